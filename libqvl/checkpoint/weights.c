/* weights.c - tensors by name into packed matrices and vectors on the device.
 *
 * Job:        find every tensor the architecture has, check its shape, pack it; refuse what is left over.
 * Input:      the safetensors of a directory and the shapes of config.json.
 * Output:     qvl__weights.
 * Invariants: q, k, v share one matrix, gate and up another: one pass over the activations each;
 *             mapped pages are given back as soon as they are packed, so loading needs the weights once, not twice;
 *             a packed directory (pack.c) holds the matrices as the device wants them: they are mapped, not read;
 *             a stored type is kept when it holds the values exactly (dtype auto, f32; FP8 with scales: bf16 with auto where the device has no F8, float
 *             with f32), rounded only for bf16, int8 and int4:
 *             int8 takes every product but the router's, whose choices are worth more than its bytes; int4 the text layers,
 *             while the embedding, the head and the vision tower stay at int8.
 */
#include <inttypes.h>
#include <math.h>
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
    bool packed;               /* the directory is a packed one */
    qvl__packer *to;           /* each weight goes there instead of staying; NULL: it stays */
    char at[48];               /* where we are, in the names of packed files: "text.3." */
    bool round_bf16, exact;    /* exact: dtype f32 */
    const qvl__type *force; /* type of the matrices to come; NULL: theirs */
    const qvl__mix *plan;  /* replaces what force says */
    uint64_t done, total;
    qvl_progress_fn progress;
    void *ud;
    int rc; /* first failure; later calls do nothing */
} loader;

/* What a weight is made of: a tensor and the shape that it must have, cols 0 for a vector. Without tensor (packed files
 * have no such parts, and after a failure) the shape alone. */
typedef struct {
    qvl__tensor *t;
    int64_t rows, cols;
} source;

#define NONE ((source){0})

static const qvl__role WHOLE = {0}, BY_OUTPUT = {QVL__BY_OUTPUT, false, 0, 0}, GATE_UP = {QVL__BY_OUTPUT, true, 0, 0}, BY_INPUT = {QVL__BY_INPUT, false, 0, 0},
                       TABLE = {QVL__TABLE, false, 0, 0};

/* Marks a tensor used, when it is there and has this shape. */
static void check_shape(loader *l, qvl__tensor *t, const char *name, int64_t rows, int64_t cols) {
    if (!t) {
        l->rc = qvl__fail(QVL_EFORMAT, "%s: tensor %s is missing", l->dir, name);
        return;
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
        return;
    }
    t->used = true;
}

/* An FP8 tensor's scales, one for each block. */
static void find_scale(loader *l, qvl__tensor *t, int64_t rows, int64_t cols) {
    const int *block = l->c->fp8_block;
    if (!block[0] || cols == 0) {
        l->rc = qvl__fail(QVL_EFORMAT, "%s: tensor %s is FP8, %s", l->dir, t->name, cols ? "but config.json has no quantization_config" : "which only matrices may be");
        return;
    }
    if (t->rank != 2) {
        l->rc = qvl__fail(QVL_EUNSUPPORTED, "%s: tensor %s: FP8 in a tensor of %d dimensions is not supported, experts must have a tensor each", l->dir, t->name, t->rank);
        return;
    }
    char name[280];
    snprintf(name, sizeof name, "%s_scale_inv", t->name);
    qvl__tensor *scale = qvl__safetensors_find(&l->st, name);
    qvl__type type;
    check_shape(l, scale, name, (rows + block[0] - 1) / block[0], (cols + block[1] - 1) / block[1]);
    if (l->rc == 0) l->rc = qvl__numbers_type(scale, &type);
    t->scale = scale, t->block[0] = block[0], t->block[1] = block[1];
}

/* The tensor of a name (prefix + printf of rest) that must have this shape; rank 2 dims may be stored flattened from
 * more (the patch embedding's Conv3d weight). Marks it used. */
static source need(loader *l, int64_t rows, int64_t cols, const char *prefix, const char *fmt, ...) QVL__PRINTF(5, 6);
static source need(loader *l, int64_t rows, int64_t cols, const char *prefix, const char *fmt, ...) {
    source s = {NULL, rows, cols};
    if (l->rc) return s;
    l->w->parameters += (uint64_t)(cols ? rows * cols : rows);
    if (l->packed) return s;
    char name[256];
    int n = snprintf(name, sizeof name, "%s", prefix);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(name + n, sizeof name - (size_t)n, fmt, ap);
    va_end(ap);
    qvl__tensor *t = qvl__safetensors_find(&l->st, name);
    check_shape(l, t, name, rows, cols);
    if (l->rc == 0 && strcmp(t->dtype, "F8_E4M3") == 0) find_scale(l, t, rows, cols);
    if (l->rc == 0) s.t = t;
    return s;
}

