/* roofline.c - how near the kernels come to what the machine can do.
 *
 * Job:        time every kind of kernel alone and set it beside the limits that the same run measures: bytes a second
 *             read from memory, and multiplications and additions a second of the type's own instruction on registers.
 * Input:      an open CPU device.
 * Output:     a JSON object: limits, and a line for each kernel (qvl.h, qvl_bench_kernels).
 * Invariants: a kernel's limit is the longer of the two times that its bytes and its operations need (Williams et al. 2009);
 *             the best of several runs counts, for limits and kernels alike; what streams is larger than caches are (up to 512 MB of them);
 *             weights and keys are one byte pattern throughout, a small positive number in every type.
 */
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "cpu.h"

#define LEAST ((size_t)256 << 20) /* bytes that are streamed: twice the last cache, within these */
#define MOST ((size_t)1 << 30)
#define PATTERN 0x3c               /* 0.0115 as F32 and BF16, 1.06 as F16 */
#define FOR_MS 60                  /* how long a kernel is repeated, at least three times */

typedef struct {
    qvl__device *d;
    const struct qvl__kern *k;
    char *region;
    size_t size; /* of region */
    float *x, *y; /* ROWS rows of INPUTS and of OUTPUTS */
    double read;  /* bytes a millisecond */
    double peak[QVL__Q4 + 1];
    qvl__buf *json;
    int lines;
    qvl_progress_fn progress;
    void *ud;
} bench;

enum { ROWS = 512, INPUTS = 2048, OUTPUTS = 6144, HEADS = 16, KV_HEADS = 8, DIM = 128, DEPTH = 2048, LAYERS = 16 /* of keys, in LEAST */, SPAN = 1024, VISION_DIM = 64 };
enum { LINES = 25 };

/* ---- limits ---- */

/* Milliseconds of the fastest call. */
static double best_of(void (*fn)(void *ctx, int round), void *ctx) {
    double best = 1e30, sum = 0;
    for (int round = 0; round < 3 || sum < FOR_MS; round++) {
        double t = qvl__now_ms();
        fn(ctx, round);
        t = qvl__now_ms() - t;
        if (t < best) best = t;
        sum += t;
    }
    return best;
}

#define PIECES 64
/* A word of every line, from several stretches in turn: how many a core reads fastest differs from machine to machine. */
typedef struct {
    bench *b;
    int streams; /* at most 16 */
} read_job;
static void read_task(void *ctx, int task, int worker) {
    (void)worker;
    enum { STRETCH = 32 << 10 };
    const read_job *j = ctx;
    const size_t piece = j->b->size / PIECES;
    const char *p = j->b->region + piece * (size_t)task;
    uint64_t s[16] = {0};
    for (size_t at = 0; at < piece; at += (size_t)j->streams * STRETCH)
        for (size_t i = 0; i < STRETCH; i += 64)
            for (int k = 0; k < j->streams; k++) s[k] |= *(const uint64_t *)(const void *)(p + at + (size_t)k * STRETCH + i);
    volatile uint64_t sink = 0;
    for (int k = 0; k < 16; k++) sink |= s[k];
    (void)sink;
}
static void read_all(void *ctx, int round) {
    (void)round;
    qvl__pool_run(((read_job *)ctx)->b->d->pool, PIECES, read_task, ctx);
}
static double read_limit(bench *b) {
    double best = 1e30;
    for (read_job j = {b, 1}; j.streams <= 16; j.streams *= 2) {
        double t = best_of(read_all, &j);
        if (t < best) best = t;
    }
    return (double)b->size / best;
}

typedef struct {
    const struct qvl__kern *k;
    qvl__type type;
} peak_job;
#define PEAK_ROUNDS 20000
static void peak_task(void *ctx, int task, int worker) {
    (void)task, (void)worker;
    const peak_job *j = ctx;
    j->k->peak(j->type, PEAK_ROUNDS);
}
static double peak_of(const bench *b, qvl__type type) {
    peak_job j = {b->k, type};
    int tasks = 8 * qvl__cpu_threads(b->d);
    double best = 1e30;
    for (int round = 0; round < 20; round++) {
        double t = qvl__now_ms();
        qvl__pool_run(b->d->pool, tasks, peak_task, &j);
        t = qvl__now_ms() - t;
        if (t < best) best = t;
    }
    return (double)b->k->peak(type, 0) * PEAK_ROUNDS * tasks / best;
}

