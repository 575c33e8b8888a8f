/* text.c - the text model (transformers Qwen3VLTextModel).
 *
 * Job:        one ragged batch through all layers: embed, attention over the paged cache, SwiGLU, logits.
 * Input:      qvl__batch: prefill chunks and decode rows of any number of sequences.
 * Output:     logits of the asked rows; keys and values in the cache.
 * Invariants: no allocation; the same ops for 1 row and 1000; image rows replace token embeddings before layer 0, and
 *             deepstack feature j is added to them after layer j.
 */
#include <string.h>

#include "forward.h"

static size_t layout(qvl__text_ws *ws, const qvl_model *m) {
    const qvl__text_config *c = &m->config.text;
    size_t at = 0, rows = (size_t)ws->max_rows, hidden = (size_t)c->hidden, q = (size_t)c->heads * (size_t)c->head_dim;
    size_t kv = (size_t)c->kv_heads * (size_t)c->head_dim, half = (size_t)c->head_dim / 2;
#define PART(field, count) \
    ws->field = ws->base ? (void *)(ws->base + at) : NULL; \
    at = (at + (count) * 4 + 63) / 64 * 64
    PART(x, rows * hidden);
    PART(norm, rows * hidden);
    PART(qkv, rows * (q + 2 * kv));
    PART(attn, rows * (q > hidden ? q : hidden)); /* also the gathered output rows */
    PART(act, rows * (size_t)c->inter);
    PART(cos, rows * half);
    PART(sin, rows * half);
    PART(ids, rows);
    PART(seq, rows);
    PART(pos, rows);
    PART(index, rows);
    PART(out, (size_t)ws->max_out);
    PART(table, (size_t)ws->max_seqs * (size_t)ws->table_stride);
    PART(logits, (size_t)ws->max_out * (size_t)c->vocab);
    if (m->device->sample) {
        PART(draws, (size_t)ws->max_out * sizeof(qvl__draw) / 4);
        PART(changed, QVL__CHANGES * sizeof(qvl__changed) / 4);
        PART(chosen, (size_t)ws->max_out);
    }
    if (c->experts) {
        PART(routes, rows * (size_t)c->experts);
        PART(experts, m->device->moe_work(m->device, ws->max_rows, c->hidden, c->expert_inter, c->experts, c->top_k) / 4);
    }
#undef PART
    return at;
}

size_t qvl__text_ws_bytes(const qvl_model *m, int max_rows, int max_out, int max_seqs, int table_stride) {
    qvl__text_ws ws = {.max_rows = max_rows, .max_out = max_out, .max_seqs = max_seqs, .table_stride = table_stride};
    return layout(&ws, m);
}

int qvl__text_ws_new(qvl__text_ws *ws, const qvl_model *m, int max_rows, int max_out, int max_seqs, int table_stride) {
    *ws = (qvl__text_ws){.max_rows = max_rows, .max_out = max_out, .max_seqs = max_seqs, .table_stride = table_stride};
    ws->bytes = layout(ws, m);
    size_t half = (size_t)m->config.text.head_dim / 2;
    ws->base = m->device->alloc(m->device, ws->bytes);
    ws->host_cos = qvl__array(NULL, (size_t)max_rows * half, sizeof(float));
    ws->host_sin = qvl__array(NULL, (size_t)max_rows * half, sizeof(float));
    bool ok = ws->base && ws->host_cos && ws->host_sin;
    if (!m->device->host_memory) {
        ws->host_logits = qvl__array(NULL, (size_t)max_out * (size_t)m->config.text.vocab, sizeof(float));
        ok = ok && ws->host_logits;
    }
    if (m->device->sample) {
        ws->host_draws = qvl__array(NULL, (size_t)max_out, sizeof(qvl__draw));
        ws->host_changed = qvl__array(NULL, QVL__CHANGES, sizeof(qvl__changed));
        ws->host_chosen = qvl__array(NULL, 2 * (size_t)max_out, sizeof(int32_t));
        ok = ok && ws->host_draws && ws->host_changed && ws->host_chosen;
    }
    if (!ok) {
        qvl__text_ws_free(ws, m);
        return QVL_ENOMEM;
    }
    layout(ws, m);
    if (m->device->host_memory) ws->host_logits = ws->logits;
    return 0;
}

