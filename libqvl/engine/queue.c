/* queue.c - the part of the engine that any thread may call.
 *
 * Job:        submit, cancel, wake, stats; the list of live requests.
 * Input:      prompts and request options.
 * Output:     requests in the inbox; numbers.
 * Invariants: a request that can never fit is refused here, with the numbers; ids rise and are never reused.
 */
#include <jansson.h>
#include <string.h>
#include <sys/random.h>

#include "engine.h"

void qvl__request_free(qvl__request *r) {
    if (!r) return;
    for (int i = 0; r->embeddings && i < r->prompt->n_visuals; i++) qvl_embedding_free(r->embeddings[i]);
    qvl__free(r->embeddings);
    qvl_prompt_free(r->prompt);
    qvl__sampler_free(&r->sampler);
    qvl__stop_free(&r->stop);
    qvl__free(r->answer);
    qvl__free(r->keys);
    qvl__free(r->table);
    qvl__free(r);
}

void qvl__request_key(qvl__request *r, int block) {
    const qvl_prompt *p = r->prompt;
    int first = block * QVL__KV_BLOCK, n = 0, lo = 0, hi = p->n_runs;
    int32_t tokens[QVL__KV_BLOCK];
    qvl__mark marks[QVL__KV_BLOCK]; /* a run has at least one token */
    for (int i = 0; i < QVL__KV_BLOCK; i++)
        tokens[i] = first + i < r->prompt_n ? p->tokens[first + i] : r->answer[first + i - r->prompt_n];
    while (lo < hi) { /* the first run that ends behind `first`; runs ascend */
        int mid = (lo + hi) / 2;
        if (p->runs[mid].start + (size_t)p->runs[mid].tokens <= (size_t)first) lo = mid + 1;
        else hi = mid;
    }
    for (; lo < p->n_runs && p->runs[lo].start < (size_t)first + QVL__KV_BLOCK; lo++) {
        const qvl__run *run = &p->runs[lo];
        int at = (int)run->start > first ? (int)run->start - first : 0;
        marks[n++] = (qvl__mark){at, run->offset + first + at - (int)run->start, p->visuals[run->visual]->hash};
    }
    r->keys[block] = qvl__prefix_key(block ? r->keys[block - 1] : (qvl__key){0}, tokens, marks, n);
    r->n_keys = block + 1;
}

/* Option stop_token_ids: a JSON array of ids. */
static int read_stop_ids(qvl__request *r, const qvl_options *o, int vocab) {
    const char *text = qvl__opt_str(o, "stop_token_ids");
    if (!*text) return 0;
    json_t *a;
    int rc = qvl__json_parse(&a, text, strlen(text), "option stop_token_ids");
    if (rc) return rc;
    if (!json_is_array(a) || json_array_size(a) > QVL__MAX_STOP_IDS)
        rc = qvl__fail(QVL_EINVAL, "option stop_token_ids: not a JSON array of at most %d ids", QVL__MAX_STOP_IDS);
    for (size_t i = 0; rc == 0 && i < json_array_size(a); i++) {
        const json_t *v = json_array_get(a, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) >= vocab)
            rc = qvl__fail(QVL_EINVAL, "option stop_token_ids: entry %zu is not a token id below %d", i, vocab);
        else r->banned[r->n_eos + r->n_stop_ids++] = (int32_t)json_integer_value(v);
    }
    json_decref(a);
    return rc;
}

