/* request.c - one request: its memory, the names of its KV blocks, what it has in common with another.
 *
 * Job:        read the request's options; take all memory that it will ever need; hash its blocks.
 * Input:      a prompt, options.
 * Output:     qvl__request.
 * Invariants: a request that can never fit is refused here, with the numbers; nothing is allocated for it later.
 */
#include <jansson.h>
#include <string.h>

#include "engine.h"

void qvl__request_free(qvl_engine *e, qvl__request *r) {
    if (!r) return;
    if (r->pictures) {
        pthread_mutex_lock(&e->lock);
        qvl__pictures_give(e, r);
        pthread_mutex_unlock(&e->lock);
    }
    qvl__free(r->pictures);
    qvl_prompt_free(r->prompt);
    qvl__sampler_free(&r->sampler);
    qvl__stop_free(&r->stop);
    for (int i = 0; r->text && i < r->speculate + 2; i++) qvl__buf_free(&r->text[i]);
    qvl__free(r->text);
    qvl__buf_free(&r->piece);
    qvl__free(r->logits);
    qvl__free(r->answer);
    qvl__free(r->keys);
    qvl__free(r->table);
    qvl__free(r);
}

/* ---- making ---- */

/* Option stop_token_ids: a JSON array of ids. */
static int read_stop_ids(qvl__request *r, const qvl_options *o, int vocab) {
    const char *text = qvl__opt_str(o, "stop_token_ids");
    if (!*text) return 0;
    json_t *a;
    int rc = qvl__json_parse(&a, text, strlen(text), "option stop_token_ids");
    if (rc) return rc;
    if (!json_is_array(a) || json_array_size(a) > QVL__MAX_STOP_IDS)
        rc = qvl__fail(QVL_EINVAL, "option stop_token_ids: not a JSON array of at most %d ids", QVL__MAX_STOP_IDS);
    for (size_t i = 0; rc == 0 && i < json_array_size(a); i++) {
        const json_t *v = json_array_get(a, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) >= vocab)
            rc = qvl__fail(QVL_EINVAL, "option stop_token_ids: entry %zu is not a token id below %d", i, vocab);
        else r->banned[r->n_eos + r->n_stop_ids++] = (int32_t)json_integer_value(v);
    }
    json_decref(a);
    return rc;
}

/* Whether prompt and answer can ever fit. */
static int read_length(qvl__request *r, const qvl_engine *e, const qvl_options *o) {
    const qvl_prompt *p = r->prompt;
    int64_t room = e->plan.max_context - (int64_t)p->n, want = qvl__opt_i64(o, "max_tokens");
    if (room < 1)
        return qvl__fail(QVL_ECONTEXT, "the prompt has %zu tokens; max_context is %d and must leave room for an answer", p->n, e->plan.max_context);
    if (want > room && qvl__opt_is_set(o, "max_tokens"))
        return qvl__fail(QVL_ECONTEXT, "prompt of %zu tokens and max_tokens %lld are more than max_context %d; raise max_context or lower max_tokens", p->n,
                         (long long)want, e->plan.max_context);
    r->max_tokens = (int)(want < room ? want : room);
    r->max_blocks = qvl__blocks_for((int64_t)p->n + r->max_tokens);
    if (r->max_blocks > e->blocks.total)
        return qvl__fail(QVL_ECONTEXT, "prompt of %zu tokens and %d of answer need %d KV blocks of %d tokens; the engine has %d (option kv_blocks)", p->n,
                         r->max_tokens, r->max_blocks, QVL__KV_BLOCK, e->blocks.total);
    for (int i = 0; i < p->n_visuals; i++)
        if (!p->visuals[i]->embedding && qvl__visual_rows(p->visuals[i]) > e->plan.image_rows)
            return qvl__fail(QVL_ELIMIT, "image or video %d of the prompt has %d tokens; the engine encodes at most %d at once (option max_image_tokens)", i,
                             p->visuals[i]->tokens, e->plan.image_rows / (qvl__visual_rows(p->visuals[i]) / p->visuals[i]->tokens));
    return 0;
}

