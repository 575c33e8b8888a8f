/* chat.c - the three known chat templates, written in C.
 *
 * Job:        messages and tools to the text that the checkpoint's jinja would give, cut into segments that say who
 *             wrote each byte.
 * Input:      untrusted JSON (any shape) and the template's name.
 * Output:     text + segments; the first error with its place ("messages[2].content[0]: ...").
 * Invariants: for well-formed messages the text equals jinja's under transformers 5.23, byte for byte;
 *             only literals of the template are TEMPLATE segments, so nothing that was sent becomes a control token;
 *             time and memory are linear in the size of the messages, whatever they hold.
 *
 * What jinja would print oddly (a Python dict, "None") or die on is refused here. Source of the semantics:
 * chat_template.json of Qwen3-VL-*-Instruct and -Thinking, and of qvl-tiny (docs/prompts.md has the differences).
 */
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "encode.h"

#define IMAGE_TEXT "<|vision_start|><|image_pad|><|vision_end|>"
#define VIDEO_TEXT "<|vision_start|><|video_pad|><|vision_end|>"

/* -------------------------------------------------------------------------------------------------- recognition */

/* SHA-256 of the template text without newlines at its end (jinja drops one, editors add one). The published texts are
 * one per kind: all sizes of Qwen3-VL Instruct share the first, all Thinking ones the second. */
static const struct known {
    qvl__template id;
    const char *name, *sha256;
} known[] = {
    /* chat_template.json of Qwen/Qwen3-VL-{2B,4B,8B,32B,30B-A3B}-Instruct, 5291 bytes */
    {QVL__TEMPLATE_INSTRUCT, "instruct", "9d879ef91075acbfb2df7e441fd79d60bacfca989cf6d511d2af45c681e94f10"},
    /* chat_template.json of Qwen/Qwen3-VL-{2B,4B,8B,32B,30B-A3B}-Thinking, 5198 bytes */
    {QVL__TEMPLATE_THINKING, "thinking", "84ed326ccec340f3c775d5a31c0aada290d59819c18e43650aabe14f1d42c839"},
    /* examples/models/qvl-tiny/chat_template.json, 2993 bytes */
    {QVL__TEMPLATE_TINY, "qvl-tiny", "f36561f3e5762b362ee4a982245af9f40f4382c8fbd06751148441619044e246"},
};

qvl__template qvl__template_recognise(const char *text, size_t len) {
    while (len && (text[len - 1] == '\n' || text[len - 1] == '\r')) len--;
    qvl__sha256 s;
    uint8_t sum[32];
    char hex[65];
    qvl__sha256_init(&s);
    qvl__sha256_add(&s, text, len);
    qvl__sha256_end(&s, sum);
    for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", sum[i]);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(hex, known[i].sha256) == 0) return known[i].id;
    return QVL__TEMPLATE_UNKNOWN;
}

const char *qvl__template_name(qvl__template t) {
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].id == t) return known[i].name;
    return "unknown";
}

/* ------------------------------------------------------------------------------------------------------ checking */

static const char *type_of(const json_t *v) {
    if (!v) return "missing";
    switch (json_typeof(v)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "an array";
    case JSON_STRING: return "a string";
    case JSON_INTEGER:
    case JSON_REAL: return "a number";
    case JSON_NULL: return "null";
    default: return "true or false";
    }
}

static bool given(const json_t *v) { return v && !json_is_null(v); }

static bool string_is(const json_t *v, const char *s) { /* strings may hold \0 */
    return json_is_string(v) && json_string_length(v) == strlen(s) && memcmp(json_string_value(v), s, strlen(s)) == 0;
}
static bool type_is(const json_t *part, const char *type) { return string_is(json_object_get(part, "type"), type); }
static bool role_is(const json_t *messages, size_t i, const char *role) {
    return string_is(json_object_get(json_array_get(messages, i), "role"), role);
}

/* The templates' own tests: content.type == 'image' or 'image' in content or 'image_url' in content. */
static bool is_image(const json_t *part) {
    return type_is(part, "image") || json_object_get(part, "image") || json_object_get(part, "image_url");
}
static bool is_video(const json_t *part) { return type_is(part, "video") || json_object_get(part, "video"); }

