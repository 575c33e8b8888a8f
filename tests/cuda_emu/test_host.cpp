/* test_host.cpp - host code with planted faults and without: streams, events, graphs, memory, cuBLASLt, NCCL.
 *
 * Job:        cases for emu_rt.cpp, emu_memory.cpp, emu_blaslt.cpp, emu_nccl.cpp.
 * Input:      planted: whether the fault is in.
 * Output:     host_cases.
 * Invariants: as in test_kernels.cpp; what CUDA refuses must be refused with CUDA's error.
 */
#include <cublasLt.h>
#include <nccl.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>
#include <cmath>
#include <functional>
#include <thread>

#include "test_emu.h"

namespace {

__global__ void add(float *y, const float *x, float v, unsigned n) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] + v;
}
void run_add(Array<float> &y, const Array<float> &x, float v, cudaStream_t s) {
    QVL_LAUNCH(add, dim3(4), dim3(64), 0, s, y.p, x.p, v, 256u);
    OK(cudaGetLastError());
}
std::vector<float> plus(std::vector<float> v, float x) {
    for (float &f : v) f += x;
    return v;
}
cudaStream_t stream() {
    cudaStream_t s;
    OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    return s;
}
cudaEvent_t event() {
    cudaEvent_t e;
    OK(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
    return e;
}
float *pinned(const std::vector<float> &from) {
    float *p;
    OK(cudaHostAlloc((void **)&p, from.size() * 4, cudaHostAllocDefault));
    memcpy(p, from.data(), from.size() * 4);
    return p;
}
int expect(cudaError_t got, cudaError_t want) {
    if (got != want) fprintf(stderr, "%s instead of %s\n", cudaGetErrorName(got), cudaGetErrorName(want));
    return got == want ? refused : wrong;
}

int missing_stream_wait(bool planted) {
    Array<float> x(counting(256)), y(256), z(256);
    cudaStream_t a = stream(), b = stream();
    cudaEvent_t e = event();
    run_add(y, x, 1, a);
    OK(cudaEventRecord(e, a));
    if (!planted) OK(cudaStreamWaitEvent(b, e, 0));
    run_add(z, y, 1, b);
    OK(cudaStreamSynchronize(b));
    OK(cudaStreamSynchronize(a));
    return same(z.get(), plus(counting(256), 2));
}
int copy_beside_kernel(bool planted) {
    Array<float> x(counting(256)), y(256);
    cudaStream_t a = stream(), b = stream();
    run_add(y, x, 1, a);
    if (!planted) OK(cudaStreamSynchronize(a));
    OK(cudaMemcpyAsync(x.p, y.p, 1024, cudaMemcpyDeviceToDevice, b));
    OK(cudaDeviceSynchronize());
    return same(x.get(), plus(counting(256), 1));
}
int read_before_sync(bool planted) {
    Array<float> x(counting(256)), y(256);
    cudaStream_t s = stream();
    float *h = pinned(std::vector<float>(256, -1));
    run_add(y, x, 1, s);
    OK(cudaMemcpyAsync(h, y.p, 1024, cudaMemcpyDeviceToHost, s));
    if (!planted) OK(cudaStreamSynchronize(s));
    int r = same(std::vector<float>(h, h + 256), plus(counting(256), 1));
    OK(cudaStreamSynchronize(s));
    return r;
}
int pinned_source_changed(bool planted) {
    Array<float> x(256);
    cudaStream_t s = stream();
    float *h = pinned(counting(256));
    OK(cudaMemcpyAsync(x.p, h, 1024, cudaMemcpyHostToDevice, s));
    if (!planted) OK(cudaStreamSynchronize(s));
    h[7] = -1;
    OK(cudaStreamSynchronize(s));
    return same(x.get(), counting(256));
}
int host_dereference(bool planted) {
    Array<float> x(counting(16));
    float v = planted ? x.p[3] : x.get()[3];
    return v == 3 ? right : wrong;
}
int long_copy(bool planted) {
    Array<float> x(16);
    std::vector<float> h = counting(32);
    OK(cudaMemcpy(x.p, h.data(), planted ? 68 : 64, cudaMemcpyHostToDevice));
    return same(x.get(), counting(16));
}
int use_after_free(bool planted) {
    Array<float> x(counting(256)), y(256);
    cudaStream_t s = stream();
    if (planted) OK(cudaFree(x.p));
    run_add(y, x, 0, s);
    OK(cudaStreamSynchronize(s));
    return same(y.get(), counting(256));
}
int copy_from_freed(bool planted) {
    Array<float> x(counting(256));
    std::vector<float> h(256);
    if (planted) OK(cudaFree(x.p));
    OK(cudaMemcpy(h.data(), x.p, 1024, cudaMemcpyDeviceToHost));
    return same(h, counting(256));
}
int copy_wrong_kind(bool planted) {
    Array<float> x(counting(16));
    std::vector<float> h(16);
    OK(cudaMemcpy(h.data(), x.p, 64, planted ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost));
    return same(h, counting(16));
}

/* ---- launches ---- */

__global__ void fill_shared(float *y, unsigned n) {
    QVL_SHARED(float, s);
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) s[i] = 1;
    __syncthreads();
    if (threadIdx.x == 0) *y = s[n - 1];
}
int much_shared_memory(bool planted) {
    Array<float> y(1);
    if (!planted) OK(cudaFuncSetAttribute(fill_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10));
    QVL_LAUNCH(fill_shared, dim3(1), dim3(32), 100 << 10, 0, y.p, (100u << 10) / 4);
    cudaError_t e = cudaGetLastError();
    if (e) return expect(e, cudaErrorInvalidValue);
    return cudaPeekAtLastError() == cudaSuccess ? same(y.get(), {1}) : wrong;
}
int big_block(bool planted) {
    Array<float> x(counting(256)), y(256);
    QVL_LAUNCH(add, dim3(1), dim3(planted ? 1025 : 256), 0, 0, y.p, x.p, 0.0f, 256u);
    if (cudaPeekAtLastError()) return expect(cudaGetLastError(), cudaErrorInvalidConfiguration);
    return same(y.get(), counting(256));
}
int stream_of_other_device(bool planted) {
    Array<float> x(counting(256)), y(256);
    cudaStream_t s = stream();
    OK(cudaSetDevice(planted ? 1 : 0));
    QVL_LAUNCH(add, dim3(4), dim3(64), 0, s, y.p, x.p, 0.0f, 256u);
    if (cudaPeekAtLastError()) return expect(cudaGetLastError(), cudaErrorInvalidResourceHandle);
    OK(cudaStreamSynchronize(s));
    return same(y.get(), counting(256));
}

