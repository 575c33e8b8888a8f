/* metrics.h - counters, gauges and histograms in Prometheus' text format 0.0.4.
 *
 * Job:        keep numbers that any thread may change; write them all as text.
 * Input:      definitions at start; values.
 * Output:     the body of /metrics (content type METRICS_CONTENT_TYPE).
 * Invariants: changing a value is one or two atomic additions and takes no lock: look a series up once and keep it;
 *             series live as long as their metrics; metric and label names are checked when defined;
 *             every function takes a NULL series or metric (what a failed allocation gave) and does nothing.
 */
#ifndef SERVE_METRICS_H
#define SERVE_METRICS_H

#include <stdbool.h>
#include <stddef.h>

#include "buf.h"

#define METRICS_CONTENT_TYPE "text/plain; version=0.0.4; charset=utf-8"

typedef struct metrics metrics;
typedef struct metric metric; /* one name with its help and label names */
typedef struct series series; /* one combination of label values */

metrics *metrics_new(void);
void metrics_free(metrics *m);

/* Definitions, in the order in which they are written. labels: "model,reason" or "". help is copied. NULL when out of
 * memory, or for a bad or repeated name (a mistake in the program: the tests define all of them). */
metric *metrics_counter(metrics *m, const char *name, const char *labels, const char *help);
metric *metrics_gauge(metrics *m, const char *name, const char *labels, const char *help);
/* bounds: n growing upper bounds, without +Inf. */
metric *metrics_histogram(metrics *m, const char *name, const char *labels, const char *help, const double *bounds, size_t n);

/* The series with these values (UTF-8, the server's own words: never what a client invents), one for each label, in
 * order; made when it is new. Takes a lock. [any thread] */
series *metric_series(metric *m, const char *const *values);
/* The same by arguments: metric_get(m, "qwen", "stop"). */
#define metric_get(m, ...) metric_series((m), (const char *const[]){__VA_ARGS__})
/* The one series of a metric without labels. */
#define metric_only(m) metric_series((m), NULL)
/* Takes a series out of the output (a model that was unloaded) or back into it. */
void series_hide(series *s, bool hidden);

/* [any thread] */
void series_add(series *s, double v);     /* counter (v >= 0) or gauge */
void series_set(series *s, double v);     /* gauge, or a counter whose total is kept elsewhere */
void series_observe(series *s, double v); /* histogram */
void series_observe_n(series *s, double v, size_t n); /* the same value n times */
double series_value(const series *s);     /* of a histogram: how many observations */

/* Appends everything to out. 0, or -1 when out of memory. [any thread] */
int metrics_write(metrics *m, buf *out);

#endif
