/* check.c - what a request would take, without running it.
 *
 * Job:        the same reading and refusing as submit; what the caches know of it.
 * Input:      an engine, a prompt, request options.
 * Output:     JSON.
 * Invariants: nothing of the engine changes; what a cache holds now may be gone when the request comes.
 */
#include <inttypes.h>

#include "engine.h"

/* Prompt tokens whose KV blocks are there. The last token is computed in any case: its logits are the first answer. */
static int cached_tokens(qvl_engine *e, const qvl__request *r) {
    int blocks = 0, full = r->share ? (r->prompt_n - 1) / QVL__KV_BLOCK : 0;
    while (blocks < full && blocks < r->n_keys && qvl__blocks_knows(&e->blocks, r->keys[blocks])) blocks++;
    return blocks * QVL__KV_BLOCK;
}

static void add_visual(qvl__buf *b, const qvl_engine *e, const qvl__visual *v, bool known) {
    int patch = e->model->config.processor.patch;
    qvl__buf_printf(b, "{\"type\": \"%s\", \"width\": %d, \"height\": %d, \"resized_width\": %d, \"resized_height\": %d, \"frame_pairs\": %d, "
                    "\"tokens\": %d, \"cached\": %s}", v->video ? "video" : "image", v->source_w ? v->source_w : v->w * patch,
                    v->source_h ? v->source_h : v->h * patch, v->w * patch, v->h * patch, v->t, v->tokens, known ? "true" : "false");
}

int qvl_engine_check(qvl_engine *e, const qvl_prompt *p, const qvl_options *o, char **json) {
    if (!e || !p || !json) return qvl__fail(QVL_EINVAL, "qvl_engine_check: engine, prompt or json is NULL");
    *json = NULL;
    if (p->model != e->model) return qvl__fail(QVL_EINVAL, "qvl_engine_check: the prompt was made for another model than the engine's");
    qvl__request *r;
    int rc = qvl__request_draft(&r, e, p, o, 0, 0), image_tokens = 0;
    if (rc) return rc;
    for (int i = 0; i < p->n_visuals; i++) image_tokens += p->visuals[i]->tokens;
    qvl__buf b = {0};
    qvl__buf_printf(&b, "{\"prompt_tokens\": %d, \"cached_tokens\": %d, \"image_tokens\": %d, \"max_tokens\": %d, \"kv_blocks\": %d, \"max_context\": %d, \"images\": [",
                    r->prompt_n, cached_tokens(e, r), image_tokens, r->max_tokens, r->max_blocks, e->plan.max_context);
    pthread_mutex_lock(&e->lock);
    for (int i = 0; i < p->n_visuals; i++) {
        if (i) qvl__buf_puts(&b, ", ");
        add_visual(&b, e, p->visuals[i], p->visuals[i]->embedding || qvl__picture_known(e, p->visuals[i]->hash));
    }
    pthread_mutex_unlock(&e->lock);
    qvl__buf_puts(&b, "]}");
    qvl__request_free(e, r);
    if (b.failed) {
        qvl__buf_free(&b);
        return QVL_ENOMEM;
    }
    *json = b.data;
    return 0;
}
