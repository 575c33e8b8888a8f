/* device.h - the op table: everything that a device must be able to do. forward/ is written over it and nothing else.
 *
 * Job:        weights, buffers, the paged KV cache and about 20 ops, fused where CPU and GPU both gain.
 * Input:      device pointers (on the CPU: plain pointers); activations are float, row-major [rows][dim].
 * Output:     as each op says. Ops cannot fail: sizes were checked when the model and the engine were built.
 * Invariants: an output row depends only on its own input row (and its own KV), and every reduction runs in one fixed
 *             order, whatever the number of rows, threads or chunks (docs/invariance.md);
 *             no op allocates; workspace comes from the caller or was taken when the device was opened.
 */
#ifndef QVL__DEVICE_H
#define QVL__DEVICE_H

#include "../base/base.h"
#include "draw.h"

/* I8 is a type of cached keys and values only: 8-bit integers with one float scale per token and KV head.
 * Q8 and Q4 are types of matrices only: 8-bit and 4-bit integers with one scale for QVL__GROUP inputs of an output
 * feature; their products round activations to 8 bits on the CPU, a scale for each group of a row.
 * F8 is E4M3 (Micikevicius et al. 2022), for devices with fp8: cached keys and values as they are, up to 448; matrices with a
 * scale for each group, as they are stored in FP8 checkpoints. */
typedef enum { QVL__F32 = 0, QVL__BF16 = 1, QVL__F16 = 2, QVL__I8 = 3, QVL__Q8 = 4, QVL__Q4 = 5, QVL__F8 = 6 } qvl__type;
#define QVL__GROUP 32
static inline bool qvl__type_quantised(qvl__type t) { return t == QVL__Q8 || t == QVL__Q4; }
/* Matrices of this type have a scale for each group. */
static inline bool qvl__type_scaled(qvl__type t) { return qvl__type_quantised(t) || t == QVL__F8; }
/* Bytes of one number; not of Q8 and Q4. */
static inline size_t qvl__type_size(qvl__type t) { return t == QVL__F32 ? 4 : t == QVL__I8 || t == QVL__F8 ? 1 : 2; }
/* Bytes of a row of k numbers as matrix_put takes them; F8: the numbers, a byte where k is odd, scales in bf16. */
static inline size_t qvl__row_bytes(qvl__type t, size_t k) {
    return t == QVL__F8 ? (k + 1) / 2 * 2 + (k + QVL__GROUP - 1) / QVL__GROUP * 2 : k * qvl__type_size(t);
}

/* Name of a type in options and JSON; and back, false for none of them. */
const char *qvl__type_name(qvl__type t);
bool qvl__kv_type_of(const char *name, qvl__type *out);

/* Tokens in a KV block. Attention walks blocks in order and this is its fixed width (docs/invariance.md). */
#define QVL__KV_BLOCK 32

typedef struct qvl__device qvl__device;

/* What a device is opened with. */
typedef struct {
    bool bf16_math;     /* products of matmul may round activations to bf16, where the device has such products */
    bool deterministic; /* GPU: kernels whose rows do not depend on the batch (on the CPU they never do) */
    double memory;      /* GPU: the part of its memory that may be used, 0..1 */
    int gpus;           /* GPU: how many share the model; 0 as 1 */
} qvl__device_options;

/* How a weight is used, which is what a device needs to know to lay it out, and to divide it when the device is several
 * GPUs (tensor parallel; Shoeybi et al. 2019, Megatron-LM). Undivided, every GPU has all of it. */
typedef enum {
    QVL__WHOLE = 0,  /* not divided */
    QVL__BY_OUTPUT,  /* output features divided; what comes out goes into a weight BY_INPUT */
    QVL__BY_HEAD,    /* the same for q, k and v: heads of head_dim, the last 2 kv_heads of them keys and values */
    QVL__BY_INPUT,   /* inputs divided (heads of head_dim, when that is set), partial results added up */
    QVL__TABLE       /* output features divided, what comes out is brought together: embedding and head */
} qvl__division;
typedef struct {
    qvl__division division;
    bool gate_up; /* n/2 gate columns and n/2 up columns, side by side so that one pass yields SwiGLU */
    int head_dim, kv_heads;
} qvl__role;

/* A packed weight of n output features by k inputs. How data is laid out is the device's business; on the CPU: panels
 * of 16 output columns, see cpu/panel.c. */
typedef struct {
    qvl__type type;
    int n, k;
    qvl__role role;
    bool mapped; /* data is part of a file that outlives the matrix */
    size_t bytes;
    void *data;
} qvl__matrix;

/* The experts of a layer: n of them, all of the same sizes. */
typedef struct {
    int n; /* 0: a plain MLP */
    qvl__matrix *gate_up, *down; /* [n] */
    void *link; /* the device's own */
} qvl__experts;

typedef enum {
    QVL__EPI_NONE = 0,
    QVL__EPI_ADD,       /* y += x W^T + b (the residual) */
    QVL__EPI_GELU_TANH, /* vision MLP */
    QVL__EPI_GELU_ERF,  /* mergers */
    QVL__EPI_SWIGLU     /* gate_up matrices: y[n/2] = silu(gate) * up */
} qvl__epilogue;

