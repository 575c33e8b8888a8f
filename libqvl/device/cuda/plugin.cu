/* plugin.cu - the CUDA device: opening, memory, copies, recorded steps.
 *
 * Job:        a qvl__device over one GPU, as the shared object libqvl-cuda.so.
 * Input:      the driver, cuBLASLt, the host's functions.
 * Output:     the symbol qvl_device_plugin.
 * Invariants: nothing that can go wrong on the GPU ends the process: opening fails with a message, an op's failure is
 *             kept for sync; host memory is copied through pinned staging, so a caller may reuse it when put returns.
 */
#include "cuda.h"

#include <new>
#include <sched.h>
#include <stdio.h>
#include <string.h>

void cuda_failed(cuda *c, int code, const char *what, const char *why) {
    if (c->failed) return;
    c->failed = code;
    snprintf(c->failure, sizeof c->failure, "%s on GPU %d: %s", what, c->gpu, why);
    if (c->broken) *c->broken = true;
}

bool cuda_ok(cuda *c, cudaError_t e, const char *what) {
    if (e != cudaSuccess) cuda_failed(c, e == cudaErrorMemoryAllocation ? QVL_ENOMEM : QVL_ENODEV, what, cudaGetErrorString(e));
    return e == cudaSuccess;
}

bool cuda_wait(cuda *c, cudaEvent_t e) {
    if (c->ranks == 1) return cuda_ok(c, e ? cudaEventSynchronize(e) : cudaStreamSynchronize(c->stream), "waiting for the GPU");
    for (;;) { /* what the stream waits for may never come from a GPU that has failed */
        cudaError_t is = e ? cudaEventQuery(e) : cudaStreamQuery(c->stream);
        if (is != cudaErrorNotReady) return cuda_ok(c, is, "waiting for the GPU") && !c->failed;
        if (cuda_lost(c)) { /* its communicator is aborted: what is on the stream comes to an end */
            cudaStreamSynchronize(c->stream);
            return false;
        }
        sched_yield();
    }
}

/* ---- memory ---- */

void *cuda_alloc(qvl__device *d, size_t size) {
    entered c(d);
    void *p = NULL;
    cudaError_t e = cudaMalloc(&p, size ? size : 1);
    if (e == cudaSuccess) e = cudaMemsetAsync(p, 0, size ? size : 1, c->stream);
    if (e == cudaSuccess) return p;
    cudaGetLastError(); /* it is reported here and must not be found by the next launch */
    size_t free_bytes = 0, all = 0;
    cudaMemGetInfo(&free_bytes, &all);
    c->host->fail(QVL_ENOMEM, "%zu MiB on GPU %d: %s; %zu of %zu MiB are free", size >> 20, c->gpu, cudaGetErrorString(e), free_bytes >> 20, all >> 20);
    return NULL;
}

static void forget(cuda *c, graph *g) {
    if (g->exec) {
        cuda_wait(c, NULL); /* it may still be running */
        cudaGraphExecDestroy(g->exec);
    }
    *g = graph{};
}

void cuda_free(qvl__device *d, void *p, size_t size) {
    (void)size;
    entered c(d);
    if (!p) return;
    for (graph &g : c->graphs) forget(c, &g); /* one of them may use it, and the next buffer may lie at the same address */
    cuda_ok(c, cudaFree(p), "cudaFree");
}

/* Room in the staging memory for up to `want` bytes; says how many there are. Waits until earlier copies from there are done. */
static char *stage(cuda *c, size_t want, size_t *got) {
    size_t size = want < STAGE_BYTES ? (want + 63) / 64 * 64 : STAGE_BYTES;
    if (c->stage_at + size > STAGE_BYTES) {
        c->stage = (c->stage + 1) % STAGES;
        c->stage_at = 0;
        cuda_wait(c, c->staged[c->stage]);
    }
    char *p = c->pinned + (size_t)c->stage * STAGE_BYTES + c->stage_at;
    c->stage_at += size;
    *got = want < size ? want : size;
    return p;
}

void cuda_put(qvl__device *d, void *dst, const void *host, size_t size) {
    entered c(d);
    for (size_t at = 0, n; at < size && !c->failed; at += n) {
        char *p = stage(c, size - at, &n);
        memcpy(p, (const char *)host + at, n);
        cuda_ok(c, cudaMemcpyAsync((char *)dst + at, p, n, cudaMemcpyHostToDevice, c->stream), "copy to the GPU");
        cuda_ok(c, cudaEventRecord(c->staged[c->stage], c->stream), "copy to the GPU");
    }
}

/* After a failure host is left as it is: sync tells. */
static void get(qvl__device *d, void *host, const void *src, size_t size) {
    entered c(d);
    for (size_t at = 0, n; at < size && !c->failed; at += n) {
        char *p = stage(c, size - at, &n);
        cuda_ok(c, cudaMemcpyAsync(p, (const char *)src + at, n, cudaMemcpyDeviceToHost, c->stream), "copy from the GPU");
        if (cuda_wait(c, NULL)) memcpy((char *)host + at, p, n);
    }
}

