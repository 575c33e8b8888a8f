/* emu_memory.cpp - devices, their memory, copies.
 *
 * Job:        the CUDA runtime's functions on devices, properties, memory and copies.
 * Input:      QVL_EMU_DEVICES (1), QVL_EMU_MEMORY (2 GiB each), QVL_EMU_NO_DEVICE (1: no device, driver: no driver, old: one of CUDA 12.4).
 * Output:     allocations in a range of addresses per device; copies as operations on streams.
 * Invariants: device memory is inaccessible while host code runs; a kernel reaches its own device's only; fresh and freed
 *             memory is 0xFF; a zone of 0xFF follows every allocation; an address range is reused late;
 *             a copy from pinned memory reads it when it runs, one from pageable memory when it is called.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <algorithm>
#include <map>

#include "emu.h"

namespace qvl_emu {
namespace {

constexpr size_t grain = 512, huge = 2 << 20, quarantine = 64 << 20;
size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

struct Device {
    char *base = nullptr;
    size_t reserved = 0, top = 0, used = 0, freed = 0; /* top: end of what was ever handed out */
    bool open = false;
    std::map<char *, Allocation> blocks;
    std::vector<const Allocation *> live; /* of blocks: looked at after every kernel */
    std::map<const void *, size_t> shared_limits;
};
std::vector<Device> devices;
std::map<char *, size_t> pinned;
size_t memory_bytes;
int sm_count = 1; /* few: grids that are sized by it stay small */

Device &device(int d) {
    if (devices.empty()) {
        devices.resize((size_t)device_count());
        memory_bytes = round_up((size_t)env("QVL_EMU_MEMORY", 2L << 30), huge);
        install_fault_handler();
    }
    Device &it = devices[(size_t)d];
    if (!it.base) {
        it.reserved = memory_bytes + memory_bytes / 4 + 2 * quarantine;
        void *p = mmap(nullptr, it.reserved + huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) fail("no address range of %zu MiB for a device: QVL_EMU_MEMORY", it.reserved >> 20);
        it.base = reinterpret_cast<char *>(round_up((uintptr_t)p, huge));
        madvise(it.base, it.reserved, MADV_HUGEPAGE); /* opening and closing touches one entry for 2 MiB */
    }
    return it;
}

void protect(Device &d, bool open) {
    if (d.open == open || !d.base) return;
    if (d.top) mprotect(d.base, round_up(d.top, huge), open ? PROT_READ | PROT_WRITE : PROT_NONE);
    d.open = open;
}

const Device *device_at(const void *p) {
    for (const Device &d : devices)
        if (d.base && p >= d.base && p < d.base + d.reserved) return &d;
    return nullptr;
}

char *take(int index, size_t bytes) {
    Device &d = device(index);
    size_t room = round_up(bytes, grain) + grain;
    if (d.used + round_up(bytes, grain) > memory_bytes) return nullptr;
    char *at = nullptr;
    if (d.freed > quarantine || d.top + room > d.reserved) {
        for (auto i = d.blocks.begin(); i != d.blocks.end() && !at; ++i) {
            if (i->second.live) continue;
            for (auto next = std::next(i); next != d.blocks.end() && !next->second.live; next = d.blocks.erase(next)) i->second.room += next->second.room;
            Allocation &a = i->second;
            if (a.room < room) continue;
            if (a.room > room) d.blocks[a.start + room] = Allocation{a.start + room, 0, a.room - room, index, false};
            d.freed -= room;
            at = a.start;
        }
    }
    if (!at && d.top + room <= d.reserved) {
        protect(d, false);
        at = d.base + d.top;
        d.top += room;
    }
    if (!at) return nullptr;
    Allocation &a = d.blocks[at] = Allocation{at, bytes, room, index, true};
    d.live.push_back(&a);
    d.used += round_up(bytes, grain);
    protect(d, true);
    unpoison(at, room);
    memset(at, 0xff, room);
    poison(at + bytes, room - bytes);
    check_allocated(&a);
    return at;
}

