/* emu_rt.cpp - streams, events, recorded graphs, launches.
 *
 * Job:        the CUDA runtime's functions on streams, events, capture and graphs; when queued work runs.
 * Input:      QVL_EMU_ASYNC: lazy (nothing runs before somebody waits for it), eager (at once), random (the default).
 * Output:     operations run in an order that streams and events allow; CUDA's errors for what CUDA refuses.
 * Invariants: one mutex, one operation at a time; an operation runs when all before it in its stream and all marks that it
 *             depends on have happened; a recorded graph is queued node by node, so its branches run in any order too;
 *             waiting with nothing left to run is a deadlock and named.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <set>

#include "emu.h"

namespace qvl_emu {

struct Op {
    Work work;
    std::vector<Mark> after;
    Mark mark;
    std::function<bool()> may;
    bool running = false;
};

struct Capture;
struct Stream {
    int device = 0;
    bool blocking = true, legacy = false;
    std::deque<Op> queue;
    Mark last;
    uint32_t lane = 0;
    std::shared_ptr<Capture> capture;
    std::vector<int> tail; /* capture: the nodes that the next one depends on */
    int branch = 0;        /* capture: which of its streams this is */
};

struct Node {
    Work work;
    std::vector<int> after;
    int branch;
};
struct Capture {
    std::vector<Node> nodes;
    std::vector<Stream *> streams; /* the first began it */
    cudaStreamCaptureMode mode;
    pthread_t thread;
    bool valid = true;
};
struct Graph {
    std::vector<Node> nodes;
    int branches;
};
struct Exec {
    Graph graph;
    std::vector<Stream *> streams; /* one for each captured stream */
    Mark last;
};
struct Event {
    int device;
    bool timing;
    Mark mark;
    std::weak_ptr<Capture> capture;
    bool captured = false;
    std::vector<int> nodes;
};

