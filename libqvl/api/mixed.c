/* mixed.c - which matrix deserves how many bits.
 *
 * Job:        option bits of qvl_quantize: int4, int8 or bf16 for every matrix, so that the mean of bits stays below what was
 *             asked for and the damage is small.
 * Input:      a checkpoint, conversations to run it on.
 * Output:     a plan for qvl__weights_pack.
 * Invariants: the plan depends on checkpoint, conversations and instruction set alone, not on threads.
 *
 * The model answers the conversations as it is stored, with a device in between that notes the squares of every product's inputs
 * (sum over rows of x_i^2). Rounding W to W' then costs about sum_i x_i^2 (W - W')_i^2, errors of inputs being taken as
 * independent. What is compared is that cost over the signal sum_i x_i^2 W_i^2, times the share that the branch has in the residual
 * stream that it ends in: for a product that is added to the stream its own share, for the one before it (whose outputs feed it)
 * the same. (The share of amplitudes: on the checkpoints of the tests those of energies, and none, lead to worse answers.) Then
 * bits go, step by step, where a byte takes away most of the sum of all costs.
 */
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../engine/engine.h"
#include "mixed.h"

#define ROWS 256  /* output features of a matrix that are looked at */
#define ANSWER 24 /* tokens of an answer */

static const qvl__type steps[] = {QVL__Q4, QVL__Q8, QVL__BF16};
enum { STEPS = 3 };

typedef struct {
    qvl__matrix *m;
    double *moment; /* [k]: sum over rows of x_i^2, each row in units of what its output (if added) or input sums up to */
    double rows, share, weights;
    bool adds, router;
    double cost[STEPS], bits[STEPS];
    int step;
} part;

/* The device that the graph sees: all as in real, but for matmul. */
typedef struct {
    qvl__device d; /* first */
    qvl__device *real;
    part *parts, **by_data; /* in the order of loading; by address of data */
    size_t n;
} tap;

static int compare_data(const void *a, const void *b) {
    const char *x = (*(part *const *)a)->m->data, *y = (*(part *const *)b)->m->data;
    return (x > y) - (x < y);
}

