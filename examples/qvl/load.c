/* load.c - qvl bench --serve: what many users at once experience.
 *
 * Job:        send requests to one engine as users would, in real time; report latency and throughput.
 * Input:      a model; a mix (lengths, pictures, shared beginnings, turns) and a pace (rate or concurrency).
 * Output:     a table, or one JSON object (docs/tool.md).
 * Invariants: the same seed gives the same requests at the same times; a token's time is the end of the step that made it;
 *             TTFT counts from when a request should have been sent, so an engine that is late cannot hide it;
 *             percentiles are nearest-rank over all samples; a refused request is counted and named, not fatal.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "bench.h"

typedef struct {
    double *v;
    long n, cap;
} samples;

typedef struct {
    long low, high;
} range;

/* One conversation: its turns are sent one after the other. */
typedef struct {
    double due;           /* when its next turn is to be sent, ms; INFINITY while one is under way or all are done */
    int32_t *ids;         /* what was said so far */
    long n, turns;
    qvl_prompt *prompt;   /* the next turn when it is ready beforehand */
    uint64_t request;     /* under way; 0 none */
    double sent, first, last;
    long tokens;
} user;

typedef struct {
    const tool_args *args;
    qvl_model *model;
    qvl_engine *engine;
    bench_random random;
    long requests, concurrency, turns, pool, prefix;
    double rate, images;
    range prompt, answer;
    int width, height;
    bool probe;
    user *users;
    long n_users, open, sent;
    int32_t *shared; /* [prefix] */
    samples ttft, tpot, gap, e2e, queue, probe_gap;
    long finished, failed, with_images;
    double prompt_tokens, cached_tokens, generated, speculated;
    char *why; /* the first failure */
    uint64_t probe_request;
    double probe_last;
} load;

/* ---- samples ---- */

static int add_sample(samples *s, double x) {
    if (s->n == s->cap) {
        long cap = s->cap ? 2 * s->cap : 1024;
        double *v = realloc(s->v, (size_t)cap * sizeof *v);
        if (!v) return tool_fail("out of memory");
        s->v = v;
        s->cap = cap;
    }
    s->v[s->n++] = x;
    return TOOL_OK;
}

static int ascending(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }

/* Nearest rank; s is sorted. */
static double percentile(const samples *s, double p) {
    long rank = (long)ceil(p / 100 * (double)s->n);
    return s->n ? s->v[rank > 0 ? rank - 1 : 0] : NAN;
}

static json_t *number(double x) { return isfinite(x) ? json_real(x) : json_null(); }

/* A row of the table, and the same as JSON. */
static json_t *summary(load *l, const char *name, samples *s) {
    static const struct {
        const char *key;
        double p;
    } at[] = {{"p50", 50}, {"p90", 90}, {"p95", 95}, {"p99", 99}, {"max", 100}};
    double sum = 0;
    qsort(s->v, (size_t)s->n, sizeof *s->v, ascending);
    for (long i = 0; i < s->n; i++) sum += s->v[i];
    json_t *o = json_pack("{s:I, s:o}", "samples", (json_int_t)s->n, "mean", number(s->n ? sum / (double)s->n : NAN));
    bool table = !tool_get(l->args, "json") && s->n;
    if (table) printf("%-14s %10.1f", name, sum / (double)s->n);
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
        json_object_set_new(o, at[i].key, number(percentile(s, at[i].p)));
        if (table) printf(" %10.1f", percentile(s, at[i].p));
    }
    if (table) printf("\n");
    return o;
}

/* ---- requests ---- */

static long pick(load *l, range r) { return r.low + (long)(bench_draw(&l->random) % (uint32_t)(r.high - r.low + 1)); }

