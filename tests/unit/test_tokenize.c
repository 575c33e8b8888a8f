/* test_tokenize.c - the tokenizer against transformers' ids, and against itself: forms of files, spans, broken text,
 * hostile texts in bounded time, failing allocations, threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>
#include <utf8proc.h>

#include "../../libqvl/encode/bpe.h"
#include "../../libqvl/encode/unicode.h"
#include "golden.h"

static qvl_tokenizer *small, *real;

/* ---- goldens ---- */

static void check_ids(const qvl_tokenizer *t, const json_t *c, const char *key, int parse_special) {
    size_t len, n = 0, want_n;
    const char *text = golden_text(c, "text", &len);
    int32_t *ids = NULL, *want;
    assert_int_equal(qvl_tokenize(t, text, len, parse_special, &ids, &n), 0);
    want_n = golden_ids(c, key, &want);
    if (n != want_n || memcmp(ids, want, n * sizeof *ids) != 0) {
        fprintf(stderr, "%s of \"%s\":\n want", key, text);
        for (size_t i = 0; i < want_n; i++) fprintf(stderr, " %d", want[i]);
        fprintf(stderr, "\n  got");
        for (size_t i = 0; i < n; i++) fprintf(stderr, " %d", ids[i]);
        fail_msg("\n");
    }
    qvl_free(ids);
    free(want);
}

static void check_text(const qvl_tokenizer *t, const json_t *c, const char *key, int skip_special) {
    int32_t *ids;
    char *text;
    size_t len, want_len, n = golden_ids(c, "ids", &ids);
    const char *want = golden_text(c, key, &want_len);
    assert_int_equal(qvl_detokenize(t, ids, n, skip_special, &text, &len), 0);
    assert_int_equal(len, want_len);
    assert_memory_equal(text, want, len + 1);
    qvl_free(text);
    free(ids);
}

/* What is left out of a case is the same as what it has. */
static void check_cases(const qvl_tokenizer *t, const char *path, size_t count) {
    json_t *cases = golden_lines(path), *c;
    size_t i;
    json_array_foreach(cases, i, c) {
        check_ids(t, c, "ids", 1);
        check_ids(t, c, json_object_get(c, "ids_plain") ? "ids_plain" : "ids", 0);
        check_text(t, c, "decoded", 0);
        check_text(t, c, json_object_get(c, "decoded_skip_special") ? "decoded_skip_special" : "decoded", 1);
    }
    assert_int_equal(i, count);
    json_decref(cases);
}

static void small_cases(void **state) { (void)state, check_cases(small, "tests/golden/tokenizer/small_cases.jsonl", 100); }
static void real_cases(void **state) { (void)state, check_cases(real, "tests/golden/tokenizer/real_cases.jsonl", 600); }

static void check_decode(const qvl_tokenizer *t, const char *path, size_t count) {
    json_t *cases = golden_lines(path), *c;
    size_t i;
    json_array_foreach(cases, i, c) {
        int32_t *ids;
        size_t n = golden_ids(c, "ids", &ids), want_n, len;
        const char *want = golden_text(c, "bytes_hex", &want_n);
        qvl__buf hex = {0};
        qvl__buf_puts(&hex, "");
        for (size_t k = 0; k < n; k++) {
            const char *bytes = qvl__token_bytes(t, ids[k], &len);
            for (size_t j = 0; j < len; j++) qvl__buf_printf(&hex, "%02x", (uint8_t)bytes[j]);
        }
        assert_string_equal(hex.data, want);
        qvl__buf_free(&hex);
        free(ids);
        check_text(t, c, "decoded", 0);
        check_text(t, c, "decoded_skip_special", 1);
    }
    assert_int_equal(i, count);
    json_decref(cases);
}

static void small_decode(void **state) { (void)state, check_decode(small, "tests/golden/tokenizer/small_decode.jsonl", 50); }
static void real_decode(void **state) { (void)state, check_decode(real, "tests/golden/tokenizer/real_decode.jsonl", 150); }

/* ---- merging against the definition ---- */

/* BPE as its definition says, over the merges of the file, on printable spelling: ASCII letters only, which are spelled
 * as they are. Quadratic. */
static size_t merge_by_definition(json_t *rank_of, json_t *vocab, const char *word, size_t n, int32_t *ids) {
    char **part = malloc(n * sizeof *part);
    for (size_t i = 0; i < n; i++) part[i] = strndup(word + i, 1);
    for (;;) {
        json_int_t best = -1;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            char key[1024];
            snprintf(key, sizeof key, "%s %s", part[i], part[i + 1]);
            const json_t *rank = json_object_get(rank_of, key);
            if (rank && (best < 0 || json_integer_value(rank) < best)) best = json_integer_value(rank), at = i;
        }
        if (best < 0) break;
        char *joined;
        assert_true(asprintf(&joined, "%s%s", part[at], part[at + 1]) > 0);
        free(part[at]);
        free(part[at + 1]);
        part[at] = joined;
        memmove(part + at + 1, part + at + 2, (--n - at - 1) * sizeof *part);
    }
    for (size_t i = 0; i < n; i++) {
        ids[i] = (int32_t)json_integer_value(json_object_get(vocab, part[i]));
        free(part[i]);
    }
    free(part);
    return n;
}