bool pinned_block(const void *p, char **start, size_t *bytes) {
    char *at = const_cast<char *>(static_cast<const char *>(p));
    auto i = pinned.upper_bound(at);
    if (i == pinned.begin()) return false;
    --i;
    if (at >= i->first + i->second) return false;
    *start = i->first;
    *bytes = i->second;
    return true;
}

uint64_t checksum(const char *p, size_t pitch, size_t width, size_t rows) {
    uint64_t h = 1469598103934665603u;
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < width; i += 8) {
            uint64_t w = 0;
            memcpy(&w, p + r * pitch + i, std::min<size_t>(8, width - i));
            h = (h ^ w) * 1099511628211u;
        }
    return h;
}

struct Rect { /* what a copy or memset covers */
    char *p;
    size_t pitch;
};
size_t span(size_t pitch, size_t width, size_t rows) { return rows ? pitch * (rows - 1) + width : 0; }

/* All copies. device: of the source or destination, -1: of any. */
cudaError_t copy(Rect to, Rect from, size_t width, size_t rows, cudaMemcpyKind kind, Stream *s, bool wait, const char *who) {
    if (!width || !rows) return cudaSuccess;
    if ((rows > 1 && (to.pitch < width || from.pitch < width)) || kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return cudaErrorInvalidValue;
    size_t to_span = span(to.pitch, width, rows), from_span = span(from.pitch, width, rows);
    bool to_device = kind == cudaMemcpyDefault ? in_device_memory(to.p) : kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDefault ? in_device_memory(from.p) : kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    char *start;
    size_t bytes;
    struct {
        Rect r;
        size_t span;
        bool device;
        const char *what;
    } sides[] = {{to, to_span, to_device, "the destination"}, {from, from_span, from_device, "the source"}};
    for (auto &side : sides) {
        if (side.device)
            need_device_memory(side.r.p, side.span, -1, who, side.what);
        else if (in_device_memory(side.r.p))
            fail("%s: %s should be host memory: %s", who, side.what, describe(side.r.p).c_str());
        else if (pinned_block(side.r.p, &start, &bytes) && side.r.p + side.span > start + bytes)
            fail("%s: %s is too long: %zu bytes at %s", who, side.what, side.span, describe(side.r.p).c_str());
    }
    bool to_pageable = !to_device && !pinned_block(to.p, &start, &bytes), from_pageable = !from_device && !pinned_block(from.p, &start, &bytes);
    if ((to_pageable || from_pageable || wait) && is_capturing(s)) return unsafe_in_capture();
    Work w;
    w.name = who;
    w.device = to_device && from_device ? -1 : to_device || from_device ? find_allocation(to_device ? to.p : from.p)->device : -1;
    w.writes_host = !to_device;
    std::shared_ptr<std::vector<char>> staged;
    uint64_t sum = 0;
    bool watch = false;
    if (from_pageable && !wait) { /* CUDA may stage it: the call returns when the source may be reused */
        staged = std::make_shared<std::vector<char>>(from.p, from.p + from_span);
        from.p = staged->data();
    } else if (!from_device && !wait && !is_capturing(s) && !host_writes_pending()) {
        watch = true;
        sum = checksum(from.p, from.pitch, width, rows);
    }
    w.run = [=] {
        (void)staged;
        if (watch && checksum(from.p, from.pitch, width, rows) != sum)
            fail("%s: the pinned source at %s was changed before the copy ran", who, describe(from.p).c_str());
        for (size_t r = 0; r < rows; r++) {
            if (from_device) check_range(from.p + r * from.pitch, width, false);
            if (to_device) check_range(to.p + r * to.pitch, width, true);
            memmove(to.p + r * to.pitch, from.p + r * from.pitch, width);
        }
    };
    cudaError_t e = enqueue(s, std::move(w));
    if (e == cudaSuccess && (wait || to_pageable)) e = wait_for(last_mark(s));
    return e;
}

cudaError_t set(void *p, int value, size_t bytes, Stream *s, const char *who) {
    if (!bytes) return cudaSuccess;
    need_device_memory(p, bytes, -1, who, "the destination");
    const Allocation *a = find_allocation(p);
    Work w;
    w.name = who;
    w.device = a ? a->device : -1;
    w.run = [=] {
        check_range(p, bytes, true);
        memset(p, value, bytes);
    };
    return enqueue(s, std::move(w));
}

cudaError_t on_stream(cudaStream_t handle, const std::function<cudaError_t(Stream *)> &fn) {
    Stream *s;
    cudaError_t e = find_stream(handle, &s);
    return result(e == cudaSuccess ? fn(s) : e);
}

} // namespace

