/* emu_count.cpp - how the accesses of kernels fall on memory: sectors for each request, conflicts of banks. Check build only.
 *
 * Job:        the accesses that the lanes of a warp make at the same place of the program for the same time are one request.
 * Input:      QVL_EMU_COUNT=file; every load, store, asynchronous copy and ldmatrix of a kernel, with its code address.
 * Output:     a line for each kernel and grid, appended to the file when the process ends: where the kernel is in its library, grid, launches,
 *             bytes of the sectors that a launch touches, each once; then requests, sectors and the fewest sectors that the same bytes
 *             could take, of global loads and stores; requests, cycles and fewest cycles of shared memory.
 * Invariants: these are counts under emulation: the compiler of a GPU may join or split accesses. Global memory moves in sectors of
 *             32 bytes. Shared memory has 32 banks of 4 bytes; requests of 8 and 16 bytes a lane go in 2 and 4 parts.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <algorithm>
#include <map>
#include <set>
#include <unordered_set>

#include "emu.h"

namespace qvl_emu {
namespace {

struct Space {
    uint64_t requests = 0, cost = 0, least = 0;
};
struct Counts {
    uint64_t launches = 0, sectors = 0;
    Space load, store, shared;
};
struct Access {
    const char *p;
    int lane;
};
struct Request {
    size_t bytes;
    bool write, global;
    std::vector<Access> lanes;
};
using Code = std::pair<const void *, int>;  /* an asynchronous copy is two accesses at the same place: 0 to 3 for global or shared, load or store */
using Place = std::pair<Code, uint32_t>;    /* and how many times the thread was there before */

std::map<std::string, Counts> kernels;
std::unordered_set<uintptr_t> touched; /* sectors of this launch */
Counts *counting;
std::map<Place, Request> open_requests[max_threads / warp_lanes];
std::map<Code, uint32_t> times[max_threads];

const char *file() {
    static const char *f = getenv("QVL_EMU_COUNT");
    return f;
}

/* Distinct pieces of size bytes that an access touches, into set. */
void pieces(std::set<uintptr_t> &set, const char *p, size_t bytes, size_t size) {
    for (uintptr_t at = (uintptr_t)p / size; at <= ((uintptr_t)p + bytes - 1) / size; at++) set.insert(at);
}

void add_global(Space &s, const Request &r) {
    std::set<uintptr_t> sectors, bytes;
    for (const Access &a : r.lanes) {
        pieces(sectors, a.p, r.bytes, 32);
        pieces(bytes, a.p, r.bytes, 1);
    }
    touched.insert(sectors.begin(), sectors.end());
    s.requests++;
    s.cost += sectors.size();
    s.least += (bytes.size() + 31) / 32;
}

/* A part of a request goes in as many cycles as the fullest bank has different words. */
void add_shared(Space &s, const Request &r) {
    size_t parts = r.bytes <= 4 ? 1 : r.bytes / 4, lanes = (size_t)warp_lanes / parts;
    s.requests++;
    for (size_t part = 0; part < parts; part++) {
        std::set<uintptr_t> words;
        for (const Access &a : r.lanes)
            if ((size_t)a.lane / lanes == part) pieces(words, a.p, r.bytes, 4);
        if (words.empty()) continue;
        uint64_t banks[32] = {}, fullest = 0;
        for (uintptr_t w : words) fullest = std::max(fullest, ++banks[w % 32]);
        s.cost += fullest;
        s.least += (words.size() + 31) / 32;
    }
}

void flush() {
    Counts &c = *counting;
    for (auto &warp : open_requests) {
        for (auto &[place, r] : warp) {
            if (r.global) add_global(r.write ? c.store : c.load, r);
            else add_shared(c.shared, r);
        }
        warp.clear();
    }
    for (int t = 0; t < running.threads; t++) times[t].clear();
}

struct Report {
    ~Report() {
        FILE *f = file() && !kernels.empty() ? fopen(file(), "a") : nullptr;
        if (!f) return;
        for (auto &[name, c] : kernels) {
            fprintf(f, "%s\t%llu\t%llu", name.c_str(), (unsigned long long)c.launches, (unsigned long long)(c.sectors * 32 / c.launches));
            for (const Space *s : {&c.load, &c.store, &c.shared})
                fprintf(f, "\t%llu\t%llu\t%llu", (unsigned long long)s->requests, (unsigned long long)s->cost, (unsigned long long)s->least);
            fprintf(f, "\n");
        }
        fclose(f);
    }
} report;

} // namespace

void count_access(const void *code, const void *p, size_t bytes, bool write, int thread) {
    if (!file()) return;
    bool shared = p >= shared_window() && p < shared_window() + shared_window_bytes();
    if (!shared && !in_device_memory(p)) return; /* arguments and constants */
    Code at = {code, shared * 2 + write};
    Request &r = open_requests[thread / warp_lanes][{at, times[thread][at]++}];
    r.bytes = bytes, r.write = write, r.global = !shared;
    r.lanes.push_back({static_cast<const char *>(p), thread % warp_lanes});
}

void count_launch(const Kernel &k, dim3 grid) {
    if (!file()) return;
    Dl_info so;
    char name[100];
    if (!dladdr(k.function, &so)) so.dli_fbase = nullptr;
    snprintf(name, sizeof name, "%zx\t%ux%ux%u", (size_t)(static_cast<const char *>(k.function) - static_cast<const char *>(so.dli_fbase)), grid.x, grid.y, grid.z);
    counting = &kernels[name];
    counting->launches++;
}
void count_end() {
    if (!file()) return;
    counting->sectors += touched.size();
    touched.clear();
}
void count_barrier() {
    if (file()) flush();
}

} // namespace qvl_emu
