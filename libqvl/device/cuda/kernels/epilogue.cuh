/* epilogue.cuh - what happens to a sum before it is stored.
 *
 * Job:        bias, residual, GELU, SwiGLU.
 * Input:      sums of output columns c and c + 1, c even.
 * Output:     y.
 * Invariants: the same text for every product kernel.
 */
#ifndef QVL__EPILOGUE_CUH
#define QVL__EPILOGUE_CUH

#include "../../device.h"
#include "../port.cuh"

struct finish {
    int kind;          /* qvl__epilogue */
    const float *bias; /* by feature; NULL: none */
    float *y;
    int n;      /* rows of the matrix; n columns of y, n / 2 with SwiGLU */
    size_t ld;  /* from one row of y to the next */
    /* A part of a matrix (divide.h) has several runs of features: behind each `section` of them the bias leaves `skip` out. */
    int section, skip;
};

__device__ __forceinline__ float bias_of(const finish &f, int feature) { return f.bias[feature + feature / f.section * f.skip]; }

/* x e^z / (e^z + 1), written so that nothing overflows. */
__device__ __forceinline__ float times_logistic(float x, float z) {
    float e = expf(-fabsf(z));
    return z < 0 ? x * e / (1.0f + e) : x / (1.0f + e);
}

__device__ __forceinline__ float activate(int kind, float v) {
    if (kind == QVL__EPI_GELU_TANH) return times_logistic(v, 1.5957691216057308f * fmaf(0.044715f * v * v, v, v)); /* (1 + tanh u) / 2 is logistic(2 u) */
    if (kind == QVL__EPI_GELU_ERF) return 0.5f * v * erfcf(-0.70710678118654752f * v);
    return v;
}

/* Row r: v0, v1 are the sums of matrix rows c and c + 1 (where c + 1 < n). */
__device__ __forceinline__ void store_pair(const finish &f, int r, int c, float v0, float v1) {
    if (f.kind == QVL__EPI_SWIGLU) {
        int half = f.n / 2, i = c / 2;
        if (c >= f.n) return;
        if (f.bias) v0 += bias_of(f, i), v1 += bias_of(f, half + i);
        f.y[(size_t)r * f.ld + i] = times_logistic(v0, v0) * v1;
        return;
    }
    float *both = f.y + (size_t)r * f.ld + c;
    if (c + 1 < f.n && (uintptr_t)both % 8 == 0) { /* at once: four lanes fill a sector */
        float2 *to = (float2 *)both, y = f.kind == QVL__EPI_ADD ? *to : make_float2(0, 0);
        if (f.bias) v0 += bias_of(f, c), v1 += bias_of(f, c + 1);
        *to = f.kind == QVL__EPI_ADD ? make_float2(y.x + v0, y.y + v1) : make_float2(activate(f.kind, v0), activate(f.kind, v1));
        return;
    }
    float v[2] = {v0, v1};
    for (int i = 0; i < 2; i++) {
        if (c + i >= f.n) return;
        float *to = f.y + (size_t)r * f.ld + c + i, x = v[i] + (f.bias ? bias_of(f, c + i) : 0.0f);
        *to = f.kind == QVL__EPI_ADD ? *to + x : activate(f.kind, x);
    }
}

#endif
