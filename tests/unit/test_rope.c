/* test_rope.c - rotary angles and YaRN against transformers, up to a million positions. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <math.h>

#include "../../libqvl/forward/forward.h"
#include "golden.h"

/* The directory of a checkpoint whose config has these rope_parameters. */
static void config_with(const json_t *parameters, qvl__config *c) {
    json_error_t error;
    json_t *config = json_load_file("tests/golden/checkpoints/tiny-dense-tied/config.json", 0, &error);
    json_t *text = json_object_get(config, "text_config");
    json_object_del(text, "rope_scaling");
    json_object_set(text, "rope_parameters", (json_t *)(uintptr_t)parameters);
    char dir[] = "/tmp/qvl-rope-XXXXXX", path[64];
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/config.json", dir);
    assert_int_equal(json_dump_file(config, path, 0), 0);
    int rc = qvl__config_load(c, dir);
    if (rc) fail_msg("%s", qvl_last_error());
    remove(path);
    remove(dir);
    json_decref(config);
}

static void cases(void **state) {
    (void)state;
    json_error_t error;
    json_t *all = json_load_file("tests/golden/rope/rope.json", 0, &error), *one;
    const char *name;
    double worst_freq = 0, worst_angle = 0;
    assert_non_null(all);
    json_object_foreach(all, name, one) {
        qvl_model m = {0};
        config_with(json_object_get(one, "rope_parameters"), &m.config);
        assert_int_equal(m.config.text.head_dim, 128);
        assert_int_equal(qvl__rope_init(&m), 0);
        double scale = json_number_value(json_object_get(one, "scale"));
        assert_true(fabs(m.text_rope_scale - scale) < 1e-6 * scale);
        for (size_t i = 0; i < 64; i++) {
            double want = json_number_value(json_array_get(json_object_get(one, "inv_freq"), i)), off = fabs(m.text_inv_freq[i] - want) / want;
            if (off > worst_freq) worst_freq = off;
            if (off > 3e-7) fail_msg("%s: inverse frequency %zu is %.9g, expected %.9g", name, i, m.text_inv_freq[i], want);
        }
        const json_t *positions = json_object_get(one, "positions");
        for (size_t r = 0; r < json_array_size(positions); r++) {
            int32_t p[3];
            float cosv[64], sinv[64];
            for (size_t a = 0; a < 3; a++) p[a] = (int32_t)json_integer_value(json_array_get(json_array_get(positions, r), a));
            qvl__rope_text(&m, cosv, sinv, p, 1, 1);
            for (size_t i = 0; i < 64; i++) {
                /* both angles are float products: as far apart as the frequencies may be, at this position */
                double bound = 1e-6 + 3e-7 * p[m.text_axis[i]] * m.text_inv_freq[i];
                double c = fabs(cosv[i] - json_number_value(json_array_get(json_array_get(json_object_get(one, "cos"), r), i)));
                double s = fabs(sinv[i] - json_number_value(json_array_get(json_array_get(json_object_get(one, "sin"), r), i)));
                if (fmax(c, s) > worst_angle) worst_angle = fmax(c, s);
                if (fmax(c, s) > bound * scale) fail_msg("%s: angle %zu at position %d is off by %.2g", name, i, p[m.text_axis[i]], fmax(c, s));
            }
        }
        qvl__free(m.text_inv_freq);
        qvl__free(m.text_axis);
        qvl__config_free(&m.config);
    }
    printf("%zu configs, largest difference: frequencies %.1e (relative), cos and sin %.1e\n", json_object_size(all), worst_freq, worst_angle);
    json_decref(all);
}

/* The option gives what the config gives. */
static void option(void **state) {
    (void)state;
    qvl__text_config t = {.head_dim = 128, .max_positions = 262144, .rope_theta = 5e6, .yarn = {.factor = 1, .attention = 1}};
    assert_int_equal(qvl__config_set_yarn(&t, 1), 0);
    assert_int_equal(t.max_positions, 262144);
    assert_int_equal(qvl__config_set_yarn(&t, 3), 0);
    assert_int_equal(t.max_positions, 786432);
    assert_int_equal(t.yarn.original, 262144);
    assert_true(fabs(t.yarn.attention - (0.1 * log(3) + 1)) < 1e-12);
    assert_int_equal(qvl__config_set_yarn(&t, 2), QVL_EINVAL);
    t.yarn.factor = 1;
    t.max_positions = 1 << 27;
    assert_int_equal(qvl__config_set_yarn(&t, 3), QVL_EINVAL);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(cases), cmocka_unit_test(option)};
    return cmocka_run_group_tests_name("rope", tests, NULL, NULL);
}
