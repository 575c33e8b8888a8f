/* simd.h - the vector vocabulary of kern.c, and the only file with intrinsics.
 *
 * Job:        one set of names (vf, vload, vfma, ...) for all instruction sets, chosen by QVL__ISA_<name>.
 * Input:      included by kern.c alone, which the Makefile compiles once for each instruction set.
 * Output:     W lanes in a vector, VP = 16 / W vectors across a panel of 16 columns, the sizes of the matrix tile.
 * Invariants: every operation is lane by lane and rounds to nearest even, so a lane never depends on its neighbours;
 *             vfma is one fused operation from AVX2 up and a multiplication and an addition in generic C: bits agree
 *             within one level, not between levels;
 *             vmax and vmin are a > b ? a : b and a < b ? a : b, so a NaN in b wins (x86 semantics, also in C).
 *
 * With QVL__SIMD_EMULATE the 16-wide levels are spelled in plain C, vdpbf16ps and the tile registers of AMX included, so that
 * their kernel text and tile sizes run in the tests of a machine without them.
 */
#ifndef QVL__SIMD_H
#define QVL__SIMD_H

#include <stdint.h>
#include <string.h>

#include "half.h"

#define PANEL 16
#define INLINE static inline __attribute__((always_inline, unused))

#if defined(QVL__ISA_generic)
#define ISA_NAME "generic"
#define ISA_INIT qvl__kern_generic
#elif defined(QVL__ISA_avx2)
#define ISA_NAME "avx2"
#define ISA_INIT qvl__kern_avx2
#elif defined(QVL__ISA_avx2_vnni)
#define ISA_NAME "avx2-vnni"
#define ISA_INIT qvl__kern_avx2_vnni
#define HAVE_VNNI 1
#elif defined(QVL__ISA_avx512)
#define ISA_NAME "avx512"
#define ISA_INIT qvl__kern_avx512
#elif defined(QVL__ISA_avx512_vnni)
#define ISA_NAME "avx512-vnni"
#define ISA_INIT qvl__kern_avx512_vnni
#define HAVE_VNNI 1
#elif defined(QVL__ISA_avx512_bf16)
#define ISA_NAME "avx512-bf16"
#define ISA_INIT qvl__kern_avx512_bf16
#define HAVE_VNNI 1
#define HAVE_DOT 1
#elif defined(QVL__ISA_amx)
#define ISA_NAME "amx"
#define ISA_INIT qvl__kern_amx
#define HAVE_VNNI 1
#define HAVE_TILES 1
#else
#error "compile with -DQVL__ISA_generic, _avx2, _avx2_vnni, _avx512, _avx512_vnni, _avx512_bf16 or _amx"
#endif

#ifndef HAVE_VNNI
#define HAVE_VNNI 0
#endif
#ifndef HAVE_TILES
#define HAVE_TILES 0
#endif

#if HAVE_TILES
/* The shapes of the 8 tile registers, as LDTILECFG reads them: rows, and bytes of a row. */
typedef struct {
    uint8_t palette, start_row, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_shape;
#endif

/* The matrix tile is mr rows by np panels, all accumulators in registers: at most MR rows. NP1 panels for one row, NP2
 * for two or three and NP4 for more (for MR = 3: NP2 for two, NP4 for three) keep at least 8 chains of additions going,
 * which is what hides the latency of an FMA; one row with 512 bits waits for memory, and takes 4 panels, because more
 * streams of weights than that get into each other's way. */

#if defined(QVL__ISA_avx2) || defined(QVL__ISA_avx2_vnni)
/* ---- AVX2 + FMA + F16C; AVX-VNNI ---- */
#include <immintrin.h>
#define W 8
#define MR 6
#define WIDEN_FIRST 0 /* shifts and masks find free ports beside two FMA */
#define NP1 4
#define NP2 2
#define NP4 1
#define INT_MR8 (HAVE_VNNI ? 6 : 5) /* rows of a tile of 8-bit weights, whose sums take two registers each without VNNI */
#define INT_NP 1
#define INT_NP1 2
#define INT_NV 2
#define INT_NV1 4
typedef __m256 vf;
typedef __m256i vu;
INLINE vf vzero(void) { return _mm256_setzero_ps(); }
INLINE vf vset(float x) { return _mm256_set1_ps(x); }
INLINE vf vload(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vstore(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vround(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* 2^n for whole n in -126..127 */
INLINE vf vpow2(vf n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
/* p 2^n, the last bits of z being those of n; p and the result are normal */
INLINE vf vtimes_pow2(vf p, vf z) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(z), 23)));
}
/* a < b ? x : y */
INLINE vf vif_lt(vf a, vf b, vf x, vf y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
/* 16-bit weights: f16 as stored, bf16 as pairs (even k in the low half) */
INLINE vf vload_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)); }
/* rounded to f16, nearest even */
INLINE void vstore_f16(uint16_t *p, vf a) { _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
INLINE vf vload_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}
/* W whole numbers of -127..127 as bytes */
INLINE void vstore_i8(int8_t *p, vf a) {
    __m256i x = _mm256_cvtps_epi32(a);
    __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packs_epi16(h, h));
}
/* The same, of 0..255, as [W][4] */
INLINE void vstore_bytes(uint8_t *p, vf a, vf b, vf c, vf d) {
    __m256i ab = _mm256_or_si256(_mm256_cvtps_epi32(a), _mm256_slli_epi32(_mm256_cvtps_epi32(b), 8));
    __m256i cd = _mm256_or_si256(_mm256_cvtps_epi32(c), _mm256_slli_epi32(_mm256_cvtps_epi32(d), 8));
    _mm256_storeu_si256((__m256i *)(void *)p, _mm256_or_si256(ab, _mm256_slli_epi32(cd, 16)));
}
/* rounded to bf16, nearest even; not of infinity */
INLINE vf vbf16(vf a) {
    __m256i u = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    u = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32((int)0xffff0000u)));
}
INLINE vu vload_pairs(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
INLINE vf vpair_even(vu a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
INLINE vf vpair_odd(vu a) { return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32((int)0xffff0000u))); }

