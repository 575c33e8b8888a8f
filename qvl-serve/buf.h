/* buf.h - a growing byte string, the server's one way to build text.
 *
 * Job:        append bytes, formatted text and JSON strings.
 * Input:      bytes of any kind; buf_json takes untrusted text.
 * Output:     data (always terminated once anything was added) and len.
 * Invariants: a failed allocation sets failed and leaves what was there; every later call is harmless, so a caller
 *             checks once at the end. An all-zero buf is an empty one.
 */
#ifndef SERVE_BUF_H
#define SERVE_BUF_H

#include <stdbool.h>
#include <stddef.h>

typedef struct {
    char *data;
    size_t len, cap;
    bool failed;
} buf;

void buf_add(buf *b, const void *data, size_t n);
void buf_puts(buf *b, const char *s);
void buf_printf(buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* n bytes as a JSON string with its quotes. Bytes that are not UTF-8 become U+FFFD, so the output always is. */
void buf_json(buf *b, const char *s, size_t n);
/* Takes the first n bytes away. */
void buf_drop(buf *b, size_t n);
void buf_clear(buf *b); /* keeps the memory and resets failed */
void buf_free(buf *b);

#endif
