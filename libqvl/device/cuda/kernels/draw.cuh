/* draw.cuh - a row of logits to a token.
 *
 * Job:        what sample/sample.c does, in its order: bias, penalties, bans, temperature, min-p, top-k, top-p, one random number.
 * Input:      logits, which are overwritten; draws and the tokens that change (device/draw.h).
 * Output:     tokens, or why there is none.
 * Invariants: probabilities are added as integers, in units of 2^-42 of the likeliest token's: no order of threads changes a sum, so
 *             a row gives the same token every time and in every batch. What is less likely than half a unit is never drawn, and a cut
 *             may fall on another token than the CPU's only where the two are within 10^-7.
 *
 * A block of 1024 threads has a row. It reads it up to a dozen times, of which all but the first come from the cache: 152,000
 * logits are 0.6 MB, where a decoding step of the 4B model reads 2 GB at least.
 */
#ifndef QVL__DRAW_CUH
#define QVL__DRAW_CUH

#include "../../draw.h"
#include "../port.cuh"

#define DRAW_THREADS 1024
#define DRAW_WARPS (DRAW_THREADS / 32)

struct draw_shared {
    uint64_t bins[QVL__ORDER_BINS];
    uint64_t part[DRAW_WARPS];
    uint64_t left;
    int found;
};

/* The probability of a logit in units of 2^-42 of the largest one's. */
__device__ __forceinline__ uint64_t draw_mass(float l, float top) { return (uint64_t)(exp((double)l - (double)top) * 0x1p42 + 0.5); }

/* Sum over the block, in every thread. */
__device__ __forceinline__ uint64_t draw_sum(uint64_t x, draw_shared *s) {
    for (int i = 16; i; i >>= 1) x += shuffle_xor(x, i);
    __syncthreads(); /* part may still be read from the last time */
    if (threadIdx.x % 32 == 0) s->part[threadIdx.x / 32] = x;
    __syncthreads();
    uint64_t sum = 0;
    for (int i = 0; i < DRAW_WARPS; i++) sum += s->part[i];
    return sum;
}

/* Largest over the block, in every thread; by the order of integers, so that -0 and 0 are equal. */
__device__ __forceinline__ float draw_max(float x, draw_shared *s) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) s->part[threadIdx.x / 32] = qvl__order_of(x);
    __syncthreads();
    uint32_t top = 0;
    for (int i = 0; i < DRAW_WARPS; i++) top = (uint32_t)s->part[i] > top ? (uint32_t)s->part[i] : top;
    return qvl__of_order(top);
}

/* The sum of x over the lanes below and this one. */
__device__ __forceinline__ uint64_t warp_scan(uint64_t x) {
    int lane = threadIdx.x % 32;
    for (int i = 1; i < 32; i <<= 1) {
        uint64_t below = shuffle_up(x, i);
        if (lane >= i) x += below;
    }
    return x;
}

/* The order of the logit at which weights, added up from the best one down, reach need (1 <= need <= their sum); *above: the sum
 * before it. weight(id, &order). */
template <class W> __device__ uint32_t draw_cut(const W &weight, int limit, uint64_t need, uint64_t *above, draw_shared *s) {
    uint32_t prefix = 0, mask = 0;
    uint64_t left = need;
    for (int pass = 0; pass < QVL__ORDER_PASSES; pass++) {
        int shift = qvl__order_shift(pass), count = 1 << qvl__order_bits(pass), lane = threadIdx.x, each = count / 32;
        for (int i = threadIdx.x; i < count; i += DRAW_THREADS) s->bins[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < limit; i += DRAW_THREADS) {
            uint32_t order;
            uint64_t w = weight(i, &order);
            if (w && (order & mask) == prefix) atomicAdd((unsigned long long *)&s->bins[order >> shift & (count - 1)], (unsigned long long)w);
        }
        __syncthreads();
        if (threadIdx.x < 32) { /* the first warp: a lane has `each` bins, lane 0 the best ones */
            uint64_t mine = 0;
            for (int i = 0; i < each; i++) mine += s->bins[count - 1 - lane * each - i];
            uint64_t up_to = warp_scan(mine), before = up_to - mine;
            if (before < left && left <= up_to) {
                int bin = count - 1 - lane * each;
                while (before + s->bins[bin] < left) before += s->bins[bin--];
                s->found = bin, s->left = left - before;
            }
        }
        __syncthreads();
        prefix |= (uint32_t)s->found << shift;
        mask |= (uint32_t)(count - 1) << shift;
        left = s->left;
    }
    *above = need - left;
    return prefix;
}

