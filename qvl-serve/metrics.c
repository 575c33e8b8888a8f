/* metrics.c - numbers and their text form.
 *
 * Job:        see metrics.h.
 * Input:      definitions, values.
 * Output:     text format 0.0.4 (prometheus.io/docs/instrumenting/exposition_formats).
 * Invariants: metrics and series are only ever added, so a reader follows the lists without stopping writers;
 *             one lock for adding and for writing out; values are atomic doubles;
 *             a histogram is written from one reading of its buckets, so its +Inf bucket and its count always agree.
 */
#include "metrics.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum { COUNTER, GAUGE, HISTOGRAM } kind;

struct series {
    series *next;
    metric *of;
    char *labels; /* a="x",b="y", as written; "" without labels */
    atomic_bool hidden;
    _Atomic double value;   /* of a histogram: the sum */
    atomic_uint_fast64_t *buckets; /* n_bounds + 1, not cumulated */
};

struct metric {
    metric *next;
    metrics *all;
    kind type;
    char *name, *help;
    char **labels;
    size_t n_labels, n_bounds;
    double *bounds;
    series *first, *last;
};

struct metrics {
    pthread_mutex_t lock;
    metric *first, *last;
};

/* ---- definitions ---- */

metrics *metrics_new(void) {
    metrics *m = calloc(1, sizeof *m);
    if (m) pthread_mutex_init(&m->lock, NULL);
    return m;
}

static void metric_free(metric *d) {
    for (series *s = d->first; s;) {
        series *next = s->next;
        free(s->labels);
        free(s->buckets);
        free(s);
        s = next;
    }
    for (size_t i = 0; i < d->n_labels; i++) free(d->labels[i]);
    free(d->labels);
    free(d->bounds);
    free(d->name);
    free(d->help);
    free(d);
}

void metrics_free(metrics *m) {
    if (!m) return;
    for (metric *d = m->first; d;) {
        metric *next = d->next;
        metric_free(d);
        d = next;
    }
    pthread_mutex_destroy(&m->lock);
    free(m);
}

static bool name_ok(const char *s, size_t n, bool colon) {
    if (!n || (s[0] >= '0' && s[0] <= '9')) return false;
    for (size_t i = 0; i < n; i++) {
        char c = s[i];
        bool word = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
        if (!word && !(colon && c == ':')) return false;
    }
    return true;
}

/* "a,b" to names; false when one is not allowed. __ is reserved, le is the histogram's own. */
static bool set_labels(metric *d, const char *labels) {
    for (const char *s = labels; *s;) {
        size_t n = strcspn(s, ",");
        char **more = realloc(d->labels, (d->n_labels + 1) * sizeof *more);
        if (!more) return false;
        d->labels = more;
        if (!name_ok(s, n, false) || !strncmp(s, "__", 2) || (n == 2 && !memcmp(s, "le", 2))) return false;
        if (!(d->labels[d->n_labels] = strndup(s, n))) return false;
        d->n_labels++;
        s += n;
        if (*s == ',') s++;
    }
    return true;
}

static bool set_bounds(metric *d, const double *bounds, size_t n) {
    if (d->type != HISTOGRAM) return true;
    for (size_t i = 0; i < n; i++)
        if (!isfinite(bounds[i]) || (i && bounds[i] <= bounds[i - 1])) return false;
    d->bounds = malloc((n + 1) * sizeof *bounds);
    if (!d->bounds) return false;
    if (n) memcpy(d->bounds, bounds, n * sizeof *bounds);
    d->n_bounds = n;
    return true;
}

static metric *define(metrics *m, kind type, const char *name, const char *labels, const char *help, const double *bounds, size_t n) {
    if (!m || !name_ok(name, strlen(name), true)) return NULL;
    metric *d = calloc(1, sizeof *d);
    if (!d) return NULL;
    d->all = m;
    d->type = type;
    d->name = strdup(name);
    d->help = strdup(help);
    bool ok = d->name && d->help && set_labels(d, labels) && set_bounds(d, bounds, n);
    pthread_mutex_lock(&m->lock);
    for (const metric *o = m->first; o && ok; o = o->next) ok = strcmp(o->name, name) != 0;
    if (ok) {
        if (m->last) m->last->next = d;
        else m->first = d;
        m->last = d;
    }
    pthread_mutex_unlock(&m->lock);
    if (!ok) {
        metric_free(d);
        return NULL;
    }
    if (!d->n_labels) metric_only(d); /* what has no labels is there from the start, as 0 */
    return d;
}

metric *metrics_counter(metrics *m, const char *name, const char *labels, const char *help) {
    return define(m, COUNTER, name, labels, help, NULL, 0);
}

metric *metrics_gauge(metrics *m, const char *name, const char *labels, const char *help) {
    return define(m, GAUGE, name, labels, help, NULL, 0);
}

metric *metrics_histogram(metrics *m, const char *name, const char *labels, const char *help, const double *bounds, size_t n) {
    return define(m, HISTOGRAM, name, labels, help, bounds, n);
}

/* ---- series ---- */