/* A picture of noise with a question; each picture of the pool is the same whenever it comes. */
static int picture_prompt(load *l, long tokens, qvl_prompt **out) {
    long which = l->pool ? (long)(bench_draw(&l->random) % (uint32_t)l->pool) : 1000000 + l->with_images;
    bench_random noise = {0x2545F4914F6CDD1DULL + (uint64_t)which * 77, 0};
    size_t bytes = (size_t)l->width * (size_t)l->height * 3;
    uint8_t *rgb = malloc(bytes);
    int32_t *ids = malloc((size_t)tokens * sizeof *ids);
    char *text = NULL;
    size_t len;
    qvl_image *im = NULL;
    qvl_media *media = NULL;
    int code = rgb && ids ? bench_tokens(l->model, &l->random, ids, tokens) : tool_fail("out of memory"), rc = 0;
    for (size_t i = 0; rgb && i < bytes; i++) rgb[i] = (uint8_t)bench_draw(&noise);
    if (code == TOOL_OK) {
        rc = qvl_detokenize(qvl_model_tokenizer(l->model), ids, (size_t)tokens, 1, &text, &len);
        json_t *messages = rc ? NULL : json_pack("[{s:s, s:[{s:s}, {s:s, s:s%}]}]", "role", "user", "content", "type", "image", "type", "text", "text", text, len);
        char *json = messages ? json_dumps(messages, 0) : NULL;
        if (rc == 0 && !json) code = tool_fail("the question is no valid text");
        if (rc == 0) rc = qvl_media_new(&media);
        if (rc == 0) rc = qvl_image_from_pixels(&im, rgb, l->width, l->height, 0);
        if (rc == 0) rc = qvl_media_add_image(media, im);
        if (rc == 0 && json) rc = qvl_prompt_new(out, l->model, json, NULL, media, l->args->options);
        if (rc < 0 && code == TOOL_OK) code = tool_library_error(NULL);
        free(json);
        json_decref(messages);
    }
    qvl_image_free(im);
    qvl_media_free(media);
    qvl_free(text);
    free(rgb);
    free(ids);
    l->with_images++;
    return code;
}

/* The next turn: what was said so far and new tokens. */
static int text_prompt(load *l, user *u, long tokens, qvl_prompt **out) {
    long old = u->n, n = old + tokens;
    int32_t *ids = realloc(u->ids, (size_t)n * sizeof *ids);
    if (!ids) return tool_fail("out of memory");
    u->ids = ids;
    u->n = n;
    long shared = old == 0 ? (l->prefix < tokens ? l->prefix : tokens) : 0;
    memcpy(ids, l->shared, (size_t)shared * sizeof *ids);
    int code = bench_tokens(l->model, &l->random, ids + old + shared, tokens - shared);
    if (code == TOOL_OK && qvl_prompt_from_tokens(out, l->model, ids, (size_t)n) < 0) code = tool_library_error(NULL);
    return code;
}

static int next_prompt(load *l, user *u) {
    long tokens = pick(l, l->prompt);
    bool picture = l->images > 0 && bench_draw(&l->random) < l->images * 4294967296.0;
    return picture ? picture_prompt(l, tokens, &u->prompt) : text_prompt(l, u, tokens, &u->prompt);
}

static int fail_one(load *l, const char *why) {
    l->failed++;
    if (l->why) return TOOL_OK;
    l->why = strdup(why);
    return l->why ? TOOL_OK : tool_fail("out of memory");
}

static int send(load *l, user *u) {
    qvl_options *o = tool_options_copy(l->args);
    if (!o) return TOOL_FAILED;
    int code = u->prompt ? TOOL_OK : next_prompt(l, u);
    if (code == TOOL_OK) {
        int rc = qvl_options_set_i64(o, "max_tokens", pick(l, l->answer));
        if (rc == 0) rc = qvl_options_set(o, "ignore_eos", "true");
        if (rc == 0) rc = qvl_engine_submit(l->engine, u->prompt, o, &u->request);
        u->sent = u->due;
        u->first = u->tokens = 0;
        u->due = INFINITY;
        u->turns--;
        l->sent++;
        if (rc < 0) {
            u->turns = 0;
            u->request = 0;
            l->open--;
            code = fail_one(l, qvl_last_error());
        }
    }
    qvl_prompt_free(u->prompt);
    u->prompt = NULL;
    qvl_options_free(o);
    return code;
}

/* ---- events ---- */