static int check_part(const json_t *part, size_t m, size_t i) {
    if (!json_is_object(part))
        return qvl__fail(QVL_EINVAL, "messages[%zu].content[%zu]: a part must be an object like {\"type\": \"text\", \"text\": ...}, "
                         "not %s", m, i, type_of(part));
    const json_t *type = json_object_get(part, "type"), *text = json_object_get(part, "text");
    if (given(type) && !json_is_string(type))
        return qvl__fail(QVL_EINVAL, "messages[%zu].content[%zu].type: must be a string, not %s", m, i, type_of(type));
    bool visual = is_image(part) || is_video(part);
    if (text && !json_is_string(text) && !(visual && json_is_null(text)))
        return qvl__fail(QVL_EINVAL, "messages[%zu].content[%zu].text: must be a string, not %s", m, i, type_of(text));
    if (visual || text) return 0;
    const char *name = given(type) ? json_string_value(type) : "";
    if (type_is(part, "text") || type_is(part, "image_url"))
        return qvl__fail(QVL_EINVAL, "messages[%zu].content[%zu]: a part of type \"%s\" needs the key \"%s\"", m, i, name, name);
    return qvl__fail(QVL_EINVAL, "messages[%zu].content[%zu]: a part must be text, image, image_url or video, not \"%s\"", m, i,
                     name);
}

/* jinja's truth of a JSON value: null, false, 0, "", [] and {} are false. */
static bool truthy(const json_t *v) {
    if (!v) return false;
    switch (json_typeof(v)) {
    case JSON_OBJECT: return json_object_size(v) > 0;
    case JSON_ARRAY: return json_array_size(v) > 0;
    case JSON_STRING: return json_string_length(v) > 0;
    case JSON_INTEGER: return json_integer_value(v) != 0;
    case JSON_REAL: return json_real_value(v) != 0;
    case JSON_TRUE: return true;
    default: return false;
    }
}

/* The object that holds name and arguments: {"function": {...}} as OpenAI sends it, or flat. */
static const json_t *call_function(const json_t *call) {
    const json_t *f = json_object_get(call, "function");
    return truthy(f) ? f : call;
}

static int check_tool_call(const json_t *call, size_t m, size_t i) {
    if (!json_is_object(call))
        return qvl__fail(QVL_EINVAL, "messages[%zu].tool_calls[%zu]: must be an object, not %s", m, i, type_of(call));
    const json_t *f = call_function(call);
    if (!json_is_object(f))
        return qvl__fail(QVL_EINVAL, "messages[%zu].tool_calls[%zu].function: must be an object, not %s", m, i, type_of(f));
    const char *in = f == call ? "" : ".function";
    const json_t *name = json_object_get(f, "name");
    if (!json_is_string(name))
        return qvl__fail(QVL_EINVAL, "messages[%zu].tool_calls[%zu]%s.name: must be a string, is %s", m, i, in, type_of(name));
    if (!json_object_get(f, "arguments"))
        return qvl__fail(QVL_EINVAL, "messages[%zu].tool_calls[%zu]%s.arguments: missing; give an object or its JSON text", m, i,
                         in);
    return 0;
}

static int check_message(const json_t *message, size_t m) {
    if (!json_is_object(message))
        return qvl__fail(QVL_EINVAL, "messages[%zu]: must be an object, not %s", m, type_of(message));
    const json_t *role = json_object_get(message, "role");
    if (!json_is_string(role))
        return qvl__fail(QVL_EINVAL, "messages[%zu].role: must be \"system\", \"user\", \"assistant\" or \"tool\", is %s",
                         m, type_of(role));
    const json_t *content = json_object_get(message, "content");
    if (given(content) && !json_is_string(content) && !json_is_array(content))
        return qvl__fail(QVL_EINVAL, "messages[%zu].content: must be a string, null or an array of parts, not %s", m,
                         type_of(content));
    for (size_t i = 0; i < json_array_size(content); i++) {
        int rc = check_part(json_array_get(content, i), m, i);
        if (rc < 0) return rc;
    }
    if (!string_is(role, "assistant")) return 0;
    const json_t *reasoning = json_object_get(message, "reasoning_content"), *calls = json_object_get(message, "tool_calls");
    if (given(reasoning) && !json_is_string(reasoning))
        return qvl__fail(QVL_EINVAL, "messages[%zu].reasoning_content: must be a string or null, not %s", m, type_of(reasoning));
    if (given(calls) && !json_is_array(calls))
        return qvl__fail(QVL_EINVAL, "messages[%zu].tool_calls: must be an array or null, not %s", m, type_of(calls));
    for (size_t i = 0; i < json_array_size(calls); i++) {
        int rc = check_tool_call(json_array_get(calls, i), m, i);
        if (rc < 0) return rc;
    }
    return 0;
}

