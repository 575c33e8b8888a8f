/* sample.h - logits to a token.
 *
 * Job:        penalties, bias, temperature, min-p, top-k, top-p, a counter-based random number, log-probabilities.
 * Input:      float logits of one position; what the request asked for; the tokens so far.
 * Output:     one token, with log-probabilities where wanted.
 * Invariants: the outcome is a function of (logits, options, tokens so far, seed, position) and nothing else.
 */
#ifndef QVL__SAMPLE_H
#define QVL__SAMPLE_H

#include "../checkpoint/checkpoint.h"
#include "../device/draw.h"

typedef struct {
    double temperature, top_p, min_p, repetition, presence, frequency;
    int top_k, logprobs; /* logprobs: -1 none, else how many alternatives (at most 64) */
    int64_t seed;
    int32_t *bias_id;
    float *bias;
    int n_bias;
} qvl__sampling;

typedef struct {
    int32_t token;
    float logprob; /* of the model's own distribution: log-softmax of the raw logits */
    int n_top;
    int32_t top_id[64];
    float top_logprob[64];
} qvl__choice;

/* Scratch that samplers of one thread share: vocab entries each. */
typedef struct {
    struct qvl__candidate {
        double prob; /* not normalized until the end */
        float logit; /* over temperature */
        int32_t id;
    } *cand;
    float *raw; /* the logits as they came, where logprobs are wanted of something that changes them */
} qvl__sample_scratch;
int qvl__sample_scratch_new(qvl__sample_scratch *s, int vocab);
void qvl__sample_scratch_free(qvl__sample_scratch *s);

/* All memory is taken by init; choosing a token takes none. */
typedef struct {
    qvl__sampling p;
    int vocab;
    uint8_t *in_prompt; /* one byte per token of the vocabulary, only with a repetition penalty */
    uint32_t *count;    /* per token: occurrences in the answer, only with a penalty */
    int32_t *seen;      /* tokens that a penalty is for, n_seen of them, only with one */
    int n_seen;
    const qvl__sample_scratch *scratch;
} qvl__sampler;

/* Reads the request's options (unset ones from g); checks ids against vocab. scratch must outlive s and belong to the
 * thread that samples. On failure s holds nothing. */
int qvl__sampler_init(qvl__sampler *s, const qvl__sample_scratch *scratch, const qvl_options *o, const qvl__generation_config *g,
                      int vocab, const int32_t *prompt, size_t n);
void qvl__sampler_free(qvl__sampler *s);
/* position = index of the token to be chosen in the whole sequence; logits are overwritten. limit: ids >= limit are
 * never chosen (padding of the vocabulary beyond the tokenizer). banned: ids that may not be chosen now (end tokens
 * before min_tokens). QVL_ENUMERIC when a logit is NaN or +inf or when none is left to choose. Greedy takes the lowest
 * id among equals. */
int qvl__sample(qvl__sampler *s, float *logits, int limit, const int32_t *banned, int n_banned, uint64_t position,
                qvl__choice *out);
/* What a device needs to do the same (device.h's op sample) for a row: *d but for its row and first, and the tokens that change, at most
 * `room` of them, into to. False: they are more, or log-probabilities are wanted, which are the host's business. */
bool qvl__sampler_draw(const qvl__sampler *s, const int32_t *banned, int n_banned, uint64_t position, qvl__draw *d, qvl__changed *to, int room);
/* What came of it: as qvl__sample. */
int qvl__sampler_take(int32_t chosen, qvl__choice *out);
void qvl__sampler_accept(qvl__sampler *s, int32_t token);
/* Log-softmax of logits[0, vocab) for token, and the n_top most likely of the ids below limit. token < 0: no logprob.
 * QVL_ENUMERIC when a logit is NaN or +inf. */
int qvl__logprobs(const float *logits, int vocab, int limit, int32_t token, int n_top, qvl__choice *out);
/* What sampling would draw from: kept ids in descending probability (equal ones: the lowest id first), for tests.
 * Returns their number. Not for greedy. */
int qvl__sample_distribution(qvl__sampler *s, float *logits, int limit, int32_t *ids, double *probs);
/* Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 random bits that depend on
 * counter and key alone. */
void qvl__philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

#endif
