/* gemm.c - matmul: blocks over the tile kernels.
 *
 * Job:        y = epilogue(x W^T + bias), split over threads by rows and panels.
 * Input:      float rows, a packed matrix.
 * Output:     float rows.
 * Invariants: k is never split over threads; a block of k ends by storing its accumulators and the next one starts from
 *             them, which changes no bit, so the sizes below are free to depend on the number of rows and threads;
 *             widening 16-bit weights to float is exact, so where it happens (registers or scratch) is free as well.
 *
 * Two ways through, equal in bits:
 *   few rows (one tile): weights go from memory through registers once, all of k in one piece, x is read where it lies;
 *   many rows: for each block of k, x is copied to scratch (rows a power of two apart would fall on the same cache
 *   lines), a slice of a panel is widened once, and all row tiles pass over it while it is in the first-level cache.
 */
#include <string.h>

#include "cpu.h"

typedef struct {
    const struct qvl__kern *k;
    const qvl__device *d;
    float *y;
    const float *x;
    int rows;
    const qvl__matrix *w;
    const float *bias;
    qvl__epilogue e;
    bool dot;            /* bf16 products */
    int unit;            /* panels that must stay together: 2 for gate_up */
    int panels, per_task; /* panels of the matrix, of a task */
    int row_blocks, block_rows;
    int n_out;           /* columns of y */
} job;

/* The same for weights of integers: activations become integers block by block of k. Every task does it for its own rows,
 * which costs a few per cent of its products and spares a buffer and a barrier. */
static void accumulate_int(const job *j, float *scratch, int r0, int rows, int p0, int count, float *acc) {
    const qvl__matrix *w = j->w;
    int k = w->k, all = qvl__div_up(k, QVL__GROUP);
    size_t panel_bytes = qvl__cpu_panel_bytes(w->type, k), ldc = (size_t)count * QVL__PANEL;
    const char *panels = (const char *)w->data + (size_t)p0 * panel_bytes;
    int most = (int)(QVL__GEMM_A_FLOATS * sizeof(float) / QVL__GROUP) / rows; /* groups of a block: integers in the A block, */
    int fit = QVL__GEMM_SLICE_FLOATS / 2 / rows;                             /* scales and sums in the slice */
    if (most > fit) most = fit;
    qvl__ints a = {.q = (int8_t *)(void *)scratch, .scale = scratch + QVL__GEMM_A_FLOATS,
                   .sum = (int32_t *)(void *)(scratch + QVL__GEMM_A_FLOATS + QVL__GEMM_SLICE_FLOATS / 2)};
    for (int g0 = 0; g0 < all; g0 += most) {
        int groups = all - g0 < most ? all - g0 : most, k0 = g0 * QVL__GROUP;
        a.ldq = (size_t)groups * QVL__GROUP;
        a.lds = (size_t)groups;
        for (int r = 0; r < rows; r++)
            j->k->quantize_rows((int8_t *)(void *)scratch + (size_t)r * a.ldq, scratch + QVL__GEMM_A_FLOATS + (size_t)r * a.lds,
                (int32_t *)(void *)(scratch + QVL__GEMM_A_FLOATS + QVL__GEMM_SLICE_FLOATS / 2) + (size_t)r * a.lds,
                j->x + (size_t)(r0 + r) * (size_t)k + k0, k - k0 < groups * QVL__GROUP ? k - k0 : groups * QVL__GROUP);
        j->k->gemm_int(w->type, acc, ldc, &a, panels, panel_bytes, rows, count, all, g0, groups, g0 > 0);
    }
}

