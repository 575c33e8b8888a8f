/* sums.cu - what the GPUs that share a model tell each other, by NCCL.
 *
 * Job:        sums of partial results, parts of rows brought together; giving up when a GPU has failed.
 * Input:      the same calls in the same order from every GPU's thread.
 * Output:     the same bits on every GPU.
 * Invariants: NCCL is opened when several GPUs are asked for, so that nobody else needs it;
 *             in modes that promise the same bits in every batch, more than two parts are added by our own kernel in the order
 *             of GPUs: NCCL's order depends on where in the buffer a number lies (of two there is but one sum);
 *             a GPU that has failed keeps calling, so that the others do not wait for it; when it cannot even do that, they see
 *             it as they wait, and abort their communicators.
 */
#include "cuda.h"

#include "kernels/sums.cuh"

#if __has_include(<nccl.h>)
#include <nccl.h>

#ifndef QVL_CUDA_EMU
#include <dlfcn.h>
#endif

#define NCCL_CALLS(X) X(CommInitAll) X(CommDestroy) X(CommAbort) X(CommGetAsyncError) X(AllReduce) X(AllGather) X(GetErrorString)

static struct {
#define X(name) decltype(&nccl##name) name;
    NCCL_CALLS(X)
#undef X
} nccl;

/* Two threads at once do no harm: both write the same. */
static int load(const qvl__host *host) {
#ifdef QVL_CUDA_EMU
    (void)host;
#define X(name) nccl.name = nccl##name;
    NCCL_CALLS(X)
#undef X
#else
    void *so = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!so) return host->fail(QVL_ENODEV, "tensor_parallel_size needs NCCL: %s; install the package libnccl2", dlerror());
#define X(name) \
    if (!(nccl.name = (decltype(&nccl##name))dlsym(so, "nccl" #name))) return host->fail(QVL_ENODEV, "libnccl.so.2 has no nccl" #name ": install a newer one");
    NCCL_CALLS(X)
#undef X
#endif
    return 0;
}

static void nccl_ok(cuda *c, ncclResult_t r, const char *what) {
    if (r == ncclSuccess || r == ncclInProgress) return;
    cuda_failed(c, QVL_ENODEV, what, nccl.GetErrorString(r));
    cuda_leave(c); /* nobody is to wait for this GPU */
}

int cuda_join(cuda **gpus, int count, const qvl__host *host) {
    ncclComm_t comms[MOST_GPUS];
    int which[MOST_GPUS] = {}, rc = load(host);
    if (rc) return rc;
    for (int i = 0; i < count; i++) which[i] = gpus[i]->gpu;
    ncclResult_t r = nccl.CommInitAll(comms, count, which);
    if (r != ncclSuccess) return host->fail(QVL_ENODEV, "NCCL among %d GPUs: %s", count, nccl.GetErrorString(r));
    for (int i = 0; i < count; i++) gpus[i]->comm = comms[i];
    return 0;
}

void cuda_leave(cuda *c) {
    if (c->comm) (c->failed || *c->broken ? nccl.CommAbort : nccl.CommDestroy)((ncclComm_t)c->comm);
    c->comm = NULL;
}

bool cuda_lost(cuda *c) {
    ncclResult_t r = ncclSuccess;
    if (c->comm && nccl.CommGetAsyncError((ncclComm_t)c->comm, &r) == ncclSuccess && r != ncclSuccess) nccl_ok(c, r, "NCCL");
    if (!*c->broken) return false;
    cuda_failed(c, QVL_ENODEV, "waiting for the GPU", "another GPU of the model has failed");
    cuda_leave(c);
    return true;
}

static void all_gather(cuda *c, const float *mine, size_t count) {
    nccl_ok(c, nccl.AllGather(mine, c->gather, count, ncclFloat32, (ncclComm_t)c->comm, c->stream), "ncclAllGather");
}

void cuda_sum(cuda *c, float *x, size_t count) {
    if (!c->comm) return;
    if (c->ranks == 2 || (c->device.bf16_math && !c->deterministic)) {
        nccl_ok(c, nccl.AllReduce(x, x, count, ncclFloat32, ncclSum, (ncclComm_t)c->comm, c->stream), "ncclAllReduce");
        return;
    }
    size_t most = GATHER_BYTES / sizeof(float) / (size_t)c->ranks;
    for (size_t at = 0; at < count; at += most) {
        size_t some = count - at < most ? count - at : most;
        all_gather(c, x + at, some);
        LAUNCH(c, sum_parts, dim3((unsigned)((some + 1023) / 1024)), dim3(256), 0, x + at, (const float *)c->gather, some, c->ranks);
    }
}

void cuda_sum_rounded(cuda *c, float *y, const float *part, bf16 *rounded, int rows, int n, bool add) {
    if (!c->comm) return;
    size_t count = (size_t)rows * (size_t)n;
    LAUNCH(c, round_rows, dim3(rows), dim3(256), 0, QVL__BF16, (void *)rounded, part, (size_t)n, n, n);
    nccl_ok(c, nccl.AllReduce(rounded, rounded, count, ncclBfloat16, ncclSum, (ncclComm_t)c->comm, c->stream), "ncclAllReduce");
    LAUNCH(c, take_sums, dim3((unsigned)((count + 1023) / 1024)), dim3(256), 0, y, (const bf16 *)rounded, count, add);
}

#else /* built without NCCL's header */

int cuda_join(cuda **, int, const qvl__host *host) { return host->fail(QVL_EUNSUPPORTED, "this libqvl-cuda.so was built without nccl.h: tensor_parallel_size must be 1; install libnccl-dev and run \"make cuda\""); }
void cuda_leave(cuda *) {}
bool cuda_lost(cuda *) { return true; }
static void all_gather(cuda *, const float *, size_t) {}
void cuda_sum(cuda *, float *, size_t) {}
void cuda_sum_rounded(cuda *, float *, const float *, bf16 *, int, int, bool) {}

#endif

int cuda_gather_rows(const cuda *c, int each) { return (int)(GATHER_BYTES / sizeof(float) / ((size_t)each * (size_t)c->ranks)); }

float *cuda_gather_part(const cuda *c, int rows, int each) { return c->gather + (size_t)c->rank * (size_t)rows * (size_t)each; }

void cuda_gather(cuda *c, float *y, int rows, int each, int n) {
    if (!c->comm) return;
    all_gather(c, cuda_gather_part(c, rows, each), (size_t)rows * (size_t)each);
    LAUNCH(c, join_columns, dim3(rows, div_up(n, 256 * 8)), dim3(256), 0, y, (const float *)c->gather, each, n);
}
