/* moe.c - the mixture-of-experts MLP (transformers Qwen3VLMoeTextSparseMoeBlock).
 *
 * Job:        route each row to its experts, run every expert once over the rows it got, add the weighted results.
 * Input:      normed rows in ws->norm.
 * Output:     added to ws->x.
 * Invariants: experts run in ascending order, so a row's results are added in the order of its own experts' numbers,
 *             whatever other rows are in the batch; one product per expert, not one per row.
 */
#include "forward.h"

/* The rows that chose expert e, with their weights; returns how many. */
static int rows_of(qvl__text_ws *ws, int e, int rows, int top_k) {
    int n = 0;
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < top_k; k++)
            if (ws->host_route[r * top_k + k] == e) {
                ws->host_index[n] = r;
                ws->host_scale[n++] = ws->host_weight[r * top_k + k];
                break;
            }
    return n;
}

void qvl__moe_forward(const qvl_model *m, qvl__text_ws *ws, const qvl__text_layer *l, int rows) {
    const qvl__text_config *c = &m->config.text;
    qvl__device *d = m->device;
    size_t routes = (size_t)rows * (size_t)c->top_k;
    d->matmul(d, ws->routes, ws->norm, rows, &l->router, NULL, QVL__EPI_NONE);
    d->moe_route(d, ws->route, ws->route_weight, ws->routes, rows, c->experts, c->top_k);
    d->get(d, ws->host_route, ws->route, routes * sizeof(int32_t));
    d->get(d, ws->host_weight, ws->route_weight, routes * sizeof(float));
    for (int e = 0; e < c->experts; e++) {
        int n = rows_of(ws, e, rows, c->top_k);
        if (n == 0) continue;
        d->put(d, ws->expert_index, ws->host_index, (size_t)n * sizeof(int32_t));
        d->put(d, ws->scale, ws->host_scale, (size_t)n * sizeof(float));
        d->gather_rows(d, ws->expert_x, ws->norm, ws->expert_index, n, c->hidden);
        d->matmul(d, ws->act, ws->expert_x, n, &l->expert_gate_up[e], NULL, QVL__EPI_SWIGLU);
        d->matmul(d, ws->expert_y, ws->act, n, &l->expert_down[e], NULL, QVL__EPI_NONE);
        d->scatter_scaled(d, ws->x, ws->expert_y, ws->expert_index, ws->scale, n, c->hidden);
    }
}