namespace {

enum class Async { lazy, eager, random };
std::mutex mutex;
std::condition_variable changed;
thread_local int depth, device_now;
thread_local cudaError_t last_error;
thread_local bool in_host_function;
std::vector<Stream *> streams; /* all with a queue, graphs' streams and destroyed ones too */
std::set<Stream *> stream_handles;
std::set<Event *> events;
std::set<Graph *> graphs;
std::set<Exec *> execs;
std::vector<std::shared_ptr<Capture>> captures;
std::vector<uint32_t> lanes; /* how many operations each lane had */
std::vector<uint32_t> free_lanes;
std::vector<uint32_t> host_seen; /* for each lane: the newest operation that the host waited for */
int host_writes;

Async async_mode() {
    static const Async mode = [] {
        const char *v = getenv("QVL_EMU_ASYNC");
        return v && strcmp(v, "lazy") == 0 ? Async::lazy : v && strcmp(v, "eager") == 0 ? Async::eager : Async::random;
    }();
    return mode;
}

double now_ms() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

#ifdef QVL_EMU_CHECK
void join(std::vector<uint32_t> &into, const std::vector<uint32_t> &other) {
    if (into.size() < other.size()) into.resize(other.size());
    for (size_t i = 0; i < other.size(); i++) into[i] = std::max(into[i], other[i]);
}
void join(std::vector<uint32_t> &into, const Done &op) {
    join(into, op.before);
    if (into.size() <= op.lane) into.resize(op.lane + 1);
    into[op.lane] = std::max(into[op.lane], op.number);
}
#else
template <class T> void join(std::vector<uint32_t> &, const T &) {}
#endif

Stream *new_stream(int device, bool blocking) {
    auto *s = new Stream;
    s->device = device;
    s->blocking = blocking;
    if (free_lanes.empty()) {
        s->lane = (uint32_t)lanes.size();
        lanes.push_back(0);
    } else {
        s->lane = free_lanes.back();
        free_lanes.pop_back();
    }
    streams.push_back(s);
    return s;
}

Stream *legacy(int device) {
    static std::vector<Stream *> all((size_t)device_count(), nullptr);
    Stream *&s = all[(size_t)device];
    if (!s) {
        s = new_stream(device, true);
        s->legacy = true;
    }
    return s;
}

bool happened(const Mark &m) { return !m || m->happened; }
bool can_run(const Stream *s) {
    if (s->queue.empty()) return false;
    const Op &op = s->queue.front();
    return !op.running && std::all_of(op.after.begin(), op.after.end(), happened) && (!op.may || op.may());
}

void run_head(Stream *s) {
    Op &op = s->queue.front();
    op.running = true;
    if (op.work.host) { /* it may take locks and take its time */
        close_memory();
        in_host_function = true;
        int outer = depth;
        depth = 0;
        mutex.unlock();
        op.work.run();
        mutex.lock();
        depth = outer;
        in_host_function = false;
    } else if (op.work.run) {
        open_memory(op.work.device);
        check_operation(op.mark.get(), op.work.name.c_str());
        op.work.run();
        check_operation(nullptr, "");
    }
    if (op.work.writes_host) host_writes--;
    op.mark->happened = true;
    op.mark->when_ms = now_ms();
    s->queue.pop_front();
    changed.notify_all();
}

Stream *holder(const Mark &m) {
    for (Stream *s : streams)
        for (const Op &op : s->queue)
            if (op.mark == m) return s;
    return nullptr;
}

Stream *random_runnable() {
    std::vector<Stream *> can;
    for (Stream *s : streams)
        if (can_run(s)) can.push_back(s);
    return can.empty() ? nullptr : can[random_below((unsigned)can.size())];
}

/* One operation towards m: lazy mode runs nothing that m does not need. */
bool run_towards(const Mark &m, int steps = 0) {
    Stream *s = async_mode() == Async::lazy && steps < 1000 ? holder(m) : random_runnable();
    if (!s) return false;
    if (async_mode() == Async::lazy && !can_run(s)) {
        for (const Mark &after : s->queue.front().after)
            if (!happened(after)) return run_towards(after, steps + 1);
        s = random_runnable(); /* a collective: whatever brings the other ranks to it */
        if (!s) return false;
    }
    run_head(s);
    return true;
}

void after_enqueue() {
    if (in_host_function) return;
    if (async_mode() == Async::eager)
        while (Stream *s = random_runnable()) run_head(s);
    if (async_mode() == Async::random && random_below(3) == 0)
        for (unsigned n = 1 + random_below(4); n; n--)
            if (Stream *s = random_runnable()) run_head(s);
}

void push(Stream *s, Work work, std::vector<Mark> after) {
    Op op;
    op.mark = std::make_shared<Done>();
    op.after = std::move(after);
    op.mark->lane = s->lane;
    op.mark->number = ++lanes[s->lane];
    join(op.mark->before, host_seen);
    if (s->last) join(op.mark->before, *s->last);
    for (const Mark &m : op.after)
        if (m) join(op.mark->before, *m);
    if (work.enter) work.enter(s, op.mark, &op.may, &work.run);
    if (work.writes_host) host_writes++;
    op.work = std::move(work);
    s->last = op.mark;
    s->queue.push_back(std::move(op));
    changed.notify_all();
}

void invalidate(Capture &c) { c.valid = false; }

void end_capture(const std::shared_ptr<Capture> &c) {
    for (Stream *s : c->streams) {
        s->capture = nullptr;
        s->tail.clear();
    }
    captures.erase(std::find(captures.begin(), captures.end(), c));
}

/* The implicit order between the legacy stream and blocking streams of a device. */
cudaError_t add_legacy_order(Stream *s, std::vector<Mark> &after) {
    if (s->legacy) {
        for (Stream *other : streams)
            if (other != s && other->blocking && other->device == s->device) {
                if (other->capture) {
                    invalidate(*other->capture);
                    return cudaErrorStreamCaptureImplicit;
                }
                if (!happened(other->last)) after.push_back(other->last);
            }
    } else if (s->blocking && !happened(legacy(s->device)->last))
        after.push_back(legacy(s->device)->last);
    return cudaSuccess;
}

/* QVL_EMU_LOST=device:n: that device fails at the n-th operation, and at every one behind it. */
bool lost(int device, bool counts) {
    static const char *asked = getenv("QVL_EMU_LOST");
    static int which = -1, left = 0, read = asked ? sscanf(asked, "%d:%d", &which, &left) : 0;
    if (read < 2 || device != which) return false;
    if (counts && left > 0) left--;
    return left == 0;
}

cudaError_t enqueue_after(Stream *s, Work work, std::vector<Mark> after) {
    if (lost(s->device, true)) return cudaErrorLaunchFailure;
    if (s->capture) {
        Capture &c = *s->capture;
        if (!c.valid) return cudaErrorStreamCaptureInvalidated;
        c.nodes.push_back(Node{std::move(work), s->tail, s->branch});
        s->tail = {(int)c.nodes.size() - 1};
        return cudaSuccess;
    }
    if (cudaError_t e = add_legacy_order(s, after)) return e;
    push(s, std::move(work), std::move(after));
    after_enqueue();
    return cudaSuccess;
}

template <class T> bool known(const std::set<T *> &all, const void *handle) {
    return all.count(const_cast<T *>(static_cast<const T *>(handle))) != 0;
}
Event *event_of(cudaEvent_t e) { return known(events, e) ? reinterpret_cast<Event *>(e) : nullptr; }

cudaError_t fail_capture(Stream *s, cudaError_t e) {
    if (s->capture) invalidate(*s->capture);
    return e;
}

} // namespace

