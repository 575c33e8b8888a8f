/* rows.cuh - kernels that work row by row: norms, rope, gather, scatter, interpolation.
 *
 * Job:        the small ops of the table, one block for each row.
 * Input:      float rows.
 * Output:     float rows.
 * Invariants: a row's result depends on that row alone and every sum is taken in one fixed order, so these ops are
 *             batch-invariant; fmaf is written where it is meant, the rest is compiled with --fmad=false.
 */
#ifndef QVL__ROWS_CUH
#define QVL__ROWS_CUH

#include "../port.cuh"

#define ROW_THREADS 256

/* Sum over a block of ROW_THREADS threads, in every thread; part: one float for each warp. */
__device__ __forceinline__ float block_sum(float x, float *part) {
    x = warp_sum(x);
    __syncthreads(); /* part may still be read from the last time */
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < ROW_THREADS / 32; i++) sum += part[i];
    return sum;
}
#define ROW_SHARED (ROW_THREADS / 32 * sizeof(float))

static __global__ void rms_norm_rows(float *y, const float *x, const float *w, int dim, float eps) {
    QVL_SHARED(float, part);
    x += (size_t)blockIdx.x * dim, y += (size_t)blockIdx.x * dim;
    float sum = 0;
    for (int i = threadIdx.x; i < dim; i += ROW_THREADS) sum = fmaf(x[i], x[i], sum);
    float inv = 1.0f / sqrtf(block_sum(sum, part) / (float)dim + eps);
    for (int i = threadIdx.x; i < dim; i += ROW_THREADS) y[i] = x[i] * inv * w[i];
}

static __global__ void layer_norm_rows(float *y, const float *x, const float *w, const float *b, int dim, float eps) {
    QVL_SHARED(float, part);
    x += (size_t)blockIdx.x * dim, y += (size_t)blockIdx.x * dim;
    float sum = 0, square = 0;
    for (int i = threadIdx.x; i < dim; i += ROW_THREADS) sum += x[i];
    float mean = block_sum(sum, part) / (float)dim;
    for (int i = threadIdx.x; i < dim; i += ROW_THREADS) square = fmaf(x[i] - mean, x[i] - mean, square);
    float inv = 1.0f / sqrtf(block_sum(square, part) / (float)dim + eps);
    for (int i = threadIdx.x; i < dim; i += ROW_THREADS) y[i] = fmaf((x[i] - mean) * inv, w[i], b[i]);
}

static __global__ void gather_some_rows(float *y, const float *x, const int32_t *idx, int dim) {
    x += (size_t)idx[blockIdx.x] * dim, y += (size_t)blockIdx.x * dim;
    for (int i = threadIdx.x; i < dim; i += ROW_THREADS) y[i] = x[i];
}

/* Several rows may have the same place, and their order has to hold: the first of them does the work of all. */
static __global__ void scatter_some_rows(float *y, const float *x, const int32_t *idx, int rows, int dim, bool add) {
    int me = blockIdx.x, place = idx[me], earlier = 0;
    for (int r = threadIdx.x; r < me; r += ROW_THREADS) earlier |= idx[r] == place;
    if (__syncthreads_or(earlier)) return;
    y += (size_t)place * dim;
    for (int r = me; r < rows; r++) {
        if (idx[r] != place) continue;
        const float *from = x + (size_t)r * dim;
        for (int i = threadIdx.x; i < dim; i += ROW_THREADS) y[i] = add ? y[i] + from[i] : from[i];
    }
}

static __global__ void add_interpolated_rows(float *y, const float *table, const int32_t *index, const float *weight, int dim) {
    y += (size_t)blockIdx.x * dim;
    for (int i = threadIdx.x; i < dim; i += ROW_THREADS) {
        float v = y[i];
        for (int c = 0; c < 4; c++) v = fmaf(weight[blockIdx.x * 4 + c], table[(size_t)index[blockIdx.x * 4 + c] * dim + i], v);
        y[i] = v;
    }
}

/* q and k of `heads` heads at the beginning of each ld of qkv, turned by cos, sin [span][head_dim / 2]. */
static __global__ void rope_vision_rows(float *qkv, size_t ld, int heads, int head_dim, const float *cos, const float *sin, int span) {
    int half = head_dim / 2;
    float *x = qkv + (size_t)blockIdx.x * ld;
    size_t angle = (size_t)(blockIdx.x % span) * half;
    for (int i = threadIdx.x; i < 2 * heads * half; i += ROW_THREADS) {
        float *v = x + i / half * head_dim + i % half, a = v[0], b = v[half], c = cos[angle + i % half], s = sin[angle + i % half];
        v[0] = a * c - b * s;
        v[half] = b * c + a * s;
    }
}

#endif
