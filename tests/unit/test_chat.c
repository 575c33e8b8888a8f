/* test_chat.c - the chat templates: text, segments, tokens, safety, bad input.
 *
 * Goldens: tests/golden/templates/cases.jsonl (transformers 5.23, real tokenizer), jinja_cases.jsonl (jinja2, make.py).
 */
#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
/* cmocka.h needs the four above */
#include <cmocka.h>

#include "../../libqvl/encode/encode.h"

#define TEMPLATES "tests/golden/templates/"
#define REAL_TOKENIZER "build/golden/qwen3-tokenizer" /* unpacked by tests/golden/unpack.py */

static const qvl__template all[] = {QVL__TEMPLATE_INSTRUCT, QVL__TEMPLATE_THINKING, QVL__TEMPLATE_TINY};
static qvl_tokenizer *real;

static int load_real(void **state) {
    (void)state;
    if (qvl__tokenizer_load(&real, REAL_TOKENIZER) == 0) return 0;
    print_error("%s\n(tests/golden/unpack.py makes %s)\n", qvl_last_error(), REAL_TOKENIZER);
    return -1;
}
static int free_real(void **state) {
    (void)state;
    qvl__tokenizer_free(real);
    return 0;
}

static char *slurp(const char *path, size_t *n) {
    char *text;
    if (qvl__read_file(path, 1 << 24, &text, n) < 0) fail_msg("%s", qvl_last_error());
    return text;
}

/* Calls fn with every line of a file of JSON lines; returns their number. */
static int each_line(const char *path, void (*fn)(const json_t *c)) {
    size_t n;
    char *text = slurp(path, &n);
    int lines = 0;
    for (char *p = text, *end; p < text + n; p = end + 1) {
        end = memchr(p, '\n', (size_t)(text + n - p));
        if (!end) end = text + n;
        json_t *c;
        assert_int_equal(qvl__messages_parse(&c, p, (size_t)(end - p), path), 0);
        fn(c);
        json_decref(c);
        lines++;
    }
    qvl__free(text);
    return lines;
}

/* JSON text in which ' may stand for " (no text here needs a real '). */
static json_t *json(const char *text) {
    json_t *v;
    if (!text) return NULL;
    char *copy = qvl__strndup(text, strlen(text));
    for (char *p = copy; *p; p++)
        if (*p == '\'') *p = '"';
    if (qvl__messages_parse(&v, copy, strlen(copy), "test") < 0) fail_msg("%s in %s", qvl_last_error(), copy);
    qvl__free(copy);
    return v;
}

/* Renders messages written as JSON text; the text is left in c. */
static int render(qvl__chat *c, qvl__template t, const char *messages, const char *tools, bool markdown, json_t **keep) {
    json_t *m = json(messages), *tl = json(tools);
    int rc = qvl__chat_render(c, t, m, tl, true, false, markdown);
    json_decref(tl);
    if (keep) *keep = m;
    else json_decref(m);
    return rc;
}

/* ------------------------------------------------------------------------------------------------------ recognition */

static void recognises(void **state) {
    (void)state;
    const struct {
        const char *path;
        qvl__template t;
        const char *name;
    } files[] = {{TEMPLATES "chat_template_instruct.jinja", QVL__TEMPLATE_INSTRUCT, "instruct"},
                 {TEMPLATES "chat_template_thinking.jinja", QVL__TEMPLATE_THINKING, "thinking"},
                 {"examples/models/qvl-tiny/chat_template.json", QVL__TEMPLATE_TINY, "qvl-tiny"}};
    for (int i = 0; i < 3; i++) {
        size_t n;
        char *text = slurp(files[i].path, &n);
        if (strstr(files[i].path, ".json")) {
            json_t *v;
            assert_int_equal(qvl__json_parse(&v, text, n, files[i].path), 0);
            qvl__free(text);
            const json_t *own = json_object_get(v, "chat_template");
            n = json_string_length(own);
            text = qvl__strndup(json_string_value(own), n);
            json_decref(v);
        }
        assert_int_equal(qvl__template_recognise(text, n), files[i].t);
        assert_string_equal(qvl__template_name(files[i].t), files[i].name);
        while (text[n - 1] == '\n') n--;
        assert_int_equal(qvl__template_recognise(text, n), files[i].t); /* without its newline */
        assert_int_equal(qvl__template_recognise(text, n - 1), QVL__TEMPLATE_UNKNOWN);
        text[n / 2] ^= 1;
        assert_int_equal(qvl__template_recognise(text, n), QVL__TEMPLATE_UNKNOWN);
        qvl__free(text);
    }
    assert_int_equal(qvl__template_recognise("", 0), QVL__TEMPLATE_UNKNOWN);
    assert_string_equal(qvl__template_name(QVL__TEMPLATE_UNKNOWN), "unknown");
    qvl__chat c;
    assert_int_equal(render(&c, QVL__TEMPLATE_UNKNOWN, "[{'role':'user','content':'x'}]", NULL, true, NULL), QVL_EUNSUPPORTED);
    assert_non_null(strstr(qvl_last_error(), "chat_template"));
}

