/* emu_core.cpp - one block of CUDA threads as fibers.
 *
 * Job:        runs a grid block by block; barriers, warp collectives, asynchronous copies, mma and ldmatrix models.
 * Input:      a kernel and its arguments from the runtime; calls of the kernel's threads through cuda_emu.h.
 * Output:     the kernel's effects; or a message that names kernel, block, thread and reason, and abort.
 * Invariants: blocks run in random order, threads of a block in random order (QVL_EMU_SEED), each until its next
 *             collective; the last thread that a collective waits for computes it for all; shared memory starts as 0xFF
 *             and ends at an inaccessible page; the destination of an asynchronous copy is 0xFF until its thread waits.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <numeric>

#include "emu.h"

#pragma GCC visibility push(hidden)
/* The variables that the toolkit's header declares const: constant for a thread, not for the emulator. */
uint3 now_thread __asm__("threadIdx"), now_block __asm__("blockIdx");
dim3 now_block_size __asm__("blockDim"), now_grid __asm__("gridDim");
int now_warp_size __asm__("warpSize") = 32;
#pragma GCC visibility pop

__asm__(".text\n.hidden qvl_emu_switch\n.globl qvl_emu_switch\n.type qvl_emu_switch, @function\n"
        "qvl_emu_switch:\n" /* (void **save_sp, void *load_sp): the registers that a call preserves, and the stack */
        "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
        "  mov %rsp, (%rdi)\n  mov %rsi, %rsp\n"
        "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n  ret\n"
        ".size qvl_emu_switch, .-qvl_emu_switch\n");
extern "C" void qvl_emu_switch(void **save_sp, void *load_sp);

