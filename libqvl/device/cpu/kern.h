/* kern.h - the table of row and tile functions that kern.c gives for each instruction set.
 *
 * Job:        the seam between the code that splits work (ops.c, gemm.c, attention.c, panel.c: compiled once for the
 *             baseline) and the code that computes (kern.c: compiled once per instruction set).
 * Input:      plain pointers; no function here allocates, splits over threads or can fail.
 * Output:     as each entry says.
 * Invariants: each output element is computed by the same operations in the same order whatever the number of rows,
 *             panels or columns it is computed together with.
 */
#ifndef QVL__KERN_H
#define QVL__KERN_H

#include "../device.h"

#define QVL__PANEL 16      /* output columns in a panel */
#define QVL__ATTN_KEYS 128 /* keys in a step of the online softmax: whole KV blocks */
/* Bytes of the scales at the beginning of a Q8 or Q4 panel: [groups][16] bf16, then the integers begin a cache line. */
#define QVL__INT_HEAD(groups) (((size_t)(groups) * QVL__PANEL * 2 + 63) / 64 * 64)

/* Rows of activations as integers of -127..127; for each group a scale, and where its integer sum starts (which is the
 * level's own business: int_from in integers.h; so is how an integer that meets Q8 is written). All three lie stride bytes
 * from row to row (a multiple of 4). */
typedef struct {
    const int8_t *q;
    const float *scale;
    const int32_t *start;
    size_t stride;
} qvl__ints;

/* Rows of numbers in two parts of bf16, hi and lo: lo lies low numbers behind hi, rows lie ld numbers apart. */
typedef struct {
    const uint16_t *hi;
    size_t ld, low;
} qvl__split;

/* Blocks of 32 keys or values in the layout of a bf16 cache (attention.c). low: bytes from a block's numbers to what rounding
 * left of them; 0: nothing. next: a block to be asked for from memory meanwhile, for each; NULL: none. */
typedef struct {
    const char *at[QVL__ATTN_KEYS / QVL__KV_BLOCK], *next[QVL__ATTN_KEYS / QVL__KV_BLOCK];
    size_t low;
    int n;
} qvl__kv_list;

struct qvl__kern {
    const char *isa;
    int mr; /* rows of the largest tile */
    int np; /* panels of the tile of mr rows */
    int dot_mr, int_mr; /* rows that gemm_dot and gemm_int are best given a multiple of */
    int block_rows, block_panels; /* of a task of matmul: rows, accumulators and a widened slice of weights fit a second-level cache */
    int q8_bytes; /* of an activation that meets Q8 weights, as quantize_rows writes it */
    bool widen_first; /* many rows: weights of 16 bits are widened to scratch once, rather than in registers by each tile */

    /* c[r][16 p + j] = sum over i = 0..k-1, in that order and into one accumulator, of a[r][i] * panel p [i][j]. With
     * resume the accumulator starts from c instead of zero, so that k may be cut anywhere (at an even place for BF16)
     * without changing a bit. Panels are panel_bytes apart; the layouts are in panel.c. next: panels as these that will be read after them, to be
     * asked for from memory meanwhile, where rows are one tile; NULL: none. */
    void (*gemm)(qvl__type type, float *c, size_t ldc, const float *a, size_t lda, const void *panels, size_t panel_bytes,
                 int rows, int count, int k, bool resume, const void *next);
    /* The same with bf16 products of pairs, of which a has one part or, where the level has split, two; panels are BF16; k may be cut
     * at a multiple of 32. NULL where there are none. */
    void (*gemm_dot)(float *c, size_t ldc, const qvl__split *a, const void *panels, size_t panel_bytes, int rows,
                     int count, int pairs, bool resume);
    /* Products of quantised weights: c[r][16 p + j] += over groups i = g0.., in that order and by one fused step each, of
     * (a's and the weights' integers multiplied and summed exactly) * (a's scale * the weights' scale). a is rows of ints
     * with scales from group 0; panels (of all groups) are read from group g0. c starts at zero without resume. */
    void (*gemm_int)(qvl__type type, float *c, size_t ldc, const qvl__ints *a, const void *panels, size_t panel_bytes, int rows,
                     int count, int all_groups, int g0, int groups, bool resume);
    /* k rows of a F32, F16, BF16 or I8 panel as floats [k][16]; exact. */
    void (*widen)(qvl__type type, float *dst, const void *panel, int k);
    /* n floats as BF16 or F16, rounded to nearest even, and a zero after an odd last one. F16 ends at 65504, beyond which all
     * stays there, and what is not finite becomes NaN. Where there are bf16 products, denormals may become zero in BF16, as they do there. */
    void (*narrow)(qvl__type type, uint16_t *dst, const float *src, int n);
    /* n floats as integers of -127..127, rounded to nearest even; returns the scale that brings them back: NaN when one
     * of them is not finite. */
    float (*quantize)(int8_t *dst, const float *src, int n);
    /* A row of k floats for products with weights of a type (qvl__ints): whole groups, with scale and start of each. */
    void (*quantize_rows)(qvl__type type, int8_t *q, float *scale, int32_t *start, const float *x, int k);
    /* A group of all columns of a panel, src [QVL__GROUP][16], as unsigned integers (Q4: 8 added, Q8: 128) in the panel's
     * layout, with the least squared error that a search finds; scales[16] in bf16, NaN for a column that is not finite. The
     * same bytes at every level. */
    void (*quantize_weights)(qvl__type type, uint8_t *out, uint16_t *scales, const float *src);
    /* y[i] *= w[i] */
    void (*scale)(float *y, const float *w, int n);

