/* prompt.c - messages to what the model takes: tokens, M-RoPE positions, pixels.
 *
 * Job:        render, resolve images and videos, tokenize, expand placeholders, lay out positions.
 * Input:      messages and tools as JSON text, media, options; or plain token ids.
 * Output:     qvl_prompt, immutable.
 * Invariants: tokens equal transformers' Qwen3VLProcessor for the same messages, where no message text holds a control
 *             token; a control token in message text is ordinary text here;
 *             every run of pad tokens is exactly one image or one frame pair of a video, in order.
 *
 * transformers expands the placeholders in the text and tokenizes the long text. Added tokens are split off before
 * anything else, so tokenizing one pad for each run and repeating its id gives the same tokens.
 */
#include <jansson.h>
#include <string.h>

#include "encode.h"

static const char vision_start[] = "<|vision_start|>", vision_end[] = "<|vision_end|>";

/* --------------------------------------------------------------------------------------------------------- tokens */

/* The text that is tokenized, where control tokens may stand in it, and the pad runs to come. */
typedef struct {
    qvl__buf text;
    qvl__span *spans;
    size_t n_spans, cap_spans;
    qvl__run *runs;
    size_t n_runs;
} expansion;

static void free_expansion(expansion *x) {
    qvl__buf_free(&x->text);
    qvl__free(x->spans);
    qvl__free(x->runs);
}

static void add_control(expansion *x, const char *s, size_t n) {
    size_t start = x->text.len;
    qvl__buf_add(&x->text, s, n);
    if (x->text.failed) return;
    if (x->n_spans && x->spans[x->n_spans - 1].end == start) {
        x->spans[x->n_spans - 1].end = x->text.len;
        return;
    }
    if (x->n_spans == x->cap_spans) {
        size_t cap = x->cap_spans ? 2 * x->cap_spans : 16;
        qvl__span *p = qvl__array(x->spans, cap, sizeof *p);
        if (!p) {
            x->text.failed = true;
            return;
        }
        x->spans = p;
        x->cap_spans = cap;
    }
    x->spans[x->n_spans++] = (qvl__span){start, x->text.len};
}
static void add_control_str(expansion *x, const char *s) { add_control(x, s, strlen(s)); }

/* "<|vision_start|>pad<|vision_end|>", to be tokens long. */
static void add_run(expansion *x, size_t visual, int tokens, int offset, bool video) {
    add_control_str(x, vision_start);
    add_control_str(x, video ? "<|video_pad|>" : "<|image_pad|>");
    add_control_str(x, vision_end);
    x->runs[x->n_runs++] = (qvl__run){.tokens = tokens, .visual = (int)visual, .offset = offset};
}

/* A video is one run for each frame pair, its time written before it. Qwen's processor and transformers up to 5.9 put
 * them in place of the whole placeholder; transformers from 5.10 on replaces only the pad ("nested"). */
static void add_video(expansion *x, size_t visual, const qvl__part *part, bool nested) {
    const int pairs = part->visual->t, each = part->visual->tokens / pairs;
    if (nested) add_control_str(x, vision_start);
    for (int i = 0; i < pairs; i++) {
        qvl__buf_puts(&x->text, part->stamp[i]);
        add_run(x, visual, each, i * each, true);
    }
    if (nested) add_control_str(x, vision_end);
}

static int expand(expansion *x, const qvl__chat *chat, const qvl__part *parts, size_t n_parts, bool nested) {
    size_t runs = 0, next = 0;
    for (size_t i = 0; i < n_parts; i++) runs += (size_t)parts[i].visual->t; /* images have t = 1 */
    x->runs = qvl__calloc(runs, sizeof *x->runs);
    if (!x->runs) return QVL_ENOMEM;
    for (size_t i = 0; i < chat->n; i++) {
        const qvl__segment *s = &chat->seg[i];
        const char *text = chat->text.data + s->start;
        switch (s->kind) {
        case QVL__SEG_TEMPLATE: add_control(x, text, s->end - s->start); break;
        case QVL__SEG_USER: qvl__buf_add(&x->text, text, s->end - s->start); break;
        case QVL__SEG_IMAGE: add_run(x, next, parts[next].visual->tokens, 0, false), next++; break;
        case QVL__SEG_VIDEO: add_video(x, next, &parts[next], nested), next++; break;
        }
    }
    return x->text.failed ? QVL_ENOMEM : 0;
}

static int check_ids(const qvl__config *c, const int32_t *ids, size_t n, int code) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= c->text.vocab)
            return qvl__fail(code, "token %zu is %d, the model has tokens 0..%d", i, ids[i], c->text.vocab - 1);
    return 0;
}

