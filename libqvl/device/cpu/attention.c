/* attention.c - the paged KV cache and softmax attention over it; the same walk for vision.
 *
 * Job:        write keys and values, attend to them.
 * Input:      qkv rows; a block table (text) or plain rows (vision).
 * Output:     rows of heads * head_dim floats.
 * Invariants: a query row walks the keys in order, QVL__ATTN_KEYS of them in a step, with a running maximum and sum of
 *             its own, so it does the same operations alone as in a tile with other rows;
 *             scores past a row's own last key are overwritten before anything reads them, and values past it are not
 *             read at all: old or uninitialised cache contents (NaN included) never reach a result.
 *
 * A block of one layer and KV head holds K, then V, with dim = head_dim rounded up to 16:
 *   K: 2 panels of 16 tokens: [2][dim][16]         (a product q k^T is the matrix tile with k = head_dim)
 *   V: dim / 16 panels of 16 columns: [dim / 16][32 tokens][16]   (p v is the matrix tile with k = tokens)
 * BF16 as in panel.c: neighbours in k (dimensions in K, tokens in V) are interleaved in pairs.
 * Vision has one such block of floats for a head, with all its keys.
 * I8: behind K and behind V lies a float scale for each of the 32 tokens. K's scales go onto the scores and V's onto the
 * probabilities, so the tiles multiply plain integers, whose conversion to float is exact in registers and in scratch.
 */
#include <math.h>
#include <string.h>

#include "cpu.h"

#define BLOCK QVL__KV_BLOCK
#define STEP QVL__ATTN_KEYS
#define TILES 512 /* query tiles listed at a time, on the stack */

static int padded(int head_dim) { return qvl__div_up(head_dim, QVL__PANEL) * QVL__PANEL; }
static size_t panels_bytes(qvl__type type, int dim) { return (size_t)BLOCK * (size_t)dim * qvl__type_size(type); }
static size_t half_bytes(qvl__type type, int dim) { /* K or V */
    return panels_bytes(type, dim) + (type == QVL__I8 ? BLOCK * sizeof(float) : 0);
}

/* ---- cache ---- */

