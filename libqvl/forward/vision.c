/* vision.c - the vision tower (transformers Qwen3VLVisionModel).
 *
 * Job:        resized frames to the merged embedding and the deepstack features.
 * Input:      a qvl__visual: t temporal pairs of h x w patches.
 * Output:     a qvl_embedding of [1 + deepstack][t * h * w / 4][hidden].
 * Invariants: rows are patches in 2x2 block order, so 4 rows in sequence are one merged token without moving data;
 *             row-wise work runs in slices of SLICE rows: memory is hidden states and qkv, not the widest activation;
 *             attention stays inside one temporal pair.
 */
#include <string.h>

#include "forward.h"

#define SLICE 1024 /* rows of one pass of the row-wise ops; a multiple of 4 */

typedef struct {
    qvl_model *m;
    qvl__device *d;
    const qvl__vision_config *c;
    int rows, span, slice;
    size_t bytes;
    char *base;
    float *x, *qkv, *norm, *wide, *cos, *sin, *weight;
    int32_t *index;
    void *scratch;
} tower;

/* Divides one region; with base NULL it only counts. */
static size_t layout(tower *t) {
    const qvl__vision_config *c = t->c;
    size_t at = 0, rows = (size_t)t->rows, span = (size_t)t->span, slice = (size_t)t->slice, h = (size_t)c->hidden;
    size_t half = h / (size_t)c->heads / 2;
    size_t widest = (size_t)c->inter > h ? (size_t)c->inter : h;
    if (widest < 3 * 2 * 16 * 16) widest = 3 * 2 * 16 * 16;
#define PART(field, count) \
    t->field = t->base ? (void *)(t->base + at) : NULL; \
    at = (at + (count) * 4 + 63) / 64 * 64
    PART(x, rows * h);
    PART(qkv, rows * 3 * h);
    PART(norm, rows * h); /* slices of normed rows, and the attention's output */
    PART(wide, slice * widest);
    PART(cos, span * half);
    PART(sin, span * half);
    PART(weight, span * 4);
    PART(index, span * 4);
    PART(scratch, t->d->attention_full_scratch(t->d, t->span, c->hidden / c->heads) / 4 + 1);
#undef PART
    return at;
}

/* Patches, their embedding, position embedding: x. */
static void embed(tower *t, const qvl__visual *v, float *host) {
    const qvl__processor *p = &t->m->config.processor;
    size_t frame = (size_t)v->h * 16 * (size_t)v->w * 16 * 3;
    for (int pair = 0; pair < v->t; pair++) {
        const uint8_t *a = v->frames + (v->video ? 2 * (size_t)pair * frame : 0), *b = v->video ? a + frame : a;
        for (int first = 0; first < t->span; first += t->slice) {
            int n = t->span - first < t->slice ? t->span - first : t->slice;
            float *x = t->x + ((size_t)pair * (size_t)t->span + (size_t)first) * (size_t)t->c->hidden;
            qvl__patches_cut(host, a, b, v->h * 16, v->w * 16, first, n, p);
            t->d->put(t->d, t->wide, host, (size_t)n * 1536 * sizeof(float));
            t->d->matmul(t->d, x, t->wide, n, &t->m->weights.patch, t->m->weights.patch_b, QVL__EPI_NONE);
        }
        t->d->add_interpolated(t->d, t->x + (size_t)pair * (size_t)t->span * (size_t)t->c->hidden, t->m->weights.pos_embed, t->index,
                               t->weight, t->span, t->c->hidden);
    }
}

static void block(tower *t, const qvl__vision_layer *l) {
    qvl__device *d = t->d;
    int h = t->c->hidden, heads = t->c->heads;
    d->layer_norm(d, t->norm, t->x, l->norm1_w, l->norm1_b, t->rows, h, 1e-6f);
    d->matmul(d, t->qkv, t->norm, t->rows, &l->qkv, l->qkv_b, QVL__EPI_NONE);
    d->rope_vision(d, t->qkv, t->rows, heads, h / heads, t->cos, t->sin, t->span);
    d->attention_full(d, t->norm, t->qkv, t->rows, t->span, heads, h / heads, t->scratch);
    d->matmul(d, t->x, t->norm, t->rows, &l->proj, l->proj_b, QVL__EPI_ADD);
    for (int r = 0; r < t->rows; r += t->slice) {
        int n = t->rows - r < t->slice ? t->rows - r : t->slice;
        float *x = t->x + (size_t)r * (size_t)h;
        d->layer_norm(d, t->norm, x, l->norm2_w, l->norm2_b, n, h, 1e-6f);
        d->matmul(d, t->wide, t->norm, n, &l->fc1, l->fc1_b, QVL__EPI_GELU_TANH);
        d->matmul(d, x, t->wide, n, &l->fc2, l->fc2_b, QVL__EPI_ADD);
    }
}

