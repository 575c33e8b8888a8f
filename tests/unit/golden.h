/* golden.h - reading golden data in unit tests: JSON files, JSON lines, tokenizers. Paths are from the repository's
 * root. A file that is missing or damaged ends the test program. */
#ifndef GOLDEN_H
#define GOLDEN_H

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../libqvl/encode/encode.h"

#define SMALL_TOKENIZER "tests/golden/small-tokenizer"
#define REAL_TOKENIZER "build/golden/qwen3-tokenizer"

static inline void golden_die(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(2);
}

static inline json_t *golden_json(const char *path) {
    json_error_t e;
    json_t *v = json_load_file(path, JSON_ALLOW_NUL, &e);
    if (!v) golden_die(path, e.text);
    return v;
}

/* An array of the file's lines. */
static inline json_t *golden_lines(const char *path) {
    FILE *f = fopen(path, "r");
    if (!f) golden_die(path, "cannot open");
    json_t *list = json_array();
    char *line = NULL;
    size_t cap = 0;
    json_error_t e;
    while (getline(&line, &cap, f) > 0) {
        json_t *v = json_loads(line, JSON_ALLOW_NUL, &e);
        if (!v) golden_die(path, e.text);
        json_array_append_new(list, v);
    }
    free(line);
    fclose(f);
    return list;
}

static inline const char *golden_text(const json_t *o, const char *key, size_t *n) {
    const json_t *v = json_object_get(o, key);
    if (!json_is_string(v)) golden_die(key, "not a string");
    *n = json_string_length(v);
    return json_string_value(v);
}

/* *ids with free(). */
static inline size_t golden_ids(const json_t *o, const char *key, int32_t **ids) {
    const json_t *v = json_object_get(o, key);
    if (!json_is_array(v)) golden_die(key, "not an array");
    size_t n = json_array_size(v);
    *ids = calloc(n + 1, sizeof **ids);
    if (!*ids) golden_die(key, "out of memory");
    for (size_t i = 0; i < n; i++) (*ids)[i] = (int32_t)json_integer_value(json_array_get(v, i));
    return n;
}

/* The published tokenizer lies compressed in the repository. */
static inline void golden_unpack(void) {
    if (system("python3 tests/golden/unpack.py") != 0)
        golden_die("tests/golden/unpack.py", "failed; run tests from the repository's root");
}

static inline qvl_tokenizer *golden_tokenizer(const char *dir) {
    qvl_tokenizer *t;
    if (qvl_tokenizer_load(&t, dir) < 0) golden_die(dir, qvl_last_error());
    return t;
}

/* A small generator with a fixed seed, so that a failure comes again. */
static inline uint32_t golden_random(uint64_t *state) {
    *state += 0x9E3779B97F4A7C15u;
    uint64_t z = *state;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (uint32_t)(z >> 32);
}

#endif