/* ---------------------------------------------------------------------------------------------------- text and tokens */

/* Segments cover the text without gaps, and placeholders are what they say. */
static void check_segments(const qvl__chat *c) {
    size_t at = 0;
    for (size_t i = 0; i < c->n; i++) {
        const qvl__segment *s = &c->seg[i];
        assert_true(s->start == at && s->end > at);
        at = s->end;
        static const char *const pads[] = {[QVL__SEG_IMAGE] = "<|vision_start|><|image_pad|><|vision_end|>",
                                           [QVL__SEG_VIDEO] = "<|vision_start|><|video_pad|><|vision_end|>"};
        if (s->kind != QVL__SEG_IMAGE && s->kind != QVL__SEG_VIDEO) continue;
        assert_true(s->end - s->start == strlen(pads[s->kind]));
        assert_memory_equal(c->text.data + s->start, pads[s->kind], s->end - s->start);
    }
    assert_true(at == c->text.len);
}

static void expect_text(const qvl__chat *c, const json_t *want, const char *name, const char *template_) {
    if (c->text.len == json_string_length(want) && memcmp(c->text.data, json_string_value(want), c->text.len) == 0) return;
    fail_msg("%s %s:\ngot  %s\nwant %s", name, template_, c->text.data, json_string_value(want));
}

/* The tokens of a chat: control tokens in all segments but USER ones. */
static void tokenize(const qvl__chat *c, int32_t **ids, size_t *n) {
    qvl__span *spans = test_calloc(c->n + 1, sizeof *spans);
    size_t k = 0;
    for (size_t i = 0; i < c->n; i++) {
        const qvl__segment *s = &c->seg[i];
        if (s->kind == QVL__SEG_USER) continue;
        if (k && spans[k - 1].end == s->start) spans[k - 1].end = s->end;
        else spans[k++] = (qvl__span){s->start, s->end};
    }
    assert_int_equal(qvl__tokenize_spans(real, c->text.data, c->text.len, spans, k, ids, n), 0);
    test_free(spans);
}

