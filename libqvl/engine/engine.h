/* engine.h - requests, and the engine that runs them together.
 *
 * Job:        continuous batching. plan.c sizes it, queue.c takes requests in (request.c makes them), batch.c picks the
 *             rows of a step, pictures.c encodes images beside it, speculate.c guesses ahead, answer.c turns logits into
 *             tokens and events, engine.c runs the step.
 * Input:      prompts and options from any thread; steps from one thread.
 * Output:     events.
 * Invariants: a request is in exactly one place: inbox, waiting, running, or ended;
 *             a running request holds the KV blocks of the tokens it has; when none is left for the next token, the last
 *             running request gives its blocks back and is computed again later, to the same bits (law 6);
 *             everything that other threads touch is under lock; the rest belongs to the stepping thread;
 *             a step takes no memory from the system: submit took what the request will need.
 */
#ifndef QVL__ENGINE_H
#define QVL__ENGINE_H

#include <pthread.h>

#include "../forward/forward.h"
#include "../sample/sample.h"
#include "../stream/stream.h"

#define QVL__MAX_STOP_IDS 64
#define QVL__MAX_DRAFT 32

/* One distinct image or video of the engine's requests, found by its hash: encoded once, whoever needs it. */
typedef struct {
    qvl_embedding *embedding;  /* data is there once READY */
    enum { QVL__WAITING, QVL__ENCODING, QVL__READY } state; /* the stepping thread's */
    qvl_prompt *prompt;        /* keeps visual's pixels until READY */
    const qvl__visual *visual;
    int users;                 /* live requests; under lock, as the rest */
    uint64_t last_use;         /* for LRU among those without users */
    double ms, done;           /* what encoding took; when it was done */
} qvl__picture;

typedef struct qvl__request {
    struct qvl__request *next; /* inbox, waiting or ended list */
    uint64_t id;
    int choice; /* of option n */
    int priority;
    qvl_prompt *prompt;
    qvl__picture **pictures; /* [prompt->n_visuals]; NULL where the prompt brought an embedding */
    qvl__sampler sampler;
    qvl__detok detok;
    qvl__stop stop;
    int max_tokens, min_tokens, prompt_logprobs, speculate;
    bool ignore_eos, share; /* share: may begin with others' KV blocks */
    int32_t banned[QVL__MAX_EOS + QVL__MAX_STOP_IDS]; /* end tokens: stop_ids behind the model's own */
    int n_eos, n_stop_ids;

    int prompt_n, cached, generated; /* prompt tokens; tokens whose keys are in the cache; tokens of the answer */
    int ready;                       /* visuals [0, ready) have their embedding, or need none */
    int reported;                    /* prompt tokens whose logprobs were given out */
    int32_t *answer;                 /* [max_tokens]; the last one is not in the cache yet */
    int32_t draft[QVL__MAX_DRAFT];   /* guesses for the tokens behind the last one, this step */
    int n_draft;
    int32_t *table;                  /* [max_blocks] KV blocks, of which it holds the first n_blocks */
    int n_blocks, max_blocks;
    qvl__key *keys;                  /* [max_blocks] names of full blocks, n_keys of them known: the prompt's from the start */
    int n_keys, named;               /* blocks [0, named) have been named in the pool, or came from it */

    /* what its events of one step point to, so that reporting takes no memory */
    qvl__buf *text;  /* [speculate + 2] */
    qvl__buf piece;  /* of one token, before stop strings are looked for */
    float *logits;   /* [speculate + 1][vocab] with return_logits */
    int n_text;
    uint64_t step;   /* the step that n_text counts in */
    char message[512];

    atomic_bool cancelled;
    bool ended;
    double submitted, deadline, started, first_token;
    int prefix, speculated, images_cached; /* prompt tokens found in the cache; right guesses; pictures that were there */
} qvl__request;

struct qvl_event {
    int type;
    uint64_t request;
    int choice;
    int32_t token;
    const qvl__buf *text; /* of the request; NULL for none */
    const char *finish_reason;
    int error;
    const char *message;
    const float *logits;
    size_t n_logits;
    bool has_logprobs;
    qvl__choice sampled;
    double usage[QVL_USAGE_IMAGES_CACHED + 1];
};

