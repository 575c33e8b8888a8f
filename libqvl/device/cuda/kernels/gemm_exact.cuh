/* gemm_exact.cuh - products in float, whatever the weights are stored as.
 *
 * Job:        y = epilogue(x W^T + bias) for dtype f32, where nothing may be rounded but float sums.
 * Input:      float rows, k numbers at the beginning of each ldx; any matrix.
 * Output:     float rows.
 * Invariants: each output is one chain of fmaf over k in order, so a row's result is the same for any number of rows.
 */
#ifndef QVL__GEMM_EXACT_CUH
#define QVL__GEMM_EXACT_CUH

#include "epilogue.cuh"
#include "layout.cuh"

#define EXACT_TILE 64
#define EXACT_K 32
#define EXACT_THREADS 256
#define EXACT_SHARED (2 * EXACT_TILE * (EXACT_K + 1) * sizeof(float))

/* A tile of 64 rows by 64 columns; thread (tx, ty) has rows ty + 16 i and columns 4 tx + j. */
__device__ __forceinline__ void exact_tile(const finish &f, const float *x, size_t ldx, int rows, const rows_of &w, int r0, int c0) {
    QVL_SHARED(float, shared);
    float *xs = shared, *ws = shared + EXACT_TILE * (EXACT_K + 1);
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float acc[4][4] = {};
    for (int k0 = 0; k0 < w.k; k0 += EXACT_K) {
        for (int i = threadIdx.x; i < EXACT_TILE * EXACT_K; i += EXACT_THREADS) {
            int line = i / EXACT_K, k = k0 + i % EXACT_K, at = line * (EXACT_K + 1) + i % EXACT_K;
            xs[at] = r0 + line < rows && k < w.k ? x[(size_t)(r0 + line) * ldx + k] : 0.0f;
            ws[at] = c0 + line < w.n && k < w.k ? weight_at(w, c0 + line, k) : 0.0f;
        }
        __syncthreads();
        int most = w.k - k0 < EXACT_K ? w.k - k0 : EXACT_K;
        for (int k = 0; k < most; k++) {
            float a[4], b[4];
            for (int i = 0; i < 4; i++) a[i] = xs[(ty + 16 * i) * (EXACT_K + 1) + k], b[i] = ws[(4 * tx + i) * (EXACT_K + 1) + k];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) acc[i][j] = fmaf(a[i], b[j], acc[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int r = r0 + ty + 16 * i;
        if (r >= rows) continue;
#pragma unroll
        for (int j = 0; j < 4; j += 2) store_pair(f, r, c0 + 4 * tx + j, acc[i][j], acc[i][j + 1]);
    }
}

static __global__ void __launch_bounds__(EXACT_THREADS) gemm_exact(finish f, const float *x, size_t ldx, int rows, rows_of w) {
    exact_tile(f, x, ldx, rows, w, blockIdx.y * EXACT_TILE, blockIdx.x * EXACT_TILE);
}

#endif