namespace qvl_emu {

Running running;

namespace {

enum class Op { none, barrier, syncwarp, vote, shuffle, mma, ldmatrix };
const char *const op_names[] = {"running", "__syncthreads", "__syncwarp", "a warp vote", "a shuffle", "mma", "ldmatrix"};

struct Copy { /* an asynchronous copy on its way */
    char *to;
    const char *from; /* null: zeros, or early */
    bool early;       /* the source was read when the copy was issued; else it is read when it lands */
    uint32_t group;
    char data[16];
};

struct Fiber {
    void *sp;
    Op op; /* what it waits in */
    Site at;
    bool done;
    unsigned mask;
    int how, lane, width, value;
    uint32_t word, result;
    const void *a, *b;
    float *d;
    uint32_t *r;
    uint32_t groups; /* committed groups of asynchronous copies */
    std::vector<Copy> copies;
};

Fiber fibers[max_threads];
struct Warp {
    uint32_t ready, alive, waiting; /* lanes; waiting: in a warp collective */
} warps[max_threads / warp_lanes];
uint32_t ready_warps;
int warp_order[max_threads / warp_lanes];
bool one_warp_first; /* how this block is scheduled: warp after warp as far as it goes, or all mixed */
int warp_count, live, at_barrier;
void *main_sp;
const Kernel *kernel;
char *window;
constexpr size_t page = 4096, guard = 64 << 10, shared_room = (max_shared + page - 1) / page * page;

Warp &warp_of(int thread) { return warps[thread / warp_lanes]; }
uint32_t bit_of(int thread) { return 1u << thread % warp_lanes; }
void set_ready(int thread) {
    warp_of(thread).ready |= bit_of(thread);
    ready_warps |= 1u << thread / warp_lanes;
    fibers[thread].op = Op::none;
}
void clear_ready(int thread) {
    Warp &w = warp_of(thread);
    w.ready &= ~bit_of(thread);
    if (!w.ready) ready_warps &= ~(1u << thread / warp_lanes);
}
int random_bit(uint32_t set) {
    if (!(set & (set - 1))) return __builtin_ctz(set);
    for (unsigned skip = random_below((unsigned)__builtin_popcount(set)); skip; skip--) set &= set - 1;
    return __builtin_ctz(set);
}

int pick() { /* a thread that can run, -1 if none can */
    if (!ready_warps) return -1;
    int w;
    if (one_warp_first) {
        int i = 0;
        while (!(ready_warps >> warp_order[i] & 1u)) i++;
        w = warp_order[i];
    } else
        w = random_bit(ready_warps);
    return w * warp_lanes + random_bit(warps[w].ready);
}

std::string place(const Fiber &f) { return f.op == Op::none ? "elsewhere" : std::string(op_names[(int)f.op]) + " at " + f.at.file + ":" + std::to_string(f.at.line); }
bool same_site(const Site &a, const Site &b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

[[noreturn]] void deadlock() {
    int waits = -1, other = -1;
    for (int t = 0; t < running.threads; t++) {
        if (fibers[t].done) continue;
        if (waits < 0)
            waits = t;
        else if (other < 0 && (fibers[t].op != fibers[waits].op || !same_site(fibers[t].at, fibers[waits].at)))
            other = t;
    }
    const Fiber &f = fibers[waits];
    running.thread = waits;
    std::string others = other < 0 ? "" : "; thread " + thread_name(other) + " waits in " + place(fibers[other]);
    if (f.op == Op::barrier && (other < 0 || fibers[other].op == Op::barrier)) fail("deadlock: waits in %s", place(f).c_str());
    char mask[32];
    snprintf(mask, sizeof mask, "0x%08x", f.op == Op::barrier && other >= 0 ? fibers[other].mask : f.mask);
    fail("divergence: waits in %s for threads that do not come (mask %s)%s", place(f).c_str(), mask, others.c_str());
}

/* Leaves the running thread for one that can run; comes back when it is chosen again. */
void go_on() {
    int self = running.thread, next = pick();
    if (next < 0) deadlock();
    if (next == self) return;
    running.thread = next;
    now_thread = uint3{(unsigned)next % now_block_size.x, (unsigned)next / now_block_size.x % now_block_size.y, (unsigned)next / now_block_size.x / now_block_size.y};
    qvl_emu_switch(&fibers[self].sp, fibers[next].sp);
}

void release_barrier() {
    int first = -1, count = 0;
    for (int t = 0; t < running.threads; t++) {
        Fiber &f = fibers[t];
        if (f.done) continue;
        if (first < 0) first = t;
        if (!same_site(f.at, fibers[first].at))
            fail("divergent barrier: thread %s waits at %s:%d, thread %s at %s:%d", thread_name(first).c_str(), fibers[first].at.file, fibers[first].at.line,
                 thread_name(t).c_str(), f.at.file, f.at.line);
        count += f.value != 0;
    }
    for (int t = 0; t < running.threads; t++) {
        Fiber &f = fibers[t];
        if (f.done) continue;
        f.result = (uint32_t)(f.how == (int)Vote::count ? count : f.how == (int)Vote::andd ? count == live : count != 0);
        set_ready(t);
    }
    at_barrier = 0;
    check_block_barrier();
    count_barrier();
}

int shuffle_source(const Fiber &f, int lane) {
    int start = lane & ~(f.width - 1), end = start + f.width - 1, from = lane;
    switch ((Shuffle)f.how) {
    case Shuffle::idx: return start | (f.lane & (f.width - 1));
    case Shuffle::up: from = lane - f.lane; return from < start ? lane : from;
    case Shuffle::down: from = lane + f.lane; return from > end ? lane : from;
    case Shuffle::xorr: from = lane ^ f.lane; return from > end ? lane : from;
    }
    return lane;
}

float wide(uint32_t pair, int high) { return bits<float>(high ? pair & 0xffff0000u : pair << 16); }

/* Lane l holds rows l/4 and l/4 + 8 of A and D and column l/4 of B, at columns (rows of B) 2 (l%4) and the next, and these + 8. */
void compute_mma(const Fiber *f) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; l++) {
        auto *fa = static_cast<const uint32_t *>(f[l].a), *fb = static_cast<const uint32_t *>(f[l].b);
        int g = l / 4, k = l % 4 * 2;
        for (int i = 0; i < 4; i++)
            for (int h = 0; h < 2; h++) a[g + i % 2 * 8][k + i / 2 * 8 + h] = wide(fa[i], h);
        for (int i = 0; i < 2; i++)
            for (int h = 0; h < 2; h++) b[k + i * 8 + h][g] = wide(fb[i], h);
    }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            int row = l / 4 + i / 2 * 8, col = l % 4 * 2 + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][col];
            f[l].d[i] += sum;
        }
}