Api::Api() {
    if (depth++ == 0) {
        if (in_host_function) fail("a host function on a stream calls the CUDA runtime, which CUDA forbids");
        mutex.lock();
    }
}
Api::~Api() {
    if (--depth == 0) {
        close_memory();
        mutex.unlock();
    }
}

cudaError_t result(cudaError_t e) {
    if (e != cudaSuccess && e != cudaErrorNotReady) last_error = e;
    return e;
}

int current_device() { return device_now; }
int stream_device(const Stream *s) { return s->device; }
bool is_capturing(const Stream *s) { return s->capture != nullptr; }
bool host_writes_pending() { return host_writes > 0; }
Mark last_mark(Stream *s) { return s->last; }
cudaError_t enqueue(Stream *s, Work work) { return enqueue_after(s, std::move(work), {}); }

cudaError_t find_stream(cudaStream_t handle, Stream **out) {
    if (handle == cudaStreamPerThread) fail("the per-thread default stream is not modelled");
    bool is_legacy = !handle || handle == cudaStreamLegacy;
    if (!is_legacy && !known(stream_handles, handle)) return cudaErrorInvalidResourceHandle;
    *out = is_legacy ? legacy(device_now) : reinterpret_cast<Stream *>(handle);
    return cudaSuccess;
}

bool at_head(Stream *s, const Mark &m) {
    if (s->queue.empty() || s->queue.front().mark != m) return false;
    const Op &op = s->queue.front();
    return std::all_of(op.after.begin(), op.after.end(), happened);
}

void something_changed() { changed.notify_all(); }

bool wait_for_others() {
    static const long limit_ms = env("QVL_EMU_DEADLOCK_MS", 5000);
    bool alone = true;
    if (FILE *f = fopen("/proc/self/status", "r")) {
        char line[128];
        int threads = 0;
        while (fgets(line, sizeof line, f))
            if (sscanf(line, "Threads: %d", &threads) == 1) break;
        fclose(f);
        alone = threads == 1;
    }
    if (alone) return false;
    close_memory();
    int outer = depth;
    depth = 0;
    std::unique_lock<std::mutex> held(mutex, std::adopt_lock);
    bool woken = changed.wait_for(held, std::chrono::milliseconds(limit_ms)) == std::cv_status::no_timeout;
    held.release();
    depth = outer;
    return woken;
}

cudaError_t wait_for(const Mark &m) {
    while (!happened(m)) {
        if (run_towards(m) || wait_for_others()) continue;
        std::string waiting;
        for (Stream *s : streams)
            if (!s->queue.empty()) waiting += (waiting.empty() ? "" : "; ") + s->queue.front().work.name;
        fail("deadlock: the host waits and nothing can run; streams are held up by: %s", waiting.c_str());
    }
    if (m) join(host_seen, *m);
    return cudaSuccess;
}

void drain(int device) {
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i]->device == device) wait_for(streams[i]->last);
}

cudaError_t unsafe_in_capture() {
    bool found = false;
    for (auto &c : captures)
        if (c->mode == cudaStreamCaptureModeGlobal || (c->mode == cudaStreamCaptureModeThreadLocal && pthread_equal(c->thread, pthread_self()))) {
            invalidate(*c);
            found = true;
        }
    return found ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

void launch(const Kernel &k, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t handle) {
    std::shared_ptr<const Kernel> kernel(new Kernel(k), [](const Kernel *p) {
        p->free_args(p->args);
        delete p;
    });
    Api api;
    Stream *s;
    uint64_t threads = (uint64_t)block.x * block.y * block.z;
    cudaError_t e = no_device();
    if (e == cudaSuccess) e = find_stream(handle, &s);
    if (e == cudaSuccess && s->device != device_now) e = cudaErrorInvalidResourceHandle;
    if (e == cudaSuccess && (!threads || threads > max_threads || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535))
        e = cudaErrorInvalidConfiguration;
    if (e == cudaSuccess && shared_bytes > shared_limit(k.function, device_now)) e = cudaErrorInvalidValue;
    if (e == cudaSuccess) {
        Work w;
        w.name = k.name;
        w.device = s->device;
        int device = s->device;
        w.run = [=] {
            run_kernel(*kernel, grid, block, shared_bytes, device);
            check_zones(device, kernel->name);
        };
        e = enqueue(s, std::move(w));
    }
    result(e);
}

} // namespace qvl_emu

