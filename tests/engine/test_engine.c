/* test_engine.c - nobody can tell from an answer that others were there.
 *
 * Random schedules (arrivals, cancels, priorities, choices, guesses, chunk sizes, limits that change, tiny block pools,
 * thread counts, shared beginnings and pictures, KV types) against the same requests run alone: tokens, text and every bit
 * of every logit. After each: no block lost, no reference left, and no memory was taken during a step. Then eight threads
 * at once, for ThreadSanitizer. QVL_TEST_SEED replays a schedule; QVL_TEST_REQUESTS sets how many requests run.
 */
#include "engine_help.h"

#include <pthread.h>
#include <stdatomic.h>

#include "../../libqvl/engine/engine.h"

#define KINDS 24  /* different prompts */
#define CHOICES 3 /* of a request, at most */

/* ---- memory that steps take ---- */

static _Thread_local bool stepping;
static atomic_long taken;

static void *count_malloc(void *ud, size_t n) {
    (void)ud;
    if (stepping) atomic_fetch_add(&taken, 1);
    return malloc(n);
}
static void *count_realloc(void *ud, void *p, size_t n) {
    (void)ud;
    if (stepping) atomic_fetch_add(&taken, 1);
    return realloc(p, n);
}
static void count_free(void *ud, void *p) {
    (void)ud;
    free(p);
}

static int step(qvl_engine *e, int timeout_ms) {
    stepping = true;
    int n = qvl_engine_step(e, timeout_ms);
    stepping = false;
    return n;
}

/* ---- schedules ---- */

static answer alone[KINDS][CHOICES]; /* by kind and what is added to the seed */

/* Each in an engine of its own that shares nothing and guesses nothing. */
static void run_alone(qvl_model *m, const char *kv) {
    memset(alone, 0, sizeof alone);
    for (int k = 0; k < KINDS * CHOICES; k++) {
        answer *a = &alone[k / CHOICES][k % CHOICES];
        qvl_options *eo = options("max_requests", "1", "max_context", "512", "prefix_cache", "false", "kv_dtype", kv, NULL), *so = sampling((uint64_t)(k / CHOICES));
        OK(qvl_options_set_i64(so, "seed", k / CHOICES + k % CHOICES));
        qvl_engine *e;
        OK(qvl_engine_new(&e, m, eo));
        qvl_prompt *p = prompt(m, (uint64_t)(k / CHOICES));
        OK(qvl_engine_submit(e, p, so, NULL));
        while (!ended(a)) {
            int n = step(e, 0);
            OK(n);
            for (int i = 0; i < n; i++) take(a, qvl_engine_event(e, i));
        }
        assert_int_equal(a->error, 0);
        qvl_prompt_free(p);
        qvl_engine_free(e);
        qvl_options_free(eo);
        qvl_options_free(so);
    }
}

typedef struct {
    uint64_t id;
    int kind, choices, cancel_after; /* cancel when choice 0 has this many tokens; -1 never */
    answer a[CHOICES];
} slot;

static long stat_of(qvl_engine *e, const char *name) {
    char *json, key[64];
    snprintf(key, sizeof key, "\"%s\": ", name);
    OK(qvl_engine_stats(e, &json));
    const char *at = strstr(json, key);
    assert_non_null(at);
    long n = atol(at + strlen(key));
    qvl_free(json);
    return n;
}

/* All blocks are free or kept, and nobody holds one. */
static void no_block_lost(const qvl_engine *e) {
    assert_int_equal(e->blocks.n_free + e->blocks.n_kept, e->blocks.total);
    for (int i = 0; i < e->blocks.total; i++) assert_int_equal(e->blocks.refs[i], 0);
}

static void send(qvl_engine *e, qvl_prompt **prompts, slot *x, uint64_t *s) {
    x->kind = (int)(rnd(s) % KINDS);
    x->cancel_after = rnd(s) % 8 == 0 ? (int)(rnd(s) % 4) : -1;
    x->choices = rnd(s) % 4 ? 1 : 1 + (int)(rnd(s) % CHOICES);
    qvl_options *so = sampling((uint64_t)x->kind);
    OK(qvl_options_set_i64(so, "n", x->choices));
    OK(qvl_options_set_i64(so, "priority", rnd(s) % 3 ? 0 : (int64_t)(rnd(s) % 5) - 2));
    OK(qvl_options_set_i64(so, "speculate", rnd(s) % 2 ? 0 : (int64_t)(rnd(s) % 9)));
    OK(qvl_engine_submit(e, prompts[x->kind], so, &x->id));
    qvl_options_free(so);
}