/* Lane l receives of each of the four 8 x 8 matrices the pair (row l/4, columns 2 (l%4), + 1); transposed: of its transpose. */
void compute_ldmatrix(const Fiber *f, int first_thread) {
    uint16_t m[4][8][8];
    for (int l = 0; l < 32; l++) {
        auto *row = static_cast<const char *>(f[l].a);
        if ((uintptr_t)row % 16) fail("ldmatrix: the row address of lane %d is not a multiple of 16", l);
        if (row < running.shared || row + 16 > running.shared + running.shared_bytes)
            fail("ldmatrix: the row of lane %d is outside shared memory, at byte %td of %zu", l, row - running.shared, running.shared_bytes);
        check_access(row, 16, false, first_thread + l);
        memcpy(m[l / 8][l % 8], row, 16);
    }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            int r = l / 4, c = l % 4 * 2;
            f[l].r[i] = f[l].how ? m[i][c][r] | (uint32_t)m[i][c + 1][r] << 16 : m[i][r][c] | (uint32_t)m[i][r][c + 1] << 16;
        }
}

/* If all living lanes of the mask are there, the collective happens. */
void complete(int warp, unsigned mask) {
    Warp &w = warps[warp];
    unsigned group = mask & w.alive;
    if (!group || (w.waiting & group) != group) return;
    int first_thread = warp * warp_lanes, first = -1, votes = 0;
    Fiber *f = fibers + first_thread;
    unsigned ballot = 0;
    for (int l = 0; l < 32; l++) {
        if (!(group >> l & 1u)) continue;
        if (first < 0) first = l;
        if (f[l].mask != f[first].mask || f[l].op != f[first].op || !same_site(f[l].at, f[first].at))
            fail("divergent warp: lane %d is in %s with mask 0x%08x, lane %d in %s with mask 0x%08x", first, place(f[first]).c_str(), f[first].mask, l,
                 place(f[l]).c_str(), f[l].mask);
        if (f[l].value) ballot |= 1u << l, votes++;
    }
    if ((f[first].op == Op::mma || f[first].op == Op::ldmatrix) && group != 0xffffffffu)
        fail("%s needs all 32 lanes of the warp; lanes 0x%08x are there", place(f[first]).c_str(), group);
    if (f[first].op == Op::shuffle)
        for (int l = 0; l < 32; l++) {
            if (!(group >> l & 1u)) continue;
            int from = shuffle_source(f[l], l);
            if (!(group >> from & 1u))
                fail("%s: lane %d reads lane %d, which %s (mask 0x%08x)", place(f[l]).c_str(), l, from, mask >> from & 1u ? "has ended" : "the mask does not name", mask);
            f[l].result = f[from].word;
        }
    if (f[first].op == Op::mma) compute_mma(f);
    if (f[first].op == Op::ldmatrix) compute_ldmatrix(f, first_thread);
    if (f[first].op == Op::syncwarp) check_warp_sync(warp, group);
    for (int l = 0; l < 32; l++) {
        if (!(group >> l & 1u)) continue;
        if (f[l].op == Op::vote)
            f[l].result = f[l].how == (int)Vote::ballot ? ballot : f[l].how == (int)Vote::any ? ballot != 0 : ballot == group;
        set_ready(first_thread + l);
    }
    w.waiting &= ~group;
}

