/* kern.c - the arithmetic of the CPU device, written once over simd.h and compiled once per instruction set.
 *
 * Job:        matrix tiles, epilogues, softmax, norms and rope for one row or one tile.
 * Input:      see kern.h.
 * Output:     a filled struct qvl__kern; everything else in this file is static, so that no copy compiled for a newer
 *             CPU can be linked into code that runs on an older one.
 * Invariants: one accumulator per output element, added to in the order of k (docs/invariance.md);
 *             sums over a row use a fixed number of lanes and a fixed tree, so they depend on the row's length alone;
 *             ends of rows that fill no vector go through the same vector operations on a padded copy.
 */
#include "simd.h"

#include <math.h>

#include "kern.h"

/* ---- matrix tiles ---- */

/* While tiles of rows pass over some panels, the panels behind them come from memory: each of `parts` tiles asks for its part of
 * the lines. at: the next panels, NULL: none. They come to the second-level cache: the first one can wait for fewer lines at once
 * than memory needs. */
typedef struct {
    const char *at;
    int part, parts;
} ahead;

#define TO_L2(p) __builtin_prefetch(p, 0, 2)
#define TO_NEAR(p) __builtin_prefetch(p, 0, HAVE_TILES ? 3 : 2) /* what one row needs soon: of the CPUs with tile registers the first level does wait for enough */

typedef void tile_fn(float *c, size_t ldc, const float *a, size_t lda, const char *b, size_t bs, int k, bool resume, ahead next);

