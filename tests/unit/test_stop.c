/* test_stop.c - stop strings: every split of a text gives what a search in the whole text gives. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "../../libqvl/stream/stream.h"
#include "golden.h"

/* By definition: the match that ends first, the longest of those. Returns its start, or -1. */
static ptrdiff_t search(const char *text, size_t n, const char *const *stops, size_t n_stops) {
    for (size_t end = 1; end <= n; end++) {
        size_t best = 0;
        for (size_t i = 0; i < n_stops; i++) {
            size_t len = strlen(stops[i]);
            if (len <= end && len > best && memcmp(text + end - len, stops[i], len) == 0) best = len;
        }
        if (best) return (ptrdiff_t)(end - best);
    }
    return -1;
}

/* The longest end of text that begins a stop string: what has to be held back, and no more. */
static size_t must_hold(const char *text, size_t n, const char *const *stops, size_t n_stops) {
    size_t best = 0;
    for (size_t i = 0; i < n_stops; i++)
        for (size_t k = 1; k < strlen(stops[i]) && k <= n; k++)
            if (k > best && memcmp(text + n - k, stops[i], k) == 0) best = k;
    return best;
}

/* Feeds text cut after every byte i with bit i set in cuts. */
static void expect(const char *text, size_t n, const char *const *stops, size_t n_stops, uint64_t cuts) {
    qvl__buf json = {0}, out = {0};
    for (size_t i = 0; i < n_stops; i++) {
        qvl__buf_puts(&json, i ? ", " : "[");
        qvl__json_quote(&json, stops[i], strlen(stops[i]));
    }
    qvl__buf_puts(&json, n_stops ? "]" : "[]");
    qvl__stop s;
    assert_int_equal(qvl__stop_init(&s, json.data), 0);
    qvl__buf_puts(&out, "");
    ptrdiff_t at = search(text, n, stops, n_stops);
    bool found = false;
    for (size_t from = 0, i = 0; i < n && !found; i++) {
        if (i + 1 < n && !(cuts >> (i % 64) & 1)) continue;
        found = qvl__stop_add(&s, text + from, i + 1 - from, &out);
        from = i + 1;
        if (!found) assert_int_equal(out.len, i + 1 - must_hold(text, i + 1, stops, n_stops));
    }
    assert_int_equal(found, at >= 0);
    if (!found) qvl__stop_flush(&s, &out);
    assert_int_equal(out.len, at >= 0 ? (size_t)at : n);
    assert_memory_equal(out.data, text, out.len);
    /* Used up either way: nothing is left for a second flush. */
    size_t len = out.len;
    qvl__stop_flush(&s, &out);
    assert_int_equal(out.len, len);
    qvl__stop_free(&s);
    qvl__buf_free(&json);
    qvl__buf_free(&out);
}