static void words_merge_by_definition(void **state) {
    (void)state;
    json_t *root = golden_json(SMALL_TOKENIZER "/tokenizer.json"), *model = json_object_get(root, "model"), *m,
           *rank_of = json_object();
    size_t i;
    json_array_foreach(json_object_get(model, "merges"), i, m) {
        char key[1024];
        snprintf(key, sizeof key, "%s %s", json_string_value(json_array_get(m, 0)), json_string_value(json_array_get(m, 1)));
        json_object_set_new(rank_of, key, json_integer((json_int_t)i));
    }
    uint64_t seed = 1;
    for (int round = 0; round < 1500; round++) { /* on both sides of bpe.c's SHORT_WORD */
        char word[300];
        int32_t want[300], *ids;
        size_t len = round < 1200 ? 1 + golden_random(&seed) % 60 : 61 + golden_random(&seed) % 239, n, want_n;
        uint32_t letters = round % 3 == 0 ? 2 : round % 3 == 1 ? 6 : 26; /* few letters make many equal pairs */
        for (size_t k = 0; k < len; k++) word[k] = "etaoinshrdlucmfwypvbgkjqxz"[golden_random(&seed) % letters];
        want_n = merge_by_definition(rank_of, json_object_get(model, "vocab"), word, len, want);
        assert_int_equal(qvl_tokenize(small, word, len, 0, &ids, &n), 0);
        assert_int_equal(n, want_n);
        assert_memory_equal(ids, want, n * sizeof *ids);
        qvl_free(ids);
    }
    json_decref(rank_of);
    json_decref(root);
}

/* ---- spans ---- */

static void expect_spans(const char *text, const qvl__span *spans, size_t n_spans, const int32_t *want, size_t want_n) {
    int32_t *ids;
    size_t n;
    assert_int_equal(qvl__tokenize_spans(small, text, strlen(text), spans, n_spans, &ids, &n), 0);
    assert_int_equal(n, want_n);
    assert_memory_equal(ids, want, n * sizeof *ids);
    qvl_free(ids);
}

/* plain(a) + added + plain(b) as ids. */
static size_t compose_with(const qvl_tokenizer *t, const char *a, const char *added, const char *b, int32_t *out) {
    int32_t *ids;
    size_t n, k = 0;
    assert_int_equal(qvl_tokenize(t, a, strlen(a), 0, &ids, &n), 0);
    memcpy(out, ids, n * sizeof *ids);
    k += n;
    qvl_free(ids);
    if (added) out[k++] = qvl__token_id(t, added);
    assert_int_equal(qvl_tokenize(t, b, strlen(b), 0, &ids, &n), 0);
    memcpy(out + k, ids, n * sizeof *ids);
    qvl_free(ids);
    return k + n;
}

static size_t compose(const char *a, const char *added, const char *b, int32_t *out) {
    return compose_with(small, a, added, b, out);
}

static void spans_bound_added_tokens(void **state) {
    (void)state;
    int32_t want[64];
    size_t n;
    assert_int_equal(qvl__token_id(small, "<|im_end|>"), 4072);
    assert_int_equal(qvl__token_id(small, "<|im_end|"), -1);
    assert_int_equal(qvl__token_id(small, "<|im_end|>x"), -1);
    assert_int_equal(qvl__token_id(small, ""), -1);

    const char *twice = "<|im_end|><|im_end|>"; /* 10 bytes each */
    n = compose("", "<|im_end|>", "<|im_end|>", want);
    expect_spans(twice, (qvl__span[]){{0, 10}}, 1, want, n);
    n = compose("<|im_end|>", "<|im_end|>", "", want);
    expect_spans(twice, (qvl__span[]){{10, 20}}, 1, want, n);
    expect_spans(twice, (qvl__span[]){{0, 9}, {10, 20}}, 2, want, n);  /* one byte short */
    expect_spans(twice, (qvl__span[]){{1, 10}, {10, 20}}, 2, want, n); /* one byte late */
    expect_spans(twice, (qvl__span[]){{0, 5}, {5, 9}, {9, 20}}, 3, want, n); /* no token across borders */
    n = compose(twice, NULL, "", want);
    expect_spans(twice, NULL, 0, want, n);
    expect_spans(twice, (qvl__span[]){{3, 17}}, 1, want, n);

    /* Text on both sides of a border is one piece: the accent joins its letter, the letters make one word. */
    const char *cafe = "the cafe\xCC\x81s", *whole = "the caf\xC3\xA9s";
    n = compose(whole, NULL, "", want);
    expect_spans(cafe, (qvl__span[]){{0, 8}}, 1, want, n);
    expect_spans(cafe, (qvl__span[]){{0, 2}, {5, 8}, {8, 9}}, 3, want, n);

    int32_t *ids;
    assert_int_equal(qvl__tokenize_spans(small, twice, 20, (qvl__span[]){{0, 21}}, 1, &ids, &n), QVL_EINTERNAL);
    assert_int_equal(qvl__tokenize_spans(small, twice, 20, (qvl__span[]){{5, 9}, {8, 10}}, 2, &ids, &n), QVL_EINTERNAL);
    assert_int_equal(qvl__tokenize_spans(small, twice, 20, (qvl__span[]){{5, 4}}, 1, &ids, &n), QVL_EINTERNAL);
}

/* ---- the pattern where goldens do not tell ---- */