static int read_request(qvl__request *r, qvl_engine *e, const qvl_prompt *p, const qvl_options *o) {
    const qvl__config *c = &e->model->config;
    r->prompt_n = (int)p->n;
    r->min_tokens = (int)qvl__opt_i64(o, "min_tokens");
    r->ignore_eos = qvl__opt_i64(o, "ignore_eos") != 0;
    r->return_logits = qvl__opt_i64(o, "return_logits") != 0;
    if (!r->ignore_eos)
        for (int i = 0; i < c->generation.n_eos; i++) r->banned[r->n_eos++] = c->generation.eos[i];

    int64_t room = e->max_context - (int64_t)p->n, want = qvl__opt_i64(o, "max_tokens");
    if (room < 1) return qvl__fail(QVL_ECONTEXT, "the prompt has %zu tokens; max_context is %d and must leave room for an answer", p->n, e->max_context);
    if (want > room && qvl__opt_is_set(o, "max_tokens"))
        return qvl__fail(QVL_ECONTEXT, "prompt of %zu tokens and max_tokens %lld are more than max_context %d; raise max_context or lower max_tokens", p->n,
                         (long long)want, e->max_context);
    r->max_tokens = (int)(want < room ? want : room);
    r->max_blocks = qvl__blocks_for((int64_t)p->n + r->max_tokens);
    if (r->max_blocks > e->blocks.total)
        return qvl__fail(QVL_ECONTEXT, "prompt of %zu tokens and %d of answer need %d KV blocks of %d tokens; the engine has %d (option kv_blocks)", p->n,
                         r->max_tokens, r->max_blocks, QVL__KV_BLOCK, e->blocks.total);
    int rc = qvl__sampler_init(&r->sampler, o, &c->generation, c->text.vocab, p->tokens, p->n);
    if (rc == 0) rc = qvl__stop_init(&r->stop, qvl__opt_str(o, "stop"));
    if (rc == 0) rc = read_stop_ids(r, o, c->text.vocab);
    if (rc) return rc;
    if (!qvl__opt_is_set(o, "seed") && getrandom(&r->sampler.p.seed, sizeof r->sampler.p.seed, GRND_NONBLOCK) < 0)
        r->sampler.p.seed = (int64_t)(qvl__now_ms() * 1e6);
    r->table = qvl__array(NULL, (size_t)r->max_blocks, sizeof *r->table);
    r->embeddings = qvl__calloc((size_t)p->n_visuals + 1, sizeof *r->embeddings);
    r->answer = qvl__array(NULL, (size_t)r->max_tokens, sizeof *r->answer);
    r->keys = qvl__array(NULL, (size_t)r->max_blocks, sizeof *r->keys);
    if (!r->table || !r->embeddings || !r->answer || !r->keys) return QVL_ENOMEM;
    /* here, on the caller's thread, rather than in a step */
    for (int i = 0; e->prefix_cache && i < r->prompt_n / QVL__KV_BLOCK; i++) qvl__request_key(r, i);
    return 0;
}

int qvl_engine_submit(qvl_engine *e, const qvl_prompt *p, const qvl_options *o, uint64_t *request) {
    if (!e || !p) return qvl__fail(QVL_EINVAL, "qvl_engine_submit: engine or prompt is NULL");
    if (p->model != e->model) return qvl__fail(QVL_EINVAL, "qvl_engine_submit: the prompt was made for another model than the engine's");
    qvl__request *r = qvl__calloc(1, sizeof *r);
    if (!r) return QVL_ENOMEM;
    r->prompt = (qvl_prompt *)(uintptr_t)p;
    atomic_fetch_add(&r->prompt->refs, 1);
    int rc = read_request(r, e, p, o);
    if (rc) {
        qvl__request_free(r);
        return rc;
    }
    r->submitted = qvl__now_ms();

    pthread_mutex_lock(&e->lock);
    if (e->n_live == e->cap_live) {
        int cap = e->cap_live ? 2 * e->cap_live : 64;
        qvl__request **live = qvl__array(e->live, (size_t)cap, sizeof *live);
        if (!live) {
            pthread_mutex_unlock(&e->lock);
            qvl__request_free(r);
            return QVL_ENOMEM;
        }
        e->live = live;
        e->cap_live = cap;
    }
    r->id = ++e->next_id;
    e->live[e->n_live++] = r;
    *e->inbox_tail = r;
    e->inbox_tail = &r->next;
    e->stats.submitted++;
    if (request) *request = r->id;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
    return 0;
}

