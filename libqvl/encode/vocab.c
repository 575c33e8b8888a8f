/* vocab.c - tokenizer.json, or vocab.json + merges.txt, to tables.
 *
 * Job:        read the files, refuse everything that is not tokenized as Qwen2 does it, turn the printable spelling of
 *             byte-level tokens ("Ġthe") back into bytes (" the"), fill qvl__bpe.
 * Input:      a directory; files as published (Qwen3-VL) and as written by transformers 4 and 5: merges as "a b" or as
 *             ["a", "b"].
 * Output:     t->bpe, t->added, t->nfc.
 * Invariants: a setting that would change ids is either done or refused by name (QVL_EUNSUPPORTED); contradictions in
 *             the files are QVL_EFORMAT. Settings that transformers itself replaces at every call (truncation, padding)
 *             are not read.
 */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "scan.h"
#include "unicode.h"
#include "vocab.h"

enum { MAX_TOKEN_ID = 1 << 24 };

/* ---- the printable alphabet of byte-level tokens (GPT-2's bytes_to_unicode) ---- */

/* Bytes that print stand for themselves; the other 68 are U+0100 and up, in the order of their values. */
static bool prints(int byte) { return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE; }

typedef struct {
    int16_t byte_of[0x144]; /* by code point; -1: not in the alphabet */
} alphabet;

static void alphabet_make(alphabet *a) {
    int other = 0x100;
    for (size_t i = 0; i < sizeof a->byte_of / sizeof *a->byte_of; i++) a->byte_of[i] = -1;
    for (int byte = 0; byte < 256; byte++) a->byte_of[prints(byte) ? byte : other++] = (int16_t)byte;
}

/* Writes the bytes that s[0, n) spells to out (room for n) and returns their number, or -1 when a character is not in
 * the alphabet. */
static ptrdiff_t spell_out(const alphabet *a, const char *s, size_t n, char *out) {
    size_t k = 0;
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        size_t len = qvl__utf8_next((const uint8_t *)s + i, n - i, &cp);
        if (len == 0 || cp >= sizeof a->byte_of / sizeof *a->byte_of || a->byte_of[cp] < 0) return -1;
        out[k++] = (char)a->byte_of[cp];
        i += len;
    }
    return (ptrdiff_t)k;
}

/* ---- small JSON checks ---- */

static bool is_null_or(const json_t *o, const char *key, const char *text) {
    const json_t *v = json_object_get(o, key);
    return !v || json_is_null(v) || (text && json_is_string(v) && strcmp(json_string_value(v), text) == 0);
}

static bool is_false_or_absent(const json_t *o, const char *key) {
    const json_t *v = json_object_get(o, key);
    return !v || json_is_false(v);
}

static const char *type_of(const json_t *o) {
    const char *type = json_string_value(json_object_get(o, "type"));
    return type ? type : json_is_object(o) ? "(no type)" : "(not an object)";
}

static bool has_type(const json_t *o, const char *type) { return json_is_object(o) && strcmp(type_of(o), type) == 0; }

static int refuse(const char *what, const char *value) {
    return qvl__fail(QVL_EUNSUPPORTED, "%s is \"%.80s\"; only tokenizers of the Qwen2 kind (byte-level BPE, NFC) are read", what,
                     value);
}

/* ---- tokenizer.json: is it Qwen2's kind? ---- */

static int check_byte_level(const json_t *o, const char *what, bool null_ok) {
    if (!o || json_is_null(o)) return null_ok ? 0 : refuse(what, "null");
    if (!has_type(o, "ByteLevel")) return refuse(what, type_of(o));
    return 0;
}

