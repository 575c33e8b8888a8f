/* attend.c - softmax attention of a tile of query rows over the keys and values of one head.
 *
 * Job:        walk the keys step by step with an online softmax; in float, or on the tile registers of AMX.
 * Input:      queries, and where keys and values lie (attend.h).
 * Output:     rows of head_dim floats.
 * Invariants: a query row walks the keys in order, QVL__ATTN_KEYS of them in a step, with a running maximum and sum of
 *             its own, so it does the same operations alone as in a tile with other rows;
 *             scores past a row's own last key are overwritten before anything reads them, and values past it are not
 *             read at all (on tile registers: only where they are finite, times zero): old or uninitialised cache contents
 *             (NaN included) never reach a result.
 */
#include "attend.h"

#include <math.h>
#include <string.h>

#define BLOCK QVL__KV_BLOCK
#define STEP QVL__ATTN_KEYS
#define TILE 16
#define TILE_ROWS (QVL__ATTN_TILE_ROWS + TILE - 1) /* whole registers of rows from any row on */
_Static_assert(TILE_ROWS * (2 * QVL__ATTN_MAX_DIM + 2 * STEP) + STEP * QVL__ATTN_MAX_DIM / 2 <= QVL__ATTN_FLOATS(QVL__ATTN_MAX_DIM), "q, o, s, p and copies of values fit the scratch");

static int least(int a, int b) { return a < b ? a : b; }

void qvl__attend_begin(qvl__tile_rows *t, const struct qvl__kern *k, const qvl__keys *keys, float *scratch) {
    const size_t rows = keys->tiles ? TILE_ROWS : QVL__ATTN_ROWS, dim = (size_t)keys->dim;
    t->k = k;
    t->keys = keys;
    t->q = scratch;
    t->o = t->q + rows * dim;
    t->s = t->o + rows * dim;
    t->p = (uint16_t *)(void *)(t->s + rows * STEP);
    t->wide_k = keys->tiles ? t->s + 2 * rows * STEP : t->s + rows * STEP;
    t->wide_v = t->wide_k + STEP * dim;
    t->rows = 0;
}

void qvl__attend_add(qvl__tile_rows *t, const float *q, int limit) {
    const qvl__keys *ks = t->keys;
    const size_t dim = (size_t)ks->dim;
    float *to = t->q + (size_t)t->rows * dim;
    if (ks->tiles) t->k->split((uint16_t *)(void *)to, dim, q, ks->head_dim);
    else memcpy(to, q, (size_t)ks->head_dim * sizeof(float));
    t->limit[t->rows] = limit;
    t->max[t->rows] = -INFINITY;
    t->sum[t->rows] = 0;
    t->rows++;
}

/* Keys and values of a step that lie together: all of them, or a block of the cache. */
typedef struct {
    qvl__type type;
    const char *k, *v;
    size_t k_panel, v_panel; /* bytes from panel to panel */
} piece;

/* What a step is made of. */
typedef struct {
    piece piece[STEP / BLOCK];
    int pieces, per_piece; /* keys of each but the last */
    const char *next[2];   /* what the step after it reads first */
    const float *k_scale[STEP / BLOCK], *v_scale[STEP / BLOCK]; /* I8: of each block */
} step;

static const char *block_at(const qvl__keys *ks, int b) { return ks->base + (size_t)(ks->table ? ks->table[b] : b) * ks->block_bytes; }

/* Keys k0 .. k0 + n as they lie, or for many rows as floats in scratch, which is exact, so that no bit changes. */
static void take_step(const struct qvl__kern *k, const qvl__keys *ks, const qvl__tile_rows *t, bool many, int k0, int n, int end, step *s) {
    size_t dim = (size_t)ks->dim, size = qvl__type_size(ks->type), half = qvl__kv_half(ks->type, ks->dim);
    s->pieces = 1, s->per_piece = STEP;
    s->next[0] = s->next[1] = NULL;
    if (!ks->table) {
        const char *v = ks->base + (size_t)ks->span * dim * sizeof(float);
        s->piece[0] = (piece){QVL__F32, ks->base + (size_t)k0 * dim * sizeof(float), v + (size_t)k0 * QVL__PANEL * sizeof(float),
                              dim * QVL__PANEL * sizeof(float), (size_t)ks->span * QVL__PANEL * sizeof(float)};
        return;
    }
    int blocks = qvl__div_up(n, BLOCK);
    if (!many) s->pieces = blocks, s->per_piece = BLOCK;
    else s->piece[0] = (piece){QVL__F32, (const char *)t->wide_k, (const char *)t->wide_v, dim * QVL__PANEL * sizeof(float), STEP * QVL__PANEL * sizeof(float)};
    for (int i = 0; i < blocks; i++) {
        const char *kp = block_at(ks, k0 / BLOCK + i), *vp = kp + half;
        if (ks->type == QVL__I8) {
            s->k_scale[i] = (const float *)(const void *)(kp + qvl__kv_panels(ks->type, ks->dim));
            s->v_scale[i] = (const float *)(const void *)(vp + qvl__kv_panels(ks->type, ks->dim));
        }
        if (!many) {
            s->piece[i] = (piece){ks->type, kp, vp, dim * QVL__PANEL * size, BLOCK * QVL__PANEL * size};
            continue;
        }
        k->widen(ks->type, t->wide_k + (size_t)i * BLOCK * dim, kp, BLOCK / QVL__PANEL * ks->dim);
        for (size_t p = 0; p < dim / QVL__PANEL; p++)
            k->widen(ks->type, t->wide_v + (p * STEP + (size_t)i * BLOCK) * QVL__PANEL, vp + p * BLOCK * QVL__PANEL * size, BLOCK);
    }
    for (int i = 0; !many && i < 2 && k0 + n + i * BLOCK < end; i++) s->next[i] = block_at(ks, (k0 + n) / BLOCK + i);
}

