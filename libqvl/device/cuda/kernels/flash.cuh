/* flash.cuh - attention of many rows on the tensor cores (Dao et al. 2022, FlashAttention; blocks of 32 keys).
 *
 * Job:        the same function as attend.cuh for rows that come in runs of one sequence (prefill), and for vision.
 * Input:      q rows in float, rounded to bf16 here; keys and values in blocks, rounded to bf16 where they are not.
 * Output:     rows of heads * head_dim.
 * Invariants: a row walks its keys from the first in blocks of 32 with a running maximum of its own; a block that holds
 *             no key of a row changes nothing of it. So a row's result does not depend on which rows are in its tile.
 *             Keys past the last one of a tile's rows are never read: zeros stand for them.
 *
 * A block of 8 warps has up to 8 query heads of a KV head and 16 * (8 / heads) rows: warp w has 16 rows of one head. Rows of
 * several sequences in a tile are done one sequence after the other.
 */
#ifndef QVL__FLASH_CUH
#define QVL__FLASH_CUH

#include "attend.cuh"

#define FLASH_WARPS 8
#define FLASH_LINE(DT) ((DT) * 32 + 16) /* bytes; 16 spare against bank conflicts */
#define FLASH_STAGE(DT) (2 * QVL__KV_BLOCK * FLASH_LINE(DT))
#define FLASH_SHARED(DT) (2 * FLASH_STAGE(DT))

/* Keys [k0, k0 + 32) of a sequence into a stage: K, then V, as bf16, head_dim filled up to 16 * DT with zeros. */
template <int DT> __device__ __forceinline__ void flash_bring(char *stage, const keys_of &c, int seq, int head, int k0, int end) {
    const int pieces = DT * 2; /* of 8 numbers in a line */
    const char *block = keys_at(c, seq, k0, head);
    for (int i = threadIdx.x; i < 2 * QVL__KV_BLOCK * pieces; i += FLASH_WARPS * 32) {
        int line = i / pieces, d = i % pieces * 8, t = line % QVL__KV_BLOCK;
        char *to = stage + line * FLASH_LINE(DT) + d * 2;
        const char *half = line < QVL__KV_BLOCK ? block : block + c.half;
        bool in = k0 + t < end && d < c.head_dim;
        if (c.type == QVL__BF16) qvl_cp_async16(to, half + (in ? ((size_t)t * c.head_dim + d) * 2 : 0), in);
        else {
            float x[8] = {};
            if (in) cache_eight(c, half, t, d, x);
            *(uint4 *)to = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
        }
    }
}

