/* test_resize.c - sizes, resized pixels and patches equal the reference's, on every instruction set and thread count. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "../../libqvl/encode/encode.h"

#define IMAGES "tests/golden/images/"

static const qvl__processor processor = {
    .patch = 16, .merge = 2, .temporal = 2, .mean = {0.5f, 0.5f, 0.5f}, .std = {0.5f, 0.5f, 0.5f}};

static void hex_sha256(char out[65], const void *data, size_t n) {
    qvl__sha256 s;
    uint8_t h[32];
    qvl__sha256_init(&s);
    qvl__sha256_add(&s, data, n);
    qvl__sha256_end(&s, h);
    for (int i = 0; i < 32; i++) snprintf(out + 2 * i, 3, "%02x", h[i]);
}

static json_t *load(const char *path) {
    json_error_t e;
    json_t *m = json_load_file(path, 0, &e);
    if (!m) fail_msg("%s: %s", path, e.text);
    return m;
}

static int64_t at(const json_t *list, size_t i) { return json_integer_value(json_array_get(list, i)); }

/* ---- sizes ---- */

static void smart_resize(void **state) {
    (void)state;
    json_t *m = load(IMAGES "manifest.json"), *table = json_object_get(m, "smart_resize"), *row;
    int factor = (int)json_integer_value(json_object_get(table, "factor"));
    size_t i, rows = 0, errors = 0;
    json_array_foreach(json_object_get(table, "rows"), i, row) {
        int height = (int)at(row, 0), width = (int)at(row, 1), h = -1, w = -1;
        int code = qvl__smart_resize(height, width, factor, at(row, 2), at(row, 3), &h, &w);
        const json_t *result = json_array_get(row, 4);
        if (json_is_null(result)) {
            assert_int_equal(code, QVL_ELIMIT);
            assert_non_null(strstr(qvl_last_error(), "200 times"));
            errors++;
        } else if (code != 0 || h != at(result, 0) || w != at(result, 1)) {
            fail_msg("%d x %d: %d x %d (%d), expected %d x %d", height, width, h, w, code, (int)at(result, 0), (int)at(result, 1));
        }
        rows++;
    }
    assert_true(rows >= 100 && errors >= 4);
    json_decref(m);

    int h, w;
    assert_int_equal(qvl__smart_resize(0, 5, 32, 65536, 1 << 24, &h, &w), QVL_EINVAL);
    assert_int_equal(qvl__smart_resize(1, 201, 32, 65536, 1 << 24, &h, &w), QVL_ELIMIT);
    assert_string_equal(qvl_last_error(), "image is 201 pixels wide and 1 high: one side may be at most 200 times the other");
    assert_int_equal(qvl__smart_resize(80, 80, 32, 1, 1 << 24, &h, &w), 0); /* 2.5 rounds to 2 */
    assert_true(h == 64 && w == 64);
}

static void smart_resize_video(void **state) {
    (void)state;
    json_t *m = load("tests/golden/videos/manifest.json"), *table = json_object_get(m, "smart_resize"), *row;
    int factor = (int)json_integer_value(json_object_get(table, "factor"));
    int temporal = (int)json_integer_value(json_object_get(table, "temporal_factor"));
    int64_t min = json_integer_value(json_object_get(table, "min")), max = json_integer_value(json_object_get(table, "max"));
    size_t i, rows = 0;
    json_array_foreach(json_object_get(table, "rows"), i, row) {
        int h = -1, w = -1;
        int code = qvl__smart_resize_video((int)at(row, 0), (int)at(row, 1), (int)at(row, 2), factor, temporal, min, max, &h, &w);
        const json_t *result = json_array_get(row, 3);
        if (json_is_null(result)) assert_int_equal(code, QVL_ELIMIT);
        else if (code != 0 || h != at(result, 0) || w != at(result, 1))
            fail_msg("row %zu: %d x %d (%d), expected %d x %d", i, h, w, code, (int)at(result, 0), (int)at(result, 1));
        rows++;
    }
    assert_true(rows >= 80);
    json_decref(m);
    int one[2], two[2]; /* a single frame is shown twice */
    assert_int_equal(qvl__smart_resize_video(1, 640, 480, 32, 2, min, max, &one[0], &one[1]), 0);
    assert_int_equal(qvl__smart_resize_video(2, 640, 480, 32, 2, min, max, &two[0], &two[1]), 0);
    assert_memory_equal(one, two, sizeof one);
}

/* ---- pixels ---- */

