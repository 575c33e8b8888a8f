/* chunk.c - answers as JSON in OpenAI's form.
 *
 * Job:        chunks of a stream; a whole reply; usage and timings.
 * Input:      a task, its choices, pieces of text.
 * Output:     JSON text to the task's sink.
 * Invariants: chat.completion(.chunk) and text_completion as OpenAI's clients read them; reasoning goes out under both of its
 *             common names, reasoning and reasoning_content, because clients are split (FEATURES: vLLM #33402).
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "task.h"

static void head(buf *b, const task *t, const char *object) {
    buf_printf(b, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%ld,\"model\":", t->id, object, t->created_unix);
    buf_json(b, t->model_name, strlen(t->model_name));
}

static double usage_of(const task *t, int what) { return isfinite(t->usage[what]) ? t->usage[what] : 0; }

static void usage(buf *b, const task *t) {
    long prompt = (long)usage_of(t, QVL_USAGE_PROMPT_TOKENS), completion = (long)usage_of(t, QVL_USAGE_COMPLETION_TOKENS);
    buf_printf(b, "\"usage\":{\"prompt_tokens\":%ld,\"completion_tokens\":%ld,\"total_tokens\":%ld,\"prompt_tokens_details\":{\"cached_tokens\":%ld,"
               "\"image_tokens\":%ld},\"completion_tokens_details\":{\"reasoning_tokens\":%ld}}", prompt, completion, prompt + completion,
               (long)usage_of(t, QVL_USAGE_CACHED_TOKENS), (long)usage_of(t, QVL_USAGE_IMAGE_TOKENS), t->reasoning_tokens);
}

/* What the request's time went to: the receipt of the page. */
static void timings(buf *b, const task *t) {
    double decode = usage_of(t, QVL_USAGE_DECODE_MS), tokens = usage_of(t, QVL_USAGE_COMPLETION_TOKENS) / (t->n > 0 ? t->n : 1);
    buf_printf(b, "\"timings\":{\"queue_ms\":%.3f,\"vision_ms\":%.3f,\"prefill_ms\":%.3f,\"ttft_ms\":%.3f,\"decode_ms\":%.3f,\"total_ms\":%.3f,"
               "\"tokens_per_second\":%.3f,\"images\":%d,\"images_cached\":%d,\"speculated_tokens\":%d}",
               usage_of(t, QVL_USAGE_QUEUE_MS), usage_of(t, QVL_USAGE_VISION_MS), usage_of(t, QVL_USAGE_PREFILL_MS), usage_of(t, QVL_USAGE_TTFT_MS),
               decode, usage_of(t, QVL_USAGE_TOTAL_MS), decode > 0 && tokens > 1 ? (tokens - 1) * 1e3 / decode : 0,
               (int)usage_of(t, QVL_USAGE_IMAGES), (int)usage_of(t, QVL_USAGE_IMAGES_CACHED), (int)usage_of(t, QVL_USAGE_SPECULATED_TOKENS));
}

static void logprobs(buf *b, choice *c) {
    const task *t = c->task;
    if (!t->want_logprobs) {
        buf_puts(b, "\"logprobs\":null");
        return;
    }
    if (t->chat) {
        buf_puts(b, "\"logprobs\":{\"content\":[");
        buf_add(b, c->logprobs.data, c->logprobs.len);
        buf_puts(b, "]}");
        buf_clear(&c->logprobs);
        return;
    }
    buf_puts(b, "\"logprobs\":{\"tokens\":[");
    buf_add(b, c->tokens.data, c->tokens.len);
    buf_puts(b, "],\"token_logprobs\":[");
    buf_add(b, c->token_logprobs.data, c->token_logprobs.len);
    buf_puts(b, "],\"top_logprobs\":[");
    buf_add(b, c->tops.data, c->tops.len);
    buf_puts(b, "],\"text_offset\":[");
    buf_add(b, c->offsets.data, c->offsets.len);
    buf_puts(b, "]}");
    buf *const all[] = {&c->tokens, &c->token_logprobs, &c->tops, &c->offsets};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) buf_clear(all[i]);
}

static void reason(buf *b, const choice *c) {
    if (c->finish_reason) buf_printf(b, "\"finish_reason\":\"%s\"", c->finish_reason);
    else buf_puts(b, "\"finish_reason\":null");
    if (c->stop_reason) buf_printf(b, ",\"stop_reason\":\"%s\"", c->stop_reason);
}

static buf out; /* one chunk; the loop's: one thread */

static void begin_chunk(const task *t) {
    buf_clear(&out);
    head(&out, t, t->chat ? "chat.completion.chunk" : "text_completion");
}

static void send_chunk(task *t) {
    if (out.failed) task_out_of_memory(t);
    else if (!t->abandoned) t->sink->chunk(t->to, out.data, out.len);
}

