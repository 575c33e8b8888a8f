/* route.h - which experts a row takes: the same text for the CPU and for a thread of a GPU.
 *
 * Job:        the experts of one row, for the op moe.
 * Input:      logits of all experts.
 * Output:     the top_k largest, the lower index first among equals, and their softmax.
 * Invariants: softmax over the chosen is softmax over all divided by the sum of the chosen: what all share cancels.
 */
#ifndef QVL__ROUTE_H
#define QVL__ROUTE_H

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
__device__
#endif
static inline void qvl__route_row(int32_t *expert, float *weight, const float *logits, int experts, int top_k) {
    float sum = 0;
    int n = 0;
    for (int i = 0; i < experts; i++) { /* insertion into a short list; a later equal stays behind */
        if (n == top_k && !(logits[i] > logits[expert[n - 1]])) continue;
        int at = n < top_k ? n++ : n - 1;
        for (; at > 0 && logits[i] > logits[expert[at - 1]]; at--) expert[at] = expert[at - 1];
        expert[at] = i;
    }
    for (int k = 0; k < top_k; k++) sum += weight[k] = expf(logits[expert[k]] - logits[expert[0]]);
    for (int k = 0; k < top_k; k++) weight[k] /= sum;
}

#endif
