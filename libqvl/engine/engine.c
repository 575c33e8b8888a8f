/* engine.c - one step after another.
 *
 * Job:        make and free engines; a step: take in, cancel, admit, encode one image, run one batch, sample, report.
 * Input:      requests from queue.c, rows from batch.c.
 * Output:     events, valid until the next step.
 * Invariants: one thread steps; a failing request ends with an error event and the others go on;
 *             at most one image is encoded between two batches, so running answers wait for one image at most.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "engine.h"

/* ---- making and freeing ---- */

static int default_context(const qvl_engine *e, const qvl_options *o) {
    int64_t asked = qvl__opt_i64(o, "max_context"), most = e->model->config.text.max_positions;
    if (asked > most)
        return qvl__fail(QVL_EINVAL, "option max_context: %" PRId64 " is more than the model's max_position_embeddings %" PRId64, asked, most);
    return (int)(asked ? asked : most < 8192 ? most : 8192);
}

static int default_blocks(const qvl_engine *e, const qvl_options *o, qvl__type type) {
    int64_t asked = qvl__opt_i64(o, "kv_blocks");
    if (asked) return (int)asked;
    const qvl__text_config *t = &e->model->config.text;
    int64_t bytes = (int64_t)QVL__KV_BLOCK * 2 * t->layers * t->kv_heads * t->head_dim * (int64_t)qvl__type_size(type);
    int64_t one = qvl__blocks_for(e->max_context), all = one * e->max_requests, bound = ((int64_t)1 << 30) / bytes;
    int64_t n = all < bound ? all : bound;
    return (int)(n > one ? n : one);
}

static int new_rows(qvl_engine *e) {
    size_t rows = (size_t)e->max_batched, seqs = (size_t)e->max_requests, stride = (size_t)e->ws.table_stride;
    e->rows.tokens = qvl__array(NULL, rows, sizeof(int32_t));
    e->rows.positions = qvl__array(NULL, rows, 3 * sizeof(int32_t));
    e->rows.seq = qvl__array(NULL, rows, sizeof(int32_t));
    e->rows.pos = qvl__array(NULL, rows, sizeof(int32_t));
    e->rows.table = qvl__calloc(seqs * stride, sizeof(int32_t));
    e->rows.visual_row = qvl__array(NULL, rows, sizeof(int32_t));
    e->rows.visual_index = qvl__array(NULL, rows, sizeof(int32_t));
    e->rows.visual_src = qvl__array(NULL, rows, sizeof(void *));
    e->rows.out_row = qvl__array(NULL, seqs, sizeof(int32_t));
    e->rows.out_request = qvl__array(NULL, seqs, sizeof(void *));
    e->running = qvl__array(NULL, seqs, sizeof(void *));
    return e->rows.tokens && e->rows.positions && e->rows.seq && e->rows.pos && e->rows.table && e->rows.visual_row &&
                   e->rows.visual_index && e->rows.visual_src && e->rows.out_row && e->rows.out_request && e->running
               ? 0
               : QVL_ENOMEM;
}

static int build(qvl_engine *e, const qvl_options *o) {
    const qvl__text_config *t = &e->model->config.text;
    e->max_requests = (int)qvl__opt_i64(o, "max_requests");
    e->max_batched = (int)qvl__opt_i64(o, "max_batched_tokens");
    e->prefix_cache = qvl__opt_i64(o, "prefix_cache") != 0;
    if ((e->max_context = default_context(e, o)) < 0) return e->max_context;
    const char *kv = qvl__opt_str(o, "kv_dtype");
    qvl__type type = strcmp(kv, "f32") == 0 ? QVL__F32 : strcmp(kv, "bf16") == 0 ? QVL__BF16 : e->model->kv_type;
    int n = default_blocks(e, o, type), rc = qvl__blocks_init(&e->blocks, n);
    if (rc == 0) rc = e->model->device->kv_new(e->model->device, &e->kv, type, t->layers, t->kv_heads, t->head_dim, n);
    int stride = qvl__blocks_for(e->max_context);
    if (rc == 0) rc = qvl__text_ws_new(&e->ws, e->model, e->max_batched, e->max_requests, e->max_requests, stride);
    return rc ? rc : new_rows(e);
}

