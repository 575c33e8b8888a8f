/* emu_blaslt.cpp - cuBLASLt's matrix product.
 *
 * Job:        descriptors, layouts, preferences, heuristic, product with bias and GELU epilogues.
 * Input:      A and B in bf16, f16 or f32; C and D in the same type or f32; sums in f32; alpha and beta on the host.
 * Output:     D, as an operation on the stream; or the status that cuBLASLt gives, with the reason on stderr.
 * Invariants: pointers, extents, devices, workspace and aliasing are checked before anything is queued; the order of a sum
 *             depends on the shape, as it does in cuBLASLt; the workspace is overwritten; GELU is the tanh form, as there.
 */
#include <cublasLt.h>
#include <stdio.h>
#include <algorithm>

#include "emu.h"

namespace qvl_emu {
namespace {

struct Layout {
    cudaDataType type;
    uint32_t order;
    uint64_t rows, cols;
    int64_t ld, stride;
    int32_t batch;
};
struct Desc {
    cublasComputeType_t compute;
    cudaDataType scale;
    int32_t op_a, op_b;
    cublasLtEpilogue_t epilogue;
    const void *bias;
    int32_t bias_type; /* -1: that of D */
};
struct Preference {
    uint64_t workspace;
};
struct Algo {
    uint64_t magic, kind, workspace;
};
constexpr uint64_t algo_magic = 0x716c74656d750001u, wished_workspace = 4 << 20;

template <class T, class Opaque> T *as(Opaque *o) {
    static_assert(sizeof(T) <= sizeof(Opaque), "ours fits into the opaque structure");
    return reinterpret_cast<T *>(o);
}
template <class T, class Opaque> const T *as(const Opaque *o) { return reinterpret_cast<const T *>(o); }

cublasStatus_t refuse(cublasStatus_t s, const char *format, ...) __attribute__((format(printf, 2, 3)));
cublasStatus_t refuse(cublasStatus_t s, const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    fprintf(stderr, "qvl-emu: cuBLASLt: ");
    vfprintf(stderr, format, ap);
    fprintf(stderr, "\n");
    va_end(ap);
    return s;
}

size_t size_of(cudaDataType t) { return t == CUDA_R_32F ? 4 : 2; }
bool is_type(cudaDataType t) { return t == CUDA_R_32F || t == CUDA_R_16F || t == CUDA_R_16BF; }
float load(const void *p, size_t i, cudaDataType t) {
    if (t == CUDA_R_32F) return static_cast<const float *>(p)[i];
    return t == CUDA_R_16F ? __half2float(static_cast<const __half *>(p)[i]) : __bfloat162float(static_cast<const __nv_bfloat16 *>(p)[i]);
}
void store(void *p, size_t i, cudaDataType t, float x) {
    if (t == CUDA_R_32F)
        static_cast<float *>(p)[i] = x;
    else if (t == CUDA_R_16F)
        static_cast<__half *>(p)[i] = __float2half_rn(x);
    else
        static_cast<__nv_bfloat16 *>(p)[i] = __float2bfloat16_rn(x);
}

size_t at(const Layout &l, size_t row, size_t col) { return l.order == CUBLASLT_ORDER_ROW ? row * (size_t)l.ld + col : col * (size_t)l.ld + row; }
size_t lines(const Layout &l) { return l.order == CUBLASLT_ORDER_ROW ? l.rows : l.cols; }
size_t line(const Layout &l) { return l.order == CUBLASLT_ORDER_ROW ? l.cols : l.rows; }
size_t extent(const Layout &l) { /* bytes from the first to behind the last number */
    return ((size_t)(l.batch - 1) * (size_t)l.stride + (lines(l) - 1) * (size_t)l.ld + line(l)) * size_of(l.type);
}
void touch(const Layout &l, const void *p, bool write) {
    size_t size = size_of(l.type);
    for (size_t b = 0; b < (size_t)l.batch; b++)
        for (size_t i = 0; i < lines(l); i++) check_range(static_cast<const char *>(p) + (b * (size_t)l.stride + i * (size_t)l.ld) * size, line(l) * size, write);
}

struct Shape {
    size_t m, n, k;
};

cublasStatus_t check_problem(const Desc &d, const Layout &a, const Layout &b, const Layout &c, const Layout &out, Shape *shape) {
    const struct {
        const char *name;
        const Layout &l;
    } all[] = {{"A", a}, {"B", b}, {"C", c}, {"D", out}};
    for (auto &x : all) {
        if (!is_type(x.l.type)) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "the type %d of %s is not modelled", (int)x.l.type, x.name);
        if (x.l.order != CUBLASLT_ORDER_COL && x.l.order != CUBLASLT_ORDER_ROW) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "the order %u of %s is not modelled", x.l.order, x.name);
        if (!x.l.rows || !x.l.cols) return refuse(CUBLAS_STATUS_INVALID_VALUE, "%s is empty", x.name);
        if (x.l.ld < (int64_t)line(x.l)) return refuse(CUBLAS_STATUS_INVALID_VALUE, "the leading dimension %lld of %s is less than %zu", (long long)x.l.ld, x.name, line(x.l));
        if (x.l.batch != a.batch || x.l.batch < 1) return refuse(CUBLAS_STATUS_INVALID_VALUE, "the batch count %d of %s, %d of A", x.l.batch, x.name, a.batch);
    }
    if (d.compute != CUBLAS_COMPUTE_32F || d.scale != CUDA_R_32F) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "compute type %d with scale type %d is not modelled", (int)d.compute, (int)d.scale);
    if (a.type != b.type || c.type != out.type || (out.type != a.type && out.type != CUDA_R_32F))
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "no product of types A %d, B %d, C %d, D %d", (int)a.type, (int)b.type, (int)c.type, (int)out.type);
    *shape = Shape{d.op_a == CUBLAS_OP_N ? a.rows : a.cols, d.op_b == CUBLAS_OP_N ? b.cols : b.rows, d.op_a == CUBLAS_OP_N ? a.cols : a.rows};
    size_t kb = d.op_b == CUBLAS_OP_N ? b.rows : b.cols;
    if (kb != shape->k || out.rows != shape->m || out.cols != shape->n || c.rows != out.rows || c.cols != out.cols)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "shapes do not fit: op(A) %zu x %zu, op(B) %zu x %zu, C %zu x %zu, D %zu x %zu", shape->m, shape->k, kb, shape->n, (size_t)c.rows,
                      (size_t)c.cols, (size_t)out.rows, (size_t)out.cols);
    if (d.epilogue & CUBLASLT_EPILOGUE_BIAS) {
        cudaDataType type = d.bias_type < 0 ? out.type : (cudaDataType)d.bias_type;
        if (type != out.type) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "a bias of type %d with D of type %d", (int)type, (int)out.type);
    }
    return CUBLAS_STATUS_SUCCESS;
}

