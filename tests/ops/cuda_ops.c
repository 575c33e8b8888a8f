/* cuda_ops.c - the op table of the CUDA backend: on a GPU, or on the CPU under the emulator.
 *
 * Job:        the cases of ops_cases.h in the backend's three modes.
 * Input:      the plug-in that libqvl would load (QVL_CUDA_PLUGIN); arguments: one mode (exact, deterministic, fast), one test.
 * Output:     cmocka's summary; exit status 77 where there is no GPU.
 * Invariants: exact: bounds of float sums, the same bits for every batch. deterministic: rounding to bf16, the same bits for
 *             every batch. fast: rounding to bf16, different kernels for few and many rows.
 */
#pragma GCC diagnostic ignored "-Wunused-function" /* some cases are the CPU's own */
#include "ops_cases.h"
#include "shim.h"

static const int n_levels = 1;
static qvl__device_options options;

static qvl__device *open_level(int i, qvl__pool *pool, bool bf16_math) {
    (void)i, (void)bf16_math;
    qvl__device *d;
    if (qvl__device_open(&d, pool, "cuda", &options)) fail_msg("%s", qvl_last_error());
    return shim_over(d);
}

/* A packed file of the CPU gives the same numbers. */
static void map_body(qvl__device *d) {
    qvl__device *cpu;
    assert_int_equal(qvl__cpu_open(&cpu, d->pool, false), 0);
    enum { N = 70, K = 131 };
    for (int t = 0; t < N_MATRIX_TYPES; t++)
        for (int gate_up = 0; gate_up < 2; gate_up++) {
            float *w = random_floats(N * K, 3.0f), here[N * K], there_[N * K];
            qvl__matrix a, b;
            assert_int_equal(cpu->matrix_new(cpu, &a, matrix_types[t], N, K, (qvl__role){.gate_up = gate_up}), 0);
            cpu->matrix_put(cpu, &a, 0, N, QVL__F32, w);
            assert_int_equal(d->matrix_map(d, &b, matrix_types[t], N, K, (qvl__role){.gate_up = gate_up}, a.data, a.bytes - 1), QVL_EFORMAT);
            assert_int_equal(d->matrix_map(d, &b, matrix_types[t], N, K, (qvl__role){.gate_up = gate_up}, a.data, a.bytes), 0);
            int32_t ids[N];
            for (int i = 0; i < N; i++) ids[i] = N - 1 - i;
            cpu->embed(cpu, here, &a, ids, N);
            d->embed(d, there_, &b, ids, N);
            check_bits("a mapped matrix", d->isa, here, there_, N * K);
            cpu->matrix_free(cpu, &a), d->matrix_free(d, &b);
            /* and rounding on the way to the GPU gives them too */
            b = new_matrix(d, matrix_types[t], N, K, gate_up, w);
            d->embed(d, there_, &b, ids, N);
            check_bits("a rounded matrix", d->isa, here, there_, N * K);
            d->matrix_free(d, &b);
            free(w);
        }
    cpu->close(cpu);
}
static void test_map(void **state) {
    (void)state;
    each_level(1, false, map_body);
}

/* More is on its way to the GPU than staging memory holds, and the sources change as soon as put returns. */
static void staging_body(qvl__device *d) {
    enum { PIECE = 3 << 20, PIECES = 17 };
    qvl__device *gpu = IN(d);
    char *to = gpu->alloc(gpu, (size_t)PIECE * PIECES), *host = must(malloc(PIECE)), *back = must(malloc((size_t)PIECE * PIECES));
    assert_non_null(to);
    for (int i = 0; i < PIECES; i++) {
        memset(host, 'a' + i, PIECE);
        gpu->put(gpu, to + (size_t)i * PIECE, host, PIECE);
    }
    gpu->get(gpu, back, to, (size_t)PIECE * PIECES);
    assert_int_equal(gpu->sync(gpu), 0);
    for (size_t i = 0; i < (size_t)PIECE * PIECES; i++)
        if (back[i] != (char)('a' + i / PIECE)) fail_msg("byte %zu is %c", i, back[i]);
    gpu->free(gpu, to, (size_t)PIECE * PIECES);
    free(host), free(back);
}
static void test_staging(void **state) {
    (void)state;
    each_level(1, false, staging_body);
}

/* What fast does not promise: there few and many rows are each held to the reference and not to one another. */
static void same_products(void **state) {
    if (apart == 0) test_matmul_bits(state);
}
static void same_decoding(void **state) {
    if (apart == 0) test_decode_batch(state);
}

int main(int argc, char **argv) {
    static const char *const modes[] = {"exact", "deterministic", "fast"};
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_staging),      cmocka_unit_test(test_map),          cmocka_unit_test(test_matmul_ends), cmocka_unit_test(test_pack_embed),      cmocka_unit_test(test_matmul),
                                       cmocka_unit_test(same_products),     cmocka_unit_test(test_activations), cmocka_unit_test(test_norms),           cmocka_unit_test(test_row_ops),
                                       cmocka_unit_test(test_moe_route),    cmocka_unit_test(same_decoding),     cmocka_unit_test(test_attention_paged), cmocka_unit_test(test_vision),
                                       cmocka_unit_test(test_refusals)};
    qvl__pool *pool;
    qvl__device *d;
    if (qvl__pool_new(&pool, 1) || qvl__device_open(&d, pool, "cuda", &options)) {
        printf("%s\n", qvl_last_error());
        return 77;
    }
    d->close(d);
    qvl__pool_free(pool);
    if (argc > 2) cmocka_set_test_filter(argv[2]);
    int bad = 0;
    for (int m = 0; m < 3; m++) {
        if (argc > 1 && strcmp(argv[1], modes[m]) != 0) continue;
        options = (qvl__device_options){.bf16_math = m > 0, .deterministic = m == 1, .memory = 0.9};
        apart = m == 2 ? 0.01 : 0; /* attention: probabilities of decoded rows are not rounded to bf16, and values are in -1 .. 1 */
        bad += cmocka_run_group_tests_name(modes[m], tests, NULL, NULL);
    }
    return bad != 0;
}
