/* layout.cuh - how weights lie on the GPU, and reading and writing single numbers of any type.
 *
 * Job:        the one description of a matrix that all kernels share.
 * Input:      -
 * Output:     rows [n][kp], kp = k rounded up to 32, zero behind k, so that every row begins on 16 bytes:
 *               F32, BF16, F16: numbers;
 *               Q8: signed bytes; Q4: [kp / 32][16] bytes, low half input i of the group, high half input i + 16, 8 for 0;
 *               F8: bytes;
 *               Q8, Q4, F8: behind the rows scales in bf16 [n][kp / 32].
 *             gate_up: row 2 i is gate feature i, row 2 i + 1 up feature i, so SwiGLU's two inputs are neighbours.
 * Invariants: conversions round to nearest even.
 */
#ifndef QVL__LAYOUT_CUH
#define QVL__LAYOUT_CUH

#include "../../device.h"
#include "../port.cuh"

/* A matrix as kernels see it. */
struct rows_of {
    int type, n, k, kp;
    const void *data;
    const uint16_t *scales;
};

/* Number `at` of an array of F32, BF16, F16 or F8. */
__device__ __forceinline__ float number_at(int type, const void *src, size_t at) {
    if (type == QVL__F8) return wide_e4m3(((const uint8_t *)src)[at]);
    return type == QVL__F32 ? ((const float *)src)[at] : type == QVL__BF16 ? wide_bf16(((const uint16_t *)src)[at]) : __half2float(((const __half *)src)[at]);
}

__device__ __forceinline__ int q4_at(const uint8_t *row, int i) {
    uint8_t b = row[i / 32 * 16 + i % 16];
    return (i % 32 < 16 ? b & 15 : b >> 4) - 8;
}

/* Number i of row r. */
__device__ __forceinline__ float weight_at(const rows_of &w, int r, int i) {
    size_t at = (size_t)r * w.kp + i;
    if (w.type == QVL__Q8) return wide_bf16(w.scales[at / 32]) * (float)((const int8_t *)w.data)[at];
    if (w.type == QVL__Q4) return wide_bf16(w.scales[at / 32]) * (float)q4_at((const uint8_t *)w.data + (size_t)r * (w.kp / 2), i);
    return (w.type == QVL__F8 ? wide_bf16(w.scales[at / 32]) : 1.0f) * number_at(w.type, w.data, at);
}

/* Feature f of a matrix with gate_up: its row. */
__device__ __forceinline__ int row_of_feature(int f, int n, bool gate_up) { return !gate_up ? f : f < n / 2 ? 2 * f : 2 * (f - n / 2) + 1; }

__device__ __forceinline__ void store_number(int type, void *dst, size_t at, float x) {
    if (type == QVL__F32) ((float *)dst)[at] = x;
    else if (type == QVL__BF16) ((bf16 *)dst)[at] = __float2bfloat16_rn(x);
    else if (type == QVL__F8) ((uint8_t *)dst)[at] = round_e4m3(x);
    else ((__half *)dst)[at] = __float2half_rn(x);
}

/* An input of a product, as type has it (F16: what is too large becomes its largest). */
__device__ __forceinline__ void store_input(int type, void *dst, size_t at, float x) {
    if (type == QVL__F16) x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    store_number(type, dst, at, x);
}

/* k numbers at the beginning of each ldx of x as inputs of type, [rows][kp], zero behind k. */
static __global__ void round_rows(int type, void *to, const float *x, size_t ldx, int k, int kp) {
    for (int i = threadIdx.x; i < kp; i += blockDim.x) store_input(type, to, (size_t)blockIdx.x * kp + i, i < k ? x[(size_t)blockIdx.x * ldx + i] : 0.0f);
}

#endif