int device_count() {
    static int n = (int)std::max(1L, std::min(16L, env("QVL_EMU_DEVICES", 1)));
    return n;
}

cudaError_t no_device() {
    const char *v = getenv("QVL_EMU_NO_DEVICE");
    if (!v || !*v || strcmp(v, "0") == 0) return cudaSuccess;
    return strcmp(v, "driver") == 0 || strcmp(v, "old") == 0 ? cudaErrorInsufficientDriver : cudaErrorNoDevice;
}

const Allocation *find_allocation(const void *p) {
    const Device *d = device_at(p);
    if (!d) return nullptr;
    auto i = d->blocks.upper_bound(const_cast<char *>(static_cast<const char *>(p)));
    if (i == d->blocks.begin()) return nullptr;
    --i;
    return p < i->first + i->second.room ? &i->second : nullptr;
}

bool in_device_memory(const void *p) { return device_at(p) != nullptr; }

int address_range(const void *p, char **start, size_t *bytes) {
    const Device *d = device_at(p);
    if (!d) return -1;
    *start = d->base;
    *bytes = d->reserved;
    return (int)(d - devices.data());
}

bool is_pinned(const void *p, size_t bytes) {
    char *start;
    size_t size;
    return pinned_block(p, &start, &size) && static_cast<const char *>(p) + bytes <= start + size;
}

std::string describe(const void *p) {
    char text[200];
    char *start;
    size_t bytes;
    if (const Allocation *a = find_allocation(p)) {
        ptrdiff_t at = static_cast<const char *>(p) - a->start;
        if (!a->live)
            snprintf(text, sizeof text, "%p, byte %td of freed memory of device %d", p, at, a->device);
        else if ((size_t)at < a->bytes)
            snprintf(text, sizeof text, "%p, byte %td of %zu bytes on device %d", p, at, a->bytes, a->device);
        else
            snprintf(text, sizeof text, "%p, %zu bytes after the end of %zu bytes on device %d", p, (size_t)at - a->bytes, a->bytes, a->device);
    } else if (in_device_memory(p))
        snprintf(text, sizeof text, "%p, device memory that was never allocated", p);
    else if (pinned_block(p, &start, &bytes))
        snprintf(text, sizeof text, "%p, byte %td of %zu bytes of pinned host memory", p, static_cast<const char *>(p) - start, bytes);
    else
        snprintf(text, sizeof text, "%p, which is neither device memory nor pinned host memory", p);
    return text;
}

void need_device_memory(const void *p, size_t bytes, int d, const char *who, const char *what) {
    if (!in_device_memory(p) && is_pinned(p, bytes)) return;
    const Allocation *a = find_allocation(p);
    if (!a) fail("%s: %s is not allocated memory: %s", who, what, describe(p).c_str());
    if (!a->live) fail("%s: %s was freed: %s", who, what, describe(p).c_str());
    if (d >= 0 && a->device != d) fail("%s on device %d: %s is on the wrong device: %s", who, d, what, describe(p).c_str());
    if (static_cast<const char *>(p) + bytes > a->start + a->bytes) fail("%s: %s is too long: %zu bytes at %s", who, what, bytes, describe(p).c_str());
}

void open_memory(int d) {
    for (size_t i = 0; i < devices.size(); i++) protect(devices[i], d < 0 || (int)i == d);
}
void close_memory() {
    for (Device &d : devices) protect(d, false);
}

