/* bpe.h - the vocabulary as tables, and byte-level byte-pair encoding of one word. Private to the tokenizer.
 *
 * Job:        hold every token's bytes once, find a token by its bytes, find what two neighbours merge to.
 * Input:      tokens and merges from vocab.c; words from tokenize.c.
 * Output:     ids.
 * Invariants: immutable once loaded, so any thread may encode; a word of n bytes takes O(n log n) time.
 */
#ifndef QVL__BPE_H
#define QVL__BPE_H

#include "../base/base.h"

enum {
    QVL__TOKEN_EXISTS = 1,  /* the id is used */
    QVL__TOKEN_BASE = 2,    /* of the byte-level vocabulary: what merges are made of */
    QVL__TOKEN_SPECIAL = 4, /* added and marked special */
    QVL__TOKEN_WHOLE = 8    /* merging this token's bytes gives this token again, as it nearly always does */
};

typedef struct {
    /* Token id: bytes[start[id]] to bytes[start[id + 1]]; limit = largest id + 1. */
    char *bytes;
    uint32_t *start;
    uint8_t *flags;
    int32_t limit;
    int32_t byte_id[256]; /* the tokens of one byte, where every word begins */
    int32_t *by_bytes;    /* open addressing over the base tokens; -1 is empty */
    size_t by_mask;
    struct qvl__merge {
        uint64_t pair; /* left id << 32 | right id; NO_PAIR is empty */
        uint32_t rank; /* the smallest rank merges first */
    } *merges;
    size_t merges_mask, n_merges, max_merges;
    int32_t *merged;         /* by rank: what the two become */
    uint32_t *byte_rank;     /* [256][256]: the rank of two bytes, which every word asks for first */
} qvl__bpe;

/* Growing ids, and the scratch of long words; one per call, zeroed at first. */
typedef struct {
    int32_t *ids;
    size_t n, cap;
    struct qvl__symbol *symbols;
    uint64_t *heap;
    size_t word_cap;
} qvl__bpe_out;
void qvl__bpe_out_free(qvl__bpe_out *o);
int qvl__bpe_put(qvl__bpe_out *o, int32_t id);

/* Loading, in this order: bytes, start, flags and limit are set; index; add_merge for each, by rank; finish. */
int qvl__bpe_index(qvl__bpe *b, size_t max_merges);
int qvl__bpe_add_merge(qvl__bpe *b, int32_t left, int32_t right, int32_t id);
int qvl__bpe_finish(qvl__bpe *b);
void qvl__bpe_free(qvl__bpe *b);

/* The base token with exactly these bytes; -1 when there is none. */
int32_t qvl__bpe_find(const qvl__bpe *b, const char *bytes, size_t n);

/* Appends the ids of one word (a piece of the pre-tokenizer). */
int qvl__bpe_word(const qvl__bpe *b, const char *word, size_t n, qvl__bpe_out *o);

#endif
