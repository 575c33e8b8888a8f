/* kv.h - who owns which block of the paged KV cache, and what is in it.
 *
 * Job:        hand out blocks of QVL__KV_BLOCK tokens, share those whose contents are already there, take them back.
 * Input:      how many blocks a sequence needs; keys that name the contents of full blocks.
 * Output:     block numbers for its table.
 * Invariants: refs[b] sequences hold block b; a block without holders is free, or kept for its contents until the room is
 *             needed (least recently used first); equal keys mean equal tokens, pictures and positions from the first
 *             token on, so sharing changes no bit of any answer (law 6 and 7).
 */
#ifndef QVL__KV_H
#define QVL__KV_H

#include <pthread.h>

#include "../device/device.h"

/* 128 bits of a SHA-256 chain over everything up to the end of a block. */
typedef struct {
    uint64_t lo, hi;
} qvl__key;

typedef struct {
    int total, n_free, n_kept;
    int32_t *refs;
    int32_t *free;        /* stack of blocks without contents */
    int32_t *prev, *next; /* list of kept blocks; place `total` is its head and tail */
    qvl__key *key;        /* of a named block; {0, 0} otherwise */
    int32_t *slots;       /* hash table from key to block, -1 empty; a power of two, at most half full */
    int n_slots;
    pthread_mutex_t names; /* held while names change, for qvl__blocks_knows; all else belongs to the stepping thread */
} qvl__blocks;

/* ---- pages.c ---- */
int qvl__blocks_init(qvl__blocks *b, int total);
void qvl__blocks_destroy(qvl__blocks *b);
static inline int qvl__blocks_for(int64_t tokens) { return (int)((tokens + QVL__KV_BLOCK - 1) / QVL__KV_BLOCK); }
/* Takes n blocks of unknown contents into table, giving up kept ones where needed; false and nothing taken when n are not
 * to be had. */
bool qvl__blocks_take(qvl__blocks *b, int32_t *table, int n);
/* The block of these contents, held once more; -1 when there is none. */
int32_t qvl__blocks_share(qvl__blocks *b, qvl__key key);
/* Holds a block that somebody holds once more. */
static inline void qvl__blocks_hold(qvl__blocks *b, int32_t block) { b->refs[block]++; }
/* Says what a held block now holds. When another block of the same contents is known already, nothing happens. */
void qvl__blocks_name(qvl__blocks *b, int32_t block, qvl__key key);
/* Whether the contents of that name are there now. [any thread] */
bool qvl__blocks_knows(qvl__blocks *b, qvl__key key);
void qvl__blocks_give(qvl__blocks *b, const int32_t *table, int n);
static inline int qvl__blocks_left(const qvl__blocks *b) { return b->n_free + b->n_kept; }
static inline int qvl__blocks_held(const qvl__blocks *b) { return b->total - b->n_free - b->n_kept; }

/* ---- prefix.c ---- */
/* Where a picture begins or goes on inside a block: at token `at`, with its own token number `place`. */
typedef struct {
    int32_t at, place;
    const uint8_t *hash; /* 32 bytes: kind, grid and pixels */
} qvl__mark;
/* The key of the block after `before` ({0, 0} for the first) that holds these QVL__KV_BLOCK tokens. */
qvl__key qvl__prefix_key(qvl__key before, const int32_t *tokens, const qvl__mark *marks, int n_marks);

#endif