void check_zones(int index, const char *who) {
#ifndef __SANITIZE_ADDRESS__ /* which watches the zones itself */
    for (size_t d = 0; d < devices.size(); d++) {
        if (index >= 0 && (int)d != index) continue;
        for (const Allocation *a : devices[d].live)
            for (char *p = a->start + a->bytes; p < a->start + a->room; p++)
                if (*p != (char)0xff) fail("%s wrote out of bounds: %s", who, describe(p).c_str());
    }
#else
    (void)index, (void)who;
#endif
}

size_t shared_limit(const void *function, int d) {
    auto &limits = device(d).shared_limits;
    auto i = limits.find(function);
    return i == limits.end() ? default_shared : i->second;
}

} // namespace qvl_emu

using namespace qvl_emu;

/* ---- devices ---- */

cudaError_t cudaGetDeviceCount(int *n) {
    *n = 0;
    QVL_EMU_API;
    *n = device_count();
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int d) {
    QVL_EMU_API;
    if (d < 0 || d >= device_count()) return result(cudaErrorInvalidDevice);
    device(d);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "CUDA emulator %d (no GPU)", d);
    p->major = 9; /* the limits of compute capability 9.0 */
    p->totalGlobalMem = memory_bytes;
    p->sharedMemPerBlock = default_shared;
    p->sharedMemPerBlockOptin = max_shared;
    p->sharedMemPerMultiprocessor = max_shared + 1024;
    p->reservedSharedMemPerBlock = 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = warp_lanes;
    p->maxThreadsPerBlock = max_threads;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalConstMem = 65536;
    p->multiProcessorCount = sm_count;
    p->l2CacheSize = 50 << 20;
    p->concurrentKernels = p->unifiedAddressing = p->asyncEngineCount = p->streamPrioritiesSupported = 1;
    p->pciBusID = d;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attr, int d) {
    cudaDeviceProp p;
    cudaError_t e = cudaGetDeviceProperties(&p, d);
    if (e != cudaSuccess) return e;
    switch (attr) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrCooperativeLaunch: *value = 0; break;
    default: fail("cudaDeviceGetAttribute: attribute %d is not modelled", (int)attr);
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int d, int peer) {
    QVL_EMU_API;
    if (d < 0 || d >= device_count() || peer < 0 || peer >= device_count()) return result(cudaErrorInvalidDevice);
    *can = 0; /* a kernel reaches its own device's memory only; copies and NCCL reach all */
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all) {
    QVL_EMU_API;
    Device &d = device(current_device());
    *all = memory_bytes;
    *free_bytes = memory_bytes - d.used;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *v) {
    *v = no_device() != cudaErrorInsufficientDriver ? CUDART_VERSION : strcmp(getenv("QVL_EMU_NO_DEVICE"), "old") == 0 ? 12040 : 0;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *v) {
    *v = CUDART_VERSION;
    return cudaSuccess;
}

/* ---- functions ---- */

cudaError_t cudaFuncSetAttribute(const void *function, cudaFuncAttribute attr, int value) {
    QVL_EMU_API;
    if (attr == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attr != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || (size_t)value > max_shared) return result(cudaErrorInvalidValue);
    device(current_device()).shared_limits[function] = (size_t)value;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *function) {
    QVL_EMU_API;
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = max_threads;
    a->numRegs = 32; /* unknown here: ptxas -v tells */
    a->binaryVersion = a->ptxVersion = 90;
    a->maxDynamicSharedSizeBytes = (int)shared_limit(function, current_device());
    return cudaSuccess;
}

/* From threads and shared memory; registers are unknown here. */
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared_bytes, unsigned) {
    QVL_EMU_API;
    if (threads < 1 || threads > max_threads) return result(cudaErrorInvalidValue);
    int warps = (threads + 31) / 32;
    *blocks = shared_bytes > shared_limit(function, current_device()) ? 0 : std::min({32, 64 / warps, (int)((max_shared + 1024) / (shared_bytes + 1024))});
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared_bytes) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared_bytes, 0);
}

/* ---- memory ---- */

