/* pages.c - the block pool.
 *
 * Job:        free blocks, held blocks, and blocks kept for their contents.
 * Input:      requests for blocks; keys; returns.
 * Output:     block numbers.
 * Invariants: free + kept + held = total; no allocation after init; a block is in the table of keys exactly while it
 *             has one.
 */
#include <string.h>

#include "kv.h"

static bool has_key(const qvl__blocks *b, int32_t block) { return (b->key[block].lo | b->key[block].hi) != 0; }
static bool same(qvl__key x, qvl__key y) { return x.lo == y.lo && x.hi == y.hi; }

int qvl__blocks_init(qvl__blocks *b, int total) {
    size_t n = (size_t)total;
    *b = (qvl__blocks){.total = total, .n_free = total, .n_slots = 4, .names = PTHREAD_MUTEX_INITIALIZER};
    while (b->n_slots < 2 * total) b->n_slots *= 2;
    b->refs = qvl__calloc(n, sizeof *b->refs);
    b->free = qvl__array(NULL, n, sizeof *b->free);
    b->prev = qvl__array(NULL, n + 1, sizeof *b->prev);
    b->next = qvl__array(NULL, n + 1, sizeof *b->next);
    b->key = qvl__calloc(n, sizeof *b->key);
    b->slots = qvl__array(NULL, (size_t)b->n_slots, sizeof *b->slots);
    if (!b->refs || !b->free || !b->prev || !b->next || !b->key || !b->slots) return QVL_ENOMEM;
    for (int i = 0; i < total; i++) b->free[i] = total - 1 - i; /* block 0 is handed out first */
    for (int i = 0; i < b->n_slots; i++) b->slots[i] = -1;
    b->prev[total] = b->next[total] = total;
    return 0;
}

void qvl__blocks_destroy(qvl__blocks *b) {
    void *const all[] = {b->refs, b->free, b->prev, b->next, b->key, b->slots};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) qvl__free(all[i]);
    *b = (qvl__blocks){0};
}

/* ---- table of keys: linear probing ---- */

/* The slot that holds key, or the empty one where it would go. */
static int slot_of(const qvl__blocks *b, qvl__key key) {
    int mask = b->n_slots - 1, i = (int)(key.lo & (uint64_t)mask);
    while (b->slots[i] >= 0 && !same(b->key[b->slots[i]], key)) i = (i + 1) & mask;
    return i;
}

/* Takes a block out of the table; entries behind it that probed past its slot move up. */
static void forget(qvl__blocks *b, int32_t block) {
    pthread_mutex_lock(&b->names);
    int mask = b->n_slots - 1, hole = slot_of(b, b->key[block]);
    for (int i = (hole + 1) & mask; b->slots[i] >= 0; i = (i + 1) & mask) {
        int home = (int)(b->key[b->slots[i]].lo & (uint64_t)mask);
        if (((i - home) & mask) < ((i - hole) & mask)) continue; /* its home lies behind the hole */
        b->slots[hole] = b->slots[i];
        hole = i;
    }
    b->slots[hole] = -1;
    b->key[block] = (qvl__key){0};
    pthread_mutex_unlock(&b->names);
}

/* ---- list of kept blocks, oldest first ---- */

static void keep(qvl__blocks *b, int32_t block) {
    int32_t end = b->total;
    b->prev[block] = b->prev[end];
    b->next[block] = end;
    b->next[b->prev[end]] = block;
    b->prev[end] = block;
    b->n_kept++;
}

static void unkeep(qvl__blocks *b, int32_t block) {
    b->next[b->prev[block]] = b->next[block];
    b->prev[b->next[block]] = b->prev[block];
    b->n_kept--;
}

/* ---- the pool ---- */

bool qvl__blocks_take(qvl__blocks *b, int32_t *table, int n) {
    if (n > b->n_free + b->n_kept) return false;
    for (int i = 0; i < n; i++) {
        int32_t block;
        if (b->n_free) block = b->free[--b->n_free];
        else {
            block = b->next[b->total];
            unkeep(b, block);
            forget(b, block);
        }
        b->refs[block] = 1;
        table[i] = block;
    }
    return true;
}

int32_t qvl__blocks_share(qvl__blocks *b, qvl__key key) {
    int32_t block = b->slots[slot_of(b, key)];
    if (block >= 0 && b->refs[block]++ == 0) unkeep(b, block);
    return block;
}

void qvl__blocks_name(qvl__blocks *b, int32_t block, qvl__key key) {
    int slot = slot_of(b, key);
    if (b->slots[slot] >= 0 || has_key(b, block)) return;
    pthread_mutex_lock(&b->names);
    b->slots[slot] = block;
    b->key[block] = key;
    pthread_mutex_unlock(&b->names);
}

bool qvl__blocks_knows(qvl__blocks *b, qvl__key key) {
    pthread_mutex_lock(&b->names);
    bool known = b->slots[slot_of(b, key)] >= 0;
    pthread_mutex_unlock(&b->names);
    return known;
}

/* The last blocks of a sequence are given back first: they are the first to go, because a prefix without its beginning is
 * of no use. */
void qvl__blocks_give(qvl__blocks *b, const int32_t *table, int n) {
    for (int i = n; i-- > 0;) {
        int32_t block = table[i];
        if (--b->refs[block] > 0) continue;
        if (has_key(b, block)) keep(b, block);
        else b->free[b->n_free++] = block;
    }
}