static int take_memory(qvl__request *r, qvl_engine *e, bool logits) {
    size_t vocab = (size_t)e->model->config.text.vocab, slots = (size_t)r->speculate + 2, longest = 0;
    r->table = qvl__array(NULL, (size_t)r->max_blocks, sizeof *r->table);
    r->answer = qvl__array(NULL, (size_t)r->max_tokens, sizeof *r->answer);
    r->keys = qvl__array(NULL, (size_t)r->max_blocks, sizeof *r->keys);
    r->text = qvl__calloc(slots, sizeof *r->text);
    if (logits) r->logits = qvl__array(NULL, slots - 1, vocab * sizeof(float));
    if (!r->table || !r->answer || !r->keys || !r->text || (logits && !r->logits)) return QVL_ENOMEM;
    for (int i = 0; i < r->stop.n; i++)
        if (r->stop.stops[i].len > longest) longest = r->stop.stops[i].len;
    bool ok = qvl__buf_reserve(&r->piece, e->piece_bytes);
    for (size_t i = 0; i < slots; i++) ok = ok && qvl__buf_reserve(&r->text[i], e->piece_bytes + longest); /* held back, and new */
    return ok ? 0 : QVL_ENOMEM;
}

static int fill(qvl__request *r, qvl_engine *e, const qvl_options *o, int64_t seed) {
    const qvl__config *c = &e->model->config;
    const qvl_prompt *p = r->prompt;
    r->priority = (int)qvl__opt_i64(o, "priority");
    r->prompt_n = (int)p->n;
    r->min_tokens = (int)qvl__opt_i64(o, "min_tokens");
    r->ignore_eos = qvl__opt_i64(o, "ignore_eos") != 0;
    r->speculate = (int)qvl__opt_i64(o, "speculate");
    r->prompt_logprobs = r->choice == 0 ? (int)qvl__opt_i64(o, "prompt_logprobs") : -1; /* they are the same for all choices */
    r->share = e->prefix_cache && r->prompt_logprobs < 0; /* what is not computed has no logits */
    if (!r->ignore_eos)
        for (int i = 0; i < c->generation.n_eos; i++) r->banned[r->n_eos++] = c->generation.eos[i];
    int rc = read_length(r, e, o);
    if (rc == 0) rc = qvl__sampler_init(&r->sampler, &e->scratch, o, &c->generation, c->text.vocab, p->tokens, p->n);
    r->sampler.p.seed = (int64_t)((uint64_t)seed + (uint64_t)r->choice);
    if (rc == 0) rc = qvl__stop_init(&r->stop, qvl__opt_str(o, "stop"));
    if (rc == 0) rc = read_stop_ids(r, o, c->text.vocab);
    if (rc == 0) rc = take_memory(r, e, qvl__opt_i64(o, "return_logits") != 0);
    /* here, on the caller's thread, rather than in a step */
    for (int i = 0; rc == 0 && e->prefix_cache && i < r->prompt_n / QVL__KV_BLOCK; i++) qvl__request_key(r, i);
    return rc;
}

int qvl__request_draft(qvl__request **out, qvl_engine *e, const qvl_prompt *p, const qvl_options *o, int choice, int64_t seed) {
    qvl__request *r = *out = qvl__calloc(1, sizeof *r);
    if (!r) return QVL_ENOMEM;
    r->choice = choice;
    r->prompt = (qvl_prompt *)(uintptr_t)p;
    atomic_fetch_add(&r->prompt->refs, 1);
    int rc = fill(r, e, o, seed);
    if (rc) {
        qvl__request_free(e, r);
        *out = NULL;
    }
    return rc;
}

