/* chat.c - qvl_chat: an answer in one call, written over the public API as a user would.
 *
 * Job:        prompt, an engine just large enough, steps until the answer is whole.
 * Input:      messages and media.
 * Output:     pieces of text to the callback, the whole text at the end.
 * Invariants: nothing is kept between calls.
 */
#include "../engine/engine.h"

/* An engine for this one request. */
static int one_request_engine(qvl_engine **e, qvl_model *m, const qvl_options *o, const qvl_prompt *p) {
    int64_t most = m->config.text.max_positions, want = (int64_t)p->n + qvl__opt_i64(o, "max_tokens"), image = 1;
    for (int i = 0; i < p->n_visuals; i++)
        if (p->visuals[i]->tokens > image) image = p->visuals[i]->tokens;
    qvl_options *eo;
    int rc = qvl_options_new(&eo);
    if (rc) return rc;
    rc = qvl_options_set_i64(eo, "max_requests", 1);
    if (rc == 0) rc = qvl_options_set_i64(eo, "max_context", want < most ? want : most);
    if (rc == 0) rc = qvl_options_set_i64(eo, "max_batched_tokens", qvl__opt_i64(o, "max_batched_tokens"));
    if (rc == 0) rc = qvl_options_set_i64(eo, "max_image_tokens", image);
    if (rc == 0) rc = qvl_options_set_i64(eo, "step_ms", qvl__opt_i64(o, "step_ms"));
    if (rc == 0) rc = qvl_options_set(eo, "kv_dtype", qvl__opt_str(o, "kv_dtype"));
    if (rc == 0) rc = qvl_engine_new(e, m, eo);
    qvl_options_free(eo);
    return rc;
}

static int answer(qvl_engine *e, const qvl_prompt *p, const qvl_options *o, qvl_text_fn on_text, void *ud, qvl__buf *text) {
    int rc = qvl_engine_submit(e, p, o, NULL);
    for (;;) {
        int n = rc ? rc : qvl_engine_step(e, -1);
        if (n < 0) return n;
        for (int i = 0; i < n; i++) {
            const qvl_event *v = qvl_engine_event(e, i);
            size_t len;
            const char *piece = qvl_event_text(v, &len), *message;
            int code = qvl_event_error(v, &message);
            if (code) return qvl__fail(code, "%s", message);
            qvl__buf_add(text, piece, len);
            if (text->failed) return QVL_ENOMEM;
            if (len && on_text && on_text(ud, piece, len) != 0) return qvl__fail(QVL_ECANCELLED, "stopped by the text callback");
            if (qvl_event_type(v) == QVL_EVENT_FINISHED) return 0;
        }
    }
}

int qvl_chat(qvl_model *m, const char *messages, const qvl_media *media, const qvl_options *o, qvl_text_fn on_text, void *ud, char **text) {
    if (!m || !messages) return qvl__fail(QVL_EINVAL, "qvl_chat: model or messages is NULL");
    if (text) *text = NULL;
    if (qvl__opt_i64(o, "n") != 1) return qvl__fail(QVL_EINVAL, "option n: qvl_chat gives one answer; submit to an engine for more");
    qvl_prompt *p;
    qvl_engine *e = NULL;
    qvl__buf all = {0};
    int rc = qvl_prompt_new(&p, m, messages, NULL, media, o);
    if (rc) return rc;
    rc = one_request_engine(&e, m, o, p);
    qvl__buf_puts(&all, "");
    if (rc == 0) rc = answer(e, p, o, on_text, ud, &all);
    if (rc == 0 && text) {
        *text = all.data;
        all = (qvl__buf){0};
    }
    qvl__buf_free(&all);
    qvl_engine_free(e);
    qvl_prompt_free(p);
    return rc;
}