static void advance(loader *l, const qvl__tensor *t, const uint8_t *from, size_t bytes) {
    const qvl__map *map = &l->st.maps[t->shard];
    if (!l->packed) qvl__map_forget(map, (size_t)(from - map->data), bytes);
    l->done += bytes;
    if (l->rc == 0 && l->progress && l->progress(l->ud, l->done, l->total) != 0)
        l->rc = qvl__fail(QVL_ECANCELLED, "%s: loading was cancelled by the progress callback", l->dir);
}

/* The type that the next matrix was told to have. */
static qvl__type forced(const loader *l) { return l->plan ? l->plan->types[l->w->n_matrices] : *l->force; }

/* The narrowest type that holds all of ts exactly, or bf16 when rounding was asked for. */
static int common_type(loader *l, const source *ts, int n, qvl__type *out) {
    bool fp8 = l->d->fp8 && !l->exact && !l->round_bf16;
    for (int i = 0; i < n; i++) {
        qvl__type t;
        if ((l->rc = qvl__numbers_type(ts[i].t, &t)) < 0) return l->rc;
        fp8 = fp8 && qvl__numbers_keep_fp8(ts[i].t);
        if (ts[i].t->scale && !l->exact) t = QVL__BF16; /* as their authors compute with them where there is no FP8 arithmetic */
        *out = i == 0 || *out == t ? t : QVL__F32;
    }
    if (l->round_bf16) *out = QVL__BF16;
    if (fp8) *out = QVL__F8;
    if (l->force) *out = forced(l);
    return 0;
}

/* The matrix goes onto the list of all, which frees it one day. */
static void enlist(loader *l, qvl__matrix *m) {
    size_t n = l->w->n_matrices;
    qvl__matrix **all = l->w->matrices;
    if ((n & (n - 1)) == 0) all = qvl__array(all, n ? 2 * n : 1, sizeof(qvl__matrix *)); /* full at every power of two */
    if (all) {
        l->w->matrices = all;
        all[l->w->n_matrices++] = m;
        return;
    }
    l->d->matrix_free(l->d, m);
    l->rc = QVL_ENOMEM;
}

typedef struct {
    void *out;
    qvl__type type; /* F32 or F8 */
    const qvl__tensor *t;
    int first, count, tasks;
    size_t k;
} scaled;

static void scaled_task(void *ctx, int task, int worker) {
    const scaled *w = ctx;
    int from = (int)((int64_t)w->count * task / w->tasks), to = (int)((int64_t)w->count * (task + 1) / w->tasks);
    (void)worker;
    uint8_t *out = (uint8_t *)w->out + (size_t)from * qvl__row_bytes(w->type, w->k);
    size_t first = (size_t)(w->first + from), count = (size_t)(to - from);
    if (w->type == QVL__F8) qvl__numbers_fp8(out, w->t, first, count, w->k);
    else qvl__numbers((float *)(void *)out, w->t, first, count, w->k);
}

/* Rows of a tensor with scales. */
static void scaled_rows(loader *l, void *out, qvl__type type, const qvl__tensor *t, int first, int count, size_t k) {
    scaled w = {out, type, t, first, count, count < 64 ? count : 64, k};
    qvl__pool_run(l->d->pool, w.tasks, scaled_task, &w);
}

static void pack(loader *l, qvl__matrix *m, int first, const qvl__tensor *t) {
    qvl__type type;
    if (l->rc || (l->rc = qvl__numbers_type(t, &type)) < 0) return;
    if (m->type == QVL__F8) type = QVL__F8;
    size_t k = (size_t)m->k, row = qvl__row_bytes(type, k), stored = t->bytes / (uint64_t)t->shape[0];
    int rows = (int)t->shape[0], step = (int)(CHUNK / row / 16 * 16);
    if (step < 16) step = 16;
    for (int r = 0; r < rows && l->rc == 0; r += step) {
        int count = rows - r < step ? rows - r : step;
        const uint8_t *src = t->data + (size_t)r * stored;
        if (t->scale || (uintptr_t)src % qvl__type_size(type)) { /* FP8, or a header of odd length: the data is not aligned */
            void *copy = qvl__malloc((size_t)count * row);
            if (!copy) {
                l->rc = QVL_ENOMEM;
                return;
            }
            if (t->scale) scaled_rows(l, copy, type, t, r, count, k);
            else memcpy(copy, src, (size_t)count * row);
            l->d->matrix_put(l->d, m, first + r, count, type, copy);
            qvl__free(copy);
        } else l->d->matrix_put(l->d, m, first + r, count, type, src);
        advance(l, t, src, (size_t)count * stored);
    }
    if (t->scale) advance(l, t->scale, t->scale->data, t->scale->bytes);
}

