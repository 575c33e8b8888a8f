/* integers.h - the part of kern.c that computes with weights of 8 and 4 bits.
 *
 * Job:        tiles of exact integer products with one float step for each group; activations and weights to integers.
 * Input:      panels as panel.c lays them out; rows of activations. Included by kern.c, in the middle.
 * Output:     gemm_int, quantize_rows, quantize_weights.
 * Invariants: integer sums are exact, so neither the level nor the tile can show in them; the float steps of an output run
 *             in the order of its groups; a weight becomes the same integers at every level.
 */
#ifndef QVL__INTEGERS_H
#define QVL__INTEGERS_H

/* ---- products of integers ----
 *
 * Weights are stored as unsigned integers (Q4: 8 added, Q8: 128 added), because that is what vpdpbusd and vpmaddubsw want
 * of one side; the sum of the activations times what was added is taken away again. All of it is exact, so the level, the
 * tile and the order do not matter; what rounds is one fused step for each group. */

#if W == 16 || defined(QVL__ISA_avx2)
#define HAVE_INT 1
#endif

#if HAVE_INT && !defined(QVL__SIMD_EMULATE)
/* w: four neighbours in k for each of W columns, unsigned; a: four of a row, the same for all columns. */
#if HAVE_VNNI
typedef struct {
    vint t;
} isum;
INLINE isum isum_zero(void) { return (isum){vint_set(0)}; }
INLINE void isum_q4(isum *s, vint nibbles, vint a) { s->t = vint_dot(s->t, nibbles, a); }
INLINE vint isum_total(const isum *s, int wide) {
    (void)wide;
    return s->t;
}
#else
/* vpmaddubsw adds pairs into 16 bits: eight times 2 * 15 * 127 = 30,480 still fit, so the nibbles of a byte are summed
 * apart and meet at the end. */
typedef struct {
    vint lo, hi;
} isum;
INLINE isum isum_zero(void) { return (isum){vint_set(0), vint_set(0)}; }
INLINE void isum_q4(isum *s, vint nibbles, vint a) { s->lo = vint_add16(s->lo, vint_maddubs(nibbles, a)); }
INLINE vint isum_total(const isum *s, int wide) {
    vint t = vint_madd(s->lo, vint_set(0x00010001));
    return wide ? vint_add(t, vint_madd(s->hi, vint_set(0x00100010))) : t;
}
#endif

