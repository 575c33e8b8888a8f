/* core.cpp - blocks of threads: fibers, barriers, warps, asynchronous copies.
 *
 * Job:        run the blocks of a grid one after the other, in random order.
 * Input:      a kernel with its arguments bound.
 * Output:     what it writes.
 * Invariants: a thread runs until it waits; which waiting thread goes on is drawn at random, so an order that the hardware
 *             does not promise is not kept here either; barriers and collectives say whom they wait for when they never end.
 */
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#include "emu.h"

#ifndef __x86_64__
#error "the fibers of cuda_emu are written for x86-64"
#endif

namespace emu {

void fault(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "cuda_emu: ");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "\n");
    fflush(NULL);
    abort();
}

uint32_t random_below(uint32_t n) {
    static uint64_t state = 0;
    if (!state) state = (getenv("QVL_EMU_SEED") ? strtoull(getenv("QVL_EMU_SEED"), NULL, 10) : 1) * 0x9e3779b97f4a7c15u + 1;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)((state >> 32) * n >> 32);
}

/* ---- fibers ---- */

#define STACK ((size_t)128 << 10)
#define MOST_THREADS 1024
#define SHARED_BYTES ((size_t)228 << 10)

enum state { READY, AT_BARRIER, IN_COLLECTIVE, ENDED };

struct copy {
    void *to;
    const void *from;
    bool valid;
};

struct thread {
    void *sp;
    state is;
    uint3 at;
    unsigned number; /* in its block */
    int kind, vote;  /* of a barrier; and its answer */
    op what;         /* of a collective */
    unsigned mask;
    operands *o;
    std::vector<std::vector<copy>> copies; /* committed groups, the oldest first; the last one is open */
};

thread *current;
uint3 thread_index, block_index;
dim3 block_dim, grid_dim;

static thread threads[MOST_THREADS];
static unsigned n_threads;
static std::vector<unsigned> ready; /* numbers of threads that can go on */
static char *stacks;
alignas(128) static unsigned char shared_memory[SHARED_BYTES];
static void *scheduler;
static const char *kernel;
static const std::function<void()> *entry;

extern "C" void emu_switch(void **from, void *to);
/* Saves what a function call keeps, changes the stack, and takes it back there. */
asm(R"(
.text
.type emu_switch,@function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

static void give_way(state s) {
    thread *me = current;
    me->is = s;
    emu_switch(&me->sp, scheduler);
    current = me;
    thread_index = me->at;
}

static void wake(thread *t) {
    t->is = READY;
    ready.push_back(t->number);
}

static void finish_copies(thread *t, size_t left) {
    while (t->copies.size() > left + 1) {
        for (const copy &c : t->copies.front()) {
            if (c.valid) memcpy(c.to, c.from, 16);
            else memset(c.to, 0, 16);
        }
        t->copies.erase(t->copies.begin());
    }
}

static void body_of_fiber() {
    (*entry)();
    if (current->copies.size() > 1 || !current->copies.back().empty()) {
        async_commit();
        finish_copies(current, 0);
    }
    give_way(ENDED);
    fault("%s: a thread that had ended went on", kernel);
}

static void start(unsigned i) {
    thread *t = &threads[i];
    char *top = stacks + (i + 1) * STACK;
    void **sp = (void **)(void *)top;
    *--sp = NULL; /* where a caller would be */
    *--sp = (void *)(uintptr_t)body_of_fiber;
    for (int r = 0; r < 6; r++) *--sp = NULL;
    t->sp = sp;
    t->number = i;
    t->at = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
    t->copies.assign(1, {});
    wake(t);
}

/* ---- barriers ---- */

static void end_barrier() {
    int kind = -1, votes = 0, waiting = 0;
    for (unsigned i = 0; i < n_threads; i++)
        if (threads[i].is == AT_BARRIER) {
            if (kind >= 0 && kind != threads[i].kind) fault("%s: threads of block (%u, %u, %u) wait at different kinds of barrier", kernel, block_index.x, block_index.y, block_index.z);
            kind = threads[i].kind;
            votes += threads[i].vote, waiting++;
        }
    for (unsigned i = 0; i < n_threads; i++)
        if (threads[i].is == AT_BARRIER) {
            threads[i].vote = kind == 1 ? votes > 0 : kind == 2 ? votes == waiting : votes;
            wake(&threads[i]);
        }
}

int barrier(int kind, int vote) {
    current->kind = kind, current->vote = vote;
    give_way(AT_BARRIER);
    return current->vote;
}

/* ---- warps ---- */

static float low(uint32_t pair) { return of_bits<float>(pair << 16); }
static float high(uint32_t pair) { return of_bits<float>(pair & 0xffff0000u); }

/* Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16". */
static void mma(thread *w) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; l++) {
        const operands *o = w[l].o;
        for (int i = 0; i < 4; i++) {
            int r = l / 4 + i % 2 * 8, k = l % 4 * 2 + i / 2 * 8;
            a[r][k] = low(o->a[i]), a[r][k + 1] = high(o->a[i]);
        }
        for (int i = 0; i < 2; i++) {
            int k = l % 4 * 2 + i * 8, n = l / 4;
            b[k][n] = low(o->b[i]), b[k + 1][n] = high(o->b[i]);
        }
    }
    float sums[16][8] = {};
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) sums[r][n] += a[r][k] * b[k][n];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) w[l].o->d[i] += sums[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

static void ldmatrix(thread *w, bool trans) {
    uint16_t m[32][8];
    for (int l = 0; l < 32; l++) {
        if ((uintptr_t)w[l].o->row % 16) fault("%s: ldmatrix from an address that is no multiple of 16", kernel);
        memcpy(m[l], w[l].o->row, 16);
    }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            int r = l / 4, c = l % 4 * 2;
            uint16_t x = trans ? m[8 * i + c][r] : m[8 * i + r][c], y = trans ? m[8 * i + c + 1][r] : m[8 * i + r][c + 1];
            w[l].o->r[i] = (uint32_t)x | (uint32_t)y << 16;
        }
}

