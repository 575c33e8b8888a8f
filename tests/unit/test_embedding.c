/* test_embedding.c - embeddings as handles and as bytes: round trip, damage, other weights, impossible sizes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
/* cmocka.h needs the four above */
#include <cmocka.h>

#include "../../libqvl/encode/encode.h"

enum { HEADER = 8 + 8 * 4 + 64, SUM = 32 };
static const uint8_t id[32] = "weights";

static qvl_embedding *make(int layers, int t, int h, int w, int hidden) {
    qvl_embedding *e;
    assert_int_equal(qvl__embedding_alloc(&e, layers, t * h * w / 4, hidden), 0);
    e->t = t;
    e->h = h;
    e->w = w;
    e->video = t > 1;
    memcpy(e->weights_id, id, 32);
    for (int i = 0; i < 32; i++) e->hash[i] = (uint8_t)(100 + i);
    for (int i = 0; i < layers * e->tokens * hidden; i++) e->data[i] = (float)i * 0.37f - 5;
    return e;
}

static void round_trip(void **state) {
    (void)state;
    for (int t = 1; t < 4; t++) {
        qvl_embedding *e = make(1 + t, t, 4, 6, 5), *back;
        void *bytes, *again;
        size_t n, m;
        assert_int_equal(qvl_embedding_to_bytes(e, &bytes, &n), 0);
        assert_int_equal(n, HEADER + (1 + t) * t * 6 * 5 * 4 + SUM);
        assert_memory_equal(bytes, "QVLEMBED\1\0\0\0", 12); /* the format is fixed: caches keep it */
        assert_int_equal(qvl__embedding_from_bytes(&back, id, bytes, n), 0);
        assert_true(back->layers == 1 + t && back->tokens == t * 6 && back->hidden == 5);
        assert_true(back->t == t && back->h == 4 && back->w == 6 && back->video == (t > 1));
        assert_memory_equal(back->hash, e->hash, 32);
        assert_memory_equal(back->weights_id, id, 32);
        assert_memory_equal(back->data, e->data, n - HEADER - SUM);
        assert_int_equal(qvl_embedding_to_bytes(back, &again, &m), 0);
        assert_true(n == m);
        assert_memory_equal(bytes, again, n);
        qvl_free(bytes);
        qvl_free(again);
        qvl_embedding_free(e);
        qvl_embedding_free(back);
    }
}

static void damage_is_refused(void **state) {
    (void)state;
    qvl_embedding *e = make(2, 1, 2, 4, 3), *back;
    void *bytes;
    size_t n;
    assert_int_equal(qvl_embedding_to_bytes(e, &bytes, &n), 0);
    uint8_t *b = bytes;
    for (size_t i = 0; i < n; i++) /* any one bit */
        for (int bit = 0; bit < 8; bit++) {
            b[i] ^= (uint8_t)(1 << bit);
            assert_int_equal(qvl__embedding_from_bytes(&back, id, b, n), QVL_EFORMAT);
            assert_null(back);
            b[i] ^= (uint8_t)(1 << bit);
        }
    for (size_t i = 0; i < n; i++) { /* any length but the right one, in memory that ends there */
        uint8_t *cut = test_malloc(i + 1);
        memcpy(cut, b, i);
        assert_int_equal(qvl__embedding_from_bytes(&back, id, cut, i), QVL_EFORMAT);
        test_free(cut);
    }
    uint8_t *longer = test_calloc(1, n + 4);
    memcpy(longer, b, n);
    assert_int_equal(qvl__embedding_from_bytes(&back, id, longer, n + 4), QVL_EFORMAT);
    test_free(longer);
    uint8_t other[32] = "another model";
    assert_int_equal(qvl__embedding_from_bytes(&back, other, b, n), QVL_EFORMAT);
    assert_non_null(strstr(qvl_last_error(), "other weights"));
    assert_int_equal(qvl__embedding_from_bytes(&back, id, NULL, 0), QVL_EFORMAT);
    qvl_free(bytes);
    qvl_embedding_free(e);
}

/* Headers with a right checksum and wrong numbers: nothing is allocated on their word. */
static void sizes_are_checked(void **state) {
    (void)state;
    qvl_embedding *e = make(2, 1, 2, 4, 3), *back;
    void *bytes;
    size_t n;
    assert_int_equal(qvl_embedding_to_bytes(e, &bytes, &n), 0);
    static const struct {
        int field;
        uint32_t value;
    } wrong[] = {{0, 2}, {0, 0}, {1, 2}, {1, 0x80000001}, {2, 0}, {2, 1}, {2, 0x7fffffff}, {2, 0x80000002}, {3, 0}, {3, 1}, {3, 3},
                 {3, 0x7fffffff}, {4, 0}, {4, 0xffffffff}, {4, 0x40000003}, {5, 0}, {5, 2}, {5, 0x7fffffff}, {6, 3}, {6, 0x7fffffff},
                 {7, 0}, {7, 0xffffffff}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        uint8_t *b = test_malloc(n);
        memcpy(b, bytes, n);
        memcpy(b + 8 + 4 * wrong[i].field, &wrong[i].value, 4);
        qvl__sha256 s;
        qvl__sha256_init(&s);
        qvl__sha256_add(&s, b, n - SUM);
        qvl__sha256_end(&s, b + n - SUM);
        if (qvl__embedding_from_bytes(&back, id, b, n) != QVL_EFORMAT)
            fail_msg("field %d = %u was taken", wrong[i].field, wrong[i].value);
        test_free(b);
    }
    const int sizes[][3] = {{0, 1, 1},  {1, 0, 1}, {1, 1, 0}, {-1, 1, 1}, {0x7fffffff, 0x40000000, 8},
                            {0x7fffffff, 0x7fffffff, 0x7fffffff}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        assert_int_equal(qvl__embedding_alloc(&back, sizes[i][0], sizes[i][1], sizes[i][2]), QVL_EINVAL);
        assert_null(back);
    }
    qvl_free(bytes);
    qvl_embedding_free(e);
}

static void handles(void **state) {
    (void)state;
    qvl_embedding *e = make(3, 1, 2, 2, 4);
    const float *data;
    int layers, tokens, hidden;
    void *bytes;
    size_t n;
    assert_int_equal(qvl_embedding_data(e, &data, &layers, &tokens, &hidden), 0);
    assert_true(data == e->data && layers == 3 && tokens == 1 && hidden == 4);
    assert_int_equal(qvl_embedding_data(e, NULL, NULL, NULL, NULL), 0);
    assert_int_equal(qvl_embedding_data(NULL, &data, NULL, NULL, NULL), QVL_EINVAL);
    assert_int_equal(qvl_embedding_to_bytes(NULL, &bytes, &n), QVL_EINVAL);
    assert_int_equal(qvl_embedding_to_bytes(e, NULL, &n), QVL_EINVAL);
    assert_int_equal(qvl_embedding_to_bytes(e, &bytes, NULL), QVL_EINVAL);
    assert_int_equal(qvl_set_allocator(NULL), QVL_EBUSY); /* an embedding is a handle */
    assert_ptr_equal(qvl__embedding_ref(e), e);
    qvl_embedding_free(e);
    assert_int_equal(e->refs, 1);
    qvl_embedding_free(e);
    qvl_embedding_free(NULL);
    assert_int_equal(qvl_set_allocator(NULL), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(round_trip),
        cmocka_unit_test(damage_is_refused),
        cmocka_unit_test(sizes_are_checked),
        cmocka_unit_test(handles),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
