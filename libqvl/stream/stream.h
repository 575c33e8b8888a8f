/* stream.h - from token ids back to text that may be shown: whole characters, stop strings held back.
 *
 * Job:        streaming detokenizer and stop-string search.
 * Input:      ids, one at a time.
 * Output:     text pieces; joined they equal the whole text decoded at once, cut at a stop string.
 * Invariants: never half a character, never a byte of a stop string, nothing lost at the end (flush).
 */
#ifndef QVL__STREAM_H
#define QVL__STREAM_H

#include "../encode/encode.h"

/* ---- detok.c ---- holds back only a tail that may still become a character; the rest is U+FFFD per maximal invalid
 * subpart (Unicode 15, 3.9, as Python's errors="replace"). */
typedef struct {
    uint8_t tail[4];
    int n;
} qvl__detok;
void qvl__detok_add(qvl__detok *d, const qvl_tokenizer *t, int32_t id, bool skip_special, qvl__buf *out);
void qvl__detok_bytes(qvl__detok *d, const char *bytes, size_t n, qvl__buf *out);
void qvl__detok_flush(qvl__detok *d, qvl__buf *out);

/* ---- stop.c ---- */
#define QVL__MAX_STOPS 16
typedef struct {
    struct qvl__stop_string {
        char *text;
        size_t len;
        uint32_t *fall; /* fall[k]: length of the longest proper suffix of text[0, k) that is also its prefix */
        size_t matched; /* how much of text the end of the answer so far is; held back */
    } stops[QVL__MAX_STOPS];
    int n;
} qvl__stop;
int qvl__stop_init(qvl__stop *s, const char *json); /* the option "stop": "" | "text" | ["a", "b"]; at most 16, not empty */
void qvl__stop_free(qvl__stop *s);
/* Feeds text; appends to out what is safe to show; true when a stop string was found (out then ends before it). The
 * match that ends first wins, and of several that end there the longest: the outcome does not depend on how the text
 * was cut into pieces. Needs no memory but out's. */
bool qvl__stop_add(qvl__stop *s, const char *text, size_t n, qvl__buf *out);
void qvl__stop_flush(qvl__stop *s, qvl__buf *out); /* at the end of the answer: what was held back */

#endif
