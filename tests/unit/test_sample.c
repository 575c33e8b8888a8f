/* test_sample.c - the sampler against the goldens' kept sets and probabilities, the generator against its published
 * vectors, and the rules: ties, bias, bans, padding, log-probabilities, dependence on seed and position alone. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <math.h>
#include <time.h>

#include "../../libqvl/sample/sample.h"
#include "golden.h"

static qvl__sample_scratch scratch; /* for the largest vocabulary */

static const qvl__generation_config plain = {.temperature = 1, .top_p = 1, .repetition_penalty = 1};

/* A sampler with options "name=value", ended by NULL, over vocab. */
static void make(qvl__sampler *s, int vocab, const int32_t *prompt, size_t n, const char *const *pairs) {
    qvl_options *o;
    assert_int_equal(qvl_options_new(&o), 0);
    for (; *pairs; pairs += 2) assert_int_equal(qvl_options_set(o, pairs[0], pairs[1]), 0);
    assert_int_equal(qvl__sampler_init(s, &scratch, o, &plain, vocab, prompt, n), 0);
    qvl_options_free(o);
}
#define OPTIONS(...) ((const char *const[]){__VA_ARGS__, NULL})

/* ---- goldens ---- */

static int descending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

static void golden_cases(void **state) {
    (void)state;
    json_t *root = golden_json("tests/golden/sampling/cases.json"), *c, *v;
    int32_t *prompt, *answer;
    size_t n_prompt = golden_ids(root, "prompt_ids", &prompt), n_answer = golden_ids(root, "generated_ids", &answer), i;
    double worst = 0;
    json_array_foreach(json_object_get(root, "cases"), i, c) {
        const json_t *vector = json_object_get(json_object_get(root, "vectors"), json_string_value(json_object_get(c, "vector")));
        int vocab = (int)json_array_size(vector);
        float *logits = malloc((size_t)vocab * sizeof *logits);
        int32_t *ids = malloc((size_t)vocab * sizeof *ids);
        double *probs = malloc((size_t)vocab * sizeof *probs), *by_id = calloc((size_t)vocab, sizeof *by_id);
        for (int k = 0; k < vocab; k++) logits[k] = (float)json_number_value(json_array_get(vector, (size_t)k));
        qvl_options *o;
        assert_int_equal(qvl_options_new(&o), 0);
        const char *name;
        json_object_foreach(json_object_get(c, "params"), name, v) {
            int rc = json_is_integer(v) ? qvl_options_set_i64(o, name, json_integer_value(v))
                                        : qvl_options_set_f64(o, name, json_number_value(v));
            assert_int_equal(rc, 0);
        }
        qvl__sampler s;
        assert_int_equal(qvl__sampler_init(&s, &scratch, o, &plain, vocab, prompt, n_prompt), 0);
        qvl_options_free(o);
        for (size_t k = 0; k < n_answer; k++) qvl__sampler_accept(&s, answer[k]);
        int n = qvl__sample_distribution(&s, logits, vocab, ids, probs);
        qvl__sampler_free(&s);

        /* Ascending ids with a probability, as the golden has them. */
        double sum = 0;
        int positive = 0;
        for (int k = 0; k < n; k++) {
            assert_true(k == 0 || probs[k] <= probs[k - 1]);
            by_id[ids[k]] = probs[k];
            positive += probs[k] > 0;
            sum += probs[k];
        }
        assert_true(fabs(sum - 1) < 1e-12);
        assert_int_equal(positive, json_integer_value(json_object_get(c, "n_kept")));
        const json_t *kept = json_object_get(c, "kept"), *p = json_object_get(c, "p");
        size_t n_p = json_array_size(p);
        assert_true(n_p > 0 && n_p <= 64);
        double want[64], got[64];
        size_t have = 0;
        for (int k = 0; k < vocab && have < n_p; k++)
            if (by_id[k] > 0) got[have++] = by_id[k];
        for (size_t k = 0; k < n_p; k++) want[k] = json_number_value(json_array_get(p, k));
        if (json_is_true(json_object_get(c, "tie_at_cut"))) { /* which of the equals is kept is open, how many is not */
            if (n_p < 64) {
                qsort(got, n_p, sizeof *got, descending);
                qsort(want, n_p, sizeof *want, descending);
            } else have = 0;
        } else if (json_is_array(kept)) {
            for (size_t k = 0; k < json_array_size(kept); k++)
                assert_true(by_id[json_integer_value(json_array_get(kept, k))] > 0);
        } else {
            assert_string_equal(json_string_value(kept), "all");
            assert_int_equal(positive, vocab);
        }
        for (size_t k = 0; k < have; k++) {
            double off = fabs(got[k] - want[k]);
            if (off > worst) worst = off;
            if (off > 1e-9) fail_msg("case %zu: probability %zu is %.10f, not %.10f", i, k, got[k], want[k]);
        }
        free(logits);
        free(ids);
        free(probs);
        free(by_id);
    }
    assert_int_equal(i, 110);
    printf("  110 cases, largest difference of a probability %.1e\n", worst);
    free(prompt);
    free(answer);
    json_decref(root);
}

