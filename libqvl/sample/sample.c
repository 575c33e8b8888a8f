/* sample.c - logits to a token.
 *
 * Job:        logit bias, then penalties (repetition over prompt and answer; frequency and presence over the answer),
 *             then temperature, min-p, top-k, top-p, softmax, one random number. This is vLLM's order; transformers
 *             differs in applying min-p last.
 * Input:      float logits of one position, overwritten.
 * Output:     a token and log-probabilities of the model's own distribution.
 * Invariants: a function of (logits, options, tokens so far, seed, position): logits stay float through bias,
 *             penalties and temperature (as in transformers and vLLM), probabilities are doubles summed in one fixed
 *             order, the random number is a hash of (seed, position), and walks the candidates by id; a tie at the top-k cut keeps
 *             all equals (as transformers does), a tie at the top-p cut keeps the lowest ids; nothing is sorted.
 *             device/draw.h has what a GPU shares with this (device.h's op sample).
 */
#include <float.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "sample.h"

typedef struct qvl__candidate candidate;

#define GREEDY_BELOW 1e-5 /* colder than this only exact ties could differ, and logits over it leave float; as vLLM */

/* ---- options ---- */

static int parse_bias(qvl__sampling *p, const char *json, int vocab) {
    if (!*json) return 0;
    json_t *root, *v;
    const char *key;
    int rc = qvl__json_parse(&root, json, strlen(json), "option logit_bias");
    if (rc == QVL_EFORMAT) return qvl__context(QVL_EINVAL, "an object from token id to number is wanted, {\"42\": -100}");
    if (rc < 0) return rc;
    if (!json_is_object(root))
        rc = qvl__fail(QVL_EINVAL, "option logit_bias: an object from token id to number is wanted, {\"42\": -100}");
    if (rc == 0) {
        p->bias_id = qvl__array(NULL, json_object_size(root), sizeof *p->bias_id);
        p->bias = qvl__array(NULL, json_object_size(root), sizeof *p->bias);
        if (!p->bias_id || !p->bias) rc = QVL_ENOMEM;
    }
    if (rc == 0) {
        json_object_foreach(root, key, v) {
            char *end;
            bool number = *key >= '0' && *key <= '9' && !(key[0] == '0' && key[1]); /* one way to write an id: each comes once */
            long long id = number ? strtoll(key, &end, 10) : -1;
            double value = json_number_value(v);
            if (id < 0 || *end || id >= vocab)
                rc = qvl__fail(QVL_EINVAL, "option logit_bias: \"%.40s\" is no token id; they are 0 to %d", key, vocab - 1);
            else if (!json_is_number(v) || !isfinite((float)value))
                rc = qvl__fail(QVL_EINVAL, "option logit_bias: the value of \"%.40s\" is not a finite number", key);
            if (rc < 0) break;
            p->bias_id[p->n_bias] = (int32_t)id;
            p->bias[p->n_bias++] = (float)value;
        }
    }
    json_decref(root);
    return rc;
}

static double f64_or(const qvl_options *o, const char *name, double unset) {
    return qvl__opt_is_set(o, name) ? qvl__opt_f64(o, name) : unset;
}

/* Options are in range already; the checkpoint's own values come from a file. */
static int check(const qvl__sampling *p) {
    if (!(p->temperature >= 0 && p->temperature <= 100))
        return qvl__fail(QVL_EINVAL, "temperature %g is out of range 0..100 (generation_config.json)", p->temperature);
    if (!(p->top_p >= 0 && p->top_p <= 1))
        return qvl__fail(QVL_EINVAL, "top_p %g is out of range 0..1 (generation_config.json)", p->top_p);
    if (!(p->repetition >= 0.01 && p->repetition <= 100))
        return qvl__fail(QVL_EINVAL, "repetition_penalty %g is out of range 0.01..100 (generation_config.json)", p->repetition);
    if (p->top_k < 0) return qvl__fail(QVL_EINVAL, "top_k %d is negative (generation_config.json)", p->top_k);
    return 0;
}

static bool has_penalty(const qvl__sampling *p) { return p->repetition != 1 || p->presence != 0 || p->frequency != 0; }

int qvl__sample_scratch_new(qvl__sample_scratch *s, int vocab) {
    s->cand = qvl__array(NULL, (size_t)vocab, sizeof *s->cand);
    s->raw = qvl__array(NULL, (size_t)vocab, sizeof *s->raw);
    return s->cand && s->raw ? 0 : QVL_ENOMEM;
}

void qvl__sample_scratch_free(qvl__sample_scratch *s) {
    qvl__free(s->cand);
    qvl__free(s->raw);
    *s = (qvl__sample_scratch){0};
}

