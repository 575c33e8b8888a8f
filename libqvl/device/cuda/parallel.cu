/* parallel.cu - one device over several GPUs (tensor parallel).
 *
 * Job:        the op table for a model that is divided among GPUs: a thread for each GPU carries every op out on its part.
 * Input:      ops; GPU 0's pointers stand for a buffer on all GPUs.
 * Output:     the same ops on each GPU, over its own buffers. What part of an op is a GPU's own business (divide.h, and the
 *             files of the ops), and so are sums over GPUs (sums.cu): ops of all GPUs stand in the same order.
 * Invariants: ops are written once into a ring that every thread reads at its own pace; what can fail or is rare (memory,
 *             weights) is done by the caller itself while the threads rest; the ring keeps small copies to the GPUs, for large
 *             ones the caller waits until every thread has taken its own.
 */
#include "cuda.h"

#include <new>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <type_traits>

#define RING ((uint64_t)4 << 20)
#define SMALL ((size_t)64 << 10) /* largest copy that goes through the ring */
#define SPINS 4000               /* looks at the ring before a thread sleeps */

struct parallel;

/* A buffer: where it is on each GPU. */
struct region {
    char *at[MOST_GPUS];
    size_t size;
};

/* One GPU and its thread. */
struct seat {
    parallel *all;
    cuda *gpu;
    int rank;
    pthread_t thread;
    bool started, stop;
    std::atomic<uint64_t> done; /* bytes of the ring that are read */

    /* This GPU's address of p, which lies in a buffer of GPU 0; NULL is NULL. */
    template <class T> T *here(T *p) const;
};

struct record {
    void (*run)(const record *r, seat *s);
    uint64_t bytes; /* with what follows it */
};

struct parallel {
    qvl__device device; /* first: a qvl__device * is a parallel * */
    const qvl__host *host;
    qvl__device *cpu;
    int count;
    seat seats[MOST_GPUS];
    std::atomic<bool> broken;
    std::recursive_mutex lock; /* held by who writes the ring, from replay to recorded */

    char *ring;
    std::atomic<uint64_t> written;
    pthread_mutex_t sleep;
    pthread_cond_t more, read; /* the ring has more; somebody has read */
    std::atomic<int> sleepers; /* threads that wait for one of the two */

    region *regions; /* by address on GPU 0 */
    int n_regions, room;
};

static parallel *all_of(qvl__device *d) { return reinterpret_cast<parallel *>(d); }

/* ---- addresses ---- */

/* Regions that begin at or before p. */
static int regions_before(const parallel *p, const void *at) {
    int lo = 0, hi = p->n_regions;
    while (lo < hi) {
        int mid = (lo + hi) / 2;
        if (p->regions[mid].at[0] <= (const char *)at) lo = mid + 1;
        else hi = mid;
    }
    return lo;
}

template <class T> T *seat::here(T *p) const {
    if (!p) return NULL;
    int i = regions_before(all, p);
    const region *r = i ? &all->regions[i - 1] : NULL;
    size_t off = r ? (size_t)((const char *)p - r->at[0]) : 0;
    if (r && off < r->size) return (T *)(r->at[rank] + off);
    cuda_failed(gpu, QVL_EINTERNAL, "an op", "an address that no buffer has");
    return NULL;
}

/* ---- the ring ---- */

/* Sleeps until ready() or, first, looks a while. */
template <class R> static void await(parallel *p, pthread_cond_t *c, R ready) {
    for (int i = 0; i < SPINS; i++) {
        if (ready()) return;
        if (i % 64 == 63) sched_yield();
    }
    pthread_mutex_lock(&p->sleep);
    p->sleepers++;
    while (!ready()) pthread_cond_wait(c, &p->sleep);
    p->sleepers--;
    pthread_mutex_unlock(&p->sleep);
}

/* Behind a change that somebody may sleep for. */
static void wake(parallel *p, pthread_cond_t *c) {
    if (p->sleepers.load() == 0) return;
    pthread_mutex_lock(&p->sleep);
    pthread_cond_broadcast(c);
    pthread_mutex_unlock(&p->sleep);
}

static bool all_have_read(const parallel *p, uint64_t to) {
    for (int i = 0; i < p->count; i++)
        if (p->seats[i].done.load() < to) return false;
    return true;
}

static void drain(parallel *p) {
    uint64_t to = p->written.load();
    await(p, &p->read, [=] { return all_have_read(p, to); });
}

