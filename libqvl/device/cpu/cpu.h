/* cpu.h - what the files of the CPU device share.
 *
 * Job:        the device's own state, its scratch, the panel layout's sizes, and how work is cut into tasks.
 * Input:      included by dispatch.c, ops.c, panel.c, gemm.c and attention.c.
 * Output:     declarations.
 * Invariants: a task writes outputs that no other task writes; per-worker scratch is used inside pool tasks only, and
 *             the pool runs one loop at a time, so ops may be called from several threads.
 */
#ifndef QVL__CPU_H
#define QVL__CPU_H

#include <pthread.h>

#include "kern.h"

/* K in a block of a matmul task; its rows and panels are the kernels' business. */
#define QVL__GEMM_K 256
#define QVL__GEMM_SLICE_FLOATS (4 * QVL__GEMM_K * QVL__PANEL)
#define QVL__PACK_BYTES ((size_t)8 << 20) /* rows of a matmul in packed form, all threads together */
#define QVL__MAX_K (1 << 20)              /* inputs of a weight: a packed row must fit */

#define QVL__ATTN_ROWS 48      /* query rows (tokens x heads of one KV head) in an attention task */
#define QVL__ATTN_TILE_ROWS 64 /* the same on tile registers, which need less scratch */
#define QVL__ATTN_MAX_DIM 512  /* largest head_dim of a KV cache */
/* Floats of scratch of one attention task: q, o, scores, and the keys and values of a step widened. */
#define QVL__ATTN_FLOATS(dim) \
    ((size_t)QVL__ATTN_ROWS * (2 * (size_t)(dim) + QVL__ATTN_KEYS) + 2 * QVL__ATTN_KEYS * (size_t)(dim))

struct qvl__cpu {
    struct qvl__kern kern;
    int threads;
    char *scratch; /* threads slices of slice bytes */
    size_t slice;
    pthread_mutex_t packing; /* held while packed is in use: ops may be called from several threads */
    char *packed;            /* QVL__PACK_BYTES */
};

static inline const struct qvl__kern *qvl__cpu_kern(const qvl__device *d) { return &((const struct qvl__cpu *)d->impl)->kern; }
static inline int qvl__cpu_threads(const qvl__device *d) { return ((const struct qvl__cpu *)d->impl)->threads; }
static inline void *qvl__cpu_scratch(const qvl__device *d, int worker) {
    const struct qvl__cpu *c = d->impl;
    return c->scratch + (size_t)worker * c->slice;
}

/* Floats of accumulators of a matmul task; a row has another panel behind it, so that rows are no power of two apart. */
static inline int qvl__gemm_acc_floats(const struct qvl__kern *k) { return k->block_rows * (k->block_panels + 1) * QVL__PANEL; }

static inline int qvl__div_up(int a, int b) { return a / b + (a % b != 0); }

/* Into how many tasks to cut items (rows, columns) that cost about cost floats each: one (run by the caller) when the
 * whole is too small to be worth waking anybody, otherwise a few for each thread. */
static inline int qvl__cpu_tasks(const qvl__device *d, int items, size_t cost) {
    size_t n = (size_t)items * cost / 16384, most = (size_t)qvl__cpu_threads(d) * 4;
    if (n > most) n = most;
    if (n > (size_t)items) n = (size_t)items;
    return n ? (int)n : 1;
}
/* Where task i of tasks begins. */
static inline int qvl__cpu_cut(int items, int i, int tasks) { return (int)((int64_t)items * i / tasks); }

/* ops.c: the device over a given set of kernels; dispatch.c chooses it, the tests also bring their own. */
int qvl__cpu_open_kern(qvl__device **out, qvl__pool *pool, bool bf16_math, int (*init)(struct qvl__kern *k));

/* panel.c */
size_t qvl__cpu_panel_bytes(qvl__type type, int k);
int qvl__cpu_matrix_new(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, qvl__role role);
void qvl__cpu_matrix_put(qvl__device *d, qvl__matrix *m, int first, int count, qvl__type src_type, const void *src);
int qvl__cpu_matrix_map(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, qvl__role role, const void *data, uint64_t bytes);
void qvl__cpu_matrix_free(qvl__device *d, qvl__matrix *m);
void qvl__cpu_embed(qvl__device *d, float *y, const qvl__matrix *table, const int32_t *ids, int rows);

/* gemm.c */
void qvl__cpu_matmul(qvl__device *d, float *y, const float *x, int rows, const qvl__matrix *w, const float *bias,
    qvl__epilogue e);

/* ops.c: y[idx[r]] += scale[r] * x[r], r in order. */
void qvl__cpu_scatter_scaled(qvl__device *d, float *y, const float *x, const int32_t *idx, const float *scale, int rows, int dim);

/* moe.c */
void qvl__cpu_moe(qvl__device *d, float *x, const float *norm, const float *logits, int rows, const qvl__experts *e, int top_k, void *work);
size_t qvl__cpu_moe_work(qvl__device *d, int rows, int hidden, int inter, int experts, int top_k);
int qvl__cpu_experts_link(qvl__device *d, qvl__experts *e);
void qvl__cpu_experts_unlink(qvl__device *d, qvl__experts *e);

/* attention.c */
int qvl__cpu_kv_new(qvl__device *d, qvl__kv *kv, qvl__type type, int layers, int kv_heads, int head_dim, int blocks);
int qvl__cpu_kv_block_bytes(qvl__device *d, qvl__type type, int layers, int kv_heads, int head_dim, size_t *bytes);
void qvl__cpu_kv_free(qvl__device *d, qvl__kv *kv);
void qvl__cpu_kv_copy(qvl__device *d, qvl__kv *kv, int from, int to);
void qvl__cpu_qk_norm_rope_kv(qvl__device *d, float *qkv, int heads, const float *q_norm, const float *k_norm, float eps,
                              const float *cos, const float *sin, qvl__kv *kv, int layer, const qvl__ragged *b);
void qvl__cpu_attention_paged(qvl__device *d, float *out, const float *qkv, int heads, const qvl__kv *kv, int layer,
                              const qvl__ragged *b);
void qvl__cpu_attention_pack(qvl__device *d, void *scratch, const float *qkv, int span, int heads, int head_dim, int head, int n);
void qvl__cpu_attention_full(qvl__device *d, float *qkv, int span, int heads, int head_dim, int head, int n, int row, int rows,
                             const void *scratch);
size_t qvl__cpu_attention_full_scratch(qvl__device *d, int span, int head_dim, int n);

#endif