int qvl__sampler_init(qvl__sampler *s, const qvl__sample_scratch *scratch, const qvl_options *o, const qvl__generation_config *g,
                      int vocab, const int32_t *prompt, size_t n) {
    memset(s, 0, sizeof *s);
    s->vocab = vocab;
    s->scratch = scratch;
    qvl__sampling *p = &s->p;
    p->temperature = f64_or(o, "temperature", g->temperature);
    p->top_p = f64_or(o, "top_p", g->top_p);
    p->repetition = f64_or(o, "repetition_penalty", g->repetition_penalty);
    p->top_k = qvl__opt_is_set(o, "top_k") ? (int)qvl__opt_i64(o, "top_k") : g->top_k;
    p->min_p = qvl__opt_f64(o, "min_p");
    p->presence = qvl__opt_f64(o, "presence_penalty");
    p->frequency = qvl__opt_f64(o, "frequency_penalty");
    p->logprobs = (int)qvl__opt_i64(o, "logprobs");
    p->seed = qvl__opt_i64(o, "seed");
    int rc = check(p);
    if (p->temperature < GREEDY_BELOW) p->temperature = 0;
    if (rc == 0) rc = parse_bias(p, qvl__opt_str(o, "logit_bias"), vocab);
    size_t v = (size_t)vocab;
    bool ok = rc == 0;
    if (ok && p->repetition != 1) ok = (s->in_prompt = qvl__calloc(v, sizeof *s->in_prompt)) != NULL;
    if (ok && has_penalty(p)) ok = (s->count = qvl__calloc(v, sizeof *s->count)) != NULL && (s->seen = qvl__array(NULL, v, sizeof *s->seen)) != NULL;
    if (rc == 0 && !ok) rc = QVL_ENOMEM;
    for (size_t i = 0; i < n && rc == 0; i++) {
        if (prompt[i] < 0 || prompt[i] >= vocab)
            rc = qvl__fail(QVL_EINVAL, "prompt token %zu is %d; the vocabulary has ids 0 to %d", i, (int)prompt[i], vocab - 1);
        else if (s->in_prompt && !s->in_prompt[prompt[i]]) {
            s->in_prompt[prompt[i]] = 1;
            s->seen[s->n_seen++] = prompt[i];
        }
    }
    if (rc < 0) qvl__sampler_free(s);
    return rc;
}

void qvl__sampler_free(qvl__sampler *s) {
    qvl__free(s->p.bias_id);
    qvl__free(s->p.bias);
    qvl__free(s->in_prompt);
    qvl__free(s->count);
    qvl__free(s->seen);
    memset(s, 0, sizeof *s);
}

void qvl__sampler_accept(qvl__sampler *s, int32_t token) {
    if (!s->count || token < 0 || token >= s->vocab) return;
    if (s->count[token]++ == 0 && !(s->in_prompt && s->in_prompt[token])) s->seen[s->n_seen++] = token;
}

/* ---- random number ---- */

void qvl__philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* Uniform in (0, 1), 53 bits. */
static double uniform(int64_t seed, uint64_t position) {
    const uint32_t counter[4] = {(uint32_t)position, (uint32_t)(position >> 32), 0, 0};
    const uint32_t key[2] = {(uint32_t)(uint64_t)seed, (uint32_t)((uint64_t)seed >> 32)};
    uint32_t r[4];
    qvl__philox4x32(counter, key, r);
    return ((double)(((uint64_t)r[0] << 32 | r[1]) >> 11) + 0.5) * 0x1p-53;
}

/* ---- whole-vocabulary loops; written so that the compiler can use vectors ---- */

enum { LANES = 16 };

/* qvl__is_logit of all: neither NaN nor +inf. */
static bool all_numbers(const float *x, int n) {
    uint32_t bad[LANES] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) bad[j] |= x[i + j] < INFINITY ? 0 : ~0u;
    for (; i < n; i++) bad[0] |= x[i] < INFINITY ? 0 : ~0u;
    for (int j = 1; j < LANES; j++) bad[0] |= bad[j];
    return bad[0] == 0;
}

static float largest(const float *x, int n) {
    float m[LANES];
    for (int j = 0; j < LANES; j++) m[j] = -INFINITY;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
    for (; i < n; i++) m[0] = x[i] > m[0] ? x[i] : m[0];
    for (int j = 1; j < LANES; j++) m[0] = m[j] > m[0] ? m[j] : m[0];
    return m[0];
}

/* log(sum(exp(x))) in the order of ids. */
static double log_sum_exp(const float *x, int n) {
    double max = largest(x, n), sum = 0;
    for (int i = 0; i < n; i++) sum += exp((double)x[i] - max);
    return max + log(sum);
}

