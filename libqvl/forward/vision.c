/* vision.c - the vision tower (transformers Qwen3VLVisionModel), slice by slice.
 *
 * Job:        resized frames to merged embeddings and deepstack features.
 * Input:      a batch of qvl__visual: each t temporal pairs of h x w patches.
 * Output:     their qvl_embedding, [1 + deepstack][t * h * w / 4][hidden].
 * Invariants: rows are patches in 2x2 block order, all pairs of all visuals behind one another, so 4 rows in sequence are
 *             one merged token without moving data; attention stays inside one pair;
 *             a slice is a piece of one phase of one layer, at most about the device's slice_flops of work, so that a step of the
 *             engine can stop anywhere; how rows are cut changes no bit, because every op works row by row;
 *             memory for each patch: hidden state, q, k, v and angles; everything wider is there for one slice only.
 */
#include <string.h>

#include "forward.h"

#define SLICE_ROWS 1024 /* most rows of a slice; a multiple of 4 */
#define LEAST_ROWS 96   /* fewer would not fill the matrix kernels */
#define PACK_ROWS 32768 /* rows of keys, over all heads, that are packed at once: 1 head where a span is longer */

typedef enum { EMBED, QKV, ATTENTION, MLP, DEEPSTACK, MERGER, FETCH, DONE } phase;

struct qvl__tower {
    qvl_model *m;
    qvl__device *d;
    const qvl__vision_config *c;
    int max_rows, max_visuals;
    size_t bytes;
    char *base; /* one device region that the pointers below divide */
    float *x, *qkv, *cos, *sin; /* for all rows */
    float *norm, *wide, *weight; /* for a slice */
    int32_t *index;
    void *pack;
    float *host; /* a slice's patches or tables on the way to the device */

    /* the batch */
    const qvl__visual **visual; /* [n] */
    qvl_embedding **out;
    int *first_row;
    int n, rows;
    /* where it stands */
    phase phase;
    int layer, deep;       /* deep: how many deepstack features are done */
    int at, pair;          /* visual, and temporal pair of it */
    int head, heads, row;  /* heads: how many are packed from head on; row: of the pair or the batch (DEEPSTACK, MERGER: token), by phase */
    int merged;            /* the layer of the embeddings that FETCH brings */
};

/* ---- memory ---- */

static size_t widest(const qvl__vision_config *c) {
    size_t w = (size_t)c->inter > (size_t)c->hidden ? (size_t)c->inter : (size_t)c->hidden;
    return w > 1536 ? w : 1536;
}

/* Divides one region; with base NULL it only counts. */
static size_t layout(qvl__tower *t) {
    const qvl__vision_config *c = t->c;
    size_t at = 0, rows = (size_t)t->max_rows, h = (size_t)c->hidden, half = h / (size_t)c->heads / 2;
    int packed = t->max_rows > PACK_ROWS ? t->max_rows : PACK_ROWS;
#define PART(field, count) \
    t->field = t->base ? (void *)(t->base + at) : NULL; \
    at = (at + (count) * 4 + 63) / 64 * 64
    PART(x, rows * h);
    PART(qkv, rows * (3 * h > (size_t)c->out_hidden / 4 + 1 ? 3 * h : (size_t)c->out_hidden / 4 + 1)); /* also merged tokens, one for 4 rows */
    PART(cos, rows * half);
    PART(sin, rows * half);
    PART(norm, SLICE_ROWS * h);
    PART(wide, SLICE_ROWS * widest(c));
    PART(weight, SLICE_ROWS * 4);
    PART(index, SLICE_ROWS * 4);
    PART(pack, t->d->attention_full_scratch(t->d, packed, c->hidden / c->heads, 1) / 4);
#undef PART
    return at;
}

size_t qvl__tower_bytes(const qvl_model *m, int max_rows, int max_visuals) {
    qvl__tower t = {.d = m->vision, .c = &m->config.vision, .max_rows = max_rows, .max_visuals = max_visuals};
    return layout(&t);
}