/* Types of matrices. */
static const qvl__type types[] = {QVL__F32, QVL__BF16, QVL__F16, QVL__Q8, QVL__Q4};
enum { TYPES = sizeof types / sizeof *types };

/* A matrix of a packed file; its type is the end of its name. */
static void map_matrix(loader *l, qvl__matrix *m, qvl__role role, int n, int k, const char *part) {
    char name[96];
    qvl__tensor *t = NULL;
    qvl__type type = QVL__F32;
    for (int i = 0; !t && i < TYPES; i++) {
        type = types[i];
        snprintf(name, sizeof name, "%s%s.%s", l->at, part, qvl__type_name(type));
        t = qvl__safetensors_find(&l->st, name);
    }
    if (!t) {
        l->rc = qvl__fail(QVL_EFORMAT, "%s: weight %s%s is missing", l->dir, l->at, part);
        return;
    }
    if ((l->rc = l->d->matrix_map(l->d, m, type, n, k, role, t->data, t->bytes)) < 0) {
        qvl__context(l->rc, "%s: %s", l->dir, name);
        return;
    }
    t->used = true;
    l->w->bytes += m->bytes;
    enlist(l, m);
    advance(l, t, t->data, t->bytes);
}

/* sqrt(sum (w - packed w)^2 / sum w^2) over at most ROWS output features, evenly chosen. */
#define ROWS 256
static double error_of(loader *l, const qvl__matrix *m, const source *ts) {
    size_t k = (size_t)m->k;
    float *is = qvl__array(NULL, 2 * k, sizeof(float)), *was = is ? is + k : NULL;
    double square = 0, wrong = 0;
    for (int i = 0; is && i < ROWS && i < m->n; i++) {
        int32_t f = (int32_t)((int64_t)i * m->n / (m->n < ROWS ? m->n : ROWS)), row = f;
        const source *from = ts;
        for (; row >= from->rows; from++) row -= (int32_t)from->rows;
        qvl__numbers(was, from->t, (size_t)row, 1, k);
        l->d->embed(l->d, is, m, &f, 1);
        for (size_t j = 0; j < k; j++) {
            double d = (double)was[j] - (double)is[j];
            square += (double)was[j] * (double)was[j];
            wrong += d * d;
        }
    }
    if (!is) l->rc = QVL_ENOMEM;
    qvl__free(is);
    return square > 0 ? sqrt(wrong / square) : 0;
}

/* A finished matrix of the loader: stays, or goes to the packer. error: what rounding did to it. */
static void settle(loader *l, qvl__matrix *m, const char *part, double error) {
    l->w->bytes += m->bytes;
    enlist(l, m);
    if (!l->to || l->rc) return;
    char name[96];
    snprintf(name, sizeof name, "%s%s.%s", l->at, part, qvl__type_name(m->type));
    l->rc = qvl__packer_add(l->to, name, "U8", 1, &(uint64_t){m->bytes}, m->data);
    qvl__packer_note(l->to, name, (uint64_t)m->n * (uint64_t)m->k, m->bytes, error);
    l->d->matrix_free(l->d, m);
}

