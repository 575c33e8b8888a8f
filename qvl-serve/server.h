/* server.h - what the parts of qvl-serve share.
 *
 * Job:        one structure of everything that lives as long as the process, and the few words used everywhere.
 * Input:      a checked config.
 * Output:     -
 * Invariants: everything here belongs to the loop's thread unless it says otherwise; the loop never waits.
 *
 * The way of a request: http.c or ws.c (bytes to a body) -> route.c (who may ask what) -> task.c (its life) -> openai.c
 * (JSON to prompt and options, on a worker) -> model.c (the engine's thread) -> answer.c (tokens to text, reasoning, tool
 * calls) -> chunk.c (to JSON) -> http.c or ws.c (out).
 */
#ifndef SERVE_SERVER_H
#define SERVE_SERVER_H

#include <libwebsockets.h>
#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "auth.h"
#include "buf.h"
#include "config.h"
#include "id.h"
#include "log.h"
#include "meters.h"

typedef struct models models;
typedef struct images images;
typedef struct task task;

typedef struct server {
    config *config;
    int argc; /* to read the configuration again */
    char **argv;
    uv_loop_t loop;
    uv_timer_t tick; /* once a second */
    uv_signal_t term, interrupt, hangup;
    struct lws_context *lws;
    struct lws_vhost *vhost;
    auth *keys; /* NULL: nobody is asked for one */
    meters *meters;
    models *models;
    images *images;
    task *tasks;          /* all that live */
    unsigned tasks_count; /* and their number */
    uint64_t held_bytes;  /* bodies and pictures of those that no engine has taken yet */
    bool draining, stopped, failed;
    double drain_until; /* seconds of server_now */
    int port;
} server;

/* Seconds of a clock that only goes forward. [any thread] */
static inline double server_now(void) { return (double)uv_hrtime() / 1e9; }

#endif
