/* batch.c - which tokens run in the next step.
 *
 * Job:        admission, KV blocks, and the rows of one step.
 * Input:      waiting and running requests; the limits max_requests, max_batched_tokens and free KV blocks.
 * Output:     a qvl__batch.
 * Invariants: a block that two sequences hold is copied before one of them writes to it;
 *             decodes come first, so that a long prompt never stops running answers; prefill takes what is left, one
 *             half for the first request in order and one for the one that has least to do, so that a short prompt does
 *             not wait for a long one and the long one goes on;
 *             a prompt is prefilled as far as its pictures are encoded.
 */
#include <string.h>

#include "engine.h"

#define WORTH_WAITING 16 /* tokens: a request waits for another one that is computing at least so many of its own */

/* ---- admission ---- */

/* How many of the prompt's pictures lie wholly in its first `tokens` tokens: they need no encoding. */
static int visuals_within(const qvl_prompt *p, int tokens) {
    int n = 0;
    for (int i = 0; i < p->n_runs && p->runs[i].start + (size_t)p->runs[i].tokens <= (size_t)tokens; i++)
        if (i + 1 == p->n_runs || p->runs[i + 1].visual != p->runs[i].visual) n++;
    return n;
}

/* Where the first picture that r still waits for begins; the end of its tokens when there is none. */
static int picture_ahead(const qvl__request *r) {
    const qvl_prompt *p = r->prompt;
    for (int i = 0; r->ready < p->n_visuals && i < p->n_runs; i++)
        if (p->runs[i].visual == r->ready) return (int)p->runs[i].start;
    return qvl__request_tokens(r);
}

/* Tokens up to which r will be computed without waiting: not a handful before a picture, a pass is too dear for that. */
static int way_ahead(const qvl__request *r) {
    int end = picture_ahead(r);
    return end == qvl__request_tokens(r) || end - r->cached >= QVL__KV_BLOCK ? end : r->cached;
}

/* Whether r should wait for q, which computes tokens that r begins with: at least a few more than are there, and not
 * behind a picture that r has no use for. */
static bool worth_waiting(const qvl__request *q, const qvl__request *r, int common, int there) {
    return common >= there + WORTH_WAITING && q->priority <= r->priority && (common > picture_ahead(q) || way_ahead(q) >= there + WORTH_WAITING);
}

/* Finds what r can begin with: `blocks` full blocks by name (held from now on), and in `donor` a running request that
 * has computed more, up to token `cached`. False when r should wait: somebody is computing what it begins with. */
typedef struct {
    int blocks, cached;
    const qvl__request *donor;
} beginning;

static bool find_beginning(qvl_engine *e, qvl__request *r, beginning *b) {
    *b = (beginning){0};
    if (!r->share) return true;
    int most = qvl__request_tokens(r) - 1, full = most / QVL__KV_BLOCK; /* the last token's logits are always needed */
    if (full > r->n_keys) full = r->n_keys;
    while (b->blocks < full && (r->table[b->blocks] = qvl__blocks_share(&e->blocks, r->keys[b->blocks])) >= 0) b->blocks++;
    b->cached = b->blocks * QVL__KV_BLOCK;
    for (int i = 0; i < e->n_running; i++) {
        const qvl__request *q = e->running[i];
        int common = qvl__request_common(q, r);
        if (common > most) common = most;
        int have = common < q->cached ? common : q->cached, there = have > b->cached ? have : b->cached;
        if (worth_waiting(q, r, common, there)) return false;
        if (have <= b->cached || have > (b->blocks + 1) * QVL__KV_BLOCK) continue;
        b->cached = have;
        b->donor = q;
    }
    return true;
}

enum { ADMITTED, WAITS, NO_ROOM };

/* Gives r the blocks for its tokens so far: the beginning as far as it is there, the rest fresh. Besides, every running
 * request needs a block to go on with. */
static int take_blocks(qvl_engine *e, qvl__request *r) {
    int need = qvl__blocks_for(qvl__request_tokens(r));
    beginning b;
    bool now = find_beginning(e, r, &b);
    if (!now || qvl__blocks_left(&e->blocks) < need - b.blocks + e->n_running) {
        qvl__blocks_give(&e->blocks, r->table, b.blocks);
        return now ? NO_ROOM : WAITS;
    }
    int held = b.blocks;
    if (b.donor) {
        r->table[held] = b.donor->table[held];
        qvl__blocks_hold(&e->blocks, r->table[held++]);
    }
    qvl__blocks_take(&e->blocks, r->table + held, need - held);
    r->n_blocks = need;
    r->named = b.blocks;
    r->cached = b.cached;
    r->ready = visuals_within(r->prompt, r->cached);
    return ADMITTED;
}

