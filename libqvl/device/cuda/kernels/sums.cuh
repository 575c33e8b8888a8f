/* sums.cuh - what is left to do when the parts of several GPUs have arrived.
 *
 * Job:        sums in a fixed order; columns side by side.
 * Input:      parts, GPU by GPU.
 * Output:     rows.
 * Invariants: a number is the sum of its parts in the order of GPUs, whatever else is summed with it.
 */
#ifndef QVL__SUMS_CUH
#define QVL__SUMS_CUH

#include "../port.cuh"

/* x[i] = sum over p of parts[p][i], in order; parts [ranks][count]. */
static __global__ void sum_parts(float *x, const float *parts, size_t count, int ranks) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        float sum = parts[i];
        for (int p = 1; p < ranks; p++) sum += parts[(size_t)p * count + i];
        x[i] = sum;
    }
}

/* Block (row, .): y [rows][n] from parts [ranks][rows][each]; the last part is cut off at n. */
static __global__ void join_columns(float *y, const float *parts, int each, int n) {
    int r = blockIdx.x, rows = gridDim.x;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < n; i += gridDim.y * blockDim.x)
        y[(size_t)r * n + i] = parts[((size_t)(i / each) * rows + r) * each + i % each];
}

/* y[i] = sum[i], or += with add. */
static __global__ void take_sums(float *y, const bf16 *sum, size_t count, bool add) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x)
        y[i] = add ? y[i] + __bfloat162float(sum[i]) : __bfloat162float(sum[i]);
}

#endif
