/* divide.h - which part of a weight, and which heads, one of several GPUs has.
 *
 * Job:        runs of output features and inputs by role (device.h), GPU and number of GPUs.
 * Input:      a weight's full sizes.
 * Output:     runs in the full weight's numbering; sizes of the part.
 * Invariants: what one weight's outputs are cut into is what the next one's inputs are cut into: both are cut by the same
 *             rule from the same size; parts cover everything once, but for keys and values of fewer heads than GPUs, which
 *             several GPUs have; with one GPU the part is the whole.
 */
#ifndef QVL__DIVIDE_H
#define QVL__DIVIDE_H

#include "../device.h"

#define MOST_GPUS 8

struct run {
    int from, count;
};

struct part {
    run out[3]; /* of output features; with gate_up the same run of gate and of up features, and out[0] is of one half */
    int outs;
    run in;
    int n, k; /* of the part */
};

/* Part number `rank` of size things, in whole units but for the very last one; some parts may have a unit more. */
static inline run cut_units(int size, int unit, int rank, int ranks) {
    int64_t units = ((int64_t)size + unit - 1) / unit, from = units * rank / ranks * unit, to = units * (rank + 1) / ranks * unit;
    return run{(int)from, (int)((to < size ? to : size) - from)};
}
/* What passes from one weight to the next: in groups of 32, as integers have their scales, where every GPU gets some. */
static inline run cut_inner(int size, int rank, int ranks) { return cut_units(size, size > QVL__GROUP * (ranks - 1) ? QVL__GROUP : 1, rank, ranks); }
/* What is brought together: parts of the same size, the last one may be smaller. */
static inline run cut_table(int size, int rank, int ranks) {
    int each = (int)(((int64_t)size + ranks - 1) / ranks), from = each * rank < size ? each * rank : size;
    return run{from, size - from < each ? size - from : each};
}
/* Heads; of fewer heads than GPUs, one is shared by several. */
static inline run cut_heads(int heads, int rank, int ranks) {
    return heads < ranks ? run{(int)((int64_t)heads * rank / ranks), 1} : run{heads / ranks * rank, heads / ranks};
}

static inline part part_of(int n, int k, const qvl__role *r, int rank, int ranks) {
    part p = {{{0, n}}, 1, {0, k}, n, k};
    int dim = r->head_dim, keys = r->kv_heads * dim, queries = n - 2 * keys;
    if (r->gate_up) p.out[0].count = n / 2;
    if (ranks == 1) return p;
    switch (r->division) {
    case QVL__WHOLE: return p;
    case QVL__BY_OUTPUT: p.out[0] = cut_inner(p.out[0].count, rank, ranks); break;
    case QVL__TABLE: p.out[0] = cut_table(n, rank, ranks); break;
    case QVL__BY_INPUT: p.in = dim ? cut_units(k, dim, rank, ranks) : cut_inner(k, rank, ranks); break;
    case QVL__BY_HEAD:
        for (int i = 0; i < 3; i++) {
            run heads = cut_heads(i ? r->kv_heads : queries / dim, rank, ranks);
            p.out[i] = run{heads.from * dim + (i ? queries + (i - 1) * keys : 0), heads.count * dim};
        }
        p.outs = 3;
    }
    p.k = p.in.count, p.n = 0;
    for (int i = 0; i < p.outs; i++) p.n += p.out[i].count;
    if (r->gate_up) p.n *= 2;
    return p;
}

/* Whether every GPU gets a part that its kernels can have. */
static inline bool divisible(qvl__type type, int n, int k, const qvl__role *r, int ranks) {
    if (ranks == 1 || r->division == QVL__WHOLE) return true;
    int dim = r->head_dim, queries = dim ? n / dim - 2 * r->kv_heads : 0;
    if (r->division == QVL__BY_HEAD && (queries % ranks || (r->kv_heads % ranks && ranks % r->kv_heads))) return false;
    if (r->division == QVL__BY_INPUT && dim && k / dim % ranks) return false;
    for (int i = 0; i < ranks; i++) {
        part p = part_of(n, k, r, i, ranks);
        if (p.n < 1 || p.k < 1) return false;
        if (qvl__type_scaled(type) && p.in.from % QVL__GROUP) return false;
    }
    return true;
}

#endif
