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

static void scatter(qvl__device *d, float *y, const float *x, const int32_t *idx, const float *scale, int rows, int dim, int kind) {
    entered c(d);
    if (rows > 0 && dim > 0) LAUNCH(c, scatter_some_rows, dim3(rows), dim3(ROW_THREADS), 0, y, x, idx, scale, rows, dim, kind);
}
static void scatter_rows(qvl__device *d, float *y, const float *x, const int32_t *idx, int rows, int dim, bool add) {
    scatter(d, y, x, idx, NULL, rows, dim, add ? SCATTER_ADD : SCATTER_SET);
}
static void scatter_scaled(qvl__device *d, float *y, const float *x, const int32_t *idx, const float *scale, int rows, int dim) {
    scatter(d, y, x, idx, scale, rows, dim, SCATTER_SCALED);
}

static void add_interpolated(qvl__device *d, float *y, const float *table, const int32_t *index, const float *weight, int rows, int dim) {
    entered c(d);
    if (rows > 0) LAUNCH(c, add_interpolated_rows, dim3(rows), dim3(ROW_THREADS), 0, y, table, index, weight, dim);
}

static void rope_vision(qvl__device *d, float *qkv, int rows, int heads, int head_dim, const float *cos, const float *sin, int span) {
    entered c(d);
    if (rows > 0) LAUNCH(c, rope_vision_rows, dim3(rows), dim3(ROW_THREADS), 0, qkv, 3 * (size_t)heads * (size_t)head_dim, heads_of(c, heads).count, head_dim, cos, sin, span);
}

static void moe_route(qvl__device *d, int32_t *expert, float *weight, const float *logits, int rows, int experts, int top_k) {
    entered c(d);
    if (rows > 0) LAUNCH(c, moe_route_rows, dim3(div_up(rows, 32)), dim3(32), 0, expert, weight, logits, rows, experts, top_k);
}

void cuda_rows(qvl__device *d) {
    d->rms_norm = rms_norm;
    d->layer_norm = layer_norm;
    d->gather_rows = gather_rows;
    d->scatter_rows = scatter_rows;
    d->scatter_scaled = scatter_scaled;
    d->add_interpolated = add_interpolated;
    d->rope_vision = rope_vision;
    d->moe_route = moe_route;
}
