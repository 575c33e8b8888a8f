/* prefix.c - names for the contents of full KV blocks.
 *
 * Job:        a hash chain over tokens, with every picture's pad tokens replaced by what the picture is.
 * Input:      a sequence: prompt and answer.
 * Output:     one 128-bit key for each full block.
 * Invariants: a key covers everything from the first token to the end of its block: token ids, kind, grid, pixels and
 *             frame pair of every picture; M-RoPE positions follow from these. Keys live inside one engine, so weights
 *             and processor are the same for all.
 */
#include <string.h>

#include "kv.h"

/* The run that token pos lies in; NULL for text. Runs ascend. */
static const qvl__run *run_at(const qvl_prompt *p, size_t pos) {
    int lo = 0, hi = p->n_runs;
    while (lo < hi) {
        int mid = (lo + hi) / 2;
        if (p->runs[mid].start + (size_t)p->runs[mid].tokens <= pos) lo = mid + 1;
        else hi = mid;
    }
    return lo < p->n_runs && p->runs[lo].start <= pos ? &p->runs[lo] : NULL;
}

qvl__key qvl__prefix_key(qvl__key before, const qvl_prompt *p, const int32_t *answer, int first) {
    qvl__sha256 s;
    uint8_t sum[32];
    const qvl__run *last = NULL;
    qvl__sha256_init(&s);
    qvl__sha256_add(&s, &before, sizeof before);
    for (int i = first; i < first + QVL__KV_BLOCK; i++) {
        bool in_prompt = (size_t)i < p->n;
        int32_t token = in_prompt ? p->tokens[i] : answer[(size_t)i - p->n];
        qvl__sha256_add(&s, &token, sizeof token);
        const qvl__run *run = in_prompt ? run_at(p, (size_t)i) : NULL;
        if (run && run != last) {
            int32_t place = run->offset + (i - (int32_t)run->start);
            qvl__sha256_add(&s, p->visuals[run->visual]->hash, 32);
            qvl__sha256_add(&s, &place, sizeof place);
        }
        last = run;
    }
    qvl__sha256_end(&s, sum);
    qvl__key key;
    memcpy(&key, sum, sizeof key);
    if ((key.lo | key.hi) == 0) key.lo = 1; /* {0, 0} means no key */
    return key;
}
