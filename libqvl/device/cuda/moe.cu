/* moe.cu - the mixture of experts on the GPU.
 *
 * Job:        the ops moe, moe_work, experts_link, experts_unlink.
 * Input:      see device.h.
 * Output:     see device.h.
 * Invariants: nothing comes back to the host, so a step with experts can be recorded: grids are made for the most tiles that there can
 *             be, and blocks without one end at once. Which product, as in gemm.cu: without bf16_math and for F32 moe_exact; up to
 *             FEW_PAIRS pairs an expert on average moe_gemv; else moe_mma (F16: moe_exact). deterministic: moe_mma, F16 moe_exact.
 *             Several GPUs: each has a part of every expert, and the weighted sums are added up once.
 */
#include "cuda.h"

#include <string.h>

#include "kernels/moe.cuh"

#define FEW_PAIRS 8

/* What a layer's experts are to kernels. */
struct linked {
    rows_of *there; /* [2][n]: gate_up, down */
    size_t bytes;
    unsigned types; /* 1 << type of those that there are */
};

static void unlink(qvl__device *d, qvl__experts *e) {
    linked *l = (linked *)e->link;
    if (!l) return;
    cuda_free(d, l->there, l->bytes);
    of(d)->host->free(l);
    e->link = NULL;
}

static int link(qvl__device *d, qvl__experts *e) {
    entered c(d);
    const unsigned f32 = 1u << QVL__F32, f16 = 1u << QVL__F16;
    linked *l = (linked *)c->host->calloc(1, sizeof *l);
    rows_of *host = (rows_of *)c->host->calloc(2 * (size_t)e->n, sizeof *host);
    e->link = l;
    int rc = l && host ? 0 : QVL_ENOMEM;
    for (int i = 0; i < e->n && rc == 0; i++) {
        host[i] = view(c, &e->gate_up[i]), host[e->n + i] = view(c, &e->down[i]);
        l->types |= 1u << e->gate_up[i].type | 1u << e->down[i].type;
    }
    if (rc == 0 && (l->types & (f32 | f16)) && l->types != f32 && l->types != f16)
        rc = c->host->fail(QVL_EUNSUPPORTED, "the experts of a layer are of several types, F32 or F16 among them: load the model as bf16, int8 or int4");
    if (rc == 0) l->bytes = 2 * (size_t)e->n * sizeof *host;
    if (rc == 0 && !(l->there = (rows_of *)cuda_alloc(d, l->bytes))) rc = QVL_ENOMEM;
    if (rc == 0) cuda_put(d, l->there, host, l->bytes);
    else unlink(d, e);
    c->host->free(host);
    return rc;
}

/* ---- memory ---- */

struct space {
    groups g;
    void *x, *mid;      /* inputs of the two products, [pairs][.] in float or 16 bits */
    float *act, *parts; /* their outputs [pairs][inter], [pairs][hidden] */
};

static size_t divide(space *s, char *base, int rows, int hidden, int inter, int experts, int top_k) {
    size_t at = 0, pairs = (size_t)rows * (size_t)top_k;
    s->g.n = experts, s->g.top_k = top_k, s->g.pairs = (int)pairs;
    s->g.tiles = s->g.pairs / MOE_TILE + (experts < s->g.pairs ? experts : s->g.pairs);
    struct {
        void **part;
        size_t size;
    } const all[] = {{&s->x, pairs * (size_t)padded(hidden) * 4},    {&s->mid, pairs * (size_t)padded(inter) * 2}, {(void **)&s->act, pairs * (size_t)inter * 4},
                     {(void **)&s->parts, pairs * (size_t)hidden * 4}, {(void **)&s->g.expert, pairs * 4},           {(void **)&s->g.weight, pairs * 4},
                     {(void **)&s->g.list, pairs * 4},                 {(void **)&s->g.place, pairs * 4},            {(void **)&s->g.count, (size_t)experts * 4},
                     {(void **)&s->g.first, (size_t)experts * 4},      {(void **)&s->g.tile, (size_t)s->g.tiles * 8}};
    for (auto &p : all) {
        *p.part = base + at;
        at = (at + p.size + 255) / 256 * 256;
    }
    return at;
}

static size_t moe_work(qvl__device *, int rows, int hidden, int inter, int experts, int top_k) {
    space s;
    return divide(&s, NULL, rows, hidden, inter, experts, top_k);
}

/* ---- products ---- */

