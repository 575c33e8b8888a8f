/* test_ops.c - the op table at every level this machine has, and the choice of the level.
 *
 * Job:        the cases of ops_cases.h on real instructions; QVL_CPU.
 * Input:      QVL_CPU is set by the tests themselves.
 * Output:     cmocka's summary.
 * Invariants: a level that the machine lacks is left out and said so.
 */
#include "ops_cases.h"

static const char *const level_names[] = {"generic", "avx2", "avx2-vnni", "avx512", "avx512-vnni", "avx512-bf16", "amx"};
enum { N_LEVELS = sizeof level_names / sizeof *level_names };

static qvl__device *open_level(int i, qvl__pool *pool, bool bf16_math) {
    qvl__device *d;
    setenv("QVL_CPU", level_names[i], 1);
    int rc = qvl__cpu_open(&d, pool, bf16_math);
    unsetenv("QVL_CPU");
    if (rc == 0) return d;
    static bool said[N_LEVELS];
    if (!said[i]) printf("[   INFO   ] %s\n", qvl_last_error());
    said[i] = true;
    return NULL;
}

static void test_level_choice(void **state) {
    (void)state;
    qvl__pool *pool;
    assert_int_equal(qvl__pool_new(&pool, 1), 0);
    qvl__device *d;
    setenv("QVL_CPU", "sse9", 1);
    assert_int_equal(qvl__cpu_open(&d, pool, false), QVL_EINVAL);
    assert_null(d);
    assert_non_null(strstr(qvl_last_error(), "sse9"));
    assert_non_null(strstr(qvl_last_error(), "generic"));
    setenv("QVL_CPU", "generic", 1);
    assert_int_equal(qvl__cpu_open(&d, pool, true), 0);
    assert_string_equal(d->isa, "generic");
    assert_false(d->bf16_math);
    d->close(d);
    unsetenv("QVL_CPU");
    assert_int_equal(qvl__cpu_open(&d, pool, true), 0);
    assert_int_equal(d->bf16_math, strcmp(d->isa, "avx512-bf16") == 0 || strcmp(d->isa, "amx") == 0);
    d->close(d);
#if defined(__x86_64__) && defined(__linux__)
    static const char *const flags[] = {" sse2 ", " avx2 ", " avx_vnni ", " avx512bw ", " avx512_vnni ", " avx512_bf16 ", " amx_bf16 "};
    static char info[8192]; /* of the first processor */
    FILE *f = fopen("/proc/cpuinfo", "r");
    assert_non_null(f);
    info[fread(info, 1, sizeof info - 1, f)] = 0;
    fclose(f);
    for (char *end = info; (end = strchr(end, '\n'));) *end = ' ';
    for (int i = 0; i < N_LEVELS; i++) {
        d = open_level(i, pool, false);
        if (d || strcmp(level_names[i], "amx") != 0) assert_int_equal(d != NULL, strstr(info, flags[i]) != NULL); /* tile registers can be refused */
        if (d) assert_string_equal(d->isa, level_names[i]);
        if (d) d->close(d);
    }
#endif
    qvl__pool_free(pool);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_level_choice), OPS_TESTS};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
