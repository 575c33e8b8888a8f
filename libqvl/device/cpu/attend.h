/* attend.h - one tile of query rows against the keys and values of one head.
 *
 * Job:        what attention.c gives attend.c, and the sizes of a KV block.
 * Input:      included by both.
 * Output:     declarations.
 * Invariants: a tile's rows are added in ascending order of their limits.
 */
#ifndef QVL__ATTEND_H
#define QVL__ATTEND_H

#include "cpu.h"

static inline int qvl__kv_padded(int head_dim) { return qvl__div_up(head_dim, QVL__PANEL) * QVL__PANEL; }
static inline size_t qvl__kv_panels(qvl__type type, int dim) { return (size_t)QVL__KV_BLOCK * (size_t)dim * qvl__type_size(type); }
static inline size_t qvl__kv_half(qvl__type type, int dim) { /* K or V of a block */
    return qvl__kv_panels(type, dim) + (type == QVL__I8 ? QVL__KV_BLOCK * sizeof(float) : 0);
}

/* Keys and values of a head: blocks of the cache, or of vision (no table): one block of floats, or on tile registers blocks as in a bf16 cache
 * that follow one another, each with what rounding left of it, and zero behind the last key. */
typedef struct {
    qvl__type type;
    bool tiles; /* bf16 numbers, attended to on tile registers; dim is a multiple of 32 */
    int head_dim, dim;
    const char *base;     /* block 0 of the cache; vision: all keys */
    size_t block_bytes;   /* from one block to the next */
    size_t low;           /* tiles: bytes from numbers to what rounding left of them; 0: nothing */
    const int32_t *table; /* vision: NULL */
    int span;             /* vision in floats: keys there is room for, and V lies behind that many */
} qvl__keys;

typedef struct {
    const struct qvl__kern *k;
    const qvl__keys *keys;
    float *q, *o, *s, *wide_k, *wide_v; /* scratch; tiles: q is in two parts of bf16, wide_k are copies of values */
    uint16_t *p;                        /* tiles: probabilities in two parts */
    float max[QVL__ATTN_TILE_ROWS], sum[QVL__ATTN_TILE_ROWS];
    int limit[QVL__ATTN_TILE_ROWS]; /* keys that the row sees; ascending */
    int rows;
} qvl__tile_rows;

/* Most rows of a tile. */
static inline int qvl__attend_most(bool tiles) { return tiles ? QVL__ATTN_TILE_ROWS : QVL__ATTN_ROWS; }

/* An empty tile over a worker's scratch. */
void qvl__attend_begin(qvl__tile_rows *t, const struct qvl__kern *k, const qvl__keys *keys, float *scratch);
/* One more row: head_dim numbers, and how many keys it sees. */
void qvl__attend_add(qvl__tile_rows *t, const float *q, int limit);
/* Attends for all rows. */
void qvl__attend(qvl__tile_rows *t);
/* What came out for a row: head_dim numbers. */
void qvl__attend_row(const qvl__tile_rows *t, int row, float *out);

#endif
