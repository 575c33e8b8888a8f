/* moe.c - the mixture-of-experts MLP (transformers Qwen3VLMoeTextSparseMoeBlock).
 *
 * Job:        route each row to its experts, run every expert once over the rows it got, add the weighted results.
 * Input:      normed rows and the router's logits.
 * Output:     added to x.
 * Invariants: experts run in ascending order, so a row's results are added in the order of its own experts' numbers,
 *             whatever other rows are in the batch; one product per expert, not one per row.
 */
#include "../route.h"
#include "cpu.h"

/* What an expert works in: the rows that it got, between its two products, behind them; who chose whom. */
typedef struct {
    float *x, *act, *y, *weight, *scale;
    int32_t *expert, *index;
} space;

static size_t divide(space *s, char *base, int rows, int hidden, int inter, int top_k) {
    size_t at = 0, n = (size_t)rows, routes = n * (size_t)top_k;
#define PART(field, count) \
    s->field = base ? (void *)(base + at) : NULL; \
    at = (at + (count) * 4 + 63) / 64 * 64
    PART(x, n * (size_t)hidden);
    PART(act, n * (size_t)inter);
    PART(y, n * (size_t)hidden);
    PART(expert, routes);
    PART(weight, routes);
    PART(index, n);
    PART(scale, n);
#undef PART
    return at;
}

size_t qvl__cpu_moe_work(qvl__device *d, int rows, int hidden, int inter, int experts, int top_k) {
    (void)d, (void)experts;
    space s;
    return divide(&s, NULL, rows, hidden, inter, top_k);
}

/* The rows that chose expert e, with their weights; returns how many. */
static int rows_of(const space *s, int e, int rows, int top_k) {
    int n = 0;
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < top_k; k++)
            if (s->expert[r * top_k + k] == e) {
                s->index[n] = r;
                s->scale[n++] = s->weight[r * top_k + k];
                break;
            }
    return n;
}

void qvl__cpu_moe(qvl__device *d, float *x, const float *norm, const float *logits, int rows, const qvl__experts *e, int top_k, void *work) {
    space s;
    int hidden = e->gate_up[0].k;
    divide(&s, work, rows, hidden, e->down[0].k, top_k);
    for (size_t r = 0; r < (size_t)rows; r++) qvl__route_row(s.expert + r * (size_t)top_k, s.weight + r * (size_t)top_k, logits + r * (size_t)e->n, e->n, top_k);
    for (int i = 0; i < e->n; i++) {
        int n = rows_of(&s, i, rows, top_k);
        if (n == 0) continue;
        d->gather_rows(d, s.x, norm, s.index, n, hidden);
        d->matmul(d, s.act, s.x, n, &e->gate_up[i], NULL, QVL__EPI_SWIGLU);
        d->matmul(d, s.y, s.act, n, &e->down[i], NULL, QVL__EPI_NONE);
        qvl__cpu_scatter_scaled(d, x, s.y, s.index, s.scale, n, hidden);
    }
}

/* Matrices are used where they are. */
int qvl__cpu_experts_link(qvl__device *d, qvl__experts *e) {
    (void)d;
    e->link = NULL;
    return 0;
}
void qvl__cpu_experts_unlink(qvl__device *d, qvl__experts *e) { (void)d, (void)e; }
