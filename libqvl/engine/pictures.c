/* pictures.c - the images of all requests: each encoded once, kept while needed and a while after.
 *
 * Job:        find or make the embedding of every image and video; run the vision tower over those that are waited for.
 * Input:      requests with their visuals; how long a step may look at pictures.
 * Output:     embeddings whose data is there (READY).
 * Invariants: one entry per hash, so the same picture submitted many times at once is encoded once;
 *             an entry with users stays; of those without, the least recently used go until they take no more than
 *             embedding_cache bytes; memory is taken on submit, never in a step;
 *             only what a running request waits for is encoded, in the order of the requests.
 */
#include <string.h>

#include "engine.h"

#define TOGETHER 1024 /* patches: pictures up to this many share a batch, so that small ones fill the matrix tiles */

static size_t picture_bytes(const qvl__picture *p) {
    const qvl_embedding *e = p->embedding;
    return (size_t)e->layers * (size_t)e->tokens * (size_t)e->hidden * sizeof(float);
}

static void picture_free(qvl__picture *p) {
    qvl_embedding_free(p->embedding);
    qvl_prompt_free(p->prompt);
    qvl__free(p);
}

/* ---- the list, under lock ---- */

static qvl__picture *find(const qvl_engine *e, const uint8_t hash[32]) {
    for (int i = 0; i < e->n_pictures; i++)
        if (memcmp(e->pictures[i]->embedding->hash, hash, 32) == 0) return e->pictures[i];
    return NULL;
}

static int add(qvl_engine *e, qvl_prompt *prompt, const qvl__visual *v, qvl__picture **out) {
    if (e->n_pictures == e->cap_pictures) {
        int cap = e->cap_pictures ? 2 * e->cap_pictures : 16;
        qvl__picture **grown = qvl__array(e->pictures, (size_t)cap, sizeof *grown);
        if (!grown) return QVL_ENOMEM;
        e->pictures = grown;
        e->cap_pictures = cap;
    }
    qvl__picture *p = *out = qvl__calloc(1, sizeof *p);
    if (!p) return QVL_ENOMEM;
    int rc = qvl__embedding_for(&p->embedding, e->model, v);
    if (rc) {
        qvl__free(p);
        *out = NULL;
        return rc;
    }
    p->prompt = prompt;
    atomic_fetch_add(&prompt->refs, 1);
    p->visual = v;
    e->pictures[e->n_pictures++] = p;
    return 0;
}

static void remove_at(qvl_engine *e, int i) {
    qvl__picture *p = e->pictures[i];
    e->pictures[i] = e->pictures[--e->n_pictures];
    picture_free(p);
}

/* Entries nobody needs: those that were never encoded at once, the others when they are too many. */
static void trim(qvl_engine *e) {
    size_t idle = 0;
    for (int i = e->n_pictures; i-- > 0;) {
        qvl__picture *p = e->pictures[i];
        if (p->users || p->state == QVL__ENCODING) continue;
        if (p->state == QVL__WAITING) remove_at(e, i);
        else idle += picture_bytes(p);
    }
    while (idle > (size_t)e->asked.embedding_cache) {
        int oldest = -1;
        for (int i = 0; i < e->n_pictures; i++)
            if (e->pictures[i]->users == 0 && e->pictures[i]->state == QVL__READY &&
                (oldest < 0 || e->pictures[i]->last_use < e->pictures[oldest]->last_use))
                oldest = i;
        idle -= picture_bytes(e->pictures[oldest]);
        remove_at(e, oldest);
    }
}

int qvl__pictures_take(qvl_engine *e, qvl__request *r) {
    const qvl_prompt *p = r->prompt;
    for (int i = 0; i < p->n_visuals; i++) {
        if (p->visuals[i]->embedding) continue;
        qvl__picture *x = find(e, p->visuals[i]->hash);
        int rc = x ? 0 : add(e, r->prompt, p->visuals[i], &x);
        if (rc) return rc; /* what was taken is given back with the request */
        x->users++;
        r->pictures[i] = x;
    }
    return 0;
}

bool qvl__picture_known(qvl_engine *e, const uint8_t hash[32]) {
    const qvl__picture *x = find(e, hash);
    return x && x->done > 0;
}

void qvl__pictures_give(qvl_engine *e, qvl__request *r) {
    for (int i = 0; i < r->prompt->n_visuals; i++) {
        if (!r->pictures[i]) continue;
        r->pictures[i]->users--;
        r->pictures[i]->last_use = ++e->uses;
        r->pictures[i] = NULL;
    }
    trim(e);
}