/* The 26 added tokens of Qwen3. */
static const char *const controls[] = {
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"};
enum { CONTROLS = sizeof controls / sizeof *controls, FIRST_CONTROL = 151643 };

static bool user_text_has_control(const qvl__chat *c) {
    for (size_t i = 0; i < c->n; i++)
        for (int k = 0; k < CONTROLS && c->seg[i].kind == QVL__SEG_USER; k++)
            if (memmem(c->text.data + c->seg[i].start, c->seg[i].end - c->seg[i].start, controls[k], strlen(controls[k])))
                return true;
    return false;
}

/* Control tokens in TEMPLATE, IMAGE and VIDEO segments. */
static int template_controls(const qvl__chat *c) {
    int found = 0;
    for (size_t i = 0; i < c->n; i++) {
        const char *p = c->text.data + c->seg[i].start, *end = c->text.data + c->seg[i].end;
        for (; c->seg[i].kind != QVL__SEG_USER && p < end; p++)
            for (int k = 0; k < CONTROLS; k++)
                found += (size_t)(end - p) >= strlen(controls[k]) && memcmp(p, controls[k], strlen(controls[k])) == 0;
    }
    return found;
}

static int cases_plain, cases_with_controls;

static bool flag(const json_t *v, const char *name) { return json_is_true(json_object_get(v, name)); }

static void golden_case(const json_t *c) {
    const json_t *o = json_object_get(c, "options");
    const char *name = json_string_value(json_object_get(c, "name"));
    for (int t = 0; t < 2; t++) {
        const char *tn = qvl__template_name(all[t]);
        const json_t *want = json_object_get(c, tn), *want_ids = json_object_get(want, "ids");
        qvl__chat chat;
        int rc = qvl__chat_render(&chat, all[t], json_object_get(c, "messages"), json_object_get(c, "tools"),
                                  flag(o, "add_generation_prompt"), flag(o, "add_vision_id"), false);
        if (rc < 0) fail_msg("%s %s: %s", name, tn, qvl_last_error());
        expect_text(&chat, json_object_get(want, "text"), name, tn);
        check_segments(&chat);
        int32_t *ids;
        size_t n;
        /* with every added token parsed, the published text gives the published ids */
        assert_int_equal(qvl_tokenize(real, chat.text.data, chat.text.len, 1, &ids, &n), 0);
        assert_true(n == json_array_size(want_ids));
        for (size_t i = 0; i < n; i++) assert_int_equal(ids[i], json_integer_value(json_array_get(want_ids, i)));
        qvl__free(ids);
        /* and so it does with only the template's own, where nothing that was sent looks like one */
        tokenize(&chat, &ids, &n);
        if (!user_text_has_control(&chat)) {
            cases_plain++;
            assert_true(n == json_array_size(want_ids));
            for (size_t i = 0; i < n; i++) assert_int_equal(ids[i], json_integer_value(json_array_get(want_ids, i)));
        } else {
            int got = 0;
            cases_with_controls++;
            for (size_t i = 0; i < n; i++) got += ids[i] >= FIRST_CONTROL;
            assert_int_equal(got, template_controls(&chat));
        }
        qvl__free(ids);
        qvl__chat_free(&chat);
    }
}

static void goldens(void **state) {
    (void)state;
    assert_int_equal(each_line(TEMPLATES "cases.jsonl", golden_case), 75);
    assert_int_equal(cases_plain + cases_with_controls, 150);
    assert_true(cases_with_controls > 4);
    print_message("75 cases x 2 templates: text and ids equal; %d of them by spans too, %d have control tokens in user text\n",
                  cases_plain, cases_with_controls);
}

static int jinja_texts;

static void jinja_case(const json_t *c) {
    const char *name = json_string_value(json_object_get(c, "name"));
    for (int t = 0; t < 3; t++) {
        const json_t *want = json_object_get(json_object_get(c, "text"), qvl__template_name(all[t]));
        if (!want) continue;
        qvl__chat chat;
        int rc = qvl__chat_render(&chat, all[t], json_object_get(c, "messages"), json_object_get(c, "tools"),
                                  flag(c, "add_generation_prompt"), flag(c, "add_vision_id"), false);
        if (rc < 0) fail_msg("%s: %s", name, qvl_last_error());
        expect_text(&chat, want, name, qvl__template_name(all[t]));
        check_segments(&chat);
        qvl__chat_free(&chat);
        jinja_texts++;
    }
}

static void equal_to_jinja(void **state) {
    (void)state;
    assert_int_equal(each_line(TEMPLATES "jinja_cases.jsonl", jinja_case), 295);
    assert_int_equal(jinja_texts, 75 + 3 * 220);
}

/* ---------------------------------------------------------------------------------------------------------- law 8 */

/* A conversation with %s in every place that a sender controls. The last user turn makes Thinking keep the structure. */
static const char *const places[][2] = {
    {"[{'role':'user','content':'a%sb'}]", NULL},
    {"[{'role':'user','content':'%s'}]", NULL},
    {"[{'role':'user','content':[{'type':'text','text':'%s'},{'type':'text','text':'x'}]}]", NULL},
    {"[{'role':'system','content':'%s'},{'role':'user','content':'q'}]", NULL},
    {"[{'role':'system','content':[{'type':'text','text':'%s'}]},{'role':'user','content':'q'}]", "[{'name':'f'}]"},
    {"[{'role':'user','content':'q'},{'role':'assistant','content':'%s'},{'role':'user','content':'r'}]", NULL},
    {"[{'role':'user','content':'q'},{'role':'assistant','content':'c','reasoning_content':'%s'}]", NULL},
    {"[{'role':'user','content':'q'},{'role':'assistant','content':'','tool_calls':[{'name':'%s','arguments':{}}]}]", NULL},
    {"[{'role':'user','content':'q'},{'role':'assistant','tool_calls':[{'function':{'name':'f','arguments':{'k':'%s'}}}]}]",
     NULL},
    {"[{'role':'user','content':'q'},{'role':'assistant','tool_calls':[{'function':{'name':'f','arguments':{'%s':1}}}]}]", NULL},
    {"[{'role':'user','content':'q'},{'role':'assistant','tool_calls':[{'name':'f','arguments':'%s'}]}]", NULL},
    {"[{'role':'user','content':'q'},{'role':'tool','content':'%s'}]", NULL},
    {"[{'role':'user','content':'q'},{'role':'tool','content':[{'type':'text','text':'%s'}]}]", NULL},
    {"[{'role':'user','content':'q'}]", "[{'name':'%s','parameters':{}}]"},
    {"[{'role':'user','content':'q'}]", "[{'name':'f','parameters':{'%s':['%s']}}]"},
    {"[{'role':'%s','content':'dropped'},{'role':'user','content':'q'}]", NULL},
};
enum { PLACES = sizeof places / sizeof *places };

static char *put(const char *pattern, const char *what) {
    if (!pattern) return NULL;
    qvl__buf b = {0};
    for (const char *p; (p = strstr(pattern, "%s")); pattern = p + 2) {
        qvl__buf_add(&b, pattern, (size_t)(p - pattern));
        qvl__buf_puts(&b, what);
    }
    qvl__buf_puts(&b, pattern);
    return b.data;
}

/* How often each control token comes out of the tokenizer. */
static void count_controls(qvl__template t, int place, const char *what, int counts[CONTROLS]) {
    char *messages = put(places[place][0], what), *tools = put(places[place][1], what);
    qvl__chat c;
    int32_t *ids;
    size_t n;
    if (render(&c, t, messages, tools, true, NULL) < 0) fail_msg("%s: %s", messages, qvl_last_error());
    tokenize(&c, &ids, &n);
    memset(counts, 0, CONTROLS * sizeof *counts);
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= FIRST_CONTROL) counts[ids[i] - FIRST_CONTROL]++;
    qvl__free(ids);
    qvl__chat_free(&c);
    qvl__free(messages);
    qvl__free(tools);
}

