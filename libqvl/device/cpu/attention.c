/* attention.c - the paged KV cache and softmax attention over it; the same walk (attend.c) for vision.
 *
 * Job:        write keys and values, attend to them.
 * Input:      qkv rows; a block table (text) or plain rows (vision).
 * Output:     rows of heads * head_dim floats.
 * Invariants: a task attends for one tile of query rows of one KV head; what else attend.c promises holds for every row.
 *
 * A block of one layer and KV head holds K, then V, with dim = head_dim rounded up to 16:
 *   K: 2 panels of 16 tokens: [2][dim][16]         (a product q k^T is the matrix tile with k = head_dim)
 *   V: dim / 16 panels of 16 columns: [dim / 16][32 tokens][16]   (p v is the matrix tile with k = tokens)
 * BF16 as in panel.c: neighbours in k (dimensions in K, tokens in V) are interleaved in pairs.
 * I8: behind K and behind V lies a float scale for each of the 32 tokens. K's scales go onto the scores and V's onto the
 * probabilities, so the tiles multiply plain integers, whose conversion to float is exact in registers and in scratch.
 */
#include <string.h>

#include "attend.h"

#define BLOCK QVL__KV_BLOCK
#define TILES 512 /* query tiles listed at a time, on the stack */

/* ---- cache ---- */

int qvl__cpu_kv_block_bytes(qvl__device *d, qvl__type type, int layers, int kv_heads, int head_dim, size_t *bytes) {
    (void)d;
    if (layers <= 0 || kv_heads <= 0 || head_dim <= 0)
        return qvl__fail(QVL_EINVAL, "a KV cache cannot have %d layers and %d heads of %d", layers, kv_heads, head_dim);
    if (head_dim % 2 || head_dim > QVL__ATTN_MAX_DIM)
        return qvl__fail(QVL_EUNSUPPORTED, "head_dim is %d: it must be even and at most %d", head_dim, QVL__ATTN_MAX_DIM);
    if (type == QVL__F8) return qvl__fail(QVL_EUNSUPPORTED, "kv_dtype fp8 needs a GPU; int8 takes as little memory and keeps more");
    size_t block = 2 * qvl__kv_half(type, qvl__kv_padded(head_dim)); /* at most 2^17 */
    if ((size_t)layers > SIZE_MAX / block / (size_t)kv_heads)
        return qvl__fail(QVL_ENOMEM, "a KV block of %d layers does not fit the address space", layers);
    *bytes = block * (size_t)layers * (size_t)kv_heads;
    return 0;
}

int qvl__cpu_kv_new(qvl__device *d, qvl__kv *kv, qvl__type type, int layers, int kv_heads, int head_dim, int blocks) {
    memset(kv, 0, sizeof *kv);
    size_t block;
    int rc = qvl__cpu_kv_block_bytes(d, type, layers, kv_heads, head_dim, &block);
    if (rc) return rc;
    if (blocks <= 0) return qvl__fail(QVL_EINVAL, "a KV cache cannot have %d blocks", blocks);
    if ((size_t)blocks > SIZE_MAX / block)
        return qvl__fail(QVL_ENOMEM, "a KV cache of %d blocks does not fit the address space", blocks);
    *kv = (qvl__kv){type, layers, kv_heads, head_dim, blocks, block, NULL};
    kv->data = qvl__pages(block * (size_t)blocks);
    return kv->data ? 0 : QVL_ENOMEM;
}

void qvl__cpu_kv_free(qvl__device *d, qvl__kv *kv) {
    (void)d;
    if (kv->data) qvl__pages_free(kv->data, kv->block_bytes * (size_t)kv->blocks);
    memset(kv, 0, sizeof *kv);
}

void qvl__cpu_kv_copy(qvl__device *d, qvl__kv *kv, int from, int to) {
    (void)d;
    char *base = kv->data;
    memcpy(base + (size_t)to * kv->block_bytes, base + (size_t)from * kv->block_bytes, kv->block_bytes);
}