static void words_end_where_the_pattern_says(void **state) {
    (void)state;
    static const char *const pairs[][2] = {
        {"'Re", "row"}, {"'re", "row"}, {"'S", "L"}, {"'\xC5\xBF", "Lines"}, {"'LL", "Ls"}, /* (?i:...) comes before letters */
        {"7", "7"}, {"\xD9\xA3", "\xD9\xA3"},                                          /* one digit at a time */
        {" \t", " word"}, {"a\n\n", "b"}, {"x", "\n  \n"}, {" ...\n\n", "  y"},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        char text[64];
        int32_t want[64], *ids;
        size_t n, want_n = compose_with(real, pairs[i][0], NULL, pairs[i][1], want);
        snprintf(text, sizeof text, "%s%s", pairs[i][0], pairs[i][1]);
        assert_int_equal(qvl_tokenize(real, text, strlen(text), 0, &ids, &n), 0);
        if (n != want_n || memcmp(ids, want, n * sizeof *ids) != 0)
            fail_msg("\"%s\" is not cut before \"%s\"", text, pairs[i][1]);
        qvl_free(ids);
    }
}

/* ---- broken UTF-8 and NFC ---- */

static void broken_text_is_replaced(void **state) {
    (void)state;
    static const struct {
        const char *bytes, *clean;
    } cases[] = {
        {"a\xFFz", "a\xEF\xBF\xBDz"},
        {"\xE2\x82", "\xEF\xBF\xBD"},                                     /* cut off: one */
        {"\xE2\x82z", "\xEF\xBF\xBDz"},
        {"\xE0\x80\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},         /* overlong: three */
        {"\xED\xA0\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},         /* surrogate */
        {"\xF4\x90\x80\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"}, /* above U+10FFFF */
        {"\xF0\x9F\x98\xE2\x82\xAC", "\xEF\xBF\xBD\xE2\x82\xAC"},
        {"\xC0\xAF\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},
        {"e\xCC\x81\xFF", "\xC3\xA9\xEF\xBF\xBD"},                        /* and normalized */
        {"\xF0\x9F\x98<|im_end|>\x98", "\xEF\xBF\xBD<|im_end|>\xEF\xBF\xBD"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t *a, *b;
        size_t n, m;
        assert_int_equal(qvl_tokenize(real, cases[i].bytes, strlen(cases[i].bytes), 1, &a, &n), 0);
        assert_int_equal(qvl_tokenize(real, cases[i].clean, strlen(cases[i].clean), 1, &b, &m), 0);
        assert_int_equal(n, m);
        assert_memory_equal(a, b, n * sizeof *a);
        qvl_free(a);
        qvl_free(b);
    }
    int32_t *ids;
    size_t n = 1;
    assert_int_equal(qvl_tokenize(real, NULL, 0, 1, &ids, &n), 0);
    assert_int_equal(n, 0);
    qvl_free(ids);
}

static void expect_nfc(const int32_t *cp, size_t n) {
    uint8_t text[512];
    size_t len = 0;
    for (size_t i = 0; i < n; i++) len += (size_t)utf8proc_encode_char(cp[i], text + len);
    qvl__buf out = {0};
    qvl__utf8_clean(&out, (const char *)text, len, true);
    uint8_t *want;
    utf8proc_ssize_t want_n = utf8proc_map(text, (utf8proc_ssize_t)len, &want, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    assert_true(want_n >= 0);
    if (out.len != (size_t)want_n || memcmp(out.data, want, out.len) != 0)
        fail_msg("NFC of text with U+%04X U+%04X", cp[0], cp[n / 2]);
    free(want);
    qvl__buf_free(&out);
}

static void nfc_equals_utf8proc(void **state) {
    (void)state;
    /* Every character among others that it could join, before and after. */
    for (int32_t c = 0; c < 0x110000; c++) {
        if (c >= 0xD800 && c < 0xE000) continue;
        const int32_t around[] = {'A', c, 0x3042, c, 0x1100, c, c, 0xAC00, c};
        const int32_t marked[] = {c, 0x0301, 0x0316, c, 0x0307};
        /* Letters that skip normalization unless c does not: a mark must not be taken for one of them. */
        const int32_t skipped[] = {'A', c, 0x304B, c, 0xAC00, c, 0x0415, c, 0x03B1, c};
        expect_nfc(around, 9);
        expect_nfc(marked, 5);
        expect_nfc(skipped, 10);
    }
    /* Runs of marks in every order, long enough for the merge sort. */
    static const int32_t marks[] = {0x0301,  0x0316, 0x0323, 0x0307, 0x0345, 0x05B0, 0x3099, 0x0F71,
                                    0x1D165, 0x0344, 0x0041, 0x00E9, 0x1161, 0x1100, 0x11A8, 0x0958};
    uint64_t seed = 2;
    for (int round = 0; round < 5000; round++) {
        int32_t cp[100];
        size_t n = 1 + golden_random(&seed) % 100, kinds = 1 + golden_random(&seed) % 16;
        for (size_t i = 0; i < n; i++) cp[i] = marks[golden_random(&seed) % kinds];
        expect_nfc(cp, n);
    }
}

/* ---- forms of files ---- */

static char scratch[] = "build/test_tokenize.XXXXXX";

static void write_json(const char *name, const json_t *v) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", scratch, name);
    assert_int_equal(json_dump_file(v, path, 0), 0);
}

static void remove_file(const char *name) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", scratch, name);
    unlink(path);
}

static void copy_small(const char *name) {
    char command[256];
    snprintf(command, sizeof command, "cp " SMALL_TOKENIZER "/%s %s/", name, scratch);
    assert_int_equal(system(command), 0);
}

/* scratch's tokenizer gives the small one's ids. */
static void expect_same(void) {
    qvl_tokenizer *t = golden_tokenizer(scratch);
    check_cases(t, "tests/golden/tokenizer/small_cases.jsonl", 100);
    qvl_tokenizer_free(t);
}

static void merges_as_strings(void **state) {
    (void)state;
    json_t *root = golden_json(SMALL_TOKENIZER "/tokenizer.json"), *model = json_object_get(root, "model"), *lines = json_array(),
           *m;
    size_t i;
    json_array_foreach(json_object_get(model, "merges"), i, m) {
        const char *left = json_string_value(json_array_get(m, 0)), *right = json_string_value(json_array_get(m, 1));
        json_array_append_new(lines, json_sprintf("%s %s", left, right));
    }
    json_object_set_new(model, "merges", lines);
    write_json("tokenizer.json", root);
    expect_same();
    remove_file("tokenizer.json");
    json_decref(root);
}

static void vocab_and_merges(void **state) {
    (void)state;
    copy_small("vocab.json");
    copy_small("merges.txt");
    copy_small("tokenizer_config.json");
    expect_same();
    qvl_tokenizer *t;
    remove_file("tokenizer_config.json");
    assert_int_equal(qvl_tokenizer_load(&t, scratch), QVL_EIO);
    assert_non_null(strstr(qvl_last_error(), "tokenizer_config.json"));
    assert_null(t);
    json_t *config = golden_json(SMALL_TOKENIZER "/tokenizer_config.json");
    json_object_set_new(config, "tokenizer_class", json_string("LlamaTokenizer"));
    write_json("tokenizer_config.json", config);
    assert_int_equal(qvl_tokenizer_load(&t, scratch), QVL_EUNSUPPORTED);
    assert_non_null(strstr(qvl_last_error(), "LlamaTokenizer"));
    json_decref(config);
    remove_file("vocab.json");
    remove_file("merges.txt");
    remove_file("tokenizer_config.json");
    assert_int_equal(qvl_tokenizer_load(&t, scratch), QVL_EIO);
    assert_int_equal(qvl_tokenizer_load(&t, "tests/golden/none"), QVL_EIO);
}

/* The value at "a.b.0.c" becomes json (NULL: is removed). */
static void put_at(json_t *root, const char *path, const char *json) {
    char parts[128], *save = NULL, *key, *next;
    snprintf(parts, sizeof parts, "%s", path);
    key = strtok_r(parts, ".", &save);
    while ((next = strtok_r(NULL, ".", &save))) {
        root = json_is_array(root) ? json_array_get(root, (size_t)atoi(key)) : json_object_get(root, key);
        assert_non_null(root);
        key = next;
    }
    json_t *v = json ? json_loads(json, JSON_DECODE_ANY, NULL) : NULL;
    assert_true(v || !json);
    if (json_is_array(root)) assert_int_equal(json_array_set_new(root, (size_t)atoi(key), v), 0);
    else if (v) assert_int_equal(json_object_set_new(root, key, v), 0);
    else assert_int_equal(json_object_del(root, key), 0);
}

static void unknown_kinds_are_refused(void **state) {
    (void)state;
    static const struct {
        const char *path, *json;
        int code;
        const char *message;
    } cases[] = {
        {"model.type", "\"WordPiece\"", QVL_EUNSUPPORTED, "model.type is \"WordPiece\""},
        {"model.type", NULL, QVL_EUNSUPPORTED, "model.type"},
        {"model", NULL, QVL_EUNSUPPORTED, "model.type"},
        {"model.byte_fallback", "true", QVL_EUNSUPPORTED, "byte_fallback"},
        {"model.ignore_merges", "true", QVL_EUNSUPPORTED, "ignore_merges"},
        {"model.fuse_unk", "true", QVL_EUNSUPPORTED, "fuse_unk"},
        {"model.dropout", "0.1", QVL_EUNSUPPORTED, "dropout"},
        {"model.unk_token", "\"<unk>\"", QVL_EUNSUPPORTED, "unk_token"},
        {"model.continuing_subword_prefix", "\"##\"", QVL_EUNSUPPORTED, "continuing_subword_prefix"},
        {"model.end_of_word_suffix", "\"</w>\"", QVL_EUNSUPPORTED, "end_of_word_suffix"},
        {"normalizer", "{\"type\": \"NFKC\"}", QVL_EUNSUPPORTED, "NFKC"},
        {"normalizer", "7", QVL_EUNSUPPORTED, "normalizer"},
        {"pre_tokenizer", "null", QVL_EUNSUPPORTED, "pre_tokenizer"},
        {"pre_tokenizer.type", "\"Whitespace\"", QVL_EUNSUPPORTED, "Whitespace"},
        {"pre_tokenizer.pretokenizers", "[]", QVL_EUNSUPPORTED, "pre_tokenizer"},
        {"pre_tokenizer.pretokenizers.0.pattern.Regex", "\"\\\\w+\"", QVL_EUNSUPPORTED, "\\w+"},
        {"pre_tokenizer.pretokenizers.0.pattern", "{\"String\": \" \"}", QVL_EUNSUPPORTED, "pattern"},
        {"pre_tokenizer.pretokenizers.0.behavior", "\"Removed\"", QVL_EUNSUPPORTED, "Isolated"},
        {"pre_tokenizer.pretokenizers.0.invert", "true", QVL_EUNSUPPORTED, "invert"},
        {"pre_tokenizer.pretokenizers.1.type", "\"Digits\"", QVL_EUNSUPPORTED, "Digits"},
        {"pre_tokenizer.pretokenizers.1.add_prefix_space", "true", QVL_EUNSUPPORTED, "add_prefix_space"},
        {"pre_tokenizer.pretokenizers.1.use_regex", "true", QVL_EUNSUPPORTED, "use_regex"},
        {"post_processor", "{\"type\": \"TemplateProcessing\"}", QVL_EUNSUPPORTED, "TemplateProcessing"},
        {"decoder", "{\"type\": \"Metaspace\"}", QVL_EUNSUPPORTED, "Metaspace"},
        {"decoder", "null", QVL_EUNSUPPORTED, "decoder"},
        {"added_tokens.3.lstrip", "true", QVL_EUNSUPPORTED, "lstrip"},
        {"added_tokens.3.rstrip", "true", QVL_EUNSUPPORTED, "rstrip"},
        {"added_tokens.3.single_word", "true", QVL_EUNSUPPORTED, "single_word"},
        {"added_tokens.3.normalized", "true", QVL_EUNSUPPORTED, "normalized"},
        {"added_tokens.3.id", "4072", QVL_EFORMAT, "4072"},
        {"added_tokens.3.id", "17", QVL_EFORMAT, "17"},
        {"added_tokens.3.id", "-1", QVL_EFORMAT, "-1"},
        {"added_tokens.3.id", "1e3", QVL_EFORMAT, "added_tokens[3].id"},
        {"added_tokens.3.id", "99999999999", QVL_EFORMAT, "99999999999"},
        {"added_tokens.3.content", "\"<|im_end|>\"", QVL_EFORMAT, "<|im_end|>"},
        {"added_tokens.3.content", "\"\"", QVL_EFORMAT, "content"},
        {"added_tokens", "{}", QVL_EFORMAT, "added_tokens"},
        {"model.vocab", "{}", QVL_EFORMAT, "vocabulary"},
        {"model.vocab", "[]", QVL_EFORMAT, "vocabulary"},
        {"model.vocab.the", "\"x\"", QVL_EFORMAT, "the"},
        {"model.vocab.the", "0", QVL_EFORMAT, "have the same id 0"},
        {"model.vocab.the", "-5", QVL_EFORMAT, "-5"},
        {"model.vocab.!", NULL, QVL_EUNSUPPORTED, "0x21"},
        {"model.merges", "null", QVL_EFORMAT, "merges"},
        {"model.merges.5", "[\"a\"]", QVL_EFORMAT, "merge 5"},
        {"model.merges.5", "7", QVL_EFORMAT, "merge 5"},
        {"model.merges.5", "\"ab\"", QVL_EFORMAT, "merge 5"},
        {"model.merges.5", "\" ab\"", QVL_EFORMAT, "merge 5"},
        {"model.merges.5", "[\"\", \"a\"]", QVL_EFORMAT, "merge 5"},
        {"model.merges.5", "[\"qqqq\", \"a\"]", QVL_EFORMAT, "the first is not in the vocabulary"},
        {"model.merges.5", "[\"a\", \"qqqq\"]", QVL_EFORMAT, "the second is not in the vocabulary"},
        {"model.merges.5", "[\"q\", \"z\"]", QVL_EFORMAT, "the whole is not in the vocabulary"},
    };
    json_t *root = golden_json(SMALL_TOKENIZER "/tokenizer.json");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *changed = json_deep_copy(root);
        put_at(changed, cases[i].path, cases[i].json);
        write_json("tokenizer.json", changed);
        qvl_tokenizer *t;
        int rc = qvl_tokenizer_load(&t, scratch);
        if (rc != cases[i].code || !strstr(qvl_last_error(), cases[i].message))
            fail_msg("%s = %s gave %s: %s", cases[i].path, cases[i].json ? cases[i].json : "(removed)", qvl_error_name(rc),
                     qvl_last_error());
        if (rc == 0) qvl_tokenizer_free(t);
        assert_null(t);
        json_decref(changed);
    }
    /* What transformers replaces or ignores is no reason to refuse; what the class does without is fine. */
    put_at(root, "truncation", "{\"max_length\": 3}");
    put_at(root, "post_processor", "null");
    put_at(root, "model.continuing_subword_prefix", "null");
    write_json("tokenizer.json", root);
    expect_same();
    json_decref(root);
    remove_file("tokenizer.json");
}

static void holes_and_no_nfc(void **state) {
    (void)state;
    json_t *root = golden_json(SMALL_TOKENIZER "/tokenizer.json");
    put_at(root, "normalizer", "null");
    put_at(root, "added_tokens.25.id", "5000");
    write_json("tokenizer.json", root);
    qvl_tokenizer *t = golden_tokenizer(scratch);
    assert_int_equal(qvl__token_limit(t), 5001);
    int32_t *ids, hole = 4500;
    size_t n, len;
    char *text;
    assert_int_equal(qvl_tokenize(t, "e\xCC\x81", 3, 1, &ids, &n), 0);
    assert_int_equal(qvl_detokenize(t, ids, n, 0, &text, &len), 0);
    assert_string_equal(text, "e\xCC\x81");
    qvl_free(ids);
    qvl_free(text);
    assert_null(qvl__token_bytes(t, hole, &len));
    assert_int_equal(qvl_detokenize(t, &hole, 1, 0, &text, &len), QVL_EINVAL);
    assert_non_null(strstr(qvl_last_error(), "4500"));
    qvl_tokenizer_free(t);
    json_decref(root);
    remove_file("tokenizer.json");
}

static void longest_added_token_wins(void **state) {
    (void)state;
    json_t *root = golden_json(SMALL_TOKENIZER "/tokenizer.json");
    put_at(root, "added_tokens.0.content", "\"<a>\"");
    put_at(root, "added_tokens.1.content", "\"<a><b>\"");
    put_at(root, "added_tokens.2.content", "\"<b><c>\"");
    put_at(root, "added_tokens.3.content", "\"<a><b><c><d>\"");
    write_json("tokenizer.json", root);
    qvl_tokenizer *t = golden_tokenizer(scratch);
    static const struct {
        const char *text;
        int32_t ids[3];
        size_t n;
    } cases[] = {
        {"<a>", {4070}, 1},
        {"<a><b>", {4071}, 1},
        {"<a><b><c><d>", {4073}, 1},
        {"<a><a><b><c><d>", {4070, 4073}, 2},
        {"<a><b><a>", {4071, 4070}, 2},
        {"<b><c><a>", {4072, 4070}, 2},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t *ids;
        size_t n;
        assert_int_equal(qvl_tokenize(t, cases[i].text, strlen(cases[i].text), 1, &ids, &n), 0);
        assert_int_equal(n, cases[i].n);
        assert_memory_equal(ids, cases[i].ids, n * sizeof *ids);
        qvl_free(ids);
    }
    int32_t *ids; /* leftmost-longest, not the best cover: <a><b> is taken, <c> is text */
    size_t n;
    assert_int_equal(qvl_tokenize(t, "<a><b><c>", 9, 1, &ids, &n), 0);
    assert_int_equal(ids[0], 4071);
    assert_true(n > 1 && ids[1] < 4070);
    qvl_free(ids);
    qvl_tokenizer_free(t);
    json_decref(root);
    remove_file("tokenizer.json");
}

/* A token that no merge makes is not made from its text either (ignore_merges is false). */
static void unreachable_token(void **state) {
    (void)state;
    json_t *root = golden_json(SMALL_TOKENIZER "/tokenizer.json");
    put_at(root, "model.vocab.qqqq", "4096");
    write_json("tokenizer.json", root);
    qvl_tokenizer *t = golden_tokenizer(scratch);
    int32_t *ids, q = 4096;
    size_t n, len;
    char *text;
    assert_int_equal(qvl_tokenize(t, "qqqq", 4, 1, &ids, &n), 0);
    for (size_t i = 0; i < n; i++) assert_int_not_equal(ids[i], 4096);
    assert_int_equal(qvl_detokenize(t, &q, 1, 0, &text, &len), 0);
    assert_string_equal(text, "qqqq");
    qvl_free(ids);
    qvl_free(text);
    qvl_tokenizer_free(t);
    json_decref(root);
    remove_file("tokenizer.json");
}

/* Cut short or with bytes changed: an error with a message, or a tokenizer that works; never a crash. */
static void damaged_files(void **state) {
    (void)state;
    char *whole, path[256];
    size_t size, refused = 0;
    assert_int_equal(qvl__read_file(SMALL_TOKENIZER "/tokenizer.json", 1 << 20, &whole, &size), 0);
    char *text = malloc(size);
    uint64_t seed = 7;
    for (int round = 0; round < 400; round++) {
        size_t n = round % 2 ? size : golden_random(&seed) % size;
        memcpy(text, whole, n);
        for (int k = 0; k < round % 5 && n; k++) {
            static const char likely[] = "\"\\[]{},:u0\xC4\xFF\n -e";
            size_t among = round % 3 || n < 8000 ? n : 8000, at = golden_random(&seed) % among; /* often near the head */
            text[at] = likely[golden_random(&seed) % (sizeof likely - 1)];
        }
        snprintf(path, sizeof path, "%s/tokenizer.json", scratch);
        FILE *f = fopen(path, "w");
        assert_non_null(f);
        assert_int_equal(fwrite(text, 1, n, f), n);
        fclose(f);
        qvl_tokenizer *t;
        int rc = qvl_tokenizer_load(&t, scratch);
        if (rc == 0) {
            int32_t *ids;
            assert_int_equal(qvl_tokenize(t, "a b <|im_end|>", 14, 1, &ids, &n), 0);
            qvl_free(ids);
            qvl_tokenizer_free(t);
        } else {
            assert_true(rc == QVL_EFORMAT || rc == QVL_EUNSUPPORTED);
            assert_non_null(strstr(qvl_last_error(), "tokenizer.json"));
            refused++;
        }
    }
    assert_true(refused > 250);
    free(text);
    qvl_free(whole);
    remove_file("tokenizer.json");
}

/* ---- arguments ---- */

static void wrong_arguments(void **state) {
    (void)state;
    qvl_tokenizer *t;
    int32_t *ids, id = -1;
    char *text;
    size_t n;
    assert_int_equal(qvl_tokenizer_load(NULL, scratch), QVL_EINVAL);
    assert_int_equal(qvl_tokenizer_load(&t, NULL), QVL_EINVAL);
    assert_int_equal(qvl_tokenize(NULL, "a", 1, 0, &ids, &n), QVL_EINVAL);
    assert_int_equal(qvl_tokenize(small, NULL, 1, 0, &ids, &n), QVL_EINVAL);
    assert_int_equal(qvl_tokenize(small, "a", 1, 0, NULL, &n), QVL_EINVAL);
    assert_int_equal(qvl_tokenize(small, "a", 1, 0, &ids, NULL), QVL_EINVAL);
    assert_int_equal(qvl_tokenize(small, "a", SIZE_MAX / 2, 0, &ids, &n), QVL_ELIMIT);
    assert_int_equal(qvl_detokenize(small, &id, 1, 0, &text, &n), QVL_EINVAL);
    id = 4096;
    assert_int_equal(qvl_detokenize(small, &id, 1, 0, &text, &n), QVL_EINVAL);
    assert_int_equal(qvl_detokenize(small, NULL, 1, 0, &text, &n), QVL_EINVAL);
    assert_int_equal(qvl_detokenize(small, NULL, 0, 0, &text, &n), 0);
    assert_string_equal(text, "");
    qvl_free(text);
    qvl_tokenizer_free(NULL);
}

/* ---- time ---- */

enum { MEGABYTE = 1 << 20 };

/* Two seconds of processor time for a megabyte: generous, yet quadratic work would take minutes. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { BOUND_MS = 20000 };
#else
enum { BOUND_MS = 2000 };
#endif

static double cpu_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static double time_of(const char *name, const char *text, size_t len) {
    int32_t *ids;
    size_t n;
    double start = cpu_ms();
    assert_int_equal(qvl_tokenize(real, text, len, 1, &ids, &n), 0);
    double ms = cpu_ms() - start;
    printf("  %-28s %8.1f ms %8.1f MB/s %9zu tokens %8.0f k tokens/s\n", name, ms, len / ms / 1e3, n, n / ms);
    qvl_free(ids);
    return ms;
}

/* A megabyte made of unit over and over. */
static char *repeat(const char *unit) {
    size_t n = strlen(unit);
    char *text = malloc(MEGABYTE + 8);
    for (size_t i = 0; i < MEGABYTE; i++) text[i] = unit[i % n];
    return text;
}

static void hostile_texts_take_bounded_time(void **state) {
    (void)state;
    static const struct {
        const char *name, *unit;
    } cases[] = {
        {"'a'", "a"},
        {"'ab'", "ab"},
        {"spaces", " "},
        {"space, newline", " \n"},
        {"newlines", "\n"},
        {"digits", "7"},
        {"exclamation marks", "!"},
        {"apostrophes", "'"},
        {"'<'", "<"},
        {"'<|im_'", "<|im_"},
        {"'<|im_end|>'", "<|im_end|>"},
        {"one ideograph", "\xE4\xB8\xAD"},
        {"broken bytes", "\xFF"},
        {"half characters", "\xE4\xB8"},
        {"NUL", "\x01"},
        {"Hangul jamo", "\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8"},
        {"combining marks", "\xCC\x81\xCC\x96"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *text = repeat(cases[i].unit);
        if (strcmp(cases[i].name, "NUL") == 0) memset(text, 0, MEGABYTE);
        assert_true(time_of(cases[i].name, text, MEGABYTE) < BOUND_MS);
        free(text);
    }
    uint64_t seed = 3;
    char *text = malloc(MEGABYTE);
    for (size_t i = 0; i < MEGABYTE; i++) text[i] = (char)('a' + golden_random(&seed) % 26);
    assert_true(time_of("random letters, one word", text, MEGABYTE) < BOUND_MS);
    for (size_t i = 0; i < MEGABYTE; i++) text[i] = (char)golden_random(&seed);
    assert_true(time_of("random bytes", text, MEGABYTE) < BOUND_MS);
    memset(text, ' ', MEGABYTE);
    text[MEGABYTE - 1] = 'x';
    assert_true(time_of("spaces and a letter", text, MEGABYTE) < BOUND_MS);
    for (size_t i = 0; i < MEGABYTE; i += 2)
        memcpy(text + i, i < MEGABYTE / 2 ? "\xCC\x81" : "\xCC\x96", 2); /* all to be put in order */
    assert_true(time_of("combining marks out of order", text, MEGABYTE) < BOUND_MS);
    free(text);
}

/* The texts of the golden cases, one after another, to a megabyte. */
static void mixed_text_speed(void **state) {
    (void)state;
    json_t *cases = golden_lines("tests/golden/tokenizer/real_cases.jsonl"), *c;
    char *text = malloc(MEGABYTE + (1 << 16));
    size_t at = 0, i;
    while (at < MEGABYTE)
        json_array_foreach(cases, i, c) {
            size_t n;
            const char *s = golden_text(c, "text", &n);
            if (at >= MEGABYTE || n >= 1 << 16) break;
            memcpy(text + at, s, n);
            at += n;
        }
    assert_true(time_of("golden texts (many scripts)", text, at) < BOUND_MS);
    free(text);
    json_decref(cases);
    text = repeat(
        "The quick brown fox, aged 12, doesn't jump over the lazy dog; it reads \"libqvl/encode/tokenize.c\" instead.\n");
    assert_true(time_of("English", text, MEGABYTE) < BOUND_MS);
    free(text);
    double start = cpu_ms();
    qvl_tokenizer *t = golden_tokenizer(REAL_TOKENIZER);
    double ms = cpu_ms() - start;
    printf("  load of the published tokenizer: %.0f ms\n", ms);
    assert_true(ms < BOUND_MS);
    qvl_tokenizer_free(t);
}

/* ---- threads ---- */

static void *tokenize_all(void *arg) {
    (void)arg;
    json_t *cases = golden_lines("tests/golden/tokenizer/small_cases.jsonl"), *c;
    size_t i, wrong = 0;
    json_array_foreach(cases, i, c) {
        size_t len, n, want_n;
        int32_t *ids, *want;
        const char *text = golden_text(c, "text", &len);
        want_n = golden_ids(c, "ids", &want);
        if (qvl_tokenize(small, text, len, 1, &ids, &n) < 0) golden_die("thread", qvl_last_error());
        wrong += n != want_n || memcmp(ids, want, n * sizeof *ids) != 0;
        qvl_free(ids);
        free(want);
    }
    json_decref(cases);
    return (void *)(uintptr_t)wrong;
}

static void threads_share_a_tokenizer(void **state) {
    (void)state;
    pthread_t th[4];
    for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&th[i], NULL, tokenize_all, NULL), 0);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(th[i], &wrong);
        assert_null(wrong);
    }
}