static void skip(const record *, seat *) {}

/* Room for a record of so many bytes, in one piece. */
static char *room_for(parallel *p, uint64_t bytes) {
    uint64_t at = p->written.load(), left = RING - at % RING, need = at + bytes + (left < bytes ? left : 0);
    if (need > RING) await(p, &p->read, [=] { return all_have_read(p, need - RING); });
    if (left >= bytes) return p->ring + at % RING;
    record *r = reinterpret_cast<record *>(p->ring + at % RING); /* lengths are multiples of 16, so a record fits */
    r->run = skip, r->bytes = left;
    p->written.store(at + left);
    wake(p, &p->more);
    return p->ring;
}

template <class F> struct posted : record {
    F f;
};

/* Every GPU's thread will call f(its seat, the payload). */
template <class F> static void post(parallel *p, const F &f, const void *payload = NULL, size_t size = 0) {
    static_assert(std::is_trivially_copyable<F>::value, "a record is forgotten, not destroyed");
    constexpr uint64_t head = (sizeof(posted<F>) + 15) / 16 * 16;
    uint64_t bytes = head + (size + 15) / 16 * 16;
    char *at = room_for(p, bytes);
    auto *r = new (at) posted<F>{{NULL, bytes}, f};
    r->run = [](const record *mine, seat *s) { static_cast<const posted<F> *>(mine)->f(s, (const void *)((const char *)mine + head)); };
    if (size) memcpy(at + head, payload, size);
    p->written.store(p->written.load() + bytes);
    wake(p, &p->more);
}

static void *work(void *arg) {
    seat *s = (seat *)arg;
    parallel *p = s->all;
    while (!s->stop) {
        uint64_t at = s->done.load();
        await(p, &p->more, [=] { return p->written.load() != at; });
        const record *r = reinterpret_cast<const record *>(p->ring + at % RING);
        r->run(r, s);
        s->done.store(at + r->bytes);
        wake(p, &p->read);
    }
    return NULL;
}

/* ---- ops ---- */

/* An op on every GPU: f(the GPU's device, its seat). */
template <class F> static void each(qvl__device *d, const F &f) {
    parallel *p = all_of(d);
    std::lock_guard<std::recursive_mutex> hold(p->lock);
    post(p, [f](seat *s, const void *) { f(&s->gpu->device, s); });
}

/* The same done by the caller, GPU by GPU, while the threads rest; f gives 0 or a failure, which is the first one's. */
template <class F> static int rest(qvl__device *d, const F &f) {
    parallel *p = all_of(d);
    std::lock_guard<std::recursive_mutex> hold(p->lock);
    drain(p);
    int rc = 0;
    for (int i = 0; i < p->count && rc == 0; i++) rc = f(&p->seats[i].gpu->device, i);
    return rc;
}

static void *alloc(qvl__device *d, size_t size) {
    parallel *p = all_of(d);
    std::lock_guard<std::recursive_mutex> hold(p->lock);
    drain(p);
    region r = {{}, size ? size : 1};
    bool ok = true;
    if (p->n_regions == p->room) {
        int room = p->room ? 2 * p->room : 256;
        region *more = (region *)p->host->calloc((size_t)room, sizeof *more);
        if (!more) return NULL;
        if (p->n_regions) memcpy(more, p->regions, (size_t)p->n_regions * sizeof *more);
        p->host->free(p->regions);
        p->regions = more, p->room = room;
    }
    for (int i = 0; i < p->count && ok; i++) ok = (r.at[i] = (char *)cuda_alloc(&p->seats[i].gpu->device, size)) != NULL;
    if (!ok) {
        for (int i = 0; i < p->count; i++) cuda_free(&p->seats[i].gpu->device, r.at[i], size);
        return NULL;
    }
    int at = regions_before(p, r.at[0]);
    memmove(p->regions + at + 1, p->regions + at, (size_t)(p->n_regions++ - at) * sizeof r);
    p->regions[at] = r;
    return r.at[0];
}

static void free_all(qvl__device *d, void *at, size_t size) {
    parallel *p = all_of(d);
    if (!at) return;
    std::lock_guard<std::recursive_mutex> hold(p->lock);
    drain(p);
    int i = regions_before(p, at) - 1;
    region r = p->regions[i];
    memmove(p->regions + i, p->regions + i + 1, (size_t)(--p->n_regions - i) * sizeof r);
    for (int g = 0; g < p->count; g++) cuda_free(&p->seats[g].gpu->device, r.at[g], size);
}