/* Limits move while it runs. */
static void disturb(qvl_engine *e, uint64_t *s) {
    qvl_options *o = options("step_ms", (const char *[]){"0", "1", "50", "1000"}[rnd(s) % 4], "embedding_cache",
                             (const char *[]){"0", "100000", "100000000"}[rnd(s) % 3], NULL);
    OK(qvl_options_set_i64(o, "max_requests", 1 + (int64_t)(rnd(s) % (uint64_t)e->plan.max_requests)));
    OK(qvl_options_set_i64(o, "max_batched_tokens", 1 + (int64_t)(rnd(s) % (uint64_t)e->plan.max_batched)));
    OK(qvl_engine_configure(e, o));
    qvl_options_free(o);
}

static void one_schedule(qvl_model *m, qvl_prompt **prompts, const char *kv, uint64_t seed, int requests, long *seen) {
    uint64_t s = seed;
    qvl_options *eo = options("max_context", "512", "kv_dtype", kv, "prefix_cache", rnd(&s) % 5 ? "true" : "false", NULL);
    OK(qvl_options_set_i64(eo, "max_batched_tokens", (int[]){1, 5, 7, 33, 64, 512}[rnd(&s) % 6]));
    OK(qvl_options_set_i64(eo, "max_requests", 1 + (int64_t)(rnd(&s) % 10)));
    OK(qvl_options_set_i64(eo, "kv_blocks", 16 + (int64_t)(rnd(&s) % 40)));
    qvl_engine *e;
    OK(qvl_engine_new(&e, m, eo));
    slot *slots = calloc((size_t)requests, sizeof *slots);
    assert_non_null(slots);
    int sent = 0, left = 0;
    long before = atomic_load(&taken);
    while (sent < requests || left) {
        for (int burst = (int)(rnd(&s) % 4); burst > 0 && sent < requests; burst--) {
            send(e, prompts, &slots[sent], &s);
            left += slots[sent++].choices;
        }
        if (rnd(&s) % 16 == 0) disturb(e, &s);
        int n = step(e, 0);
        OK(n);
        for (int i = 0; i < n; i++) {
            const qvl_event *v = qvl_engine_event(e, i);
            slot *x = NULL;
            for (int k = 0; k < sent; k++)
                if (slots[k].id == qvl_event_request(v)) x = &slots[k];
            assert_non_null(x);
            assert_in_range(qvl_event_choice(v), 0, x->choices - 1);
            answer *a = &x->a[qvl_event_choice(v)];
            assert_false(ended(a));
            take(a, v);
            if (x->cancel_after >= 0 && x->a[0].n >= x->cancel_after) qvl_engine_cancel(e, x->id);
            left -= ended(a);
        }
    }
    assert_int_equal(atomic_load(&taken) - before, 0);
    for (int k = 0; k < requests; k++)
        for (int c = 0; c < slots[k].choices; c++) {
            const answer *a = &slots[k].a[c], *b = &alone[slots[k].kind][c];
            bool cancelled = strcmp(a->reason, "cancelled") == 0;
            if (cancelled ? memcmp(a->tokens, b->tokens, (size_t)a->n * sizeof *a->tokens) != 0 : !same(a, b))
                fail_msg("seed %llu (QVL_TEST_SEED), kv_dtype %s: choice %d of request %d (kind %d) differs from the same alone: %d tokens, %s, error %d",
                         (unsigned long long)seed, kv, c, k, slots[k].kind, a->n, a->reason, a->error);
        }
    assert_int_equal(step(e, 0), 0);
    no_block_lost(e);
    static const char *const counters[] = {"prefix_tokens", "preempted", "speculated_tokens", "images_encoded"};
    for (int i = 0; i < 4; i++) seen[i] += stat_of(e, counters[i]);
    free(slots);
    qvl_engine_free(e);
    qvl_options_free(eo);
}