int qvl__tower_new(qvl__tower **out, qvl_model *m, int max_rows, int max_visuals) {
    qvl__tower *t = *out = qvl__calloc(1, sizeof *t);
    if (!t) return QVL_ENOMEM;
    *t = (qvl__tower){.m = m, .d = m->vision, .c = &m->config.vision, .max_rows = max_rows, .max_visuals = max_visuals, .phase = DONE};
    t->bytes = layout(t);
    t->base = t->d->alloc(t->d, t->bytes);
    t->host = qvl__array(NULL, SLICE_ROWS * (widest(t->c) + 2), sizeof(float));
    t->visual = qvl__array(NULL, (size_t)max_visuals, sizeof *t->visual);
    t->out = qvl__array(NULL, (size_t)max_visuals, sizeof *t->out);
    t->first_row = qvl__array(NULL, (size_t)max_visuals, sizeof *t->first_row);
    if (!t->base || !t->host || !t->visual || !t->out || !t->first_row) {
        qvl__tower_free(t);
        *out = NULL;
        return QVL_ENOMEM;
    }
    layout(t);
    return 0;
}

void qvl__tower_free(qvl__tower *t) {
    if (!t) return;
    if (t->base) t->d->free(t->d, t->base, t->bytes);
    qvl__free(t->host);
    qvl__free(t->visual);
    qvl__free(t->out);
    qvl__free(t->first_row);
    qvl__free(t);
}

/* ---- slices ---- */

/* Rows that cost about a slice, of `left`. */
static int slice_rows(const qvl__tower *t, double flops_per_row, int left) {
    double most = t->d->slice_flops / flops_per_row;
    int n = most > SLICE_ROWS ? SLICE_ROWS : most < LEAST_ROWS ? LEAST_ROWS : (int)most / LEAST_ROWS * LEAST_ROWS;
    return n < left ? n : left;
}

static int span_of(const qvl__tower *t) { return t->visual[t->at]->h * t->visual[t->at]->w; }
static size_t pair_row(const qvl__tower *t) { return (size_t)t->first_row[t->at] + (size_t)t->pair * (size_t)span_of(t); }

static void enter(qvl__tower *t, phase p) {
    t->phase = p;
    t->at = t->pair = t->head = t->row = 0;
}

/* The next pair, of this visual or the next; false behind the last one. */
static bool next_pair(qvl__tower *t) {
    t->row = t->head = 0;
    if (++t->pair < t->visual[t->at]->t) return true;
    t->pair = 0;
    return ++t->at < t->n;
}

/* Patches, their embedding, position embedding: x. Angles: cos, sin. */
static void embed(qvl__tower *t) {
    const qvl__visual *v = t->visual[t->at];
    const qvl__vision_config *c = t->c;
    qvl__device *d = t->d;
    int hidden = c->hidden, head_dim = hidden / c->heads, half = head_dim / 2, side = 1;
    while (side * side < c->positions) side++;
    int n = slice_rows(t, 2.0 * 1536 * hidden, span_of(t) - t->row);
    size_t row = pair_row(t) + (size_t)t->row, frame = (size_t)v->h * 16 * (size_t)v->w * 16 * 3, angles = (size_t)n * (size_t)half;
    const uint8_t *a = v->frames + (v->video ? 2 * (size_t)t->pair * frame : 0), *b = v->video ? a + frame : a;
    float *x = t->x + row * (size_t)hidden;

    qvl__patches_cut(t->host, a, b, v->h * 16, v->w * 16, t->row, n, &t->m->config.processor);
    d->put(d, t->wide, t->host, (size_t)n * 1536 * sizeof(float));
    d->matmul(d, x, t->wide, n, &t->m->weights.patch, t->m->weights.patch_b, QVL__EPI_NONE);

    int32_t *index = (int32_t *)(void *)(t->host + 4 * n);
    qvl__pos_embed(index, t->host, t->row, n, v->h, v->w, side);
    d->put(d, t->weight, t->host, 4 * (size_t)n * sizeof(float));
    d->put(d, t->index, index, 4 * (size_t)n * sizeof(int32_t));
    d->add_interpolated(d, x, t->m->weights.pos_embed, t->index, t->weight, n, hidden);

    qvl__rope_vision(t->host, t->host + angles, t->row, n, v->w, head_dim);
    d->put(d, t->cos + row * (size_t)half, t->host, angles * sizeof(float));
    d->put(d, t->sin + row * (size_t)half, t->host + angles, angles * sizeof(float));

    t->row += n;
    if (t->row == span_of(t) && !next_pair(t)) enter(t, QKV);
}

