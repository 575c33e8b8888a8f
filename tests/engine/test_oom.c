/* test_oom.c - every allocation fails once, and nothing breaks.
 *
 * The whole way (load, picture, prompt, embedding, engine, answer) runs with an allocator that fails allocation number
 * k, for k over the run: each time the outcome is the right answer or QVL_ENOMEM, no handle and no byte is left, and
 * the next run without failure gives the answer again. QVL_TEST_OOM_STEP=1 takes every k (make check-oom).
 */
#include "engine_help.h"

#include <stdatomic.h>

static atomic_long countdown = -1, failures, alive;

static void *bad_malloc(void *ud, size_t n) {
    (void)ud;
    if (atomic_fetch_sub(&countdown, 1) == 0) {
        atomic_fetch_add(&failures, 1);
        return NULL;
    }
    atomic_fetch_add(&alive, 1);
    return malloc(n);
}
static void *bad_realloc(void *ud, void *p, size_t n) {
    (void)ud;
    if (atomic_fetch_sub(&countdown, 1) == 0) {
        atomic_fetch_add(&failures, 1);
        return NULL;
    }
    if (!p) atomic_fetch_add(&alive, 1);
    return realloc(p, n);
}
static void bad_free(void *ud, void *p) {
    (void)ud;
    atomic_fetch_sub(&alive, 1);
    free(p);
}

/* 0, or the code of the first call that failed. */
static int whole_way(char out[256]) {
    qvl_model *m = NULL;
    qvl_image *im = NULL;
    qvl_media *media = NULL;
    qvl_options *o = NULL, *lo = NULL;
    qvl_embedding *e = NULL, *again = NULL;
    void *bytes = NULL;
    size_t size = 0;
    char *text = NULL;
    int rc = qvl_options_new(&lo);
    if (rc == 0) rc = qvl_options_set(lo, "threads", "2");
    if (rc == 0) rc = qvl_model_load(&m, CHECKPOINT, lo);
    if (rc == 0) rc = qvl_image_from_file(&im, "tests/golden/images/exif6_160x96.jpg", NULL);
    if (rc == 0) rc = qvl_encode_image(m, im, NULL, &e);
    if (rc == 0) rc = qvl_embedding_to_bytes(e, &bytes, &size);
    if (rc == 0) rc = qvl_embedding_from_bytes(&again, m, bytes, size);
    if (rc == 0) rc = qvl_media_new(&media);
    if (rc == 0) rc = qvl_media_add_image(media, im);
    if (rc == 0) rc = qvl_media_add_embedding(media, again);
    if (rc == 0) rc = qvl_options_new(&o);
    if (rc == 0) rc = qvl_options_set(o, "temperature", "0.8");
    if (rc == 0) rc = qvl_options_set(o, "seed", "7");
    if (rc == 0) rc = qvl_options_set(o, "max_tokens", "6");
    if (rc == 0) rc = qvl_options_set(o, "repetition_penalty", "1.1");
    if (rc == 0) rc = qvl_options_set(o, "frequency_penalty", "0.1");
    if (rc == 0) rc = qvl_options_set(o, "logit_bias", "{\"50\": -5}");
    if (rc == 0) rc = qvl_options_set(o, "stop", "[\"nothing like it\", \"\\n\\n\\n\"]");
    if (rc == 0)
        rc = qvl_chat(m, "[{\"role\":\"user\",\"content\":[{\"type\":\"image\"},{\"type\":\"text\",\"text\":\"What e\\u0301 is\"},{\"type\":\"image\"}]}]", media, o, NULL,
                      NULL, &text);
    if (rc == 0) snprintf(out, 256, "%s", text);
    qvl_free(text);
    qvl_free(bytes);
    qvl_embedding_free(again);
    qvl_embedding_free(e);
    qvl_media_free(media);
    qvl_image_free(im);
    qvl_options_free(o);
    qvl_options_free(lo);
    qvl_model_free(m);
    return rc;
}

static void every_allocation(void **state) {
    (void)state;
    const qvl_allocator bad = {sizeof bad, NULL, bad_malloc, bad_realloc, bad_free};
    OK(qvl_set_allocator(&bad));
    char right[256], text[256];
    long big = 1L << 40;
    atomic_store(&countdown, big);
    OK(whole_way(right));
    long total = big - atomic_load(&countdown);
    assert_int_equal(atomic_load(&alive), 0);
    const char *s = getenv("QVL_TEST_OOM_STEP");
    long step = s ? atol(s) : total / 400 + 1, tried = 0;
    for (long k = 0; k < total; k += k < 100 ? 1 : step, tried++) {
        atomic_store(&failures, 0);
        atomic_store(&countdown, k);
        int rc = whole_way(text);
        if (rc != QVL_ENOMEM && (rc != 0 || strcmp(text, right) != 0))
            fail_msg("allocation %ld of %ld failed: got %s (%s), text \"%s\"", k, total, qvl_error_name(rc), qvl_last_error(), rc ? "" : text);
        if (atomic_load(&alive) != 0) fail_msg("allocation %ld of %ld failed: %ld blocks leaked", k, total, atomic_load(&alive));
    }
    atomic_store(&countdown, big);
    OK(whole_way(text));
    assert_string_equal(text, right);
    OK(qvl_set_allocator(NULL)); /* refused if a handle were left */
    print_message("%ld of %ld allocations made to fail\n", tried, total);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_allocation)};
    return cmocka_run_group_tests_name("oom", tests, NULL, NULL);
}
