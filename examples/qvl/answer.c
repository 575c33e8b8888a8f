/* answer.c - one request through the engine, its text shown as it comes.
 *
 * Job:        submit, step, split reasoning from answer, stream, collect; stop on Ctrl-C.
 * Input:      a prompt, options, where to write.
 * Output:     tool_answer: texts, why it ended, figures.
 * Invariants: what went to out is exactly text (and reasoning, on a terminal), however the pieces were cut;
 *             a stopped request is gone from the engine when this returns, so the next one can follow.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

/* Splits "reasoning</think>answer". Where the prompt does not end inside <think>, an answer may still open with it. */
typedef struct {
    enum { START, THINK, GAP, ANSWER } state; /* GAP: the empty lines between reasoning and answer */
    char held[16];                            /* a beginning of the tag that may yet become whole */
    size_t n_held;
    FILE *text, *reasoning, *out;
    bool show_reasoning, dim;
} splitter;

static void put_answer(splitter *s, const char *p, size_t n) {
    while (s->state == GAP && n > 0 && *p == '\n') p++, n--;
    if (n == 0) return;
    s->state = ANSWER;
    fwrite(p, 1, n, s->text);
    if (s->out) tool_write_text(s->out, p, n);
}

static void put_reasoning(splitter *s, const char *p, size_t n) {
    fwrite(p, 1, n, s->reasoning);
    if (!s->show_reasoning || n == 0) return;
    if (s->dim) fputs("\033[2m", s->out);
    tool_write_text(s->out, p, n);
    if (s->dim) fputs("\033[0m", s->out);
}

static void put(splitter *s, const char *p, size_t n) {
    if (s->state == THINK) put_reasoning(s, p, n);
    else put_answer(s, p, n);
}

static void tag_found(splitter *s) {
    if (s->state == START) s->state = THINK;
    else {
        s->state = GAP;
        if (s->show_reasoning) fputs("\n\n", s->out);
    }
}

/* Runs of text that hold no tag go on in one piece; '<' occurs only at a tag's start, so a mismatch restarts there. */
static void split(splitter *s, const char *p, size_t n) {
    while (n > 0) {
        if (s->state == ANSWER || s->state == GAP) {
            put_answer(s, p, n);
            return;
        }
        const char *tag = s->state == THINK ? "</think>" : "<think>";
        if (s->n_held > 0 || *p == '<') {
            if (*p == tag[s->n_held]) {
                s->held[s->n_held++] = *p++;
                n--;
                if (!tag[s->n_held]) {
                    s->n_held = 0;
                    tag_found(s);
                }
                continue;
            }
            if (s->n_held > 0) { /* no tag after all */
                size_t held = s->n_held;
                s->n_held = 0;
                put(s, s->held, held);
                continue;
            }
        }
        const char *next = s->state == THINK ? memchr(p + 1, '<', n - 1) : NULL; /* an answer opens with <think> or has none */
        size_t take = next ? (size_t)(next - p) : n;
        put(s, p, take);
        p += take;
        n -= take;
    }
}

static void collect_logprobs(tool_answer *a, const qvl_event *v) {
    float logprob = qvl_event_logprob(v);
    if (isnan(logprob)) return;
    const int32_t *ids = NULL;
    const float *values = NULL;
    int n = qvl_event_top_logprobs(v, &ids, &values);
    json_t *top = json_array();
    for (int i = 0; i < n; i++) json_array_append_new(top, json_pack("[i, f]", (int)ids[i], (double)values[i]));
    if (!a->tokens) a->tokens = json_array();
    json_array_append_new(a->tokens, json_pack("{s:i, s:f, s:o}", "id", (int)qvl_event_token(v), "logprob", (double)logprob, "top", top));
}

/* The events of one step. 1 when the request has ended, 0 when not, TOOL_FAILED negated after a message. */
static int take_events(tool_answer *a, splitter *s, const qvl_engine *e, int n, uint64_t request) {
    for (int i = 0; i < n; i++) {
        const qvl_event *v = qvl_engine_event(e, i);
        if (qvl_event_request(v) != request) continue;
        size_t len;
        const char *piece = qvl_event_text(v, &len), *why;
        split(s, piece, len);
        if (len && s->out) fflush(s->out);
        if (qvl_event_type(v) == QVL_EVENT_TOKEN) collect_logprobs(a, v);
        if (qvl_event_error(v, &why)) {
            tool_fail("%s", why);
            return -TOOL_FAILED;
        }
        if (qvl_event_type(v) != QVL_EVENT_FINISHED) continue;
        put(s, s->held, s->n_held);
        s->n_held = 0;
        snprintf(a->finish_reason, sizeof a->finish_reason, "%s", qvl_event_finish_reason(v));
        for (int what = 1; what <= QVL_USAGE_IMAGES_CACHED; what++) a->usage[what] = qvl_event_usage(v, what);
        return 1;
    }
    return 0;
}

