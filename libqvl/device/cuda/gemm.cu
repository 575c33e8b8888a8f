/* gemm.cu - matmul: which product for which rows and weights.
 *
 * Job:        y = epilogue(x W^T + bias).
 * Input:      float rows, a matrix.
 * Output:     float rows.
 * Invariants: without bf16_math always gemm_exact. With it x is rounded once, to bf16 (F16 matrices: to f16):
 *               up to GEMV_ROWS rows           gemv: reading the weights is the work
 *               BF16, F16, more rows           cuBLASLt, F32 sums; without such a product gemm_mma, gemm_exact
 *               Q8, Q4, more rows              gemm_mma
 *               F32                            gemm_exact: who keeps such weights wants them
 *             Several GPUs: each has the product of its part; parts of sums are added, parts of tables brought together.
 *             deterministic: BF16, Q8 and Q4 always take gemm_mma, F16 gemm_exact, so that the number of rows decides nothing.
 */
#include "cuda.h"

#include <string.h>

#include "kernels/gemm_exact.cuh"
#include "kernels/gemm_mma.cuh"
#include "kernels/gemv.cuh"

/* ---- cuBLASLt ---- */

static void lt_ok(cuda *c, cublasStatus_t s, const char *what) {
    if (s != CUBLAS_STATUS_SUCCESS) cuda_failed(c, QVL_ENODEV, what, cublasLtGetStatusString(s));
}

/* What a product looks like to cuBLASLt, column-major: y^T [n][rows] = W [n][k] x^T [k][rows]. */
struct lt_product {
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, y;
};

static cublasStatus_t lt_describe(lt_product *p, const rows_of &w, int rows, size_t ldy, cublasLtEpilogue_t epilogue, const float *bias) {
    cudaDataType_t type = w.type == QVL__BF16 ? CUDA_R_16BF : CUDA_R_16F, f32 = CUDA_R_32F;
    cublasOperation_t turned = CUBLAS_OP_T;
    cublasStatus_t s = cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, f32);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &turned, sizeof turned);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    if (s == CUBLAS_STATUS_SUCCESS && bias) s = cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    if (s == CUBLAS_STATUS_SUCCESS && bias) s = cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &f32, sizeof f32);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatrixLayoutCreate(&p->w, type, (uint64_t)w.kp, (uint64_t)w.n, w.kp);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatrixLayoutCreate(&p->x, type, (uint64_t)w.kp, (uint64_t)rows, w.kp);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatrixLayoutCreate(&p->y, f32, (uint64_t)w.n, (uint64_t)rows, (int64_t)ldy);
    return s;
}

static void lt_forget(lt_product *p) {
    if (p->y) cublasLtMatrixLayoutDestroy(p->y);
    if (p->x) cublasLtMatrixLayoutDestroy(p->x);
    if (p->w) cublasLtMatrixLayoutDestroy(p->w);
    if (p->desc) cublasLtMatmulDescDestroy(p->desc);
}

/* The remembered choice for this product, made now if it is new. */
static lt_plan *lt_choose(cuda *c, const lt_product *p, const rows_of &w, int rows, size_t ldy, int epilogue) {
    uint64_t key = (uint64_t)w.n * 0x9e3779b97f4a7c15u ^ (ldy == (size_t)w.n ? 0 : (uint64_t)ldy * 0xd6e8feb86659fd93u) ^ (uint64_t)w.kp * 0xc2b2ae3d27d4eb4fu ^ (uint64_t)rows * 0x165667b19e3779f9u ^ (uint64_t)(w.type * 16 + epilogue + 1);
    lt_plan *plan = &c->plans[(key >> 20) % LT_PLANS];
    if (plan->key == key) return plan;
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtMatmulHeuristicResult_t found;
    memset(&found, 0, sizeof found);
    size_t most = LT_BYTES;
    int n = 0;
    cublasStatus_t s = cublasLtMatmulPreferenceCreate(&wish);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most, sizeof most);
    if (s == CUBLAS_STATUS_SUCCESS) s = cublasLtMatmulAlgoGetHeuristic(c->lt, p->desc, p->w, p->x, p->y, p->y, wish, 1, &found, &n);
    if (wish) cublasLtMatmulPreferenceDestroy(wish);
    *plan = lt_plan{key, found.algo, s != CUBLAS_STATUS_SUCCESS || n == 0};
    return plan;
}

/* y (or y += with add) = x W^T, and bias and GELU if the epilogue says so; x [rows][kp] in the matrix's type, y with rows
 * ldy apart. False: cuBLASLt has no such product, nothing was done. */