/* mr rows by np panels; all three of type, mr, np are constants after inlining, so acc lives in registers. */
INLINE void tile(const int type, const int mr, const int np, float *c, size_t ldc, const float *a, size_t lda, const char *b,
                 size_t bs, int k, bool resume, ahead next) {
    const int from_panel = np * next.part / next.parts, to_panel = np * (next.part + 1) / next.parts;
    vf acc[6][4 * VP];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < np * VP; j++) acc[i][j] = resume ? vload(c + (size_t)i * ldc + j * W) : vzero();

    if (type == QVL__BF16) {
        for (int p = 0; p + 1 < k; p += 2) {
            vu w[4 * VP];
            for (int j = from_panel; next.at && j < to_panel; j++) TO_L2(next.at + (size_t)j * bs + (size_t)p * 2 * PANEL);
#pragma GCC unroll 8
            for (int j = 0; j < np * VP; j++)
                w[j] = vload_pairs((const uint16_t *)(const void *)(b + (size_t)(j / VP) * bs) + (size_t)p * PANEL + j % VP * 2 * W);
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                vf x[4 * VP];
#pragma GCC unroll 8
                for (int j = 0; j < np * VP; j++) x[j] = odd ? vpair_odd(w[j]) : vpair_even(w[j]);
#pragma GCC unroll 8
                for (int i = 0; i < mr; i++) {
                    vf y = vset(a[(size_t)i * lda + p + odd]);
#pragma GCC unroll 8
                    for (int j = 0; j < np * VP; j++) acc[i][j] = vfma(y, x[j], acc[i][j]);
                }
            }
        }
        if (k & 1) {
#pragma GCC unroll 8
            for (int j = 0; j < np * VP; j++) {
                vf x = vpair_even(vload_pairs((const uint16_t *)(const void *)(b + (size_t)(j / VP) * bs) +
                                              (size_t)(k - 1) * PANEL + j % VP * 2 * W));
#pragma GCC unroll 8
                for (int i = 0; i < mr; i++) acc[i][j] = vfma(vset(a[(size_t)i * lda + k - 1]), x, acc[i][j]);
            }
        }
    } else {
        for (int p = 0; p < k; p++) {
            vf x[4 * VP];
            const size_t line = (size_t)p * PANEL * (type == QVL__F32 ? 4 : type == QVL__F16 ? 2 : 1);
            for (int j = from_panel; line % 64 == 0 && next.at && j < to_panel; j++) /* making floats of I8 takes long enough for the first level */
                __builtin_prefetch(next.at + (size_t)j * bs + line, 0, type == QVL__I8 ? 3 : 2);
#pragma GCC unroll 8
            for (int j = 0; j < np * VP; j++) {
                const char *q = b + (size_t)(j / VP) * bs;
                size_t at = (size_t)p * PANEL + (size_t)(j % VP * W);
                x[j] = type == QVL__F16  ? vload_f16((const uint16_t *)(const void *)q + at)
                       : type == QVL__I8 ? vload_i8((const int8_t *)(const void *)q + at)
                                         : vload((const float *)(const void *)q + at);
            }
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) {
                vf y = vset(a[(size_t)i * lda + p]);
#pragma GCC unroll 8
                for (int j = 0; j < np * VP; j++) acc[i][j] = vfma(y, x[j], acc[i][j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < np * VP; j++) vstore(c + (size_t)i * ldc + j * W, acc[i][j]);
}

#define TILE(T, M, N)                                                                                                  \
    static void tile_##T##_##M##_##N(float *c, size_t ldc, const float *a, size_t lda, const char *b, size_t bs, int k, \
                                     bool resume, ahead next) {                                                        \
        tile(QVL__##T, M, N, c, ldc, a, lda, b, bs, k, resume, next);                                                  \
    }
#define TILES(M, N) TILE(F32, M, N) TILE(BF16, M, N) TILE(F16, M, N) TILE(I8, M, N)
/* The widths a row count comes in: its own and the halves of it, for the panels that are left over. */
#if W == 16
#define WIDTHS1(X) X(1, 4) X(1, 2) X(1, 1)
#define WIDTHS2(X, M) X(M, 4) X(M, 2) X(M, 1)
#define WIDTHS4(X, M) X(M, 4) X(M, 2) X(M, 1)
#elif W == 8
#define WIDTHS1(X) X(1, 4) X(1, 2) X(1, 1)
#define WIDTHS2(X, M) X(M, 2) X(M, 1)
#define WIDTHS4(X, M) X(M, 1)
#else
#define WIDTHS1(X) X(1, 2) X(1, 1)
#define WIDTHS2(X, M) X(M, 1)
#define WIDTHS4(X, M) X(M, 1)
#endif
#if MR == 6
#define ALL_WIDTHS(X) WIDTHS1(X) WIDTHS2(X, 2) WIDTHS2(X, 3) WIDTHS4(X, 4) WIDTHS4(X, 5) WIDTHS4(X, 6)
#else
#define ALL_WIDTHS(X) WIDTHS1(X) WIDTHS2(X, 2) WIDTHS2(X, 3)
#endif
ALL_WIDTHS(TILES)

#define ENTRY(M, N)                             \
    [QVL__F32][M][N] = tile_F32_##M##_##N,   \
    [QVL__BF16][M][N] = tile_BF16_##M##_##N, \
    [QVL__F16][M][N] = tile_F16_##M##_##N,   \
    [QVL__I8][M][N] = tile_I8_##M##_##N,
static tile_fn *const tiles[4][MR + 1][5] = {ALL_WIDTHS(ENTRY)};

static int widest(int mr) { return mr == 1 ? NP1 : mr <= 3 ? NP2 : NP4; }

/* Rows of the next tile: full tiles, and the last two alike (7 is 4 + 3 rather than 6 + 1). */
static int next_tile(int left) { return left >= 2 * MR ? MR : left > MR ? (left + 1) / 2 : left; }

/* For each group of panels all row tiles, so that a slice of panels stays in the first-level cache while the rows pass;
 * one tile of rows takes all panels, widest first. */
static void gemm(qvl__type type, float *c, size_t ldc, const float *a, size_t lda, const void *panels, size_t panel_bytes,
                 int rows, int count, int k, bool resume, const void *next) {
    int group = rows > MR ? widest(MR) : count;
    for (int g = 0; g < count; g += group) {
        int in_group = count - g < group ? count - g : group;
        ahead then = {count - g > group ? (const char *)panels + (size_t)(g + group) * panel_bytes : NULL, 0, (rows + MR - 1) / MR};
        for (int r = 0, mr; r < rows; r += mr, then.part++) {
            mr = next_tile(rows - r);
            int np = widest(mr);
            for (int p = 0; p < in_group; p += np) {
                while (np > in_group - p) np /= 2;
                if (next && rows <= MR) then.at = (const char *)next + (size_t)p * panel_bytes;
                else if (W == 8 && rows > 1 && rows <= MR) /* slower than one row or wider vectors: there the hardware looks far enough */
                    then.at = in_group - p > np ? (const char *)panels + (size_t)(g + p + np) * panel_bytes : NULL;
                tiles[type][mr][np](c + (size_t)r * ldc + (size_t)(g + p) * PANEL, ldc, a + (size_t)r * lda, lda,
                                    (const char *)panels + (size_t)(g + p) * panel_bytes, panel_bytes, k, resume, then);
            }
        }
    }
}

#if HAVE_DOT
INLINE void dot_tile(const int mr, const int np, float *c, size_t ldc, const uint32_t *a, size_t lda, const char *b, size_t bs,
                     int pairs, bool resume, ahead next) {
    const int from_panel = np * next.part / next.parts, to_panel = np * (next.part + 1) / next.parts;
    vf acc[6][4];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < np; j++) acc[i][j] = resume ? vload(c + (size_t)i * ldc + j * W) : vzero();
    for (int p = 0; p < pairs; p++) {
        vu w[4];
#pragma GCC unroll 8
        for (int j = 0; j < np; j++) w[j] = vload_pairs((const uint16_t *)(const void *)(b + (size_t)j * bs) + (size_t)p * 2 * PANEL);
        for (int j = from_panel; next.at && j < to_panel; j++) TO_L2(next.at + (size_t)j * bs + (size_t)p * 4 * PANEL);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
            for (int j = 0; j < np; j++) acc[i][j] = vdot_pairs(acc[i][j], a[(size_t)i * lda + p], w[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < np; j++) vstore(c + (size_t)i * ldc + j * W, acc[i][j]);
}

typedef void dot_fn(float *c, size_t ldc, const uint32_t *a, size_t lda, const char *b, size_t bs, int pairs, bool resume, ahead next);
#define DOT(M, N)                                                                                                          \
    static void dot_##M##_##N(float *c, size_t ldc, const uint32_t *a, size_t lda, const char *b, size_t bs, int pairs, \
                              bool resume, ahead next) {                                                                   \
        dot_tile(M, N, c, ldc, a, lda, b, bs, pairs, resume, next);                                                        \
    }
ALL_WIDTHS(DOT)
#define DOT_ENTRY(M, N) [M][N] = dot_##M##_##N,
static dot_fn *const dots[MR + 1][5] = {ALL_WIDTHS(DOT_ENTRY)};

static void gemm_dot(float *c, size_t ldc, const qvl__split *a, const void *panels, size_t panel_bytes, int rows,
                     int count, int pairs, bool resume) {
    int group = rows > MR ? widest(MR) : count;
    for (int g = 0; g < count; g += group) {
        int in_group = count - g < group ? count - g : group;
        ahead next = {rows > MR && count - g > group ? (const char *)panels + (size_t)(g + group) * panel_bytes : NULL, 0, (rows + MR - 1) / MR};
        for (int r = 0, mr; r < rows; r += mr, next.part++) {
            mr = next_tile(rows - r);
            int np = widest(mr);
            for (int p = 0; p < in_group; p += np) {
                while (np > in_group - p) np /= 2;
                dots[mr][np](c + (size_t)r * ldc + (size_t)(g + p) * PANEL, ldc, (const uint32_t *)(const void *)(a->hi + (size_t)r * a->ld), a->ld / 2,
                             (const char *)panels + (size_t)(g + p) * panel_bytes, panel_bytes, pairs, resume, next);
            }
        }
    }
}
#endif

static void widen(qvl__type type, float *dst, const void *panel, int k) {
    const uint16_t *src = panel;
    if (type == QVL__F32) {
        memcpy(dst, panel, (size_t)k * PANEL * sizeof(float));
        return;
    }
    if (type == QVL__I8) {
        for (size_t i = 0; i < (size_t)k * PANEL; i += W) vstore(dst + i, vload_i8((const int8_t *)panel + i));
        return;
    }
    if (type == QVL__F16) {
        for (size_t i = 0; i < (size_t)k * PANEL; i += W) vstore(dst + i, vload_f16(src + i));
        return;
    }
    int p = 0;
    for (; p + 1 < k; p += 2)
        for (int j = 0; j < PANEL; j += W) {
            vu w = vload_pairs(src + (size_t)p * PANEL + 2 * j);
            vstore(dst + (size_t)p * PANEL + j, vpair_even(w));
            vstore(dst + (size_t)(p + 1) * PANEL + j, vpair_odd(w));
        }
    if (p < k)
        for (int j = 0; j < PANEL; j += W)
            vstore(dst + (size_t)p * PANEL + j, vpair_even(vload_pairs(src + (size_t)p * PANEL + 2 * j)));
}

/* W floats; x * 0 is NaN for what is not finite. */
INLINE void narrow_f16(uint16_t *dst, const float *src) {
    vf x = vload(src), most = vset(65504);
    vstore_f16(dst, vfma(x, vzero(), vmin(most, vmax(vsub(vzero(), most), x))));
}

static void narrow(qvl__type type, uint16_t *dst, const float *src, int n) {
    int i = 0;
    if (type == QVL__BF16) {
#if HAVE_DOT || HAVE_TILES
        for (; i + 2 * W <= n; i += 2 * W) vstore_bf16(dst + i, vload(src + i), vload(src + i + W));
#endif
        for (; i < n; i++) dst[i] = f32_to_bf16(src[i]);
    } else {
        for (; i + W <= n; i += W) narrow_f16(dst + i, src + i);
        if (i < n) {
            float rest[W] = {0};
            uint16_t out[W];
            memcpy(rest, src + i, (size_t)(n - i) * sizeof(float));
            narrow_f16(out, rest);
            memcpy(dst + i, out, (size_t)(n - i) * sizeof(uint16_t));
        }
    }
    if (n & 1) dst[n] = 0;
}

/* Symmetric, 127 steps to the largest. A number that is not finite makes the scale NaN, so that nothing hides it. *total is
 * the sum of the integers. */
INLINE float quantize_sum(int8_t *dst, const float *src, int n, int32_t *total) {
    vf top = vzero(), zero = vzero(), sum = vzero(); /* x * 0 is NaN for what is not finite; sums of integers are exact */
    float tail[W] = {0};
    int whole = n / W * W;
    for (int i = whole; i < n; i++) tail[i - whole] = src[i];
    for (int i = 0; i < n; i += W) {
        vf x = vload(i < whole ? src + i : tail);
        top = vmax(vabs(x), top);
        zero = vfma(x, vzero(), zero);
    }
    float max = vmax_lanes(top);
    bool finite = vsum(zero) == 0;
    float inverse = finite && max > 0 ? 127.0f / max : 0;
    if (inverse > 3.4028234e38f) inverse = 0; /* so small that 127 / max is no float: all zero */
    for (int i = 0; i < n; i += W) {
        vf t = finite ? vround(vmul(vload(i < whole ? src + i : tail), vset(inverse))) : vzero();
        sum = vadd(sum, t);
        if (i < whole) {
            vstore_i8(dst + i, t);
        } else {
            int8_t end[W];
            vstore_i8(end, t);
            memcpy(dst + i, end, (size_t)(n - i));
        }
    }
    *total = (int32_t)vsum(sum);
    return !finite ? NAN : inverse > 0 ? max / 127.0f : 0;
}

static float quantize(int8_t *dst, const float *src, int n) {
    int32_t total;
    return quantize_sum(dst, src, n, &total);
}

#include "integers.h"
#if HAVE_TILES
#include "tiles.h"
#endif

static void scale(float *y, const float *w, int n) {
    int i = 0;
    for (; i + W <= n; i += W) vstore(y + i, vmul(vload(y + i), vload(w + i)));
    for (; i < n; i++) y[i] *= w[i];
}

/* ---- functions of one number ---- */

/* e^x: x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite: the high part of ln 2 has few bits, so n * it is exact), then
 * a minimax polynomial (relative error 3e-9) whose first two coefficients are exactly 1, so that e^0 is exactly 1.
 * At most 1.5 ulp with FMA, 2 without; below -87.3 the result is 0, above 88.3 it stays at e^88.3. NaN stays NaN. */
INLINE vf vexp(vf x) {
    vf t = vmin(vset(88.3f), x); /* vmin and vmax give the second argument when it is NaN */
    t = vmax(vset(-87.3f), t);
    vf n = vround(vmul(t, vset(1.44269504f)));
    vf r = vfma(n, vset(-0.693359375f), t);
    r = vfma(n, vset(2.12194440e-4f), r);
    vf p = vset(1.381448061e-3f);
    p = vfma(p, r, vset(8.368780211e-3f));
    p = vfma(p, r, vset(4.166839394e-2f));
    p = vfma(p, r, vset(1.666652011e-1f));
    p = vfma(p, r, vset(4.999999341e-1f));
    p = vfma(vmul(p, r), r, r);
    p = vadd(p, vset(1.0f));
    return vif_lt(x, vset(-87.3f), vzero(), vmul(p, vpow2(n)));
}

/* x * sigmoid(x) */
INLINE vf vsilu(vf x) { return vdiv(x, vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }

/* x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3); since (1 + tanh u) / 2 = 1 / (1 + e^-2u), no tanh and
 * no cancellation. */
INLINE vf vgelu_tanh(vf x) {
    vf u = vfma(vmul(vmul(x, x), x), vset(0.044715f), x);
    return vdiv(x, vadd(vset(1.0f), vexp(vmul(u, vset(-1.5957691216f)))));
}

/* x (1 + erf(x / sqrt 2)) / 2. With z = |x| / sqrt 2 and t = 1 / (1 + 0.35 z), erfc(z) = e^(-z^2) t P(t): P is a minimax
 * polynomial over z = 0..10 (relative error 7e-9), and past 10 the exponential is 0. The tail of negative x keeps its
 * relative accuracy (about 1e-6 at x = -5, where the rounding of z^2 weighs most). */
INLINE vf vgelu_erf(vf x) {
    vf z = vmul(vabs(x), vset(0.70710678f));
    vf t = vdiv(vset(1.0f), vfma(z, vset(0.35f), vset(1.0f)));
    vf p = vset(3.840129066e-2f);
    p = vfma(p, t, vset(-1.589296495e-1f));
    p = vfma(p, t, vset(1.814646041e-1f));
    p = vfma(p, t, vset(-2.771037739e-2f));
    p = vfma(p, t, vset(8.702285854e-2f));
    p = vfma(p, t, vset(1.460399052e-1f));
    p = vfma(p, t, vset(1.511869971e-1f));
    p = vfma(p, t, vset(1.879022252e-1f));
    p = vfma(p, t, vset(1.971383758e-1f));
    p = vfma(p, t, vset(1.974837773e-1f));
    vf h = vmul(vmul(vmul(p, t), vexp(vsub(vzero(), vmul(z, z)))), vset(0.5f)); /* erfc(z) / 2 */
    return vmul(x, vif_lt(x, vzero(), h, vsub(vset(1.0f), h)));
}

/* ---- epilogues ---- */

INLINE vf finish(const int e, vf y, vf acc, vf up) {
    if (e == QVL__EPI_ADD) return vadd(y, acc);
    if (e == QVL__EPI_GELU_TANH) return vgelu_tanh(acc);
    if (e == QVL__EPI_GELU_ERF) return vgelu_erf(acc);
    if (e == QVL__EPI_SWIGLU) return vmul(vsilu(acc), up);
    return acc;
}

/* y is read for ADD and bias where there is one, both through padded copies at the end of a row. */
INLINE void epilogue_row(const int e, float *y, const float *acc, const float *bias, const float *bias2, int n) {
    for (int c = 0; c < n; c += W) {
        const float *src = acc + (e == QVL__EPI_SWIGLU ? c / PANEL * 2 * PANEL + c % PANEL : c);
        int m = n - c < W ? n - c : W;
        float yb[W], bb[W], ub[W];
        const float *yp = y + c, *bp = bias ? bias + c : NULL, *up = bias2 ? bias2 + c : NULL;
        if (m < W) {
            memset(yb, 0, sizeof yb);
            memset(bb, 0, sizeof bb);
            memset(ub, 0, sizeof ub);
            if (e == QVL__EPI_ADD) memcpy(yb, yp, (size_t)m * sizeof(float));
            if (bp) memcpy(bb, bp, (size_t)m * sizeof(float));
            if (up) memcpy(ub, up, (size_t)m * sizeof(float));
            yp = yb;
            if (bp) bp = bb;
            if (up) up = ub;
        }
        vf v = vload(src), u = vzero();
        if (bp) v = vadd(v, vload(bp));
        if (e == QVL__EPI_SWIGLU) {
            u = vload(src + PANEL);
            if (up) u = vadd(u, vload(up));
        }
        v = finish(e, e == QVL__EPI_ADD ? vload(yp) : vzero(), v, u);
        if (m < W) {
            vstore(yb, v);
            memcpy(y + c, yb, (size_t)m * sizeof(float));
        } else {
            vstore(y + c, v);
        }
    }
}

static void epilogue(qvl__epilogue e, float *y, const float *acc, const float *bias, const float *bias2, int n) {
    switch (e) {
    case QVL__EPI_NONE: epilogue_row(QVL__EPI_NONE, y, acc, bias, NULL, n); break;
    case QVL__EPI_ADD: epilogue_row(QVL__EPI_ADD, y, acc, bias, NULL, n); break;
    case QVL__EPI_GELU_TANH: epilogue_row(QVL__EPI_GELU_TANH, y, acc, bias, NULL, n); break;
    case QVL__EPI_GELU_ERF: epilogue_row(QVL__EPI_GELU_ERF, y, acc, bias, NULL, n); break;
    case QVL__EPI_SWIGLU: epilogue_row(QVL__EPI_SWIGLU, y, acc, bias, bias2, n); break;
    }
}

/* ---- softmax ---- */

/* 2^x for x up to 0, or a rounding above: x = n + r with |r| <= 1/2, both exact (adding 1.5 * 2^23 leaves n in the last bits),
 * then a minimax polynomial (relative error 2e-8) whose first coefficient is 1, so that 2^0 is exactly 1. At most 1 ulp; 0 up to
 * -125. NaN stays NaN. */
INLINE vf vexp2(vf x) {
    vf t = vmax(vset(-126.0f), x), z = vadd(t, vset(12582912.0f)), r = vsub(t, vsub(z, vset(12582912.0f)));
    vf p = vset(1.559467782e-4f);
    p = vfma(p, r, vset(1.340664341e-3f));
    p = vfma(p, r, vset(9.617692791e-3f));
    p = vfma(p, r, vset(5.550310388e-2f));
    p = vfma(p, r, vset(2.402265221e-1f));
    p = vfma(p, r, vset(6.931472421e-1f));
    p = vfma(p, r, vset(1.0f));
    return vif_lt(vset(-125.0f), x, vtimes_pow2(p, z), vmax(vzero(), x)); /* vmax gives the second argument when that is NaN */
}

/* Probabilities are powers of 2: what brings the scores to that takes the same fused operation that takes away the maximum,
 * and as *max is kept rounded, it is the same number for all that is divided by the same sum. */
static void softmax_step(float *s, int valid, float scale, float *max, float *sum, float *o, int dim) {
    int n = (valid + PANEL - 1) / PANEL * PANEL;
    for (int i = valid; i < n; i++) s[i] = -INFINITY; /* whatever lies past the row's own keys */
    vf by = vset(scale * 1.44269504f), m = vset(-INFINITY), total = vzero();
    for (int i = 0; i < n; i += W) m = vmax(m, vload(s + i));
    float m_new = vmax_lanes(vmul(m, by));
    if (*max > m_new) m_new = *max;
    for (int i = 0; i < n; i += W) {
        vf p = vexp2(vfma(vload(s + i), by, vset(-m_new)));
        vstore(s + i, p);
        total = vadd(total, p);
    }
    /* Not rescaling is the same bits as multiplying by 2^0 = 1. A NaN maximum does compare unequal. */
    if (!(m_new == *max)) {
        float before[W];
        vstore(before, vexp2(vset(*max - m_new)));
        float alpha = before[0];
        *sum *= alpha;
        *max = m_new;
        for (int i = 0; i < dim; i += W) vstore(o + i, vmul(vload(o + i), vset(alpha)));
    }
    *sum += vsum(total);
}

static void divide(float *out, const float *o, float sum, int n) {
    int i = 0;
    for (; i + W <= n; i += W) vstore(out + i, vdiv(vload(o + i), vset(sum)));
    for (; i < n; i++) out[i] = o[i] / sum;
}

/* ---- norms and rope ---- */

/* The sum of f(x[i]) by four vectors of lanes in turn, then a tree; the end of the row is padded with zeros. */
INLINE float row_sum(const float *x, int n, float shift, const int squared) {
    vf t[4] = {vzero(), vzero(), vzero(), vzero()}, sh = vset(shift);
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vf v = vsub(vload(x + i + j * W), sh);
            t[j] = squared ? vfma(v, v, t[j]) : vadd(t[j], v);
        }
    for (int j = 0; i < n; i += W, j++) {
        float tail[W];
        int m = n - i < W ? n - i : W;
        for (int l = 0; l < W; l++) tail[l] = l < m ? x[i + l] : shift;
        vf v = vsub(vload(tail), sh);
        t[j] = squared ? vfma(v, v, t[j]) : vadd(t[j], v);
    }
    return vsum(vadd(vadd(t[0], t[1]), vadd(t[2], t[3])));
}

static void rms_norm(float *y, const float *x, const float *w, int n, float eps) {
    float r = 1.0f / sqrtf(row_sum(x, n, 0.0f, 1) / (float)n + eps);
    int i = 0;
    for (; i + W <= n; i += W) vstore(y + i, vmul(vmul(vload(x + i), vset(r)), vload(w + i)));
    for (; i < n; i++) y[i] = x[i] * r * w[i];
}

static void layer_norm(float *y, const float *x, const float *w, const float *b, int n, float eps) {
    float mean = row_sum(x, n, 0.0f, 0) / (float)n;
    float r = 1.0f / sqrtf(row_sum(x, n, mean, 1) / (float)n + eps);
    int i = 0;
    for (; i + W <= n; i += W)
        vstore(y + i, vadd(vmul(vmul(vsub(vload(x + i), vset(mean)), vset(r)), vload(w + i)), vload(b + i)));
    for (; i < n; i++) y[i] = (x[i] - mean) * r * w[i] + b[i];
}

static void rope(float *x, const float *cos, const float *sin, int half) {
    float *hi = x + half;
    int i = 0;
    for (; i + W <= half; i += W) {
        vf a = vload(x + i), b = vload(hi + i), c = vload(cos + i), s = vload(sin + i);
        vstore(x + i, vsub(vmul(a, c), vmul(b, s)));
        vstore(hi + i, vadd(vmul(b, c), vmul(a, s)));
    }
    for (; i < half; i++) {
        float a = x[i], b = hi[i];
        x[i] = a * cos[i] - b * sin[i];
        hi[i] = b * cos[i] + a * sin[i];
    }
}

static void add(float *y, const float *x, int n) {
    int i = 0;
    for (; i + W <= n; i += W) vstore(y + i, vadd(vload(y + i), vload(x + i)));
    for (; i < n; i++) y[i] += x[i];
}

static void axpy(float *y, const float *x, float a, int n) {
    int i = 0;
    for (; i + W <= n; i += W) vstore(y + i, vadd(vload(y + i), vmul(vset(a), vload(x + i))));
    for (; i < n; i++) y[i] += a * x[i];
}

/* ---- the yardstick of roofline.c ---- */

/* CHAINS chains hide an instruction's latency, and 16 registers hold them. */
#define CHAINS 12
#if defined(QVL__ISA_generic) || defined(QVL__SIMD_EMULATE)
#define HOLD(x) (void)(x)
#else
#define HOLD(x) KEEP(x)
#endif

static uint64_t peak_float(int rounds) {
    vf s[CHAINS], x = vset(0.5f), y = vset(0.25f);
    for (int j = 0; j < CHAINS; j++) s[j] = vset((float)j);
    for (int i = 0; i < rounds; i++) {
        HOLD(y);
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) s[j] = vfma(s[j], x, y);
    }
    volatile float sink = 0;
    for (int j = 0; j < CHAINS; j++) sink += vsum(s[j]);
    return CHAINS * W * 2;
}

#if HAVE_DOT
static uint64_t peak_dot(int rounds) {
    vf s[CHAINS];
    vu y = vload_pairs((const uint16_t[2 * W]){0x3c00});
    for (int j = 0; j < CHAINS; j++) s[j] = vset((float)j);
    for (int i = 0; i < rounds; i++) {
        HOLD(y);
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) s[j] = vdot_pairs(s[j], 0x3c003c00, y);
    }
    volatile float sink = 0;
    for (int j = 0; j < CHAINS; j++) sink += vsum(s[j]);
    return CHAINS * W * 4;
}
#endif