static int ended(load *l, user *u, const qvl_event *v, double now) {
    const char *why;
    int code = TOOL_OK;
    u->request = 0;
    if (qvl_event_error(v, &why)) {
        u->turns = 0;
        code = fail_one(l, why);
    } else {
        l->finished++;
        l->prompt_tokens += qvl_event_usage(v, QVL_USAGE_PROMPT_TOKENS);
        l->cached_tokens += qvl_event_usage(v, QVL_USAGE_CACHED_TOKENS);
        l->generated += qvl_event_usage(v, QVL_USAGE_COMPLETION_TOKENS);
        l->speculated += qvl_event_usage(v, QVL_USAGE_SPECULATED_TOKENS);
        code = add_sample(&l->e2e, now - u->sent);
        if (code == TOOL_OK) code = add_sample(&l->queue, qvl_event_usage(v, QVL_USAGE_QUEUE_MS));
        if (code == TOOL_OK && u->tokens > 1) code = add_sample(&l->tpot, (u->last - u->first) / (double)(u->tokens - 1));
    }
    if (u->turns > 0) u->due = now; /* the next turn at once */
    else l->open--;
    return code;
}

static int token(load *l, user *u, const qvl_event *v, double now) {
    int code = add_sample(u->tokens ? &l->gap : &l->ttft, now - (u->tokens ? u->last : u->sent));
    if (u->tokens++ == 0) u->first = now;
    u->last = now;
    if (u->turns > 0 && u->ids) { /* remembered for the next turn */
        int32_t *ids = realloc(u->ids, (size_t)(u->n + 1) * sizeof *ids);
        if (!ids) return tool_fail("out of memory");
        u->ids = ids;
        ids[u->n++] = qvl_event_token(v);
    }
    return code;
}

static int step(load *l, int timeout_ms) {
    int n = qvl_engine_step(l->engine, timeout_ms), code = TOOL_OK;
    double now = tool_now_ms();
    if (n < 0) return tool_library_error(NULL);
    for (int i = 0; i < n && code == TOOL_OK; i++) {
        const qvl_event *v = qvl_engine_event(l->engine, i);
        uint64_t request = qvl_event_request(v);
        bool is_token = qvl_event_type(v) == QVL_EVENT_TOKEN;
        if (request == l->probe_request) {
            if (is_token && l->probe_last > 0 && l->sent) code = add_sample(&l->probe_gap, now - l->probe_last);
            l->probe_last = is_token ? now : 0;
            continue;
        }
        user *u = NULL;
        for (long k = 0; k < l->n_users && !u; k++)
            if (l->users[k].request == request) u = &l->users[k];
        if (!u) continue;
        code = is_token ? token(l, u, v, now) : ended(l, u, v, now);
    }
    return code;
}

/* ---- a run ---- */

/* A long answer that runs beside the load from its beginning to its end. */
static int start_probe(load *l, long room) {
    qvl_prompt *p = NULL;
    qvl_options *o = tool_options_copy(l->args);
    int32_t ids[16];
    int code = o ? bench_tokens(l->model, &l->random, ids, 16) : TOOL_FAILED, rc = 0;
    if (code == TOOL_OK) {
        rc = qvl_prompt_from_tokens(&p, l->model, ids, 16);
        if (rc == 0) rc = qvl_options_set_i64(o, "max_tokens", room - 16);
        if (rc == 0) rc = qvl_options_set(o, "ignore_eos", "true");
        if (rc == 0) rc = qvl_options_set(o, "priority", "-1");
        if (rc == 0) rc = qvl_engine_submit(l->engine, p, o, &l->probe_request);
        if (rc < 0) code = tool_library_error("--probe");
    }
    while (code == TOOL_OK && l->probe_last == 0) code = step(l, 0);
    qvl_prompt_free(p);
    qvl_options_free(o);
    return code;
}

