/* config.h - what the server is told: the file, the environment and the command line, in one structure.
 *
 * Job:        defaults, then config.yaml, then QVL_SERVE_* of the environment, then the command line; checked as a whole.
 * Input:      argv and environ; a YAML file (libyaml). docs/config.example.yaml shows every key with its default.
 * Output:     a config, or one message that names the file, the line and the key.
 * Invariants: an unknown key or a value out of range is an error, never ignored; a config that was read is never changed:
 *             a reload reads a new one and the server takes over what can change while it runs.
 */
#ifndef SERVE_CONFIG_H
#define SERVE_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    char *name;    /* what requests ask for */
    char *path;    /* Hugging Face directory or packed file */
    char **aliases; /* further names of it */
    unsigned aliases_count;
    char **options; /* further options of scope model and engine as "name=value" (docs/options.md), checked by libqvl */
    unsigned options_count;
} config_model;

typedef struct config {
    struct config *previous; /* the one that a reload replaced */
    char *host;
    uint16_t port;          /* 0: any free one; the log and stdout say which */
    char *tls_certificate;  /* PEM chain; with tls_key: HTTPS and HTTP/2. "": plain HTTP */
    char *tls_key;
    char *keys;             /* file of API keys (auth.h); "": no keys asked for */
    char **cors;            /* origins that browsers may call from; "*" is all */
    unsigned cors_count;

    config_model *models;
    unsigned models_count;

    /* limits; bytes are plain numbers in the structure, "64MiB" in the file */
    uint64_t max_body;          /* of a request's body */
    uint32_t max_connections;
    uint32_t max_queue;         /* requests that wait for their turn, for each model; more get 429 */
    uint64_t max_queue_bytes;   /* bodies and pixels of requests that were not yet taken by an engine */
    uint32_t max_images;        /* in one request, video frames apart */
    uint32_t max_frames;        /* frames of one request's videos */
    uint64_t max_image_pixels;
    uint64_t max_image_bytes;
    uint32_t max_tokens;        /* most tokens of one answer; 0: what the context holds */
    uint32_t default_max_tokens; /* of requests that do not say; 0: what the context holds */
    uint64_t send_buffer;       /* what may wait to be read by one slow client before its request is cancelled */
    uint32_t deadline_ms;       /* of every request; 0: none */
    uint64_t image_store;       /* bytes of images kept by /v1/images */
    uint32_t image_ttl_s;       /* after which they are forgotten */

    /* remote images: off while fetch_allow is empty */
    char **fetch_allow;         /* host names, ".example.com" for all below one, "*" for all public hosts */
    unsigned fetch_allow_count;
    uint64_t fetch_max_bytes;
    uint32_t fetch_timeout_ms;

    char *log_file;             /* "": stderr */
    char *log_level;            /* debug, info, warn, error */
    bool log_access;
    bool log_prompts;           /* writes what people asked and got: off unless told */
    uint32_t log_slow_ms;

    uint32_t drain_ms;          /* SIGTERM: running requests may take this long to end */
    uint32_t watchdog_ms;       /* an engine step that takes longer makes /health say "stuck" */
    uint32_t keepalive_s;       /* a comment line on streams that are silent this long */
    uint32_t idle_s;            /* a connection that sends nothing for so long while it owes a request is closed */

    char *file;                 /* the file that was read, or NULL */
    struct block *memory;       /* config.c's: all of the above */
} config;

enum { CONFIG_RUN = 0, CONFIG_EXIT_OK = 1, CONFIG_EXIT_USAGE = 2 };

/* Reads everything. CONFIG_RUN: *out is set. CONFIG_EXIT_OK: --help, --version, --check-config or --new-key did their
 * work and the text is on stdout. CONFIG_EXIT_USAGE: err says what is wrong and the caller prints it. */
int config_main(config **out, int argc, char **argv, char *err, size_t err_size);
/* The same sources again with the same argv (SIGHUP). 0, or -1 with err. */
int config_reload(config **out, int argc, char **argv, char *err, size_t err_size);
void config_free(config *c);

#endif
