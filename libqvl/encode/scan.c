/* scan.c - the JSON cursor of scan.h.
 *
 * Job:        RFC 8259 as far as tables of strings and integers need it.
 * Input:      untrusted text.
 * Output:     see scan.h.
 * Invariants: linear; no recursion, so depth costs nothing; what is skipped is only checked for balance and for ended
 *             strings, since a second reader sees it too (vocab.c).
 */
#include <string.h>

#include "scan.h"

int qvl__scan_fail(const qvl__scan *s, const char *what) {
    return qvl__fail(QVL_EFORMAT, "byte %zu: %s", (size_t)(s->at - s->start), what);
}

static void skip_space(qvl__scan *s) {
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\n' || *s->at == '\t' || *s->at == '\r')) s->at++;
}

bool qvl__scan_char(qvl__scan *s, char c) {
    skip_space(s);
    if (s->at >= s->end || *s->at != c) return false;
    s->at++;
    return true;
}

/* Takes a string as it is written: [*text, *text + *len) is what stands between the quotes. */
static int raw_string(qvl__scan *s, char **text, size_t *len, bool *escaped) {
    if (!qvl__scan_char(s, '"')) return qvl__scan_fail(s, "a string is wanted");
    *text = s->at;
    *escaped = false;
    for (; s->at < s->end; s->at++) {
        if (*s->at == '"') {
            *len = (size_t)(s->at++ - *text);
            return 0;
        }
        if (*s->at == '\\') {
            *escaped = true;
            s->at++;
        } else if ((unsigned char)*s->at < 0x20) break;
    }
    return qvl__scan_fail(s, "a string does not end or has a control character");
}

/* Four hexadecimal digits, or -1. */
static int32_t hex4(const char *p, const char *end) {
    int32_t v = 0;
    if (end - p < 4) return -1;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        int d = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (d < 0) return -1;
        v = v << 4 | d;
    }
    return v;
}

/* The code point after "\u" at *p, a surrogate pair taken together; -1 when it is none. */
static int32_t escaped_code_point(const char **p, const char *end) {
    int32_t a = hex4(*p, end);
    if (a < 0 || (a >= 0xDC00 && a <= 0xDFFF)) return -1;
    *p += 4;
    if (a < 0xD800 || a > 0xDBFF) return a;
    int32_t b = end - *p >= 6 && (*p)[0] == '\\' && (*p)[1] == 'u' ? hex4(*p + 2, end) : -1;
    if (b < 0xDC00 || b > 0xDFFF) return -1;
    *p += 6;
    return 0x10000 + ((a - 0xD800) << 10) + (b - 0xDC00);
}

static char *put_utf8(char *to, int32_t c) {
    if (c < 0x80) *to++ = (char)c;
    else if (c < 0x800) {
        *to++ = (char)(0xC0 | c >> 6);
        *to++ = (char)(0x80 | (c & 0x3F));
    } else {
        if (c < 0x10000) *to++ = (char)(0xE0 | c >> 12);
        else {
            *to++ = (char)(0xF0 | c >> 18);
            *to++ = (char)(0x80 | (c >> 12 & 0x3F));
        }
        *to++ = (char)(0x80 | (c >> 6 & 0x3F));
        *to++ = (char)(0x80 | (c & 0x3F));
    }
    return to;
}

int qvl__scan_string(qvl__scan *s, char **text, size_t *len) {
    bool escaped;
    int rc = raw_string(s, text, len, &escaped);
    if (rc < 0) return rc;
    (*text)[*len] = 0; /* where the quote was */
    if (!escaped) return 0;
    static const char from[] = "\"\\/bfnrt", as[] = "\"\\/\b\f\n\r\t";
    const char *p = *text, *end = *text + *len;
    char *to = *text; /* an escape is longer than what it stands for, so to never passes p */
    while (p < end) {
        if (*p != '\\') {
            *to++ = *p++;
            continue;
        }
        p++;
        const char *known = *p ? strchr(from, *p) : NULL;
        if (known) {
            *to++ = as[known - from];
            p++;
            continue;
        }
        int32_t c = *p == 'u' ? (p++, escaped_code_point(&p, end)) : -1;
        if (c < 0) {
            s->at = *text;
            return qvl__scan_fail(s, "a string has a wrong escape");
        }
        to = put_utf8(to, c);
    }
    *to = 0;
    *len = (size_t)(to - *text);
    return 0;
}

