/* Tool calls: every text gives the same content and calls however it is cut, and exactly those that are expected. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../../qvl-serve/reasoning.h"
#include "../../qvl-serve/toolcall.h"

/* The joined result as text: content, then each call as [name](arguments), with ! when it broke off. */
typedef struct {
    buf content, calls;
    int open, next; /* protocol: calls start and end in order, one at a time */
} result;

static void receive(void *ud, const toolcall_event *e) {
    result *r = ud;
    switch (e->type) {
    case TOOLCALL_CONTENT:
        assert_int_equal(r->open, 0);
        assert_true(e->n > 0);
        buf_add(&r->content, e->text, e->n);
        break;
    case TOOLCALL_START:
        assert_int_equal(r->open, 0);
        assert_int_equal(e->index, r->next++);
        assert_int_equal(strncmp(e->id, "call_", 5), 0);
        assert_int_equal(strlen(e->id), 37);
        r->open = 1;
        buf_printf(&r->calls, "[%s](", e->name);
        break;
    case TOOLCALL_ARGUMENTS:
        assert_int_equal(r->open, 1);
        assert_int_equal(e->index, r->next - 1);
        assert_true(e->n > 0);
        buf_add(&r->calls, e->text, e->n);
        break;
    default:
        assert_int_equal(e->type, TOOLCALL_END);
        assert_int_equal(r->open, 1);
        assert_int_equal(e->index, r->next - 1);
        r->open = 0;
        buf_puts(&r->calls, e->whole ? ")" : ")!");
    }
}

/* cuts: n_cuts growing positions. */
static void parse(result *r, const char *text, size_t n, const size_t *cuts, size_t n_cuts) {
    *r = (result){0};
    buf_puts(&r->content, "");
    buf_puts(&r->calls, "");
    toolcall *t = toolcall_new(receive, r);
    assert_non_null(t);
    size_t from = 0;
    for (size_t i = 0; i <= n_cuts; i++) {
        size_t to = i < n_cuts ? cuts[i] : n;
        char *piece = malloc(to - from + 1); /* a copy of its own: reading past its end is seen by AddressSanitizer */
        assert_non_null(piece);
        memcpy(piece, text + from, to - from);
        assert_int_equal(toolcall_feed(t, piece, to - from), 0);
        free(piece);
        from = to;
    }
    assert_int_equal(toolcall_finish(t), 0);
    assert_int_equal(toolcall_count(t), r->next);
    assert_int_equal(r->open, 0);
    toolcall_free(t);
}

static void free_result(result *r) {
    buf_free(&r->content);
    buf_free(&r->calls);
}

#define T "<tool_call>"
#define E "</tool_call>"

