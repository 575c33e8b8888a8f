/* shim.h - a device with memory of its own, as one whose ops take plain pointers.
 *
 * Job:        let the cases of ops_cases.h, which keep their numbers in malloc'ed arrays, run on a GPU.
 * Input:      any device.
 * Output:     a device whose ops copy their arguments there, call the inner op, and copy its results back.
 * Invariants: matrices and caches stay the inner device's; buffers are made for each call and filled with what the host
 *             has, so an op that reads or writes what it should not is seen as it would be on the CPU.
 */
#ifndef SHIM_H
#define SHIM_H

#include <stdlib.h>
#include <string.h>

#include "../../libqvl/device/device.h"

typedef struct {
    qvl__device device; /* first */
    qvl__device *in;
} shim;

#define IN(d) (((shim *)(d))->in)

/* A copy of host memory on the device; given back by done. */
typedef struct {
    void *p;
    size_t size;
} there;

static there up(qvl__device *in, const void *host, size_t size) {
    there t = {in->alloc(in, size ? size : 1), size};
    if (!t.p) abort();
    if (host) in->put(in, t.p, host, size);
    return t;
}
static void done(qvl__device *in, there t) { in->free(in, t.p, t.size); }
static void down(qvl__device *in, void *host, there t) {
    in->get(in, host, t.p, t.size);
    if (in->sync(in)) {
        fprintf(stderr, "%s\n", qvl_last_error());
        abort();
    }
    done(in, t);
}

#define FLOATS(n) ((size_t)(n) * sizeof(float))

static void shim_close(qvl__device *d) {
    IN(d)->close(IN(d));
    free(d);
}
static int shim_sync(qvl__device *d) { return IN(d)->sync(IN(d)); }
static uint64_t shim_room(qvl__device *d) { return IN(d)->room(IN(d)); }
static void *shim_alloc(qvl__device *d, size_t n) { return IN(d)->alloc(IN(d), n); }
static void shim_free(qvl__device *d, void *p, size_t n) { IN(d)->free(IN(d), p, n); }
static void shim_put(qvl__device *d, void *to, const void *from, size_t n) {
    IN(d)->put(IN(d), to, from, n);
    IN(d)->sync(IN(d)); /* the cases let two devices share a cache, which have nothing but this to wait for each other */
}
static void shim_get(qvl__device *d, void *to, const void *from, size_t n) { IN(d)->get(IN(d), to, from, n); }
static int shim_matrix_new(qvl__device *d, qvl__matrix *m, qvl__type t, int n, int k, qvl__role g) { return IN(d)->matrix_new(IN(d), m, t, n, k, g); }
static void shim_matrix_put(qvl__device *d, qvl__matrix *m, int f, int c, qvl__type t, const void *s) { IN(d)->matrix_put(IN(d), m, f, c, t, s); }
static void shim_matrix_free(qvl__device *d, qvl__matrix *m) { IN(d)->matrix_free(IN(d), m); }
static int shim_matrix_map(qvl__device *d, qvl__matrix *m, qvl__type t, int n, int k, qvl__role g, const void *p, uint64_t b) { return IN(d)->matrix_map(IN(d), m, t, n, k, g, p, b); }
static int shim_kv_block_bytes(qvl__device *d, qvl__type t, int l, int h, int n, size_t *b) { return IN(d)->kv_block_bytes(IN(d), t, l, h, n, b); }
static int shim_kv_new(qvl__device *d, qvl__kv *kv, qvl__type t, int l, int h, int n, int b) { return IN(d)->kv_new(IN(d), kv, t, l, h, n, b); }
static void shim_kv_free(qvl__device *d, qvl__kv *kv) { IN(d)->kv_free(IN(d), kv); }
static void shim_kv_copy(qvl__device *d, qvl__kv *kv, int from, int to) { IN(d)->kv_copy(IN(d), kv, from, to); }
static size_t shim_full_scratch(qvl__device *d, int span, int n, int h) { return IN(d)->attention_full_scratch(IN(d), span, n, h); }

static int most(const int32_t *x, int n) {
    int m = 0;
    for (int i = 0; i < n; i++) m = x[i] > m ? x[i] : m;
    return m;
}

