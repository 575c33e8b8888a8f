/* test_ops.c - the op table at every level this machine has, and the choice of the level.
 *
 * Job:        the cases of ops_cases.h on real instructions; QVL_CPU; with --bench: speed.
 * Input:      QVL_CPU is set by the tests themselves.
 * Output:     cmocka's summary; with --bench a few lines of figures.
 * Invariants: a level that the machine lacks is left out and said so.
 */
#include "ops_cases.h"

static const char *const level_names[] = {"generic", "avx2", "avx512", "avx512-vnni", "avx512-bf16"};
static const int n_levels = 5;

static qvl__device *open_level(int i, qvl__pool *pool, bool bf16_math) {
    qvl__device *d;
    setenv("QVL_CPU", level_names[i], 1);
    int rc = qvl__cpu_open(&d, pool, bf16_math);
    unsetenv("QVL_CPU");
    if (rc == 0) return d;
    static bool said[5];
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
    assert_int_equal(d->bf16_math, strcmp(d->isa, "avx512-bf16") == 0);
    char best[32];
    snprintf(best, sizeof best, "%s", d->isa);
    d->close(d);
    bool past = false; /* every level up to the best opens, none past it */
    for (int i = 0; i < n_levels; i++) {
        d = open_level(i, pool, false);
        assert_int_equal(d != NULL, !past);
        if (d) assert_string_equal(d->isa, level_names[i]);
        if (d) d->close(d);
        if (strcmp(level_names[i], best) == 0) past = true;
    }
    assert_true(past);
    qvl__pool_free(pool);
}

/* ---- --bench ---- */

#if defined(__x86_64__)
/* GFLOP/s of one core that does nothing but FMAs on registers. */
__attribute__((target("avx2,fma"))) static double fma_peak(void) {
    typedef float v8 __attribute__((vector_size(32)));
    v8 a[12], x = {0}, y = {0};
    for (int i = 0; i < 12; i++) a[i] = (v8){0} + (float)i;
    x += 0.999f, y += 0.001f;
    const int n = 4000000;
    double best = 1e30;
    for (int round = 0; round < 5; round++) {
        double t0 = qvl__now_ms();
        for (int i = 0; i < n; i++) {
#pragma GCC unroll 12
            for (int j = 0; j < 12; j++) a[j] = __builtin_ia32_vfmaddps256(a[j], x, y);
            __asm__ volatile("" : "+x"(x));
        }
        double t = qvl__now_ms() - t0;
        if (t < best) best = t;
    }
    volatile float sink = 0;
    for (int i = 0; i < 12; i++) sink += a[i][0];
    return 12.0 * 16 * n / best / 1e6;
}
#endif

