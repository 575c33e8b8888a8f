/* bpe.c - byte-pair encoding: tables by open addressing, merges by rank.
 *
 * Job:        a word's bytes to ids: begin with one token per byte; while any two neighbours are a merge, join the
 *             pair of the smallest rank, the leftmost one among equals (Sennrich et al. 2016, as in tokenizers' BPE).
 * Input:      see bpe.h.
 * Output:     ids.
 * Invariants: three ways, one result: a word that is a token which merging would make anyway is looked up; a short
 *             word is merged in arrays on the stack; a long one in a linked list with a heap of pairs, so that a
 *             megabyte without a space takes n log n steps instead of n squared.
 */
#include <string.h>

#include "bpe.h"

#define NO_PAIR UINT64_MAX
#define NO_RANK UINT32_MAX
enum { SHORT_WORD = 48 }; /* bytes; above it the heap is faster than searching the array for every merge */

/* ---- tables ---- */

static size_t hash_bytes(const char *s, size_t n) {
    uint64_t h = n * 0x9E3779B97F4A7C15u;
    for (; n >= 8; s += 8, n -= 8) {
        uint64_t w;
        memcpy(&w, s, 8);
        h = (h ^ w) * 0xFF51AFD7ED558CCDu;
        h ^= h >> 32;
    }
    uint64_t w = 0;
    memcpy(&w, s, n);
    h = (h ^ w) * 0xC4CEB9FE1A85EC53u;
    return (size_t)(h ^ h >> 29);
}

static size_t hash_pair(uint64_t pair) {
    pair *= 0x9E3779B97F4A7C15u;
    return (size_t)(pair ^ pair >> 32);
}

static size_t power_of_two_above(size_t n) {
    size_t p = 16;
    while (p < n) p *= 2;
    return p;
}

int32_t qvl__bpe_find(const qvl__bpe *b, const char *bytes, size_t n) {
    for (size_t i = hash_bytes(bytes, n) & b->by_mask; b->by_bytes[i] >= 0; i = (i + 1) & b->by_mask) {
        int32_t id = b->by_bytes[i];
        if (b->start[id + 1] - b->start[id] == n && memcmp(b->bytes + b->start[id], bytes, n) == 0) return id;
    }
    return -1;
}

static uint32_t rank_of(const qvl__bpe *b, int32_t left, int32_t right) {
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    for (size_t i = hash_pair(pair) & b->merges_mask;; i = (i + 1) & b->merges_mask) {
        if (b->merges[i].pair == pair) return b->merges[i].rank;
        if (b->merges[i].pair == NO_PAIR) return NO_RANK;
    }
}

int qvl__bpe_index(qvl__bpe *b, size_t max_merges) {
    size_t room = power_of_two_above((size_t)b->limit * 2);
    b->by_bytes = qvl__array(NULL, room, sizeof *b->by_bytes);
    if (!b->by_bytes) return QVL_ENOMEM;
    memset(b->by_bytes, 0xFF, room * sizeof *b->by_bytes);
    b->by_mask = room - 1;
    for (int32_t id = 0; id < b->limit; id++) {
        if (!(b->flags[id] & QVL__TOKEN_BASE)) continue;
        const char *bytes = b->bytes + b->start[id];
        size_t n = b->start[id + 1] - b->start[id], i = hash_bytes(bytes, n) & b->by_mask;
        int32_t twin = qvl__bpe_find(b, bytes, n);
        if (twin >= 0) return qvl__fail(QVL_EFORMAT, "the tokens %d and %d are the same bytes", (int)twin, (int)id);
        while (b->by_bytes[i] >= 0) i = (i + 1) & b->by_mask;
        b->by_bytes[i] = id;
    }
    for (int c = 0; c < 256; c++) {
        char byte = (char)c;
        b->byte_id[c] = qvl__bpe_find(b, &byte, 1);
        if (b->byte_id[c] < 0)
            return qvl__fail(QVL_EUNSUPPORTED,
                             "the vocabulary has no token for the byte 0x%02X; a byte-level vocabulary has all 256", c);
    }
    room = power_of_two_above(max_merges + max_merges / 2 + 1);
    b->merges = qvl__array(NULL, room, sizeof *b->merges);
    b->merged = qvl__array(NULL, max_merges, sizeof *b->merged);
    b->byte_rank = qvl__array(NULL, 256 * 256, sizeof *b->byte_rank);
    if (!b->merges || !b->merged || !b->byte_rank) return QVL_ENOMEM;
    b->max_merges = max_merges;
    for (size_t i = 0; i < room; i++) b->merges[i] = (struct qvl__merge){.pair = NO_PAIR};
    b->merges_mask = room - 1;
    return 0;
}

