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
 * of one side; what was added, times the sum of the activations, is where the accumulators start. All of it is exact, so the
 * level, the tile and the order do not matter; what rounds is one fused step for each group. */

#if W > 4
#define HAVE_INT 1
#endif
#if HAVE_INT && !HAVE_VNNI && !defined(QVL__SIMD_EMULATE)
#define INT_PAIRS 1 /* sums in halves of lanes */
#else
#define INT_PAIRS 0
#endif
#define INT_BODY(q8) ((size_t)QVL__GROUP * PANEL / ((q8) ? 1 : 2)) /* bytes of a group in a panel */
#define INT_BYTES(q8) (INT_PAIRS && (q8) ? 2 : 1) /* of an activation */

#if HAVE_INT && !defined(QVL__SIMD_EMULATE)
enum { LOW = 1, HIGH = 2 }; /* halves of Q8's activations, where they are cut */

/* Four neighbours in k for each of W columns, times four activations that are the same for all columns. A step is one load
 * of weights: 4 in k (Q8), or 4 in the low halves and 4 in the high ones (Q4). */
#if INT_PAIRS
/* vpmaddubsw adds pairs into 16 bits, and the 16 products of a half lane still fit when one side has 4 bits: for Q4, 16 * 15 * 127,
 * or with what was added taken away 16 * 8 * 127. (On the way a sum may wrap, which takes nothing from the end.) For Q8 the
 * activations have their 4 bits apart: a = 16 h + l with h and l in -8..8, 16 * 255 * 8 at most, and the two sums meet at the
 * end. They are cut once for a row where weights would have to be cut each time they are read. */
typedef struct {
    vint s, low; /* low: Q8 only */
} isum;
INLINE isum int_start(vint start) { return (isum){start, vint_set(0)}; }
INLINE void int_step(const int q8, const int parts, isum *s, vint w, const char *a) {
    if (q8 && parts & LOW) {
        s->low = vint_add16(s->low, vint_maddubs(w, vint_four(a)));
        KEEP(s->low);
    }
    if (!q8 || parts & HIGH) {
        s->s = vint_add16(s->s, vint_maddubs(w, vint_four(q8 ? a + QVL__GROUP : a)));
        KEEP(s->s);
    }
}
INLINE vint int_total(const int q8, const isum *s) {
    vint t = vint_madd(s->s, vint_set(q8 ? 0x00100010 : 0x00010001));
    return q8 ? vint_add(t, vint_madd(s->low, vint_set(0x00010001))) : t;
}
#else
typedef struct {
    vint s;
} isum;
INLINE isum int_start(vint start) { return (isum){start}; }
INLINE void int_step(const int q8, const int parts, isum *s, vint w, const char *a) {
    (void)q8, (void)parts;
    s->s = vint_dot(s->s, w, vint_four(a));
    KEEP(s->s);
}
INLINE vint int_total(const int q8, const isum *s) {
    (void)q8;
    return s->s;
}
#endif

/* One row asks for weights this far ahead, in bytes of a panel, and for the first groups of the next panels, which the hardware
 * does not see coming; several rows, which take longer, ask for all of the next panels. */
#define AHEAD (W == 8 ? 4096 : 1024)
#define FIRST 4
#define INT_HELD (W == 16) /* 32 registers hold the float sums of a tile beside its integer ones */

/* The products of a group; of Q8, where activations are cut, those with the halves in parts. */
INLINE void int_steps(const int q8, const int parts, const int mr, const int v0, const int nv, isum s[6][4], const char *b, size_t bs, const char *q,
                      size_t stride) {
    for (int half = 0; half < (q8 ? 2 : 1); half++)
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; quarter++) {
            const int step = 4 * half + quarter;
            vint x[4], w[4];
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++)
                x[j] = vint_load(b + (size_t)((v0 + j) / VP) * bs + (size_t)((v0 + j) % VP) * 4 * W + (size_t)step * 4 * PANEL);
            for (int high = 0; high < (q8 ? 1 : 2); high++) {
#pragma GCC unroll 4
                for (int j = 0; j < nv; j++) w[j] = q8 ? x[j] : high ? vint_high(x[j]) : vint_low(x[j]);
#pragma GCC unroll 6
                for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
                    for (int j = 0; j < nv; j++) int_step(q8, parts, &s[i][j], w[j], q + (size_t)i * stride + 4 * step + high * (QVL__GROUP / 2));
            }
        }
}