/* head_dim a multiple of 8, at most 16 * DT. Grid (tiles of rows, KV heads x chunks of their group). */
template <int DT> static __global__ void __launch_bounds__(FLASH_WARPS * 32) flash(attend_args a, keys_of c, int rows) {
    QVL_SHARED(char, shared);
    int n = c.head_dim, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int chunks = (a.group + FLASH_WARPS - 1) / FLASH_WARPS, kv_head = blockIdx.y / chunks, g0 = blockIdx.y % chunks * FLASH_WARPS;
    int heads = a.group - g0 < FLASH_WARPS ? a.group - g0 : FLASH_WARPS, tiles = FLASH_WARPS / heads;
    int first = blockIdx.x * tiles * 16, last = first + tiles * 16 < rows ? first + tiles * 16 : rows;
    bool mine = warp < tiles * heads;
    size_t column = (size_t)(kv_head * a.group + g0 + warp % heads) * n; /* of this warp's head */
    int row[2], limit[2], seq[2]; /* this lane's rows of the accumulators, keys they see, their sequences */
    for (int i = 0; i < 2; i++) {
        row[i] = first + warp / heads * 16 + lane / 4 + 8 * i;
        bool in = mine && row[i] < last;
        if (!in) row[i] = -1;
        limit[i] = in ? keys_of_row(a, row[i]) : 0;
        seq[i] = in && a.seq ? a.seq[row[i]] : 0;
    }
    uint32_t q[DT][4];
    for (int d = 0; d < DT; d++)
        for (int i = 0; i < 4; i++) {
            int r = row[i % 2], k = d * 16 + i / 2 * 8 + lane % 4 * 2;
            const float *from = a.q + (size_t)(r < 0 ? 0 : r) * a.q_stride + column + k;
            q[d][i] = r >= 0 && k < n ? pack_bf16(from[0], from[1]) : 0;
        }
    float scale = 1.44269504088896341f / sqrtf((float)n); /* scores to the base 2 */
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {}, acc[2 * DT][4] = {};

    for (int r0 = first, r1; r0 < last; r0 = r1) {
        int s = a.seq ? a.seq[r0] : 0;
        for (r1 = r0 + 1; r1 < last && (!a.seq || a.seq[r1] == s); r1++) {}
        int end = keys_of_row(a, r1 - 1);
        __syncthreads(); /* all are done with the stages */
        flash_bring<DT>(shared, c, s, kv_head, 0, end);
        qvl_cp_async_commit();
        for (int k0 = 0, stage = 0; k0 < end; k0 += QVL__KV_BLOCK, stage ^= 1) {
            if (k0) __syncthreads(); /* all are done with the stage that is filled next */
            if (k0 + QVL__KV_BLOCK < end) flash_bring<DT>(shared + (stage ^ 1) * FLASH_STAGE(DT), c, s, kv_head, k0 + QVL__KV_BLOCK, end);
            qvl_cp_async_commit();
            qvl_cp_async_wait<1>();
            __syncthreads();
            if (!mine) continue;
            const char *ks = shared + stage * FLASH_STAGE(DT), *vs = ks + QVL__KV_BLOCK * FLASH_LINE(DT);
            float p[4][4] = {};
            for (int d = 0; d < DT; d++)
                for (int j = 0; j < 4; j += 2) { /* matrices: keys 0-7 of d 0-7 and 8-15, then keys 8-15 */
                    uint32_t b[4];
                    qvl_ldmatrix_x4(b, ks + (8 * j + lane / 16 * 8 + lane % 8) * FLASH_LINE(DT) + d * 32 + lane / 8 % 2 * 16);
                    qvl_mma_16816(p[j], q[d], b);
                    qvl_mma_16816(p[j + 1], q[d], b + 2);
                }
            for (int i = 0; i < 2; i++) {
                int most = seq[i] == s && row[i] >= r0 && row[i] < r1 ? limit[i] - k0 : 0; /* keys of this block that the row sees */
                float top = max[i];
                for (int j = 0; j < 4; j++)
                    for (int e = 0; e < 2; e++) {
                        float *x = &p[j][2 * i + e];
                        *x = 8 * j + lane % 4 * 2 + e < most ? *x * scale : -INFINITY;
                        top = fmaxf(top, *x);
                    }
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                float base = top == -INFINITY ? 0.0f : top, shrink = exp2f(max[i] - base), total = 0;
                for (int j = 0; j < 4; j++)
                    for (int e = 0; e < 2; e++) total += p[j][2 * i + e] = exp2f(p[j][2 * i + e] - base);
                if (most > 0) {
                    max[i] = top;
                    sum[i] = fmaf(sum[i], shrink, total);
                    for (int d = 0; d < 2 * DT; d++) acc[d][2 * i] *= shrink, acc[d][2 * i + 1] *= shrink;
                }
            }
            for (int half = 0; half < 2; half++) {
                uint32_t w[4] = {pack_bf16(p[2 * half][0], p[2 * half][1]), pack_bf16(p[2 * half][2], p[2 * half][3]),
                                 pack_bf16(p[2 * half + 1][0], p[2 * half + 1][1]), pack_bf16(p[2 * half + 1][2], p[2 * half + 1][3])};
                for (int d = 0; d < DT; d++) { /* matrices: keys 0-7 and 8-15 of d 0-7, then of d 8-15 */
                    uint32_t b[4];
                    qvl_ldmatrix_x4_trans(b, vs + (16 * half + lane % 16) * FLASH_LINE(DT) + d * 32 + lane / 16 * 16);
                    qvl_mma_16816(acc[2 * d], w, b);
                    qvl_mma_16816(acc[2 * d + 1], w, b + 2);
                }
            }
        }
    }
    for (int i = 0; i < 2; i++) {
        float total = sum[i];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (row[i] < 0) continue;
        float *to = a.out + row[i] * a.out_stride + column;
        for (int d = 0; d < 2 * DT; d++) { /* n is a multiple of 8: both or none; rows of any width begin anywhere */
            int k = 8 * d + lane % 4 * 2;
            float x = acc[d][2 * i] / total, y = acc[d][2 * i + 1] / total;
            if (k < n && (uintptr_t)to % 8 == 0) *(float2 *)(to + k) = make_float2(x, y);
            else if (k < n) to[k] = x, to[k + 1] = y;
        }
    }
}

#endif
