/* weights.cuh - filling matrices, and embedding rows.
 *
 * Job:        conversion of checkpoint rows and of the CPU's packed panels into rows.
 * Input:      rows in F32, BF16, F16; panels as device/cpu/panel.c describes them.
 * Output:     rows as layout.cuh describes them.
 * Invariants: integers and scales are the CPU's.
 */
#ifndef QVL__WEIGHTS_CUH
#define QVL__WEIGHTS_CUH

#include "layout.cuh"

/* Block b: feature first + b from row b of src [count][k]. */
static __global__ void put_rows(rows_of w, bool gate_up, int first, int src_type, const void *src) {
    size_t to = (size_t)row_of_feature(first + blockIdx.x, w.n, gate_up) * w.kp, from = (size_t)blockIdx.x * w.k;
    for (int i = threadIdx.x; i < w.kp; i += blockDim.x)
        store_number(w.type, (void *)w.data, to + i, i < w.k ? number_at(src_type, src, from + i) : 0.0f);
}

/* The same from rows of F8 (device.h), row_bytes each. */
static __global__ void put_fp8_rows(rows_of w, bool gate_up, int first, const uint8_t *src, size_t row_bytes) {
    size_t row = (size_t)row_of_feature(first + blockIdx.x, w.n, gate_up);
    const uint8_t *from = src + blockIdx.x * row_bytes;
    const uint16_t *scales = (const uint16_t *)(from + (w.k + 1) / 2 * 2);
    for (int i = threadIdx.x; i < w.kp; i += blockDim.x) ((uint8_t *)w.data)[row * w.kp + i] = i < w.k ? from[i] : 0;
    for (int g = threadIdx.x; g < w.kp / 32; g += blockDim.x) ((uint16_t *)w.scales)[row * (w.kp / 32) + g] = scales[g];
}

/* Panels of the CPU's layout, of a weight that w is a part of. */
struct panels_of {
    const uint8_t *data; /* of panel `first` */
    size_t bytes;        /* of a panel */
    int first, kp;       /* kp: inputs, rounded up to 32 */
    int from, count, to; /* features [from, from + count), of either half with gate_up, become features to.. of w */
    int in;              /* the first input that w has */
};

/* Block b: one feature, out of panel number first + b / 16. */
static __global__ void put_panels(rows_of w, bool gate_up, panels_of p) {
    int panel = p.first + blockIdx.x / 16, column = blockIdx.x % 16;
    int at = (gate_up ? panel / 2 : panel) * 16 + column - p.from;
    if (at < 0 || at >= p.count) return;
    const uint8_t *from = p.data + (size_t)(blockIdx.x / 16) * p.bytes;
    int row = gate_up ? 2 * at + panel % 2 : p.to + at, groups = w.kp / 32, g0 = p.in / 32;
    size_t to = (size_t)row * w.kp;
    const uint16_t *h = (const uint16_t *)from;
    if (w.type == QVL__Q8 || w.type == QVL__Q4) {
        const uint8_t *body = from + ((size_t)(p.kp / 32) * 16 * 2 + 63) / 64 * 64;
        for (int g = threadIdx.x; g < groups; g += blockDim.x) ((uint16_t *)w.scales)[(size_t)row * groups + g] = h[(g0 + g) * 16 + column];
        for (int i = threadIdx.x; i < w.kp; i += blockDim.x) {
            int g = g0 + i / 32, in = i % 32;
            if (w.type == QVL__Q8) ((int8_t *)w.data)[to + i] = (int8_t)(body[(size_t)g * 512 + (in / 4 * 16 + column) * 4 + in % 4] - 128);
            else if (in < 16) ((uint8_t *)w.data)[to / 2 + i / 32 * 16 + in] = body[(size_t)g * 256 + (in / 4 * 16 + column) * 4 + in % 4];
        }
        return;
    }
    for (int i = threadIdx.x; i < w.kp; i += blockDim.x) {
        float x = 0;
        if (i < w.k) {
            int k = p.in + i;
            if (w.type == QVL__F32) x = ((const float *)from)[(size_t)k * 16 + column];
            else if (w.type == QVL__F16) x = __half2float(((const __half *)from)[(size_t)k * 16 + column]);
            else x = wide_bf16(h[(size_t)(k / 2) * 32 + column * 2 + k % 2]);
        }
        store_number(w.type, (void *)w.data, to + i, x);
    }
}

/* first: the feature that w begins with; zeros for those that it has not. */
static __global__ void embed_rows(float *y, rows_of w, bool gate_up, int first, const int32_t *ids) {
    int at = ids[blockIdx.x] - first, row = row_of_feature(at, w.n, gate_up);
    bool has = at >= 0 && at < w.n;
    for (int i = threadIdx.x; i < w.k; i += blockDim.x) y[(size_t)blockIdx.x * w.k + i] = has ? weight_at(w, row, i) : 0.0f;
}

#endif
