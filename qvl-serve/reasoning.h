/* reasoning.h - splits what a Thinking model writes into its reasoning and its answer.
 *
 * Job:        find </think>, also when it arrives in pieces.
 * Input:      the generated text in pieces of any size; whether the prompt already opened <think>.
 * Output:     pieces of reasoning and of answer; joined, the same for every way of cutting the text.
 * Invariants: no allocation; at most a part of a tag and a count of newlines are held back;
 *             newlines at both ends of the reasoning and before the answer are dropped. The chat template drops the same
 *             ones when the message comes back (Qwen3-VL's template: strip and lstrip of '\n'), so nothing is lost;
 *             text that ends before </think> is all reasoning, as in vLLM's qwen3 parser.
 */
#ifndef SERVE_REASONING_H
#define SERVE_REASONING_H

#include <stdbool.h>
#include <stddef.h>

enum { REASONING_THOUGHT = 1, REASONING_ANSWER = 2 };

typedef struct {
    int state;
    size_t newlines; /* held back: dropped or given out once it is known what follows */
    size_t tag;      /* bytes of a tag that have matched so far */
    bool empty;      /* nothing of the present part was given out yet */
} reasoning;

typedef void (*reasoning_fn)(void *ud, int part, const char *text, size_t n);

/* opened: the prompt ends inside <think> (Thinking models). Otherwise the text is reasoning only when it begins with
 * <think>, newlines aside. */
void reasoning_init(reasoning *r, bool opened);
void reasoning_feed(reasoning *r, const char *text, size_t n, reasoning_fn fn, void *ud);
void reasoning_finish(reasoning *r, reasoning_fn fn, void *ud);
/* Whether the next byte would be reasoning: tokens generated meanwhile count as reasoning_tokens. */
bool reasoning_inside(const reasoning *r);

#endif
