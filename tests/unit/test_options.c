/* test_options.c - options.def and the bag over it.
 *
 * Job:        every line of options.def is sound; setters refuse what is out of range with the range in the message; and no
 *             source of the library reads an option that does not exist, or as another type.
 * Input:      the library; its sources, read as text.
 * Output:     cmocka's summary.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <ctype.h>
#include <glob.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../libqvl/base/base.h"

typedef struct {
    const char *name, *type, *scope, *range, *dflt, *help;
} info;

static bool at(int i, info *o) { return qvl_option_info(i, &o->name, &o->type, &o->scope, &o->range, &o->dflt, &o->help) == 0; }

static bool find(const char *name, info *o) {
    for (int i = 0; at(i, o); i++)
        if (strcmp(o->name, name) == 0) return true;
    return false;
}

static qvl_options *fresh(void) {
    qvl_options *o;
    assert_int_equal(qvl_options_new(&o), 0);
    return o;
}

static void refused(int rc, const char *part) {
    assert_int_equal(rc, QVL_EINVAL);
    if (!strstr(qvl_last_error(), part)) fail_msg("\"%s\" is not in \"%s\"", part, qvl_last_error());
}

/* Everything printed about an option is complete, and its default passes its own check. */
static void table_is_sound(void **state) {
    (void)state;
    info o;
    int n = 0;
    for (; at(n, &o); n++) {
        assert_true(*o.name && *o.help && isalpha((unsigned char)*o.name));
        for (const char *p = o.name; *p; p++) assert_true(islower((unsigned char)*p) || isdigit((unsigned char)*p) || *p == '_');
        assert_non_null(strstr(" bool int float string json ", o.type));
        assert_non_null(strstr(" model quantize image prompt engine request ", o.scope));
        assert_null(strchr(o.help, '\n'));
        info other;
        for (int k = 0; k < n; k++) assert_true(at(k, &other) && strcmp(other.name, o.name) != 0);
        bool numeric = strcmp(o.type, "int") == 0 || strcmp(o.type, "float") == 0;
        char *end;
        if (numeric) { /* "min..max", both plain numbers */
            const char *dots = strstr(o.range, "..");
            assert_true(dots && dots > o.range);
            char low[64];
            snprintf(low, sizeof low, "%.*s", (int)(dots - o.range), o.range);
            strtod(low, &end);
            if (*end) fail_msg("option %s: the range \"%s\" does not begin with a number", o.name, o.range);
            strtod(dots + 2, &end);
            if (!dots[2] || *end) fail_msg("option %s: the range \"%s\" does not end with a number", o.name, o.range);
        }
        qvl_options *bag = fresh();
        if (*o.dflt && qvl_options_set(bag, o.name, o.dflt) < 0) fail_msg("the default of %s is refused: %s", o.name, qvl_last_error());
        assert_int_equal(qvl__opt_is_set(bag, o.name), *o.dflt != 0);
        qvl_options_free(bag);
    }
    assert_true(n > 30);
    refused(qvl_option_info(n, NULL, NULL, NULL, NULL, NULL, NULL), "there are");
    refused(qvl_option_info(-1, NULL, NULL, NULL, NULL, NULL, NULL), "there are");
    assert_int_equal(qvl_option_info(0, NULL, NULL, NULL, NULL, NULL, NULL), 0);
}

/* Both ends of every numeric range are allowed, and the next number beyond is refused with the range in the message. */
static void ranges_hold(void **state) {
    (void)state;
    info o;
    for (int i = 0; at(i, &o); i++) {
        bool is_int = strcmp(o.type, "int") == 0;
        if (!is_int && strcmp(o.type, "float") != 0) continue;
        qvl_options *bag = fresh();
        char low[64], *high;
        snprintf(low, sizeof low, "%s", o.range);
        high = strstr(low, "..");
        assert_non_null(high);
        *high = 0;
        high += 2;
        assert_int_equal(qvl_options_set(bag, o.name, low), 0);
        assert_int_equal(qvl_options_set(bag, o.name, high), 0);
        if (is_int && strlen(high) < 18) {
            refused(qvl_options_set_i64(bag, o.name, strtoll(low, NULL, 10) - 1), o.range);
            refused(qvl_options_set_i64(bag, o.name, strtoll(high, NULL, 10) + 1), o.range);
        } else if (!is_int) {
            refused(qvl_options_set_f64(bag, o.name, nextafter(strtod(low, NULL), -INFINITY)), o.range);
            refused(qvl_options_set_f64(bag, o.name, nextafter(strtod(high, NULL), INFINITY)), o.range);
            refused(qvl_options_set_f64(bag, o.name, (double)NAN), o.range);
            refused(qvl_options_set_f64(bag, o.name, (double)INFINITY), o.range);
        }
        qvl_options_free(bag);
    }
}

