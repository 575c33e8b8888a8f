/* dispatch.c - which kernels this machine runs.
 *
 * Job:        choose the fastest level that the CPU and the operating system support, or the one that QVL_CPU names.
 * Input:      cpuid, XGETBV, the environment variable QVL_CPU (generic, avx2, avx512, avx512-vnni, avx512-bf16, amx).
 * Output:     an open device, or QVL_EINVAL naming the choices.
 * Invariants: a level counts only if the operating system saves its registers (XCR0), not on cpuid's word alone;
 *             this file is compiled for the baseline and touches no kernel of a level that it has not found.
 */
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

typedef struct {
    const char *name;
    int (*init)(struct qvl__kern *k);
} level;

#if defined(__x86_64__)
#include <cpuid.h>
#include <errno.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const level levels[] = {
    {"generic", qvl__kern_generic},
    {"avx2", qvl__kern_avx2},
    {"avx512", qvl__kern_avx512},
    {"avx512-vnni", qvl__kern_avx512_vnni},
    {"avx512-bf16", qvl__kern_avx512_bf16},
    {"amx", qvl__kern_amx},
};

static uint64_t xcr0(void) {
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
}

/* Linux gives a process the tile registers when it asks (Documentation/arch/x86/xstate.rst). */
static bool may_use_tiles(void) {
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0) return true;
    static _Atomic bool said;
    if (!said) qvl__log(QVL_LOG_WARN, "this CPU has AMX, but the kernel does not let this process use it: %s", strerror(errno));
    said = true;
#endif
    return false;
}

/* Index of the best level in levels. */
static int best_level(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if ((c & (fma | osxsave | avx | f16c)) != (fma | osxsave | avx | f16c)) return 0;
    uint64_t saved = xcr0();
    if ((saved & 0x6) != 0x6) return 0; /* xmm, ymm */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & 1u << 5)) return 0; /* AVX2 */
    const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    if ((b & (f | dq | bw | vl)) != (f | dq | bw | vl)) return 1;
    if ((saved & 0xe6) != 0xe6) return 1; /* opmask, zmm */
    if (!(c & 1u << 11)) return 2; /* AVX512_VNNI */
    const unsigned amx = d & (1u << 22 | 1u << 24 | 1u << 25);
    if (a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return 3; /* AVX512_BF16 */
    if (amx != (1u << 22 | 1u << 24 | 1u << 25) || (saved & 0x60000) != 0x60000) return 4; /* AMX_BF16, AMX_TILE, AMX_INT8; tiles */
    return may_use_tiles() ? 5 : 4;
}

/* Intel's vdpbf16ps does half of what FMAs do in the same time, AMD's twice that (qvl bench --kernels): there floats are faster
 * and nearer. */
static int preferred(int best) {
    unsigned a, b, c, d;
    bool intel = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx && c == signature_INTEL_ecx && d == signature_INTEL_edx;
    return best == 4 && intel ? 3 : best;
}
#else
static const level levels[] = {{"generic", qvl__kern_generic}};

static int best_level(void) { return 0; }
static int preferred(int best) { return best; }
#endif

int qvl__cpu_open(qvl__device **out, qvl__pool *pool, bool bf16_math) {
    *out = NULL;
    const int best = best_level(), n = (int)(sizeof levels / sizeof *levels);
    int use = preferred(best);
    const char *cap = getenv("QVL_CPU");
    if (cap && *cap) {
        int asked = 0;
        while (asked < n && strcmp(levels[asked].name, cap) != 0) asked++;
        if (asked == n) {
            qvl__log(QVL_LOG_WARN, "QVL_CPU=%s is not a level this build knows", cap);
            return qvl__fail(QVL_EINVAL, "QVL_CPU is \"%.32s\": it may be generic%s", cap,
                             n > 1 ? ", avx2, avx512, avx512-vnni, avx512-bf16 or amx" : " on this architecture");
        }
        if (asked > best)
            return qvl__fail(QVL_EINVAL, "QVL_CPU is %s, but this machine has no more than %s: unset it or set a lower level", cap,
                             levels[best].name);
        use = asked;
    }
    return qvl__cpu_open_kern(out, pool, bf16_math, levels[use].init);
}
