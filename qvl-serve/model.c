/* model.c - models, their engines and their threads.
 *
 * Job:        model.h.
 * Input:      configuration, prompts.
 * Output:     events on the loop.
 * Invariants: a model's thread loads it, steps its engine and leaves; the loop joins it;
 *             weights and engine are freed when nobody but the list holds the model (holds == 1).
 */
#include "model.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "task.h"

#define BUCKETS 1024

struct model {
    model *next;
    server *server;
    char *name, *path;
    char **aliases, **options; /* copies */
    unsigned aliases_count, options_count;
    long created;
    atomic_int state, holds, progress; /* progress: 0..100 of the weights */
    bool wanted; /* false: unload when nobody uses it */
    qvl_model *weights;
    qvl_engine *engine;
    int max_context;
    unsigned capacity;
    meters_model *meters;
    pthread_t thread;
    bool threaded;
    atomic_bool stop;
    _Atomic double step_began; /* server_now; 0 between steps */
    uv_async_t async;
    bool closing, removed; /* the async's handle; out of the list */
    char failure[768];     /* why loading failed */
    bool finished;         /* the thread has left; under lock */

    pthread_mutex_t lock; /* what the thread hands over */
    pthread_cond_t room;
    buf outbox;
    bool loaded;

    buf inbox; /* the loop's: swapped with outbox */
    task *bucket[BUCKETS];
    unsigned live;
};

struct models {
    pthread_mutex_t lock; /* the list and what models_find reads of it */
    model *first;
};

/* ---- events from the engine's thread ---- */
static void post(model *m, const qvl_event *v, double now) {
    model_event e = {.request = qvl_event_request(v), .type = qvl_event_type(v), .choice = qvl_event_choice(v), .token = qvl_event_token(v),
                     .time = now, .logprob = qvl_event_logprob(v)};
    e.text = qvl_event_text(v, &e.text_n);
    e.error = qvl_event_error(v, &e.message);
    e.n_top = qvl_event_top_logprobs(v, &e.top_ids, &e.top_logprobs);
    const char *reason = qvl_event_finish_reason(v);
    size_t reason_n = strlen(reason) + 1, message_n = e.message ? strlen(e.message) + 1 : 1;
    for (int i = 1; e.type == QVL_EVENT_FINISHED && i <= QVL_USAGE_IMAGES_CACHED; i++) e.usage[i] = qvl_event_usage(v, i);
    /* one record: the structure, then what it points to, padded to 8 bytes */
    static const char zeros[8];
    size_t top = (size_t)e.n_top * 4, n = sizeof e + 2 * top + e.text_n + reason_n + message_n;
    buf_add(&m->outbox, &e, sizeof e);
    buf_add(&m->outbox, e.top_ids, top);
    buf_add(&m->outbox, e.top_logprobs, top);
    buf_add(&m->outbox, e.text, e.text_n);
    buf_add(&m->outbox, reason, reason_n);
    buf_add(&m->outbox, e.message ? e.message : "", message_n);
    buf_add(&m->outbox, zeros, (8 - n % 8) % 8);
}

static const char *take(model_event *e, const char *p) {
    size_t top = (size_t)e->n_top * 4;
    const char *start = p;
    p += sizeof *e;
    e->top_ids = (const int32_t *)(const void *)p;
    p += top;
    e->top_logprobs = (const float *)(const void *)p;
    p += top;
    e->text = p;
    p += e->text_n;
    e->finish_reason = p;
    p += strlen(p) + 1;
    e->message = p;
    p += strlen(p) + 1;
    return start + (((size_t)(p - start) + 7) & ~(size_t)7);
}

static task *find_task(model *m, uint64_t request) {
    task *t = m->bucket[request % BUCKETS];
    while (t && t->request != request) t = t->next_in_model;
    return t;
}

/* ---- the thread ---- */
static int on_progress(void *ud, uint64_t done, uint64_t total) {
    model *m = ud;
    atomic_store(&m->progress, total ? (int)(done * 100 / total) : 100);
    return atomic_load(&m->stop);
}

