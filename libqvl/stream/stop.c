/* stop.c - stop strings in a text that comes in pieces.
 *
 * Job:        find the first stop string; hold back what may be the beginning of one.
 * Input:      the option "stop" as JSON; pieces of text of any length.
 * Output:     text that is safe to show; whether a stop string came.
 * Invariants: every byte is looked at once for every stop string (Knuth, Morris, Pratt 1977), so a hostile stop string
 *             costs no more than another; what is held back is always a beginning of a stop string, so it needs no copy.
 */
#include <jansson.h>
#include <string.h>

#include "stream.h"

/* fall for s->text, s->len. */
static int prepare(struct qvl__stop_string *s) {
    s->fall = qvl__array(NULL, s->len + 1, sizeof *s->fall);
    if (!s->fall) return QVL_ENOMEM;
    s->fall[0] = 0;
    s->fall[1] = 0;
    for (size_t k = 1; k < s->len; k++) {
        uint32_t f = s->fall[k];
        while (f && s->text[f] != s->text[k]) f = s->fall[f];
        s->fall[k + 1] = f + (s->text[f] == s->text[k]);
    }
    return 0;
}

static int add_string(qvl__stop *s, const json_t *v, size_t i) {
    size_t n = json_string_length(v);
    if (!json_is_string(v)) return qvl__fail(QVL_EINVAL, "option stop: entry %zu is not a string", i);
    if (n == 0) return qvl__fail(QVL_EINVAL, "option stop: entry %zu is empty; leave it out", i);
    if (n > UINT32_MAX / 2) return qvl__fail(QVL_ELIMIT, "option stop: entry %zu has %zu bytes", i, n);
    struct qvl__stop_string *to = &s->stops[s->n++];
    to->len = n;
    to->text = qvl__strndup(json_string_value(v), n);
    return to->text ? prepare(to) : QVL_ENOMEM;
}

int qvl__stop_init(qvl__stop *s, const char *json) {
    memset(s, 0, sizeof *s);
    if (!*json) return 0;
    /* One string is written as "text"; the parser takes arrays and objects. */
    qvl__buf list = {0};
    bool bare = json[strspn(json, " \t\r\n")] == '"';
    qvl__buf_puts(&list, bare ? "[" : "");
    qvl__buf_puts(&list, json);
    qvl__buf_puts(&list, bare ? "]" : "");
    json_t *v = NULL;
    int rc = list.failed ? QVL_ENOMEM : qvl__json_parse(&v, list.data, list.len, "option stop");
    qvl__buf_free(&list);
    if (rc == QVL_EFORMAT) rc = qvl__context(QVL_EINVAL, "a JSON string or array of strings is wanted");
    if (rc == 0 && (!json_is_array(v) || (bare && json_array_size(v) != 1)))
        rc = qvl__fail(QVL_EINVAL, "option stop: a string or an array of strings is wanted");
    if (rc == 0 && json_array_size(v) > QVL__MAX_STOPS)
        rc = qvl__fail(QVL_EINVAL, "option stop: %zu strings; at most %d", json_array_size(v), QVL__MAX_STOPS);
    for (size_t i = 0; rc == 0 && i < json_array_size(v); i++) rc = add_string(s, json_array_get(v, i), i);
    json_decref(v);
    if (rc < 0) qvl__stop_free(s);
    return rc;
}

void qvl__stop_free(qvl__stop *s) {
    for (int i = 0; i < s->n; i++) {
        qvl__free(s->stops[i].text);
        qvl__free(s->stops[i].fall);
    }
    memset(s, 0, sizeof *s);
}

/* The stop string of which the answer's end is the longest beginning; that beginning is what is held back. */
static const struct qvl__stop_string *held(const qvl__stop *s) {
    const struct qvl__stop_string *h = NULL;
    for (int i = 0; i < s->n; i++)
        if (s->stops[i].matched && (!h || s->stops[i].matched > h->matched)) h = &s->stops[i];
    return h;
}

bool qvl__stop_add(qvl__stop *s, const char *text, size_t n, qvl__buf *out) {
    const struct qvl__stop_string *before = held(s);
    size_t n_before = before ? before->matched : 0, used = 0, cut = 0;
    while (used < n && !cut) {
        char c = text[used++];
        for (int i = 0; i < s->n; i++) {
            struct qvl__stop_string *t = &s->stops[i];
            while (t->matched && t->text[t->matched] != c) t->matched = t->fall[t->matched];
            t->matched += t->text[t->matched] == c;
            if (t->matched == t->len && t->len > cut) cut = t->len;
        }
    }
    const struct qvl__stop_string *after = held(s);
    size_t keep = cut ? cut : after ? after->matched : 0, show = n_before + used - keep;
    if (show <= n_before) {
        if (show) qvl__buf_add(out, before->text, show);
    } else {
        if (n_before) qvl__buf_add(out, before->text, n_before);
        qvl__buf_add(out, text, show - n_before);
    }
    if (cut)
        for (int i = 0; i < s->n; i++) s->stops[i].matched = 0;
    return cut > 0;
}

void qvl__stop_flush(qvl__stop *s, qvl__buf *out) {
    const struct qvl__stop_string *h = held(s);
    if (h) qvl__buf_add(out, h->text, h->matched);
    for (int i = 0; i < s->n; i++) s->stops[i].matched = 0;
}
