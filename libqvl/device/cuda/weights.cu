/* weights.cu - matrices on the GPU.
 *
 * Job:        matrix_new, matrix_put, matrix_map, matrix_free, embed; of several GPUs each keeps its part.
 * Input:      checkpoint rows; packed files as the CPU wrote them.
 * Output:     rows as kernels/layout.cuh describes them.
 * Invariants: integers are rounded by the CPU's own search, so a model has the same integers on every device;
 *             rows pass through one staging buffer on the GPU (the arena), never through memory of their own.
 */
#include "cuda.h"

#include <string.h>

#include "kernels/weights.cuh"

static int matrix_new(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, qvl__role role) {
    entered c(d);
    memset(m, 0, sizeof *m);
    if (n <= 0 || k <= 0 || (role.gate_up && n % 2)) return c->host->fail(QVL_EINVAL, "a weight cannot have %d outputs and %d inputs", n, k);
    if (k > 1 << 20) return c->host->fail(QVL_EUNSUPPORTED, "a weight of %d inputs: at most %d are supported", k, 1 << 20);
    bool scaled = qvl__type_scaled(type);
    if (!divisible(type, n, k, &role, c->ranks) || (role.division == QVL__TABLE && c->ranks > 1 && cuda_gather_rows(c, cut_table(n, 0, c->ranks).count) < 1))
        return c->host->fail(QVL_EUNSUPPORTED, "a weight of %d outputs and %d inputs cannot be divided among %d GPUs%s: choose another tensor_parallel_size", n, k, c->ranks,
                             scaled ? " in groups of 32" : "");
    part p = part_of(n, k, &role, c->rank, c->ranks);
    size_t bytes = rows_bytes(type, p.n, p.k) + (scaled ? (size_t)p.n * (size_t)(padded(p.k) / 32) * 2 : 0);
    void *data = cuda_alloc(d, bytes);
    if (!data) return QVL_ENOMEM;
    m->type = type, m->n = n, m->k = k, m->role = role, m->bytes = bytes, m->data = data;
    return 0;
}

/* Panels as the CPU packs a weight of [n][k], those features and inputs that p names: to rows, as many at a time as the
 * arena holds. */
static void upload(cuda *c, const qvl__matrix *m, const void *panels, size_t bytes, int n, int k, const part &p) {
    int unit = m->role.gate_up ? 2 : 1;
    size_t one = bytes / (size_t)(unit * div_up(n / unit, 16));
    int most = (int)(ARENA_BYTES / one) / unit * unit;
    for (int i = 0, to = 0; i < p.outs; to += p.out[i].count, i++) {
        run r = p.out[i];
        for (int at = r.from / 16 * unit, end = div_up(r.from + r.count, 16) * unit; at < end; at += most) {
            int some = end - at < most ? end - at : most;
            cuda_put(&c->device, c->arena, (const char *)panels + (size_t)at * one, (size_t)some * one);
            panels_of from = {(const uint8_t *)c->arena, one, at, padded(k), r.from, r.count, to, p.in.from};
            LAUNCH(c, put_panels, dim3(some * 16), dim3(256), 0, view(c, m), m->role.gate_up, from);
        }
    }
}

/* Integers: the CPU gets the rows of the part until it has all. */
static void round(cuda *c, const qvl__matrix *m, const part &p, int first, int count, qvl__type src_type, const void *src) {
    filling *f = &c->fill;
    qvl__role role = {QVL__WHOLE, m->role.gate_up, 0, 0};
    int rc = 0;
    if (!f->data) rc = c->cpu->matrix_new(c->cpu, &f->host, m->type, p.n, p.k, role);
    else if (f->data != m->data) rc = QVL_EINTERNAL;
    if (rc) {
        cuda_failed(c, rc, "rounding a weight", rc == QVL_ENOMEM ? "out of host memory" : "another one is not complete");
        return;
    }
    f->data = m->data;
    c->cpu->matrix_put(c->cpu, &f->host, first, count, src_type, src);
    if ((f->features += count) < p.n) return;
    upload(c, m, f->host.data, f->host.bytes, p.n, p.k, part_of(p.n, p.k, &role, 0, 1));
    c->cpu->matrix_free(c->cpu, &f->host);
    *f = filling{};
}

