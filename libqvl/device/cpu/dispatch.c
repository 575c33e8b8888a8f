/* dispatch.c - which kernels this machine runs.
 *
 * Job:        choose the fastest level that the CPU and the operating system support, or the one that QVL_CPU names.
 * Input:      cpuid, XGETBV, the environment variable QVL_CPU (generic, avx2, avx2-vnni, avx512, avx512-vnni, avx512-bf16, amx).
 * Output:     an open device, or QVL_EINVAL naming the choices.
 * Invariants: a level counts only if the operating system saves its registers (XCR0), not on cpuid's word alone;
 *             this file is compiled for the baseline and touches no kernel of a level that it has not found.
 */
#include <stdio.h>
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

enum { GENERIC, AVX2, AVX2_VNNI, AVX512, AVX512_VNNI, AVX512_BF16, AMX };
static const level levels[] = {
    [GENERIC] = {"generic", qvl__kern_generic},
    [AVX2] = {"avx2", qvl__kern_avx2},
    [AVX2_VNNI] = {"avx2-vnni", qvl__kern_avx2_vnni},
    [AVX512] = {"avx512", qvl__kern_avx512},
    [AVX512_VNNI] = {"avx512-vnni", qvl__kern_avx512_vnni},
    [AVX512_BF16] = {"avx512-bf16", qvl__kern_avx512_bf16},
    [AMX] = {"amx", qvl__kern_amx},
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

/* A bit for each level that this machine has. AVX-VNNI and AVX-512 come without each other as well as together. */
static unsigned levels_here(void) {
    unsigned here = 1u << GENERIC, a, b, c, d, a1 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return here;
    const unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if ((c & (fma | osxsave | avx | f16c)) != (fma | osxsave | avx | f16c)) return here;
    uint64_t saved = xcr0();
    if ((saved & 0x6) != 0x6) return here; /* xmm, ymm */
    unsigned features, vnni, tiles;        /* leaf 7 */
    if (!__get_cpuid_count(7, 0, &a, &features, &vnni, &tiles) || !(features & 1u << 5)) return here; /* AVX2 */
    here |= 1u << AVX2;
    if (a >= 1 && __get_cpuid_count(7, 1, &a1, &b, &c, &d) && a1 & 1u << 4) here |= 1u << AVX2_VNNI; /* AVX_VNNI */
    const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    if ((features & (f | dq | bw | vl)) != (f | dq | bw | vl) || (saved & 0xe6) != 0xe6) return here; /* opmask, zmm */
    here |= 1u << AVX512;
    if (!(vnni & 1u << 11)) return here; /* AVX512_VNNI */
    here |= 1u << AVX512_VNNI;
    if (!(a1 & 1u << 5)) return here; /* AVX512_BF16 */
    here |= 1u << AVX512_BF16;
    const unsigned amx = 1u << 22 | 1u << 24 | 1u << 25; /* AMX_BF16, AMX_TILE, AMX_INT8 */
    if ((tiles & amx) == amx && (saved & 0x60000) == 0x60000 && may_use_tiles()) here |= 1u << AMX;
    return here;
}

/* The fastest. Intel's vdpbf16ps does half of what FMAs do in the same time, AMD's twice that (qvl bench --kernels): there floats
 * are faster and nearer. */
static int preferred(unsigned here) {
    unsigned a, b, c, d;
    bool intel = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx && c == signature_INTEL_ecx && d == signature_INTEL_edx;
    int best = AMX;
    while (!(here & 1u << best)) best--;
    return best == AVX512_BF16 && intel ? AVX512_VNNI : best;
}
#else
static const level levels[] = {{"generic", qvl__kern_generic}};

static unsigned levels_here(void) { return 1; }
static int preferred(unsigned here) {
    (void)here;
    return 0;
}
#endif

/* The names of some levels, "generic, avx2 or avx512". */
static void name_levels(char *to, size_t size, unsigned which) {
    *to = 0;
    for (unsigned i = 0, rest = which; rest; i++) {
        if (!(rest & 1u << i)) continue;
        rest &= ~(1u << i);
        size_t used = strlen(to);
        snprintf(to + used, size - used, "%s%s", !used ? "" : rest ? ", " : " or ", levels[i].name);
    }
}

int qvl__cpu_open(qvl__device **out, qvl__pool *pool, bool bf16_math) {
    *out = NULL;
    const unsigned here = levels_here(), n = sizeof levels / sizeof *levels;
    int use = preferred(here);
    const char *cap = getenv("QVL_CPU");
    if (cap && *cap) {
        char names[128];
        unsigned asked = 0;
        while (asked < n && strcmp(levels[asked].name, cap) != 0) asked++;
        if (asked == n) {
            name_levels(names, sizeof names, (1u << n) - 1);
            qvl__log(QVL_LOG_WARN, "QVL_CPU=%s is not a level this build knows", cap);
            return qvl__fail(QVL_EINVAL, "QVL_CPU is \"%.32s\": it may be %s", cap, names);
        }
        if (!(here & 1u << asked)) {
            name_levels(names, sizeof names, here);
            return qvl__fail(QVL_EINVAL, "QVL_CPU is %s, which this machine does not have: unset it, or set it to %s", cap, names);
        }
        use = (int)asked;
    }
    return qvl__cpu_open_kern(out, pool, bf16_math, levels[use].init);
}
