/* Metrics: a strict reader of text format 0.0.4 reads back what was put in; threads lose nothing; the server's own list. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <math.h>
#include <pthread.h>
#include <unistd.h>

#include "../../qvl-serve/meters.h"
#include "../../qvl-serve/metrics.h"

/* ---- the reader ---- */

typedef struct {
    char name[128], labels[512]; /* labels: k=v;k=v; with escapes undone */
    double value;
} sample;

typedef struct {
    sample list[4096];
    size_t n;
} samples;

static bool word(char c, bool first) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == ':' || (!first && c >= '0' && c <= '9');
}

static const char *read_name(const char *s, char *out, size_t cap) {
    size_t n = 0;
    while (word(s[n], n == 0)) n++;
    if (!n || n >= cap) fail_msg("no name at %.40s", s);
    memcpy(out, s, n);
    out[n] = 0;
    return s + n;
}

static const char *read_labels(const char *s, char *out, size_t cap) {
    size_t at = 0;
    while (*s != '}') {
        char key[64];
        s = read_name(s, key, sizeof key);
        if (strncmp(s, "=\"", 2)) fail_msg("no =\" at %.40s", s);
        s += 2;
        at += (size_t)snprintf(out + at, cap - at, "%s=", key);
        for (; *s != '"'; s++) {
            char c = *s;
            if (!c || c == '\n') fail_msg("open label value");
            if (c == '\\') {
                c = *++s;
                if (c == 'n') c = '\n';
                else if (c != '\\' && c != '"') fail_msg("bad escape \\%c", c);
            }
            assert_true(at + 2 < cap);
            out[at++] = c;
        }
        out[at++] = ';';
        s++;
        if (*s == ',') s++;
        else if (*s != '}') fail_msg("no , or } at %.40s", s);
    }
    out[at] = 0;
    return s + 1;
}

static double read_value(const char *s, const char *end) {
    char *stop;
    if (s == end || *s == ' ') fail_msg("no value");
    double v = strtod(s, &stop);
    if (stop != end) fail_msg("bad value %.30s", s);
    return v;
}

/* HELP, then TYPE, then that metric's samples and no other's; every metric once; buckets cumulative and complete. */
static void read_all(samples *out, const char *text) {
    char current[128] = "", type[16] = "", name[128];
    char seen[128][128];
    size_t n_seen = 0;
    double last_bucket = 0, last_bound = 0;
    out->n = 0;
    assert_true(!*text || text[strlen(text) - 1] == '\n');
    for (const char *s = text; *s;) {
        const char *end = strchr(s, '\n');
        if (!strncmp(s, "# HELP ", 7)) {
            const char *rest = read_name(s + 7, current, sizeof current);
            assert_int_equal(*rest, ' ');
            for (size_t i = 0; i < n_seen; i++) assert_string_not_equal(seen[i], current);
            assert_true(n_seen < 128);
            strcpy(seen[n_seen++], current);
            for (const char *c = rest; c < end; c++)
                if (*c == '\\' && *++c != 'n' && *c != '\\') fail_msg("bad escape in help of %s", current);
            s = end + 1;
            end = strchr(s, '\n');
            assert_int_equal(strncmp(s, "# TYPE ", 7), 0);
            rest = read_name(s + 7, name, sizeof name);
            assert_string_equal(name, current);
            snprintf(type, sizeof type, "%.*s", (int)(end - rest - 1), rest + 1);
            assert_true(!strcmp(type, "counter") || !strcmp(type, "gauge") || !strcmp(type, "histogram"));
        } else {
            sample *p = &out->list[out->n++];
            assert_true(out->n < 4096);
            *p = (sample){.labels = ""};
            const char *rest = read_name(s, p->name, sizeof p->name);
            if (*rest == '{') rest = read_labels(rest + 1, p->labels, sizeof p->labels);
            assert_int_equal(*rest, ' ');
            p->value = read_value(rest + 1, end);
            assert_int_equal(strncmp(p->name, current, strlen(current)), 0);
            const char *suffix = p->name + strlen(current);
            if (strcmp(type, "histogram")) {
                assert_string_equal(suffix, "");
                if (!strcmp(type, "counter")) {
                    assert_true(p->value >= 0);
                    assert_string_equal(current + strlen(current) - 6, "_total");
                }
            } else if (!strcmp(suffix, "_bucket")) {
                const char *le = strstr(p->labels, "le=");
                assert_non_null(le);
                double bound = strtod(le + 3, NULL);
                bool first = out->n < 2 || strcmp(p[-1].name, p->name) != 0;
                if (!first) assert_true(p->value >= last_bucket && bound > last_bound);
                last_bucket = p->value;
                last_bound = bound;
            } else if (!strcmp(suffix, "_count")) {
                assert_true(isinf(last_bound));
                assert_true(p->value == last_bucket);
            } else {
                assert_string_equal(suffix, "_sum");
            }
            for (const sample *o = out->list; o < p; o++)
                if (!strcmp(o->name, p->name) && !strcmp(o->labels, p->labels)) fail_msg("%s{%s} twice", p->name, p->labels);
        }
        s = end + 1;
    }
}