static void user_text_never_becomes_control(void **state) {
    (void)state;
    for (int k = 0; k < CONTROLS; k++) assert_int_equal(qvl__token_id(real, controls[k]), FIRST_CONTROL + k);
    for (int t = 0; t < 3; t++)
        for (int p = 0; p < PLACES; p++) {
            int want[CONTROLS], got[CONTROLS];
            count_controls(all[t], p, "x", want);
            for (int k = 0; k < CONTROLS; k++) {
                count_controls(all[t], p, controls[k], got);
                if (memcmp(want, got, sizeof want) != 0)
                    fail_msg("%s in place %d of %s became a token", controls[k], p, qvl__template_name(all[t]));
            }
        }
    /* Nor do two pieces that only together look like one. */
    qvl__chat c;
    int32_t *ids;
    size_t n;
    assert_int_equal(render(&c, QVL__TEMPLATE_INSTRUCT,
                            "[{'role':'user','content':[{'type':'text','text':'<|im_'},{'type':'text','text':'start|>'},"
                            "{'type':'image'},{'type':'text','text':'<|im_end|'}]}]",
                            NULL, true, NULL), 0);
    tokenize(&c, &ids, &n);
    int got = 0;
    for (size_t i = 0; i < n; i++) got += ids[i] >= FIRST_CONTROL;
    assert_int_equal(got, 3 + 3); /* im_start, im_end, im_start; the placeholder */
    qvl__free(ids);
    qvl__chat_free(&c);
}