static int check_pre_tokenizer(const json_t *o) {
    if (!has_type(o, "Sequence")) return refuse("pre_tokenizer.type", type_of(o));
    const json_t *list = json_object_get(o, "pretokenizers");
    const json_t *split = json_array_get(list, 0), *bytes = json_array_get(list, 1);
    if (json_array_size(list) != 2 || !has_type(split, "Split"))
        return refuse("pre_tokenizer", "not a Sequence of Split and ByteLevel");
    const char *pattern = json_string_value(json_object_get(json_object_get(split, "pattern"), "Regex"));
    if (!pattern || strcmp(pattern, QVL__QWEN2_PATTERN) != 0)
        return refuse("pre_tokenizer's pattern", pattern ? pattern : "(not a Regex)");
    if (!is_null_or(split, "behavior", "Isolated") || !is_false_or_absent(split, "invert"))
        return refuse("pre_tokenizer's Split", "not behavior Isolated without invert");
    int rc = check_byte_level(bytes, "pre_tokenizer's second step", false);
    if (rc < 0) return rc;
    if (!is_false_or_absent(bytes, "add_prefix_space")) return refuse("pre_tokenizer's add_prefix_space", "true");
    if (!json_is_false(json_object_get(bytes, "use_regex"))) return refuse("pre_tokenizer's use_regex", "true");
    return 0;
}