static int check(const json_t *messages, const json_t *tools) {
    if (!json_is_array(messages))
        return qvl__fail(QVL_EINVAL, "messages: must be an array of objects, not %s", type_of(messages));
    if (json_array_size(messages) == 0) return qvl__fail(QVL_EINVAL, "messages: is empty; at least one message is needed");
    for (size_t m = 0; m < json_array_size(messages); m++) {
        int rc = check_message(json_array_get(messages, m), m);
        if (rc < 0) return rc;
    }
    if (!given(tools)) return 0;
    if (!json_is_array(tools)) return qvl__fail(QVL_EINVAL, "tools: must be an array of objects, not %s", type_of(tools));
    for (size_t i = 0; i < json_array_size(tools); i++)
        if (!json_is_object(json_array_get(tools, i)))
            return qvl__fail(QVL_EINVAL, "tools[%zu]: must be an object, not %s", i, type_of(json_array_get(tools, i)));
    return 0;
}

/* ------------------------------------------------------------------------------------------------------ segments */

/* Appends a segment for the bytes of text from start on; neighbours of one plain kind become one. */
static void add_segment(qvl__chat *c, qvl__segment s) {
    s.end = c->text.len;
    if (c->text.failed || s.end == s.start) return;
    qvl__segment *last = c->n ? &c->seg[c->n - 1] : NULL;
    if (last && last->kind == s.kind && (s.kind == QVL__SEG_TEMPLATE || s.kind == QVL__SEG_USER)) {
        last->end = s.end;
        return;
    }
    if (c->n == c->cap) {
        size_t cap = c->cap ? 2 * c->cap : 16;
        qvl__segment *p = qvl__array(c->seg, cap, sizeof *p);
        if (!p) {
            c->text.failed = true; /* the one flag that the end of rendering looks at */
            return;
        }
        c->seg = p;
        c->cap = cap;
    }
    c->seg[c->n++] = s;
}

static void add(qvl__chat *c, qvl__segment_kind kind, const char *text, size_t n) {
    qvl__segment s = {.kind = kind, .start = c->text.len};
    qvl__buf_add(&c->text, text, n);
    add_segment(c, s);
}
static void literal(qvl__chat *c, const char *text) { add(c, QVL__SEG_TEMPLATE, text, strlen(text)); }
static void sent(qvl__chat *c, const json_t *v) { add(c, QVL__SEG_USER, json_string_value(v), json_string_length(v)); }
static void sent_json(qvl__chat *c, const json_t *v) {
    qvl__segment s = {.kind = QVL__SEG_USER, .start = c->text.len};
    qvl__messages_dump(&c->text, v);
    add_segment(c, s);
}

/* Bytes [start, end) of another chat with their segments. The borders are ends of tags or of newlines, none of which
 * can lie inside a placeholder, so image and video segments are taken or left whole. */
static void add_range(qvl__chat *c, const qvl__chat *from, size_t start, size_t end) {
    for (size_t i = 0; i < from->n; i++) {
        qvl__segment s = from->seg[i];
        size_t a = s.start > start ? s.start : start, b = s.end < end ? s.end : end;
        if (a >= b) continue;
        s.start = c->text.len;
        qvl__buf_add(&c->text, from->text.data + a, b - a);
        add_segment(c, s);
    }
    if (from->text.failed) c->text.failed = true;
}

static void clear(qvl__chat *c) {
    c->text.len = 0;
    c->n = 0;
    qvl__buf_add(&c->text, "", 0); /* so that text.data is never NULL */
}

void qvl__chat_free(qvl__chat *c) {
    qvl__buf_free(&c->text);
    qvl__free(c->seg);
    *c = (qvl__chat){0};
}

/* --------------------------------------------------------------------------------------------------------- bodies */

typedef struct {
    qvl__template template_;
    const json_t *messages, *tools;
    bool vision_id, markdown;
    int images, videos; /* image_count.value, video_count.value */
} render;