uint64_t kind_of(const Desc &d, const Layout &a, const Layout &out) {
    return (uint64_t)a.type | (uint64_t)out.type << 8 | (uint64_t)d.op_a << 16 | (uint64_t)d.op_b << 20 | (uint64_t)d.epilogue << 24 | (uint64_t)a.order << 40 | (uint64_t)out.order << 44;
}

constexpr int tile_m = 4, tile_n = 16;

/* sums[m][n] += a[m][k0..k1) b[k0..k1)[n], both as float; columns in tiles of 16 so that they stay in registers. */
void multiply(float *sums, const float *a, const float *b, Shape s, size_t n_padded, size_t k0, size_t k1) {
    for (size_t j = 0; j < n_padded; j += tile_n)
        for (size_t i = 0; i < s.m; i += tile_m) {
            size_t rows = std::min<size_t>(tile_m, s.m - i);
            float acc[tile_m][tile_n] = {};
            for (size_t k = k0; k < k1; k++) {
                const float *bk = b + k * n_padded + j;
                for (size_t r = 0; r < rows; r++) {
                    float x = a[(i + r) * s.k + k];
                    for (int c = 0; c < tile_n; c++) acc[r][c] += x * bk[c];
                }
            }
            for (size_t r = 0; r < rows; r++)
                for (int c = 0; c < tile_n; c++) sums[(i + r) * n_padded + j + (size_t)c] += acc[r][c];
        }
}

