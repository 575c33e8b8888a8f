/* test_emulated_avx512.c - the kernel text of the avx512 level, its instructions spelled in C (simd.h).
 *
 * Job:        the cases of ops_cases.h with 16 lanes and that level's tile sizes, on any machine.
 * Input:      kern.c, compiled into this program (emulated.h).
 * Output:     cmocka's summary.
 * Invariants: says nothing about the instructions themselves, only about the code that uses them.
 */
#define QVL__ISA_avx512 1
#define qvl__kern_avx512 qvl__kern_emulated
#include "emulated.h"

int main(void) {
    const struct CMUnitTest tests[] = {OPS_TESTS};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
