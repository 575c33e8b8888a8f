/* answer.c - an engine's tokens to what clients read.
 *
 * Job:        split text into reasoning, content and tool calls; keep log-probabilities; say how it ended.
 * Input:      events of one request, in order.
 * Output:     chunks as they come, or everything for one whole reply.
 * Invariants: joined, the pieces of a stream are the whole reply's text.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "task.h"

/* ---- pieces of text ---- */
static void on_call(void *ud, const toolcall_event *e) {
    choice *c = ud;
    if (!c->task->stream) {
        toolcall_collect(&c->whole, e);
        return;
    }
    if (e->type == TOOLCALL_END) return;
    chunk_delta d = {0};
    if (e->type == TOOLCALL_CONTENT) {
        d.text = e->text;
        d.text_n = e->n;
    } else {
        d.call = e;
    }
    chunk_delta_out(c, &d);
}

static void on_part(void *ud, int part, const char *text, size_t n) {
    choice *c = ud;
    task *t = c->task;
    chunk_delta d = {0};
    if (part == REASONING_THOUGHT) {
        if (!t->include_reasoning) return;
        d.thought = text;
        d.thought_n = n;
        if (!t->stream) buf_add(&c->thought, text, n);
    } else if (c->calls) {
        if (toolcall_feed(c->calls, text, n)) c->content.failed = true;
        return;
    } else {
        d.text = text;
        d.text_n = n;
        if (!t->stream) buf_add(&c->content, text, n);
    }
    if (t->stream) chunk_delta_out(c, &d);
}

/* ---- log-probabilities ---- */
static void add_token_text(buf *b, task *t, int32_t id, bool bytes) {
    char *text = NULL;
    size_t n = 0;
    if (qvl_detokenize(qvl_model_tokenizer(model_weights(t->model)), &id, 1, 0, &text, &n)) n = 0;
    buf_json(b, text ? text : "", n);
    if (bytes) {
        /* a token that is a part of a character has no text of its own: its bytes cannot be told */
        bool whole = !(n >= 3 && memmem(text, n, "\xEF\xBF\xBD", 3));
        buf_puts(b, whole ? ",\"bytes\":[" : ",\"bytes\":null");
        for (size_t i = 0; whole && i < n; i++) buf_printf(b, "%s%d", i ? "," : "", (unsigned char)text[i]);
        if (whole) buf_puts(b, "]");
    }
    qvl_free(text);
}

static void add_number(buf *b, float v) {
    if (isfinite(v)) buf_printf(b, "%.6g", (double)v);
    else buf_puts(b, v < 0 ? "-9999" : "null"); /* OpenAI's word for a token that could not come */
}

static void add_logprob(choice *c, const model_event *v) {
    task *t = c->task;
    buf *b = &c->logprobs;
    if (t->chat) {
        if (b->len) buf_puts(b, ",");
        buf_puts(b, "{\"token\":");
        add_token_text(b, t, v->token, true);
        buf_puts(b, ",\"logprob\":");
        add_number(b, v->logprob);
        buf_puts(b, ",\"top_logprobs\":[");
        for (int i = 0; i < v->n_top && i < t->top_logprobs; i++) {
            buf_puts(b, i ? ",{\"token\":" : "{\"token\":");
            add_token_text(b, t, v->top_ids[i], true);
            buf_puts(b, ",\"logprob\":");
            add_number(b, v->top_logprobs[i]);
            buf_puts(b, "}");
        }
        buf_puts(b, "]}");
        return;
    }
    const char *comma = c->tokens.len ? "," : "";
    buf_puts(&c->tokens, comma);
    add_token_text(&c->tokens, t, v->token, false);
    buf_puts(&c->token_logprobs, comma);
    add_number(&c->token_logprobs, v->logprob);
    buf_printf(&c->offsets, "%s%zu", comma, c->text_bytes);
    buf_puts(&c->tops, comma);
    buf_puts(&c->tops, "{");
    for (int i = 0; i < v->n_top && i < t->top_logprobs; i++) {
        if (i) buf_puts(&c->tops, ",");
        add_token_text(&c->tops, t, v->top_ids[i], false);
        buf_puts(&c->tops, ":");
        add_number(&c->tops, v->top_logprobs[i]);
    }
    buf_puts(&c->tops, "}");
}

/* ---- events ---- */
static bool failed(const choice *c) {
    return c->content.failed || c->thought.failed || c->logprobs.failed || c->whole.failed || c->tokens.failed || c->tops.failed || c->offsets.failed;
}

static void finish(choice *c, const char *reason) {
    task *t = c->task;
    reasoning_finish(&c->split, on_part, c);
    if (c->calls && toolcall_finish(c->calls)) c->content.failed = true;
    if (strcmp(reason, "cancelled") == 0) c->finish_reason = "abort";
    else if (strcmp(reason, "deadline") == 0) {
        c->finish_reason = "length"; /* the one word that clients have for an answer that was cut short */
        c->stop_reason = "deadline";
    } else c->finish_reason = strcmp(reason, "length") == 0 ? "length" : "stop";
    if (c->calls && toolcall_count(c->calls) && strcmp(c->finish_reason, "stop") == 0) c->finish_reason = "tool_calls";
    if (t->stream) chunk_finish(c);
}

int answer_begin(task *t) {
    t->choices = calloc((size_t)t->n, sizeof *t->choices);
    if (!t->choices) return -1;
    t->open_choices = t->n;
    for (int i = 0; i < t->n; i++) {
        choice *c = &t->choices[i];
        c->task = t;
        c->index = i;
        reasoning_init(&c->split, t->opened);
        if (t->tools && !(c->calls = toolcall_new(on_call, c))) return -1;
    }
    return 0;
}

void answer_free(task *t) {
    for (int i = 0; t->choices && i < t->n; i++) {
        choice *c = &t->choices[i];
        toolcall_free(c->calls);
        toolcall_result_free(&c->whole);
        buf *const all[] = {&c->content, &c->thought, &c->logprobs, &c->tokens, &c->token_logprobs, &c->tops, &c->offsets};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) buf_free(all[k]);
    }
    free(t->choices);
}

void answer_event(task *t, const model_event *v) {
    choice *c = &t->choices[v->choice];
    if (t->abandoned) {
        if (v->type == QVL_EVENT_FINISHED) c->finish_reason = "abort";
        return;
    }
    if (t->stream && !c->role_sent) {
        c->role_sent = true;
        chunk_delta d = {.role = true};
        chunk_delta_out(c, &d);
        if (t->prefix) {
            chunk_delta echo = {.text = t->prefix, .text_n = strlen(t->prefix)};
            chunk_delta_out(c, &echo);
        }
    } else if (!t->stream && t->prefix && !c->role_sent) {
        c->role_sent = true;
        buf_puts(&c->content, t->prefix);
    }
    if (v->type == QVL_EVENT_TOKEN) {
        if (t->chat && reasoning_inside(&c->split)) {
            c->reasoning_tokens++;
            t->reasoning_tokens++;
        }
        if (t->want_logprobs && !isnan(v->logprob)) add_logprob(c, v);
    }
    if (v->text_n) {
        c->text_bytes += v->text_n;
        if (t->chat) reasoning_feed(&c->split, v->text, v->text_n, on_part, c);
        else on_part(c, REASONING_ANSWER, v->text, v->text_n);
    }
    if (v->type == QVL_EVENT_FINISHED) finish(c, v->finish_reason);
    if (failed(c) && !t->error.status) {
        task_out_of_memory(t);
        if (v->type != QVL_EVENT_FINISHED || t->open_choices) model_cancel(t->model, t->request);
    }
}