/* The half of a block that is read two halves after half i of a step, its keys and then its values: blocks lie anywhere, so the
 * hardware does not see the next one coming, and products ask for it as they go. */
static const char *two_on(const step *s, int i) {
    int j = i + 2;
    return j < s->pieces ? s->piece[j].k : j < 2 * s->pieces ? s->piece[j - s->pieces].v : s->next[j - 2 * s->pieces];
}

/* Many rows: part i of parts of what the step from key k0 on will read, asked for from memory. */
static void ask(const qvl__keys *ks, int k0, int end, int i, int parts) {
    if (!ks->table || k0 >= end) return; /* vision: the hardware sees it coming */
    size_t block = 2 * qvl__kv_half(ks->type, ks->dim), bytes = block * (size_t)qvl__div_up(least(STEP, end - k0), BLOCK);
    for (size_t at = bytes / 64 * (size_t)i / (size_t)parts * 64; at < bytes / 64 * (size_t)(i + 1) / (size_t)parts * 64; at += 64)
        __builtin_prefetch(block_at(ks, k0 / BLOCK + (int)(at / block)) + at % block, 0, 2);
}

/* s[0..n) times the scales of their keys. */
static void scale_keys(const struct qvl__kern *k, float *s, const float *const *scale, int n) {
    for (int i = 0; i < n; i += BLOCK) k->scale(s + i, scale[i / BLOCK], least(BLOCK, n - i));
}

static void attend(const struct qvl__kern *k, const qvl__keys *ks, qvl__tile_rows *t) {
    size_t dim = (size_t)ks->dim;
    const float scale = 1.0f / sqrtf((float)ks->head_dim);
    const int end = t->limit[t->rows - 1], panels = ks->dim / QVL__PANEL;
    memset(t->o, 0, (size_t)t->rows * dim * sizeof(float));
    step s;
    for (int k0 = 0, n, first = 0; k0 < end; k0 += n) {
        n = least(STEP, end - k0);
        while (t->limit[first] <= k0) first++; /* rows that end before this step */
        const int rows = t->rows - first;
        bool many = rows > k->mr;
        take_step(k, ks, t, many, k0, n, end, &s);
        float *scores = t->s + (size_t)first * STEP, *o = t->o + (size_t)first * dim;
        for (int i = 0; i < s.pieces; i++) {
            const piece *p = &s.piece[i];
            int some = least(n - i * s.per_piece, s.per_piece);
            k->gemm(p->type, scores + i * s.per_piece, STEP, t->q + (size_t)first * dim, dim, p->k, p->k_panel, rows, qvl__div_up(some, QVL__PANEL),
                    ks->head_dim, false, many ? NULL : two_on(&s, i));
        }
        for (int r = 0; r < rows; r++) {
            int valid = least(t->limit[first + r] - k0, n);
            float *row = scores + (size_t)r * STEP;
            if (ks->type == QVL__I8) scale_keys(k, row, s.k_scale, valid);
            k->softmax_step(row, valid, scale, &t->max[first + r], &t->sum[first + r], o + (size_t)r * dim, ks->dim);
            if (ks->type == QVL__I8) scale_keys(k, row, s.v_scale, valid);
            if (many) ask(ks, k0 + n, end, r, rows);
        }
        for (int i = 0; i < s.pieces; i++) {
            const piece *p = &s.piece[i];
            const char *next = many ? NULL : two_on(&s, s.pieces + i);
            /* What all rows see, as one product; the rest of it with those rows together that see equally many. */
            int from = i * s.per_piece, to = least(n, from + s.per_piece), all = (least(t->limit[first] - k0, to) - from) / 2 * 2;
            if (all > 0) k->gemm(p->type, o, dim, scores + from, STEP, p->v, p->v_panel, rows, panels, all, true, next);
            else all = 0;
            for (int r = 0, last; r < rows; r = last) {
                int some = least(t->limit[first + r] - k0, to) - from - all;
                for (last = r + 1; last < rows && least(t->limit[first + last] - k0, to) - from - all == some; last++) {}
                if (some > 0)
                    k->gemm(p->type, o + (size_t)r * dim, dim, scores + (size_t)r * STEP + from + all, STEP,
                            p->v + (size_t)all * QVL__PANEL * qvl__type_size(p->type), p->v_panel, last - r, panels, some, true, NULL);
            }
        }
    }
}

