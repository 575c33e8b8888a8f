/* ops_cases.h - the checks of the op table, for whatever levels of the CPU or modes of a GPU the including program opens.
 *
 * Job:        every op against a reference in double precision, and every op against itself: alone, batched, chunked,
 *             on 1, 2 and 3 threads, with NaN in all memory that must not matter - the same bits.
 * Input:      the including program defines n_levels and open_level().
 * Output:     cmocka tests, listed in OPS_TESTS.
 * Invariants: bounds are stated where they are used: u = 2^-24 is half an ulp of 1, and a sum of k products in order
 *             is off by at most about k u times the sum of their magnitudes.
 */
#ifndef OPS_CASES_H
#define OPS_CASES_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../../libqvl/device/cpu/cpu.h"

#define U 0x1p-24

static const int n_levels;
/* The device of level i with bf16_math asked for or not, or NULL if this machine lacks the level. */
static qvl__device *open_level(int i, qvl__pool *pool, bool bf16_math);

/* ---- helpers ---- */

static uint64_t rng = 88172645463325252ull;
static uint32_t random_u32(void) {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint32_t)(rng >> 32);
}
static float random_float(void) { return (float)((double)random_u32() / 2147483648.0 - 1.0); } /* -1 .. 1 */
static int random_below(int n) { return (int)(random_u32() % (uint32_t)n); }

static void *must(void *p) {
    if (!p) abort();
    return p;
}
static float *floats(size_t n) { return must(malloc((n + 1) * sizeof(float))); }
static float *random_floats(size_t n, float scale) {
    float *x = floats(n);
    for (size_t i = 0; i < n; i++) x[i] = random_float() * scale;
    return x;
}
static float *copy_floats(const float *x, size_t n) {
    float *y = floats(n);
    memcpy(y, x, n * sizeof(float));
    return y;
}
static void fill_nan(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = NAN;
}

/* Rounding as IEEE defines it, by scaling to the grid of the format: not the bit tricks that are being tested. */
static double to_grid(double x, int bits, int min_exp, double max) {
    if (x == 0 || !isfinite(x)) return x;
    int e;
    frexp(x, &e);
    e = e - 1 < min_exp ? min_exp : e - 1;
    double r = ldexp(nearbyint(ldexp(x, bits - e)), e - bits);
    return fabs(r) > max ? copysign(INFINITY, r) : r;
}
static float rounded(float x, qvl__type t) {
    if (t == QVL__BF16) return (float)to_grid(x, 7, -126, 0x1.fep127);
    if (t == QVL__F16) return (float)to_grid(x, 10, -14, 65504);
    if (t == QVL__F8) return fabsf(x) > 448 ? copysignf(448, x) : (float)to_grid(x, 3, -6, 448);
    return x;
}
/* n numbers that type t represents, as the bytes of a checkpoint. */
static void *encode(const float *x, size_t n, qvl__type t) {
    uint8_t *out = must(malloc(n * 4 + 4));
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, &x[i], 4);
        uint16_t h = (uint16_t)(u >> 16);
        if (t == QVL__F16) {
            float a = fabsf(x[i]);
            int e;
            frexpf(a, &e);
            if (a == 0) h = 0;
            else if (e - 1 < -14) h = (uint16_t)ldexpf(a, 24);
            else h = (uint16_t)((e - 1 + 15) << 10 | ((int)ldexpf(a, 10 - (e - 1)) & 1023));
            if (signbit(x[i])) h |= 0x8000;
        }
        if (t == QVL__F32) memcpy(out + 4 * i, &u, 4);
        else memcpy(out + 2 * i, &h, 2);
    }
    return out;
}

static void check_near(const char *what, const char *level, double got, double want, double bound) {
    if (fabs(got - want) <= bound) return;
    fail_msg("%s at %s: got %.9g, want %.9g, off by %.3g, bound %.3g", what, level, got, want, fabs(got - want), bound);
}
/* 0: the same bits. A GPU in its fastest mode does not promise that: then how much the two may differ. */
static double apart = 0;
static void check_bits(const char *what, const char *level, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], 4) != 0 && !(fabs((double)a[i] - (double)b[i]) <= apart * (1 + fabs((double)a[i])))) fail_msg("%s at %s: element %zu differs: %.9g and %.9g", what, level, i,
            (double)a[i], (double)b[i]);
}