/* One matrix out of one to three tensors stacked along the outputs (rows 0: no tensor). */
static void matrix(loader *l, qvl__matrix *m, const char *part, qvl__role role, source a, source b, source c) {
    source ts[3] = {a, b, c};
    int n = c.rows ? 3 : b.rows ? 2 : 1;
    qvl__type type = QVL__F32;
    if (l->rc) return;
    int outputs = (int)(a.rows + b.rows + c.rows), k = (int)a.cols;
    if (l->packed) {
        map_matrix(l, m, role, outputs, k, part);
        return;
    }
    if (common_type(l, ts, n, &type) < 0) return;
    if ((l->rc = l->d->matrix_new(l->d, m, type, outputs, k, role)) < 0) return;
    if (!l->force && l->w->type != QVL__F8) l->w->type = type; /* FP8 checkpoints keep their embedding and vision tower in bf16 */
    for (int i = 0, first = 0; i < n; first += (int)ts[i].rows, i++) pack(l, m, first, ts[i].t);
    double error = l->to && l->rc == 0 ? error_of(l, m, ts) : 0;
    for (int i = 0; l->to && i < n; i++) { /* which has brought pages back */
        const qvl__map *map = &l->st.maps[ts[i].t->shard];
        qvl__map_forget(map, (size_t)(ts[i].t->data - map->data), ts[i].t->bytes);
    }
    settle(l, m, part, error);
}

/* Norm weights, biases and the position table stay in float. */
static float *vector(loader *l, const char *part, source from) {
    qvl__type type;
    char name[96];
    snprintf(name, sizeof name, "%s%s", l->at, part);
    if (l->rc) return NULL;
    qvl__tensor *t = from.t;
    if (l->packed) check_shape(l, t = qvl__safetensors_find(&l->st, name), name, from.rows, from.cols);
    if (l->rc || (l->rc = qvl__numbers_type(t, &type)) < 0) return NULL;
    size_t n = t->bytes / qvl__type_size(type);
    float *host = qvl__array(NULL, n, sizeof(float)), *p = host ? l->d->alloc(l->d, n * sizeof(float)) : NULL;
    if (!p) {
        qvl__free(host);
        l->rc = QVL_ENOMEM;
        return NULL;
    }
    qvl__numbers(host, t, 0, 1, n);
    l->d->put(l->d, p, host, n * sizeof(float));
    if (l->to) {
        uint64_t shape[2] = {(uint64_t)from.rows, (uint64_t)from.cols};
        l->rc = qvl__packer_add(l->to, name, "F32", from.cols ? 2 : 1, shape, host);
    }
    qvl__free(host);
    l->w->bytes += n * sizeof(float);
    advance(l, t, t->data, t->bytes);
    return p;
}

/* Where in the names of packed files the weights to come are. */
static void go(loader *l, const char *fmt, ...) QVL__PRINTF(2, 3);
static void go(loader *l, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(l->at, sizeof l->at, fmt, ap);
    va_end(ap);
}

static void load_merger(loader *l, qvl__merger *m, const char *name, int norm) {
    const qvl__vision_config *v = &l->c->vision;
    int wide = 4 * v->hidden;
    const char *p = l->vision;
    go(l, "vision.%s.", name);
    m->norm_w = vector(l, "norm_w", need(l, norm, 0, p, "%s.norm.weight", name));
    m->norm_b = vector(l, "norm_b", need(l, norm, 0, p, "%s.norm.bias", name));
    matrix(l, &m->fc1, "fc1", BY_OUTPUT, need(l, wide, wide, p, "%s.linear_fc1.weight", name), NONE, NONE);
    m->fc1_b = vector(l, "fc1_b", need(l, wide, 0, p, "%s.linear_fc1.bias", name));
    matrix(l, &m->fc2, "fc2", BY_INPUT, need(l, v->out_hidden, wide, p, "%s.linear_fc2.weight", name), NONE, NONE);
    m->fc2_b = vector(l, "fc2_b", need(l, v->out_hidden, 0, p, "%s.linear_fc2.bias", name));
}

