/* test_detok.c - the streaming detokenizer: the goldens' pieces one by one, and every cut of bytes against the whole. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "../../libqvl/stream/stream.h"
#include "golden.h"

static qvl_tokenizer *small, *real;

/* "stream": the text to show after each id, and one last element for the flush. */
static void check_stream(const qvl_tokenizer *t, const char *path, size_t count) {
    json_t *cases = golden_lines(path), *c;
    size_t i;
    json_array_foreach(cases, i, c) {
        int32_t *ids;
        size_t n = golden_ids(c, "ids", &ids), len;
        const json_t *stream = json_object_get(c, "stream");
        assert_int_equal(json_array_size(stream), n + 1);
        qvl__detok d = {0}, skipping = {0};
        qvl__buf skipped = {0};
        for (size_t k = 0; k <= n; k++) {
            qvl__buf out = {0};
            qvl__buf_puts(&out, "");
            if (k < n) qvl__detok_add(&d, t, ids[k], false, &out);
            else qvl__detok_flush(&d, &out);
            assert_int_equal(out.len, json_string_length(json_array_get(stream, k)));
            assert_string_equal(out.data, json_string_value(json_array_get(stream, k)));
            qvl__buf_free(&out);
            if (k < n) qvl__detok_add(&skipping, t, ids[k], true, &skipped);
            else qvl__detok_flush(&skipping, &skipped);
        }
        const char *want = golden_text(c, "decoded_skip_special", &len);
        assert_int_equal(skipped.len, len);
        assert_memory_equal(skipped.data, want, len);
        qvl__buf_free(&skipped);
        free(ids);
    }
    assert_int_equal(i, count);
    json_decref(cases);
}

static void small_streams(void **state) { (void)state, check_stream(small, "tests/golden/tokenizer/small_decode.jsonl", 50); }
static void real_streams(void **state) { (void)state, check_stream(real, "tests/golden/tokenizer/real_decode.jsonl", 150); }

/* Replacement by the standard's definition, written the slow way: from each byte the longest prefix of a well-formed
 * sequence (table 3-7 row by row); a whole one is a character, anything else one U+FFFD of at least one byte. */
static void replace_by_definition(const uint8_t *s, size_t n, qvl__buf *out) {
    static const uint8_t rows[][8] = {{0x00, 0x7F},
                                      {0xC2, 0xDF, 0x80, 0xBF},
                                      {0xE0, 0xE0, 0xA0, 0xBF, 0x80, 0xBF},
                                      {0xE1, 0xEC, 0x80, 0xBF, 0x80, 0xBF},
                                      {0xED, 0xED, 0x80, 0x9F, 0x80, 0xBF},
                                      {0xEE, 0xEF, 0x80, 0xBF, 0x80, 0xBF},
                                      {0xF0, 0xF0, 0x90, 0xBF, 0x80, 0xBF, 0x80, 0xBF},
                                      {0xF1, 0xF3, 0x80, 0xBF, 0x80, 0xBF, 0x80, 0xBF},
                                      {0xF4, 0xF4, 0x80, 0x8F, 0x80, 0xBF, 0x80, 0xBF}};
    static const size_t lengths[] = {1, 2, 3, 3, 3, 3, 4, 4, 4};
    for (size_t i = 0; i < n;) {
        size_t best = 0, whole = 0;
        for (size_t r = 0; r < 9; r++) {
            size_t k = 0;
            while (k < lengths[r] && i + k < n && s[i + k] >= rows[r][2 * k] && s[i + k] <= rows[r][2 * k + 1]) k++;
            if (k > best) best = k;
            if (k == lengths[r]) whole = k;
        }
        if (whole) qvl__buf_add(out, s + i, whole);
        else qvl__buf_puts(out, "\xEF\xBF\xBD");
        i += whole ? whole : best ? best : 1;
    }
}

static void cuts_do_not_matter(void **state) {
    (void)state;
    static const char *const units[] = {"a",        "\xC3\xA9",     "\xE4\xB8\xAD", "\xF0\x9F\x98\x80", "\x80",     "\xC0",
                                        "\xE0\x80", "\xED\xA0",     "\xF4\x90",     "\xF0\x9F",         "\xE4\xB8", "\xC3",
                                        "\xFF",     "\xF0\x9F\x98", "\xEF\xBF\xBD", "\xE0\xA0",         "\xF0\x90"};
    uint64_t seed = 4;
    for (int round = 0; round < 20000; round++) {
        qvl__buf bytes = {0}, want = {0}, got = {0};
        size_t n_units = 1 + golden_random(&seed) % 20;
        for (size_t i = 0; i < n_units; i++) {
            if (round % 2) qvl__buf_puts(&bytes, units[golden_random(&seed) % 17]);
            else {
                uint8_t b = (uint8_t)golden_random(&seed);
                qvl__buf_add(&bytes, &b, 1);
            }
        }
        replace_by_definition((const uint8_t *)bytes.data, bytes.len, &want);
        qvl__detok d = {0};
        for (size_t i = 0; i < bytes.len;) {
            size_t k = golden_random(&seed) % 5; /* empty pieces too */
            if (k > bytes.len - i) k = bytes.len - i;
            size_t before = got.len;
            qvl__detok_bytes(&d, bytes.data + i, k, &got);
            assert_true(d.n >= 0 && d.n <= 3);
            i += k;
            /* What was shown is a whole number of characters, and all that can be told so far. */
            qvl__buf rest = {0};
            qvl__detok again = {0};
            qvl__detok_bytes(&again, got.data ? got.data + before : "", got.len - before, &rest);
            assert_int_equal(again.n, 0);
            assert_int_equal(rest.len, got.len - before);
            qvl__buf_free(&rest);
        }
        qvl__detok_flush(&d, &got);
        assert_int_equal(got.len, want.len);
        assert_memory_equal(got.data, want.data, want.len);
        qvl__buf_free(&bytes);
        qvl__buf_free(&want);
        qvl__buf_free(&got);
    }
}

static void unknown_ids_are_nothing(void **state) {
    (void)state;
    qvl__detok d = {0};
    qvl__buf out = {0};
    qvl__detok_add(&d, small, -1, false, &out);
    qvl__detok_add(&d, small, 1 << 20, false, &out);
    qvl__detok_flush(&d, &out);
    assert_int_equal(out.len, 0);
    qvl__detok_add(&d, small, 4072, false, &out);
    assert_string_equal(out.data, "<|im_end|>");
    qvl__detok_add(&d, small, 4072, true, &out);
    assert_int_equal(out.len, 10);
    qvl__buf_free(&out);
}

static int setup(void **state) {
    (void)state;
    golden_unpack();
    small = golden_tokenizer(SMALL_TOKENIZER);
    real = golden_tokenizer(REAL_TOKENIZER);
    return 0;
}

static int teardown(void **state) {
    (void)state;
    qvl_tokenizer_free(small);
    qvl_tokenizer_free(real);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_streams),
        cmocka_unit_test(real_streams),
        cmocka_unit_test(cuts_do_not_matter),
        cmocka_unit_test(unknown_ids_are_nothing),
    };
    return cmocka_run_group_tests_name("detok", tests, setup, teardown);
}