/* The n largest of x[0, limit), best first, the lowest id among equals. */
static int top_logits(const float *x, int limit, int n, int32_t *id) {
    int have = 0;
    for (int i = 0; i < limit; i++) {
        if (have == n && !(x[i] > x[id[n - 1]])) continue;
        int at = have < n ? have++ : n - 1;
        for (; at > 0 && x[i] > x[id[at - 1]]; at--) id[at] = id[at - 1];
        id[at] = i;
    }
    return have;
}

/* ---- bias and penalties ---- */

static void adjust(const qvl__sampler *s, float *x) {
    const qvl__sampling *p = &s->p;
    for (int i = 0; i < p->n_bias; i++) x[p->bias_id[i]] = qvl__bounded(x[p->bias_id[i]] + p->bias[i]);
    for (int i = 0; i < s->n_seen; i++) {
        int32_t id = s->seen[i];
        x[id] = qvl__penalised(x[id], s->count[id], (float)p->repetition, (float)p->frequency, (float)p->presence);
    }
}

/* ---- candidates ---- */

/* The logit at which the weights of c[0, n), added up from the best one down, reach need; *above: the sum before it. A weight is 1,
 * or with by_mass the probability. Sums over the upper 11 bits tell the bucket that it is in, then the next 11, then the last 10. */
static uint32_t cut(const candidate *c, int n, double need, bool by_mass, double *above) {
    uint32_t prefix = 0, mask = 0;
    *above = 0;
    for (int pass = 0; pass < QVL__ORDER_PASSES; pass++) {
        double sums[QVL__ORDER_BINS] = {0};
        uint32_t field = (1u << qvl__order_bits(pass)) - 1, bucket = field;
        int shift = qvl__order_shift(pass);
        for (int i = 0; i < n; i++) {
            uint32_t v = qvl__order_of(c[i].logit);
            if ((v & mask) == prefix) sums[v >> shift & field] += by_mass ? c[i].prob : 1;
        }
        while (bucket > 0 && (sums[bucket] == 0 || *above + sums[bucket] < need)) *above += sums[bucket--];
        prefix |= bucket << shift;
        mask |= field << shift;
    }
    return prefix;
}