/* ---- capture ---- */

/* y = x + 1 + ... by a recorded graph of two branches, launched twice. */
int capture(bool planted, cudaError_t want, const std::function<cudaError_t(cudaStream_t)> &misuse) {
    Array<float> x(counting(256)), y(256), z(256), sum(256);
    cudaStream_t a = stream(), b = stream();
    cudaEvent_t fork = event(), join = event();
    cudaGraph_t g;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(a, cudaStreamCaptureModeGlobal));
    OK(cudaEventRecord(fork, a));
    OK(cudaStreamWaitEvent(b, fork, 0));
    run_add(y, x, 1, a);
    run_add(z, x, 2, b);
    if (planted) {
        cudaError_t e = misuse(a);
        if (e != want) return expect(e, want);
        cudaError_t end = cudaStreamEndCapture(a, &g);
        return end == cudaErrorStreamCaptureInvalidated && g == nullptr ? refused : wrong;
    }
    OK(cudaEventRecord(join, b));
    OK(cudaStreamWaitEvent(a, join, 0));
    run_add(sum, z, 1, a);
    run_add(sum, sum, 1, a);
    OK(cudaStreamEndCapture(a, &g));
    size_t nodes = 0;
    OK(cudaGraphGetNodes(g, nullptr, &nodes));
    OK(cudaGraphInstantiate(&exec, g, 0));
    OK(cudaGraphDestroy(g));
    OK(cudaGraphLaunch(exec, a));
    OK(cudaMemcpyAsync(x.p, sum.p, 1024, cudaMemcpyDeviceToDevice, a));
    OK(cudaGraphLaunch(exec, a));
    OK(cudaStreamSynchronize(a));
    OK(cudaGraphExecDestroy(exec));
    return nodes == 4 && y.get() == plus(counting(256), 5) ? same(sum.get(), plus(counting(256), 8)) : wrong;
}
int malloc_in_capture(bool planted) {
    return capture(planted, cudaErrorStreamCaptureUnsupported, [](cudaStream_t) {
        void *p;
        return cudaMalloc(&p, 16);
    });
}
int sync_in_capture(bool planted) {
    return capture(planted, cudaErrorStreamCaptureUnsupported, [](cudaStream_t s) { return cudaStreamSynchronize(s); });
}
int outside_event_in_capture(bool planted) {
    Array<float> x(counting(256)), y(256);
    cudaStream_t other = stream();
    cudaEvent_t e = event();
    run_add(y, x, 0, other);
    OK(cudaEventRecord(e, other));
    return capture(planted, cudaErrorStreamCaptureIsolation, [&](cudaStream_t s) { return cudaStreamWaitEvent(s, e, 0); });
}
int legacy_in_capture(bool planted) {
    Array<float> x(counting(256)), y(256);
    cudaStream_t s;
    cudaGraph_t g;
    OK(cudaStreamCreate(&s)); /* blocking */
    OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed));
    run_add(y, x, 1, s);
    QVL_LAUNCH(add, dim3(4), dim3(64), 0, planted ? (cudaStream_t)0 : s, y.p, y.p, 1.0f, 256u);
    cudaError_t e = cudaGetLastError(), end = cudaStreamEndCapture(s, &g);
    if (planted) return expect(e, cudaErrorStreamCaptureImplicit) == refused && end == cudaErrorStreamCaptureInvalidated ? refused : wrong;
    return e == cudaSuccess && end == cudaSuccess ? right : wrong;
}
int unjoined_capture(bool planted) {
    Array<float> x(counting(256)), y(256);
    cudaStream_t a = stream(), b = stream();
    cudaEvent_t e = event();
    cudaGraph_t g;
    OK(cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal));
    OK(cudaEventRecord(e, a));
    OK(cudaStreamWaitEvent(b, e, 0));
    run_add(y, x, 1, b);
    OK(cudaEventRecord(e, b));
    if (!planted) OK(cudaStreamWaitEvent(a, e, 0));
    cudaError_t end = cudaStreamEndCapture(a, &g);
    return end == cudaSuccess ? right : expect(end, cudaErrorStreamCaptureUnjoined);
}
int branches_race(bool planted) { /* two branches of a graph write one place */
    Array<float> x(counting(256)), y(256), z(256);
    cudaStream_t a = stream(), b = stream();
    cudaEvent_t e = event();
    cudaGraph_t g;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(a, cudaStreamCaptureModeRelaxed));
    OK(cudaEventRecord(e, a));
    OK(cudaStreamWaitEvent(b, e, 0));
    run_add(y, x, 1, a);
    run_add(planted ? y : z, x, 2, b);
    OK(cudaEventRecord(e, b));
    OK(cudaStreamWaitEvent(a, e, 0));
    OK(cudaStreamEndCapture(a, &g));
    OK(cudaGraphInstantiate(&exec, g, 0));
    OK(cudaGraphLaunch(exec, a));
    OK(cudaStreamSynchronize(a));
    return same(y.get(), plus(counting(256), 1));
}