int qvl_engine_new(qvl_engine **out, qvl_model *m, const qvl_options *o) {
    if (!out || !m) return qvl__fail(QVL_EINVAL, "qvl_engine_new: out or model is NULL");
    *out = NULL;
    qvl_engine *e = qvl__calloc(1, sizeof *e);
    if (!e) return QVL_ENOMEM;
    qvl__handle_born();
    atomic_fetch_add(&m->refs, 1);
    e->model = m;
    e->inbox_tail = &e->inbox;
    e->waiting_tail = &e->waiting;
    pthread_mutex_init(&e->lock, NULL);
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&e->wake, &clock);
    pthread_condattr_destroy(&clock);
    int rc = build(e, o);
    if (rc) {
        qvl_engine_free(e);
        return rc;
    }
    *out = e;
    return 0;
}

void qvl_engine_free(qvl_engine *e) {
    if (!e) return;
    for (int i = 0; i < e->n_live; i++) qvl__request_free(e->live[i]);
    for (int i = 0; i < e->cap_events; i++) {
        qvl__buf_free(&e->events[i].text);
        qvl__free(e->events[i].logits);
    }
    qvl__free(e->events);
    qvl__free(e->live);
    qvl__free(e->running);
    void *const rows[] = {e->rows.tokens, e->rows.positions, e->rows.seq, e->rows.pos, e->rows.table, e->rows.visual_row,
                          e->rows.visual_index, e->rows.visual_src, e->rows.out_row, e->rows.out_request};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) qvl__free(rows[i]);
    qvl__text_ws_free(&e->ws, e->model);
    e->model->device->kv_free(e->model->device, &e->kv);
    qvl__blocks_destroy(&e->blocks);
    pthread_cond_destroy(&e->wake);
    pthread_mutex_destroy(&e->lock);
    qvl_model_free(e->model);
    qvl__free(e);
    qvl__handle_gone();
}

/* ---- events ---- */

/* Room for everything one step can report, two events a request, so that reporting itself cannot fail. */
static int reserve_events(qvl_engine *e) {
    pthread_mutex_lock(&e->lock);
    int need = 2 * e->n_live;
    pthread_mutex_unlock(&e->lock);
    if (need <= e->cap_events) return 0;
    qvl_event *grown = qvl__array(e->events, (size_t)need, sizeof *grown);
    if (!grown) return QVL_ENOMEM;
    memset(grown + e->cap_events, 0, (size_t)(need - e->cap_events) * sizeof *grown);
    e->events = grown;
    e->cap_events = need;
    return 0;
}

/* The next event, cleared. */
static qvl_event *new_event(qvl_engine *e, int type, const qvl__request *r) {
    qvl_event *v = &e->events[e->n_events++];
    qvl__buf text = v->text;
    text.len = 0;
    text.failed = false;
    if (text.data) text.data[0] = 0;
    qvl__free(v->logits);
    *v = (qvl_event){.type = type, .request = r->id, .token = -1, .text = text, .finish_reason = ""};
    for (size_t i = 0; i < sizeof v->usage / sizeof *v->usage; i++) v->usage[i] = NAN;
    return v;
}

static void fill_usage(qvl_event *v, const qvl__request *r) {
    double now = qvl__now_ms();
    int pads = 0;
    for (int i = 0; i < r->prompt->n_runs; i++) pads += r->prompt->runs[i].tokens;
    v->usage[QVL_USAGE_PROMPT_TOKENS] = r->prompt_n;
    v->usage[QVL_USAGE_COMPLETION_TOKENS] = r->generated;
    v->usage[QVL_USAGE_IMAGE_TOKENS] = pads;
    v->usage[QVL_USAGE_CACHED_TOKENS] = r->prefix;
    v->usage[QVL_USAGE_QUEUE_MS] = (r->started ? r->started : now) - r->submitted;
    v->usage[QVL_USAGE_VISION_MS] = r->vision_ms;
    if (r->first_token) v->usage[QVL_USAGE_TTFT_MS] = r->first_token - r->submitted;
    v->usage[QVL_USAGE_TOTAL_MS] = now - r->submitted;
}

