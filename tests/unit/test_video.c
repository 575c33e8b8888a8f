/* test_video.c - the chosen frames and their timestamps equal the published processor's. */
#include <locale.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "../../libqvl/encode/encode.h"

static void hex_sha256(char out[65], const void *data, size_t n) {
    qvl__sha256 s;
    uint8_t h[32];
    qvl__sha256_init(&s);
    qvl__sha256_add(&s, data, n);
    qvl__sha256_end(&s, h);
    for (int i = 0; i < 32; i++) snprintf(out + 2 * i, 3, "%02x", h[i]);
}

static double number(const json_t *o, const char *key) { return json_number_value(json_object_get(o, key)); }

/* Timestamp of temporal pair k; an odd last frame is its own partner. */
static void pair_time(char out[48], const int32_t *index, size_t n, size_t k, double fps) {
    qvl__timestamp(out, index[2 * k], index[2 * k + 1 < n ? 2 * k + 1 : n - 1], fps);
}

static void golden_frames(void **state) {
    (void)state;
    json_error_t e;
    json_t *m = json_load_file("tests/golden/videos/manifest.json", 0, &e), *one, *v;
    assert_non_null(m);
    size_t i, k, rows = 0;
    json_array_foreach(json_object_get(m, "sample_frames"), i, one) {
        size_t total = (size_t)number(one, "total"), n;
        double fps = number(one, "fps");
        int32_t *index;
        assert_int_equal(qvl__sample_frames(total, fps, number(one, "target_fps"), 4, 768, &index, &n), 0);
        assert_int_equal(n, (size_t)number(one, "n"));
        json_array_foreach(json_object_get(one, "first"), k, v) assert_int_equal(index[k], json_integer_value(v));
        const json_t *last = json_object_get(one, "last");
        json_array_foreach(last, k, v) assert_int_equal(index[n - json_array_size(last) + k], json_integer_value(v));

        qvl__buf text = {0}; /* "sha" is the first half of SHA-256 over json.dumps(indices) */
        qvl__buf_puts(&text, "[");
        for (k = 0; k < n; k++) qvl__buf_printf(&text, k ? ", %d" : "%d", (int)index[k]);
        qvl__buf_puts(&text, "]");
        char sha[65], time[48];
        hex_sha256(sha, text.data, text.len);
        sha[16] = 0;
        assert_string_equal(sha, json_string_value(json_object_get(one, "sha")));
        qvl__buf_free(&text);

        /* Up to six timestamps from the start, "...", and the last two. */
        const json_t *times = json_object_get(one, "timestamps_text");
        size_t pairs = (n + 1) / 2, listed = json_array_size(times), dots = 0;
        while (dots < listed && strcmp(json_string_value(json_array_get(times, dots)), "...") != 0) dots++;
        for (k = 0; k < listed; k++) {
            if (k == dots) continue;
            pair_time(time, index, n, k < dots ? k : pairs - (listed - k), fps);
            assert_string_equal(time, json_string_value(json_array_get(times, k)));
        }
        qvl_free(index);
        rows++;
    }
    assert_int_equal(rows, 120);
    json_decref(m);
}

static void limits(void **state) {
    (void)state;
    int32_t *index;
    size_t n;
    assert_int_equal(qvl__sample_frames(0, 25, 2, 4, 768, &index, &n), QVL_EINVAL);
    assert_int_equal(qvl__sample_frames((size_t)1 << 40, 25, 2, 4, 768, &index, &n), QVL_EINVAL);
    static const double bad[] = {0, -1, NAN, INFINITY};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(qvl__sample_frames(10, bad[i], 2, 4, 768, &index, &n), QVL_EINVAL);
        assert_int_equal(qvl__sample_frames(10, 25, bad[i], 4, 768, &index, &n), QVL_EINVAL);
        assert_null(index);
    }
    assert_int_equal(qvl__sample_frames(10, 25, 2, 8, 4, &index, &n), QVL_EINVAL);
    assert_int_equal(qvl__sample_frames(1, 1e-300, 1e300, 4, 768, &index, &n), 0); /* infinitely many wanted, one there */
    assert_int_equal(n, 1);
    assert_int_equal(index[0], 0);
    qvl_free(index);
    assert_int_equal(qvl__sample_frames(INT32_MAX, 30, 2, 4, 768, &index, &n), 0);
    assert_int_equal(n, 768);
    assert_int_equal(index[767], INT32_MAX - 1);
    qvl_free(index);
}

static void timestamps(void **state) {
    (void)state;
    char t[48];
    qvl__timestamp(t, 0, 1, 2.0); /* 0.25: half to even of the exact double */
    assert_string_equal(t, "<0.2 seconds>");
    qvl__timestamp(t, 1, 2, 2.0); /* 0.75 */
    assert_string_equal(t, "<0.8 seconds>");
    qvl__timestamp(t, 0, 0, 30.0);
    assert_string_equal(t, "<0.0 seconds>");
    qvl__timestamp(t, INT32_MAX, INT32_MAX, 1.0);
    assert_string_equal(t, "<2147483647.0 seconds>");
    qvl__timestamp(t, INT32_MAX, INT32_MAX, 1e-300); /* no overrun */
    assert_true(strlen(t) < 48);
    static const char *const names[] = {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8"}; /* a comma, where installed */
    for (int i = 0; i < 3; i++)
        if (setlocale(LC_ALL, names[i])) {
            qvl__timestamp(t, 1, 2, 2.0);
            assert_string_equal(t, "<0.8 seconds>");
        }
    setlocale(LC_ALL, "C");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_frames),
        cmocka_unit_test(limits),
        cmocka_unit_test(timestamps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