static void put(qvl__device *d, void *dst, const void *host, size_t size) {
    parallel *p = all_of(d);
    std::lock_guard<std::recursive_mutex> hold(p->lock);
    if (size <= SMALL) {
        post(p, [=](seat *s, const void *copy) { cuda_put(&s->gpu->device, s->here((char *)dst), copy, size); }, host, size);
        return;
    }
    each(d, [=](qvl__device *g, const seat *s) { cuda_put(g, s->here((char *)dst), host, size); });
    drain(p);
}

/* Rows that are read back are the same on all GPUs. */
static void get(qvl__device *d, void *host, const void *src, size_t size) {
    parallel *p = all_of(d);
    std::lock_guard<std::recursive_mutex> hold(p->lock);
    each(d, [=](qvl__device *g, const seat *s) {
        if (s->rank == 0) g->get(g, host, s->here((const char *)src), size);
    });
    drain(p);
}

static int sync_all(qvl__device *d) {
    parallel *p = all_of(d);
    std::lock_guard<std::recursive_mutex> hold(p->lock);
    each(d, [](qvl__device *, const seat *s) { cuda_wait(s->gpu, NULL); });
    drain(p);
    const cuda *bad = NULL; /* the one that tells most: not that another one has failed */
    for (int i = 0; i < p->count; i++) {
        const cuda *c = p->seats[i].gpu;
        if (c->failed && (!bad || strstr(bad->failure, "another GPU"))) bad = c;
    }
    return bad ? p->host->fail(bad->failed, "%s", bad->failure) : 0;
}

static uint64_t room(qvl__device *d) {
    uint64_t least = UINT64_MAX;
    rest(d, [&](qvl__device *g, int) {
        uint64_t r = g->room(g);
        if (r < least) least = r;
        return 0;
    });
    return least;
}

/* The GPUs remember the same steps, as they see the same ones. */
static bool replay(qvl__device *d, const uint64_t key[4]) {
    parallel *p = all_of(d);
    p->lock.lock(); /* held until recorded */
    struct {
        uint64_t key[4];
    } k;
    memcpy(k.key, key, sizeof k.key);
    bool found[MOST_GPUS] = {}, *to = found;
    each(d, [=](qvl__device *g, const seat *s) { to[s->rank] = g->replay(g, k.key); });
    drain(p);
    for (int i = 1; i < p->count; i++)
        if (found[i] != found[0]) cuda_failed(p->seats[i].gpu, QVL_EINTERNAL, "a recorded step", "the GPUs do not remember the same");
    if (found[0]) p->lock.unlock();
    return found[0];
}

static void recorded(qvl__device *d) {
    each(d, [](qvl__device *g, const seat *) { g->recorded(g); });
    all_of(d)->lock.unlock();
}

/* ---- weights and cache: data is an array with each GPU's ---- */

static const qvl__matrix *part_at(const qvl__matrix *m, int rank) { return (const qvl__matrix *)m->data + rank; }
static qvl__kv *part_at(const qvl__kv *kv, int rank) { return (qvl__kv *)kv->data + rank; }

static void matrix_free(qvl__device *d, qvl__matrix *m) {
    if (m->data)
        rest(d, [=](qvl__device *g, int i) {
            g->matrix_free(g, (qvl__matrix *)m->data + i);
            return 0;
        });
    all_of(d)->host->free(m->data);
    memset(m, 0, sizeof *m);
}

template <class F> static int matrix_parts(qvl__device *d, qvl__matrix *m, const F &make) {
    memset(m, 0, sizeof *m);
    qvl__matrix *parts = (qvl__matrix *)all_of(d)->host->calloc(MOST_GPUS, sizeof *parts);
    if (!parts) return QVL_ENOMEM;
    m->data = parts;
    int rc = rest(d, [&](qvl__device *g, int i) { return make(g, &parts[i]); });
    if (rc) {
        matrix_free(d, m);
        return rc;
    }
    *m = parts[0];
    m->data = parts, m->bytes = 0;
    for (int i = 0; i < all_of(d)->count; i++) m->bytes += parts[i].bytes;
    return 0;
}

