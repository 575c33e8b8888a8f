/* main.c - starts everything, and ends it in order.
 *
 * Job:        configuration, models, sockets, signals; the loop; the end.
 * Input:      the command line.
 * Output:     "listening on URL" on stdout once every model is there; the log; an exit code: 0 after SIGTERM or SIGINT, 1 when
 *             it cannot start, 2 for a wrong command line or configuration.
 * Invariants: SIGTERM stops taking requests and lets running ones end (life.drain_ms); a second one ends at once;
 *             SIGHUP reads keys, certificates, limits and the log's settings again, all or nothing.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "fetch.h"
#include "http.h"
#include "image.h"
#include "model.h"
#include "server.h"
#include "task.h"
#include "ws.h"

static int open_log(const config *c) {
    log_options o = {.path = c->log_file, .slow_ms = c->log_slow_ms, .access = c->log_access, .prompts = c->log_prompts};
    if (log_level_parse(&o.level, c->log_level)) o.level = LOG_INFO;
    return log_open(&o);
}

/* ---- signals ---- */
static void reload(server *s) {
    char err[512];
    config *c = NULL;
    if (config_reload(&c, s->argc, s->argv, err, sizeof err)) {
        log_event(LOG_ERROR, "reload_failed", NULL, LOG_STR("reason", err));
        return;
    }
    if ((c->keys[0] != 0) != (s->keys != NULL)) {
        log_event(LOG_ERROR, "reload_failed", NULL, LOG_STR("reason", "auth.keys can be changed, but not be switched on or off while the server runs"));
        config_free(c);
        return;
    }
    if (s->keys && auth_reload(s->keys, c->keys, err, sizeof err)) {
        log_event(LOG_ERROR, "reload_failed", NULL, LOG_STR("reason", err));
        config_free(c);
        return;
    }
    if (strcmp(c->host, s->config->host) != 0 || c->port != s->config->port || c->models_count != s->config->models_count)
        log_event(LOG_WARN, "reload_partly", NULL, LOG_STR("reason", "host, port and models need a restart (or POST /admin/models)"));
    if (open_log(c)) log_event(LOG_ERROR, "log_not_opened", NULL, LOG_STR("file", c->log_file));
    /* What workers may be reading lives on in the old one: it is small and reloads are rare, so it is kept until the end. */
    c->previous = s->config;
    s->config = c;
    http_reload(s);
    log_event(LOG_INFO, "reloaded", NULL, LOG_NUM("keys", s->keys ? (int64_t)auth_count(s->keys) : 0));
}

static void stop_now(server *s) {
    if (s->stopped) return;
    s->stopped = true;
    uv_stop(&s->loop);
}

static void on_signal(uv_signal_t *h, int number) {
    server *s = h->data;
    if (number == SIGHUP) {
        reload(s);
        return;
    }
    if (s->draining) {
        stop_now(s);
        return;
    }
    s->draining = true;
    s->drain_until = server_now() + s->config->drain_ms / 1e3;
    log_event(LOG_INFO, "draining", NULL, LOG_NUM("requests", s->tasks_count), LOG_NUM("ms", s->config->drain_ms));
    if (!s->tasks_count) ws_goodbye();
}

/* ---- once a second ---- */
static void drain(server *s) {
    static double goodbye;
    double now = server_now();
    if (s->tasks_count && now < s->drain_until) return;
    if (s->tasks_count && !goodbye)
        for (task *t = s->tasks, *next; t; t = next) {
            next = t->next;
            task_cancel(t);
        }
    if (!goodbye) {
        goodbye = now;
        ws_goodbye();
        log_event(LOG_INFO, "drained", NULL, LOG_NUM("left", s->tasks_count));
    }
    if ((!s->tasks_count && now - goodbye > 0.5) || now - goodbye > 3) stop_now(s);
}

static void say_listening(server *s) {
    static bool said;
    const char *why = NULL;
    if (said) return;
    if (models_failed(s, &why)) {
        fprintf(stderr, "qvl-serve: %s\n", why);
        s->failed = true;
        stop_now(s);
        return;
    }
    if (!models_ready(s)) return;
    said = true;
    bool six = strchr(s->config->host, ':') != NULL;
    printf("listening on http%s://%s%s%s:%d\n", s->config->tls_certificate[0] ? "s" : "", six ? "[" : "", s->config->host, six ? "]" : "", s->port);
    fflush(stdout);
}

static void on_tick(uv_timer_t *h) {
    server *s = h->data;
    static unsigned ticks;
    static bool stuck_said;
    say_listening(s);
    if (s->draining) drain(s);
    if (++ticks % 5) return; /* the rest once a second */
    http_tick(s);
    images_tick(s);
    models_tick(s);
    const char *stuck = NULL;
    bool is = models_stuck(s, s->config->watchdog_ms, &stuck);
    if (is && !stuck_said) log_event(LOG_ERROR, "engine_stuck", NULL, LOG_STR("model", stuck), LOG_NUM("watchdog_ms", s->config->watchdog_ms));
    stuck_said = is;
}