/* Block 0 of a layer and KV head; block b lies b * block_bytes further. */
static char *kv_base(const qvl__kv *kv, int layer, int head) {
    size_t one = 2 * qvl__kv_half(kv->type, qvl__kv_padded(kv->head_dim));
    return (char *)kv->data + ((size_t)layer * (size_t)kv->kv_heads + (size_t)head) * one;
}

/* Room for one token's key or value in the type of the cache. */
typedef struct {
    uint16_t h[QVL__ATTN_MAX_DIM + 1];
    int8_t q[QVL__ATTN_MAX_DIM];
    float scale; /* I8 */
} token;

/* x in the type of the cache. */
static const void *convert(const struct qvl__kern *k, qvl__type type, token *t, const float *x, int n) {
    t->scale = 0;
    if (type == QVL__F32) return x;
    if (type == QVL__I8) {
        t->scale = k->quantize(t->q, x, n);
        return t->q;
    }
    k->narrow(type, t->h, x, n);
    return t->h;
}

/* Token number t (0..31) of a block: converted numbers, n of them. */
static void store_k(qvl__type type, char *block, int t, int dim, const void *x, float scale, int n) {
    size_t at = (size_t)(t / 16) * (size_t)dim * 16 + t % 16; /* its column in its panel */
    if (type == QVL__F32) {
        float *p = (float *)(void *)block + at;
        for (int i = 0; i < n; i++) p[(size_t)i * 16] = ((const float *)x)[i];
    } else if (type == QVL__I8) {
        int8_t *p = (int8_t *)block + at;
        for (int i = 0; i < n; i++) p[(size_t)i * 16] = ((const int8_t *)x)[i];
        ((float *)(void *)(block + qvl__kv_panels(type, dim)))[t] = scale;
    } else if (type == QVL__F16) {
        uint16_t *p = (uint16_t *)(void *)block + at;
        for (int i = 0; i < n; i++) p[(size_t)i * 16] = ((const uint16_t *)x)[i];
    } else {
        uint16_t *p = (uint16_t *)(void *)block + at + t % 16;
        for (int i = 0; i < n; i++) p[(size_t)(i / 2) * 32 + i % 2] = ((const uint16_t *)x)[i];
    }
}

static void store_v(qvl__type type, char *block, int t, int dim, const void *x, float scale, int n) {
    size_t size = qvl__type_size(type);
    if (type == QVL__BF16) {
        uint16_t *p = (uint16_t *)(void *)block + (size_t)(t / 2) * 32 + t % 2;
        for (int i = 0; i < n; i++) p[(size_t)(i / 16) * BLOCK * 16 + i % 16 * 2] = ((const uint16_t *)x)[i];
        return;
    }
    for (int i = 0; i < n; i += 16)
        memcpy(block + ((size_t)i * BLOCK + (size_t)t * 16) * size, (const char *)x + (size_t)i * size, (size_t)(n - i < 16 ? n - i : 16) * size);
    if (type == QVL__I8) ((float *)(void *)(block + qvl__kv_panels(type, dim)))[t] = scale;
}

typedef struct {
    const struct qvl__kern *k;
    float *qkv;
    int heads;
    const float *q_norm, *k_norm, *cos, *sin;
    float eps;
    const qvl__kv *kv;
    int layer;
    const qvl__ragged *b;
    int tasks;
} write_job;