static const struct {
    const char *text, *content, *calls;
} cases[] = {
    {"", "", ""},
    {"Hello, world.\n", "Hello, world.\n", ""},
    {T "\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n" E, "", "[f]({\"a\": 1})"},
    {T "{\"name\":\"f\",\"arguments\":{}}" E, "", "[f]({})"},
    {T "\r\n\t {\t\"name\" :\n\"f\" ,\r \"arguments\" :\n {\n} \n}\n \n" E "\n", "", "[f]({\n})"},
    {"I'll look.\n" T "\n{\"name\": \"f\", \"arguments\": {}}\n" E, "I'll look.", "[f]({})"},
    {"A\n" T "{\"name\": \"f\", \"arguments\": {}}" E "\nB\n", "A\nB", "[f]({})"},
    {T "\n{\"name\": \"f\", \"arguments\": {\"x\": [1, {\"y\": null}]}}\n" E "\n" T "\n{\"name\": \"g\", \"arguments\": {}}\n" E,
     "", "[f]({\"x\": [1, {\"y\": null}]})[g]({})"},
    /* no white space, no end between calls; three in a row */
    {T "{\"name\":\"a\",\"arguments\":{}}" E T "{\"name\":\"b\",\"arguments\":{}}" E T "{\"name\":\"c\",\"arguments\":{}}" E, "",
     "[a]({})[b]({})[c]({})"},
    /* tags and brackets inside strings are text */
    {T "{\"name\": \"f\", \"arguments\": {\"s\": \"}]{[ </tool_call> <tool_call> \\\" \\\\\"}}" E, "",
     "[f]({\"s\": \"}]{[ </tool_call> <tool_call> \\\" \\\\\"})"},
    {T "{\"name\": \"f\", \"arguments\": {\"s\": \"ünïcode 图片 \\u4f60\"}}" E, "", "[f]({\"s\": \"ünïcode 图片 \\u4f60\"})"},
    /* arguments first */
    {T "{\"arguments\": {\"a\": \"b\"}, \"name\": \"f\"}" E, "", "[f]({\"a\": \"b\"})"},
    {T "{\"arguments\": \"{}\", \"id\": [1, \"}\"], \"name\": \"f\"}" E, "", "[f]({})"},
    /* arguments as a string: its escapes undone */
    {T "{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": \\\"x\\\\ny\\\", \\\"b\\\": \\\"\\u00e9\\ud83d\\ude00\\/\\\"}\"}" E, "",
     "[f]({\"a\": \"x\\ny\", \"b\": \"é😀/\"})"},
    {T "{\"name\": \"f\", \"arguments\": \"\\ud83d!\\ude00\\ud83d\\u0041\"}" E, "", "[f](\xEF\xBF\xBD!\xEF\xBF\xBD\xEF\xBF\xBD" "A)"},
    {T "{\"name\": \"f\", \"arguments\": \"\"}" E, "", "[f]()"},
    /* none, null, escaped names, members nobody asked for */
    {T "{\"name\": \"now\"}" E, "", "[now]({})"},
    {T "{\"name\": \"now\", \"arguments\": null}" E, "", "[now]({})"},
    {T "{\"n\\u0061me\": \"\\u0066\\n\", \"arguments\": {}}" E, "", "[f\n]({})"},
    {T "{\"id\": \"x\", \"name\": \"f\", \"type\": -1.5e+3, \"arguments\": {}, \"more\": {\"a\": [\"]\"]}, \"ok\": true}" E, "", "[f]({})"},
    {T "{\"name\": \"f\", \"name\": \"g\", \"arguments\": {}, \"arguments\": {\"b\": 1}}" E, "", "[f]({})"},
    {T "{\"name\": \"f\", \"arguments\": {},}" E, "", "[f]({})"},
    /* slips that models make: a bracket too many or too few, a tag left out or doubled */
    {T "{\"name\": \"f\", \"arguments\": {}}}\n" E, "", "[f]({})"},
    {T "{\"name\": \"f\", \"arguments\": {}\n" E "x", "x", "[f]({})"},
    {T "{\"name\": \"f\", \"arguments\": {}}\n" T "{\"name\": \"g\", \"arguments\": {}}" E, "", "[f]({})[g]({})"},
    {T T "{\"name\": \"f\", \"arguments\": {}}" E, T, "[f]({})"},
    {T "\n" T "\n{\"name\": \"f\", \"arguments\": {}}\n" E, T, "[f]({})"},
    {T "{\"name\": \"f\", \"arguments\": {}} That's it." E " Bye", " That's it. Bye", "[f]({})"},
    {T "{\"name\": \"f\", \"arguments\": {}, oops}" E, ", oops}", "[f]({})"},
    {T "{\"name\": \"f\", \"arguments\": {}, \"x\": <}" E, ", \"x\": <}", "[f]({})"},
    /* broken inside the arguments: what was sent stays sent */
    {T "{\"name\": \"f\", \"arguments\": {\"a\": [1, 2\n" E " on", " on", "[f]({\"a\": [1, 2\n)!"},
    {T "{\"name\": \"f\", \"arguments\": {\"a\": \"no end\n" E "\n", "", "[f]({\"a\": \"no end)!"},
    {T "{\"name\": \"f\", \"arguments\": \"no end\n" E, "", "[f](no end)!"},
    {T "{\"name\": \"f\", \"arguments\": {\"a\": \"x\n</tool_cal\"}}" E, "", "[f]({\"a\": \"x\n</tool_cal\"})"},
    {T "{\"name\": \"f\", \"arguments\": {\"a\": 1 <b>}}" E, "", "[f]({\"a\": 1 <b>})"},
    /* the answer ends early */
    {T "{\"name\": \"f\", \"arguments\": {\"a\": \"b", "", "[f]({\"a\": \"b)!"},
    {T "{\"name\": \"f\", \"arguments\": \"\\u00", "", "[f](\\u00)!"},
    {T "{\"name\": \"f\", \"arguments\": {}}", "", "[f]({})"},
    {T "{\"name\": \"f\", \"arguments\": {}}\n</tool", "\n</tool", "[f]({})"},
    {T "{\"name\": \"f\", \"arguments\": {}, \"mor", ", \"mor", "[f]({})"},
    {T "{\"name\": \"f\", \"argum", T "{\"name\": \"f\", \"argum", ""},
    {"Look: " T, "Look: " T, ""},
    {"Look: <tool_ca", "Look: <tool_ca", ""},
    {"x \n\n ", "x \n\n ", ""},
    /* no calls: given back, tags included */
    {"a < b, <b>, <tool>, <<tool_call, " E " c", "a < b, <b>, <tool>, <<tool_call, " E " c", ""},
    {"<" T "{\"name\": \"f\", \"arguments\": {}}" E, "<", "[f]({})"},
    {"<tool_" T "{\"name\": \"f\", \"arguments\": {}}" E, "<tool_", "[f]({})"},
    {T "not json" E, T "not json" E, ""},
    {"x\n" T "[]" E "\n", "x\n" T "[]" E "\n", ""},
    {T "{}" E, T "{}" E, ""},
    {T "{\"name\": 1, \"arguments\": {}}" E, T "{\"name\": 1, \"arguments\": {}}" E, ""},
    {T "{\"name\": \"\", \"arguments\": {}}" E, T "{\"name\": \"\", \"arguments\": {}}" E, ""},
    {T "{\"name\": \"a\\u0000b\", \"arguments\": {}}" E, T "{\"name\": \"a\\u0000b\", \"arguments\": {}}" E, ""},
    {T "{\"name\": \"\\q\"}" E, T "{\"name\": \"\\q\"}" E, ""},
    {T "{\"arguments\": {}}" E, T "{\"arguments\": {}}" E, ""},
    {T "{\"name\": \"f\", \"arguments\": [1]}" E, T "{\"name\": \"f\", \"arguments\": [1]}" E, ""},
    {T "{\"name\": \"f\", \"arguments\": nil}" E, T "{\"name\": \"f\", \"arguments\": nil}" E, ""},
    {T "{\"name\" \"f\"}" E "\n" T "{\"name\": \"g\"}" E, T "{\"name\" \"f\"}" E, "[g]({})"},
    {T "{\"arguments\": {\"a\": \"x\n" E "y", T "{\"arguments\": {\"a\": \"x\n" E "y", ""},
};