static void shim_embed(qvl__device *d, float *y, const qvl__matrix *m, const int32_t *ids, int rows) {
    there t = up(IN(d), y, FLOATS(rows * m->k)), i = up(IN(d), ids, (size_t)rows * 4);
    IN(d)->embed(IN(d), t.p, m, i.p, rows);
    down(IN(d), y, t), done(IN(d), i);
}
static void shim_gather(qvl__device *d, float *y, const float *x, const int32_t *idx, int rows, int dim) {
    there t = up(IN(d), y, FLOATS(rows * dim)), s = up(IN(d), x, FLOATS((most(idx, rows) + 1) * dim)), i = up(IN(d), idx, (size_t)rows * 4);
    IN(d)->gather_rows(IN(d), t.p, s.p, i.p, rows, dim);
    down(IN(d), y, t), done(IN(d), s), done(IN(d), i);
}
static void shim_scatter(qvl__device *d, float *y, const float *x, const int32_t *idx, int rows, int dim, bool add) {
    there t = up(IN(d), y, FLOATS((most(idx, rows) + 1) * dim)), s = up(IN(d), x, FLOATS(rows * dim)), i = up(IN(d), idx, (size_t)rows * 4);
    IN(d)->scatter_rows(IN(d), t.p, s.p, i.p, rows, dim, add);
    down(IN(d), y, t), done(IN(d), s), done(IN(d), i);
}
static void shim_interpolated(qvl__device *d, float *y, const float *table, const int32_t *index, const float *weight, int rows, int dim) {
    there t = up(IN(d), y, FLOATS(rows * dim)), s = up(IN(d), table, FLOATS((most(index, 4 * rows) + 1) * dim)), i = up(IN(d), index, (size_t)rows * 16),
          w = up(IN(d), weight, FLOATS(4 * rows));
    IN(d)->add_interpolated(IN(d), t.p, s.p, i.p, w.p, rows, dim);
    down(IN(d), y, t), done(IN(d), s), done(IN(d), i), done(IN(d), w);
}
static void shim_rms(qvl__device *d, float *y, const float *x, const float *w, int rows, int dim, float eps) {
    there t = up(IN(d), y, FLOATS(rows * dim)), s = up(IN(d), x, FLOATS(rows * dim)), u = up(IN(d), w, FLOATS(dim));
    IN(d)->rms_norm(IN(d), t.p, s.p, u.p, rows, dim, eps);
    down(IN(d), y, t), done(IN(d), s), done(IN(d), u);
}
static void shim_layer(qvl__device *d, float *y, const float *x, const float *w, const float *b, int rows, int dim, float eps) {
    there t = up(IN(d), y, FLOATS(rows * dim)), s = up(IN(d), x, FLOATS(rows * dim)), u = up(IN(d), w, FLOATS(dim)), v = up(IN(d), b, FLOATS(dim));
    IN(d)->layer_norm(IN(d), t.p, s.p, u.p, v.p, rows, dim, eps);
    down(IN(d), y, t), done(IN(d), s), done(IN(d), u), done(IN(d), v);
}
static void shim_matmul(qvl__device *d, float *y, const float *x, int rows, const qvl__matrix *m, const float *bias, qvl__epilogue e) {
    int n_out = e == QVL__EPI_SWIGLU ? m->n / 2 : m->n;
    there t = up(IN(d), y, FLOATS(rows * n_out)), s = up(IN(d), x, FLOATS(rows * m->k)), b = up(IN(d), bias, bias ? FLOATS(m->n) : 0);
    IN(d)->matmul(IN(d), t.p, s.p, rows, m, bias ? b.p : NULL, e);
    down(IN(d), y, t), done(IN(d), s), done(IN(d), b);
}

typedef struct {
    there seq, pos, table;
    qvl__ragged b;
} ragged_there;
static ragged_there up_ragged(qvl__device *in, const qvl__ragged *b) {
    ragged_there r = {up(in, b->seq, (size_t)b->rows * 4), up(in, b->pos, (size_t)b->rows * 4), up(in, b->table, (size_t)((most(b->seq, b->rows) + 1) * b->stride) * 4), *b};
    r.b.seq = r.seq.p, r.b.pos = r.pos.p, r.b.table = r.table.p;
    /* what a caller knows of its batch, as forward/text.c tells it */
    while (r.b.singles < b->rows && (r.b.singles + 1 == b->rows || b->seq[r.b.singles + 1] != b->seq[r.b.singles])) r.b.singles++;
    r.b.longest = most(b->pos, b->rows) + 1;
    return r;
}
static void done_ragged(qvl__device *in, ragged_there r) { done(in, r.seq), done(in, r.pos), done(in, r.table); }