static void load_vision(loader *l) {
    const qvl__vision_config *v = &l->c->vision;
    qvl__weights *w = l->w;
    const char *p = l->vision;
    int h = v->hidden, head_dim = h / v->heads;
    const qvl__role qkv = {QVL__BY_HEAD, false, head_dim, v->heads}, heads = {QVL__BY_INPUT, false, head_dim, 0};
    go(l, "vision.");
    matrix(l, &w->patch, "patch", WHOLE, need(l, h, v->in_channels * 2 * 16 * 16, p, "patch_embed.proj.weight"), NONE, NONE);
    w->patch_b = vector(l, "patch_b", need(l, h, 0, p, "patch_embed.proj.bias"));
    w->pos_embed = vector(l, "pos_embed", need(l, v->positions, h, p, "pos_embed.weight"));
    for (int i = 0; i < v->depth && l->rc == 0; i++) {
        qvl__vision_layer *b = &w->vision[i];
        go(l, "vision.%d.", i);
        b->norm1_w = vector(l, "norm1_w", need(l, h, 0, p, "blocks.%d.norm1.weight", i));
        b->norm1_b = vector(l, "norm1_b", need(l, h, 0, p, "blocks.%d.norm1.bias", i));
        b->norm2_w = vector(l, "norm2_w", need(l, h, 0, p, "blocks.%d.norm2.weight", i));
        b->norm2_b = vector(l, "norm2_b", need(l, h, 0, p, "blocks.%d.norm2.bias", i));
        matrix(l, &b->qkv, "qkv", qkv, need(l, 3 * h, h, p, "blocks.%d.attn.qkv.weight", i), NONE, NONE);
        b->qkv_b = vector(l, "qkv_b", need(l, 3 * h, 0, p, "blocks.%d.attn.qkv.bias", i));
        matrix(l, &b->proj, "proj", heads, need(l, h, h, p, "blocks.%d.attn.proj.weight", i), NONE, NONE);
        b->proj_b = vector(l, "proj_b", need(l, h, 0, p, "blocks.%d.attn.proj.bias", i));
        matrix(l, &b->fc1, "fc1", BY_OUTPUT, need(l, v->inter, h, p, "blocks.%d.mlp.linear_fc1.weight", i), NONE, NONE);
        b->fc1_b = vector(l, "fc1_b", need(l, v->inter, 0, p, "blocks.%d.mlp.linear_fc1.bias", i));
        matrix(l, &b->fc2, "fc2", BY_INPUT, need(l, h, v->inter, p, "blocks.%d.mlp.linear_fc2.weight", i), NONE, NONE);
        b->fc2_b = vector(l, "fc2_b", need(l, h, 0, p, "blocks.%d.mlp.linear_fc2.bias", i));
    }
    load_merger(l, &w->merger, "merger", h);
    for (int i = 0; i < v->n_deepstack; i++) {
        char name[64];
        snprintf(name, sizeof name, "deepstack_merger_list.%d", i);
        load_merger(l, &w->deepstack[i], name, 4 * h);
    }
}

/* Tied checkpoints have no lm_head.weight; some tools store the same matrix again, which is fine. */
static void load_head(loader *l, const qvl__tensor *embed) {
    qvl__tensor *head = qvl__safetensors_find(&l->st, "lm_head.weight");
    if (!l->c->text.tied) {
        matrix(l, &l->w->lm_head, "lm_head", TABLE, need(l, l->c->text.vocab, l->c->text.hidden, "", "lm_head.weight"), NONE, NONE);
        return;
    }
    l->w->lm_head = l->w->embed;
    if (!head || l->rc || l->packed) return;
    head->used = true;
    if (head->bytes != embed->bytes || strcmp(head->dtype, embed->dtype) != 0 || memcmp(head->data, embed->data, head->bytes) != 0)
        l->rc = qvl__fail(QVL_EFORMAT, "%s: config.json says tie_word_embeddings, but lm_head.weight differs from %s", l->dir, embed->name);
    else advance(l, head, head->data, head->bytes);
}

/* Experts are stored input-major, [experts][inputs][outputs]: y = x W. Packing wants one row per output. */
static void experts(loader *l, qvl__matrix **out, qvl__role role, int inputs, int outputs, const char *name, int layer) {
    int n = l->c->text.experts;
    char part[48];
    qvl__type type = QVL__F32, stored;
    source from = need(l, n, (int64_t)inputs * outputs, l->text, "layers.%d.mlp.experts.%s", layer, name);
    if (l->rc == 0 && !(*out = qvl__calloc((size_t)n, sizeof **out))) l->rc = QVL_ENOMEM;
    if (l->packed) {
        for (int e = 0; e < n && l->rc == 0; e++) {
            snprintf(part, sizeof part, "experts.%d.%s", e, name);
            map_matrix(l, &(*out)[e], role, outputs, inputs, part);
        }
        return;
    }
    if (l->rc || common_type(l, &from, 1, &type) < 0) return;
    const qvl__tensor *t = from.t;
    if (t->rank != 3 || t->shape[1] != inputs) {
        l->rc = qvl__fail(QVL_EFORMAT, "%s: tensor %s is not [experts][%d inputs][%d outputs]", l->dir, t->name, inputs, outputs);
        return;
    }
    qvl__numbers_type(t, &stored);
    size_t size = qvl__type_size(stored), bytes = (size_t)inputs * (size_t)outputs * size;
    uint8_t *turned = qvl__malloc(bytes);
    if (!turned) l->rc = QVL_ENOMEM;
    for (int e = 0; e < n && l->rc == 0; e++) {
        const uint8_t *src = t->data + (size_t)e * bytes;
        for (size_t i = 0; i < (size_t)inputs; i++)
            for (size_t o = 0; o < (size_t)outputs; o++) memcpy(turned + (o * (size_t)inputs + i) * size, src + (i * (size_t)outputs + o) * size, size);
        if (l->force) type = forced(l);
        if ((l->rc = l->d->matrix_new(l->d, &(*out)[e], type, outputs, inputs, role)) < 0) break;
        l->d->matrix_put(l->d, &(*out)[e], 0, outputs, stored, turned);
        advance(l, t, src, bytes);
        snprintf(part, sizeof part, "experts.%d.%s", e, name);
        source turned_rows = {&(qvl__tensor){.data = turned}, outputs, inputs};
        memcpy(turned_rows.t->dtype, t->dtype, sizeof t->dtype);
        settle(l, &(*out)[e], part, l->to && l->rc == 0 ? error_of(l, &(*out)[e], &turned_rows) : 0);
    }
    qvl__free(turned);
}

