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

static void matmul_case(qvl__device *d, qvl__type type, qvl__epilogue e, int rows, int n, int k, bool with_bias) {
    bool gate_up = e == QVL__EPI_SWIGLU;
    if (gate_up) n *= 2;
    int n_out = gate_up ? n / 2 : n;
    float *w = random_floats((size_t)n * k, 1.0f), *x = random_floats((size_t)rows * k, 2.0f),
        *bias = random_floats((size_t)n, 1.0f);
    float *y = random_floats((size_t)rows * n_out, 1.0f), *before = copy_floats(y, (size_t)rows * n_out);
    if (e != QVL__EPI_ADD) fill_nan(y, (size_t)rows * n_out);
    y[(size_t)rows * n_out] = 12345.0f; /* the guard */
    qvl__matrix m = new_matrix(d, type, n, k, gate_up, w);
    d->matmul(d, y, x, rows, &m, with_bias ? bias : NULL, e);
    assert_true(y[(size_t)rows * n_out] == 12345.0f);
    /* Integer matrices: the CPU rounds activations to integers, a GPU to bf16 like all others but F32. */
    bool dot = d->bf16_math && (type == QVL__BF16 || (!d->host_memory && qvl__type_scaled(type)));
    /* F16 matrices: to f16, but not at all in deterministic mode. Either is allowed. */
    double inputs = d->bf16_math && !d->host_memory && type == QVL__F16 ? 0x1p-11 : 0;
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
            for (int e = 0; e < 5; e++) matmul_case(d, matrix_types[t], epilogues[e], shapes[s][0], shapes[s][1], shapes[s][2],
                s % 2 == 0);
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

/* ---- attention over the paged cache ---- */

#define SEQS 4

typedef struct {
    int heads, kv_heads, n, rows, stride, blocks;
    int32_t *seq, *pos, *table;
    float *qkv0; /* before norm and rope */
    float *cos, *sin, *q_norm, *k_norm;
} text_case;

/* Sequences of the given lengths with scattered block tables, rows in order. */
static text_case new_text(int heads, int kv_heads, int n, const int *lengths) {
    text_case t = {.heads = heads, .kv_heads = kv_heads, .n = n};
    for (int s = 0; s < SEQS; s++) {
        t.rows += lengths[s];
        if (lengths[s] / QVL__KV_BLOCK + 1 > t.stride) t.stride = lengths[s] / QVL__KV_BLOCK + 1;
    }
    t.blocks = SEQS * t.stride + 3;
    t.seq = must(malloc((size_t)t.rows * 4));
    t.pos = must(malloc((size_t)t.rows * 4));
    t.table = must(malloc((size_t)SEQS * (size_t)t.stride * 4));
    int32_t *order = must(malloc((size_t)t.blocks * 4));
    for (int i = 0; i < t.blocks; i++) order[i] = i;
    for (int i = t.blocks - 1; i > 0; i--) {
        int j = random_below(i + 1);
        int32_t o = order[i];
        order[i] = order[j], order[j] = o;
    }
    memcpy(t.table, order, (size_t)SEQS * (size_t)t.stride * 4);
    free(order);
    for (int s = 0, r = 0; s < SEQS; s++)
        for (int p = 0; p < lengths[s]; p++, r++) t.seq[r] = s, t.pos[r] = p;
    t.qkv0 = random_floats((size_t)t.rows * (size_t)(heads + 2 * kv_heads) * (size_t)n, 1.0f);
    t.cos = floats((size_t)t.rows * (size_t)n / 2);
    t.sin = floats((size_t)t.rows * (size_t)n / 2);
    for (int i = 0; i < t.rows * n / 2; i++) {
        float a = random_float() * 3.0f;
        t.cos[i] = cosf(a), t.sin[i] = sinf(a);
    }
    t.q_norm = random_floats((size_t)n, 2.0f);
    t.k_norm = random_floats((size_t)n, 2.0f);
    return t;
}
static void free_text(text_case *t) {
    free(t->seq), free(t->pos), free(t->table), free(t->qkv0), free(t->cos), free(t->sin), free(t->q_norm), free(t->k_norm);
}

/* Both ops over rows [r0, r1) of the case. */
static void run_text(qvl__device *d, const text_case *t, qvl__kv *kv, float *qkv, float *out, int r0, int r1) {
    qvl__ragged b = {.rows = r1 - r0, .seq = t->seq + r0, .pos = t->pos + r0, .table = t->table, .stride = t->stride};
    size_t ld = (size_t)(t->heads + 2 * t->kv_heads) * (size_t)t->n, half = (size_t)t->n / 2;
    memcpy(qkv + (size_t)r0 * ld, t->qkv0 + (size_t)r0 * ld, (size_t)(r1 - r0) * ld * sizeof(float));
    d->qk_norm_rope_kv(d, qkv + (size_t)r0 * ld, t->heads, t->q_norm, t->k_norm, 1e-6f, t->cos + (size_t)r0 * half,
        t->sin + (size_t)r0 * half, kv, 1, &b);
    d->attention_paged(d, out + (size_t)r0 * (size_t)(t->heads * t->n), qkv + (size_t)r0 * ld, t->heads, kv, 1, &b);
}

static void poison(qvl__device *d, qvl__kv *kv) { /* NaN, or NaN scales */
    size_t bytes = kv->block_bytes * (size_t)kv->blocks;
    void *nan = must(malloc(bytes));
    memset(nan, 0xff, bytes);
    d->put(d, kv->data, nan, bytes);
    free(nan);
}

/* A key or value as the cache keeps it: I8 in 127 steps to the largest, one scale for all n. */
static void cached(double *to, const float *x, int n, qvl__type type) {
    float max = 0;
    for (int i = 0; i < n; i++) max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
    for (int i = 0; i < n; i++) to[i] = type == QVL__I8 ? (double)nearbyintf(x[i] * (127.0f / max)) * (double)(max / 127.0f) : rounded(x[i], type);
}

/* What attention may be off by, for values in -1 .. 1 and scores of a few units. In float: their error, some n u, is the
 * relative error of each probability. On tensor cores queries, probabilities and what the cache holds are rounded to bf16,
 * a relative 2^-9 each: a score of a few units moves by up to about 2^-7, and so does each probability. */
static double attention_bound(const qvl__device *d, int n) { return d->bf16_math && !d->host_memory && n % 8 == 0 ? 1.5e-2 : 1e-5; }

static void reference_text(const qvl__device *d, const text_case *t, qvl__type type, const float *qkv, const float *out) {
    const char *isa = d->isa;
    int n = t->n, ld = (t->heads + 2 * t->kv_heads) * n;
    double *p = must(malloc((size_t)t->rows * sizeof(double)));
    double *kv = must(malloc((size_t)t->rows * 2 * (size_t)(t->kv_heads * n) * sizeof(double))), error = 0, size = 0;
    for (int i = 0; i < t->rows * 2 * t->kv_heads; i++)
        cached(kv + (size_t)i * n, qkv + (size_t)(i / (2 * t->kv_heads)) * ld + (t->heads + i % (2 * t->kv_heads)) * n, n, type);
    for (int r = 0; r < t->rows; r++) {
        /* norm and rope, from the inputs */
        for (int h = 0; h < t->heads + t->kv_heads; h++) {
            const float *x = t->qkv0 + (size_t)r * ld + h * n, *got = qkv + (size_t)r * ld + h * n, *norm = h < t->heads ? t->q_norm : t->k_norm;
            double square = 0, v[512];
            for (int i = 0; i < n; i++) square += (double)x[i] * x[i] / n;
            for (int i = 0; i < n; i++) v[i] = x[i] / sqrt(square + 1e-6) * norm[i];
            for (int i = 0; i < n; i++) {
                int a = i % (n / 2);
                double c = t->cos[(size_t)r * n / 2 + a], s = t->sin[(size_t)r * n / 2 + a];
                double want = i < n / 2 ? v[i] * c - v[i + n / 2] * s : v[i] * c + v[i - n / 2] * s;
                check_near("qk_norm_rope", isa, got[i], want, 32 * U * (fabs(v[a]) + fabs(v[a + n / 2])) + 1e-30);
            }
        }
        size_t values = (size_t)r * ld + (size_t)(t->heads + t->kv_heads) * n;
        check_bits("qk_norm_rope: values as they were", isa, t->qkv0 + values, qkv + values, (size_t)(t->kv_heads * n));
        for (int h = 0; h < t->heads; h++) {
            int g = h / (t->heads / t->kv_heads), len = t->pos[r] + 1;
            double max = -INFINITY, sum = 0;
            for (int i = 0; i < len; i++) {
                const double *key = kv + ((size_t)(r - len + 1 + i) * 2 * t->kv_heads + g) * n;
                p[i] = 0;
                for (int c = 0; c < n; c++) p[i] += (double)qkv[(size_t)r * ld + h * n + c] * key[c];
                p[i] /= sqrt(n);
                max = fmax(max, p[i]);
            }
            for (int i = 0; i < len; i++) sum += p[i] = exp(p[i] - max);
            for (int c = 0; c < n; c++) {
                double v = 0;
                for (int i = 0; i < len; i++) {
                    size_t token = (size_t)(r - len + 1 + i);
                    v += p[i] / sum * kv[(token * 2 * t->kv_heads + t->kv_heads + g) * n + c];
                    double whole = qkv[token * ld + (t->heads + t->kv_heads + g) * n + c];
                    error += pow(kv[(token * 2 * t->kv_heads + t->kv_heads + g) * n + c] - whole, 2), size += whole * whole;
                }
                check_near("attention_paged", isa, out[((size_t)r * t->heads + h) * n + c], v, attention_bound(d, n));
            }
        }
    }
    /* what the type costs: rms of what is lost of V, relative */
    static const double lost[] = {[QVL__F32] = 0, [QVL__BF16] = 2.5e-3, [QVL__F16] = 4e-4, [QVL__I8] = 8e-3, [QVL__F8] = 3.5e-2};
    if (sqrt(error / size) > lost[type]) fail_msg("%s: a cache of type %s loses %.2g of its values", isa, qvl__type_name(type), sqrt(error / size));
    free(kv);
    free(p);
}

typedef struct {
    int heads, kv_heads, n;
    int lengths[SEQS];
} paged_case;
static void paged_body(qvl__device *d, const paged_case *cases, size_t n_cases) {
    qvl__pool *pool1, *pool3;
    qvl__device *d1 = NULL, *d3 = NULL;
    if (d->host_memory) d1 = reopen(d, 1, &pool1), d3 = reopen(d, 3, &pool3); /* threads decide nothing on a GPU */
    for (size_t c = 0; c < n_cases; c++)
        for (int type = QVL__F32; type <= (d->fp8 ? QVL__F8 : QVL__I8); type++) {
            if (qvl__type_quantised((qvl__type)type)) continue;
            text_case t = new_text(cases[c].heads, cases[c].kv_heads, cases[c].n, cases[c].lengths);
            size_t q_size = (size_t)t.rows * (size_t)((t.heads + 2 * t.kv_heads) * t.n),
                o_size = (size_t)t.rows * (size_t)(t.heads * t.n);
            float *qkv = floats(q_size), *out = floats(o_size), *z = floats(o_size);
            qvl__kv kv;
            assert_int_equal(d->kv_new(d, &kv, (qvl__type)type, 2, t.kv_heads, t.n, t.blocks), 0);
            poison(d, &kv);
            run_text(d, &t, &kv, qkv, out, 0, t.rows);
            reference_text(d, &t, (qvl__type)type, qkv, out);

            static const int steps[] = {1, 7, 32, 50};
            for (size_t s = 0; s < sizeof steps / sizeof *steps; s++) { /* chunked prefill; 1 is decoding */
                poison(d, &kv);
                for (int r = 0; r < t.rows; r += steps[s]) run_text(d, &t, &kv, qkv, z, r,
                    r + steps[s] < t.rows ? r + steps[s] : t.rows);
                check_bits("attention in chunks", d->isa, out, z, o_size);
            }
            for (int k = 0; k < 2 && d1; k++) {
                poison(d, &kv);
                run_text(k ? d3 : d1, &t, &kv, qkv, z, 0, t.rows);
                check_bits(k ? "attention on 3 threads" : "attention on 1 thread", d->isa, out, z, o_size);
            }
            /* each row alone against a full cache: later keys are there, and must not matter */
            fill_nan(z, o_size);
            for (int r = t.rows - 1; r >= 0; r--) {
                qvl__ragged b = {.rows = 1, .seq = t.seq + r, .pos = t.pos + r, .table = t.table, .stride = t.stride};
                d->attention_paged(d, z + (size_t)r * (size_t)(t.heads * t.n),
                    qkv + (size_t)r * (size_t)((t.heads + 2 * t.kv_heads) * t.n), t.heads, &kv, 1, &b);
            }
            check_bits("attention of a row alone", d->isa, out, z, o_size);
            /* all blocks moved elsewhere by copies */
            qvl__kv moved;
            assert_int_equal(d->kv_new(d, &moved, (qvl__type)type, 2, t.kv_heads, t.n, 2 * t.blocks), 0);
            poison(d, &moved);
            size_t bytes = kv.block_bytes * (size_t)kv.blocks;
            void *through = must(malloc(bytes));
            d->get(d, through, kv.data, bytes);
            d->put(d, (char *)moved.data + bytes, through, bytes);
            for (int i = 0; i < t.blocks; i++) d->kv_copy(d, &moved, t.blocks + (i + 1) % t.blocks, i);
            int32_t *table = must(malloc((size_t)SEQS * (size_t)t.stride * 4));
            for (int i = 0; i < SEQS * t.stride; i++) table[i] = (t.table[i] + t.blocks - 1) % t.blocks;
            memset(through, 0xff, bytes);
            d->put(d, (char *)moved.data + bytes, through, bytes);
            free(through);
            qvl__ragged b = {.rows = t.rows, .seq = t.seq, .pos = t.pos, .table = table, .stride = t.stride};
            d->attention_paged(d, z, qkv, t.heads, &moved, 1, &b);
            check_bits("attention over copied blocks", d->isa, out, z, o_size);
            free(table);
            d->kv_free(d, &moved);
            d->kv_free(d, &kv);
            free(z), free(out), free(qkv);
            free_text(&t);
        }
    if (!d1) return;
    d1->close(d1), d3->close(d3);
    qvl__pool_free(pool1), qvl__pool_free(pool3);
}
/* In two tests: what a kernel does wrong shows in the first, nearly always. */
static void paged_some(qvl__device *d) {
    static const paged_case cases[] = {{4, 2, 128, {40, 1, 32, 31}}, {3, 3, 72, {20, 64, 3, 45}}, {70, 1, 8, {35, 1, 2, 3}}};
    paged_body(d, cases, sizeof cases / sizeof *cases);
}
static void paged_others(qvl__device *d) {
    static const paged_case cases[] = {{2, 2, 64, {1, 33, 70, 5}}, {8, 2, 64, {100, 2, 65, 64}}, {8, 1, 128, {7, 97, 1, 33}}, {2, 1, 18, {33, 31, 34, 1}}};
    paged_body(d, cases, sizeof cases / sizeof *cases);
}
/* Once more where a CPU has bf16 products: with tile registers it attends on them. */
static void (*dot_body)(qvl__device *d);
static void run_dot_body(qvl__device *d) {
    if (d->host_memory && d->bf16_math) dot_body(d);
}
static void each_dot_level(int threads, void (*body)(qvl__device *d)) {
    dot_body = body;
    each_level(threads, true, run_dot_body);
}
static void test_attention_paged(void **state) {
    (void)state;
    each_level(2, false, paged_some);
    each_dot_level(2, paged_some);
}
static void test_attention_shapes(void **state) {
    (void)state;
    each_level(2, false, paged_others);
    each_dot_level(2, paged_others);
}

/* A value that is not a number reaches the tokens that see it, and no other that is computed beside them. */
static void stray_body(qvl__device *d) {
    const int lengths[SEQS] = {70, 33, 64, 1}, heads = 4, kv_heads = 2, n = 64, stray = 41; /* a row of the first sequence */
    text_case t = new_text(heads, kv_heads, n, lengths);
    size_t ld = (size_t)(heads + 2 * kv_heads) * (size_t)n, width = (size_t)(heads * n);
    float *qkv = floats((size_t)t.rows * ld), *out = floats((size_t)t.rows * width), *z = floats((size_t)t.rows * width);
    qvl__kv kv;
    assert_int_equal(d->kv_new(d, &kv, QVL__BF16, 2, kv_heads, n, t.blocks), 0);
    run_text(d, &t, &kv, qkv, out, 0, t.rows);
    for (int i = 0; i < 2 * n; i += 5) t.qkv0[(size_t)stray * ld + (size_t)((heads + kv_heads) * n + i)] = i % 2 ? NAN : INFINITY;
    run_text(d, &t, &kv, qkv, z, 0, t.rows);
    check_bits("rows before a stray value", d->isa, out, z, (size_t)stray * width);
    check_bits("rows of other sequences", d->isa, out + 70 * width, z + 70 * width, (size_t)(t.rows - 70) * width);
    for (int r = stray; r < 70; r++)
        for (int i = 0; i < 2 * n; i += 5) /* the first head of the two that share it */
            assert_false(isfinite(z[(size_t)r * width + (size_t)(i / n * 2 * n + i % n)]));
    d->kv_free(d, &kv);
    free(z), free(out), free(qkv);
    free_text(&t);
}
static void test_stray_value(void **state) {
    (void)state;
    each_level(2, false, stray_body);
    each_dot_level(2, stray_body);
}

/* Decoding rows of all sequences in one batch give what each gives alone; and scores that grow and shrink by large
 * steps go through every way of rescaling. */
static void decode_body(qvl__device *d) {
    const int lengths[SEQS] = {70, 33, 64, 1}, heads = 4, kv_heads = 2, n = 64;
    text_case t = new_text(heads, kv_heads, n, lengths);
    size_t ld = (size_t)(heads + 2 * kv_heads) * (size_t)n;
    for (int r = 0; r < t.rows; r++)
        for (int i = 0; i < n; i++) t.k_norm[i] = 1.0f;
    for (int i = 0; i < n; i++) t.q_norm[i] = 30.0f;
    float *qkv = floats((size_t)t.rows * ld), *out = floats((size_t)t.rows * (size_t)(heads * n));
    qvl__kv kv;
    assert_int_equal(d->kv_new(d, &kv, QVL__BF16, 2, kv_heads, n, t.blocks), 0);
    poison(d, &kv);
    run_text(d, &t, &kv, qkv, out, 0, t.rows);
    int32_t seq[SEQS], pos[SEQS];
    float *q = floats(SEQS * ld), *z = floats(SEQS * (size_t)(heads * n));
    for (int s = 0, end = 0; s < SEQS; s++) {
        end += lengths[s];
        seq[s] = s, pos[s] = lengths[s] - 1;
        memcpy(q + (size_t)s * ld, qkv + (size_t)(end - 1) * ld, ld * sizeof(float));
    }
    qvl__ragged b = {.rows = SEQS, .seq = seq, .pos = pos, .table = t.table, .stride = t.stride};
    d->attention_paged(d, z, q, heads, &kv, 1, &b);
    for (int s = 0, end = 0; s < SEQS; s++) {
        end += lengths[s];
        check_bits("decode batch", d->isa, z + (size_t)s * (size_t)(heads * n),
            out + (size_t)(end - 1) * (size_t)(heads * n), (size_t)(heads * n));
        for (int i = 0; i < heads * n; i++) assert_true(isfinite(z[(size_t)s * (size_t)(heads * n) + (size_t)i]));
    }
    d->kv_free(d, &kv);
    free(z), free(q), free(out), free(qkv);
    free_text(&t);
}
static void test_decode_batch(void **state) {
    (void)state;
    each_level(3, false, decode_body);
    each_dot_level(3, decode_body);
}

/* ---- vision ---- */

/* All spans of qkv, `most` heads and `step` query rows at a time; scratch is poisoned before each packing. */
static void attend_spans(qvl__device *d, float *qkv, int rows, int span, int heads, int n, void *scratch, int most, int step) {
    for (int r = 0; r < rows; r += span)
        for (int h = 0; h < heads; h += most) {
            int some = heads - h < most ? heads - h : most;
            float *at = qkv + (size_t)r * 3 * heads * n;
            memset(scratch, 0xff, d->attention_full_scratch(d, span, n, some));
            d->attention_pack(d, scratch, at, span, heads, n, h, some);
            for (int q = 0; q < span; q += step) d->attention_full(d, at, span, heads, n, h, some, q, span - q < step ? span - q : step, scratch);
        }
}

static void vision_body(qvl__device *d) {
    static const int cases[][4] = {/* spans, span, heads, head_dim */
        {1, 1, 2, 64}, {2, 16, 3, 72}, {1, 33, 2, 80}, {3, 64, 2, 32}, {1, 130, 5, 72}, {2, 100, 1, 64}, {1, 300, 2, 10}};
    qvl__pool *pool1, *pool3;
    qvl__device *d1 = reopen(d, 1, &pool1), *d3 = reopen(d, 3, &pool3);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        int span = cases[c][1], rows = cases[c][0] * span, heads = cases[c][2], n = cases[c][3], ld = 3 * heads * n;
        float *x = random_floats((size_t)rows * ld, 2.0f), *qkv = copy_floats(x, (size_t)rows * ld);
        float *cs = random_floats((size_t)span * n / 2, 1.0f), *sn = random_floats((size_t)span * n / 2, 1.0f);
        d->rope_vision(d, qkv, rows, heads, n, cs, sn, span);
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 3 * heads; h++)
                for (int i = 0; i < n; i++) {
                    const float *v = x + (size_t)r * ld + h * n;
                    size_t a = (size_t)(r % span) * n / 2 + i % (n / 2);
                    double other = i < n / 2 ? -v[i + n / 2] : v[i - n / 2];
                    double want = h < 2 * heads ? v[i] * (double)cs[a] + other * sn[a] : v[i];
                    check_near("rope_vision", d->isa, qkv[(size_t)r * ld + h * n + i], want,
                        h < 2 * heads ? 4 * U * (fabs(v[i]) + fabs(other)) : 0);
                }
        size_t size = (size_t)rows * ld;
        float *done = copy_floats(qkv, size), *z = copy_floats(qkv, size);
        void *scratch = must(malloc(d->attention_full_scratch(d, span, n, heads)));
        attend_spans(d, done, rows, span, heads, n, scratch, heads, span);
        double *p = must(malloc((size_t)span * sizeof(double)));
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < heads; h++) {
                const float *base = qkv + (size_t)(r / span * span) * ld + h * n, *q = qkv + (size_t)r * ld + h * n;
                double max = -INFINITY, sum = 0;
                for (int i = 0; i < span; i++) {
                    p[i] = 0;
                    for (int k = 0; k < n; k++) p[i] += (double)q[k] * base[(size_t)i * ld + heads * n + k];
                    p[i] /= sqrt(n);
                    max = fmax(max, p[i]);
                }
                for (int i = 0; i < span; i++) sum += p[i] = exp(p[i] - max);
                for (int k = 0; k < n; k++) {
                    double v = 0;
                    for (int i = 0; i < span; i++) v += p[i] / sum * base[(size_t)i * ld + 2 * heads * n + k];
                    check_near("attention_full", d->isa, done[(size_t)r * ld + h * n + k], v, 2 * attention_bound(d, n)); /* values in -2 .. 2 */
                }
            }
        free(p);
        /* on 1 thread; on 3; one head and 7 rows at a time */
        attend_spans(d1, z, rows, span, heads, n, scratch, heads, span);
        check_bits("attention_full on 1 thread", d->isa, done, z, size);
        memcpy(z, qkv, size * sizeof(float));
        attend_spans(d3, z, rows, span, heads, n, scratch, heads, span);
        check_bits("attention_full on 3 threads", d->isa, done, z, size);
        memcpy(z, qkv, size * sizeof(float));
        attend_spans(d, z, rows, span, heads, n, scratch, 1, 7);
        check_bits("attention_full in pieces", d->isa, done, z, size);
        free(scratch), free(sn), free(cs), free(z), free(done), free(qkv), free(x);
    }
    d1->close(d1), d3->close(d3);
    qvl__pool_free(pool1), qvl__pool_free(pool3);
}
static void test_vision(void **state) {
    (void)state;
    each_level(2, false, vision_body);
    each_dot_level(2, vision_body);
}

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