/* ---- start and end ---- */
static int listen_to_signals(server *s) {
    static const int numbers[] = {SIGTERM, SIGINT, SIGHUP};
    uv_signal_t *const handles[] = {&s->term, &s->interrupt, &s->hangup};
    for (int i = 0; i < 3; i++) {
        handles[i]->data = s;
        if (uv_signal_init(&s->loop, handles[i]) || uv_signal_start(handles[i], on_signal, numbers[i])) return -1;
    }
    s->tick.data = s;
    return uv_timer_init(&s->loop, &s->tick) || uv_timer_start(&s->tick, on_tick, 200, 200) ? -1 : 0;
}

static int start(server *s, char *err, size_t err_size) {
    const config *c = s->config;
    if (open_log(c)) {
        snprintf(err, err_size, "log.file: %s cannot be opened", c->log_file);
        return -1;
    }
    if (c->keys[0] && auth_load(&s->keys, c->keys, err, err_size)) return -1;
    if (!(s->meters = meters_new(QVL_VERSION)) || images_start(s) || fetch_start() || listen_to_signals(s)) {
        snprintf(err, err_size, "no memory to start");
        return -1;
    }
    if (http_start(s, err, err_size) || models_start(s, err, err_size)) return -1;
    log_event(LOG_INFO, "started", NULL, LOG_STR("version", QVL_VERSION), LOG_STR("host", c->host), LOG_NUM("port", s->port),
              LOG_NUM("models", c->models_count), LOG_NUM("keys", s->keys ? (int64_t)auth_count(s->keys) : 0));
    if (!s->keys && strcmp(c->host, "127.0.0.1") != 0 && strcmp(c->host, "localhost") != 0 && strcmp(c->host, "::1") != 0)
        log_event(LOG_WARN, "open_to_all", NULL, LOG_STR("reason", "the server listens beyond this machine and asks for no key (auth.keys)"));
    return 0;
}

/* libwebsockets closes its own handles in callbacks of the loop. */
static void pump(server *s) {
    for (int i = 0; i < 100 && uv_run(&s->loop, UV_RUN_NOWAIT); i++) {}
}

static void end(server *s) {
    /* connections first: their tasks are abandoned; then workers, engines and what is left of the tasks */
    if (s->lws) lws_context_destroy(s->lws);
    while (s->tasks) {
        task *t = s->tasks;
        if (t->working) uv_run(&s->loop, UV_RUN_ONCE);
        else task_drop(t);
    }
    models_stop(s);
    uv_handle_t *const own[] = {(uv_handle_t *)&s->tick, (uv_handle_t *)&s->term, (uv_handle_t *)&s->interrupt, (uv_handle_t *)&s->hangup};
    for (size_t i = 0; s->tick.data && i < sizeof own / sizeof *own; i++) uv_close(own[i], NULL);
    pump(s);
    uv_loop_close(&s->loop);
    images_stop(s);
    meters_free(s->meters);
    auth_free(s->keys);
    log_event(LOG_INFO, "stopped", NULL, LOG_NUM("code", s->failed));
    for (config *c = s->config, *p; c; c = p) {
        p = c->previous;
        config_free(c);
    }
}

/* Bodies of megabytes come and go on several threads: without this each thread's heap keeps its own peak for good.
 * Naming the thresholds also stops glibc from raising them, so large bodies go back to the system when they are freed. */
static void tame_heap(void) {
#ifdef __GLIBC__
    mallopt(M_ARENA_MAX, 2);
    mallopt(M_MMAP_THRESHOLD, 64 << 10);
    mallopt(M_TRIM_THRESHOLD, 64 << 10);
#endif
}

int main(int argc, char **argv) {
    static server s;
    tame_heap();
    char err[1024] = "";
    signal(SIGPIPE, SIG_IGN);
    int rc = config_main(&s.config, argc, argv, err, sizeof err);
    if (rc == CONFIG_EXIT_OK) return 0;
    if (rc == CONFIG_EXIT_USAGE) {
        fprintf(stderr, "qvl-serve: %s\n", err);
        return 2;
    }
    s.argc = argc;
    s.argv = argv;
    if (uv_loop_init(&s.loop)) return 1;
    if (start(&s, err, sizeof err)) {
        fprintf(stderr, "qvl-serve: %s\n", err);
        s.failed = true;
    } else {
        uv_run(&s.loop, UV_RUN_DEFAULT);
    }
    end(&s);
    return s.failed ? 1 : 0;
}