/* The same as a tensor for each expert and projection, as FP8 checkpoints have them; false: they are not stored like that. */
static bool single_experts(loader *l, qvl__text_layer *b, int i) {
    const qvl__text_config *t = &l->c->text;
    const char *p = l->text;
    char part[256];
    snprintf(part, sizeof part, "%slayers.%d.mlp.experts.0.gate_proj.weight", p, i);
    if (l->rc || !qvl__safetensors_find(&l->st, part)) return false;
    b->experts.gate_up = qvl__calloc((size_t)t->experts, sizeof *b->experts.gate_up);
    b->experts.down = qvl__calloc((size_t)t->experts, sizeof *b->experts.down);
    if (!b->experts.gate_up || !b->experts.down) l->rc = QVL_ENOMEM;
    for (int e = 0; e < t->experts && l->rc == 0; e++) {
        snprintf(part, sizeof part, "experts.%d.gate_up_proj", e);
        matrix(l, &b->experts.gate_up[e], part, GATE_UP, need(l, t->expert_inter, t->hidden, p, "layers.%d.mlp.experts.%d.gate_proj.weight", i, e),
               need(l, t->expert_inter, t->hidden, p, "layers.%d.mlp.experts.%d.up_proj.weight", i, e), NONE);
    }
    for (int e = 0; e < t->experts && l->rc == 0; e++) {
        snprintf(part, sizeof part, "experts.%d.down_proj", e);
        matrix(l, &b->experts.down[e], part, BY_INPUT, need(l, t->hidden, t->expert_inter, p, "layers.%d.mlp.experts.%d.down_proj.weight", i, e), NONE, NONE);
    }
    return true;
}

static void load_mlp(loader *l, qvl__text_layer *b, int i) {
    const qvl__text_config *t = &l->c->text;
    const char *p = l->text;
    if (t->experts && !t->dense_layer[i]) {
        const qvl__type *force = l->force;
        l->force = NULL;
        matrix(l, &b->router, "router", WHOLE, need(l, t->experts, t->hidden, p, "layers.%d.mlp.gate.weight", i), NONE, NONE);
        l->force = force;
        if (!single_experts(l, b, i)) {
            experts(l, &b->experts.gate_up, GATE_UP, t->hidden, 2 * t->expert_inter, "gate_up_proj", i);
            experts(l, &b->experts.down, BY_INPUT, t->expert_inter, t->hidden, "down_proj", i);
        }
        if (l->rc || l->to) return; /* packed, they are gone again */
        b->experts.n = t->experts;
        l->rc = l->d->experts_link(l->d, &b->experts);
        return;
    }
    matrix(l, &b->gate_up, "gate_up", GATE_UP, need(l, t->inter, t->hidden, p, "layers.%d.mlp.gate_proj.weight", i),
           need(l, t->inter, t->hidden, p, "layers.%d.mlp.up_proj.weight", i), NONE);
    matrix(l, &b->down, "down", BY_INPUT, need(l, t->hidden, t->inter, p, "layers.%d.mlp.down_proj.weight", i), NONE, NONE);
}

