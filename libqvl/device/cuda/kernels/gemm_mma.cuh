/* gemm_mma.cuh - products of many rows on the tensor cores, for the weights that libraries have no product for.
 *
 * Job:        y = epilogue(x W^T + bias) for BF16 (deterministic mode), Q8, Q4 and F8 matrices.
 * Input:      x rounded to bf16, [rows][kp].
 * Output:     float rows.
 * Invariants: a block has MMA_M rows and MMA_N(PARTS) columns (fewer where there would be too few blocks) and walks k in steps
 *             of 32 = one group with a scale: its weights are multiplied without it (exact in bf16) and the group's sum is scaled
 *             once. The order of k is fixed and no row or column sees another, so a row's result is the same for any number
 *             of rows and any PARTS.
 *
 * Three stages of cp.async: while a step is multiplied the next two are on their way. Lines of a stage have 16 spare
 * bytes so that the 8 addresses of an ldmatrix lie in different banks.
 */
#ifndef QVL__GEMM_MMA_CUH
#define QVL__GEMM_MMA_CUH

#include "epilogue.cuh"
#include "layout.cuh"

#define MMA_M 64
#define MMA_K 32
#define MMA_STAGES 3
#define MMA_THREADS 256
#define MMA_LINE (MMA_K * 2 + 16)
#define MMA_N(PARTS) (32 * (PARTS))
#define MMA_STAGE(PARTS) ((MMA_M + MMA_N(PARTS)) * MMA_LINE)
#define MMA_SHARED(PARTS) (MMA_STAGES * MMA_STAGE(PARTS))

/* Bytes of 32 weights in memory. */
template <int TYPE> struct step_of {
    static const int bytes = TYPE == QVL__BF16 ? 64 : TYPE == QVL__Q8 || TYPE == QVL__F8 ? 32 : 16;
};

/* Inputs k, k + 1 (k even) of a line of 32 weights as a pair of bf16. */
template <int TYPE> __device__ __forceinline__ uint32_t weight_pair(const char *line, int k) {
    if (TYPE == QVL__Q8) return pack_bf16((float)((const int8_t *)line)[k], (float)((const int8_t *)line)[k + 1]);
    if (TYPE == QVL__F8) {
        float2 pair = wide_e4m3x2(*(const uint16_t *)(line + k));
        return pack_bf16(pair.x, pair.y);
    }
    uint32_t two = *(const uint16_t *)(line + k % 16) >> (k < 16 ? 0 : 4);
    return pack_bf16((float)((int)(two & 15) - 8), (float)((int)(two >> 8 & 15) - 8));
}

/* Brings step number s of x and w into a stage. Lines past the end are zeros. */
template <int TYPE, int PARTS> __device__ __forceinline__ void bring(char *stage, const uint16_t *x, int rows, const rows_of &w, int r0, int c0, int s) {
    const int bytes = step_of<TYPE>::bytes, pieces = bytes / 16;
    {
        int line = threadIdx.x / 4, part = threadIdx.x % 4 * 16; /* 64 lines of 4 pieces: one for each thread */
        bool in = r0 + line < rows;
        qvl_cp_async16(stage + line * MMA_LINE + part, (const char *)(x + (size_t)(in ? r0 + line : 0) * w.kp + s * MMA_K) + part, in);
    }
    char *to = stage + MMA_M * MMA_LINE;
    for (int i = threadIdx.x; i < MMA_N(PARTS) * pieces; i += MMA_THREADS) {
        int line = i / pieces, part = i % pieces * 16;
        bool in = c0 + line < w.n;
        size_t step = (size_t)(in ? c0 + line : 0) * (w.kp / MMA_K) + s;
        qvl_cp_async16(to + line * MMA_LINE + part, (const char *)w.data + step * bytes + part, in);
    }
}