/* ---- the stepping thread ---- */

const qvl_embedding *qvl__picture_embedding(const qvl__request *r, int i) {
    if (r->prompt->visuals[i]->embedding) return r->prompt->visuals[i]->embedding;
    const qvl__picture *p = r->pictures[i];
    return p->state == QVL__READY ? p->embedding : NULL;
}

/* The first picture that r waits for, or NULL. */
static qvl__picture *wanted(qvl__request *r) {
    while (r->ready < r->prompt->n_visuals && qvl__picture_embedding(r, r->ready)) r->ready++;
    return r->ready < r->prompt->n_visuals ? r->pictures[r->ready] : NULL;
}

bool qvl__pictures_wanted(const qvl_engine *e) {
    for (int i = 0; i < e->n_running; i++)
        if (wanted(e->running[i])) return true;
    return false;
}

/* Adds a picture to the batch; false when that is full. */
static bool put(qvl_engine *e, qvl__picture *p) {
    int n = e->encoding.n, rows = qvl__visual_rows(p->visual);
    if (n == e->plan.max_requests || (n && e->encoding.rows + rows > TOGETHER)) return false;
    p->state = QVL__ENCODING;
    e->encoding.picture[n] = p;
    e->encoding.visual[n] = p->visual;
    e->encoding.embedding[n] = p->embedding;
    e->encoding.n++;
    e->encoding.rows += rows;
    return true;
}

double qvl__pictures_ms(const qvl__request *r) {
    double ms = 0;
    for (int i = 0; i < r->prompt->n_visuals; i++)
        if (r->pictures[i] && r->pictures[i]->state == QVL__READY && r->pictures[i]->done > r->started) ms += r->pictures[i]->ms;
    return ms;
}

/* Fills the tower with the next pictures, in the order of the requests; false when none is waited for. */
static bool start(qvl_engine *e) {
    e->encoding.n = e->encoding.rows = 0;
    e->encoding.ms = 0;
    e->encoding.start = qvl__now_ms();
    for (int i = 0; i < e->n_running; i++) {
        const qvl__request *r = e->running[i];
        if (!wanted(e->running[i])) continue;
        for (int k = r->ready; k < r->prompt->n_visuals; k++) {
            qvl__picture *p = r->pictures[k];
            if (!p || p->state != QVL__WAITING) continue; /* or it is in the batch already */
            if (!put(e, p)) goto full;
        }
    }
full:
    if (e->encoding.n) qvl__tower_start(e->tower, e->encoding.visual, e->encoding.embedding, e->encoding.n);
    return e->encoding.n > 0;
}

/* The batch is done, or given up because all who wanted it are gone. */
static void end(qvl_engine *e, bool done) {
    for (int i = 0; i < e->encoding.n; i++) {
        qvl__picture *p = e->encoding.picture[i];
        p->ms = e->encoding.ms * qvl__visual_rows(p->visual) / e->encoding.rows;
        p->done = qvl__now_ms();
        p->state = done ? QVL__READY : QVL__WAITING;
        if (!done) continue;
        qvl_prompt_free(p->prompt); /* the pixels are not needed any more */
        p->prompt = NULL;
        p->visual = NULL;
        e->counts.images++;
    }
    e->encoding.n = 0;
    pthread_mutex_lock(&e->lock);
    trim(e);
    pthread_mutex_unlock(&e->lock);
}

void qvl__pictures_abandon(qvl_engine *e) {
    int users = 0;
    if (!e->encoding.n) return;
    pthread_mutex_lock(&e->lock);
    for (int i = 0; i < e->encoding.n; i++) users += e->encoding.picture[i]->users;
    pthread_mutex_unlock(&e->lock);
    if (users) return;
    qvl__tower_stop(e->tower);
    end(e, false);
}

void qvl__pictures_work(qvl_engine *e, double until_ms, bool wait) {
    bool beside = e->model->vision != e->model->device;
    do {
        if (!e->encoding.n && !start(e)) return;
        double before = qvl__now_ms();
        int done = qvl__tower_work(e->tower, until_ms, wait);
        double ms = qvl__now_ms() - before;
        if (beside) ms = done ? qvl__now_ms() - e->encoding.start : 0; /* this thread's time says nothing */
        e->encoding.ms += ms;
        e->counts.vision_ms += ms;
        if (!done) return;
        end(e, done > 0);
        e->encoding.failed = done < 0;
        if (done < 0) return;
    } while (qvl__now_ms() < until_ms);
}