Fiber &collective(Op op, unsigned mask, Site at) {
    int t = running.thread;
    Fiber &f = fibers[t];
    f.op = op;
    f.at = at;
    f.mask = mask;
    f.value = 0;
    if (!(mask >> t % warp_lanes & 1u)) fail("%s: mask 0x%08x does not name the calling lane %d", place(f).c_str(), mask, t % warp_lanes);
    return f;
}
uint32_t meet(Fiber &f) {
    int t = running.thread;
    clear_ready(t);
    warp_of(t).waiting |= bit_of(t);
    complete(t / warp_lanes, f.mask);
    go_on();
    return f.result;
}

void thread_main() {
    kernel->invoke(kernel->args);
    int t = running.thread;
    Warp &w = warp_of(t);
    fibers[t].done = true;
    clear_ready(t);
    w.alive &= ~bit_of(t);
    live--;
    for (unsigned left = w.waiting; left; left &= left - 1) { /* whoever waited for this lane too */
        unsigned lane = (unsigned)__builtin_ctz(left);
        if (w.waiting >> lane & 1u) complete(t / warp_lanes, fibers[t / warp_lanes * warp_lanes + (int)lane].mask);
    }
    if (live && at_barrier == live) release_barrier();
    if (live) go_on();
    void *unused;
    qvl_emu_switch(&unused, main_sp);
}

void run_block() {
    int t = 0;
    live = running.threads;
    at_barrier = 0;
    ready_warps = 0;
    warp_count = (running.threads + warp_lanes - 1) / warp_lanes;
    one_warp_first = random64() & 1;
    for (int w = 0; w < warp_count; w++) {
        int other = (int)random_below((unsigned)w + 1);
        warp_order[w] = warp_order[other];
        warp_order[other] = w;
        warps[w] = Warp{0, 0, 0};
    }
    for (t = 0; t < running.threads; t++) {
        Fiber &f = fibers[t];
        void **top = reinterpret_cast<void **>(running.stacks + (size_t)(t + 1) * stack_bytes);
        *--top = nullptr; /* where a return address would be: keeps the alignment that a function expects */
        *--top = reinterpret_cast<void *>(thread_main);
        for (int r = 0; r < 6; r++) *--top = nullptr;
        f.sp = top;
        f.done = false;
        f.groups = 0;
        f.copies.clear();
        warp_of(t).alive |= bit_of(t);
        set_ready(t);
    }
    memset(running.shared, 0xff, running.shared_bytes);
    check_block_start();
    running.thread = pick();
    t = running.thread;
    now_thread = uint3{(unsigned)t % now_block_size.x, (unsigned)t / now_block_size.x % now_block_size.y, (unsigned)t / now_block_size.x / now_block_size.y};
    qvl_emu_switch(&main_sp, fibers[t].sp);
}

bool on_fiber(const void *sp) { return running.kernel && sp >= running.stacks && sp < running.stacks + max_threads * stack_bytes; }

struct sigaction before[3];
const int fault_signals[3] = {SIGSEGV, SIGBUS, SIGILL};

void on_fault(int sig, siginfo_t *info, void *context) {
    char *at = static_cast<char *>(info->si_addr);
    bool in_kernel = on_fiber(reinterpret_cast<void *>(static_cast<ucontext_t *>(context)->uc_mcontext.gregs[REG_RSP]));
    if (sig == SIGILL && in_kernel) fail("undefined operation in a kernel: misaligned access");
    if (in_kernel && at >= window && at < window + shared_window_bytes())
        fail("out of bounds: byte %td of %zu bytes of shared memory", at - running.shared, running.shared_bytes);
    if (in_kernel && at >= running.stacks && at < running.stacks + max_threads * stack_bytes) fail("the thread's stack overflows (%zu KiB)", stack_bytes >> 10);
    if (in_kernel) fail("invalid access of a kernel at %s", describe(at).c_str());
    if (sig == SIGSEGV && find_allocation(at)) fail("host code dereferences device memory: %s", describe(at).c_str());
    for (int i = 0; i < 3; i++)
        if (fault_signals[i] == sig) { /* not ours: as if we had not been there */
            if (before[i].sa_flags & SA_SIGINFO)
                before[i].sa_sigaction(sig, info, context);
            else if (before[i].sa_handler != SIG_DFL && before[i].sa_handler != SIG_IGN)
                before[i].sa_handler(sig);
            else
                sigaction(sig, &before[i], nullptr); /* the instruction runs again and ends the process */
        }
}