static void every_split(void **state) {
    (void)state;
    static const struct {
        const char *text, *stops[4];
    } cases[] = {
        {"hello STOP there", {"STOP"}},
        {"hello STO there", {"STOP"}},
        {"ababac", {"abac"}},
        {"aaaaaab", {"aaab"}},
        {"xabcabcabd", {"abcabd"}},
        {"abcd", {"abcd", "bc"}},        /* bc ends first */
        {"abcx", {"abcd", "bcx", "cx"}}, /* both end there: the longest */
        {"abcd", {"d", "cd", "bcd"}},
        {"a\n\nb", {"\n\n"}},
        {"ends with STO", {"STOP"}},
        {"aab", {"ab", "aab"}},
        {"nothing", {"x", "gn", "ngx"}},
        {"", {"x"}},
        {"x", {"x"}},
        {"no stops", {0}},
        {"\xE4\xB8\xAD\xE6\x96\x87", {"\xE6\x96\x87"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n = strlen(cases[i].text), n_stops = 0;
        while (n_stops < 4 && cases[i].stops[n_stops]) n_stops++;
        for (uint64_t cuts = 0; cuts < (uint64_t)1 << (n ? n - 1 : 0); cuts++)
            expect(cases[i].text, n, cases[i].stops, n_stops, cuts);
    }
}

static void random_texts(void **state) {
    (void)state;
    uint64_t seed = 5;
    for (int round = 0; round < 100000; round++) {
        char text[65], stop[4][8];
        const char *stops[4];
        size_t n = 1 + golden_random(&seed) % 64, n_stops = 1 + golden_random(&seed) % 4;
        uint32_t letters = 2 + (uint32_t)round % 2;
        for (size_t i = 0; i < n; i++) text[i] = (char)('a' + golden_random(&seed) % letters);
        for (size_t i = 0; i < n_stops; i++) {
            size_t len = 1 + golden_random(&seed) % 7;
            for (size_t k = 0; k < len; k++) stop[i][k] = (char)('a' + golden_random(&seed) % letters);
            stop[i][len] = 0;
            stops[i] = stop[i];
        }
        expect(text, n, stops, n_stops, (uint64_t)golden_random(&seed) << 32 | golden_random(&seed));
    }
}

static void forms_of_the_option(void **state) {
    (void)state;
    qvl__stop s;
    qvl__buf out = {0};
    assert_int_equal(qvl__stop_init(&s, ""), 0);
    assert_int_equal(s.n, 0);
    assert_false(qvl__stop_add(&s, "text", 4, &out));
    assert_string_equal(out.data, "text");
    qvl__stop_free(&s);
    qvl__buf_free(&out);

    assert_int_equal(qvl__stop_init(&s, " \"x\\u0000y\""), 0); /* a zero byte is a character */
    assert_true(qvl__stop_add(&s, "ax\0y", 4, &out));
    assert_string_equal(out.data, "a");
    qvl__stop_free(&s);
    qvl__buf_free(&out);

    static const struct {
        const char *json, *message;
    } wrong[] = {
        {"[\"\"]", "entry 0 is empty"},
        {"\"\"", "empty"},
        {"[\"a\", 7]", "entry 1 is not a string"},
        {"{\"a\": 1}", "array of strings"},
        {"7", "array of strings"},
        {"END", "array of strings"},
        {"\"a\", \"b\"", "array of strings"},
        {"[\"a\"", "array of strings"},
        {"[\"0\",\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\",\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\"]", "at most 16"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(qvl__stop_init(&s, wrong[i].json), QVL_EINVAL);
        if (!strstr(qvl_last_error(), wrong[i].message)) fail_msg("%s: %s", wrong[i].json, qvl_last_error());
        assert_int_equal(s.n, 0);
    }
}

/* A stop string of a hundred thousand equal letters, and an answer that always nearly matches. */
static void long_stop_strings_are_linear(void **state) {
    (void)state;
    enum { N = 100000 };
    qvl__buf json = {0}, out = {0};
    qvl__buf_puts(&json, "[\"");
    for (int i = 0; i < N; i++) qvl__buf_puts(&json, "a");
    qvl__buf_puts(&json, "b\"]");
    qvl__stop s;
    assert_int_equal(qvl__stop_init(&s, json.data), 0);
    double start = qvl__now_ms();
    for (int i = 0; i < 4 * N; i++) assert_false(qvl__stop_add(&s, "a", 1, &out));
    assert_int_equal(out.len, 3 * N);
    assert_true(qvl__stop_add(&s, "b", 1, &out));
    assert_int_equal(out.len, 3 * N);
    assert_true(qvl__now_ms() - start < 5000);
    qvl__stop_free(&s);
    qvl__buf_free(&json);
    qvl__buf_free(&out);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_split),
        cmocka_unit_test(random_texts),
        cmocka_unit_test(forms_of_the_option),
        cmocka_unit_test(long_stop_strings_are_linear),
    };
    return cmocka_run_group_tests_name("stop", tests, NULL, NULL);
}