/* What an engine is made of: fixed when it is made. */
typedef struct {
    int max_requests, max_context, max_batched, max_out; /* max_out: rows of a step that may give logits */
    int kv_blocks, table_stride, image_rows, batch_rows; /* patches of the largest image; of the tower */
    qvl__type kv_type;
    size_t block_bytes, text_bytes, vision_bytes;
} qvl__plan;

/* What may change while it runs. */
typedef struct {
    int max_requests, max_batched;
    double step_ms;
    int64_t embedding_cache;
} qvl__limits;

typedef struct {
    uint64_t steps, rows, prompt_tokens, prefix_tokens, generated_tokens, images, preempted, drafted, speculated;
    double vision_ms;
    int running, blocks_used, blocks_kept;
} qvl__counts;

struct qvl_engine {
    qvl_model *model;
    qvl__plan plan;
    bool prefix_cache;
    size_t piece_bytes; /* the longest text that one token can give */
    qvl__kv kv;
    qvl__blocks blocks;
    qvl__text_ws ws;
    qvl__tower *tower;
    qvl__sample_scratch scratch;

    pthread_mutex_t lock; /* inbox, live, next_id, wake flag, asked, pictures, stats */
    pthread_cond_t wake;
    qvl__request *inbox, **inbox_tail;
    qvl__request **live; /* every request that has not ended, for cancel */
    int n_live, cap_live;
    uint64_t next_id, uses;
    bool woken;
    qvl__limits asked;
    qvl__picture **pictures;
    int n_pictures, cap_pictures;
    struct {
        uint64_t submitted, finished, failed, cancelled;
    } ends;
    qvl__counts stats; /* counts as of the last step */

    /* the stepping thread's */
    atomic_uintptr_t owner; /* address of the owner's thread-local mark; 0 until somebody steps */
    qvl__limits limits;
    qvl__request *waiting;  /* by priority, then arrival */
    qvl__request **running; /* in the same order; the last one gives way first */
    int n_running;
    qvl__request *ended;    /* of the last step: events point to them */
    uint64_t step;
    qvl__counts counts;
    int turn; /* where decodes start when not all of them fit a step */
    double row_ms, decode_ms; /* measured: a row of prefill; a step without any */
    qvl_event *events;
    int n_events, cap_events;
    struct { /* the batch of pictures in the tower */
        qvl__picture **picture;
        const qvl__visual **visual;
        qvl_embedding **embedding;
        int n, rows;
        double ms, start;
        bool failed; /* the tower's device has */
    } encoding;
    struct { /* one step's rows, host side */
        int32_t *tokens, *positions, *seq, *pos, *table, *visual_row, *visual_index, *out_row;
        const qvl_embedding **visual_src;
        qvl__request **out_request;
        bool *drawn; /* outputs that the device samples */
        int decode_rows, prefill_rows, prompt_rows, spare_outs;
    } rows;
};

/* Tokens of the sequence so far: prompt and answer. */
static inline int qvl__request_tokens(const qvl__request *r) { return r->prompt_n + r->generated; }
static inline int32_t qvl__request_token(const qvl__request *r, int i) {
    return i < r->prompt_n ? r->prompt->tokens[i] : r->answer[i - r->prompt_n];
}
/* By priority, then arrival. */
static inline bool qvl__request_before(const qvl__request *a, const qvl__request *b) {
    if (a->priority != b->priority) return a->priority < b->priority;
    return a->id != b->id ? a->id < b->id : a->choice < b->choice;
}

/* ---- plan.c ---- */
int qvl__plan_make(qvl__plan *p, const qvl_model *m, const qvl_options *o);