/* ---- cuBLASLt ---- */

struct Lt {
    cublasLtHandle_t h;
    cublasLtMatmulDesc_t d;
    Lt() {
        OK(cublasLtCreate(&h));
        OK(cublasLtMatmulDescCreate(&d, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    }
    template <class T> void set(cublasLtMatmulDescAttributes_t a, T v) { OK(cublasLtMatmulDescSetAttribute(d, a, &v, sizeof v)); }
};
cublasLtMatrixLayout_t layout(cudaDataType type, int rows, int cols, int ld, int batch = 1, int64_t stride = 0, bool row_major = false) {
    cublasLtMatrixLayout_t l;
    OK(cublasLtMatrixLayoutCreate(&l, type, (uint64_t)rows, (uint64_t)cols, ld));
    int32_t n = batch, order = row_major ? CUBLASLT_ORDER_ROW : CUBLASLT_ORDER_COL;
    OK(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &n, sizeof n));
    OK(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
    OK(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_ORDER, &order, sizeof order));
    return l;
}
int matrix(bool planted, int fault) {
    const int m = 24, n = 5, k = 40, batch = 2;
    std::vector<float> ha(batch * k * m), hb(batch * k * n), hc(batch * m * n), hbias(m);
    for (size_t i = 0; i < ha.size(); i++) ha[i] = (float)(i * 7 % 13) - 6;
    for (size_t i = 0; i < hb.size(); i++) hb[i] = (float)(i * 5 % 11) - 5;
    for (size_t i = 0; i < hc.size(); i++) hc[i] = (float)(i % 3);
    for (int i = 0; i < m; i++) hbias[(size_t)i] = 0.25f * (float)i;
    std::vector<__nv_bfloat16> ba, bb;
    for (float f : ha) ba.push_back(__float2bfloat16_rn(f));
    for (float f : hb) bb.push_back(__float2bfloat16_rn(f));
    Array<__nv_bfloat16> a(ba), b(bb);
    Array<float> d(hc), bias(hbias);
    Array<char> space(8 << 20);
    Lt lt;
    lt.set(CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)CUBLAS_OP_T);
    lt.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_GELU_BIAS);
    lt.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, (const void *)(fault == 5 && planted ? bias.p + 1 : bias.p));
    bool bad_ld = planted && fault == 1, bad_type = planted && fault == 2, beyond = planted && fault == 3, overlap = planted && fault == 4;
    auto la = layout(CUDA_R_16BF, k, m, bad_ld ? k - 8 : k, batch, k * m), lb = layout(CUDA_R_16BF, beyond ? k : k, n, k, batch, beyond ? k * n + 8 : k * n);
    auto lc = layout(bad_type ? CUDA_R_16F : CUDA_R_32F, m, n, m, batch, m * n);
    cublasLtMatmulPreference_t wish;
    cublasLtMatmulHeuristicResult_t found;
    size_t most = 1 << 20;
    int count;
    OK(cublasLtMatmulPreferenceCreate(&wish));
    OK(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most, sizeof most));
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lt.h, lt.d, la, lb, lc, lc, wish, 1, &found, &count);
    if (status) return status == (bad_ld ? CUBLAS_STATUS_INVALID_VALUE : CUBLAS_STATUS_NOT_SUPPORTED) && (bad_ld || bad_type) ? refused : wrong;
    float alpha = 0.125f, beta = 1;
    cudaStream_t s = stream();
    void *out = overlap ? (void *)a.p : (void *)d.p;
    status = cublasLtMatmul(lt.h, lt.d, &alpha, a.p, la, b.p, lb, &beta, out, lc, out, lc, &found.algo, space.p, planted && fault == 6 ? most / 2 : most, s);
    if (status) return planted && status == CUBLAS_STATUS_INVALID_VALUE ? refused : wrong;
    OK(cudaStreamSynchronize(s));
    std::vector<float> got = d.get();
    for (int g = 0; g < batch; g++)
        for (int j = 0; j < n; j++)
            for (int i = 0; i < m; i++) {
                double x = 0;
                for (int q = 0; q < k; q++) x += (double)ha[(size_t)(g * k * m + i * k + q)] * hb[(size_t)(g * k * n + j * k + q)];
                x = 0.125 * x + hc[(size_t)(g * m * n + j * m + i)] + hbias[(size_t)i];
                x = 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
                if (fabs(x - got[(size_t)(g * m * n + j * m + i)]) > 1e-4 * (1 + fabs(x))) return wrong;
            }
    return right;
}
int bad_leading_dimension(bool planted) { return matrix(planted, 1); }
int bad_types(bool planted) { return matrix(planted, 2); }
int matrix_beyond_memory(bool planted) { return matrix(planted, 3); }
int matrix_overlap(bool planted) { return matrix(planted, 4); }
int bias_misaligned(bool planted) { return matrix(planted, 5); }
int small_workspace(bool planted) { return matrix(planted, 6); }
int row_major(bool) { /* f16, no transposition, all row-major; f32 likewise column-major */
    std::vector<float> hx = {1, 2, 3, 4, 5, 6}, hy = {1, 0, 2, 1, 1, 3, 0, 1, 1, 2, 0, 1};
    std::vector<__half> x, y;
    for (float f : hx) x.push_back(__float2half(f));
    for (float f : hy) y.push_back(__float2half(f));
    Array<__half> a(x), b(y), d(8);
    Array<float> fa(hx), fb(hy), fd(8);
    Lt lt;
    float one = 1, zero = 0;
    auto la = layout(CUDA_R_16F, 2, 3, 3, 1, 0, true), lb = layout(CUDA_R_16F, 3, 4, 4, 1, 0, true), ld = layout(CUDA_R_16F, 2, 4, 4, 1, 0, true);
    OK(cublasLtMatmul(lt.h, lt.d, &one, a.p, la, b.p, lb, &zero, d.p, ld, d.p, ld, nullptr, nullptr, 0, 0));
    auto fla = layout(CUDA_R_32F, 2, 3, 2), flb = layout(CUDA_R_32F, 3, 4, 3), fld = layout(CUDA_R_32F, 2, 4, 2);
    OK(cublasLtMatmul(lt.h, lt.d, &one, fa.p, fla, fb.p, flb, &zero, fd.p, fld, fd.p, fld, nullptr, nullptr, 0, 0));
    std::vector<__half> got = d.get();
    std::vector<float> fgot = fd.get();
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
            float w = 0, f = 0;
            for (int k = 0; k < 3; k++) w += hx[(size_t)(i * 3 + k)] * hy[(size_t)(k * 4 + j)], f += hx[(size_t)(k * 2 + i)] * hy[(size_t)(j * 3 + k)];
            if (__half2float(got[(size_t)(i * 4 + j)]) != w || fgot[(size_t)(j * 2 + i)] != f) return wrong;
        }
    return right;
}