/* PARTS (2 or 4): groups of 8 columns that a warp has. */
template <int TYPE, int PARTS> __device__ __forceinline__ void mma_tile(const finish &f, const uint16_t *x, int rows, const rows_of &w, int r0, int c0) {
    QVL_SHARED(char, shared);
    const bool scaled = TYPE != QVL__BF16;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, steps = w.kp / MMA_K;
    int wr = warp / 4 * 32, wc = warp % 4 * 8 * PARTS; /* of the block; a warp has 32 x 8 PARTS */
    float acc[2][PARTS][4] = {};
    for (int s = 0; s < MMA_STAGES - 1; s++) {
        if (s < steps) bring<TYPE, PARTS>(shared + s * MMA_STAGE(PARTS), x, rows, w, r0, c0, s);
        qvl_cp_async_commit();
    }
    for (int s = 0; s < steps; s++) {
        qvl_cp_async_wait<MMA_STAGES - 2>();
        __syncthreads(); /* step s is there for all, and all are done with the stage that is filled next */
        int next = s + MMA_STAGES - 1;
        if (next < steps) bring<TYPE, PARTS>(shared + next % MMA_STAGES * MMA_STAGE(PARTS), x, rows, w, r0, c0, next);
        qvl_cp_async_commit();
        const char *a = shared + s % MMA_STAGES * MMA_STAGE(PARTS), *b = a + MMA_M * MMA_LINE;
        float group[2][PARTS][4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t af[2][4], bf[PARTS][2];
            for (int i = 0; i < 2; i++) /* matrices: rows 0-7 and 8-15 of k 0-7, then of k 8-15 */
                qvl_ldmatrix_x4(af[i], a + (wr + 16 * i + lane % 16) * MMA_LINE + half * 32 + lane / 16 * 16);
            if (!scaled) {
                for (int j = 0; j < PARTS; j += 2) { /* matrices: columns 0-7 of k 0-7 and 8-15, then columns 8-15 */
                    uint32_t q[4];
                    qvl_ldmatrix_x4(q, b + (wc + 8 * j + lane / 16 * 8 + lane % 8) * MMA_LINE + half * 32 + lane / 8 % 2 * 16);
                    bf[j][0] = q[0], bf[j][1] = q[1], bf[j + 1][0] = q[2], bf[j + 1][1] = q[3];
                }
            } else
                for (int j = 0; j < PARTS; j++) {
                    const char *line = b + (wc + 8 * j + lane / 4) * MMA_LINE;
                    int k = half * 16 + lane % 4 * 2;
                    bf[j][0] = weight_pair<TYPE>(line, k), bf[j][1] = weight_pair<TYPE>(line, k + 8);
                }
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < PARTS; j++) qvl_mma_16816(scaled ? group[i][j] : acc[i][j], af[i], bf[j]);
        }
        if (scaled)
            for (int j = 0; j < PARTS; j++) {
                int c = c0 + wc + 8 * j + lane % 4 * 2;
                float by[2] = {c < w.n ? wide_bf16(w.scales[(size_t)c * steps + s]) : 0.0f, c + 1 < w.n ? wide_bf16(w.scales[(size_t)(c + 1) * steps + s]) : 0.0f};
                for (int i = 0; i < 2; i++)
                    for (int e = 0; e < 4; e++) acc[i][j][e] = fmaf(by[e % 2], group[i][j][e], acc[i][j][e]);
            }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < PARTS; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int r = r0 + wr + 16 * i + 8 * h + lane / 4, c = c0 + wc + 8 * j + lane % 4 * 2;
                if (r < rows) store_pair(f, r, c, acc[i][j][2 * h], acc[i][j][2 * h + 1]);
            }
}

template <int TYPE, int PARTS> static __global__ void __launch_bounds__(MMA_THREADS) gemm_mma(finish f, const uint16_t *x, int rows, rows_of w) {
    mma_tile<TYPE, PARTS>(f, x, rows, w, blockIdx.y * MMA_M, blockIdx.x * MMA_N(PARTS));
}

#endif
