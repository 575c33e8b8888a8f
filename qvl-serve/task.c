/* task.c - one request's life, from its body to its end.
 *
 * Job:        task.h.
 * Input:      bodies; workers' results; engines' events.
 * Output:     calls of the sink.
 * Invariants: the queue is bounded twice, by number for each model and by bytes in all; what is refused is told to try
 *             again (429, Retry-After); what was taken is never dropped without a word.
 *
 *     task_start -> [worker: run] -> reply
 *                                 -> model loading? wait -> [worker: run again] -> submit -> events -> end
 */
#include "task.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define QUICK_BODY 1024

/* ---- errors ---- */
int task_fail(task *t, int status, const char *type, const char *param, const char *code, const char *fmt, ...) {
    if (t->error.status) return -1;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(t->error.message, sizeof t->error.message, fmt, ap);
    va_end(ap);
    t->error.status = status;
    t->error.type = type;
    t->error.code = code;
    if (param) {
        snprintf(t->error.param_name, sizeof t->error.param_name, "%s", param);
        t->error.param = t->error.param_name;
    }
    return -1;
}

int task_fail_qvl(task *t, int code, const char *param) {
    const char *why = qvl_last_error();
    char option[64];
    const char *named = strstr(why, "option ");
    if (!param && named && sscanf(named, "option %63[a-z_]:", option) == 1) param = option; /* options have the fields' names */
    switch (code) {
    case QVL_ECONTEXT: return task_fail(t, 400, "invalid_request_error", param ? param : "messages", "context_length_exceeded", "%s", why);
    case QVL_EINVAL:
    case QVL_EFORMAT:
    case QVL_EUNSUPPORTED:
    case QVL_ELIMIT: return task_fail(t, 400, "invalid_request_error", param, code == QVL_EFORMAT ? "invalid_value" : NULL, "%s", why);
    case QVL_ENOMEM:
        t->error.retry_after = 1;
        return task_fail(t, 503, "overloaded_error", NULL, "out_of_memory", "%s", why);
    default: return task_fail(t, 500, "server_error", NULL, qvl_error_name(code), "%s", why);
    }
}

void task_out_of_memory(task *t) {
    t->error.retry_after = 1;
    task_fail(t, 503, "overloaded_error", NULL, "out_of_memory", "the server has no memory for this request now");
}

void task_error_json(buf *b, const task_error *e) {
    buf_puts(b, "{\"error\":{\"message\":");
    buf_json(b, e->message, strlen(e->message));
    buf_printf(b, ",\"type\":\"%s\",\"param\":", e->type);
    if (e->param) buf_json(b, e->param, strlen(e->param));
    else buf_puts(b, "null");
    buf_puts(b, ",\"code\":");
    if (e->code) buf_json(b, e->code, strlen(e->code));
    else buf_puts(b, "null");
    buf_puts(b, "}}");
}

/* ---- the list ---- */
task *task_new(server *s, const char *route, void (*run)(task *), const task_sink *sink, void *to, buf *body) {
    task *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    t->server = s;
    t->route = route;
    t->run = run;
    t->sink = sink;
    t->to = to;
    t->body = *body;
    *body = (buf){0};
    t->work.data = t;
    t->created = server_now();
    t->created_unix = (long)time(NULL);
    t->next = s->tasks;
    if (s->tasks) s->tasks->prev = t;
    s->tasks = t;
    s->tasks_count++;
    return t;
}

static void hold_bytes(task *t, uint64_t n) {
    t->server->held_bytes += n - t->held;
    t->held = n;
}

static void task_free(task *t) {
    server *s = t->server;
    hold_bytes(t, 0);
    if (t->request) model_forget(t->model, t);
    if (t->prev) t->prev->next = t->next;
    else s->tasks = t->next;
    if (t->next) t->next->prev = t->prev;
    s->tasks_count--;
    answer_free(t);
    json_decref(t->json);
    buf_free(&t->body);
    buf_free(&t->reply);
    free(t->tools_json);
    free(t->prefix);
    qvl_prompt_free(t->prompt);
    qvl_options_free(t->options);
    model_let_go(t->model);
    free(t);
}

/* ---- ends ---- */
static void end_with_error(task *t) {
    task_error *e = &t->error;
    if (!t->abandoned) {
        if (e->status >= 500) log_event(LOG_ERROR, "request_failed", t->request_id, LOG_STR("reason", e->message), LOG_STR("code", e->code));
        else log_event(LOG_DEBUG, "request_refused", t->request_id, LOG_STR("reason", e->message), LOG_STR("param", e->param));
        t->ended = true;
        if (t->begun) {
            t->finish_reason = "error";
            t->sink->break_off(t->to, e);
            t->sink->end(t->to);
        } else {
            t->sink->fail(t->to, e);
        }
    }
    t->ended = true;
    task_free(t);
}

