/* blaslt.cpp - cuBLASLt: matrix products in the queue of a stream, with the checks of the real calls.
 *
 * Job:        cublasLtMatmul and what describes it.
 * Input:      the toolkit's opaque structs, which hold our own fields here.
 * Output:     D = epilogue(alpha op(A) op(B) + beta C), sums in float.
 * Invariants: what cuBLASLt's documentation does not list for these types, or what is not modelled, is refused, never guessed.
 *             Modelled: A, B both bf16, f16 or f32, C and D f32; A turned or not; plain column-major layouts; epilogues default,
 *             bias, GELU, GELU with bias.
 */
#include <cublasLt.h>

#include <vector>

#include "emu.h"

using namespace emu;

struct desc {
    cublasComputeType_t compute;
    cudaDataType_t scale, bias_type;
    cublasOperation_t a, b;
    cublasLtEpilogue_t epilogue;
    const float *bias;
};
struct layout {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld;
};
struct preference {
    size_t workspace;
};
struct chosen { /* in an algo */
    uint64_t magic, m, n, k;
};
static_assert(sizeof(layout) <= sizeof(cublasLtMatrixLayoutOpaque_t) && sizeof(chosen) <= sizeof(cublasLtMatmulAlgo_t), "our fields fit theirs");
#define MAGIC 0x71766c5f6c74u

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) {
    int n;
    if (cudaGetDeviceCount(&n) != cudaSuccess) return CUBLAS_STATUS_NOT_INITIALIZED;
    *h = (cublasLtHandle_t)(void *)new int(0);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) {
    delete (int *)(void *)h;
    return CUBLAS_STATUS_SUCCESS;
}
const char *cublasLtGetStatusString(cublasStatus_t s) { return s == CUBLAS_STATUS_SUCCESS ? "success" : s == CUBLAS_STATUS_INVALID_VALUE ? "invalid value" : s == CUBLAS_STATUS_NOT_SUPPORTED ? "not supported" : "failed"; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute, cudaDataType_t scale) {
    *d = (cublasLtMatmulDesc_t)(void *)new desc{compute, scale, CUDA_R_32F, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, NULL};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    delete (desc *)(void *)d;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t h, cublasLtMatmulDescAttributes_t a, const void *v, size_t n) {
    desc *d = (desc *)(void *)h;
    size_t want = a == CUBLASLT_MATMUL_DESC_BIAS_POINTER ? sizeof(void *) : 4;
    if (!v || n != want) return CUBLAS_STATUS_INVALID_VALUE;
    switch (a) {
    case CUBLASLT_MATMUL_DESC_TRANSA: d->a = *(const cublasOperation_t *)v; break;
    case CUBLASLT_MATMUL_DESC_TRANSB: d->b = *(const cublasOperation_t *)v; break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE: d->epilogue = *(const cublasLtEpilogue_t *)v; break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: d->bias = *(const float *const *)v; break;
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: d->bias_type = *(const cudaDataType_t *)v; break;
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType_t type, uint64_t rows, uint64_t cols, int64_t ld) {
    *l = (cublasLtMatrixLayout_t)(void *)new layout{type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete (layout *)(void *)l;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    *p = (cublasLtMatmulPreference_t)(void *)new preference{0};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    delete (preference *)(void *)p;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t a, const void *v, size_t n) {
    if (a != CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES || n != sizeof(size_t)) return CUBLAS_STATUS_NOT_SUPPORTED;
    ((preference *)(void *)p)->workspace = *(const size_t *)v;
    return CUBLAS_STATUS_SUCCESS;
}

/* The sizes of a product, or why there is none. */
static cublasStatus_t sizes(const desc *d, const layout *a, const layout *b, const layout *c, const layout *out, chosen *x) {
    if (d->compute != CUBLAS_COMPUTE_32F || d->scale != CUDA_R_32F || d->bias_type != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (a->type != b->type || (a->type != CUDA_R_16BF && a->type != CUDA_R_16F && a->type != CUDA_R_32F)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (c->type != CUDA_R_32F || out->type != CUDA_R_32F || d->b != CUBLAS_OP_N || d->a == CUBLAS_OP_C) return CUBLAS_STATUS_NOT_SUPPORTED;
    uint64_t m = d->a == CUBLAS_OP_T ? a->cols : a->rows, k = d->a == CUBLAS_OP_T ? a->rows : a->cols;
    for (const layout *l : {a, b, c, out})
        if (l->ld < (int64_t)l->rows) return CUBLAS_STATUS_INVALID_VALUE;
    if (b->rows != k || out->rows != m || out->cols != b->cols || c->rows != m || c->cols != b->cols) return CUBLAS_STATUS_INVALID_VALUE;
    *x = {MAGIC, m, b->cols, k};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t out, cublasLtMatmulPreference_t, int want, cublasLtMatmulHeuristicResult_t *r, int *n) {
    chosen x;
    *n = 0;
    cublasStatus_t s = sizes((desc *)(void *)d, (layout *)(void *)a, (layout *)(void *)b, (layout *)(void *)c, (layout *)(void *)out, &x);
    if (s != CUBLAS_STATUS_SUCCESS || want < 1) return s;
    memset(r, 0, sizeof *r);
    memcpy(&r->algo, &x, sizeof x);
    *n = 1;
    return CUBLAS_STATUS_SUCCESS;
}

static void widen(float *to, const char *from, uint64_t n, cudaDataType_t type) {
    for (uint64_t i = 0; i < n; i++)
        to[i] = type == CUDA_R_32F ? ((const float *)from)[i] : type == CUDA_R_16BF ? __bfloat162float(((const __nv_bfloat16 *)from)[i]) : __half2float(((const __half *)from)[i]);
}

static uint64_t extent(const layout *l) { return ((uint64_t)l->ld * (l->cols - 1) + l->rows) * (l->type == CUDA_R_32F ? 4 : 2); }

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t dh, const void *alpha, const void *a, cublasLtMatrixLayout_t ah, const void *b, cublasLtMatrixLayout_t bh,
                              const void *beta, const void *c, cublasLtMatrixLayout_t ch, void *out, cublasLtMatrixLayout_t oh, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
    desc d = *(desc *)(void *)dh;
    layout la = *(layout *)(void *)ah, lb = *(layout *)(void *)bh, lc = *(layout *)(void *)ch, lo = *(layout *)(void *)oh;
    chosen x, made;
    cublasStatus_t s = sizes(&d, &la, &lb, &lc, &lo, &x);
    if (s != CUBLAS_STATUS_SUCCESS) return s;
    if (!algo || (memcpy(&made, algo, sizeof made), made.magic != MAGIC || made.m != x.m || made.n != x.n || made.k != x.k))
        fault("cublasLtMatmul: the algorithm was chosen for another product");
    if (((uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)out | (uintptr_t)workspace) % 16) fault("cublasLtMatmul: an operand does not begin on 16 bytes");
    bool with_bias = d.epilogue == CUBLASLT_EPILOGUE_BIAS || d.epilogue == CUBLASLT_EPILOGUE_GELU_BIAS, gelu = d.epilogue == CUBLASLT_EPILOGUE_GELU || d.epilogue == CUBLASLT_EPILOGUE_GELU_BIAS;
    if (!with_bias && !gelu && d.epilogue != CUBLASLT_EPILOGUE_DEFAULT) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (with_bias && !d.bias) return CUBLAS_STATUS_INVALID_VALUE;
    check_device(a, extent(&la), "cublasLtMatmul, A"), check_device(b, extent(&lb), "cublasLtMatmul, B");
    check_device(c, extent(&lc), "cublasLtMatmul, C"), check_device(out, extent(&lo), "cublasLtMatmul, D");
    if (with_bias) check_device(d.bias, x.m * 4, "cublasLtMatmul, bias");
    if (workspace_bytes) check_device(workspace, workspace_bytes, "cublasLtMatmul, workspace");
    float one = *(const float *)alpha, two = *(const float *)beta;
    enqueue(stream, "cublasLtMatmul", [=] {
        if (workspace_bytes) memset(workspace, 0xff, workspace_bytes < 4096 ? workspace_bytes : 4096); /* it may be written to */
        std::vector<float> w(x.m * x.k), col(x.k);
        size_t size = la.type == CUDA_R_32F ? 4 : 2;
        for (uint64_t i = 0; i < la.cols; i++) widen(w.data() + i * la.rows, (const char *)a + i * (uint64_t)la.ld * size, la.rows, la.type);
        for (uint64_t j = 0; j < x.n; j++) {
            widen(col.data(), (const char *)b + j * (uint64_t)lb.ld * size, x.k, lb.type);
            for (uint64_t i = 0; i < x.m; i++) {
                float sum = 0;
                if (d.a == CUBLAS_OP_T)
                    for (uint64_t k = 0; k < x.k; k++) sum += w[i * x.k + k] * col[k];
                else
                    for (uint64_t k = 0; k < x.k; k++) sum += w[k * x.m + i] * col[k];
                float v = one * sum + (two != 0 ? two * ((const float *)c)[j * (uint64_t)lc.ld + i] : 0.0f);
                if (with_bias) v += d.bias[i];
                if (gelu) v = 0.5f * v * (1.0f + tanhf(0.7978845608f * (v + 0.044715f * v * v * v)));
                ((float *)out)[j * (uint64_t)lo.ld + i] = v;
            }
        }
    });
    return CUBLAS_STATUS_SUCCESS;
}

} // extern "C"