/* ------------------------------------------------------------------------------------------------------- bad input */

#define U "{'role':'user','content':'q'}"
#define CALLS(x) "[" U ",{'role':'assistant','tool_calls':" x "}]"
static const struct {
    const char *messages, *tools, *error;
} bad[] = {
    {"{}", NULL, "messages: must be an array of objects, not an object"},
    {"[]", NULL, "messages: is empty"},
    {"[[]]", NULL, "messages[0]: must be an object, not an array"},
    {"[" U ",'hi']", NULL, "messages[1]: must be an object, not a string"},
    {"[" U ",null]", NULL, "messages[1]: must be an object, not null"},
    {"[{'content':'x'}]", NULL, "messages[0].role: must be \"system\", \"user\", \"assistant\" or \"tool\", is missing"},
    {"[{'role':7,'content':'x'}]", NULL, "messages[0].role: must be"},
    {"[{'role':null,'content':'x'}]", NULL, "is null"},
    {"[" U ",{'role':'user','content':5}]", NULL,
     "messages[1].content: must be a string, null or an array of parts, not a number"},
    {"[{'role':'user','content':{'type':'text'}}]", NULL,
     "messages[0].content: must be a string, null or an array of parts, not an object"},
    {"[{'role':'user','content':true}]", NULL,
     "messages[0].content: must be a string, null or an array of parts, not true or false"},
    {"[{'role':'user','content':['image']}]", NULL, "messages[0].content[0]: a part must be an object"},
    {"[" U "," U ",{'role':'tool','content':[{'text':'a'},3]}]", NULL, "messages[2].content[1]: a part must be an object"},
    {"[{'role':'user','content':[{'type':'text'}]}]", NULL,
     "messages[0].content[0]: a part of type \"text\" needs the key \"text\""},
    {"[{'role':'user','content':[{'type':'text','text':null}]}]", NULL,
     "messages[0].content[0].text: must be a string, not null"},
    {"[{'role':'user','content':[{'type':'text','text':[1]}]}]", NULL,
     "messages[0].content[0].text: must be a string, not an array"},
    {"[{'role':'user','content':[{'type':'image_url'}]}]", NULL, "needs the key \"image_url\""},
    {"[{'role':'user','content':[{'type':'input_audio','input_audio':{}}]}]", NULL, "not \"input_audio\""},
    {"[{'role':'user','content':[{}]}]", NULL, "messages[0].content[0]: a part must be text, image, image_url or video"},
    {"[{'role':'user','content':[{'type':3,'text':'x'}]}]", NULL, "messages[0].content[0].type: must be a string, not a number"},
    {"[{'role':'developer','content':[7]}," U "]", NULL, "messages[0].content[0]: a part must be an object"},
    {CALLS("{}"), NULL, "messages[1].tool_calls: must be an array or null, not an object"},
    {CALLS("'f'"), NULL, "messages[1].tool_calls: must be an array or null, not a string"},
    {CALLS("[1]"), NULL, "messages[1].tool_calls[0]: must be an object, not a number"},
    {CALLS("[{'name':'f','arguments':{}},{'function':'f'}]"), NULL,
     "messages[1].tool_calls[1].function: must be an object, not a string"},
    {CALLS("[{'function':{'arguments':{}}}]"), NULL, "messages[1].tool_calls[0].function.name: must be a string, is missing"},
    {CALLS("[{'name':1,'arguments':{}}]"), NULL, "messages[1].tool_calls[0].name: must be a string, is a number"},
    {CALLS("[{'name':'f'}]"), NULL, "messages[1].tool_calls[0].arguments: missing"},
    {CALLS("[{'type':'function','function':{}}]"), NULL, "messages[1].tool_calls[0].name"},
    {"[" U ",{'role':'assistant','content':'a','reasoning_content':[]}]", NULL,
     "messages[1].reasoning_content: must be a string or null"},
    {"[" U "]", "{}", "tools: must be an array of objects, not an object"},
    {"[" U "]", "[{},'f']", "tools[1]: must be an object, not a string"},
    {"[{'role':'user','content':12345678901234567890}]", NULL,
     "messages[0].content: must be a string, null or an array of parts, not a"},
};

