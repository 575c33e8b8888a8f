/* half.h - single numbers of 16 bits.
 *
 * Job:        bf16 and f16 to float and back.
 * Input:      included by panel.c, and by simd.h for what has no vectors.
 * Output:     four functions.
 * Invariants: to float is exact; back is rounded to nearest even, and a NaN stays a (quiet) NaN.
 */
#ifndef QVL__HALF_H
#define QVL__HALF_H

#include <stdint.h>
#include <string.h>

static inline float bf16_to_f32(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint16_t f32_to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40) : rounded);
}

static inline float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023, u;
    float f;
    if (e == 31) {
        u = sign | 0x7f800000u | m << 13;
    } else if (e) {
        u = sign | (e + 112) << 23 | m << 13;
    } else {
        f = (float)m * 0x1p-24f; /* subnormal */
        memcpy(&u, &f, 4);
        u |= sign;
    }
    memcpy(&f, &u, 4);
    return f;
}

/* From 65520 on infinity. */
static inline uint16_t f32_to_f16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | (u >> 13 & 0x1ff));
    if (u >= 0x47800000u) return (uint16_t)(sign | 0x7c00); /* 65536 and more; 65520..65535 round up to it below */
    if (u < 0x38800000u) {
        /* Below 2^-14 the result is a multiple of 2^-24: adding 0.5 leaves exactly those bits, rounded by the FPU. */
        float a;
        memcpy(&a, &u, 4);
        a += 0.5f;
        memcpy(&u, &a, 4);
        return (uint16_t)(sign | (u - 0x3f000000u));
    }
    return (uint16_t)(sign | ((u + 0xfffu + (u >> 13 & 1)) - 0x38000000u) >> 13);
}

#endif