static void check(const char *text, size_t n, const size_t *cuts, size_t n_cuts, const char *content, const char *calls) {
    result r;
    parse(&r, text, n, cuts, n_cuts);
    if (strcmp(r.content.data, content) || strcmp(r.calls.data, calls)) {
        print_error("text    <%s>\ncuts   ", text);
        for (size_t i = 0; i < n_cuts; i++) print_error(" %zu", cuts[i]);
        print_error("\ncontent <%s>\nwanted  <%s>\ncalls   <%s>\nwanted  <%s>\n", r.content.data, content, r.calls.data, calls);
        fail();
    }
    free_result(&r);
}

static void every_case_whole_and_cut_at_every_pair(void **state) {
    (void)state;
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        const char *text = cases[c].text;
        size_t n = strlen(text), cuts[512];
        assert_true(n < 512);
        check(text, n, NULL, 0, cases[c].content, cases[c].calls);
        for (size_t i = 0; i < n; i++) cuts[i] = i + 1;
        check(text, n, cuts, n, cases[c].content, cases[c].calls);
        for (size_t i = 0; i <= n; i++)
            for (size_t j = i; j <= n; j++) check(text, n, (size_t[]){i, j}, 2, cases[c].content, cases[c].calls);
    }
}

static uint64_t seed = 1;
static unsigned below(unsigned n) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(seed >> 33) % n;
}

