/* queue.c - the part of the engine that any thread may call.
 *
 * Job:        submit, cancel, wake, configure, stats; the list of live requests.
 * Input:      prompts and request options.
 * Output:     requests in the inbox; limits for the next step; numbers.
 * Invariants: ids rise and are never reused; all choices of a request are queued, or none.
 */
#include <string.h>
#include <sys/random.h>

#include "engine.h"

#define MAX_CHOICES 64 /* of option n */

/* Room in the list of live requests. [lock held] */
static int reserve_live(qvl_engine *e, int n) {
    if (e->n_live + n <= e->cap_live) return 0;
    int cap = e->cap_live + n > 2 * e->cap_live ? e->cap_live + n + 64 : 2 * e->cap_live;
    qvl__request **live = qvl__array(e->live, (size_t)cap, sizeof *live);
    if (!live) return QVL_ENOMEM;
    e->live = live;
    e->cap_live = cap;
    return 0;
}

int qvl_engine_submit(qvl_engine *e, const qvl_prompt *p, const qvl_options *o, uint64_t *request) {
    if (!e || !p) return qvl__fail(QVL_EINVAL, "qvl_engine_submit: engine or prompt is NULL");
    if (p->model != e->model) return qvl__fail(QVL_EINVAL, "qvl_engine_submit: the prompt was made for another model than the engine's");
    qvl__request *choice[MAX_CHOICES];
    int n = (int)qvl__opt_i64(o, "n"), made = 0, rc = 0;
    int64_t seed = qvl__opt_i64(o, "seed");
    if (!qvl__opt_is_set(o, "seed") && getrandom(&seed, sizeof seed, GRND_NONBLOCK) < 0) seed = (int64_t)(qvl__now_ms() * 1e6);
    for (; made < n && rc == 0; made += rc == 0) rc = qvl__request_new(&choice[made], e, p, o, made, seed);

    pthread_mutex_lock(&e->lock);
    if (rc == 0) rc = reserve_live(e, n);
    for (int i = 0; rc == 0 && i < n; i++) {
        if (i == 0) e->next_id++;
        choice[i]->id = e->next_id;
        e->live[e->n_live++] = choice[i];
        *e->inbox_tail = choice[i];
        e->inbox_tail = &choice[i]->next;
        e->ends.submitted++;
    }
    if (rc == 0 && request) *request = e->next_id;
    if (rc == 0) pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
    for (int i = 0; rc && i < made; i++) qvl__request_free(e, choice[i]);
    return rc;
}

int qvl_engine_cancel(qvl_engine *e, uint64_t request) {
    if (!e) return qvl__fail(QVL_EINVAL, "qvl_engine_cancel: engine is NULL");
    int found = 0;
    pthread_mutex_lock(&e->lock);
    for (int i = 0; i < e->n_live; i++)
        if (e->live[i]->id == request) found |= !atomic_exchange(&e->live[i]->cancelled, true);
    if (found) pthread_cond_signal(&e->wake);
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

int qvl_engine_configure(qvl_engine *e, const qvl_options *o) {
    if (!e) return qvl__fail(QVL_EINVAL, "qvl_engine_configure: engine is NULL");
    static const char *const fixed[] = {"max_context", "kv_blocks", "kv_dtype", "prefix_cache", "max_image_tokens"};
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++)
        if (qvl__opt_is_set(o, fixed[i])) return qvl__fail(QVL_EINVAL, "option %s cannot change while the engine lives; make a new one", fixed[i]);
    int requests = (int)qvl__opt_i64(o, "max_requests"), batched = (int)qvl__opt_i64(o, "max_batched_tokens");
    bool set_requests = qvl__opt_is_set(o, "max_requests"), set_batched = qvl__opt_is_set(o, "max_batched_tokens");
    if (set_requests && requests > e->plan.max_requests)
        return qvl__fail(QVL_EINVAL, "option max_requests: %d is more than the %d that this engine has memory for", requests, e->plan.max_requests);
    if (set_batched && batched > e->plan.max_batched)
        return qvl__fail(QVL_EINVAL, "option max_batched_tokens: %d is more than the %d that this engine has memory for", batched, e->plan.max_batched);
    pthread_mutex_lock(&e->lock);
    if (set_requests) e->asked.max_requests = requests;
    if (set_batched) e->asked.max_batched = batched;
    if (qvl__opt_is_set(o, "step_ms")) e->asked.step_ms = (double)qvl__opt_i64(o, "step_ms");
    if (qvl__opt_is_set(o, "embedding_cache")) e->asked.embedding_cache = qvl__opt_i64(o, "embedding_cache");
    pthread_mutex_unlock(&e->lock);
    return 0;
}

/* ---- the stepping thread's side ---- */

