/* base.h - what every other part of libqvl stands on: errors, memory, mapped files, log, threads, JSON, hashes.
 *
 * Job:        the smallest common ground; nothing here knows about models.
 * Input:      calls from the other folders of libqvl.
 * Output:     error codes (negative) and a thread-local message, memory, a thread pool.
 * Invariants: mem.c is the only place that asks the system for heap memory;
 *             every function that can fail returns 0 or a negative QVL_E* and has set the message;
 *             nothing here prints, exits or aborts.
 */
#ifndef QVL__BASE_H
#define QVL__BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../../include/qvl.h"

#if defined(__GNUC__)
#define QVL__PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define QVL__PRINTF(f, a)
#endif

/* ---- error.c ---- */

/* Sets the calling thread's message (no allocation, cut at 511 bytes) and returns code, so that
 * "return qvl__fail(QVL_EINVAL, ...)" is the one way to fail. */
int qvl__fail(int code, const char *fmt, ...) QVL__PRINTF(2, 3);

/* Puts "where: " before the message that is already set and returns code. */
int qvl__context(int code, const char *fmt, ...) QVL__PRINTF(2, 3);

/* ---- mem.c ---- All return NULL on failure with the QVL_ENOMEM message set. free takes NULL. */

void *qvl__malloc(size_t size);
void *qvl__calloc(size_t count, size_t size); /* checks count * size */
void *qvl__realloc(void *p, size_t size);
void *qvl__array(void *p, size_t count, size_t size); /* realloc to count * size, checked */
char *qvl__strndup(const char *s, size_t n);          /* always terminated */
void qvl__free(void *p);

/* Large zeroed regions on page boundaries (weights, KV, workspaces); released with qvl__pages_free(p, size). */
void *qvl__pages(size_t size);
void qvl__pages_free(void *p, size_t size);

/* Handles alive right now; qvl_set_allocator refuses while any is. */
void qvl__handle_born(void);
void qvl__handle_gone(void);

/* A growing byte string. data is always terminated once anything was added; add after a failed add is harmless:
 * the first failure is kept in failed. */
typedef struct {
    char *data;
    size_t len, cap;
    bool failed;
} qvl__buf;
void qvl__buf_add(qvl__buf *b, const void *data, size_t n);
bool qvl__buf_reserve(qvl__buf *b, size_t n); /* room for n more bytes, so that adding them takes no memory */
void qvl__buf_puts(qvl__buf *b, const char *s);
void qvl__buf_printf(qvl__buf *b, const char *fmt, ...) QVL__PRINTF(2, 3);
void qvl__buf_free(qvl__buf *b);

/* ---- map.c ---- */

typedef struct {
    const uint8_t *data;
    size_t size;
} qvl__map;
/* Maps a regular file read-only. Empty files map to size 0. Errors: QVL_EIO naming the path. */
int qvl__map_open(qvl__map *m, const char *path);
void qvl__map_close(qvl__map *m);
/* Tells the system that the pages of [offset, offset + size) are no longer needed in memory. */
void qvl__map_forget(const qvl__map *m, size_t offset, size_t size);
/* Asks for huge pages when the file is read into memory; before anything of it was. Where the kernel has none for files,
 * nothing changes. */
void qvl__map_huge(const qvl__map *m);
/* Reads a whole file (at most limit bytes) into memory of qvl__malloc, with a zero after the last byte. */
int qvl__read_file(const char *path, size_t limit, char **data, size_t *size);
/* Writes n bytes of data to fd, from byte at of the file on; path is what an error names. */
int qvl__write_at(int fd, const char *path, const void *data, uint64_t n, uint64_t at);
bool qvl__file_exists(const char *path);

/* ---- log.c ---- */

void qvl__log(int level, const char *fmt, ...) QVL__PRINTF(2, 3);

/* ---- threads.c ---- */

typedef struct qvl__pool qvl__pool;
/* threads = 0: as many as the process may run on. The calling thread is one of them. */
int qvl__pool_new(qvl__pool **out, int threads);
void qvl__pool_free(qvl__pool *p);
int qvl__pool_threads(const qvl__pool *p);
/* Calls fn(ctx, i, worker) once for every i in [0, tasks), in any order, on any of the threads; returns when all are
 * done. worker is in [0, threads). Results must not depend on who does what. [any thread; calls queue up] */
void qvl__pool_run(qvl__pool *p, int tasks, void (*fn)(void *ctx, int task, int worker), void *ctx);

/* Milliseconds of a clock that only goes forward. */
double qvl__now_ms(void);

/* ---- json.c: read-only view over jansson ---- */

struct json_t;
/* Parses text; on error QVL_EFORMAT with line and column and the given name of the source. */
int qvl__json_parse(struct json_t **out, const char *text, size_t len, const char *name);
int qvl__json_file(struct json_t **out, const char *path); /* at most 256 MiB */
/* Python's json.dumps(v, ensure_ascii=False): ", " and ": ", insertion order; appended to b. */
int qvl__json_dump(qvl__buf *b, const struct json_t *v);
/* A string as it stands inside a JSON document, quotes included, appended to b. */
void qvl__json_quote(qvl__buf *b, const char *s, size_t n);

/* ---- hash.c ---- */

/* SHA-256 (FIPS 180-4): identity of weights, images and cache keys. */
typedef struct {
    uint32_t h[8];
    uint64_t bytes;
    uint8_t block[64];
} qvl__sha256;
void qvl__sha256_init(qvl__sha256 *s);
void qvl__sha256_add(qvl__sha256 *s, const void *data, size_t n);
void qvl__sha256_end(qvl__sha256 *s, uint8_t out[32]);

/* ---- options (api/options.c): typed reads used by every folder; o may be NULL, which gives the default ---- */

int64_t qvl__opt_i64(const qvl_options *o, const char *name);
double qvl__opt_f64(const qvl_options *o, const char *name);
const char *qvl__opt_str(const qvl_options *o, const char *name); /* "" when unset */
bool qvl__opt_is_set(const qvl_options *o, const char *name);     /* set by the caller, not defaulted */
void qvl__opt_progress(const qvl_options *o, qvl_progress_fn *fn, void **ud);

#endif