static void refuse(task *t, const char *reason, int seconds) {
    meters_refused(t->server->meters, reason);
    t->error.retry_after = seconds;
    end_with_error(t);
}

static void whole_reply(task *t) {
    if (t->reply.failed) {
        task_out_of_memory(t);
        end_with_error(t);
        return;
    }
    t->ended = true;
    if (!t->abandoned) t->sink->reply(t->to, 200, t->reply_type ? t->reply_type : "application/json", t->reply.data, t->reply.len);
    task_free(t);
}

/* ---- to the engine ---- */
/* Seconds after which a full queue has probably moved: one request in its turn. */
static int full_queue_wait(const model *m) { return 1 + (int)(model_live(m) / (4 * model_capacity(m) + 1)); }

static void submit(task *t) {
    const config *c = t->server->config;
    if (model_live(t->model) >= model_capacity(t->model) + c->max_queue) {
        int wait = full_queue_wait(t->model);
        task_fail(t, 429, "overloaded_error", NULL, "queue_full", "%u requests are running or waiting for \"%s\" and no more are taken "
                  "(limits.max_queue); try again in %d s", model_live(t->model), model_name(t->model), wait);
        refuse(t, "queue_full", wait);
        return;
    }
    if (answer_begin(t)) {
        task_out_of_memory(t);
        end_with_error(t);
        return;
    }
    int rc = model_submit(t->model, t);
    if (rc) {
        task_fail_qvl(t, rc, NULL);
        end_with_error(t);
        return;
    }
    qvl_prompt_free(t->prompt); /* the engine holds what it needs */
    t->prompt = NULL;
    json_decref(t->json);
    t->json = NULL;
    if (t->stream || t->sink->chunks) {
        t->stream = true;
        t->begun = true;
        t->sink->begin(t->to);
    }
}

static void wait_for_model(task *t) {
    unsigned waiting = 0;
    for (task *o = t->server->tasks; o; o = o->next) waiting += o->waiting && o->model == t->model;
    if (waiting >= t->server->config->max_queue) {
        task_fail(t, 503, "overloaded_error", "model", "model_loading", "\"%s\" is being loaded and %u requests wait for it already",
                  model_name(t->model), waiting);
        refuse(t, "queue_full", 5);
        return;
    }
    t->waiting = true;
}

static void after_run(uv_work_t *w, int status) {
    task *t = w->data;
    t->working = false;
    if (status == UV_ECANCELED || t->abandoned) {
        t->ended = true;
        task_free(t);
    } else if (t->error.status) {
        if (t->error.status == 400) meters_refused(t->server->meters, "bad_request");
        end_with_error(t);
    } else if (t->waiting) {
        t->waiting = false;
        model_state st = model_state_of(t->model);
        if (st == MODEL_LOADING) wait_for_model(t);
        else task_start(t); /* it became ready, or failed, meanwhile */
    } else if (t->generate) {
        hold_bytes(t, t->held_after);
        submit(t);
    } else {
        whole_reply(t);
    }
}

static void on_worker(uv_work_t *w) {
    task *t = w->data;
    t->run(t);
}

void task_start(task *t) {
    server *s = t->server;
    uint64_t bytes = t->body.len * 2; /* the text and what is made of it */
    if (s->held_bytes - t->held + bytes > s->config->max_queue_bytes) {
        task_fail(t, 429, "overloaded_error", NULL, "queue_full", "requests of %llu bytes are being prepared and no more are taken "
                  "(limits.max_queue_bytes); try again in 1 s", (unsigned long long)s->held_bytes);
        refuse(t, "queue_bytes", 1);
        return;
    }
    hold_bytes(t, bytes);
    if (t->quick && t->body.len <= QUICK_BODY) { /* handing it to a worker would take longer than doing it */
        t->run(t);
        after_run(&t->work, 0);
        return;
    }
    t->working = true;
    if (uv_queue_work(&s->loop, &t->work, on_worker, after_run)) {
        t->working = false;
        task_out_of_memory(t);
        end_with_error(t);
    }
}

void task_model_changed(server *s, model *m) {
    for (task *t = s->tasks, *next; t; t = next) {
        next = t->next;
        if (t->model == m && t->waiting && !t->working) {
            t->waiting = false;
            task_start(t);
        } else if (t->model == m && t->request && model_state_of(m) == MODEL_UNLOADED) {
            t->request = 0;
            task_fail(t, 503, "overloaded_error", "model", "model_unloaded", "the model was unloaded");
            end_with_error(t);
        }
    }
}