static void random_texts_do_not_depend_on_the_cuts(void **state) {
    (void)state;
    static const char *const bits[] = {
        T, E, "{", "}", "\"name\"", "\"arguments\"", ":", ",", "\"f\"", "{\"a\": 1}", "\"", "\\", "\\u00e9", "\\ud83d", "\\ude00", "\n", " ",
        "<", "</", "<tool_", "text", "null", "[", "]", "1", "é", T "{\"name\": \"f\", \"arguments\": ", "{\"name\": \"f\", ", "\"arguments\": \"", "}}" E,
    };
    int with_calls = 0;
    for (int round = 0; round < 30000; round++) {
        char text[600] = "";
        for (unsigned k = 1 + below(24); k; k--) strcat(text, bits[below(sizeof bits / sizeof bits[0])]);
        size_t n = strlen(text), cuts[600], n_cuts = 0;
        result whole;
        parse(&whole, text, n, NULL, 0);
        with_calls += whole.next > 0;
        /* without calls nothing is changed at all; with them only tags, members and white space between go */
        if (!whole.next) assert_string_equal(whole.content.data, text);
        for (int again = 0; again < 4; again++) {
            unsigned step = 1 + below(12);
            n_cuts = 0;
            for (size_t at = 1 + below(step); at < n; at += 1 + below(step)) cuts[n_cuts++] = at;
            check(text, n, cuts, n_cuts, whole.content.data, whole.calls.data);
        }
        free_result(&whole);
    }
    assert_true(with_calls > 1000);
}

static void content_is_not_held_back(void **state) {
    (void)state;
    result r = {0};
    toolcall *t = toolcall_new(receive, &r);
    static const char *const words[] = {"A", " b", " <", "c", "\n", "d<tool_x", "e"};
    static const char *const sent[] = {"A", "A b", "A b", "A b <c", "A b <c", "A b <c\nd<tool_x", "A b <c\nd<tool_xe"};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        toolcall_feed(t, words[i], strlen(words[i]));
        assert_string_equal(r.content.data, sent[i]);
    }
    /* arguments go out byte by byte, the start before them */
    const char *head = T "{\"name\": \"f\", \"arguments\": {\"city\": \"De";
    toolcall_feed(t, head, strlen(head));
    assert_string_equal(r.calls.data, "[f]({\"city\": \"De");
    toolcall_feed(t, "lft", 3);
    assert_string_equal(r.calls.data, "[f]({\"city\": \"Delft");
    toolcall_feed(t, "\"}", 2);
    assert_string_equal(r.calls.data, "[f]({\"city\": \"Delft\"})"); /* ended before the closing tag came */
    toolcall_feed(t, "}" E, 1 + strlen(E));
    toolcall_finish(t);
    assert_string_equal(r.content.data, "A b <c\nd<tool_xe");
    toolcall_free(t);
    free_result(&r);
}