/* Rows [count][part.k] become features first.. of the part. */
static void put_part(cuda *c, const qvl__matrix *m, const part &p, int first, int count, qvl__type src_type, const void *src) {
    if (qvl__type_quantised(m->type)) {
        round(c, m, p, first, count, src_type, src);
        return;
    }
    size_t row = qvl__row_bytes(src_type, (size_t)p.k);
    int most = (int)(ARENA_BYTES / row);
    for (int r = 0; r < count; r += most) {
        int some = count - r < most ? count - r : most;
        cuda_put(&c->device, c->arena, (const char *)src + (size_t)r * row, (size_t)some * row);
        if (m->type == QVL__F8) LAUNCH(c, put_fp8_rows, dim3(some), dim3(256), 0, view(c, m), m->role.gate_up, first + r, (const uint8_t *)c->arena, row);
        else LAUNCH(c, put_rows, dim3(some), dim3(256), 0, view(c, m), m->role.gate_up, first + r, src_type, (const void *)c->arena);
    }
}

/* The same of rows [count][m->k]: only the part's inputs leave the host. */
static void put_inputs(cuda *c, const qvl__matrix *m, const part &p, int first, int count, qvl__type src_type, const char *src) {
    if (p.k == m->k) {
        put_part(c, m, p, first, count, src_type, src);
        return;
    }
    size_t size = qvl__type_size(src_type), row = qvl__row_bytes(src_type, (size_t)m->k), some = qvl__row_bytes(src_type, (size_t)p.k);
    int most = (int)(STAGE_BYTES / some) + 1;
    char *cut = (char *)c->host->calloc((size_t)(most < count ? most : count), some);
    if (!cut) cuda_failed(c, QVL_ENOMEM, "dividing a weight", "out of host memory");
    for (int r = 0, n; cut && r < count; r += n) {
        n = count - r < most ? count - r : most;
        for (int i = 0; i < n; i++) {
            const char *from = src + (size_t)(r + i) * row;
            char *to = cut + (size_t)i * some;
            memcpy(to, from + (size_t)p.in.from * size, (size_t)p.k * size);
            if (src_type == QVL__F8) memcpy(to + div_up(p.k, 2) * 2, from + div_up(m->k, 2) * 2 + p.in.from / 32 * 2, (size_t)div_up(p.k, 32) * 2);
        }
        put_part(c, m, p, first + r, n, src_type, cut);
    }
    c->host->free(cut);
}

static void matrix_put(qvl__device *d, qvl__matrix *m, int first, int count, qvl__type src_type, const void *src) {
    entered c(d);
    part p = part_of(c, m);
    size_t row = qvl__row_bytes(src_type, (size_t)m->k);
    for (int i = 0, to = 0; i < p.outs * (m->role.gate_up ? 2 : 1); i++) {
        run r = p.out[i % p.outs];
        if (i >= p.outs) r.from += m->n / 2; /* the up half */
        int lo = first > r.from ? first : r.from, hi = first + count < r.from + r.count ? first + count : r.from + r.count;
        if (lo < hi) put_inputs(c, m, p, to + lo - r.from, hi - lo, src_type, (const char *)src + (size_t)(lo - first) * row);
        to += r.count;
    }
}

static int matrix_map(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, qvl__role role, const void *data, uint64_t bytes) {
    entered c(d);
    qvl__matrix checked; /* the CPU knows whether these bytes can be such a weight */
    int rc = c->cpu->matrix_map(c->cpu, &checked, type, n, k, role, data, bytes);
    if (rc) return rc;
    c->cpu->matrix_free(c->cpu, &checked);
    if ((rc = matrix_new(d, m, type, n, k, role)) < 0) return rc;
    upload(c, m, data, bytes, n, k, part_of(c, m));
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

/* Each GPU has the rows of its part, zeros stand for the others. */
static void embed(qvl__device *d, float *y, const qvl__matrix *table, const int32_t *ids, int rows) {
    entered c(d);
    if (rows <= 0) return;
    part p = part_of(c, table);
    bool divided = p.n < table->n;
    if (divided && table->role.division != QVL__TABLE) cuda_failed(c, QVL_EINTERNAL, "embed", "this weight is divided and no table");
    LAUNCH(c, embed_rows, dim3(rows), dim3(256), 0, y, view(c, table), table->role.gate_up, divided ? p.out[0].from : 0, ids);
    if (divided) cuda_sum(c, y, (size_t)rows * (size_t)table->k);
}

void cuda_weights(qvl__device *d) {
    d->matrix_new = matrix_new;
    d->matrix_put = matrix_put;
    d->matrix_map = matrix_map;
    d->matrix_free = matrix_free;
    d->embed = embed;
}