template <int TYPE> static void run_mma(cuda *c, const groups &g, const finish &f, const void *x, const rows_of *w, int n) {
    if (div_up(n, MMA_N(4)) * g.tiles >= 2 * c->processors)
        LAUNCH(c, (moe_mma<TYPE, 4>), dim3(div_up(n, MMA_N(4)), g.tiles), dim3(MMA_THREADS), MMA_SHARED(4), g, f, (const uint16_t *)x, w);
    else LAUNCH(c, (moe_mma<TYPE, 2>), dim3(div_up(n, MMA_N(2)), g.tiles), dim3(MMA_THREADS), MMA_SHARED(2), g, f, (const uint16_t *)x, w);
}

template <int TYPE> static void run_gemv(cuda *c, const groups &g, const finish &f, const void *x, const rows_of *w, int n) {
    LAUNCH(c, moe_gemv<TYPE>, dim3(div_up(n, 2 * GEMV_WARPS), g.n), dim3(GEMV_WARPS * 32), 0, g, f, (const uint16_t *)x, w);
}

static bool few(const cuda *c, const groups &g) { return !c->deterministic && g.pairs <= FEW_PAIRS * g.n; }

static bool in_float(const cuda *c, unsigned types, const groups &g) {
    return !c->device.bf16_math || types == 1u << QVL__F32 || (types == 1u << QVL__F16 && !few(c, g));
}

static void products(cuda *c, unsigned types, const groups &g, const finish &f, const void *x, size_t ldx, const rows_of *w) {
    int n = f.n;
    if (in_float(c, types, g)) {
        LAUNCH(c, moe_exact, dim3(div_up(n, EXACT_TILE), g.tiles), dim3(EXACT_THREADS), EXACT_SHARED, g, f, (const float *)x, ldx, w);
    } else if (!few(c, g)) {
        if (types & 1u << QVL__BF16) run_mma<QVL__BF16>(c, g, f, x, w, n);
        if (types & 1u << QVL__Q8) run_mma<QVL__Q8>(c, g, f, x, w, n);
        if (types & 1u << QVL__Q4) run_mma<QVL__Q4>(c, g, f, x, w, n);
        if (types & 1u << QVL__F8) run_mma<QVL__F8>(c, g, f, x, w, n);
    } else {
        if (types & 1u << QVL__BF16) run_gemv<QVL__BF16>(c, g, f, x, w, n);
        if (types & 1u << QVL__F16) run_gemv<QVL__F16>(c, g, f, x, w, n);
        if (types & 1u << QVL__Q8) run_gemv<QVL__Q8>(c, g, f, x, w, n);
        if (types & 1u << QVL__Q4) run_gemv<QVL__Q4>(c, g, f, x, w, n);
        if (types & 1u << QVL__F8) run_gemv<QVL__F8>(c, g, f, x, w, n);
    }
}

static void moe(qvl__device *d, float *x, const float *norm, const float *logits, int rows, const qvl__experts *e, int top_k, void *work) {
    entered c(d);
    if (rows <= 0) return;
    const linked *l = (const linked *)e->link;
    int hidden = e->gate_up[0].k, inter = e->down[0].k;
    part up = part_of(c, &e->gate_up[0]), down = part_of(c, &e->down[0]);
    space s;
    divide(&s, (char *)work, rows, hidden, inter, e->n, top_k);
    bool floats = in_float(c, l->types, s.g);
    int type = floats ? QVL__F32 : l->types == 1u << QVL__F16 ? QVL__F16 : QVL__BF16;
    LAUNCH(c, moe_route_rows, dim3(div_up(rows, 32)), dim3(32), 0, s.g, logits);
    LAUNCH(c, moe_count, dim3(e->n), dim3(32), 0, s.g);
    LAUNCH(c, moe_list, dim3(e->n), dim3(32), 0, s.g);
    LAUNCH(c, moe_gather, dim3(s.g.pairs), dim3(256), 0, s.g, type, s.x, norm, hidden, padded(hidden));
    finish to_act = {QVL__EPI_SWIGLU, NULL, s.act, up.n, (size_t)inter, up.n, 0}, to_parts = {QVL__EPI_NONE, NULL, s.parts, down.n, (size_t)hidden, down.n, 0};
    products(c, l->types, s.g, to_act, s.x, (size_t)padded(hidden), l->there);
    if (!floats) LAUNCH(c, round_rows, dim3(s.g.pairs), dim3(256), 0, type, s.mid, (const float *)s.act, (size_t)inter, down.k, padded(down.k));
    products(c, l->types, s.g, to_parts, floats ? (const void *)s.act : s.mid, (size_t)inter, l->there + e->n);
    LAUNCH(c, moe_join, dim3(rows), dim3(256), 0, s.g, x, (const float *)s.parts, hidden, c->rank == 0);
    if (down.k < inter) cuda_sum(c, x, (size_t)rows * (size_t)hidden);
}

void cuda_moe(qvl__device *d) {
    d->moe = moe;
    d->moe_work = moe_work;
    d->experts_link = link;
    d->experts_unlink = unlink;
}