static void write_task(void *ctx, int task, int worker) {
    (void)worker;
    const write_job *j = ctx;
    const qvl__kv *kv = j->kv;
    int n = kv->head_dim, dim = qvl__kv_padded(n);
    size_t ld = (size_t)(j->heads + 2 * kv->kv_heads) * (size_t)n;
    token t;
    for (int r = qvl__cpu_cut(j->b->rows, task, j->tasks); r < qvl__cpu_cut(j->b->rows, task + 1, j->tasks); r++) {
        float *x = j->qkv + (size_t)r * ld;
        const float *cos = j->cos + (size_t)r * (size_t)(n / 2), *sin = j->sin + (size_t)r * (size_t)(n / 2);
        for (int h = 0; h < j->heads + kv->kv_heads; h++) { /* k is turned in place as well, before it is stored */
            float *v = x + (size_t)h * (size_t)n;
            j->k->rms_norm(v, v, h < j->heads ? j->q_norm : j->k_norm, n, j->eps);
            j->k->rope(v, cos, sin, n / 2);
        }
        int pos = j->b->pos[r];
        size_t block = (size_t)j->b->table[(size_t)j->b->seq[r] * (size_t)j->b->stride + (size_t)(pos / BLOCK)];
        for (int h = 0; h < kv->kv_heads; h++) {
            char *to = kv_base(kv, j->layer, h) + block * kv->block_bytes;
            const float *key = x + (size_t)(j->heads + h) * (size_t)n;
            const void *c = convert(j->k, kv->type, &t, key, n);
            store_k(kv->type, to, pos % BLOCK, dim, c, t.scale, n);
            c = convert(j->k, kv->type, &t, key + (size_t)kv->kv_heads * (size_t)n, n);
            store_v(kv->type, to + qvl__kv_half(kv->type, dim), pos % BLOCK, dim, c, t.scale, n);
        }
    }
}

void qvl__cpu_qk_norm_rope_kv(qvl__device *d, float *qkv, int heads, const float *q_norm, const float *k_norm, float eps,
                              const float *cos, const float *sin, qvl__kv *kv, int layer, const qvl__ragged *b) {
    if (b->rows <= 0) return;
    write_job j = {qvl__cpu_kern(d), qkv, heads, q_norm, k_norm, cos, sin, eps, kv, layer, b, 0};
    j.tasks = qvl__cpu_tasks(d, b->rows, (size_t)(heads + 2 * kv->kv_heads) * (size_t)kv->head_dim);
    qvl__pool_run(d->pool, j.tasks, write_task, &j);
}

/* ---- text ---- */

/* Tile registers take numbers of bf16, in steps of 32 of them. */
static bool on_tiles(const qvl__device *d, const qvl__kv *kv) {
    return d->bf16_math && qvl__cpu_kern(d)->tiles && kv->type == QVL__BF16 && kv->head_dim % 32 == 0;
}

typedef struct {
    const qvl__device *d;
    float *out;
    const float *qkv;
    int heads, layer;
    const qvl__kv *kv;
    const qvl__ragged *b;
    int group, chunk, chunks; /* query heads of a KV head; of a task; tasks that makes */
    int tiles;
    struct {
        int first, count;
    } tile[TILES];
} paged_job;

static void paged_task(void *ctx, int task, int worker) {
    const paged_job *j = ctx;
    const qvl__kv *kv = j->kv;
    const qvl__ragged *b = j->b;
    int per_tile = kv->kv_heads * j->chunks;
    int tile = j->tiles - 1 - task / per_tile; /* later tokens see more keys: start with the long ones */
    int kv_head = task % per_tile / j->chunks, g0 = task % j->chunks * j->chunk;
    int gn = j->group - g0 < j->chunk ? j->group - g0 : j->chunk;
    int first = j->tile[tile].first, count = j->tile[tile].count;
    size_t n = (size_t)kv->head_dim, ld = (size_t)(j->heads + 2 * kv->kv_heads) * n;
    size_t h0 = (size_t)(kv_head * j->group + g0);

    qvl__keys ks = {.type = kv->type, .tiles = on_tiles(j->d, kv), .head_dim = kv->head_dim, .dim = qvl__kv_padded(kv->head_dim),
                    .base = kv_base(kv, j->layer, kv_head), .block_bytes = kv->block_bytes, .table = b->table + (size_t)b->seq[first] * (size_t)b->stride};
    qvl__tile_rows t;
    qvl__attend_begin(&t, qvl__cpu_kern(j->d), &ks, qvl__cpu_scratch(j->d, worker));
    for (int r = first; r < first + count; r++)
        for (int g = 0; g < gn; g++) qvl__attend_add(&t, j->qkv + (size_t)r * ld + (h0 + (size_t)g) * n, b->pos[r] + 1);
    qvl__attend(&t);
    for (int i = 0; i < t.rows; i++) qvl__attend_row(&t, i, j->out + ((size_t)(first + i / gn) * (size_t)j->heads + h0 + (size_t)(i % gn)) * n);
}

