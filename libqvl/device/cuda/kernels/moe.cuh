/* moe.cuh - rows to their experts, products of all experts at once, and back.
 *
 * Job:        lists of the rows that an expert got; the products of gemm_exact.cuh, gemm_mma.cuh and gemv.cuh with another matrix
 *             for each run of rows; weighted sums.
 * Input:      routes [rows][top_k] (device/route.h). A pair is a row and one of its experts: pair number row * top_k + k.
 * Output:     pairs in the order of experts, and among those of an expert in their own; rows.
 * Invariants: no atomic decides an order; a pair's numbers depend on its row and expert alone; a row adds its experts in ascending order.
 */
#ifndef QVL__MOE_CUH
#define QVL__MOE_CUH

#include "../../route.h"
#include "gemm_exact.cuh"
#include "gemm_mma.cuh"
#include "gemv.cuh"

#define MOE_TILE MMA_M /* rows of a tile, for both products that work in tiles */
static_assert(MMA_M == EXACT_TILE, "one list of tiles serves both");

/* Who got what. */
struct groups {
    int32_t *expert; /* [pairs], and */
    float *weight;   /* [pairs]: routes */
    int32_t *count;  /* [n] pairs of an expert */
    int32_t *first;  /* [n] where they begin */
    int32_t *list;   /* [pairs] pairs in the order of experts */
    int32_t *place;  /* [pairs] where a pair is in it */
    int32_t *tile;   /* [tiles][2]: expert, its row; -1 behind the last */
    int n, pairs, top_k, tiles;
};

/* One thread for each row. */
static __global__ void moe_route_rows(groups g, const float *logits) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r * g.top_k < g.pairs) qvl__route_row(g.expert + (size_t)r * g.top_k, g.weight + (size_t)r * g.top_k, logits + (size_t)r * g.n, g.n, g.top_k);
}

/* Block e, one warp: how many pairs expert e has. */
static __global__ void moe_count(groups g) {
    int count = 0;
    for (int p = threadIdx.x; p < g.pairs; p += 32) count += g.expert[p] == (int)blockIdx.x;
    for (int i = 16; i; i >>= 1) count += __shfl_xor_sync(0xffffffffu, count, i);
    if (threadIdx.x == 0) g.count[blockIdx.x] = count;
}

/* Block e, one warp: its pairs into the list, its tiles. */
static __global__ void moe_list(groups g) {
    int e = blockIdx.x, lane = threadIdx.x, at = 0, tile = 0;
    for (int i = lane; i < e; i += 32) at += g.count[i], tile += (g.count[i] + MOE_TILE - 1) / MOE_TILE;
    for (int i = 16; i; i >>= 1) at += __shfl_xor_sync(0xffffffffu, at, i), tile += __shfl_xor_sync(0xffffffffu, tile, i);
    int mine = (g.count[e] + MOE_TILE - 1) / MOE_TILE;
    if (lane == 0) g.first[e] = at;
    for (int i = lane; i < mine; i += 32) g.tile[2 * (tile + i)] = e, g.tile[2 * (tile + i) + 1] = i * MOE_TILE;
    if (e == g.n - 1)
        for (int i = tile + mine + lane; i < g.tiles; i += 32) g.tile[2 * i] = -1;
    for (int base = 0; base < g.pairs; base += 32) {
        bool is = base + lane < g.pairs && g.expert[base + lane] == e;
        unsigned all = __ballot_sync(0xffffffffu, is);
        if (is) {
            int to = at + __popc(all & ((1u << lane) - 1));
            g.list[to] = base + lane, g.place[base + lane] = to;
        }
        at += __popc(all);
    }
}

/* Block p: number p of the list gets its row of x [rows][k], as numbers of type, [pairs][kp] with zeros behind k. */
static __global__ void moe_gather(groups g, int type, void *to, const float *x, int k, int kp) {
    const float *from = x + (size_t)(g.list[blockIdx.x] / g.top_k) * k;
    for (int i = threadIdx.x; i < kp; i += blockDim.x) store_input(type, to, (size_t)blockIdx.x * kp + i, i < k ? from[i] : 0.0f);
}

/* Expert e's own rows of what is [pairs][...]. */
__device__ __forceinline__ finish finish_of(const groups &g, finish f, int e) {
    f.y += (size_t)g.first[e] * f.ld;
    return f;
}

static __global__ void __launch_bounds__(EXACT_THREADS) moe_exact(groups g, finish f, const float *x, size_t ldx, const rows_of *w) {
    int e = g.tile[2 * blockIdx.y];
    if (e >= 0) exact_tile(finish_of(g, f, e), x + (size_t)g.first[e] * ldx, ldx, g.count[e], w[e], g.tile[2 * blockIdx.y + 1], blockIdx.x * EXACT_TILE);
}

template <int TYPE, int PARTS> static __global__ void __launch_bounds__(MMA_THREADS) moe_mma(groups g, finish f, const uint16_t *x, const rows_of *w) {
    int e = g.tile[2 * blockIdx.y];
    if (e >= 0 && w[e].type == TYPE)
        mma_tile<TYPE, PARTS>(finish_of(g, f, e), x + (size_t)g.first[e] * w[e].kp, g.count[e], w[e], g.tile[2 * blockIdx.y + 1], blockIdx.x * MMA_N(PARTS));
}

/* Grid (matrix rows, experts). */
template <int TYPE> static __global__ void __launch_bounds__(GEMV_WARPS * 32) moe_gemv(groups g, finish f, const uint16_t *x, const rows_of *w) {
    const int most = 4;
    int e = blockIdx.y, c = 2 * (blockIdx.x * GEMV_WARPS + threadIdx.x / 32), rows = g.count[e];
    if (rows == 0 || w[e].type != TYPE || c >= w[e].n) return;
    finish mine = finish_of(g, f, e);
    x += (size_t)g.first[e] * w[e].kp;
    for (int r = 0; r < rows; r += most, mine.y += most * mine.ld) gemv_pair<TYPE, most>(mine, x + (size_t)r * w[e].kp, rows - r < most ? rows - r : most, w[e], c);
}

/* Block r: y[r] = (with add: +=) the weighted sum of row r's pairs, of parts [pairs][dim]. */
static __global__ void moe_join(groups g, float *y, const float *parts, int dim, bool add) {
    const int32_t *expert = g.expert + (size_t)blockIdx.x * g.top_k;
    y += (size_t)blockIdx.x * dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        float v = add ? y[i] : 0.0f;
        for (int last = -1, n = 0; n < g.top_k; n++) {
            int k = -1;
            for (int j = 0; j < g.top_k; j++)
                if (expert[j] > last && (k < 0 || expert[j] < expert[k])) k = j;
            last = expert[k];
            int pair = blockIdx.x * g.top_k + k;
            v += g.weight[pair] * parts[(size_t)g.place[pair] * dim + i];
        }
        y[i] = v;
    }
}

#endif