/* Runs body once for each level that can be opened, on the given number of threads, as d. */
static void each_level(int threads, bool bf16_math, void (*body)(qvl__device *d)) {
    qvl__pool *pool;
    assert_int_equal(qvl__pool_new(&pool, threads), 0);
    for (int i = 0; i < n_levels; i++) {
        qvl__device *d = open_level(i, pool, bf16_math);
        if (!d) continue;
        body(d);
        d->close(d);
    }
    qvl__pool_free(pool);
}

/* The same level as d on another number of threads. */
static qvl__device *reopen(const qvl__device *d, int threads, qvl__pool **pool) {
    assert_int_equal(qvl__pool_new(pool, threads), 0);
    for (int i = 0; i < n_levels; i++) {
        qvl__device *e = open_level(i, *pool, d->bf16_math);
        if (e && strcmp(e->isa, d->isa) == 0) return e;
        if (e) e->close(e);
    }
    abort();
}

/* A scale for each group, so that its largest number becomes 448: rows as matrix_put takes F8, and with `as` the numbers that they hold. */
static uint8_t *fp8_rows(const float *w, int n, int k, float *as) {
    size_t row = qvl__row_bytes(QVL__F8, (size_t)k);
    uint8_t *out = must(calloc((size_t)n, row));
    for (int i = 0; i < n * k; i++) {
        int r = i / k, g = i % k / QVL__GROUP * QVL__GROUP;
        float max = 0;
        for (int j = g; j < k && j < g + QVL__GROUP; j++) max = fabsf(w[r * k + j]) > max ? fabsf(w[r * k + j]) : max;
        float scale = rounded(max > 0 ? max / 448 : 1, QVL__BF16), x = rounded(w[i] / scale, QVL__F8);
        uint32_t bits;
        memcpy(&bits, &scale, 4);
        uint16_t half = (uint16_t)(bits >> 16);
        uint8_t *to = out + (size_t)r * row;
        memcpy(to + (k + 1) / 2 * 2 + g / QVL__GROUP * 2, &half, 2);
        int e;
        frexpf(fabsf(x), &e);
        to[i % k] = (uint8_t)(isnan(x) ? 0x7F : x == 0 || e - 1 < -6 ? (int)ldexpf(fabsf(x), 9) : (e - 1 + 7) << 3 | ((int)ldexpf(fabsf(x), 3 - (e - 1)) & 7));
        if (signbit(x)) to[i % k] |= 0x80;
        if (as) as[i] = x * scale;
    }
    return out;
}

/* Rows of floats, rounded for a type that has no way from them. */
static void put_floats(qvl__device *d, qvl__matrix *m, int first, int count, const float *w) {
    if (m->type != QVL__F8) {
        d->matrix_put(d, m, first, count, QVL__F32, w);
        return;
    }
    uint8_t *rows = fp8_rows(w, count, m->k, NULL);
    d->matrix_put(d, m, first, count, QVL__F8, rows);
    free(rows);
}

static qvl__matrix new_matrix(qvl__device *d, qvl__type type, int n, int k, bool gate_up, const float *w) {
    qvl__matrix m;
    assert_int_equal(d->matrix_new(d, &m, type, n, k, (qvl__role){.gate_up = gate_up}), 0);
    put_floats(d, &m, 0, n, w);
    return m;
}

/* ---- matmul ---- */

static double reference_finish(qvl__epilogue e, double v, double y, double up) {
    switch (e) {
    case QVL__EPI_NONE: return v;
    case QVL__EPI_ADD: return y + v;
    case QVL__EPI_GELU_TANH: return v / (1 + exp(-2 * sqrt(2 / M_PI) * (v + 0.044715 * v * v * v))); /* (1 + tanh u) / 2 */
    case QVL__EPI_GELU_ERF: return 0.5 * v * erfc(-v / sqrt(2));
    case QVL__EPI_SWIGLU: return v / (1 + exp(-v)) * up;
    }
    return NAN;
}

/* Types of matrices. */
static const qvl__type matrix_types[] = {
    QVL__F32, QVL__BF16, QVL__F16, QVL__Q8, QVL__Q4,
#ifdef WITH_FP8
    QVL__F8,
#endif
};
enum { N_MATRIX_TYPES = sizeof matrix_types / sizeof *matrix_types };