/* ---- NCCL ---- */

struct Ranks {
    ncclComm_t comm[2];
    cudaStream_t s[2];
    float *x[2], *y[2];
    Ranks() {
        OK(ncclCommInitAll(comm, 2, nullptr));
        for (int r = 0; r < 2; r++) {
            OK(cudaSetDevice(r));
            s[r] = stream();
            Array<float> a(plus(counting(256), (float)r)), b(512);
            x[r] = a.p;
            y[r] = b.p;
        }
    }
    std::vector<float> get(int r, size_t n) {
        std::vector<float> h(n);
        OK(cudaSetDevice(r));
        OK(cudaMemcpyAsync(h.data(), y[r], n * 4, cudaMemcpyDeviceToHost, s[r]));
        return h;
    }
};
int reduce(bool planted, int fault) {
    Ranks q;
    bool grouped = !(planted && fault == 1);
    if (grouped) OK(ncclGroupStart());
    for (int r = 0; r < 2; r++) OK(ncclAllReduce(q.x[r], q.y[r], planted && fault == 2 && r ? 128 : 256, planted && fault == 3 && r ? ncclFloat16 : ncclFloat, ncclSum, q.comm[r], q.s[r]));
    if (grouped) OK(ncclGroupEnd());
    std::vector<float> want = counting(256);
    for (float &f : want) f = 2 * f + 1;
    for (int r = 0; r < 2; r++)
        if (q.get(r, 256) != want) return wrong;
    OK(ncclGroupStart());
    for (int r = 0; r < 2; r++) OK(ncclAllGather(q.x[r], q.y[r], 256, ncclFloat, q.comm[r], q.s[r]));
    for (int r = 0; r < 2; r++) OK(ncclBroadcast(q.x[r], q.x[r], 256, ncclFloat, 1, q.comm[r], q.s[r]));
    for (int r = 0; r < 2; r++) OK(ncclAllReduce(q.x[r], q.x[r], 256, ncclFloat, ncclSum, q.comm[r], q.s[r]));
    OK(ncclGroupEnd());
    std::vector<float> both = counting(256), other = plus(counting(256), 1);
    both.insert(both.end(), other.begin(), other.end());
    for (int r = 0; r < 2; r++) {
        if (q.get(r, 512) != both) return wrong;
        OK(cudaMemcpyAsync(q.y[r], q.x[r], 1024, cudaMemcpyDeviceToDevice, q.s[r]));
        std::vector<float> got = q.get(r, 256);
        for (size_t i = 0; i < 256; i++)
            if (got[i] != 2 * (float)(i + 1)) return wrong;
        OK(ncclCommDestroy(q.comm[r]));
    }
    return right;
}
int missing_group(bool planted) { return reduce(planted, 1); }
int different_counts(bool planted) { return reduce(planted, 2); }
int different_types(bool planted) { return reduce(planted, 3); }
int rank_absent(bool planted) { /* a rank never calls */
    Ranks q;
    OK(ncclGroupStart());
    for (int r = 0; r < (planted ? 1 : 2); r++) OK(ncclAllReduce(q.x[r], q.y[r], 256, ncclFloat, ncclSum, q.comm[r], q.s[r]));
    OK(ncclGroupEnd());
    return q.get(0, 2) == std::vector<float>{1, 3} ? right : wrong;
}
int thread_per_rank(bool) {
    ncclUniqueId id;
    OK(ncclGetUniqueId(&id));
    int results[2];
    std::vector<std::thread> threads;
    for (int r = 0; r < 2; r++)
        threads.emplace_back([&, r] {
            OK(cudaSetDevice(r));
            ncclComm_t c;
            OK(ncclCommInitRank(&c, 2, id, r));
            Array<float> x(plus(counting(256), (float)r)), y(256);
            cudaStream_t s = stream();
            for (int i = 0; i < 20; i++) {
                run_add(y, x, 1, s);
                OK(ncclAllReduce(y.p, y.p, 256, ncclFloat, ncclSum, c, s));
            }
            OK(cudaStreamSynchronize(s));
            std::vector<float> want = counting(256);
            for (float &f : want) f = 2 * f + 3;
            results[r] = same(y.get(), want);
            OK(ncclCommDestroy(c));
        });
    for (auto &t : threads) t.join();
    return results[0] | results[1];
}
int replayed_collective(bool) { /* a graph of each rank, launched three times */
    Ranks q;
    cudaGraphExec_t exec[2];
    for (int r = 0; r < 2; r++) {
        cudaGraph_t g;
        OK(cudaSetDevice(r));
        OK(cudaStreamBeginCapture(q.s[r], cudaStreamCaptureModeThreadLocal));
        OK(ncclAllReduce(q.x[r], q.x[r], 256, ncclFloat, ncclSum, q.comm[r], q.s[r]));
        OK(cudaStreamEndCapture(q.s[r], &g));
        OK(cudaGraphInstantiate(&exec[r], g, 0));
    }
    for (int i = 0; i < 3; i++)
        for (int r = 0; r < 2; r++) OK(cudaGraphLaunch(exec[r], q.s[r]));
    for (int r = 0; r < 2; r++) {
        OK(cudaMemcpyAsync(q.y[r], q.x[r], 1024, cudaMemcpyDeviceToDevice, q.s[r]));
        std::vector<float> got = q.get(r, 256);
        for (size_t i = 0; i < 256; i++)
            if (got[i] != 4 * (2 * (float)i + 1)) return wrong;
    }
    return right;
}

