/* engine.c - one step after another.
 *
 * Job:        make and free engines; a step: take in, sweep, admit, look at pictures, run one batch, answer.
 * Input:      requests from queue.c, rows from batch.c.
 * Output:     events, valid until the next step.
 * Invariants: one thread steps; a failing request ends with an error event and the others go on;
 *             a step is kept to about step_ms while answers are written, and to IDLE times that while none is: decodes
 *             always run, prefill and vision get what is left, but at least MIN_ROWS rows and one slice of an image.
 */
#include <math.h>
#include <string.h>
#include <time.h>

#include "engine.h"

#define MIN_ROWS 16
#define FIRST_ROWS 64 /* before anything is known about this machine */
#define IDLE 4

/* ---- making and freeing ---- */

static int new_rows(qvl_engine *e) {
    size_t rows = (size_t)e->plan.max_batched, seqs = (size_t)e->plan.max_requests, outs = (size_t)e->plan.max_out;
    e->rows.tokens = qvl__array(NULL, rows, sizeof(int32_t));
    e->rows.positions = qvl__array(NULL, rows, 3 * sizeof(int32_t));
    e->rows.seq = qvl__array(NULL, rows, sizeof(int32_t));
    e->rows.pos = qvl__array(NULL, rows, sizeof(int32_t));
    e->rows.table = qvl__calloc(seqs, (size_t)e->plan.table_stride * sizeof(int32_t));
    e->rows.visual_row = qvl__array(NULL, rows, sizeof(int32_t));
    e->rows.visual_index = qvl__array(NULL, rows, sizeof(int32_t));
    e->rows.visual_src = qvl__array(NULL, rows, sizeof(void *));
    e->rows.out_row = qvl__array(NULL, outs, sizeof(int32_t));
    e->rows.out_request = qvl__array(NULL, outs, sizeof(void *));
    e->rows.drawn = qvl__array(NULL, outs, sizeof(bool));
    e->running = qvl__array(NULL, seqs, sizeof(void *));
    e->encoding.picture = qvl__array(NULL, seqs, sizeof(void *));
    e->encoding.visual = qvl__array(NULL, seqs, sizeof(void *));
    e->encoding.embedding = qvl__array(NULL, seqs, sizeof(void *));
    e->cap_events = 3 * e->plan.max_out + 300; /* a prompt's token, an answer's and an end for each; what a sweep may end */
    e->events = qvl__array(NULL, (size_t)e->cap_events, sizeof *e->events);
    return e->rows.tokens && e->rows.positions && e->rows.seq && e->rows.pos && e->rows.table && e->rows.visual_row && e->rows.visual_index &&
                   e->rows.visual_src && e->rows.out_row && e->rows.out_request && e->rows.drawn && e->running && e->encoding.picture && e->encoding.visual &&
                   e->encoding.embedding && e->events
               ? 0
               : QVL_ENOMEM;
}

/* The longest text that one token can give: every byte may become a U+FFFD, with what was held back before it. */
static size_t longest_piece(const qvl_tokenizer *t) {
    size_t longest = 0, n;
    for (int32_t i = 0; i < qvl__token_limit(t); i++)
        if (qvl__token_bytes(t, i, &n) && n > longest) longest = n;
    return 3 * (longest + 4);
}

static int build(qvl_engine *e, const qvl_options *o) {
    const qvl__text_config *t = &e->model->config.text;
    qvl__plan *p = &e->plan;
    int rc = qvl__plan_make(p, e->model, o);
    e->asked = (qvl__limits){p->max_requests, p->max_batched, (double)qvl__opt_i64(o, "step_ms"), qvl__opt_i64(o, "embedding_cache")};
    e->limits = e->asked;
    e->prefix_cache = qvl__opt_i64(o, "prefix_cache") != 0;
    e->piece_bytes = longest_piece(e->model->tokenizer);
    if (rc == 0) rc = qvl__blocks_init(&e->blocks, p->kv_blocks);
    if (rc == 0) rc = e->model->device->kv_new(e->model->device, &e->kv, p->kv_type, t->layers, t->kv_heads, t->head_dim, p->kv_blocks);
    if (rc == 0) rc = qvl__text_ws_new(&e->ws, e->model, p->max_batched, p->max_out, p->max_requests, p->table_stride);
    if (rc == 0) rc = qvl__tower_new(&e->tower, e->model, p->batch_rows, p->max_requests);
    if (rc == 0) rc = qvl__sample_scratch_new(&e->scratch, t->vocab);
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
    if (e->encoding.n) qvl__tower_stop(e->tower);
    qvl__answer_bury(e);
    for (int i = 0; i < e->n_live; i++) qvl__request_free(e, e->live[i]);
    for (int i = 0; i < e->n_pictures; i++) {
        qvl_embedding_free(e->pictures[i]->embedding);
        qvl_prompt_free(e->pictures[i]->prompt);
        qvl__free(e->pictures[i]);
    }
    void *const all[] = {e->pictures, e->events, e->live, e->running, e->encoding.picture, e->encoding.visual, e->encoding.embedding,
                         e->rows.tokens, e->rows.positions, e->rows.seq, e->rows.pos, e->rows.table, e->rows.visual_row, e->rows.visual_index,
                         e->rows.visual_src, e->rows.out_row, e->rows.out_request, e->rows.drawn};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) qvl__free(all[i]);
    qvl__sample_scratch_free(&e->scratch);
    qvl__tower_free(e->tower);
    qvl__text_ws_free(&e->ws, e->model);
    e->model->device->kv_free(e->model->device, &e->kv);
    qvl__blocks_destroy(&e->blocks);
    pthread_cond_destroy(&e->wake);
    pthread_mutex_destroy(&e->lock);
    qvl_model_free(e->model);
    qvl__free(e);
    qvl__handle_gone();
}