INLINE void int_tile(const int q8, const int mr, const int v0, const int nv, float *c, size_t ldc, const qvl__ints *a, int row, const char *b,
                     size_t bs, int all_groups, int g0, int groups) {
    const size_t head = QVL__INT_HEAD(all_groups), body = q8 ? QVL__GROUP * PANEL : QVL__GROUP * PANEL / 2;
    for (int g = 0; g < groups; g++) {
        isum s[6][4];
#pragma GCC unroll 6
        for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) s[i][j] = isum_zero();
        const int8_t *q = a->q + (size_t)row * a->ldq + (size_t)g * QVL__GROUP;
#pragma GCC unroll 4
        for (int step = 0; step < 4; step++) {
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) {
                const char *w = b + (size_t)((v0 + j) / VP) * bs + head + (size_t)(g0 + g) * body + (size_t)((v0 + j) % VP) * 4 * W;
                if (q8) {
#pragma GCC unroll 2
                    for (int odd = 0; odd < 2; odd++) {
                        vint x = vint_load(w + (size_t)(2 * step + odd) * 4 * PANEL);
#if HAVE_VNNI
#pragma GCC unroll 6
                        for (int i = 0; i < mr; i++) s[i][j].t = vint_dot(s[i][j].t, x, vint_four(q + (size_t)i * a->ldq + 8 * step + 4 * odd));
#else
                        vint lo = vint_low(x), hi = vint_high(x);
#pragma GCC unroll 6
                        for (int i = 0; i < mr; i++) {
                            vint y = vint_four(q + (size_t)i * a->ldq + 8 * step + 4 * odd);
                            s[i][j].lo = vint_add16(s[i][j].lo, vint_maddubs(lo, y));
                            s[i][j].hi = vint_add16(s[i][j].hi, vint_maddubs(hi, y));
                        }
#endif
                    }
                } else {
                    vint x = vint_load(w + (size_t)step * 4 * PANEL), lo = vint_low(x), hi = vint_high(x);
#pragma GCC unroll 6
                    for (int i = 0; i < mr; i++) {
                        isum_q4(&s[i][j], lo, vint_four(q + (size_t)i * a->ldq + 4 * step));
                        isum_q4(&s[i][j], hi, vint_four(q + (size_t)i * a->ldq + 4 * step + 16));
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) {
            vf scale = vload_bf16((const uint16_t *)(const void *)(b + (size_t)((v0 + j) / VP) * bs) + (size_t)(g0 + g) * PANEL + (v0 + j) % VP * W);
#pragma GCC unroll 6
            for (int i = 0; i < mr; i++) {
                size_t at = (size_t)(row + i) * a->lds + (size_t)g;
                vint total = vint_less(isum_total(&s[i][j], q8), vint_set(a->sum[at]), q8 ? 7 : 3); /* 128 or 8 times the sum */
                float *to = c + (size_t)i * ldc + (v0 + j) * W;
                vstore(to, vfma(vint_float(total), vmul(scale, vset(a->scale[at])), vload(to)));
            }
        }
    }
}
#else
/* The same in plain C. */
INLINE void int_tile(const int q8, const int mr, const int v0, const int nv, float *c, size_t ldc, const qvl__ints *a, int row, const char *b,
                     size_t bs, int all_groups, int g0, int groups) {
    const size_t head = QVL__INT_HEAD(all_groups), body = q8 ? QVL__GROUP * PANEL : QVL__GROUP * PANEL / 2;
    for (int p = v0 / VP; p < (v0 + nv) / VP; p++)
        for (int i = 0; i < mr; i++)
            for (int g = 0; g < groups; g++) {
                const uint8_t *w = (const uint8_t *)b + (size_t)p * bs + head + (size_t)(g0 + g) * body;
                const int8_t *q = a->q + (size_t)(row + i) * a->ldq + (size_t)g * QVL__GROUP;
                size_t at = (size_t)(row + i) * a->lds + (size_t)g;
                int32_t t[PANEL];
                for (int j = 0; j < PANEL; j++) t[j] = a->sum[at] * (q8 ? -128 : -8);
                for (int four = 0; four < (q8 ? 8 : 4); four++)
                    for (int j = 0; j < PANEL; j++)
                        for (int l = 0; l < 4; l++) {
                            int x = w[(four * PANEL + j) * 4 + l], k = four * 4 + l;
                            t[j] += q8 ? x * q[k] : (x & 15) * q[k] + (x >> 4) * q[k + 16];
                        }
                for (int j = 0; j < PANEL; j += W) {
                    float f[W];
                    for (int l = 0; l < W; l++) f[l] = (float)t[j + l];
                    vf scale = vload_bf16((const uint16_t *)(const void *)(b + (size_t)p * bs) + (size_t)(g0 + g) * PANEL + j);
                    float *to = c + (size_t)i * ldc + p * PANEL + j;
                    vstore(to, vfma(vload(f), vmul(scale, vset(a->scale[at])), vload(to)));
                }
            }
}
#endif

/* INT_NP panels (one row: INT_NP1), or the single ones that are left over; INT_NV vectors at a time, which is what the
 * registers hold. */
typedef void int_fn(float *c, size_t ldc, const qvl__ints *a, int row, const char *b, size_t bs, int all_groups, int g0, int groups);
#define INT_TILE(Q, M, NAME, NP, NV)                                                                                           \
    static void int_##Q##_##M##_##NAME(float *c, size_t ldc, const qvl__ints *a, int row, const char *b, size_t bs, int all_groups, \
                                       int g0, int groups) {                                                                   \
        for (int v = 0; v < NP * VP; v += NV) int_tile(Q == 8, M, v, NV, c, ldc, a, row, b, bs, all_groups, g0, groups);        \
    }
#define INT_LEAST(NV) (NV < VP ? NV : VP)
#define INT_TILES(M, NP, NV)                                                              \
    INT_TILE(8, M, wide, NP, NV) INT_TILE(8, M, one, 1, INT_LEAST(NV)) INT_TILE(4, M, wide, NP, NV) INT_TILE(4, M, one, 1, INT_LEAST(NV))
INT_TILES(1, INT_NP1, INT_NV1)
INT_TILES(2, INT_NP, INT_NV)
INT_TILES(3, INT_NP, INT_NV)
INT_TILES(4, INT_NP, INT_NV)
#if INT_MR == 6
INT_TILES(5, INT_NP, INT_NV)
INT_TILES(6, INT_NP, INT_NV)
#endif
#define INT_ENTRY(M) [0][M] = {int_4_##M##_wide, int_4_##M##_one}, [1][M] = {int_8_##M##_wide, int_8_##M##_one}
static int_fn *const int_tiles[2][INT_MR + 1][2] = {
    INT_ENTRY(1), INT_ENTRY(2), INT_ENTRY(3), INT_ENTRY(4),
#if INT_MR == 6
    INT_ENTRY(5), INT_ENTRY(6),
#endif
};

static void gemm_int(qvl__type type, float *c, size_t ldc, const qvl__ints *a, const void *panels, size_t panel_bytes, int rows,
                     int count, int all_groups, int g0, int groups, bool resume) {
    if (!resume)
        for (int r = 0; r < rows; r++) memset(c + (size_t)r * ldc, 0, (size_t)count * PANEL * sizeof(float));
    int wide = rows == 1 ? INT_NP1 : INT_NP;
    for (int p = 0, np; p < count; p += np) {
        np = count - p < wide ? 1 : wide;
        for (int r = 0, mr; r < rows; r += mr) {
            int left = rows - r; /* full tiles, and the last two alike; never one row of many, whose width is another */
            mr = left >= 2 * INT_MR ? INT_MR : left > INT_MR ? (left + 1) / 2 : left;
            int_tiles[type == QVL__Q8][mr][np < wide](c + (size_t)r * ldc + (size_t)p * PANEL, ldc, a, r,
                (const char *)panels + (size_t)p * panel_bytes, panel_bytes, all_groups, g0, groups);
        }
    }
}

