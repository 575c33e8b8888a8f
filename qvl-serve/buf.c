/* buf.c - a growing byte string.
 *
 * Job:        see buf.h.
 * Input:      bytes.
 * Output:     bytes, terminated.
 * Invariants: sizes are checked before they are added; growth doubles, so appending is linear.
 */
#include "buf.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Room for n more bytes and the end. */
static bool grow(buf *b, size_t n) {
    if (b->failed) return false;
    if (n >= SIZE_MAX / 2 - b->len) {
        b->failed = true;
        return false;
    }
    if (b->len + n < b->cap) return true;
    size_t cap = b->cap ? b->cap : 64;
    while (cap <= b->len + n) cap *= 2;
    char *p = realloc(b->data, cap);
    if (!p) {
        b->failed = true;
        return false;
    }
    b->data = p;
    b->cap = cap;
    return true;
}

void buf_add(buf *b, const void *data, size_t n) {
    if (!grow(b, n)) return;
    if (n) memcpy(b->data + b->len, data, n);
    b->len += n;
    b->data[b->len] = 0;
}

void buf_puts(buf *b, const char *s) {
    buf_add(b, s, strlen(s));
}

void buf_printf(buf *b, const char *fmt, ...) {
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n < 0) b->failed = true;
    else if (grow(b, (size_t)n)) {
        vsnprintf(b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
    }
    va_end(again);
}

/* Bytes of the UTF-8 character at s (n > 0 bytes left), or 0 when there is none: overlong forms, surrogates and numbers
 * above U+10FFFF are none (RFC 3629, section 4). */
static size_t utf8_length(const unsigned char *s, size_t n) {
    unsigned char c = s[0], low = 0x80, high = 0xBF;
    size_t len;
    if (c < 0x80) return 1;
    if (c >= 0xC2 && c <= 0xDF) len = 2;
    else if (c >= 0xE0 && c <= 0xEF) len = 3;
    else if (c >= 0xF0 && c <= 0xF4) len = 4;
    else return 0;
    if (n < len) return 0;
    if (c == 0xE0) low = 0xA0;
    if (c == 0xED) high = 0x9F;
    if (c == 0xF0) low = 0x90;
    if (c == 0xF4) high = 0x8F;
    if (s[1] < low || s[1] > high) return 0;
    for (size_t i = 2; i < len; i++)
        if ((s[i] & 0xC0) != 0x80) return 0;
    return len;
}

void buf_json(buf *b, const char *text, size_t n) {
    const unsigned char *s = (const unsigned char *)text;
    buf_add(b, "\"", 1);
    size_t from = 0, i = 0;
    while (i < n) {
        size_t len = utf8_length(s + i, n - i);
        if (len && s[i] >= 0x20 && s[i] != '"' && s[i] != '\\' && s[i] != 0x7F) {
            i += len;
            continue;
        }
        buf_add(b, s + from, i - from);
        switch (len ? s[i] : 0x100) {
        case 0x100: buf_puts(b, "\xEF\xBF\xBD"); break;
        case '"': buf_puts(b, "\\\""); break;
        case '\\': buf_puts(b, "\\\\"); break;
        case '\n': buf_puts(b, "\\n"); break;
        case '\r': buf_puts(b, "\\r"); break;
        case '\t': buf_puts(b, "\\t"); break;
        default: buf_printf(b, "\\u%04x", s[i]);
        }
        from = ++i;
    }
    buf_add(b, s + from, n - from);
    buf_add(b, "\"", 1);
}

void buf_drop(buf *b, size_t n) {
    if (!n || !b->data) return;
    if (n > b->len) n = b->len;
    memmove(b->data, b->data + n, b->len - n);
    b->len -= n;
    b->data[b->len] = 0;
}

void buf_clear(buf *b) {
    b->len = 0;
    b->failed = false;
    if (b->data) b->data[0] = 0;
}

void buf_free(buf *b) {
    free(b->data);
    *b = (buf){0};
}
