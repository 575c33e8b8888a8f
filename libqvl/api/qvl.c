/* qvl.c - models, images through the tower, prompts (public functions).
 *
 * Job:        check arguments, put the parts of a model together, call inward.
 * Input:      what qvl.h says.
 * Output:     handles; JSON; numbers.
 * Invariants: a model is immutable once loaded and counted: prompts and engines keep it alive.
 */
#include <inttypes.h>
#include <string.h>

#include "../engine/engine.h"

/* ---- model ---- */

/* An unknown template does not stop the load: tokens, logits and embeddings need none. Rendering a chat refuses it. */
static void choose_template(qvl_model *m, const char *path, const qvl_options *o) {
    const char *asked = qvl__opt_str(o, "chat_template"), *own = m->config.chat_template;
    for (int t = QVL__TEMPLATE_INSTRUCT; t <= QVL__TEMPLATE_TINY; t++)
        if (strcmp(asked, qvl__template_name((qvl__template)t)) == 0) m->template_ = (qvl__template)t;
    if (m->template_ != QVL__TEMPLATE_UNKNOWN || !own) return;
    m->template_ = qvl__template_recognise(own, strlen(own));
    if (m->template_ == QVL__TEMPLATE_UNKNOWN) qvl__log(QVL_LOG_WARN, "%s: the chat template is not known; chats need option chat_template", path);
}

static int load(qvl_model *m, const char *path, const qvl_options *o) {
    const char *dtype = qvl__opt_str(o, "dtype");
    qvl_progress_fn progress;
    void *ud;
    qvl__opt_progress(o, &progress, &ud);
    int rc = qvl__config_load(&m->config, path);
    if (rc == 0) rc = qvl__config_set_yarn(&m->config.text, qvl__opt_f64(o, "rope_yarn_factor"));
    if (rc == 0) choose_template(m, path, o);
    if (rc == 0) rc = qvl__tokenizer_load(&m->tokenizer, path);
    if (rc == 0 && qvl__token_limit(m->tokenizer) > m->config.text.vocab)
        rc = qvl__fail(QVL_EFORMAT, "%s: the tokenizer has ids up to %d, config.json's vocab_size is %d", path, qvl__token_limit(m->tokenizer) - 1, m->config.text.vocab);
    if (rc == 0) rc = qvl__pool_new(&m->pool, (int)qvl__opt_i64(o, "threads"));
    qvl__device_options want = {.bf16_math = strcmp(dtype, "f32") != 0, .deterministic = qvl__opt_i64(o, "deterministic") != 0, .memory = qvl__opt_f64(o, "gpu_memory_utilization"),
                                .gpus = (int)qvl__opt_i64(o, "tensor_parallel_size")};
    if (rc == 0) rc = qvl__device_open(&m->device, m->pool, qvl__opt_str(o, "device"), &want);
    if (rc == 0) m->vision = m->device;
    if (rc == 0 && m->device->beside) rc = m->device->beside(m->device, &m->vision);
    if (rc == 0) rc = qvl__rope_init(m);
    if (rc == 0) m->kv_type = strcmp(dtype, "f32") == 0 ? QVL__F32 : m->device->kv_type;
    if (rc == 0) rc = qvl__weights_load(&m->weights, &m->config, path, m->device, dtype, progress, ud);
    if (rc == 0) rc = m->device->sync(m->device);
    return rc;
}

int qvl_model_load(qvl_model **out, const char *path, const qvl_options *o) {
    if (!out || !path) return qvl__fail(QVL_EINVAL, "qvl_model_load: out or path is NULL");
    *out = NULL;
    qvl_model *m = qvl__calloc(1, sizeof *m);
    if (!m) return QVL_ENOMEM;
    qvl__handle_born();
    atomic_init(&m->refs, 1);
    int rc = load(m, path, o);
    if (rc) {
        qvl_model_free(m);
        return rc;
    }
    *out = m;
    return 0;
}

void qvl_model_free(qvl_model *m) {
    if (!m || atomic_fetch_sub(&m->refs, 1) != 1) return;
    if (m->weights.text) qvl__weights_free(&m->weights, &m->config, m->device);
    if (m->vision && m->vision != m->device) m->vision->close(m->vision);
    if (m->device) m->device->close(m->device);
    qvl__pool_free(m->pool);
    qvl__tokenizer_free(m->tokenizer);
    qvl__config_free(&m->config);
    qvl__free(m->text_inv_freq);
    qvl__free(m->text_axis);
    qvl__free(m);
    qvl__handle_gone();
}