/* Label values escape \ " and newline; help texts \ and newline. */
static void add_escaped(buf *b, const char *s, bool quotes) {
    for (; *s; s++) {
        if (*s == '\n') buf_puts(b, "\\n");
        else if (*s == '\\') buf_puts(b, "\\\\");
        else if (*s == '"' && quotes) buf_puts(b, "\\\"");
        else buf_add(b, s, 1);
    }
}

series *metric_series(metric *d, const char *const *values) {
    if (!d) return NULL;
    buf b = {0};
    buf_puts(&b, "");
    for (size_t i = 0; i < d->n_labels; i++) {
        buf_printf(&b, "%s%s=\"", i ? "," : "", d->labels[i]);
        add_escaped(&b, values[i], true);
        buf_puts(&b, "\"");
    }
    if (b.failed) {
        buf_free(&b);
        return NULL;
    }
    pthread_mutex_lock(&d->all->lock);
    series *s = d->first;
    while (s && strcmp(s->labels, b.data)) s = s->next;
    if (!s && (s = calloc(1, sizeof *s))) {
        s->of = d;
        s->labels = b.data;
        b = (buf){0};
        if (d->type == HISTOGRAM && !(s->buckets = calloc(d->n_bounds + 1, sizeof *s->buckets))) {
            free(s->labels);
            free(s);
            s = NULL;
        } else {
            if (d->last) d->last->next = s;
            else d->first = s;
            d->last = s;
        }
    }
    pthread_mutex_unlock(&d->all->lock);
    buf_free(&b);
    return s;
}

void series_hide(series *s, bool hidden) {
    if (s) atomic_store(&s->hidden, hidden);
}

static void atomic_add(_Atomic double *to, double v) {
    double old = atomic_load_explicit(to, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(to, &old, old + v, memory_order_relaxed, memory_order_relaxed)) {}
}

void series_add(series *s, double v) {
    if (s) atomic_add(&s->value, v);
}

void series_set(series *s, double v) {
    if (s) atomic_store_explicit(&s->value, v, memory_order_relaxed);
}

void series_observe_n(series *s, double v, size_t n) {
    if (!s || !n || isnan(v)) return;
    const metric *d = s->of;
    size_t low = 0, high = d->n_bounds; /* the first bound that is not below v */
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (d->bounds[mid] < v) low = mid + 1;
        else high = mid;
    }
    atomic_fetch_add_explicit(&s->buckets[low], n, memory_order_relaxed);
    atomic_add(&s->value, v * (double)n);
}

void series_observe(series *s, double v) {
    series_observe_n(s, v, 1);
}

double series_value(const series *s) {
    if (!s) return 0;
    if (s->of->type != HISTOGRAM) return atomic_load_explicit(&s->value, memory_order_relaxed);
    double sum = 0;
    for (size_t i = 0; i <= s->of->n_bounds; i++) sum += (double)atomic_load_explicit(&s->buckets[i], memory_order_relaxed);
    return sum;
}

/* ---- the text ---- */

/* The fewest digits that read back as the same number. */
static void add_number(buf *b, double v) {
    if (isnan(v)) buf_puts(b, "NaN");
    else if (isinf(v)) buf_puts(b, v > 0 ? "+Inf" : "-Inf");
    else if (fabs(v) < 1e15 && v == floor(v)) buf_printf(b, "%.0f", v);
    else {
        char text[40];
        for (int digits = 6; digits <= 17; digits++) {
            snprintf(text, sizeof text, "%.*g", digits, v);
            if (strtod(text, NULL) == v) break;
        }
        buf_puts(b, text);
    }
}

static void add_sample(buf *b, const char *name, const char *suffix, const char *labels, double v) {
    buf_printf(b, "%s%s", name, suffix);
    if (*labels) buf_printf(b, "{%s}", labels);
    buf_puts(b, " ");
    add_number(b, v);
    buf_puts(b, "\n");
}

static void add_histogram(buf *b, const metric *d, const series *s) {
    uint64_t count = 0;
    for (size_t i = 0; i <= d->n_bounds; i++) {
        count += atomic_load_explicit(&s->buckets[i], memory_order_relaxed);
        buf_printf(b, "%s_bucket{%s%sle=\"", d->name, s->labels, *s->labels ? "," : "");
        add_number(b, i < d->n_bounds ? d->bounds[i] : INFINITY);
        buf_printf(b, "\"} %llu\n", (unsigned long long)count);
    }
    add_sample(b, d->name, "_sum", s->labels, atomic_load_explicit(&s->value, memory_order_relaxed));
    add_sample(b, d->name, "_count", s->labels, (double)count);
}

int metrics_write(metrics *m, buf *out) {
    static const char *const kinds[] = {"counter", "gauge", "histogram"};
    pthread_mutex_lock(&m->lock);
    for (const metric *d = m->first; d; d = d->next) {
        buf_printf(out, "# HELP %s ", d->name);
        add_escaped(out, d->help, false);
        buf_printf(out, "\n# TYPE %s %s\n", d->name, kinds[d->type]);
        for (const series *s = d->first; s; s = s->next) {
            if (atomic_load(&s->hidden)) continue;
            if (d->type == HISTOGRAM) add_histogram(out, d, s);
            else add_sample(out, d->name, "", s->labels, atomic_load_explicit(&s->value, memory_order_relaxed));
        }
    }
    pthread_mutex_unlock(&m->lock);
    return out->failed ? -1 : 0;
}
