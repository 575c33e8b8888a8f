/* threads.c - a pool that runs loops.
 *
 * Job:        call fn for every index of a loop on all threads and wait for the end.
 * Input:      a number of tasks; results must not depend on which thread does which.
 * Output:     all tasks done when qvl__pool_run returns.
 * Invariants: one loop at a time (callers queue on a mutex); the caller works too;
 *             tasks are taken one by one from a shared counter, so uneven tasks balance out;
 *             workers spin briefly between loops, because a forward pass is hundreds of short ones, then sleep.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include "base.h"

#define SPIN_NS 60000 /* how long an idle worker watches for the next loop before it sleeps */

struct qvl__pool {
    int threads;
    pthread_t *workers;
    pthread_mutex_t entry; /* one loop at a time */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    void (*fn)(void *ctx, int task, int worker);
    void *ctx;
    int tasks;
    atomic_int next;      /* next task */
    atomic_uint round;    /* loops started; a change is the signal to work */
    atomic_int busy;      /* workers that have not finished the current round */
    atomic_int sleeping;
    bool stop;
};

typedef struct {
    qvl__pool *pool;
    int id;
} worker_arg;

double qvl__now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void work(qvl__pool *p, int id) {
    for (;;) {
        int i = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
        if (i >= p->tasks) return;
        p->fn(p->ctx, i, id);
    }
}

/* Waits until the round is no longer seen; spins, then sleeps. */
static unsigned wait_round(qvl__pool *p, unsigned seen) {
    double until = qvl__now_ms() + SPIN_NS / 1e6;
    do {
        for (int i = 0; i < 64; i++) {
            unsigned r = atomic_load_explicit(&p->round, memory_order_acquire);
            if (r != seen) return r;
            relax();
        }
    } while (qvl__now_ms() < until);
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->sleeping, 1);
    while (atomic_load(&p->round) == seen) pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub(&p->sleeping, 1);
    pthread_mutex_unlock(&p->lock);
    return atomic_load_explicit(&p->round, memory_order_acquire);
}

static void *worker_main(void *arg) {
    worker_arg a = *(worker_arg *)arg;
    qvl__free(arg);
    unsigned seen = 0;
    for (;;) {
        seen = wait_round(a.pool, seen);
        if (a.pool->stop) return NULL;
        work(a.pool, a.id);
        atomic_fetch_sub_explicit(&a.pool->busy, 1, memory_order_release);
    }
}

static void start_round(qvl__pool *p) {
    atomic_fetch_add(&p->round, 1);
    /* A worker that is about to sleep has raised sleeping under the lock before it looked at round for the last time,
     * so either it saw the new round or we see it sleeping. */
    if (atomic_load(&p->sleeping) > 0) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
}

void qvl__pool_run(qvl__pool *p, int tasks, void (*fn)(void *ctx, int task, int worker), void *ctx) {
    if (tasks <= 0) return;
    pthread_mutex_lock(&p->entry);
    if (p->threads == 1 || tasks == 1) {
        for (int i = 0; i < tasks; i++) fn(ctx, i, 0);
        pthread_mutex_unlock(&p->entry);
        return;
    }
    p->fn = fn;
    p->ctx = ctx;
    p->tasks = tasks;
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    atomic_store_explicit(&p->busy, p->threads - 1, memory_order_relaxed);
    start_round(p);
    work(p, 0);
    for (int spins = 0; atomic_load_explicit(&p->busy, memory_order_acquire) > 0; spins++) {
        relax();
        if (spins > 4096) sched_yield(); /* more threads than processors: let the last worker run */
    }
    pthread_mutex_unlock(&p->entry);
}

int qvl__pool_threads(const qvl__pool *p) { return p->threads; }

void qvl__pool_free(qvl__pool *p) {
    if (!p) return;
    p->stop = true;
    start_round(p);
    for (int i = 0; i < p->threads - 1; i++) pthread_join(p->workers[i], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    pthread_mutex_destroy(&p->entry);
    qvl__free(p->workers);
    qvl__free(p);
}

int qvl__pool_new(qvl__pool **out, int threads) {
    *out = NULL;
    if (threads <= 0) {
        cpu_set_t set;
        threads = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    }
    qvl__pool *p = qvl__calloc(1, sizeof *p);
    if (!p) return QVL_ENOMEM;
    p->threads = 1;
    pthread_mutex_init(&p->entry, NULL);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->workers = qvl__calloc((size_t)threads, sizeof *p->workers);
    if (!p->workers) {
        qvl__pool_free(p);
        return QVL_ENOMEM;
    }
    for (int i = 1; i < threads; i++) {
        worker_arg *a = qvl__malloc(sizeof *a);
        if (!a) {
            qvl__pool_free(p);
            return QVL_ENOMEM;
        }
        *a = (worker_arg){p, i};
        if (pthread_create(&p->workers[i - 1], NULL, worker_main, a) != 0) {
            qvl__free(a);
            qvl__pool_free(p);
            return qvl__fail(QVL_ENOMEM, "cannot start worker thread %d of %d", i, threads);
        }
        p->threads = i + 1;
    }
    *out = p;
    return 0;
}