    /* One row of matmul's result: y[0..n) from the accumulators acc (which hold whole panels). bias may be NULL. For
     * SWIGLU acc is gate panel, up panel, gate panel, ...; n counts outputs and bias2 is the bias of the up half. */
    void (*epilogue)(qvl__epilogue e, float *y, const float *acc, const float *bias, const float *bias2, int n);

    /* One step of the online softmax for one query row: the first valid of the raw scores s count; up to the next multiple of
     * 16 s is written. Updates the running maximum (of scores times scale, as a power of 2) and sum, turns s into probabilities
     * (0 past valid) and, if the maximum grew, rescales o[0..dim) (dim a multiple of 16). */
    void (*softmax_step)(float *s, int valid, float scale, float *max, float *sum, float *o, int dim);
    /* out[0..n) = o[0..n) / sum */
    void (*divide)(float *out, const float *o, float sum, int n);

    /* Attention on tile registers (AMX); tiles is NULL where there are none. Rows are 1..16 or a multiple of 16. Between tiles(rows)
     * and tiles(0) the thread's tile registers are ready for scores and values of so many rows. */
    void (*tiles)(int rows);
    /* n floats as hi + lo, both bf16 (low numbers apart): x to 2^-17; and zeros up to a multiple of 32. */
    void (*split)(uint16_t *hi, size_t low, const float *x, int n);
    /* s[r][32 i + j] = q row r times key j of block i; rows of q lie ld numbers apart. */
    void (*scores)(float *s, size_t lds, qvl__split q, const qvl__kv_list *keys, int rows, int dim);
    /* o[r][0..dim) += p row r times the values of the blocks, 32 of them each. */
    void (*values)(float *o, size_t ldo, qvl__split p, const qvl__kv_list *values, int rows, int dim);
    /* The values of a block of dim columns, and zero from token n on; returns whether all of the first n are finite. */
    bool (*first_values)(uint16_t *to, const uint16_t *from, int dim, int n);

    /* y[0..n) = x * rsqrt(mean(x^2) + eps) * w; y may be x. */
    void (*rms_norm)(float *y, const float *x, const float *w, int n, float eps);
    void (*layer_norm)(float *y, const float *x, const float *w, const float *b, int n, float eps);
    /* rotate_half: pairs (x[i], x[i + half]) turned by angle i. In place. */
    void (*rope)(float *x, const float *cos, const float *sin, int half);
    /* y += x, y += a * x */
    void (*add)(float *y, const float *x, int n);
    void (*axpy)(float *y, const float *x, float a, int n);

    /* A yardstick: rounds of the multiplications and additions that products with weights of a type are made of, on
     * registers alone. Returns how many of them a round has. */
    uint64_t (*peak)(qvl__type type, int rounds);
};

int qvl__kern_generic(struct qvl__kern *k);
int qvl__kern_avx2(struct qvl__kern *k);
int qvl__kern_avx2_vnni(struct qvl__kern *k);
int qvl__kern_avx512(struct qvl__kern *k);
int qvl__kern_avx512_vnni(struct qvl__kern *k);
int qvl__kern_avx512_bf16(struct qvl__kern *k);
int qvl__kern_amx(struct qvl__kern *k);

#endif