/* mr rows by nv vectors from vector v0 of the panels on. */
INLINE void int_tile(const int q8, const int mr, const int v0, const int nv, float *c, size_t ldc, const qvl__ints *a, int row, const char *b,
                     size_t bs, int all_groups, int g0, int groups, ahead next) {
    const size_t head = QVL__INT_HEAD(all_groups), body = INT_BODY(q8);
    const size_t from_line = body / 64 * (size_t)next.part / (size_t)next.parts * 64, to_line = body / 64 * (size_t)(next.part + 1) / (size_t)next.parts * 64;
    const size_t stride = a->stride;
    const char *q = (const char *)a->q + (size_t)row * stride, *start = (const char *)a->start + (size_t)row * stride;
    const char *by = (const char *)a->scale + (size_t)row * stride;
    vf sum[6][4]; /* INT_HELD: in registers all the time */
#pragma GCC unroll 6
    for (int i = 0; INT_HELD && i < mr; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) sum[i][j] = vload(c + (size_t)i * ldc + (v0 + j) * W);
    for (int g = 0; g < groups; g++, q += QVL__GROUP * INT_BYTES(q8), start += sizeof(int32_t), by += sizeof(float)) {
        for (int j = 0; mr == 1 && j < nv; j++) {
            const char *far = b + (size_t)((v0 + j) / VP) * bs + head + (size_t)(g0 + g) * body + (size_t)((v0 + j) % VP) * body / VP + AHEAD;
            for (size_t i = 0; i < body / VP; i += 64) TO_NEAR(far + i);
        }
        for (int j = v0; next.at && j < v0 + nv; j += VP) {
            const char *then = next.at + (size_t)(j / VP) * bs, *ints = then + head + (size_t)g0 * body;
            if (next.part == 0 && g % 2 == 0) TO_L2(then + (size_t)(g0 + g) * PANEL * 2);
            if (mr > 1)
                for (size_t i = from_line; i < to_line; i += 64) TO_L2(ints + (size_t)g * body + i);
            else
                for (size_t i = 0; g + FIRST >= groups && i < body; i += 64) TO_L2(ints + (size_t)(g + FIRST - groups) * body + i);
        }
        isum s[6][4];
#pragma GCC unroll 6
        for (int i = 0; i < mr; i++) {
            vint from = vint_four(start + (size_t)i * stride);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) s[i][j] = int_start(from);
        }
        const char *weights = b + head + (size_t)(g0 + g) * body;
        if (INT_PAIRS && W == 8 && q8 && mr > 1) { /* 16 registers hold one sum of each: weights are read twice */
            int_steps(q8, LOW, mr, v0, nv, s, weights, bs, q, stride);
            int_steps(q8, HIGH, mr, v0, nv, s, weights, bs, q, stride);
        } else {
            int_steps(q8, LOW | HIGH, mr, v0, nv, s, weights, bs, q, stride);
        }
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) {
            vf scale = vload_bf16((const uint16_t *)(const void *)(b + (size_t)((v0 + j) / VP) * bs) + (size_t)(g0 + g) * PANEL + (v0 + j) % VP * W);
#pragma GCC unroll 6
            for (int i = 0; i < mr; i++) {
                float *to = c + (size_t)i * ldc + (v0 + j) * W;
                vf more = vint_float(int_total(q8, &s[i][j])), times = vmul(scale, vset(*(const float *)(const void *)(by + (size_t)i * stride)));
                if (INT_HELD) sum[i][j] = vfma(more, times, sum[i][j]);
                else vstore(to, vfma(more, times, vload(to)));
            }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; INT_HELD && i < mr; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) vstore(c + (size_t)i * ldc + (v0 + j) * W, sum[i][j]);
}
#else
/* The same in plain C. */
INLINE void int_tile(const int q8, const int mr, const int v0, const int nv, float *c, size_t ldc, const qvl__ints *a, int row, const char *b,
                     size_t bs, int all_groups, int g0, int groups, ahead next) {
    (void)next;
    const size_t head = QVL__INT_HEAD(all_groups), body = INT_BODY(q8);
    for (int p = v0 / VP; p < (v0 + nv) / VP; p++)
        for (int i = 0; i < mr; i++)
            for (int g = 0; g < groups; g++) {
                const uint8_t *w = (const uint8_t *)b + (size_t)p * bs + head + (size_t)(g0 + g) * body;
                size_t at = (size_t)(row + i) * a->stride;
                const int8_t *q = (const int8_t *)a->q + at + (size_t)g * QVL__GROUP;
                int32_t t[PANEL];
                for (int j = 0; j < PANEL; j++) t[j] = ((const int32_t *)(const void *)((const char *)a->start + at))[g];
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
                    vf by = vset(((const float *)(const void *)((const char *)a->scale + at))[g]);
                    float *to = c + (size_t)i * ldc + p * PANEL + j;
                    vstore(to, vfma(vload(f), vmul(scale, by), vload(to)));
                }
            }
}
#endif