static int drive(load *l, double start) {
    int code = TOOL_OK;
    l->open = l->n_users;
    for (long i = 0; i < l->n_users; i++) l->users[i].due += start;
    while (code == TOOL_OK && l->open) {
        if (tool_interrupted()) return TOOL_INTERRUPTED;
        double now = tool_now_ms(), next = INFINITY;
        long running = 0;
        for (long i = 0; i < l->n_users; i++) running += l->users[i].request != 0;
        for (long i = 0; i < l->n_users && code == TOOL_OK; i++) {
            user *u = &l->users[i];
            if (u->due <= now && (l->concurrency == 0 || running < l->concurrency)) {
                if (l->concurrency) u->due = now; /* closed loop: sent when there is a place */
                code = send(l, u);
                running += u->request != 0;
            } else if (u->due < next) next = u->due;
        }
        double wait = next - tool_now_ms();
        if (code == TOOL_OK) code = step(l, running || l->probe_request ? 0 : wait > 100 ? 100 : wait > 0 ? (int)ceil(wait) : 0);
        if (code == TOOL_OK && tool_is_terminal(stderr)) fprintf(stderr, "\r%ld of %ld requests done, %ld running ", l->finished + l->failed, l->requests, running);
    }
    if (tool_is_terminal(stderr)) fprintf(stderr, "\r\033[K");
    return code;
}

static int report(load *l, double seconds, json_t *about, json_t *results) {
    char *text;
    if (qvl_engine_stats(l->engine, &text) < 0) return tool_library_error(NULL);
    json_t *s = json_loads(text, 0, NULL), *o = json_object();
    qvl_free(text);
    if (!tool_get(l->args, "json")) {
        printf("%ld requests in %.1f s (%.2f a second), %ld failed; %.1f tokens/s generated, %.1f tokens/s with prompts\n", l->finished, seconds,
               (double)l->finished / seconds, l->failed, l->generated / seconds, (l->generated + l->prompt_tokens) / seconds);
        printf("%.0f of %.0f prompt tokens from the prefix cache; %ld pictures sent, %lld encoded; %.0f answer tokens guessed\n", l->cached_tokens,
               l->prompt_tokens, l->with_images, (long long)json_integer_value(json_object_get(s, "images_encoded")), l->speculated);
        if (l->why) printf("first failure: %s\n", l->why);
        printf("%-14s %10s %10s %10s %10s %10s %10s\n", "milliseconds", "mean", "p50", "p90", "p95", "p99", "max");
    }
    json_t *counts = json_pack("{s:s, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:O, s:O, s:O, s:O, s:O}", "test", "serve", "requests", (json_int_t)l->sent,
                               "finished", (json_int_t)l->finished, "failed", (json_int_t)l->failed, "seconds", seconds, "prompt_tokens", l->prompt_tokens,
                               "cached_tokens", l->cached_tokens, "generated_tokens", l->generated, "speculated_tokens", l->speculated, "generated_tokens_per_s",
                               l->generated / seconds, "requests_per_s", (double)l->finished / seconds, "images", (json_int_t)l->with_images, "images_encoded",
                               json_object_get(s, "images_encoded"), "preempted", json_object_get(s, "preempted"), "steps", json_object_get(s, "steps"), "rows",
                               json_object_get(s, "rows"), "memory", json_object_get(s, "memory"));
    json_object_update(o, counts);
    json_decref(counts);
    if (l->why) json_object_set_new(o, "first_failure", json_string(l->why));
    struct {
        const char *key, *row;
        samples *s;
    } all[] = {{"ttft_ms", "TTFT", &l->ttft}, {"tpot_ms", "TPOT", &l->tpot}, {"gap_ms", "token gap", &l->gap}, {"e2e_ms", "end to end", &l->e2e},
               {"queue_ms", "queue", &l->queue}, {"probe_gap_ms", "probe's gap", &l->probe_gap}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (i < 5 || l->probe) json_object_set_new(o, all[i].key, summary(l, all[i].row, all[i].s));
    json_object_update(o, about);
    json_decref(s);
    return json_array_append_new(results, o) < 0 ? tool_fail("out of memory") : TOOL_OK;
}

static long image_tokens(const load *l) { return l->images > 0 ? (long)((l->width + 63) / 32) * ((l->height + 63) / 32) + 64 : 0; }

static int open_engine(load *l, long context) {
    qvl_options *o = tool_options_copy(l->args);
    if (!o) return TOOL_FAILED;
    int rc = tool_get(l->args, "max_context") ? 0 : qvl_options_set_i64(o, "max_context", context);
    if (rc == 0) rc = qvl_engine_new(&l->engine, l->model, o);
    qvl_options_free(o);
    return rc < 0 ? tool_library_error(NULL) : TOOL_OK;
}

/* All requests that do not depend on answers are made before the clock runs. */
static int prepare(load *l) {
    l->n_users = (l->requests + l->turns - 1) / l->turns;
    l->users = calloc((size_t)l->n_users, sizeof *l->users);
    l->shared = malloc(((size_t)l->prefix + 1) * sizeof *l->shared);
    if (!l->users || !l->shared) return tool_fail("out of memory");
    int code = bench_tokens(l->model, &l->random, l->shared, l->prefix);
    double due = 0;
    for (long i = 0; i < l->n_users && code == TOOL_OK; i++) {
        user *u = &l->users[i];
        u->turns = i + 1 < l->n_users ? l->turns : l->requests - i * l->turns;
        u->due = due;
        if (l->rate > 0) due -= log(1 - bench_draw(&l->random) / 4294967296.0) / l->rate * 1e3; /* a Poisson process */
        code = next_prompt(l, u);
    }
    return code;
}

static void close_load(load *l) {
    for (long i = 0; l->users && i < l->n_users; i++) {
        qvl_prompt_free(l->users[i].prompt);
        free(l->users[i].ids);
    }
    samples *const all[] = {&l->ttft, &l->tpot, &l->gap, &l->e2e, &l->queue, &l->probe_gap};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]->v);
    free(l->users);
    free(l->shared);
    free(l->why);
    qvl_engine_free(l->engine);
}