void qvl__queue_wait(qvl_engine *e, qvl__request *r) {
    qvl__request **at = &e->waiting;
    while (*at && qvl__request_before(*at, r)) at = &(*at)->next;
    r->next = *at;
    *at = r;
}

void qvl__queue_drain(qvl_engine *e) {
    pthread_mutex_lock(&e->lock);
    qvl__request *in = e->inbox;
    e->inbox = NULL;
    e->inbox_tail = &e->inbox;
    e->limits = e->asked;
    pthread_mutex_unlock(&e->lock);
    while (in) {
        qvl__request *r = in;
        in = r->next;
        qvl__queue_wait(e, r);
    }
}

void qvl__queue_ended(qvl_engine *e, qvl__request *r, int event_type, bool cancelled) {
    pthread_mutex_lock(&e->lock);
    if (r->pictures) qvl__pictures_give(e, r);
    for (int i = 0; i < e->n_live; i++)
        if (e->live[i] == r) {
            e->live[i] = e->live[--e->n_live];
            break;
        }
    if (cancelled) e->ends.cancelled++;
    else if (event_type == QVL_EVENT_ERROR) e->ends.failed++;
    else e->ends.finished++;
    pthread_mutex_unlock(&e->lock);
}

/* ---- stats ---- */

typedef unsigned long long ull;

/* Bytes of embeddings in use and kept. [lock held] */
static void embedding_bytes(const qvl_engine *e, size_t *used, size_t *kept) {
    *used = *kept = 0;
    for (int i = 0; i < e->n_pictures; i++) {
        const qvl_embedding *m = e->pictures[i]->embedding;
        *(e->pictures[i]->users ? used : kept) += (size_t)m->layers * (size_t)m->tokens * (size_t)m->hidden * sizeof(float);
    }
}

int qvl_engine_stats(const qvl_engine *ce, char **json) {
    qvl_engine *e = (qvl_engine *)(uintptr_t)ce;
    if (!e || !json) return qvl__fail(QVL_EINVAL, "qvl_engine_stats: engine or json is NULL");
    *json = NULL;
    size_t used, kept, kv = e->kv.block_bytes * (size_t)e->kv.blocks;
    pthread_mutex_lock(&e->lock);
    int live = e->n_live, pictures = e->n_pictures;
    __typeof__(e->ends) ends = e->ends;
    qvl__counts s = e->stats;
    qvl__limits l = e->asked;
    embedding_bytes(e, &used, &kept);
    pthread_mutex_unlock(&e->lock);
    qvl__buf b = {0};
    qvl__buf_printf(&b, "{\"requests\": {\"running\": %d, \"waiting\": %d, \"submitted\": %llu, \"finished\": %llu, \"failed\": %llu, \"cancelled\": %llu}, ",
                    s.running, live > s.running ? live - s.running : 0, (ull)ends.submitted, (ull)ends.finished, (ull)ends.failed, (ull)ends.cancelled);
    qvl__buf_printf(&b, "\"kv\": {\"dtype\": \"%s\", \"block_tokens\": %d, \"blocks\": %d, \"blocks_used\": %d, \"blocks_kept\": %d, \"bytes\": %zu}, ",
                    qvl__type_name(e->kv.type), QVL__KV_BLOCK, e->blocks.total, s.blocks_used, s.blocks_kept, kv);
    qvl__buf_printf(&b, "\"embeddings\": {\"count\": %d, \"bytes_used\": %zu, \"bytes_kept\": %zu, \"bytes_limit\": %lld}, ", pictures, used, kept,
                    (long long)l.embedding_cache);
    qvl__buf_printf(&b, "\"memory\": {\"weights\": %llu, \"kv\": %zu, \"workspace\": %zu, \"vision\": %zu, \"embeddings\": %zu}, ", (ull)e->model->weights.bytes,
                    kv, e->plan.text_bytes, e->plan.vision_bytes, used + kept);
    qvl__buf_printf(&b, "\"max_requests\": %d, \"max_context\": %d, \"max_batched_tokens\": %d, \"step_ms\": %.0f, ", l.max_requests, e->plan.max_context,
                    l.max_batched, l.step_ms);
    qvl__buf_printf(&b, "\"steps\": %llu, \"rows\": %llu, \"prompt_tokens\": %llu, \"prefix_tokens\": %llu, \"generated_tokens\": %llu, "
                    "\"images_encoded\": %llu, \"vision_ms\": %.1f, \"preempted\": %llu, \"drafted_tokens\": %llu, \"speculated_tokens\": %llu}",
                    (ull)s.steps, (ull)s.rows, (ull)s.prompt_tokens, (ull)s.prefix_tokens, (ull)s.generated_tokens, (ull)s.images, s.vision_ms,
                    (ull)s.preempted, (ull)s.drafted, (ull)s.speculated);
    if (b.failed) {
        qvl__buf_free(&b);
        return QVL_ENOMEM;
    }
    *json = b.data;
    return 0;
}
