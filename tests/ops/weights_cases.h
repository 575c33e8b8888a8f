/* weights_cases.h - weights: the part of ops_cases.h that checks packing and the search for scales.
 *
 * Job:        what comes out of a packed matrix; the search of every level against one in plain C, bit by bit, and against rounding without a search.
 * Input:      included by ops_cases.h, in the middle.
 * Output:     test_pack_embed, test_quantise.
 * Invariants: the plain search is the definition: packed files depend on it.
 */
#ifndef WEIGHTS_CASES_H
#define WEIGHTS_CASES_H

/* ---- packing and embed ---- */

static void pack_body(qvl__device *d) {
    static const qvl__type types[] = {QVL__F32, QVL__BF16, QVL__F16};
    const int n = 53, k = 131;
    float *w = random_floats((size_t)n * k, 3.0f);
    /* Ties, subnormals, the ends of the range and signed zero. */
    static const float special[] = {0.0f, -0.0f, 1.00390625f, 1.01171875f, 65504.0f, 65519.0f, 6.1e-5f, 5.9e-8f, 2.98e-8f,
        1.00048828125f,
                                    1.00146484375f, -1e-7f, 1e-39f, 3.3e38f, 65535.0f};
    memcpy(w, special, sizeof special);
    for (int from = 0; from < 3; from++)
        for (int to = 0; to < 3; to++) {
            float *src = floats((size_t)n * k);
            for (int i = 0; i < n * k; i++) src[i] = rounded(w[i], types[from]);
            for (int i = 0; i < n * k; i++)
                if (!isfinite(src[i])) src[i] = 1.0f;
            char *bytes = encode(src, (size_t)n * k, types[from]);
            qvl__matrix m;
            assert_int_equal(d->matrix_new(d, &m, types[to], n, k, (qvl__role){0}), 0);
            for (int f = 0; f < n;) { /* in uneven pieces */
                int count = 1 + random_below(20);
                if (count > n - f) count = n - f;
                d->matrix_put(d, &m, f, count, types[from], bytes + (size_t)f * k * qvl__type_size(types[from]));
                f += count;
            }
            int32_t ids[53];
            for (int i = 0; i < n; i++) ids[i] = n - 1 - i;
            float *y = floats((size_t)n * k);
            d->embed(d, y, &m, ids, n);
            for (int r = 0; r < n; r++)
                for (int i = 0; i < k; i++) {
                    float want = rounded(src[(size_t)ids[r] * k + i], types[to]), got = y[(size_t)r * k + i];
                    if (memcmp(&want, &got, 4) != 0) fail_msg("%d to %d: %.9g became %.9g, not %.9g", from, to,
                        (double)src[(size_t)ids[r] * k + i], (double)got, (double)want);
                }
            d->matrix_free(d, &m);
            free(y);
            free(bytes);
            free(src);
        }
    free(w);
}
static void test_pack_embed(void **state) {
    (void)state;
    each_level(2, false, pack_body);
}

/* ---- weights to integers ---- */

/* The search for a group's scale, number by number: what every level has to give to the bit. */
static uint16_t search_scale(bool q8, uint8_t *out, const float *from) {
    float top = 0, best = 0, scale = 0, lo = q8 ? -127 : -8, hi = q8 ? 127 : 7, x[QVL__GROUP], q[QVL__GROUP];
    for (int i = 0; i < QVL__GROUP; i++)
        if (fabsf(from[i]) > fabsf(top)) top = from[i];
    int e = top == 0 || fabsf(top) < 0x1p-126f ? -126 : ilogbf(top);
    if (e < -126) e = -126;
    if (e > 126) e = 126;
    for (int i = 0; i < QVL__GROUP; i++) x[i] = ldexpf(from[i], -e);
    for (int c = 0; c <= (q8 ? 3 : 24); c++) { /* the last round: with the best scale */
        bool last = c == (q8 ? 3 : 24);
        float steps = q8 ? 127 - 0.5f * (float)c : (c % 2 ? 1.0f : -1.0f) * (8.75f - 0.25f * (float)(c / 2));
        float by = last ? scale : ldexpf(top, -e) / steps, inverse = by == 0 ? 0 : 1 / by, a[8] = {0}, qq = 0;
        for (int i = 0; i < QVL__GROUP; i++) {
            q[i] = rintf(fminf(fmaxf(x[i] * inverse, lo), hi));
            a[i % 8] += x[i] * q[i];
            qq += q[i] * q[i];
        }
        float xq = ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
        float s = rounded(xq / qq, QVL__BF16), error = s * (s * qq - 2 * xq);
        if (!last && error < best) best = error, scale = s;
    }
    for (int i = 0; i < QVL__GROUP; i++) out[i] = (uint8_t)(q[i] + (q8 ? 128 : 8));
    float s = rounded(ldexpf(scale, e), QVL__BF16);
    uint32_t u;
    memcpy(&u, &s, 4);
    return (uint16_t)(u >> 16);
}