int qvl__cpu_kv_block_bytes(qvl__device *d, qvl__type type, int layers, int kv_heads, int head_dim, size_t *bytes) {
    (void)d;
    if (layers <= 0 || kv_heads <= 0 || head_dim <= 0)
        return qvl__fail(QVL_EINVAL, "a KV cache cannot have %d layers and %d heads of %d", layers, kv_heads, head_dim);
    if (head_dim % 2 || head_dim > QVL__ATTN_MAX_DIM)
        return qvl__fail(QVL_EUNSUPPORTED, "head_dim is %d: it must be even and at most %d", head_dim, QVL__ATTN_MAX_DIM);
    if (type == QVL__F8) return qvl__fail(QVL_EUNSUPPORTED, "kv_dtype fp8 needs a GPU; int8 takes as little memory and keeps more");
    size_t block = 2 * half_bytes(type, padded(head_dim)); /* at most 2^17 */
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
    size_t one = 2 * half_bytes(kv->type, padded(kv->head_dim));
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
        ((float *)(void *)(block + panels_bytes(type, dim)))[t] = scale;
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
    if (type == QVL__I8) ((float *)(void *)(block + panels_bytes(type, dim)))[t] = scale;
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
    int n = kv->head_dim, dim = padded(n);
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
            store_v(kv->type, to + half_bytes(kv->type, dim), pos % BLOCK, dim, c, t.scale, n);
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

/* ---- one tile of query rows against one head's keys ---- */

static int least(int a, int b) { return a < b ? a : b; }

typedef struct {
    qvl__type type;
    int head_dim, dim;
    const char *base;     /* block 0 of the cache; vision: K of all keys */
    size_t block_bytes;   /* from one block to the next */
    const int32_t *table; /* vision: NULL */
    int span;             /* vision: keys there is room for, and V lies behind that many */
} keys;

/* Scratch of a tile, QVL__ATTN_FLOATS(dim) floats. */
typedef struct {
    float *q, *o, *s, *wide_k, *wide_v;
    float max[QVL__ATTN_ROWS], sum[QVL__ATTN_ROWS];
    int limit[QVL__ATTN_ROWS]; /* keys that the row sees; ascending */
    int rows;
} qtile;

static void tile_init(qtile *t, float *scratch, int dim) {
    size_t n = (size_t)QVL__ATTN_ROWS * (size_t)dim;
    t->q = scratch;
    t->o = t->q + n;
    t->s = t->o + n;
    t->wide_k = t->s + QVL__ATTN_ROWS * STEP;
    t->wide_v = t->wide_k + (size_t)STEP * (size_t)dim;
    t->rows = 0;
}

static void tile_add(qtile *t, const keys *ks, const float *q, int limit) {
    memcpy(t->q + (size_t)t->rows * (size_t)ks->dim, q, (size_t)ks->head_dim * sizeof(float));
    t->limit[t->rows] = limit;
    t->max[t->rows] = -INFINITY;
    t->sum[t->rows] = 0;
    t->rows++;
}

/* Keys and values of a step that lie together: all of them, or a block of the cache. */
typedef struct {
    qvl__type type;
    const char *k, *v;
    size_t k_panel, v_panel; /* bytes from panel to panel */
} piece;

/* What a step is made of. */
typedef struct {
    piece piece[STEP / BLOCK];
    int pieces, per_piece; /* keys of each but the last */
    const char *next[2];   /* what the step after it reads first */
    const float *k_scale[STEP / BLOCK], *v_scale[STEP / BLOCK]; /* I8: of each block */
} step;

static const char *block_at(const keys *ks, int b) { return ks->base + (size_t)ks->table[b] * ks->block_bytes; }

/* Keys k0 .. k0 + n as they lie, or for many rows as floats in scratch, which is exact, so that no bit changes. */
static void take_step(const struct qvl__kern *k, const keys *ks, const qtile *t, bool many, int k0, int n, int end, step *s) {
    size_t dim = (size_t)ks->dim, size = qvl__type_size(ks->type), half = half_bytes(ks->type, ks->dim);
    s->pieces = 1, s->per_piece = STEP;
    s->next[0] = s->next[1] = NULL;
    if (!ks->table) {
        const char *v = ks->base + (size_t)ks->span * dim * sizeof(float);
        s->piece[0] = (piece){QVL__F32, ks->base + (size_t)k0 * dim * sizeof(float), v + (size_t)k0 * QVL__PANEL * sizeof(float),
                              dim * QVL__PANEL * sizeof(float), (size_t)ks->span * QVL__PANEL * sizeof(float)};
        return;
    }
    int blocks = qvl__div_up(n, BLOCK);
    if (!many) s->pieces = blocks, s->per_piece = BLOCK;
    else s->piece[0] = (piece){QVL__F32, (const char *)t->wide_k, (const char *)t->wide_v, dim * QVL__PANEL * sizeof(float), STEP * QVL__PANEL * sizeof(float)};
    for (int i = 0; i < blocks; i++) {
        const char *kp = block_at(ks, k0 / BLOCK + i), *vp = kp + half;
        if (ks->type == QVL__I8) {
            s->k_scale[i] = (const float *)(const void *)(kp + panels_bytes(ks->type, ks->dim));
            s->v_scale[i] = (const float *)(const void *)(vp + panels_bytes(ks->type, ks->dim));
        }
        if (!many) {
            s->piece[i] = (piece){ks->type, kp, vp, dim * QVL__PANEL * size, BLOCK * QVL__PANEL * size};
            continue;
        }
        k->widen(ks->type, t->wide_k + (size_t)i * BLOCK * dim, kp, BLOCK / QVL__PANEL * ks->dim);
        for (size_t p = 0; p < dim / QVL__PANEL; p++)
            k->widen(ks->type, t->wide_v + (p * STEP + (size_t)i * BLOCK) * QVL__PANEL, vp + p * BLOCK * QVL__PANEL * size, BLOCK);
    }
    for (int i = 0; !many && i < 2 && k0 + n + i * BLOCK < end; i++) s->next[i] = block_at(ks, (k0 + n) / BLOCK + i);
}

/* The half of a block that is read two halves after half i of a step, its keys and then its values: blocks lie anywhere, so the
 * hardware does not see the next one coming, and products ask for it as they go. */
static const char *two_on(const step *s, int i) {
    int j = i + 2;
    return j < s->pieces ? s->piece[j].k : j < 2 * s->pieces ? s->piece[j - s->pieces].v : s->next[j - 2 * s->pieces];
}

/* Many rows: part i of parts of what the step from key k0 on will read, asked for from memory. */
static void ask(const keys *ks, int k0, int end, int i, int parts) {
    if (!ks->table || k0 >= end) return; /* vision: the hardware sees it coming */
    size_t block = 2 * half_bytes(ks->type, ks->dim), bytes = block * (size_t)qvl__div_up(least(STEP, end - k0), BLOCK);
    for (size_t at = bytes / 64 * (size_t)i / (size_t)parts * 64; at < bytes / 64 * (size_t)(i + 1) / (size_t)parts * 64; at += 64)
        __builtin_prefetch(block_at(ks, k0 / BLOCK + (int)(at / block)) + at % block, 0, 2);
}

/* s[0..n) times the scales of their keys. */
static void scale_keys(const struct qvl__kern *k, float *s, const float *const *scale, int n) {
    for (int i = 0; i < n; i += BLOCK) k->scale(s + i, scale[i / BLOCK], least(BLOCK, n - i));
}

static void attend(const struct qvl__kern *k, const keys *ks, qtile *t) {
    size_t dim = (size_t)ks->dim;
    const float scale = 1.0f / sqrtf((float)ks->head_dim);
    const int end = t->limit[t->rows - 1], panels = ks->dim / QVL__PANEL;
    memset(t->o, 0, (size_t)t->rows * dim * sizeof(float));
    step s;
    for (int k0 = 0, n, first = 0; k0 < end; k0 += n) {
        n = least(STEP, end - k0);
        while (t->limit[first] <= k0) first++; /* rows that end before this step */
        const int rows = t->rows - first;
        bool many = rows > k->mr;
        take_step(k, ks, t, many, k0, n, end, &s);
        float *scores = t->s + (size_t)first * STEP, *o = t->o + (size_t)first * dim;
        for (int i = 0; i < s.pieces; i++) {
            const piece *p = &s.piece[i];
            int some = least(n - i * s.per_piece, s.per_piece);
            k->gemm(p->type, scores + i * s.per_piece, STEP, t->q + (size_t)first * dim, dim, p->k, p->k_panel, rows, qvl__div_up(some, QVL__PANEL),
                    ks->head_dim, false, many ? NULL : two_on(&s, i));
        }
        for (int r = 0; r < rows; r++) {
            int valid = least(t->limit[first + r] - k0, n);
            float *row = scores + (size_t)r * STEP;
            if (ks->type == QVL__I8) scale_keys(k, row, s.k_scale, valid);
            k->softmax_step(row, valid, scale, &t->max[first + r], &t->sum[first + r], o + (size_t)r * dim, ks->dim);
            if (ks->type == QVL__I8) scale_keys(k, row, s.v_scale, valid);
            if (many) ask(ks, k0 + n, end, r, rows);
        }
        for (int i = 0; i < s.pieces; i++) {
            const piece *p = &s.piece[i];
            const char *next = many ? NULL : two_on(&s, s.pieces + i);
            /* What all rows see, as one product; the rest of it with those rows together that see equally many. */
            int from = i * s.per_piece, to = least(n, from + s.per_piece), all = (least(t->limit[first] - k0, to) - from) / 2 * 2;
            if (all > 0) k->gemm(p->type, o, dim, scores + from, STEP, p->v, p->v_panel, rows, panels, all, true, next);
            else all = 0;
            for (int r = 0, last; r < rows; r = last) {
                int some = least(t->limit[first + r] - k0, to) - from - all;
                for (last = r + 1; last < rows && least(t->limit[first + last] - k0, to) - from - all == some; last++) {}
                if (some > 0)
                    k->gemm(p->type, o + (size_t)r * dim, dim, scores + (size_t)r * STEP + from + all, STEP,
                            p->v + (size_t)all * QVL__PANEL * qvl__type_size(p->type), p->v_panel, last - r, panels, some, true, NULL);
            }
        }
    }
}

/* ---- text ---- */

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

    keys ks = {.type = kv->type, .head_dim = kv->head_dim, .dim = padded(kv->head_dim), .base = kv_base(kv, j->layer, kv_head),
               .block_bytes = kv->block_bytes, .table = b->table + (size_t)b->seq[first] * (size_t)b->stride};
    qtile t;
    tile_init(&t, qvl__cpu_scratch(j->d, worker), ks.dim);
    for (int r = first; r < first + count; r++)
        for (int g = 0; g < gn; g++) tile_add(&t, &ks, j->qkv + (size_t)r * ld + (h0 + (size_t)g) * n, b->pos[r] + 1);
    const struct qvl__kern *k = qvl__cpu_kern(j->d);
    attend(k, &ks, &t);
    for (int i = 0; i < t.rows; i++)
        k->divide(j->out + ((size_t)(first + i / gn) * (size_t)j->heads + h0 + (size_t)(i % gn)) * n,
            t.o + (size_t)i * (size_t)ks.dim,
                  t.sum[i], kv->head_dim);
}