/* acc[rows][count * 16] = x[rows] times count panels from p0. */
static void accumulate(const job *j, float *scratch, int r0, int rows, int p0, int count, float *acc) {
    const struct qvl__kern *kern = j->k;
    const qvl__matrix *w = j->w;
    int k = w->k, size = (int)qvl__type_size(w->type);
    size_t panel_bytes = qvl__cpu_panel_bytes(w->type, k), ldc = (size_t)count * QVL__PANEL;
    const char *panels = (const char *)w->data + (size_t)p0 * panel_bytes;
    const float *x = j->x + (size_t)r0 * (size_t)k;
    float *a = scratch, *slice = scratch + QVL__GEMM_A_FLOATS;

    if (j->dot) {
        int block = (QVL__GEMM_A_FLOATS / rows - QVL__PANEL) / 8 * 8 * 2; /* two to a float */
        if (block > 4096) block = 4096;
        if (rows > kern->mr && block > 2 * QVL__GEMM_K) block = 2 * QVL__GEMM_K;
        size_t lda = (size_t)block / 2 + QVL__PANEL / 2;
        for (int k0 = 0; k0 < k; k0 += block) {
            int n = k - k0 < block ? k - k0 : block;
            uint32_t *pairs = (uint32_t *)(void *)a;
            for (int r = 0; r < rows; r++)
                kern->narrow(QVL__BF16, (uint16_t *)(void *)(pairs + (size_t)r * lda), x + (size_t)r * (size_t)k + k0, n);
            kern->gemm_dot(acc, ldc, pairs, lda, panels + (size_t)k0 * QVL__PANEL * 2, panel_bytes, rows, count, (n + 1) / 2,
                k0 > 0);
        }
        return;
    }
    if (rows <= kern->mr) {
        kern->gemm(w->type, acc, ldc, x, (size_t)k, panels, panel_bytes, rows, count, k, false);
        return;
    }
    /* Up to three tiles, widening in registers each time costs less than writing floats out and reading them back. */
    bool in_registers = w->type == QVL__F32 || rows <= 3 * kern->mr;
    int block = in_registers && w->type != QVL__F32 ? 2 * QVL__GEMM_K : QVL__GEMM_K;
    size_t lda = (size_t)block + QVL__PANEL;
    for (int k0 = 0; k0 < k; k0 += block) {
        int n = k - k0 < block ? k - k0 : block;
        for (int r = 0; r < rows; r++)
            memcpy(a + (size_t)r * lda, x + (size_t)r * (size_t)k + k0, (size_t)n * sizeof(float));
        const char *from = panels + (size_t)k0 * QVL__PANEL * (size_t)size;
        if (in_registers) {
            kern->gemm(w->type, acc, ldc, a, lda, from, panel_bytes, rows, count, n, k0 > 0);
            continue;
        }
        size_t slice_floats = QVL__GEMM_K * QVL__PANEL;
        for (int p = 0; p < count; p += kern->np) {
            int np = count - p < kern->np ? count - p : kern->np;
            for (int i = 0; i < np; i++)
                kern->widen(w->type, slice + (size_t)i * slice_floats, from + (size_t)(p + i) * panel_bytes, n);
            kern->gemm(QVL__F32, acc + (size_t)p * QVL__PANEL, ldc, a, lda, slice, slice_floats * sizeof(float), rows, np, n,
                k0 > 0);
        }
    }
}

static void matmul_task(void *ctx, int task, int worker) {
    const job *j = ctx;
    float *scratch = qvl__cpu_scratch(j->d, worker);
    float *acc = scratch + QVL__GEMM_A_FLOATS + QVL__GEMM_SLICE_FLOATS;
    int r0 = task % j->row_blocks * j->block_rows;
    int r1 = j->rows - r0 < j->block_rows ? j->rows : r0 + j->block_rows;
    int p0 = task / j->row_blocks * j->per_task;
    int count = j->panels - p0 < j->per_task ? j->panels - p0 : j->per_task;
    (qvl__type_quantised(j->w->type) ? accumulate_int : accumulate)(j, scratch, r0, r1 - r0, p0, count, acc);

    int c0 = p0 / j->unit * QVL__PANEL, n = count / j->unit * QVL__PANEL;
    if (n > j->n_out - c0) n = j->n_out - c0;
    const float *bias = j->bias ? j->bias + c0 : NULL, *bias2 = j->bias && j->unit == 2 ? j->bias + j->n_out + c0 : NULL;
    for (int r = r0; r < r1; r++)
        j->k->epilogue(j->e, j->y + (size_t)r * (size_t)j->n_out + c0, acc + (size_t)(r - r0) * (size_t)count * QVL__PANEL,
            bias, bias2, n);
}

void qvl__cpu_matmul(qvl__device *d, float *y, const float *x, int rows, const qvl__matrix *w, const float *bias,
    qvl__epilogue e) {
    if (rows <= 0) return;
    const struct qvl__kern *k = qvl__cpu_kern(d);
    int threads = qvl__cpu_threads(d), unit = w->gate_up ? 2 : 1;
    job j = {.k = k, .d = d, .y = y, .x = x, .rows = rows, .w = w, .bias = bias, .e = e, .unit = unit};
    j.dot = d->bf16_math && w->type == QVL__BF16;
    j.n_out = w->n / unit;
    j.panels = qvl__div_up(j.n_out, QVL__PANEL) * unit;
    j.block_rows = qvl__div_up(rows, qvl__div_up(rows, QVL__GEMM_ROWS)); /* nearly equal, then whole tiles: at most 96 */
    if (rows > QVL__GEMM_ROWS) j.block_rows = qvl__div_up(j.block_rows, k->mr) * k->mr;
    j.row_blocks = qvl__div_up(rows, j.block_rows);

    /* Panels of a task: as many as the accumulators allow, few enough that every thread gets several tasks, and a
     * multiple of 8 (the widest tile) where the matrix is large. */
    int most = QVL__GEMM_ACC_FLOATS / QVL__PANEL / j.block_rows;
    int64_t tasks = (int64_t)threads * 4;
    int64_t want = ((int64_t)j.panels * j.row_blocks + tasks - 1) / tasks;
    want = want < 1 ? 1 : want > most ? most : want;
    if (want > 4) want = want >= 8 ? want / 8 * 8 : 4;
    j.per_task = (int)want;
    if (j.per_task % unit) j.per_task++;
    /* Too little work to wake anybody for. */
    if ((int64_t)rows * w->k * w->n < 65536 && j.panels <= most) j.per_task = j.panels;
    qvl__pool_run(d->pool, j.row_blocks * qvl__div_up(j.panels, j.per_task), matmul_task, &j);
}