static int set_options(model *m, qvl_options *o, const char *scope) {
    for (unsigned i = 0; i < m->options_count; i++) {
        const char *eq = strchr(m->options[i], '=');
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)(eq ? eq - m->options[i] : 63), m->options[i]);
        const char *n, *sc;
        bool here = !scope;
        for (int k = 0; scope && qvl_option_info(k, &n, NULL, &sc, NULL, NULL, NULL) == 0; k++)
            if (strcmp(n, name) == 0 && strcmp(sc, scope) == 0) here = true;
        int rc = here ? qvl_options_set(o, name, eq ? eq + 1 : "true") : 0;
        if (rc) return rc;
    }
    return 0;
}

static int load(model *m) {
    qvl_options *o = NULL;
    char *plan = NULL;
    int rc = qvl_options_new(&o);
    if (!rc) rc = set_options(m, o, NULL);
    if (!rc) rc = qvl_options_set_progress(o, on_progress, m);
    if (!rc) rc = qvl_model_load(&m->weights, m->path, o);
    if (!rc) rc = qvl_engine_plan(m->weights, o, &plan);
    if (!rc) {
        json_t *j = json_loads(plan, 0, NULL);
        m->max_context = (int)json_integer_value(json_object_get(j, "max_context"));
        m->capacity = (unsigned)json_integer_value(json_object_get(j, "max_requests"));
        log_event(LOG_INFO, "memory_plan", NULL, LOG_STR("model", m->name), LOG_NUM("total", json_integer_value(json_object_get(j, "total"))),
                  LOG_NUM("weights", json_integer_value(json_object_get(j, "weights"))), LOG_NUM("kv", json_integer_value(json_object_get(j, "kv"))),
                  LOG_NUM("max_context", m->max_context), LOG_NUM("max_requests", m->capacity));
        json_decref(j);
        rc = qvl_engine_new(&m->engine, m->weights, o);
    }
    qvl_free(plan);
    qvl_options_free(o);
    if (rc) snprintf(m->failure, sizeof m->failure, "%s", qvl_last_error());
    return rc;
}

static void *thread_main(void *arg) {
    model *m = arg;
    int rc = load(m);
    pthread_mutex_lock(&m->lock);
    m->loaded = rc == 0;
    m->finished = rc != 0;
    pthread_mutex_unlock(&m->lock);
    uv_async_send(&m->async);
    while (rc == 0 && !atomic_load(&m->stop)) {
        m->step_began = server_now();
        int n = qvl_engine_step(m->engine, 200);
        double now = server_now();
        m->step_began = 0;
        if (n < 0) {
            log_event(LOG_ERROR, "engine_step", NULL, LOG_STR("model", m->name), LOG_STR("reason", qvl_last_error()));
            struct timespec pause = {0, 100000000};
            nanosleep(&pause, NULL); /* out of memory, most likely: do not spin */
            continue;
        }
        if (n == 0) continue;
        pthread_mutex_lock(&m->lock);
        while (m->outbox.len > MODEL_OUTBOX && !atomic_load(&m->stop)) pthread_cond_wait(&m->room, &m->lock);
        for (int i = 0; i < n; i++) {
            size_t before = m->outbox.len;
            post(m, qvl_engine_event(m->engine, i), now);
            while (m->outbox.failed && !atomic_load(&m->stop)) { /* no memory: wait until the loop has taken what is there */
                m->outbox.failed = false;
                m->outbox.len = before;
                uv_async_send(&m->async);
                pthread_cond_wait(&m->room, &m->lock);
                before = m->outbox.len;
                post(m, qvl_engine_event(m->engine, i), now);
            }
        }
        pthread_mutex_unlock(&m->lock);
        uv_async_send(&m->async);
    }
    pthread_mutex_lock(&m->lock);
    m->finished = true;
    pthread_mutex_unlock(&m->lock);
    uv_async_send(&m->async);
    return NULL;
}

/* ---- the loop's side ---- */
static void set_state(model *m, model_state s) {
    atomic_store(&m->state, (int)s);
    meters_model_state(m->meters, (meters_state)s);
}

static void free_model(uv_handle_t *h) {
    model *m = h->data;
    for (unsigned i = 0; i < m->aliases_count; i++) free(m->aliases[i]);
    for (unsigned i = 0; i < m->options_count; i++) free(m->options[i]);
    free(m->aliases);
    free(m->options);
    free(m->name);
    free(m->path);
    buf_free(&m->outbox);
    buf_free(&m->inbox);
    pthread_mutex_destroy(&m->lock);
    pthread_cond_destroy(&m->room);
    free(m);
}