float gelu(float x) { return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))); }

struct Product {
    Desc d;
    Layout a, b, c, out;
    Shape s;
    float alpha, beta;
    const void *pa, *pb, *pc;
    void *pd, *workspace;
    size_t workspace_bytes;
};

void product(const Product &q) {
    touch(q.a, q.pa, false);
    touch(q.b, q.pb, false);
    if (q.beta != 0) touch(q.c, q.pc, false);
    if (q.workspace_bytes) {
        check_range(q.workspace, q.workspace_bytes, true);
        memset(q.workspace, 0xff, q.workspace_bytes);
    }
    bool biased = q.d.epilogue & CUBLASLT_EPILOGUE_BIAS, gelued = q.d.epilogue & CUBLASLT_EPILOGUE_GELU;
    if (biased) check_range(q.d.bias, q.s.m * size_of(q.out.type), false);
    Shape s = q.s;
    size_t np = (s.n + tile_n - 1) / tile_n * tile_n, parts = 1 + (s.m * 7 + s.n * 3 + s.k) % 3;
    std::vector<float> a(s.m * s.k), b(s.k * np), sums(s.m * np);
    for (size_t batch = 0; batch < (size_t)q.a.batch; batch++) {
        auto *pa = static_cast<const char *>(q.pa) + batch * (size_t)q.a.stride * size_of(q.a.type);
        auto *pb = static_cast<const char *>(q.pb) + batch * (size_t)q.b.stride * size_of(q.b.type);
        auto *pc = static_cast<const char *>(q.pc) + batch * (size_t)q.c.stride * size_of(q.c.type);
        auto *pd = static_cast<char *>(q.pd) + batch * (size_t)q.out.stride * size_of(q.out.type);
        for (size_t i = 0; i < s.m; i++)
            for (size_t k = 0; k < s.k; k++) a[i * s.k + k] = load(pa, q.d.op_a == CUBLAS_OP_N ? at(q.a, i, k) : at(q.a, k, i), q.a.type);
        for (size_t j = 0; j < s.n; j++)
            for (size_t k = 0; k < s.k; k++) b[k * np + j] = load(pb, q.d.op_b == CUBLAS_OP_N ? at(q.b, k, j) : at(q.b, j, k), q.b.type);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (size_t p = 0; p < parts; p++) multiply(sums.data(), a.data(), b.data(), s, np, s.k * p / parts, s.k * (p + 1) / parts);
        for (size_t j = 0; j < s.n; j++)
            for (size_t i = 0; i < s.m; i++) {
                float x = q.alpha * sums[i * np + j];
                if (q.beta != 0) x += q.beta * load(pc, at(q.c, i, j), q.c.type);
                if (biased) x += load(q.d.bias, i, q.out.type);
                if (gelued) x = gelu(x);
                store(pd, at(q.out, i, j), q.out.type, x);
            }
    }
    touch(q.out, q.pd, true);
}

bool overlap(const void *p, size_t n, const void *q, size_t m) {
    return static_cast<const char *>(p) < static_cast<const char *>(q) + m && static_cast<const char *>(q) < static_cast<const char *>(p) + n;
}

template <class T> cublasStatus_t put(T *to, const void *from, size_t size) {
    if (!from || size != sizeof(T)) return refuse(CUBLAS_STATUS_INVALID_VALUE, "an attribute of %zu bytes is set with %zu bytes", sizeof(T), size);
    memcpy(to, from, size);
    return CUBLAS_STATUS_SUCCESS;
}

} // namespace
} // namespace qvl_emu

using namespace qvl_emu;

cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) {
    if (no_device()) return CUBLAS_STATUS_NOT_INITIALIZED;
    *h = reinterpret_cast<cublasLtHandle_t>(new uint64_t(algo_magic));
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) {
    delete reinterpret_cast<uint64_t *>(h);
    return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion() { return CUBLAS_VERSION; }

const char *cublasLtGetStatusName(cublasStatus_t s) {
    switch (s) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    default: return "another cuBLAS status";
    }
}
const char *cublasLtGetStatusString(cublasStatus_t s) { return cublasLtGetStatusName(s); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute, cudaDataType scale) {
    *d = new cublasLtMatmulDescOpaque_t();
    *as<Desc>(*d) = Desc{compute, scale, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr, -1};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    delete d;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t handle, cublasLtMatmulDescAttributes_t attr, const void *p, size_t size) {
    Desc *d = as<Desc>(handle);
    cublasStatus_t s;
    switch (attr) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
    case CUBLASLT_MATMUL_DESC_TRANSB: {
        int32_t *op = attr == CUBLASLT_MATMUL_DESC_TRANSA ? &d->op_a : &d->op_b;
        s = put(op, p, size);
        return s == CUBLAS_STATUS_SUCCESS && *op != CUBLAS_OP_N && *op != CUBLAS_OP_T ? refuse(CUBLAS_STATUS_INVALID_VALUE, "operation %d is not modelled", *op) : s;
    }
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        s = put(&d->epilogue, p, size);
        if (s == CUBLAS_STATUS_SUCCESS && d->epilogue != CUBLASLT_EPILOGUE_DEFAULT && d->epilogue != CUBLASLT_EPILOGUE_BIAS && d->epilogue != CUBLASLT_EPILOGUE_GELU &&
            d->epilogue != CUBLASLT_EPILOGUE_GELU_BIAS)
            return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "epilogue %d is not modelled", (int)d->epilogue);
        return s;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return put(&d->bias, p, size);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return put(&d->bias_type, p, size);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE: {
        int32_t mode = 0;
        s = put(&mode, p, size);
        return s == CUBLAS_STATUS_SUCCESS && mode != CUBLASLT_POINTER_MODE_HOST ? refuse(CUBLAS_STATUS_NOT_SUPPORTED, "alpha and beta on the device are not modelled") : s;
    }
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
    case CUBLASLT_MATMUL_DESC_C_SCALE_POINTER:
    case CUBLASLT_MATMUL_DESC_D_SCALE_POINTER: return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "scale pointers (attribute %d) are not modelled", (int)attr);
    default: return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "attribute %d of a product is not modelled", (int)attr);
    }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type, uint64_t rows, uint64_t cols, int64_t ld) {
    *l = new cublasLtMatrixLayoutOpaque_t();
    *as<Layout>(*l) = Layout{type, CUBLASLT_ORDER_COL, rows, cols, ld, 0, 1};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete l;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t handle, cublasLtMatrixLayoutAttribute_t attr, const void *p, size_t size) {
    Layout *l = as<Layout>(handle);
    switch (attr) {
    case CUBLASLT_MATRIX_LAYOUT_ORDER: return put(&l->order, p, size);
    case CUBLASLT_MATRIX_LAYOUT_ROWS: return put(&l->rows, p, size);
    case CUBLASLT_MATRIX_LAYOUT_COLS: return put(&l->cols, p, size);
    case CUBLASLT_MATRIX_LAYOUT_LD: return put(&l->ld, p, size);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return put(&l->batch, p, size);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return put(&l->stride, p, size);
    default: return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "attribute %d of a layout is not modelled", (int)attr);
    }
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    *p = new cublasLtMatmulPreferenceOpaque_t();
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    delete p;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t handle, cublasLtMatmulPreferenceAttributes_t attr, const void *p, size_t size) {
    if (attr == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return put(&as<Preference>(handle)->workspace, p, size);
    return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "attribute %d of a preference is not modelled", (int)attr);
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t out,
                                              cublasLtMatmulPreference_t wish, int wanted, cublasLtMatmulHeuristicResult_t results[], int *found) {
    *found = 0;
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!d || !a || !b || !c || !out || !wish || wanted < 1 || !results) return CUBLAS_STATUS_INVALID_VALUE;
    Shape shape;
    cublasStatus_t s = check_problem(*as<Desc>(d), *as<Layout>(a), *as<Layout>(b), *as<Layout>(c), *as<Layout>(out), &shape);
    if (s != CUBLAS_STATUS_SUCCESS) return s;
    memset(&results[0], 0, sizeof results[0]);
    uint64_t space = std::min(as<Preference>(wish)->workspace, wished_workspace);
    *as<Algo>(&results[0].algo) = Algo{algo_magic, kind_of(*as<Desc>(d), *as<Layout>(a), *as<Layout>(out)), space};
    results[0].workspaceSize = space;
    results[0].state = CUBLAS_STATUS_SUCCESS;
    results[0].wavesCount = 1;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDesc_t desc, const void *alpha, const void *A, cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b, const void *beta,
                              const void *C, cublasLtMatrixLayout_t c, void *D, cublasLtMatrixLayout_t out, const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes, cudaStream_t handle) {
    Api api;
    if (no_device() || !h) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!desc || !alpha || !beta || !A || !B || !D || !a || !b || !c || !out) return refuse(CUBLAS_STATUS_INVALID_VALUE, "a null pointer");
    Product q = {*as<Desc>(desc), *as<Layout>(a), *as<Layout>(b), *as<Layout>(c), *as<Layout>(out), {}, *static_cast<const float *>(alpha), *static_cast<const float *>(beta), A, B, C, D, workspace, 0};
    cublasStatus_t status = check_problem(q.d, q.a, q.b, q.c, q.out, &q.s);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (algo) {
        const Algo *chosen = as<Algo>(algo);
        if (chosen->magic != algo_magic || chosen->kind != kind_of(q.d, q.a, q.out)) return refuse(CUBLAS_STATUS_INVALID_VALUE, "the algorithm was chosen for another kind of product");
        if (chosen->workspace > workspace_bytes) return refuse(CUBLAS_STATUS_INVALID_VALUE, "%zu bytes of workspace, the algorithm needs %zu", workspace_bytes, (size_t)chosen->workspace);
        q.workspace_bytes = chosen->workspace;
    } else
        q.workspace_bytes = std::min<size_t>(workspace_bytes, wished_workspace);
    Stream *s;
    if (find_stream(handle, &s) != cudaSuccess) return refuse(CUBLAS_STATUS_INVALID_VALUE, "no such stream");
    int device = stream_device(s);
    if (device != current_device()) return refuse(CUBLAS_STATUS_INVALID_VALUE, "the stream is device %d's, the current device is %d", device, current_device());
    const struct {
        const char *name;
        const void *p;
        size_t bytes;
        bool used;
    } all[] = {{"A", A, extent(q.a), true},
               {"B", B, extent(q.b), true},
               {"C", C, extent(q.c), q.beta != 0},
               {"D", D, extent(q.out), true},
               {"the workspace", workspace, q.workspace_bytes, q.workspace_bytes != 0},
               {"the bias", q.d.bias, q.s.m * size_of(q.out.type), (q.d.epilogue & CUBLASLT_EPILOGUE_BIAS) != 0}};
    for (auto &x : all) {
        if (!x.used) continue;
        need_device_memory(x.p, x.bytes, device, "cublasLtMatmul", x.name);
        if ((uintptr_t)x.p % 16) return refuse(CUBLAS_STATUS_INVALID_VALUE, "%s at %p is not a multiple of 16", x.name, x.p);
        bool in_place = x.p == C && C == D && memcmp(&q.c, &q.out, sizeof q.c) == 0;
        if (x.p != D && !in_place && overlap(x.p, x.bytes, D, extent(q.out))) fail("cublasLtMatmul: D overlaps %s", x.name);
        if (x.p == D && &x != &all[3] && !in_place) fail("cublasLtMatmul: D is also %s", x.name);
    }
    Work w;
    w.name = "cublasLtMatmul";
    w.device = device;
    w.run = [q, device] {
        product(q);
        check_zones(device, "cublasLtMatmul");
    };
    return enqueue(s, std::move(w)) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