void qvl__cpu_attention_paged(qvl__device *d, float *out, const float *qkv, int heads, const qvl__kv *kv, int layer,
                              const qvl__ragged *b) {
    paged_job j = {.d = d, .out = out, .qkv = qkv, .heads = heads, .layer = layer, .kv = kv, .b = b};
    j.group = heads / kv->kv_heads;
    j.chunk = j.group < QVL__ATTN_ROWS ? j.group : QVL__ATTN_ROWS;
    j.chunks = qvl__div_up(j.group, j.chunk);
    int tokens = QVL__ATTN_ROWS / j.chunk;
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

/* ---- vision: keys and values of a head are packed into scratch as one block, which is then walked as above ---- */

static int roomy(int span) { return qvl__div_up(span, BLOCK) * BLOCK; }
static size_t full_head(int span, int dim) { return 2 * (size_t)roomy(span) * (size_t)dim * sizeof(float); }

size_t qvl__cpu_attention_full_scratch(qvl__device *d, int span, int head_dim, int n) {
    (void)d;
    return (size_t)n * full_head(span, padded(head_dim));
}

typedef struct {
    const qvl__device *d;
    float *qkv;
    int span, heads, head_dim, dim, head; /* head: the first of those in scratch */
    int row, rows;                        /* of queries */
    char *scratch;
    int per_head; /* tasks */
} full_job;

#define PACK_BLOCKS 8

static void full_pack(void *ctx, int task, int worker) {
    (void)worker;
    const full_job *j = ctx;
    int head = task / j->per_head, n = j->head_dim;
    size_t ld = 3 * (size_t)j->heads * (size_t)n, dim = (size_t)j->dim, room = (size_t)roomy(j->span);
    float *k = (float *)(void *)(j->scratch + (size_t)head * full_head(j->span, j->dim)), *v = k + room * dim;
    const float *base = j->qkv + (size_t)(j->head + head) * (size_t)n;
    int t = task % j->per_head * PACK_BLOCKS * BLOCK, end = t + PACK_BLOCKS * BLOCK;
    if (end > j->span) end = j->span;
    for (; t < end; t++) {
        size_t panel = (size_t)(t / QVL__PANEL);
        if (t % QVL__PANEL == 0) memset(k + panel * QVL__PANEL * dim, 0, QVL__PANEL * dim * sizeof(float));
        const float *key = base + (size_t)t * ld + (size_t)j->heads * (size_t)n, *value = key + (size_t)j->heads * (size_t)n;
        store_k(QVL__F32, (char *)(k + panel * QVL__PANEL * dim), t % QVL__PANEL, j->dim, key, 0, n);
        for (size_t i = 0; i < dim; i += QVL__PANEL) {
            float *to = v + i * room + (size_t)t * QVL__PANEL;
            size_t some = (size_t)n - i < QVL__PANEL ? (size_t)n - i : QVL__PANEL;
            memset(to, 0, QVL__PANEL * sizeof(float));
            memcpy(to, value + i, some * sizeof(float));
        }
    }
}

void qvl__cpu_attention_pack(qvl__device *d, void *scratch, const float *qkv, int span, int heads, int head_dim, int head, int n) {
    if (span <= 0 || n <= 0) return;
    full_job j = {.d = d, .qkv = (float *)(uintptr_t)qkv, .span = span, .heads = heads, .head_dim = head_dim, .dim = padded(head_dim), .head = head,
                  .scratch = scratch, .per_head = qvl__div_up(span, PACK_BLOCKS * BLOCK)};
    qvl__pool_run(d->pool, n * j.per_head, full_pack, &j);
}

/* A tile of one head reads its own queries first and writes their outputs there last. */
static void full_task(void *ctx, int task, int worker) {
    const full_job *j = ctx;
    const struct qvl__kern *k = qvl__cpu_kern(j->d);
    int head = task / j->per_head;
    size_t n = (size_t)j->head_dim, ld = 3 * (size_t)j->heads * n;
    keys ks = {.type = QVL__F32, .head_dim = j->head_dim, .dim = j->dim, .base = j->scratch + (size_t)head * full_head(j->span, j->dim), .span = roomy(j->span)};
    qtile t;
    tile_init(&t, qvl__cpu_scratch(j->d, worker), j->dim);
    int r0 = task % j->per_head * QVL__ATTN_ROWS, r1 = j->rows - r0 < QVL__ATTN_ROWS ? j->rows : r0 + QVL__ATTN_ROWS;
    float *q = j->qkv + (size_t)(j->row + r0) * ld + (size_t)(j->head + head) * n;
    for (int r = r0; r < r1; r++) tile_add(&t, &ks, q + (size_t)(r - r0) * ld, j->span);
    attend(k, &ks, &t);
    for (int i = 0; i < t.rows; i++) k->divide(q + (size_t)i * ld, t.o + (size_t)i * (size_t)j->dim, t.sum[i], j->head_dim);
}

void qvl__cpu_attention_full(qvl__device *d, float *qkv, int span, int heads, int head_dim, int head, int n, int row, int rows,
                             const void *scratch) {
    if (rows <= 0 || n <= 0) return;
    full_job j = {.d = d, .qkv = qkv, .span = span, .heads = heads, .head_dim = head_dim, .dim = padded(head_dim), .head = head, .row = row, .rows = rows,
                  .scratch = (char *)(uintptr_t)scratch, .per_head = qvl__div_up(rows, QVL__ATTN_ROWS)};
    qvl__pool_run(d->pool, n * j.per_head, full_task, &j);
}