static int matrix_new(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, qvl__role role) {
    return matrix_parts(d, m, [=](qvl__device *g, qvl__matrix *one) { return g->matrix_new(g, one, type, n, k, role); });
}
static int matrix_map(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, qvl__role role, const void *data, uint64_t bytes) {
    return matrix_parts(d, m, [=](qvl__device *g, qvl__matrix *one) { return g->matrix_map(g, one, type, n, k, role, data, bytes); });
}
static void matrix_put(qvl__device *d, qvl__matrix *m, int first, int count, qvl__type src_type, const void *src) {
    rest(d, [=](qvl__device *g, int i) {
        g->matrix_put(g, (qvl__matrix *)m->data + i, first, count, src_type, src);
        return 0;
    });
}

static int kv_block_bytes(qvl__device *d, qvl__type type, int layers, int kv_heads, int head_dim, size_t *bytes) {
    qvl__device *g = &all_of(d)->seats[0].gpu->device;
    return g->kv_block_bytes(g, type, layers, kv_heads, head_dim, bytes);
}
static void kv_free(qvl__device *d, qvl__kv *kv) {
    if (kv->data)
        rest(d, [=](qvl__device *g, int i) {
            g->kv_free(g, part_at(kv, i));
            return 0;
        });
    all_of(d)->host->free(kv->data);
    memset(kv, 0, sizeof *kv);
}
static int kv_new(qvl__device *d, qvl__kv *kv, qvl__type type, int layers, int kv_heads, int head_dim, int blocks) {
    memset(kv, 0, sizeof *kv);
    qvl__kv *parts = (qvl__kv *)all_of(d)->host->calloc(MOST_GPUS, sizeof *parts);
    if (!parts) return QVL_ENOMEM;
    kv->data = parts;
    int rc = rest(d, [=](qvl__device *g, int i) { return g->kv_new(g, &parts[i], type, layers, kv_heads, head_dim, blocks); });
    if (rc) {
        kv_free(d, kv);
        return rc;
    }
    *kv = parts[0];
    kv->data = parts;
    return 0;
}
static void kv_copy(qvl__device *d, qvl__kv *kv, int from, int to) {
    qvl__kv all = *kv;
    each(d, [=](qvl__device *g, const seat *s) { g->kv_copy(g, part_at(&all, s->rank), from, to); });
}

/* ---- the model's ops ---- */

