/* logits.c - teacher-forced logits of a whole prompt (public function).
 *
 * Job:        run a prompt through the text model and keep the logits of every position.
 * Input:      a prompt.
 * Output:     float[n][vocab].
 * Invariants: the same rows, in chunks, that an engine would run: the same bits (law 6);
 *             LOGITS_ROWS rows of logits are in memory at a time beside the caller's buffer.
 */
#include <string.h>

#include "../engine/engine.h"

#define LOGITS_ROWS 64

typedef struct {
    qvl_model *m;
    const qvl_prompt *p;
    qvl_embedding **embeddings; /* of p->visuals */
    qvl__kv kv;
    qvl__text_ws ws;
    int32_t *table, *tokens, *seq, *pos, *out_row, *positions, *visual_row, *visual_index;
    const qvl_embedding **visual_src;
} forced;

static void forced_free(forced *f) {
    for (int i = 0; f->embeddings && i < f->p->n_visuals; i++) qvl_embedding_free(f->embeddings[i]);
    qvl__free(f->embeddings);
    qvl__text_ws_free(&f->ws, f->m);
    f->m->device->kv_free(f->m->device, &f->kv);
    void *const all[] = {f->table, f->tokens, f->seq, f->pos, f->out_row, f->positions, f->visual_row, f->visual_index, f->visual_src};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) qvl__free(all[i]);
}

static int forced_new(forced *f) {
    const qvl__text_config *t = &f->m->config.text;
    size_t rows = LOGITS_ROWS;
    int blocks = qvl__blocks_for((int64_t)f->p->n);
    int rc = f->m->device->kv_new(f->m->device, &f->kv, f->m->kv_type, t->layers, t->kv_heads, t->head_dim, blocks);
    if (rc == 0) rc = qvl__text_ws_new(&f->ws, f->m, LOGITS_ROWS, LOGITS_ROWS, 1, blocks);
    if (rc) return rc;
    f->embeddings = qvl__calloc((size_t)f->p->n_visuals + 1, sizeof *f->embeddings);
    f->table = qvl__array(NULL, (size_t)blocks, sizeof(int32_t));
    f->tokens = qvl__array(NULL, rows, sizeof(int32_t));
    f->seq = qvl__calloc(rows, sizeof(int32_t));
    f->pos = qvl__array(NULL, rows, sizeof(int32_t));
    f->out_row = qvl__array(NULL, rows, sizeof(int32_t));
    f->positions = qvl__array(NULL, rows, 3 * sizeof(int32_t));
    f->visual_row = qvl__array(NULL, rows, sizeof(int32_t));
    f->visual_index = qvl__array(NULL, rows, sizeof(int32_t));
    f->visual_src = qvl__array(NULL, rows, sizeof(void *));
    if (!f->embeddings || !f->table || !f->tokens || !f->seq || !f->pos || !f->out_row || !f->positions || !f->visual_row || !f->visual_index || !f->visual_src)
        return QVL_ENOMEM;
    for (int i = 0; i < blocks; i++) f->table[i] = i;
    for (int i = 0; i < f->p->n_visuals && rc == 0; i++) {
        const qvl__visual *v = f->p->visuals[i];
        if (v->embedding) f->embeddings[i] = qvl__embedding_ref(v->embedding);
        else rc = qvl__vision_forward(f->m, v, &f->embeddings[i]);
    }
    return rc;
}

static int forced_chunk(forced *f, int first, int rows, float *out) {
    const qvl_prompt *p = f->p;
    int visual_rows = 0;
    for (int k = 0; k < rows; k++) {
        f->tokens[k] = p->tokens[first + k];
        f->pos[k] = first + k;
        f->out_row[k] = k;
        for (int axis = 0; axis < 3; axis++) f->positions[axis * rows + k] = p->positions[(size_t)axis * p->n + (size_t)(first + k)];
        const qvl__run *pads = qvl__prompt_run(p, first + k);
        if (!pads) continue;
        f->visual_row[visual_rows] = k;
        f->visual_src[visual_rows] = f->embeddings[pads->visual];
        f->visual_index[visual_rows++] = pads->offset + first + k - (int)pads->start;
    }
    qvl__batch b = {.rows = rows, .seqs = 1, .tokens = f->tokens, .positions = f->positions, .stride = rows, .seq = f->seq, .pos = f->pos, .table = f->table,
                    .visual_rows = visual_rows, .visual_row = f->visual_row, .visual_src = f->visual_src, .visual_index = f->visual_index,
                    .outs = rows, .out_row = f->out_row};
    int rc = qvl__text_forward(f->m, &f->kv, &f->ws, &b);
    if (rc == 0) memcpy(out, f->ws.host_logits, (size_t)rows * (size_t)f->m->config.text.vocab * sizeof(float));
    return rc;
}

int qvl_logits(const qvl_model *m, const qvl_prompt *p, float *out, size_t out_floats) {
    if (!m || !p || !out) return qvl__fail(QVL_EINVAL, "qvl_logits: an argument is NULL");
    if (p->model != m) return qvl__fail(QVL_EINVAL, "qvl_logits: the prompt was made for another model");
    size_t vocab = (size_t)m->config.text.vocab;
    if (out_floats != p->n * vocab) return qvl__fail(QVL_EINVAL, "qvl_logits: out has %zu floats, %zu x %zu are needed", out_floats, p->n, vocab);
    if (p->n > (size_t)m->config.text.max_positions)
        return qvl__fail(QVL_ECONTEXT, "the prompt has %zu tokens, the model's max_position_embeddings is %d", p->n, m->config.text.max_positions);
    forced f = {.m = (qvl_model *)(uintptr_t)m, .p = p};
    int rc = forced_new(&f), n = (int)p->n;
    for (int i = 0; rc == 0 && i < n; i += LOGITS_ROWS) rc = forced_chunk(&f, i, n - i < LOGITS_ROWS ? n - i : LOGITS_ROWS, out + (size_t)i * vocab);
    forced_free(&f);
    return rc;
}