static int no_pads(int32_t image, int32_t video) {
    return qvl__fail(QVL_EFORMAT, "the checkpoint's tokenizer.json and config.json disagree about <|image_pad|> (%d in config.json) "
                     "or <|video_pad|> (%d)", image, video);
}

/* ids with one pad for each run to p->tokens with whole runs; sets the runs' start. */
static int repeat_pads(qvl_prompt *p, const qvl__encoder *e, const int32_t *ids, size_t n) {
    const int32_t image = e->config->image_token, video = e->config->video_token;
    size_t total = n, pads = 0, at = 0;
    for (size_t i = 0; i < n; i++) {
        if (ids[i] != image && ids[i] != video) continue;
        if (pads == (size_t)p->n_runs || p->visuals[p->runs[pads].visual]->video != (ids[i] == video))
            return no_pads(image, video);
        total += (size_t)p->runs[pads++].tokens - 1;
    }
    if (pads != (size_t)p->n_runs) return no_pads(image, video);
    if (total > INT32_MAX) return qvl__fail(QVL_ECONTEXT, "the prompt has %zu tokens, at most %d are possible", total, INT32_MAX);
    p->tokens = qvl__array(NULL, total, sizeof *p->tokens);
    if (!p->tokens) return QVL_ENOMEM;
    p->n = total;
    pads = 0;
    for (size_t i = 0; i < n; i++) {
        if (ids[i] != image && ids[i] != video) {
            p->tokens[at++] = ids[i];
            continue;
        }
        qvl__run *r = &p->runs[pads++];
        r->start = at;
        for (int k = 0; k < r->tokens; k++) p->tokens[at++] = ids[i];
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------------ positions */

/* M-RoPE (transformers modeling_qwen3_vl, get_rope_index): text goes one step on all three axes; a run at position q
 * spans T = q, H = q + row, W = q + column on its merged grid, and the next token is at q + max(rows, columns). */
static int set_positions(qvl_prompt *p, int merge) {
    p->positions = qvl__array(NULL, p->n, 3 * sizeof *p->positions);
    if (!p->positions) return QVL_ENOMEM;
    int32_t *t = p->positions, *h = t + p->n, *w = h + p->n, at = 0; /* at <= tokens so far: no overflow */
    int run = 0;
    for (size_t i = 0; i < p->n;) {
        if (run == p->n_runs || i != p->runs[run].start) {
            t[i] = h[i] = w[i] = at++;
            i++;
            continue;
        }
        const qvl__visual *v = p->visuals[p->runs[run++].visual];
        const int rows = v->h / merge, columns = v->w / merge;
        for (int y = 0; y < rows; y++)
            for (int x = 0; x < columns; x++, i++) {
                t[i] = at;
                h[i] = at + y;
                w[i] = at + x;
            }
        at += rows > columns ? rows : columns;
    }
    p->rope_delta = at - (int32_t)p->n;
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------- prompt */

static int prompt_alloc(qvl_prompt **out) {
    *out = qvl__calloc(1, sizeof **out);
    if (!*out) return QVL_ENOMEM;
    atomic_init(&(*out)->refs, 1);
    return 0;
}

bool qvl__prompt_free(qvl_prompt *p) {
    if (!p || atomic_fetch_sub_explicit(&p->refs, 1, memory_order_acq_rel) != 1) return false;
    for (int i = 0; i < p->n_visuals; i++) qvl__visual_free(p->visuals[i]);
    qvl__free(p->visuals);
    qvl__free(p->runs);
    qvl__free(p->positions);
    qvl__free(p->tokens);
    qvl__free(p->text);
    qvl__free(p);
    return true;
}

/* Moves the visuals of parts and the runs of x into p. */
static int take_visuals(qvl_prompt *p, qvl__part *parts, size_t n, expansion *x) {
    if (n > INT32_MAX || x->n_runs > INT32_MAX) return qvl__fail(QVL_ECONTEXT, "too many images and videos");
    p->visuals = qvl__calloc(n, sizeof *p->visuals);
    if (!p->visuals) return QVL_ENOMEM;
    for (size_t i = 0; i < n; i++) {
        p->visuals[i] = parts[i].visual;
        parts[i].visual = NULL;
    }
    p->n_visuals = (int)n;
    p->runs = x->runs;
    p->n_runs = (int)x->n_runs;
    x->runs = NULL;
    return 0;
}

static int fill(qvl_prompt *p, const qvl__encoder *e, qvl__chat *chat, const qvl_media *media, const qvl_options *o) {
    const bool nested = strcmp(qvl__opt_str(o, "video_layout"), "nested") == 0;
    expansion x = {0};
    qvl__part *parts;
    int32_t *ids = NULL;
    size_t n_parts, n;
    int rc = qvl__parts_resolve(&parts, &n_parts, chat, e, media, o);
    if (rc < 0) return rc;
    if ((rc = expand(&x, chat, parts, n_parts, nested)) < 0) goto done;
    if (x.text.len == 0) {
        rc = qvl__fail(QVL_EINVAL, "messages: the chat template leaves all of them out, so that the prompt would be empty");
        goto done;
    }
    if ((rc = take_visuals(p, parts, n_parts, &x)) < 0) goto done;
    if ((rc = qvl__tokenize_spans(e->tokenizer, x.text.data, x.text.len, x.spans, x.n_spans, &ids, &n)) < 0) goto done;
    if ((rc = check_ids(e->config, ids, n, QVL_EFORMAT)) < 0) {
        rc = qvl__context(rc, "tokenizer and model do not belong together");
        goto done;
    }
    if ((rc = repeat_pads(p, e, ids, n)) < 0) goto done;
    if ((rc = set_positions(p, e->config->processor.merge)) < 0) goto done;
    p->text = chat->text.data;
    chat->text = (qvl__buf){0};
done:
    qvl__free(ids);
    free_expansion(&x);
    qvl__parts_free(parts, n_parts);
    return rc;
}

/* JSON text to a rendered chat. The chat borrows from *root, which the caller drops (also after a failure). */
static int render(qvl__chat *chat, json_t **root, qvl__template t, const char *messages, const char *tools,
                  const qvl_options *o) {
    json_t *tool_list = NULL;
    *root = NULL;
    int rc = qvl__messages_parse(root, messages, strlen(messages), "messages");
    if (rc == 0 && tools) rc = qvl__messages_parse(&tool_list, tools, strlen(tools), "tools");
    if (rc == 0)
        rc = qvl__chat_render(chat, t, *root, tool_list, qvl__opt_i64(o, "add_generation_prompt") != 0,
                              qvl__opt_i64(o, "add_vision_id") != 0, true);
    json_decref(tool_list); /* its text was copied */
    return rc;
}

int qvl__render_chat(qvl__template t, const char *messages, const char *tools, const qvl_options *o, char **text) {
    qvl__chat chat = {0};
    json_t *root;
    *text = NULL;
    int rc = render(&chat, &root, t, messages, tools, o);
    if (rc == 0) {
        *text = chat.text.data;
        chat.text = (qvl__buf){0};
    }
    qvl__chat_free(&chat);
    json_decref(root);
    return rc;
}

int qvl__prompt_new(qvl_prompt **out, const qvl__encoder *e, const char *messages, const char *tools, const qvl_media *media,
                    const qvl_options *o) {
    qvl__chat chat = {0};
    json_t *root;
    qvl_prompt *p = NULL;
    *out = NULL;
    int rc = render(&chat, &root, e->template_, messages, tools, o);
    if (rc == 0) rc = prompt_alloc(&p);
    if (rc == 0) rc = fill(p, e, &chat, media, o);
    qvl__chat_free(&chat);
    json_decref(root);
    if (rc < 0) {
        qvl__prompt_free(p);
        return rc;
    }
    *out = p;
    return 0;
}

int qvl__prompt_from_tokens(qvl_prompt **out, const qvl__encoder *e, const int32_t *ids, size_t n) {
    const qvl__config *c = e->config;
    qvl_prompt *p;
    *out = NULL;
    if (!ids || n == 0) return qvl__fail(QVL_EINVAL, "a prompt needs at least one token");
    if (n > INT32_MAX) return qvl__fail(QVL_ECONTEXT, "the prompt has %zu tokens, at most %d are possible", n, INT32_MAX);
    int rc = check_ids(c, ids, n, QVL_EINVAL);
    if (rc < 0) return rc;
    for (size_t i = 0; i < n; i++)
        if (ids[i] == c->image_token || ids[i] == c->video_token)
            return qvl__fail(QVL_EINVAL, "token %zu is %s (%d), which stands for pixels; make prompts with images from messages",
                             i, ids[i] == c->image_token ? "<|image_pad|>" : "<|video_pad|>", ids[i]);
    if ((rc = prompt_alloc(&p)) < 0) return rc;
    p->n = n;
    p->tokens = qvl__array(NULL, n, sizeof *p->tokens);
    p->text = qvl__strndup("", 0);
    if (!p->tokens || !p->text || set_positions(p, c->processor.merge) < 0) {
        qvl__prompt_free(p);
        return QVL_ENOMEM;
    }
    memcpy(p->tokens, ids, n * sizeof *ids);
    *out = p;
    return 0;
}