/* How a body is rendered: Instruct leaves images out of system and assistant turns; Thinking's first look at the
 * system message shows them but does not count them. */
enum { TEXT_ONLY, VISUALS, VISUALS_UNCOUNTED };

static void add_visual(render *r, qvl__chat *c, int how, qvl__segment s) {
    bool video = s.kind == QVL__SEG_VIDEO;
    int *count = video ? &r->videos : &r->images;
    if (how == VISUALS) ++*count;
    if (r->vision_id) {
        char id[32];
        snprintf(id, sizeof id, "%s %d: ", video ? "Video" : "Picture", *count);
        literal(c, id);
    }
    s.start = c->text.len;
    qvl__buf_puts(&c->text, video ? VIDEO_TEXT : IMAGE_TEXT);
    add_segment(c, s);
}

/* A string that may hold ![alt](data:image/TYPE;base64,DATA). alt has no brackets; the header before the comma is short
 * and ends in ;base64; all up to the next ) is data. Anything less stays text. One pass: the brackets are visited once
 * and the next ) is looked up only when the last one found was passed. */
static void add_markdown(render *r, qvl__chat *c, size_t message, const char *text, size_t n) {
    static const char scheme[] = "(data:image/";
    enum { HEADER_MAX = 256, SCHEME = sizeof scheme - 1 };
    size_t done = 0, open = n, close = 0; /* open: the ! of the candidate, n when there is none */
    for (size_t i = 0; i < n; i++) {
        if (text[i] == '[') {
            open = i > done && text[i - 1] == '!' ? i - 1 : n;
            continue;
        }
        if (text[i] != ']') continue;
        size_t bang = open;
        open = n;
        if (bang == n || n - i - 1 < SCHEME || strncasecmp(text + i + 1, scheme, SCHEME) != 0) continue;
        size_t uri = i + 2;
        if (close < uri) {
            const char *p = memchr(text + uri, ')', n - uri);
            if (!p) break; /* no image can be complete any more */
            close = (size_t)(p - text);
        }
        size_t header = close - uri < HEADER_MAX ? close - uri : HEADER_MAX;
        const char *comma = memchr(text + uri, ',', header);
        if (!comma || comma - (text + uri) < 7 || strncasecmp(comma - 7, ";base64", 7) != 0) continue;
        add(c, QVL__SEG_USER, text + done, bang - done);
        qvl__segment s = {.kind = QVL__SEG_IMAGE, .message = message, .item = QVL__NO_ITEM};
        s.uri = text + uri;
        s.uri_len = close - uri;
        add_visual(r, c, VISUALS, s);
        done = close + 1;
        i = close;
    }
    add(c, QVL__SEG_USER, text + done, n - done);
}

static void add_body(render *r, qvl__chat *c, size_t message, int how) {
    const json_t *content = json_object_get(json_array_get(r->messages, message), "content");
    if (json_is_string(content)) {
        if (r->markdown && role_is(r->messages, message, "user"))
            add_markdown(r, c, message, json_string_value(content), json_string_length(content));
        else
            sent(c, content);
        return;
    }
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *part = json_array_get(content, i), *text = json_object_get(part, "text");
        qvl__segment s = {.kind = is_image(part) ? QVL__SEG_IMAGE : QVL__SEG_VIDEO, .part = part, .message = message, .item = i};
        if (how != TEXT_ONLY && (is_image(part) || is_video(part))) add_visual(r, c, how, s);
        else if (json_is_string(text)) sent(c, text);
    }
}

/* ---------------------------------------------------------------------------------------------- common to all three */

/* The system turn at the top, with or without tools. */
static void add_head(render *r, qvl__chat *c) {
    bool system = role_is(r->messages, 0, "system");
    int how = r->template_ == QVL__TEMPLATE_INSTRUCT   ? TEXT_ONLY
              : r->template_ == QVL__TEMPLATE_THINKING ? VISUALS_UNCOUNTED
                                                       : VISUALS;
    if (!truthy(r->tools)) {
        if (!system) return;
        literal(c, "<|im_start|>system\n");
        add_body(r, c, 0, how);
        literal(c, "<|im_end|>\n");
        return;
    }
    literal(c, "<|im_start|>system\n");
    if (system) {
        add_body(r, c, 0, how);
        literal(c, "\n\n");
    }
    literal(c, "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
               "signatures within <tools></tools> XML tags:\n<tools>");
    for (size_t i = 0; i < json_array_size(r->tools); i++) {
        literal(c, "\n");
        sent_json(c, json_array_get(r->tools, i));
    }
    literal(c, "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
               "<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n"
               "</tool_call><|im_end|>\n");
}

