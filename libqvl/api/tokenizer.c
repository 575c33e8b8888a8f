/* tokenizer.c - the public tokenizer calls.
 *
 * Job:        check arguments, call inward, count the handle.
 * Input:      what the user gives.
 * Output:     a handle; ids; text.
 * Invariants: outputs are untouched after a failure.
 */
#include "../encode/encode.h"
#include "../stream/stream.h"

int qvl_tokenizer_load(qvl_tokenizer **out, const char *dir) {
    if (!out || !dir) return qvl__fail(QVL_EINVAL, "qvl_tokenizer_load: %s is NULL", out ? "dir" : "out");
    *out = NULL;
    int rc = qvl__tokenizer_load(out, dir);
    if (rc == 0) qvl__handle_born();
    return rc;
}

void qvl_tokenizer_free(qvl_tokenizer *t) {
    if (!t) return;
    qvl__tokenizer_free(t);
    qvl__handle_gone();
}

int qvl_tokenize(const qvl_tokenizer *t, const char *text, size_t len, int parse_special, int32_t **ids, size_t *n) {
    if (!t || !ids || !n || (!text && len))
        return qvl__fail(QVL_EINVAL, "qvl_tokenize: %s is NULL", !t ? "the tokenizer" : !ids ? "ids" : !n ? "n" : "text");
    const qvl__span all = {0, len};
    return qvl__tokenize_spans(t, text ? text : "", len, &all, parse_special ? 1 : 0, ids, n);
}

int qvl_detokenize(const qvl_tokenizer *t, const int32_t *ids, size_t n, int skip_special, char **text, size_t *len) {
    if (!t || !text || !len || (!ids && n))
        return qvl__fail(QVL_EINVAL, "qvl_detokenize: %s is NULL", !t ? "the tokenizer" : !text ? "text" : !len ? "len" : "ids");
    for (size_t i = 0; i < n; i++) {
        size_t bytes;
        if (!qvl__token_bytes(t, ids[i], &bytes))
            return qvl__fail(QVL_EINVAL, "qvl_detokenize: ids[%zu] is %d, which is no token; ids are 0 to %d", i, (int)ids[i],
                             (int)qvl__token_limit(t) - 1);
    }
    qvl__detok d = {0};
    qvl__buf out = {0};
    qvl__buf_puts(&out, "");
    for (size_t i = 0; i < n; i++) qvl__detok_add(&d, t, ids[i], skip_special != 0, &out);
    qvl__detok_flush(&d, &out);
    if (out.failed) {
        qvl__buf_free(&out);
        return QVL_ENOMEM;
    }
    *text = out.data;
    *len = out.len;
    return 0;
}