using namespace qvl_emu;

/* ---- devices and errors ---- */

cudaError_t cudaSetDevice(int d) {
    QVL_EMU_API;
    if (d < 0 || d >= device_count()) return result(cudaErrorInvalidDevice);
    device_now = d;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *d) {
    QVL_EMU_API;
    *d = device_now;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    QVL_EMU_API;
    if (cudaError_t e = unsafe_in_capture()) return result(e);
    drain(device_now);
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

static const struct {
    cudaError_t error;
    const char *name, *text;
} error_table[] = {
#define E(name, text) {name, #name, text}
    E(cudaSuccess, "no error"),
    E(cudaErrorInvalidValue, "invalid argument"),
    E(cudaErrorMemoryAllocation, "out of memory"),
    E(cudaErrorLaunchFailure, "unspecified launch failure"),
    E(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    E(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    E(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    E(cudaErrorInvalidDevice, "invalid device ordinal"),
    E(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    E(cudaErrorNotReady, "device not ready"),
    E(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    E(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    E(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    E(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    E(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    E(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    E(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream"),
    E(cudaErrorStreamCaptureWrongThread, "attempt to terminate a thread-local capture sequence from another thread"),
    E(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
#undef E
};
const char *cudaGetErrorName(cudaError_t e) {
    for (auto &row : error_table)
        if (row.error == e) return row.name;
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t e) {
    for (auto &row : error_table)
        if (row.error == e) return row.text;
    return "unrecognized error code";
}

/* ---- streams ---- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int) {
    QVL_EMU_API;
    if (flags > cudaStreamNonBlocking) return result(cudaErrorInvalidValue);
    Stream *s = new_stream(device_now, flags != cudaStreamNonBlocking);
    stream_handles.insert(s);
    *out = reinterpret_cast<cudaStream_t>(s);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { /* priorities say who goes first, never who waits */
    QVL_EMU_API;
    *low = 0, *high = -5;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) { return cudaStreamCreateWithPriority(out, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithPriority(out, cudaStreamDefault, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t handle) { /* what is queued still runs */
    QVL_EMU_API;
    Stream *s;
    cudaError_t e = find_stream(handle, &s);
    if (e != cudaSuccess || s->legacy) return result(cudaErrorInvalidResourceHandle);
    if (s->capture) invalidate(*s->capture);
    stream_handles.erase(s);
    if (s->queue.empty() && !s->capture) {
        streams.erase(std::find(streams.begin(), streams.end(), s));
        free_lanes.push_back(s->lane);
        delete s;
    }
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    QVL_EMU_API;
    Stream *s;
    if (cudaError_t e = find_stream(handle, &s)) return result(e);
    if (s->capture) return result(fail_capture(s, cudaErrorStreamCaptureUnsupported));
    if (lost(s->device, false)) return result(cudaErrorLaunchFailure);
    if (s->legacy) {
        std::vector<Mark> after;
        if (cudaError_t e = add_legacy_order(s, after)) return result(e);
        for (const Mark &m : after) wait_for(m);
    }
    return result(wait_for(s->last));
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
    QVL_EMU_API;
    Stream *s;
    if (cudaError_t e = find_stream(handle, &s)) return result(e);
    if (s->capture) return result(fail_capture(s, cudaErrorStreamCaptureUnsupported));
    if (lost(s->device, false)) return result(cudaErrorLaunchFailure);
    if (happened(s->last)) return wait_for(s->last);
    run_towards(s->last); /* whoever polls must get on */
    return cudaErrorNotReady;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t fn, void *data) {
    QVL_EMU_API;
    Stream *s;
    if (cudaError_t e = find_stream(handle, &s)) return result(e);
    Work w;
    w.name = "a host function";
    w.host = w.writes_host = true;
    w.run = [=] { fn(data); };
    return result(enqueue(s, std::move(w)));
}

/* ---- events ---- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    QVL_EMU_API;
    auto *e = new Event{device_now, !(flags & cudaEventDisableTiming), nullptr, {}, false, {}};
    events.insert(e);
    *out = reinterpret_cast<cudaEvent_t>(e);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    QVL_EMU_API;
    Event *e = event_of(handle);
    if (!e) return result(cudaErrorInvalidResourceHandle);
    events.erase(e);
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
    QVL_EMU_API;
    Event *e = event_of(handle);
    Stream *s;
    if (!e || find_stream(stream, &s)) return result(cudaErrorInvalidResourceHandle);
    if (e->device != s->device) return result(cudaErrorInvalidResourceHandle);
    e->captured = s->capture != nullptr;
    e->capture = s->capture;
    e->nodes = s->tail;
    if (e->captured) return cudaSuccess;
    Work w;
    w.name = "an event";
    w.device = s->device;
    std::vector<Mark> after;
    if (cudaError_t error = add_legacy_order(s, after)) return result(error);
    push(s, std::move(w), std::move(after));
    e->mark = s->last;
    after_enqueue();
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
    QVL_EMU_API;
    Event *e = event_of(handle);
    Stream *s;
    if (!e || find_stream(stream, &s)) return result(cudaErrorInvalidResourceHandle);
    auto c = e->capture.lock();
    if (e->captured) {
        if (!c || std::find(captures.begin(), captures.end(), c) == captures.end()) return result(fail_capture(s, cudaErrorInvalidValue)); /* its capture is over */
        if (s->legacy) return result(fail_capture(c->streams[0], cudaErrorStreamCaptureImplicit));
        if (s->capture && s->capture != c) return result(fail_capture(s, cudaErrorStreamCaptureMerge));
        if (!s->capture) {
            s->capture = c;
            s->branch = (int)c->streams.size();
            c->streams.push_back(s);
        }
        s->tail.insert(s->tail.end(), e->nodes.begin(), e->nodes.end());
        return cudaSuccess;
    }
    if (!e->mark) return cudaSuccess; /* never recorded: nothing to wait for */
    if (s->capture) return result(fail_capture(s, cudaErrorStreamCaptureIsolation));
    Work w;
    w.name = "a wait for an event";
    w.device = s->device;
    return result(enqueue_after(s, std::move(w), {e->mark}));
}
static cudaError_t event_state(cudaEvent_t handle, Event **out) {
    *out = event_of(handle);
    if (!*out) return cudaErrorInvalidResourceHandle;
    if ((*out)->captured) {
        if (auto c = (*out)->capture.lock()) invalidate(*c);
        return cudaErrorCapturedEvent;
    }
    return unsafe_in_capture();
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    QVL_EMU_API;
    Event *e;
    if (cudaError_t error = event_state(handle, &e)) return result(error);
    return result(wait_for(e->mark));
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
    QVL_EMU_API;
    Event *e;
    if (cudaError_t error = event_state(handle, &e)) return result(error);
    if (happened(e->mark)) return wait_for(e->mark);
    run_towards(e->mark);
    return cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    QVL_EMU_API;
    Event *a, *b;
    if (cudaError_t error = event_state(from, &a)) return result(error);
    if (cudaError_t error = event_state(to, &b)) return result(error);
    if (!a->timing || !b->timing || !a->mark || !b->mark) return result(cudaErrorInvalidResourceHandle);
    if (!a->mark->happened || !b->mark->happened) return cudaErrorNotReady;
    *ms = (float)(b->mark->when_ms - a->mark->when_ms);
    return cudaSuccess;
}

/* ---- capture and graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    QVL_EMU_API;
    Stream *s;
    if (cudaError_t e = find_stream(handle, &s)) return result(e);
    if (s->legacy) return result(cudaErrorStreamCaptureUnsupported);
    if (s->capture) return result(fail_capture(s, cudaErrorIllegalState));
    auto c = std::make_shared<Capture>();
    c->mode = mode;
    c->thread = pthread_self();
    c->streams = {s};
    captures.push_back(c);
    s->capture = c;
    s->branch = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *out) {
    QVL_EMU_API;
    *out = nullptr;
    Stream *s;
    if (cudaError_t e = find_stream(handle, &s)) return result(e);
    if (!s->capture) return result(cudaErrorIllegalState);
    auto c = s->capture;
    if (c->streams[0] != s) return result(fail_capture(s, cudaErrorStreamCaptureUnmatched));
    if (c->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(c->thread, pthread_self())) return result(fail_capture(s, cudaErrorStreamCaptureWrongThread));
    std::vector<bool> followed(c->nodes.size());
    for (const Node &n : c->nodes)
        for (int a : n.after) followed[(size_t)a] = true;
    for (int a : s->tail) followed[(size_t)a] = true;
    bool joined = std::all_of(followed.begin(), followed.end(), [](bool f) { return f; }), valid = c->valid;
    end_capture(c);
    if (!valid) return result(cudaErrorStreamCaptureInvalidated);
    if (!joined) return result(cudaErrorStreamCaptureUnjoined);
    auto *g = new Graph{c->nodes, (int)c->streams.size()};
    graphs.insert(g);
    *out = reinterpret_cast<cudaGraph_t>(g);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus *status) {
    QVL_EMU_API;
    Stream *s;
    if (cudaError_t e = find_stream(handle, &s)) return result(e);
    *status = !s->capture ? cudaStreamCaptureStatusNone : s->capture->valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t *nodes, size_t *count) {
    QVL_EMU_API;
    if (!known(graphs, handle)) return result(cudaErrorInvalidValue);
    auto *g = reinterpret_cast<Graph *>(handle);
    if (nodes)
        for (size_t i = 0; i < *count; i++) nodes[i] = i < g->nodes.size() ? reinterpret_cast<cudaGraphNode_t>(&g->nodes[i]) : nullptr;
    if (!nodes || *count > g->nodes.size()) *count = g->nodes.size();
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t handle) {
    QVL_EMU_API;
    if (!known(graphs, handle)) return result(cudaErrorInvalidValue);
    auto *g = reinterpret_cast<Graph *>(handle);
    graphs.erase(g);
    delete g;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t handle, unsigned long long flags) {
    QVL_EMU_API;
    *out = nullptr;
    if (!known(graphs, handle) || flags) return result(cudaErrorInvalidValue);
    auto *x = new Exec{*reinterpret_cast<Graph *>(handle), {}, nullptr};
    if (getenv("QVL_EMU_GRAPHS")) fprintf(stderr, "qvl-emu: a graph of %zu nodes\n", x->graph.nodes.size());
    for (int i = 0; i < x->graph.branches; i++) x->streams.push_back(new_stream(device_now, false));
    for (const Node &n : x->graph.nodes)
        if (n.work.device >= 0) x->streams[(size_t)n.branch]->device = n.work.device;
    execs.insert(x);
    *out = reinterpret_cast<cudaGraphExec_t>(x);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t handle) {
    QVL_EMU_API;
    if (!known(execs, handle)) return result(cudaErrorInvalidValue);
    auto *x = reinterpret_cast<Exec *>(handle);
    if (!happened(x->last) && !lost(x->streams[0]->device, false)) fail("cudaGraphExecDestroy: the graph may still be running");
    for (Stream *s : x->streams) {
        free_lanes.push_back(s->lane);
        streams.erase(std::find(streams.begin(), streams.end(), s));
        delete s;
    }
    execs.erase(x);
    delete x;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream) {
    QVL_EMU_API;
    Stream *s;
    if (!known(execs, handle)) return result(cudaErrorInvalidValue);
    if (cudaError_t e = find_stream(stream, &s)) return result(e);
    if (s->capture) fail("cudaGraphLaunch on a capturing stream (a child graph) is not modelled");
    auto *x = reinterpret_cast<Exec *>(handle);
    std::vector<Mark> after = {x->last}, marks, ends; /* a graph does not run beside itself */
    if (cudaError_t e = add_legacy_order(s, after)) return result(e);
    Work w;
    w.name = "the start of a graph";
    w.device = s->device;
    push(s, w, after);
    Mark start = s->last;
    std::vector<bool> followed(x->graph.nodes.size());
    for (const Node &n : x->graph.nodes) {
        after = {start};
        for (int a : n.after) {
            after.push_back(marks[(size_t)a]);
            followed[(size_t)a] = true;
        }
        Stream *branch = x->streams[(size_t)n.branch];
        push(branch, n.work, after);
        marks.push_back(branch->last);
    }
    for (size_t i = 0; i < marks.size(); i++)
        if (!followed[i]) ends.push_back(marks[i]);
    w.name = "the end of a graph";
    push(s, w, ends);
    x->last = s->last;
    after_enqueue();
    return cudaSuccess;
}