/* Up to INT_MR rows (Q8: INT_MR8) by INT_NP panels (one row: INT_NP1), or the single ones that are left over; INT_NV vectors at a time,
 * which is what the registers hold. */
#define INT_MR 6
typedef void int_fn(float *c, size_t ldc, const qvl__ints *a, int row, const char *b, size_t bs, int all_groups, int g0, int groups, ahead next);
#define INT_TILE(Q, M, NAME, NP, NV)                                                                                           \
    static void int_##Q##_##M##_##NAME(float *c, size_t ldc, const qvl__ints *a, int row, const char *b, size_t bs, int all_groups, \
                                       int g0, int groups, ahead next) {                                                       \
        for (int v = 0; v < NP * VP; v += NV) int_tile(Q == 8, M, v, NV, c, ldc, a, row, b, bs, all_groups, g0, groups, next);  \
    }
#define INT_LEAST(NV) (NV < VP ? NV : VP)
#define INT_TILES(M, NP, NV)                                                              \
    INT_TILE(8, M, wide, NP, NV) INT_TILE(8, M, one, 1, INT_LEAST(NV)) INT_TILE(4, M, wide, NP, NV) INT_TILE(4, M, one, 1, INT_LEAST(NV))
INT_TILES(1, INT_NP1, INT_NV1)
INT_TILES(2, INT_NP, INT_NV)
INT_TILES(3, INT_NP, INT_NV)
INT_TILES(4, INT_NP, INT_NV)
INT_TILES(5, INT_NP, INT_NV)
INT_TILES(6, INT_NP, INT_NV)
#define INT_ENTRY(M) [0][M] = {int_4_##M##_wide, int_4_##M##_one}, [1][M] = {int_8_##M##_wide, int_8_##M##_one}
static int_fn *const int_tiles[2][INT_MR + 1][2] = {
    INT_ENTRY(1), INT_ENTRY(2), INT_ENTRY(3), INT_ENTRY(4), INT_ENTRY(5), INT_ENTRY(6),
};

static void gemm_int(qvl__type type, float *c, size_t ldc, const qvl__ints *a, const void *panels, size_t panel_bytes, int rows,
                     int count, int all_groups, int g0, int groups, bool resume) {
    if (!resume)
        for (int r = 0; r < rows; r++) memset(c + (size_t)r * ldc, 0, (size_t)count * PANEL * sizeof(float));
    const int wide = rows == 1 ? INT_NP1 : INT_NP, most = type == QVL__Q8 ? INT_MR8 : INT_MR;
    for (int p = 0, np; p < count; p += np) {
        np = count - p < wide ? 1 : wide;
        ahead next = {count - p > np ? (const char *)panels + (size_t)(p + np) * panel_bytes : NULL, 0, (rows + most - 1) / most};
        for (int r = 0, mr; r < rows; r += mr, next.part++) {
            int left = rows - r; /* full tiles, and the last two alike; never one row of many, whose width is another */
            mr = left >= 2 * most ? most : left > most ? (left + 1) / 2 : left;
            int_tiles[type == QVL__Q8][mr][np < wide](c + (size_t)r * ldc + (size_t)p * PANEL, ldc, a, r,
                (const char *)panels + (size_t)p * panel_bytes, panel_bytes, all_groups, g0, groups, next);
        }
    }
}