void prepare() {
    static thread_local bool has_stack = false;
    if (!has_stack) { /* the handler needs a stack of its own: the fault may be that a fiber's stack is full */
        stack_t s;
        sigaltstack(nullptr, &s);
        if (s.ss_flags & SS_DISABLE) {
            s = stack_t{};
            s.ss_size = 64 << 10;
            s.ss_sp = mmap(nullptr, s.ss_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            sigaltstack(&s, nullptr);
        }
        has_stack = true;
    }
    if (window) return;
    void *stacks = mmap(nullptr, max_threads * stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *room = mmap(nullptr, shared_window_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED || room == MAP_FAILED) fail("no memory for stacks");
    window = static_cast<char *>(room);
    running.stacks = static_cast<char *>(stacks);
    mprotect(window + guard, shared_room, PROT_READ | PROT_WRITE);
    for (int t = 0; t < max_threads; t++) mprotect(running.stacks + (size_t)t * stack_bytes, page, PROT_NONE);
}

} // namespace

char *shared_window() { return window; }
size_t shared_window_bytes() { return shared_room + 2 * guard; }

void install_fault_handler() {
    struct sigaction mine = {};
    mine.sa_sigaction = on_fault;
    mine.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; i++) sigaction(fault_signals[i], &mine, &before[i]);
}

std::string thread_name(int t) {
    unsigned x = now_block_size.x, y = now_block_size.y, u = (unsigned)t;
    return "(" + std::to_string(u % x) + "," + std::to_string(u / x % y) + "," + std::to_string(u / x / y) + ")";
}

void fail(const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    fprintf(stderr, "qvl-emu: ");
    vfprintf(stderr, format, ap);
    va_end(ap);
    if (running.kernel)
        fprintf(stderr, "\n  in kernel %s, block (%u,%u,%u), thread %s", running.kernel, running.block.x, running.block.y, running.block.z,
                running.thread < 0 ? "any" : thread_name(running.thread).c_str());
    fprintf(stderr, "\n");
    abort();
}

long env(const char *name, long otherwise) {
    const char *v = getenv(name);
    return v && *v ? strtol(v, nullptr, 0) : otherwise;
}

uint64_t random64() {
    static uint64_t state = (uint64_t)env("QVL_EMU_SEED", 1) * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1du >> 7;
}