static void schedules(void **state) {
    (void)state;
    const char *replay = getenv("QVL_TEST_SEED"), *many = getenv("QVL_TEST_REQUESTS");
    int per = 40, rounds = (many ? atoi(many) : 2000) / per;
    static const struct {
        const char *threads, *dtype, *kv;
    } sets[] = {{"1", "auto", "bf16"}, {"3", "auto", "bf16"}, {"2", "f32", "f32"}, {"2", "auto", "int8"}};
    long seen[4] = {0};
    for (int t = 0; t < 4; t++) {
        qvl_model *m = load(sets[t].threads, sets[t].dtype);
        if (t != 1) run_alone(m, sets[t].kv); /* three threads are compared with one: the same bits */
        qvl_prompt *prompts[KINDS];
        for (int k = 0; k < KINDS; k++) prompts[k] = prompt(m, (uint64_t)k);
        int own = replay ? 1 : rounds / 4 + (t < rounds % 4);
        for (int r = 0; r < own; r++)
            one_schedule(m, prompts, sets[t].kv, replay ? strtoull(replay, NULL, 10) : (uint64_t)(1000 * t + r), per, seen);
        for (int k = 0; k < KINDS; k++) qvl_prompt_free(prompts[k]);
        qvl_model_free(m);
    }
    print_message("%d requests: %ld prompt tokens shared, %ld preempted, %ld tokens guessed right, %ld pictures encoded\n", rounds * per, seen[0], seen[1],
                  seen[2], seen[3]);
    if (!many && !replay)
        for (int i = 0; i < 4; i++) assert_true(seen[i] > 100); /* or the schedules would not test what they are for */
}

/* ---- threads ---- */

typedef struct {
    qvl_engine *e;
    qvl_prompt **prompts;
    atomic_int *submitted;
    uint64_t seed;
} client;

static void *client_main(void *arg) {
    client *c = arg;
    for (int i = 0; i < 12; i++) {
        uint64_t id = 0;
        int kind = (int)(rnd(&c->seed) % KINDS);
        qvl_options *so = sampling((uint64_t)kind);
        if (qvl_engine_submit(c->e, c->prompts[kind], so, &id) == 0) atomic_fetch_add(c->submitted, 1);
        qvl_options_free(so);
        char *json = NULL;
        if (qvl_engine_stats(c->e, &json) == 0) qvl_free(json);
        if (rnd(&c->seed) % 3 == 0) qvl_engine_cancel(c->e, id);
        if (rnd(&c->seed) % 3 == 0) qvl_engine_wake(c->e);
    }
    return NULL;
}

static void threads(void **state) {
    (void)state;
    qvl_model *m = load("2", "auto");
    qvl_options *eo = options("max_requests", "6", "max_context", "512", "kv_blocks", "64", NULL);
    qvl_engine *e;
    OK(qvl_engine_new(&e, m, eo));
    qvl_prompt *prompts[KINDS];
    for (int k = 0; k < KINDS; k++) prompts[k] = prompt(m, (uint64_t)k);
    atomic_int submitted = 0;
    client clients[8];
    pthread_t ids[8];
    for (int i = 0; i < 8; i++) {
        clients[i] = (client){e, prompts, &submitted, (uint64_t)i};
        assert_int_equal(pthread_create(&ids[i], NULL, client_main, &clients[i]), 0);
    }
    int done = 0, joined = 0;
    while (!joined || done < atomic_load(&submitted)) {
        int n = qvl_engine_step(e, 10);
        OK(n);
        for (int i = 0; i < n; i++) {
            int type = qvl_event_type(qvl_engine_event(e, i));
            assert_int_not_equal(type, QVL_EVENT_ERROR);
            done += type == QVL_EVENT_FINISHED;
        }
        if (!joined && atomic_load(&submitted) == 8 * 12) {
            for (int i = 0; i < 8; i++) pthread_join(ids[i], NULL);
            joined = 1;
        }
    }
    assert_int_equal(done, 96);
    assert_int_equal(blocks_used(e), 0);
    for (int k = 0; k < KINDS; k++) qvl_prompt_free(prompts[k]);
    qvl_model_free(m); /* the engine keeps it alive */
    qvl_engine_free(e);
    qvl_options_free(eo);
}

static void *step_elsewhere(void *e) { return (void *)(intptr_t)qvl_engine_step(e, 0); }