/* ---- lines ---- */

/* A kernel that moved bytes and did ops on the arithmetic of a type in ms. Returns non-zero to stop. */
static int report(bench *b, const char *kernel, const char *type, int rows, double ms, double bytes, double ops, qvl__type arithmetic) {
    double memory = bytes / b->read, compute = b->peak[arithmetic] > 0 ? ops / b->peak[arithmetic] : 0;
    qvl__buf_printf(b->json, "%s{\"kernel\": \"%s\", \"type\": \"%s\", \"rows\": %d, \"ms\": %.5g, \"gb_s\": %.4g, \"gop_s\": %.4g, \"bound\": \"%s\", \"percent\": %.3g}",
                    b->lines++ ? ", " : "", kernel, type, rows, ms, bytes / ms / 1e6, ops / ms / 1e6, memory >= compute ? "memory" : "arithmetic",
                    100 * (memory >= compute ? memory : compute) / ms);
    if (!b->progress || b->progress(b->ud, (uint64_t)b->lines, LINES) == 0) return 0;
    return qvl__fail(QVL_ECANCELLED, "the kernels' bench was cancelled by the progress callback");
}

/* ---- kernels ---- */

typedef struct {
    bench *b;
    qvl__matrix m[160]; /* one after the other through the region */
    int matrices, rows;
    qvl__kv kv;
    qvl__ragged ragged;
    void *scratch;
} job;

static void run_matmul(void *ctx, int round) {
    job *j = ctx;
    bench *b = j->b;
    b->d->matmul(b->d, b->y, b->x, j->rows, &j->m[round % j->matrices], NULL, QVL__EPI_NONE);
}

static int matmuls(bench *b, qvl__type type) {
    static const int rows[] = {1, 16, ROWS};
    job j = {.b = b};
    size_t bytes = qvl__cpu_panel_bytes(type, INPUTS) * (OUTPUTS / QVL__PANEL);
    int rc = 0;
    for (; j.matrices < 160 && (size_t)(j.matrices + 1) * bytes <= b->size && rc == 0; j.matrices++)
        rc = b->d->matrix_map(b->d, &j.m[j.matrices], type, OUTPUTS, INPUTS, (qvl__role){0}, b->region + (size_t)j.matrices * bytes, bytes);
    for (int i = 0; i < 3 && rc == 0; i++) {
        j.rows = rows[i];
        double moved = (double)bytes + (double)j.rows * (INPUTS + OUTPUTS) * sizeof(float), ops = 2.0 * j.rows * INPUTS * OUTPUTS;
        rc = report(b, "matmul", qvl__type_name(type), j.rows, best_of(run_matmul, &j), moved, ops,
                  type == QVL__BF16 && !b->d->bf16_math ? QVL__F32 : type);
    }
    return rc;
}

/* Whose arithmetic attention over bf16 keys uses. */
static qvl__type attention_type(const bench *b) { return b->d->bf16_math && b->k->tiles ? QVL__BF16 : QVL__F32; }

static void run_paged(void *ctx, int round) {
    job *j = ctx;
    bench *b = j->b;
    b->d->attention_paged(b->d, b->y, b->x, HEADS, &j->kv, round % j->kv.layers, &j->ragged);
}