static int sync_all(qvl__device *d) {
    entered c(d);
    cuda_wait(c, NULL);
    return c->failed ? c->host->fail(c->failed, "%s", c->failure) : 0;
}

/* A stream that has failed does nothing more: get and sync tell. */
static bool idle(qvl__device *d) {
    entered c(d);
    return cudaStreamQuery(c->stream) != cudaErrorNotReady;
}

static uint64_t room(qvl__device *d) {
    entered c(d);
    size_t free_bytes = 0, all = 0;
    if (!cuda_ok(c, cudaMemGetInfo(&free_bytes, &all), "cudaMemGetInfo")) return 1;
    double keep = (1 - c->memory) * (double)all, left = (double)free_bytes - keep;
    return left > 1 ? (uint64_t)left : 1;
}

/* ---- recorded steps ---- */

/* A step is recorded when it comes for the second time: by then all its kernels are loaded, which could not be done while
 * recording, and a step that comes once costs nothing. */
static bool replay(qvl__device *d, const uint64_t key[4]) {
    cuda *c = of(d);
    c->lock->lock(); /* held until recorded: no other thread's work may get into the graph */
    cudaSetDevice(c->gpu);
    graph *g = NULL, *oldest = &c->graphs[0];
    for (graph &i : c->graphs) {
        if (i.used && memcmp(i.key, key, sizeof i.key) == 0) g = &i;
        if (i.used < oldest->used) oldest = &i;
    }
    if (!g) {
        forget(c, oldest);
        memcpy(oldest->key, key, sizeof oldest->key);
    } else if (g->exec) cuda_ok(c, cudaGraphLaunch(g->exec, c->stream), "a recorded step");
    else if (cuda_ok(c, cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal), "recording a step")) c->recording = g;
    (g ? g : oldest)->used = ++c->clock;
    if (!g || !g->exec) return false;
    c->lock->unlock();
    return true;
}

static void recorded(qvl__device *d) {
    cuda *c = of(d);
    if (c->recording) {
        cudaGraph_t made = NULL;
        cudaGraphExec_t *exec = &c->recording->exec;
        if (cuda_ok(c, cudaStreamEndCapture(c->stream, &made), "recording a step") && cuda_ok(c, cudaGraphInstantiate(exec, made, 0), "recording a step"))
            cuda_ok(c, cudaGraphLaunch(*exec, c->stream), "a recorded step");
        if (made) cudaGraphDestroy(made);
        c->recording = NULL;
    }
    c->lock->unlock();
}

/* ---- open and close ---- */

void cuda_close(cuda *c) {
    if (!c) return;
    cudaSetDevice(c->gpu);
    if (c->stream) cuda_wait(c, NULL);
    cuda_leave(c);
    for (graph &g : c->graphs) forget(c, &g);
    c->cpu->matrix_free(c->cpu, &c->fill.host);
    if (c->lt) cublasLtDestroy(c->lt);
    for (cudaEvent_t e : c->staged)
        if (e) cudaEventDestroy(e);
    if (c->arena) cudaFree(c->arena);
    if (c->lt_work) cudaFree(c->lt_work);
    if (c->gather) cudaFree(c->gather);
    if (c->pinned) cudaFreeHost(c->pinned);
    if (c->stream) cudaStreamDestroy(c->stream);
    delete c->lock;
    c->host->free(c);
}

/* The CPU became ours when opening succeeded. */
static void close_one(qvl__device *d) {
    if (!d) return;
    qvl__device *cpu = of(d)->cpu;
    cuda_close(of(d));
    cpu->close(cpu);
}

/* The CPU is the first one's. */
static void close_beside(qvl__device *d) {
    if (d) cuda_close(of(d));
}

/* What the GPU must be; a message when it is not. */
static int look(cuda *c) {
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e == cudaErrorInsufficientDriver) {
        int driver = 0, runtime = 0;
        cudaDriverGetVersion(&driver);
        cudaRuntimeGetVersion(&runtime);
        if (driver == 0) return c->host->fail(QVL_ENODEV, "no NVIDIA driver is installed");
        return c->host->fail(QVL_ENODEV, "the NVIDIA driver knows CUDA %d.%d, libqvl-cuda needs %d.%d: install a newer driver", driver / 1000, driver % 100 / 10,
                             runtime / 1000, runtime % 100 / 10);
    }
    if (e == cudaErrorNoDevice || (e == cudaSuccess && count == 0)) return c->host->fail(QVL_ENODEV, "no NVIDIA GPU is visible (see nvidia-smi and CUDA_VISIBLE_DEVICES)");
    if (e != cudaSuccess) return c->host->fail(QVL_ENODEV, "CUDA cannot be used: %s", cudaGetErrorString(e));
    if (count < c->ranks) return c->host->fail(QVL_ENODEV, "tensor_parallel_size is %d, but %d NVIDIA GPU%s visible (see nvidia-smi and CUDA_VISIBLE_DEVICES)", c->ranks, count, count == 1 ? " is" : "s are");
    cudaDeviceProp p;
    e = cudaGetDeviceProperties(&p, c->gpu);
    if (e != cudaSuccess) return c->host->fail(QVL_ENODEV, "GPU %d: %s", c->gpu, cudaGetErrorString(e));
    if (p.major < 8) return c->host->fail(QVL_ENODEV, "GPU %d (%s) has compute capability %d.%d; 8.0 (Ampere) is the least", c->gpu, p.name, p.major, p.minor);
    c->processors = p.multiProcessorCount;
    if (c->ranks == 1) snprintf(c->isa, sizeof c->isa, "sm_%d%d", p.major, p.minor);
    else snprintf(c->isa, sizeof c->isa, "sm_%d%d x %d", p.major, p.minor, c->ranks);
    return 0;
}