int qvl_engine_cancel(qvl_engine *e, uint64_t request) {
    if (!e) return qvl__fail(QVL_EINVAL, "qvl_engine_cancel: engine is NULL");
    int found = 0;
    pthread_mutex_lock(&e->lock);
    for (int i = 0; i < e->n_live && !found; i++)
        if (e->live[i]->id == request) {
            found = !atomic_exchange(&e->live[i]->cancelled, true);
            pthread_cond_signal(&e->wake);
        }
    pthread_mutex_unlock(&e->lock);
    return found;
}

int qvl_engine_wake(qvl_engine *e) {
    if (!e) return qvl__fail(QVL_EINVAL, "qvl_engine_wake: engine is NULL");
    pthread_mutex_lock(&e->lock);
    e->woken = true;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
    return 0;
}

void qvl__queue_drain(qvl_engine *e) {
    pthread_mutex_lock(&e->lock);
    if (e->inbox) {
        *e->waiting_tail = e->inbox;
        e->waiting_tail = e->inbox_tail;
        e->inbox = NULL;
        e->inbox_tail = &e->inbox;
    }
    pthread_mutex_unlock(&e->lock);
}

void qvl__queue_ended(qvl_engine *e, qvl__request *r, int event_type, bool cancelled) {
    pthread_mutex_lock(&e->lock);
    for (int i = 0; i < e->n_live; i++)
        if (e->live[i] == r) {
            e->live[i] = e->live[--e->n_live];
            break;
        }
    if (cancelled) e->stats.cancelled++;
    else if (event_type == QVL_EVENT_ERROR) e->stats.failed++;
    else e->stats.finished++;
    pthread_mutex_unlock(&e->lock);
}

int qvl_engine_stats(const qvl_engine *ce, char **json) {
    qvl_engine *e = (qvl_engine *)(uintptr_t)ce;
    if (!e || !json) return qvl__fail(QVL_EINVAL, "qvl_engine_stats: engine or json is NULL");
    *json = NULL;
    pthread_mutex_lock(&e->lock);
    int live = e->n_live;
    __typeof__(e->stats) s = e->stats;
    pthread_mutex_unlock(&e->lock);
    qvl__buf b = {0};
    qvl__buf_printf(&b, "{\"requests\": {\"running\": %d, \"waiting\": %d, \"submitted\": %llu, \"finished\": %llu, \"failed\": %llu, \"cancelled\": %llu}, ",
                    s.running, live - s.running, (unsigned long long)s.submitted, (unsigned long long)s.finished, (unsigned long long)s.failed,
                    (unsigned long long)s.cancelled);
    qvl__buf_printf(&b, "\"kv\": {\"dtype\": \"%s\", \"block_tokens\": %d, \"blocks\": %d, \"blocks_used\": %d, \"blocks_kept\": %d, \"bytes\": %zu}, ",
                    e->kv.type == QVL__F32 ? "f32" : "bf16", QVL__KV_BLOCK, e->blocks.total, s.blocks_used, s.blocks_kept, e->kv.block_bytes * (size_t)e->kv.blocks);
    qvl__buf_printf(&b, "\"memory\": {\"weights\": %llu, \"kv\": %zu, \"workspace\": %zu}, ", (unsigned long long)e->model->weights.bytes,
                    e->kv.block_bytes * (size_t)e->kv.blocks, e->ws.bytes);
    qvl__buf_printf(&b, "\"max_requests\": %d, \"max_context\": %d, \"max_batched_tokens\": %d, ", e->max_requests, e->max_context, e->max_batched);
    qvl__buf_printf(&b, "\"steps\": %llu, \"prompt_tokens\": %llu, \"prefix_tokens\": %llu, \"generated_tokens\": %llu, "
                    "\"images_encoded\": %llu, \"preempted\": %llu}",
                    (unsigned long long)s.steps, (unsigned long long)s.prompt_tokens, (unsigned long long)s.prefix_tokens,
                    (unsigned long long)s.generated_tokens, (unsigned long long)s.images, (unsigned long long)s.preempted);
    if (b.failed) {
        qvl__buf_free(&b);
        return QVL_ENOMEM;
    }
    *json = b.data;
    return 0;
}