/* The same on tile registers, which take queries and probabilities in two parts of bf16 and read the blocks of a bf16 cache as they
 * lie. A block that some row does not see to its end is copied without what no row sees. What some rows see and others do not is
 * zero times a number for these, which adds nothing; if the number is not finite each row goes by itself instead. */
static void attend_tiles(const struct qvl__kern *k, const qvl__keys *ks, qvl__tile_rows *t) {
    const size_t dim = (size_t)ks->dim, half = qvl__kv_half(QVL__BF16, ks->dim), copy = BLOCK * dim;
    const int end = t->limit[t->rows - 1], columns = qvl__kv_padded(ks->head_dim);
    const float scale = 1.0f / sqrtf((float)ks->head_dim);
    memset(t->o, 0, (size_t)t->rows * dim * sizeof(float));
    k->tiles(t->rows);
    for (int k0 = 0, n, first = 0; k0 < end; k0 += n) {
        n = least(STEP, end - k0);
        while (t->limit[first] <= k0) first++;
        const int left = t->rows - first, rows = left <= TILE && t->rows < TILE ? left : qvl__div_up(left, TILE) * TILE, blocks = qvl__div_up(n, BLOCK);
        float *s = t->s, *o = t->o + (size_t)first * dim;
        uint16_t *copies = (uint16_t *)(void *)t->wide_k;
        qvl__split q = {(const uint16_t *)(const void *)(t->q + (size_t)first * dim), 2 * dim, dim}, p = {t->p, 2 * STEP, STEP};
        qvl__kv_list keys = {.n = blocks, .low = ks->low}, values = {.n = blocks, .low = ks->low};
        for (int i = 0; i < blocks; i++) {
            keys.at[i] = block_at(ks, k0 / BLOCK + i);
            values.at[i] = keys.at[i] + half;
            if (ks->table && k0 + n + i * BLOCK < end) { /* vision: the hardware sees it coming */
                keys.next[i] = block_at(ks, (k0 + n) / BLOCK + i);
                values.next[i] = keys.next[i] + half;
            }
        }
        k->scores(s, STEP, q, &keys, rows, ks->dim);
        for (int r = 0; r < left; r++) {
            int valid = least(t->limit[first + r] - k0, n), written = qvl__div_up(valid, QVL__PANEL) * QVL__PANEL;
            float *row = s + (size_t)r * STEP;
            k->softmax_step(row, valid, scale, &t->max[first + r], &t->sum[first + r], o + (size_t)r * dim, ks->dim);
            memset(row + written, 0, (size_t)(blocks * BLOCK - written) * sizeof(float));
            k->split(t->p + (size_t)r * 2 * STEP, STEP, row, blocks * BLOCK);
        }
        int whole = least(t->limit[first] - k0, n) / BLOCK;
        bool finite = true;
        for (int i = whole; i < blocks && ks->table; i++) {
            uint16_t *to = copies + (size_t)(i - whole) * copy;
            finite &= k->first_values(to, (const uint16_t *)(const void *)values.at[i], ks->dim, least(n - i * BLOCK, BLOCK));
            values.at[i] = (const char *)to;
        }
        if (!finite && t->limit[first] != end) values.n = whole;
        if (values.n) k->values(o, dim, p, &values, rows, columns);
        if (values.n == blocks) continue;
        values.at[0] = (const char *)copies;
        values.n = 1;
        values.next[0] = NULL;
        for (int r = 0; r < left; r++)
            for (int i = whole; i < blocks && k0 + i * BLOCK < t->limit[first + r]; i++) {
                k->first_values(copies, (const uint16_t *)(const void *)(block_at(ks, k0 / BLOCK + i) + half), ks->dim,
                                least(t->limit[first + r] - k0 - i * BLOCK, BLOCK));
                qvl__split one = {p.hi + (size_t)r * p.ld + i * BLOCK, p.ld, p.low};
                k->tiles(1);
                k->values(o + (size_t)r * dim, dim, one, &values, 1, columns);
            }
        k->tiles(t->rows);
    }
    k->tiles(0);
    /* A product with zero leaves a sum as it is, but for its sign if it is zero, and unless it is denormal. */
    for (size_t i = 0; i < (size_t)t->rows * dim; i++) t->o[i] = fabsf(t->o[i]) < 0x1p-126f ? 0 : t->o[i];
}

void qvl__attend(qvl__tile_rows *t) {
    if (t->keys->tiles) attend_tiles(t->k, t->keys, t);
    else attend(t->k, t->keys, t);
}

void qvl__attend_row(const qvl__tile_rows *t, int row, float *out) {
    t->k->divide(out, t->o + (size_t)row * (size_t)t->keys->dim, t->sum[row], t->keys->head_dim);
}