/* integers: bytes in 32-bit lanes, one lane a column */
typedef __m256i vint;
INLINE vint vint_set(int x) { return _mm256_set1_epi32(x); }
INLINE vint vint_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE vint vint_add(vint a, vint b) { return _mm256_add_epi32(a, b); }
INLINE vint vint_add16(vint a, vint b) { return _mm256_add_epi16(a, b); }
INLINE vint vint_low(vint a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
INLINE vint vint_high(vint a) { return vint_low(_mm256_srli_epi16(a, 4)); }
INLINE vint vint_maddubs(vint a, vint b) { return _mm256_maddubs_epi16(a, b); }
INLINE vint vint_madd(vint a, vint b) { return _mm256_madd_epi16(a, b); }
INLINE vf vint_float(vint a) { return _mm256_cvtepi32_ps(a); }
#if HAVE_VNNI
/* c + the four products of unsigned bytes of a and signed bytes of b, lane by lane */
INLINE vint vint_dot(vint c, vint a, vint b) { return _mm256_dpbusd_avx_epi32(c, a, b); }
#endif
INLINE vf vload_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)), 16));
}

#elif !defined(QVL__ISA_generic) && !defined(QVL__SIMD_EMULATE)
/* ---- AVX-512 F, BW, VL, DQ; BF16; AMX ---- */
#include <immintrin.h>
#define W 16
#define MR 6
#define WIDEN_FIRST 1
#define NP1 4
#define NP2 4
#define NP4 4
#define INT_MR8 (HAVE_VNNI ? 6 : 4)
#define INT_NP 2
#define INT_NP1 (HAVE_TILES ? 2 : 4) /* Intel reads fewer streams faster */
#define INT_NV 2
#define INT_NV1 INT_NP1
typedef __m512 vf;
typedef __m512i vu;
INLINE vf vzero(void) { return _mm512_setzero_ps(); }
INLINE vf vset(float x) { return _mm512_set1_ps(x); }
INLINE vf vload(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vstore(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vround(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf vpow2(vf n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
INLINE vf vtimes_pow2(vf p, vf z) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(z), 23)));
}
INLINE vf vif_lt(vf a, vf b, vf x, vf y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
INLINE vf vload_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
INLINE void vstore_f16(uint16_t *p, vf a) { _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
INLINE vf vload_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
INLINE void vstore_i8(int8_t *p, vf a) { _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a))); }
INLINE void vstore_bytes(uint8_t *p, vf a, vf b, vf c, vf d) {
    __m512i ab = _mm512_or_si512(_mm512_cvtps_epi32(a), _mm512_slli_epi32(_mm512_cvtps_epi32(b), 8));
    __m512i cd = _mm512_or_si512(_mm512_cvtps_epi32(c), _mm512_slli_epi32(_mm512_cvtps_epi32(d), 8));
    _mm512_storeu_si512(p, _mm512_or_si512(ab, _mm512_slli_epi32(cd, 16)));
}
INLINE vf vbf16(vf a) {
    __m512i u = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32((int)0xffff0000u)));
}
INLINE vu vload_pairs(const uint16_t *p) { return _mm512_loadu_si512(p); }
INLINE vf vpair_even(vu a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
INLINE vf vpair_odd(vu a) { return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000u))); }
typedef __m512i vint;
INLINE vint vint_set(int x) { return _mm512_set1_epi32(x); }
INLINE vint vint_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vint vint_add(vint a, vint b) { return _mm512_add_epi32(a, b); }
INLINE vint vint_add16(vint a, vint b) { return _mm512_add_epi16(a, b); }
INLINE vint vint_low(vint a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE vint vint_high(vint a) { return vint_low(_mm512_srli_epi16(a, 4)); }
INLINE vint vint_maddubs(vint a, vint b) { return _mm512_maddubs_epi16(a, b); }
INLINE vint vint_madd(vint a, vint b) { return _mm512_madd_epi16(a, b); }
INLINE vf vint_float(vint a) { return _mm512_cvtepi32_ps(a); }
INLINE vf vload_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p)), 16));
}
#if HAVE_VNNI
INLINE vint vint_dot(vint c, vint a, vint b) { return _mm512_dpbusd_epi32(c, a, b); }
#endif
#if HAVE_DOT || HAVE_TILES
/* 2 W floats as bf16, rounded to nearest even; denormals become zero */
INLINE void vstore_bf16(uint16_t *p, vf a, vf b) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
#endif
#if HAVE_DOT
/* c + a.odd * b.odd, then + a.even * b.even; a is one pair for all lanes */
INLINE vf vdot_pairs(vf c, uint32_t a, vu b) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#endif
#if HAVE_TILES
/* integers: bytes less what Q8 adds; the halves of bytes less what Q4 adds */
INLINE vint vint_signed(vint a) { return _mm512_xor_si512(a, _mm512_set1_epi8((char)0x80)); }
INLINE vint vint_signed_half(vint a) { return _mm512_sub_epi8(a, _mm512_set1_epi8(8)); }
INLINE void vint_store(void *p, vint a) { _mm512_storeu_si512(p, a); }
INLINE vf vint_load_float(const int32_t *p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }

/* Tile registers (Intel's Software Developer's Manual, volume 1, chapter 18); t, c, a and b are plain digits. */
#define TILE_SHAPE(shape) __asm__ volatile("ldtilecfg %0" : : "m"(*(shape)))
#define TILE_RELEASE() __asm__ volatile("tilerelease" : : : "memory")
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t : :)
#define TILE_LOAD(t, p, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(p), "r"((size_t)(stride)) : "memory")
#define TILE_PASS(t, p, stride) __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #t : : "r"(p), "r"((size_t)(stride)) : "memory") /* not to stay near */
#define TILE_STORE(t, p, stride) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(p), "r"((size_t)(stride)) : "memory")
/* c += a b: pairs of bf16 into floats; four signed bytes into integers */
#define TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define TILE_INT(c, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#endif

#else
/* ---- plain C (GCC vector types, which compile to what the target has): 4 lanes as the generic level, 16 as the
 *      emulation of the AVX-512 levels ---- */
#if defined(QVL__ISA_generic)
#define W 4
#define MR 3
#define WIDEN_FIRST 1
#define NP1 2
#define NP2 1
#define NP4 1
#define INT_MR8 6
#define INT_NP 1
#define INT_NP1 1
#define INT_NV 4
#define INT_NV1 4
#else
#define W 16
#define MR 6
#define WIDEN_FIRST 1
#define NP1 4
#define NP2 4
#define NP4 4
#define INT_MR8 (HAVE_VNNI ? 6 : 4)
#define INT_NP 2
#define INT_NP1 4
#define INT_NV 2
#define INT_NV1 4
#pragma GCC diagnostic ignored "-Wpsabi" /* no 64-byte vector leaves this file's users: all is static */
#endif
typedef float vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), aligned(4), may_alias));
INLINE vf vzero(void) { return (vf){0}; }
INLINE vf vset(float x) { return (vf){0} + x; }
INLINE vf vload(const float *p) { return *(const vf *)p; }
INLINE void vstore(float *p, vf a) { *(vf *)p = a; }
INLINE vf vadd(vf a, vf b) { return a + b; }
INLINE vf vsub(vf a, vf b) { return a - b; }
INLINE vf vmul(vf a, vf b) { return a * b; }
INLINE vf vdiv(vf a, vf b) { return a / b; }
INLINE vf vpick(vi m, vf x, vf y) { return (vf)((m & (vi)x) | (~m & (vi)y)); }
INLINE vf vmax(vf a, vf b) { return vpick(a > b, a, b); }
INLINE vf vmin(vf a, vf b) { return vpick(a < b, a, b); }
INLINE vf vif_lt(vf a, vf b, vf x, vf y) { return vpick(a < b, x, y); }
#if defined(QVL__ISA_generic)
INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
#else
/* Not inlined: 16 calls of fmaf in every place would only make the compiler slow. */
static __attribute__((noinline)) vf vfma(vf a, vf b, vf c) {
    for (int i = 0; i < W; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
#endif
/* Whole numbers are exact in float up to 2^23, so adding and taking away 1.5 * 2^23 rounds; callers stay far below. */
INLINE vf vround(vf a) { return (a + 12582912.0f) - 12582912.0f; }
INLINE vf vpow2(vf n) {
    vf s = n + 12582912.0f; /* the low bits of s are n + 0x4b400000; a NaN gives some power, and NaN times it stays */
    return (vf)(((vu)s - 0x4b400000u + 127u) << 23);
}
INLINE vf vtimes_pow2(vf p, vf z) { return (vf)((vu)p + ((vu)z << 23)); }
INLINE vf vload_f16(const uint16_t *p) {
    vf r;
    for (int i = 0; i < W; i++) r[i] = f16_to_f32(p[i]);
    return r;
}
INLINE void vstore_f16(uint16_t *p, vf a) {
    for (int i = 0; i < W; i++) p[i] = f32_to_f16(a[i]);
}
INLINE vf vload_i8(const int8_t *p) {
    vf r;
    for (int i = 0; i < W; i++) r[i] = (float)p[i];
    return r;
}
INLINE void vstore_i8(int8_t *p, vf a) {
    for (int i = 0; i < W; i++) p[i] = (int8_t)a[i];
}
INLINE void vstore_bytes(uint8_t *p, vf a, vf b, vf c, vf d) {
    for (int i = 0; i < W; i++, p += 4) p[0] = (uint8_t)a[i], p[1] = (uint8_t)b[i], p[2] = (uint8_t)c[i], p[3] = (uint8_t)d[i];
}
INLINE vf vbf16(vf a) {
    vu u = (vu)a;
    return (vf)((u + 0x7fffu + (u >> 16 & 1)) & 0xffff0000u);
}
INLINE vf vload_bf16(const uint16_t *p) {
    vu r;
    for (int i = 0; i < W; i++) r[i] = (uint32_t)p[i] << 16;
    return (vf)r;
}
INLINE vu vload_pairs(const uint16_t *p) { return *(const vu *)(const void *)p; }
INLINE vf vpair_even(vu a) { return (vf)(a << 16); }
INLINE vf vpair_odd(vu a) { return (vf)(a & 0xffff0000u); }
#if HAVE_DOT || HAVE_TILES
/* VDPBF16PS after Intel's Software Developer's Manual, volume 2: for each lane the odd elements first, then the even
 * ones, each by a fused multiply-add rounded to nearest even; denormal inputs count as zero, denormal results become
 * zero, MXCSR is not looked at. */
INLINE float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
INLINE float bits_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return flush(f);
}
INLINE void vstore_bf16(uint16_t *p, vf a, vf b) {
    for (int i = 0; i < 2 * W; i++) p[i] = f32_to_bf16(flush(i < W ? a[i] : b[i - W]));
}
#endif
#if HAVE_DOT
static __attribute__((noinline)) vf vdot_pairs(vf c, uint32_t a, vu b) {
    for (int i = 0; i < W; i++) {
        float s = flush(c[i]);
        s = flush(__builtin_fmaf(bits_float(a & 0xffff0000u), bits_float(b[i] & 0xffff0000u), s));
        c[i] = flush(__builtin_fmaf(bits_float(a << 16), bits_float(b[i] << 16), s));
    }
    return c;
}
#endif
#if HAVE_TILES
typedef uint8_t vint __attribute__((vector_size(4 * W), aligned(1), may_alias));
INLINE vint vint_load(const void *p) { return *(const vint *)p; }
INLINE void vint_store(void *p, vint a) { *(vint *)p = a; }
INLINE vint vint_low(vint a) { return a & 15; }
INLINE vint vint_high(vint a) { return a >> 4; }
INLINE vint vint_signed(vint a) { return a ^ 0x80; }
INLINE vint vint_signed_half(vint a) { return a - 8; }
INLINE vf vint_load_float(const int32_t *p) { return __builtin_convertvector(*(const vi *)p, vf); }

/* TDPBF16PS and TDPBSSD after the same manual: of a row and a column the products of even elements and of odd ones are each added
 * up by fused multiply-adds, then their sum is added to what was there, all flushed as above. */
static _Thread_local struct {
    tile_shape shape;
    union {
        float f[16][16];
        int32_t i[16][16];
        int8_t b[16][64];
        uint32_t pairs[16][16];
    } t[8];
} tile_file;
INLINE void tile_zero(int t) { memset(&tile_file.t[t], 0, sizeof tile_file.t[t]); }
INLINE void tile_load(int t, const void *p, size_t stride) {
    tile_zero(t);
    for (int r = 0; r < tile_file.shape.rows[t]; r++) memcpy(tile_file.t[t].b[r], (const char *)p + (size_t)r * stride, tile_file.shape.bytes[t]);
}
INLINE void tile_store(int t, void *p, size_t stride) {
    for (int r = 0; r < tile_file.shape.rows[t]; r++) memcpy((char *)p + (size_t)r * stride, tile_file.t[t].b[r], tile_file.shape.bytes[t]);
}
static __attribute__((noinline)) void tile_dot(int c, int a, int b) {
    for (int m = 0; m < tile_file.shape.rows[a]; m++)
        for (int n = 0; n < 16; n++) {
            float even = 0, odd = 0;
            for (int k = 0; k < tile_file.shape.rows[b]; k++) {
                uint32_t x = tile_file.t[a].pairs[m][k], y = tile_file.t[b].pairs[k][n];
                even = flush(__builtin_fmaf(bits_float(x << 16), bits_float(y << 16), even));
                odd = flush(__builtin_fmaf(bits_float(x & 0xffff0000u), bits_float(y & 0xffff0000u), odd));
            }
            tile_file.t[c].f[m][n] = flush(flush(tile_file.t[c].f[m][n]) + flush(even + odd));
        }
}
static __attribute__((noinline)) void tile_int(int c, int a, int b) {
    for (int m = 0; m < tile_file.shape.rows[a]; m++)
        for (int n = 0; n < 16; n++)
            for (int k = 0; k < 4 * tile_file.shape.rows[b]; k++) tile_file.t[c].i[m][n] += tile_file.t[a].b[m][k] * tile_file.t[b].b[k / 4][4 * n + k % 4];
}
#define TILE_SHAPE(s) ((void)(tile_file.shape = *(s)))
#define TILE_RELEASE() ((void)memset(&tile_file.shape, 0, sizeof tile_file.shape))
#define TILE_ZERO(t) tile_zero(t)
#define TILE_LOAD(t, p, stride) tile_load(t, p, stride)
#define TILE_PASS(t, p, stride) tile_load(t, p, stride)
#define TILE_STORE(t, p, stride) tile_store(t, p, stride)
#define TILE_DOT(c, a, b) tile_dot(c, a, b)
#define TILE_INT(c, a, b) tile_int(c, a, b)
#endif
#endif

#define VP (PANEL / W)

/* ---- common ---- */

INLINE vf vabs(vf a) { return vmax(a, vsub(vzero(), a)); }

/* The sum and the maximum of all lanes, by halving: a fixed tree (8 lanes: i + (i + 4), then i + (i + 2), ...). */
#if W == 4 || defined(QVL__SIMD_EMULATE)
INLINE float vsum(vf a) {
    float t[W];
    vstore(t, a);
    for (int h = W / 2; h; h /= 2)
        for (int i = 0; i < h; i++) t[i] += t[i + h];
    return t[0];
}
INLINE float vmax_lanes(vf a) {
    float t[W];
    vstore(t, a);
    for (int h = W / 2; h; h /= 2)
        for (int i = 0; i < h; i++) t[i] = t[i] > t[i + h] ? t[i] : t[i + h];
    return t[0];
}
#else
#if W == 16
#define FOLD(op, a) _mm256_##op##_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))
#else
#define FOLD(op, a) (a)
#endif
#define REDUCE(op, a)                                                                  \
    __m256 h8 = FOLD(op, a);                                                           \
    __m128 h4 = _mm_##op##_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1)); \
    __m128 h2 = _mm_##op##_ps(h4, _mm_movehl_ps(h4, h4));                              \
    return _mm_cvtss_f32(_mm_##op##_ss(h2, _mm_movehdup_ps(h2)))
INLINE float vsum(vf a) { REDUCE(add, a); }
INLINE float vmax_lanes(vf a) { REDUCE(max, a); }
#endif

#if !defined(QVL__ISA_generic) && !defined(QVL__SIMD_EMULATE)
/* x stays in a register here: the compiler would otherwise reorder sums, and run out of registers for their parts. */
#define KEEP(x) __asm__("" : "+v"(x))

/* Four bytes, the same for all lanes. */
INLINE vint vint_four(const char *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return vint_set(x);
}
#endif

#endif