static void thread_left(model *m) {
    pthread_join(m->thread, NULL);
    m->threaded = false;
    qvl_engine_free(m->engine);
    qvl_model_free(m->weights);
    m->engine = NULL;
    m->weights = NULL;
    m->finished = false;
    atomic_store(&m->stop, false);
    set_state(m, MODEL_UNLOADED);
    if (m->failure[0]) log_event(LOG_ERROR, "model_failed", NULL, LOG_STR("model", m->name), LOG_STR("path", m->path), LOG_STR("reason", m->failure));
    else log_event(LOG_INFO, "model_unloaded", NULL, LOG_STR("model", m->name));
    task_model_changed(m->server, m);
}

static void on_async(uv_async_t *a) {
    model *m = a->data;
    pthread_mutex_lock(&m->lock);
    buf_clear(&m->inbox);
    buf swap = m->inbox;
    m->inbox = m->outbox;
    m->outbox = swap;
    bool loaded = m->loaded, finished = m->finished;
    m->loaded = false;
    pthread_cond_signal(&m->room);
    pthread_mutex_unlock(&m->lock);
    if (loaded) {
        atomic_store(&m->progress, 100);
        set_state(m, m->wanted ? MODEL_READY : MODEL_DRAINING);
        log_event(LOG_INFO, "model_ready", NULL, LOG_STR("model", m->name), LOG_STR("path", m->path));
        task_model_changed(m->server, m);
    }
    for (const char *p = m->inbox.data, *end = p + m->inbox.len; p && p < end;) {
        model_event e;
        memcpy(&e, p, sizeof e);
        p = take(&e, p);
        task *t = find_task(m, e.request);
        if (t) task_event(t, &e);
    }
    if (m->inbox.cap > (1 << 20)) buf_free(&m->inbox);
    if (finished && m->threaded) thread_left(m);
}

static int start_thread(model *m) {
    m->failure[0] = 0;
    m->wanted = true;
    atomic_store(&m->progress, 0);
    set_state(m, MODEL_LOADING);
    if (pthread_create(&m->thread, NULL, thread_main, m)) {
        set_state(m, MODEL_UNLOADED);
        return -1;
    }
    m->threaded = true;
    log_event(LOG_INFO, "model_loading", NULL, LOG_STR("model", m->name), LOG_STR("path", m->path));
    return 0;
}

static char **copy_list(char **list, unsigned n) {
    char **copy = calloc(n ? n : 1, sizeof *copy);
    for (unsigned i = 0; copy && i < n; i++) copy[i] = strdup(list[i]);
    return copy;
}

static model *add_model(server *s, const config_model *c, char *err, size_t err_size) {
    model *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    m->server = s;
    m->name = strdup(c->name);
    m->path = strdup(c->path);
    m->aliases = copy_list(c->aliases, c->aliases_count);
    m->aliases_count = c->aliases_count;
    m->options = copy_list(c->options, c->options_count);
    m->options_count = c->options_count;
    m->created = (long)time(NULL);
    m->meters = meters_of_model(s->meters, c->name);
    atomic_store(&m->holds, 1);
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->room, NULL);
    m->async.data = m;
    if (!m->name || !m->path || !m->aliases || !m->options || uv_async_init(&s->loop, &m->async, on_async)) {
        snprintf(err, err_size, "no memory for model %s", c->name);
        free_model((uv_handle_t *)&m->async);
        return NULL;
    }
    pthread_mutex_lock(&s->models->lock);
    model **p = &s->models->first;
    while (*p) p = &(*p)->next;
    *p = m;
    pthread_mutex_unlock(&s->models->lock);
    return m;
}

int models_start(server *s, char *err, size_t err_size) {
    s->models = calloc(1, sizeof *s->models);
    if (!s->models) return -1;
    pthread_mutex_init(&s->models->lock, NULL);
    for (unsigned i = 0; i < s->config->models_count; i++) {
        model *m = add_model(s, &s->config->models[i], err, err_size);
        if (!m || start_thread(m)) return -1;
    }
    return 0;
}

