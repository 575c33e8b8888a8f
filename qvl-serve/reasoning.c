/* reasoning.c - the splitter between <think> and </think>.
 *
 * Job:        see reasoning.h.
 * Input:      text in pieces.
 * Output:     runs of the piece itself where possible: a run is one call of the receiver.
 * Invariants: the two tags have their '<' at the front only, so after a mismatch no shorter prefix of the tag can have
 *             begun inside what matched: the matched part is text, and the byte at hand is looked at afresh.
 */
#include "reasoning.h"

#include <string.h>

/* BEFORE: nothing but newlines so far, <think> may come; OPENED: the same inside a part the prompt opened. */
enum { BEFORE, OPENED, THOUGHT, ANSWER };

static const char open_tag[] = "<think>", close_tag[] = "</think>";

static const char *tag_of(int state) {
    return state == THOUGHT ? close_tag : open_tag;
}

void reasoning_init(reasoning *r, bool opened) {
    *r = (reasoning){.state = opened ? OPENED : BEFORE, .empty = true};
}

bool reasoning_inside(const reasoning *r) {
    return r->state == OPENED || r->state == THOUGHT;
}

static void give(reasoning *r, const char *text, size_t n, reasoning_fn fn, void *ud) {
    static const char lines[] = "\n\n\n\n\n\n\n\n";
    if (!n) return;
    int part = reasoning_inside(r) ? REASONING_THOUGHT : REASONING_ANSWER;
    while (r->newlines) {
        size_t some = r->newlines < sizeof lines - 1 ? r->newlines : sizeof lines - 1;
        fn(ud, part, lines, some);
        r->newlines -= some;
    }
    r->empty = false;
    fn(ud, part, text, n);
}

static void enter(reasoning *r, int state) {
    *r = (reasoning){.state = state, .empty = true};
}

/* What is not a tag after all: the part before the text was waiting for one is decided. */
static void decide(reasoning *r) {
    if (r->state == BEFORE) r->state = ANSWER;
    if (r->state == OPENED) {
        r->state = THOUGHT;
        r->newlines = 0; /* leading */
    }
}

void reasoning_feed(reasoning *r, const char *text, size_t n, reasoning_fn fn, void *ud) {
    size_t from = 0; /* [from, i) is decided text that was not given out yet */
    for (size_t i = 0; i < n;) {
        if (r->state == ANSWER && (!r->empty || text[i] != '\n')) {
            give(r, text + from, n - from, fn, ud);
            return;
        }
        const char *tag = tag_of(r->state);
        char c = text[i];
        if (r->state != ANSWER && c == tag[r->tag]) {
            if (!r->tag) give(r, text + from, i - from, fn, ud);
            i++;
            from = i;
            if (tag[++r->tag]) continue;
            enter(r, r->state == THOUGHT ? ANSWER : THOUGHT);
        } else if (r->tag) {
            size_t matched = r->tag;
            bool other = r->state == OPENED && matched == 1; /* the '<' may be that of </think>, too */
            decide(r);
            if (other) continue;
            r->tag = 0;
            give(r, tag, matched, fn, ud);
            from = i;
        } else if (c == '\n') {
            give(r, text + from, i - from, fn, ud);
            /* Those at the start of a part are dropped; before the first word they still may be the answer's own. */
            if (!(r->empty && (r->state == THOUGHT || r->state == ANSWER))) r->newlines++;
            from = ++i;
        } else {
            decide(r);
            if (r->state != ANSWER) i++;
        }
    }
    if (!r->tag) give(r, text + from, n - from, fn, ud);
}

void reasoning_finish(reasoning *r, reasoning_fn fn, void *ud) {
    const char *tag = tag_of(r->state);
    size_t matched = r->tag;
    r->tag = 0;
    if (matched) {
        decide(r);
        give(r, tag, matched, fn, ud);
    }
    if (r->state == BEFORE && r->newlines) { /* an answer of newlines only */
        r->newlines--;
        r->state = ANSWER;
        give(r, "\n", 1, fn, ud);
    }
    r->newlines = 0;
}
