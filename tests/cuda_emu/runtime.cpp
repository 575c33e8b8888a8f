/* runtime.cpp - the CUDA runtime API: devices, memory, streams, events, graphs.
 *
 * Job:        the toolkit's own prototypes over work that is queued and run later.
 * Input:      QVL_EMU_ASYNC = lazy (as late as allowed), eager (at once) or random (the default); QVL_EMU_SEED;
 *             QVL_EMU_DEVICES (1); QVL_EMU_MEMORY (MiB of a device, 1024); QVL_EMU_NO_DEVICE = 1 or driver.
 * Output:     what the calls promise, no earlier than they promise it.
 * Invariants: device memory cannot be touched while host code runs (it faults), and is NaN when it is fresh; a copy from
 *             pinned memory reads it when it runs, so a source that is changed too early is seen; work on different
 *             streams is ordered by events alone.
 *
 * Modelled: the calls that libqvl makes, with the errors it can meet. Not modelled: unified memory, peer access, stream priorities,
 * capture over several streams, timing (events measure nothing).
 */
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sys/mman.h>

#include "emu.h"

using namespace emu;

/* ---- state ---- */

struct task {
    const char *name;
    std::function<void()> work;
    cudaEvent_t wait = NULL; /* an event that must have happened, as often as at the time of the call */
    uint64_t times = 0;
};

struct CUstream_st {
    std::deque<task> tasks;
    int device;
    CUgraph_st *capture = NULL;
    bool broken = false; /* a call that capture does not allow */
};
struct CUevent_st {
    uint64_t recorded = 0, happened = 0;
    cudaStream_t on = NULL; /* of the last record */
};
struct CUgraph_st {
    std::vector<task> tasks;
};
struct CUgraphExec_st {
    std::vector<task> tasks;
    int device;
};

struct allocation {
    size_t size, room; /* asked for; there */
    int device;
    bool freed;
};

static std::recursive_mutex lock;
static thread_local int device_now;
static thread_local cudaError_t last_error;
static std::set<cudaStream_t> streams;
static std::map<char *, allocation> memory; /* by address */
static std::map<const char *, size_t> pinned;
static std::map<const void *, int> shared_limit;
static char *arena; /* all devices behind one another */
static size_t device_bytes, used[16], next_at[16];
static int devices = -1;
static cudaError_t no_device;
static int depth; /* of running work */

#define HUGE_PAGE ((size_t)2 << 20)
/* Addresses of a device: many times its memory, so that these never run out where memory does not. */
static size_t space() { return device_bytes * 64; }

#define LOCKED std::lock_guard<std::recursive_mutex> hold(lock)

static cudaError_t fail(cudaError_t e) {
    if (e != cudaSuccess) last_error = e;
    return e;
}