static bool lt_matmul(cuda *c, float *y, size_t ldy, const void *x, int rows, const rows_of &w, const float *bias, cublasLtEpilogue_t epilogue, bool add) {
    lt_product p = {};
    float one = 1.0f, beta = add ? 1.0f : 0.0f;
    bool done = false;
    if (lt_describe(&p, w, rows, ldy, epilogue, bias) == CUBLAS_STATUS_SUCCESS) {
        const lt_plan *plan = lt_choose(c, &p, w, rows, ldy, (int)epilogue);
        if ((done = !plan->none))
            lt_ok(c, cublasLtMatmul(c->lt, p.desc, &one, w.data, p.w, x, p.x, &beta, y, p.y, y, p.y, &plan->algo, c->lt_work, LT_BYTES, c->stream), "cublasLtMatmul");
    }
    lt_forget(&p);
    return done;
}

/* ---- our own ---- */

template <int TYPE> static void run_gemv(cuda *c, const finish &f, const uint16_t *x, int rows, const rows_of &w) {
    dim3 grid(div_up(w.n, 2 * GEMV_WARPS)), block(GEMV_WARPS * 32);
    if (rows == 1) LAUNCH(c, (gemv<TYPE, 1>), grid, block, 0, f, x, rows, w);
    else if (rows <= 4) LAUNCH(c, (gemv<TYPE, 4>), grid, block, 0, f, x, rows, w);
    else LAUNCH(c, (gemv<TYPE, GEMV_ROWS>), grid, block, 0, f, x, rows, w);
}

static void few_rows(cuda *c, const finish &f, const uint16_t *x, int rows, const rows_of &w) {
    if (w.type == QVL__BF16) run_gemv<QVL__BF16>(c, f, x, rows, w);
    if (w.type == QVL__F16) run_gemv<QVL__F16>(c, f, x, rows, w);
    if (w.type == QVL__Q8) run_gemv<QVL__Q8>(c, f, x, rows, w);
    if (w.type == QVL__Q4) run_gemv<QVL__Q4>(c, f, x, rows, w);
    if (w.type == QVL__F8) run_gemv<QVL__F8>(c, f, x, rows, w);
}

template <int TYPE> static void run_mma(cuda *c, const finish &f, const uint16_t *x, int rows, const rows_of &w) {
    int tiles = div_up(rows, MMA_M);
    if (div_up(w.n, MMA_N(4)) * tiles >= 2 * c->processors)
        LAUNCH(c, (gemm_mma<TYPE, 4>), dim3(div_up(w.n, MMA_N(4)), tiles), dim3(MMA_THREADS), MMA_SHARED(4), f, x, rows, w);
    else LAUNCH(c, (gemm_mma<TYPE, 2>), dim3(div_up(w.n, MMA_N(2)), tiles), dim3(MMA_THREADS), MMA_SHARED(2), f, x, rows, w);
}

static void tensor_cores(cuda *c, const finish &f, const uint16_t *x, int rows, const rows_of &w) {
    if (w.type == QVL__BF16) run_mma<QVL__BF16>(c, f, x, rows, w);
    if (w.type == QVL__Q8) run_mma<QVL__Q8>(c, f, x, rows, w);
    if (w.type == QVL__Q4) run_mma<QVL__Q4>(c, f, x, rows, w);
    if (w.type == QVL__F8) run_mma<QVL__F8>(c, f, x, rows, w);
}

static void exact(cuda *c, const finish &f, const float *x, size_t ldx, int rows, const rows_of &w) {
    LAUNCH(c, gemm_exact, dim3(div_up(w.n, EXACT_TILE), div_up(rows, EXACT_TILE)), dim3(EXACT_THREADS), EXACT_SHARED, f, x, ldx, rows, w);
}

/* ---- the op ---- */

/* By cuBLASLt; x: rounded rows; sums: room for rows x n floats. False: it has no such product, nothing was done. */
static bool library(cuda *c, const finish &f, const uint16_t *x, int rows, const rows_of &w, float *sums) {
    bool direct = f.kind == QVL__EPI_NONE || f.kind == QVL__EPI_ADD || f.kind == QVL__EPI_GELU_TANH;
    bool aligned = ((uintptr_t)f.y | (uintptr_t)(f.bias ? f.bias : f.y)) % 16 == 0 && f.ld % 4 == 0, plain = !f.bias || !f.skip;
    cublasLtEpilogue_t epilogue = f.kind == QVL__EPI_GELU_TANH ? (f.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU) :
                                  f.bias                       ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    if (w.n % 4) return false;
    if (direct && aligned && plain && lt_matmul(c, f.y, f.ld, x, rows, w, f.bias, epilogue, f.kind == QVL__EPI_ADD)) return true;
    if (!lt_matmul(c, sums, (size_t)w.n, x, rows, w, NULL, CUBLASLT_EPILOGUE_DEFAULT, false)) return false;
    LAUNCH(c, finish_rows, dim3(rows, div_up(w.n, 2 * 256 * 4)), dim3(256), 0, f, (const float *)sums);
    return true;
}

