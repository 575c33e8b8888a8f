/* mixed.h - bits by measurement.
 * Job: the plan behind option bits of qvl_quantize (mixed.c). Input: a checkpoint's directory, options. Output: a type for each matrix.
 * Invariants: types is freed by the caller, with qvl__free. */
#ifndef QVL__MIXED_H
#define QVL__MIXED_H

#include "../checkpoint/checkpoint.h"

int qvl__mixed_choose(qvl__mix *plan, const char *path, const qvl_options *o);

#endif