const qvl_tokenizer *qvl_model_tokenizer(const qvl_model *m) { return m ? m->tokenizer : NULL; }

int qvl_model_info(const qvl_model *m, char **json) {
    if (!m || !json) return qvl__fail(QVL_EINVAL, "qvl_model_info: model or json is NULL");
    *json = NULL;
    const qvl__text_config *t = &m->config.text;
    const qvl__vision_config *v = &m->config.vision;
    const qvl__generation_config *g = &m->config.generation;
    qvl__buf b = {0};
    qvl__buf_puts(&b, "{\"family\": ");
    qvl__json_quote(&b, m->config.family, strlen(m->config.family));
    const char *stored = qvl__type_name(m->weights.type), *dtype = m->kv_type == QVL__F32 ? "f32" : stored;
    qvl__buf_printf(&b, ", \"template\": \"%s\", \"dtype\": \"%s\", \"weight_dtype\": \"%s\", \"kv_dtype\": \"%s\", \"device\": \"%s\", \"isa\": \"%s\", \"threads\": %d, ",
                    qvl__template_name(m->template_), dtype, stored, qvl__type_name(m->kv_type), m->device->name, m->device->isa, qvl__pool_threads(m->pool));
    qvl__buf_printf(&b, "\"bf16_math\": %s, \"weight_bytes\": %" PRIu64 ", \"parameters\": %" PRIu64 ", \"vocab_size\": %d, \"max_context\": %d, ",
                    m->device->bf16_math ? "true" : "false", m->weights.bytes, m->weights.parameters, t->vocab, t->max_positions);
    qvl__buf_printf(&b, "\"text\": {\"hidden\": %d, \"layers\": %d, \"heads\": %d, \"kv_heads\": %d, \"head_dim\": %d, \"intermediate\": %d, \"rope_theta\": %.17g, \"yarn_factor\": %g, "
                    "\"mrope_section\": [%d, %d, %d], \"tied\": %s}, ", t->hidden, t->layers, t->heads, t->kv_heads, t->head_dim, t->inter, t->rope_theta, t->yarn.factor,
                    t->mrope_section[0], t->mrope_section[1], t->mrope_section[2], t->tied ? "true" : "false");
    qvl__buf_printf(&b, "\"vision\": {\"hidden\": %d, \"depth\": %d, \"heads\": %d, \"intermediate\": %d, \"patch\": %d, \"merge\": %d, \"deepstack\": [", v->hidden,
                    v->depth, v->heads, v->inter, m->config.processor.patch, m->config.processor.merge);
    for (int i = 0; i < v->n_deepstack; i++) qvl__buf_printf(&b, "%s%d", i ? ", " : "", v->deepstack[i]);
    qvl__buf_printf(&b, "], \"min_pixels\": %" PRId64 ", \"max_pixels\": %" PRId64 "}, ", m->config.processor.min_pixels, m->config.processor.max_pixels);
    qvl__buf_printf(&b, "\"generation\": {\"temperature\": %g, \"top_p\": %g, \"top_k\": %d, \"repetition_penalty\": %g, \"eos_token_ids\": [", g->temperature,
                    g->top_p, g->top_k, g->repetition_penalty);
    for (int i = 0; i < g->n_eos; i++) qvl__buf_printf(&b, "%s%d", i ? ", " : "", g->eos[i]);
    qvl__buf_puts(&b, "]}, \"weights_id\": \"");
    for (int i = 0; i < 32; i++) qvl__buf_printf(&b, "%02x", m->weights.id[i]);
    qvl__buf_puts(&b, "\"}");
    if (b.failed) {
        qvl__buf_free(&b);
        return QVL_ENOMEM;
    }
    *json = b.data;
    return 0;
}

/* ---- vision ---- */

int qvl_patches(const qvl_model *m, const qvl_image *im, const qvl_options *o, float **patches, int32_t thw[3]) {
    if (!m || !im || !patches || !thw) return qvl__fail(QVL_EINVAL, "qvl_patches: an argument is NULL");
    *patches = NULL;
    qvl__visual *v;
    qvl__pixels bounds;
    int rc = qvl__pixels_read(&bounds, o, "min_pixels", "max_pixels");
    if (rc == 0) rc = qvl__visual_from_image(&v, &m->config, im, bounds, m->pool);
    if (rc) return rc;
    int n = v->h * v->w, p = m->config.processor.patch;
    float *f = qvl__array(NULL, (size_t)n, 1536 * sizeof(float));
    if (f) {
        qvl__patches_cut(f, v->frames, v->frames, v->h * p, v->w * p, 0, n, &m->config.processor);
        thw[0] = v->t, thw[1] = v->h, thw[2] = v->w;
        *patches = f;
    } else rc = QVL_ENOMEM;
    qvl__visual_free(v);
    return rc;
}

