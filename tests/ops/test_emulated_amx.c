/* test_emulated_amx.c - the kernel text of the amx level, its instructions spelled in C (simd.h).
 *
 * Job:        the cases of ops_cases.h with 16 lanes and that level's tile sizes, on any machine.
 * Input:      kern.c, compiled into this program (emulated.h).
 * Output:     cmocka's summary.
 * Invariants: says nothing about the instructions themselves, only about the code that uses them; but where the machine has them,
 *             both give the same bits.
 */
#define QVL__ISA_amx 1
#define qvl__kern_amx qvl__kern_emulated
#include "emulated.h"

/* Products of bf16 and of integers, of numbers from 1e-6 to 1e6 (and 1e-40, which counts as zero). */
static void test_as_hardware(void **state) {
    (void)state;
    qvl__pool *pool;
    qvl__device *real, *emulated;
    assert_int_equal(qvl__pool_new(&pool, 1), 0);
    setenv("QVL_CPU", "amx", 1);
    int rc = qvl__cpu_open(&real, pool, true);
    unsetenv("QVL_CPU");
    if (rc != 0) {
        printf("[   INFO   ] %s\n", qvl_last_error());
        qvl__pool_free(pool);
        skip();
    }
    emulated = open_level(0, pool, true);
    enum { ROWS = 70, N = 90, K = 620 };
    float *w = random_floats(N * K, 1.0f), *x = random_floats(ROWS * K, 1.0f), *y = floats(ROWS * N), *z = floats(ROWS * N);
    for (int i = 0; i < ROWS * K; i++) x[i] *= i % 97 == 0 ? 1e-40f : powf(10.0f, (float)(i % 13 - 6));
    static const qvl__type types[] = {QVL__BF16, QVL__Q8, QVL__Q4};
    for (size_t t = 0; t < 4; t++) {
        qvl__matrix m = new_matrix(real, types[t % 3], N, K, false, w);
        if (t == 3) m.role.head_dim = 8; /* activations in two parts */
        real->matmul(real, y, x, ROWS, &m, NULL, QVL__EPI_NONE);
        emulated->matmul(emulated, z, x, ROWS, &m, NULL, QVL__EPI_NONE);
        check_bits("emulation and hardware", "amx", y, z, ROWS * N);
        real->matrix_free(real, &m);
    }
    free(z), free(y), free(x), free(w);
    real->close(real), emulated->close(emulated);
    qvl__pool_free(pool);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_as_hardware), OPS_TESTS};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
