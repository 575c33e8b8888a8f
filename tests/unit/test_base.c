/* test_base.c - the ground everything stands on: hashes, JSON text, byte strings, messages, the thread pool. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "../../libqvl/base/base.h"

static void hex_of(const void *data, size_t n, size_t piece, char out[65]) {
    qvl__sha256 s;
    uint8_t sum[32];
    qvl__sha256_init(&s);
    for (size_t i = 0; i < n; i += piece) qvl__sha256_add(&s, (const char *)data + i, n - i < piece ? n - i : piece);
    qvl__sha256_end(&s, sum);
    for (int i = 0; i < 32; i++) snprintf(out + 2 * i, 3, "%02x", sum[i]);
}

/* FIPS 180-4's examples, in pieces of several sizes. */
static void sha256(void **state) {
    (void)state;
    static const size_t pieces[] = {1, 3, 55, 56, 63, 64, 65, 1000, 1 << 20};
    char *million = malloc(1000000), hex[65];
    assert_non_null(million);
    memset(million, 'a', 1000000);
    const char *two = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        hex_of("", 0, pieces[i], hex);
        assert_string_equal(hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        hex_of("abc", 3, pieces[i], hex);
        assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        hex_of(two, strlen(two), pieces[i], hex);
        assert_string_equal(hex, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
        hex_of(million, 1000000, pieces[i], hex);
        assert_string_equal(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    }
    free(million);
}

/* Python's json.dumps(json.loads(x), ensure_ascii=False) */
static void json_text(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"{\"b\":1,\"a\":[true,false,null]}", "{\"b\": 1, \"a\": [true, false, null]}"},
        {"[1.0,0.1,1e22,1e16,123456789012345.6,1e-5,0.0001,-0.0,5e-324,1.7976931348623157e308]",
         "[1.0, 0.1, 1e+22, 1e+16, 123456789012345.6, 1e-05, 0.0001, -0.0, 5e-324, 1.7976931348623157e+308]"},
        {"\"\\u00e9\\u4f60\\n\\u0001\\\"\\\\/\\u007f\"", "\"é你\\n\\u0001\\\"\\\\/\x7f\""},
        {"[]", "[]"},
        {"{}", "{}"},
        {"9223372036854775807", "9223372036854775807"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_error_t e;
        json_t *v = json_loads(cases[i][0], JSON_DECODE_ANY, &e);
        assert_non_null(v);
        qvl__buf b = {0};
        assert_int_equal(qvl__json_dump(&b, v), 0);
        assert_string_equal(b.data, cases[i][1]);
        qvl__buf_free(&b);
        json_decref(v);
    }
    json_t *v;
    assert_int_equal(qvl__json_parse(&v, "{\"a\": }", 7, "config.json"), QVL_EFORMAT);
    assert_non_null(strstr(qvl_last_error(), "config.json: line 1"));
}

/* Long messages are cut at whole characters, control characters cannot get into a log line. */
static void messages(void **state) {
    (void)state;
    char text[1200];
    for (int shift = 0; shift < 4; shift++) {
        size_t n = (size_t)shift;
        memset(text, 'x', n);
        while (n < 1100) memcpy(text + n, "你", 3), n += 3;
        text[n] = 0;
        assert_int_equal(qvl__fail(QVL_EINVAL, "%s", text), QVL_EINVAL);
        const char *m = qvl_last_error();
        size_t len = strlen(m);
        assert_true(len > 500 && len < 512 && (len - (size_t)shift) % 3 == 0);
        assert_int_equal(qvl__context(QVL_EINVAL, "where"), QVL_EINVAL);
        assert_memory_equal(qvl_last_error(), "where: ", 7);
    }
    qvl__fail(QVL_EINVAL, "a\nb\x1b[31m%s", "c\r");
    assert_string_equal(qvl_last_error(), "a b [31mc ");
    assert_string_equal(qvl_error_name(QVL_ELIMIT), "QVL_ELIMIT");
    assert_string_equal(qvl_error_name(-99), "QVL_E?");
}

static void sizes(void **state) {
    (void)state;
    assert_null(qvl__calloc(SIZE_MAX / 2, 3));
    assert_non_null(strstr(qvl_last_error(), "out of memory"));
    assert_null(qvl__array(NULL, SIZE_MAX / 4, 5));
    qvl__buf b = {0};
    for (int i = 0; i < 1000; i++) qvl__buf_printf(&b, "%d,", i);
    assert_false(b.failed);
    assert_int_equal(b.len, 10 * 2 + 90 * 3 + 900 * 4);
    assert_int_equal(b.data[b.len], 0);
    qvl__buf_free(&b);
}

static atomic_int counts[1000];
static void count(void *ctx, int task, int worker) {
    assert_true(worker >= 0 && worker < *(int *)ctx);
    atomic_fetch_add(&counts[task], 1);
}

static void pool(void **state) {
    (void)state;
    for (int threads = 1; threads <= 5; threads++) {
        qvl__pool *p;
        assert_int_equal(qvl__pool_new(&p, threads), 0);
        assert_int_equal(qvl__pool_threads(p), threads);
        for (int i = 0; i < 1000; i++) atomic_store(&counts[i], 0);
        for (int round = 0; round < 300; round++) qvl__pool_run(p, round % 7 == 0 ? 1000 : round % 5, count, &threads);
        int first = atomic_load(&counts[999]);
        assert_int_equal(first, 43);
        for (int i = 4; i < 1000; i++) assert_int_equal(atomic_load(&counts[i]), 43);
        assert_int_equal(atomic_load(&counts[0]), 43 + 206);
        qvl__pool_free(p);
    }
}

static void files(void **state) {
    (void)state;
    qvl__map m;
    char *text;
    size_t n;
    assert_int_equal(qvl__map_open(&m, "no/such/file"), QVL_EIO);
    assert_non_null(strstr(qvl_last_error(), "no/such/file"));
    assert_int_equal(qvl__map_open(&m, "tests"), QVL_EIO);
    assert_int_equal(qvl__read_file("Makefile", 10, &text, &n), QVL_ELIMIT);
    assert_int_equal(qvl__read_file("Makefile", 1 << 20, &text, &n), 0);
    assert_int_equal(qvl__map_open(&m, "Makefile"), 0);
    assert_int_equal(m.size, n);
    assert_memory_equal(m.data, text, n);
    qvl__free(text);
    qvl__map_close(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(sha256), cmocka_unit_test(json_text), cmocka_unit_test(messages),
                                       cmocka_unit_test(sizes), cmocka_unit_test(pool), cmocka_unit_test(files)};
    return cmocka_run_group_tests_name("base", tests, NULL, NULL);
}