static void embed(qvl__device *d, float *y, const qvl__matrix *table, const int32_t *ids, int rows) {
    qvl__matrix all = *table;
    each(d, [=](qvl__device *g, const seat *s) { g->embed(g, s->here(y), part_at(&all, s->rank), s->here(ids), rows); });
}
static void gather_rows(qvl__device *d, float *y, const float *x, const int32_t *idx, int rows, int dim) {
    each(d, [=](qvl__device *g, const seat *s) { g->gather_rows(g, s->here(y), s->here(x), s->here(idx), rows, dim); });
}
static void scatter_rows(qvl__device *d, float *y, const float *x, const int32_t *idx, int rows, int dim, bool add) {
    each(d, [=](qvl__device *g, const seat *s) { g->scatter_rows(g, s->here(y), s->here(x), s->here(idx), rows, dim, add); });
}
static void add_interpolated(qvl__device *d, float *y, const float *table, const int32_t *index, const float *weight, int rows, int dim) {
    each(d, [=](qvl__device *g, const seat *s) { g->add_interpolated(g, s->here(y), s->here(table), s->here(index), s->here(weight), rows, dim); });
}
static void rms_norm(qvl__device *d, float *y, const float *x, const float *w, int rows, int dim, float eps) {
    each(d, [=](qvl__device *g, const seat *s) { g->rms_norm(g, s->here(y), s->here(x), s->here(w), rows, dim, eps); });
}
static void layer_norm(qvl__device *d, float *y, const float *x, const float *w, const float *b, int rows, int dim, float eps) {
    each(d, [=](qvl__device *g, const seat *s) { g->layer_norm(g, s->here(y), s->here(x), s->here(w), s->here(b), rows, dim, eps); });
}
static void matmul(qvl__device *d, float *y, const float *x, int rows, const qvl__matrix *m, const float *bias, qvl__epilogue e) {
    qvl__matrix all = *m;
    each(d, [=](qvl__device *g, const seat *s) { g->matmul(g, s->here(y), s->here(x), rows, part_at(&all, s->rank), s->here(bias), e); });
}
/* link: an array with each GPU's experts, and behind it their matrices. */
static void experts_unlink(qvl__device *d, qvl__experts *e) {
    qvl__experts *parts = (qvl__experts *)e->link;
    if (parts)
        rest(d, [=](qvl__device *g, int i) {
            g->experts_unlink(g, &parts[i]);
            return 0;
        });
    all_of(d)->host->free(parts);
    e->link = NULL;
}
static int experts_link(qvl__device *d, qvl__experts *e) {
    size_t count = (size_t)all_of(d)->count, n = (size_t)e->n;
    qvl__experts *parts = (qvl__experts *)all_of(d)->host->calloc(1, count * (sizeof *parts + 2 * n * sizeof(qvl__matrix)));
    if (!parts) return QVL_ENOMEM;
    e->link = parts;
    int rc = rest(d, [=](qvl__device *g, int i) {
        qvl__matrix *m = reinterpret_cast<qvl__matrix *>(parts + count) + 2 * n * (size_t)i;
        for (size_t k = 0; k < n; k++) m[k] = *part_at(&e->gate_up[k], i), m[n + k] = *part_at(&e->down[k], i);
        parts[i] = qvl__experts{(int)n, m, m + n, NULL};
        return g->experts_link(g, &parts[i]);
    });
    if (rc) experts_unlink(d, e);
    return rc;
}
static void moe(qvl__device *d, float *x, const float *norm, const float *logits, int rows, const qvl__experts *e, int top_k, void *work) {
    const qvl__experts *parts = (const qvl__experts *)e->link;
    each(d, [=](qvl__device *g, const seat *s) { g->moe(g, s->here(x), s->here(norm), s->here(logits), rows, &parts[s->rank], top_k, s->here((char *)work)); });
}
static size_t moe_work(qvl__device *d, int rows, int hidden, int inter, int experts, int top_k) {
    qvl__device *g = &all_of(d)->seats[0].gpu->device;
    return g->moe_work(g, rows, hidden, inter, experts, top_k);
}
static void rope_vision(qvl__device *d, float *qkv, int rows, int heads, int head_dim, const float *cos, const float *sin, int span) {
    each(d, [=](qvl__device *g, const seat *s) { g->rope_vision(g, s->here(qkv), rows, heads, head_dim, s->here(cos), s->here(sin), span); });
}
static void attention_pack(qvl__device *d, void *scratch, const float *qkv, int span, int heads, int head_dim, int head, int n) {
    each(d, [=](qvl__device *g, const seat *s) { g->attention_pack(g, s->here((char *)scratch), s->here(qkv), span, heads, head_dim, head, n); });
}
static void attention_full(qvl__device *d, float *qkv, int span, int heads, int head_dim, int head, int n, int row, int rows, const void *scratch) {
    each(d, [=](qvl__device *g, const seat *s) { g->attention_full(g, s->here(qkv), span, heads, head_dim, head, n, row, rows, s->here((const char *)scratch)); });
}
static size_t attention_full_scratch(qvl__device *d, int span, int head_dim, int n) {
    qvl__device *g = &all_of(d)->seats[0].gpu->device;
    return g->attention_full_scratch(g, span, head_dim, n);
}

/* Every GPU has all logits: one of them is enough. */
static void sample(qvl__device *d, int32_t *chosen, float *logits, int vocab, int limit, const qvl__draw *draws, int rows, const qvl__changed *changed) {
    each(d, [=](qvl__device *g, const seat *s) {
        if (s->rank == 0) g->sample(g, chosen, logits, vocab, limit, draws, rows, changed);
    });
}

static qvl__ragged here(const seat *s, qvl__ragged b) {
    b.seq = s->here(b.seq), b.pos = s->here(b.pos), b.table = s->here(b.table);
    return b;
}
static void qk_norm_rope_kv(qvl__device *d, float *qkv, int heads, const float *q_norm, const float *k_norm, float eps, const float *cos, const float *sin, qvl__kv *kv,
                            int layer, const qvl__ragged *b) {
    qvl__kv all = *kv;
    qvl__ragged rows = *b;
    each(d, [=](qvl__device *g, const seat *s) {
        qvl__ragged mine = here(s, rows);
        g->qk_norm_rope_kv(g, s->here(qkv), heads, s->here(q_norm), s->here(k_norm), eps, s->here(cos), s->here(sin), part_at(&all, s->rank), layer, &mine);
    });
}
static void attention_paged(qvl__device *d, float *out, const float *qkv, int heads, const qvl__kv *kv, int layer, const qvl__ragged *b) {
    qvl__kv all = *kv;
    qvl__ragged rows = *b;
    each(d, [=](qvl__device *g, const seat *s) {
        qvl__ragged mine = here(s, rows);
        g->attention_paged(g, s->here(out), s->here(qkv), heads, part_at(&all, s->rank), layer, &mine);
    });
}