static void begin(qvl_engine *e, qvl__request *r) {
    if (r->started == 0) {
        r->started = qvl__now_ms();
        r->prefix = r->cached;
        e->counts.prefix_tokens += (uint64_t)r->prefix;
        for (int i = 0; i < r->prompt->n_visuals; i++) r->images_cached += i < r->ready || qvl__picture_embedding(r, i);
    }
    int at = e->n_running++;
    for (; at > 0 && qvl__request_before(r, e->running[at - 1]); at--) e->running[at] = e->running[at - 1];
    e->running[at] = r;
}

/* Takes the blocks of the last running request away; it waits to be computed again. */
static void preempt(qvl_engine *e) {
    qvl__request *r = e->running[--e->n_running];
    qvl__batch_name_blocks(e, r);
    qvl__blocks_give(&e->blocks, r->table, r->n_blocks);
    r->n_blocks = r->cached = r->named = 0;
    qvl__queue_wait(e, r);
    e->counts.preempted++;
}

void qvl__batch_admit(qvl_engine *e) {
    for (qvl__request **at = &e->waiting; *at;) {
        qvl__request *r = *at;
        int got = e->n_running < e->limits.max_requests ? take_blocks(e, r) : NO_ROOM;
        if (got == ADMITTED) {
            *at = r->next;
            r->next = NULL;
            begin(e, r);
        } else if (got == WAITS) {
            at = &r->next;
        } else if (e->n_running && e->running[e->n_running - 1]->priority > r->priority) {
            preempt(e); /* goes behind r; try r again */
        } else {
            return; /* first come, first served */
        }
    }
}

/* ---- blocks for this step ---- */

/* Takes one block into *table, for running request i, by preempting the last ones where needed; false when it was
 * preempted itself. */
static bool take_one(qvl_engine *e, int i, int32_t *table) {
    while (!qvl__blocks_take(&e->blocks, table, 1)) {
        preempt(e);
        if (i >= e->n_running) return false;
    }
    return true;
}

/* A block for the next token of every answer, and one of its own for every request that goes on in a shared block. */
static void grow(qvl_engine *e) {
    for (int i = 0; i < e->n_running; i++) {
        qvl__request *r = e->running[i];
        while (r->n_blocks < qvl__blocks_for(qvl__request_tokens(r)))
            if (take_one(e, i, r->table + r->n_blocks)) r->n_blocks++;
            else return;
        int32_t *next = &r->table[r->cached / QVL__KV_BLOCK], own;
        if (r->cached % QVL__KV_BLOCK == 0 || e->blocks.refs[*next] == 1) continue;
        if (!take_one(e, i, &own)) return;
        if (e->blocks.refs[*next] > 1) e->model->device->kv_copy(e->model->device, &e->kv, *next, own);
        else { /* who shared it was preempted just now */
            qvl__blocks_give(&e->blocks, &own, 1);
            continue;
        }
        qvl__blocks_give(&e->blocks, next, 1);
        *next = own;
    }
}

/* ---- rows ---- */

/* Adds the input rows [r->cached, r->cached + n) of a request, guesses included. */
static void add_rows(qvl_engine *e, qvl__batch *b, qvl__request *r, int n) {
    const qvl_prompt *p = r->prompt;
    int seq = b->seqs++, stride = e->plan.table_stride, tokens = qvl__request_tokens(r);
    memcpy(e->rows.table + (size_t)seq * (size_t)stride, r->table, (size_t)r->n_blocks * sizeof(int32_t));
    for (int k = 0; k < n; k++) {
        int pos = r->cached + k, row = b->rows++;
        bool in_prompt = pos < r->prompt_n;
        e->rows.tokens[row] = pos < tokens ? qvl__request_token(r, pos) : r->draft[pos - tokens];
        e->rows.seq[row] = seq;
        e->rows.pos[row] = pos;
        for (int axis = 0; axis < 3; axis++)
            e->rows.positions[axis * e->plan.max_batched + row] = in_prompt ? p->positions[(size_t)axis * p->n + (size_t)pos] : pos + p->rope_delta;
        if (pos + 1 >= tokens || (r->prompt_logprobs >= 0 && pos + 1 >= r->reported && pos + 1 < r->prompt_n)) {
            e->rows.out_row[b->outs] = row;
            e->rows.out_request[b->outs++] = r;
        }
        if (!in_prompt) continue;
        e->rows.prompt_rows++;
        const qvl__run *pads = p->n_runs ? qvl__prompt_run(p, pos) : NULL;
        if (!pads) continue;
        int i = b->visual_rows++;
        e->rows.visual_row[i] = row;
        e->rows.visual_src[i] = qvl__picture_embedding(r, pads->visual);
        e->rows.visual_index[i] = pads->offset + (pos - (int)pads->start);
    }
    r->cached += n;
}

/* All is computed but the last token of the answer. */
static bool decodes(const qvl__request *r) { return r->generated > 0 && r->cached + 1 == qvl__request_tokens(r); }

/* Rows that r could prefill now. */
static int prefill_left(const qvl__request *r) {
    if (r->cached >= qvl__request_tokens(r) || decodes(r)) return 0; /* it decodes in this step, or will */
    return way_ahead(r) - r->cached;
}