/* The product of one GPU. */
static void product(cuda *c, const finish &f, const float *x, size_t ldx, int rows, const rows_of &w) {
    if (!c->device.bf16_math || w.type == QVL__F32 || (c->deterministic && w.type == QVL__F16)) {
        exact(c, f, x, ldx, rows, w);
        return;
    }
    bool few = rows <= GEMV_ROWS && !c->deterministic, own = few || c->deterministic || qvl__type_scaled((qvl__type)w.type);
    size_t rounded = ((size_t)w.kp * 2 + 255) / 256 * 256, sums = own ? 0 : (size_t)w.n * sizeof(float);
    int most = (int)(ARENA_BYTES / (rounded + sums));
    for (int r = 0; r < rows; r += most) {
        int some = rows - r < most ? rows - r : most;
        uint16_t *to = (uint16_t *)c->arena;
        const float *from = x + (size_t)r * ldx;
        finish g = f;
        g.y += (size_t)r * f.ld;
        LAUNCH(c, round_rows, dim3(some), dim3(256), 0, w.type == QVL__F16 ? QVL__F16 : QVL__BF16, (void *)to, from, ldx, w.k, w.kp);
        if (few) few_rows(c, g, to, some, w);
        else if (own) tensor_cores(c, g, to, some, w);
        else if (library(c, g, to, some, w, (float *)(c->arena + (size_t)some * rounded))) continue;
        else if (w.type == QVL__BF16) tensor_cores(c, g, to, some, w);
        else exact(c, g, from, ldx, some, w);
    }
}

/* Partial results are brought together on each GPU. */
static void table_product(cuda *c, const finish &f, float *y, const float *x, int rows, const qvl__matrix *m, const rows_of &w) {
    int each = cut_table(m->n, 0, c->ranks).count, most = cuda_gather_rows(c, each);
    for (int r = 0; r < rows; r += most) {
        int some = rows - r < most ? rows - r : most;
        finish g = f;
        g.y = cuda_gather_part(c, some, each), g.ld = (size_t)each;
        product(c, g, x + (size_t)r * (size_t)m->k, (size_t)m->k, some, w);
        cuda_gather(c, y + (size_t)r * (size_t)m->n, some, each, m->n);
    }
}

/* Partial sums of many rows, sent in bf16: the link between GPUs is what takes the time. */
static void rounded_sums(cuda *c, finish f, const float *x, int rows, const qvl__matrix *m, const rows_of &w) {
    bool add = f.kind == QVL__EPI_ADD;
    float *y = f.y, *partial = c->gather;
    int most = (int)(GATHER_BYTES / ((size_t)m->n * (sizeof(float) + sizeof(bf16))));
    f.kind = QVL__EPI_NONE, f.y = partial;
    for (int r = 0; r < rows; r += most) {
        int some = rows - r < most ? rows - r : most;
        product(c, f, x + (size_t)r * (size_t)m->k, (size_t)m->k, some, w);
        cuda_sum_rounded(c, y + (size_t)r * (size_t)m->n, partial, (bf16 *)(partial + (size_t)some * (size_t)m->n), some, m->n, add);
    }
}

static void matmul(qvl__device *d, float *y, const float *x, int rows, const qvl__matrix *m, const float *bias, qvl__epilogue e) {
    entered c(d);
    if (rows <= 0) return;
    part p = part_of(c, m);
    rows_of w = view(c, m);
    int section = m->role.gate_up ? w.n / 2 : p.outs == 3 ? p.out[0].count : w.n;
    int skip = m->role.gate_up ? (m->n - w.n) / 2 : p.outs == 3 ? p.out[1].from - p.out[0].from - p.out[0].count : 0;
    finish f = {e, bias ? bias + p.out[0].from : NULL, y, w.n, (size_t)(e == QVL__EPI_SWIGLU ? m->n / 2 : m->n), section, skip};
    qvl__division division = c->ranks > 1 ? m->role.division : QVL__WHOLE;
    if (bias && p.outs == 3 && p.out[2].from - p.out[1].from - p.out[1].count != skip) cuda_failed(c, QVL_EINTERNAL, "matmul", "a bias for divided heads of two kinds");
    if (division == QVL__TABLE) {
        table_product(c, f, y, x, rows, m, w);
        return;
    }
    if (division == QVL__BY_INPUT) {
        if (c->rank) f.bias = NULL; /* it is added once */
        if (e != QVL__EPI_NONE && e != QVL__EPI_ADD) cuda_failed(c, QVL_EINTERNAL, "matmul", "an activation of partial sums");
        if (rows >= ROUNDED_ROWS && d->bf16_math && !c->deterministic) {
            rounded_sums(c, f, x, rows, m, w);
            return;
        }
        if (c->rank) f.kind = QVL__EPI_NONE; /* and so is y */
    }
    product(c, f, x, (size_t)m->k, rows, w);
    if (division == QVL__BY_INPUT) cuda_sum(c, y, (size_t)rows * (size_t)m->n);
}

void cuda_products(qvl__device *d) { d->matmul = matmul; }