static samples got;

static double value(const char *name, const char *labels) {
    for (size_t i = 0; i < got.n; i++)
        if (!strcmp(got.list[i].name, name) && !strcmp(got.list[i].labels, labels)) return got.list[i].value;
    return NAN;
}

static void read_back(metrics *m) {
    buf b = {0};
    buf_puts(&b, "");
    assert_int_equal(metrics_write(m, &b), 0);
    read_all(&got, b.data);
    buf_free(&b);
}

/* ---- tests ---- */

static void counters_and_gauges(void **state) {
    (void)state;
    metrics *m = metrics_new();
    metric *c = metrics_counter(m, "c_total", "", "Plain."), *g = metrics_gauge(m, "g", "model,kind", "Help with \\ and\nnewline \"quoted\".");
    series_add(metric_only(c), 1);
    series_add(metric_only(c), 2.5);
    series_set(metric_get(g, "a", "x"), -0.1);
    series_set(metric_get(g, "q\"u\\o\nte", "{},="), 1e300);
    series_set(metric_get(g, "", "é图"), NAN);
    series_set(metric_get(g, "big", ""), 9007199254740993.0 * 1024);
    series_set(metric_get(g, "inf", ""), -INFINITY);
    series_set(metric_get(g, "third", ""), 1.0 / 3);
    assert_ptr_equal(metric_get(g, "a", "x"), metric_get(g, "a", "x"));
    assert_ptr_not_equal(metric_get(g, "a", "x"), metric_get(g, "a", "y"));
    read_back(m);
    assert_int_equal(got.n, 8);
    assert_true(value("c_total", "") == 3.5);
    assert_true(value("g", "model=a;kind=x;") == -0.1);
    assert_true(value("g", "model=q\"u\\o\nte;kind={},=;") == 1e300);
    assert_true(isnan(value("g", "model=;kind=é图;")));
    assert_true(value("g", "model=big;kind=;") == 9007199254740993.0 * 1024);
    assert_true(value("g", "model=inf;kind=;") == -INFINITY);
    assert_true(value("g", "model=third;kind=;") == 1.0 / 3);
    series_hide(metric_get(g, "a", "x"), true);
    read_back(m);
    assert_int_equal(got.n, 7);
    series_hide(metric_get(g, "a", "x"), false);
    read_back(m);
    assert_int_equal(got.n, 8);
    metrics_free(m);
}

static void histograms(void **state) {
    (void)state;
    metrics *m = metrics_new();
    const double bounds[] = {0.1, 1, 10};
    metric *h = metrics_histogram(m, "h_seconds", "model", "Times.", bounds, 3);
    series *s = metric_get(h, "a");
    series_observe(s, 0.1); /* a bound belongs to its bucket */
    series_observe(s, 0.10001);
    series_observe(s, -5);
    series_observe(s, 11);
    series_observe(s, NAN);
    series_observe_n(s, 2, 3);
    metric_get(h, "empty");
    assert_true(series_value(s) == 7);
    read_back(m);
    assert_true(value("h_seconds_bucket", "model=a;le=0.1;") == 2);
    assert_true(value("h_seconds_bucket", "model=a;le=1;") == 3);
    assert_true(value("h_seconds_bucket", "model=a;le=10;") == 6);
    assert_true(value("h_seconds_bucket", "model=a;le=+Inf;") == 7);
    assert_true(value("h_seconds_count", "model=a;") == 7);
    assert_true(fabs(value("h_seconds_sum", "model=a;") - (0.1 + 0.10001 - 5 + 11 + 6)) < 1e-12);
    assert_true(value("h_seconds_count", "model=empty;") == 0);
    metrics_free(m);
}

