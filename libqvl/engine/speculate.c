/* speculate.c - guessing the next tokens from the text so far (prompt lookup decoding).
 *
 * Job:        where the last tokens stood before, take what followed them there as a guess.
 * Input:      prompt and answer so far.
 * Output:     a draft, whose rows run together with the last token's row in one step.
 * Invariants: a draft costs time or saves it, and changes no token: answer.c samples row after row with the same logits
 *             and random numbers as without, and drops the rest of the draft at the first token that differs (law 6).
 * Source:     Saxena 2023, "Prompt lookup decoding".
 */
#include "engine.h"

#define LONGEST 8 /* tokens of context that are compared */
#define SHORTEST 2

int qvl__speculate(qvl__request *r, int n) {
    int tokens = qvl__request_tokens(r), best = SHORTEST - 1, from = -1;
    for (int end = tokens - 1; end >= SHORTEST && best < LONGEST; end--) { /* tokens before end; the latest of equals wins */
        int same = 0;
        while (same < LONGEST && same < end && qvl__request_token(r, end - 1 - same) == qvl__request_token(r, tokens - 1 - same)) same++;
        if (same > best) {
            best = same;
            from = end;
        }
    }
    if (from < 0) return 0;
    for (int i = 0; i < n; i++) /* behind the end of the sequence the guess goes on from itself: what repeats, repeats on */
        r->draft[i] = from + i < tokens ? qvl__request_token(r, from + i) : r->draft[from + i - tokens];
    return n;
}