static bool above(const candidate *a, const candidate *b) {
    return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

/* Keeps the fewest best candidates of c[0, n) that hold mass, at least one, in the order in which they are; *sum is their
 * probability. Returns their number. */
static int keep_mass(candidate *c, int n, double mass, double *sum) {
    double held;
    uint32_t least = cut(c, n, mass, true, &held);
    int kept = 0;
    *sum = 0;
    for (int i = 0; i < n; i++) {
        uint32_t v = qvl__order_of(c[i].logit);
        if (v < least || (v == least && held > 0 && held >= mass)) continue;
        if (v == least) held += c[i].prob;
        *sum += c[i].prob;
        c[kept++] = c[i];
    }
    return kept;
}

/* Fills the scratch with what may be drawn; *total gets the sum of the probabilities. Returns its number, 0 when there is
 * nothing. */
static int distribution(qvl__sampler *s, const float *x, int limit, double *total) {
    const qvl__sampling *p = &s->p;
    candidate *c = s->scratch->cand;
    *total = 0;
    float max = largest(x, limit);
    if (max == -INFINITY) return 0;
    float t = (float)p->temperature, top = qvl__bounded(max / t);
    /* prob < min_p * largest prob, in logits: nothing has to be computed for what is dropped */
    double floor_logit = p->min_p > 0 ? top + log(p->min_p) : -INFINITY;
    int n = 0;
    for (int i = 0; i < limit; i++) {
        float l = qvl__bounded(x[i] / t);
        if (l >= floor_logit && l > -INFINITY) c[n++] = (candidate){.logit = l, .id = i};
    }
    if (p->top_k > 0 && p->top_k < n) {
        double better;
        uint32_t least = cut(c, n, p->top_k, false, &better);
        int kept = 0;
        for (int i = 0; i < n; i++)
            if (qvl__order_of(c[i].logit) >= least) c[kept++] = c[i];
        n = kept;
    }
    for (int i = 0; i < n; i++) {
        c[i].prob = exp((double)c[i].logit - top);
        *total += c[i].prob;
    }
    return p->top_p < 1 ? keep_mass(c, n, p->top_p * *total, total) : n;
}

/* ---- the choice ---- */

static int not_finite(void) { return qvl__fail(QVL_ENUMERIC, "the model produced a logit that is not a finite number"); }

/* x -> what is chosen from: adjusted, without banned ids. */
static int prepare(qvl__sampler *s, float *x, const int32_t *banned, int n_banned) {
    if (!all_numbers(x, s->vocab)) return not_finite();
    adjust(s, x);
    for (int i = 0; i < n_banned; i++)
        if (banned[i] >= 0 && banned[i] < s->vocab) x[banned[i]] = -INFINITY;
    return 0;
}

static int nothing_left(void) {
    return qvl__fail(QVL_ENUMERIC, "no token is left to choose from: every logit is -inf or its token is banned");
}

bool qvl__sampler_draw(const qvl__sampler *s, const int32_t *banned, int n_banned, uint64_t position, qvl__draw *d, qvl__changed *to, int room) {
    const qvl__sampling *p = &s->p;
    if (p->logprobs >= 0 || (int64_t)p->n_bias + s->n_seen + n_banned > room) return false;
    *d = (qvl__draw){.bias = p->n_bias, .seen = s->n_seen, .top_k = p->top_k, .temperature = (float)p->temperature, .repetition = (float)p->repetition,
                     .frequency = (float)p->frequency, .presence = (float)p->presence, .log_min_p = p->min_p > 0 ? log(p->min_p) : -INFINITY, .top_p = p->top_p,
                     .uniform = uniform(p->seed, position)};
    for (int i = 0; i < p->n_bias; i++) *to++ = (qvl__changed){.id = p->bias_id[i], .bias = p->bias[i]};
    for (int i = 0; i < s->n_seen; i++) *to++ = (qvl__changed){.id = s->seen[i], .count = s->count[s->seen[i]]};
    for (int i = 0; i < n_banned; i++) { /* each once: their threads do not wait for one another */
        bool new = banned[i] >= 0 && banned[i] < s->vocab;
        for (int j = 0; j < d->banned; j++) new = new && to[j].id != banned[i];
        if (new) to[d->banned++] = (qvl__changed){.id = banned[i]};
    }
    return true;
}

int qvl__sampler_take(int32_t chosen, qvl__choice *out) {
    if (chosen == QVL__DRAW_NOT_FINITE) return not_finite();
    if (chosen < 0) return nothing_left();
    *out = (qvl__choice){.token = chosen, .logprob = NAN};
    return 0;
}

static int choose(qvl__sampler *s, const float *x, int limit, uint64_t position, int32_t *token) {
    if (s->p.temperature == 0) {
        float max = largest(x, limit);
        if (max == -INFINITY) return nothing_left();
        int i = 0;
        while (x[i] != max) i++;
        *token = i;
        return 0;
    }
    double total;
    int n = distribution(s, x, limit, &total);
    if (n == 0) return nothing_left();
    const candidate *c = s->scratch->cand;
    double rest = uniform(s->p.seed, position) * total;
    int chosen = 0;
    for (int i = 0; i < n; i++) {
        if (c[i].prob > 0) chosen = i; /* rounding may leave a rest after the last one */
        rest -= c[i].prob;
        if (rest < 0) break;
    }
    *token = c[chosen].id;
    return 0;
}

int qvl__logprobs(const float *logits, int vocab, int limit, int32_t token, int n_top, qvl__choice *out) {
    out->logprob = NAN;
    out->n_top = 0;
    if (!all_numbers(logits, vocab)) return not_finite();
    double lse = log_sum_exp(logits, vocab);
    out->n_top = top_logits(logits, limit < vocab ? limit : vocab, n_top, out->top_id);
    for (int i = 0; i < out->n_top; i++) out->top_logprob[i] = (float)(logits[out->top_id[i]] - lse);
    if (token >= 0) out->logprob = (float)(logits[token] - lse);
    return 0;
}

int qvl__sample(qvl__sampler *s, float *logits, int limit, const int32_t *banned, int n_banned, uint64_t position,
                qvl__choice *out) {
    if (limit > s->vocab) limit = s->vocab;
    const float *raw = logits;
    if (s->p.logprobs >= 0) { /* of the logits as they came */
        memcpy(s->scratch->raw, logits, (size_t)s->vocab * sizeof *logits);
        raw = s->scratch->raw;
    }
    int rc = prepare(s, logits, banned, n_banned);
    if (rc == 0) rc = choose(s, logits, limit, position, &out->token);
    out->logprob = NAN;
    out->n_top = 0;
    return rc || s->p.logprobs < 0 ? rc : qvl__logprobs(raw, s->vocab, limit, out->token, s->p.logprobs, out);
}

static int best_first(const void *a, const void *b) { return above(a, b) ? -1 : 1; }

int qvl__sample_distribution(qvl__sampler *s, float *logits, int limit, int32_t *ids, double *probs) {
    int rc = prepare(s, logits, NULL, 0);
    double total;
    if (rc < 0) return rc;
    int n = distribution(s, logits, limit < s->vocab ? limit : s->vocab, &total);
    candidate *c = s->scratch->cand;
    qsort(c, (size_t)n, sizeof *c, best_first);
    for (int i = 0; i < n; i++) {
        ids[i] = c[i].id;
        probs[i] = c[i].prob / total;
    }
    return n;
}