int qvl_encode_image(const qvl_model *m, const qvl_image *im, const qvl_options *o, qvl_embedding **out) {
    if (!m || !im || !out) return qvl__fail(QVL_EINVAL, "qvl_encode_image: an argument is NULL");
    *out = NULL;
    qvl__visual *v;
    qvl__pixels bounds;
    int rc = qvl__pixels_read(&bounds, o, "min_pixels", "max_pixels");
    if (rc == 0) rc = qvl__visual_from_image(&v, &m->config, im, bounds, m->pool);
    if (rc) return rc;
    rc = qvl__vision_forward((qvl_model *)(uintptr_t)m, v, out);
    qvl__visual_free(v);
    return rc;
}

int qvl_embedding_from_bytes(qvl_embedding **out, const qvl_model *m, const void *data, size_t size) {
    if (!out || !m || (!data && size)) return qvl__fail(QVL_EINVAL, "qvl_embedding_from_bytes: an argument is NULL");
    return qvl__embedding_from_bytes(out, m->weights.id, data, size);
}

/* ---- prompts ---- */

int qvl_render_chat(const qvl_model *m, const char *messages, const char *tools, const qvl_options *o, char **text) {
    if (!m || !messages || !text) return qvl__fail(QVL_EINVAL, "qvl_render_chat: model, messages or text is NULL");
    return qvl__render_chat(m->template_, messages, tools, o, text);
}

/* A prompt of the model: gives it the reference, or passes the failure on. */
static int adopt(qvl_prompt *p, const qvl_model *m, int rc, qvl_prompt **out) {
    if (rc) return rc;
    p->model = (qvl_model *)(uintptr_t)m;
    atomic_fetch_add(&p->model->refs, 1);
    qvl__handle_born();
    *out = p;
    return 0;
}

static qvl__encoder encoder_of(const qvl_model *m) {
    return (qvl__encoder){&m->config, m->tokenizer, m->template_, m->weights.id, m->pool};
}

int qvl_prompt_new(qvl_prompt **out, const qvl_model *m, const char *messages, const char *tools, const qvl_media *media, const qvl_options *o) {
    if (!out || !m || !messages) return qvl__fail(QVL_EINVAL, "qvl_prompt_new: out, model or messages is NULL");
    *out = NULL;
    qvl__encoder e = encoder_of(m);
    qvl_prompt *p = NULL;
    int rc = qvl__prompt_new(&p, &e, messages, tools, media, o);
    return adopt(p, m, rc, out);
}

int qvl_prompt_from_tokens(qvl_prompt **out, const qvl_model *m, const int32_t *ids, size_t n) {
    if (!out || !m || (!ids && n)) return qvl__fail(QVL_EINVAL, "qvl_prompt_from_tokens: out, model or ids is NULL");
    *out = NULL;
    qvl__encoder e = encoder_of(m);
    qvl_prompt *p = NULL;
    int rc = qvl__prompt_from_tokens(&p, &e, ids, n);
    return adopt(p, m, rc, out);
}

void qvl_prompt_free(qvl_prompt *p) {
    if (!p) return;
    qvl_model *m = p->model;
    if (!qvl__prompt_free(p)) return;
    qvl_model_free(m);
    qvl__handle_gone();
}

int qvl_prompt_tokens(const qvl_prompt *p, const int32_t **ids, size_t *n) {
    if (!p) return qvl__fail(QVL_EINVAL, "qvl_prompt_tokens: prompt is NULL");
    if (ids) *ids = p->tokens;
    if (n) *n = p->n;
    return 0;
}

int qvl_prompt_positions(const qvl_prompt *p, const int32_t **positions, size_t *n) {
    if (!p) return qvl__fail(QVL_EINVAL, "qvl_prompt_positions: prompt is NULL");
    if (positions) *positions = p->positions;
    if (n) *n = p->n;
    return 0;
}

const char *qvl_prompt_text(const qvl_prompt *p) { return p && p->text ? p->text : ""; }
