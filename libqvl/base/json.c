/* json.c - JSON in (jansson) and JSON out (our own writer for two forms).
 *
 * Job:        parse with messages that name the source; write strings and whole values as Python's json.dumps does.
 * Input:      untrusted text.
 * Output:     jansson values; text.
 * Invariants: duplicate keys: the last wins, as in Python; depth is bounded by jansson (2048).
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"

int qvl__json_parse(json_t **out, const char *text, size_t len, const char *name) {
    json_error_t e;
    *out = json_loadb(text, len, JSON_ALLOW_NUL, &e);
    if (*out) return 0;
    if (json_error_code(&e) == json_error_out_of_memory) return qvl__fail(QVL_ENOMEM, "%s: out of memory in the JSON parser", name);
    return qvl__fail(QVL_EFORMAT, "%s: line %d, column %d: %s", name, e.line, e.column, e.text);
}

int qvl__json_file(json_t **out, const char *path) {
    char *text;
    size_t n;
    *out = NULL;
    int rc = qvl__read_file(path, (size_t)256 << 20, &text, &n);
    if (rc < 0) return rc;
    rc = qvl__json_parse(out, text, n, path);
    qvl__free(text);
    return rc;
}

void qvl__json_quote(qvl__buf *b, const char *s, size_t n) {
    qvl__buf_puts(b, "\"");
    size_t from = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c >= 0x20 && c != '"' && c != '\\') continue;
        qvl__buf_add(b, s + from, i - from);
        from = i + 1;
        switch (c) {
        case '"': qvl__buf_puts(b, "\\\""); break;
        case '\\': qvl__buf_puts(b, "\\\\"); break;
        case '\n': qvl__buf_puts(b, "\\n"); break;
        case '\r': qvl__buf_puts(b, "\\r"); break;
        case '\t': qvl__buf_puts(b, "\\t"); break;
        case '\b': qvl__buf_puts(b, "\\b"); break;
        case '\f': qvl__buf_puts(b, "\\f"); break;
        default: qvl__buf_printf(b, "\\u%04x", c);
        }
    }
    qvl__buf_add(b, s + from, n - from);
    qvl__buf_puts(b, "\"");
}

/* A float as Python's repr: the fewest digits that read back the same, exponent form outside [1e-4, 1e16). */
static void dump_real(qvl__buf *b, double v) {
    char digits[40];
    int prec = 1;
    for (; prec <= 17; prec++) {
        snprintf(digits, sizeof digits, "%.*e", prec - 1, v);
        if (strtod(digits, NULL) == v) break;
    }
    int exp10 = atoi(strchr(digits, 'e') + 1);
    if (exp10 < -4 || exp10 >= 16) {
        char mant[40];
        size_t m = (size_t)(strchr(digits, 'e') - digits);
        memcpy(mant, digits, m);
        mant[m] = 0;
        qvl__buf_printf(b, "%se%c%02d", mant, exp10 < 0 ? '-' : '+', exp10 < 0 ? -exp10 : exp10);
    } else {
        int after = prec - 1 - exp10;
        qvl__buf_printf(b, "%.*f", after > 1 ? after : 1, v);
    }
}

int qvl__json_dump(qvl__buf *b, const json_t *v) {
    switch (json_typeof(v)) {
    case JSON_OBJECT: {
        qvl__buf_puts(b, "{");
        bool first = true;
        for (void *it = json_object_iter((json_t *)(uintptr_t)v); it; it = json_object_iter_next((json_t *)(uintptr_t)v, it)) {
            if (!first) qvl__buf_puts(b, ", ");
            first = false;
            const char *key = json_object_iter_key(it);
            qvl__json_quote(b, key, strlen(key));
            qvl__buf_puts(b, ": ");
            qvl__json_dump(b, json_object_iter_value(it));
        }
        qvl__buf_puts(b, "}");
        break;
    }
    case JSON_ARRAY:
        qvl__buf_puts(b, "[");
        for (size_t i = 0; i < json_array_size(v); i++) {
            if (i) qvl__buf_puts(b, ", ");
            qvl__json_dump(b, json_array_get(v, i));
        }
        qvl__buf_puts(b, "]");
        break;
    case JSON_STRING: qvl__json_quote(b, json_string_value(v), json_string_length(v)); break;
    case JSON_INTEGER: qvl__buf_printf(b, "%" JSON_INTEGER_FORMAT, json_integer_value(v)); break;
    case JSON_REAL: dump_real(b, json_real_value(v)); break;
    case JSON_TRUE: qvl__buf_puts(b, "true"); break;
    case JSON_FALSE: qvl__buf_puts(b, "false"); break;
    case JSON_NULL: qvl__buf_puts(b, "null"); break;
    }
    return b->failed ? QVL_ENOMEM : 0;
}
