/* attend.cuh - attention of single rows in float: decode, and everything with dtype f32.
 *
 * Job:        softmax(q k^T / sqrt(head_dim)) v for each row by itself, the keys cut into pieces that run side by side.
 * Input:      q rows; keys and values in blocks.
 * Output:     rows of heads * head_dim.
 * Invariants: how a row's keys are cut depends on how many it has, never on the batch; pieces are put together in order:
 *             a row's result is the same alone and in any batch.
 *
 * A block has one row, up to ATTEND_HEADS query heads of one KV head (which share the loaded keys) and one piece. Scores:
 * a lane has a key of the block of 32; values: a lane has head_dim / 32 columns.
 */
#ifndef QVL__ATTEND_CUH
#define QVL__ATTEND_CUH

#include "cache.cuh"

#define ATTEND_WARPS 4
#define ATTEND_HEADS 8                    /* two for each warp */
#define ATTEND_PIECES 64                  /* most pieces of a row */
#define ATTEND_PIECE (4 * QVL__KV_BLOCK)  /* keys of a piece, until there would be more than ATTEND_PIECES */
#define ATTEND_SHARED(dim) ((2 * QVL__KV_BLOCK * ((dim) + 1) + ATTEND_HEADS * (dim)) * sizeof(float))

struct attend_args {
    float *out;
    const float *q;      /* row r, head h: q + r * q_stride + h * head_dim */
    size_t q_stride, out_stride;
    int heads, group;    /* query heads; of one KV head */
    const int32_t *seq, *pos; /* NULL: every row sees all keys up to span */
    int span;
    float *partial;      /* [rows][heads][pieces][head_dim + 2]: sums, maximum, denominator; NULL with one piece */
    int pieces;
};

__device__ __forceinline__ int keys_of_row(const attend_args &a, int r) { return a.pos ? a.pos[r] + 1 : a.span; }

/* Keys of a piece for a row with len keys. */
__device__ __forceinline__ int piece_keys(int len) {
    int times = (len + ATTEND_PIECE * ATTEND_PIECES - 1) / (ATTEND_PIECE * ATTEND_PIECES);
    return ATTEND_PIECE * times;
}

/* COLS = ceil(head_dim / 32). Grid (rows, KV heads x chunks of their group, pieces). */
template <int COLS> static __global__ void __launch_bounds__(ATTEND_WARPS * 32) attend(attend_args a, keys_of c) {
    QVL_SHARED(float, shared);
    int n = c.head_dim, line = n + 1, r = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float *ks = shared, *vs = ks + QVL__KV_BLOCK * line, *qs = vs + QVL__KV_BLOCK * line;
    int chunks = (a.group + ATTEND_HEADS - 1) / ATTEND_HEADS, kv_head = blockIdx.y / chunks, g0 = blockIdx.y % chunks * ATTEND_HEADS;
    int heads = a.group - g0 < ATTEND_HEADS ? a.group - g0 : ATTEND_HEADS, h0 = kv_head * a.group + g0;
    int len = keys_of_row(a, r), per = piece_keys(len), first = blockIdx.z * per, end = first + per < len ? first + per : len;
    if (first >= end) return;
    float scale = 1.0f / sqrtf((float)n);
    for (int i = threadIdx.x; i < heads * n; i += ATTEND_WARPS * 32) qs[i] = a.q[r * a.q_stride + (size_t)h0 * n + i];
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {}, acc[2][COLS] = {};
    int seq = a.seq ? a.seq[r] : 0;
    for (int k0 = first; k0 < end; k0 += QVL__KV_BLOCK) {
        const char *block = keys_at(c, seq, k0, kv_head);
        int most = end - k0 < QVL__KV_BLOCK ? end - k0 : QVL__KV_BLOCK;
        __syncthreads();
        for (int i = threadIdx.x; i < most * n; i += ATTEND_WARPS * 32) {
            ks[i / n * line + i % n] = cache_at(c, block, i / n, i % n);
            vs[i / n * line + i % n] = cache_at(c, block + c.half, i / n, i % n);
        }
        __syncthreads();
        for (int j = 0; j < 2; j++) {
            int g = warp + ATTEND_WARPS * j;
            if (g >= heads) break;
            float s = -INFINITY;
            if (lane < most) {
                s = 0;
                for (int i = 0; i < n; i++) s = fmaf(qs[g * n + i], ks[lane * line + i], s);
                s *= scale;
            }
            float top = fmaxf(max[j], warp_max(s)), shrink = expf(max[j] - top), p = lane < most ? expf(s - top) : 0.0f;
            max[j] = top;
            sum[j] = fmaf(sum[j], shrink, warp_sum(p));
            for (int i = 0; i < COLS; i++) acc[j][i] *= shrink;
            for (int t = 0; t < most; t++) {
                float pt = __shfl_sync(0xffffffffu, p, t);
                for (int i = 0; i < COLS; i++)
                    if (lane + 32 * i < n) acc[j][i] = fmaf(pt, vs[t * line + lane + 32 * i], acc[j][i]);
            }
        }
    }
    for (int j = 0; j < 2; j++) {
        int g = warp + ATTEND_WARPS * j;
        if (g >= heads) break;
        bool whole = a.pieces == 1;
        float *to = whole ? a.out + r * a.out_stride + (size_t)(h0 + g) * n : a.partial + (((size_t)r * a.heads + h0 + g) * a.pieces + blockIdx.z) * (n + 2);
        for (int i = 0; i < COLS; i++)
            if (lane + 32 * i < n) to[lane + 32 * i] = whole ? acc[j][i] / sum[j] : acc[j][i];
        if (!whole && lane == 0) to[n] = max[j], to[n + 1] = sum[j];
    }
}

/* Block (row, head), one warp: the pieces of a row, in order. */
static __global__ void attend_join(attend_args a, int n) {
    int r = blockIdx.x, h = blockIdx.y, lane = threadIdx.x, len = keys_of_row(a, r), per = piece_keys(len), pieces = (len + per - 1) / per;
    const float *from = a.partial + ((size_t)r * a.heads + h) * a.pieces * (n + 2);
    float top = -INFINITY, sum = 0;
    for (int p = 0; p < pieces; p++) top = fmaxf(top, from[(size_t)p * (n + 2) + n]);
    for (int p = 0; p < pieces; p++) sum = fmaf(expf(from[(size_t)p * (n + 2) + n] - top), from[(size_t)p * (n + 2) + n + 1], sum);
    for (int i = lane; i < n; i += 32) {
        float v = 0;
        for (int p = 0; p < pieces; p++) v = fmaf(expf(from[(size_t)p * (n + 2) + n] - top), from[(size_t)p * (n + 2) + i], v);
        a.out[r * a.out_stride + (size_t)h * n + i] = v / sum;
    }
}

#endif
