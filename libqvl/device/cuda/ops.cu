/* ops.cu - the ops of the table that work row by row.
 *
 * Job:        launch kernels/rows.cuh.
 * Input:      see device.h.
 * Output:     see device.h.
 * Invariants: one block for each row; nothing is launched for no rows.
 */
#include "cuda.h"

#include "kernels/rows.cuh"

static void rms_norm(qvl__device *d, float *y, const float *x, const float *w, int rows, int dim, float eps) {
    entered c(d);
    if (rows > 0) LAUNCH(c, rms_norm_rows, dim3(rows), dim3(ROW_THREADS), ROW_SHARED, y, x, w, dim, eps);
}

static void layer_norm(qvl__device *d, float *y, const float *x, const float *w, const float *b, int rows, int dim, float eps) {
    entered c(d);
    if (rows > 0) LAUNCH(c, layer_norm_rows, dim3(rows), dim3(ROW_THREADS), ROW_SHARED, y, x, w, b, dim, eps);
}

static void gather_rows(qvl__device *d, float *y, const float *x, const int32_t *idx, int rows, int dim) {
    entered c(d);
    if (rows > 0) LAUNCH(c, gather_some_rows, dim3(rows), dim3(ROW_THREADS), 0, y, x, idx, dim);
}

static void scatter_rows(qvl__device *d, float *y, const float *x, const int32_t *idx, int rows, int dim, bool add) {
    entered c(d);
    if (rows > 0 && dim > 0) LAUNCH(c, scatter_some_rows, dim3(rows), dim3(ROW_THREADS), 0, y, x, idx, rows, dim, add);
}

static void add_interpolated(qvl__device *d, float *y, const float *table, const int32_t *index, const float *weight, int rows, int dim) {
    entered c(d);
    if (rows > 0) LAUNCH(c, add_interpolated_rows, dim3(rows), dim3(ROW_THREADS), 0, y, table, index, weight, dim);
}

static void rope_vision(qvl__device *d, float *qkv, int rows, int heads, int head_dim, const float *cos, const float *sin, int span) {
    entered c(d);
    if (rows > 0) LAUNCH(c, rope_vision_rows, dim3(rows), dim3(ROW_THREADS), 0, qkv, 3 * (size_t)heads * (size_t)head_dim, heads_of(c, heads).count, head_dim, cos, sin, span);
}

void cuda_rows(qvl__device *d) {
    d->rms_norm = rms_norm;
    d->layer_norm = layer_norm;
    d->gather_rows = gather_rows;
    d->scatter_rows = scatter_rows;
    d->add_interpolated = add_interpolated;
    d->rope_vision = rope_vision;
}
