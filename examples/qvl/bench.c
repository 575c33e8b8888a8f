/* bench.c - qvl bench: how fast this machine runs a model.
 *
 * Job:        time prefill, decode, image encoding and loading; report every repetition.
 * Input:      a model, sizes.
 * Output:     a table with medians, or a JSON list (docs/tool.md).
 * Invariants: one uncounted run warms up each test; prompts are random ordinary tokens, new ones for every run, so no
 *             cache of prefixes can answer; the engine is made as large as the test needs, nothing is clamped;
 *             depth tokens are in the KV cache before the clock counts: of a step that crosses that border, the share
 *             of its rows beyond it counts.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "bench.h"

typedef struct {
    const tool_args *args;
    qvl_model *model;
    long prefill, decode, depth, streams, repeat; /* prefill, decode: 0 = not asked for */
    int width, height;                            /* 0: no image test */
    bool load;
    bench_random random;
    json_t *about;   /* what every entry says of the model */
    json_t *results; /* the list */
} bench;

typedef struct {
    qvl_engine *engine;
    qvl_prompt **prompts;
    int *tokens; /* of each request's answer so far */
    long streams;
    uint64_t first; /* number of the first request */
    long started, ended, counted;
} field; /* the requests of one run */

/* ---- prompts ---- */

uint32_t bench_draw(bench_random *r) { /* Marsaglia's xorshift64*; the same prompts in every call of the program */
    r->state ^= r->state >> 12;
    r->state ^= r->state << 25;
    r->state ^= r->state >> 27;
    return (uint32_t)(r->state * 0x2545F4914F6CDD1DULL >> 32);
}

int bench_tokens(const qvl_model *m, bench_random *r, int32_t *ids, long n) {
    const qvl_tokenizer *t = qvl_model_tokenizer(m);
    for (long i = 0, tries = 0; i < n; tries++) {
        char *text;
        size_t len = 0;
        ids[i] = (int32_t)(bench_draw(r) % r->vocab);
        if (qvl_detokenize(t, ids + i, 1, 1, &text, &len) == 0) qvl_free(text);
        if (len > 0) i++;
        else if (tries > 1000 + 100 * n) return tool_fail("the tokenizer has hardly any ordinary tokens");
    }
    return TOOL_OK;
}

static int random_prompt(bench *b, long n, qvl_prompt **out) {
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    if (!ids) return tool_fail("out of memory");
    int code = bench_tokens(b->model, &b->random, ids, n);
    if (code == TOOL_OK && qvl_prompt_from_tokens(out, b->model, ids, (size_t)n) < 0) code = tool_library_error(NULL);
    free(ids);
    return code;
}

/* ---- runs over the engine ---- */

static void field_close(field *f) {
    for (long i = 0; f->prompts && i < f->streams; i++) qvl_prompt_free(f->prompts[i]);
    free(f->prompts);
    free(f->tokens);
    qvl_engine_free(f->engine);
}

/* An engine for streams requests of prompt + answer tokens each, and the requests. */
static int field_open(field *f, bench *b, long prompt, long answer) {
    memset(f, 0, sizeof *f);
    f->streams = b->streams;
    f->prompts = calloc((size_t)b->streams, sizeof *f->prompts);
    f->tokens = calloc((size_t)b->streams, sizeof *f->tokens);
    qvl_options *o = f->prompts && f->tokens ? tool_options_copy(b->args) : NULL;
    if (!o) return f->prompts && f->tokens ? TOOL_FAILED : tool_fail("out of memory");
    long context = prompt + answer, blocks = (context + 31) / 32; /* a block holds 32 tokens, see option kv_blocks */
    int rc = qvl_options_set_i64(o, "max_requests", b->streams);
    if (rc == 0) rc = qvl_options_set(o, "prefix_cache", "false"); /* every run computes everything */
    if (rc == 0) rc = qvl_options_set(o, "step_ms", "0");          /* and nobody is waited for */
    if (rc == 0) rc = qvl_options_set_i64(o, "max_context", context);
    if (rc == 0) rc = qvl_options_set_i64(o, "kv_blocks", blocks * b->streams);
    if (rc == 0 && !tool_get(b->args, "max_batched_tokens") && b->streams > tool_library_number(b->args, "max_batched_tokens"))
        rc = qvl_options_set_i64(o, "max_batched_tokens", b->streams); /* all streams decode in every step */
    if (rc == 0) rc = qvl_options_set_i64(o, "max_tokens", answer);
    if (rc == 0) rc = qvl_options_set(o, "ignore_eos", "true");
    if (rc == 0) rc = qvl_options_set(o, "temperature", "0");
    if (rc == 0) rc = qvl_engine_new(&f->engine, b->model, o);
    int code = rc < 0 ? tool_library_error(NULL) : TOOL_OK;
    for (long i = 0; code == TOOL_OK && i < f->streams; i++) {
        uint64_t request;
        code = random_prompt(b, prompt, &f->prompts[i]);
        if (code == TOOL_OK && qvl_engine_submit(f->engine, f->prompts[i], o, &request) < 0) code = tool_library_error(NULL);
        if (i == 0) f->first = request;
    }
    qvl_options_free(o);
    return code;
}

