/* weights.c - tensors by name into packed matrices and vectors on the device.
 *
 * Job:        find every tensor the architecture has, check its shape, pack it; refuse what is left over.
 * Input:      the safetensors of a directory and the shapes of config.json.
 * Output:     qvl__weights.
 * Invariants: q, k, v share one matrix, gate and up another: one pass over the activations each;
 *             mapped pages are given back as soon as they are packed, so loading needs the weights once, not twice;
 *             a stored type is kept when it holds the values exactly (dtype auto, f32), rounded only for bf16, int8 and int4:
 *             int8 takes every product but the router's, whose choices are worth more than its bytes; int4 the text layers,
 *             while the embedding, the head and the vision tower stay at int8.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "checkpoint.h"

#define CHUNK ((size_t)64 << 20) /* bytes of a tensor that are packed between two looks at progress */

typedef struct {
    qvl__safetensors st;
    qvl__device *d;
    const qvl__config *c;
    qvl__weights *w;
    const char *dir;
    const char *text, *vision; /* prefixes of the two key styles */
    bool round_bf16;
    const qvl__type *force; /* type of the matrices to come; NULL: theirs */
    uint64_t done, total;
    qvl_progress_fn progress;
    void *ud;
    int rc; /* first failure; later calls do nothing */
} loader;

static int type_of(const qvl__tensor *t, qvl__type *out) {
    if (strcmp(t->dtype, "BF16") == 0) *out = QVL__BF16;
    else if (strcmp(t->dtype, "F16") == 0) *out = QVL__F16;
    else if (strcmp(t->dtype, "F32") == 0) *out = QVL__F32;
    else return qvl__fail(QVL_EUNSUPPORTED, "tensor %.120s: type %s is not supported; use a BF16, F16 or F32 checkpoint", t->name, t->dtype);
    return 0;
}

/* The tensor of a name (prefix + printf of rest) that must have this shape; rank 2 dims may be stored flattened from
 * more (the patch embedding's Conv3d weight). Marks it used. */
static qvl__tensor *need(loader *l, int64_t rows, int64_t cols, const char *prefix, const char *fmt, ...) QVL__PRINTF(5, 6);
static qvl__tensor *need(loader *l, int64_t rows, int64_t cols, const char *prefix, const char *fmt, ...) {
    if (l->rc) return NULL;
    char name[256];
    int n = snprintf(name, sizeof name, "%s", prefix);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(name + n, sizeof name - (size_t)n, fmt, ap);
    va_end(ap);
    qvl__tensor *t = qvl__safetensors_find(&l->st, name);
    if (!t) {
        l->rc = qvl__fail(QVL_EFORMAT, "%s: tensor %s is missing", l->dir, name);
        return NULL;
    }
    int64_t rest = 1;
    for (int i = 1; i < t->rank; i++) rest *= t->shape[i];
    bool fits = cols == 0 ? t->rank == 1 && t->shape[0] == rows : t->rank >= 2 && t->shape[0] == rows && rest == cols;
    if (!fits) {
        char have[128] = "", want[64];
        for (int i = 0, k = 0; i < t->rank && k < 100; i++) k += snprintf(have + k, sizeof have - (size_t)k, "%s%" PRId64, i ? "x" : "", t->shape[i]);
        if (cols) snprintf(want, sizeof want, "%" PRId64 "x%" PRId64, rows, cols);
        else snprintf(want, sizeof want, "%" PRId64, rows);
        l->rc = qvl__fail(QVL_EFORMAT, "%s: tensor %s has shape %s, config.json asks for %s", l->dir, name, have, want);
        return NULL;
    }
    t->used = true;
    l->w->parameters += (uint64_t)(cols ? rows * cols : rows);
    return t;
}

static void advance(loader *l, const qvl__tensor *t, const uint8_t *from, size_t bytes) {
    const qvl__map *map = &l->st.maps[t->shard];
    qvl__map_forget(map, (size_t)(from - map->data), bytes);
    l->done += bytes;
    if (l->rc == 0 && l->progress && l->progress(l->ud, l->done, l->total) != 0)
        l->rc = qvl__fail(QVL_ECANCELLED, "%s: loading was cancelled by the progress callback", l->dir);
}