/* ---- request.c ---- */
/* A request for choice number choice; seed is the request's. Takes all memory that the request will ever need. */
int qvl__request_new(qvl__request **out, qvl_engine *e, const qvl_prompt *p, const qvl_options *o, int choice, int64_t seed);
/* The same without its pictures: read and checked, not to be run. */
int qvl__request_draft(qvl__request **out, qvl_engine *e, const qvl_prompt *p, const qvl_options *o, int choice, int64_t seed);
void qvl__request_free(qvl_engine *e, qvl__request *r);
/* The pad run that token i of the prompt lies in; NULL when it is text. */
const qvl__run *qvl__prompt_run(const qvl_prompt *p, int i);
/* Computes keys[block] of a block that is full: of the prompt, or of the answer as well. */
void qvl__request_key(qvl__request *r, int block);
/* From the first token on, how many tokens (and pictures behind them) two requests have in common; stops at the end of
 * the first block whose key one of them does not know. */
int qvl__request_common(const qvl__request *a, const qvl__request *b);

/* ---- queue.c ---- */
/* Moves the inbox into the waiting list and takes over limits that were asked for. */
void qvl__queue_drain(qvl_engine *e);
/* Puts r where it belongs in the waiting list. */
void qvl__queue_wait(qvl_engine *e, qvl__request *r);
/* Forgets an ended request, gives up its pictures, and counts how it ended. */
void qvl__queue_ended(qvl_engine *e, qvl__request *r, int event_type, bool cancelled);

/* ---- pictures.c ---- */
/* Gives r its pictures: those that are known, or new ones that wait for the tower. [lock held] */
int qvl__pictures_take(qvl_engine *e, qvl__request *r);
/* r needs its pictures no more; the least recently used of those that nobody needs go when they are too many. [lock held] */
void qvl__pictures_give(qvl_engine *e, qvl__request *r);
/* The embedding of visual i; NULL until it is there. */
const qvl_embedding *qvl__picture_embedding(const qvl__request *r, int i);
/* Whether the embedding of these pixels is there. [lock held] */
bool qvl__picture_known(qvl_engine *e, const uint8_t hash[32]);
/* What encoding the pictures that r had to wait for took. */
double qvl__pictures_ms(const qvl__request *r);
/* Whether a running request waits for a picture. */
bool qvl__pictures_wanted(const qvl_engine *e);
/* Encodes pictures that running requests wait for, slice by slice, until the clock says until_ms; at least one slice. Without
 * wait, what a device does beside this thread is left to it, and looked at again in the next step. */
void qvl__pictures_work(qvl_engine *e, double until_ms, bool wait);
/* Gives the batch in the tower up when all who wanted it are gone. */
void qvl__pictures_abandon(qvl_engine *e);

/* ---- batch.c ---- */
/* Starts waiting requests, in order, while there are places and blocks. */
void qvl__batch_admit(qvl_engine *e);
/* Whether a running request has rows to prefill. */
bool qvl__batch_prefills(const qvl_engine *e);
/* Picks the rows of this step: decodes first, then at most prefill_rows rows of prompts. Fills e->rows; b->rows = 0 when
 * there is nothing to run. Row i of the outputs belongs to e->rows.out_request[i]. */
void qvl__batch_build(qvl_engine *e, qvl__batch *b, int prefill_rows);
/* Gives the blocks of r that are full now their names, for others to share. */
void qvl__batch_name_blocks(qvl_engine *e, qvl__request *r);

/* ---- speculate.c ---- */
/* Fills r->draft with at most n tokens that followed the last tokens of the sequence when they came before; how many. */
int qvl__speculate(qvl__request *r, int n);

/* ---- answer.c ---- */
/* Room for one more event of a request that is not running. */
static inline bool qvl__answer_room(const qvl_engine *e) { return e->n_events < 256; }
/* Lists the outputs that the device may sample, if it does that. */
void qvl__answer_draws(qvl_engine *e, qvl__batch *b);
/* Turns output number out of the step into events of its request. */
void qvl__answer_row(qvl_engine *e, const qvl__batch *b, int out);
/* Ends a request before its time: "cancelled" or "deadline". */
void qvl__answer_end(qvl_engine *e, qvl__request *r, const char *reason);
/* Ends a request with the thread's last error. */
void qvl__answer_fail(qvl_engine *e, qvl__request *r, int code);
/* Frees what ended in the last step. */
void qvl__answer_bury(qvl_engine *e);

#endif