/* ---- open and close ---- */

static void close_all(parallel *p) {
    if (p->ring) {
        post(p, [](seat *s, const void *) { s->stop = true; });
        for (int i = 0; i < p->count; i++)
            if (p->seats[i].started) pthread_join(p->seats[i].thread, NULL);
    }
    for (int i = 0; i < p->count; i++) cuda_close(p->seats[i].gpu);
    pthread_mutex_destroy(&p->sleep);
    pthread_cond_destroy(&p->more);
    pthread_cond_destroy(&p->read);
    p->host->free(p->regions);
    p->host->free(p->ring);
    const qvl__host *host = p->host;
    p->~parallel();
    host->free(p);
}

/* The CPU became ours when opening succeeded. */
static void close_parallel(qvl__device *d) {
    if (!d) return;
    qvl__device *cpu = all_of(d)->cpu;
    close_all(all_of(d));
    cpu->close(cpu);
}

static int start(parallel *p, const qvl__device_options *o) {
    cuda *gpus[MOST_GPUS];
    for (int i = 0; i < p->count; i++) {
        seat *s = &p->seats[i];
        s->all = p, s->rank = i;
        int rc = cuda_open(&s->gpu, p->cpu, o, p->host, i, true);
        if (rc) return rc;
        s->gpu->broken = &p->broken;
        gpus[i] = s->gpu;
    }
    int rc = cuda_join(gpus, p->count, p->host);
    if (rc == 0 && !(p->ring = (char *)p->host->calloc(1, RING))) rc = QVL_ENOMEM;
    for (int i = 0; i < p->count && rc == 0; i++) {
        seat *s = &p->seats[i];
        s->started = pthread_create(&s->thread, NULL, work, s) == 0;
        if (!s->started) rc = p->host->fail(QVL_ENOMEM, "no thread for GPU %d", i);
    }
    return rc;
}

int parallel_open(qvl__device **out, qvl__device *cpu, const qvl__device_options *o, const qvl__host *host) {
    *out = NULL;
    if (o->gpus > MOST_GPUS) return host->fail(QVL_EUNSUPPORTED, "%d GPUs: at most %d can share a model", o->gpus, MOST_GPUS);
    void *memory = host->calloc(1, sizeof(parallel));
    if (!memory) return QVL_ENOMEM;
    parallel *p = new (memory) parallel();
    p->host = host, p->cpu = cpu, p->count = o->gpus;
    pthread_mutex_init(&p->sleep, NULL);
    pthread_cond_init(&p->more, NULL);
    pthread_cond_init(&p->read, NULL);
    int rc = start(p, o);
    if (rc) {
        close_all(p);
        return rc;
    }
    qvl__device *d = &p->device;
    *d = p->seats[0].gpu->device;
    d->close = close_parallel;
    d->sync = sync_all;
    d->beside = NULL; /* a second set of communicators could wait for the first one's */
    d->idle = NULL;
    d->room = room;
    d->replay = replay;
    d->recorded = recorded;
    d->alloc = alloc;
    d->free = free_all;
    d->put = put;
    d->get = get;
    d->matrix_new = matrix_new;
    d->matrix_map = matrix_map;
    d->matrix_put = matrix_put;
    d->matrix_free = matrix_free;
    d->kv_block_bytes = kv_block_bytes;
    d->kv_new = kv_new;
    d->kv_free = kv_free;
    d->kv_copy = kv_copy;
    d->embed = embed;
    d->gather_rows = gather_rows;
    d->scatter_rows = scatter_rows;
    d->add_interpolated = add_interpolated;
    d->rms_norm = rms_norm;
    d->layer_norm = layer_norm;
    d->matmul = matmul;
    d->experts_link = experts_link;
    d->experts_unlink = experts_unlink;
    d->moe = moe;
    d->moe_work = moe_work;
    d->rope_vision = rope_vision;
    d->attention_pack = attention_pack;
    d->attention_full = attention_full;
    d->attention_full_scratch = attention_full_scratch;
    d->qk_norm_rope_kv = qk_norm_rope_kv;
    d->attention_paged = attention_paged;
    d->sample = sample;
    *out = d;
    return 0;
}