/* The narrowest type that holds all of ts exactly, or bf16 when rounding was asked for. */
static int common_type(loader *l, qvl__tensor *const *ts, int n, qvl__type *out) {
    for (int i = 0; i < n; i++) {
        qvl__type t;
        if (!ts[i]) return l->rc;
        if ((l->rc = type_of(ts[i], &t)) < 0) return l->rc;
        *out = i == 0 || *out == t ? t : QVL__F32;
    }
    if (l->round_bf16) *out = QVL__BF16;
    if (l->force) *out = *l->force;
    return 0;
}

static void pack(loader *l, qvl__matrix *m, int first, const qvl__tensor *t) {
    qvl__type type;
    if (l->rc || (l->rc = type_of(t, &type)) < 0) return;
    size_t row = (size_t)m->k * qvl__type_size(type);
    int rows = (int)t->shape[0], step = (int)(CHUNK / row / 16 * 16);
    if (step < 16) step = 16;
    for (int r = 0; r < rows && l->rc == 0; r += step) {
        int count = rows - r < step ? rows - r : step;
        const uint8_t *src = t->data + (size_t)r * row;
        if ((uintptr_t)src % qvl__type_size(type)) { /* a header of odd length: the data is not aligned */
            void *copy = qvl__malloc((size_t)count * row);
            if (!copy) {
                l->rc = QVL_ENOMEM;
                return;
            }
            memcpy(copy, src, (size_t)count * row);
            l->d->matrix_put(l->d, m, first + r, count, type, copy);
            qvl__free(copy);
        } else l->d->matrix_put(l->d, m, first + r, count, type, src);
        advance(l, t, src, (size_t)count * row);
    }
}

/* One matrix out of one to three tensors stacked along the outputs. */
static void matrix(loader *l, qvl__matrix *m, bool gate_up, qvl__tensor *a, qvl__tensor *b, qvl__tensor *c) {
    qvl__tensor *ts[3] = {a, b, c};
    int n = c ? 3 : b ? 2 : 1, outputs = 0;
    qvl__type type = QVL__F32;
    if (l->rc || common_type(l, ts, n, &type) < 0) return;
    int64_t k = 1;
    for (int i = 1; i < a->rank; i++) k *= a->shape[i];
    for (int i = 0; i < n; i++) outputs += (int)ts[i]->shape[0];
    if ((l->rc = l->d->matrix_new(l->d, m, type, outputs, (int)k, gate_up)) < 0) return;
    l->w->bytes += m->bytes;
    if (!l->force) l->w->type = type;
    for (int i = 0, first = 0; i < n; first += (int)ts[i]->shape[0], i++) pack(l, m, first, ts[i]);
}

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = h >> 10 & 31, man = h & 1023, bits;
    float f;
    if (exp == 0) {
        f = (float)man * 0x1p-24f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    } else bits = sign | (exp == 31 ? 0x7F800000 : (exp + 112) << 23) | man << 13;
    memcpy(&f, &bits, 4);
    return f;
}

/* Norm weights, biases and the position table stay in float. */
static float *vector(loader *l, qvl__tensor *t) {
    qvl__type type;
    if (!t || l->rc || (l->rc = type_of(t, &type)) < 0) return NULL;
    size_t n = t->bytes / qvl__type_size(type);
    float *host = qvl__array(NULL, n, sizeof(float)), *p = host ? l->d->alloc(l->d, n * sizeof(float)) : NULL;
    if (!p) {
        qvl__free(host);
        l->rc = QVL_ENOMEM;
        return NULL;
    }
    for (size_t i = 0; i < n; i++) {
        uint16_t u;
        if (type == QVL__F32) memcpy(&host[i], t->data + 4 * i, 4);
        else {
            memcpy(&u, t->data + 2 * i, 2);
            uint32_t wide = (uint32_t)u << 16;
            if (type == QVL__BF16) memcpy(&host[i], &wide, 4);
            else host[i] = half_to_float(u);
        }
    }
    l->d->put(l->d, p, host, n * sizeof(float));
    qvl__free(host);
    l->w->bytes += n * sizeof(float);
    advance(l, t, t->data, t->bytes);
    return p;
}