/* ---- what needs no planted fault ---- */

int memory_limits(bool) {
    size_t left, all;
    void *p, *q;
    OK(cudaMemGetInfo(&left, &all));
    if (all != 64u << 20 || left != all) return wrong;
    OK(cudaMalloc(&p, 48 << 20));
    if (cudaMalloc(&q, 32 << 20) != cudaErrorMemoryAllocation || q || cudaGetLastError() != cudaErrorMemoryAllocation || cudaGetLastError() != cudaSuccess) return wrong;
    OK(cudaFree(p));
    for (int i = 0; i < 30; i++) { /* addresses are reused in the end */
        OK(cudaMalloc(&p, 40 << 20));
        OK(cudaFree(p));
    }
    Array<unsigned char> fresh(100);
    for (unsigned char c : fresh.get())
        if (c != 0xff) return wrong;
    return right;
}
int errors_and_properties(bool) {
    int n, v;
    cudaDeviceProp p;
    OK(cudaGetDeviceCount(&n));
    OK(cudaGetDeviceProperties(&p, 1));
    OK(cudaDeviceGetAttribute(&v, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    bool good = n == 2 && p.major == 9 && v == 227 << 10 && cudaSetDevice(2) == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice;
    good = good && cudaStreamSynchronize((cudaStream_t)0x1234) == cudaErrorInvalidResourceHandle;
    good = good && strcmp(cudaGetErrorName(cudaErrorNoDevice), "cudaErrorNoDevice") == 0;
    cudaFuncAttributes a;
    OK(cudaFuncGetAttributes(&a, fill_shared));
    OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&v, fill_shared, 256, 40 << 10));
    return good && a.maxThreadsPerBlock == 1024 && v == 5 ? right : wrong;
}
int without_device(bool) {
    for (const char *how : {"1", "driver"}) {
        setenv("QVL_EMU_NO_DEVICE", how, 1);
        cudaError_t want = strcmp(how, "1") == 0 ? cudaErrorNoDevice : cudaErrorInsufficientDriver;
        int n = 7, version = -1;
        void *p;
        cublasLtHandle_t lt;
        cudaStream_t s;
        if (cudaGetDeviceCount(&n) != want || n != 0 || cudaMalloc(&p, 16) != want || cudaStreamCreate(&s) != want || cudaSetDevice(0) != want) return wrong;
        if (cublasLtCreate(&lt) != CUBLAS_STATUS_NOT_INITIALIZED) return wrong;
        QVL_LAUNCH(add, dim3(1), dim3(1), 0, 0, (float *)nullptr, (const float *)nullptr, 0.0f, 0u);
        if (cudaGetLastError() != want) return wrong;
        OK(cudaDriverGetVersion(&version));
        if ((version == 0) != (want == cudaErrorInsufficientDriver)) return wrong;
    }
    return right;
}
int pageable_source(bool) { /* may be reused at once */
    Array<float> x(256);
    cudaStream_t s = stream();
    std::vector<float> h = counting(256);
    OK(cudaMemcpyAsync(x.p, h.data(), 1024, cudaMemcpyHostToDevice, s));
    h[7] = -1;
    OK(cudaStreamSynchronize(s));
    return same(x.get(), counting(256));
}
int legacy_stream_order(bool) { /* blocking streams and the legacy stream wait for each other */
    Array<float> x(counting(256)), y(256), z(256), w(256);
    cudaStream_t a, b;
    OK(cudaStreamCreate(&a));
    OK(cudaStreamCreate(&b));
    run_add(y, x, 1, a);
    run_add(z, y, 1, 0);
    run_add(w, z, 1, b);
    OK(cudaStreamSynchronize(b));
    return same(w.get(), plus(counting(256), 3));
}
int events_and_host_functions(bool) {
    Array<float> x(counting(256)), y(256);
    cudaStream_t s = stream();
    cudaEvent_t from, to;
    OK(cudaEventCreate(&from));
    OK(cudaEventCreate(&to));
    int called = 0;
    OK(cudaEventRecord(from, s));
    run_add(y, x, 1, s);
    OK(cudaLaunchHostFunc(s, [](void *p) { ++*static_cast<int *>(p); }, &called));
    OK(cudaEventRecord(to, s));
    while (cudaEventQuery(to) == cudaErrorNotReady) {}
    while (cudaStreamQuery(s) == cudaErrorNotReady) {}
    float ms = -1;
    OK(cudaEventElapsedTime(&ms, from, to));
    OK(cudaEventDestroy(from));
    OK(cudaStreamDestroy(s));
    return called == 1 && ms >= 0 ? same(y.get(), plus(counting(256), 1)) : wrong;
}
__attribute__((no_sanitize("undefined", "address"))) int faults_of_others(bool) { /* a handler that was there before still gets what is not the emulator's */
    struct sigaction mine = {};
    mine.sa_handler = [](int) { _exit(right); };
    sigaction(SIGSEGV, &mine, nullptr);
    Array<float> x(16);
    *static_cast<volatile int *>(nullptr) = 1;
    return wrong;
}
int rows_and_peers(bool) {
    std::vector<float> h = counting(60);
    Array<float> x(48);
    cudaStream_t s = stream();
    OK(cudaMemsetAsync(x.p, 0, 192, s));
    OK(cudaMemcpy2DAsync(x.p, 32, h.data(), 24, 20, 6, cudaMemcpyHostToDevice, s)); /* 6 rows of 5 of 6 numbers to rows of 8 */
    OK(cudaStreamSynchronize(s));
    OK(cudaSetDevice(1));
    Array<float> y(48);
    OK(cudaMemcpyPeerAsync(y.p, 1, x.p, 0, 192, s));
    OK(cudaStreamSynchronize(s));
    std::vector<float> got = y.get();
    for (int i = 0; i < 48; i++)
        if (got[(size_t)i] != (i % 8 < 5 ? (float)(i / 8 * 6 + i % 8) : 0.0f)) return wrong;
    return right;
}

} // namespace

