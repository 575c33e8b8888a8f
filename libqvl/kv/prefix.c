/* prefix.c - names for the contents of full KV blocks.
 *
 * Job:        a hash chain over tokens and the pictures that their pad tokens stand for.
 * Input:      the tokens of a block, its pictures, the key of the block before.
 * Output:     a 128-bit key.
 * Invariants: a key covers everything from the first token to the end of its block: token ids, and kind, grid, pixels and
 *             frame pair of every picture; M-RoPE positions follow from these. Keys live inside one engine, so weights
 *             and processor are the same for all.
 */
#include <string.h>

#include "kv.h"

qvl__key qvl__prefix_key(qvl__key before, const int32_t *tokens, const qvl__mark *marks, int n_marks) {
    qvl__sha256 s;
    uint8_t sum[32];
    qvl__sha256_init(&s);
    qvl__sha256_add(&s, &before, sizeof before);
    qvl__sha256_add(&s, tokens, QVL__KV_BLOCK * sizeof *tokens);
    for (int i = 0; i < n_marks; i++) {
        const int32_t where[2] = {marks[i].at, marks[i].place};
        qvl__sha256_add(&s, where, sizeof where);
        qvl__sha256_add(&s, marks[i].hash, 32);
    }
    qvl__sha256_end(&s, sum);
    qvl__key key;
    memcpy(&key, sum, sizeof key);
    if ((key.lo | key.hi) == 0) key.lo = 1; /* {0, 0} means no key */
    return key;
}