#if HAVE_TILES
/* Four chains, as tiles.h has them; integers in steps of a group. */
static uint64_t peak_tiles(const bool ints, int rounds) {
    static const char zero[REG_ROWS * 64];
    tiles_take(REG_ROWS, REG_ROWS, ints ? QVL__GROUP / 4 : 16);
    TILE_LOAD(4, zero, 64);
    TILE_LOAD(5, zero, 64);
    TILE_LOAD(6, zero, 64);
    TILE_LOAD(7, zero, 64);
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int i = 0; i < rounds; i++) {
        if (ints) {
            TILE_INT(0, 4, 6);
            TILE_INT(1, 4, 7);
            TILE_INT(2, 5, 6);
            TILE_INT(3, 5, 7);
        } else {
            TILE_DOT(0, 4, 6);
            TILE_DOT(1, 4, 7);
            TILE_DOT(2, 5, 6);
            TILE_DOT(3, 5, 7);
        }
    }
    TILE_RELEASE();
    return 4 * REG_ROWS * PANEL * 32 * 2;
}
#elif HAVE_INT && !defined(QVL__SIMD_EMULATE)
/* What int_step does for each load of activations. */
static uint64_t peak_int(const bool q8, int rounds) {
    vint s[CHAINS], x = vint_set(0x01020304), y = vint_set(0x04030201);
#pragma GCC unroll 12
    for (int j = 0; j < CHAINS; j++) s[j] = vint_set(j);
    for (int i = 0; i < rounds; i++)
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) {
#if INT_PAIRS
            s[j] = vint_add16(s[j], vint_maddubs(x, y));
#else
            s[j] = vint_dot(s[j], x, y);
#endif
            HOLD(s[j]); /* in its register */
            HOLD(y);
        }
    volatile float sink = 0;