void qvl__cpu_attention_paged(qvl__device *d, float *out, const float *qkv, int heads, const qvl__kv *kv, int layer,
                              const qvl__ragged *b) {
    paged_job j = {.d = d, .out = out, .qkv = qkv, .heads = heads, .layer = layer, .kv = kv, .b = b};
    j.group = heads / kv->kv_heads;
    int most = qvl__attend_most(on_tiles(d, kv));
    j.chunk = j.group < most ? j.group : most;
    j.chunks = qvl__div_up(j.group, j.chunk);
    int tokens = most / j.chunk;
    for (int r = 0; r < b->rows;) {
        for (j.tiles = 0; r < b->rows && j.tiles < TILES; j.tiles++) {
            int n = 1;
            while (r + n < b->rows && n < tokens && b->seq[r + n] == b->seq[r]) n++;
            j.tile[j.tiles].first = r;
            j.tile[j.tiles].count = n;
            r += n;
        }
        qvl__pool_run(d->pool, j.tiles * kv->kv_heads * j.chunks, paged_task, &j);
    }
}

/* ---- vision: keys and values of a head are packed into scratch, and walked as above ----
 *
 * In floats as one block: K of all keys, then V. On tile registers as blocks of 32 keys: K and V in bf16, then what rounding left of
 * them, so that products are nearly those of floats. */

static bool full_on_tiles(const qvl__device *d) { return d->bf16_math && qvl__cpu_kern(d)->tiles; }
static int full_dim(bool tiles, int head_dim) { return tiles ? qvl__div_up(head_dim, 32) * 32 : qvl__kv_padded(head_dim); }
static int roomy(int span) { return qvl__div_up(span, BLOCK) * BLOCK; }
static size_t full_block(int dim) { return 4 * qvl__kv_panels(QVL__BF16, dim); }
static size_t full_head(int span, int dim) { return 2 * (size_t)roomy(span) * (size_t)dim * sizeof(float); } /* in both forms */

size_t qvl__cpu_attention_full_scratch(qvl__device *d, int span, int head_dim, int n) {
    return (size_t)n * full_head(span, full_dim(full_on_tiles(d), head_dim));
}

typedef struct {
    const qvl__device *d;
    float *qkv;
    bool tiles;
    int span, heads, head_dim, dim, head; /* head: the first of those in scratch */
    int row, rows;                        /* of queries */
    char *scratch;
    int per_head; /* tasks */
} full_job;

#define PACK_BLOCKS 8

/* Key t of a head, which lies in scratch at to, in floats. */
static void pack_floats(const full_job *j, char *to, int t, const float *key, const float *value) {
    size_t dim = (size_t)j->dim, room = (size_t)roomy(j->span), panel = (size_t)(t / QVL__PANEL), n = (size_t)j->head_dim;
    float *k = (float *)(void *)to, *v = k + room * dim;
    if (t % QVL__PANEL == 0) memset(k + panel * QVL__PANEL * dim, 0, QVL__PANEL * dim * sizeof(float));
    store_k(QVL__F32, (char *)(k + panel * QVL__PANEL * dim), t % QVL__PANEL, j->dim, key, 0, j->head_dim);
    for (size_t i = 0; i < dim; i += QVL__PANEL) {
        float *at = v + i * room + (size_t)t * QVL__PANEL;
        size_t some = n - i < QVL__PANEL ? n - i : QVL__PANEL;
        memset(at, 0, QVL__PANEL * sizeof(float));
        memcpy(at, value + i, some * sizeof(float));
    }
}

/* The same for tile registers. */
static void pack_tiles(const full_job *j, char *to, int t, const float *key, const float *value) {
    const size_t half = qvl__kv_panels(QVL__BF16, j->dim);
    char *block = to + (size_t)(t / BLOCK) * full_block(j->dim);
    if (t % BLOCK == 0) memset(block, 0, full_block(j->dim));
    for (int v = 0; v < 2; v++) {
        uint16_t parts[2 * QVL__ATTN_MAX_DIM];
        qvl__cpu_kern(j->d)->split(parts, QVL__ATTN_MAX_DIM, v ? value : key, j->head_dim);
        for (size_t low = 0; low < 2; low++) {
            char *at = block + (2 * low + (size_t)v) * half;
            const uint16_t *x = parts + low * QVL__ATTN_MAX_DIM;
            if (v) store_v(QVL__BF16, at, t % BLOCK, j->dim, x, 0, j->head_dim);
            else store_k(QVL__BF16, at, t % BLOCK, j->dim, x, 0, j->head_dim);
        }
    }
}