static void qkv(qvl__tower *t) {
    const qvl__vision_layer *l = &t->m->weights.vision[t->layer];
    qvl__device *d = t->d;
    int h = t->c->hidden, heads = t->c->heads, half = h / heads / 2, n = slice_rows(t, 6.0 * h * h, t->rows - t->row);
    size_t row = (size_t)t->row;
    float *to = t->qkv + row * 3 * (size_t)h;
    d->layer_norm(d, t->norm, t->x + row * (size_t)h, l->norm1_w, l->norm1_b, n, h, 1e-6f);
    d->matmul(d, to, t->norm, n, &l->qkv, l->qkv_b, QVL__EPI_NONE);
    d->rope_vision(d, to, n, heads, h / heads, t->cos + row * (size_t)half, t->sin + row * (size_t)half, n);
    t->row += n;
    if (t->row == t->rows) enter(t, ATTENTION);
}

/* Some query rows of some heads of one pair, against all its keys; the outputs take the queries' places. */
static void attention(qvl__tower *t) {
    qvl__device *d = t->d;
    int heads = t->c->heads, head_dim = t->c->hidden / heads, span = span_of(t);
    double flops = 4.0 * span * head_dim; /* of one row and head */
    float *at = t->qkv + pair_row(t) * 3 * (size_t)t->c->hidden;
    if (t->row == 0) {
        double fit = d->slice_flops / flops / span;
        int blocks = (span + QVL__KV_BLOCK - 1) / QVL__KV_BLOCK, room = PACK_ROWS / QVL__KV_BLOCK / blocks;
        t->heads = fit < 1 ? 1 : fit < heads - t->head ? (int)fit : heads - t->head;
        if (t->heads > room) t->heads = room > 1 ? room : 1;
        d->attention_pack(d, t->pack, at, span, heads, head_dim, t->head, t->heads);
    }
    double most = d->slice_flops / flops / t->heads;
    int n = span - t->row < most ? span - t->row : most < LEAST_ROWS ? LEAST_ROWS : (int)most / LEAST_ROWS * LEAST_ROWS;
    if (n > span - t->row) n = span - t->row;
    d->attention_full(d, at, span, heads, head_dim, t->head, t->heads, t->row, n, t->pack);
    t->row += n;
    if (t->row < span) return;
    t->row = 0;
    t->head += t->heads;
    if (t->head == heads && !next_pair(t)) enter(t, MLP);
}

/* The phase behind a layer: its deepstack feature, the next layer, or the merger. */
static void next_layer(qvl__tower *t) { enter(t, ++t->layer < t->c->depth ? QKV : MERGER); }

static void mlp(qvl__tower *t) {
    const qvl__vision_layer *l = &t->m->weights.vision[t->layer];
    qvl__device *d = t->d;
    int h = t->c->hidden, n = slice_rows(t, 2.0 * h * h + 4.0 * h * t->c->inter, t->rows - t->row);
    int32_t *index = (int32_t *)(void *)t->host;
    float *x = t->x + (size_t)t->row * (size_t)h;
    for (int i = 0; i < n; i++) index[i] = 3 * (t->row + i); /* the outputs of attention lie where q was */
    d->put(d, t->index, index, (size_t)n * sizeof(int32_t));
    d->gather_rows(d, t->norm, t->qkv, t->index, n, h);
    d->matmul(d, x, t->norm, n, &l->proj, l->proj_b, QVL__EPI_ADD);
    d->layer_norm(d, t->norm, x, l->norm2_w, l->norm2_b, n, h, 1e-6f);
    d->matmul(d, t->wide, t->norm, n, &l->fc1, l->fc1_b, QVL__EPI_GELU_TANH);
    d->matmul(d, x, t->wide, n, &l->fc2, l->fc2_b, QVL__EPI_ADD);
    t->row += n;
    if (t->row < t->rows) return;
    if (t->deep < t->c->n_deepstack && t->c->deepstack[t->deep] == t->layer) enter(t, DEEPSTACK);
    else next_layer(t);
}

/* Tokens of all visuals through a merger; the main one norms each patch, the deepstack ones the four patches joined. Results
 * stay on the device, in qkv, which is free between layers. */