#pragma GCC unroll 12
    for (int j = 0; j < CHAINS; j++) sink += vsum(vint_float(s[j]));
    return CHAINS * W * 8 / INT_BYTES(q8);
}
#endif

static uint64_t peak(qvl__type type, int rounds) {
#if HAVE_TILES
    if (type == QVL__BF16 || qvl__type_quantised(type)) return peak_tiles(type != QVL__BF16, rounds);
#endif
#if HAVE_DOT
    if (type == QVL__BF16) return peak_dot(rounds);
#endif
#if HAVE_INT && !HAVE_TILES && !defined(QVL__SIMD_EMULATE)
    if (qvl__type_quantised(type)) return peak_int(type == QVL__Q8, rounds);
#endif
    (void)type;
    return peak_float(rounds);
}

int ISA_INIT(struct qvl__kern *k) {
    *k = (struct qvl__kern){
        .isa = ISA_NAME,
        .mr = MR,
        .np = NP4,
        .dot_mr = HAVE_TILES ? 32 : MR,
        .int_mr = HAVE_TILES ? 16 : MR,
        .block_rows = HAVE_TILES ? 256 : 96, /* of 2 MB, or of 512 KB */
        .block_panels = HAVE_TILES ? 32 : 16,
        .q8_bytes = INT_BYTES(1),
        .widen_first = WIDEN_FIRST,
        .gemm = gemm,
#if HAVE_DOT || HAVE_TILES
        .gemm_dot = gemm_dot,
#endif
#if HAVE_TILES
        .gemm_int = gemm_int_tiles,
        .tiles = hold_tiles,
        .split = split,
        .scores = scores,
        .values = values,
        .first_values = first_values,
#else
        .gemm_int = gemm_int,
#endif
        .widen = widen,
        .narrow = narrow,
        .quantize = quantize,
        .quantize_weights = quantize_weights,
        .quantize_rows = quantize_rows,
        .scale = scale,
        .epilogue = epilogue,
        .softmax_step = softmax_step,
        .divide = divide,
        .rms_norm = rms_norm,
        .layer_norm = layer_norm,
        .rope = rope,
        .add = add,
        .axpy = axpy,
        .peak = peak,
    };
    return 0;
}
