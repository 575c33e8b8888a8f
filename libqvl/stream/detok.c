/* detok.c - bytes of tokens to whole characters, as they come.
 *
 * Job:        a token may end inside a character: hold its beginning back until the rest comes.
 * Input:      token ids, or bytes.
 * Output:     valid UTF-8; U+FFFD for every maximal subpart that is no character.
 * Invariants: pieces joined (flush included) equal the whole decoded at once, however the bytes were cut; what is held
 *             back is at most three bytes that are still a valid beginning of a character.
 */
#include <string.h>

#include "../encode/unicode.h"
#include "stream.h"

/* Takes as many bytes as make a character or a broken part from d->tail followed by s[0, n); returns how many of s were
 * used up. */
static size_t finish_tail(qvl__detok *d, const uint8_t *s, size_t n, qvl__buf *out) {
    uint8_t joined[8];
    size_t held = (size_t)d->n, more = n < 4 ? n : 4;
    memcpy(joined, d->tail, held);
    memcpy(joined + held, s, more);
    uint32_t cp;
    size_t k = qvl__utf8_next(joined, held + more, &cp);
    if (k == 0) { /* still not over, so all of s is in joined */
        memcpy(d->tail, joined, held + more);
        d->n = (int)(held + more);
        return n;
    }
    d->n = 0;
    if (cp == QVL__UTF8_BROKEN) qvl__buf_puts(out, QVL__UTF8_REPLACEMENT);
    else qvl__buf_add(out, joined, k);
    return k - held; /* a held beginning is valid, so a broken part is at least that long */
}

void qvl__detok_bytes(qvl__detok *d, const char *bytes, size_t n, qvl__buf *out) {
    const uint8_t *s = (const uint8_t *)bytes;
    size_t i = d->n && n ? finish_tail(d, s, n, out) : 0;
    while (i < n) {
        size_t valid = qvl__utf8_valid(s + i, n - i);
        qvl__buf_add(out, s + i, valid);
        i += valid;
        if (i == n) break;
        uint32_t cp;
        size_t k = qvl__utf8_next(s + i, n - i, &cp);
        if (k == 0) {
            d->n = (int)(n - i);
            memcpy(d->tail, s + i, n - i);
            break;
        }
        qvl__buf_puts(out, QVL__UTF8_REPLACEMENT);
        i += k;
    }
}

void qvl__detok_add(qvl__detok *d, const qvl_tokenizer *t, int32_t id, bool skip_special, qvl__buf *out) {
    if (skip_special && qvl__token_is_special(t, id)) return;
    size_t n;
    const char *bytes = qvl__token_bytes(t, id, &n);
    if (bytes) qvl__detok_bytes(d, bytes, n, out);
}

void qvl__detok_flush(qvl__detok *d, qvl__buf *out) {
    if (d->n) qvl__buf_puts(out, QVL__UTF8_REPLACEMENT);
    d->n = 0;
}