#define ALL {"named", "named", "named"}
const std::vector<Case> host_cases = {
    {"missing stream wait between two kernels", missing_stream_wait, "race:", "lazy", {"wrong", "named", "wrong"}},
    {"missing stream wait, random order", missing_stream_wait, "race:", nullptr, {"order", "named", "order"}},
    {"copy beside the kernel that feeds it", copy_beside_kernel, "race:", nullptr, {"order", "named", "order"}},
    {"result read before the wait", read_before_sync, "-", "lazy", {"wrong", "wrong", "wrong"}},
    {"pinned source overwritten before its copy", pinned_source_changed, "was changed before the copy", "lazy", ALL},
    {"host dereferences device memory", host_dereference, "host code dereferences device memory", nullptr, ALL},
    {"copy longer than its destination", long_copy, "too long", nullptr, ALL},
    {"kernel uses freed memory", use_after_free, "out of bounds|AddressSanitizer", nullptr, {"wrong", "named", "named"}},
    {"copy from freed memory", copy_from_freed, "was freed", nullptr, ALL},
    {"copy in the wrong direction", copy_wrong_kind, "the destination is not allocated memory", nullptr, ALL},
    {"shared memory above 48 KiB not allowed", much_shared_memory, "-", nullptr, ALL},
    {"block of 1025 threads", big_block, "-", nullptr, ALL},
    {"launch on another device's stream", stream_of_other_device, "-", nullptr, ALL},
    {"capture: cudaMalloc", malloc_in_capture, "-", nullptr, ALL},
    {"capture: waiting for the stream", sync_in_capture, "-", nullptr, ALL},
    {"capture: legacy stream", legacy_in_capture, "-", nullptr, ALL},
    {"capture: event from outside", outside_event_in_capture, "-", nullptr, ALL},
    {"capture: branch not joined", unjoined_capture, "-", nullptr, ALL},
    {"graph: branches write one place", branches_race, "race:", nullptr, {"order", "named", "order"}},
    {"cuBLASLt: leading dimension too small", bad_leading_dimension, "-", nullptr, ALL},
    {"cuBLASLt: types that do not go together", bad_types, "-", nullptr, ALL},
    {"cuBLASLt: matrix longer than its memory", matrix_beyond_memory, "too long", nullptr, ALL},
    {"cuBLASLt: D overlaps A", matrix_overlap, "D overlaps A", nullptr, ALL},
    {"cuBLASLt: bias not aligned", bias_misaligned, "not a multiple of 16|too long", nullptr, ALL},
    {"cuBLASLt: workspace too small", small_workspace, "-", nullptr, ALL},
    {"NCCL: counts differ", different_counts, "does not match", nullptr, ALL},
    {"NCCL: types differ", different_types, "does not match", nullptr, ALL},
    {"NCCL: group missing", missing_group, "NCCL deadlock", nullptr, ALL},
    {"NCCL: a rank does not call", rank_absent, "NCCL deadlock", nullptr, ALL},
    {"cuBLASLt: row-major and types", row_major, nullptr, nullptr, {}},
    {"NCCL: a thread for each rank", thread_per_rank, nullptr, nullptr, {}},
    {"NCCL: in graphs", replayed_collective, nullptr, nullptr, {}},
    {"memory limits", memory_limits, nullptr, nullptr, {}},
    {"errors and properties", errors_and_properties, nullptr, nullptr, {}},
    {"no device", without_device, nullptr, nullptr, {}},
    {"pageable source", pageable_source, nullptr, "lazy", {}},
    {"legacy stream", legacy_stream_order, nullptr, "lazy", {}},
    {"events and host functions", events_and_host_functions, nullptr, nullptr, {}},
    {"faults that are not ours", faults_of_others, nullptr, nullptr, {}},
    {"rows and peers", rows_and_peers, nullptr, nullptr, {}},
};
