/* meters.c - the list of the server's metrics.
 *
 * Job:        see meters.h.
 * Input:      figures of requests, engines, connections and of this process (/proc/self).
 * Output:     the text of /metrics.
 * Invariants: one table says what a metric is called and what it means; its order is that of the output;
 *             what a request adds is found once per model, not once per request.
 */
#include "meters.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <dirent.h>
#include <time.h>
#include <unistd.h>

/* vLLM's buckets where it has the metric (vllm/v1/metrics/loggers.py), so that its dashboards read the same, and some
 * smaller ones: qvl-tiny answers in milliseconds. */
static const double first_token_s[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                                       1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560};
static const double between_s[] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
static const double request_s[] = {0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
static const double http_s[] = {0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300};
static const double tokens_n[] = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000};
static const double few_n[] = {1, 2, 5, 10, 20};

#define BOUNDS(list) list, sizeof(list) / sizeof(list)[0]
#define MODEL "model_name"

/* X(member, kind, name without qvl_, labels, bounds, help). Members of metrics with only the label model_name are also
 * those of struct meters_model. */
#define MODEL_METRICS(X) \
    X(running, gauge, "num_requests_running", "Requests that the engine is working on.") \
    X(waiting, gauge, "num_requests_waiting", "Requests that wait for the engine.") \
    X(kv_usage, gauge, "kv_cache_usage_perc", "Share of the KV cache's blocks that requests hold; 1 is all.") \
    X(kv_kept, gauge, "kv_cache_kept_perc", "Share of the KV cache's blocks that are free and kept for shared prefixes.") \
    X(state, gauge, "model_state", "0 unloaded, 1 loading, 2 ready, 3 draining.") \
    X(prompt_tokens, counter, "prompt_tokens_total", "Prompt tokens processed.") \
    X(generation_tokens, counter, "generation_tokens_total", "Tokens generated.") \
    X(preemptions, counter, "num_preemptions_total", "Requests put back because the KV cache was full.") \
    X(steps, counter, "engine_steps_total", "Steps of the engine.") \
    X(prefix_queries, counter, "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.") \
    X(prefix_hits, counter, "prefix_cache_hits_total", "Prompt tokens found in the prefix cache.") \
    X(image_queries, counter, "mm_cache_queries_total", "Images and videos looked up among the embeddings.") \
    X(image_hits, counter, "mm_cache_hits_total", "Images and videos found among the embeddings.") \
    X(image_tokens, counter, "image_tokens_total", "Image and video tokens among the prompt tokens.") \
    X(images_encoded, counter, "images_encoded_total", "Images and videos that went through the vision tower.")

#define MODEL_HISTOGRAMS(X) \
    X(ttft, "time_to_first_token_seconds", first_token_s, "Arrival to first token.") \
    X(inter_token, "inter_token_latency_seconds", between_s, "Time between two tokens of a request.") \
    X(per_token, "request_time_per_output_token_seconds", between_s, "Mean time between the tokens of a request.") \
    X(e2e, "e2e_request_latency_seconds", request_s, "Arrival to last token.") \
    X(queue, "request_queue_time_seconds", request_s, "Arrival to first work.") \
    X(inference, "request_inference_time_seconds", request_s, "First work to last token.") \
    X(prefill, "request_prefill_time_seconds", request_s, "First work to first token, without the vision tower.") \
    X(decode, "request_decode_time_seconds", request_s, "First token to last token.") \
    X(vision, "request_vision_time_seconds", request_s, "Vision tower, of requests that needed it.") \
    X(request_prompt, "request_prompt_tokens", tokens_n, "Prompt tokens of a request.") \
    X(request_generation, "request_generation_tokens", tokens_n, "Tokens generated for a request.") \
    X(params_n, "request_params_n", few_n, "Parameter n of a request.") \
    X(params_max_tokens, "request_params_max_tokens", tokens_n, "Parameter max_tokens of a request.")

struct meters {
    metrics *all;
    pthread_mutex_t lock;
    meters_model *models;
#define X(member, kind, title, help) metric *member;
    MODEL_METRICS(X)
#undef X
#define X(member, title, bounds, help) metric *member;
    MODEL_HISTOGRAMS(X)
#undef X
    metric *success, *memory;
    metric *refused, *cache_queries, *cache_hits, *http_requests, *http_seconds, *connections;
    metric *start, *cpu, *resident, *virtual, *open_fds, *max_fds, *threads;
};

struct meters_model {
    meters_model *next;
    meters *of;
    char *name;
#define X(member, kind, title, help) series *member;
    MODEL_METRICS(X)
#undef X
#define X(member, title, bounds, help) series *member;
    MODEL_HISTOGRAMS(X)
#undef X
    series *memory_weights, *memory_kv, *memory_workspace, *memory_vision;
};