static void bad_messages(void **state) {
    (void)state;
    for (int t = 0; t < 3; t++)
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            qvl__chat c;
            int rc = render(&c, all[t], bad[i].messages, bad[i].tools, true, NULL);
            if (rc != QVL_EINVAL) fail_msg("%s %s: %d", bad[i].messages, bad[i].tools ? bad[i].tools : "", rc);
            if (!strstr(qvl_last_error(), bad[i].error))
                fail_msg("%s:\ngot  %s\nwant %s", bad[i].messages, qvl_last_error(), bad[i].error);
            assert_null(c.text.data);
        }
}

/* Shapes that look odd but are what clients send. */
static void odd_but_good(void **state) {
    (void)state;
    static const char *const good[][2] = {
        {"[" U "]", "[]"},
        {"[" U ",{'role':'assistant','content':'a','tool_calls':null,'reasoning_content':null,'refusal':null}]", NULL},
        {"[{'role':'user','content':[{'type':'image_url','image_url':{'url':'data:'},'text':null}]}]", NULL},
        {"[{'role':'user','content':'nul \\u0000 inside'}]", NULL},
        {CALLS("[{'name':'f','arguments':null}]"), NULL},
    };
    for (int t = 0; t < 3; t++)
        for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
            qvl__chat c;
            if (render(&c, all[t], good[i][0], good[i][1], true, NULL) < 0) fail_msg("%s: %s", good[i][0], qvl_last_error());
            check_segments(&c);
            qvl__chat_free(&c);
        }
    /* a role that only begins like a known one is unknown, and dropped */
    qvl__chat c;
    assert_int_equal(render(&c, QVL__TEMPLATE_INSTRUCT, "[{'role':'user\\u0000','content':'x'}]", NULL, true, NULL), 0);
    assert_string_equal(c.text.data, "<|im_start|>assistant\n");
    qvl__chat_free(&c);
}

/* --------------------------------------------------------------------------------------------------------- markdown */