/* The lowest id up to which the weights, by id, add up to more than rest (rest < their sum). Warps have runs of ids. */
template <class W> __device__ int draw_walk(const W &weight, int limit, uint64_t rest, draw_shared *s) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, run = (limit + DRAW_THREADS - 1) / DRAW_THREADS * 32, first = warp * run;
    int end = first + run < limit ? first + run : limit;
    uint64_t mine = 0;
    uint32_t order;
    for (int i = first + lane; i < end; i += 32) mine += weight(i, &order);
    for (int i = 16; i; i >>= 1) mine += shuffle_xor(mine, i);
    __syncthreads();
    if (lane == 0) s->part[warp] = mine;
    __syncthreads();
    uint64_t before = 0;
    for (int i = 0; i < warp; i++) before += s->part[i];
    if (before <= rest && rest < before + mine)
        for (int i = first;; i += 32) {
            uint64_t up_to = before + warp_scan(i + lane < end ? weight(i + lane, &order) : 0);
            unsigned beyond = __ballot_sync(0xffffffffu, up_to > rest);
            if (beyond) {
                if (lane == 0) s->found = i + __ffs((int)beyond) - 1;
                break;
            }
            before = shuffle(up_to, 31);
        }
    __syncthreads();
    return s->found;
}

static __global__ void __launch_bounds__(DRAW_THREADS) draw_rows(int32_t *chosen, float *logits, int vocab, int limit, const qvl__draw *draws, const qvl__changed *changed) {
    QVL_SHARED(draw_shared, s);
    qvl__draw d = draws[blockIdx.x];
    float *x = logits + (size_t)d.row * vocab;
    int bad = 0;
    for (int i = threadIdx.x; i < vocab; i += DRAW_THREADS) bad |= !qvl__is_logit(x[i]);
    if (__syncthreads_or(bad)) {
        if (threadIdx.x == 0) chosen[blockIdx.x] = QVL__DRAW_NOT_FINITE;
        return;
    }
    const qvl__changed *c = changed + d.first; /* a token may be among several kinds: one kind after the other */
    for (int i = threadIdx.x; i < d.bias; i += DRAW_THREADS) x[c[i].id] = qvl__bounded(x[c[i].id] + c[i].bias);
    __syncthreads();
    c += d.bias;
    for (int i = threadIdx.x; i < d.seen; i += DRAW_THREADS) x[c[i].id] = qvl__penalised(x[c[i].id], c[i].count, d.repetition, d.frequency, d.presence);
    __syncthreads();
    c += d.seen;
    for (int i = threadIdx.x; i < d.banned; i += DRAW_THREADS) x[c[i].id] = -INFINITY;
    __syncthreads();
    float max = -INFINITY;
    for (int i = threadIdx.x; i < limit; i += DRAW_THREADS) max = fmaxf(max, x[i]);
    max = draw_max(max, s);
    int token = QVL__DRAW_NOTHING_LEFT;
    if (max > -INFINITY && d.temperature == 0) {
        auto largest = [=](int i, uint32_t *) -> uint64_t { return x[i] == max; };
        token = draw_walk(largest, limit, 0, s);
    } else if (max > -INFINITY) {
        float top = qvl__bounded(max / d.temperature);
        double floor = (double)top + d.log_min_p;
        uint32_t least = 0, last = 0; /* orders: of the worst that is kept; of those that only ids up to `id` are kept of */
        int id = 0;
        /* candidates as the CPU has them: l below floor_logit or -inf is none */
        auto one = [&](int i, uint32_t *order) -> uint64_t {
            float l = qvl__bounded(x[i] / d.temperature);
            *order = qvl__order_of(l);
            return (double)l >= floor && l > -INFINITY && *order >= least && (*order != last || i <= id);
        };
        auto mass = [&](int i, uint32_t *order) -> uint64_t {
            return one(i, order) ? draw_mass(qvl__of_order(*order), top) : 0;
        };
        uint64_t count = 0, total = 0, above;
        uint32_t order;
        for (int i = threadIdx.x; i < limit; i += DRAW_THREADS) count += one(i, &order);
        count = draw_sum(count, s);
        if (d.top_k > 0 && (uint64_t)d.top_k < count) least = draw_cut(one, limit, (uint64_t)d.top_k, &above, s);
        for (int i = threadIdx.x; i < limit; i += DRAW_THREADS) total += mass(i, &order);
        total = draw_sum(total, s);
        if (d.top_p < 1) {
            uint64_t need = (uint64_t)(d.top_p * (double)total);
            need = need < 1 ? 1 : need < total ? need : total;
            uint32_t at = draw_cut(mass, limit, need, &above, s);
            least = at;
            uint64_t each = draw_mass(qvl__of_order(at), top), equals = (need - above + each - 1) / each;
            auto equal = [&](int i, uint32_t *o) -> uint64_t { return one(i, o) && *o == at; };
            int lowest = draw_walk(equal, limit, equals - 1, s);
            last = at, id = lowest;
            total = above + equals * each;
        }
        uint64_t rest = (uint64_t)(d.uniform * (double)total);
        token = draw_walk(mass, limit, rest < total ? rest : total - 1, s);
    }
    if (threadIdx.x == 0) chosen[blockIdx.x] = token;
}

#endif
