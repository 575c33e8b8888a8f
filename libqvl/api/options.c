/* options.c - the opaque bag of options over options.def.
 *
 * Job:        set by name with type and range checks; read with defaults.
 * Input:      names and values from users (C, command line, JSON, Python).
 * Output:     typed values for the rest of the library.
 * Invariants: a stored value is inside its range; reading an option that options.def does not have is a bug of ours,
 *             found by tests/unit/test_options.c.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../base/base.h"

enum type { B, I, F, S, J };

static const struct def {
    const char *name;
    enum type type;
    const char *scope;
    double min, max;
    const char *dflt, *choices, *help;
} defs[] = {
#define X(name, type, scope, min, max, dflt, choices, help) {#name, type, scope, (double)(min), (double)(max), dflt, choices, help},
#include "options.def"
#undef X
};
enum { COUNT = sizeof defs / sizeof *defs };

/* Ranges as text, made at compile time so that qvl_option_info needs no memory. */
static const char *const ranges[] = {
#define RANGE_B(min, max, choices) ""
#define RANGE_I(min, max, choices) #min ".." #max
#define RANGE_F(min, max, choices) #min ".." #max
#define RANGE_S(min, max, choices) choices
#define RANGE_J(min, max, choices) ""
#define X(name, type, scope, min, max, dflt, choices, help) RANGE_##type(min, max, choices),
#include "options.def"
#undef X
};

struct qvl_options {
    struct value {
        bool set;
        int64_t i;
        double f;
        char *s;
    } v[COUNT];
    qvl_progress_fn progress;
    void *progress_ud;
};

static const char *type_name(enum type t) {
    static const char *const names[] = {"bool", "int", "float", "string", "json"};
    return names[t];
}

static int find(const char *name) {
    for (int i = 0; i < COUNT; i++)
        if (strcmp(defs[i].name, name) == 0) return i;
    return -1;
}

static int find_or_fail(const char *name) {
    int i = name ? find(name) : -1;
    return i >= 0 ? i : qvl__fail(QVL_EINVAL, "unknown option \"%s\"; docs/options.md lists the options", name ? name : "(null)");
}

/* The number of "a|b|c" that value is, or -1. */
static bool among(const char *choices, const char *value) {
    size_t n = strlen(value);
    for (const char *p = choices; *p;) {
        const char *bar = strchr(p, '|');
        size_t len = bar ? (size_t)(bar - p) : strlen(p);
        if (len == n && memcmp(p, value, n) == 0) return true;
        p += len + (bar != NULL);
    }
    return false;
}

static int parse_int(const char *s, int64_t *out) {
    char *end;
    errno = 0;
    long long v = strtoll(s, &end, 10);
    if (end == s || *end || errno == ERANGE) return -1;
    *out = v;
    return 0;
}

static int parse_float(const char *s, double *out) {
    char *end;
    double v = strtod(s, &end);
    if (end == s || *end || !isfinite(v)) return -1;
    *out = v;
    return 0;
}

static int parse_bool(const char *s, int64_t *out) {
    if (among("true|1|yes|on", s)) *out = 1;
    else if (among("false|0|no|off", s)) *out = 0;
    else return -1;
    return 0;
}

int qvl_options_new(qvl_options **out) {
    if (!out) return qvl__fail(QVL_EINVAL, "qvl_options_new: out is NULL");
    *out = qvl__calloc(1, sizeof **out);
    if (!*out) return QVL_ENOMEM;
    qvl__handle_born();
    return 0;
}

void qvl_options_free(qvl_options *o) {
    if (!o) return;
    for (int i = 0; i < COUNT; i++) qvl__free(o->v[i].s);
    qvl__free(o);
    qvl__handle_gone();
}

/* Numbers that a double holds exactly are compared as doubles; seeds span all of int64 and have no other bound. */
static bool in_range(const struct def *d, double v) { return v >= d->min && v <= d->max; }

static int wrong_type(const struct def *d, const char *given) {
    if (*d->choices) return qvl__fail(QVL_EINVAL, "option %s: \"%.60s\" is not one of %s", d->name, given, d->choices);
    return qvl__fail(QVL_EINVAL, "option %s: \"%.60s\" is not %s %s", d->name, given, d->type == I ? "an" : "a", type_name(d->type));
}

/* A numeric setter on an option that is not a number. */
static int takes(const struct def *d, const char *given) {
    return qvl__fail(QVL_EINVAL, "option %s takes a %s, not the number %s", d->name, type_name(d->type), given);
}