/* ---- failing allocations ---- */

static int allowed; /* allocations until one fails; after it all fail */
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

/* Loads, tokenizes, detokenizes; the first failure. */
static int whole_life(const char *dir, const char *text) {
    qvl_tokenizer *t;
    int32_t *ids;
    size_t n, len;
    char *back;
    int rc = qvl_tokenizer_load(&t, dir);
    if (rc < 0) return rc;
    rc = qvl_tokenize(t, text, strlen(text), 1, &ids, &n);
    if (rc == 0) {
        rc = qvl_detokenize(t, ids, n, 0, &back, &len);
        if (rc == 0) qvl_free(back);
        qvl_free(ids);
    }
    qvl_tokenizer_free(t);
    return rc;
}

static void failing_allocations(void **state) {
    (void)state;
    copy_small("vocab.json");
    copy_small("merges.txt");
    copy_small("tokenizer_config.json");
    const qvl_allocator scarce = {sizeof scarce, NULL, scarce_malloc, scarce_realloc, scarce_free};
    qvl_tokenizer_free(small);
    qvl_tokenizer_free(real);
    assert_int_equal(qvl_set_allocator(&scarce), 0);
    char text[1200];
    for (size_t i = 0; i < sizeof text - 1; i++) text[i] = "<|im_end|>abcabc de\xCC\x81\xCC\x96"[i * 7 % 23];
    text[sizeof text - 1] = 0;
    static const char *const dirs[] = {SMALL_TOKENIZER, scratch};
    for (int d = 0; d < 2; d++)
        for (int n = 0;; n++) {
            allowed = n;
            int rc = whole_life(dirs[d], text);
            assert_int_equal(alive, 0);
            if (rc == 0) {
                assert_true(n > 10);
                break;
            }
            assert_int_equal(rc, QVL_ENOMEM);
        }
    assert_int_equal(qvl_set_allocator(NULL), 0);
    small = golden_tokenizer(SMALL_TOKENIZER);
    real = golden_tokenizer(REAL_TOKENIZER);
    remove_file("vocab.json");
    remove_file("merges.txt");
    remove_file("tokenizer_config.json");
}