static void markdown_becomes_images(void **state) {
    (void)state;
    /* content, the text it becomes (P for a placeholder), the URIs in it */
    static const struct {
        const char *content, *text, *uris;
    } cases[] = {
        {"![cat](data:image/png;base64,AAAA)", "P", "data:image/png;base64,AAAA "},
        {"see ![a b](data:image/png;base64,QUJD=) ok", "see P ok", "data:image/png;base64,QUJD= "},
        {"![](data:image/jpeg;base64,A)![](data:image/webp;base64,B)", "PP",
         "data:image/jpeg;base64,A data:image/webp;base64,B "},
        {"!![x](DATA:IMAGE/PNG;BASE64,A)!", "!P!", "DATA:IMAGE/PNG;BASE64,A "},
        {"[x](data:image/png;base64,A)", "[x](data:image/png;base64,A)", ""},         /* a link */
        {"![x](data:image/png;base64,A", "![x](data:image/png;base64,A", ""},         /* not closed */
        {"![x](data:image/png,A)", "![x](data:image/png,A)", ""},                     /* not base64 */
        {"![x](http://h/a.png) ![y](data:text/plain;base64,A)", "![x](http://h/a.png) ![y](data:text/plain;base64,A)", ""},
        {"![x] (data:image/png;base64,A)", "![x] (data:image/png;base64,A)", ""},
        {"![a](http://h) [b](data:image/png;base64,A)", "![a](http://h) [b](data:image/png;base64,A)", ""},
        {"![a [b](data:image/png;base64,A)", "![a [b](data:image/png;base64,A)", ""},
        {"![a ![b](data:image/png;base64,A)", "![a P", "data:image/png;base64,A "},
        {"![x](data:image/png;base64,A)(data:image/png;base64,B)]", "P(data:image/png;base64,B)]", "data:image/png;base64,A "},
        {"![x](data:image/", "![x](data:image/", ""},
        {"![", "![", ""},
        {"]", "]", ""},
        {"![图](data:image/png;base64,A)é", "Pé", "data:image/png;base64,A "},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int t = 0; t < 3; t++) {
            qvl__buf m = {0}, got = {0}, uris = {0};
            qvl__buf_puts(&m, "[{\"role\":\"user\",\"content\":");
            qvl__json_quote(&m, cases[i].content, strlen(cases[i].content));
            qvl__buf_puts(&m, "}]");
            json_t *keep;
            qvl__chat c;
            assert_int_equal(render(&c, all[t], m.data, NULL, true, &keep), 0);
            check_segments(&c);
            qvl__buf_puts(&uris, "");
            for (size_t k = 0; k < c.n; k++) {
                const qvl__segment *s = &c.seg[k];
                if (s->kind == QVL__SEG_USER) qvl__buf_add(&got, c.text.data + s->start, s->end - s->start);
                if (s->kind != QVL__SEG_IMAGE) continue;
                assert_null(s->part);
                assert_true(s->message == 0 && s->item == QVL__NO_ITEM);
                qvl__buf_puts(&got, "P");
                qvl__buf_add(&uris, s->uri, s->uri_len);
                qvl__buf_puts(&uris, " ");
            }
            assert_string_equal(got.data, cases[i].text);
            assert_string_equal(uris.data, cases[i].uris);
            qvl__chat_free(&c);
            json_decref(keep);
            /* switched off: text as it is */
            assert_int_equal(render(&c, all[t], m.data, NULL, false, NULL), 0);
            assert_non_null(strstr(c.text.data, cases[i].content));
            qvl__chat_free(&c);
            qvl__buf_free(&m);
            qvl__buf_free(&got);
            qvl__buf_free(&uris);
        }
    /* only in user turns, only in plain strings, and numbered like other pictures */
    qvl__chat c;
    json_t *m = json("[{'role':'system','content':'![](data:image/png;base64,A)'},{'role':'user','content':[{'type':'text',"
                     "'text':'![](data:image/png;base64,A)'},{'type':'image'}]},{'role':'user',"
                     "'content':'![](data:image/png;base64,A)'}]");
    assert_int_equal(qvl__chat_render(&c, QVL__TEMPLATE_INSTRUCT, m, NULL, false, true, true), 0);
    assert_string_equal(c.text.data, "<|im_start|>system\n![](data:image/png;base64,A)<|im_end|>\n"
                                     "<|im_start|>user\n![](data:image/png;base64,A)"
                                     "Picture 1: <|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>user\n"
                                     "Picture 2: <|vision_start|><|image_pad|><|vision_end|><|im_end|>\n");
    qvl__chat_free(&c);
    json_decref(m);
}

/* Megabytes of what a backtracking search would choke on: each must take a fraction of a second. */
static void long_strings_take_linear_time(void **state) {
    (void)state;
    static const char *const units[] = {"![", "![](data:image/", "![](data:image/png;base64,", "![](data:image/png;base64,A)", "](",
                                        "[![x]", "![x](data:image/png)", "<think>", "</think>", "\n"};
    enum { SIZE = 4 << 20 };
    for (size_t u = 0; u < sizeof units / sizeof *units; u++) {
        qvl__buf b = {0};
        while (b.len < SIZE) qvl__buf_puts(&b, units[u]);
        json_t *s = json_stringn(b.data, b.len);
        json_t *m = json_pack("[{s:s,s:O},{s:s,s:O}]", "role", "user", "content", s, "role", "assistant", "content", s);
        assert_non_null(m);
        for (int t = 0; t < 3; t++) {
            qvl__chat c;
            double from = qvl__now_ms();
            assert_int_equal(qvl__chat_render(&c, all[t], m, NULL, true, false, true), 0);
            double ms = qvl__now_ms() - from;
            if (ms > 5000) fail_msg("%d MB of \"%s\" took %.0f ms", SIZE >> 20, units[u], ms);
            check_segments(&c);
            qvl__chat_free(&c);
        }
        json_decref(m);
        json_decref(s);
        qvl__buf_free(&b);
    }
}