/* Takes a request out of running or waiting, gives back its blocks, frees it. */
static void drop(qvl_engine *e, qvl__request *r, int event_type, bool cancelled) {
    for (int i = 0; i < e->n_running; i++)
        if (e->running[i] == r) {
            memmove(e->running + i, e->running + i + 1, (size_t)(--e->n_running - i) * sizeof *e->running);
            qvl__blocks_give(&e->blocks, r->table, r->n_blocks);
            break;
        }
    for (qvl__request **p = &e->waiting; *p; p = &(*p)->next)
        if (*p == r) {
            *p = r->next;
            if (!*p) e->waiting_tail = p;
            break;
        }
    qvl__queue_ended(e, r, event_type, cancelled);
    qvl__request_free(r);
}

static void finish(qvl_engine *e, qvl__request *r, const char *reason, bool flush) {
    qvl_event *v = new_event(e, QVL_EVENT_FINISHED, r);
    v->finish_reason = reason;
    if (flush) {
        qvl__buf rest = {0};
        qvl__detok_flush(&r->detok, &rest);
        if (!rest.len || !qvl__stop_add(&r->stop, rest.data, rest.len, &v->text)) qvl__stop_flush(&r->stop, &v->text);
        if (rest.failed || v->text.failed) { /* text would be lost: say so */
            v->type = QVL_EVENT_ERROR;
            v->error = QVL_ENOMEM;
            v->finish_reason = "";
            snprintf(v->message, sizeof v->message, "%s", qvl_last_error());
        }
        qvl__buf_free(&rest);
    }
    fill_usage(v, r);
    drop(e, r, v->type, strcmp(reason, "cancelled") == 0);
}

/* Ends a request with the thread's last error. */
static void fail(qvl_engine *e, qvl__request *r, int code) {
    qvl_event *v = new_event(e, QVL_EVENT_ERROR, r);
    v->error = code;
    snprintf(v->message, sizeof v->message, "%s", qvl_last_error());
    fill_usage(v, r);
    drop(e, r, QVL_EVENT_ERROR, false);
}

/* ---- a step ---- */

static void sweep_cancelled(qvl_engine *e) {
    for (int i = e->n_running; i-- > 0;)
        if (atomic_load(&e->running[i]->cancelled)) finish(e, e->running[i], "cancelled", true);
    for (qvl__request *r = e->waiting, *next; r; r = next) {
        next = r->next;
        if (atomic_load(&r->cancelled)) finish(e, r, "cancelled", true);
    }
}

/* An embedding of the same pixels that the prompt brought or another request has. */
static qvl_embedding *known_embedding(qvl_engine *e, const qvl__visual *v) {
    if (v->embedding) return qvl__embedding_ref(v->embedding);
    for (int i = 0; i < e->n_running; i++) {
        const qvl__request *r = e->running[i];
        for (int k = 0; k < r->encoded; k++)
            if (r->embeddings[k] && memcmp(r->embeddings[k]->hash, v->hash, sizeof v->hash) == 0) return qvl__embedding_ref(r->embeddings[k]);
    }
    return NULL;
}

/* Brings embeddings to the requests that wait for them; runs the vision tower once at most. True when it ran. */
static bool encode_one(qvl_engine *e) {
    bool ran = false;
    for (int i = 0; i < e->n_running; i++) {
        qvl__request *r = e->running[i];
        while (r->encoded < r->prompt->n_visuals) {
            if (r->embeddings[r->encoded]) { /* from before it was preempted */
                r->encoded++;
                continue;
            }
            const qvl__visual *v = r->prompt->visuals[r->encoded];
            qvl_embedding *em = known_embedding(e, v);
            if (!em) {
                if (ran) break;
                ran = true;
                double t = qvl__now_ms();
                int rc = qvl__vision_forward(e->model, v, &em);
                if (rc) {
                    fail(e, r, rc);
                    return true;
                }
                r->vision_ms += qvl__now_ms() - t;
                e->images_encoded++;
            }
            r->embeddings[r->encoded++] = em;
        }
    }
    return ran;
}

static bool is_end(const qvl__request *r, int32_t token) {
    for (int i = 0; i < r->n_eos + r->n_stop_ids; i++)
        if (r->banned[i] == token) return true;
    return false;
}

