/* test_vision.c - the vision tower against transformers: images, and a video, which only here can be looked at directly.
 *
 * Goldens: tests/golden/model/NAME/goldens.safetensors, vision.K.merged and vision.K.deepstack.J. Relative to the largest
 * golden value; the tolerance is the 1e-4, a wrong kind of GELU shows as 8e-4.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "../../libqvl/forward/forward.h"

#define OK(call) \
    do { \
        int rc_ = (call); \
        if (rc_ < 0) fail_msg("%s: %s", #call, qvl_last_error()); \
    } while (0)

static char *data;
static json_t *header;

static void open_goldens(const char *name) {
    char path[256];
    size_t n;
    uint64_t len;
    snprintf(path, sizeof path, "tests/golden/model/%s/goldens.safetensors", name);
    OK(qvl__read_file(path, 1 << 26, &data, &n));
    memcpy(&len, data, 8);
    OK(qvl__json_parse(&header, data + 8, len, path));
    memmove(data, data + 8 + len, n - 8 - len);
}

static void close_goldens(void) {
    json_decref(header);
    qvl__free(data);
}

/* Largest difference of a layer of e to a golden tensor, over its largest value; -1 when there is no such golden. */
static double difference(const qvl_embedding *e, int layer, const char *key) {
    const json_t *t = json_object_get(header, key);
    if (!t) return -1;
    const json_t *shape = json_object_get(t, "shape");
    assert_int_equal(json_integer_value(json_array_get(shape, 0)), e->tokens);
    assert_int_equal(json_integer_value(json_array_get(shape, 1)), e->hidden);
    const char *at = data + json_integer_value(json_array_get(json_object_get(t, "data_offsets"), 0));
    const float *have = e->data + (size_t)layer * (size_t)e->tokens * (size_t)e->hidden;
    double worst = 0, largest = 0;
    for (int i = 0; i < e->tokens * e->hidden; i++) {
        float want;
        memcpy(&want, at + 4 * i, 4);
        worst = fmax(worst, fabs((double)have[i] - (double)want));
        largest = fmax(largest, fabs((double)want));
    }
    return worst / largest;
}

static double compare(qvl_model *m, const qvl__visual *v, const char *prefix) {
    qvl_embedding *e;
    OK(qvl__vision_forward(m, v, &e));
    char key[64];
    snprintf(key, sizeof key, "%s.merged", prefix);
    double worst = difference(e, 0, key);
    assert_true(worst >= 0);
    for (int j = 0; j + 1 < e->layers; j++) {
        snprintf(key, sizeof key, "%s.deepstack.%d", prefix, j);
        worst = fmax(worst, difference(e, j + 1, key));
    }
    qvl_embedding_free(e);
    return worst;
}

static void towers(void **state) {
    (void)state;
    static const char *const models[] = {"tiny-dense-tied", "tiny-dense-untied"};
    static const char *const images[] = {"photo_320x240.jpg", "tiny_10x10.png", "wide_1500x12.png"};
    qvl_options *o;
    OK(qvl_options_new(&o));
    OK(qvl_options_set(o, "dtype", "f32"));
    for (int i = 0; i < 2; i++) {
        char path[256], prefix[32];
        qvl_model *m;
        double image = 0;
        open_goldens(models[i]);
        snprintf(path, sizeof path, "tests/golden/checkpoints/%s", models[i]);
        OK(qvl_model_load(&m, path, o));
        for (int k = 0; k < 3; k++) {
            qvl_image *im;
            qvl__visual *v;
            snprintf(path, sizeof path, "tests/golden/images/%s", images[k]);
            snprintf(prefix, sizeof prefix, "vision.%d", k);
            OK(qvl_image_from_file(&im, path, NULL));
            OK(qvl__visual_from_image(&v, &m->config, im, (qvl__pixels){0}, m->pool));
            image = fmax(image, compare(m, v, prefix));
            qvl__visual_free(v);
            qvl_image_free(im);
        }
        qvl__video b = {0};
        for (int k = 0; k < 8; k++) {
            qvl_image *im;
            snprintf(path, sizeof path, "tests/golden/videos/v1/frame_%03d.png", k);
            OK(qvl_image_from_file(&im, path, NULL));
            if (k == 0) OK(qvl__video_begin(&b, &m->config, 8, im->height, im->width, NULL));
            OK(qvl__video_add(&b, im, m->pool));
            qvl_image_free(im);
        }
        qvl__visual *v = qvl__video_end(&b);
        double video = compare(m, v, "vision.video");
        qvl__visual_free(v);
        print_message("%s: largest relative difference: images %.1e, video %.1e\n", models[i], image, video);
        assert_true(image < 1e-4 && video < 1e-4);
        qvl_model_free(m);
        close_goldens();
    }
    qvl_options_free(o);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(towers)};
    return cmocka_run_group_tests_name("vision", tests, NULL, NULL);
}
