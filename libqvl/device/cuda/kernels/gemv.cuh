/* gemv.cuh - products for a few rows, where reading the weights is all the work (decode).
 *
 * Job:        y = epilogue(x W^T + bias) for up to 8 rows.
 * Input:      x rounded to bf16 (F16 matrices: f16), [rows][kp]; a matrix of any type but F32.
 * Output:     float rows.
 * Invariants: a warp has two matrix rows and walks k once for all rows of x; each sum is added in an order that does not
 *             depend on their number. Weights with scales are multiplied without them; the sum of a group is scaled once.
 */
#ifndef QVL__GEMV_CUH
#define QVL__GEMV_CUH

#include "epilogue.cuh"
#include "layout.cuh"

#define GEMV_WARPS 4
#define GEMV_ROWS 8

/* Weights that one lane takes at a time: 16 bytes. */
template <int TYPE> struct lane_of {
    static const int count = TYPE == QVL__Q8 || TYPE == QVL__F8 ? 16 : TYPE == QVL__Q4 ? 32 : 8;
};

/* Numbers of 16 bits that share a register: f16 with F16 matrices, else bf16. */
template <int TYPE> __device__ __forceinline__ float low_half(uint32_t pair) {
    return TYPE == QVL__F16 ? __half2float(__ushort_as_half((unsigned short)(pair & 0xffff))) : low_bf16(pair);
}
template <int TYPE> __device__ __forceinline__ float high_half(uint32_t pair) {
    return TYPE == QVL__F16 ? __half2float(__ushort_as_half((unsigned short)(pair >> 16))) : high_bf16(pair);
}

/* The `count` weights at 16 bytes p as floats. */
template <int TYPE> __device__ __forceinline__ void unpack_lane(float *to, uint4 p) {
    uint32_t u[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (TYPE == QVL__BF16 || TYPE == QVL__F16) to[2 * i] = low_half<TYPE>(u[i]), to[2 * i + 1] = high_half<TYPE>(u[i]);
        if (TYPE == QVL__Q8)
            for (int b = 0; b < 4; b++) to[4 * i + b] = (float)(int8_t)(u[i] >> 8 * b);
        if (TYPE == QVL__F8)
            for (int b = 0; b < 4; b += 2) {
                float2 two = wide_e4m3x2((uint16_t)(u[i] >> 8 * b));
                to[4 * i + b] = two.x, to[4 * i + b + 1] = two.y;
            }
        if (TYPE == QVL__Q4)
            for (int b = 0; b < 4; b++) {
                uint32_t byte = u[i] >> 8 * b & 255;
                to[4 * i + b] = (float)((int)(byte & 15) - 8);
                to[16 + 4 * i + b] = (float)((int)(byte >> 4) - 8);
            }
    }
}

/* Up to ROWS rows, matrix rows c and c + 1. */
template <int TYPE, int ROWS> __device__ __forceinline__ void gemv_pair(const finish &f, const uint16_t *x, int rows, const rows_of &w, int c) {
    const int count = lane_of<TYPE>::count;
    const bool scaled = TYPE == QVL__Q8 || TYPE == QVL__Q4 || TYPE == QVL__F8;
    int lane = threadIdx.x % 32;
    size_t row_bytes = TYPE == QVL__Q8 || TYPE == QVL__F8 ? (size_t)w.kp : TYPE == QVL__Q4 ? (size_t)w.kp / 2 : (size_t)w.kp * 2;
    const char *from[2] = {(const char *)w.data + (size_t)c * row_bytes, (const char *)w.data + (size_t)(c + 1 < w.n ? c + 1 : c) * row_bytes};
    const uint16_t *scale[2] = {w.scales + (size_t)c * (w.kp / 32), w.scales + (size_t)(c + 1 < w.n ? c + 1 : c) * (w.kp / 32)};
    float acc[2][ROWS] = {};
    for (int k = lane * count; k < w.kp; k += 32 * count) {
        float v[2][count];
#pragma unroll
        for (int j = 0; j < 2; j++) unpack_lane<TYPE>(v[j], *(const uint4 *)(from[j] + (size_t)k / count * 16));
        float by[2] = {1.0f, 1.0f};
        if (scaled) by[0] = wide_bf16(scale[0][k / 32]), by[1] = wide_bf16(scale[1][k / 32]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r >= rows) break;
            float sum[2] = {};
            const uint16_t *xr = x + (size_t)r * w.kp + k;
#pragma unroll
            for (int i = 0; i < count; i += 8) {
                uint4 p = *(const uint4 *)(xr + i);
                float xs[8] = {low_half<TYPE>(p.x), high_half<TYPE>(p.x), low_half<TYPE>(p.y), high_half<TYPE>(p.y),
                               low_half<TYPE>(p.z), high_half<TYPE>(p.z), low_half<TYPE>(p.w), high_half<TYPE>(p.w)};
#pragma unroll
                for (int e = 0; e < 8; e++) sum[0] = fmaf(xs[e], v[0][i + e], sum[0]), sum[1] = fmaf(xs[e], v[1][i + e], sum[1]);
            }
            for (int j = 0; j < 2; j++) acc[j][r] = scaled ? fmaf(by[j], sum[j], acc[j][r]) : acc[j][r] + sum[j];
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= rows) break;
        float v0 = warp_sum(acc[0][r]), v1 = warp_sum(acc[1][r]);
        if (lane == 0) store_pair(f, r, c, v0, v1);
    }
}

template <int TYPE, int ROWS> static __global__ void __launch_bounds__(GEMV_WARPS * 32) gemv(finish f, const uint16_t *x, int rows, rows_of w) {
    int c = 2 * (blockIdx.x * GEMV_WARPS + threadIdx.x / 32);
    if (c < w.n) gemv_pair<TYPE, ROWS>(f, x, rows, w, c);
}

/* y = epilogue(sums) for sums [rows][n] that a library product has left. */
static __global__ void finish_rows(finish f, const float *sums) {
    for (int c = 2 * (blockIdx.y * blockDim.x + threadIdx.x); c < f.n; c += 2 * gridDim.y * blockDim.x) {
        const float *s = sums + (size_t)blockIdx.x * f.n + c;
        store_pair(f, blockIdx.x, c, s[0], c + 1 < f.n ? s[1] : 0.0f);
    }
}

#endif