static void bench(int threads) {
    qvl__pool *pool;
    qvl__device *d;
    if (qvl__pool_new(&pool, threads) || qvl__cpu_open(&d, pool, false)) {
        printf("%s\n", qvl_last_error());
        return;
    }
    threads = qvl__pool_threads(pool);
    double peak = 0;
#if defined(__x86_64__)
    if (strcmp(d->isa, "generic") != 0) peak = fma_peak();
#endif
    printf("%s, %d threads; peak of one core %.1f GFLOP/s with 256-bit FMA\n", d->isa, threads, peak);
    const int k = 2048, n = 6144, most = 512;
    float *w = random_floats((size_t)n * k, 1.0f), *x = random_floats((size_t)most * k, 1.0f), *y = floats((size_t)most * n);
    uint16_t *h = encode(w, (size_t)n * k, QVL__BF16);
    static const char *const names[] = {"f32", "bf16", "f16", "int8"};
    for (int type = 0; type < 3; type++) {
        qvl__matrix m[4]; /* more than the last-level cache holds */
        double t0 = qvl__now_ms();
        for (int i = 0; i < 4; i++) {
            d->matrix_new(d, &m[i], (qvl__type)type, n, k, false);
            d->matrix_put(d, &m[i], 0, n, QVL__BF16, h);
        }
        double t = qvl__now_ms() - t0;
        printf("  %-4s pack from bf16, pages included: %.2f GB/s of source\n", names[type], 4.0 * n * k * 2 / t / 1e6);
        static const int rows[] = {1, 2, 4, 8, 16, 64, 512};
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            double best = 1e30;
            for (int round = 0; round < (rows[r] < 64 ? 16 : 4); round++) {
                t0 = qvl__now_ms();
                d->matmul(d, y, x, rows[r], &m[round % 4], NULL, QVL__EPI_NONE);
                t = qvl__now_ms() - t0;
                if (t < best) best = t;
            }
            double gf = 2.0 * rows[r] * n * k / best / 1e6;
            printf("  %-4s %3d rows %d x %d: %7.3f ms %6.1f GB/s %6.1f GFLOP/s %5.1f %% of peak\n", names[type], rows[r], k,
                n, best, (double)m[0].bytes / best / 1e6,
                   gf, peak > 0 ? 100 * gf / peak / threads : 0);
        }
        for (int i = 0; i < 4; i++) d->matrix_free(d, &m[i]);
    }
    free(h), free(y), free(x), free(w);

    enum { heads = 16, kv_heads = 8, dim = 128, depth = 2048 };
    const int ld = (heads + 2 * kv_heads) * dim;
    for (int type = QVL__F32; type <= QVL__I8; type++) {
        qvl__kv kv;
        d->kv_new(d, &kv, (qvl__type)type, 4, kv_heads, dim, depth / QVL__KV_BLOCK);
        int32_t table[depth / QVL__KV_BLOCK], seq[512] = {0}, pos[512];
        float *qkv = random_floats((size_t)512 * ld, 1.0f), *out = floats((size_t)512 * heads * dim),
            *ones = floats((size_t)512 * dim);
        for (int i = 0; i < depth / QVL__KV_BLOCK; i++) table[i] = depth / QVL__KV_BLOCK - 1 - i;
        for (int i = 0; i < 512 * dim; i++) ones[i] = 1.0f;
        for (int layer = 0; layer < 4; layer++)
            for (int c = 0; c < 4; c++) {
                for (int i = 0; i < 512; i++) pos[i] = c * 512 + i;
                qvl__ragged b = {512, seq, pos, table, depth / QVL__KV_BLOCK};
                d->qk_norm_rope_kv(d, qkv, heads, ones, ones, 1e-6f, ones, ones, &kv, layer, &b);
            }
        static const int counts[] = {1, 512};
        for (int c = 0; c < 2; c++) {
            double best = 1e30;
            for (int round = 0; round < 8; round++) {
                qvl__ragged b = {counts[c], seq, pos + 512 - counts[c], table, depth / QVL__KV_BLOCK};
                double t0 = qvl__now_ms();
                d->attention_paged(d, out, qkv, heads, &kv, round % 4, &b);
                double t = qvl__now_ms() - t0;
                if (t < best) best = t;
            }
            double keys = counts[c] == 1 ? depth : 512 * (depth - 255.5);
            printf("  attention_paged, %s cache, %3d rows at depth 2048, %d/%d heads of %d: %7.3f ms", names[type],
                counts[c], heads, kv_heads, dim, best);
            if (counts[c] == 1) printf(" %5.1f GB/s\n", (double)kv.block_bytes / 4 * depth / QVL__KV_BLOCK / best / 1e6);
            else printf(" %5.1f GFLOP/s\n", 4.0 * keys * heads * dim / best / 1e6);
        }
        d->kv_free(d, &kv);
        free(ones), free(out), free(qkv);
    }
    const int span = 1024, vd = 64;
    float *qkv = random_floats((size_t)span * 3 * 16 * vd, 1.0f);
    void *scratch = must(malloc(d->attention_full_scratch(d, span, vd, 16)));
    double best = 1e30;
    for (int round = 0; round < 4; round++) {
        double t0 = qvl__now_ms();
        d->attention_pack(d, scratch, qkv, span, 16, vd, 0, 16);
        d->attention_full(d, qkv, span, 16, vd, 0, 16, 0, span, scratch);
        double t = qvl__now_ms() - t0;
        if (t < best) best = t;
    }
    printf("  attention_full, span %d, 16 heads of %d: %.2f ms %.1f GFLOP/s\n", span, vd, best,
        4.0 * span * span * 16 * vd / best / 1e6);
    free(scratch), free(qkv);
    d->close(d);
    qvl__pool_free(pool);
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--bench") == 0) {
        bench(argc > 2 ? atoi(argv[2]) : 0);
        return 0;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_level_choice), OPS_TESTS};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