void run_kernel(const Kernel &k, dim3 grid, dim3 block, size_t shared_bytes, int device) {
    prepare();
    kernel = &k;
    now_block_size = block;
    now_grid = grid;
    running.kernel = k.name;
    running.device = device;
    running.threads = (int)(block.x * block.y * block.z);
    size_t rounded = (shared_bytes + 15) / 16 * 16;
    running.shared = window + guard + shared_room - rounded;
    running.shared_bytes = shared_bytes;
    running.args = k.args;
    running.args_bytes = k.args_bytes;
    poison(window + guard, shared_room);
    unpoison(running.shared, shared_bytes);
    /* Blocks i -> (start + i step) mod n: a random order without a list of blocks. */
    uint64_t n = (uint64_t)grid.x * grid.y * grid.z, start = random64() % n, step = random64() % n;
    while (std::gcd(step, n) != 1) step = (step + 1) % n;
    count_launch(k, grid);
    for (uint64_t i = 0, b = start; i < n; i++, b = (b + step) % n) {
        now_block = running.block = uint3{(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
        running.block_number = (uint32_t)b;
        run_block();
        count_barrier();
    }
    count_end();
    unpoison(window + guard, shared_room);
    running.kernel = nullptr;
}

void *shared_memory() { return running.shared; }

int block_sync(Vote how, int value, Site at) {
    Fiber &f = fibers[running.thread];
    f.op = Op::barrier;
    f.at = at;
    f.how = (int)how;
    f.value = value;
    clear_ready(running.thread);
    if (++at_barrier == live) release_barrier();
    go_on();
    return (int)f.result;
}

void warp_sync(unsigned mask, Site at) { meet(collective(Op::syncwarp, mask, at)); }

unsigned warp_vote(unsigned mask, Vote how, int value, Site at) {
    Fiber &f = collective(Op::vote, mask, at);
    f.how = (int)how;
    f.value = value;
    return meet(f);
}

uint32_t warp_shuffle(unsigned mask, Shuffle how, uint32_t value, int lane, int width, Site at) {
    Fiber &f = collective(Op::shuffle, mask, at);
    if (width < 1 || width > 32 || (width & (width - 1))) fail("%s: width %d is not a power of two up to 32", place(f).c_str(), width);
    f.how = (int)how;
    f.word = value;
    f.lane = lane;
    f.width = width;
    return meet(f);
}

/* Which lanes run together is the hardware's choice: here the calling lane alone, or all that are not waiting. */
unsigned active_mask() {
    int t = running.thread;
    return random64() & 1 ? bit_of(t) : warp_of(t).ready | bit_of(t);
}

void mma_16816(float *d, const uint32_t *a, const uint32_t *b, Site at) {
    Fiber &f = collective(Op::mma, 0xffffffffu, at);
    f.d = d;
    f.a = a;
    f.b = b;
    meet(f);
}

void ldmatrix_x4(uint32_t *r, const void *row, bool transposed, Site at) {
    Fiber &f = collective(Op::ldmatrix, 0xffffffffu, at);
    f.r = r;
    f.a = row;
    f.how = transposed;
    count_access(__builtin_return_address(0), row, 16, false, running.thread);
    meet(f);
}

void cp_async16(void *shared, const void *global, bool valid) {
    Fiber &f = fibers[running.thread];
    auto *to = static_cast<char *>(shared);
    auto *from = static_cast<const char *>(global);
    if ((uintptr_t)to % 16 || (valid && (uintptr_t)from % 16)) fail("cp.async: an address is not a multiple of 16");
    if (to < running.shared || to + 16 > running.shared + running.shared_bytes)
        fail("cp.async: the destination is outside shared memory, at byte %td of %zu", to - running.shared, running.shared_bytes);
    if (valid) {
        need_device_memory(from, 16, running.device, "cp.async", "the source");
        check_access(from, 16, false, running.thread);
        count_access(__builtin_return_address(0), from, 16, false, running.thread);
    }
    count_access(__builtin_return_address(0), to, 16, true, running.thread);
    Copy c = {to, valid ? from : nullptr, (random64() & 1) != 0, f.groups, {}};
    if (c.from && c.early) memcpy(c.data, from, 16);
    check_async_issue(to, running.thread);
    memset(to, 0xff, 16);
    f.copies.push_back(c);
}

void cp_async_commit() { fibers[running.thread].groups++; }

void cp_async_wait(int newest) {
    Fiber &f = fibers[running.thread];
    size_t kept = 0;
    for (Copy &c : f.copies) {
        if ((int64_t)c.group >= (int64_t)f.groups - newest) {
            f.copies[kept++] = c;
            continue;
        }
        memcpy(c.to, c.from && !c.early ? c.from : c.data, 16);
        check_async_land(c.to, running.thread);
    }
    f.copies.resize(kept);
}

void atomic_access(void *at, size_t bytes) {
    if ((uintptr_t)at % bytes) fail("atomic: %p is not a multiple of %zu", at, bytes);
    check_atomic(at, bytes);
    if ((random64() & 3) == 0) go_on();
}

void fence() {} /* one operation at a time: everything is visible at once */

} // namespace qvl_emu
