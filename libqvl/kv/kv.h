/* kv.h - who owns which block of the paged KV cache.
 *
 * Job:        hand out and take back blocks of QVL__KV_BLOCK tokens.
 * Input:      how many blocks a sequence needs.
 * Output:     block numbers for its table.
 * Invariants: a block has one owner or is free; all or nothing: a sequence gets every block it asked for or none.
 */
#ifndef QVL__KV_H
#define QVL__KV_H

#include "../device/device.h"

typedef struct {
    int32_t *free; /* stack of free block numbers */
    int n_free, total;
} qvl__blocks;
int qvl__blocks_init(qvl__blocks *b, int total);
void qvl__blocks_destroy(qvl__blocks *b);
static inline int qvl__blocks_for(int64_t tokens) { return (int)((tokens + QVL__KV_BLOCK - 1) / QVL__KV_BLOCK); }
/* Takes n blocks into table; false (and nothing taken) when fewer are free. */
bool qvl__blocks_take(qvl__blocks *b, int32_t *table, int n);
void qvl__blocks_give(qvl__blocks *b, const int32_t *table, int n);

#endif
