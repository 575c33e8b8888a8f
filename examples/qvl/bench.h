/* bench.h - what the modes of qvl bench share.
 * Job: random prompts, and what every entry of the results says of model and machine.
 * Input: the tool's arguments and an open model. Output: token ids, JSON entries, a line on stdout.
 * Invariants: the same seed draws the same tokens on every machine. */
#ifndef QVL_TOOL_BENCH_H
#define QVL_TOOL_BENCH_H

#include "tool.h"

typedef struct {
    uint64_t state; /* not 0 */
    uint32_t vocab; /* of bench_describe */
} bench_random;
uint32_t bench_draw(bench_random *r);
/* n tokens that stand for text: no special ones, none beyond the tokenizer's. */
int bench_tokens(const qvl_model *m, bench_random *r, int32_t *ids, long n);
/* What every entry says of the model, into about; a line of it on stdout without --json. */
int bench_describe(const tool_args *a, const qvl_model *m, json_t *about, uint32_t *vocab);
/* Appends the entry with peak memory. */
int bench_memory(const tool_args *a, const json_t *about, json_t *results);
/* kernels.c: qvl bench --kernels */
int bench_kernels(const tool_args *a);

#endif