void qvl__text_ws_free(qvl__text_ws *ws, const qvl_model *m) {
    if (ws->base) m->device->free(m->device, ws->base, ws->bytes);
    if (ws->host_logits != ws->logits) qvl__free(ws->host_logits);
    qvl__free(ws->host_draws);
    qvl__free(ws->host_changed);
    qvl__free(ws->host_chosen);
    qvl__free(ws->host_cos);
    qvl__free(ws->host_sin);
    *ws = (qvl__text_ws){0};
}

/* Brings layer `layer` of the embeddings of all visual rows to the device, in ws->norm (free at that time), and puts it
 * into x: in place of the token embedding (layer 0), or added (deepstack). */
static void visual_rows(const qvl_model *m, qvl__text_ws *ws, const qvl__batch *b, int layer) {
    qvl__device *d = m->device;
    size_t hidden = (size_t)m->config.text.hidden;
    for (int i = 0, n; i < b->visual_rows; i += n) { /* tokens that follow one another in one embedding go together */
        const qvl_embedding *e = b->visual_src[i];
        for (n = 1; i + n < b->visual_rows && b->visual_src[i + n] == e && b->visual_index[i + n] == b->visual_index[i] + n; n++) {}
        const float *src = e->data + ((size_t)layer * (size_t)e->tokens + (size_t)b->visual_index[i]) * hidden;
        d->put(d, ws->norm + (size_t)i * hidden, src, (size_t)n * hidden * sizeof(float));
    }
    d->scatter_rows(d, ws->x, ws->norm, ws->index, b->visual_rows, (int)hidden, layer > 0);
}

/* What the device is told about the batch beside its rows. longest is rounded up so that steps of one shape repeat. */
static qvl__ragged ragged(const qvl__text_ws *ws, const qvl__batch *b) {
    qvl__ragged w = {b->rows, ws->seq, ws->pos, ws->table, ws->table_stride, 0, 1};
    int longest = 0;
    while (w.singles < b->rows && (w.singles + 1 == b->rows || b->seq[w.singles + 1] != b->seq[w.singles])) w.singles++;
    for (int r = 0; r < b->rows; r++) longest = b->pos[r] + 1 > longest ? b->pos[r] + 1 : longest;
    while (w.longest < longest) w.longest *= 2;
    return w;
}

/* The layers and the logits: ops alone, unless there are visual rows. Behind the last attention only the rows that give logits go
 * on, and where none does, behind the last keys and values nothing. */
static void layers(const qvl_model *m, qvl__kv *kv, qvl__text_ws *ws, const qvl__batch *b, const qvl__ragged *where) {
    const qvl__text_config *c = &m->config.text;
    const qvl__weights *w = &m->weights;
    qvl__device *d = m->device;
    float *x = ws->x;
    int rows = b->rows;
    d->embed(d, x, &w->embed, ws->ids, rows);
    if (b->visual_rows) visual_rows(m, ws, b, 0);
    for (int i = 0; i < c->layers; i++) {
        const qvl__text_layer *l = &w->text[i];
        const bool last = i + 1 == c->layers, deepstack = b->visual_rows && i < m->config.vision.n_deepstack;
        d->rms_norm(d, ws->norm, x, l->input_norm, rows, c->hidden, c->eps);
        d->matmul(d, ws->qkv, ws->norm, rows, &l->qkv, NULL, QVL__EPI_NONE);
        d->qk_norm_rope_kv(d, ws->qkv, c->heads, l->q_norm, l->k_norm, c->eps, ws->cos, ws->sin, kv, i, where);
        if (last && b->outs == 0) return;
        d->attention_paged(d, ws->attn, ws->qkv, c->heads, kv, i, where);
        d->matmul(d, x, ws->attn, rows, &l->o, NULL, QVL__EPI_ADD);
        if (last && !deepstack) {
            d->gather_rows(d, ws->attn, x, ws->out, b->outs, c->hidden);
            x = ws->attn, rows = b->outs;
        }
        d->rms_norm(d, ws->norm, x, l->post_norm, rows, c->hidden, c->eps);
        if (l->experts.n) {
            d->matmul(d, ws->routes, ws->norm, rows, &l->router, NULL, QVL__EPI_NONE);
            d->moe(d, x, ws->norm, ws->routes, rows, &l->experts, c->top_k, ws->experts);
        } else {
            d->matmul(d, ws->act, ws->norm, rows, &l->gate_up, NULL, QVL__EPI_SWIGLU);
            d->matmul(d, x, ws->act, rows, &l->down, NULL, QVL__EPI_ADD);
        }
        if (deepstack) visual_rows(m, ws, b, 1 + i);
    }
    if (x == ws->x) { /* deepstack after the last layer */
        d->gather_rows(d, ws->attn, x, ws->out, b->outs, c->hidden);
        x = ws->attn;
    }
    d->rms_norm(d, ws->norm, x, w->norm, b->outs, c->hidden, c->eps);
    d->matmul(d, ws->logits, ws->norm, b->outs, &w->lm_head, NULL, QVL__EPI_NONE);
}