int qvl__request_new(qvl__request **out, qvl_engine *e, const qvl_prompt *p, const qvl_options *o, int choice, int64_t seed) {
    int rc = qvl__request_draft(out, e, p, o, choice, seed);
    if (rc) return rc;
    qvl__request *r = *out;
    if (p->n_visuals && !(r->pictures = qvl__calloc((size_t)p->n_visuals, sizeof *r->pictures))) rc = QVL_ENOMEM;
    if (rc == 0 && p->n_visuals) {
        pthread_mutex_lock(&e->lock);
        rc = qvl__pictures_take(e, r);
        pthread_mutex_unlock(&e->lock);
    }
    r->submitted = qvl__now_ms();
    int64_t deadline = qvl__opt_i64(o, "deadline_ms");
    r->deadline = deadline ? r->submitted + (double)deadline : 0;
    if (rc) {
        qvl__request_free(e, r);
        *out = NULL;
    }
    return rc;
}

/* ---- the contents of blocks ---- */

const qvl__run *qvl__prompt_run(const qvl_prompt *p, int i) {
    int lo = 0, hi = p->n_runs; /* the first run that ends behind i; runs ascend */
    while (lo < hi) {
        int mid = (lo + hi) / 2;
        if (p->runs[mid].start + (size_t)p->runs[mid].tokens <= (size_t)i) lo = mid + 1;
        else hi = mid;
    }
    return lo < p->n_runs && p->runs[lo].start <= (size_t)i ? &p->runs[lo] : NULL;
}

void qvl__request_key(qvl__request *r, int block) {
    const qvl_prompt *p = r->prompt;
    int first = block * QVL__KV_BLOCK, n = 0;
    int32_t tokens[QVL__KV_BLOCK];
    qvl__mark marks[QVL__KV_BLOCK]; /* a run has at least one token */
    for (int i = 0; i < QVL__KV_BLOCK; i++) tokens[i] = qvl__request_token(r, first + i);
    for (int i = 0; i < QVL__KV_BLOCK && first + i < r->prompt_n;) {
        const qvl__run *run = qvl__prompt_run(p, first + i);
        if (!run) {
            i++;
            continue;
        }
        marks[n++] = (qvl__mark){i, run->offset + first + i - (int)run->start, p->visuals[run->visual]->hash};
        i = (int)run->start + run->tokens - first; /* behind the run */
    }
    r->keys[block] = qvl__prefix_key(block ? r->keys[block - 1] : (qvl__key){0}, tokens, marks, n);
    r->n_keys = block + 1;
}

/* Token i of both, and what it stands for. */
static bool same_token(const qvl__request *a, const qvl__request *b, int i) {
    if (qvl__request_token(a, i) != qvl__request_token(b, i)) return false;
    const qvl__run *x = i < a->prompt_n ? qvl__prompt_run(a->prompt, i) : NULL, *y = i < b->prompt_n ? qvl__prompt_run(b->prompt, i) : NULL;
    if (!x || !y) return x == y;
    return x->offset + i - (int)x->start == y->offset + i - (int)y->start &&
           memcmp(a->prompt->visuals[x->visual]->hash, b->prompt->visuals[y->visual]->hash, 32) == 0;
}

int qvl__request_common(const qvl__request *a, const qvl__request *b) {
    int lo = 0, hi = a->n_keys < b->n_keys ? a->n_keys : b->n_keys; /* a chain: equal keys come before unequal ones */
    while (lo < hi) {
        int mid = (lo + hi) / 2;
        if (memcmp(&a->keys[mid], &b->keys[mid], sizeof a->keys[mid]) == 0) lo = mid + 1;
        else hi = mid;
    }
    int n = qvl__request_tokens(a) < qvl__request_tokens(b) ? qvl__request_tokens(a) : qvl__request_tokens(b);
    int i = lo * QVL__KV_BLOCK, end = i + QVL__KV_BLOCK < n ? i + QVL__KV_BLOCK : n;
    while (i < end && same_token(a, b, i)) i++;
    return i;
}