static void golden_pixels(void **state) {
    (void)state;
    qvl__pool *pool;
    assert_int_equal(qvl__pool_new(&pool, 2), 0);
    json_t *m = load(IMAGES "manifest.json"), *one;
    size_t i;
    int done = 0;
    json_array_foreach(json_object_get(m, "images"), i, one) {
        char path[256], got[65];
        snprintf(path, sizeof path, IMAGES "%s", json_string_value(json_object_get(one, "file")));
        qvl_image *im;
        if (qvl_image_from_file(&im, path, NULL) < 0) fail_msg("%s", qvl_last_error());
        const char *resized = json_string_value(json_object_get(one, "resized_sha256"));
        const char *values = json_string_value(json_object_get(one, "pixel_values_sha256"));
        if (json_is_false(json_object_get(one, "binding"))) { /* gray16_120x100.png: the high byte, from goldens.safetensors */
            resized = "0bbb519fa7e5042fbbf458ae10217d9cd6ef6a7fe0655d5f079d1a0d01669d81";
            values = "99203117e71f5c68895f7d3e8470a150ac9f553fb08310c435d2b33de2351bf7";
        }
        const json_t *size = json_object_get(one, "size_config"), *grid = json_object_get(one, "grid_thw");
        int h, w;
        assert_int_equal(qvl__smart_resize(im->height, im->width, 32, json_integer_value(json_object_get(size, "shortest_edge")),
                                           json_integer_value(json_object_get(size, "longest_edge")), &h, &w), 0);
        assert_int_equal(h, at(grid, 1) * 16);
        assert_int_equal(w, at(grid, 2) * 16);
        size_t bytes = (size_t)h * (size_t)w * 3;
        uint8_t *rgb = malloc(bytes);
        assert_int_equal(qvl__resize_bicubic(rgb, h, w, im->rgb, im->height, im->width, done % 2 ? pool : NULL), 0);
        hex_sha256(got, rgb, bytes);
        if (strcmp(got, resized) != 0) fail_msg("%s: resized %s, expected %s", path, got, resized);

        qvl__sha256 s; /* in slices of 37 patches, as the vision tower takes them */
        uint8_t hash[32];
        qvl__sha256_init(&s);
        int patches = h / 16 * (w / 16);
        float *slice = malloc(37 * 1536 * sizeof *slice);
        for (int first = 0; first < patches; first += 37) {
            int count = patches - first < 37 ? patches - first : 37;
            qvl__patches_cut(slice, rgb, rgb, h, w, first, count, &processor);
            qvl__sha256_add(&s, slice, (size_t)count * 1536 * sizeof *slice);
        }
        qvl__sha256_end(&s, hash);
        for (int k = 0; k < 32; k++) snprintf(got + 2 * k, 3, "%02x", hash[k]);
        if (strcmp(got, values) != 0) fail_msg("%s: pixel_values %s, expected %s", path, got, values);
        free(slice);
        free(rgb);
        qvl_image_free(im);
        done++;
    }
    assert_int_equal(done, 33);
    json_decref(m);
    qvl__pool_free(pool);
}

/* Random sizes: AVX2, plain C, one and several threads give the same bytes, and none writes outside of dst. */
static void same_everywhere(void **state) {
    (void)state;
    qvl__pool *pool;
    assert_int_equal(qvl__pool_new(&pool, 4), 0);
    srand(3);
    for (int round = 0; round < 150; round++) {
        int sh = 1 + rand() % (round % 3 ? 90 : 700), sw = 1 + rand() % (round % 5 ? 90 : 700);
        int dh = round % 7 == 0 ? sh : 1 + rand() % 300, dw = round % 11 == 0 ? sw : 1 + rand() % 200;
        size_t n = (size_t)sh * (size_t)sw * 3, out = (size_t)dh * (size_t)dw * 3, guard = 64;
        uint8_t *src = malloc(n), *dst[4];
        for (size_t i = 0; i < n; i++) src[i] = round % 4 == 0 ? (rand() & 64 ? 255 : 0) : (uint8_t)rand(); /* 0/255: clamping */
        for (int k = 0; k < 4; k++) {
            dst[k] = malloc(out + guard);
            memset(dst[k], 0xA5, out + guard);
            if (k & 1) setenv("QVL_CPU", "generic", 1);
            else unsetenv("QVL_CPU");
            assert_int_equal(qvl__resize_bicubic(dst[k], dh, dw, src, sh, sw, k & 2 ? pool : NULL), 0);
            for (size_t i = 0; i < guard; i++) assert_int_equal(dst[k][out + i], 0xA5);
            if (memcmp(dst[k], dst[0], out) != 0) fail_msg("%d x %d to %d x %d: way %d differs", sw, sh, dw, dh, k);
        }
        for (int k = 0; k < 4; k++) free(dst[k]);
        free(src);
    }
    unsetenv("QVL_CPU");
    qvl__pool_free(pool);
}