/* One step; counts tokens and who has started and ended. *ms is what it took. */
static int field_step(field *f, double *ms) {
    if (tool_interrupted()) return TOOL_INTERRUPTED;
    double start = tool_now_ms();
    int n = qvl_engine_step(f->engine, -1);
    *ms = tool_now_ms() - start;
    if (n < 0) return tool_library_error(NULL);
    for (int i = 0; i < n; i++) {
        const qvl_event *v = qvl_engine_event(f->engine, i);
        const char *why;
        if (qvl_event_error(v, &why)) return tool_fail("%s", why);
        f->ended += qvl_event_type(v) == QVL_EVENT_FINISHED;
        if (qvl_event_type(v) != QVL_EVENT_TOKEN) continue;
        f->counted++;
        f->started += f->tokens[qvl_event_request(v) - f->first]++ == 0;
    }
    return TOOL_OK;
}

/* Prompt tokens that the engine has processed so far. */
static int prompt_rows(const field *f, long *rows) {
    char *text;
    if (qvl_engine_stats(f->engine, &text) < 0) return tool_library_error(NULL);
    json_t *s = json_loads(text, 0, NULL);
    qvl_free(text);
    *rows = (long)json_integer_value(json_object_get(s, "prompt_tokens"));
    json_decref(s);
    return TOOL_OK;
}

/* Prompts are processed in order of arrival: of the first rows of all of them, how many lie beyond depth. */
static long beyond_depth(long rows, long depth, long n) {
    long rest = rows % (depth + n) - depth;
    return rows / (depth + n) * n + (rest > 0 ? rest : 0);
}

static int run_prefill(bench *b, double *value) {
    field f;
    int code = field_open(&f, b, b->depth + b->prefill, 1);
    double ms, sum = 0;
    for (long before = 0, after = 0; code == TOOL_OK && f.ended < f.streams; before = after) {
        code = field_step(&f, &ms);
        if (code == TOOL_OK && b->depth > 0) {
            code = prompt_rows(&f, &after);
            ms = after > before ? ms * (double)(beyond_depth(after, b->depth, b->prefill) - beyond_depth(before, b->depth, b->prefill)) / (double)(after - before) : 0;
        }
        sum += ms;
    }
    *value = 1e3 * (double)(b->prefill * b->streams) / sum;
    field_close(&f);
    return code;
}

/* The clock runs from the step after the last stream's first token, for n tokens of every stream. At depth 0 the prompt
 * is one token, whose step is a decode step like the others. Streams that were prefilled first get ahead meanwhile. */
static int run_decode(bench *b, double *value) {
    long batched = tool_library_number(b->args, "max_batched_tokens"), room = batched > b->streams ? batched - b->streams : 1;
    long prompt = b->depth ? b->depth : 1, ahead = b->depth && b->streams > 1 ? (b->streams * b->depth + room - 1) / room + 1 : 0;
    field f;
    int code = field_open(&f, b, prompt, b->decode + (b->depth > 0) + ahead);
    double ms, sum = 0;
    while (code == TOOL_OK && b->depth > 0 && f.started < f.streams) code = field_step(&f, &ms);
    f.counted = 0;
    while (code == TOOL_OK && f.counted < b->decode * b->streams && f.ended < f.streams) {
        code = field_step(&f, &ms);
        sum += ms;
    }
    *value = 1e3 * (double)f.counted / sum;
    field_close(&f);
    return code;
}

/* ---- the other tests ---- */

static int run_image(bench *b, double *value, int *tokens) {
    size_t bytes = (size_t)b->width * (size_t)b->height * 3;
    uint8_t *rgb = malloc(bytes);
    if (!rgb) return tool_fail("out of memory");
    for (size_t i = 0; i < bytes; i++) rgb[i] = (uint8_t)bench_draw(&b->random);
    qvl_image *im = NULL;
    qvl_embedding *e = NULL;
    int rc = qvl_image_from_pixels(&im, rgb, b->width, b->height, 0);
    free(rgb);
    double start = tool_now_ms();
    if (rc == 0) rc = qvl_encode_image(b->model, im, b->args->options, &e);
    *value = tool_now_ms() - start;
    if (rc == 0) rc = qvl_embedding_data(e, NULL, NULL, tokens, NULL);
    qvl_embedding_free(e);
    qvl_image_free(im);
    return rc < 0 ? tool_library_error(NULL) : TOOL_OK;
}