meters *meters_new(const char *version) {
    meters *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    pthread_mutex_init(&m->lock, NULL);
    m->all = metrics_new();
#define X(member, kind, title, help) m->member = metrics_##kind(m->all, "qvl_" title, MODEL, help);
    MODEL_METRICS(X)
#undef X
    m->success = metrics_counter(m->all, "qvl_request_success_total", MODEL ",finished_reason", "Choices of requests that ended, by how.");
    m->memory = metrics_gauge(m->all, "qvl_memory_bytes", MODEL ",kind", "Memory held: weights, kv, workspace, vision.");
#define X(member, title, bounds, help) m->member = metrics_histogram(m->all, "qvl_" title, MODEL, help, BOUNDS(bounds));
    MODEL_HISTOGRAMS(X)
#undef X
    m->refused = metrics_counter(m->all, "qvl_requests_refused_total", "reason", "Requests refused before they ran, by why.");
    m->cache_queries = metrics_counter(m->all, "qvl_cache_queries_total", "cache,tier", "Look-ups in the server's caches.");
    m->cache_hits = metrics_counter(m->all, "qvl_cache_hits_total", "cache,tier", "Look-ups in the server's caches that found something.");
    m->http_requests = metrics_counter(m->all, "http_requests_total", "method,route,status", "HTTP requests answered.");
    m->http_seconds = metrics_histogram(m->all, "http_request_duration_seconds", "method,route", "HTTP request to the end of its answer.", BOUNDS(http_s));
    m->connections = metrics_gauge(m->all, "qvl_connections", "kind", "Open connections: http, sse, ws.");
    metric *build = metrics_gauge(m->all, "qvl_build_info", "version", "Always 1; the label tells the version.");
    m->start = metrics_gauge(m->all, "process_start_time_seconds", "", "Start of the process, seconds since 1970.");
    m->cpu = metrics_counter(m->all, "process_cpu_seconds_total", "", "CPU time of the process.");
    m->resident = metrics_gauge(m->all, "process_resident_memory_bytes", "", "Memory of the process that is in RAM.");
    m->virtual = metrics_gauge(m->all, "process_virtual_memory_bytes", "", "Address space of the process.");
    m->open_fds = metrics_gauge(m->all, "process_open_fds", "", "Open file descriptors.");
    m->max_fds = metrics_gauge(m->all, "process_max_fds", "", "File descriptors that may be open.");
    m->threads = metrics_gauge(m->all, "process_threads", "", "Threads of the process.");
    if (!m->threads) {
        meters_free(m);
        return NULL;
    }
    series_set(metric_get(build, version), 1);
    series_set(metric_only(m->start), (double)time(NULL));
    series_set(metric_only(m->max_fds), (double)sysconf(_SC_OPEN_MAX));
    return m;
}