/* One group of a panel's 16 columns: x[column][k], q likewise. */
static void quantise_group(const struct qvl__kern *kern, bool q8, uint8_t q[][QVL__GROUP], uint16_t *scales, float x[][QVL__GROUP]) {
    float turned[QVL__GROUP][QVL__PANEL];
    uint8_t bytes[QVL__GROUP * QVL__PANEL];
    for (int j = 0; j < QVL__PANEL; j++)
        for (int i = 0; i < QVL__GROUP; i++) turned[i][j] = x[j][i];
    kern->quantize_weights(q8 ? QVL__Q8 : QVL__Q4, bytes, scales, turned[0]);
    for (int j = 0; j < QVL__PANEL; j++)
        for (int i = 0; i < QVL__GROUP; i++) {
            int b = bytes[((q8 ? i : i % 16) / 4 * QVL__PANEL + j) * 4 + i % 4];
            q[j][i] = (uint8_t)(q8 ? b : i < 16 ? b & 15 : b >> 4);
        }
}

static float scale_of(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float s;
    memcpy(&s, &u, 4);
    return s;
}

static void quantise_body(qvl__device *d) {
    const struct qvl__kern *kern = qvl__cpu_kern(d);
    double searched[2] = {0, 0}, plain[2] = {0, 0};
    float x[QVL__PANEL][QVL__GROUP];
    uint8_t q[QVL__PANEL][QVL__GROUP], want[QVL__GROUP];
    uint16_t scales[QVL__PANEL];
    for (int group = 0; group < 200; group++) {
        for (int j = 0; j < QVL__PANEL; j++) {
            float size = ldexpf(0.02f, random_below(9) - 4);
            for (int i = 0; i < QVL__GROUP; i++) {
                x[j][i] = 0;
                for (int r = 0; r < 6; r++) x[j][i] += random_float() * size; /* nearly normal */
            }
        }
        for (int q8 = 0; q8 < 2; q8++) {
            quantise_group(kern, q8, q, scales, x);
            for (int j = 0; j < QVL__PANEL; j++) {
                if (search_scale(q8, want, x[j]) != scales[j] || memcmp(want, q[j], sizeof want) != 0)
                    fail_msg("%s: group %d, column %d: not the integers or the scale of the plain search", d->isa, group, j);
                float top = 0;
                for (int i = 0; i < QVL__GROUP; i++) top = fabsf(x[j][i]) > fabsf(top) ? x[j][i] : top;
                float s = scale_of(scales[j]), p = q8 ? fabsf(top) / 127 : top / -8, zero = q8 ? 128 : 8;
                for (int i = 0; i < QVL__GROUP; i++) {
                    assert_in_range(q[j][i], q8 ? 1 : 0, q8 ? 255 : 15);
                    double e = (double)x[j][i] - (double)s * (q[j][i] - zero), n = rint(x[j][i] / p);
                    if (!q8 && n > 7) n = 7;
                    searched[q8] += e * e / ((double)top * top);
                    plain[q8] += ((double)x[j][i] - n * p) * ((double)x[j][i] - n * p) / ((double)top * top);
                }
            }
        }
    }
    if (searched[0] > 0.9 * plain[0]) fail_msg("4 bits: squared error %g, %g without a search", searched[0], plain[0]);
    if (searched[1] > 1.02 * plain[1]) fail_msg("8 bits: squared error %g, %g with a float scale", searched[1], plain[1]);
    static const float odd[][2] = {{0, 0}, {1e-42f, 0}, {3e38f, -3e38f}, {1, 1}, {-1, 0}, {1e-30f, -1e-30f}, {NAN, 1}, {1, INFINITY}};
    enum { ODD = sizeof odd / sizeof *odd };
    for (int j = 0; j < QVL__PANEL; j++)
        for (int i = 0; i < QVL__GROUP; i++) x[j][i] = odd[j % ODD][i % 2];
    for (int q8 = 0; q8 < 2; q8++) {
        quantise_group(kern, q8, q, scales, x);
        for (int j = 0; j < QVL__PANEL; j++) {
            float s = scale_of(scales[j]);
            if (!isfinite(odd[j % ODD][0] + odd[j % ODD][1])) { /* what is not finite is not hidden, and harms no neighbour */
                assert_true(isnan(s));
                continue;
            }
            for (int i = 0; i < QVL__GROUP; i++)
                check_near("a group", q8 ? "8 bits" : "4 bits", (double)s * (q[j][i] - (q8 ? 128 : 8)), x[j][i], (q8 ? 0.005 : 0.07) * fabs(x[j][i]) + 1e-38);
        }
    }
}

static void test_quantise(void **state) {
    (void)state;
    each_level(1, false, quantise_body);
}

#endif
