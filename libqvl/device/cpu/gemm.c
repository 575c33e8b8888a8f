/* gemm.c - matmul: blocks over the tile kernels.
 *
 * Job:        y = epilogue(x W^T + bias), split over threads by rows and panels.
 * Input:      float rows, a packed matrix.
 * Output:     float rows.
 * Invariants: k is never split over threads; a block of k ends by storing its accumulators and the next one starts from
 *             them, which changes no bit, so the sizes below are free to depend on the number of rows and threads;
 *             widening 16-bit weights to float is exact, so where it happens (registers or scratch) is free as well.
 *
 * The way through: rows of x are packed once into the form that the tiles read (floats, pairs of bf16, or integers with
 * their scales), block by block of k, so that a block of rows is one stretch of memory; then each task takes a block of rows
 * and some panels, and for each block of k all its row tiles pass over a panel while it is in the first-level cache.
 * One tile of float rows is read where it lies, and weights go from memory through registers once.
 */
#include <string.h>

#include "cpu.h"

typedef enum { FLOATS, PAIRS, INTS } form;

typedef struct {
    const struct qvl__kern *k;
    qvl__device *d;
    float *y;
    const float *x;
    int rows;
    const qvl__matrix *w;
    const float *bias;
    qvl__epilogue e;
    form form;
    int mr;               /* rows of its largest tile */
    bool widen;           /* weights to scratch before many rows pass */
    int unit;             /* panels that must stay together: 2 for gate_up */
    int panels, per_task; /* panels of the matrix, of a task */
    int row_blocks, block_rows;
    int n_out;            /* columns of y */
    char *packed;         /* [blocks of k][rows][stride]; NULL: x is read where it lies */
    int block;            /* k in a block of packed */
    size_t stride;        /* bytes */
    size_t low;           /* PAIRS in two parts (kern.h): the second lies so many numbers behind the first; 0: one part */
    size_t scales;        /* INTS: where a row's scales lie behind its integers; its starts follow them */
    int pack_tasks;
} job;

static void pack_task(void *ctx, int task, int worker) {
    (void)worker;
    const job *j = ctx;
    int k = j->w->k;
    for (int r = qvl__cpu_cut(j->rows, task, j->pack_tasks); r < qvl__cpu_cut(j->rows, task + 1, j->pack_tasks); r++)
        for (int k0 = 0; k0 < k; k0 += j->block) {
            int n = k - k0 < j->block ? k - k0 : j->block;
            const float *x = j->x + (size_t)r * (size_t)k + k0;
            char *to = j->packed + ((size_t)(k0 / j->block) * (size_t)j->rows + (size_t)r) * j->stride;
            float *scale = (float *)(void *)(to + j->scales);
            if (j->form == FLOATS) memcpy(to, x, (size_t)n * sizeof(float));
            else if (j->low) j->k->split((uint16_t *)(void *)to, j->low, x, n);
            else if (j->form == PAIRS) j->k->narrow(QVL__BF16, (uint16_t *)(void *)to, x, n);
            else j->k->quantize_rows(j->w->type, (int8_t *)to, scale, (int32_t *)(void *)(scale + j->block / QVL__GROUP), x, n);
        }
}

static size_t acc_ld(int count) { return ((size_t)count + 1) * QVL__PANEL; }

