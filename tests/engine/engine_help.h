/* engine_help.h - what the engine tests share: a checkpoint, prompts with pictures, running requests to their end. */
#ifndef ENGINE_HELP_H
#define ENGINE_HELP_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../../include/qvl.h"

#define CHECKPOINT "tests/golden/checkpoints/tiny-dense-tied"

#define OK(call) \
    do { \
        int rc_ = (call); \
        if (rc_ < 0) fail_msg("%s: %s: %s", #call, qvl_error_name(rc_), qvl_last_error()); \
    } while (0)

static inline uint64_t rnd(uint64_t *s) { /* SplitMix64 */
    uint64_t z = *s += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static inline qvl_options *options(const char *first, ...) { /* name, value, name, value, NULL */
    qvl_options *o;
    OK(qvl_options_new(&o));
    va_list ap;
    va_start(ap, first);
    for (const char *name = first; name; name = va_arg(ap, const char *)) OK(qvl_options_set(o, name, va_arg(ap, const char *)));
    va_end(ap);
    return o;
}

static inline qvl_model *load(const char *threads, const char *dtype) {
    qvl_options *o = options("threads", threads, "dtype", dtype, NULL);
    qvl_model *m;
    OK(qvl_model_load(&m, CHECKPOINT, o));
    qvl_options_free(o);
    return m;
}

/* A picture that depends on seed only. */
static inline qvl_image *picture(uint64_t seed) {
    int w = 40 + (int)(rnd(&seed) % 200), h = 40 + (int)(rnd(&seed) % 200);
    uint8_t *rgb = malloc((size_t)w * (size_t)h * 3);
    assert_non_null(rgb);
    uint64_t a = rnd(&seed), b = rnd(&seed);
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++)
            for (int c = 0; c < 3; c++) rgb[(y * w + x) * 3 + c] = (uint8_t)((uint64_t)x * (a >> 8 * c & 15) + (uint64_t)y * (b >> 8 * c & 15) + (a >> c));
    qvl_image *im;
    OK(qvl_image_from_pixels(&im, rgb, w, h, 0));
    free(rgb);
    return im;
}

/* Prompt number seed: text of some length, in a third of them one or two pictures; two of three go on from one of three
 * beginnings, which end anywhere in a KV block. */
static inline qvl_prompt *prompt(qvl_model *m, uint64_t seed) {
    static const char *const words[] = {"describe", "the", "colour", "two", "circle", "where", "is", "a", "left", "why", "\\n", "number", "42", "请", "fox"};
    char text[4096], messages[6000];
    size_t n = 0;
    uint64_t s = seed * 77 + 1, beginning = seed % 3;
    for (int k = beginning ? 20 + (int)(rnd(&beginning) % 60) : 0; k > 0; k--) n += (size_t)snprintf(text + n, sizeof text - n, "%s ", words[rnd(&beginning) % 15]);
    for (int k = (int)(rnd(&s) % 60) + 1; k > 0; k--) n += (size_t)snprintf(text + n, sizeof text - n, "%s ", words[rnd(&s) % 15]);
    int images = rnd(&s) % 3 == 0 ? 1 + (int)(rnd(&s) % 2) : 0;
    qvl_media *media;
    OK(qvl_media_new(&media));
    for (int i = 0; i < images; i++) {
        qvl_image *im = picture(rnd(&s) % 4); /* few different ones, so that requests share them */
        OK(qvl_media_add_image(media, im));
        qvl_image_free(im);
    }
    bool last = rnd(&s) % 2; /* pictures before the text, or behind it */
    const char *pictures = images == 2 ? "{\"type\":\"image\"},{\"type\":\"image\"}," : images ? "{\"type\":\"image\"}," : "";
    snprintf(messages, sizeof messages, "[{\"role\":\"user\",\"content\":[%s{\"type\":\"text\",\"text\":\"%s\"},%s{\"type\":\"text\",\"text\":\"?\"}]}]",
             last ? "" : pictures, text, last ? pictures : "");
    qvl_prompt *p;
    OK(qvl_prompt_new(&p, m, messages, NULL, media, NULL));
    qvl_media_free(media);
    return p;
}

typedef struct {
    int32_t tokens[64];
    int n;
    uint64_t logits; /* hash of all logits, bit for bit */
    char text[1024];
    char reason[16];
    int error;
} answer;

static inline void take(answer *a, const qvl_event *v) {
    size_t n, len;
    const float *l = qvl_event_logits(v, &n);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, l + i, 4);
        a->logits = (a->logits ^ bits) * 0x100000001B3u;
    }
    if (qvl_event_token(v) >= 0 && a->n < 64) a->tokens[a->n++] = qvl_event_token(v);
    const char *t = qvl_event_text(v, &len);
    size_t have = strlen(a->text);
    for (size_t i = 0; i < len && have + 1 < sizeof a->text; i++) a->text[have++] = t[i] ? t[i] : '?';
    a->text[have] = 0;
    if (qvl_event_type(v) == QVL_EVENT_FINISHED) snprintf(a->reason, sizeof a->reason, "%s", qvl_event_finish_reason(v));
    if (qvl_event_type(v) == QVL_EVENT_ERROR) a->error = qvl_event_error(v, NULL);
}

static inline int ended(const answer *a) { return a->reason[0] || a->error; }

static inline int same(const answer *a, const answer *b) {
    return a->n == b->n && memcmp(a->tokens, b->tokens, (size_t)a->n * sizeof *a->tokens) == 0 && a->logits == b->logits && strcmp(a->text, b->text) == 0 &&
           strcmp(a->reason, b->reason) == 0;
}

/* Request options of prompt number seed: some greedy, some sampled with penalties. */
static inline qvl_options *sampling(uint64_t seed) {
    uint64_t s = seed * 991 + 5;
    char number[32];
    snprintf(number, sizeof number, "%llu", (unsigned long long)(seed % 1000));
    qvl_options *o = options("seed", number, "ignore_eos", "true", "return_logits", "true", "temperature", rnd(&s) % 2 ? "0" : "0.9", NULL);
    if (rnd(&s) % 3 == 0) OK(qvl_options_set(o, "repetition_penalty", "1.2"));
    if (rnd(&s) % 3 == 0) OK(qvl_options_set(o, "presence_penalty", "0.5"));
    if (rnd(&s) % 3 == 0) OK(qvl_options_set(o, "logit_bias", "{\"300\": 60, \"301\": 60, \"302\": 60}")); /* says the same again and again: guesses come true */
    OK(qvl_options_set_i64(o, "max_tokens", rnd(&s) % 4 ? 1 + (int64_t)(rnd(&s) % 12) : 64));
    return o;
}

/* Kept blocks in use, from the stats. */
static inline int blocks_used(qvl_engine *e) {
    char *json;
    OK(qvl_engine_stats(e, &json));
    int used = atoi(strstr(json, "\"blocks_used\": ") + 15);
    qvl_free(json);
    return used;
}

#endif