static void shim_write(qvl__device *d, float *qkv, int heads, const float *qn, const float *kn, float eps, const float *cos, const float *sin, qvl__kv *kv, int layer,
                       const qvl__ragged *b) {
    int n = kv->head_dim;
    ragged_there r = up_ragged(IN(d), b);
    there t = up(IN(d), qkv, FLOATS(b->rows * (heads + 2 * kv->kv_heads) * n)), q = up(IN(d), qn, FLOATS(n)), k = up(IN(d), kn, FLOATS(n)),
          c = up(IN(d), cos, FLOATS(b->rows * n / 2)), s = up(IN(d), sin, FLOATS(b->rows * n / 2));
    IN(d)->qk_norm_rope_kv(IN(d), t.p, heads, q.p, k.p, eps, c.p, s.p, kv, layer, &r.b);
    down(IN(d), qkv, t), done(IN(d), q), done(IN(d), k), done(IN(d), c), done(IN(d), s), done_ragged(IN(d), r);
}
static void shim_paged(qvl__device *d, float *out, const float *qkv, int heads, const qvl__kv *kv, int layer, const qvl__ragged *b) {
    int n = kv->head_dim;
    ragged_there r = up_ragged(IN(d), b);
    there t = up(IN(d), out, FLOATS(b->rows * heads * n)), q = up(IN(d), qkv, FLOATS(b->rows * (heads + 2 * kv->kv_heads) * n));
    IN(d)->attention_paged(IN(d), t.p, q.p, heads, kv, layer, &r.b);
    down(IN(d), out, t), done(IN(d), q), done_ragged(IN(d), r);
}
static int shim_link(qvl__device *d, qvl__experts *e) { return IN(d)->experts_link(IN(d), e); }
static void shim_unlink(qvl__device *d, qvl__experts *e) { IN(d)->experts_unlink(IN(d), e); }
static size_t shim_moe_work(qvl__device *d, int rows, int hidden, int inter, int n, int top) { return IN(d)->moe_work(IN(d), rows, hidden, inter, n, top); }
static void shim_moe(qvl__device *d, float *x, const float *norm, const float *logits, int rows, const qvl__experts *e, int top, void *work) {
    int hidden = e->gate_up[0].k;
    there t = up(IN(d), x, FLOATS(rows * hidden)), n = up(IN(d), norm, FLOATS(rows * hidden)), l = up(IN(d), logits, FLOATS(rows * e->n)),
          w = up(IN(d), work, IN(d)->moe_work(IN(d), rows, hidden, e->down[0].k, e->n, top));
    IN(d)->moe(IN(d), t.p, n.p, l.p, rows, e, top, w.p);
    down(IN(d), x, t), done(IN(d), n), done(IN(d), l), done(IN(d), w);
}
static void shim_rope(qvl__device *d, float *qkv, int rows, int heads, int n, const float *cos, const float *sin, int span) {
    there t = up(IN(d), qkv, FLOATS(rows * 3 * heads * n)), c = up(IN(d), cos, FLOATS(span * n / 2)), s = up(IN(d), sin, FLOATS(span * n / 2));
    IN(d)->rope_vision(IN(d), t.p, rows, heads, n, c.p, s.p, span);
    down(IN(d), qkv, t), done(IN(d), c), done(IN(d), s);
}
static void shim_pack(qvl__device *d, void *scratch, const float *qkv, int span, int heads, int n, int head, int some) {
    there s = up(IN(d), scratch, IN(d)->attention_full_scratch(IN(d), span, n, some)), q = up(IN(d), qkv, FLOATS(span * 3 * heads * n));
    IN(d)->attention_pack(IN(d), s.p, q.p, span, heads, n, head, some);
    down(IN(d), scratch, s), done(IN(d), q);
}
static void shim_full(qvl__device *d, float *qkv, int span, int heads, int n, int head, int some, int row, int rows, const void *scratch) {
    there s = up(IN(d), scratch, IN(d)->attention_full_scratch(IN(d), span, n, some)), q = up(IN(d), qkv, FLOATS(span * 3 * heads * n));
    IN(d)->attention_full(IN(d), q.p, span, heads, n, head, some, row, rows, s.p);
    down(IN(d), qkv, q), done(IN(d), s);
}

static qvl__device *shim_over(qvl__device *in) {
    shim *s = calloc(1, sizeof *s);
    if (!s) abort();
    s->in = in;
    s->device = (qvl__device){
        .name = in->name, .isa = in->isa, .pool = in->pool, .bf16_math = in->bf16_math, .kv_type = in->kv_type, .fp8 = in->fp8, .slice_flops = in->slice_flops, .close = shim_close, .sync = shim_sync, .room = shim_room,
        .alloc = shim_alloc, .free = shim_free, .put = shim_put, .get = shim_get, .matrix_new = shim_matrix_new, .matrix_put = shim_matrix_put, .matrix_free = shim_matrix_free,
        .matrix_map = shim_matrix_map, .kv_block_bytes = shim_kv_block_bytes, .kv_new = shim_kv_new, .kv_free = shim_kv_free, .kv_copy = shim_kv_copy, .embed = shim_embed,
        .gather_rows = shim_gather, .scatter_rows = shim_scatter, .add_interpolated = shim_interpolated, .rms_norm = shim_rms,
        .layer_norm = shim_layer, .matmul = shim_matmul, .qk_norm_rope_kv = shim_write, .attention_paged = shim_paged, .moe = shim_moe, .moe_work = shim_moe_work, .experts_link = shim_link, .experts_unlink = shim_unlink, .rope_vision = shim_rope,
        .attention_pack = shim_pack, .attention_full = shim_full, .attention_full_scratch = shim_full_scratch};
    return &s->device;
}

#endif