/* The paged cache of one engine: blocks x layers x (K, V). */
typedef struct {
    qvl__type type;
    int layers, kv_heads, head_dim, blocks;
    size_t block_bytes; /* one block, all layers, K and V */
    void *data;
} qvl__kv;

/* Where the rows of a ragged batch live: row r is token number pos[r] (from 0) of sequence seq[r]; its key and value go
 * to block table[seq * stride + pos / QVL__KV_BLOCK], place pos % QVL__KV_BLOCK, and it attends to keys 0..pos of its
 * sequence. Rows of one sequence are consecutive and ascending. */
typedef struct {
    int rows;
    const int32_t *seq, *pos;
    const int32_t *table;
    int stride;
    /* Known on the host, for devices that choose kernels by them; 0 is always right. */
    int singles; /* so many rows at the beginning are the only ones of their sequences */
    int longest; /* at least the largest pos + 1 */
} qvl__ragged;

struct qvl__device {
    const char *name; /* "cpu" */
    const char *isa;  /* "generic", "avx2", "avx2-vnni", "avx512", "avx512-vnni", "avx512-bf16", "amx" */
    qvl__pool *pool;  /* borrowed */
    bool bf16_math;   /* products of matmul round activations to bf16 (dtype bf16 on a CPU with AVX-512-BF16 or AMX, or a GPU) */
    qvl__type kv_type; /* which cache it attends to best: what kv_dtype auto means, but with dtype f32 */
    bool fp8;         /* takes F8: matrices and caches */
    bool host_memory; /* what alloc gives may be read and written by the host */
    double slice_flops; /* how much work of the vision tower is worth a look at the clock */
    void *impl;       /* the device's own state (CPU: kernel table and per-thread scratch) */

    void (*close)(qvl__device *d);
    /* Waits until everything asked for is done. 0, or the first failure of any op since the device was opened (QVL_ENODEV:
     * the GPU is lost): ops themselves cannot report. */
    int (*sync)(qvl__device *d);
    /* A second device over the same memory, whose ops run beside this one's, in no order with them: buffers belong to the
     * device that took them, weights serve both. It is closed before this one. NULL where ops are done when they return. */
    int (*beside)(qvl__device *d, qvl__device **out);
    /* Whether all that was asked for is done (or has failed); NULL where ops are done when they return. */
    bool (*idle)(qvl__device *d);
    /* Bytes that are left for a KV cache; 0: memory is the host's, and the caller's options decide. */
    uint64_t (*room)(qvl__device *d);
    /* Steps that repeat. replay: true when the ops of this key were recorded before; they have been started again, over
     * the same buffers. False: the caller calls the ops and then recorded; nothing but ops without put, get and alloc may
     * lie between. NULL where calling the ops is cheap. */
    bool (*replay)(qvl__device *d, const uint64_t key[4]);
    void (*recorded)(qvl__device *d);

    /* Buffers. alloc gives zeroed memory or NULL (message set). On several GPUs a buffer is on all of them, and one of rows
     * that come out of a divided weight holds on each GPU its part, at the beginning of rows of the full width. */
    void *(*alloc)(qvl__device *d, size_t size);
    void (*free)(qvl__device *d, void *p, size_t size);
    void (*put)(qvl__device *d, void *dst, const void *host, size_t size);
    void (*get)(qvl__device *d, void *host, const void *src, size_t size);

    /* Weights. put packs count rows [count][k] of type src_type, which become output features first, first + 1, ...;
     * converting to the matrix's type (round to nearest even; Q8 and Q4: the scale with the least squared error; to F8: from F8 only, and back never). For gate_up, features 0..n/2-1 are gate, the rest up.
     * A Q8 or Q4 matrix is put whole before the next one is begun. */
    int (*matrix_new)(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, qvl__role role);
    void (*matrix_put)(qvl__device *d, qvl__matrix *m, int first, int count, qvl__type src_type, const void *src);
    void (*matrix_free)(qvl__device *d, qvl__matrix *m);
    /* A matrix whose packed data lie in memory already, bytes of them; on the CPU they are used where they are. */
    int (*matrix_map)(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, qvl__role role, const void *data, uint64_t bytes);
    /* Once the matrices of e are there, before its first use; and before they go. */
    int (*experts_link)(qvl__device *d, qvl__experts *e);
    void (*experts_unlink)(qvl__device *d, qvl__experts *e);

    /* Bytes of one block, all layers, K and V; QVL_EUNSUPPORTED for what kv_new would refuse. */
    int (*kv_block_bytes)(qvl__device *d, qvl__type type, int layers, int kv_heads, int head_dim, size_t *bytes);
    int (*kv_new)(qvl__device *d, qvl__kv *kv, qvl__type type, int layers, int kv_heads, int head_dim, int blocks);
    void (*kv_free)(qvl__device *d, qvl__kv *kv);
    /* Block `to` gets the contents of block `from`, all layers (copy-on-write of a block that two sequences share). */
    void (*kv_copy)(qvl__device *d, qvl__kv *kv, int from, int to);

