/* draw.h - the arithmetic of choosing a token: the same text for the CPU's sampler and for a thread of a GPU.
 *
 * Job:        penalties, the order of logits; what a device is told about a row that it samples.
 * Input:      single logits.
 * Output:     numbers.
 * Invariants: no sum is taken here: how sums are taken is the sampler's (sample/sample.c) or the device's business.
 */
#ifndef QVL__DRAW_H
#define QVL__DRAW_H

#include <float.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define QVL__DRAW_FN __device__ static inline
#else
#define QVL__DRAW_FN static inline
#endif

/* A row of logits to sample, and how: sample/sample.h says what the numbers mean. */
typedef struct {
    int32_t row;
    int32_t first, bias, seen, banned; /* its tokens: from `first` on so many of each kind, one kind behind the other */
    int32_t top_k;                     /* 0: all */
    float temperature;                 /* 0: greedy */
    float repetition, frequency, presence;
    double log_min_p;                  /* -INFINITY: none */
    double top_p, uniform;             /* uniform: the random number, in (0, 1) */
} qvl__draw;

/* A token whose logit changes before the choice. */
typedef struct {
    int32_t id;
    float bias;
    uint32_t count; /* how often it is in the answer */
} qvl__changed;

/* Instead of a token. */
enum { QVL__DRAW_NOT_FINITE = -1, QVL__DRAW_NOTHING_LEFT = -2 };

/* What overflows stays comparable. */
QVL__DRAW_FN float qvl__bounded(float x) { return x > FLT_MAX ? FLT_MAX : x; }

/* Neither NaN nor +inf. */
QVL__DRAW_FN bool qvl__is_logit(float x) { return x <= FLT_MAX; }

/* Repetition as in Keskar et al. 2019 (CTRL) and transformers, for what is in prompt or answer; frequency and presence for what
 * is in the answer. */
QVL__DRAW_FN float qvl__penalised(float l, uint32_t count, float repetition, float frequency, float presence) {
    if (repetition != 1.0f) l = l > 0 ? l / repetition : l * repetition;
    if (count) l = l - (float)count * frequency - presence;
    return qvl__bounded(l);
}

/* Floats in the order of unsigned integers, and back. */
QVL__DRAW_FN uint32_t qvl__order_of(float x) {
    uint32_t bits;
    x += 0.0f; /* -0 and 0 are equal */
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
QVL__DRAW_FN float qvl__of_order(uint32_t v) {
    uint32_t bits = v & 0x80000000u ? v & 0x7fffffffu : ~v;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* A logit in the order of integers, field by field from the top: the place of a cut is found in three passes. */
enum { QVL__ORDER_PASSES = 3, QVL__ORDER_BINS = 1 << 11 };
QVL__DRAW_FN int qvl__order_shift(int pass) { return pass == 0 ? 21 : pass == 1 ? 10 : 0; }
QVL__DRAW_FN int qvl__order_bits(int pass) { return pass == 2 ? 10 : 11; }

#endif