static int check_model(const json_t *model) {
    if (!has_type(model, "BPE")) return refuse("model.type", type_of(model));
    static const char *const empty[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (size_t i = 0; i < 2; i++)
        if (!is_null_or(model, empty[i], "")) return refuse(empty[i], "not empty");
    static const char *const off[] = {"fuse_unk", "byte_fallback", "ignore_merges"};
    for (size_t i = 0; i < 3; i++)
        if (!is_false_or_absent(model, off[i])) return refuse(off[i], "true");
    if (!is_null_or(model, "dropout", NULL)) return refuse("model.dropout", "set");
    if (!is_null_or(model, "unk_token", NULL)) return refuse("model.unk_token", "set");
    return 0;
}

static int check_pipeline(qvl_tokenizer *t, const json_t *root) {
    const json_t *norm = json_object_get(root, "normalizer");
    t->nfc = norm && !json_is_null(norm);
    if (t->nfc && !has_type(norm, "NFC")) return refuse("normalizer.type", type_of(norm));
    int rc = check_pre_tokenizer(json_object_get(root, "pre_tokenizer"));
    if (rc == 0) rc = check_byte_level(json_object_get(root, "post_processor"), "post_processor.type", true);
    if (rc == 0) rc = check_byte_level(json_object_get(root, "decoder"), "decoder.type", false);
    return rc;
}

/* ---- vocabulary and added tokens to one block of bytes ---- */

typedef struct {
    const char *text; /* borrowed from the files' text, terminated; base tokens still in printable spelling */
    uint32_t len;
    uint8_t flags;
} entry;

typedef struct {
    entry *entries; /* by id */
    int32_t limit, cap;
    size_t n_added;
} listing;

/* The entry of id, made if it is new; NULL with the message set when there cannot be one. */
static entry *entry_of(listing *l, int64_t id, const char *token) {
    if (id < 0 || id >= MAX_TOKEN_ID) {
        qvl__fail(QVL_EFORMAT, "token \"%.60s\" has the id %lld; ids are 0 to %d", token, (long long)id, MAX_TOKEN_ID - 1);
        return NULL;
    }
    if (id >= l->cap) {
        int32_t cap = l->cap ? l->cap : 4096;
        while (cap <= id) cap *= 2;
        entry *e = qvl__array(l->entries, (size_t)cap, sizeof *e);
        if (!e) return NULL;
        memset(e + l->cap, 0, (size_t)(cap - l->cap) * sizeof *e);
        l->entries = e;
        l->cap = cap;
    }
    if (id >= l->limit) l->limit = (int32_t)id + 1;
    return &l->entries[id];
}

/* {"token": id, ...} */
static int list_vocab(listing *l, qvl__scan *s) {
    if (!qvl__scan_char(s, '{')) return qvl__scan_fail(s, "the vocabulary is not an object");
    do {
        char *text;
        size_t len;
        int64_t id;
        int rc = qvl__scan_string(s, &text, &len);
        if (rc < 0) return qvl__context(rc, "vocabulary");
        if (!qvl__scan_char(s, ':')) rc = qvl__scan_fail(s, "\":\" is wanted");
        if (rc == 0) rc = qvl__scan_integer(s, &id);
        if (rc < 0) return qvl__context(rc, "token \"%.60s\"", text);
        entry *e = entry_of(l, id, text);
        if (!e) return id < 0 || id >= MAX_TOKEN_ID ? QVL_EFORMAT : QVL_ENOMEM;
        if (e->flags) return qvl__fail(QVL_EFORMAT, "tokens \"%.60s\" and \"%.60s\" have the same id %d", e->text, text, (int)id);
        *e = (entry){text, (uint32_t)len, QVL__TOKEN_EXISTS | QVL__TOKEN_BASE};
    } while (qvl__scan_char(s, ','));
    return qvl__scan_char(s, '}') ? 0 : qvl__scan_fail(s, "\",\" or \"}\" is wanted in the vocabulary");
}

enum { ENTRY_ADDED = 0x80 }; /* only while loading */

static int list_added(listing *l, const json_t *o, int64_t id) {
    const json_t *content = json_object_get(o, "content");
    if (json_string_length(content) == 0) return qvl__fail(QVL_EFORMAT, "added token %lld has no content", (long long)id);
    const char *text = json_string_value(content);
    static const char *const off[] = {"lstrip", "rstrip", "single_word", "normalized"};
    for (size_t i = 0; i < sizeof off / sizeof *off; i++)
        if (!is_false_or_absent(o, off[i]))
            return qvl__fail(QVL_EUNSUPPORTED, "added token \"%.60s\" sets %s; only added tokens matched as they stand are read",
                             text, off[i]);
    entry *e = entry_of(l, id, text);
    if (!e) return id < 0 || id >= MAX_TOKEN_ID ? QVL_EFORMAT : QVL_ENOMEM;
    if (e->flags & ENTRY_ADDED) return qvl__fail(QVL_EFORMAT, "two added tokens have the id %lld", (long long)id);
    if (e->flags && (e->len != json_string_length(content) || memcmp(e->text, text, e->len) != 0))
        return qvl__fail(QVL_EFORMAT, "id %lld is \"%.60s\" in the vocabulary and \"%.60s\" among the added tokens",
                         (long long)id, e->text, text);
    e->text = text;
    e->len = (uint32_t)json_string_length(content);
    e->flags |= QVL__TOKEN_EXISTS | ENTRY_ADDED | (json_is_true(json_object_get(o, "special")) ? QVL__TOKEN_SPECIAL : 0);
    l->n_added++;
    return 0;
}

static int by_text(const void *a, const void *b) {
    const qvl__added_token *x = a, *y = b;
    size_t n = x->len < y->len ? x->len : y->len;
    int c = memcmp(x->text, y->text, n);
    return c ? c : (x->len > y->len) - (x->len < y->len);
}

/* One copy of all bytes, ids in order; added tokens point into it. */
static int pack(qvl_tokenizer *t, const listing *l, const alphabet *a) {
    qvl__bpe *b = &t->bpe;
    size_t total = 0, k = 0;
    for (int32_t id = 0; id < l->limit; id++) total += l->entries[id].len;
    if (total >= UINT32_MAX) return qvl__fail(QVL_ELIMIT, "the tokens have %zu bytes together; at most 4 GiB are read", total);
    b->limit = l->limit;
    b->bytes = qvl__malloc(total + 1);
    b->start = qvl__array(NULL, (size_t)l->limit + 1, sizeof *b->start);
    b->flags = qvl__calloc((size_t)l->limit, 1);
    t->added = qvl__array(NULL, l->n_added, sizeof *t->added);
    if (!b->bytes || !b->start || !b->flags || !t->added) return QVL_ENOMEM;
    for (int32_t id = 0; id < l->limit; id++) {
        const entry *e = &l->entries[id];
        b->start[id] = (uint32_t)k;
        b->flags[id] = e->flags & (uint8_t)~ENTRY_ADDED;
        if (!e->flags) continue;
        ptrdiff_t n = e->flags & QVL__TOKEN_BASE ? spell_out(a, e->text, e->len, b->bytes + k) : -1;
        if (n > 0 && e->flags & ENTRY_ADDED && ((size_t)n != e->len || memcmp(b->bytes + k, e->text, e->len) != 0)) n = -1;
        if (n < 0) { /* an added token, or one that is spelled as it stands: merges cannot make it */
            memcpy(b->bytes + k, e->text, e->len);
            b->flags[id] &= (uint8_t)~QVL__TOKEN_BASE;
            n = (ptrdiff_t)e->len;
        }
        if (e->flags & ENTRY_ADDED) t->added[t->n_added++] = (qvl__added_token){b->bytes + k, (size_t)n, id};
        k += (size_t)n;
    }
    b->start[l->limit] = (uint32_t)k;
    qsort(t->added, t->n_added, sizeof *t->added, by_text);
    for (size_t i = 1; i < t->n_added; i++)
        if (by_text(&t->added[i - 1], &t->added[i]) == 0)
            return qvl__fail(QVL_EFORMAT, "added token \"%.*s\" has two ids, %d and %d", (int)t->added[i].len, t->added[i].text,
                             (int)t->added[i - 1].id, (int)t->added[i].id);
    return 0;
}

/* ---- merges ---- */

typedef struct {
    qvl__bpe *bpe;
    const alphabet *alphabet;
    qvl__buf bytes; /* scratch: left and right beside each other */
} merger;

static int add_merge(merger *m, const char *left, size_t n_left, const char *right, size_t n_right) {
    m->bytes.len = 0;
    qvl__buf_add(&m->bytes, left, n_left); /* only to make room */
    qvl__buf_add(&m->bytes, right, n_right);
    if (m->bytes.failed) return QVL_ENOMEM;
    ptrdiff_t a = spell_out(m->alphabet, left, n_left, m->bytes.data);
    ptrdiff_t b = a > 0 ? spell_out(m->alphabet, right, n_right, m->bytes.data + a) : -1;
    int32_t l = -1, r = -1, id = -1;
    if (a > 0 && b > 0) {
        l = qvl__bpe_find(m->bpe, m->bytes.data, (size_t)a);
        r = qvl__bpe_find(m->bpe, m->bytes.data + a, (size_t)b);
        id = qvl__bpe_find(m->bpe, m->bytes.data, (size_t)(a + b));
    }
    const char *missing = l < 0 ? "the first" : r < 0 ? "the second" : id < 0 ? "the whole" : NULL;
    if (missing)
        return qvl__fail(QVL_EFORMAT, "merge %zu, \"%.*s\" and \"%.*s\": %s is not in the vocabulary", m->bpe->n_merges,
                         (int)(n_left < 60 ? n_left : 60), left, (int)(n_right < 60 ? n_right : 60), right, missing);
    return qvl__bpe_add_merge(m->bpe, l, r, id);
}

/* "a b": neither side has a space, which is spelled U+0120. */
static int add_merge_line(merger *m, const char *line, size_t n) {
    const char *space = memchr(line, ' ', n);
    if (!space)
        return qvl__fail(QVL_EFORMAT, "merge %zu, \"%.*s\", is not two tokens with a space between", m->bpe->n_merges,
                         (int)(n < 60 ? n : 60), line);
    size_t left = (size_t)(space - line);
    return add_merge(m, line, left, space + 1, n - left - 1);
}

/* [["a", "b"], ...] or ["a b", ...] */
static int add_merges_json(merger *m, qvl__scan s) {
    qvl__scan_char(&s, '['); /* an array: it has been counted */
    if (qvl__scan_char(&s, ']')) return 0;
    do {
        char *left, *right;
        size_t n_left, n_right;
        int rc;
        if (qvl__scan_char(&s, '[')) {
            rc = qvl__scan_string(&s, &left, &n_left);
            if (rc == 0 && !qvl__scan_char(&s, ',')) rc = qvl__scan_fail(&s, "a pair has two strings");
            if (rc == 0) rc = qvl__scan_string(&s, &right, &n_right);
            if (rc == 0 && !qvl__scan_char(&s, ']')) rc = qvl__scan_fail(&s, "a pair has two strings");
            if (rc < 0) return qvl__context(rc, "merge %zu", m->bpe->n_merges);
            rc = add_merge(m, left, n_left, right, n_right);
        } else {
            rc = qvl__scan_string(&s, &left, &n_left);
            if (rc < 0) return qvl__context(rc, "merge %zu is neither \"a b\" nor [\"a\", \"b\"]", m->bpe->n_merges);
            rc = add_merge_line(m, left, n_left);
        }
        if (rc < 0) return rc;
    } while (qvl__scan_char(&s, ','));
    return qvl__scan_char(&s, ']') ? 0 : qvl__scan_fail(&s, "\",\" or \"]\" is wanted in the merges");
}

static int add_merges_text(merger *m, const char *text, size_t n) {
    for (size_t i = 0; i < n;) {
        const char *end = memchr(text + i, '\n', n - i);
        size_t len = end ? (size_t)(end - (text + i)) : n - i, next = i + len + 1;
        if (len && text[i + len - 1] == '\r') len--;
        bool header = i == 0 && len >= 9 && memcmp(text, "#version:", 9) == 0;
        int rc = len == 0 || header ? 0 : add_merge_line(m, text + i, len);
        if (rc < 0) return rc;
        i = next;
    }
    return 0;
}

/* From listed entries to finished tables; merges is JSON's array, or NULL and text[0, n) is merges.txt. */
static int build(qvl_tokenizer *t, const listing *l, const qvl__scan *merges, const char *text, size_t n) {
    alphabet a;
    alphabet_make(&a);
    size_t n_merges = 0;
    int rc = merges ? qvl__scan_count(*merges, &n_merges) : 0;
    if (rc < 0) return qvl__context(rc, "merges");
    if (!merges)
        for (size_t i = 0; i < n; i++) n_merges += text[i] == '\n' || i + 1 == n;
    if (n_merges >= MAX_TOKEN_ID) return qvl__fail(QVL_EFORMAT, "%zu merges are more than a vocabulary can need", n_merges);
    rc = pack(t, l, &a);
    if (rc == 0) rc = qvl__bpe_index(&t->bpe, n_merges);
    if (rc == 0) {
        merger m = {.bpe = &t->bpe, .alphabet = &a};
        rc = merges ? add_merges_json(&m, *merges) : add_merges_text(&m, text, n);
        qvl__buf_free(&m.bytes);
    }
    return rc == 0 ? qvl__bpe_finish(&t->bpe) : rc;
}

/* ---- the two forms of a tokenizer on disk ---- */

/* Reads a file that is scanned in place; it must be UTF-8. */
static int read_text(const char *path, char **text, size_t *n) {
    int rc = qvl__read_file(path, (size_t)256 << 20, text, n);
    if (rc < 0) return rc;
    size_t valid = qvl__utf8_valid((const uint8_t *)*text, *n);
    return valid == *n ? 0 : qvl__fail(QVL_EFORMAT, "%s: byte %zu: not UTF-8", path, valid);
}

/* Everything but the two large tables as a tree: text with null in their places. */
static int parse_rest(json_t **root, const qvl__scan *all, const qvl__scan *vocab, const qvl__scan *merges) {
    const qvl__scan *first = vocab, *second = merges;
    if (first->at && second->at && second->at < first->at) first = merges, second = vocab;
    const char *from = all->at;
    qvl__buf rest = {0};
    for (int i = 0; i < 2; i++) {
        const qvl__scan *table = i == 0 ? first : second;
        if (!table->at) continue;
        qvl__buf_add(&rest, from, (size_t)(table->at - from));
        qvl__buf_puts(&rest, "null");
        from = table->end;
    }
    qvl__buf_add(&rest, from, (size_t)(all->end - from));
    int rc = rest.failed ? QVL_ENOMEM : qvl__json_parse(root, rest.data, rest.len, "without its tables");
    qvl__buf_free(&rest);
    return rc;
}

static int from_tokenizer_json(qvl_tokenizer *t, char *text, size_t n) {
    static const char *const model_key[] = {"model"}, *const table_keys[] = {"vocab", "merges"};
    qvl__scan all = {text, text, text + n}, model, tables[2] = {{NULL, NULL, NULL}};
    json_t *root = NULL, *added, *v;
    size_t i;
    listing l = {0};
    int rc = qvl__scan_members(all, model_key, &model, 1);
    if (rc == 0 && model.at && *model.at == '{') rc = qvl__scan_members(model, table_keys, tables, 2);
    if (rc == 0) rc = parse_rest(&root, &all, &tables[0], &tables[1]);
    if (rc == 0) rc = check_model(json_object_get(root, "model"));
    if (rc == 0) rc = check_pipeline(t, root);
    added = json_object_get(root, "added_tokens");
    if (rc == 0 && added && !json_is_array(added)) rc = qvl__fail(QVL_EFORMAT, "added_tokens is not an array");
    if (rc == 0 && (!tables[0].at || !tables[1].at))
        rc = qvl__fail(QVL_EFORMAT, "model has no %s", tables[0].at ? "merges" : "vocabulary");
    if (rc == 0) rc = list_vocab(&l, &tables[0]);
    for (i = 0; rc == 0 && i < json_array_size(added); i++) {
        v = json_array_get(added, i);
        const json_t *id = json_object_get(v, "id");
        rc = json_is_integer(id) ? list_added(&l, v, json_integer_value(id))
                                 : qvl__fail(QVL_EFORMAT, "added_tokens[%zu].id is not an integer", i);
    }
    if (rc == 0) rc = build(t, &l, &tables[1], NULL, 0);
    qvl__free(l.entries);
    json_decref(root);
    return rc;
}

static int list_added_decoder(listing *l, json_t *config) {
    const char *class = json_string_value(json_object_get(config, "tokenizer_class"));
    if (!class || (strcmp(class, "Qwen2Tokenizer") != 0 && strcmp(class, "Qwen2TokenizerFast") != 0))
        return refuse("tokenizer_class", class ? class : "(absent)");
    if (!is_false_or_absent(config, "add_prefix_space")) return refuse("add_prefix_space", "true");
    if (!is_false_or_absent(config, "add_bos_token")) return refuse("add_bos_token", "true");
    json_t *added = json_object_get(config, "added_tokens_decoder"), *v;
    const char *key;
    json_object_foreach(added, key, v) {
        char *end;
        long long id = strtoll(key, &end, 10);
        int rc = end != key && !*end ? list_added(l, v, id)
                                     : qvl__fail(QVL_EFORMAT, "added_tokens_decoder: \"%.60s\" is not an id", key);
        if (rc < 0) return rc;
    }
    return 0;
}

/* Qwen2Tokenizer without its tokenizer.json: NFC and the pattern are the class's own. */
static int from_parts(qvl_tokenizer *t, const char *vocab_path, const char *merges_path, const char *config_path) {
    json_t *config = NULL;
    char *vocab = NULL, *merges = NULL;
    size_t n_vocab = 0, n_merges = 0;
    listing l = {0};
    t->nfc = true;
    int rc = read_text(vocab_path, &vocab, &n_vocab);
    if (rc == 0) rc = qvl__json_file(&config, config_path);
    if (rc == 0) rc = read_text(merges_path, &merges, &n_merges);
    if (rc == 0) {
        qvl__scan s = {vocab, vocab, vocab + n_vocab};
        rc = list_vocab(&l, &s);
        while (rc == 0 && s.at < s.end && strchr(" \t\r\n", *s.at)) s.at++;
        if (rc == 0 && s.at < s.end) rc = qvl__scan_fail(&s, "something follows the object");
        if (rc < 0) qvl__context(rc, "%s", vocab_path);
    }
    if (rc == 0 && (rc = list_added_decoder(&l, config)) < 0) qvl__context(rc, "%s", config_path);
    if (rc == 0 && (rc = build(t, &l, NULL, merges, n_merges)) < 0) qvl__context(rc, "%s", merges_path);
    qvl__free(l.entries);
    qvl__free(vocab);
    qvl__free(merges);
    json_decref(config);
    return rc;
}

int qvl__vocab_load(qvl_tokenizer *t, const char *dir) {
    static const char *const names[] = {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"};
    qvl__buf path[4] = {{0}};
    int rc = 0;
    for (int i = 0; i < 4; i++) {
        qvl__buf_printf(&path[i], "%s/%s", dir, names[i]);
        if (path[i].failed) rc = QVL_ENOMEM;
    }
    if (rc == 0 && qvl__file_exists(path[0].data)) {
        char *text = NULL;
        size_t n;
        rc = read_text(path[0].data, &text, &n);
        if (rc == 0 && (rc = from_tokenizer_json(t, text, n)) < 0) qvl__context(rc, "%s", path[0].data);
        qvl__free(text);
    } else if (rc == 0 && qvl__file_exists(path[1].data)) {
        rc = from_parts(t, path[1].data, path[2].data, path[3].data);
    } else if (rc == 0) {
        rc = qvl__fail(QVL_EIO, "%s has neither tokenizer.json nor vocab.json", dir);
    }
    for (int i = 0; i < 4; i++) qvl__buf_free(&path[i]);
    return rc;
}