    /* y[r] = feature row ids[r] of the matrix (an embedding table [vocab][dim]), as floats; numbered as in matrix_put. */
    void (*embed)(qvl__device *d, float *y, const qvl__matrix *table, const int32_t *ids, int rows);
    /* y[r] = x[idx[r]]. */
    void (*gather_rows)(qvl__device *d, float *y, const float *x, const int32_t *idx, int rows, int dim);
    /* y[idx[r]] = x[r], or += with add. */
    void (*scatter_rows)(qvl__device *d, float *y, const float *x, const int32_t *idx, int rows, int dim, bool add);
    /* y[r] += sum over c of weight[4r + c] * table[index[4r + c]], c = 0..3 in order (interpolated position embedding). */
    void (*add_interpolated)(qvl__device *d, float *y, const float *table, const int32_t *index, const float *weight, int rows, int dim);

    void (*rms_norm)(qvl__device *d, float *y, const float *x, const float *w, int rows, int dim, float eps);
    void (*layer_norm)(qvl__device *d, float *y, const float *x, const float *w, const float *b, int rows, int dim, float eps);

    /* y[rows][n, or n/2 for SWIGLU] = epilogue(x[rows][k] W^T + bias); bias may be NULL; y and x do not overlap. */
    void (*matmul)(qvl__device *d, float *y, const float *x, int rows, const qvl__matrix *w, const float *bias, qvl__epilogue e);

    /* Text: qkv is [rows][(heads + 2 kv_heads) * head_dim], q then k then v. RMSNorm per head of q and k (weights
     * [head_dim]), rotate_half RoPE by cos, sin [rows][head_dim / 2], q back in place, k and v into the cache. */
    void (*qk_norm_rope_kv)(qvl__device *d, float *qkv, int heads, const float *q_norm, const float *k_norm, float eps,
                            const float *cos, const float *sin, qvl__kv *kv, int layer, const qvl__ragged *b);
    /* out[rows][heads * head_dim]: causal softmax(q k^T / sqrt(head_dim)) v over the paged cache; q as left in qkv. */
    void (*attention_paged)(qvl__device *d, float *out, const float *qkv, int heads, const qvl__kv *kv, int layer, const qvl__ragged *b);

    /* Mixture of experts: x[r] += sum over r's experts, in ascending order, of weight * down(swiglu(gate_up(norm[r]))). Experts and weights
     * come from logits[rows][n]: softmax, the top_k largest (the lower index among equals), scaled to add up to 1. work: moe_work bytes. */
    void (*moe)(qvl__device *d, float *x, const float *norm, const float *logits, int rows, const qvl__experts *e, int top_k, void *work);
    size_t (*moe_work)(qvl__device *d, int rows, int hidden, int inter, int experts, int top_k);

    /* chosen[i] = the token that draws[i] takes from its row of logits [.][vocab], which is overwritten, or QVL__DRAW_*; ids from limit on
     * are not taken. NULL where the host can read logits: it samples them itself (sample/sample.c). */
    void (*sample)(qvl__device *d, int32_t *chosen, float *logits, int vocab, int limit, const qvl__draw *draws, int rows, const qvl__changed *changed);

    /* Vision: qkv is [rows][3 * heads * head_dim]. rotate_half RoPE on q and k by cos, sin [span][head_dim / 2], where
     * rows repeat every span (one temporal patch = one span). */
    void (*rope_vision)(qvl__device *d, float *qkv, int rows, int heads, int head_dim, const float *cos, const float *sin, int span);
    /* Full attention inside a span of rows of qkv, in two calls so that a large span can be done in pieces: pack brings
     * keys and values of heads [head, head + n) into scratch; attention_full replaces the queries of these heads in rows
     * [row, row + rows) by their outputs. */
    void (*attention_pack)(qvl__device *d, void *scratch, const float *qkv, int span, int heads, int head_dim, int head, int n);
    void (*attention_full)(qvl__device *d, float *qkv, int span, int heads, int head_dim, int head, int n, int row, int rows, const void *scratch);
    /* Bytes of scratch for n heads of a span. */
    size_t (*attention_full_scratch)(qvl__device *d, int span, int head_dim, int n);
};

/* Opens what option device names: "cpu"; "cuda" (QVL_ENODEV with the reason when there is no plug-in, no driver or no GPU);
 * "auto": a GPU if one can be opened, else the CPU. pool is borrowed. */
int qvl__device_open(qvl__device **out, qvl__pool *pool, const char *name, const qvl__device_options *o);

/* Opens the CPU. bf16_math asks for bf16 products, granted where the CPU has them (see d->bf16_math after). The level
 * is the fastest that cpuid and the operating system allow, or the one that the environment variable QVL_CPU (generic, avx2,
 * avx2-vnni, avx512, avx512-vnni, avx512-bf16, amx) names. */
int qvl__cpu_open(qvl__device **out, qvl__pool *pool, bool bf16_math);
/* Times the kernels of an open CPU against the machine's limits; the JSON object of qvl_bench_kernels, appended to json. */
int qvl__cpu_bench(qvl__device *d, qvl__buf *json, qvl_progress_fn progress, void *ud);

#endif