/* The numbers that a matrix of such a type holds for w[n][k]. */
static void as_stored(qvl__device *d, qvl__type type, float *w, int n, int k) {
    if (type == QVL__F8) {
        float *as = floats((size_t)(n * k));
        free(fp8_rows(w, n, k, as));
        memcpy(w, as, (size_t)(n * k) * sizeof *w);
        free(as);
        return;
    }
    if (!qvl__type_quantised(type)) {
        for (int i = 0; i < n * k; i++) w[i] = rounded(w[i], type);
        return;
    }
    qvl__matrix m = new_matrix(d, type, n, k, false, w);
    int32_t *ids = must(malloc((size_t)n * sizeof *ids));
    for (int i = 0; i < n; i++) ids[i] = i;
    d->embed(d, w, &m, ids, n);
    free(ids);
    d->matrix_free(d, &m);
}

/* Activations as products of integers see them: 127 steps to the largest of each group. */
static void as_integers(float *x, int rows, int k) {
    for (int r = 0; r < rows; r++)
        for (int g = 0; g < k; g += QVL__GROUP) {
            float *p = x + (size_t)r * k + g, max = 0;
            int n = k - g < QVL__GROUP ? k - g : QVL__GROUP;
            for (int i = 0; i < n; i++) max = fabsf(p[i]) > max ? fabsf(p[i]) : max;
            float inverse = max > 0 ? 127.0f / max : 0;
            for (int i = 0; i < n; i++) p[i] = rintf(p[i] * inverse) * (max / 127.0f);
        }
}

static void matmul_case(qvl__device *d, qvl__type type, qvl__epilogue e, int rows, int n, int k, bool with_bias, bool by_attention) {
    bool gate_up = e == QVL__EPI_SWIGLU;
    if (gate_up) n *= 2;
    int n_out = gate_up ? n / 2 : n;
    float *w = random_floats((size_t)n * k, 1.0f), *x = random_floats((size_t)rows * k, 2.0f),
        *bias = random_floats((size_t)n, 1.0f);
    float *y = random_floats((size_t)rows * n_out, 1.0f), *before = copy_floats(y, (size_t)rows * n_out);
    if (e != QVL__EPI_ADD) fill_nan(y, (size_t)rows * n_out);
    y[(size_t)rows * n_out] = 12345.0f; /* the guard */
    qvl__matrix m = new_matrix(d, type, n, k, gate_up, w);
    if (by_attention) m.role.head_dim = 8; /* the CPU lays all out alike */
    d->matmul(d, y, x, rows, &m, with_bias ? bias : NULL, e);
    assert_true(y[(size_t)rows * n_out] == 12345.0f);
    /* Integer matrices: the CPU rounds activations to integers, a GPU to bf16 like all others but F32. */
    bool dot = d->bf16_math && (type == QVL__BF16 || (!d->host_memory && qvl__type_scaled(type)));
    /* F16 matrices: to f16, but not at all in deterministic mode. Either is allowed. */
    double inputs = d->bf16_math && !d->host_memory && type == QVL__F16 ? 0x1p-11 : 0;
    /* Tile registers: beside attention in two parts. */
    if (by_attention && d->kv_type == QVL__BF16) dot = false, inputs = 0x1p-17;
    as_stored(d, type, w, n, k);
    if (qvl__type_quantised(type) && d->host_memory) as_integers(x, rows, k);
    if (dot)
        for (int i = 0; i < rows * k; i++) x[i] = rounded(x[i], QVL__BF16);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < n_out; c++) {
            double v[2] = {0, 0}, mag[2] = {0, 0};
            for (int part = 0; part <= gate_up; part++) {
                const float *col = w + (size_t)(c + part * n_out) * k;
                for (int i = 0; i < k; i++) {
                    double p = (double)x[(size_t)r * k + i] * col[i];
                    v[part] += p;
                    mag[part] += fabs(p);
                }
                if (with_bias) v[part] += bias[c + part * n_out], mag[part] += fabs(bias[c + part * n_out]);
            }
            double old = before[(size_t)r * n_out + c], want = reference_finish(e, v[0], old, v[1]);
            /* the sum's error, passed through a function whose slope is at most 1.13, plus the function's own 1e-6 */
            double u = (k + 4) * U + inputs, sum = u * mag[0], bound = sum;
            if (e == QVL__EPI_ADD) bound = sum + 2 * U * (fabs(old) + fabs(v[0]));
            if (e == QVL__EPI_GELU_TANH || e == QVL__EPI_GELU_ERF) bound = 1.13 * sum + 1e-6 * fabs(want);
            if (e == QVL__EPI_SWIGLU)
                bound = 1.13 * sum * fabs(v[1]) + u * mag[1] * fabs(v[0]) + 1.13 * sum * u * mag[1] + 1e-6 * fabs(want);
            check_near("matmul", d->isa, y[(size_t)r * n_out + c], want, bound + 1e-30);
        }
    d->matrix_free(d, &m);
    free(before);
    free(y);
    free(bias);
    free(x);
    free(w);
}

