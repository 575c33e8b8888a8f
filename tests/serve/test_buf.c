/* The byte string, JSON strings from any bytes, and random names. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <jansson.h>

#include "../../qvl-serve/buf.h"
#include "../../qvl-serve/id.h"

static void growing_and_dropping(void **state) {
    (void)state;
    buf b = {0};
    for (int i = 0; i < 1000; i++) {
        buf_printf(&b, "%d,", i);
        assert_int_equal(b.data[b.len], 0);
    }
    assert_int_equal(b.len, 3890);
    assert_string_equal(b.data + b.len - 8, "998,999,");
    buf_drop(&b, 2);
    assert_int_equal(strncmp(b.data, "1,2,", 4), 0);
    buf_drop(&b, 1 << 20); /* more than there is: all */
    assert_string_equal(b.data, "");
    buf_add(&b, "a\0b", 3);
    buf_puts(&b, "c");
    assert_memory_equal(b.data, "a\0bc", 5);
    buf_clear(&b);
    assert_int_equal(b.len, 0);
    buf_free(&b);
    buf_drop(&b, 1);
    buf_add(&b, NULL, 0);
    assert_string_equal(b.data, "");
    buf_free(&b);
}

static void too_much_is_remembered(void **state) {
    (void)state;
    buf b = {0};
    buf_puts(&b, "kept");
    buf_add(&b, "x", SIZE_MAX / 2); /* refused before a byte is read */
    assert_true(b.failed);
    buf_puts(&b, "not added");
    buf_printf(&b, "%d", 1);
    assert_string_equal(b.data, "kept");
    buf_clear(&b);
    assert_false(b.failed);
    buf_free(&b);
}

static void json_strings(void **state) {
    (void)state;
    static const struct {
        const char *in;
        size_t n;
        const char *out;
    } cases[] = {
        {"", 0, "\"\""},
        {"plain", 5, "\"plain\""},
        {"q\"b\\/\n\r\t", 8, "\"q\\\"b\\\\/\\n\\r\\t\""},
        {"\0\x1f\x7f", 3, "\"\\u0000\\u001f\\u007f\""},
        {"é图😀", 9, "\"é图😀\""},
        {"\xc3", 1, "\"\xEF\xBF\xBD\""},
        {"\xc0\x80", 2, "\"\xEF\xBF\xBD\xEF\xBF\xBD\""},                         /* overlong */
        {"\xed\xa0\x80", 3, "\"\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\""},         /* surrogate */
        {"\xf4\x90\x80\x80", 4, "\"\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\""}, /* above U+10FFFF */
        {"\xf4\x8f\xbf\xbf", 4, "\"\xf4\x8f\xbf\xbf\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        buf b = {0};
        buf_json(&b, cases[i].in, cases[i].n);
        assert_string_equal(b.data, cases[i].out);
        buf_free(&b);
    }
    uint64_t seed = 5;
    for (int round = 0; round < 5000; round++) { /* noise: always JSON; jansson checks UTF-8 itself */
        char noise[24];
        for (size_t k = 0; k < sizeof noise; k++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            noise[k] = (char)(seed >> (round & 1 ? 40 : 33) | (round & 1 ? 0 : 0x80));
        }
        buf b = {0};
        buf_json(&b, noise, sizeof noise);
        json_t *v = json_loadb(b.data, b.len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        assert_non_null(v);
        json_decref(v);
        buf_free(&b);
    }
}

static void names(void **state) {
    (void)state;
    char a[ID_SIZE], b[ID_SIZE];
    assert_int_equal(id_new(a, "chatcmpl-"), 0);
    assert_int_equal(id_new(b, "chatcmpl-"), 0);
    assert_int_equal(strlen(a), 9 + 32);
    assert_int_equal(strncmp(a, "chatcmpl-", 9), 0);
    assert_int_equal(strspn(a + 9, "0123456789abcdef"), 32);
    assert_string_not_equal(a, b);
    id_new(a, "a-prefix-that-is-too-long"); /* cut, never written past the end */
    assert_int_equal(strlen(a), 16 + 32);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(growing_and_dropping),
        cmocka_unit_test(too_much_is_remembered),
        cmocka_unit_test(json_strings),
        cmocka_unit_test(names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
