/* attention_cases.h - attention: the part of ops_cases.h that checks the paged cache and attention over it, and vision's.
 *
 * Job:        both against a reference in double precision, and against themselves in chunks, alone, and over moved blocks.
 * Input:      included by ops_cases.h, in the middle.
 * Output:     test_attention_paged, test_attention_shapes, test_stray_value, test_decode_batch, test_vision.
 * Invariants: what memory holds beyond the keys of a sequence is NaN.
 */
#ifndef ATTENTION_CASES_H
#define ATTENTION_CASES_H

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
static void stray(qvl__device *d, qvl__type type) {
    const int lengths[SEQS] = {70, 33, 64, 1}, heads = 4, kv_heads = 2, n = 64, stray = 41, first = (heads + kv_heads) * n; /* a row of the first sequence */
    text_case t = new_text(heads, kv_heads, n, lengths);
    size_t ld = (size_t)(heads + 2 * kv_heads) * (size_t)n, width = (size_t)(heads * n);
    float *qkv = floats((size_t)t.rows * ld), *out = floats((size_t)t.rows * width), *z = floats((size_t)t.rows * width);
    qvl__kv kv;
    assert_int_equal(d->kv_new(d, &kv, type, 2, kv_heads, n, t.blocks), 0);
    t.qkv0[(size_t)(first + 1)] = 1e6f; /* of the first row, which f16 has to bring down */
    run_text(d, &t, &kv, qkv, out, 0, t.rows);
    for (size_t i = 0; i < (size_t)t.rows * width; i++) assert_true(isfinite(out[i]));
    if (type == QVL__F16) check_near("the largest f16", d->isa, out[1], 65504, 65504 * 4 * U);
    for (int i = 0; i < 2 * n; i += 5) t.qkv0[(size_t)stray * ld + (size_t)(first + i)] = i % 2 ? NAN : INFINITY;
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
static void stray_body(qvl__device *d) {
    stray(d, QVL__BF16);
    if (d->host_memory) stray(d, QVL__F16); /* a GPU's goes on to infinity */
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

#endif