/* newline: whether the first call is set off from text before it. */
static void add_tool_calls(qvl__chat *c, const json_t *message, bool newline) {
    const json_t *calls = json_object_get(message, "tool_calls");
    for (size_t i = 0; i < json_array_size(calls); i++) {
        const json_t *f = call_function(json_array_get(calls, i)), *arguments = json_object_get(f, "arguments");
        if (i > 0 || newline) literal(c, "\n");
        literal(c, "<tool_call>\n{\"name\": \"");
        sent(c, json_object_get(f, "name"));
        literal(c, "\", \"arguments\": ");
        if (json_is_string(arguments)) sent(c, arguments);
        else sent_json(c, arguments);
        literal(c, "}\n</tool_call>");
    }
}

/* Tool answers in a row share one user turn. */
static void open_tool(const render *r, qvl__chat *c, size_t i) {
    if (i == 0 || !role_is(r->messages, i - 1, "tool")) literal(c, "<|im_start|>user");
    literal(c, "\n<tool_response>\n");
}
static void close_tool(const render *r, qvl__chat *c, size_t i) {
    literal(c, "\n</tool_response>");
    if (i + 1 == json_array_size(r->messages) || !role_is(r->messages, i + 1, "tool")) literal(c, "<|im_end|>\n");
}

/* ------------------------------------------------------------------------------------------- Instruct and qvl-tiny */

static void add_plain(render *r, qvl__chat *c) {
    for (size_t i = 0; i < json_array_size(r->messages); i++) {
        const json_t *message = json_array_get(r->messages, i);
        if (role_is(r->messages, i, "user")) {
            literal(c, "<|im_start|>user\n");
            add_body(r, c, i, VISUALS);
            literal(c, "<|im_end|>\n");
        } else if (role_is(r->messages, i, "assistant")) {
            literal(c, "<|im_start|>assistant\n");
            add_body(r, c, i, r->template_ == QVL__TEMPLATE_INSTRUCT ? TEXT_ONLY : VISUALS);
            add_tool_calls(c, message, truthy(json_object_get(message, "content")));
            literal(c, "<|im_end|>\n");
        } else if (role_is(r->messages, i, "tool")) {
            open_tool(r, c, i);
            add_body(r, c, i, VISUALS);
            close_tool(r, c, i);
        }
    }
}

/* -------------------------------------------------------------------------------------------------------- Thinking */

static bool has_prefix(const qvl__buf *b, const char *s) { return b->len >= strlen(s) && memcmp(b->data, s, strlen(s)) == 0; }
static bool has_suffix(const qvl__buf *b, const char *s) {
    return b->len >= strlen(s) && memcmp(b->data + b->len - strlen(s), s, strlen(s)) == 0;
}

/* The last user message that is not a tool response in disguise: reasoning before it is history and left out. */
static size_t last_query(render *r, qvl__chat *body) {
    size_t n = json_array_size(r->messages);
    render look = *r; /* this look counts nothing */
    for (size_t i = n; i-- > 0;) {
        if (!role_is(r->messages, i, "user")) continue;
        clear(body);
        add_body(&look, body, i, VISUALS_UNCOUNTED);
        if (!(has_prefix(&body->text, "<tool_response>") && has_suffix(&body->text, "</tool_response>"))) return i;
    }
    return n - 1;
}

typedef struct {
    size_t start, end;
} range;

static const char *find(const char *text, range in, const char *tag) {
    return in.start < in.end ? memmem(text + in.start, in.end - in.start, tag, strlen(tag)) : NULL;
}
/* Where the text after the last tag begins; in.start when there is none: Python's split(tag)[-1]. */
static size_t after_last(const char *text, range in, const char *tag) {
    const size_t n = strlen(tag);
    for (size_t end = in.end; end >= in.start + n; end--)
        if (memcmp(text + end - n, tag, n) == 0) return end;
    return in.start;
}
static void lstrip(const char *text, range *in) {
    while (in->start < in->end && text[in->start] == '\n') in->start++;
}
static void rstrip(const char *text, range *in) {
    while (in->end > in->start && text[in->end - 1] == '\n') in->end--;
}