static double energy(const float *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

static void tapped_matmul(qvl__device *d, float *y, const float *x, int rows, const qvl__matrix *w, const float *bias, qvl__epilogue e) {
    tap *t = (tap *)(void *)d;
    t->real->matmul(t->real, y, x, rows, w, bias, e);
    part key = {.m = (qvl__matrix *)(uintptr_t)w}, *at = &key, **found = bsearch(&at, t->by_data, t->n, sizeof *t->by_data, compare_data);
    if (!found) return;
    part *p = *found;
    p->adds = e == QVL__EPI_ADD;
    for (int r = 0; r < rows; r++) {
        const float *in = x + (size_t)r * (size_t)w->k;
        double unit = p->adds ? energy(y + (size_t)r * (size_t)w->n, w->n) : energy(in, w->k);
        if (!(unit > 0)) continue;
        for (int i = 0; i < w->k; i++) p->moment[i] += (double)in[i] * (double)in[i] / unit;
        p->rows++;
    }
}

static void tap_free(tap *t) {
    for (size_t i = 0; t->parts && i < t->n; i++) qvl__free(t->parts[i].moment);
    qvl__free(t->parts);
    qvl__free(t->by_data);
}

static int tap_new(tap *t, qvl_model *m) {
    t->real = m->device;
    t->d = *m->device;
    t->d.matmul = tapped_matmul;
    t->n = m->weights.n_matrices;
    t->parts = qvl__calloc(t->n, sizeof *t->parts);
    t->by_data = qvl__calloc(t->n, sizeof *t->by_data);
    if (!t->parts || !t->by_data) return QVL_ENOMEM;
    for (size_t i = 0; i < t->n; i++) {
        part *p = t->by_data[i] = &t->parts[i];
        p->m = m->weights.matrices[i];
        p->weights = (double)p->m->n * p->m->k;
        for (int l = 0; l < m->config.text.layers; l++) p->router |= p->m == &m->weights.text[l].router;
        p->moment = qvl__calloc((size_t)p->m->k, sizeof *p->moment);
        if (!p->moment) return QVL_ENOMEM;
    }
    qsort(t->by_data, t->n, sizeof *t->by_data, compare_data);
    return 0;
}

/* ---- conversations ---- */

/* When the caller gives none: prose, facts, code, numbers, other languages, and a picture. */
static const char *const built_in[] = {
    "[{\"role\":\"user\",\"content\":[{\"type\":\"image\"},{\"type\":\"text\",\"text\":\"What do you see? Name the shapes, their colours and where they are.\"}]}]",
    "[{\"role\":\"user\",\"content\":\"The lighthouse keeper wrote down the weather every morning for thirty years: wind from the west, rain before noon, a clear "
    "evening. When the new owner found the notebooks, she counted the storms, drew a chart, and noticed that the winters had become shorter. Summarise "
    "this in one sentence, then say what she should check next.\"}]",
    "[{\"role\":\"user\",\"content\":\"Write a function in C that returns the greatest common divisor of two integers, and explain each line.\"},"
    "{\"role\":\"assistant\",\"content\":\"int gcd(int a, int b) {\\n    while (b != 0) {\\n        int r = a % b;\\n        a = b;\\n        b = r;\\n    }\\n    return a;\\n}\\n"
    "The loop replaces the pair by (b, a mod b), which keeps the divisor, until b is zero.\"},"
    "{\"role\":\"user\",\"content\":\"Now for 1071 and 462: show each step.\"}]",
    "[{\"role\":\"user\",\"content\":\"Wie hei\\u00dft die Hauptstadt von Frankreich, und welcher Fluss flie\\u00dft hindurch? R\\u00e9pondez aussi en fran\\u00e7ais. "
    "\\u8bf7\\u7528\\u4e2d\\u6587\\u518d\\u8bf4\\u4e00\\u904d\\u3002 2 + 2 = 4, 17 * 23 = 391, 1000 / 8 = 125.\"}]",
};

/* Discs and a bar on a ground that goes from light to dark. */
static int draw(qvl_image **out) {
    enum { SIDE = 256 };
    uint8_t *rgb = qvl__malloc(SIDE * SIDE * 3);
    if (!rgb) return QVL_ENOMEM;
    for (int y = 0; y < SIDE; y++)
        for (int x = 0; x < SIDE; x++) {
            uint8_t *p = rgb + (y * SIDE + x) * 3;
            int ground = 230 - y / 4 + (x * 7 + y * 13) % 5;
            p[0] = p[1] = p[2] = (uint8_t)ground;
            if ((x - 70) * (x - 70) + (y - 80) * (y - 80) < 45 * 45) p[0] = 210, p[1] = 30, p[2] = 40;
            if ((x - 180) * (x - 180) + (y - 170) * (y - 170) < 30 * 30) p[0] = 30, p[1] = 80, p[2] = 200;
            if (x > 30 && x < 120 && y > 170 && y < 200) p[0] = 40, p[1] = 160, p[2] = 60;
        }
    int rc = qvl_image_from_pixels(out, rgb, SIDE, SIDE, 0);
    qvl__free(rgb);
    return rc;
}

static int ask(qvl_model *m, const char *messages, const qvl_media *media) {
    qvl_options *o;
    int rc = qvl_options_new(&o);
    if (rc) return rc;
    rc = qvl_options_set_i64(o, "max_tokens", ANSWER);
    if (rc == 0) rc = qvl_options_set(o, "temperature", "0");
    if (rc == 0) rc = qvl_options_set(o, "ignore_eos", "true");
    if (rc == 0) rc = qvl_chat(m, messages, media, o, NULL, NULL, NULL);
    qvl_options_free(o);
    return rc;
}

static int ask_built_in(qvl_model *m) {
    qvl_image *im = NULL;
    qvl_media *media = NULL;
    int rc = draw(&im);
    if (rc == 0) rc = qvl_media_new(&media);
    if (rc == 0) rc = qvl_media_add_image(media, im);
    for (size_t i = 0; rc == 0 && i < sizeof built_in / sizeof *built_in; i++) rc = ask(m, built_in[i], strstr(built_in[i], "\"image\"") ? media : NULL);
    qvl_media_free(media);
    qvl_image_free(im);
    return rc;
}

static int ask_given(qvl_model *m, const char *text) {
    json_t *all, *one;
    size_t i;
    int rc = qvl__json_parse(&all, text, strlen(text), "option calibration");
    if (rc) return rc;
    if (!json_is_array(all) || json_array_size(all) == 0) rc = qvl__fail(QVL_EINVAL, "option calibration: not an array of conversations");
    else json_array_foreach(all, i, one) {
        qvl__buf b = {0};
        rc = qvl__json_dump(&b, one);
        if (rc == 0) rc = ask(m, b.data, NULL);
        qvl__buf_free(&b);
        if (rc) {
            qvl__context(rc, "option calibration: conversation %zu", i);
            break;
        }
    }
    json_decref(all);
    return rc;
}

/* ---- costs ---- */

static double weighted(const part *p, const float *a, const float *b, int rows) {
    double sum = 0;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < p->m->k; i++) {
            double d = (double)a[(size_t)r * (size_t)p->m->k + (size_t)i] - (b ? (double)b[(size_t)r * (size_t)p->m->k + (size_t)i] : 0);
            sum += (p->rows > 0 ? p->moment[i] : 1) * d * d;
        }
    return sum;
}