static void merge(qvl__tower *t) {
    bool joined = t->phase == DEEPSTACK;
    const qvl__merger *m = joined ? &t->m->weights.deepstack[t->deep] : &t->m->weights.merger;
    qvl__device *d = t->d;
    int h = t->c->hidden, out = t->c->out_hidden, tokens = t->rows / 4;
    int n = slice_rows(t, 2.0 * h * (4.0 * h + out), 4 * (tokens - t->row)) / 4;
    const float *x = t->x + 4 * (size_t)t->row * (size_t)h;
    d->layer_norm(d, t->norm, x, m->norm_w, m->norm_b, joined ? n : 4 * n, joined ? 4 * h : h, 1e-6f);
    d->matmul(d, t->wide, t->norm, n, &m->fc1, m->fc1_b, QVL__EPI_GELU_ERF);
    d->matmul(d, t->qkv + (size_t)t->row * (size_t)out, t->wide, n, &m->fc2, m->fc2_b, QVL__EPI_NONE);
    t->row += n;
    if (t->row < tokens) return;
    t->merged = joined ? 1 + t->deep : 0;
    enter(t, FETCH);
}

/* The merged tokens of all visuals to the host. */
static void fetch(qvl__tower *t) {
    size_t out = (size_t)t->c->out_hidden;
    for (int i = 0; i < t->n; i++) {
        qvl_embedding *e = t->out[i];
        t->d->get(t->d, e->data + (size_t)t->merged * (size_t)e->tokens * out, t->qkv + (size_t)(t->first_row[i] / 4) * out, (size_t)e->tokens * out * sizeof(float));
    }
    if (t->merged) t->deep++, next_layer(t);
    else t->phase = DONE;
}

void qvl__tower_start(qvl__tower *t, const qvl__visual *const *visual, qvl_embedding *const *out, int n) {
    t->n = n;
    t->rows = 0;
    for (int i = 0; i < n; i++) {
        t->visual[i] = visual[i];
        t->out[i] = out[i];
        t->first_row[i] = t->rows;
        t->rows += qvl__visual_rows(visual[i]);
    }
    t->layer = t->deep = 0;
    enter(t, n ? EMBED : DONE);
}

int qvl__tower_work(qvl__tower *t, double until_ms, bool wait) {
    do {
        switch (t->phase) {
        case EMBED: embed(t); break;
        case QKV: qkv(t); break;
        case ATTENTION: attention(t); break;
        case MLP: mlp(t); break;
        case DEEPSTACK:
        case MERGER: merge(t); break;
        case FETCH:
            if (!wait && t->d->idle && !t->d->idle(t->d)) return 0;
            fetch(t);
            break;
        case DONE: break;
        }
    } while (t->phase != DONE && qvl__now_ms() < until_ms);
    if (t->phase != DONE) return 0;
    int rc = t->d->sync(t->d);
    return rc ? rc : 1;
}

void qvl__tower_stop(qvl__tower *t) { t->phase = DONE; }

/* ---- one visual ---- */

int qvl__embedding_for(qvl_embedding **out, const qvl_model *m, const qvl__visual *v) {
    int rc = qvl__embedding_alloc(out, 1 + m->config.vision.n_deepstack, v->tokens, m->config.vision.out_hidden);
    if (rc) return rc;
    qvl_embedding *e = *out;
    e->t = v->t, e->h = v->h, e->w = v->w, e->video = v->video;
    memcpy(e->hash, v->hash, sizeof e->hash);
    memcpy(e->weights_id, m->weights.id, sizeof e->weights_id);
    return 0;
}

int qvl__vision_forward(qvl_model *m, const qvl__visual *v, qvl_embedding **out) {
    qvl__tower *t;
    *out = NULL;
    qvl_embedding *e;
    int rc = qvl__embedding_for(&e, m, v);
    if (rc) return rc;
    rc = qvl__tower_new(&t, m, qvl__visual_rows(v), 1);
    if (rc) {
        qvl_embedding_free(e);
        return rc;
    }
    qvl__tower_start(t, &v, &e, 1);
    rc = qvl__tower_work(t, 1e300, true);
    qvl__tower_free(t);
    if (rc < 0) qvl_embedding_free(e);
    else *out = e;
    return rc < 0 ? rc : 0;
}
