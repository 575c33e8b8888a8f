/* pages.c - the block pool.
 *
 * Job:        a stack of free blocks.
 * Input:      requests for n blocks; returns.
 * Output:     block numbers.
 * Invariants: taken + free = total; no allocation after init.
 */
#include "kv.h"

int qvl__blocks_init(qvl__blocks *b, int total) {
    *b = (qvl__blocks){qvl__array(NULL, (size_t)total, sizeof(int32_t)), total, total};
    if (!b->free) return QVL_ENOMEM;
    for (int i = 0; i < total; i++) b->free[i] = total - 1 - i; /* block 0 is handed out first */
    return 0;
}

void qvl__blocks_destroy(qvl__blocks *b) {
    qvl__free(b->free);
    *b = (qvl__blocks){0};
}

bool qvl__blocks_take(qvl__blocks *b, int32_t *table, int n) {
    if (n > b->n_free) return false;
    for (int i = 0; i < n; i++) table[i] = b->free[--b->n_free];
    return true;
}

void qvl__blocks_give(qvl__blocks *b, const int32_t *table, int n) {
    for (int i = n; i-- > 0;) b->free[b->n_free++] = table[i];
}