static int take(cuda *c) {
    cudaError_t e = cudaSetDevice(c->gpu);
    int low = 0, high = 0;
    if (e == cudaSuccess) e = cudaDeviceGetStreamPriorityRange(&low, &high);
    if (e == cudaSuccess) e = cudaStreamCreateWithPriority(&c->stream, cudaStreamNonBlocking, c->first ? high : low);
    if (e == cudaSuccess) e = cudaMalloc((void **)&c->arena, ARENA_BYTES);
    if (e == cudaSuccess) e = cudaMalloc((void **)&c->lt_work, LT_BYTES);
    if (e == cudaSuccess && c->ranks > 1) e = cudaMalloc((void **)&c->gather, GATHER_BYTES);
    if (e == cudaSuccess) e = cudaHostAlloc((void **)&c->pinned, STAGES * STAGE_BYTES, cudaHostAllocDefault);
    for (int i = 0; e == cudaSuccess && i < STAGES; i++) e = cudaEventCreateWithFlags(&c->staged[i], cudaEventDisableTiming);
    if (e != cudaSuccess)
        return c->host->fail(e == cudaErrorMemoryAllocation ? QVL_ENOMEM : QVL_ENODEV, "GPU %d: %s while its workspace was set up", c->gpu, cudaGetErrorString(e));
    cublasStatus_t s = cublasLtCreate(&c->lt);
    return s == CUBLAS_STATUS_SUCCESS ? 0 : c->host->fail(QVL_ENODEV, "cuBLASLt: %s", cublasLtGetStatusString(s));
}

/* The same GPU once more: a stream, an arena and staging of its own. */
static int beside(qvl__device *d, qvl__device **out) {
    cuda *c = of(d), *other;
    qvl__device_options o = {d->bf16_math, c->deterministic, c->memory, 1};
    int rc = cuda_open(&other, c->cpu, &o, c->host, c->rank, false);
    if (rc) return rc;
    other->device.close = close_beside;
    other->device.beside = NULL;
    *out = &other->device;
    return 0;
}

int cuda_open(cuda **out, qvl__device *cpu, const qvl__device_options *o, const qvl__host *host, int rank, bool first) {
    *out = NULL;
    cuda *c = (cuda *)host->calloc(1, sizeof *c);
    if (!c) return QVL_ENOMEM;
    c->host = host;
    c->cpu = cpu;
    c->memory = o->memory;
    c->gpu = c->rank = rank;
    c->first = first;
    c->ranks = o->gpus > 1 ? o->gpus : 1;
    c->deterministic = o->deterministic;
    c->lock = new (std::nothrow) std::recursive_mutex;
    int rc = c->lock ? look(c) : host->fail(QVL_ENOMEM, "no memory for a lock");
    if (rc == 0) rc = take(c);
    if (rc) {
        cuda_close(c);
        return rc;
    }
    qvl__device *d = &c->device;
    d->name = "cuda";
    d->isa = c->isa;
    d->pool = cpu->pool;
    d->bf16_math = o->bf16_math;
    d->kv_type = QVL__BF16;
    d->fp8 = true;
    d->slice_flops = 1e15; /* whole phases: a launch costs more than a look at the clock */
    d->close = close_one;
    d->sync = sync_all;
    d->beside = beside;
    d->idle = idle;
    d->room = room;
    d->replay = replay;
    d->recorded = recorded;
    d->alloc = cuda_alloc;
    d->free = cuda_free;
    d->put = cuda_put;
    d->get = get;
    cuda_weights(d);
    cuda_rows(d);
    cuda_products(d);
    cuda_attention(d);
    cuda_moe(d);
    cuda_draw(d);
    *out = c;
    return 0;
}

static int open_device(qvl__device **out, qvl__device *cpu, const qvl__device_options *o, const qvl__host *host) {
    if (o->gpus > 1) return parallel_open(out, cpu, o, host);
    cuda *c;
    int rc = cuda_open(&c, cpu, o, host, 0, true);
    *out = rc ? NULL : &c->device;
    return rc;
}

extern "C" __attribute__((visibility("default"))) const qvl__plugin qvl_device_plugin = {QVL__PLUGIN_VERSION, sizeof(qvl__device), open_device};