/* Attention of one new token, and of a chunk of a prompt, over DEPTH keys. */
static int paged(bench *b, qvl__type type) {
    int32_t seq[ROWS] = {0}, pos[ROWS], table[DEPTH / QVL__KV_BLOCK];
    job j = {.b = b};
    int rc = b->d->kv_new(b->d, &j.kv, type, LAYERS * (int)(b->size / LEAST), KV_HEADS, DIM, DEPTH / QVL__KV_BLOCK);
    if (rc) return rc;
    memset(j.kv.data, PATTERN, j.kv.block_bytes * (size_t)j.kv.blocks);
    for (int i = 0; i < ROWS; i++) pos[i] = DEPTH - ROWS + i;
    for (int i = 0; i < DEPTH / QVL__KV_BLOCK; i++) table[i] = (i * 29 + 7) % (DEPTH / QVL__KV_BLOCK);
    for (int many = 0; many < 2 && rc == 0; many++) {
        int rows = many ? ROWS : 1;
        j.ragged = (qvl__ragged){.rows = rows, .seq = seq, .pos = pos + ROWS - rows, .table = table, .stride = DEPTH / QVL__KV_BLOCK};
        double keys = rows * (DEPTH - (rows - 1) / 2.0), bytes = (double)j.kv.block_bytes * j.kv.blocks / j.kv.layers + 2.0 * rows * HEADS * DIM * sizeof(float);
        rc = report(b, "attention_paged", qvl__type_name(type), rows, best_of(run_paged, &j), bytes, 4.0 * keys * HEADS * DIM, type == QVL__BF16 ? attention_type(b) : QVL__F32);
    }
    b->d->kv_free(b->d, &j.kv);
    return rc;
}

static void run_full(void *ctx, int round) {
    (void)round;
    job *j = ctx;
    bench *b = j->b;
    b->d->attention_pack(b->d, j->scratch, b->x, SPAN, HEADS, VISION_DIM, 0, HEADS);
    b->d->attention_full(b->d, b->y, SPAN, HEADS, VISION_DIM, 0, HEADS, 0, SPAN, j->scratch);
}

static int full(bench *b) {
    size_t bytes = b->d->attention_full_scratch(b->d, SPAN, VISION_DIM, HEADS);
    job j = {.b = b, .scratch = qvl__pages(bytes)};
    if (!j.scratch) return QVL_ENOMEM;
    int rc = report(b, "attention_full", qvl__type_name(attention_type(b)), SPAN, best_of(run_full, &j), (4.0 * SPAN * HEADS * VISION_DIM) * sizeof(float),
                  4.0 * SPAN * SPAN * HEADS * VISION_DIM, attention_type(b));
    qvl__pages_free(j.scratch, bytes);
    return rc;
}

/* Row by row through half of the region into the other half. */
static int long_rows(const bench *b) { return (int)(b->size / 2 / INPUTS / sizeof(float)); }
static void run_rms(void *ctx, int round) {
    (void)round;
    bench *b = ((job *)ctx)->b;
    b->d->rms_norm(b->d, (float *)(void *)(b->region + b->size / 2), (const float *)(const void *)b->region, b->x, long_rows(b), INPUTS, 1e-6f);
}
static void run_layer(void *ctx, int round) {
    (void)round;
    bench *b = ((job *)ctx)->b;
    b->d->layer_norm(b->d, (float *)(void *)(b->region + b->size / 2), (const float *)(const void *)b->region, b->x, b->x, long_rows(b), INPUTS, 1e-6f);
}
static void quantize_task(void *ctx, int task, int worker) {
    (void)worker;
    bench *b = ((job *)ctx)->b;
    const int rows = long_rows(b);
    for (int r = qvl__cpu_cut(rows, task, PIECES); r < qvl__cpu_cut(rows, task + 1, PIECES); r++) {
        char *to = b->region + b->size / 2 + (size_t)r * INPUTS * 3;
        float *scale = (float *)(void *)(to + INPUTS * b->k->q8_bytes);
        b->k->quantize_rows(QVL__Q8, (int8_t *)to, scale, (int32_t *)(void *)(scale + INPUTS / QVL__GROUP), (const float *)(const void *)b->region + (size_t)r * INPUTS, INPUTS);
    }
}
static void run_quantize(void *ctx, int round) {
    (void)round;
    qvl__pool_run(((job *)ctx)->b->d->pool, PIECES, quantize_task, ctx);
}
static void run_put(void *ctx, int round) {
    (void)round;
    job *j = ctx;
    j->b->d->matrix_put(j->b->d, &j->m[0], 0, OUTPUTS, QVL__BF16, j->b->region);
}

