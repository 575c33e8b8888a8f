/* model.h - models by name, each with an engine and the thread that steps it.
 *
 * Job:        load and unload models; hand requests to their engines and events back to the loop.
 * Input:      the models of the configuration; prompts.
 * Output:     model_event, on the loop.
 * Invariants: only the engine's own thread steps it; events cross to the loop in one buffer that is swapped under a lock,
 *             and the engine's thread waits when the loop is MODEL_OUTBOX behind: memory is bounded;
 *             a model that somebody holds (model_hold) is never freed under him.
 */
#ifndef SERVE_MODEL_H
#define SERVE_MODEL_H

#include <qvl.h>

#include "server.h"

#define MODEL_OUTBOX (8 << 20)

typedef struct model model;

typedef struct model_event {
    uint64_t request;
    int type; /* QVL_EVENT_* */
    int choice;
    int32_t token;
    const char *text;
    size_t text_n;
    const char *finish_reason;
    int error;
    const char *message;
    float logprob; /* NaN: none */
    int n_top;
    const int32_t *top_ids;
    const float *top_logprobs;
    double time; /* server_now of the step that made it */
    double usage[QVL_USAGE_IMAGES_CACHED + 1]; /* of a finished event */
} model_event; /* pointers until the function that got it returns */

typedef enum { MODEL_UNLOADED, MODEL_LOADING, MODEL_READY, MODEL_DRAINING } model_state;

/* Begins to load all models of the configuration. 0 or -1 with err. */
int models_start(server *s, char *err, size_t err_size);
/* Stops every engine and frees everything. No task may be left. */
void models_stop(server *s);
/* The model of that name or alias ("" or NULL: the first one), held; NULL when there is none. [any thread] */
model *models_find(server *s, const char *name);
void model_hold(model *m);
void model_let_go(model *m); /* [any thread] */

const char *model_name(const model *m);
/* Why it is not loaded; "" when nothing failed. */
const char *model_failure(const model *m);
model_state model_state_of(model *m); /* [any thread] */
const char *model_state_name(model_state s);
/* Valid while the state is READY or DRAINING. [any thread] */
qvl_model *model_weights(model *m);
qvl_engine *model_engine(model *m);
int model_max_context(const model *m);
meters_model *model_meters(model *m);
/* Requests of the engine that have not ended. */
unsigned model_live(const model *m);
unsigned model_capacity(const model *m); /* requests that run together */

/* Queues t->prompt with t->options; t gets the events. 0 or the library's error. */
int model_submit(model *m, task *t);
void model_cancel(model *m, uint64_t request);
/* No events of this request any more. */
void model_forget(model *m, task *t);

/* Load or unload at run time: 0, or -1 with err. The change is under way when it returns. */
int model_load(server *s, const char *name, const char *path, char *err, size_t err_size);
int model_unload(server *s, const char *name, char *err, size_t err_size);

/* The JSON of /v1/models (name NULL) or of one model; of /admin/models. 0, or -1 when there is no such model. */
int models_json(server *s, const char *name, buf *out);
void models_admin_json(server *s, buf *out);
/* Whether all are ready; whether a step of one has been running for more than ms (then *stuck is its name). */
bool models_ready(server *s);
/* Whether one that is wanted could not be loaded, and why. */
bool models_failed(server *s, const char **why);
/* Unloads what nobody uses any more. Once a second. */
void models_tick(server *s);
bool models_stuck(server *s, double ms, const char **stuck);
/* Copies every engine's figures into the meters. */
void models_measure(server *s);

#endif
