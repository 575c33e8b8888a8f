/* tokenize.c - text to ids: added tokens, NFC, pre-tokenizer, byte-level BPE; and what a token is.
 *
 * Job:        as transformers' Qwen2Tokenizer (tokenizers library): split at added tokens, then for each piece between
 *             them normalize (NFC), cut into words by the pattern, merge each word.
 * Input:      untrusted bytes; spans in which added tokens count.
 * Output:     ids.
 * Invariants: outside of spans the text "<|im_end|>" never becomes the token <|im_end|>; of several added tokens that
 *             begin at the same byte the longest wins, the leftmost first; time is n log n at worst in the text's
 *             length; nothing here changes the tokenizer, so every thread may call it.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <string.h>

#include "encode.h"
#include "unicode.h"
#include "vocab.h"

/* ---- pre-tokenizer ---- */

/* QVL__QWEN2_PATTERN for PCRE2. \s is spelled out as Unicode's White_Space, which is what Oniguruma takes it for: PCRE2's
 * own \s is ASCII, or with PCRE2_UCP has U+180E too. Caseless UTF matching makes 's match 'ſ (U+017F), as there. */
#define SPACE "\\x09-\\x0D\\x20\\x85\\xA0\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"
static const char pattern[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
                              "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
                              "|\\p{N}"
                              "| ?[^" SPACE "\\p{L}\\p{N}]+[\\r\\n]*"
                              "|[" SPACE "]*[\\r\\n]+"
                              "|[" SPACE "]+(?![^" SPACE "])"
                              "|[" SPACE "]+";

/* A message of PCRE2 in buf. */
static const char *pcre2_text(int code, char buf[120]) {
    if (pcre2_get_error_message(code, (PCRE2_UCHAR *)buf, 120) < 0) strcpy(buf, "unknown error");
    return buf;
}

static int compile_pattern(qvl_tokenizer *t) {
    int code;
    char text[120];
    PCRE2_SIZE at;
    pcre2_code *re = pcre2_compile((PCRE2_SPTR)pattern, sizeof pattern - 1, PCRE2_UTF | PCRE2_ANCHORED, &code, &at, NULL);
    if (!re) {
        if (code == PCRE2_ERROR_NOMEMORY || code == PCRE2_ERROR_HEAP_FAILED)
            return qvl__fail(QVL_ENOMEM, "out of memory in PCRE2");
        return qvl__fail(QVL_EUNSUPPORTED,
                         "PCRE2 cannot compile the pre-tokenizer: %s at %zu; it must be built with Unicode support",
                         pcre2_text(code, text), (size_t)at);
    }
    pcre2_jit_compile(re, PCRE2_JIT_COMPLETE); /* may be missing or forbidden: pcre2_match then interprets */
    t->regex = re;
    return 0;
}

/* Everything of one call that is not the tokenizer. */
typedef struct {
    const qvl_tokenizer *t;
    pcre2_match_data *match;
    pcre2_match_context *limits;
    qvl__buf clean; /* the piece in NFC */
    qvl__bpe_out out;
} call;

/* Text between added tokens. */
static int put_piece(call *c, const char *text, size_t n) {
    if (n == 0) return 0;
    c->clean.len = 0;
    qvl__utf8_clean(&c->clean, text, n, c->t->nfc);
    if (c->clean.failed) return QVL_ENOMEM;
    for (size_t at = 0; at < c->clean.len;) {
        /* What is matched is valid UTF-8, and every character matches one of the branches; the pattern is anchored. */
        PCRE2_SPTR subject = (PCRE2_SPTR)c->clean.data;
        int rc = pcre2_match(c->t->regex, subject, c->clean.len, at, PCRE2_NO_UTF_CHECK, c->match, c->limits);
        if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
            rc = pcre2_match(c->t->regex, subject, c->clean.len, at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, c->match, c->limits);
        if (rc == PCRE2_ERROR_NOMEMORY || rc == PCRE2_ERROR_HEAPLIMIT) return qvl__fail(QVL_ENOMEM, "out of memory in PCRE2");
        size_t end = rc > 0 ? pcre2_get_ovector_pointer(c->match)[1] : 0;
        if (end <= at) {
            char why[120];
            return qvl__fail(QVL_EINTERNAL, "the pre-tokenizer stopped at byte %zu: %s", at,
                             rc < 0 ? pcre2_text(rc, why) : "empty match");
        }
        rc = qvl__bpe_word(&c->t->bpe, c->clean.data + at, end - at, &c->out);
        if (rc < 0) return rc;
        at = end;
    }
    return 0;
}

/* ---- added tokens ---- */

/* The longest added token that s[0, n) begins with. The list is in byte order: the tokens that agree with s in the first
 * k bytes are one range of it, narrowed byte by byte. */
static const qvl__added_token *added_at(const qvl_tokenizer *t, const char *s, size_t n) {
    const qvl__added_token *best = NULL;
    size_t low = 0, high = t->n_added;
    for (size_t k = 0; k < n && low < high; k++) {
        uint8_t c = (uint8_t)s[k];
        size_t a = low, b = high;
        while (a < b) { /* first one whose byte k is not below c; a token that ends here sorts first */
            size_t mid = a + (b - a) / 2;
            bool below = t->added[mid].len == k || (uint8_t)t->added[mid].text[k] < c;
            if (below) a = mid + 1;
            else b = mid;
        }
        low = a;
        for (b = high; a < b;) { /* first one above c */
            size_t mid = a + (b - a) / 2;
            if ((uint8_t)t->added[mid].text[k] <= c) a = mid + 1;
            else b = mid;
        }
        high = a;
        if (low < high && t->added[low].len == k + 1) best = &t->added[low];
    }
    return best;
}

int32_t qvl__token_id(const qvl_tokenizer *t, const char *added) {
    size_t n = strlen(added);
    const qvl__added_token *a = added_at(t, added, n);
    return a && a->len == n ? a->id : -1;
}

static int put_text(call *c, const char *text, size_t len, const qvl__span *spans, size_t n_spans) {
    size_t from = 0; /* where the piece that is not written yet begins */
    for (size_t s = 0; s < n_spans; s++) {
        for (size_t i = spans[s].start; i < spans[s].end;) {
            const qvl__added_token *a = added_at(c->t, text + i, spans[s].end - i);
            if (!a) {
                i++;
                continue;
            }
            int rc = put_piece(c, text + from, i - from);
            if (rc == 0) rc = qvl__bpe_put(&c->out, a->id);
            if (rc < 0) return rc;
            i += a->len;
            from = i;
        }
    }
    return put_piece(c, text + from, len - from);
}

int qvl__tokenize_spans(const qvl_tokenizer *t, const char *text, size_t len, const qvl__span *spans, size_t n_spans,
                        int32_t **ids, size_t *n_ids) {
    if (len > INT32_MAX / 2) /* NFC at most triples it; positions inside a word are 32 bits */
        return qvl__fail(QVL_ELIMIT, "a text of %zu bytes is too long to be tokenized at once; at most %d", len, INT32_MAX / 2);
    for (size_t i = 0; i < n_spans; i++)
        if (spans[i].end > len || spans[i].start > spans[i].end || (i && spans[i].start < spans[i - 1].end))
            return qvl__fail(QVL_EINTERNAL, "span %zu of a text of %zu bytes is %zu to %zu", i, len, spans[i].start,
                             spans[i].end);
    call c = {.t = t, .match = pcre2_match_data_create(1, NULL), .limits = pcre2_match_context_create(NULL)};
    int rc = c.match && c.limits ? 0 : qvl__fail(QVL_ENOMEM, "out of memory in PCRE2");
    if (rc == 0) {
        /* PCRE2 counts backtracking steps, and a run of spaces takes as many as it is long. */
        pcre2_set_match_limit(c.limits, UINT32_MAX);
        pcre2_set_depth_limit(c.limits, UINT32_MAX);
        rc = put_text(&c, text, len, spans, n_spans);
    }
    if (rc == 0 && !c.out.ids) { /* no tokens is still a list */
        c.out.ids = qvl__malloc(0);
        if (!c.out.ids) rc = QVL_ENOMEM;
    }
    if (rc == 0) {
        *ids = c.out.ids;
        *n_ids = c.out.n;
        c.out.ids = NULL;
    }
    qvl__bpe_out_free(&c.out);
    qvl__buf_free(&c.clean);
    pcre2_match_context_free(c.limits);
    pcre2_match_data_free(c.match);
    return rc;
}

/* ---- load, free, tokens ---- */

int qvl__tokenizer_load(qvl_tokenizer **out, const char *dir) {
    qvl_tokenizer *t = qvl__calloc(1, sizeof *t);
    if (!t) return QVL_ENOMEM;
    int rc = qvl__vocab_load(t, dir);
    if (rc == 0) rc = compile_pattern(t);
    if (rc < 0) {
        qvl__tokenizer_free(t);
        return rc;
    }
    *out = t;
    return 0;
}

void qvl__tokenizer_free(qvl_tokenizer *t) {
    if (!t) return;
    pcre2_code_free(t->regex);
    qvl__bpe_free(&t->bpe);
    qvl__free(t->added);
    qvl__free(t);
}

const char *qvl__token_bytes(const qvl_tokenizer *t, int32_t id, size_t *len) {
    *len = 0;
    if (id < 0 || id >= t->bpe.limit || !(t->bpe.flags[id] & QVL__TOKEN_EXISTS)) return NULL;
    *len = t->bpe.start[id + 1] - t->bpe.start[id];
    return t->bpe.bytes + t->bpe.start[id];
}

bool qvl__token_is_special(const qvl_tokenizer *t, int32_t id) {
    return id >= 0 && id < t->bpe.limit && t->bpe.flags[id] & QVL__TOKEN_SPECIAL;
}

int32_t qvl__token_limit(const qvl_tokenizer *t) { return t->bpe.limit; }