cudaError_t cudaMalloc(void **p, size_t bytes) {
    QVL_EMU_API;
    if (cudaError_t e = unsafe_in_capture()) return result(e);
    *p = nullptr;
    if (!bytes) return cudaSuccess;
    *p = take(current_device(), bytes);
    return *p ? cudaSuccess : result(cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void *p) {
    QVL_EMU_API;
    if (cudaError_t e = unsafe_in_capture()) return result(e);
    if (!p) return cudaSuccess;
    auto *a = const_cast<Allocation *>(find_allocation(p));
    if (!a || a->start != p) fail("cudaFree: not the start of an allocation: %s", describe(p).c_str());
    if (!a->live) fail("cudaFree: freed before: %s", describe(p).c_str());
    drain(a->device);
    open_memory(a->device);
    check_zones(a->device, "somebody");
    unpoison(a->start, a->room);
    memset(a->start, 0xff, a->room);
    poison(a->start, a->room);
    a->live = false;
    check_allocated(a);
    Device &d = device(a->device);
    d.live.erase(std::find(d.live.begin(), d.live.end(), a));
    d.used -= round_up(a->bytes, grain);
    d.freed += a->room;
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) {
    QVL_EMU_API;
    if (cudaError_t e = unsafe_in_capture()) return result(e);
    *p = nullptr;
    if (!bytes) return cudaSuccess;
    device(current_device());
    *p = malloc(bytes);
    if (!*p) return result(cudaErrorMemoryAllocation);
    memset(*p, 0xff, bytes);
    pinned[static_cast<char *>(*p)] = bytes;
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }

cudaError_t cudaFreeHost(void *p) {
    QVL_EMU_API;
    if (cudaError_t e = unsafe_in_capture()) return result(e);
    if (!p) return cudaSuccess;
    if (!pinned.count(static_cast<char *>(p))) fail("cudaFreeHost: not pinned memory: %s", describe(p).c_str());
    for (int d = 0; d < device_count(); d++) drain(d);
    pinned.erase(static_cast<char *>(p));
    free(p);
    return cudaSuccess;
}

/* ---- copies ---- */

static Rect rect(const void *p, size_t pitch) { return Rect{const_cast<char *>(static_cast<const char *>(p)), pitch}; }

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    QVL_EMU_API;
    return on_stream(stream, [&](Stream *s) { return copy(rect(to, bytes), rect(from, bytes), bytes, 1, kind, s, false, "cudaMemcpyAsync"); });
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    QVL_EMU_API;
    return on_stream(nullptr, [&](Stream *s) { return copy(rect(to, bytes), rect(from, bytes), bytes, 1, kind, s, true, "cudaMemcpy"); });
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows, cudaMemcpyKind kind, cudaStream_t stream) {
    QVL_EMU_API;
    return on_stream(stream, [&](Stream *s) { return copy(rect(to, to_pitch), rect(from, from_pitch), width, rows, kind, s, false, "cudaMemcpy2DAsync"); });
}
cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows, cudaMemcpyKind kind) {
    QVL_EMU_API;
    return on_stream(nullptr, [&](Stream *s) { return copy(rect(to, to_pitch), rect(from, from_pitch), width, rows, kind, s, true, "cudaMemcpy2D"); });
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t stream) {
    QVL_EMU_API;
    need_device_memory(to, bytes, to_device, "cudaMemcpyPeerAsync", "the destination");
    need_device_memory(from, bytes, from_device, "cudaMemcpyPeerAsync", "the source");
    return on_stream(stream, [&](Stream *s) { return copy(rect(to, bytes), rect(from, bytes), bytes, 1, cudaMemcpyDeviceToDevice, s, false, "cudaMemcpyPeerAsync"); });
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    QVL_EMU_API;
    return on_stream(stream, [&](Stream *s) { return set(p, value, bytes, s, "cudaMemsetAsync"); });
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) { /* asynchronous to the host for device memory, as in CUDA */
    QVL_EMU_API;
    return on_stream(nullptr, [&](Stream *s) { return set(p, value, bytes, s, "cudaMemset"); });
}