void meters_free(meters *m) {
    if (!m) return;
    for (meters_model *mm = m->models; mm;) {
        meters_model *next = mm->next;
        free(mm->name);
        free(mm);
        mm = next;
    }
    metrics_free(m->all);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

/* ---- models ---- */

static meters_model *new_model(meters *m, const char *name) {
    meters_model *mm = calloc(1, sizeof *mm);
    if (!mm || !(mm->name = strdup(name))) {
        free(mm);
        return NULL;
    }
    mm->of = m;
#define X(member, kind, title, help) mm->member = metric_get(m->member, name);
    MODEL_METRICS(X)
#undef X
#define X(member, title, bounds, help) mm->member = metric_get(m->member, name);
    MODEL_HISTOGRAMS(X)
#undef X
    mm->memory_weights = metric_get(m->memory, name, "weights");
    mm->memory_kv = metric_get(m->memory, name, "kv");
    mm->memory_workspace = metric_get(m->memory, name, "workspace");
    mm->memory_vision = metric_get(m->memory, name, "vision");
    return mm;
}

meters_model *meters_of_model(meters *m, const char *model) {
    pthread_mutex_lock(&m->lock);
    meters_model *mm = m->models;
    while (mm && strcmp(mm->name, model)) mm = mm->next;
    if (!mm && (mm = new_model(m, model))) {
        mm->next = m->models;
        m->models = mm;
    }
    pthread_mutex_unlock(&m->lock);
    return mm;
}

void meters_model_state(meters_model *mm, meters_state state) {
    if (!mm) return;
    series *const gauges[] = {mm->running, mm->waiting, mm->kv_usage, mm->kv_kept, mm->memory_weights, mm->memory_kv, mm->memory_workspace, mm->memory_vision};
    for (size_t i = 0; i < sizeof gauges / sizeof gauges[0]; i++) series_hide(gauges[i], state == METERS_UNLOADED);
    series_set(mm->state, state);
}

/* ---- requests ---- */

static void observe(series *s, double v) {
    if (v >= 0) series_observe(s, v); /* not NaN, not unknown */
}

static void add(series *s, double v) {
    if (v > 0) series_add(s, v);
}

void meters_finished(meters_model *mm, const meters_request *r) {
    if (!mm) return;
    series_add(metric_get(mm->of->success, mm->name, r->finish_reason), 1);
    observe(mm->ttft, r->ttft_s);
    observe(mm->e2e, r->e2e_s);
    observe(mm->queue, r->queue_s);
    observe(mm->inference, r->e2e_s - r->queue_s);
    observe(mm->prefill, r->prefill_s);
    observe(mm->decode, r->decode_s);
    if (r->vision_s > 0) observe(mm->vision, r->vision_s);
    if (r->completion_tokens > 1) observe(mm->per_token, r->decode_s / (double)(r->completion_tokens - 1));
    observe(mm->request_prompt, (double)r->prompt_tokens);
    observe(mm->request_generation, (double)r->completion_tokens);
    if (r->n > 0) observe(mm->params_n, (double)r->n);
    if (r->max_tokens > 0) observe(mm->params_max_tokens, (double)r->max_tokens);
    add(mm->prefix_queries, (double)r->prompt_tokens);
    add(mm->prefix_hits, (double)r->cached_tokens);
    add(mm->image_tokens, (double)r->image_tokens);
    add(mm->image_queries, (double)r->images);
    add(mm->image_hits, (double)r->images_cached);
}

void meters_inter_token(meters_model *mm, double seconds) {
    if (mm) observe(mm->inter_token, seconds);
}

void meters_refused(meters *m, const char *reason) {
    series_add(metric_get(m->refused, reason), 1);
}

/* ---- engines ---- */

/* The number at a path of one or two names; NaN when it is not there. */
static double number(const json_t *o, const char *a, const char *b) {
    const json_t *v = json_object_get(o, a);
    if (b) v = json_object_get(v, b);
    return json_is_number(v) ? json_number_value(v) : NAN;
}

static void set(series *s, double v) {
    if (!isnan(v)) series_set(s, v);
}

void meters_engine(meters_model *mm, const json_t *stats) {
    if (!mm) return;
    double blocks = number(stats, "kv", "blocks");
    set(mm->running, number(stats, "requests", "running"));
    set(mm->waiting, number(stats, "requests", "waiting"));
    if (blocks > 0) {
        set(mm->kv_usage, number(stats, "kv", "blocks_used") / blocks);
        set(mm->kv_kept, number(stats, "kv", "blocks_kept") / blocks);
    }
    set(mm->prompt_tokens, number(stats, "prompt_tokens", NULL));
    set(mm->generation_tokens, number(stats, "generated_tokens", NULL));
    set(mm->preemptions, number(stats, "preempted", NULL));
    set(mm->steps, number(stats, "steps", NULL));
    set(mm->images_encoded, number(stats, "images_encoded", NULL));
    set(mm->memory_weights, number(stats, "memory", "weights"));
    set(mm->memory_kv, number(stats, "memory", "kv"));
    set(mm->memory_workspace, number(stats, "memory", "workspace"));
    set(mm->memory_vision, number(stats, "memory", "vision"));
}

/* ---- HTTP ---- */

void meters_http(meters *m, const char *method, const char *route, int status, double seconds) {
    static const char *const known[] = {"GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH"};
    const char *name = "other"; /* a client's invention must not become a series */
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (!strcmp(method, known[i])) name = known[i];
    char code[16];
    snprintf(code, sizeof code, "%d", status);
    series_add(metric_get(m->http_requests, name, route, code), 1);
    series *s = metric_get(m->http_seconds, name, route);
    observe(s, seconds);
}

void meters_connection(meters *m, const char *kind, int delta) {
    series_add(metric_get(m->connections, kind), delta);
}

void meters_cache(meters *m, const char *cache, const char *tier, int hit) {
    series_add(metric_get(m->cache_queries, cache, tier), 1);
    series_add(metric_get(m->cache_hits, cache, tier), hit ? 1 : 0);
}

/* ---- the process ---- */

static void read_process(meters *m) {
    struct timespec cpu;
    if (!clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu)) series_set(metric_only(m->cpu), (double)cpu.tv_sec + (double)cpu.tv_nsec * 1e-9);
    unsigned long size, resident;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f) {
        if (fscanf(f, "%lu %lu", &size, &resident) == 2) {
            double page = (double)sysconf(_SC_PAGESIZE);
            series_set(metric_only(m->virtual), (double)size * page);
            series_set(metric_only(m->resident), (double)resident * page);
        }
        fclose(f);
    }
    static const struct {
        const char *path;
        size_t offset;
        int extra; /* entries that are not counted: ., .. and the listing's own descriptor */
    } folders[] = {{"/proc/self/fd", offsetof(meters, open_fds), 3}, {"/proc/self/task", offsetof(meters, threads), 2}};
    for (size_t i = 0; i < sizeof folders / sizeof folders[0]; i++) {
        DIR *d = opendir(folders[i].path);
        if (!d) continue;
        int n = -folders[i].extra;
        while (readdir(d)) n++;
        closedir(d);
        series_set(metric_only(*(metric **)((char *)m + folders[i].offset)), n);
    }
}

int meters_write(meters *m, buf *out) {
    read_process(m);
    return metrics_write(m->all, out);
}