void models_stop(server *s) {
    if (!s->models) return;
    for (model *m = s->models->first, *next; m; m = next) {
        next = m->next;
        atomic_store(&m->stop, true);
        if (m->threaded) {
            pthread_mutex_lock(&m->lock);
            pthread_cond_signal(&m->room);
            pthread_mutex_unlock(&m->lock);
            if (atomic_load(&m->state) != MODEL_LOADING) qvl_engine_wake(m->engine);
            pthread_join(m->thread, NULL);
        }
        qvl_engine_free(m->engine);
        qvl_model_free(m->weights);
        uv_close((uv_handle_t *)&m->async, free_model);
    }
    pthread_mutex_destroy(&s->models->lock);
    free(s->models);
    s->models = NULL;
}

/* ---- names ---- */
static bool called(const model *m, const char *name) {
    if (strcmp(m->name, name) == 0) return true;
    for (unsigned i = 0; i < m->aliases_count; i++)
        if (strcmp(m->aliases[i], name) == 0) return true;
    return false;
}

static model *find(server *s, const char *name) {
    for (model *m = s->models->first; m; m = m->next)
        if (!name || !name[0] || called(m, name)) return m;
    return NULL;
}

model *models_find(server *s, const char *name) {
    pthread_mutex_lock(&s->models->lock);
    model *m = find(s, name);
    if (m) atomic_fetch_add(&m->holds, 1);
    pthread_mutex_unlock(&s->models->lock);
    return m;
}

void model_hold(model *m) { atomic_fetch_add(&m->holds, 1); }
void model_let_go(model *m) {
    if (m) atomic_fetch_sub(&m->holds, 1);
}

const char *model_name(const model *m) { return m->name; }
model_state model_state_of(model *m) { return (model_state)atomic_load(&m->state); }
const char *model_state_name(model_state s) {
    static const char *const names[] = {"unloaded", "loading", "ready", "draining"};
    return names[s];
}
const char *model_failure(const model *m) { return m->failure; }
qvl_model *model_weights(model *m) { return m->weights; }
qvl_engine *model_engine(model *m) { return m->engine; }
int model_max_context(const model *m) { return m->max_context; }
meters_model *model_meters(model *m) { return m->meters; }
unsigned model_live(const model *m) { return m->live; }
unsigned model_capacity(const model *m) { return m->capacity; }

/* ---- requests ---- */
int model_submit(model *m, task *t) {
    uint64_t id = 0;
    int rc = qvl_engine_submit(m->engine, t->prompt, t->options, &id);
    if (rc) return rc;
    t->request = id;
    t->next_in_model = m->bucket[id % BUCKETS];
    m->bucket[id % BUCKETS] = t;
    m->live++;
    return 0;
}

void model_cancel(model *m, uint64_t request) {
    if (m->engine) qvl_engine_cancel(m->engine, request);
}

void model_forget(model *m, task *t) {
    for (task **p = &m->bucket[t->request % BUCKETS]; *p; p = &(*p)->next_in_model) {
        if (*p != t) continue;
        *p = t->next_in_model;
        m->live--;
        return;
    }
}

/* ---- at run time ---- */
int model_load(server *s, const char *name, const char *path, char *err, size_t err_size) {
    model *m = find(s, name);
    if (m) {
        if (path && path[0] && strcmp(path, m->path) != 0) {
            snprintf(err, err_size, "path: \"%s\" is %s; give the new one another name", name, m->path);
            return -1;
        }
        if (atomic_load(&m->state) == MODEL_UNLOADED && !m->threaded) return start_thread(m);
        m->wanted = true; /* it may be on its way out */
        if (atomic_load(&m->state) == MODEL_DRAINING && !atomic_load(&m->stop)) set_state(m, MODEL_READY);
        return 0;
    }
    if (!path || !path[0]) {
        snprintf(err, err_size, "path: \"%s\" is a new name; say where its checkpoint is", name);
        return -1;
    }
    config_model c = {.name = (char *)(uintptr_t)name, .path = (char *)(uintptr_t)path};
    m = add_model(s, &c, err, err_size);
    return m ? start_thread(m) : -1;
}

int model_unload(server *s, const char *name, char *err, size_t err_size) {
    model *m = find(s, name);
    if (!m) {
        snprintf(err, err_size, "name: there is no model \"%s\"", name);
        return -1;
    }
    m->wanted = false;
    if (atomic_load(&m->state) == MODEL_READY) {
        set_state(m, MODEL_DRAINING);
        task_model_changed(s, m);
    }
    return 0;
}

