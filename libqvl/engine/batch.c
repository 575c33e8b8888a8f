/* batch.c - which tokens run in the next step.
 *
 * Job:        admission, and the rows of one step.
 * Input:      waiting and running requests; the limits max_requests, max_batched_tokens and free KV blocks.
 * Output:     a qvl__batch.
 * Invariants: only full blocks are shared, and rows are written behind them, so a shared block is never written;
 *             decodes come first, so that a long prompt never stops running answers; prefill takes what is left of
 *             max_batched_tokens, oldest request first; a prompt is prefilled only when all its images are encoded.
 */
#include <string.h>

#include "engine.h"

/* How many of the prompt's pictures lie wholly in its first `tokens` tokens: they need no encoding. */
static int visuals_within(const qvl_prompt *p, int tokens) {
    int n = 0;
    for (int i = 0; i < p->n_runs && p->runs[i].start + (size_t)p->runs[i].tokens <= (size_t)tokens; i++)
        if (i + 1 == p->n_runs || p->runs[i + 1].visual != p->runs[i].visual) n++;
    return n;
}

/* Blocks for the tokens so far: the beginning from the cache as far as it is there, the rest fresh. The last token is
 * always computed, because its logits choose the next one. Besides, every running request needs a block to go on with. */
static bool take_blocks(qvl_engine *e, qvl__request *r) {
    int tokens = qvl__request_tokens(r), need = qvl__blocks_for(tokens), most = (tokens - 1) / QVL__KV_BLOCK, shared = 0;
    if (!e->prefix_cache) most = 0;
    if (most > r->n_keys) most = r->n_keys;
    while (shared < most && (r->table[shared] = qvl__blocks_share(&e->blocks, r->keys[shared])) >= 0) shared++;
    if (qvl__blocks_left(&e->blocks) < need - shared + e->n_running || !qvl__blocks_take(&e->blocks, r->table + shared, need - shared)) {
        qvl__blocks_give(&e->blocks, r->table, shared);
        return false;
    }
    r->n_blocks = need;
    r->named = shared;
    r->cached = shared * QVL__KV_BLOCK;
    r->encoded = visuals_within(r->prompt, r->cached);
    return true;
}

void qvl__batch_admit(qvl_engine *e) {
    while (e->waiting && e->n_running < e->max_requests) {
        qvl__request *r = e->waiting;
        if (!take_blocks(e, r)) return; /* first come, first served: nobody overtakes */
        e->waiting = r->next;
        if (!e->waiting) e->waiting_tail = &e->waiting;
        r->next = NULL;
        if (r->started == 0) {
            r->started = qvl__now_ms();
            r->prefix = r->cached;
            e->prefix_tokens += (uint64_t)r->prefix;
        }
        e->running[e->n_running++] = r;
    }
}

/* Takes the blocks of the youngest running request away; it waits in front of all others to be computed again. */
static void preempt(qvl_engine *e) {
    qvl__request *r = e->running[--e->n_running];
    qvl__blocks_give(&e->blocks, r->table, r->n_blocks);
    r->n_blocks = r->cached = r->named = 0;
    if (!e->waiting) e->waiting_tail = &r->next;
    r->next = e->waiting;
    e->waiting = r;
    e->preempted++;
}

/* A block for the next token of every answer, oldest request first, so that the oldest always goes on. */
static void grow(qvl_engine *e) {
    for (int i = 0; i < e->n_running; i++) {
        qvl__request *r = e->running[i];
        while (r->n_blocks < qvl__blocks_for(qvl__request_tokens(r))) {
            if (qvl__blocks_take(&e->blocks, r->table + r->n_blocks, 1)) r->n_blocks++;
            else if (preempt(e), i >= e->n_running) break; /* it was the youngest itself */
        }
    }
}

/* Adds the input rows [r->cached, r->cached + n) of a request. */
static void add_rows(qvl_engine *e, qvl__batch *b, qvl__request *r, int n) {
    const qvl_prompt *p = r->prompt;
    int seq = b->seqs++, stride = e->ws.table_stride;
    memcpy(e->rows.table + (size_t)seq * (size_t)stride, r->table, (size_t)r->n_blocks * sizeof(int32_t));
    int run = 0; /* pad runs ascend: walk them along */
    for (int k = 0; k < n; k++) {
        int pos = r->cached + k, row = b->rows++;
        bool in_prompt = pos < r->prompt_n;
        e->rows.tokens[row] = in_prompt ? p->tokens[pos] : r->answer[pos - r->prompt_n];
        e->rows.seq[row] = seq;
        e->rows.pos[row] = pos;
        for (int axis = 0; axis < 3; axis++)
            e->rows.positions[axis * e->max_batched + row] = in_prompt ? p->positions[(size_t)axis * p->n + (size_t)pos] : pos + p->rope_delta;
        if (!in_prompt) continue;
        e->rows.prompt_rows++;
        while (run < p->n_runs && (size_t)pos >= p->runs[run].start + (size_t)p->runs[run].tokens) run++;
        if (run < p->n_runs && (size_t)pos >= p->runs[run].start) {
            const qvl__run *pads = &p->runs[run];
            int i = b->visual_rows++;
            e->rows.visual_row[i] = row;
            e->rows.visual_src[i] = r->embeddings[pads->visual];
            e->rows.visual_index[i] = pads->offset + (pos - (int)pads->start);
        }
    }
    if (r->cached + n == qvl__request_tokens(r)) {
        e->rows.out_row[b->outs] = b->rows - 1;
        e->rows.out_request[b->outs++] = r;
    }
    r->cached += n;
}

/* All is computed but the last token of the answer. */
static bool decodes(const qvl__request *r) { return r->generated > 0 && r->cached + 1 == qvl__request_tokens(r); }

void qvl__batch_build(qvl_engine *e, qvl__batch *b) {
    *b = (qvl__batch){0};
    e->rows.prompt_rows = 0;
    grow(e);
    int first = e->n_running ? e->turn % e->n_running : 0;
    for (int i = 0; i < e->n_running; i++) {
        qvl__request *r = e->running[(first + i) % e->n_running];
        if (!decodes(r)) continue;
        if (b->rows == e->max_batched) {
            e->turn = first + i; /* the ones left out come first in the next step */
            break;
        }
        add_rows(e, b, r, 1);
    }
    for (int i = 0; i < e->n_running && b->rows < e->max_batched; i++) {
        qvl__request *r = e->running[i];
        int left = qvl__request_tokens(r) - r->cached, room = e->max_batched - b->rows;
        if (left == 0 || decodes(r) || r->encoded < r->prompt->n_visuals) continue; /* 0: it decodes in this step */
        add_rows(e, b, r, left < room ? left : room);
    }
    b->tokens = e->rows.tokens;
    b->positions = e->rows.positions;
    b->stride = e->max_batched;
    b->seq = e->rows.seq;
    b->pos = e->rows.pos;
    b->table = e->rows.table;
    b->visual_row = e->rows.visual_row;
    b->visual_src = e->rows.visual_src;
    b->visual_index = e->rows.visual_index;
    b->out_row = e->rows.out_row;
}

void qvl__batch_name_blocks(qvl_engine *e) {
    for (int i = 0; e->prefix_cache && i < e->n_running; i++) {
        qvl__request *r = e->running[i];
        for (; (r->named + 1) * QVL__KV_BLOCK <= r->cached; r->named++) {
            if (r->named == r->n_keys) qvl__request_key(r, r->named);
            qvl__blocks_name(&e->blocks, r->table[r->named], r->keys[r->named]);
        }
    }
}
