/* vocab.h - what a tokenizer is made of once its files are read. Private to the tokenizer.
 *
 * Job:        the struct behind qvl_tokenizer; filled by vocab.c, used by tokenize.c.
 * Input:      -
 * Output:     -
 * Invariants: nothing in it changes after loading.
 */
#ifndef QVL__VOCAB_H
#define QVL__VOCAB_H

#include "bpe.h"

/* A token that is found in the text itself. */
typedef struct {
    const char *text; /* inside bpe.bytes */
    size_t len;
    int32_t id;
} qvl__added_token;

struct qvl_tokenizer {
    qvl__bpe bpe;
    qvl__added_token *added; /* in the order of their bytes */
    size_t n_added;
    bool nfc;
    void *regex; /* pcre2_code of the pre-tokenizer */
};

/* The pre-tokenizer of Qwen2 to Qwen3 as tokenizer.json writes it; any other one is refused. */
#define QVL__QWEN2_PATTERN                                                                                                         \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

/* Reads the files of dir into t->bpe, t->added, t->nfc. On failure what was taken is still in t. */
int qvl__vocab_load(qvl_tokenizer *t, const char *dir);

#endif