static const qvl__epilogue epilogues[] = {QVL__EPI_NONE, QVL__EPI_ADD, QVL__EPI_GELU_TANH, QVL__EPI_GELU_ERF, QVL__EPI_SWIGLU};

static void matmul_body(qvl__device *d) {
    static const int shapes[][3] = {/* rows, n, k */
        {1, 1, 1}, {1, 16, 16}, {1, 130, 77}, {2, 17, 33}, {3, 95, 64}, {4, 15, 7}, {5, 100, 100}, {6, 33, 301},
        {7, 48, 600}, {12, 129, 257}, {33, 31, 513}, {97, 40, 259}, {200, 70, 90}};
    for (int t = 0; t < N_MATRIX_TYPES; t++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (int e = 0; e < 5; e++) {
                matmul_case(d, matrix_types[t], epilogues[e], shapes[s][0], shapes[s][1], shapes[s][2], s % 2 == 0, false);
                if (d->host_memory && d->bf16_math && matrix_types[t] == QVL__BF16)
                    matmul_case(d, QVL__BF16, epilogues[e], shapes[s][0], shapes[s][1], shapes[s][2], s % 2 == 0, true);
            }
}
static void test_matmul(void **state) {
    (void)state;
    each_level(2, false, matmul_body);
}

static void matmul_dot_body(qvl__device *d) {
    if (d->bf16_math) matmul_body(d);
}
static void test_matmul_bf16_math(void **state) {
    (void)state;
    each_level(2, true, matmul_dot_body);
}

/* Integer products are exact, so two levels differ by their last rounding step alone; here the extremes: every integer
 * at its end, where a 16-bit sum would overflow first. And what is not finite comes out as that. */
static void matmul_ends_body(qvl__device *d) {
    enum { K = 96, N = 33, ROWS = 7 };
    float w[N * K], x[ROWS * K], y[ROWS * N];
    for (int t = 3; t < N_MATRIX_TYPES; t++)
        for (int sign = -1; sign <= 1; sign += 2) {
            for (int i = 0; i < N * K; i++) w[i] = (float)sign * 3.0f;
            qvl__matrix m = new_matrix(d, matrix_types[t], N, K, false, w);
            static const int ends[] = {8, 119, 120, 127}; /* of 127 steps: where halves of 4 bits end, and all of them */
            for (size_t e = 0; e < sizeof ends / sizeof *ends; e++) {
                for (int i = 0; i < ROWS * K; i++) x[i] = (float)((i / K % 2 ? -1 : 1) * (i % QVL__GROUP ? ends[e] : 127));
                d->matmul(d, y, x, ROWS, &m, NULL, QVL__EPI_NONE);
                for (int i = 0; i < ROWS * N; i++) {
                    double want = sign * 3.0 * (i / N % 2 ? -1 : 1) * (K / QVL__GROUP) * (127 + (QVL__GROUP - 1) * ends[e]);
                    check_near("integers at their ends", d->isa, y[i], want, 0.004 * fabs(want)); /* bf16 scale: 2^-8 */
                }
            }
            x[3 * K + 40] = sign < 0 ? NAN : INFINITY;
            d->matmul(d, y, x, ROWS, &m, NULL, QVL__EPI_NONE);
            for (int i = 0; i < ROWS * N; i++) assert_int_equal(!isfinite(y[i]), i / N == 3);
            d->matrix_free(d, &m);
            w[5 * K + 2] = NAN;
            m = new_matrix(d, matrix_types[t], N, K, false, w);
            d->matmul(d, y, x, 1, &m, NULL, QVL__EPI_NONE);
            for (int i = 0; i < N; i++) assert_int_equal(isnan(y[i]), i == 5);
            d->matrix_free(d, &m);
        }
}
static void test_matmul_ends(void **state) {
    (void)state;
    each_level(2, false, matmul_ends_body);
}


#include "weights_cases.h"

static void run_matmul(qvl__device *d, float *y, const float *y0, const float *x, int rows, const qvl__matrix *m,
    const float *bias, qvl__epilogue e, int step) {
    size_t n_out = (size_t)(m->role.gate_up ? m->n / 2 : m->n);
    memcpy(y, y0, (size_t)rows * n_out * sizeof(float));
    for (int r = 0; r < rows; r += step)
        d->matmul(d, y + (size_t)r * n_out, x + (size_t)r * (size_t)m->k, rows - r < step ? rows - r : step, m, bias, e);
}

static void matmul_bits_body(qvl__device *d) {
    static const int shapes[][3] = {{33, 70, 300}, {200, 37, 531}, {8, 300, 1031}};
    qvl__pool *pool1, *pool3;
    qvl__device *d1 = reopen(d, 1, &pool1), *d3 = reopen(d, 3, &pool3);
    for (int t = 0; t < N_MATRIX_TYPES; t++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (int i = 0; i < 5; i++) {
                qvl__epilogue e = epilogues[i];
                int rows = shapes[s][0], n_out = shapes[s][1], k = shapes[s][2], n = e == QVL__EPI_SWIGLU ? 2 * n_out : n_out;
                size_t size = (size_t)rows * n_out;
                float *w = random_floats((size_t)n * k, 1.0f), *x = random_floats((size_t)rows * k, 1.0f),
                    *bias = random_floats((size_t)n, 1.0f);
                float *y0 = random_floats(size, 1.0f), *y = floats(size), *z = floats(size);
                qvl__matrix m = new_matrix(d, matrix_types[t], n, k, e == QVL__EPI_SWIGLU, w);
                if (e == QVL__EPI_ADD && d->host_memory) m.role.head_dim = 8; /* beside attention, see above */
                run_matmul(d, y, y0, x, rows, &m, bias, e, rows);
                static const int steps[] = {1, 2, 3, 5, 6, 7, 20, 100};
                for (size_t j = 0; j < sizeof steps / sizeof *steps; j++) {
                    run_matmul(d, z, y0, x, rows, &m, bias, e, steps[j]);
                    check_bits("matmul in pieces", d->isa, y, z, size);
                }
                run_matmul(d1, z, y0, x, rows, &m, bias, e, rows);
                check_bits("matmul on 1 thread", d->isa, y, z, size);
                run_matmul(d3, z, y0, x, rows, &m, bias, e, rows);
                check_bits("matmul on 3 threads", d->isa, y, z, size);
                run_matmul(d3, z, y0, x, rows, &m, bias, e, 4);
                check_bits("matmul in pieces on 3 threads", d->isa, y, z, size);
                d->matrix_free(d, &m);
                free(z), free(y), free(y0), free(bias), free(x), free(w);
            }
    d1->close(d1), d3->close(d3);
    qvl__pool_free(pool1), qvl__pool_free(pool3);
}
static void test_matmul_bits(void **state) {
    (void)state;
    each_level(2, false, matmul_bits_body);
}
static void test_matmul_bits_bf16_math(void **state) {
    (void)state;
    each_level(2, true, matmul_bits_body);
}

/* The activation functions alone, over their whole range, through a 1 by 1 matrix. */
static void activation_body(qvl__device *d) {
    const float one = 1.0f, two[2] = {1.0f, 1.0f};
    const int rows = 4001;
    float *x = floats((size_t)rows), *y = floats((size_t)rows);
    for (int i = 0; i < rows; i++) x[i] = (float)(i - 2000) / 100.0f; /* -20 .. 20 */
    qvl__matrix m = new_matrix(d, QVL__F32, 1, 1, false, &one), g = new_matrix(d, QVL__F32, 2, 1, true, two);
    for (int e = 2; e < 5; e++) {
        d->matmul(d, y, x, rows, e == 4 ? &g : &m, NULL, epilogues[e]);
        for (int i = 0; i < rows; i++) {
            double want = reference_finish(epilogues[e], x[i], 0, x[i]);
            /* 1e-6 relative, and where the result is x times e^a, three roundings of a: at a = -20 those are 4e-6 */
            double a = e == 2 ? 1.6 * (x[i] + 0.044715 * pow(x[i], 3)) : e == 3 ? -0.5 * x[i] * x[i] : x[i];
            double bound = (1e-6 + (x[i] < 0 ? 3 * U * fabs(a) : 0)) * fabs(want) + 1e-30;
            check_near(e == 2 ? "gelu_tanh" : e == 3 ? "gelu_erf" : "swiglu", d->isa, y[i], want, bound);
        }
    }
    const float odd[] = {NAN, 200.0f, -200.0f, 1e30f};
    d->matmul(d, y, odd, 4, &m, NULL, QVL__EPI_GELU_ERF);
    assert_true(isnan(y[0]) && y[1] == 200.0f && y[2] == 0.0f && y[3] == 1e30f);
    d->matmul(d, y, odd, 4, &m, NULL, QVL__EPI_GELU_TANH);
    assert_true(isnan(y[0]) && y[1] == 200.0f && fabsf(y[2]) < 1e-30f && y[3] == 1e30f);
    d->matrix_free(d, &m);
    d->matrix_free(d, &g);
    free(y);
    free(x);
}
static void test_activations(void **state) {
    (void)state;
    each_level(2, false, activation_body);
}

/* ---- norms and row ops ---- */

static void norm_body(qvl__device *d) {
    static const int dims[] = {1, 7, 16, 33, 64, 72, 100, 1000, 2048};
    const int rows = 37;
    qvl__pool *pool3;
    qvl__device *d3 = reopen(d, 3, &pool3);
    for (size_t s = 0; s < sizeof dims / sizeof *dims; s++) {
        int n = dims[s];
        size_t size = (size_t)rows * n;
        float *x = random_floats(size, 4.0f), *w = random_floats((size_t)n, 1.0f), *b = random_floats((size_t)n, 1.0f),
            *y = floats(size), *z = floats(size);
        for (size_t i = 0; i < size; i++) x[i] += 1.0f;
        for (int kind = 0; kind < 2; kind++) {
            if (kind) d->layer_norm(d, y, x, w, b, rows, n, 1e-6f);
            else d->rms_norm(d, y, x, w, rows, n, 1e-6f);
            for (int r = 0; r < rows; r++) {
                double mean = 0, square = 0, mag = 0;
                for (int i = 0; i < n && kind; i++) mean += x[(size_t)r * n + i] / (double)n;
                for (int i = 0; i < n; i++) {
                    double v = x[(size_t)r * n + i] - mean;
                    square += v * v / n;
                    mag = fmax(mag, fabs(x[(size_t)r * n + i]));
                }
                double inv = 1 / sqrt(square + 1e-6);
                for (int i = 0; i < n; i++) {
                    double want = (x[(size_t)r * n + i] - mean) * inv * w[i] + (kind ? b[i] : 0);
                    /* 32 u: a tree of lanes keeps the sum's relative error far below n u. The mean's error is n/64 u of
                     * the largest x and inv turns it into output. */
                    double bound = 32 * U * (fabs(want) + fabs(b[i])) + (kind ? (n / 64.0 + 8) * U * mag * inv * fabs(w[i]) : 0) + 1e-30;
                    check_near(kind ? "layer_norm" : "rms_norm", d->isa, y[(size_t)r * n + i], want, bound);
                }
            }
            for (int r = 0; r < rows; r++) {
                if (kind) d3->layer_norm(d3, z + (size_t)r * n, x + (size_t)r * n, w, b, 1, n, 1e-6f);
                else d3->rms_norm(d3, z + (size_t)r * n, x + (size_t)r * n, w, 1, n, 1e-6f);
            }
            check_bits("norm row by row", d->isa, y, z, size);
            if (kind) d3->layer_norm(d3, z, x, w, b, rows, n, 1e-6f);
            else d3->rms_norm(d3, z, x, w, rows, n, 1e-6f);
            check_bits("norm on 3 threads", d->isa, y, z, size);
        }
        free(z), free(y), free(b), free(w), free(x);
    }
    d3->close(d3);
    qvl__pool_free(pool3);
}
static void test_norms(void **state) {
    (void)state;
    each_level(2, false, norm_body);
}

static void row_ops_body(qvl__device *d) {
    const int rows = 150, dim = 333, places = 60;
    size_t size = (size_t)rows * dim;
    float *x = random_floats(size, 1.0f), *table = random_floats((size_t)places * dim, 1.0f), *y = floats(size),
        *want = floats(size);
    int32_t idx[600];
    float weight[600];
    for (int i = 0; i < 600; i++) idx[i] = random_below(places), weight[i] = random_float();

    d->gather_rows(d, y, table, idx, rows, dim);
    for (int r = 0; r < rows; r++) check_bits("gather_rows", d->isa, y + (size_t)r * dim, table + (size_t)idx[r] * dim,
        (size_t)dim);

    /* Places repeat on purpose: the last row wins, or all are added in order. */
    for (int add = 0; add < 2; add++) {
        memcpy(y, table, (size_t)places * dim * sizeof(float));
        memcpy(want, table, (size_t)places * dim * sizeof(float));
        d->scatter_rows(d, y, x, idx, rows, dim, add);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < dim; i++) {
                float *to = &want[(size_t)idx[r] * dim + i];
                *to = add ? *to + x[(size_t)r * dim + i] : x[(size_t)r * dim + i];
            }
        check_bits("scatter_rows", d->isa, y, want, (size_t)places * dim);
    }

    memcpy(y, x, size * sizeof(float));
    d->add_interpolated(d, y, table, idx, weight, rows, dim);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < dim; i++) {
            double v = x[(size_t)r * dim + i], mag = fabs(v);
            for (int c = 0; c < 4; c++) {
                double p = (double)weight[4 * r + c] * table[(size_t)idx[4 * r + c] * dim + i];
                v += p;
                mag += fabs(p);
            }
            check_near("add_interpolated", d->isa, y[(size_t)r * dim + i], v, 8 * U * mag);
        }
    for (int r = 0; r < rows; r++) {
        memcpy(want, x + (size_t)r * dim, (size_t)dim * sizeof(float));
        d->add_interpolated(d, want, table, idx + 4 * r, weight + 4 * r, 1, dim);
        check_bits("add_interpolated alone", d->isa, y + (size_t)r * dim, want, (size_t)dim);
    }

    char *p = d->alloc(d, 1000);
    assert_non_null(p);
    char fresh[1000], host[10] = "123456789", back[10];
    d->get(d, fresh, p, 1000);
    for (int i = 0; i < 1000; i++) assert_int_equal(fresh[i], 0);
    d->put(d, p + 5, host, 10);
    d->get(d, back, p + 5, 10);
    assert_string_equal(back, host);
    d->free(d, p, 1000);
    free(want), free(y), free(table), free(x);
}
static void test_row_ops(void **state) {
    (void)state;
    each_level(2, false, row_ops_body);
}