static void load_merger(loader *l, qvl__merger *m, const char *name, int norm) {
    const qvl__vision_config *v = &l->c->vision;
    int wide = 4 * v->hidden;
    const char *p = l->vision;
    m->norm_w = vector(l, need(l, norm, 0, p, "%s.norm.weight", name));
    m->norm_b = vector(l, need(l, norm, 0, p, "%s.norm.bias", name));
    matrix(l, &m->fc1, false, need(l, wide, wide, p, "%s.linear_fc1.weight", name), NULL, NULL);
    m->fc1_b = vector(l, need(l, wide, 0, p, "%s.linear_fc1.bias", name));
    matrix(l, &m->fc2, false, need(l, v->out_hidden, wide, p, "%s.linear_fc2.weight", name), NULL, NULL);
    m->fc2_b = vector(l, need(l, v->out_hidden, 0, p, "%s.linear_fc2.bias", name));
}

static void load_vision(loader *l) {
    const qvl__vision_config *v = &l->c->vision;
    qvl__weights *w = l->w;
    const char *p = l->vision;
    int h = v->hidden;
    matrix(l, &w->patch, false, need(l, h, v->in_channels * 2 * 16 * 16, p, "patch_embed.proj.weight"), NULL, NULL);
    w->patch_b = vector(l, need(l, h, 0, p, "patch_embed.proj.bias"));
    w->pos_embed = vector(l, need(l, v->positions, h, p, "pos_embed.weight"));
    for (int i = 0; i < v->depth && l->rc == 0; i++) {
        qvl__vision_layer *b = &w->vision[i];
        b->norm1_w = vector(l, need(l, h, 0, p, "blocks.%d.norm1.weight", i));
        b->norm1_b = vector(l, need(l, h, 0, p, "blocks.%d.norm1.bias", i));
        b->norm2_w = vector(l, need(l, h, 0, p, "blocks.%d.norm2.weight", i));
        b->norm2_b = vector(l, need(l, h, 0, p, "blocks.%d.norm2.bias", i));
        matrix(l, &b->qkv, false, need(l, 3 * h, h, p, "blocks.%d.attn.qkv.weight", i), NULL, NULL);
        b->qkv_b = vector(l, need(l, 3 * h, 0, p, "blocks.%d.attn.qkv.bias", i));
        matrix(l, &b->proj, false, need(l, h, h, p, "blocks.%d.attn.proj.weight", i), NULL, NULL);
        b->proj_b = vector(l, need(l, h, 0, p, "blocks.%d.attn.proj.bias", i));
        matrix(l, &b->fc1, false, need(l, v->inter, h, p, "blocks.%d.mlp.linear_fc1.weight", i), NULL, NULL);
        b->fc1_b = vector(l, need(l, v->inter, 0, p, "blocks.%d.mlp.linear_fc1.bias", i));
        matrix(l, &b->fc2, false, need(l, h, v->inter, p, "blocks.%d.mlp.linear_fc2.weight", i), NULL, NULL);
        b->fc2_b = vector(l, need(l, h, 0, p, "blocks.%d.mlp.linear_fc2.bias", i));
    }
    load_merger(l, &w->merger, "merger", h);
    for (int i = 0; i < v->n_deepstack; i++) {
        char name[64];
        snprintf(name, sizeof name, "deepstack_merger_list.%d", i);
        load_merger(l, &w->deepstack[i], name, 4 * h);
    }
}

/* Tied checkpoints have no lm_head.weight; some tools store the same matrix again, which is fine. */
static void load_head(loader *l, qvl__tensor *embed) {
    qvl__tensor *head = qvl__safetensors_find(&l->st, "lm_head.weight");
    if (!l->c->text.tied) {
        matrix(l, &l->w->lm_head, false, need(l, l->c->text.vocab, l->c->text.hidden, "", "lm_head.weight"), NULL, NULL);
        return;
    }
    l->w->lm_head = l->w->embed;
    if (!head || l->rc) return;
    head->used = true;
    if (head->bytes != embed->bytes || strcmp(head->dtype, embed->dtype) != 0 || memcmp(head->data, embed->data, head->bytes) != 0)
        l->rc = qvl__fail(QVL_EFORMAT, "%s: config.json says tie_word_embeddings, but lm_head.weight differs from %s", l->dir, embed->name);
    else advance(l, head, head->data, head->bytes);
}

