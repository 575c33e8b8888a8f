/* test_emulated_amx.c - the kernel text of the amx level, its instructions spelled in C (simd.h).
 *
 * Job:        the cases of ops_cases.h with 16 lanes and that level's tile sizes, on any machine.
 * Input:      kern.c, compiled into this program with QVL__SIMD_EMULATE.
 * Output:     cmocka's summary.
 * Invariants: says nothing about the instructions themselves, only about the code that uses them.
 */
#define QVL__SIMD_EMULATE 1
#define QVL__ISA_amx 1
#define qvl__kern_amx qvl__kern_emulated /* the library has the real one */
#include "../../libqvl/device/cpu/kern.c"
#include "ops_cases.h"

static const int n_levels = 1;

static qvl__device *open_level(int i, qvl__pool *pool, bool bf16_math) {
    (void)i;
    qvl__device *d;
    assert_int_equal(qvl__cpu_open_kern(&d, pool, bf16_math, qvl__kern_emulated), 0);
    return d;
}

int main(void) {
    const struct CMUnitTest tests[] = {OPS_TESTS};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