int qvl__scan_integer(qvl__scan *s, int64_t *v) {
    skip_space(s);
    bool negative = s->at < s->end && *s->at == '-';
    char *p = s->at + negative;
    int64_t n = 0;
    int digits = 0;
    for (; p < s->end && *p >= '0' && *p <= '9' && digits < 18; p++, digits++) n = n * 10 + (*p - '0');
    bool more = p < s->end && ((*p >= '0' && *p <= '9') || *p == '.' || *p == 'e' || *p == 'E');
    if (digits == 0 || more) return qvl__scan_fail(s, "an integer is wanted");
    s->at = p;
    *v = negative ? -n : n;
    return 0;
}

int qvl__scan_skip(qvl__scan *s, qvl__scan *value) {
    skip_space(s);
    char *from = s->at;
    size_t depth = 0;
    do {
        char *text;
        size_t len;
        bool escaped;
        skip_space(s);
        char c = s->at < s->end ? *s->at : 0;
        if (c == '"') {
            int rc = raw_string(s, &text, &len, &escaped);
            if (rc < 0) return rc;
        } else if (c == '{' || c == '[') {
            depth++;
            s->at++;
        } else if (c == '}' || c == ']') {
            if (depth == 0) return qvl__scan_fail(s, "a value is wanted");
            depth--;
            s->at++;
        } else if ((c == ',' || c == ':') && depth) {
            s->at++;
        } else { /* a number or a word */
            text = s->at;
            while (s->at < s->end && ((*s->at >= '0' && *s->at <= '9') || (*s->at >= 'a' && *s->at <= 'z') || *s->at == '-' ||
                                      *s->at == '+' || *s->at == '.' || *s->at == 'E'))
                s->at++;
            if (s->at == text) return qvl__scan_fail(s, "a value is wanted");
        }
    } while (depth);
    if (value) *value = (qvl__scan){s->start, from, s->at};
    return 0;
}

int qvl__scan_members(qvl__scan s, const char *const *keys, qvl__scan *values, int n) {
    for (int i = 0; i < n; i++) values[i] = (qvl__scan){s.start, NULL, NULL};
    if (!qvl__scan_char(&s, '{')) return qvl__scan_fail(&s, "an object is wanted");
    if (qvl__scan_char(&s, '}')) return 0;
    do {
        char *key;
        size_t len;
        bool escaped;
        qvl__scan value;
        int rc = raw_string(&s, &key, &len, &escaped);
        if (rc == 0 && !qvl__scan_char(&s, ':')) rc = qvl__scan_fail(&s, "\":\" is wanted");
        if (rc == 0) rc = qvl__scan_skip(&s, &value);
        if (rc < 0) return rc;
        for (int i = 0; i < n; i++)
            if (strlen(keys[i]) == len && memcmp(keys[i], key, len) == 0) values[i] = value;
    } while (qvl__scan_char(&s, ','));
    return qvl__scan_char(&s, '}') ? 0 : qvl__scan_fail(&s, "\",\" or \"}\" is wanted");
}

int qvl__scan_count(qvl__scan s, size_t *n) {
    *n = 0;
    if (!qvl__scan_char(&s, '[')) return qvl__scan_fail(&s, "an array is wanted");
    if (qvl__scan_char(&s, ']')) return 0;
    do {
        int rc = qvl__scan_skip(&s, NULL);
        if (rc < 0) return rc;
        ++*n;
    } while (qvl__scan_char(&s, ','));
    return qvl__scan_char(&s, ']') ? 0 : qvl__scan_fail(&s, "\",\" or \"]\" is wanted");
}