/* What each step costs a matrix, relative to its signal. */
static int measure(const tap *t, part *p) {
    int n = p->m->n < ROWS ? p->m->n : ROWS, k = p->m->k, rc = 0;
    int32_t from[ROWS], to[ROWS];
    float *was = qvl__array(NULL, (size_t)n * (size_t)k, sizeof(float)), *is = qvl__array(NULL, (size_t)n * (size_t)k, sizeof(float));
    if (!was || !is) rc = QVL_ENOMEM;
    for (int i = 0; i < n; i++) from[i] = (int32_t)((int64_t)i * p->m->n / n), to[i] = i;
    if (rc == 0) t->real->embed(t->real, was, p->m, from, n);
    double signal = rc == 0 ? weighted(p, was, NULL, n) : 0;
    p->share = p->adds && p->rows > 0 ? fmin(1, sqrt(signal * p->m->n / n / p->rows)) : 1;
    for (int s = 0; s < STEPS && rc == 0; s++) {
        qvl__matrix q;
        rc = t->real->matrix_new(t->real, &q, steps[s], n, k, (qvl__role){0});
        if (rc) break;
        t->real->matrix_put(t->real, &q, 0, n, QVL__F32, was);
        t->real->embed(t->real, is, &q, to, n);
        p->cost[s] = signal > 0 ? weighted(p, was, is, n) / signal : 0;
        p->bits[s] = 8.0 * (double)q.bytes / ((double)n * k);
        t->real->matrix_free(t->real, &q);
    }
    qvl__free(was);
    qvl__free(is);
    return rc;
}

/* Bits where they take away most, until the mean is reached. */
static int choose(tap *t, double mean, qvl__mix *plan) {
    double room = 0;
    for (size_t i = 0; i < t->n; i++)
        if (!t->parts[i].router) room += (mean - t->parts[i].bits[0]) * t->parts[i].weights;
    if (room < 0) return qvl__fail(QVL_EINVAL, "option bits: %g is less than int4 takes", mean);
    for (;;) {
        part *best = NULL;
        double most = 0;
        for (size_t i = 0; i < t->n; i++) {
            part *p = &t->parts[i];
            if (p->router || p->step + 1 == STEPS) continue;
            double more = (p->bits[p->step + 1] - p->bits[p->step]) * p->weights, gain = p->share * (p->cost[p->step] - p->cost[p->step + 1]) / more;
            if (more <= room && gain > most) best = p, most = gain;
        }
        if (!best) break;
        room -= (best->bits[best->step + 1] - best->bits[best->step]) * best->weights;
        best->step++;
    }
    double weights[STEPS] = {0};
    plan->types = qvl__calloc(t->n, sizeof *plan->types);
    if (!plan->types) return QVL_ENOMEM;
    plan->n = t->n;
    for (size_t i = 0; i < t->n; i++) {
        plan->types[i] = steps[t->parts[i].step];
        if (!t->parts[i].router) weights[t->parts[i].step] += t->parts[i].weights;
    }
    int most = 0;
    for (int s = 1; s < STEPS; s++)
        if (weights[s] > weights[most]) most = s;
    plan->most = steps[most];
    return 0;
}

int qvl__mixed_choose(qvl__mix *plan, const char *path, const qvl_options *o) {
    *plan = (qvl__mix){0};
    qvl_options *stored;
    qvl_model *m = NULL;
    tap t = {0};
    int rc = qvl_options_new(&stored);
    if (rc) return rc;
    qvl_progress_fn progress;
    void *ud;
    qvl__opt_progress(o, &progress, &ud);
    rc = qvl_options_set_i64(stored, "threads", qvl__opt_i64(o, "threads"));
    if (rc == 0) rc = qvl_options_set(stored, "device", "cpu"); /* the tap reads inputs where they lie */
    if (rc == 0) rc = qvl_options_set(stored, "chat_template", qvl__opt_str(o, "chat_template"));
    if (rc == 0) rc = qvl_options_set_progress(stored, progress, ud);
    if (rc == 0) rc = qvl_model_load(&m, path, stored);
    if (rc == 0 && m->weights.file.data) rc = qvl__fail(QVL_EUNSUPPORTED, "%s is packed already; pack the directory it was made from", path);
    if (rc == 0) rc = tap_new(&t, m);
    if (rc == 0) {
        m->device = m->vision = &t.d;
        const char *given = qvl__opt_str(o, "calibration");
        rc = *given ? ask_given(m, given) : ask_built_in(m);
        m->device = m->vision = t.real;
    }
    for (size_t i = 0; rc == 0 && i < t.n; i++)
        if (!t.parts[i].router) rc = measure(&t, &t.parts[i]);
    for (size_t i = 0; rc == 0 && i + 1 < t.n; i++)
        if (!t.parts[i].adds && t.parts[i + 1].adds) t.parts[i].share = t.parts[i + 1].share;
    if (rc == 0) rc = choose(&t, qvl__opt_f64(o, "bits"), plan);
    tap_free(&t);
    qvl_model_free(m);
    qvl_options_free(stored);
    return rc;
}