bool qvl__batch_prefills(const qvl_engine *e) {
    for (int i = 0; i < e->n_running; i++)
        if (prefill_left(e->running[i])) return true;
    return false;
}

/* Guesses for a decode, as many as there is room for: they never push anybody out. */
static void guess(qvl_engine *e, const qvl__batch *b, qvl__request *r, int others) {
    int room = e->limits.max_batched - b->rows - 1 - others, left = r->max_tokens - r->generated - 1, outs = e->rows.spare_outs / 2;
    int n = r->speculate;
    if (n > room) n = room;
    if (n > outs) n = outs; /* the other half is for prompt_logprobs */
    if (n > left) n = left;
    r->n_draft = n > 0 ? qvl__speculate(r, n) : 0;
    while (r->n_draft && r->n_blocks < qvl__blocks_for(qvl__request_tokens(r) + r->n_draft)) {
        if (qvl__blocks_take(&e->blocks, r->table + r->n_blocks, 1)) r->n_blocks++;
        else r->n_draft = 0;
    }
    e->rows.spare_outs -= r->n_draft;
    e->counts.drafted += (uint64_t)r->n_draft;
}

static void add_decodes(qvl_engine *e, qvl__batch *b) {
    int first = e->n_running ? e->turn % e->n_running : 0, others = 0;
    for (int i = 0; i < e->n_running; i++) others += decodes(e->running[i]);
    for (int i = 0; i < e->n_running; i++) {
        qvl__request *r = e->running[(first + i) % e->n_running];
        r->n_draft = 0;
        if (!decodes(r)) continue;
        if (b->rows >= e->limits.max_batched) {
            e->turn = first + i; /* the ones left out come first in the next step */
            return;
        }
        others--;
        if (r->speculate) guess(e, b, r, others > 0 ? others : 0);
        add_rows(e, b, r, 1 + r->n_draft);
    }
}

/* The rows that one request may add, of n that it could: outputs are limited too. */
static int fits(qvl_engine *e, const qvl__request *r, int room) {
    int n = prefill_left(r);
    if (n > room) n = room;
    if (r->prompt_logprobs < 0 || r->reported >= r->prompt_n) return n;
    if (n > e->rows.spare_outs) n = e->rows.spare_outs;
    e->rows.spare_outs -= n;
    return n;
}

static void add_prefill(qvl_engine *e, qvl__batch *b, qvl__request *r, int room) {
    int n = fits(e, r, room);
    if (n > 0) add_rows(e, b, r, n);
}

/* In order, but half of the room is for the request with the least to do. */
static void add_prefills(qvl_engine *e, qvl__batch *b, int room) {
    int first = -1, shortest = -1;
    for (int i = 0; i < e->n_running; i++) {
        int left = prefill_left(e->running[i]);
        if (!left) continue;
        if (first < 0) first = i;
        else if (shortest < 0 || left < prefill_left(e->running[shortest])) shortest = i;
    }
    if (first < 0) return;
    int kept = 0;
    if (shortest >= 0) {
        kept = prefill_left(e->running[shortest]);
        if (kept > room / 2) kept = room / 2;
    }
    int end = b->rows + room;
    add_prefill(e, b, e->running[first], room - kept);
    if (shortest >= 0) add_prefill(e, b, e->running[shortest], end - b->rows);
    for (int i = first + 1; i < e->n_running && b->rows < end; i++)
        if (i != shortest) add_prefill(e, b, e->running[i], end - b->rows);
}

void qvl__batch_build(qvl_engine *e, qvl__batch *b, int prefill_rows) {
    *b = (qvl__batch){0};
    e->rows.prompt_rows = 0;
    grow(e);
    e->rows.spare_outs = e->plan.max_out - e->n_running; /* everybody may need one */
    add_decodes(e, b);
    e->rows.decode_rows = b->rows;
    int room = e->limits.max_batched - b->rows;
    add_prefills(e, b, room < prefill_rows ? room : prefill_rows);
    e->rows.prefill_rows = b->rows - e->rows.decode_rows;
    b->tokens = e->rows.tokens;
    b->positions = e->rows.positions;
    b->stride = e->plan.max_batched;
    b->seq = e->rows.seq;
    b->pos = e->rows.pos;
    b->table = e->rows.table;
    b->visual_row = e->rows.visual_row;
    b->visual_src = e->rows.visual_src;
    b->visual_index = e->rows.visual_index;
    b->out_row = e->rows.out_row;
}

void qvl__batch_name_blocks(qvl_engine *e, qvl__request *r) {
    for (; e->prefix_cache && (r->named + 1) * QVL__KV_BLOCK <= r->cached; r->named++) {
        if (r->named == r->n_keys) qvl__request_key(r, r->named);
        qvl__blocks_name(&e->blocks, r->table[r->named], r->keys[r->named]);
    }
}