static int setup(void **state) {
    (void)state;
    golden_unpack();
    small = golden_tokenizer(SMALL_TOKENIZER);
    real = golden_tokenizer(REAL_TOKENIZER);
    return mkdtemp(scratch) ? 0 : -1;
}

static int teardown(void **state) {
    (void)state;
    qvl_tokenizer_free(small);
    qvl_tokenizer_free(real);
    return rmdir(scratch);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_cases),
        cmocka_unit_test(real_cases),
        cmocka_unit_test(small_decode),
        cmocka_unit_test(real_decode),
        cmocka_unit_test(words_merge_by_definition),
        cmocka_unit_test(spans_bound_added_tokens),
        cmocka_unit_test(words_end_where_the_pattern_says),
        cmocka_unit_test(broken_text_is_replaced),
        cmocka_unit_test(nfc_equals_utf8proc),
        cmocka_unit_test(merges_as_strings),
        cmocka_unit_test(vocab_and_merges),
        cmocka_unit_test(unknown_kinds_are_refused),
        cmocka_unit_test(holes_and_no_nfc),
        cmocka_unit_test(longest_added_token_wins),
        cmocka_unit_test(unreachable_token),
        cmocka_unit_test(damaged_files),
        cmocka_unit_test(wrong_arguments),
        cmocka_unit_test(hostile_texts_take_bounded_time),
        cmocka_unit_test(mixed_text_speed),
        cmocka_unit_test(threads_share_a_tokenizer),
        cmocka_unit_test(failing_allocations),
    };
    return cmocka_run_group_tests_name("tokenize", tests, setup, teardown);
}