static int run_load(bench *b, double *value) {
    char path[PATH_MAX];
    int code = tool_model_path(b->args, path);
    if (code) return code;
    qvl_model_free(b->model); /* two at once might not fit, and would show in the peak */
    b->model = NULL;
    double start = tool_now_ms();
    int rc = qvl_model_load(&b->model, path, b->args->options);
    *value = tool_now_ms() - start;
    return rc < 0 ? tool_library_error(NULL) : TOOL_OK;
}

/* ---- results ---- */

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_row(const char *test, const char *unit, long n, long depth, long streams, const double *values, long count) {
    double *v = malloc((size_t)count * sizeof *v);
    if (!v) return;
    memcpy(v, values, (size_t)count * sizeof *v);
    qsort(v, (size_t)count, sizeof *v, ascending);
    double median = count % 2 ? v[count / 2] : (v[count / 2 - 1] + v[count / 2]) / 2;
    printf("%-9s %8ld %8ld %8ld %12.2f %12.2f %12.2f  %s\n", test, n, depth, streams, median, v[0], v[count - 1], unit);
    fflush(stdout);
    free(v);
}

static int add_result(bench *b, const char *test, const char *unit, long n, long depth, long streams, const double *values) {
    json_t *list = json_array(), *entry;
    for (long i = 0; i < b->repeat; i++) json_array_append_new(list, json_real(values[i]));
    entry = json_pack("{s:s, s:I, s:I, s:I, s:s, s:o}", "test", test, "n", (json_int_t)n, "depth", (json_int_t)depth, "streams", (json_int_t)streams, "unit",
                      unit, "values", list);
    if (strcmp(test, "image") == 0) json_object_set_new(entry, "size", json_sprintf("%dx%d", b->width, b->height));
    json_object_update(entry, b->about);
    if (!entry || json_array_append_new(b->results, entry) < 0) return tool_fail("out of memory");
    if (!tool_get(b->args, "json")) print_row(test, unit, n, depth, streams, values, b->repeat);
    return TOOL_OK;
}

typedef enum { PREFILL, DECODE, IMAGE, LOAD } test;

static int measure(bench *b, test which) {
    double *values = calloc((size_t)b->repeat + 1, sizeof *values);
    if (!values) return tool_fail("out of memory");
    int code = TOOL_OK, tokens = 0;
    for (long i = -1; code == TOOL_OK && i < b->repeat; i++) { /* -1: the warm-up, overwritten; loading was done once before */
        double *v = values + (i < 0 ? 0 : i);
        if (tool_interrupted()) code = TOOL_INTERRUPTED;
        else if (which == PREFILL) code = run_prefill(b, v);
        else if (which == DECODE) code = run_decode(b, v);
        else if (which == IMAGE) code = run_image(b, v, &tokens);
        else if (i >= 0) code = run_load(b, v);
    }
    if (code == TOOL_OK && which == PREFILL) code = add_result(b, "prefill", "tokens/s", b->prefill, b->depth, b->streams, values);
    if (code == TOOL_OK && which == DECODE) code = add_result(b, "decode", "tokens/s", b->decode, b->depth, b->streams, values);
    if (code == TOOL_OK && which == IMAGE) code = add_result(b, "image", "ms", tokens, 0, 1, values);
    if (code == TOOL_OK && which == LOAD) code = add_result(b, "load", "ms", 1, 0, 1, values);
    free(values);
    return code;
}

int bench_memory(const tool_args *a, const json_t *about, json_t *results) {
    struct rusage use;
    double weights = json_number_value(json_object_get(about, "weight_bytes"));
    getrusage(RUSAGE_SELF, &use);
    double peak = (double)use.ru_maxrss * 1024; /* Linux counts in kB */
    if (!tool_get(a, "json")) printf("peak memory %.1f MB, weights %.1f MB\n", peak / 1e6, weights / 1e6);
    json_t *entry = json_pack("{s:s, s:I}", "test", "memory", "peak_rss_bytes", (json_int_t)peak);
    json_object_update(entry, (json_t *)(uintptr_t)about);
    return !entry || json_array_append_new(results, entry) < 0 ? tool_fail("out of memory") : TOOL_OK;
}

int bench_describe(const tool_args *a, const qvl_model *m, json_t *about, uint32_t *vocab) {
    char path[PATH_MAX];
    json_t *info = tool_model_info(m);
    if (!info || tool_model_path(a, path)) {
        json_decref(info);
        return TOOL_FAILED;
    }
    static const char *const keys[] = {"family", "parameters", "dtype", "bf16_math", "kv_dtype", "device", "isa", "threads", "weight_bytes"};
    json_object_set_new(about, "model", json_string(path));
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) json_object_set(about, keys[i], json_object_get(info, keys[i]));
    *vocab = (uint32_t)json_integer_value(json_object_get(info, "vocab_size"));
    if (!tool_get(a, "json"))
        printf("%s: %s, %.3g M parameters, %s, %s %s, threads %d\n", path, json_string_value(json_object_get(info, "family")),
               (double)json_integer_value(json_object_get(info, "parameters")) / 1e6, json_string_value(json_object_get(info, "dtype")),
               json_string_value(json_object_get(info, "device")), json_string_value(json_object_get(info, "isa")),
               (int)json_integer_value(json_object_get(info, "threads")));
    json_decref(info);
    return *vocab ? TOOL_OK : tool_fail("the model tells no vocab_size");
}

