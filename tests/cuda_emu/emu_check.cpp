/* emu_check.cpp - races, bounds, alignment and uninitialised reads of kernels compiled with -fsanitize=thread.
 *
 * Job:        the __tsan_* functions that such code calls, over our own record of who read and wrote what.
 * Input:      every load and store of a kernel; barriers, __syncwarp, atomics; copies and library calls as ranges;
 *             for each operation, which others end before it starts.
 * Output:     the first misuse, named with both sides; host code passes unchecked.
 * Invariants: two accesses of which one writes are ordered by a barrier, by __syncwarp within a warp, or by streams, events
 *             and host waits between operations, and by nothing else; shuffles, mma and votes order nothing;
 *             a record may be lost (the read of an older operation, bytes of a pair), none is invented.
 */
#include <stdio.h>
#include <sys/mman.h>
#include <algorithm>
#include <map>

#include "emu.h"

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end; /* the module that kernels are in */

namespace qvl_emu {
namespace {

constexpr size_t unit = 2, page = 4096, cells_per_page = page / unit;
constexpr uint32_t thread_bits = 10, nobody = 0xffffffffu;
enum : uint8_t { pending = 4, atomic_write = 8 };         /* state, above the two bits of initialised bytes */
enum : uint8_t { one, some_lanes, some_threads, some_blocks }; /* who read */

struct Cell { /* of two bytes */
    uint32_t w_op, w_who, w_tick;         /* the last write: operation, block and thread, that thread's time */
    uint32_t r_op, r_who, r_tick, r_lanes; /* the reads since */
    uint8_t w_bytes, r_bytes, readers, state;
};
static_assert(sizeof(Cell) == 32);
struct Page { /* of device memory: accesses that cover it whole */
    uint32_t w_op, r_op;
    bool cells; /* records of parts of it exist */
};

struct Shadow {
    char *base;
    Cell *cells;
    Page *pages;
};
std::vector<Shadow> shadows;
Cell shared_cells[(max_shared + 2 * page) / unit];
Allocation cached; /* the last one that was accessed */
int cached_device = -1;

struct Named {
    uint32_t lane, number;
    const char *name;
};
std::vector<Named> operations(1); /* 0: none */
const Done *current;
uint32_t current_op;

/* Time within a block: a counter that every barrier and warp barrier moves on. */
uint32_t tick, barrier_tick, epoch[max_threads], seen[max_threads][warp_lanes];

uint32_t who(int thread) { return running.block_number << thread_bits | (uint32_t)thread; }

bool op_before(uint32_t op) { /* does it end before the current one starts? */
    if (!op || !current) return true;
    const Named &o = operations[op];
    return o.lane < current->before.size() && current->before[o.lane] >= o.number;
}
bool same_block(uint32_t w) { return w >> thread_bits == running.block_number; }
bool thread_before(uint32_t w, uint32_t time, int me) {
    int other = (int)(w & ((1u << thread_bits) - 1));
    if (!same_block(w)) return false;
    return time < barrier_tick || other == me || (other / warp_lanes == me / warp_lanes && time <= seen[me][other % warp_lanes]);
}
bool write_before(const Cell &c, int me) { return c.w_op != current_op ? op_before(c.w_op) : me >= 0 && thread_before(c.w_who, c.w_tick, me); }
bool reads_before(const Cell &c, int me) {
    if (c.r_op != current_op) return op_before(c.r_op);
    if (me < 0) return false;
    if (c.readers == one) return thread_before(c.r_who, c.r_tick, me);
    if (c.readers == some_blocks || !same_block(c.r_who)) return false;
    if (c.r_tick < barrier_tick) return true;
    int first = (int)(c.r_who & ((1u << thread_bits) - 1)) / warp_lanes * warp_lanes;
    if (c.readers == some_threads || first != me / warp_lanes * warp_lanes) return false;
    for (int l = 0; l < warp_lanes; l++)
        if (c.r_lanes >> l & 1u && first + l != me && c.r_tick > seen[me][l]) return false;
    return true;
}

std::string author(uint32_t op, uint32_t w, bool many) {
    if (op != current_op) return std::string(operations[op].name) + ", which neither stream order nor an event puts before this";
    if (many) return "several threads";
    uint32_t b = w >> thread_bits;
    std::string block = same_block(w) ? "" : " of block (" + std::to_string(b % gridDim.x) + "," + std::to_string(b / gridDim.x % gridDim.y) + "," + std::to_string(b / gridDim.x / gridDim.y) + ")";
    return "thread " + thread_name((int)(w & ((1u << thread_bits) - 1))) + block;
}

std::string where(const void *p) {
    if (p >= shared_window() && p < shared_window() + shared_window_bytes())
        return "byte " + std::to_string(static_cast<const char *>(p) - running.shared) + " of shared memory";
    return "global memory at " + describe(p);
}

[[noreturn]] void race(const void *p, bool write, int me, const char *before, uint32_t op, uint32_t w, bool many) {
    if (me >= 0) running.thread = me;
    fail("race: %s %s %s; %s by %s", current ? operations[current_op].name : "the host", write ? "writes" : "reads", where(p).c_str(), before, author(op, w, many).c_str());
}

void note_read(Cell &c, uint8_t bytes, int me) {
    uint32_t mine = who(me), now = epoch[me];
    bool replace = c.r_op != current_op || !(c.r_bytes & bytes);
    if (!replace && c.readers == one) replace = c.r_who == mine || thread_before(c.r_who, c.r_tick, me);
    if (!replace && c.readers != some_blocks) replace = same_block(c.r_who) && c.r_tick < barrier_tick;
    if (replace) {
        c.r_op = current_op;
        c.r_who = mine;
        c.r_tick = now;
        c.r_lanes = 1u << me % warp_lanes;
        c.r_bytes = bytes;
        c.readers = one;
        return;
    }
    uint8_t group = !same_block(c.r_who) ? some_blocks : (c.r_who & 1023u) / warp_lanes == (uint32_t)me / warp_lanes ? some_lanes : some_threads;
    c.readers = std::max(c.readers, group);
    c.r_tick = std::max(c.r_tick, now);
    c.r_lanes |= 1u << me % warp_lanes;
    c.r_bytes |= bytes;
}

void note_write(Cell &c, uint8_t bytes, uint32_t w, uint32_t time, uint8_t state) {
    c.w_op = current_op;
    c.w_who = w;
    c.w_tick = time;
    c.w_bytes = bytes;
    c.state = (uint8_t)((c.state & 3) | bytes | state);
    if ((c.r_bytes & ~bytes) == 0) c.r_op = 0;
}

/* One access to one cell; at: where the cell's first byte is. */
void access_cell(Cell &c, const char *at, uint8_t bytes, bool write, bool atomic, int me) {
    bool overlaps_write = c.w_op && (c.w_bytes & bytes);
    if (overlaps_write && !(atomic && c.state & atomic_write && c.w_op == current_op) && !write_before(c, me)) race(at, write, me, "written", c.w_op, c.w_who, c.w_who == nobody);
    if (write && c.r_op && (c.r_bytes & bytes) && !reads_before(c, me)) race(at, write, me, "read", c.r_op, c.r_who, c.readers != one || c.r_who == nobody);
    if (write)
        note_write(c, bytes, me < 0 ? nobody : who(me), me < 0 ? 0 : epoch[me], atomic ? atomic_write : 0);
    else if (me >= 0)
        note_read(c, bytes, me);
    else {
        c.r_op = current_op;
        c.r_who = nobody;
        c.r_bytes = 3;
        c.readers = some_blocks;
    }
}

template <class F> void each_cell(Cell *cells, const char *base, const char *p, size_t bytes, F fn) {
    for (const char *end = p + bytes; p < end;) {
        size_t i = (size_t)(p - base) / unit, first = (size_t)(p - base) % unit;
        uint8_t mask = (uint8_t)(first ? 2 : end - p > 1 ? 3 : 1);
        fn(cells[i], base + i * unit, mask);
        p = base + (i + 1) * unit;
    }
}

Shadow &shadow_of(const void *p) {
    char *base;
    size_t bytes;
    size_t d = (size_t)address_range(p, &base, &bytes);
    if (shadows.size() <= d) shadows.resize(d + 1);
    Shadow &s = shadows[d];
    if (!s.base) { /* address ranges; what is not touched takes no memory */
        auto reserve = [](size_t n) {
            void *m = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (m == MAP_FAILED) fail("no address range of %zu GiB for the checker: make QVL_EMU_MEMORY smaller", n >> 30);
            return m;
        };
        s.cells = static_cast<Cell *>(reserve(bytes / unit * sizeof(Cell)));
        s.pages = static_cast<Page *>(reserve(bytes / page * sizeof(Page)));
        s.base = base;
    }
    return s;
}

void access_shared(const char *p, size_t bytes, bool write, bool atomic, int me) {
    if (p < running.shared || p + bytes > running.shared + running.shared_bytes)
        fail("out of bounds: %s %zu bytes at byte %td of %zu bytes of shared memory", write ? "writes" : "reads", bytes, p - running.shared, running.shared_bytes);
    char *origin = running.shared + (running.shared_bytes + 15) / 16 * 16 - (max_shared + page) / unit * unit; /* cells go by distance from the end */
    each_cell(shared_cells, origin, p, bytes, [&](Cell &c, const char *at, uint8_t mask) {
        if (c.w_op != current_op || !same_block(c.w_who)) c.w_op = 0, c.state = 0; /* another block's */
        if (c.r_op != current_op || !same_block(c.r_who)) c.r_op = 0;
        if (c.state & pending)
            fail("%s %s, the destination of an asynchronous copy of thread %s that was not waited for", write ? "writes" : "reads", where(at).c_str(),
                 thread_name((int)(c.w_who & 1023u)).c_str());
        if ((!write || atomic) && (c.state & mask) != mask) fail("uninitialised: reads %s, which no thread of the block wrote", where(at).c_str());
        access_cell(c, at, mask, write, atomic, me);
    });
}

void access_global(const char *p, size_t bytes, bool write, bool atomic, int me) {
    if (cached_device < 0 || p < cached.start || p + bytes > cached.start + cached.bytes) {
        const Allocation *a = find_allocation(p);
        if (!a || !a->live || p + bytes > a->start + a->bytes) fail("out of bounds: %s %zu bytes at %s", write ? "writes" : "reads", bytes, describe(p).c_str());
        cached = *a;
        cached_device = a->device;
    }
    if (cached.device != running.device) fail("wrong device: a kernel on device %d %s %s", running.device, write ? "writes" : "reads", describe(p).c_str());
    Shadow &s = shadow_of(p);
    Page &page_of = s.pages[(size_t)(p - s.base) / page];
    page_of.cells = true;
    if (!op_before(page_of.w_op)) race(p, write, me, "written", page_of.w_op, nobody, true);
    if (write && !op_before(page_of.r_op)) race(p, write, me, "read", page_of.r_op, nobody, true);
    each_cell(s.cells, s.base, p, bytes, [&](Cell &c, const char *at, uint8_t mask) { access_cell(c, at, mask, write, atomic, me); });
}

void access(const void *pointer, size_t bytes, bool write, bool atomic, int me) {
    auto *p = static_cast<const char *>(pointer);
    int was = running.thread;
    running.thread = me; /* for messages */
    if (p >= shared_window() && p < shared_window() + shared_window_bytes())
        access_shared(p, bytes, write, atomic, me);
    else if (in_device_memory(p))
        access_global(p, bytes, write, atomic, me);
    else if (p >= running.stacks && p < running.stacks + max_threads * stack_bytes)
        fail("%s a variable of thread %s", write ? "writes" : "reads", thread_name((int)((size_t)(p - running.stacks) / stack_bytes)).c_str());
    else if (!is_pinned(p, bytes)) {
        bool argument = p >= running.args && p + bytes <= static_cast<const char *>(running.args) + running.args_bytes;
        bool constant = p >= &__ehdr_start && p < &_end;
        if (write || (!argument && !constant)) fail("a kernel %s host memory: %s", write ? "writes" : "reads", describe(p).c_str());
    }
    running.thread = was;
}

} // namespace

void check_access(const void *p, size_t bytes, bool write, int thread) { access(p, bytes, write, false, thread); }
void check_atomic(void *p, size_t bytes) { access(p, bytes, true, true, running.thread); }

void check_async_issue(const void *shared, int thread) {
    access(shared, 16, true, false, thread);
    char *origin = running.shared + (running.shared_bytes + 15) / 16 * 16 - (max_shared + page) / unit * unit;
    each_cell(shared_cells, origin, static_cast<const char *>(shared), 16, [](Cell &c, const char *, uint8_t) { c.state |= pending; });
}
void check_async_land(const void *shared, int thread) {
    char *origin = running.shared + (running.shared_bytes + 15) / 16 * 16 - (max_shared + page) / unit * unit;
    each_cell(shared_cells, origin, static_cast<const char *>(shared), 16, [&](Cell &c, const char *, uint8_t) { note_write(c, 3, who(thread), epoch[thread], 0); });
}

void check_block_start() {
    tick = barrier_tick = 1;
    std::fill(epoch, epoch + running.threads, 1u);
    memset(seen, 0, sizeof seen[0] * (size_t)running.threads);
    if (running.block_number >> (32 - thread_bits)) fail("more than 4 million blocks");
}
void check_block_barrier() {
    barrier_tick = ++tick;
    std::fill(epoch, epoch + running.threads, tick);
}
void check_warp_sync(int warp, unsigned lanes) {
    uint32_t joined[warp_lanes] = {};
    int first = warp * warp_lanes;
    for (int t = 0; t < warp_lanes; t++) {
        if (!(lanes >> t & 1u)) continue;
        joined[t] = std::max(joined[t], epoch[first + t]);
        for (int l = 0; l < warp_lanes; l++) joined[l] = std::max(joined[l], seen[first + t][l]);
    }
    ++tick;
    for (int t = 0; t < warp_lanes; t++) {
        if (!(lanes >> t & 1u)) continue;
        memcpy(seen[first + t], joined, sizeof joined);
        epoch[first + t] = tick;
    }
}

void check_operation(const Done *op, const char *name) {
    static std::map<std::string, bool> names;
    current = op;
    if (!op) return;
    current_op = (uint32_t)operations.size();
    operations.push_back(Named{op->lane, op->number, names.emplace(name, true).first->first.c_str()});
}

void check_allocated(const Allocation *a) {
    cached_device = -1;
    Shadow &s = shadow_of(a->start);
    size_t first = (size_t)(a->start - s.base), last = first + a->room; /* multiples of 512, whose cells fill pages */
    madvise(s.cells + first / unit, a->room / unit * sizeof(Cell), MADV_DONTNEED);
    for (size_t i = first / page; i < (last + page - 1) / page; i++) {
        bool whole = i * page >= first && (i + 1) * page <= last;
        if (whole) s.pages[i] = Page{};
    }
}

void check_range(const void *pointer, size_t bytes, bool write) {
    auto *p = static_cast<const char *>(pointer);
    if (!in_device_memory(p) || !current) return;
    Shadow &s = shadow_of(p);
    for (size_t at = (size_t)(p - s.base), end = at + bytes; at < end;) {
        size_t i = at / page, next = std::min(end, (i + 1) * page);
        Page &g = s.pages[i];
        const char *here = s.base + at;
        if (!op_before(g.w_op) && g.w_op != current_op) race(here, write, -1, "written", g.w_op, nobody, true);
        if (write && !op_before(g.r_op) && g.r_op != current_op) race(here, write, -1, "read", g.r_op, nobody, true);
        bool whole = next - at == page;
        if (g.cells || !whole) {
            g.cells = true;
            each_cell(s.cells, s.base, here, next - at, [&](Cell &c, const char *cell, uint8_t mask) {
                if (c.w_op && c.w_op != current_op && (c.w_bytes & mask) && !op_before(c.w_op)) race(cell, write, -1, "written", c.w_op, c.w_who, c.w_who == nobody);
                if (write && c.r_op && c.r_op != current_op && (c.r_bytes & mask) && !op_before(c.r_op)) race(cell, write, -1, "read", c.r_op, c.r_who, true);
                if (whole) return;
                if (write)
                    note_write(c, mask, nobody, 0, 0);
                else {
                    c.r_op = current_op;
                    c.r_who = nobody;
                    c.r_bytes = 3;
                    c.readers = some_blocks;
                }
            });
        }
        if (whole && write) {
            if (g.cells) memset(static_cast<void *>(s.cells + i * cells_per_page), 0, cells_per_page * sizeof(Cell));
            g = Page{current_op, 0, false};
        } else if (whole)
            g.r_op = current_op;
        at = next;
    }
}

} // namespace qvl_emu