/* ---- mixture of experts ---- */

/* What one row gets, out of the plain ops, expert by expert; also checks the route against its definition. */
static void moe_row(qvl__device *d, float *x, const float *norm, const float *logits, const qvl__experts *e, int top_k) {
    int hidden = e->gate_up[0].k, inter = e->down[0].k;
    float *act = floats((size_t)inter), *y = floats((size_t)hidden), sum = 0, weight[16];
    int best[16];
    for (int k = 0; k < top_k; k++) {
        best[k] = -1;
        for (int i = 0; i < e->n; i++) {
            bool used = false;
            for (int j = 0; j < k; j++) used |= best[j] == i;
            if (!used && (best[k] < 0 || logits[i] > logits[best[k]])) best[k] = i;
        }
        sum += weight[k] = expf(logits[best[k]] - logits[best[0]]);
    }
    for (int i = 0; i < e->n; i++)
        for (int k = 0; k < top_k; k++) {
            if (best[k] != i) continue;
            d->matmul(d, act, norm, 1, &e->gate_up[i], NULL, QVL__EPI_SWIGLU);
            d->matmul(d, y, act, 1, &e->down[i], NULL, QVL__EPI_NONE);
            for (int c = 0; c < hidden; c++) {
                float part = weight[k] / sum * y[c];
                x[c] += part;
            }
        }
    free(act), free(y);
}

