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

/* Blocks for the whole request: its beginning from the cache as far as it is there, the rest fresh. The last token of a
 * prompt is always computed, because its logits choose the first token of the answer. */
static bool take_blocks(qvl_engine *e, qvl__request *r) {
    int shared = 0, most = e->prefix_cache ? (r->prompt_n - 1) / QVL__KV_BLOCK : 0;
    while (shared < most && (r->table[shared] = qvl__blocks_share(&e->blocks, r->keys[shared])) >= 0) shared++;
    if (!qvl__blocks_take(&e->blocks, r->table + shared, r->n_blocks - shared)) {
        qvl__blocks_give(&e->blocks, r->table, shared);
        return false;
    }
    r->named = shared;
    r->cached = r->prefix = shared * QVL__KV_BLOCK;
    r->encoded = visuals_within(r->prompt, r->prefix);
    e->prefix_tokens += (uint64_t)r->prefix;
    return true;
}

void qvl__batch_admit(qvl_engine *e) {
    while (e->waiting && e->n_running < e->max_requests) {
        qvl__request *r = e->waiting;
        if (!take_blocks(e, r)) return; /* first come, first served: nobody overtakes */
        e->waiting = r->next;
        if (!e->waiting) e->waiting_tail = &e->waiting;
        r->next = NULL;
        r->started = qvl__now_ms();
        e->running[e->n_running++] = r;
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
        e->rows.tokens[row] = in_prompt ? p->tokens[pos] : r->last;
        e->rows.seq[row] = seq;
        e->rows.pos[row] = pos;
        for (int axis = 0; axis < 3; axis++)
            e->rows.pos_scratch[3 * row + axis] = in_prompt ? p->positions[(size_t)axis * p->n + (size_t)pos] : pos + p->rope_delta;
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
    if (r->cached + n >= r->prompt_n) {
        e->rows.out_row[b->outs] = b->rows - 1;
        e->rows.out_request[b->outs++] = r;
    }
    r->cached += n;
}

void qvl__batch_build(qvl_engine *e, qvl__batch *b) {
    *b = (qvl__batch){0};
    e->rows.prompt_rows = 0;
    int first = e->n_running ? e->turn % e->n_running : 0;
    for (int i = 0; i < e->n_running; i++) {
        qvl__request *r = e->running[(first + i) % e->n_running];
        if (r->generated == 0) continue;
        if (b->rows == e->max_batched) {
            e->turn = first + i; /* the ones left out come first in the next step */
            break;
        }
        add_rows(e, b, r, 1);
    }
    for (int i = 0; i < e->n_running && b->rows < e->max_batched; i++) {
        qvl__request *r = e->running[i];
        if (r->generated > 0 || r->encoded < r->prompt->n_visuals) continue;
        int left = r->prompt_n - r->cached, room = e->max_batched - b->rows;
        add_rows(e, b, r, left < room ? left : room);
    }
    for (int axis = 0; axis < 3; axis++)
        for (int row = 0; row < b->rows; row++) e->rows.positions[axis * b->rows + row] = e->rows.pos_scratch[3 * row + axis];
    b->tokens = e->rows.tokens;
    b->positions = e->rows.positions;
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
            if ((r->named + 1) * QVL__KV_BLOCK > r->prompt_n) qvl__request_key(r, r->named);
            qvl__blocks_name(&e->blocks, r->table[r->named], r->keys[r->named]);
        }
    }
}