/* Where the accumulators of a group start: what was added to the weights, taken away again. */
INLINE int32_t int_from(const int q8, const int8_t *q, int32_t sum) {
#if INT_PAIRS
    (void)q8; /* Q8: 128 are 8 of the high sum's 16 */
    int32_t first = 0; /* what falls to the low half of a lane */
    for (int i = 0; i < QVL__GROUP; i += 4) first += q[i] + q[i + 1];
    return (int32_t)((uint32_t)(uint16_t)(-8 * first) | (uint32_t)(uint16_t)(-8 * (sum - first)) << 16);
#else
    (void)q;
    return (q8 ? -128 : -8) * sum;
#endif
}

/* Activations to integers, group by group; what lies past k in the last group is zero. */
static void quantize_rows(qvl__type type, int8_t *q, float *scale, int32_t *start, const float *x, int k) {
    for (int g = 0; g * QVL__GROUP < k; g++, q += QVL__GROUP * INT_BYTES(type == QVL__Q8), x += QVL__GROUP) {
        int n = k - g * QVL__GROUP;
        int32_t sum;
        if (n < QVL__GROUP) memset(q, 0, QVL__GROUP);
        scale[g] = n < QVL__GROUP ? quantize_sum(q, x, n, &sum) : quantize_sum(q, x, QVL__GROUP, &sum);
        start[g] = int_from(type == QVL__Q8, q, sum);
        if (INT_BYTES(type == QVL__Q8) == 2) { /* the low halves of a group, then the high ones */
            for (int i = 0; i < QVL__GROUP; i++) q[QVL__GROUP + i] = (int8_t)((q[i] + 8) >> 4);
            for (int i = 0; i < QVL__GROUP; i++) q[i] = (int8_t)(q[i] - 16 * q[QVL__GROUP + i]);
        }
    }
}

/* ---- weights to integers ----
 *
 * Q8 spans -127..127: the largest number sets the scale, and rounding that to bf16 is the only freedom. Q4 spans -8..7, where
 * the choice matters: candidates let the largest number (with either sign) fall on 8.75 .. 5.75 steps, and for the integers
 * that come out the best scale is known, sum(x q) / sum(q q). A lane is a column, and its operations are the same at every
 * level (no product is fused with a sum that it could round), so that a weight becomes the same integers everywhere. */

/* x to the nearest integer (even at a tie) of steps of 1 / inverse, within lo..hi. */
INLINE vf int_round(vf x, vf inverse, vf lo, vf hi) { return vround(vmin(vmax(vmul(x, inverse), lo), hi)); }

/* 1 / scale, and 0 for a scale of 0. */
INLINE vf int_inverse(vf scale) { return vif_lt(vzero(), vabs(scale), vdiv(vset(1.0f), scale), vzero()); }

/* sum(x q) / sum(q q), rounded to bf16, into *scale; returns the squared error that it leaves, less the sum of squares of x.
 * The products with x are added up by k % 8, then in pairs; those of integers are exact in any order. */
INLINE vf int_try(const bool clamp, const float (*x)[W], vf inverse, vf lo, vf hi, vf *scale) {
    vf a[8], qq[2] = {vzero(), vzero()};
#pragma GCC unroll 8
    for (int l = 0; l < 8; l++) a[l] = vzero();
    for (int k = 0; k < QVL__GROUP; k += 8)
#pragma GCC unroll 8
        for (int l = 0; l < 8; l++) {
            vf v = vload(x[k + l]), q = clamp ? int_round(v, inverse, lo, hi) : vround(vmul(v, inverse));
            a[l] = vadd(a[l], vmul(v, q));
            qq[l % 2] = vfma(q, q, qq[l % 2]);
        }
    vf even = vadd(vadd(a[0], a[4]), vadd(a[2], a[6])), odd = vadd(vadd(a[1], a[5]), vadd(a[3], a[7]));
    vf xq = vadd(even, odd), square = vadd(qq[0], qq[1]);
    *scale = vbf16(vdiv(xq, square)); /* a lane of zeros: NaN, which is no lower than anything */
    return vmul(*scale, vsub(vmul(*scale, square), vmul(vset(2.0f), xq)));
}