static int out_of_range(int i, const char *given) {
    return qvl__fail(QVL_EINVAL, "option %s: %.60s is out of range %s", defs[i].name, given, ranges[i]);
}

int qvl_options_set_i64(qvl_options *o, const char *name, int64_t value) {
    int i = find_or_fail(name);
    if (!o) return qvl__fail(QVL_EINVAL, "qvl_options_set_i64: options is NULL");
    if (i < 0) return i;
    char given[32];
    snprintf(given, sizeof given, "%lld", (long long)value);
    if (defs[i].type == F) return qvl_options_set_f64(o, name, (double)value);
    if (defs[i].type != I && defs[i].type != B) return takes(&defs[i], given);
    if (!in_range(&defs[i], (double)value)) return out_of_range(i, given);
    o->v[i].i = value;
    o->v[i].set = true;
    return 0;
}

int qvl_options_set_f64(qvl_options *o, const char *name, double value) {
    int i = find_or_fail(name);
    if (!o) return qvl__fail(QVL_EINVAL, "qvl_options_set_f64: options is NULL");
    if (i < 0) return i;
    char given[32];
    snprintf(given, sizeof given, "%g", value);
    if (defs[i].type != F) return takes(&defs[i], given);
    if (!in_range(&defs[i], value)) return out_of_range(i, given); /* refuses NaN too */
    o->v[i].f = value;
    o->v[i].set = true;
    return 0;
}

int qvl_options_set(qvl_options *o, const char *name, const char *value) {
    int i = find_or_fail(name);
    if (!o || !value) return qvl__fail(QVL_EINVAL, "qvl_options_set: options or value is NULL");
    if (i < 0) return i;
    const struct def *d = &defs[i];
    int64_t n;
    double f;
    switch (d->type) {
    case B: return parse_bool(value, &n) < 0 ? wrong_type(d, value) : qvl_options_set_i64(o, name, n);
    case I: return parse_int(value, &n) < 0 ? wrong_type(d, value) : qvl_options_set_i64(o, name, n);
    case F: return parse_float(value, &f) < 0 ? wrong_type(d, value) : qvl_options_set_f64(o, name, f);
    case S:
        if (*d->choices && !among(d->choices, value)) return wrong_type(d, value);
        break;
    case J: break; /* parsed where it is used, with that place in the message */
    }
    char *copy = qvl__strndup(value, strlen(value));
    if (!copy) return QVL_ENOMEM;
    qvl__free(o->v[i].s);
    o->v[i].s = copy;
    o->v[i].set = true;
    return 0;
}

int qvl_options_set_progress(qvl_options *o, qvl_progress_fn fn, void *ud) {
    if (!o) return qvl__fail(QVL_EINVAL, "qvl_options_set_progress: options is NULL");
    o->progress = fn;
    o->progress_ud = ud;
    return 0;
}

void qvl__opt_progress(const qvl_options *o, qvl_progress_fn *fn, void **ud) {
    *fn = o ? o->progress : NULL;
    *ud = o ? o->progress_ud : NULL;
}

int qvl_option_info(int index, const char **name, const char **type, const char **scope, const char **range, const char **dflt,
                    const char **help) {
    if (index < 0 || index >= COUNT) return qvl__fail(QVL_EINVAL, "qvl_option_info: there are %d options", COUNT);
    const struct def *d = &defs[index];
    if (name) *name = d->name;
    if (type) *type = type_name(d->type);
    if (scope) *scope = d->scope;
    if (range) *range = ranges[index];
    if (dflt) *dflt = d->dflt;
    if (help) *help = d->help;
    return 0;
}

bool qvl__opt_is_set(const qvl_options *o, const char *name) {
    int i = find(name);
    return o && i >= 0 && o->v[i].set;
}

int64_t qvl__opt_i64(const qvl_options *o, const char *name) {
    int i = find(name);
    if (i < 0) return 0;
    if (o && o->v[i].set) return o->v[i].i;
    int64_t n = 0;
    if (defs[i].type == B) parse_bool(defs[i].dflt, &n);
    else parse_int(defs[i].dflt, &n);
    return n;
}

double qvl__opt_f64(const qvl_options *o, const char *name) {
    int i = find(name);
    if (i < 0) return 0;
    double f = 0;
    if (o && o->v[i].set) f = o->v[i].f;
    else parse_float(defs[i].dflt, &f);
    return f;
}

const char *qvl__opt_str(const qvl_options *o, const char *name) {
    int i = find(name);
    if (i < 0) return "";
    return o && o->v[i].set ? o->v[i].s : defs[i].dflt;
}