/* Experts are stored input-major, [experts][inputs][outputs]: y = x W. Packing wants one row per output. */
static void experts(loader *l, qvl__matrix **out, bool gate_up, int inputs, int outputs, const char *name, int layer) {
    int n = l->c->text.experts;
    qvl__type type = QVL__F32;
    qvl__tensor *t = need(l, n, (int64_t)inputs * outputs, l->text, "layers.%d.mlp.experts.%s", layer, name);
    if (!t || common_type(l, &t, 1, &type) < 0) return;
    if (t->rank != 3 || t->shape[1] != inputs) {
        l->rc = qvl__fail(QVL_EFORMAT, "%s: tensor %s is not [experts][%d inputs][%d outputs]", l->dir, t->name, inputs, outputs);
        return;
    }
    qvl__type stored;
    type_of(t, &stored);
    size_t size = qvl__type_size(stored), bytes = (size_t)inputs * (size_t)outputs * size;
    *out = qvl__calloc((size_t)n, sizeof **out);
    uint8_t *turned = qvl__malloc(bytes);
    if (!*out || !turned) l->rc = QVL_ENOMEM;
    for (int e = 0; e < n && l->rc == 0; e++) {
        const uint8_t *src = t->data + (size_t)e * bytes;
        for (size_t i = 0; i < (size_t)inputs; i++)
            for (size_t o = 0; o < (size_t)outputs; o++) memcpy(turned + (o * (size_t)inputs + i) * size, src + (i * (size_t)outputs + o) * size, size);
        if ((l->rc = l->d->matrix_new(l->d, &(*out)[e], type, outputs, inputs, gate_up)) < 0) break;
        l->w->bytes += (*out)[e].bytes;
        l->d->matrix_put(l->d, &(*out)[e], 0, outputs, stored, turned);
        advance(l, t, src, bytes);
    }
    qvl__free(turned);
}

static void load_mlp(loader *l, qvl__text_layer *b, int i) {
    const qvl__text_config *t = &l->c->text;
    const char *p = l->text;
    if (t->experts && !t->dense_layer[i]) {
        const qvl__type *force = l->force;
        l->force = NULL;
        matrix(l, &b->router, false, need(l, t->experts, t->hidden, p, "layers.%d.mlp.gate.weight", i), NULL, NULL);
        l->force = force;
        experts(l, &b->expert_gate_up, true, t->hidden, 2 * t->expert_inter, "gate_up_proj", i);
        experts(l, &b->expert_down, false, t->expert_inter, t->hidden, "down_proj", i);
        return;
    }
    matrix(l, &b->gate_up, true, need(l, t->inter, t->hidden, p, "layers.%d.mlp.gate_proj.weight", i),
           need(l, t->inter, t->hidden, p, "layers.%d.mlp.up_proj.weight", i), NULL);
    matrix(l, &b->down, false, need(l, t->hidden, t->inter, p, "layers.%d.mlp.down_proj.weight", i), NULL, NULL);
}

static void load_text(loader *l, const qvl__type *layers) {
    const qvl__text_config *t = &l->c->text;
    qvl__weights *w = l->w;
    const char *p = l->text;
    int h = t->hidden, q = t->heads * t->head_dim, kv = t->kv_heads * t->head_dim;
    qvl__tensor *embed = need(l, t->vocab, h, p, "embed_tokens.weight");
    matrix(l, &w->embed, false, embed, NULL, NULL);
    if (l->rc == 0) load_head(l, embed);
    w->norm = vector(l, need(l, h, 0, p, "norm.weight"));
    const qvl__type *rest = l->force;
    l->force = layers;
    for (int i = 0; i < t->layers && l->rc == 0; i++) {
        qvl__text_layer *b = &w->text[i];
        b->input_norm = vector(l, need(l, h, 0, p, "layers.%d.input_layernorm.weight", i));
        b->post_norm = vector(l, need(l, h, 0, p, "layers.%d.post_attention_layernorm.weight", i));
        b->q_norm = vector(l, need(l, t->head_dim, 0, p, "layers.%d.self_attn.q_norm.weight", i));
        b->k_norm = vector(l, need(l, t->head_dim, 0, p, "layers.%d.self_attn.k_norm.weight", i));
        matrix(l, &b->qkv, false, need(l, q, h, p, "layers.%d.self_attn.q_proj.weight", i),
               need(l, kv, h, p, "layers.%d.self_attn.k_proj.weight", i), need(l, kv, h, p, "layers.%d.self_attn.v_proj.weight", i));
        matrix(l, &b->o, false, need(l, h, q, p, "layers.%d.self_attn.o_proj.weight", i), NULL, NULL);
        load_mlp(l, b, i);
    }
    l->force = rest;
}