/* ---- a step ---- */

/* Ends what was cancelled or is out of time; what there is no room to report waits for the next step. */
static void sweep(qvl_engine *e) {
    double now = qvl__now_ms();
    for (int i = e->n_running; i-- > 0 && qvl__answer_room(e);) {
        qvl__request *r = e->running[i];
        if (atomic_load(&r->cancelled)) qvl__answer_end(e, r, "cancelled");
        else if (r->deadline && now >= r->deadline) qvl__answer_end(e, r, "deadline");
    }
    for (qvl__request *r = e->waiting, *next; r && qvl__answer_room(e); r = next) {
        next = r->next;
        if (atomic_load(&r->cancelled)) qvl__answer_end(e, r, "cancelled");
        else if (r->deadline && now >= r->deadline) qvl__answer_end(e, r, "deadline");
    }
}

static bool answering(const qvl_engine *e) {
    for (int i = 0; i < e->n_running; i++)
        if (e->running[i]->generated) return true;
    return false;
}

/* Looks at pictures for the time that they may have; returns how many rows of prefill the rest of the step is good for. */
static int pace(qvl_engine *e) {
    double start = qvl__now_ms(), decode = answering(e) ? e->decode_ms : 0;
    double left = e->limits.step_ms > 0 ? e->limits.step_ms * (decode > 0 || answering(e) ? 1 : IDLE) - decode : INFINITY;
    if (qvl__pictures_wanted(e)) {
        bool prefills = qvl__batch_prefills(e);
        double share = prefills ? left / 2 : left;
        qvl__pictures_work(e, start + (share > 0 ? share : 0), !prefills && !answering(e));
        left -= qvl__now_ms() - start;
    }
    if (isinf(left)) return e->limits.max_batched;
    double rows = e->row_ms > 0 ? left / e->row_ms : FIRST_ROWS;
    return rows < MIN_ROWS ? MIN_ROWS : rows < e->limits.max_batched ? (int)rows : e->limits.max_batched;
}

/* Remembers what a batch took, as running means. */
static void learn(qvl_engine *e, double ms) {
    double *to = e->rows.prefill_rows ? &e->row_ms : &e->decode_ms, x = ms;
    if (e->rows.prefill_rows) {
        if (e->rows.prefill_rows < MIN_ROWS / 2) return; /* mostly the cost of a pass over the weights */
        x = (ms - (e->rows.decode_rows ? e->decode_ms : 0)) / e->rows.prefill_rows;
        if (x <= 0) return;
    }
    *to = *to > 0 ? *to + 0.3 * (x - *to) : x;
}

/* Runs the batch that was built and answers its outputs. When the device has failed, so have all who were to use it. */
static void run(qvl_engine *e, const qvl__batch *b) {
    double start = qvl__now_ms();
    qvl__device *asked = e->encoding.failed ? e->model->vision : e->model->device; /* for its failure */
    int rc = b->rows && !e->encoding.failed ? qvl__text_forward(e->model, &e->kv, &e->ws, b) : asked->sync(asked);
    for (int i = e->n_running; rc && i-- > 0 && qvl__answer_room(e);) qvl__answer_fail(e, e->running[i], rc);
    if (rc || !b->rows) return;
    learn(e, qvl__now_ms() - start);
    for (int i = 0; i < b->outs; i++) qvl__answer_row(e, b, i);
    for (int i = 0; i < e->n_running; i++) {
        qvl__request *r = e->running[i];
        if (r->cached >= qvl__request_tokens(r)) r->cached = qvl__request_tokens(r) - 1; /* guesses that were wrong */
        r->n_draft = 0;
        qvl__batch_name_blocks(e, r);
    }
    e->counts.rows += (uint64_t)b->rows;
    e->counts.prompt_tokens += (uint64_t)e->rows.prompt_rows;
}

static void publish(qvl_engine *e) {
    e->counts.steps++;
    e->counts.running = e->n_running;
    e->counts.blocks_used = qvl__blocks_held(&e->blocks);
    e->counts.blocks_kept = e->blocks.n_kept;
    pthread_mutex_lock(&e->lock);
    e->stats = e->counts;
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
    qvl__answer_bury(e);
    qvl__pictures_abandon(e);
    e->n_events = 0;
    e->step++;
    if (e->n_running == 0 && !e->waiting && !wait_for_work(e, timeout_ms)) return 0;

    qvl__queue_drain(e);
    sweep(e);
    qvl__batch_admit(e);
    int rows = pace(e);
    qvl__batch b;
    qvl__batch_build(e, &b, rows);
    qvl__answer_draws(e, &b);
    run(e, &b);
    publish(e);
    return e->n_events;
}

const qvl_event *qvl_engine_event(const qvl_engine *e, int i) { return e && i >= 0 && i < e->n_events ? &e->events[i] : NULL; }
