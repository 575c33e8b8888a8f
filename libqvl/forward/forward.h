/* forward.h - the model: weights on a device, and the two graphs that run over it.
 *
 * Job:        vision tower (pixels to embeddings) and text model (tokens, embeddings and cached keys to logits).
 * Input:      visuals; ragged batches of rows, each a token of some sequence.
 * Output:     qvl_embedding; logits of the rows that asked for them.
 * Invariants: prefill and decode are the same function: a decode step is a batch of one-row chunks;
 *             a row's result depends on its sequence only (law 6), never on its neighbours;
 *             all memory of a step is in a workspace made beforehand.
 */
#ifndef QVL__FORWARD_H
#define QVL__FORWARD_H

#include "../encode/encode.h"
#include "../kv/kv.h"

struct qvl_model {
    atomic_int refs;
    qvl__config config;
    qvl__weights weights;
    qvl__pool *pool;
    qvl__device *device;
    qvl__device *vision; /* the tower's: device, or one beside it, so that decoding does not wait for pictures */
    qvl_tokenizer *tokenizer;
    qvl__template template_;
    qvl__type kv_type; /* what kv_dtype auto means */
    float *text_inv_freq; /* [head_dim / 2] */
    float text_rope_scale; /* of cos and sin; 1 without YaRN */
    uint8_t *text_axis;   /* [head_dim / 2]: 0 time, 1 height, 2 width */
};

/* ---- rope.c ---- */

/* Frequencies of the text model and the axis each one follows (transformers Qwen3VLTextRotaryEmbedding). */
int qvl__rope_init(qvl_model *m);
/* cos, sin [rows][head_dim / 2] for positions [3][stride]. */
void qvl__rope_text(const qvl_model *m, float *cos_out, float *sin_out, const int32_t *positions, int stride, int rows);
/* cos, sin [n][head_dim / 2] of patches [first, first + n) of a grid w patches wide, in 2x2 block order (transformers
 * Qwen3VLVisionRotaryEmbedding). */
void qvl__rope_vision(float *cos_out, float *sin_out, int first, int n, int w, int head_dim);
/* Position embedding of these patches: 4 table rows and weights for each, align_corners bilinear over a side x side
 * table (transformers fast_pos_embed_interpolate). */
void qvl__pos_embed(int32_t *index, float *weight, int first, int n, int h, int w, int side);

/* ---- vision.c ---- */

/* The vision tower with a workspace of its own. It encodes a batch of visuals in slices of bounded work, so that
 * decode steps can run in between; how the work is sliced or batched changes no bit (law 6). One thread at a time. */
typedef struct qvl__tower qvl__tower;
/* Room for batches of up to max_rows patches and max_visuals visuals. All memory is taken here, and the pages of a large
 * workspace are not touched before a batch needs them. */
int qvl__tower_new(qvl__tower **out, qvl_model *m, int max_rows, int max_visuals);
void qvl__tower_free(qvl__tower *t);
/* Bytes that a tower of these sizes takes; out of tower_new's own layout. */
size_t qvl__tower_bytes(const qvl_model *m, int max_rows, int max_visuals);
/* Patches of a visual: rows of the tower. */
static inline int qvl__visual_rows(const qvl__visual *v) { return v->t * v->h * v->w; }
/* An embedding of v's sizes and identity whose data is not there yet. */
int qvl__embedding_for(qvl_embedding **out, const qvl_model *m, const qvl__visual *v);
/* Starts a batch; out[i] (of qvl__embedding_for) gets visual[i]'s result. Both stay the caller's and must live until the
 * batch is done or given up. The tower must be idle and the batch fit. */
void qvl__tower_start(qvl__tower *t, const qvl__visual *const *visual, qvl_embedding *const *out, int n);
/* Does slices of the started batch until it is done or qvl__now_ms() >= until_ms, at least one slice; without wait also only
 * until its results have to come from a device that works beside this thread and is not done. 1: the batch is done, the tower
 * idle again; 0: there is more to do; or the device's failure, the batch is given up. Never allocates. */
int qvl__tower_work(qvl__tower *t, double until_ms, bool wait);
/* Gives a started batch up. */
void qvl__tower_stop(qvl__tower *t);

/* Encodes one visual with a tower of its own. Threads may call it at the same time; they take turns on the device. */
int qvl__vision_forward(qvl_model *m, const qvl__visual *v, qvl_embedding **out);

/* ---- text.c ---- */

/* Buffers for batches of up to max_rows rows, max_out of which give logits. */
typedef struct {
    int max_rows, max_out;
    size_t bytes;
    char *base; /* one device region that the pointers below divide */
    float *x, *norm, *qkv, *attn, *act, *cos, *sin, *logits;
    int32_t *ids, *seq, *pos, *index, *out, *table;
    int max_seqs, table_stride;
    float *host_cos, *host_sin;
    float *host_logits; /* where the host reads logits: logits itself in host memory */
    /* sampling on the device, where it has that (op sample) */
    qvl__draw *draws;         /* [max_out] */
    qvl__changed *changed;    /* [QVL__CHANGES] */
    int32_t *chosen;          /* [max_out] */
    qvl__draw *host_draws;
    qvl__changed *host_changed;
    int32_t *host_chosen;
    float *routes; /* mixture of experts only */
    void *experts;
} qvl__text_ws;
/* Bytes that qvl__text_ws_new takes from the device. */
size_t qvl__text_ws_bytes(const qvl_model *m, int max_rows, int max_out, int max_seqs, int table_stride);
int qvl__text_ws_new(qvl__text_ws *ws, const qvl_model *m, int max_rows, int max_out, int max_seqs, int table_stride);
void qvl__text_ws_free(qvl__text_ws *ws, const qvl_model *m);

/* One ragged batch, all pointers on the host. */
typedef struct {
    int rows, seqs;
    const int32_t *tokens;    /* [rows] */
    const int32_t *positions; /* [3][stride], M-RoPE; the first rows of each axis count */
    int stride;
    const int32_t *seq, *pos; /* [rows]: sequence, and index of the token in it */
    const int32_t *table;     /* [seqs][table_stride] KV blocks */
    int visual_rows;          /* rows whose input is a row of an embedding */
    const int32_t *visual_row;              /* [visual_rows] row of the batch */
    const qvl_embedding *const *visual_src; /* [visual_rows] */
    const int32_t *visual_index;            /* [visual_rows] token of the embedding */
    int outs;
    const int32_t *out_row; /* [outs] rows that give logits */
    int draws, changes;     /* outputs that the device samples: ws->host_draws[0, draws), by row; of ws->host_changed */
    int token_limit;        /* with draws: ids that may be taken */
} qvl__batch;
/* Tokens whose logits change, in one step; rows with more are sampled on the host. */
#define QVL__CHANGES 65536
/* Runs the batch; keys and values go into kv. ws->host_logits gets [outs][vocab], but for the rows of draws, of which
 * ws->host_chosen[row] gets what the device has taken (op sample). Fails only when the device has failed (qvl__device's sync):
 * nothing of the batch counts then. */
int qvl__text_forward(const qvl_model *m, qvl__kv *kv, qvl__text_ws *ws, const qvl__batch *b);

#endif
