/* meters.h - what the server measures: the list of its metrics, named as vLLM's with the prefix qvl_.
 *
 * Job:        define every metric of /metrics in one place; read the process's own figures.
 * Input:      finished requests, engine statistics (the JSON of qvl_engine_stats), HTTP results.
 * Output:     the text of /metrics.
 * Invariants: every metric is defined when the server starts;
 *             totals that the engine keeps are copied from it when /metrics is read, so they cost nothing before.
 */
#ifndef SERVE_METERS_H
#define SERVE_METERS_H

#include <jansson.h>
#include <stddef.h>

#include "metrics.h"

typedef struct meters meters;
typedef struct meters_model meters_model; /* the series of one model */

/* NULL when out of memory. */
meters *meters_new(const char *version);
void meters_free(meters *m);

/* The series of a model by its served name; the same pointer for the same name; lives as long as m. [any thread] */
meters_model *meters_of_model(meters *m, const char *model);
/* An unloaded model's gauges leave the output; its counters stay. */
typedef enum { METERS_UNLOADED, METERS_LOADING, METERS_READY, METERS_DRAINING } meters_state;
void meters_model_state(meters_model *mm, meters_state state);

/* One choice of a request has ended. NaN or a negative number: unknown. */
typedef struct {
    const char *finish_reason; /* stop, length, tool_calls, abort, error */
    double queue_s, prefill_s, decode_s, vision_s, ttft_s, e2e_s;
    long prompt_tokens, cached_tokens, image_tokens, completion_tokens;
    long images, images_cached;
    long n, max_tokens; /* of the request's parameters */
} meters_request;
void meters_finished(meters_model *mm, const meters_request *r);
/* Seconds between two tokens of a stream: the hot path. */
void meters_inter_token(meters_model *mm, double seconds);
/* A request that was refused before it ran: "queue_full", "rate", "concurrency", "tokens", "bad_request", "too_large" ... */
void meters_refused(meters *m, const char *reason);
/* Copies what qvl_engine_stats tells; called when /metrics is read. Members that are missing are left alone. */
void meters_engine(meters_model *mm, const json_t *stats);

/* One HTTP exchange. route is the pattern of the route table, never the client's path. */
void meters_http(meters *m, const char *method, const char *route, int status, double seconds);
/* Open connections: kind "http", "sse", "ws". delta is +1 or -1. */
void meters_connection(meters *m, const char *kind, int delta);
/* A cache outside the engine: tier "answer", "image", "disk" ...; hit or not. */
void meters_cache(meters *m, const char *cache, const char *tier, int hit);

/* Reads the process's figures (memory, CPU time, file descriptors) and appends all metrics to out. 0 or -1. */
int meters_write(meters *m, buf *out);

#endif
