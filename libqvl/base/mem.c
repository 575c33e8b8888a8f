/* mem.c - the one door to heap memory.
 *
 * Job:        malloc and friends through the user's hook; big zeroed page regions; a growing byte string.
 * Input:      sizes, checked for overflow here.
 * Output:     memory, or NULL with QVL_ENOMEM set.
 * Invariants: no other file of libqvl calls malloc, calloc, realloc, strdup or free (tests/lint/symbols.sh);
 *             the hook can only change while no handle is alive.
 */
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base.h"

static void *system_malloc(void *ud, size_t n) { (void)ud; return malloc(n); }
static void *system_realloc(void *ud, void *p, size_t n) { (void)ud; return realloc(p, n); }
static void system_free(void *ud, void *p) { (void)ud; free(p); }

static qvl_allocator hook = {sizeof(qvl_allocator), NULL, system_malloc, system_realloc, system_free};
static atomic_long handles;

void qvl__handle_born(void) { atomic_fetch_add(&handles, 1); }
void qvl__handle_gone(void) { atomic_fetch_sub(&handles, 1); }

int qvl_set_allocator(const qvl_allocator *a) {
    if (atomic_load(&handles) != 0)
        return qvl__fail(QVL_EBUSY, "qvl_set_allocator: %ld handles are alive; free them first", atomic_load(&handles));
    if (!a) {
        hook = (qvl_allocator){sizeof hook, NULL, system_malloc, system_realloc, system_free};
        return 0;
    }
    if (a->size < sizeof hook || !a->malloc_fn || !a->realloc_fn || !a->free_fn)
        return qvl__fail(QVL_EINVAL, "qvl_set_allocator: size must be sizeof(qvl_allocator) and all three functions set");
    hook = *a;
    return 0;
}

static void *out_of_memory(size_t size) {
    qvl__fail(QVL_ENOMEM, "out of memory: %zu bytes could not be allocated", size);
    return NULL;
}

void *qvl__malloc(size_t size) {
    void *p = hook.malloc_fn(hook.ud, size ? size : 1);
    return p ? p : out_of_memory(size);
}

static bool product(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }

void *qvl__calloc(size_t count, size_t size) {
    size_t n;
    if (!product(count, size, &n)) return out_of_memory(SIZE_MAX);
    void *p = qvl__malloc(n);
    if (p) memset(p, 0, n);
    return p;
}

void *qvl__realloc(void *p, size_t size) {
    void *q = hook.realloc_fn(hook.ud, p, size ? size : 1);
    return q ? q : out_of_memory(size);
}

void *qvl__array(void *p, size_t count, size_t size) {
    size_t n;
    if (!product(count, size, &n)) return out_of_memory(SIZE_MAX);
    return qvl__realloc(p, n);
}

char *qvl__strndup(const char *s, size_t n) {
    if (n == SIZE_MAX) return out_of_memory(n);
    char *p = qvl__malloc(n + 1);
    if (!p) return NULL;
    memcpy(p, s, n);
    p[n] = 0;
    return p;
}

void qvl__free(void *p) {
    if (p) hook.free_fn(hook.ud, p);
}

void qvl_free(void *p) { qvl__free(p); }

void *qvl__pages(size_t size) {
    if (size == 0) size = 1;
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return out_of_memory(size);
    if (size >= (size_t)4 << 20) madvise(p, size, MADV_HUGEPAGE); /* fewer TLB misses where weights are streamed */
    return p;
}

void qvl__pages_free(void *p, size_t size) {
    if (p) munmap(p, size ? size : 1);
}

/* Room for n more bytes and a terminator. */
static bool grow(qvl__buf *b, size_t n) {
    if (b->failed) return false;
    if (n >= SIZE_MAX / 2 - b->len) {
        b->failed = true;
        out_of_memory(n);
        return false;
    }
    size_t need = b->len + n + 1;
    if (need <= b->cap) return true;
    size_t cap = b->cap ? b->cap : 64;
    while (cap < need) cap *= 2;
    char *p = qvl__realloc(b->data, cap);
    if (!p) {
        b->failed = true;
        return false;
    }
    b->data = p;
    b->cap = cap;
    return true;
}

bool qvl__buf_reserve(qvl__buf *b, size_t n) { return grow(b, n); }

void qvl__buf_add(qvl__buf *b, const void *data, size_t n) {
    if (!grow(b, n)) return;
    if (n) memcpy(b->data + b->len, data, n);
    b->len += n;
    b->data[b->len] = 0;
}

void qvl__buf_puts(qvl__buf *b, const char *s) { qvl__buf_add(b, s, strlen(s)); }

void qvl__buf_printf(qvl__buf *b, const char *fmt, ...) {
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n >= 0 && grow(b, (size_t)n)) {
        vsnprintf(b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
    }
    va_end(again);
}

void qvl__buf_free(qvl__buf *b) {
    qvl__free(b->data);
    *b = (qvl__buf){0};
}
