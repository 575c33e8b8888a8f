/* weights.cu - matrices on the GPU.
 *
 * Job:        matrix_new, matrix_put, matrix_map, matrix_free, embed.
 * Input:      checkpoint rows; packed files as the CPU wrote them.
 * Output:     rows as kernels/layout.cuh describes them.
 * Invariants: integers are rounded by the CPU's own search, so a model has the same integers on every device;
 *             rows pass through one staging buffer on the GPU (the arena), never through memory of their own.
 */
#include "cuda.h"

#include <string.h>

#include "kernels/weights.cuh"

static int matrix_new(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, bool gate_up) {
    entered c(d);
    memset(m, 0, sizeof *m);
    if (n <= 0 || k <= 0 || (gate_up && n % 2)) return c->host->fail(QVL_EINVAL, "a weight cannot have %d outputs and %d inputs", n, k);
    if (k > 1 << 20) return c->host->fail(QVL_EUNSUPPORTED, "a weight of %d inputs: at most %d are supported", k, 1 << 20);
    bool integers = qvl__type_quantised(type);
    size_t bytes = rows_bytes(type, n, k) + (integers ? (size_t)n * (size_t)(padded(k) / 32) * 2 : 0);
    void *data = cuda_alloc(d, bytes);
    if (!data) return QVL_ENOMEM;
    m->type = type, m->n = n, m->k = k, m->gate_up = gate_up, m->bytes = bytes, m->data = data;
    return 0;
}

/* The CPU's panels to rows, as many at a time as the arena holds. */
static void upload(qvl__device *d, const qvl__matrix *m, const void *panels, size_t bytes) {
    entered c(d);
    int count = m->gate_up ? 2 * div_up(m->n / 2, 16) : div_up(m->n, 16);
    size_t one = bytes / (size_t)count;
    int most = (int)(ARENA_BYTES / one);
    for (int p = 0; p < count; p += most) {
        int some = count - p < most ? count - p : most;
        cuda_put(d, c->arena, (const char *)panels + (size_t)p * one, (size_t)some * one);
        LAUNCH(c, put_panels, dim3(some * 16), dim3(256), 0, view(m), m->gate_up, p, (const uint8_t *)c->arena, one);
    }
}

/* Integers: the CPU gets the rows until it has all. */
static void round(cuda *c, const qvl__matrix *m, int first, int count, qvl__type src_type, const void *src) {
    filling *f = &c->fill;
    int rc = 0;
    if (!f->data) rc = c->cpu->matrix_new(c->cpu, &f->host, m->type, m->n, m->k, m->gate_up);
    else if (f->data != m->data) rc = QVL_EINTERNAL;
    if (rc) {
        cuda_failed(c, rc, "rounding a weight", rc == QVL_ENOMEM ? "out of host memory" : "another one is not complete");
        return;
    }
    f->data = m->data;
    c->cpu->matrix_put(c->cpu, &f->host, first, count, src_type, src);
    if ((f->features += count) < m->n) return;
    upload(&c->device, m, f->host.data, f->host.bytes);
    c->cpu->matrix_free(c->cpu, &f->host);
    *f = filling{};
}

static void matrix_put(qvl__device *d, qvl__matrix *m, int first, int count, qvl__type src_type, const void *src) {
    entered c(d);
    if (qvl__type_quantised(m->type)) {
        round(c, m, first, count, src_type, src);
        return;
    }
    size_t row = (size_t)m->k * qvl__type_size(src_type);
    int most = (int)(ARENA_BYTES / row);
    for (int r = 0; r < count; r += most) {
        int some = count - r < most ? count - r : most;
        cuda_put(d, c->arena, (const char *)src + (size_t)r * row, (size_t)some * row);
        LAUNCH(c, put_rows, dim3(some), dim3(256), 0, view(m), m->gate_up, first + r, src_type, (const void *)c->arena);
    }
}

static int matrix_map(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, bool gate_up, const void *data, uint64_t bytes) {
    entered c(d);
    qvl__matrix checked; /* the CPU knows whether these bytes can be such a weight */
    int rc = c->cpu->matrix_map(c->cpu, &checked, type, n, k, gate_up, data, bytes);
    if (rc) return rc;
    c->cpu->matrix_free(c->cpu, &checked);
    if ((rc = matrix_new(d, m, type, n, k, gate_up)) < 0) return rc;
    upload(d, m, data, bytes);
    return 0;
}

static void matrix_free(qvl__device *d, qvl__matrix *m) {
    entered c(d);
    if (m->data && c->fill.data == m->data) { /* loading was given up */
        c->cpu->matrix_free(c->cpu, &c->fill.host);
        c->fill = filling{};
    }
    cuda_free(d, m->data, m->bytes);
    memset(m, 0, sizeof *m);
}

static void embed(qvl__device *d, float *y, const qvl__matrix *table, const int32_t *ids, int rows) {
    entered c(d);
    if (rows > 0) LAUNCH(c, embed_rows, dim3(rows), dim3(256), 0, y, view(table), table->gate_up, ids);
}

void cuda_weights(qvl__device *d) {
    d->matrix_new = matrix_new;
    d->matrix_put = matrix_put;
    d->matrix_map = matrix_map;
    d->matrix_free = matrix_free;
    d->embed = embed;
}