static void add_thinking_assistant(qvl__chat *c, const qvl__chat *body, const json_t *message, bool after_query, bool last) {
    const char *text = body->text.data;
    const json_t *given_reasoning = json_object_get(message, "reasoning_content");
    range content = {0, body->text.len}, reasoning = {0, 0};
    const char *end_think = find(text, content, "</think>");
    if (json_is_string(given_reasoning)) {
        text = json_string_value(given_reasoning);
        reasoning.end = json_string_length(given_reasoning);
    } else if (end_think) {
        reasoning.end = (size_t)(end_think - text);
        rstrip(text, &reasoning);
        reasoning.start = after_last(text, reasoning, "<think>");
        lstrip(text, &reasoning);
        content.start = after_last(text, content, "</think>");
        lstrip(text, &content);
    }
    bool newline = content.start < content.end; /* before the first tool call: content as it is before the next lstrip */
    literal(c, "<|im_start|>assistant\n");
    if (after_query && (last || reasoning.start < reasoning.end)) {
        lstrip(text, &reasoning);
        rstrip(text, &reasoning);
        literal(c, "<think>\n");
        if (text == body->text.data) add_range(c, body, reasoning.start, reasoning.end);
        else add(c, QVL__SEG_USER, text + reasoning.start, reasoning.end - reasoning.start);
        literal(c, "\n</think>\n\n");
        lstrip(body->text.data, &content);
    }
    add_range(c, body, content.start, content.end);
    add_tool_calls(c, message, newline);
    literal(c, "<|im_end|>\n");
}

static void add_thinking(render *r, qvl__chat *c, qvl__chat *body) {
    size_t n = json_array_size(r->messages), query = last_query(r, body);
    for (size_t i = 0; i < n; i++) {
        /* Every message is rendered, shown or not: dropped ones and the system message at the top, shown before, count
         * their images here. */
        clear(body);
        add_body(r, body, i, VISUALS);
        if (body->text.failed) return;
        if (role_is(r->messages, i, "user") || (role_is(r->messages, i, "system") && i > 0)) {
            literal(c, role_is(r->messages, i, "user") ? "<|im_start|>user\n" : "<|im_start|>system\n");
            add_range(c, body, 0, body->text.len);
            literal(c, "<|im_end|>\n");
        } else if (role_is(r->messages, i, "assistant")) {
            add_thinking_assistant(c, body, json_array_get(r->messages, i), i > query, i + 1 == n);
        } else if (role_is(r->messages, i, "tool")) {
            open_tool(r, c, i);
            add_range(c, body, 0, body->text.len);
            close_tool(r, c, i);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------ all */

int qvl__chat_render(qvl__chat *out, qvl__template t, const json_t *messages, const json_t *tools, bool add_generation_prompt,
                     bool add_vision_id, bool markdown) {
    *out = (qvl__chat){0};
    if (t == QVL__TEMPLATE_UNKNOWN)
        return qvl__fail(QVL_EUNSUPPORTED, "the checkpoint has no chat template, or one that this library does not know (it knows Qwen3-VL "
                         "Instruct, Thinking and qvl-tiny); if it renders like one of them, say so when loading: option chat_template=instruct|"
                         "thinking|qvl-tiny");
    int rc = check(messages, tools);
    if (rc < 0) return rc;
    render r = {.template_ = t, .messages = messages, .tools = tools, .vision_id = add_vision_id, .markdown = markdown};
    clear(out);
    add_head(&r, out);
    if (t == QVL__TEMPLATE_THINKING) {
        qvl__chat body = {0};
        add_thinking(&r, out, &body);
        if (body.text.failed) out->text.failed = true;
        qvl__chat_free(&body);
    } else {
        add_plain(&r, out);
    }
    if (add_generation_prompt) literal(out, "<|im_start|>assistant\n");
    if (add_generation_prompt && t == QVL__TEMPLATE_THINKING) literal(out, "<think>\n");
    if (!out->text.failed) return 0;
    qvl__chat_free(out);
    return QVL_ENOMEM; /* the message was set where memory ran out */
}
