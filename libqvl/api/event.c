/* event.c - reading events (public accessors).
 *
 * Job:        the fields of a qvl_event, one function each.
 * Input:      an event of the last step, or NULL.
 * Output:     values; neutral ones for NULL.
 * Invariants: borrowed pointers end with the next step.
 */
#include <math.h>

#include "../engine/engine.h"

int qvl_event_type(const qvl_event *v) { return v ? v->type : 0; }
uint64_t qvl_event_request(const qvl_event *v) { return v ? v->request : 0; }
int qvl_event_choice(const qvl_event *v) { return v ? v->choice : 0; }
int32_t qvl_event_token(const qvl_event *v) { return v ? v->token : -1; }

const char *qvl_event_text(const qvl_event *v, size_t *len) {
    if (len) *len = v && v->text ? v->text->len : 0;
    return v && v->text ? v->text->data : "";
}

const char *qvl_event_finish_reason(const qvl_event *v) { return v ? v->finish_reason : ""; }

int qvl_event_error(const qvl_event *v, const char **message) {
    if (message) *message = v ? v->message : "";
    return v ? v->error : 0;
}

float qvl_event_logprob(const qvl_event *v) { return v && v->has_logprobs ? v->sampled.logprob : NAN; }

int qvl_event_top_logprobs(const qvl_event *v, const int32_t **ids, const float **logprobs) {
    if (!v || !v->has_logprobs) return 0;
    if (ids) *ids = v->sampled.top_id;
    if (logprobs) *logprobs = v->sampled.top_logprob;
    return v->sampled.n_top;
}

const float *qvl_event_logits(const qvl_event *v, size_t *n) {
    if (n) *n = v ? v->n_logits : 0;
    return v ? v->logits : NULL;
}

double qvl_event_usage(const qvl_event *v, int what) {
    return v && what >= 1 && what < (int)(sizeof v->usage / sizeof *v->usage) ? v->usage[what] : NAN;
}
