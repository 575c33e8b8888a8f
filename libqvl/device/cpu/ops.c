/* ops.c - the op table of the CPU device: opening, memory, and the ops that work row by row.
 *
 * Job:        split every op over the threads of the pool and call the kernels.
 * Input:      see device.h.
 * Output:     see device.h.
 * Invariants: tasks split outputs (rows or columns), so results are the same for every number of threads;
 *             per-worker scratch is taken here, once, and no op allocates.
 */
#include <string.h>

#include "cpu.h"

/* ---- memory ---- */

static void *cpu_alloc(qvl__device *d, size_t size) {
    (void)d;
    return qvl__pages(size);
}

static void cpu_free(qvl__device *d, void *p, size_t size) {
    (void)d;
    if (p) qvl__pages_free(p, size);
}

static int cpu_sync(qvl__device *d) {
    (void)d;
    return 0;
}

static uint64_t cpu_room(qvl__device *d) {
    (void)d;
    return 0;
}

static void cpu_put(qvl__device *d, void *dst, const void *host, size_t size) {
    (void)d;
    memcpy(dst, host, size);
}

static void cpu_get(qvl__device *d, void *host, const void *src, size_t size) {
    (void)d;
    memcpy(host, src, size);
}

/* ---- ops over rows (norms, rope, gather, interpolation): one job, one task function each ---- */

typedef struct {
    const struct qvl__kern *k;
    float *y;
    const float *x, *w, *b;
    const int32_t *idx;
    int rows, dim, tasks;
    float eps;
    int heads, span; /* rope_vision; dim is head_dim */
    bool add;        /* scatter_rows; qvl__cpu_scatter_scaled has w instead */
} row_job;

static void run_rows(qvl__device *d, row_job *j, size_t cost, void (*fn)(void *ctx, int task, int worker)) {
    if (j->rows <= 0) return;
    j->k = qvl__cpu_kern(d);
    j->tasks = qvl__cpu_tasks(d, j->rows, cost);
    qvl__pool_run(d->pool, j->tasks, fn, j);
}

#define FOR_ROWS(j, task)                                                                               \
    (void)worker;                                                                                       \
    const row_job *j = ctx;                                                                             \
    size_t dim = (size_t)j->dim;                                                                        \
    for (int r = qvl__cpu_cut(j->rows, task, j->tasks); r < qvl__cpu_cut(j->rows, task + 1, j->tasks); r++)

static void rms_task(void *ctx, int task, int worker) {
    FOR_ROWS(j, task) j->k->rms_norm(j->y + (size_t)r * dim, j->x + (size_t)r * dim, j->w, j->dim, j->eps);
}

static void cpu_rms_norm(qvl__device *d, float *y, const float *x, const float *w, int rows, int dim, float eps) {
    row_job j = {.y = y, .x = x, .w = w, .rows = rows, .dim = dim, .eps = eps};
    run_rows(d, &j, (size_t)dim, rms_task);
}

static void layer_task(void *ctx, int task, int worker) {
    FOR_ROWS(j, task) j->k->layer_norm(j->y + (size_t)r * dim, j->x + (size_t)r * dim, j->w, j->b, j->dim, j->eps);
}

static void cpu_layer_norm(qvl__device *d, float *y, const float *x, const float *w, const float *b, int rows, int dim,
    float eps) {
    row_job j = {.y = y, .x = x, .w = w, .b = b, .rows = rows, .dim = dim, .eps = eps};
    run_rows(d, &j, (size_t)dim, layer_task);
}

static void gather_task(void *ctx, int task, int worker) {
    FOR_ROWS(j, task) memcpy(j->y + (size_t)r * dim, j->x + (size_t)j->idx[r] * dim, dim * sizeof(float));
}

static void cpu_gather_rows(qvl__device *d, float *y, const float *x, const int32_t *idx, int rows, int dim) {
    row_job j = {.y = y, .x = x, .idx = idx, .rows = rows, .dim = dim};
    run_rows(d, &j, (size_t)dim, gather_task);
}

static void interpolate_task(void *ctx, int task, int worker) {
    FOR_ROWS(j, task) {
        for (int c = 0; c < 4; c++)
            j->k->axpy(j->y + (size_t)r * dim, j->x + (size_t)j->idx[(size_t)r * 4 + (size_t)c] * dim,
                j->w[(size_t)r * 4 + (size_t)c], j->dim);
    }
}

static void cpu_add_interpolated(qvl__device *d, float *y, const float *table, const int32_t *index, const float *weight,
    int rows, int dim) {
    row_job j = {.y = y, .x = table, .idx = index, .w = weight, .rows = rows, .dim = dim};
    run_rows(d, &j, 4 * (size_t)dim, interpolate_task);
}

/* w is cos, b is sin */
static void rope_task(void *ctx, int task, int worker) {
    FOR_ROWS(j, task) {
        float *x = j->y + (size_t)r * 3 * (size_t)j->heads * dim;
        size_t angle = (size_t)(r % j->span) * (dim / 2);
        for (int h = 0; h < 2 * j->heads; h++) j->k->rope(x + (size_t)h * dim, j->w + angle, j->b + angle, j->dim / 2);
    }
}

static void cpu_rope_vision(qvl__device *d, float *qkv, int rows, int heads, int head_dim, const float *cos,
    const float *sin, int span) {
    row_job j = {.y = qkv, .w = cos, .b = sin, .rows = rows, .dim = head_dim, .heads = heads, .span = span};
    run_rows(d, &j, 2 * (size_t)heads * (size_t)head_dim, rope_task);
}