/* acc[rows][count * 16], rows acc_ld apart, = x[r0..] times count panels from p0. */
static void accumulate(const job *j, float *slice, int r0, int rows, int p0, int count, float *acc) {
    const struct qvl__kern *kern = j->k;
    const qvl__matrix *w = j->w;
    int k = w->k;
    size_t panel_bytes = qvl__cpu_panel_bytes(w->type, k), ldc = acc_ld(count);
    const char *panels = (const char *)w->data + (size_t)p0 * panel_bytes;
    if (!j->packed) {
        kern->gemm(w->type, acc, ldc, j->x + (size_t)r0 * (size_t)k, (size_t)k, panels, panel_bytes, rows, count, k, false, NULL);
        return;
    }
    for (int k0 = 0; k0 < k; k0 += j->block) {
        int n = k - k0 < j->block ? k - k0 : j->block;
        const char *a = j->packed + ((size_t)(k0 / j->block) * (size_t)j->rows + (size_t)r0) * j->stride;
        if (j->form == INTS) {
            const float *scale = (const float *)(const void *)(a + j->scales);
            qvl__ints ints = {(const int8_t *)a, scale, (const int32_t *)(const void *)(scale + j->block / QVL__GROUP), j->stride};
            kern->gemm_int(w->type, acc, ldc, &ints, panels, panel_bytes, rows, count, qvl__div_up(k, QVL__GROUP), k0 / QVL__GROUP,
                qvl__div_up(n, QVL__GROUP), k0 > 0);
            continue;
        }
        const char *from = panels + (size_t)k0 * QVL__PANEL * qvl__type_size(w->type);
        size_t lda = j->stride / sizeof(float);
        if (j->form == PAIRS) {
            qvl__split x = {(const uint16_t *)(const void *)a, j->stride / 2, j->low};
            kern->gemm_dot(acc, ldc, &x, from, panel_bytes, rows, count, (n + 1) / 2, k0 > 0);
            continue;
        }
        const float *af = (const float *)(const void *)a;
        if (!j->widen) {
            kern->gemm(w->type, acc, ldc, af, lda, from, panel_bytes, rows, count, n, k0 > 0, NULL);
            continue;
        }
        size_t slice_floats = QVL__GEMM_K * QVL__PANEL;
        for (int p = 0; p < count; p += kern->np) {
            int np = count - p < kern->np ? count - p : kern->np;
            for (int i = 0; i < np; i++)
                kern->widen(w->type, slice + (size_t)i * slice_floats, from + (size_t)(p + i) * panel_bytes, n);
            kern->gemm(QVL__F32, acc + (size_t)p * QVL__PANEL, ldc, af, lda, slice, slice_floats * sizeof(float), rows, np, n, k0 > 0, NULL);
        }
    }
}

static void matmul_task(void *ctx, int task, int worker) {
    const job *j = ctx;
    float *slice = qvl__cpu_scratch(j->d, worker), *acc = slice + QVL__GEMM_SLICE_FLOATS;
    int r0 = task % j->row_blocks * j->block_rows;
    int r1 = j->rows - r0 < j->block_rows ? j->rows : r0 + j->block_rows;
    int p0 = task / j->row_blocks * j->per_task;
    int count = j->panels - p0 < j->per_task ? j->panels - p0 : j->per_task;
    accumulate(j, slice, r0, r1 - r0, p0, count, acc);

    int c0 = p0 / j->unit * QVL__PANEL, n = count / j->unit * QVL__PANEL;
    if (n > j->n_out - c0) n = j->n_out - c0;
    const float *bias = j->bias ? j->bias + c0 : NULL, *bias2 = j->bias && j->unit == 2 ? j->bias + j->n_out + c0 : NULL;
    for (int r = r0; r < r1; r++)
        j->k->epilogue(j->e, j->y + (size_t)r * (size_t)j->n_out + c0, acc + (size_t)(r - r0) * acc_ld(count),
            bias, bias2, n);
}

/* How rows are packed: the form, and blocks of k that leave room in the first-level cache for a panel's share of it. Where the
 * level can, pairs that go into and out of attention are in two parts, nearly exact: a fourth of the text model's products,
 * which makes two fifths of what rounding activations costs (docs/performance.md). */