/* Samples on the device the rows that may. */
static void draw(const qvl_model *m, qvl__text_ws *ws, const qvl__batch *b) {
    qvl__device *d = m->device;
    int32_t *taken = ws->host_chosen + ws->max_out; /* by draw */
    d->put(d, ws->draws, ws->host_draws, (size_t)b->draws * sizeof(qvl__draw));
    if (b->changes) d->put(d, ws->changed, ws->host_changed, (size_t)b->changes * sizeof(qvl__changed));
    d->sample(d, ws->chosen, ws->logits, m->config.text.vocab, b->token_limit, ws->draws, b->draws, ws->changed);
    d->get(d, taken, ws->chosen, (size_t)b->draws * sizeof(int32_t));
    for (int i = 0; i < b->draws; i++) ws->host_chosen[ws->host_draws[i].row] = taken[i];
}

/* The logits of all other rows to the host, rows that follow one another together. */
static void bring_logits(const qvl_model *m, qvl__text_ws *ws, const qvl__batch *b) {
    qvl__device *d = m->device;
    size_t vocab = (size_t)m->config.text.vocab;
    for (int row = 0, k = 0, end; row < b->outs; row = end + 1, k++) {
        end = k < b->draws ? ws->host_draws[k].row : b->outs;
        if (end > row) d->get(d, ws->host_logits + (size_t)row * vocab, ws->logits + (size_t)row * vocab, (size_t)(end - row) * vocab * sizeof(float));
    }
}

int qvl__text_forward(const qvl_model *m, qvl__kv *kv, qvl__text_ws *ws, const qvl__batch *b) {
    const qvl__text_config *c = &m->config.text;
    qvl__device *d = m->device;
    size_t ints = (size_t)b->rows * sizeof(int32_t), angles = (size_t)b->rows * (size_t)c->head_dim / 2 * sizeof(float);

    qvl__rope_text(m, ws->host_cos, ws->host_sin, b->positions, b->stride, b->rows);
    d->put(d, ws->cos, ws->host_cos, angles);
    d->put(d, ws->sin, ws->host_sin, angles);
    d->put(d, ws->ids, b->tokens, ints);
    d->put(d, ws->seq, b->seq, ints);
    d->put(d, ws->pos, b->pos, ints);
    d->put(d, ws->table, b->table, (size_t)b->seqs * (size_t)ws->table_stride * sizeof(int32_t));
    if (b->visual_rows) d->put(d, ws->index, b->visual_row, (size_t)b->visual_rows * sizeof(int32_t));
    if (b->outs) d->put(d, ws->out, b->out_row, (size_t)b->outs * sizeof(int32_t));
    qvl__ragged where = ragged(ws, b);

    /* Decoding steps repeat: the same ops over the same buffers, only their contents change. */
    const uint64_t key[4] = {(uint64_t)(uintptr_t)ws->base, (uint64_t)(uintptr_t)kv->data, (uint64_t)b->rows << 32 | (uint64_t)b->outs, (uint64_t)where.longest};
    bool repeats = d->replay && where.singles == b->rows && b->visual_rows == 0;
    if (!repeats || !d->replay(d, key)) {
        layers(m, kv, ws, b, &where);
        if (repeats) d->recorded(d);
    }
    if (b->draws) draw(m, ws, b);
    if (!d->host_memory) bring_logits(m, ws, b);
    return d->sync(d);
}
