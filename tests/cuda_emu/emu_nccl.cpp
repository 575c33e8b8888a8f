/* emu_nccl.cpp - NCCL among the devices of one process.
 *
 * Job:        communicators, groups, all-reduce (sum), all-gather, broadcast.
 * Input:      ranks as devices, called from one thread in groups or from a thread each.
 * Output:     a collective happens when it is next in the streams of all its ranks.
 * Invariants: n-th call meets n-th call; differing kinds, counts, types or roots are named; outside a group a call waits
 *             for the other ranks' calls, as NCCL may, so a missing group is a deadlock and named;
 *             sums are rounded to the type at every step, beginning at a rank that changes from call to call.
 */
#include <nccl.h>
#include <stdio.h>
#include <algorithm>
#include <map>

#include "emu.h"

namespace qvl_emu {
namespace {

enum class Kind { all_reduce, all_gather, broadcast };
const char *const kind_names[] = {"ncclAllReduce", "ncclAllGather", "ncclBroadcast"};

struct Part {
    Kind kind;
    const char *send;
    char *recv;
    size_t count;
    ncclDataType_t type;
    int root;
    Stream *stream = nullptr;
    Mark mark;
};
struct Clique;
struct Collective {
    std::vector<Part> parts;
    std::vector<bool> called;
    uint64_t number;
    bool computed = false;
    Clique *clique;
    std::vector<std::vector<char>> results;
    bool complete() const { return std::all_of(called.begin(), called.end(), [](bool c) { return c; }); }
};
struct Rank;
struct Clique {
    std::vector<Rank *> ranks; /* null: not there yet */
    std::map<uint64_t, std::shared_ptr<Collective>> open;
    bool aborted = false; /* by one of its ranks: what has not happened never will, and nobody waits for it */
    bool complete() const { return std::all_of(ranks.begin(), ranks.end(), [](Rank *r) { return r != nullptr; }); }
};
struct Rank {
    std::shared_ptr<Clique> clique;
    int rank, device;
    uint64_t next = 0;
};

std::map<std::string, std::shared_ptr<Clique>> meeting; /* by unique id */
struct Queued {
    Stream *stream;
    Work work;
};
thread_local int group_depth;
thread_local std::vector<Queued> group;
thread_local std::vector<std::shared_ptr<Collective>> entered;  /* by this thread, since its last wait */
thread_local std::vector<std::shared_ptr<Clique>> initialising;

size_t size_of(ncclDataType_t t) {
    switch (t) {
    case ncclFloat32:
    case ncclInt32: return 4;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt8:
    case ncclUint8: return 1;
    default: return 0;
    }
}

void add(char *to, const char *from, size_t count, ncclDataType_t t) {
    for (size_t i = 0; i < count; i++) {
        if (t == ncclFloat32)
            reinterpret_cast<float *>(to)[i] += reinterpret_cast<const float *>(from)[i];
        else if (t == ncclFloat16) {
            auto *a = reinterpret_cast<__half *>(to);
            a[i] = __float2half_rn(__half2float(a[i]) + __half2float(reinterpret_cast<const __half *>(from)[i]));
        } else {
            auto *a = reinterpret_cast<__nv_bfloat16 *>(to);
            a[i] = __float2bfloat16_rn(__bfloat162float(a[i]) + __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(from)[i]));
        }
    }
}

size_t received(const Part &p, size_t ranks) { return p.count * size_of(p.type) * (p.kind == Kind::all_gather ? ranks : 1); }

void compute(Collective &c) {
    size_t n = c.parts.size(), bytes = c.parts[0].count * size_of(c.parts[0].type);
    c.results.assign(n, {});
    for (size_t r = 0; r < n; r++) {
        std::vector<char> &out = c.results[r];
        if (c.parts[0].kind == Kind::broadcast) {
            const char *from = c.parts[(size_t)c.parts[0].root].send;
            out.assign(from, from + bytes);
        } else if (c.parts[0].kind == Kind::all_gather) {
            for (const Part &p : c.parts) out.insert(out.end(), p.send, p.send + bytes);
        } else if (r == 0) {
            size_t first = c.number % n;
            out.assign(c.parts[first].send, c.parts[first].send + bytes);
            for (size_t i = 1; i < n; i++) add(out.data(), c.parts[(first + i) % n].send, c.parts[0].count, c.parts[0].type);
        } else
            out = c.results[0];
    }
    c.computed = true;
}

std::string text(const Part &p, size_t rank) {
    return "rank " + std::to_string(rank) + ": " + kind_names[(int)p.kind] + " of " + std::to_string(p.count) + " numbers of type " + std::to_string((int)p.type) +
           (p.kind == Kind::broadcast ? " from " + std::to_string(p.root) : "");
}

std::shared_ptr<Collective> call(Rank *r, Part part, Stream *s, Mark mark) {
    auto &c = r->clique->open[r->next];
    size_t n = r->clique->ranks.size(), me = (size_t)r->rank;
    if (!c) {
        c = std::make_shared<Collective>();
        c->parts.resize(n);
        c->called.resize(n);
        c->number = r->next;
        c->clique = r->clique.get();
    }
    part.stream = s;
    part.mark = std::move(mark);
    for (size_t i = 0; i < n; i++)
        if (c->called[i] && (c->parts[i].kind != part.kind || c->parts[i].count != part.count || c->parts[i].type != part.type || c->parts[i].root != part.root))
            fail("NCCL: call %llu does not match: %s; %s", (unsigned long long)r->next, text(c->parts[i], i).c_str(), text(part, me).c_str());
    c->parts[me] = part;
    c->called[me] = true;
    auto it = c;
    if (it->complete()) r->clique->open.erase(r->next);
    r->next++;
    entered.push_back(it);
    return it;
}

void wait_for_ranks() { /* the host, for the other ranks' calls */
    for (auto &c : initialising)
        while (!c->complete())
            if (!wait_for_others()) fail("NCCL deadlock: ncclCommInitRank waits for the other ranks; with one thread for several ranks it must be in a group");
    initialising.clear();
    for (auto &c : entered)
        while (!c->complete() && !c->clique->aborted)
            if (!wait_for_others()) {
                size_t here = 0, missing = 0;
                while (!c->called[here]) here++;
                while (c->called[missing]) missing++;
                fail("NCCL deadlock: %s, but rank %zu has not called; one thread for several ranks must call within ncclGroupStart and ncclGroupEnd", text(c->parts[here], here).c_str(),
                     missing);
            }
    entered.clear();
}

ncclResult_t start(Kind kind, const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t handle) {
    Api api;
    auto *r = reinterpret_cast<Rank *>(comm);
    Stream *s;
    if (no_device()) return ncclUnhandledCudaError;
    if (!r || !size_of(type) || find_stream(handle, &s)) return ncclInvalidArgument;
    if (root < 0 || root >= (int)r->clique->ranks.size()) return ncclInvalidArgument;
    if (kind == Kind::all_reduce && type != ncclFloat32 && type != ncclFloat16 && type != ncclBfloat16) fail("NCCL: sums of type %d are not modelled", (int)type);
    if (stream_device(s) != r->device) fail("NCCL: rank %d is device %d, its stream is device %d's", r->rank, r->device, stream_device(s));
    Part p{kind, static_cast<const char *>(send), static_cast<char *>(recv), count, type, root, nullptr, nullptr};
    size_t sent = count * size_of(type), got = received(p, r->clique->ranks.size());
    bool sends = kind != Kind::broadcast || r->rank == root;
    if (sends) need_device_memory(send, sent, r->device, kind_names[(int)kind], "the send buffer");
    need_device_memory(recv, got, r->device, kind_names[(int)kind], "the receive buffer");
    Work w;
    w.name = text(p, (size_t)r->rank);
    w.device = -1;
    size_t me = (size_t)r->rank;
    w.enter = [=](Stream *stream, Mark mark, std::function<bool()> *may, std::function<void()> *run) {
        auto c = call(r, p, stream, std::move(mark));
        *may = [c] { return c->computed || c->clique->aborted || (c->complete() && std::all_of(c->parts.begin(), c->parts.end(), [](const Part &q) { return at_head(q.stream, q.mark); })); };
        *run = [=] {
            if (!c->computed && c->clique->aborted) return;
            if (!c->computed) compute(*c);
            if (sends) check_range(send, sent, false);
            check_range(recv, got, true);
            memcpy(recv, c->results[me].data(), got);
        };
    };
    if (group_depth) {
        group.push_back({s, std::move(w)});
        return ncclSuccess;
    }
    if (enqueue(s, std::move(w)) != cudaSuccess) return ncclUnhandledCudaError;
    wait_for_ranks();
    return ncclSuccess;
}

Rank *join(const std::shared_ptr<Clique> &c, int rank, int device) {
    auto *r = new Rank;
    r->clique = c;
    r->rank = rank;
    r->device = device;
    c->ranks[(size_t)rank] = r;
    return r;
}

} // namespace
} // namespace qvl_emu