static void one_owner(void **state) {
    (void)state;
    qvl_model *m = load("1", "auto");
    qvl_engine *e;
    OK(qvl_engine_new(&e, m, NULL));
    OK(qvl_engine_step(e, 0));
    pthread_t t;
    void *rc;
    assert_int_equal(pthread_create(&t, NULL, step_elsewhere, e), 0);
    pthread_join(t, &rc);
    assert_int_equal((intptr_t)rc, QVL_EMISUSE);
    qvl_engine_free(e);
    qvl_model_free(m);
}

/* Runs p to its end; the answer, and how many prompt tokens came from the cache. */
static answer finish(qvl_engine *e, const qvl_prompt *p, const qvl_options *o, int *cached) {
    answer a = {0};
    OK(qvl_engine_submit(e, p, o, NULL));
    while (!ended(&a)) {
        int n = qvl_engine_step(e, 0);
        OK(n);
        for (int i = 0; i < n; i++) {
            const qvl_event *v = qvl_engine_event(e, i);
            take(&a, v);
            if (ended(&a)) *cached = (int)qvl_event_usage(v, QVL_USAGE_CACHED_TOKENS);
        }
    }
    assert_int_equal(a.error, 0);
    return a;
}

/* A second turn computes only what is new; another picture in the same place shares nothing from there on. */
static void prefixes(void **state) {
    (void)state;
    qvl_model *m = load("2", "auto");
    qvl_options *eo = options("max_requests", "2", "max_context", "1024", NULL), *off = options("max_requests", "2", "max_context", "1024", "prefix_cache", "false", NULL);
    qvl_options *so = options("temperature", "0", "max_tokens", "40", "ignore_eos", "true", "return_logits", "true", NULL);
    qvl_engine *with, *without;
    OK(qvl_engine_new(&with, m, eo));
    OK(qvl_engine_new(&without, m, off));
    int32_t ids[700];
    for (int i = 0; i < 700; i++) ids[i] = 10 + i * 5;
    int cached = -1, none = -1, n = 500;
    for (int turn = 0; turn < 4; turn++) {
        qvl_prompt *p;
        OK(qvl_prompt_from_tokens(&p, m, ids, (size_t)n));
        answer a = finish(with, p, so, &cached), b = finish(without, p, so, &none);
        assert_true(same(&a, &b));
        assert_int_equal(none, 0);
        /* everything but the last token of the previous answer was in the cache, in blocks of 32 */
        assert_int_equal(cached, turn == 0 ? 0 : (n - 10 - 1) / 32 * 32);
        qvl_prompt_free(p);
        memcpy(ids + n, a.tokens, sizeof(int32_t) * 40); /* the next turn: the answer, and 10 new tokens */
        n += 50;
    }
    assert_true(stat_of(with, "blocks_kept") > 10);
    assert_int_equal(stat_of(with, "blocks_used"), 0);

    const char *look = "[{\"role\":\"user\",\"content\":[{\"type\":\"image\"},{\"type\":\"text\",\"text\":\"What is it? Tell me all about its shape, its colour, and where in the picture it is to be found.\"}]}]";
    int before = (int)stat_of(with, "images_encoded");
    for (int k = 0; k < 4; k++) { /* picture 1, 1 again, 2, 1 again */
        qvl_image *im = picture(k == 2 ? 22 : 11);
        qvl_media *media;
        qvl_prompt *p;
        OK(qvl_media_new(&media));
        OK(qvl_media_add_image(media, im));
        OK(qvl_prompt_new(&p, m, look, NULL, media, NULL));
        answer a = finish(with, p, so, &cached), b = finish(without, p, so, &none);
        assert_true(same(&a, &b));
        if (k == 0 || k == 2) assert_int_equal(cached, 0);
        else assert_true(cached >= 32);
        qvl_prompt_free(p);
        qvl_media_free(media);
        qvl_image_free(im);
    }
    assert_int_equal(stat_of(with, "images_encoded") - before, 2); /* a picture whose tokens are all cached is not encoded */
    qvl_options_free(eo);
    qvl_options_free(off);
    qvl_options_free(so);
    qvl_engine_free(with);
    qvl_engine_free(without);
    qvl_model_free(m);
}

