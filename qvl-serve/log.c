/* log.c - JSON lines.
 *
 * Job:        see log.h.
 * Input:      events.
 * Output:     lines on a file descriptor opened for appending.
 * Invariants: a line is built in memory and written by one write(2) under one lock; what a full disk or a closed pipe
 *             refuses is counted, and the number is told in the next line that gets through.
 */
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "buf.h"

static struct {
    pthread_mutex_t lock;
    int fd;
    char *path; /* NULL: stderr */
    unsigned long lost;
    atomic_int level;
    atomic_bool access, prompts;
    _Atomic double slow_ms;
} logger = {.lock = PTHREAD_MUTEX_INITIALIZER, .fd = STDERR_FILENO, .level = LOG_INFO, .access = true};

static const char *const level_names[] = {"debug", "info", "warn", "error"};

/* ---- opening ---- */

static int use_path(const char *path) {
    int fd = STDERR_FILENO;
    char *copy = NULL;
    if (path && *path) {
        fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640);
        if (fd < 0) return -1;
        if (!(copy = strdup(path))) {
            close(fd);
            errno = ENOMEM;
            return -1;
        }
    }
    pthread_mutex_lock(&logger.lock);
    int old = logger.fd;
    char *old_path = logger.path;
    logger.fd = fd;
    logger.path = copy;
    pthread_mutex_unlock(&logger.lock);
    if (old != STDERR_FILENO) close(old);
    free(old_path);
    return 0;
}

int log_open(const log_options *o) {
    if (use_path(o->path) < 0) return -1;
    atomic_store(&logger.level, (int)o->level);
    atomic_store(&logger.access, o->access);
    atomic_store(&logger.prompts, o->prompts);
    atomic_store(&logger.slow_ms, o->slow_ms);
    return 0;
}

int log_reopen(void) {
    pthread_mutex_lock(&logger.lock);
    char *path = logger.path ? strdup(logger.path) : NULL;
    bool failed = logger.path && !path;
    pthread_mutex_unlock(&logger.lock);
    if (failed) return -1;
    int rc = use_path(path);
    int e = errno;
    free(path);
    errno = e;
    return rc;
}

int log_level_parse(log_level *out, const char *word) {
    for (int i = LOG_DEBUG; i <= LOG_ERROR; i++)
        if (!strcmp(word, level_names[i])) return *out = (log_level)i, 0;
    if (!strcmp(word, "warning")) return *out = LOG_WARN, 0;
    return -1;
}

bool log_wanted(log_level level) {
    return (int)level >= atomic_load_explicit(&logger.level, memory_order_relaxed);
}

/* ---- lines ---- */

/* A text value, at most LOG_VALUE bytes of it, cut between characters. */
static void add_text(buf *b, const char *s, size_t n) {
    if (!s) {
        buf_puts(b, "null");
        return;
    }
    if (n == SIZE_MAX) n = strlen(s);
    if (n <= LOG_VALUE) {
        buf_json(b, s, n);
        return;
    }
    size_t keep = LOG_VALUE;
    for (int back = 0; back < 3 && keep && ((unsigned char)s[keep] & 0xC0) == 0x80; back++) keep--;
    buf_json(b, s, keep);
    b->len--; /* the closing quote */
    buf_printf(b, "... (%zu bytes more)\"", n - keep);
}

static void add_field(buf *b, const log_field *f) {
    buf_puts(b, ",");
    buf_json(b, f->key, strlen(f->key));
    buf_puts(b, ":");
    switch (f->type) {
    case LOG_TEXT: add_text(b, f->text, f->n); break;
    case LOG_INT: buf_printf(b, "%lld", (long long)f->integer); break;
    case LOG_REAL:
        if (isfinite(f->real)) buf_printf(b, "%.3f", f->real);
        else buf_puts(b, "null");
        break;
    default: buf_puts(b, f->integer ? "true" : "false");
    }
}

static void begin(buf *b, log_level level, const char *event, const char *request) {
    struct timespec now;
    struct tm day;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &day);
    char text[32] = "";
    strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &day);
    buf_printf(b, "{\"time\":\"%s.%03ldZ\",\"level\":\"%s\",\"event\":", text, now.tv_nsec / 1000000, level_names[level]);
    add_text(b, event, SIZE_MAX);
    if (request) add_field(b, &LOG_STR("request", request));
}

/* The whole line in one call; a signal before the first byte means trying again. */
static bool put(int fd, const buf *b) {
    ssize_t n;
    do n = write(fd, b->data, b->len);
    while (n < 0 && errno == EINTR);
    return n == (ssize_t)b->len;
}

static void end(buf *b) {
    int kept = errno; /* logging an error must not change it */
    pthread_mutex_lock(&logger.lock);
    if (logger.lost) add_field(b, &LOG_NUM("lines_lost", (int64_t)logger.lost));
    buf_puts(b, "}\n");
    if (!b->failed && put(logger.fd, b)) logger.lost = 0;
    else logger.lost++;
    pthread_mutex_unlock(&logger.lock);
    buf_free(b);
    errno = kept;
}

void log_write(log_level level, const char *event, const char *request, const log_field *fields) {
    if (!log_wanted(level)) return;
    buf b = {0};
    begin(&b, level, event, request);
    for (const log_field *f = fields; f->key; f++) add_field(&b, f);
    end(&b);
}

void log_prompt(const char *event, const char *request, const char *text, size_t n) {
    if (atomic_load(&logger.prompts)) log_event(LOG_INFO, event, request, LOG_STRN("text", text, n));
}

void log_access(const log_request *r) {
    double slow_ms = atomic_load(&logger.slow_ms);
    bool slow = slow_ms > 0 && r->total_ms > slow_ms;
    log_level level = slow ? LOG_WARN : LOG_INFO;
    if (!log_wanted(level) || (!slow && !atomic_load(&logger.access))) return;
    buf b = {0};
    begin(&b, level, slow ? "slow_request" : "request", r->request);
    const struct {
        const char *key, *text;
    } texts[] = {{"peer", r->peer}, {"method", r->method}, {"path", r->path}, {"key", r->key}, {"model", r->model},
                 {"finish_reason", r->finish_reason}, {"agent", r->agent}};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
        if (texts[i].text) add_field(&b, &LOG_STR(texts[i].key, texts[i].text));
    add_field(&b, &LOG_NUM("status", r->status));
    add_field(&b, &LOG_NUM("bytes_in", (int64_t)r->bytes_in));
    add_field(&b, &LOG_NUM("bytes_out", (int64_t)r->bytes_out));
    const struct {
        const char *key;
        double ms;
    } times[] = {{"total_ms", r->total_ms}, {"queue_ms", r->queue_ms}, {"ttft_ms", r->ttft_ms}, {"vision_ms", r->vision_ms}};
    for (size_t i = 0; i < sizeof times / sizeof times[0]; i++)
        if (times[i].ms >= 0) add_field(&b, &LOG_MS(times[i].key, times[i].ms));
    const struct {
        const char *key;
        int64_t n;
    } counts[] = {{"prompt_tokens", r->prompt_tokens}, {"cached_tokens", r->cached_tokens}, {"image_tokens", r->image_tokens},
                  {"completion_tokens", r->completion_tokens}};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        if (counts[i].n >= 0) add_field(&b, &LOG_NUM(counts[i].key, counts[i].n));
    end(&b);
}