/* W columns of a group, [QVL__GROUP][PANEL] at from. */
INLINE void quantize_columns(const int q8, uint8_t *out, uint16_t *scales, const float *from) {
    float x[QVL__GROUP][W], up[W], down[W];
    vf check = vzero(), top = vzero();
    for (int k = 0; k < QVL__GROUP; k++) check = vfma(vload(from + k * PANEL), vzero(), check); /* NaN where one is not finite */
    for (int k = 0; k < QVL__GROUP; k++) {
        vf v = vif_lt(check, vset(1.0f), vload(from + k * PANEL), vzero());
        vstore(x[k], v);
        top = vif_lt(vabs(top), vabs(v), v, top);
    }
    /* The search sees numbers near 1, whose squares are floats; a power of two brings them there and back exactly. */
    vstore(up, top);
    for (int j = 0; j < W; j++) {
        uint32_t e;
        memcpy(&e, &up[j], 4);
        e = e >> 23 & 255;
        e = e < 1 ? 1 : e > 253 ? 253 : e;
        uint32_t up_bits = (254 - e) << 23, down_bits = e << 23;
        memcpy(&up[j], &up_bits, 4);
        memcpy(&down[j], &down_bits, 4);
    }
    for (int k = 0; k < QVL__GROUP; k++) vstore(x[k], vmul(vload(x[k]), vload(up)));
    top = vmul(top, vload(up));
    vf lo = vset(q8 ? -127 : -8), hi = vset(q8 ? 127 : 7), best = vzero(), scale = vzero();
    for (int c = 0; c < (q8 ? 3 : 24); c++) {
        float steps = q8 ? 127.0f - 0.5f * (float)c : (c & 1 ? 1.0f : -1.0f) * (8.75f - 0.25f * (float)(c / 2));
        /* Up to 7.25 steps (Q8: always) no number leaves the range; then the other sign gives the same error, and came first. */
        bool inside = q8 || fabsf(steps) <= 7.25f;
        if (!q8 && inside && c & 1) continue;
        vf inverse = int_inverse(vdiv(top, vset(steps))), s, error = inside ? int_try(false, x, inverse, lo, hi, &s) : int_try(true, x, inverse, lo, hi, &s);
        scale = vif_lt(error, best, s, scale);
        best = vif_lt(error, best, error, best);
    }
    /* Bytes of four neighbours in k share 32 bits (panel.c). */
    vf inverse = int_inverse(scale), zero = vset(q8 ? 128 : 8);
    for (int k = 0; k < QVL__GROUP / (q8 ? 1 : 2); k += 4) {
        vf q[4];
        for (int l = 0; l < 4; l++) {
            q[l] = vadd(int_round(vload(x[k + l]), inverse, lo, hi), zero);
            if (!q8) q[l] = vadd(q[l], vmul(vadd(int_round(vload(x[k + l + 16]), inverse, lo, hi), zero), vset(16.0f)));
        }
        vstore_bytes(out + k * PANEL, q[0], q[1], q[2], q[3]);
    }
    float bad[W];
    vstore(bad, check);
    vstore(up, scale);
    for (int j = 0; j < W; j++) scales[j] = bad[j] == 0 ? f32_to_bf16(up[j] * down[j]) : 0x7fc0;
}

static void quantize_weights(qvl__type type, uint8_t *out, uint16_t *scales, const float *from) {
    for (int j = 0; j < PANEL; j += W) {
        if (type == QVL__Q8) quantize_columns(1, out + 4 * j, scales + j, from + j);
        else quantize_columns(0, out + 4 * j, scales + j, from + j);
    }
}

#endif