/* SHA-256 over what decides the bits of an output: the numbers of config.json that no tensor's shape tells, names, types,
 * shapes, 4 KiB at 16 places of every tensor, and how the device computes. Whole contents would cost a second per gigabyte
 * at every start. */
static void identify(loader *l) {
    const qvl__text_config *tc = &l->c->text;
    const qvl__vision_config *vc = &l->c->vision;
    const int32_t heads[] = {tc->heads, tc->kv_heads, tc->mrope_section[0], tc->mrope_section[1], tc->mrope_section[2], tc->top_k, vc->heads};
    const double real[] = {(double)tc->eps, tc->rope_theta};
    qvl__sha256 s;
    qvl__sha256_init(&s);
    qvl__sha256_add(&s, heads, sizeof heads);
    qvl__sha256_add(&s, real, sizeof real);
    qvl__sha256_add(&s, vc->deepstack, sizeof vc->deepstack[0] * (size_t)vc->n_deepstack);
    for (size_t i = 0; i < l->st.n; i++) {
        const qvl__tensor *t = &l->st.tensors[i];
        qvl__sha256_add(&s, t->name, strlen(t->name) + 1);
        qvl__sha256_add(&s, t->dtype, sizeof t->dtype);
        qvl__sha256_add(&s, t->shape, sizeof t->shape[0] * (size_t)t->rank);
        for (int part = 0; part < 16; part++) {
            uint64_t at = t->bytes > 4096 ? (t->bytes - 4096) / 15 * (uint64_t)part : 0;
            qvl__sha256_add(&s, t->data + at, t->bytes - at < 4096 ? t->bytes - at : 4096);
            if (t->bytes <= 4096) break;
        }
    }
    const qvl__text_config *t = &l->c->text;
    const qvl__vision_config *v = &l->c->vision;
    const qvl__processor *p = &l->c->processor;
    const double numbers[] = {t->heads, t->kv_heads, t->head_dim, t->eps, t->rope_theta, t->mrope_section[0], t->mrope_section[1], t->mrope_section[2],
                              t->experts, t->top_k, v->heads, v->n_deepstack, p->mean[0], p->mean[1], p->mean[2], p->std[0], p->std[1], p->std[2]};
    qvl__sha256_add(&s, numbers, sizeof numbers);
    qvl__sha256_add(&s, v->deepstack, sizeof v->deepstack);
    qvl__sha256_add(&s, l->d->isa, strlen(l->d->isa) + 1);
    uint8_t how[3] = {l->round_bf16, l->d->bf16_math, (uint8_t)l->w->type};
    qvl__sha256_add(&s, how, sizeof how);
    qvl__sha256_end(&s, l->w->id);
}

static void check_leftovers(loader *l) {
    for (size_t i = 0; l->rc == 0 && i < l->st.n; i++)
        if (!l->st.tensors[i].used)
            l->rc = qvl__fail(QVL_EUNSUPPORTED, "%s: tensor %.120s is not part of this architecture as config.json describes it", l->dir, l->st.tensors[i].name);
}

