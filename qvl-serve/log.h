/* log.h - the server's log: one JSON object a line.
 *
 * Job:        write events with typed fields, access lines and slow requests.
 * Input:      calls from any thread; values from clients, which are never trusted.
 * Output:     lines to stderr or a file: {"time":"2026-01-02T03:04:05.678Z","level":"info","event":"listening",...}
 * Invariants: a line is one write(2), never mixed with another's; every line is valid JSON in UTF-8;
 *             a text value longer than LOG_VALUE bytes is cut and says so; nothing here can fail the caller;
 *             what people wrote (prompts, answers) is only ever passed to log_prompt, which is silent unless asked for.
 */
#ifndef SERVE_LOG_H
#define SERVE_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LOG_VALUE 2048

typedef enum { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR } log_level;

typedef struct {
    const char *path; /* NULL or "": stderr */
    log_level level;  /* less is left out */
    double slow_ms;   /* requests that took longer are warnings "slow_request"; 0: none */
    bool access;      /* write access lines */
    bool prompts;     /* log_prompt writes */
} log_options;

/* Until the first log_open the log goes to stderr at level info. 0, or -1 with errno when path cannot be opened (then
 * the log goes on where it was). Call it at start and on reload, from one thread. */
int log_open(const log_options *o);
/* Opens the path again (after logrotate moved the file). 0, or -1 with errno. */
int log_reopen(void);
/* "debug", "info", "warn" ("warning"), "error" to *out; -1 for another word. */
int log_level_parse(log_level *out, const char *word);
bool log_wanted(log_level level);

typedef struct {
    const char *key; /* NULL ends the list */
    enum { LOG_TEXT, LOG_INT, LOG_REAL, LOG_BOOL } type;
    const char *text;
    size_t n;
    int64_t integer;
    double real;
} log_field;

#define LOG_STR(k, v) ((log_field){.key = (k), .type = LOG_TEXT, .text = (v), .n = SIZE_MAX}) /* NULL is null */
#define LOG_STRN(k, v, len) ((log_field){.key = (k), .type = LOG_TEXT, .text = (v), .n = (len)})
#define LOG_NUM(k, v) ((log_field){.key = (k), .type = LOG_INT, .integer = (v)})
#define LOG_MS(k, v) ((log_field){.key = (k), .type = LOG_REAL, .real = (v)}) /* three decimals; NaN and infinite: null */
#define LOG_FLAG(k, v) ((log_field){.key = (k), .type = LOG_BOOL, .integer = (v)})

/* One event. request may be NULL. Use: log_event(LOG_INFO, "listening", NULL, LOG_STR("host", h), LOG_NUM("port", p)) */
void log_write(log_level level, const char *event, const char *request, const log_field *fields);
#define log_event(level, event, ...) log_event_(level, event, __VA_ARGS__, (log_field){.key = NULL})
#define log_event_(level, event, request, ...) \
    log_write((level), (event), (request), (const log_field[]){__VA_ARGS__})

/* What a client wrote or got, when option prompts is on: event "prompt" or "answer". */
void log_prompt(const char *event, const char *request, const char *text, size_t n);

typedef struct {
    const char *request, *peer, *method, *path, *key, *model, *finish_reason, *agent; /* any may be NULL: left out */
    int status;
    uint64_t bytes_in, bytes_out;
    double total_ms, queue_ms, ttft_ms, vision_ms; /* NaN or < 0: left out */
    int64_t prompt_tokens, cached_tokens, image_tokens, completion_tokens; /* < 0: left out */
} log_request;
/* The access line of a finished request (event "request"; "slow_request" at level warn above slow_ms). path without
 * its query, which may hold secrets. */
void log_access(const log_request *r);

#endif