/* Split by columns: two rows may go to the same place, and their order has to hold. */
static void scatter_task(void *ctx, int task, int worker) {
    (void)worker;
    const row_job *j = ctx;
    size_t dim = (size_t)j->dim;
    size_t c0 = (size_t)qvl__cpu_cut(j->dim, task, j->tasks), c1 = (size_t)qvl__cpu_cut(j->dim, task + 1, j->tasks);
    for (int r = 0; r < j->rows; r++) {
        float *y = j->y + (size_t)j->idx[r] * dim + c0;
        const float *x = j->x + (size_t)r * dim + c0;
        if (j->w)
            j->k->axpy(y, x, j->w[r], (int)(c1 - c0));
        else if (j->add)
            j->k->add(y, x, (int)(c1 - c0));
        else
            memcpy(y, x, (c1 - c0) * sizeof(float));
    }
}

static void cpu_scatter_rows(qvl__device *d, float *y, const float *x, const int32_t *idx, int rows, int dim, bool add) {
    if (rows <= 0 || dim <= 0) return;
    row_job j = {.k = qvl__cpu_kern(d), .y = y, .x = x, .idx = idx, .rows = rows, .dim = dim, .add = add};
    j.tasks = qvl__cpu_tasks(d, dim, (size_t)rows);
    qvl__pool_run(d->pool, j.tasks, scatter_task, &j);
}

void qvl__cpu_scatter_scaled(qvl__device *d, float *y, const float *x, const int32_t *idx, const float *scale, int rows,
    int dim) {
    if (rows <= 0 || dim <= 0) return;
    row_job j = {.k = qvl__cpu_kern(d), .y = y, .x = x, .w = scale, .idx = idx, .rows = rows, .dim = dim};
    j.tasks = qvl__cpu_tasks(d, dim, (size_t)rows);
    qvl__pool_run(d->pool, j.tasks, scatter_task, &j);
}

/* ---- open and close ---- */

static void cpu_close(qvl__device *d) {
    if (!d) return;
    struct qvl__cpu *c = d->impl;
    if (c) {
        if (c->scratch) qvl__pages_free(c->scratch, c->slice * (size_t)c->threads);
        if (c->packed) qvl__pages_free(c->packed, QVL__PACK_BYTES);
        pthread_mutex_destroy(&c->packing);
        qvl__free(c);
    }
    qvl__free(d);
}

int qvl__cpu_open_kern(qvl__device **out, qvl__pool *pool, bool bf16_math, int (*init)(struct qvl__kern *k)) {
    *out = NULL;
    qvl__device *d = qvl__calloc(1, sizeof *d);
    if (!d) return QVL_ENOMEM;
    struct qvl__cpu *c = d->impl = qvl__calloc(1, sizeof *c);
    if (!c) {
        qvl__free(d);
        return QVL_ENOMEM;
    }
    pthread_mutex_init(&c->packing, NULL);
    init(&c->kern);
    c->threads = qvl__pool_threads(pool);
    size_t attention = QVL__ATTN_FLOATS(QVL__ATTN_MAX_DIM), matmul = (size_t)qvl__gemm_acc_floats(&c->kern) + QVL__GEMM_SLICE_FLOATS;
    c->slice = ((matmul > attention ? matmul : attention) * sizeof(float) + 4095) / 4096 * 4096;
    c->scratch = qvl__pages(c->slice * (size_t)c->threads);
    c->packed = qvl__pages(QVL__PACK_BYTES);
    if (!c->scratch || !c->packed) {
        cpu_close(d);
        return QVL_ENOMEM;
    }
    d->name = "cpu";
    d->isa = c->kern.isa;
    d->pool = pool;
    d->bf16_math = bf16_math && c->kern.gemm_dot;
    d->kv_type = d->bf16_math && c->kern.tiles ? QVL__BF16 : QVL__F16; /* tile registers take bf16; as floats F16 is nearer and costs the same */
    d->host_memory = true;
    d->slice_flops = 5e9; /* 30 ms on two AVX2 cores */
    d->close = cpu_close;
    d->sync = cpu_sync;
    d->room = cpu_room;
    d->alloc = cpu_alloc;
    d->free = cpu_free;
    d->put = cpu_put;
    d->get = cpu_get;
    d->matrix_new = qvl__cpu_matrix_new;
    d->matrix_put = qvl__cpu_matrix_put;
    d->matrix_map = qvl__cpu_matrix_map;
    d->matrix_free = qvl__cpu_matrix_free;
    d->kv_new = qvl__cpu_kv_new;
    d->kv_block_bytes = qvl__cpu_kv_block_bytes;
    d->kv_free = qvl__cpu_kv_free;
    d->kv_copy = qvl__cpu_kv_copy;
    d->embed = qvl__cpu_embed;
    d->gather_rows = cpu_gather_rows;
    d->scatter_rows = cpu_scatter_rows;
    d->moe = qvl__cpu_moe;
    d->moe_work = qvl__cpu_moe_work;
    d->experts_link = qvl__cpu_experts_link;
    d->experts_unlink = qvl__cpu_experts_unlink;
    d->add_interpolated = cpu_add_interpolated;
    d->rms_norm = cpu_rms_norm;
    d->layer_norm = cpu_layer_norm;
    d->matmul = qvl__cpu_matmul;
    d->qk_norm_rope_kv = qvl__cpu_qk_norm_rope_kv;
    d->attention_paged = qvl__cpu_attention_paged;
    d->rope_vision = cpu_rope_vision;
    d->attention_pack = qvl__cpu_attention_pack;
    d->attention_full = qvl__cpu_attention_full;
    d->attention_full_scratch = qvl__cpu_attention_full_scratch;
    *out = d;
    return 0;
}