/* The main merger norms each patch, the deepstack ones the four patches joined. */
static void merge(tower *t, const qvl__merger *m, bool joined, float *out) {
    qvl__device *d = t->d;
    int h = t->c->hidden, tokens = t->rows / 4, step = t->slice / 4;
    for (int k = 0; k < tokens; k += step) {
        int n = tokens - k < step ? tokens - k : step;
        const float *x = t->x + 4 * (size_t)k * (size_t)h;
        d->layer_norm(d, t->norm, x, m->norm_w, m->norm_b, joined ? n : 4 * n, joined ? 4 * h : h, 1e-6f);
        d->matmul(d, t->qkv, t->norm, n, &m->fc1, m->fc1_b, QVL__EPI_GELU_ERF); /* qkv is free here */
        d->matmul(d, out + (size_t)k * (size_t)t->c->out_hidden, t->qkv, n, &m->fc2, m->fc2_b, QVL__EPI_NONE);
    }
}

static int grid_tables(tower *t, const qvl__visual *v) {
    int half = t->c->hidden / t->c->heads / 2, side = 1;
    while (side * side < t->c->positions) side++;
    size_t n = (size_t)t->span * (size_t)(2 * half + 8);
    float *host = qvl__array(NULL, n, sizeof(float));
    if (!host) return QVL_ENOMEM;
    size_t angles = (size_t)t->span * (size_t)half, corners = (size_t)t->span * 4;
    float *cosv = host, *sinv = cosv + angles, *weight = sinv + angles;
    int32_t *index = (int32_t *)(void *)(weight + corners);
    qvl__rope_vision(cosv, sinv, v->h, v->w, 2 * half);
    qvl__pos_embed(index, weight, v->h, v->w, side);
    t->d->put(t->d, t->cos, cosv, angles * sizeof(float));
    t->d->put(t->d, t->sin, sinv, angles * sizeof(float));
    t->d->put(t->d, t->weight, weight, corners * sizeof(float));
    t->d->put(t->d, t->index, index, corners * sizeof(int32_t));
    qvl__free(host);
    return 0;
}

static int run(tower *t, const qvl__visual *v, qvl_embedding *e) {
    size_t layer = (size_t)e->tokens * (size_t)e->hidden;
    float *host = qvl__array(NULL, (size_t)t->slice * 1536, sizeof(float));
    float *out = t->d->alloc(t->d, layer * sizeof(float));
    int rc = host && out ? grid_tables(t, v) : QVL_ENOMEM;
    if (rc == 0) {
        embed(t, v, host);
        for (int i = 0, k = 0; i < t->c->depth; i++) {
            block(t, &t->m->weights.vision[i]);
            if (k == t->c->n_deepstack || t->c->deepstack[k] != i) continue;
            merge(t, &t->m->weights.deepstack[k], true, out);
            t->d->get(t->d, e->data + (size_t)++k * layer, out, layer * sizeof(float));
        }
        merge(t, &t->m->weights.merger, false, out);
        t->d->get(t->d, e->data, out, layer * sizeof(float));
    }
    if (out) t->d->free(t->d, out, layer * sizeof(float));
    qvl__free(host);
    return rc;
}

int qvl__vision_forward(qvl_model *m, const qvl__visual *v, qvl_embedding **out) {
    *out = NULL;
    tower t = {.m = m, .d = m->device, .c = &m->config.vision, .rows = v->t * v->h * v->w, .span = v->h * v->w};
    t.slice = t.rows < SLICE ? t.rows : SLICE;
    t.bytes = layout(&t);
    qvl_embedding *e;
    int rc = qvl__embedding_alloc(&e, 1 + t.c->n_deepstack, v->tokens, t.c->out_hidden);
    if (rc) return rc;
    e->t = v->t, e->h = v->h, e->w = v->w, e->video = v->video;
    memcpy(e->hash, v->hash, sizeof e->hash);
    memcpy(e->weights_id, m->weights.id, sizeof e->weights_id);
    t.base = t.d->alloc(t.d, t.bytes);
    if (t.base) {
        layout(&t);
        rc = run(&t, v, e);
        t.d->free(t.d, t.base, t.bytes);
    } else rc = QVL_ENOMEM;
    if (rc) {
        qvl_embedding_free(e);
        return rc;
    }
    *out = e;
    return 0;
}