static void load_text(loader *l, const qvl__type *layers) {
    const qvl__text_config *t = &l->c->text;
    qvl__weights *w = l->w;
    const char *p = l->text;
    int h = t->hidden, q = t->heads * t->head_dim, kv = t->kv_heads * t->head_dim;
    const qvl__role qkv = {QVL__BY_HEAD, false, t->head_dim, t->kv_heads}, heads = {QVL__BY_INPUT, false, t->head_dim, 0};
    go(l, "text.");
    source embed = need(l, t->vocab, h, p, "embed_tokens.weight");
    matrix(l, &w->embed, "embed", TABLE, embed, NONE, NONE);
    if (l->rc == 0) load_head(l, embed.t);
    w->norm = vector(l, "norm", need(l, h, 0, p, "norm.weight"));
    const qvl__type *rest = l->force;
    l->force = layers;
    for (int i = 0; i < t->layers && l->rc == 0; i++) {
        qvl__text_layer *b = &w->text[i];
        go(l, "text.%d.", i);
        b->input_norm = vector(l, "input_norm", need(l, h, 0, p, "layers.%d.input_layernorm.weight", i));
        b->post_norm = vector(l, "post_norm", need(l, h, 0, p, "layers.%d.post_attention_layernorm.weight", i));
        b->q_norm = vector(l, "q_norm", need(l, t->head_dim, 0, p, "layers.%d.self_attn.q_norm.weight", i));
        b->k_norm = vector(l, "k_norm", need(l, t->head_dim, 0, p, "layers.%d.self_attn.k_norm.weight", i));
        matrix(l, &b->qkv, "qkv", qkv, need(l, q, h, p, "layers.%d.self_attn.q_proj.weight", i),
               need(l, kv, h, p, "layers.%d.self_attn.k_proj.weight", i), need(l, kv, h, p, "layers.%d.self_attn.v_proj.weight", i));
        matrix(l, &b->o, "o", heads, need(l, h, q, p, "layers.%d.self_attn.o_proj.weight", i), NONE, NONE);
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
    if (l->c->fp8_block[0]) qvl__sha256_add(&s, l->c->fp8_block, sizeof l->c->fp8_block);
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

/* What a packed directory says of itself: what its weights are called, checked against the option dtype. */
static void read_packed(loader *l, const char *dtype) {
    const char *is = l->st.packed;
    int i = 0;
    while (i < TYPES && strcmp(is, qvl__type_name(types[i])) != 0) i++;
    if (i < TYPES) l->w->type = types[i];
    else l->rc = qvl__fail(QVL_EFORMAT, "%s: packed weights of an unknown kind: %.20s", l->dir, is);
    if (l->rc == 0 && strcmp(dtype, "auto") != 0 && strcmp(dtype, "f32") != 0 && strcmp(dtype, is) != 0)
        l->rc = qvl__fail(QVL_EUNSUPPORTED, "%s is packed as %s: it cannot be loaded as %s; leave dtype at auto, or load the directory it was made from", l->dir, is, dtype);
    l->packed = true;
    qvl__map_huge(&l->st.maps[0]); /* the weights are streamed for as long as the model lives */
}

/* Loads into w, or with to: through w into a packed file. */
static int load(loader *l, const char *dtype) {
    qvl__weights *w = l->w;
    const qvl__config *c = l->c;
    *w = (qvl__weights){0};
    int rc = qvl__safetensors_open(&l->st, l->dir);
    if (rc) return rc;
    /* Published files and transformers' save_pretrained of the whole model use "model."; the inner model saved alone
     * leaves it out. */
    bool outer = qvl__safetensors_find(&l->st, "model.language_model.embed_tokens.weight") || !qvl__safetensors_find(&l->st, "language_model.embed_tokens.weight");
    l->text = outer ? "model.language_model." : "language_model.";
    l->vision = outer ? "model.visual." : "visual.";
    for (size_t i = 0; i < l->st.n; i++) l->total += l->st.tensors[i].bytes;
    w->text = qvl__calloc((size_t)c->text.layers, sizeof *w->text);
    w->vision = qvl__calloc((size_t)c->vision.depth, sizeof *w->vision);
    if (!w->text || !w->vision) l->rc = QVL_ENOMEM;
    static const qvl__type q8 = QVL__Q8, q4 = QVL__Q4;
    const qvl__type *layers = strcmp(dtype, "int4") == 0 ? &q4 : strcmp(dtype, "int8") == 0 ? &q8 : NULL;
    if (l->st.packed) {
        if (l->to) l->rc = qvl__fail(QVL_EUNSUPPORTED, "%s is packed already (%s); pack the directory it was made from", l->dir, l->st.packed);
        else if (l->rc == 0) read_packed(l, dtype);
        layers = NULL;
    }
    l->force = layers ? &q8 : NULL;
    if (l->plan) l->force = layers = &l->plan->most;
    if (layers) w->type = *layers;
    if (l->rc == 0) identify(l);
    if (l->rc == 0) load_text(l, layers);
    if (l->rc == 0) load_vision(l);
    check_leftovers(l);
    if (l->packed && l->rc == 0) { /* the weights live in the file */
        w->file = l->st.maps[0];
        l->st.maps[0] = (qvl__map){0};
    }
    qvl__safetensors_close(&l->st);
    if (l->rc) qvl__weights_free(w, c, l->d);
    return l->rc;
}

int qvl__weights_load(qvl__weights *w, const qvl__config *c, const char *dir, qvl__device *d, const char *dtype,
                      qvl_progress_fn progress, void *ud) {
    loader l = {.d = d, .c = c, .w = w, .dir = dir, .round_bf16 = strcmp(dtype, "bf16") == 0, .exact = strcmp(dtype, "f32") == 0, .progress = progress, .ud = ud};
    return load(&l, dtype);
}

int qvl__weights_pack(qvl__packer *to, const qvl__config *c, const char *dir, qvl__device *d, const char *dtype, const qvl__mix *plan,
                      qvl_progress_fn progress, void *ud) {
    qvl__weights w;
    loader l = {.d = d, .c = c, .w = &w, .dir = dir, .to = to, .plan = plan, .round_bf16 = strcmp(dtype, "bf16") == 0, .exact = strcmp(dtype, "f32") == 0, .progress = progress, .ud = ud};
    int rc = load(&l, dtype);
    if (rc) return rc;
    rc = qvl__packer_end(to, qvl__type_name(w.type));
    qvl__weights_free(&w, c, d);
    return rc;
}

static void free_vector(qvl__device *d, float *p, size_t n) { d->free(d, p, n * sizeof(float)); }

static void free_merger(qvl__device *d, qvl__merger *m, int norm, int wide, int out) {
    free_vector(d, m->norm_w, (size_t)norm);
    free_vector(d, m->norm_b, (size_t)norm);
    free_vector(d, m->fc1_b, (size_t)wide);
    free_vector(d, m->fc2_b, (size_t)out);
}

void qvl__weights_free(qvl__weights *w, const qvl__config *c, qvl__device *d) {
    const qvl__text_config *t = &c->text;
    const qvl__vision_config *v = &c->vision;
    size_t h = (size_t)t->hidden, vh = (size_t)v->hidden, hd = (size_t)t->head_dim;
    for (int i = 0; w->text && i < t->layers; i++)
        if (w->text[i].experts.n) d->experts_unlink(d, &w->text[i].experts);
    for (size_t i = 0; i < w->n_matrices; i++) d->matrix_free(d, w->matrices[i]);
    qvl__free(w->matrices);
    free_vector(d, w->norm, h);
    for (int i = 0; w->text && i < t->layers; i++) {
        qvl__text_layer *b = &w->text[i];
        free_vector(d, b->input_norm, h);
        free_vector(d, b->post_norm, h);
        free_vector(d, b->q_norm, hd);
        free_vector(d, b->k_norm, hd);
        qvl__free(b->experts.gate_up);
        qvl__free(b->experts.down);
    }
    free_vector(d, w->patch_b, vh);
    free_vector(d, w->pos_embed, (size_t)v->positions * vh);
    for (int i = 0; w->vision && i < v->depth; i++) {
        qvl__vision_layer *b = &w->vision[i];
        float *const per_hidden[] = {b->norm1_w, b->norm1_b, b->norm2_w, b->norm2_b, b->proj_b, b->fc2_b};
        for (int j = 0; j < 6; j++) free_vector(d, per_hidden[j], vh);
        free_vector(d, b->qkv_b, 3 * vh);
        free_vector(d, b->fc1_b, (size_t)v->inter);
    }
    free_merger(d, &w->merger, v->hidden, 4 * v->hidden, v->out_hidden);
    for (int i = 0; i < v->n_deepstack; i++) free_merger(d, &w->deepstack[i], 4 * v->hidden, 4 * v->hidden, v->out_hidden);
    qvl__free(w->text);
    qvl__free(w->vision);
    qvl__map_close(&w->file);
    *w = (qvl__weights){0};
}