static void print_head(const bench *b) {
    if (!tool_get(b->args, "json"))
        printf("%-9s %8s %8s %8s %12s %12s %12s  unit (%ld runs)\n", "test", "n", "depth", "streams", "median", "min", "max", b->repeat);
}

/* ---- command line ---- */

static int parse(bench *b) {
    const tool_args *a = b->args;
    int code = tool_number(a, "prefill", 1, 1 << 20, 0, &b->prefill);
    if (!code) code = tool_number(a, "decode", 1, 1 << 20, 0, &b->decode);
    if (!code) code = tool_number(a, "depth", 0, 1 << 20, 0, &b->depth);
    if (!code) code = tool_number(a, "streams", 1, 4096, 1, &b->streams);
    if (!code) code = tool_number(a, "repeat", 1, 10000, 5, &b->repeat);
    if (code) return code;
    const char *size = tool_get(a, "image");
    int end = 0;
    if (size && (sscanf(size, "%5dx%5d%n", &b->width, &b->height, &end) != 2 || size[end] || b->width < 1 || b->height < 1))
        return tool_usage(a->command, "option --image: \"%s\" is not a size such as 448x448", size);
    b->load = tool_get(a, "load") != NULL;
    if (!b->prefill && !b->decode && !size && !b->load) {
        b->prefill = 512;
        b->decode = 64;
        b->width = b->height = 448;
        b->load = true;
    }
    return TOOL_OK;
}

static int run(const tool_args *a) {
    if (tool_get(a, "kernels")) return bench_kernels(a);
    bench b = {.args = a, .random = {0x9E3779B97F4A7C15ULL, 0}};
    int code = parse(&b);
    if (code) return code;
    b.about = json_object();
    b.results = json_array();
    code = tool_model_load(a, &b.model, NULL);
    if (code == TOOL_OK) code = bench_describe(a, b.model, b.about, &b.random.vocab);
    if (code == TOOL_OK) print_head(&b);
    if (code == TOOL_OK && b.load) code = measure(&b, LOAD);
    if (code == TOOL_OK && b.width) code = measure(&b, IMAGE);
    if (code == TOOL_OK && b.prefill) code = measure(&b, PREFILL);
    if (code == TOOL_OK && b.decode) code = measure(&b, DECODE);
    if (code == TOOL_OK) code = bench_memory(a, b.about, b.results);
    if (code == TOOL_OK && tool_get(a, "json")) code = tool_print_json(json_incref(b.results));
    json_decref(b.about);
    json_decref(b.results);
    qvl_model_free(b.model);
    return code;
}

static const tool_option options[] = {
    {"prefill", 0, "N", "tokens a second of a prompt of N tokens"},
    {"decode", 0, "N", "tokens a second while N tokens are generated, one by one"},
    {"depth", 0, "N", "prefill and decode with N tokens already in the KV cache; default 0"},
    {"streams", 0, "N", "prefill and decode of N requests at once, tokens of all together; default 1"},
    {"image", 0, "WxH", "milliseconds to encode a picture of that size, resizing included"},
    {"load", 0, NULL, "milliseconds to load the model, its files being in the page cache"},
    {"kernels", 0, NULL, "no model: every kernel alone, in per cent of what memory or arithmetic allow"},
    {"repeat", 0, "N", "counted runs of each test, after one that is not; default 5"},
    {"json", 0, NULL, "a JSON list with every run's value"},
    {0},
};

const tool_command tool_bench = {
    .name = "bench",
    .synopsis = "[-m MODEL] [--prefill N] [--decode N] [--depth N] [--streams N] [--image WxH] [--load] [--repeat N] [--json]\n"
                "       qvl bench --kernels [--dtype T] [--threads N] [--json]",
    .summary = "how fast this machine runs a model",
    .details = "Without a test: --load --image 448x448 --prefill 512 --decode 64. The engine is made as large as the tests need.\n"
               "qvl bench --serve [OPTION]... is another mode, many users at once: qvl bench --serve --help.",
    .options = options,
    .scopes = "model prompt engine",
    .without = "max_requests max_context kv_blocks prefix_cache step_ms embedding_cache max_image_tokens video_min_pixels video_max_pixels video_layout add_generation_prompt add_vision_id",
    .max_words = 0,
    .run = run,
};