static void choices_hold(void **state) {
    (void)state;
    info o;
    for (int i = 0; at(i, &o); i++) {
        if (strcmp(o.type, "string") != 0 || !*o.range) continue;
        qvl_options *bag = fresh();
        char list[256];
        snprintf(list, sizeof list, "%s", o.range);
        for (char *save, *c = strtok_r(list, "|", &save); c; c = strtok_r(NULL, "|", &save)) {
            assert_int_equal(qvl_options_set(bag, o.name, c), 0);
            assert_string_equal(qvl__opt_str(bag, o.name), c);
        }
        static const char *const wrong[] = {"", "au", "auto|", "AUTO", "auto ", "|"};
        for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) refused(qvl_options_set(bag, o.name, wrong[k]), o.range);
        qvl_options_free(bag);
    }
}

static void text_and_types(void **state) {
    (void)state;
    qvl_options *o = fresh();
    static const char *const not_int[] = {"", " ", "x", "1x", "1.5", "0x10", "99999999999999999999", "1e3"};
    for (size_t i = 0; i < sizeof not_int / sizeof *not_int; i++) refused(qvl_options_set(o, "max_tokens", not_int[i]), "max_tokens");
    static const char *const not_float[] = {"", "x", "0.5x", "nan", "inf", "-inf", "1e999"};
    for (size_t i = 0; i < sizeof not_float / sizeof *not_float; i++) refused(qvl_options_set(o, "temperature", not_float[i]), "temperature");
    assert_false(qvl__opt_is_set(o, "max_tokens"));
    assert_false(qvl__opt_is_set(o, "temperature"));
    static const char *const yes[] = {"true", "1", "yes", "on"}, *const no[] = {"false", "0", "no", "off"};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(qvl_options_set(o, "ignore_eos", yes[i]), 0);
        assert_int_equal(qvl__opt_i64(o, "ignore_eos"), 1);
        assert_int_equal(qvl_options_set(o, "ignore_eos", no[i]), 0);
        assert_int_equal(qvl__opt_i64(o, "ignore_eos"), 0);
    }
    refused(qvl_options_set(o, "ignore_eos", "maybe"), "bool");
    refused(qvl_options_set_i64(o, "ignore_eos", 2), "ignore_eos");
    refused(qvl_options_set_i64(o, "dtype", 1), "string");
    refused(qvl_options_set_f64(o, "max_tokens", 1), "int");
    refused(qvl_options_set_f64(o, "dtype", 1), "string");
    assert_int_equal(qvl_options_set_i64(o, "temperature", 2), 0); /* a whole number is a float */
    assert_true(qvl__opt_f64(o, "temperature") == 2);
    assert_int_equal(qvl_options_set_i64(o, "seed", INT64_MIN), 0);
    assert_true(qvl__opt_i64(o, "seed") == INT64_MIN);
    assert_int_equal(qvl_options_set(o, "seed", "9223372036854775807"), 0);
    assert_true(qvl__opt_i64(o, "seed") == INT64_MAX);
    qvl_options_free(o);
}

static void wrong_calls(void **state) {
    (void)state;
    qvl_options *o = fresh();
    refused(qvl_options_set(o, "no_such", "1"), "no_such");
    refused(qvl_options_set_i64(o, "no_such", 1), "no_such");
    refused(qvl_options_set_f64(o, "no_such", 1), "no_such");
    refused(qvl_options_set(o, NULL, "1"), "unknown option");
    refused(qvl_options_set_i64(o, NULL, 1), "unknown option");
    refused(qvl_options_set(o, "max_tokens", NULL), "NULL");
    refused(qvl_options_set(NULL, "max_tokens", "1"), "NULL");
    refused(qvl_options_set_i64(NULL, "max_tokens", 1), "NULL");
    refused(qvl_options_set_f64(NULL, "temperature", 1), "NULL");
    refused(qvl_options_set_progress(NULL, NULL, NULL), "NULL");
    refused(qvl_options_new(NULL), "NULL");
    refused(qvl_options_set(o, "max_tokens\nfoo", "1"), "max_tokens foo"); /* a message is one line */
    qvl_options_free(o);
    qvl_options_free(NULL);
}

