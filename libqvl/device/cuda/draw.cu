/* draw.cu - sampling on the GPU.
 *
 * Job:        the op sample.
 * Input:      see device.h.
 * Output:     see device.h.
 * Invariants: one block for each row.
 */
#include "cuda.h"

#include "kernels/draw.cuh"

static void sample(qvl__device *d, int32_t *chosen, float *logits, int vocab, int limit, const qvl__draw *draws, int rows, const qvl__changed *changed) {
    entered c(d);
    if (rows > 0) LAUNCH(c, draw_rows, dim3(rows), dim3(DRAW_THREADS), sizeof(draw_shared), chosen, logits, vocab, limit, draws, changed);
}

void cuda_draw(qvl__device *d) { d->sample = sample; }