/* ---- random numbers ---- */

/* Random123's kat_vectors for philox4x32-10. */
static void philox_known_answers(void **state) {
    (void)state;
    static const uint32_t rows[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
    for (int i = 0; i < 3; i++) {
        uint32_t out[4];
        qvl__philox4x32(rows[i], rows[i] + 4, out);
        assert_memory_equal(out, rows[i] + 6, sizeof out);
    }
}

static int32_t draw(qvl__sampler *s, const float *logits, int vocab, uint64_t position) {
    float *copy = malloc((size_t)vocab * sizeof *copy);
    memcpy(copy, logits, (size_t)vocab * sizeof *copy);
    qvl__choice c;
    assert_int_equal(qvl__sample(s, copy, vocab, NULL, 0, position, &c), 0);
    free(copy);
    return c.token;
}

/* A draw depends on seed and position, not on what was drawn before; frequencies are the probabilities. */
static void draws_follow_the_distribution(void **state) {
    (void)state;
    enum { N = 6, DRAWS = 60000 };
    static const double want[N] = {0.4, 0.25, 0.2, 0.1, 0.05, 0};
    float logits[N];
    for (int i = 0; i < N; i++) logits[i] = want[i] > 0 ? (float)log(want[i]) : -INFINITY;
    qvl__sampler a, b, other;
    make(&a, N, NULL, 0, OPTIONS("seed", "7"));
    make(&b, N, NULL, 0, OPTIONS("seed", "7"));
    make(&other, N, NULL, 0, OPTIONS("seed", "8"));
    int counts[N] = {0}, differ = 0;
    static int32_t first[DRAWS];
    for (uint64_t i = 0; i < DRAWS; i++) {
        first[i] = draw(&a, logits, N, i);
        counts[first[i]]++;
        differ += draw(&other, logits, N, i) != first[i];
    }
    for (uint64_t i = DRAWS; i-- > 0;) assert_int_equal(draw(&b, logits, N, i), first[i]); /* backwards */
    for (int i = 0; i < N; i++) { /* five standard deviations */
        double sd = sqrt(DRAWS * want[i] * (1 - want[i]));
        assert_true(fabs(counts[i] - DRAWS * want[i]) <= 5 * sd);
    }
    assert_true(differ > DRAWS / 2);
    qvl__sampler_free(&a);
    qvl__sampler_free(&b);
    qvl__sampler_free(&other);

    /* Through the cut as well: top-k 2 of the same. */
    make(&a, N, NULL, 0, OPTIONS("seed", "-1", "top_k", "2", "top_p", "0.99"));
    int zeros = 0;
    for (uint64_t i = 0; i < 10000; i++) {
        int32_t t = draw(&a, logits, N, i);
        assert_in_range(t, 0, 1);
        zeros += t == 0;
    }
    assert_true(fabs(zeros - 10000 * 0.4 / 0.65) < 5 * sqrt(10000 * 0.24));
    qvl__sampler_free(&a);
}

/* ---- cuts, against the definition on a large vocabulary ---- */

typedef struct {
    float logit;
    int32_t id;
} pair;
static int by_logit(const void *a, const void *b) {
    const pair *x = a, *y = b;
    return x->logit != y->logit ? (x->logit < y->logit) - (x->logit > y->logit) : (x->id > y->id) - (x->id < y->id);
}

static void cuts_equal_a_full_sort(void **state) {
    (void)state;
    enum { N = 3000 };
    static float logits[N], copy[N];
    static pair sorted[N];
    static int32_t ids[N];
    static double probs[N];
    uint64_t seed = 6;
    for (int round = 0; round < 400; round++) {
        int spread = 1 + round % 20, steps = round % 3 ? 1 << 20 : 8; /* every third one full of ties */
        for (int i = 0; i < N; i++) {
            logits[i] = (float)((int)(golden_random(&seed) % (uint32_t)steps) - steps / 2) * (float)spread / (float)steps;
            if (round % 5 == 4 && golden_random(&seed) % 4 == 0) logits[i] = -INFINITY;
        }
        int k = (int)(golden_random(&seed) % 100), limit = N;
        double p = round % 4 == 0 ? 1 : (golden_random(&seed) % 1000) / 1000.0,
               m = round % 2 ? 0 : (golden_random(&seed) % 100) / 200.0;
        double t = 0.2 + (golden_random(&seed) % 100) / 50.0;
        char text[4][32];
        snprintf(text[0], 32, "%d", k);
        snprintf(text[1], 32, "%.3f", p);
        snprintf(text[2], 32, "%.17g", m);
        snprintf(text[3], 32, "%.17g", t);
        for (int i = 0; i < N; i++) sorted[i] = (pair){logits[i] / (float)t, i};
        qsort(sorted, N, sizeof *sorted, by_logit);
        qvl__sampler s;
        make(&s, N, NULL, 0, OPTIONS("top_k", text[0], "top_p", text[1], "min_p", text[2], "temperature", text[3]));
        memcpy(copy, logits, sizeof copy);
        int n = qvl__sample_distribution(&s, copy, limit, ids, probs);
        qvl__sampler_free(&s);

        int want = 0;
        while (want < N && sorted[want].logit > -INFINITY && exp((double)sorted[want].logit - sorted[0].logit) >= m) want++;
        if (k && k < want)
            while (want > k && sorted[want - 1].logit < sorted[k - 1].logit) want--;
        double total = 0, sum = 0;
        for (int i = 0; i < want; i++) total += exp((double)sorted[i].logit - sorted[0].logit);
        if (p < 1) {
            int cut = 0;
            while (cut < want && (cut == 0 || sum < p * total)) sum += exp((double)sorted[cut++].logit - sorted[0].logit);
            want = cut;
            total = sum;
        }
        assert_int_equal(n, want);
        for (int i = 0; i < n; i++) {
            assert_int_equal(ids[i], sorted[i].id);
            assert_true(fabs(probs[i] - exp((double)sorted[i].logit - sorted[0].logit) / total) < 1e-12);
        }
    }
}

/* ---- rules ---- */

static void greedy_rules(void **state) {
    (void)state;
    enum { N = 40 };
    float x[N];
    qvl__sampler s;
    qvl__choice c;
    make(&s, N, NULL, 0, OPTIONS("temperature", "0"));
    for (int i = 0; i < N; i++) x[i] = -3;
    x[17] = x[21] = x[39] = 2;
    assert_int_equal(qvl__sample(&s, x, N, NULL, 0, 0, &c), 0);
    assert_int_equal(c.token, 17); /* the lowest of the equals */
    assert_true(isnan(c.logprob));
    assert_int_equal(c.n_top, 0);
    assert_int_equal(qvl__sample(&s, x, N, (const int32_t[]){17, 21}, 2, 0, &c), 0);
    assert_int_equal(c.token, 39);
    x[17] = 2;
    assert_int_equal(qvl__sample(&s, x, 17, NULL, 0, 0, &c), 0); /* padding of the vocabulary is never chosen */
    assert_int_equal(c.token, 0);
    qvl__sampler_free(&s);

    /* Bias comes before penalties, and greedy obeys both: (1 + 4) / 2 < 3. */
    const int32_t prompt[] = {5, 5};
    make(&s, N, prompt, 2, OPTIONS("temperature", "0", "logit_bias", "{\"5\": 4, \"6\": -100}", "repetition_penalty", "2"));
    for (int i = 0; i < N; i++) x[i] = -3;
    x[5] = 1, x[6] = 50, x[7] = 3;
    assert_int_equal(qvl__sample(&s, x, N, NULL, 0, 0, &c), 0);
    assert_int_equal(c.token, 7);
    assert_true(x[5] == 2.5f && x[6] == -50 && x[7] == 3);
    qvl__sampler_free(&s);

    /* Presence and frequency count the answer, not the prompt. */
    make(&s, N, prompt, 2, OPTIONS("temperature", "0", "presence_penalty", "1", "frequency_penalty", "0.5"));
    for (int i = 0; i < N; i++) x[i] = -3;
    x[5] = 3, x[7] = 2.75f;
    assert_int_equal(qvl__sample(&s, x, N, NULL, 0, 0, &c), 0);
    assert_int_equal(c.token, 5);
    qvl__sampler_accept(&s, 5);
    qvl__sampler_accept(&s, 5);
    x[5] = 3;
    assert_int_equal(qvl__sample(&s, x, N, NULL, 0, 1, &c), 0);
    assert_int_equal(c.token, 7);
    assert_true(x[5] == 1);
    qvl__sampler_free(&s);
}

static void logprobs_are_the_models_own(void **state) {
    (void)state;
    enum { N = 50 };
    float x[N], raw[N];
    uint64_t seed = 9;
    double sum = 0;
    for (int i = 0; i < N; i++) x[i] = raw[i] = (float)(golden_random(&seed) % 1000) / 100;
    raw[30] = x[30] = raw[10] = x[10] = 20; /* equals: the lower id first */
    for (int i = 0; i < N; i++) sum += exp(raw[i]);
    qvl__sampler s;
    qvl__choice c;
    make(&s, N, NULL, 0,
         OPTIONS("temperature", "0.5", "logprobs", "5", "logit_bias", "{\"10\": -100, \"30\": -100, \"3\": 60}", "top_k", "1"));
    assert_int_equal(qvl__sample(&s, x, N, NULL, 0, 0, &c), 0);
    assert_int_equal(c.token, 3);
    assert_true(fabs(c.logprob - (raw[3] - log(sum))) < 1e-5);
    assert_int_equal(c.n_top, 5);
    assert_int_equal(c.top_id[0], 10);
    assert_int_equal(c.top_id[1], 30);
    for (int i = 0; i < 5; i++) {
        assert_true(fabs(c.top_logprob[i] - (raw[c.top_id[i]] - log(sum))) < 1e-5);
        assert_true(i == 0 || c.top_logprob[i] <= c.top_logprob[i - 1]);
    }
    qvl__sampler_free(&s);
    make(&s, N, NULL, 0, OPTIONS("temperature", "0", "logprobs", "0"));
    memcpy(x, raw, sizeof x);
    assert_int_equal(qvl__sample(&s, x, N, NULL, 0, 0, &c), 0);
    assert_int_equal(c.n_top, 0);
    assert_true(fabs(c.logprob - (20 - log(sum))) < 1e-5);
    qvl__sampler_free(&s);
    make(&s, 3, NULL, 0, OPTIONS("logprobs", "64")); /* more than there are */
    assert_int_equal(qvl__sample(&s, (float[]){1, 2, 3}, 2, NULL, 0, 0, &c), 0);
    assert_int_equal(c.n_top, 2);
    assert_int_equal(c.top_id[0], 1);
    qvl__sampler_free(&s);
}

static void broken_logits_are_errors(void **state) {
    (void)state;
    static const char *const temperatures[] = {"0", "1"};
    for (int t = 0; t < 2; t++) {
        qvl__sampler s;
        qvl__choice c;
        make(&s, 4, NULL, 0, OPTIONS("temperature", temperatures[t], "logprobs", "2"));
        assert_int_equal(qvl__sample(&s, (float[]){1, NAN, 2, 3}, 4, NULL, 0, 0, &c), QVL_ENUMERIC);
        assert_int_equal(qvl__sample(&s, (float[]){1, -NAN, 2, 3}, 4, NULL, 0, 0, &c), QVL_ENUMERIC);
        assert_int_equal(qvl__sample(&s, (float[]){1, INFINITY, 2, 3}, 4, NULL, 0, 0, &c), QVL_ENUMERIC);
        assert_int_equal(qvl__sample(&s, (float[]){1, 2, 3, NAN}, 2, NULL, 0, 0, &c), QVL_ENUMERIC);
        float none[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
        assert_int_equal(qvl__sample(&s, none, 4, NULL, 0, 0, &c), QVL_ENUMERIC);
        assert_int_equal(qvl__sample(&s, (float[]){1, 2, 3, 4}, 2, (const int32_t[]){0, 1}, 2, 0, &c), QVL_ENUMERIC);
        assert_int_equal(qvl__sample(&s, (float[]){-INFINITY, -INFINITY, -4, -INFINITY}, 4, (const int32_t[]){-1, 99}, 2, 0, &c),
                         0);
        assert_int_equal(c.token, 2);
        qvl__sampler_free(&s);
    }
    /* What overflows by a penalty is still a choice. */
    qvl__sampler s;
    qvl__choice c;
    const int32_t prompt[] = {1};
    make(&s, 3, prompt, 1, OPTIONS("repetition_penalty", "0.01", "logit_bias", "{\"1\": 3e38}"));
    assert_int_equal(qvl__sample(&s, (float[]){1, 2e38f, 3}, 3, NULL, 0, 0, &c), 0);
    assert_int_equal(c.token, 1);
    qvl__sampler_free(&s);
}

static void small_numbers_are_safe(void **state) {
    (void)state;
    qvl__sampler s;
    qvl__choice c;
    make(&s, 3, NULL, 0, OPTIONS("temperature", "1e-300", "min_p", "1", "top_p", "0", "top_k", "1"));
    assert_int_equal(qvl__sample(&s, (float[]){1, 1.0001f, -80}, 3, NULL, 0, 0, &c), 0);
    assert_int_equal(c.token, 1);
    qvl__sampler_free(&s);
    make(&s, 3, NULL, 0, OPTIONS("temperature", "1e-300"));
    for (uint64_t i = 0; i < 50; i++) {
        assert_int_equal(qvl__sample(&s, (float[]){1, 1.0001f, -80}, 3, NULL, 0, i, &c), 0);
        assert_int_equal(c.token, 1);
    }
    qvl__sampler_free(&s);
    make(&s, 3, NULL, 0, OPTIONS("top_p", "0")); /* one is always left */
    assert_int_equal(qvl__sample_distribution(&s, (float[]){1, 1.0001f, -80}, 3, (int32_t[3]){0}, (double[3]){0}), 1);
    qvl__sampler_free(&s);
    make(&s, 4, NULL, 0, OPTIONS("top_k", "2")); /* -0 and 0 are equal at the cut */
    int32_t ids[4];
    double probs[4];
    assert_int_equal(qvl__sample_distribution(&s, (float[]){-0.0f, 1, 0.0f, -1}, 4, ids, probs), 3);
    qvl__sampler_free(&s);
}

static void options_and_defaults(void **state) {
    (void)state;
    qvl__generation_config g = {.temperature = 0.7, .top_p = 0.8, .top_k = 20, .repetition_penalty = 1.1};
    const int32_t prompt[] = {1, 2};
    qvl__sampler s;
    assert_int_equal(qvl__sampler_init(&s, &scratch, NULL, &g, 10, prompt, 2), 0);
    assert_true(s.p.temperature == 0.7 && s.p.top_p == 0.8 && s.p.top_k == 20 && s.p.repetition == 1.1 && s.p.logprobs == -1);
    qvl__sampler_free(&s);
    qvl_options *o;
    assert_int_equal(qvl_options_new(&o), 0);
    qvl_options_set(o, "temperature", "0");
    qvl_options_set(o, "top_k", "0");
    qvl_options_set(o, "top_p", "1");
    qvl_options_set(o, "repetition_penalty", "1");
    assert_int_equal(qvl__sampler_init(&s, &scratch, o, &g, 10, prompt, 2), 0);
    assert_true(s.p.temperature == 0 && s.p.top_p == 1 && s.p.top_k == 0 && s.p.repetition == 1);
    assert_true(!s.in_prompt && !s.count);
    qvl__sampler_free(&s);
    static const char *const wrong[] = {"[1]",
                                        "{\"10\": 1}",
                                        "{\"-1\": 1}",
                                        "{\"x\": 1}",
                                        "{\"1.5\": 1}",
                                        "{\" 1\": 1}",
                                        "{\"1\": \"2\"}",
                                        "{\"1\": 1e300}",
                                        "{\"99999999999999999999\": 1}",
                                        "{\"1\": 1",
                                        "7",
                                        "{\"\": 1}"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        qvl_options_set(o, "logit_bias", wrong[i]);
        assert_int_equal(qvl__sampler_init(&s, &scratch, o, &g, 10, prompt, 2), QVL_EINVAL);
        assert_non_null(strstr(qvl_last_error(), "logit_bias"));
        assert_null(s.p.bias);
    }
    qvl_options_free(o);
    const int32_t outside[] = {1, 10};
    assert_int_equal(qvl__sampler_init(&s, &scratch, NULL, &g, 10, outside, 2), QVL_EINVAL);
    static const qvl__generation_config bad[] = {{.temperature = -1, .top_p = 1, .repetition_penalty = 1},
                                                 {.temperature = NAN, .top_p = 1, .repetition_penalty = 1},
                                                 {.temperature = 1, .top_p = 1.5, .repetition_penalty = 1},
                                                 {.temperature = 1, .top_p = 1, .repetition_penalty = 0},
                                                 {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .top_k = -1}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(qvl__sampler_init(&s, &scratch, NULL, &bad[i], 10, prompt, 2), QVL_EINVAL);
}

/* ---- time ---- */

static void speed(void **state) {
    (void)state;
    enum { N = 151936, REPEAT = 20 };
    static float logits[N], x[N];
    uint64_t seed = 10;
    for (int i = 0; i < N; i++) { /* roughly normal, standard deviation 2.5, as real logits are away from their peak */
        double sum = 0;
        for (int k = 0; k < 12; k++) sum += golden_random(&seed) / 4294967296.0;
        logits[i] = (float)((sum - 6) * 2.5);
    }
    for (int i = 0; i < 20; i++) logits[i * 7000] += 8;
    static const struct {
        const char *name;
        const char *options[9];
    } cases[] = {
        {"greedy", {"temperature", "0"}},
        {"temperature 1", {"temperature", "1"}},
        {"0.7, top-k 20, top-p 0.8", {"temperature", "0.7", "top_k", "20", "top_p", "0.8"}},
        {"top-p 0.95", {"top_p", "0.95"}},
        {"min-p 0.05", {"min_p", "0.05"}},
        {"greedy, 5 logprobs", {"temperature", "0", "logprobs", "5"}},
        {"greedy, penalties", {"temperature", "0", "repetition_penalty", "1.1", "presence_penalty", "1"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        qvl__sampler s;
        qvl__choice c;
        make(&s, N, NULL, 0, cases[i].options);
        double best = 1e9;
        for (int r = 0; r < REPEAT; r++) {
            struct timespec a, b;
            memcpy(x, logits, sizeof x);
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
            assert_int_equal(qvl__sample(&s, x, N, NULL, 0, (uint64_t)r, &c), 0);
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
            double ms = (double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6;
            if (ms < best) best = ms;
        }
        printf("  %-26s %6.2f ms for %d logits\n", cases[i].name, best, N);
        qvl__sampler_free(&s);
    }
}

/* ---- failing allocations ---- */

static int allowed;
static long alive;
static void *scarce_realloc(void *ud, void *p, size_t n) {
    (void)ud;
    if (allowed-- <= 0) return NULL;
    void *q = realloc(p, n);
    if (q && !p) alive++;
    return q;
}
static void *scarce_malloc(void *ud, size_t n) { return scarce_realloc(ud, NULL, n); }
static void scarce_free(void *ud, void *p) {
    (void)ud;
    free(p);
    alive--;
}

static void failing_allocations(void **state) {
    (void)state;
    const qvl_allocator scarce = {sizeof scarce, NULL, scarce_malloc, scarce_realloc, scarce_free};
    assert_int_equal(qvl_set_allocator(&scarce), 0);
    qvl_options *o;
    allowed = 100;
    assert_int_equal(qvl_options_new(&o), 0);
    qvl_options_set(o, "logit_bias", "{\"1\": 1}");
    qvl_options_set(o, "repetition_penalty", "1.5");
    qvl_options_set(o, "logprobs", "2");
    long before = alive;
    int rc = -1;
    for (int n = 0; rc < 0; n++) {
        qvl__sampler s;
        allowed = n;
        rc = qvl__sampler_init(&s, &scratch, o, &plain, 100, NULL, 0);
        if (rc == 0) {
            qvl__choice c; /* and choosing takes nothing */
            float x[100] = {0};
            allowed = 0;
            assert_int_equal(qvl__sample(&s, x, 100, NULL, 0, 0, &c), 0);
            qvl__sampler_free(&s);
            assert_true(n >= 4);
        } else assert_int_equal(rc, QVL_ENOMEM);
        assert_int_equal(alive, before);
    }
    qvl_options_free(o);
    assert_int_equal(alive, 0);
    assert_int_equal(qvl_set_allocator(NULL), 0);
}

int main(void) {
    if (qvl__sample_scratch_new(&scratch, 200000)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_cases),
        cmocka_unit_test(philox_known_answers),
        cmocka_unit_test(draws_follow_the_distribution),
        cmocka_unit_test(cuts_equal_a_full_sort),
        cmocka_unit_test(greedy_rules),
        cmocka_unit_test(logprobs_are_the_models_own),
        cmocka_unit_test(broken_logits_are_errors),
        cmocka_unit_test(small_numbers_are_safe),
        cmocka_unit_test(options_and_defaults),
        cmocka_unit_test(speed),
        cmocka_unit_test(failing_allocations),
    };
    int failed = cmocka_run_group_tests_name("sample", tests, NULL, NULL);
    qvl__sample_scratch_free(&scratch);
    return failed;
}