static void plan_packing(job *j) {
    const qvl__matrix *w = j->w;
    j->form = qvl__type_quantised(w->type) ? INTS : j->d->bf16_math && w->type == QVL__BF16 ? PAIRS : FLOATS;
    j->mr = j->form == PAIRS ? j->k->dot_mr : j->form == INTS ? j->k->int_mr : j->k->mr;
    bool many = j->rows > j->mr;
    /* Up to three tiles, widening in registers each time costs less than writing floats out and reading them back. */
    j->widen = j->form == FLOATS && w->type != QVL__F32 && j->k->widen_first && j->rows > 3 * j->k->mr;
    j->block = w->type == QVL__F32 || j->widen || (j->form == INTS && j->k->tiles) ? QVL__GEMM_K : 2 * QVL__GEMM_K;
    if (!many) j->block = qvl__div_up(w->k, QVL__GROUP) * QVL__GROUP; /* all of it */
    j->low = j->form == PAIRS && j->k->split && w->role.head_dim ? (size_t)j->block : 0;
    size_t one = j->low ? 4 : j->form == FLOATS ? sizeof(float) : j->form == PAIRS ? 2 : w->type == QVL__Q8 ? (size_t)j->k->q8_bytes : 1;
    j->scales = (size_t)j->block * one;
    j->stride = j->scales + (j->form == INTS ? (size_t)j->block / QVL__GROUP * 8 : 0);
    j->stride = (j->stride + 63) / 64 * 64 + 64; /* whole lines, and never a power of two */
}

/* At most as many rows as the pack buffer holds. */
static void matmul_rows(job *j) {
    qvl__device *d = j->d;
    int threads = qvl__cpu_threads(d), rows = j->rows;
    j->block_rows = qvl__div_up(rows, qvl__div_up(rows, j->k->block_rows)); /* nearly equal, then whole tiles */
    if (rows > j->k->block_rows) j->block_rows = qvl__div_up(j->block_rows, j->mr) * j->mr;
    j->row_blocks = qvl__div_up(rows, j->block_rows);

    /* Panels of a task: as many as the accumulators allow, few enough that every thread gets several tasks, and a
     * multiple of 8 (two tiles of the widest) where the matrix is large. */
    int most = qvl__gemm_acc_floats(j->k) / QVL__PANEL / j->block_rows - 1;
    int64_t tasks = (int64_t)threads * 4;
    int64_t want = ((int64_t)j->panels * j->row_blocks + tasks - 1) / tasks;
    want = want < 1 ? 1 : want > most ? most : want;
    if (want > 4) want = want >= 8 ? want / 8 * 8 : 4;
    j->per_task = (int)want;
    if (j->per_task % j->unit) j->per_task++;
    /* Too little work to wake anybody for. */
    if ((int64_t)rows * j->w->k * j->w->n < 65536 && j->panels <= most) j->per_task = j->panels;
    if (j->packed) {
        j->pack_tasks = qvl__cpu_tasks(d, rows, (size_t)j->w->k);
        qvl__pool_run(d->pool, j->pack_tasks, pack_task, j);
    }
    qvl__pool_run(d->pool, j->row_blocks * qvl__div_up(j->panels, j->per_task), matmul_task, j);
}

void qvl__cpu_matmul(qvl__device *d, float *y, const float *x, int rows, const qvl__matrix *w, const float *bias,
    qvl__epilogue e) {
    if (rows <= 0) return;
    struct qvl__cpu *c = d->impl;
    int unit = w->role.gate_up ? 2 : 1;
    job j = {.k = &c->kern, .d = d, .y = y, .x = x, .rows = rows, .w = w, .bias = bias, .e = e, .unit = unit};
    j.n_out = w->n / unit;
    j.panels = qvl__div_up(j.n_out, QVL__PANEL) * unit;
    plan_packing(&j);
    if (j.form == FLOATS && rows <= c->kern.mr) {
        matmul_rows(&j);
        return;
    }
    size_t row_bytes = (size_t)qvl__div_up(w->k, j.block) * j.stride;
    int most = (int)(QVL__PACK_BYTES / row_bytes); /* at least one: QVL__MAX_K */
    if (most > c->kern.block_rows) most = most / c->kern.block_rows * c->kern.block_rows;
    pthread_mutex_lock(&c->packing);
    j.packed = c->packed;
    for (int r = 0; r < rows; r += j.rows) {
        j.rows = rows - r < most ? rows - r : most;
        j.x = x + (size_t)r * (size_t)w->k;
        j.y = y + (size_t)r * (size_t)j.n_out;
        matmul_rows(&j);
    }
    pthread_mutex_unlock(&c->packing);
}