/* ---- command line ---- */

/* "N" or "A-B". */
static int parse_range(const tool_args *a, const char *name, long low, long high, range *out) {
    const char *text = tool_get(a, name);
    int end = 0;
    *out = (range){low, high};
    if (!text) return TOOL_OK;
    if (sscanf(text, "%9ld-%9ld%n", &out->low, &out->high, &end) == 2 && !text[end]) {
    } else if (sscanf(text, "%9ld%n", &out->low, &end) == 1 && !text[end]) out->high = out->low;
    else end = 0;
    if (!end || out->low < 1 || out->high < out->low || out->high > 1 << 20)
        return tool_usage(a->command, "option --%s: \"%s\" is not a number from 1 to %d or a range such as 100-500", name, text, 1 << 20);
    return TOOL_OK;
}

static int parse_double(const tool_args *a, const char *name, double max, double *out) {
    const char *text = tool_get(a, name);
    char *end;
    *out = 0;
    if (!text) return TOOL_OK;
    *out = strtod(text, &end);
    if (end == text || *end || !(*out >= 0 && *out <= max)) return tool_usage(a->command, "option --%s: \"%s\" is not a number from 0 to %g", name, text, max);
    return TOOL_OK;
}

static int parse(load *l) {
    const tool_args *a = l->args;
    long seed = 1;
    const char *size = tool_get(a, "image");
    int end = 0, code = tool_number(a, "requests", 1, 10000000, 32, &l->requests);
    if (!code) code = tool_number(a, "concurrency", 0, 1000000, 0, &l->concurrency);
    if (!code) code = tool_number(a, "turns", 1, 1000, 1, &l->turns);
    if (!code) code = tool_number(a, "image-pool", 0, 1000000, 0, &l->pool);
    if (!code) code = tool_number(a, "shared-prefix", 0, 1 << 20, 0, &l->prefix);
    if (!code) code = tool_number(a, "load-seed", 1, LONG_MAX, 1, &seed);
    if (!code) code = parse_double(a, "rate", 1e6, &l->rate);
    if (!code) code = parse_double(a, "images", 1, &l->images);
    if (!code) code = parse_range(a, "prompt-tokens", 128, 128, &l->prompt);
    if (!code) code = parse_range(a, "answer-tokens", 64, 64, &l->answer);
    if (code) return code;
    l->width = l->height = 448;
    if (size && (sscanf(size, "%5dx%5d%n", &l->width, &l->height, &end) != 2 || size[end] || l->width < 1 || l->height < 1))
        return tool_usage(a->command, "option --image: \"%s\" is not a size such as 448x448", size);
    if (l->images > 0 && l->turns > 1) return tool_usage(a->command, "--images and --turns do not go together: turns are text");
    l->probe = tool_get(a, "probe") != NULL;
    l->random.state = (uint64_t)seed * 0x9E3779B97F4A7C15ULL | 1;
    return TOOL_OK;
}

