/* answer.c - logits to tokens, text and events; the end of a request.
 *
 * Job:        sample a row, stream its text, find the end; log-probabilities of the prompt; every way to end.
 * Input:      rows of logits of a step.
 * Output:     events, which point into their requests until the next step.
 * Invariants: a guessed token counts only if sampling gave the same one, row after row;
 *             an ended request gives its blocks back at once and is freed a step later; reporting takes no memory.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "engine.h"

/* ---- events ---- */

static qvl_event *new_event(qvl_engine *e, int type, const qvl__request *r) {
    qvl_event *v = &e->events[e->n_events++];
    v->type = type;
    v->request = r->id;
    v->choice = r->choice;
    v->token = -1;
    v->text = NULL;
    v->finish_reason = "";
    v->error = 0;
    v->message = "";
    v->logits = NULL;
    v->n_logits = 0;
    v->has_logprobs = false;
    for (size_t i = 0; i < sizeof v->usage / sizeof *v->usage; i++) v->usage[i] = NAN;
    return v;
}

/* A text of r's that no event of this step uses yet. */
static qvl__buf *new_text(const qvl_engine *e, qvl__request *r) {
    if (r->step != e->step) r->n_text = 0;
    r->step = e->step;
    qvl__buf *b = &r->text[r->n_text++];
    b->len = 0;
    b->data[0] = 0;
    return b;
}

static void fill_usage(qvl_event *v, const qvl__request *r) {
    double now = qvl__now_ms();
    double vision = r->started ? qvl__pictures_ms(r) : 0;
    int pads = 0;
    for (int i = 0; i < r->prompt->n_runs; i++) pads += r->prompt->runs[i].tokens;
    v->usage[QVL_USAGE_PROMPT_TOKENS] = r->prompt_n;
    v->usage[QVL_USAGE_COMPLETION_TOKENS] = r->generated;
    v->usage[QVL_USAGE_IMAGE_TOKENS] = pads;
    v->usage[QVL_USAGE_CACHED_TOKENS] = r->prefix;
    v->usage[QVL_USAGE_QUEUE_MS] = (r->started ? r->started : now) - r->submitted;
    v->usage[QVL_USAGE_VISION_MS] = vision;
    if (r->first_token) {
        v->usage[QVL_USAGE_TTFT_MS] = r->first_token - r->submitted;
        v->usage[QVL_USAGE_PREFILL_MS] = fmax(0, r->first_token - r->started - vision);
        v->usage[QVL_USAGE_DECODE_MS] = now - r->first_token;
    }
    v->usage[QVL_USAGE_TOTAL_MS] = now - r->submitted;
    v->usage[QVL_USAGE_SPECULATED_TOKENS] = r->speculated;
    v->usage[QVL_USAGE_IMAGES] = r->prompt->n_visuals;
    v->usage[QVL_USAGE_IMAGES_CACHED] = r->images_cached;
}

/* ---- ends ---- */

/* Takes a request out of running or waiting and gives its blocks back. */
static void drop(qvl_engine *e, qvl__request *r, int event_type, bool cancelled) {
    for (int i = 0; i < e->n_running; i++)
        if (e->running[i] == r) {
            memmove(e->running + i, e->running + i + 1, (size_t)(--e->n_running - i) * sizeof *e->running);
            if (r->cached >= qvl__request_tokens(r)) r->cached = qvl__request_tokens(r) - 1; /* guesses behind the end */
            qvl__batch_name_blocks(e, r);
            qvl__blocks_give(&e->blocks, r->table, r->n_blocks);
            break;
        }
    for (qvl__request **p = &e->waiting; *p; p = &(*p)->next)
        if (*p == r) {
            *p = r->next;
            break;
        }
    qvl__queue_ended(e, r, event_type, cancelled);
    r->ended = true;
    r->next = e->ended;
    e->ended = r;
}

void qvl__answer_bury(qvl_engine *e) {
    while (e->ended) {
        qvl__request *r = e->ended;
        e->ended = r->next;
        qvl__request_free(e, r);
    }
}

void qvl__answer_fail(qvl_engine *e, qvl__request *r, int code) {
    qvl_event *v = new_event(e, QVL_EVENT_ERROR, r);
    v->error = code;
    snprintf(r->message, sizeof r->message, "%s", qvl_last_error());
    v->message = r->message;
    fill_usage(v, r);
    drop(e, r, QVL_EVENT_ERROR, false);
}

static void finish(qvl_engine *e, qvl__request *r, const char *reason, bool flush) {
    qvl__buf *text = new_text(e, r);
    if (flush) {
        r->piece.len = 0;
        qvl__detok_flush(&r->detok, &r->piece);
        if (!r->piece.len || !qvl__stop_add(&r->stop, r->piece.data, r->piece.len, text)) qvl__stop_flush(&r->stop, text);
    }
    qvl_event *v = new_event(e, QVL_EVENT_FINISHED, r);
    v->text = text;
    v->finish_reason = reason;
    fill_usage(v, r);
    drop(e, r, QVL_EVENT_FINISHED, strcmp(reason, "cancelled") == 0);
}

void qvl__answer_end(qvl_engine *e, qvl__request *r, const char *reason) { finish(e, r, reason, true); }

/* ---- rows ---- */

static int token_limit(const qvl_engine *e) {
    int vocab = e->model->config.text.vocab, limit = qvl__token_limit(e->model->tokenizer);
    return limit < vocab ? limit : vocab;
}