/* Samples one row and reports it. */
static void advance(qvl_engine *e, qvl__request *r, float *logits) {
    int vocab = e->model->config.text.vocab, limit = qvl__token_limit(e->model->tokenizer);
    qvl_event *v = new_event(e, QVL_EVENT_TOKEN, r);
    if (r->return_logits && (v->logits = qvl__array(NULL, (size_t)vocab, sizeof(float)))) {
        memcpy(v->logits, logits, (size_t)vocab * sizeof(float));
        v->n_logits = (size_t)vocab;
    }
    int n_banned = r->generated < r->min_tokens ? r->n_eos + r->n_stop_ids : 0;
    int rc = r->return_logits && !v->logits
                 ? QVL_ENOMEM
                 : qvl__sample(&r->sampler, logits, limit < vocab ? limit : vocab, r->banned, n_banned, (uint64_t)r->prompt_n + (uint64_t)r->generated, &v->choice);
    if (rc) {
        e->n_events--; /* the slot becomes the error event */
        fail(e, r, rc);
        return;
    }
    v->token = r->answer[r->generated] = v->choice.token;
    v->has_logprobs = r->sampler.p.logprobs >= 0;
    qvl__sampler_accept(&r->sampler, v->token);
    if (r->generated++ == 0) r->first_token = qvl__now_ms();

    bool end = is_end(r, v->token), stopped = false;
    if (!end) {
        qvl__buf piece = {0};
        qvl__detok_add(&r->detok, e->model->tokenizer, v->token, true, &piece);
        if (piece.len) stopped = qvl__stop_add(&r->stop, piece.data, piece.len, &v->text);
        bool failed = piece.failed || v->text.failed;
        qvl__buf_free(&piece);
        if (failed) {
            fail(e, r, QVL_ENOMEM);
            return;
        }
    }
    if (end || stopped) finish(e, r, "stop", !stopped);
    else if (r->generated >= r->max_tokens) finish(e, r, "length", true);
}

static void publish(qvl_engine *e, int outs) {
    pthread_mutex_lock(&e->lock);
    e->stats.steps++;
    e->stats.prompt_tokens += (uint64_t)e->rows.prompt_rows;
    e->stats.generated_tokens += (uint64_t)outs;
    e->stats.images = e->images_encoded;
    e->stats.preempted = e->preempted;
    e->stats.running = e->n_running;
    e->stats.prefix_tokens = e->prefix_tokens;
    e->stats.blocks_used = qvl__blocks_held(&e->blocks);
    e->stats.blocks_kept = e->blocks.n_kept;
    pthread_mutex_unlock(&e->lock);
}

/* Waits until there is work; false when the time is over or somebody woke us. */
static bool wait_for_work(qvl_engine *e, int timeout_ms) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000L) until.tv_sec++, until.tv_nsec -= 1000000000L;
    pthread_mutex_lock(&e->lock);
    int rc = 0;
    while (!e->inbox && !e->woken && rc == 0) {
        if (timeout_ms < 0) pthread_cond_wait(&e->wake, &e->lock);
        else rc = pthread_cond_timedwait(&e->wake, &e->lock, &until);
    }
    bool work = e->inbox != NULL;
    e->woken = false;
    pthread_mutex_unlock(&e->lock);
    return work;
}

int qvl_engine_step(qvl_engine *e, int timeout_ms) {
    if (!e) return qvl__fail(QVL_EINVAL, "qvl_engine_step: engine is NULL");
    static _Thread_local char mark; /* its address is this thread's name */
    uintptr_t me = (uintptr_t)&mark, nobody = 0;
    if (!atomic_compare_exchange_strong(&e->owner, &nobody, me) && nobody != me)
        return qvl__fail(QVL_EMISUSE, "qvl_engine_step: this engine is stepped by another thread");
    e->n_events = 0;
    if (e->n_running == 0 && !e->waiting && !wait_for_work(e, timeout_ms)) return 0;

    qvl__queue_drain(e);
    int rc = reserve_events(e);
    if (rc) return rc;
    sweep_cancelled(e);
    qvl__batch_admit(e);
    bool encoded = encode_one(e);
    qvl__batch b;
    qvl__batch_build(e, &b);
    if (b.rows) {
        qvl__text_forward(e->model, &e->kv, &e->ws, &b);
        qvl__batch_name_blocks(e);
        for (int i = 0; i < b.outs; i++)
            advance(e, e->rows.out_request[i], e->ws.logits + (size_t)i * (size_t)e->model->config.text.vocab);
    }
    if (b.rows || encoded || e->n_events) publish(e, b.outs);
    return e->n_events;
}

const qvl_event *qvl_engine_event(const qvl_engine *e, int i) { return e && i >= 0 && i < e->n_events ? &e->events[i] : NULL; }