static int run(const tool_args *a) {
    load l = {.args = a};
    json_t *about = json_object(), *results = json_array();
    int code = parse(&l);
    if (code == TOOL_OK) code = tool_model_load(a, &l.model, NULL);
    if (code == TOOL_OK) code = bench_describe(a, l.model, about, &l.random.vocab);
    long context = l.turns * (l.prompt.high + l.answer.high) + image_tokens(&l), least = l.probe ? 1024 : 0;
    if (code == TOOL_OK) code = open_engine(&l, context > least ? context : least);
    if (code == TOOL_OK) code = prepare(&l);
    if (code == TOOL_OK && l.probe) code = start_probe(&l, context > least ? context : least);
    if (code == TOOL_OK) {
        double start = tool_now_ms();
        code = drive(&l, start);
        int reported = code == TOOL_OK || code == TOOL_INTERRUPTED ? report(&l, (tool_now_ms() - start) / 1e3, about, results) : TOOL_OK;
        if (code == TOOL_OK) code = reported;
    }
    if (code == TOOL_OK) code = bench_memory(a, about, results);
    if ((code == TOOL_OK || code == TOOL_INTERRUPTED) && tool_get(a, "json") && json_array_size(results)) {
        int printed = tool_print_json(json_incref(results));
        if (code == TOOL_OK) code = printed;
    }
    if (code == TOOL_OK && l.finished == 0) code = tool_fail("no request finished: %s", l.why ? l.why : "none was sent");
    close_load(&l);
    json_decref(about);
    json_decref(results);
    qvl_model_free(l.model);
    return code;
}

static const tool_option options[] = {
    {"serve", 0, NULL, "this mode: requests to one engine, in real time"},
    {"requests", 0, "N", "requests in all; default 32"},
    {"rate", 0, "R", "requests a second, at random times (Poisson); 0, the default: all at once"},
    {"concurrency", 0, "N", "at most N at a time, each sent when another one ends; 0, the default: no limit"},
    {"prompt-tokens", 0, "A[-B]", "tokens of a prompt, or of the question to a picture; default 128"},
    {"answer-tokens", 0, "A[-B]", "tokens of an answer; default 64"},
    {"images", 0, "F", "share of requests with a picture, 0 to 1; default 0"},
    {"image", 0, "WxH", "size of the pictures; default 448x448"},
    {"image-pool", 0, "N", "how many different pictures there are; 0, the default: each its own"},
    {"shared-prefix", 0, "N", "the first N tokens are the same for all text prompts"},
    {"turns", 0, "N", "requests of a conversation, each with all that was said before; default 1"},
    {"probe", 0, NULL, "a long answer beside the load, whose token gaps are reported apart"},
    {"load-seed", 0, "N", "another N, other requests at other times; default 1"},
    {"json", 0, NULL, "a JSON list: the results, and the memory"},
    {0},
};

const tool_command tool_bench_serve = {
    .name = "bench --serve",
    .synopsis = "[-m MODEL] [--requests N] [--rate R] [--concurrency N] [--prompt-tokens A-B] [--answer-tokens A-B] [--images F] [--probe] [--json]",
    .summary = "what many users at once experience",
    .details = "Prompts are random ordinary tokens, pictures are noise. max_context follows from the mix unless it is given; --probe needs a context of 1024.",
    .options = options,
    .scopes = "model prompt engine request",
    .without = "max_tokens min_tokens ignore_eos stop stop_token_ids logprobs prompt_logprobs return_logits n priority deadline_ms video_min_pixels "
               "video_max_pixels video_layout add_generation_prompt add_vision_id",
    .max_words = 0,
    .run = run,
};