/* ---- what instrumented code calls ---- */

using namespace qvl_emu;

static inline void seen_by_compiler(const void *code, const void *p, size_t bytes, bool write, bool aligned) {
    auto *frame = static_cast<char *>(__builtin_frame_address(0));
    if (!running.kernel || frame < running.stacks || frame >= running.stacks + max_threads * stack_bytes) return; /* host code */
    char *own = running.stacks + (size_t)running.thread * stack_bytes;
    if (p >= own && p < own + stack_bytes) return;
    if (aligned && (uintptr_t)p % bytes) fail("misaligned: %s %zu bytes at %p, in %s", write ? "writes" : "reads", bytes, p, where(p).c_str());
    check_access(p, bytes, write, running.thread);
    count_access(code, p, bytes, write, running.thread);
}

#define HERE __builtin_return_address(0)
#pragma GCC visibility push(hidden)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void *, void *) {}
void __tsan_vptr_read(void *) {}
void __tsan_read_range(void *p, size_t n) { seen_by_compiler(HERE, p, n, false, false); }
void __tsan_write_range(void *p, size_t n) { seen_by_compiler(HERE, p, n, true, false); }
void __tsan_read1(void *p) { seen_by_compiler(HERE, p, 1, false, false); }
void __tsan_write1(void *p) { seen_by_compiler(HERE, p, 1, true, false); }
#define SIZES(n)                                                                   \
    void __tsan_read##n(void *p) { seen_by_compiler(HERE, p, n, false, true); }          \
    void __tsan_write##n(void *p) { seen_by_compiler(HERE, p, n, true, true); }          \
    void __tsan_unaligned_read##n(void *p) { seen_by_compiler(HERE, p, n, false, false); } \
    void __tsan_unaligned_write##n(void *p) { seen_by_compiler(HERE, p, n, true, false); }
SIZES(2) SIZES(4) SIZES(8) SIZES(16)
#undef SIZES

/* Host code's atomics: done, in the strongest order. */
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
#define FETCH(bits, T, op) \
    T __tsan_atomic##bits##_fetch_##op(volatile T *p, T v, int) { return __atomic_fetch_##op(p, v, __ATOMIC_SEQ_CST); }
#define ATOMICS(bits, T)                                                                                                       \
    T __tsan_atomic##bits##_load(const volatile T *p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }                    \
    void __tsan_atomic##bits##_store(volatile T *p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }                    \
    T __tsan_atomic##bits##_exchange(volatile T *p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }          \
    FETCH(bits, T, add) FETCH(bits, T, sub) FETCH(bits, T, and) FETCH(bits, T, or) FETCH(bits, T, xor) FETCH(bits, T, nand)    \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T *p, T *e, T v, int, int) {                                    \
        return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                \
    }                                                                                                                          \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile T *p, T *e, T v, int, int) {                                      \
        return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                \
    }
ATOMICS(8, uint8_t) ATOMICS(16, uint16_t) ATOMICS(32, uint32_t) ATOMICS(64, uint64_t)
}
#pragma GCC visibility pop