static int run(tool_answer *a, splitter *s, qvl_engine *e, const qvl_prompt *p, const qvl_options *o) {
    uint64_t request;
    if (qvl_engine_submit(e, p, o, &request) < 0) return tool_library_error(NULL);
    for (;;) {
        int n = qvl_engine_step(e, -1);
        if (n < 0) return tool_library_error(NULL);
        int ended = take_events(a, s, e, n, request);
        if (ended) return ended < 0 ? -ended : TOOL_OK;
        if (tool_interrupted() && !a->interrupted) {
            a->interrupted = true;
            qvl_engine_cancel(e, request); /* its finished event comes with the next step */
        }
    }
}

/* Thinking templates open the answer inside <think>; nothing a user wrote can stand at the end of a rendered prompt. */
static bool opens_think(const qvl_prompt *p) {
    static const char end[] = "<think>\n";
    const char *text = qvl_prompt_text(p);
    size_t n = strlen(text), m = sizeof end - 1;
    return n >= m && strcmp(text + n - m, end) == 0;
}

int tool_answer_run(tool_answer *a, qvl_engine *e, const qvl_prompt *p, const qvl_options *o, FILE *out) {
    memset(a, 0, sizeof *a);
    for (int i = 0; i <= QVL_USAGE_IMAGES_CACHED; i++) a->usage[i] = NAN;
    splitter s = {.state = opens_think(p) ? THINK : START, .out = out, .show_reasoning = out && tool_is_terminal(out), .dim = out && tool_has_color(out)};
    s.text = open_memstream(&a->text, &a->text_len);
    s.reasoning = open_memstream(&a->reasoning, &a->reasoning_len);
    int code = s.text && s.reasoning ? run(a, &s, e, p, o) : tool_fail("out of memory");
    if (s.text && fclose(s.text) != 0) code = tool_fail("out of memory");
    if (s.reasoning && fclose(s.reasoning) != 0) code = tool_fail("out of memory");
    return code;
}

void tool_answer_free(tool_answer *a) {
    free(a->text);
    free(a->reasoning);
    json_decref(a->tokens);
    memset(a, 0, sizeof *a);
}

double tool_tokens_per_second(const tool_answer *a) {
    double tokens = a->usage[QVL_USAGE_COMPLETION_TOKENS] - 1, ms = a->usage[QVL_USAGE_TOTAL_MS] - a->usage[QVL_USAGE_TTFT_MS];
    return tokens > 0 && ms > 0 ? 1e3 * tokens / ms : NAN;
}

static json_t *number(double v) { return isfinite(v) ? json_real(round(v * 1e3) / 1e3) : json_null(); }

json_t *tool_usage_json(const tool_answer *a) {
    json_int_t prompt = (json_int_t)a->usage[QVL_USAGE_PROMPT_TOKENS], completion = (json_int_t)a->usage[QVL_USAGE_COMPLETION_TOKENS];
    return json_pack("{s:I, s:I, s:I, s:I}", "prompt_tokens", prompt, "image_tokens", (json_int_t)a->usage[QVL_USAGE_IMAGE_TOKENS], "completion_tokens",
                     completion, "total_tokens", prompt + completion);
}

json_t *tool_timings_json(const tool_answer *a, double load_ms) {
    return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o}", "load_ms", number(load_ms), "queue_ms", number(a->usage[QVL_USAGE_QUEUE_MS]), "vision_ms",
                     number(a->usage[QVL_USAGE_VISION_MS]), "ttft_ms", number(a->usage[QVL_USAGE_TTFT_MS]), "total_ms",
                     number(a->usage[QVL_USAGE_TOTAL_MS]), "tokens_per_second", number(tool_tokens_per_second(a)));
}

json_t *tool_text_message(const char *role, const char *text, size_t len) {
    json_t *content = json_stringn(text, len);
    if (!content) tool_fail("the %s text is not UTF-8", role);
    return content ? json_pack("{s:s, s:o}", "role", role, "content", content) : NULL;
}