/* A flat picture stays flat: the weights of every output sum to one within the rounding of 16 bits. */
static void flat_stays_flat(void **state) {
    (void)state;
    static uint8_t src[61 * 47 * 3], dst[400 * 300 * 3];
    static const int sizes[][2] = {{1, 1}, {3, 300}, {400, 2}, {31, 60}, {61, 90}, {122, 94}, {400, 300}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int v = 0; v <= 255; v += 85) {
            memset(src, v, sizeof src);
            assert_int_equal(qvl__resize_bicubic(dst, sizes[i][0], sizes[i][1], src, 61, 47, NULL), 0);
            for (int k = 0; k < sizes[i][0] * sizes[i][1] * 3; k++) assert_int_equal(dst[k], v);
        }
}

static void bad_sizes(void **state) {
    (void)state;
    uint8_t p[3] = {0};
    assert_int_equal(qvl__resize_bicubic(p, 0, 1, p, 1, 1, NULL), QVL_EINVAL);
    assert_int_equal(qvl__resize_bicubic(p, 1, 1, p, 1, -1, NULL), QVL_EINVAL);
    assert_int_equal(qvl__resize_bicubic(p, 1, 1, p, 1, 1 << 29, NULL), QVL_EINVAL);
}

static long allocations_left;
static void *failing_malloc(void *ud, size_t n) { return (void)ud, allocations_left-- > 0 ? malloc(n) : NULL; }
static void *failing_realloc(void *ud, void *p, size_t n) { return (void)ud, allocations_left-- > 0 ? realloc(p, n) : NULL; }
static void plain_free(void *ud, void *p) { (void)ud, free(p); }

static void out_of_memory(void **state) {
    (void)state;
    static uint8_t src[40 * 30 * 3], dst[64 * 96 * 3];
    qvl_allocator a = {sizeof a, NULL, failing_malloc, failing_realloc, plain_free};
    assert_int_equal(qvl_set_allocator(&a), 0);
    long k = 0;
    for (int code = -1; code != 0; k++) {
        allocations_left = k;
        code = qvl__resize_bicubic(dst, 64, 96, src, 40, 30, NULL);
        assert_true(code == 0 || code == QVL_ENOMEM);
    }
    assert_in_range(k, 6, 12);
    assert_int_equal(qvl_set_allocator(NULL), 0);
}

/* ---- patches ---- */

/* Two different frames, other mean and std, odd slices: against the definition. */
static void patches_of_a_pair(void **state) {
    (void)state;
    enum { H = 64, W = 96, N = (H / 16) * (W / 16) };
    qvl__processor p = processor;
    memcpy(p.mean, (float[]){0.48145466f, 0.4578275f, 0.40821073f}, sizeof p.mean);
    memcpy(p.std, (float[]){0.26862954f, 0.26130258f, 0.27577711f}, sizeof p.std);
    static uint8_t frame[2][H * W * 3];
    static float all[N * 1536], part[5 * 1536];
    srand(5);
    for (int i = 0; i < 2 * H * W * 3; i++) frame[i / (H * W * 3)][i % (H * W * 3)] = (uint8_t)rand();
    qvl__patches_cut(all, frame[0], frame[1], H, W, 0, N, &p);
    int row = 0;
    for (int by = 0; by < H / 32; by++)
        for (int bx = 0; bx < W / 32; bx++)
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 2; j++, row++)
                    for (int k = 0; k < 1536; k++) {
                        int c = k / 512, t = k / 256 % 2, y = (by * 2 + i) * 16 + k / 16 % 16, x = (bx * 2 + j) * 16 + k % 16;
                        float v = frame[t][(y * W + x) * 3 + c];
                        float expected = (v - p.mean[c] * 255.0f) / (p.std[c] * 255.0f);
                        assert_true(all[row * 1536 + k] == expected);
                    }
    assert_int_equal(row, N);
    for (int first = 0; first < N; first += 5) {
        int count = N - first < 5 ? N - first : 5;
        qvl__patches_cut(part, frame[0], frame[1], H, W, first, count, &p);
        assert_memory_equal(part, all + first * 1536, (size_t)count * 1536 * sizeof *part);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(smart_resize),    cmocka_unit_test(smart_resize_video), cmocka_unit_test(golden_pixels),
        cmocka_unit_test(same_everywhere), cmocka_unit_test(flat_stays_flat),    cmocka_unit_test(bad_sizes),
        cmocka_unit_test(out_of_memory),   cmocka_unit_test(patches_of_a_pair),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