int qvl__bpe_add_merge(qvl__bpe *b, int32_t left, int32_t right, int32_t id) {
    if (b->n_merges >= b->max_merges) return qvl__fail(QVL_EINTERNAL, "more merges than announced");
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t i = hash_pair(pair) & b->merges_mask;
    while (b->merges[i].pair != NO_PAIR && b->merges[i].pair != pair) i = (i + 1) & b->merges_mask;
    b->merges[i] = (struct qvl__merge){pair, (uint32_t)b->n_merges}; /* listed twice: the later rank holds, as in tokenizers */
    b->merged[b->n_merges++] = id;
    return 0;
}

void qvl__bpe_free(qvl__bpe *b) {
    qvl__free(b->bytes);
    qvl__free(b->start);
    qvl__free(b->flags);
    qvl__free(b->by_bytes);
    qvl__free(b->merges);
    qvl__free(b->merged);
    qvl__free(b->byte_rank);
    *b = (qvl__bpe){0};
}

/* ---- words ---- */

void qvl__bpe_out_free(qvl__bpe_out *o) {
    qvl__free(o->ids);
    qvl__free(o->symbols);
    qvl__free(o->heap);
    *o = (qvl__bpe_out){0};
}

int qvl__bpe_put(qvl__bpe_out *o, int32_t id) {
    if (o->n == o->cap) {
        size_t cap = o->cap ? o->cap * 2 : 64;
        int32_t *ids = qvl__array(o->ids, cap, sizeof *ids);
        if (!ids) return QVL_ENOMEM;
        o->ids = ids;
        o->cap = cap;
    }
    o->ids[o->n++] = id;
    return 0;
}

static int short_word(const qvl__bpe *b, const uint8_t *word, size_t n, qvl__bpe_out *o) {
    int32_t sym[SHORT_WORD];
    uint32_t rank[SHORT_WORD]; /* of sym[i] with sym[i + 1] */
    for (size_t i = 0; i < n; i++) sym[i] = b->byte_id[word[i]];
    for (size_t i = 0; i + 1 < n; i++) rank[i] = b->byte_rank[word[i] << 8 | word[i + 1]];
    rank[n - 1] = NO_RANK;
    for (;;) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == NO_RANK) break;
        sym[best] = b->merged[rank[best]];
        size_t gone = best + 1, after = n - gone - 1;
        memmove(sym + gone, sym + gone + 1, after * sizeof *sym);
        memmove(rank + gone, rank + gone + 1, after * sizeof *rank);
        n--;
        rank[best] = best + 1 < n ? rank_of(b, sym[best], sym[best + 1]) : NO_RANK;
        if (best > 0) rank[best - 1] = rank_of(b, sym[best - 1], sym[best]);
    }
    for (size_t i = 0; i < n; i++) {
        int rc = qvl__bpe_put(o, sym[i]);
        if (rc < 0) return rc;
    }
    return 0;
}

/* A symbol of a long word: a list in an array, in the order of the text. */
struct qvl__symbol {
    int32_t id;
    uint32_t rank; /* with the next one; NO_RANK: no merge, last, or swallowed by the one before */
    uint32_t prev, next;
};
#define END UINT32_MAX

/* A binary heap of rank << 32 | position: the smallest rank first, the leftmost among equals. An entry whose symbol has
 * another rank by now is out of date and skipped (a pair only ever grows, so it never comes back to an old rank). */