/* Activations to integers, group by group; what lies past k in the last group is zero. */
static void quantize_rows(int8_t *q, float *scale, int32_t *sum, const float *x, int k) {
    int g = 0;
    for (; (g + 1) * QVL__GROUP <= k; g++) scale[g] = quantize_sum(q + g * QVL__GROUP, x + g * QVL__GROUP, QVL__GROUP, &sum[g]);
    if (g * QVL__GROUP < k) {
        memset(q + g * QVL__GROUP, 0, QVL__GROUP);
        scale[g] = quantize_sum(q + g * QVL__GROUP, x + g * QVL__GROUP, k - g * QVL__GROUP, &sum[g]);
    }
}

/* ---- weights to integers ----
 *
 * Q8 spans -127..127: the largest number sets the scale, and rounding that to bf16 is the only freedom. Q4 spans -8..7, where
 * the choice matters: candidates let the largest number (with either sign) fall on 8.75 .. 5.75 steps, and for the integers
 * that come out the best scale is known, sum(x q) / sum(q q). Always eight lanes, so that a weight becomes the same integers
 * at every level. */

#define LANES 8
#define PARTS (QVL__GROUP / LANES)
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t masks __attribute__((vector_size(4 * LANES), may_alias));

/* Macros: on a level without AVX a function with such an argument has no good ABI. */
#define SUM(a) (((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])))
#define PICK(m, a, b) ((lanes)(((m) & (masks)(a)) | (~(m) & (masks)(b))))

INLINE float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* x / scale to the nearest integer (even at a tie) within lo..hi. */
INLINE void round_all(lanes *q, const lanes *x, float scale, float lo, float hi) {
    float inverse = scale != 0 ? 1.0f / scale : 0;
    if (!isfinite(inverse)) inverse = 0;
    for (int i = 0; i < PARTS; i++) {
        lanes t = x[i] * inverse;
        t = PICK(t < lo, (lanes){0} + lo, t);
        t = PICK(t > hi, (lanes){0} + hi, t);
        q[i] = (t + 12582912.0f) - 12582912.0f;
    }
}

/* Squared error, less the sum of squares of x, of integers q with scale s. */
INLINE float error_of(float xq, float qq, float s) { return s * (s * qq - 2 * xq); }

INLINE void sums(const lanes *x, const lanes *q, float *xq, float *qq) {
    lanes a = {0}, b = {0};
    for (int i = 0; i < PARTS; i++) {
        a += x[i] * q[i];
        b += q[i] * q[i];
    }
    *xq = SUM(a);
    *qq = SUM(b);
}

static uint16_t quantize_weights(qvl__type type, uint8_t *out, const float *from) {
    lanes x[PARTS], q[PARTS], check = {0};
    memcpy(x, from, sizeof x);
    float top = 0;
    for (int i = 0; i < PARTS; i++) check += x[i] * 0.0f;
    for (int i = 0; i < QVL__GROUP; i++) top = fabsf(from[i]) > fabsf(top) ? from[i] : top;
    int zero = type == QVL__Q8 ? 128 : 8;
    if (SUM(check) != 0 || top == 0) {
        memset(out, zero, QVL__GROUP);
        return SUM(check) != 0 ? 0x7fc0 : 0;
    }
    /* The search sees numbers near 1, whose squares are floats; a power of two brings them there and back exactly. */
    uint32_t e;
    float up, down;
    memcpy(&e, &top, 4);
    e = e >> 23 & 255;
    e = e < 1 ? 1 : e > 253 ? 253 : e;
    uint32_t up_bits = (254 - e) << 23, down_bits = e << 23;
    memcpy(&up, &up_bits, 4);
    memcpy(&down, &down_bits, 4);
    for (int i = 0; i < PARTS; i++) x[i] *= up;
    top *= up;
    float lo = type == QVL__Q8 ? -127 : -8, hi = type == QVL__Q8 ? 127 : 7, best = 0, scale = 0;
    int candidates = type == QVL__Q8 ? 3 : 24;
    for (int c = 0; c < candidates; c++) {
        float steps = type == QVL__Q8 ? 127.0f - 0.5f * (float)c : (c & 1 ? 1.0f : -1.0f) * (8.75f - 0.25f * (float)(c / 2));
        float xq, qq;
        round_all(q, x, top / steps, lo, hi);
        sums(x, q, &xq, &qq);
        float s = from_bf16(to_bf16(xq / qq)), error = error_of(xq, qq, s); /* qq > 0: the largest is 5 steps or more */
        if (error < best) best = error, scale = s;
    }
    round_all(q, x, scale, lo, hi);
    for (int i = 0; i < QVL__GROUP; i++) out[i] = (uint8_t)((int)q[i / LANES][i % LANES] + zero);
    return to_bf16(scale * down);
}

#endif