/* A refused value leaves the one before; the last one counts; bags do not know of each other; NULL means defaults. */
static void values_keep(void **state) {
    (void)state;
    qvl_options *a = fresh(), *b = fresh();
    assert_int_equal(qvl_options_set(a, "top_p", "0.25"), 0);
    refused(qvl_options_set(a, "top_p", "7"), "top_p");
    assert_true(qvl__opt_f64(a, "top_p") == 0.25);
    assert_true(qvl__opt_f64(b, "top_p") == 1 && qvl__opt_f64(NULL, "top_p") == 1);
    assert_false(qvl__opt_is_set(b, "top_p"));
    assert_false(qvl__opt_is_set(NULL, "top_p"));
    char stop[] = "[\"a\"]";
    assert_int_equal(qvl_options_set(a, "stop", stop), 0);
    stop[2] = 'b'; /* the bag has its own copy */
    assert_string_equal(qvl__opt_str(a, "stop"), "[\"a\"]");
    assert_int_equal(qvl_options_set(a, "stop", "\"c\""), 0);
    assert_string_equal(qvl__opt_str(a, "stop"), "\"c\"");
    assert_string_equal(qvl__opt_str(b, "stop"), "");
    qvl_options_free(a);
    qvl_options_free(b);
}

static int stop_at(void *ud, uint64_t done, uint64_t total) { return ud == &stop_at && done == total; }

static void progress_is_carried(void **state) {
    (void)state;
    qvl_options *o = fresh();
    qvl_progress_fn fn = stop_at;
    void *ud = o;
    qvl__opt_progress(NULL, &fn, &ud);
    assert_true(!fn && !ud);
    assert_int_equal(qvl_options_set_progress(o, stop_at, o), 0);
    qvl__opt_progress(o, &fn, &ud);
    assert_true(fn == stop_at && ud == o);
    qvl_options_free(o);
}

/* ---- the sources: qvl__opt_KIND(o, "name") must name an option of that kind ---- */

static char *read_text(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    long n = ftell(f);
    rewind(f);
    char *s = calloc((size_t)n + 1, 1);
    if (s && fread(s, 1, (size_t)n, f) != (size_t)n) s[0] = 0;
    fclose(f);
    return s;
}

static int check_source(const char *path) {
    static const struct {
        const char *call, *types;
    } kinds[] = {{"qvl__opt_i64(", "bool int"}, {"qvl__opt_f64(", "float"}, {"qvl__opt_str(", "string json"}, {"qvl__opt_is_set(", "bool int float string json"}};
    char *text = read_text(path);
    assert_non_null(text);
    int found = 0;
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        for (const char *p = text; (p = strstr(p, kinds[k].call)); p++) {
            const char *end = strchr(p, ')'), *quote = strchr(p, '"');
            if (!quote || quote > end) continue; /* a declaration, or a name from a variable */
            char name[64];
            snprintf(name, sizeof name, "%.*s", (int)strcspn(quote + 1, "\""), quote + 1);
            info o;
            if (!find(name, &o)) fail_msg("%s reads option \"%s\", which options.def does not have", path, name);
            if (!strstr(kinds[k].types, o.type)) fail_msg("%s: %s\"%s\") but the option is of type %s", path, kinds[k].call, name, o.type);
            found++;
        }
    }
    free(text);
    return found;
}

static void sources_read_what_exists(void **state) {
    (void)state;
    glob_t g;
    assert_int_equal(glob("libqvl/*/*.c", 0, NULL, &g), 0);
    assert_int_equal(glob("libqvl/*/*/*.c", GLOB_APPEND, NULL, &g), 0);
    int found = 0;
    for (size_t i = 0; i < g.gl_pathc; i++) found += check_source(g.gl_pathv[i]);
    globfree(&g);
    assert_true(found > 30);
}

/* And the other way: an option that nothing reads would be a promise nobody keeps. device has one choice besides auto,
 * so its check is all there is to it. */
static void every_option_is_read(void **state) {
    (void)state;
    glob_t g;
    assert_int_equal(glob("libqvl/*/*.c", 0, NULL, &g), 0);
    info o;
    for (int i = 0; at(i, &o); i++) {
        char quoted[80];
        snprintf(quoted, sizeof quoted, "\"%s\"", o.name);
        bool read = strcmp(o.name, "device") == 0 && strcmp(o.range, "auto|cpu") == 0;
        for (size_t k = 0; k < g.gl_pathc && !read; k++) {
            char *text = read_text(g.gl_pathv[k]);
            assert_non_null(text);
            read = strstr(text, quoted) != NULL;
            free(text);
        }
        if (!read) fail_msg("no source of the library mentions option %s", quoted);
    }
    globfree(&g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(table_is_sound),      cmocka_unit_test(ranges_hold),           cmocka_unit_test(choices_hold),
        cmocka_unit_test(text_and_types),      cmocka_unit_test(wrong_calls),           cmocka_unit_test(values_keep),
        cmocka_unit_test(progress_is_carried), cmocka_unit_test(sources_read_what_exists), cmocka_unit_test(every_option_is_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