/* The log-probability of prompt token number i from the logits of the token before. */
static int report_prompt(qvl_engine *e, qvl__request *r, int i, const float *logits) {
    if (r->reported == 0) { /* nothing comes before the first token */
        qvl_event *v = new_event(e, QVL_EVENT_PROMPT, r);
        v->token = r->prompt->tokens[0];
        v->has_logprobs = true;
        v->sampled.logprob = NAN;
        v->sampled.n_top = 0;
        r->reported = 1;
    }
    if (i < r->reported || i >= r->prompt_n) return 0;
    qvl_event *v = new_event(e, QVL_EVENT_PROMPT, r);
    v->token = r->prompt->tokens[i];
    v->has_logprobs = true;
    r->reported = i + 1;
    int rc = qvl__logprobs(logits, e->model->config.text.vocab, token_limit(e), v->token, r->prompt_logprobs, &v->sampled);
    if (rc) e->n_events--; /* the slot becomes the error event */
    return rc;
}

static bool is_end(const qvl__request *r, int32_t token) {
    for (int i = 0; i < r->n_eos + r->n_stop_ids; i++)
        if (r->banned[i] == token) return true;
    return false;
}

/* End tokens that row `at` may not give yet. */
static int banned_at(const qvl__request *r, int at) { return at + 1 - r->prompt_n < r->min_tokens ? r->n_eos + r->n_stop_ids : 0; }

/* Samples the token behind number `at` and reports it; logits, of output number out, are overwritten; NULL: the device has taken the
 * token. guess: its place in the draft, when it was guessed. */
static void advance(qvl_engine *e, qvl__request *r, int at, float *logits, int out, int guess) {
    size_t vocab = (size_t)e->model->config.text.vocab;
    qvl__buf *text = new_text(e, r);
    qvl_event *v = new_event(e, QVL_EVENT_TOKEN, r);
    v->text = text;
    if (r->logits) {
        float *copy = r->logits + (size_t)(r->n_text - 1) * vocab;
        memcpy(copy, logits, vocab * sizeof(float));
        v->logits = copy;
        v->n_logits = vocab;
    }
    int rc = logits ? qvl__sample(&r->sampler, logits, token_limit(e), r->banned, banned_at(r, at), (uint64_t)at + 1, &v->sampled)
                    : qvl__sampler_take(e->ws.host_chosen[out], &v->sampled);
    if (rc) {
        e->n_events--;
        qvl__answer_fail(e, r, rc);
        return;
    }
    v->token = r->answer[r->generated] = v->sampled.token;
    v->has_logprobs = r->sampler.p.logprobs >= 0;
    qvl__sampler_accept(&r->sampler, v->token);
    if (r->generated++ == 0) r->first_token = qvl__now_ms();
    e->counts.generated_tokens++;
    if (guess >= 0 && guess < r->n_draft && r->draft[guess] == v->token) {
        r->speculated++;
        e->counts.speculated++;
    }

    bool end = is_end(r, v->token), stopped = false;
    if (!end) {
        r->piece.len = 0;
        qvl__detok_add(&r->detok, e->model->tokenizer, v->token, true, &r->piece);
        if (r->piece.len) stopped = qvl__stop_add(&r->stop, r->piece.data, r->piece.len, text);
    }
    if (end || stopped) finish(e, r, "stop", !stopped);
    else if (r->generated >= r->max_tokens) finish(e, r, "length", true);
}

void qvl__answer_row(qvl_engine *e, const qvl__batch *b, int out) {
    qvl__request *r = e->rows.out_request[out];
    if (r->ended) return;
    int row = b->out_row[out], at = b->pos[row];
    float *logits = e->ws.host_logits + (size_t)out * (size_t)e->model->config.text.vocab;
    int rc = r->prompt_logprobs >= 0 && r->reported < r->prompt_n ? report_prompt(e, r, at + 1, logits) : 0;
    if (rc) {
        qvl__answer_fail(e, r, rc);
        return;
    }
    /* the row of the sequence's last token: a guess that was wrong, and all behind it, are not */
    if (at + 1 != qvl__request_tokens(r) || b->tokens[row] != qvl__request_token(r, at)) return;
    advance(e, r, at, e->rows.drawn[out] ? NULL : logits, out, at + 1 - (r->cached - r->n_draft));
}

/* Whether the device can do what the host would do with an output. Guesses are taken to be right, as their rows count only then; what
 * they do to penalties is not worked out in advance. */
static bool drawable(const qvl_engine *e, const qvl__request *r, int at) {
    bool reports = r->prompt_logprobs >= 0 && r->reported < r->prompt_n;
    return e->ws.host_draws && !r->logits && !reports && (r->n_draft == 0 || !r->sampler.count) && at + 1 >= r->prompt_n;
}

void qvl__answer_draws(qvl_engine *e, qvl__batch *b) {
    b->token_limit = token_limit(e);
    for (int i = 0; i < b->outs; i++) {
        const qvl__request *r = e->rows.out_request[i];
        int at = b->pos[b->out_row[i]];
        e->rows.drawn[i] = false;
        if (!drawable(e, r, at)) continue;
        qvl__draw *d = &e->ws.host_draws[b->draws];
        e->rows.drawn[i] = qvl__sampler_draw(&r->sampler, r->banned, banned_at(r, at), (uint64_t)at + 1, d, e->ws.host_changed + b->changes, QVL__CHANGES - b->changes);
        if (!e->rows.drawn[i]) continue;
        d->row = i;
        d->first = b->changes;
        b->changes += d->bias + d->seen + d->banned;
        b->draws++;
    }
}
