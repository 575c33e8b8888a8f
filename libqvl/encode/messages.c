/* messages.c - the JSON of messages and tools, with integers of any size.
 *
 * Job:        parse as qvl__json_parse does and write as qvl__json_dump does, but keep integers beyond 64 bits, which
 *             Python (and so the chat templates' tojson) prints digit by digit and jansson refuses.
 * Input:      untrusted text.
 * Output:     a jansson value in which such an integer is {"\xFF": "digits"}; text.
 * Invariants: nobody can send that object: "\xFF" is not UTF-8, so the parser never makes it;
 *             text without such integers is parsed once and goes through untouched.
 */
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "encode.h"

/* Python refuses to read integers of more digits (sys.int_info.default_max_str_digits). */
enum { MAX_DIGITS = 4300, MARK = 64 };

/* Length of the number at s when it is an integer that 64 bits do not hold, else 0. *whole is the number's length. */
static size_t big_integer(const char *s, size_t n, size_t *whole) {
    size_t sign = n && s[0] == '-', digits = sign, end;
    while (digits < n && s[digits] >= '0' && s[digits] <= '9') digits++;
    for (end = digits; end < n && s[end] && strchr("0123456789+-.eE", s[end]);) end++;
    *whole = end ? end : 1;
    if (end != digits || digits - sign < 19 || digits - sign > MAX_DIGITS || s[sign] == '0') return 0;
    if (digits - sign > 19) return digits;
    char copy[24];
    memcpy(copy, s, digits);
    copy[digits] = 0;
    errno = 0;
    strtoll(copy, NULL, 10);
    return errno == ERANGE ? digits : 0;
}

/* Copies text with every big integer N as {"MARK": "N"}; returns how many there were. The mark is the hash of the
 * text, which the text cannot hold. */
static size_t mark_integers(qvl__buf *b, const char *text, size_t len, const char *mark) {
    size_t found = 0, done = 0;
    for (size_t i = 0; i < len;) {
        if (text[i] == '"') {
            for (i++; i < len && text[i] != '"'; i++)
                if (text[i] == '\\') i++;
            i++;
        } else if (text[i] == '-' || (text[i] >= '0' && text[i] <= '9')) {
            size_t whole, n = big_integer(text + i, len - i, &whole);
            if (n) {
                qvl__buf_add(b, text + done, i - done);
                qvl__buf_printf(b, "{\"%s\":\"%.*s\"}", mark, (int)n, text + i);
                done = i + n;
                found++;
            }
            i += whole;
        } else {
            i++;
        }
    }
    qvl__buf_add(b, text + done, len - done);
    return found;
}

/* {"MARK": "N"} to {"\xFF": "N"}, everywhere below v. Returns the new value to put in v's place, or NULL to keep v. */
static json_t *unmark(json_t *v, const char *mark, bool *failed) {
    if (json_is_object(v)) {
        json_t *digits = json_object_get(v, mark);
        if (digits) {
            json_t *big = json_object();
            if (!big || json_object_set_nocheck(big, "\xFF", digits) < 0) *failed = true;
            return big;
        }
        for (void *it = json_object_iter(v); it; it = json_object_iter_next(v, it)) {
            json_t *big = unmark(json_object_iter_value(it), mark, failed);
            if (big) json_object_iter_set_new(v, it, big);
        }
    } else if (json_is_array(v)) {
        for (size_t i = 0; i < json_array_size(v); i++) {
            json_t *big = unmark(json_array_get(v, i), mark, failed);
            if (big) json_array_set_new(v, i, big);
        }
    }
    return NULL;
}

int qvl__messages_parse(json_t **out, const char *text, size_t len, const char *name) {
    int rc = qvl__json_parse(out, text, len, name);
    if (rc != QVL_EFORMAT) return rc;
    /* The text is wrong, or it holds a big integer. */
    qvl__sha256 s;
    uint8_t sum[32];
    char mark[MARK + 1];
    qvl__sha256_init(&s);
    qvl__sha256_add(&s, text, len);
    qvl__sha256_end(&s, sum);
    for (int i = 0; i < 32; i++) snprintf(mark + 2 * i, 3, "%02x", sum[i]);
    qvl__buf b = {0};
    size_t found = mark_integers(&b, text, len, mark);
    if (b.failed) rc = QVL_ENOMEM;
    else if (found) rc = qvl__json_parse(out, b.data, b.len, name);
    qvl__buf_free(&b);
    if (rc < 0 || !found) return rc;
    bool failed = false;
    json_t *root = unmark(*out, mark, &failed);
    if (root) { /* the text was one integer */
        json_decref(*out);
        *out = root;
    }
    if (!failed) return 0;
    json_decref(*out);
    *out = NULL;
    return qvl__fail(QVL_ENOMEM, "%s: out of memory in the JSON parser", name);
}

void qvl__messages_dump(qvl__buf *b, const json_t *v) {
    static const char open[] = "{\"\xFF\": \"";
    size_t start = b->len;
    qvl__json_dump(b, v);
    if (b->failed) return;
    char *to = b->data + start, *from = to, *end = b->data + b->len, *p;
    while ((p = memchr(from, 0xFF, (size_t)(end - from)))) {
        p -= 2; /* at the { */
        memmove(to, from, (size_t)(p - from));
        to += p - from;
        from = p + sizeof open - 1;
        size_t digits = (size_t)((char *)memchr(from, '"', (size_t)(end - from)) - from);
        memmove(to, from, digits);
        to += digits;
        from += digits + 2; /* "} */
    }
    memmove(to, from, (size_t)(end - from));
    b->len = (size_t)(to - b->data) + (size_t)(end - from);
    b->data[b->len] = 0;
}