/* The first `checked` rows are held against the plain ops. */
static void moe_case(qvl__device *d, qvl__type type, int rows, int n, int top, int hidden, int inter, int checked) {
    qvl__matrix gate_up[9], down[9];
    for (int k = 0; k < n; k++) {
        float *a = random_floats((size_t)(2 * inter * hidden), 0.3f), *b = random_floats((size_t)(hidden * inter), 0.3f);
        gate_up[k] = new_matrix(d, type, 2 * inter, hidden, true, a);
        down[k] = new_matrix(d, type, hidden, inter, false, b);
        free(a), free(b);
    }
    qvl__experts e = {n, gate_up, down, NULL};
    assert_int_equal(d->experts_link(d, &e), 0);
    float *x = random_floats((size_t)(rows * hidden), 1), *norm = random_floats((size_t)(rows * hidden), 1), *logits = floats((size_t)(rows * n));
    for (int k = 0; k < rows * n; k++) logits[k] = (float)(random_below(40) - 20) * 0.25f - (k % n == 1 ? 100 : 0); /* with equals; one that few want */
    float *want = copy_floats(x, (size_t)(rows * hidden));
    for (int r = 0; r < checked; r++) moe_row(d, want + r * hidden, norm + r * hidden, logits + r * n, &e, top);
    size_t bytes = d->moe_work(d, rows, hidden, inter, n, top);
    void *work = must(malloc(bytes + 64));
    memset(work, 0xFF, bytes);
    d->moe(d, x, norm, logits, rows, &e, top, (void *)(((uintptr_t)work + 63) / 64 * 64));
    check_bits("moe", d->isa, want, x, (size_t)(checked * hidden));
    for (int i = 0; i < rows * hidden; i++) assert_true(isfinite(x[i]));
    d->experts_unlink(d, &e);
    for (int k = 0; k < n; k++) d->matrix_free(d, &gate_up[k]), d->matrix_free(d, &down[k]);
    free(work), free(want), free(logits), free(norm), free(x);
}
static void moe_body(qvl__device *d) {
    static const struct {
        int rows, experts, top, hidden, inter;
    } cases[] = {{1, 6, 2, 70, 33}, {7, 9, 3, 96, 64}, {150, 5, 2, 131, 47}, {300, 3, 3, 64, 96}};
    for (int t = 0; t < N_MATRIX_TYPES; t++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) moe_case(d, matrix_types[t], cases[i].rows, cases[i].experts, cases[i].top, cases[i].hidden, cases[i].inter, cases[i].rows);
}
static void test_moe(void **state) {
    (void)state;
    each_level(2, false, moe_body);
    if (apart == 0) each_level(2, true, moe_body);
}