/* ----------------------------------------------------------------------------------------------------- big integers */

static void integers_of_any_size(void **state) {
    (void)state;
    static const char *const texts[][2] = {
        {"[9223372036854775807, -9223372036854775808]", "[9223372036854775807, -9223372036854775808]"},
        {"[9223372036854775808,-9223372036854775809]", "[9223372036854775808, -9223372036854775809]"},
        {"{\"a\":{\"b\":[1,123456789012345678901234567890]},\"c\":18446744073709551616}",
         "{\"a\": {\"b\": [1, 123456789012345678901234567890]}, \"c\": 18446744073709551616}"},
        {"[\"99999999999999999999\\\"\", 99999999999999999999, 1.5]",
         "[\"99999999999999999999\\\"\", 99999999999999999999, 1.5]"},
        {"[{\"\\u00ff\": \"1\"}, 99999999999999999999]", "[{\"ÿ\": \"1\"}, 99999999999999999999]"},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        qvl__buf b = {0};
        json_t *v = json(texts[i][0]);
        qvl__messages_dump(&b, v);
        assert_string_equal(b.data, texts[i][1]);
        json_decref(v);
        qvl__buf_free(&b);
    }
    static const char *const wrong[] = {"[99999999999999999999",    "[099999999999999999999]", "[1e999]", "[\"99999999999999999999]",
                                        "[99999999999999999999 \"]", "[--99999999999999999999]", "\"\\"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        json_t *v;
        assert_int_equal(qvl__messages_parse(&v, wrong[i], strlen(wrong[i]), "messages"), QVL_EFORMAT);
        assert_non_null(strstr(qvl_last_error(), "messages"));
    }
}

/* ---------------------------------------------------------------------------------------------------- out of memory */

static int countdown;
static void *failing_malloc(void *ud, size_t n) { (void)ud; return countdown-- > 0 ? malloc(n) : NULL; }
static void *failing_realloc(void *ud, void *p, size_t n) { (void)ud; return countdown-- > 0 ? realloc(p, n) : NULL; }
static void plain_free(void *ud, void *p) { (void)ud; free(p); }

static void memory_may_run_out_anywhere(void **state) {
    (void)state;
    const qvl_allocator a = {sizeof a, NULL, failing_malloc, failing_realloc, plain_free};
    json_t *m = json("[{'role':'user','content':[{'type':'image'},{'type':'text','text':'q'}]},{'role':'assistant','content':"
                     "'<think>r</think>a','tool_calls':[{'name':'f','arguments':{'k':[1]}}]},{'role':'tool','content':'r'}]");
    json_t *tools = json("[{'name':'f','n':99999999999999999999}]");
    for (int t = 0; t < 3; t++)
        for (int k = 0;; k++) {
            qvl__chat c;
            countdown = k;
            assert_int_equal(qvl_set_allocator(&a), 0);
            int rc = qvl__chat_render(&c, all[t], m, tools, true, true, true);
            if (rc == 0) qvl__chat_free(&c);
            assert_int_equal(qvl_set_allocator(NULL), 0);
            if (rc == 0) {
                assert_true(k > 3);
                break;
            }
            assert_int_equal(rc, QVL_ENOMEM);
            assert_true(k < 1000);
        }
    json_decref(m);
    json_decref(tools);
}

int main(void) {
    const struct CMUnitTest without_tokenizer[] = {
        cmocka_unit_test(recognises),
        cmocka_unit_test(equal_to_jinja),
        cmocka_unit_test(bad_messages),
        cmocka_unit_test(odd_but_good),
        cmocka_unit_test(markdown_becomes_images),
        cmocka_unit_test(long_strings_take_linear_time),
        cmocka_unit_test(integers_of_any_size),
        cmocka_unit_test(memory_may_run_out_anywhere),
    };
    const struct CMUnitTest with_tokenizer[] = {
        cmocka_unit_test(goldens),
        cmocka_unit_test(user_text_never_becomes_control),
    };
    int failed = cmocka_run_group_tests(without_tokenizer, NULL, NULL);
    return failed + cmocka_run_group_tests(with_tokenizer, load_real, free_real);
}