/* Long answers in a pool that is too small for all of them: the youngest gives way again and again, and nobody can tell. */
static void preemption(void **state) {
    (void)state;
    qvl_model *m = load("2", "auto");
    qvl_options *one = options("max_requests", "1", "max_context", "160", NULL), *so = options("temperature", "0.8", "max_tokens", "64", "ignore_eos", "true", "return_logits", "true", NULL);
    qvl_engine *alone_in;
    qvl_prompt *p[12];
    answer right[12], got[12];
    uint64_t id[12];
    int cached;
    OK(qvl_engine_new(&alone_in, m, one));
    for (int i = 0; i < 12; i++) {
        int32_t ids[80];
        for (int k = 0; k < 80; k++) ids[k] = 20 + (i / 2 * 7 + k * 3) % 3000; /* in pairs, so that prefixes are shared too */
        OK(qvl_prompt_from_tokens(&p[i], m, ids, (size_t)(10 + 2 * i)));
        OK(qvl_options_set_i64(so, "seed", i));
        right[i] = finish(alone_in, p[i], so, &cached);
    }
    for (int cache = 0; cache < 2; cache++) {
        qvl_options *eo = options("max_requests", "6", "max_context", "160", "kv_blocks", "8", "prefix_cache", cache ? "true" : "false", NULL);
        qvl_engine *e;
        OK(qvl_engine_new(&e, m, eo));
        memset(got, 0, sizeof got);
        for (int i = 0; i < 12; i++) {
            OK(qvl_options_set_i64(so, "seed", i));
            OK(qvl_engine_submit(e, p[i], so, &id[i]));
        }
        for (int done = 0; done < 12;) {
            int n = qvl_engine_step(e, 0);
            OK(n);
            for (int k = 0; k < n; k++) {
                const qvl_event *v = qvl_engine_event(e, k);
                answer *a = &got[qvl_event_request(v) - id[0]];
                take(a, v);
                done += ended(a);
            }
        }
        for (int i = 0; i < 12; i++) assert_true(same(&got[i], &right[i]));
        assert_in_range(stat_of(e, "preempted"), 3, 1000);
        assert_int_equal(blocks_used(e), 0);
        qvl_engine_free(e);
        qvl_options_free(eo);
    }
    for (int i = 0; i < 12; i++) qvl_prompt_free(p[i]);
    qvl_engine_free(alone_in);
    qvl_options_free(one);
    qvl_options_free(so);
    qvl_model_free(m);
}

static void refused(void **state) {
    (void)state;
    qvl_model *m = load("1", "auto");
    qvl_options *eo = options("max_context", "128", "kv_blocks", "2", NULL), *so = options("max_tokens", "100", NULL);
    qvl_engine *e;
    OK(qvl_engine_new(&e, m, eo));
    int32_t ids[200];
    for (int i = 0; i < 200; i++) ids[i] = i + 100;
    qvl_prompt *longer, *fits;
    OK(qvl_prompt_from_tokens(&longer, m, ids, 200));
    OK(qvl_prompt_from_tokens(&fits, m, ids, 20));
    assert_int_equal(qvl_engine_submit(e, longer, NULL, NULL), QVL_ECONTEXT);
    assert_non_null(strstr(qvl_last_error(), "128"));
    assert_int_equal(qvl_engine_submit(e, fits, so, NULL), QVL_ECONTEXT);
    assert_non_null(strstr(qvl_last_error(), "kv_blocks"));
    OK(qvl_options_set(so, "max_tokens", "4"));
    uint64_t id;
    OK(qvl_engine_submit(e, fits, so, &id));
    answer a = {0};
    while (!ended(&a)) {
        int n = qvl_engine_step(e, 0);
        OK(n);
        for (int i = 0; i < n; i++) take(&a, qvl_engine_event(e, i));
    }
    assert_int_equal(a.error, 0);
    assert_int_equal(qvl_engine_cancel(e, id), 0);
    qvl_prompt_free(longer);
    qvl_prompt_free(fits);
    qvl_options_free(eo);
    qvl_options_free(so);
    qvl_engine_free(e);
    qvl_model_free(m);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(schedules), cmocka_unit_test(threads), cmocka_unit_test(one_owner), cmocka_unit_test(prefixes), cmocka_unit_test(preemption), cmocka_unit_test(refused)};
    const qvl_allocator counting = {sizeof counting, NULL, count_malloc, count_realloc, count_free};
    if (qvl_set_allocator(&counting)) return 1;
    return cmocka_run_group_tests_name("engine", tests, NULL, NULL);
}