#include "attention_cases.h"

/* ---- refusals ---- */

static void refuse_body(qvl__device *d) {
    qvl__matrix m;
    qvl__kv kv;
    assert_int_equal(d->matrix_new(d, &m, QVL__F32, 0, 5, (qvl__role){0}), QVL_EINVAL);
    assert_int_equal(d->matrix_new(d, &m, QVL__F32, 3, 5, (qvl__role){.gate_up = true}), QVL_EINVAL);
    assert_null(m.data);
    assert_int_equal(d->kv_new(d, &kv, QVL__F32, 1, 1, 63, 1), QVL_EUNSUPPORTED);
    assert_int_equal(d->kv_new(d, &kv, QVL__F32, 1, 1, 514, 1), QVL_EUNSUPPORTED);
    assert_int_equal(d->kv_new(d, &kv, QVL__F32, 0, 1, 64, 1), QVL_EINVAL);
    assert_int_equal(d->kv_new(d, &kv, QVL__F32, INT32_MAX, INT32_MAX, 256, INT32_MAX), QVL_ENOMEM);
    assert_null(kv.data);
    d->matrix_free(d, &m); /* freeing what never was is allowed */
    d->kv_free(d, &kv);
}
static void test_refusals(void **state) {
    (void)state;
    each_level(1, false, refuse_body);
}

#define OPS_TESTS                                                                                       \
    cmocka_unit_test(test_quantise), cmocka_unit_test(test_matmul_ends), cmocka_unit_test(test_pack_embed), cmocka_unit_test(test_matmul), cmocka_unit_test(test_matmul_bf16_math), \
        cmocka_unit_test(test_matmul_bits), cmocka_unit_test(test_matmul_bits_bf16_math),               \
        cmocka_unit_test(test_activations), cmocka_unit_test(test_norms), cmocka_unit_test(test_row_ops), \
        cmocka_unit_test(test_moe), cmocka_unit_test(test_attention_paged), cmocka_unit_test(test_attention_shapes), \
        cmocka_unit_test(test_stray_value), cmocka_unit_test(test_decode_batch), cmocka_unit_test(test_vision), cmocka_unit_test(test_refusals)

#endif