using namespace qvl_emu;

ncclResult_t ncclGetVersion(int *v) {
    *v = NCCL_VERSION_CODE;
    return ncclSuccess;
}
const char *ncclGetErrorString(ncclResult_t r) {
    static const char *const texts[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument", "invalid usage", "remote process error", "in progress"};
    return (unsigned)r < ncclNumResults ? texts[r] : "unknown result code";
}
const char *ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    Api api;
    static int count;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "qvl-emu-%d", ++count);
    return ncclSuccess;
}

ncclResult_t ncclCommInitAll(ncclComm_t *comms, int n, const int *devices) {
    Api api;
    if (no_device()) return ncclUnhandledCudaError;
    if (n < 1 || n > device_count()) return ncclInvalidArgument;
    auto c = std::make_shared<Clique>();
    c->ranks.resize((size_t)n);
    std::vector<int> used;
    for (int r = 0; r < n; r++) {
        int d = devices ? devices[r] : r;
        if (d < 0 || d >= device_count()) return ncclInvalidArgument;
        if (std::count(used.begin(), used.end(), d)) return ncclInvalidUsage;
        used.push_back(d);
    }
    for (int r = 0; r < n; r++) comms[r] = reinterpret_cast<ncclComm_t>(join(c, r, used[(size_t)r]));
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int n, ncclUniqueId id, int rank) {
    Api api;
    if (no_device()) return ncclUnhandledCudaError;
    if (n < 1 || rank < 0 || rank >= n) return ncclInvalidArgument;
    auto &c = meeting[std::string(id.internal, strnlen(id.internal, sizeof id.internal))];
    if (!c) {
        c = std::make_shared<Clique>();
        c->ranks.resize((size_t)n);
    }
    if (c->ranks.size() != (size_t)n || c->ranks[(size_t)rank]) return ncclInvalidUsage;
    for (Rank *r : c->ranks)
        if (r && r->device == current_device()) return ncclInvalidUsage; /* two ranks on one device */
    *comm = reinterpret_cast<ncclComm_t>(join(c, rank, current_device()));
    initialising.push_back(c);
    if (!group_depth) wait_for_ranks();
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    Api api;
    auto *r = reinterpret_cast<Rank *>(comm);
    if (!r) return ncclSuccess;
    drain(r->device);
    delete r;
    return ncclSuccess;
}

/* The rank stays: recorded graphs may hold calls of it. */
ncclResult_t ncclCommAbort(ncclComm_t comm) {
    Api api;
    if (auto *r = reinterpret_cast<Rank *>(comm)) r->clique->aborted = true;
    something_changed();
    return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *is) {
    *is = ncclSuccess;
    return comm ? ncclSuccess : ncclInvalidArgument;
}

ncclResult_t ncclGroupStart() {
    group_depth++;
    return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
    Api api;
    if (!group_depth) return ncclInvalidUsage;
    if (--group_depth) return ncclSuccess;
    std::vector<Queued> calls;
    calls.swap(group);
    for (Queued &q : calls)
        if (enqueue(q.stream, std::move(q.work)) != cudaSuccess) return ncclUnhandledCudaError;
    wait_for_ranks();
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    if (op != ncclSum) fail("NCCL: reductions other than sums are not modelled");
    return start(Kind::all_reduce, send, recv, count, type, 0, comm, stream);
}
ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
    return start(Kind::all_gather, send, recv, count, type, 0, comm, stream);
}
ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
    return start(Kind::broadcast, send, recv, count, type, root, comm, stream);
}