static int rows_and_weights(bench *b) {
    static const qvl__type types[] = {QVL__BF16, QVL__Q8, QVL__Q4};
    job j = {.b = b};
    const int rows = long_rows(b);
    double numbers = (double)rows * INPUTS;
    int rc = report(b, "rms_norm", "f32", rows, best_of(run_rms, &j), 8 * numbers, 4 * numbers, QVL__F32);
    if (rc == 0) rc = report(b, "layer_norm", "f32", rows, best_of(run_layer, &j), 8 * numbers, 7 * numbers, QVL__F32);
    if (rc == 0) rc = report(b, "quantize_rows", "int8", rows, best_of(run_quantize, &j), numbers * (4 + b->k->q8_bytes + 8.0 / QVL__GROUP), 0, QVL__F32);
    for (int i = 0; i < 3 && rc == 0; i++) { /* a bf16 checkpoint's rows into panels */
        if ((rc = b->d->matrix_new(b->d, &j.m[0], types[i], OUTPUTS, INPUTS, (qvl__role){0})) < 0) break;
        rc = report(b, "pack_weights", qvl__type_name(types[i]), OUTPUTS, best_of(run_put, &j), 2.0 * OUTPUTS * INPUTS + (double)j.m[0].bytes, 0, QVL__F32);
        b->d->matrix_free(b->d, &j.m[0]);
    }
    return rc;
}

/* ---- all of it ---- */

int qvl__cpu_bench(qvl__device *d, qvl__buf *json, qvl_progress_fn progress, void *ud) {
    static const qvl__type types[] = {QVL__F32, QVL__BF16, QVL__Q8, QVL__Q4}, caches[] = {QVL__F32, QVL__BF16, QVL__I8};
    bench b = {.d = d, .k = qvl__cpu_kern(d), .json = json, .progress = progress, .ud = ud};
    size_t x = (size_t)ROWS * OUTPUTS * sizeof(float); /* the widest rows of all kernels: SPAN x 3 x HEADS x VISION_DIM as well */
    long cache = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE /* glibc */
    cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    b.size = cache <= 0 || (size_t)cache < LEAST / 2 ? LEAST : (size_t)cache > MOST / 2 ? MOST : 2 * (size_t)cache / LEAST * LEAST;
    b.region = qvl__pages(b.size), b.x = qvl__pages(x), b.y = qvl__pages(x);
    int rc = b.region && b.x && b.y ? 0 : QVL_ENOMEM;
    if (rc == 0) {
        memset(b.region, PATTERN, b.size);
        for (size_t i = 0; i < x / sizeof(float); i++) b.x[i] = (float)(i * 2654435761u % 1001) / 500 - 1;
        memcpy(b.y, b.x, x);
        b.read = read_limit(&b);
        qvl__buf_printf(json, "{\"device\": \"%s\", \"isa\": \"%s\", \"threads\": %d, \"limits\": {\"read_gb_s\": %.4g", d->name, d->isa, qvl__cpu_threads(d), b.read / 1e6);
        for (int i = 0; i < 4; i++) {
            b.peak[types[i]] = peak_of(&b, types[i]);
            qvl__buf_printf(json, ", \"%s_gop_s\": %.4g", qvl__type_name(types[i]), b.peak[types[i]] / 1e6);
        }
        qvl__buf_puts(json, "}, \"kernels\": [");
    }
    for (int i = 0; i < 4 && rc == 0; i++) rc = matmuls(&b, types[i]);
    for (int i = 0; i < 3 && rc == 0; i++) rc = paged(&b, caches[i]);
    if (rc == 0) rc = full(&b);
    if (rc == 0) rc = rows_and_weights(&b);
    qvl__buf_puts(json, "]}");
    if (b.region) qvl__pages_free(b.region, b.size);
    if (b.x) qvl__pages_free(b.x, x);
    if (b.y) qvl__pages_free(b.y, x);
    return rc == 0 && json->failed ? QVL_ENOMEM : rc;
}