static void held_text_is_bounded(void **state) {
    (void)state;
    result r = {0};
    toolcall *t = toolcall_new(receive, &r);
    const char *head = T "{\"arguments\": {\"x\": \"";
    toolcall_feed(t, head, strlen(head));
    for (int i = 0; i < TOOLCALL_HELD / 16; i++) toolcall_feed(t, "0123456789abcdef", 16);
    assert_true(r.content.len > TOOLCALL_HELD); /* given up, given back */
    toolcall_feed(t, "<", 1);
    toolcall_finish(t);
    assert_int_equal(r.content.len, strlen(head) + TOOLCALL_HELD + 1);
    assert_int_equal(r.next, 0);
    toolcall_free(t);
    free_result(&r);
    /* white space before a call that never comes */
    r = (result){0};
    t = toolcall_new(receive, &r);
    for (int i = 0; i < 1000; i++) toolcall_feed(t, "\n\n", 2);
    assert_true(r.content.len >= 2000 - 256);
    toolcall_finish(t);
    assert_int_equal(r.content.len, 2000);
    toolcall_free(t);
    free_result(&r);
}

/* A gigantic row of opened calls: work stays near linear, memory bounded. */
static void many_false_starts_are_cheap(void **state) {
    (void)state;
    result r = {0};
    toolcall *t = toolcall_new(receive, &r);
    size_t total = 0;
    for (int i = 0; i < 20000; i++) {
        const char *bit = T "{\"a\":\"";
        toolcall_feed(t, bit, strlen(bit));
        total += strlen(bit);
    }
    toolcall_finish(t);
    assert_int_equal(r.content.len, total);
    toolcall_free(t);
    free_result(&r);
}

static void the_collected_result(void **state) {
    (void)state;
    toolcall_result r = {0};
    toolcall *t = toolcall_new(toolcall_collect, &r);
    const char *text = "Both.\n" T "\n{\"name\": \"f\", \"arguments\": {\"a\": \"é\"}}\n" E "\n" T "\n{\"name\": \"g\"}\n" E;
    for (const char *s = text; *s; s++) assert_int_equal(toolcall_feed(t, s, 1), 0);
    assert_int_equal(toolcall_finish(t), 0);
    assert_false(r.failed);
    assert_string_equal(r.content.data, "Both.");
    assert_int_equal(json_array_size(r.calls), 2);
    json_t *first = json_array_get(r.calls, 0), *second = json_array_get(r.calls, 1);
    assert_string_equal(json_string_value(json_object_get(first, "type")), "function");
    assert_string_not_equal(json_string_value(json_object_get(first, "id")), json_string_value(json_object_get(second, "id")));
    json_t *f = json_object_get(first, "function"), *g = json_object_get(second, "function");
    assert_string_equal(json_string_value(json_object_get(f, "name")), "f");
    assert_string_equal(json_string_value(json_object_get(f, "arguments")), "{\"a\": \"é\"}");
    assert_string_equal(json_string_value(json_object_get(g, "name")), "g");
    assert_string_equal(json_string_value(json_object_get(g, "arguments")), "{}");
    toolcall_free(t);
    toolcall_result_free(&r);
}

static void answer_to_calls(void *ud, int part, const char *text, size_t n) {
    if (part == REASONING_ANSWER) assert_int_equal(toolcall_feed(ud, text, n), 0);
}

static void calls_inside_the_reasoning_are_none(void **state) {
    (void)state;
    const char *text = "I could write " T "{\"name\": \"no\"}" E ".\n</think>\n\n" T "{\"name\": \"yes\"}" E;
    result r = {0};
    buf_puts(&r.content, "");
    toolcall *t = toolcall_new(receive, &r);
    reasoning split;
    reasoning_init(&split, true);
    for (const char *s = text; *s; s++) reasoning_feed(&split, s, 1, answer_to_calls, t);
    reasoning_finish(&split, answer_to_calls, t);
    toolcall_finish(t);
    assert_string_equal(r.calls.data, "[yes]({})");
    assert_string_equal(r.content.data, "");
    toolcall_free(t);
    free_result(&r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_case_whole_and_cut_at_every_pair),
        cmocka_unit_test(random_texts_do_not_depend_on_the_cuts),
        cmocka_unit_test(content_is_not_held_back),
        cmocka_unit_test(held_text_is_bounded),
        cmocka_unit_test(many_false_starts_are_cheap),
        cmocka_unit_test(the_collected_result),
        cmocka_unit_test(calls_inside_the_reasoning_are_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