int qvl__weights_load(qvl__weights *w, const qvl__config *c, const char *dir, qvl__device *d, const char *dtype,
                      qvl_progress_fn progress, void *ud) {
    *w = (qvl__weights){0};
    loader l = {.d = d, .c = c, .w = w, .dir = dir, .round_bf16 = strcmp(dtype, "bf16") == 0, .progress = progress, .ud = ud};
    int rc = qvl__safetensors_open(&l.st, dir);
    if (rc) return rc;
    /* Published files and transformers' save_pretrained of the whole model use "model."; the inner model saved alone
     * leaves it out. */
    bool outer = qvl__safetensors_find(&l.st, "model.language_model.embed_tokens.weight") || !qvl__safetensors_find(&l.st, "language_model.embed_tokens.weight");
    l.text = outer ? "model.language_model." : "language_model.";
    l.vision = outer ? "model.visual." : "visual.";
    for (size_t i = 0; i < l.st.n; i++) l.total += l.st.tensors[i].bytes;
    w->text = qvl__calloc((size_t)c->text.layers, sizeof *w->text);
    w->vision = qvl__calloc((size_t)c->vision.depth, sizeof *w->vision);
    if (!w->text || !w->vision) l.rc = QVL_ENOMEM;
    static const qvl__type q8 = QVL__Q8, q4 = QVL__Q4;
    const qvl__type *layers = strcmp(dtype, "int4") == 0 ? &q4 : strcmp(dtype, "int8") == 0 ? &q8 : NULL;
    l.force = layers ? &q8 : NULL;
    if (layers) w->type = *layers;
    if (l.rc == 0) identify(&l);
    if (l.rc == 0) load_text(&l, layers);
    if (l.rc == 0) load_vision(&l);
    check_leftovers(&l);
    qvl__safetensors_close(&l.st);
    if (l.rc) qvl__weights_free(w, c, d);
    return l.rc;
}

static void free_vector(qvl__device *d, float *p, size_t n) { d->free(d, p, n * sizeof(float)); }

static void free_merger(qvl__device *d, qvl__merger *m, int norm, int wide, int out) {
    free_vector(d, m->norm_w, (size_t)norm);
    free_vector(d, m->norm_b, (size_t)norm);
    free_vector(d, m->fc1_b, (size_t)wide);
    free_vector(d, m->fc2_b, (size_t)out);
    d->matrix_free(d, &m->fc1);
    d->matrix_free(d, &m->fc2);
}

void qvl__weights_free(qvl__weights *w, const qvl__config *c, qvl__device *d) {
    const qvl__text_config *t = &c->text;
    const qvl__vision_config *v = &c->vision;
    size_t h = (size_t)t->hidden, vh = (size_t)v->hidden, hd = (size_t)t->head_dim;
    if (!t->tied) d->matrix_free(d, &w->lm_head);
    d->matrix_free(d, &w->embed);
    free_vector(d, w->norm, h);
    for (int i = 0; w->text && i < t->layers; i++) {
        qvl__text_layer *b = &w->text[i];
        free_vector(d, b->input_norm, h);
        free_vector(d, b->post_norm, h);
        free_vector(d, b->q_norm, hd);
        free_vector(d, b->k_norm, hd);
        d->matrix_free(d, &b->qkv);
        d->matrix_free(d, &b->o);
        d->matrix_free(d, &b->gate_up);
        d->matrix_free(d, &b->down);
        d->matrix_free(d, &b->router);
        for (int e = 0; b->expert_gate_up && e < t->experts; e++) d->matrix_free(d, &b->expert_gate_up[e]);
        for (int e = 0; b->expert_down && e < t->experts; e++) d->matrix_free(d, &b->expert_down[e]);
        qvl__free(b->expert_gate_up);
        qvl__free(b->expert_down);
    }
    d->matrix_free(d, &w->patch);
    free_vector(d, w->patch_b, vh);
    free_vector(d, w->pos_embed, (size_t)v->positions * vh);
    for (int i = 0; w->vision && i < v->depth; i++) {
        qvl__vision_layer *b = &w->vision[i];
        float *const per_hidden[] = {b->norm1_w, b->norm1_b, b->norm2_w, b->norm2_b, b->proj_b, b->fc2_b};
        for (int j = 0; j < 6; j++) free_vector(d, per_hidden[j], vh);
        free_vector(d, b->qkv_b, 3 * vh);
        free_vector(d, b->fc1_b, (size_t)v->inter);
        d->matrix_free(d, &b->qkv);
        d->matrix_free(d, &b->proj);
        d->matrix_free(d, &b->fc1);
        d->matrix_free(d, &b->fc2);
    }
    free_merger(d, &w->merger, v->hidden, 4 * v->hidden, v->out_hidden);
    for (int i = 0; i < v->n_deepstack; i++) free_merger(d, &w->deepstack[i], 4 * v->hidden, 4 * v->hidden, v->out_hidden);
    qvl__free(w->text);
    qvl__free(w->vision);
    *w = (qvl__weights){0};
}