static void full_pack(void *ctx, int task, int worker) {
    (void)worker;
    const full_job *j = ctx;
    int head = task / j->per_head, n = j->head_dim;
    size_t ld = 3 * (size_t)j->heads * (size_t)n;
    char *to = j->scratch + (size_t)head * full_head(j->span, j->dim);
    const float *base = j->qkv + (size_t)(j->head + head) * (size_t)n;
    int t = task % j->per_head * PACK_BLOCKS * BLOCK, end = t + PACK_BLOCKS * BLOCK;
    if (end > j->span) end = j->span;
    for (; t < end; t++) {
        const float *key = base + (size_t)t * ld + (size_t)j->heads * (size_t)n, *value = key + (size_t)j->heads * (size_t)n;
        if (j->tiles) pack_tiles(j, to, t, key, value);
        else pack_floats(j, to, t, key, value);
    }
}

static full_job new_full(const qvl__device *d, const float *qkv, int span, int heads, int head_dim, int head, const void *scratch) {
    bool tiles = full_on_tiles(d);
    return (full_job){.d = d, .qkv = (float *)(uintptr_t)qkv, .tiles = tiles, .span = span, .heads = heads, .head_dim = head_dim,
                      .dim = full_dim(tiles, head_dim), .head = head, .scratch = (char *)(uintptr_t)scratch};
}

void qvl__cpu_attention_pack(qvl__device *d, void *scratch, const float *qkv, int span, int heads, int head_dim, int head, int n) {
    if (span <= 0 || n <= 0) return;
    full_job j = new_full(d, qkv, span, heads, head_dim, head, scratch);
    j.per_head = qvl__div_up(span, PACK_BLOCKS * BLOCK);
    qvl__pool_run(d->pool, n * j.per_head, full_pack, &j);
}

/* A tile of one head reads its own queries first and writes their outputs there last. */
static void full_task(void *ctx, int task, int worker) {
    const full_job *j = ctx;
    int head = task / j->per_head, most = qvl__attend_most(j->tiles);
    size_t n = (size_t)j->head_dim, ld = 3 * (size_t)j->heads * n;
    qvl__keys ks = {.type = j->tiles ? QVL__BF16 : QVL__F32, .tiles = j->tiles, .head_dim = j->head_dim, .dim = j->dim,
                    .base = j->scratch + (size_t)head * full_head(j->span, j->dim), .block_bytes = full_block(j->dim),
                    .low = 2 * qvl__kv_panels(QVL__BF16, j->dim), .span = roomy(j->span)};
    qvl__tile_rows t;
    qvl__attend_begin(&t, qvl__cpu_kern(j->d), &ks, qvl__cpu_scratch(j->d, worker));
    int r0 = task % j->per_head * most, r1 = j->rows - r0 < most ? j->rows : r0 + most;
    float *q = j->qkv + (size_t)(j->row + r0) * ld + (size_t)(j->head + head) * n;
    for (int r = r0; r < r1; r++) qvl__attend_add(&t, q + (size_t)(r - r0) * ld, j->span);
    qvl__attend(&t);
    for (int i = 0; i < t.rows; i++) qvl__attend_row(&t, i, q + (size_t)i * ld);
}

void qvl__cpu_attention_full(qvl__device *d, float *qkv, int span, int heads, int head_dim, int head, int n, int row, int rows,
                             const void *scratch) {
    if (rows <= 0 || n <= 0) return;
    full_job j = new_full(d, qkv, span, heads, head_dim, head, scratch);
    j.row = row, j.rows = rows;
    j.per_head = qvl__div_up(rows, qvl__attend_most(j.tiles));
    qvl__pool_run(d->pool, n * j.per_head, full_task, &j);
}