/* ---- while it runs ---- */
static void measure(task *t, const char *reason, const double *usage, long completion_tokens) {
    meters_request r = {.finish_reason = reason,
                        .queue_s = usage[QVL_USAGE_QUEUE_MS] / 1e3,
                        .prefill_s = usage[QVL_USAGE_PREFILL_MS] / 1e3,
                        .decode_s = usage[QVL_USAGE_DECODE_MS] / 1e3,
                        .vision_s = usage[QVL_USAGE_VISION_MS] / 1e3,
                        .ttft_s = usage[QVL_USAGE_TTFT_MS] / 1e3,
                        .e2e_s = usage[QVL_USAGE_TOTAL_MS] / 1e3,
                        .prompt_tokens = (long)usage[QVL_USAGE_PROMPT_TOKENS],
                        .cached_tokens = (long)usage[QVL_USAGE_CACHED_TOKENS],
                        .image_tokens = (long)usage[QVL_USAGE_IMAGE_TOKENS],
                        .completion_tokens = completion_tokens,
                        .images = (long)usage[QVL_USAGE_IMAGES],
                        .images_cached = (long)usage[QVL_USAGE_IMAGES_CACHED],
                        .n = t->n,
                        .max_tokens = t->max_tokens};
    meters_finished(model_meters(t->model), &r);
}

static void end_answer(task *t) {
    t->ended = true;
    if (!t->abandoned) {
        if (t->stream) {
            if (t->include_usage) chunk_usage(t);
            t->sink->end(t->to);
        } else {
            buf out = {0};
            chunk_whole(t, &out);
            if (out.failed) {
                t->ended = false;
                task_out_of_memory(t);
                buf_free(&out);
                end_with_error(t);
                return;
            }
            t->sink->reply(t->to, 200, "application/json", out.data, out.len);
            buf_free(&out);
        }
    }
    task_free(t);
}

void task_event(task *t, const model_event *v) {
    if (t->held) hold_bytes(t, 0); /* its pictures are encoded, or were never needed */
    choice *c = &t->choices[v->choice];
    if (v->type == QVL_EVENT_TOKEN) {
        if (c->generated++ == 0) {
            if (!t->first_token) t->first_token = v->time;
        } else {
            meters_inter_token(model_meters(t->model), v->time - c->last_token);
        }
        c->last_token = v->time;
    }
    if (v->type == QVL_EVENT_ERROR) {
        c->ended = true;
        t->open_choices--;
        if (!t->abandoned && !t->error.status) {
            bool numeric = v->error == QVL_ENUMERIC;
            task_fail(t, 500, "server_error", NULL, numeric ? "non_finite_logits" : qvl_error_name(v->error), "%s", v->message);
            meters_request r = {.finish_reason = "error", .ttft_s = NAN, .e2e_s = NAN, .queue_s = NAN, .prefill_s = NAN, .decode_s = NAN};
            meters_finished(model_meters(t->model), &r);
            if (t->open_choices) model_cancel(t->model, t->request);
        }
    } else {
        if (v->type == QVL_EVENT_FINISHED) {
            c->ended = true;
            t->open_choices--;
            double tokens = t->usage[QVL_USAGE_COMPLETION_TOKENS];
            memcpy(t->usage, v->usage, sizeof t->usage);
            t->usage[QVL_USAGE_COMPLETION_TOKENS] += tokens;
        }
        if (!t->error.status) answer_event(t, v);
        if (v->type == QVL_EVENT_FINISHED) {
            t->finish_reason = c->finish_reason;
            measure(t, c->finish_reason, v->usage, (long)v->usage[QVL_USAGE_COMPLETION_TOKENS]);
        }
    }
    if (t->open_choices) return;
    if (t->error.status) end_with_error(t);
    else end_answer(t);
}

void task_cancel(task *t) {
    if (t->request) {
        model_cancel(t->model, t->request);
        return;
    }
    task_fail(t, 400, "invalid_request_error", NULL, "cancelled", "cancelled before it ran");
    if (!t->working) end_with_error(t);
}

void task_abandon(task *t) {
    if (t->ended) return;
    t->abandoned = true;
    if (t->request) {
        model_cancel(t->model, t->request); /* its finished event frees it */
    } else if (!t->working) {
        t->ended = true;
        task_free(t);
    } else {
        uv_cancel((uv_req_t *)&t->work);
    }
}

void task_drop(task *t) {
    t->ended = t->abandoned = true;
    task_free(t);
}