void models_tick(server *s) {
    for (model *m = s->models->first; m; m = m->next) {
        if (atomic_load(&m->state) != MODEL_DRAINING || m->wanted || atomic_load(&m->holds) > 1 || atomic_load(&m->stop)) continue;
        atomic_store(&m->stop, true);
        qvl_engine_wake(m->engine);
    }
}

/* ---- what is told of them ---- */
static void list(buf *out, const model *m) {
    buf_puts(out, "\"aliases\":[");
    for (unsigned i = 0; i < m->aliases_count; i++) {
        if (i) buf_puts(out, ",");
        buf_json(out, m->aliases[i], strlen(m->aliases[i]));
    }
    buf_puts(out, "]");
}

static void one_json(buf *out, model *m, const char *id) {
    model_state st = model_state_of(m);
    buf_puts(out, "{\"id\":");
    buf_json(out, id, strlen(id));
    buf_printf(out, ",\"object\":\"model\",\"created\":%ld,\"owned_by\":\"libqvl\",\"root\":", m->created);
    buf_json(out, m->name, strlen(m->name));
    if (st == MODEL_READY || st == MODEL_DRAINING) buf_printf(out, ",\"max_model_len\":%d", m->max_context);
    buf_printf(out, ",\"state\":\"%s\",\"progress\":%d,", model_state_name(st), atomic_load(&m->progress));
    list(out, m);
    buf_puts(out, "}");
}

int models_json(server *s, const char *name, buf *out) {
    if (name) {
        model *m = name[0] ? find(s, name) : NULL;
        if (!m) return -1;
        one_json(out, m, name);
        return 0;
    }
    buf_puts(out, "{\"object\":\"list\",\"data\":[");
    for (model *m = s->models->first; m; m = m->next) {
        if (m != s->models->first) buf_puts(out, ",");
        one_json(out, m, m->name);
    }
    buf_puts(out, "]}");
    return 0;
}

void models_admin_json(server *s, buf *out) {
    buf_puts(out, "{\"object\":\"list\",\"data\":[");
    for (model *m = s->models->first; m; m = m->next) {
        if (m != s->models->first) buf_puts(out, ",");
        buf_puts(out, "{\"name\":");
        buf_json(out, m->name, strlen(m->name));
        buf_puts(out, ",\"path\":");
        buf_json(out, m->path, strlen(m->path));
        buf_printf(out, ",\"state\":\"%s\",\"progress\":%d,\"failure\":", model_state_name(model_state_of(m)), atomic_load(&m->progress));
        if (m->failure[0] && model_state_of(m) == MODEL_UNLOADED) buf_json(out, m->failure, strlen(m->failure));
        else buf_puts(out, "null");
        buf_puts(out, ",");
        list(out, m);
        char *stats = NULL;
        if (model_state_of(m) == MODEL_READY && qvl_engine_stats(m->engine, &stats) == 0) buf_printf(out, ",\"engine\":%s", stats);
        qvl_free(stats);
        buf_puts(out, "}");
    }
    buf_puts(out, "]}");
}

bool models_ready(server *s) {
    for (model *m = s->models->first; m; m = m->next)
        if (m->wanted && model_state_of(m) != MODEL_READY) return false;
    return s->models->first != NULL;
}

bool models_failed(server *s, const char **why) {
    for (model *m = s->models->first; m; m = m->next)
        if (m->wanted && model_state_of(m) == MODEL_UNLOADED) {
            *why = m->failure;
            return true;
        }
    return false;
}

bool models_stuck(server *s, double ms, const char **stuck) {
    double now = server_now();
    for (model *m = s->models->first; m; m = m->next) {
        double began = m->step_began;
        /* a step that waits for work returns after 200 ms */
        if (began > 0 && ms > 0 && (now - began) * 1e3 > ms + 200) {
            *stuck = m->name;
            return true;
        }
    }
    return false;
}

void models_measure(server *s) {
    for (model *m = s->models->first; m; m = m->next) {
        if (model_state_of(m) != MODEL_READY && model_state_of(m) != MODEL_DRAINING) continue;
        char *stats = NULL;
        if (qvl_engine_stats(m->engine, &stats)) continue;
        json_t *j = json_loads(stats, 0, NULL);
        qvl_free(stats);
        meters_engine(m->meters, j);
        json_decref(j);
    }
}
