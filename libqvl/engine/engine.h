/* engine.h - requests, and the engine that runs them together.
 *
 * Job:        continuous batching: queue.c takes requests in, batch.c picks the rows of a step, engine.c runs it.
 * Input:      prompts and options from any thread; steps from one thread.
 * Output:     events.
 * Invariants: a request is in exactly one place: inbox, waiting, running, or gone;
 *             a running request holds the KV blocks of the tokens it has; when none is left for the next token, the
 *             youngest running request gives its blocks back and is computed again later, to the same bits (law 6);
 *             everything that other threads touch is under lock; the rest belongs to the stepping thread.
 */
#ifndef QVL__ENGINE_H
#define QVL__ENGINE_H

#include <pthread.h>

#include "../forward/forward.h"
#include "../sample/sample.h"
#include "../stream/stream.h"

#define QVL__MAX_STOP_IDS 64

typedef struct qvl__request {
    struct qvl__request *next; /* inbox or waiting list */
    uint64_t id;
    qvl_prompt *prompt;
    qvl_embedding **embeddings; /* of prompt->visuals[i]; NULL until encoded */
    qvl__sampler sampler;
    qvl__detok detok;
    qvl__stop stop;
    int max_tokens, min_tokens;
    bool ignore_eos, return_logits;
    int32_t banned[QVL__MAX_EOS + QVL__MAX_STOP_IDS]; /* end tokens: stop_ids behind the model's own */
    int n_eos, n_stop_ids;

    int prompt_n, cached, generated; /* prompt tokens; tokens whose keys are in the cache; tokens of the answer */
    int encoded;                     /* embeddings [0, encoded) are there */
    int32_t *answer;                 /* [max_tokens]; the last one is not in the cache yet */
    int32_t *table;                  /* [max_blocks] KV blocks, of which it holds the first n_blocks */
    int n_blocks, max_blocks;
    qvl__key *keys;                  /* [max_blocks] names of full blocks, n_keys of them known: the prompt's from the start */
    int n_keys, named;                       /* blocks [0, named) have been named in the pool, or came from it */
    int prefix;                      /* prompt tokens found in the cache */
    atomic_bool cancelled;
    double submitted, started, first_token, vision_ms;
} qvl__request;

struct qvl_event {
    int type;
    uint64_t request;
    int32_t token;
    qvl__buf text;
    const char *finish_reason;
    int error;
    char message[512];
    qvl__choice choice; /* logprobs when has_logprobs */
    bool has_logprobs;
    float *logits; /* of return_logits; owned */
    size_t n_logits;
    double usage[9];
};

struct qvl_engine {
    qvl_model *model;
    int max_requests, max_context, max_batched;
    bool prefix_cache;
    qvl__kv kv;
    qvl__blocks blocks;
    qvl__text_ws ws;

    pthread_mutex_t lock; /* inbox, live, next_id, wake flag, stats */
    pthread_cond_t wake;
    qvl__request *inbox, **inbox_tail;
    qvl__request **live; /* every request that has not ended, for cancel */
    int n_live, cap_live;
    uint64_t next_id;
    bool woken;
    struct {
        uint64_t submitted, finished, failed, cancelled, steps, prompt_tokens, prefix_tokens, generated_tokens, images, preempted;
        int running, blocks_used, blocks_kept;
    } stats;

    /* the stepping thread's */
    atomic_uintptr_t owner; /* address of the owner's thread-local mark; 0 until somebody steps */
    qvl__request *waiting, **waiting_tail;
    qvl__request **running;
    int n_running;
    uint64_t images_encoded, prefix_tokens, preempted;
    int turn; /* where decodes start when not all of them fit a step */
    qvl_event *events;
    int n_events, cap_events;
    struct { /* one step's rows, host side */
        int32_t *tokens, *positions, *seq, *pos, *table, *visual_row, *visual_index, *out_row;
        const qvl_embedding **visual_src;
        qvl__request **out_request;
        int prompt_rows; /* how many rows are of prompts */
    } rows;
};

/* Tokens of the sequence so far: prompt and answer. */
static inline int qvl__request_tokens(const qvl__request *r) { return r->prompt_n + r->generated; }

/* ---- queue.c ---- */
void qvl__request_free(qvl__request *r);
/* Computes keys[block] of a block that is full: of the prompt, or of the answer as well. */
void qvl__request_key(qvl__request *r, int block);
/* Moves the inbox behind the waiting list. */
void qvl__queue_drain(qvl_engine *e);
/* Forgets an ended request and counts how it ended. */
void qvl__queue_ended(qvl_engine *e, qvl__request *r, int event_type, bool cancelled);

/* ---- batch.c ---- */
/* Starts waiting requests, in order, while there are places and blocks. */
void qvl__batch_admit(qvl_engine *e);
/* Picks the rows of this step: decodes first, then prefill chunks in order of arrival. Fills e->rows; b->rows = 0 when
 * there is nothing to run. Row i of the outputs belongs to e->rows.out_request[i]. */
void qvl__batch_build(qvl_engine *e, qvl__batch *b);
/* After the batch ran: gives the blocks that are full now their names, for others to share. */
void qvl__batch_name_blocks(qvl_engine *e);

#endif
