/* The splitter of reasoning and answer: the same result however the text is cut. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../../qvl-serve/reasoning.h"

typedef struct {
    char thought[256], answer[256];
} result;

static void receive(void *ud, int part, const char *text, size_t n) {
    result *r = ud;
    assert_true(n > 0);
    assert_true(part == REASONING_THOUGHT || part == REASONING_ANSWER);
    if (part == REASONING_THOUGHT) assert_string_equal(r->answer, ""); /* never after the answer */
    char *to = part == REASONING_THOUGHT ? r->thought : r->answer;
    size_t have = strlen(to);
    assert_true(have + n < 256);
    memcpy(to + have, text, n);
}

static result split(bool opened, const char *text, size_t n, size_t i, size_t j) {
    result out = {{0}, {0}};
    reasoning r;
    reasoning_init(&r, opened);
    assert_int_equal(reasoning_inside(&r), opened);
    reasoning_feed(&r, text, i, receive, &out);
    reasoning_feed(&r, text + i, j - i, receive, &out);
    reasoning_feed(&r, text + j, n - j, receive, &out);
    reasoning_finish(&r, receive, &out);
    return out;
}

static const struct {
    bool opened;
    const char *text, *thought, *answer;
} cases[] = {
    {true, "Let me see.\n</think>\n\nBlue.", "Let me see.", "Blue."},
    {true, "\nLet me see.\n</think>\n\nBlue.\n", "Let me see.", "Blue.\n"},
    {true, "<think>\nLet me see.\n</think>\n\nBlue.", "Let me see.", "Blue."},
    {true, "\n\n<think>a</think>b", "a", "b"},
    {true, "a\n\n\nb\n\n\n</think>\n\n\n\nc\n\n\nd\n", "a\n\n\nb", "c\n\n\nd\n"},
    {true, "a\n\n\n\n\n\n\n\n\n\n\n\nb</think>", "a\n\n\n\n\n\n\n\n\n\n\n\nb", ""},
    {true, "</think>\n\nBlue.", "", "Blue."},
    {true, "\n\n</think>\n\nBlue.", "", "Blue."},
    {true, "", "", ""},
    {true, "cut off in the mid", "cut off in the mid", ""},
    {true, "cut off</thi", "cut off</thi", ""},
    {true, "cut off\n\n", "cut off", ""},
    {true, "<thi", "<thi", ""},
    {true, "a < b, </thin>, <</think>x", "a < b, </thin>, <", "x"},
    {true, "a\n</think\n</think>x", "a\n</think", "x"},
    {true, "a</</think>x", "a</", "x"},
    {true, "<think>one</think>two <think>three</think> four</think>", "one", "two <think>three</think> four</think>"},
    {true, "a <think> b</think>c", "a <think> b", "c"},
    {true, " a </think> b ", " a ", " b "},
    {true, "想一想\n</think>\n\n蓝色", "想一想", "蓝色"},
    {false, "Blue.", "", "Blue."},
    {false, "", "", ""},
    {false, "\n\nBlue.\n", "", "\n\nBlue.\n"},
    {false, "\n\n\n\n\n\n\n\n\n\n\n", "", "\n\n\n\n\n\n\n\n\n\n\n"},
    {false, "<think>\na\n</think>\n\nb", "a", "b"},
    {false, "\n<think>\n\n</think>\n\nb", "", "b"},
    {false, "\n\n<thin air>", "", "\n\n<thin air>"},
    {false, "<thi", "", "<thi"},
    {false, "\n<", "", "\n<"},
    {false, "<<think>a</think>b", "", "<<think>a</think>b"},
    {false, "x <think>a</think>b", "", "x <think>a</think>b"},
    {false, "a</think>b", "", "a</think>b"},
    {false, "<think>a", "a", ""},
};

static void every_text_at_every_pair_of_cuts(void **state) {
    (void)state;
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        size_t n = strlen(cases[c].text);
        for (size_t i = 0; i <= n; i++)
            for (size_t j = i; j <= n; j++) {
                result r = split(cases[c].opened, cases[c].text, n, i, j);
                if (strcmp(r.thought, cases[c].thought) || strcmp(r.answer, cases[c].answer))
                    print_error("text <%s> cut at %zu and %zu\n", cases[c].text, i, j);
                assert_string_equal(r.thought, cases[c].thought);
                assert_string_equal(r.answer, cases[c].answer);
            }
    }
}

static void byte_by_byte_and_random(void **state) {
    (void)state;
    static const char *const bits[] = {"<think>", "</think>", "<", "</", "think>", "\n", "\n\n", "a", "é", "</thi", "<<"};
    uint64_t seed = 7;
    for (int round = 0; round < 20000; round++) {
        char text[128] = "";
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        uint64_t dice = seed >> 8;
        for (int k = 0; k < 1 + round % 14; k++, dice /= 11) strcat(text, bits[dice % 11]);
        size_t n = strlen(text);
        result whole = split(round & 1, text, n, n, n), single = {{0}, {0}};
        reasoning r;
        reasoning_init(&r, round & 1);
        for (size_t i = 0; i < n; i++) reasoning_feed(&r, text + i, 1, receive, &single);
        reasoning_finish(&r, receive, &single);
        assert_string_equal(whole.thought, single.thought);
        assert_string_equal(whole.answer, single.answer);
    }
}

static void nothing_waits_without_need(void **state) {
    (void)state;
    result out = {{0}, {0}};
    reasoning r;
    reasoning_init(&r, true);
    static const char *const words[] = {"I", " think", "\n", "so <", "b", ".\n</think>", "\n\nYes"};
    static const char *const thoughts[] = {"I", "I think", "I think", "I think\nso ", "I think\nso <b", "I think\nso <b.", "I think\nso <b."};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        reasoning_feed(&r, words[i], strlen(words[i]), receive, &out);
        assert_string_equal(out.thought, thoughts[i]);
        assert_int_equal(reasoning_inside(&r), i < 5);
    }
    assert_string_equal(out.answer, "Yes");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_text_at_every_pair_of_cuts),
        cmocka_unit_test(byte_by_byte_and_random),
        cmocka_unit_test(nothing_waits_without_need),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