static void end_collective(thread *w, op what, unsigned mask) {
    if (what == MMA) mma(w);
    else if (what == LDMATRIX || what == LDMATRIX_TRANS) ldmatrix(w, what == LDMATRIX_TRANS);
    unsigned votes = 0;
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1 && what == BALLOT) votes |= (unsigned)(w[l].o->value != 0) << l;
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        operands *o = w[l].o;
        int base = o->width ? l / o->width * o->width : 0, in = l - base, from = l;
        if (what == BALLOT) o->result = votes;
        if (what > SHUFFLE_UP) continue;
        if (what == SHUFFLE) from = base + o->lane % o->width;
        if (what == SHUFFLE_XOR) from = (in ^ o->lane) < o->width ? base + (in ^ o->lane) : l;
        if (what == SHUFFLE_DOWN) from = in + o->lane < o->width ? l + o->lane : l;
        if (what == SHUFFLE_UP) from = in - o->lane >= 0 ? l - o->lane : l;
        if (!(mask >> from & 1)) fault("%s: lane %d of block (%u, %u, %u) shuffles from lane %d, which its mask %08x leaves out", kernel, l, block_index.x, block_index.y, block_index.z, from, mask);
        o->result = w[from].o->value;
    }
}

void collective(op what, unsigned mask, operands *o) {
    thread *me = current, *w = &threads[me->number / 32 * 32];
    unsigned lane = me->number % 32, last = n_threads - me->number / 32 * 32;
    if (!(mask >> lane & 1)) fault("%s: lane %u of block (%u, %u, %u) is not in its own mask %08x", kernel, lane, block_index.x, block_index.y, block_index.z, mask);
    if (last < 32) mask &= (1u << last) - 1; /* a block that ends within a warp */
    me->what = what, me->mask = mask, me->o = o;
    me->is = IN_COLLECTIVE;
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        if (w[l].is == ENDED) fault("%s: lane %u of block (%u, %u, %u) waits for lane %d, which has ended (mask %08x)", kernel, lane, block_index.x, block_index.y, block_index.z, l, mask);
        if (w[l].is != IN_COLLECTIVE) {
            give_way(IN_COLLECTIVE);
            return;
        }
        if (w[l].what != what || w[l].mask != mask)
            fault("%s: lanes %u and %d of block (%u, %u, %u) meet in different collectives (masks %08x and %08x)", kernel, lane, l, block_index.x, block_index.y, block_index.z, mask, w[l].mask);
    }
    end_collective(w, what, mask);
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1 && &w[l] != me) wake(&w[l]);
    me->is = READY;
}

/* ---- shared memory ---- */

void *shared() { return shared_memory; }

void async_copy(void *to, const void *from, bool valid) {
    if ((uintptr_t)to % 16 || (valid && (uintptr_t)from % 16)) fault("%s: cp.async of 16 bytes between addresses that are no multiples of 16", kernel);
    memset(to, 0xff, 16); /* not there before the wait, and what was there is gone at once */
    current->copies.back().push_back({to, from, valid});
}
void async_commit() { current->copies.push_back({}); }
void async_wait(int left) { finish_copies(current, (size_t)left); }

/* ---- blocks ---- */

static void stuck() {
    unsigned at[4] = {};
    for (unsigned i = 0; i < n_threads; i++) at[threads[i].is]++;
    fault("%s: block (%u, %u, %u) cannot go on: %u threads at a barrier, %u in warp collectives, %u ended: a barrier or collective that not all of them reach", kernel,
          block_index.x, block_index.y, block_index.z, at[AT_BARRIER], at[IN_COLLECTIVE], at[ENDED]);
}

static void run_block(size_t smem) {
    memset(shared_memory, 0xff, smem);
    ready.clear();
    for (unsigned i = 0; i < n_threads; i++) start(i);
    for (;;) {
        while (!ready.empty()) {
            size_t i = random_below((uint32_t)ready.size());
            current = &threads[ready[i]];
            ready[i] = ready.back();
            ready.pop_back();
            thread_index = current->at;
            emu_switch(&scheduler, current->sp);
        }
        unsigned ended = 0, waiting = 0;
        for (unsigned i = 0; i < n_threads; i++) ended += threads[i].is == ENDED, waiting += threads[i].is == AT_BARRIER;
        if (ended == n_threads) return;
        if (ended + waiting < n_threads) stuck();
        end_barrier(); /* of those that live */
    }
}

void run_grid(const char *name, dim3 grid, dim3 block, size_t smem, const std::function<void()> &body) {
    if (!stacks) stacks = (char *)mmap(NULL, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    kernel = name, entry = &body;
    grid_dim = grid, block_dim = block;
    n_threads = block.x * block.y * block.z;
    std::vector<uint32_t> order((size_t)grid.x * grid.y * grid.z);
    for (size_t i = 0; i < order.size(); i++) order[i] = (uint32_t)i;
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below((uint32_t)i)]);
    for (uint32_t b : order) {
        block_index = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        run_block(smem);
    }
}

} // namespace emu