static void bad_definitions(void **state) {
    (void)state;
    metrics *m = metrics_new();
    const double down[] = {2, 1}, inf[] = {1, INFINITY};
    assert_null(metrics_counter(m, "", "", ""));
    assert_null(metrics_counter(m, "1st", "", ""));
    assert_null(metrics_counter(m, "a-b", "", ""));
    assert_null(metrics_counter(m, "ok_total", "le", ""));
    assert_null(metrics_counter(m, "ok_total", "__x", ""));
    assert_null(metrics_counter(m, "ok_total", "a,,b", ""));
    assert_null(metrics_counter(m, "ok_total", "a:b", ""));
    assert_null(metrics_histogram(m, "h", "", "", down, 2));
    assert_null(metrics_histogram(m, "h", "", "", inf, 2));
    assert_non_null(metrics_counter(m, "ok_total", "", ""));
    assert_null(metrics_gauge(m, "ok_total", "", ""));
    series_add(NULL, 1); /* what a failed allocation gave is harmless */
    series_set(NULL, 1);
    series_observe(NULL, 1);
    assert_null(metric_only(NULL));
    metrics_free(m);
    metrics_free(NULL);
}

static metric *shared_counter, *shared_histogram;
static metrics *shared;
enum { THREADS = 4, ROUNDS = 20000 };

static void *worker(void *ud) {
    const char *mine = ud;
    series *c = metric_get(shared_counter, "all"), *h = metric_get(shared_histogram, "all");
    for (int i = 0; i < ROUNDS; i++) {
        series_add(c, 0.5);
        series_observe(h, i % 3);
        if (i % 1000 == 0) series_add(metric_get(shared_counter, mine), 1);
        if (i % 5000 == 0) {
            buf b = {0};
            metrics_write(shared, &b);
            buf_free(&b);
        }
    }
    return NULL;
}

static void threads_lose_nothing(void **state) {
    (void)state;
    shared = metrics_new();
    const double bounds[] = {0.5, 1.5};
    shared_counter = metrics_counter(shared, "c_total", "who", "C.");
    shared_histogram = metrics_histogram(shared, "h", "who", "H.", bounds, 2);
    pthread_t t[THREADS];
    static char names[THREADS][2] = {"a", "b", "c", "d"};
    for (int i = 0; i < THREADS; i++) assert_int_equal(pthread_create(&t[i], NULL, worker, names[i]), 0);
    for (int i = 0; i < THREADS; i++) pthread_join(t[i], NULL);
    read_back(shared);
    assert_true(value("c_total", "who=all;") == THREADS * ROUNDS * 0.5);
    assert_true(value("c_total", "who=d;") == ROUNDS / 1000);
    assert_true(value("h_count", "who=all;") == THREADS * ROUNDS);
    assert_true(value("h_bucket", "who=all;le=0.5;") == THREADS * 6667);
    metrics_free(shared);
}