static void heap_push(uint64_t *heap, size_t *n, uint64_t v) {
    size_t i = (*n)++;
    for (; i > 0 && heap[(i - 1) / 2] > v; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = v;
}

static uint64_t heap_pop(uint64_t *heap, size_t *n) {
    uint64_t top = heap[0], v = heap[--*n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < *n; i = child) {
        if (child + 1 < *n && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= v) break;
        heap[i] = heap[child];
    }
    heap[i] = v;
    return top;
}

static int reserve_long(qvl__bpe_out *o, size_t n) {
    if (n <= o->word_cap) return 0;
    struct qvl__symbol *s = qvl__array(o->symbols, n, sizeof *s);
    if (!s) return QVL_ENOMEM;
    o->symbols = s;
    uint64_t *heap = qvl__array(o->heap, n, 2 * sizeof *heap); /* n - 1 pairs; a merge takes one entry and adds two */
    if (!heap) return QVL_ENOMEM;
    o->heap = heap;
    o->word_cap = n;
    return 0;
}

static int long_word(const qvl__bpe *b, const uint8_t *word, size_t n, qvl__bpe_out *o) {
    int rc = reserve_long(o, n);
    if (rc < 0) return rc;
    struct qvl__symbol *s = o->symbols;
    uint64_t *heap = o->heap;
    size_t waiting = 0;
    for (size_t i = 0; i < n; i++)
        s[i] = (struct qvl__symbol){.id = b->byte_id[word[i]], .rank = NO_RANK, .prev = (uint32_t)i - 1, .next = (uint32_t)i + 1};
    s[0].prev = s[n - 1].next = END;
    for (size_t i = 0; i + 1 < n; i++) {
        s[i].rank = b->byte_rank[word[i] << 8 | word[i + 1]];
        if (s[i].rank != NO_RANK) heap_push(heap, &waiting, (uint64_t)s[i].rank << 32 | i);
    }
    while (waiting) {
        uint64_t top = heap_pop(heap, &waiting);
        uint32_t i = (uint32_t)top;
        if (s[i].rank != top >> 32) continue;
        uint32_t gone = s[i].next;
        s[i].id = b->merged[s[i].rank];
        s[i].next = s[gone].next;
        s[gone].rank = NO_RANK;
        s[i].rank = NO_RANK;
        if (s[i].next != END) {
            s[s[i].next].prev = i;
            s[i].rank = rank_of(b, s[i].id, s[s[i].next].id);
            if (s[i].rank != NO_RANK) heap_push(heap, &waiting, (uint64_t)s[i].rank << 32 | i);
        }
        uint32_t p = s[i].prev;
        if (p != END) {
            s[p].rank = rank_of(b, s[p].id, s[i].id);
            if (s[p].rank != NO_RANK) heap_push(heap, &waiting, (uint64_t)s[p].rank << 32 | p);
        }
    }
    for (uint32_t i = 0; i != END; i = s[i].next)
        if ((rc = qvl__bpe_put(o, s[i].id)) < 0) return rc;
    return 0;
}

static int merge_word(const qvl__bpe *b, const uint8_t *word, size_t n, qvl__bpe_out *o) {
    if (n == 1) return qvl__bpe_put(o, b->byte_id[word[0]]);
    return n <= SHORT_WORD ? short_word(b, word, n, o) : long_word(b, word, n, o);
}

int qvl__bpe_finish(qvl__bpe *b) {
    for (int left = 0; left < 256; left++)
        for (int right = 0; right < 256; right++)
            b->byte_rank[left << 8 | right] = rank_of(b, b->byte_id[left], b->byte_id[right]);
    qvl__bpe_out o = {0};
    int rc = 0;
    for (int32_t id = 0; id < b->limit && rc == 0; id++) {
        size_t n = b->start[id + 1] - b->start[id];
        if (!(b->flags[id] & QVL__TOKEN_BASE) || n == 0) continue;
        o.n = 0;
        rc = merge_word(b, (const uint8_t *)b->bytes + b->start[id], n, &o);
        if (rc == 0 && o.n == 1 && o.ids[0] == id) b->flags[id] |= QVL__TOKEN_WHOLE;
    }
    qvl__bpe_out_free(&o);
    return rc;
}

int qvl__bpe_word(const qvl__bpe *b, const char *word, size_t n, qvl__bpe_out *o) {
    if (n == 0) return 0;
    int32_t id = qvl__bpe_find(b, word, n);
    if (id >= 0 && b->flags[id] & QVL__TOKEN_WHOLE) return qvl__bpe_put(o, id);
    return merge_word(b, (const uint8_t *)word, n, o);
}
