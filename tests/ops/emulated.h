/* emulated.h - the kernel text of a level with its instructions spelled in C (simd.h), as the one level of ops_cases.h.
 *
 * Job:        what the test_emulated_*.c share.
 * Input:      QVL__ISA_<level>, and qvl__kern_<level> defined as qvl__kern_emulated, because the library has the real one.
 * Output:     n_levels and open_level.
 * Invariants: none of the library's kernels run.
 */
#define QVL__SIMD_EMULATE 1
#include "../../libqvl/device/cpu/kern.c"
#include "ops_cases.h"

static const int n_levels = 1;

static qvl__device *open_level(int i, qvl__pool *pool, bool bf16_math) {
    (void)i;
    qvl__device *d;
    assert_int_equal(qvl__cpu_open_kern(&d, pool, bf16_math, qvl__kern_emulated), 0);
    return d;
}