static void the_servers_metrics(void **state) {
    (void)state;
    meters *m = meters_new("1.2.3");
    assert_non_null(m);
    meters_model *mm = meters_of_model(m, "qvl-tiny");
    assert_non_null(mm);
    assert_ptr_equal(mm, meters_of_model(m, "qvl-tiny"));
    meters_model_state(mm, METERS_READY);
    meters_request r = {.finish_reason = "stop", .queue_s = 0.5, .prefill_s = 0.25, .decode_s = 2, .vision_s = NAN, .ttft_s = 1, .e2e_s = 3,
                        .prompt_tokens = 100, .cached_tokens = 64, .image_tokens = -1, .completion_tokens = 5, .images = 2, .images_cached = 1,
                        .n = 1, .max_tokens = 16};
    meters_finished(mm, &r);
    r.finish_reason = "length";
    r.vision_s = 0.125;
    meters_finished(mm, &r);
    meters_inter_token(mm, 0.02);
    meters_refused(m, "queue_full");
    meters_http(m, "GET", "/health", 200, 0.001);
    meters_http(m, "BREW", "/health", 400, 0.001);
    meters_connection(m, "sse", 1);
    meters_connection(m, "sse", 1);
    meters_connection(m, "sse", -1);
    meters_cache(m, "image", "memory", 0);
    meters_cache(m, "image", "memory", 1);
    json_t *stats = json_loads("{\"requests\": {\"running\": 3, \"waiting\": 4}, \"kv\": {\"blocks\": 200, \"blocks_used\": 50, \"blocks_kept\": 100},"
                               " \"memory\": {\"weights\": 1000, \"kv\": 2000}, \"steps\": 9, \"prompt_tokens\": 11, \"generated_tokens\": 12,"
                               " \"preempted\": \"many\"}", 0, NULL);
    assert_non_null(stats);
    meters_engine(mm, stats);
    meters_engine(NULL, stats);
    json_decref(stats);
    buf b = {0};
    assert_int_equal(meters_write(m, &b), 0);
    read_all(&got, b.data);
    assert_true(value("qvl_build_info", "version=1.2.3;") == 1);
    assert_true(value("qvl_model_state", "model_name=qvl-tiny;") == 2);
    assert_true(value("qvl_num_requests_running", "model_name=qvl-tiny;") == 3);
    assert_true(value("qvl_num_requests_waiting", "model_name=qvl-tiny;") == 4);
    assert_true(value("qvl_kv_cache_usage_perc", "model_name=qvl-tiny;") == 0.25);
    assert_true(value("qvl_kv_cache_kept_perc", "model_name=qvl-tiny;") == 0.5);
    assert_true(value("qvl_prompt_tokens_total", "model_name=qvl-tiny;") == 11);
    assert_true(value("qvl_generation_tokens_total", "model_name=qvl-tiny;") == 12);
    assert_true(value("qvl_num_preemptions_total", "model_name=qvl-tiny;") == 0);
    assert_true(value("qvl_memory_bytes", "model_name=qvl-tiny;kind=kv;") == 2000);
    assert_true(value("qvl_request_success_total", "model_name=qvl-tiny;finished_reason=stop;") == 1);
    assert_true(value("qvl_request_success_total", "model_name=qvl-tiny;finished_reason=length;") == 1);
    assert_true(value("qvl_time_to_first_token_seconds_sum", "model_name=qvl-tiny;") == 2);
    assert_true(value("qvl_inter_token_latency_seconds_count", "model_name=qvl-tiny;") == 1);
    assert_true(value("qvl_request_time_per_output_token_seconds_sum", "model_name=qvl-tiny;") == 1);
    assert_true(value("qvl_e2e_request_latency_seconds_sum", "model_name=qvl-tiny;") == 6);
    assert_true(value("qvl_request_queue_time_seconds_sum", "model_name=qvl-tiny;") == 1);
    assert_true(value("qvl_request_inference_time_seconds_sum", "model_name=qvl-tiny;") == 5);
    assert_true(value("qvl_request_vision_time_seconds_count", "model_name=qvl-tiny;") == 1);
    assert_true(value("qvl_prefix_cache_queries_total", "model_name=qvl-tiny;") == 200);
    assert_true(value("qvl_prefix_cache_hits_total", "model_name=qvl-tiny;") == 128);
    assert_true(value("qvl_mm_cache_hits_total", "model_name=qvl-tiny;") == 2);
    assert_true(value("qvl_image_tokens_total", "model_name=qvl-tiny;") == 0);
    assert_true(value("qvl_requests_refused_total", "reason=queue_full;") == 1);
    assert_true(value("http_requests_total", "method=GET;route=/health;status=200;") == 1);
    assert_true(value("http_requests_total", "method=other;route=/health;status=400;") == 1);
    assert_true(value("http_request_duration_seconds_count", "method=GET;route=/health;") == 1);
    assert_true(value("qvl_connections", "kind=sse;") == 1);
    assert_true(value("qvl_cache_queries_total", "cache=image;tier=memory;") == 2);
    assert_true(value("qvl_cache_hits_total", "cache=image;tier=memory;") == 1);
    assert_in_range(value("process_resident_memory_bytes", ""), 100000, 1e12);
    assert_in_range(value("process_open_fds", ""), 1, 1000);
    assert_true(value("process_threads", "") >= 1);
    assert_true(value("process_start_time_seconds", "") > 1.6e9);
    double fds = value("process_open_fds", "");
    int fd = dup(0);
    buf_clear(&b);
    meters_write(m, &b);
    read_all(&got, b.data);
    assert_true(value("process_open_fds", "") == fds + 1);
    close(fd);
    meters_model_state(mm, METERS_UNLOADED);
    buf_clear(&b);
    meters_write(m, &b);
    read_all(&got, b.data);
    assert_true(isnan(value("qvl_num_requests_running", "model_name=qvl-tiny;")));
    assert_true(value("qvl_model_state", "model_name=qvl-tiny;") == 0);
    assert_true(value("qvl_generation_tokens_total", "model_name=qvl-tiny;") == 12);
    meters_model_state(mm, METERS_LOADING);
    buf_clear(&b);
    meters_write(m, &b);
    read_all(&got, b.data);
    assert_true(value("qvl_num_requests_running", "model_name=qvl-tiny;") == 3);
    buf_free(&b);
    meters_free(m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(counters_and_gauges),  cmocka_unit_test(histograms),          cmocka_unit_test(bad_definitions),
        cmocka_unit_test(threads_lose_nothing), cmocka_unit_test(the_servers_metrics),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