static void running_usage(const task *t) {
    if (t->continuous_usage) {
        /* the engine's own figures come with the end: until then what is known here */
        long n = 0;
        for (int i = 0; i < t->n; i++) n += t->choices[i].generated;
        buf_printf(&out, ",\"usage\":{\"prompt_tokens\":%ld,\"completion_tokens\":%ld,\"total_tokens\":%ld}", t->prompt_tokens, n, t->prompt_tokens + n);
    } else if (t->include_usage) {
        buf_puts(&out, ",\"usage\":null");
    }
}

static void call_delta(const toolcall_event *e) {
    buf_printf(&out, "\"tool_calls\":[{\"index\":%d,", e->index);
    if (e->type == TOOLCALL_START) {
        buf_printf(&out, "\"id\":\"%s\",\"type\":\"function\",\"function\":{\"name\":", e->id);
        buf_json(&out, e->name, strlen(e->name));
        buf_puts(&out, ",\"arguments\":\"\"}}]");
    } else {
        buf_puts(&out, "\"function\":{\"arguments\":");
        buf_json(&out, e->text, e->n);
        buf_puts(&out, "}}]");
    }
}

void chunk_delta_out(choice *c, const chunk_delta *d) {
    task *t = c->task;
    if (d->role && !t->chat) return;
    begin_chunk(t);
    buf_printf(&out, ",\"choices\":[{\"index\":%d,", c->index);
    if (t->chat) {
        buf_puts(&out, "\"delta\":{");
        if (d->role) buf_puts(&out, "\"role\":\"assistant\",\"content\":\"\"");
        else if (d->call) call_delta(d->call);
        else if (d->thought) {
            buf_puts(&out, "\"reasoning\":");
            buf_json(&out, d->thought, d->thought_n);
            buf_puts(&out, ",\"reasoning_content\":");
            buf_json(&out, d->thought, d->thought_n);
        } else {
            buf_puts(&out, "\"content\":");
            buf_json(&out, d->text, d->text_n);
        }
        buf_puts(&out, "},");
    } else {
        buf_puts(&out, "\"text\":");
        buf_json(&out, d->text, d->text_n);
        buf_puts(&out, ",");
    }
    if (d->role) buf_puts(&out, "\"logprobs\":null");
    else logprobs(&out, c);
    buf_puts(&out, ",\"finish_reason\":null}]");
    running_usage(t);
    buf_puts(&out, "}");
    send_chunk(t);
}

void chunk_finish(choice *c) {
    task *t = c->task;
    begin_chunk(t);
    buf_printf(&out, ",\"choices\":[{\"index\":%d,%s", c->index, t->chat ? "\"delta\":{}," : "\"text\":\"\",");
    if (c->logprobs.len || c->tokens.len) logprobs(&out, c); /* of tokens whose text was held back, or is none */
    else buf_puts(&out, "\"logprobs\":null");
    buf_puts(&out, ",");
    reason(&out, c);
    buf_puts(&out, "}]");
    running_usage(t);
    buf_puts(&out, "}");
    send_chunk(t);
}

void chunk_usage(task *t) {
    begin_chunk(t);
    buf_puts(&out, ",\"choices\":[],");
    usage(&out, t);
    buf_puts(&out, ",");
    timings(&out, t);
    buf_puts(&out, "}");
    send_chunk(t);
}

static void message(buf *b, choice *c) {
    const task *t = c->task;
    const buf *content = c->calls ? &c->whole.content : &c->content;
    buf_puts(b, "\"message\":{\"role\":\"assistant\",\"content\":");
    if (c->whole.calls && !content->len) buf_puts(b, "null");
    else buf_json(b, content->data ? content->data : "", content->len);
    if (c->thought.len || t->opened) {
        buf_puts(b, ",\"reasoning\":");
        buf_json(b, c->thought.data ? c->thought.data : "", c->thought.len);
        buf_puts(b, ",\"reasoning_content\":");
        buf_json(b, c->thought.data ? c->thought.data : "", c->thought.len);
    }
    if (c->whole.calls) {
        char *calls = json_dumps(c->whole.calls, JSON_COMPACT);
        if (calls) buf_printf(b, ",\"tool_calls\":%s", calls);
        else b->failed = true;
        free(calls);
    }
    buf_puts(b, "},");
    if (content->len) log_prompt("answer", t->request_id, content->data, content->len);
}

void chunk_whole(task *t, buf *b) {
    head(b, t, t->chat ? "chat.completion" : "text_completion");
    buf_puts(b, ",\"choices\":[");
    for (int i = 0; i < t->n; i++) {
        choice *c = &t->choices[i];
        buf_printf(b, "%s{\"index\":%d,", i ? "," : "", i);
        if (t->chat) message(b, c);
        else {
            buf_puts(b, "\"text\":");
            buf_json(b, c->content.data ? c->content.data : "", c->content.len);
            buf_puts(b, ",");
        }
        logprobs(b, c);
        buf_puts(b, ",");
        reason(b, c);
        buf_puts(b, "}");
    }
    buf_puts(b, "],");
    usage(b, t);
    buf_puts(b, ",");
    timings(b, t);
    buf_puts(b, "}");
}