static cudaError_t begin() {
    if (devices < 0) {
        const char *none = getenv("QVL_EMU_NO_DEVICE"), *n = getenv("QVL_EMU_DEVICES"), *mb = getenv("QVL_EMU_MEMORY");
        no_device = !none ? cudaSuccess : strcmp(none, "driver") == 0 ? cudaErrorInsufficientDriver : cudaErrorNoDevice;
        devices = n ? atoi(n) : 1;
        device_bytes = (size_t)(mb ? atoi(mb) : 1024) << 20;
        void *p = mmap(NULL, space() * (size_t)devices + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) fault("no address space for %d devices of %zu MiB", devices, device_bytes >> 20);
        arena = (char *)(((uintptr_t)p + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
        madvise(arena, space() * (size_t)devices, MADV_HUGEPAGE); /* protection changes often, and by the page */
    }
    return no_device;
}
#define BEGIN                                     \
    LOCKED;                                       \
    if (begin() != cudaSuccess) return fail(no_device)

static bool on_device(const void *p) { return devices > 0 && (const char *)p >= arena && (const char *)p < arena + space() * (size_t)devices; }

static void protect(int how) {
    for (int d = 0; d < devices; d++)
        if (next_at[d]) mprotect(arena + (size_t)d * space(), (next_at[d] + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, how);
}
static void open_arena() {
    if (depth++ == 0) protect(PROT_READ | PROT_WRITE);
}
static void close_arena() {
    if (--depth == 0) protect(PROT_NONE);
}

void emu::check_device(const void *p, size_t n, const char *what) {
    auto i = memory.upper_bound((char *)(uintptr_t)p);
    if (i == memory.begin()) fault("%s: %p is no device memory", what, p);
    --i;
    size_t at = (size_t)((const char *)p - i->first);
    if (i->second.freed && at < i->second.size) fault("%s: %p was freed", what, p);
    if (at >= i->second.size || n > i->second.size - at) fault("%s: %zu bytes at %p run past the end of an allocation of %zu bytes, %zu bytes in", what, n, p, i->second.size, at);
}

/* ---- running ---- */

static void run_front(cudaStream_t s);

static void drain(cudaStream_t s) {
    if (s->tasks.empty()) return;
    open_arena();
    while (!s->tasks.empty()) run_front(s);
    close_arena();
}

/* Runs the stream of an event until it has happened so often. */
static void reach(cudaEvent_t e, uint64_t times) {
    while (e->happened < times) {
        if (!e->on || e->on->tasks.empty()) fault("a stream waits for an event that nothing is going to record");
        run_front(e->on);
    }
}

static void run_front(cudaStream_t s) {
    task t = s->tasks.front();
    s->tasks.pop_front();
    if (t.wait) {
        reach(t.wait, t.times);
        return;
    }
    open_arena();
    t.work();
    close_arena();
}

static const char *async_mode() {
    static const char *m = getenv("QVL_EMU_ASYNC");
    return m ? m : "random";
}

static void perhaps_run() {
    const char *m = async_mode();
    if (strcmp(m, "lazy") == 0) return;
    if (strcmp(m, "eager") == 0) {
        for (cudaStream_t s : streams) drain(s);
        return;
    }
    if (random_below(64)) return; /* seldom, as each time costs a change of the memory's protection */
    for (cudaStream_t s : streams)
        for (uint32_t n = random_below((uint32_t)s->tasks.size() + 1); n && !s->tasks.empty(); n--) run_front(s);
}

static void drain_all() {
    for (cudaStream_t s : streams) drain(s);
}

static void put_task(cudaStream_t s, task t) {
    LOCKED;
    if (!s) { /* the legacy stream waits for all and all wait for it */
        for (cudaStream_t o : streams)
            if (o->capture) fault("%s: on the legacy stream while another stream is being captured", t.name);
        drain_all();
        open_arena();
        t.work();
        close_arena();
        return;
    }
    if (!streams.count(s)) fault("%s: on a stream that does not exist", t.name);
    if (s->capture) {
        s->capture->tasks.push_back(t);
        return;
    }
    s->tasks.push_back(t);
    perhaps_run();
}

void emu::enqueue(cudaStream_t s, const char *name, std::function<void()> work) { put_task(s, task{name, work}); }

void emu::launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t smem, cudaStream_t s, std::function<void()> body) {
    LOCKED;
    size_t threads = (size_t)block.x * block.y * block.z, most = shared_limit.count(kernel) ? (size_t)shared_limit[kernel] : (size_t)48 << 10;
    if (!threads || threads > 1024 || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    if (smem > most) {
        last_error = cudaErrorInvalidValue;
        return;
    }
    put_task(s, task{name, [=] { run_grid(name, grid, block, smem, body); }});
}

/* True, and the capture is spoilt, when this call is not allowed now. */
static bool forbidden(cudaStream_t only = NULL) {
    bool bad = false;
    for (cudaStream_t s : streams)
        if (s->capture && (!only || s == only)) s->broken = bad = true;
    return bad;
}

/* ---- devices ---- */

#undef cudaGetDeviceProperties
extern "C" {

cudaError_t cudaGetDeviceCount(int *n) {
    LOCKED;
    *n = 0;
    if (begin() != cudaSuccess) return fail(no_device);
    *n = devices;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int d) {
    BEGIN;
    if (d < 0 || d >= devices) return fail(cudaErrorInvalidDevice);
    device_now = d;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *d) {
    BEGIN;
    *d = device_now;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int d) {
    BEGIN;
    if (d < 0 || d >= devices) return fail(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "CPU emulation");
    p->major = 8, p->minor = 0, p->multiProcessorCount = 4, p->warpSize = 32, p->maxThreadsPerBlock = 1024;
    p->totalGlobalMem = device_bytes, p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 163 << 10;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *v) {
    LOCKED;
    begin();
    *v = no_device == cudaErrorInsufficientDriver ? 12040 : CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *v) {
    *v = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaGetLastError(void) {
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t e) {
    switch (e) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    default: return "cudaErrorUnknown";
    }
}
const char *cudaGetErrorString(cudaError_t e) { return cudaGetErrorName(e); }
cudaError_t cudaFuncSetAttribute(const void *f, cudaFuncAttribute a, int v) {
    BEGIN;
    if (a != cudaFuncAttributeMaxDynamicSharedMemorySize || v < 0 || v > 163 << 10) return fail(cudaErrorInvalidValue);
    shared_limit[f] = v;
    return cudaSuccess;
}

/* ---- memory ---- */

cudaError_t cudaMalloc(void **p, size_t n) {
    BEGIN;
    if (forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
    *p = NULL;
    size_t size = (n + 511) / 256 * 256; /* some bytes behind, so that neighbours do not touch */
    if (n > device_bytes || used[device_now] + size > device_bytes) return fail(cudaErrorMemoryAllocation);
    char *at = NULL;
    for (auto &m : memory) /* what was freed is used again when it fits well */
        if (m.second.freed && m.second.device == device_now && m.second.room >= size && m.second.room / 2 <= size) {
            at = m.first;
            break;
        }
    if (!at) {
        if (next_at[device_now] + size > space()) fault("the address space of a device is used up");
        at = arena + (size_t)device_now * space() + next_at[device_now];
        memory[at].room = (size + 4095) / 4096 * 4096;
        next_at[device_now] += memory[at].room;
    }
    memory[at] = {n, memory[at].room, device_now, false};
    used[device_now] += size;
    open_arena();
    memset(at, 0xff, size);
    close_arena();
    *p = at;
    return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
    BEGIN;
    if (!p) return cudaSuccess;
    if (forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
    auto i = memory.find((char *)p);
    if (i == memory.end() || i->second.freed) fault("cudaFree: %p was not allocated, or was freed before", p);
    drain_all();
    i->second.freed = true;
    used[i->second.device] -= (i->second.size + 511) / 256 * 256;
    open_arena();
    if (i->second.room > HUGE_PAGE) madvise(p, i->second.room, MADV_DONTNEED);
    else memset(p, 0xff, i->second.room);
    close_arena();
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned) {
    BEGIN;
    *p = malloc(n ? n : 1);
    if (!*p) return fail(cudaErrorMemoryAllocation);
    memset(*p, 0xff, n);
    pinned[(const char *)*p] = n;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) {
    BEGIN;
    drain_all();
    if (p && !pinned.erase((const char *)p)) fault("cudaFreeHost: %p is no pinned memory", p);
    free(p);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) {
    BEGIN;
    *all = device_bytes;
    *left = device_bytes - used[device_now];
    return cudaSuccess;
}

static bool is_pinned(const void *p, size_t n) {
    auto i = pinned.upper_bound((const char *)p);
    if (i == pinned.begin()) return false;
    --i;
    size_t at = (size_t)((const char *)p - i->first);
    if (at >= i->second) return false;
    if (n > i->second - at) fault("cudaMemcpyAsync: %zu bytes run past the end of pinned memory", n);
    return true;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t s) {
    BEGIN;
    if (n == 0) return cudaSuccess;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice, from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (to_device != on_device(to) || from_device != on_device(from)) fault("cudaMemcpyAsync: kind %d does not fit %p <- %p", (int)kind, to, from);
    if (to_device) check_device(to, n, "cudaMemcpyAsync, target");
    if (from_device) check_device(from, n, "cudaMemcpyAsync, source");
    if (kind == cudaMemcpyHostToDevice && !is_pinned(from, n)) { /* staged by the driver: the source may change now */
        auto copy = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + n);
        enqueue(s, "cudaMemcpyAsync", [=] { memcpy(to, copy->data(), n); });
        return cudaSuccess;
    }
    enqueue(s, "cudaMemcpyAsync", [=] { memmove(to, from, n); });
    if (kind == cudaMemcpyDeviceToHost && !is_pinned(to, n)) {
        if (s && s->capture) return fail(cudaErrorStreamCaptureUnsupported);
        if (s) drain(s);
    }
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) { return cudaMemcpyAsync(to, from, n, kind, NULL); }
cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t s) {
    BEGIN;
    check_device(p, n, "cudaMemsetAsync");
    enqueue(s, "cudaMemsetAsync", [=] { memset(p, v, n); });
    return cudaSuccess;
}

/* ---- streams and events ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) {
    BEGIN;
    *s = new CUstream_st;
    (*s)->device = device_now;
    streams.insert(*s);
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    BEGIN;
    drain(s);
    streams.erase(s);
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    BEGIN;
    if (!s) {
        drain_all();
        return cudaSuccess;
    }
    if (forbidden(s)) return fail(cudaErrorStreamCaptureUnsupported);
    drain(s);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
    BEGIN;
    if (forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
    drain_all();
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    BEGIN;
    if (s->capture) return fail(cudaErrorStreamCaptureUnsupported); /* not modelled: capture over several streams */
    s->tasks.push_back(task{"cudaStreamWaitEvent", {}, e, e->recorded});
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    BEGIN;
    *e = new CUevent_st;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    BEGIN;
    drain_all();
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    BEGIN;
    if (s && s->capture) return fail(cudaErrorStreamCaptureUnsupported);
    if (e->on && e->on != s) reach(e, e->recorded);
    e->on = s;
    e->recorded++;
    enqueue(s, "cudaEventRecord", [=] { e->happened++; });
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    BEGIN;
    reach(e, e->recorded);
    return cudaSuccess;
}

/* ---- graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    BEGIN;
    if (!s || s->capture) return fail(cudaErrorStreamCaptureUnsupported);
    s->capture = new CUgraph_st;
    s->broken = false;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
    BEGIN;
    *g = NULL;
    if (!s->capture) return fail(cudaErrorInvalidValue);
    cudaGraph_t made = s->capture;
    s->capture = NULL;
    if (s->broken) {
        delete made;
        return fail(cudaErrorStreamCaptureInvalidated);
    }
    *g = made;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long) {
    BEGIN;
    *x = new CUgraphExec_st{g->tasks, device_now};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) {
    BEGIN;
    for (const task &t : x->tasks) put_task(s, t);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) {
    delete x;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) {
    delete g;
    return cudaSuccess;
}

} // extern "C"
