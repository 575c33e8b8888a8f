/* task.h - one request's life.
 *
 * Job:        work on a thread of the pool, then either a whole reply or an answer that an engine generates.
 * Input:      a body and where it came from (http.c, ws.c).
 * Output:     through task_sink: one whole reply, or a beginning, chunks and an end.
 * Invariants: a task belongs to the loop, but for the time of its work, when it belongs to one worker;
 *             it ends exactly once; its owner may leave at any time (task_abandon), then it is cancelled and frees itself;
 *             the sink's functions are called by the loop only, and never after the end or task_abandon.
 */
#ifndef SERVE_TASK_H
#define SERVE_TASK_H

#include <jansson.h>
#include <qvl.h>

#include "model.h"
#include "reasoning.h"
#include "server.h"
#include "toolcall.h"

typedef struct task_error {
    int status;                     /* of HTTP; 0: none */
    const char *type, *param, *code; /* static or kept in the task; param and code may be NULL */
    char param_name[64];
    char message[768];
    int retry_after; /* seconds; 0: do not say */
} task_error;

/* Where a task's output goes. */
typedef struct task_sink {
    /* A whole reply. */
    void (*reply)(void *to, int status, const char *content_type, const char *body, size_t n);
    void (*fail)(void *to, const task_error *e);
    /* An answer in pieces: JSON texts of chunks. */
    void (*begin)(void *to);
    void (*chunk)(void *to, const char *json, size_t n);
    void (*end)(void *to); /* after the last chunk, or after break_off */
    void (*break_off)(void *to, const task_error *e); /* an error after begin; end follows */
    bool chunks; /* answers are always sent in pieces */
} task_sink;

/* One of the n answers of a request. */
typedef struct choice {
    task *task;
    int index;
    reasoning split;
    toolcall *calls; /* NULL when no tools were offered */
    toolcall_result whole; /* of an answer that is sent in one piece */
    buf content, thought;
    buf logprobs; /* JSON objects, comma separated, of the tokens not sent yet (or of all) */
    buf tokens, token_logprobs, tops, offsets; /* the same in the form of /v1/completions */
    size_t text_bytes;
    int reasoning_tokens, generated;
    bool role_sent, ended;
    const char *finish_reason, *stop_reason;
    double last_token; /* server_now */
} choice;

struct task {
    server *server;
    task *prev, *next;
    uv_work_t work;
    void (*run)(task *); /* on a worker */
    bool quick, working, abandoned, ended, begun;
    char id[ID_SIZE];
    char request_id[ID_SIZE]; /* of the log */
    char peer[48];
    const char *route; /* of the log */
    char content_type[64]; /* of the body */
    auth_key *key;
    double created;
    long created_unix;

    const task_sink *sink;
    void *to;

    /* the request */
    buf body;
    json_t *json;
    model *model;
    char model_name[128]; /* as asked */
    task_error error;
    buf reply; /* what run made, when it is the whole answer */
    const char *reply_type;
    uint64_t held, held_after; /* bytes counted in server.held_bytes: now; when its prompt is made */

    /* an answer to generate */
    bool generate, chat, stream, include_usage, continuous_usage, want_logprobs, include_reasoning, tools, echo, opened;
    int n, top_logprobs, max_tokens;
    char *tools_json;
    qvl_prompt *prompt;
    qvl_options *options;
    bool waiting; /* for its model to be there, or for a place in the queue */
    uint64_t request; /* the engine's number; 0: not submitted */
    task *next_in_model; /* model.c's */
    choice *choices;
    int open_choices;
    char *prefix; /* echo */
    double usage[QVL_USAGE_IMAGES_CACHED + 1]; /* of the first choice that ended, completion tokens of all */
    long reasoning_tokens;
    double first_token;
    long prompt_tokens;
    const char *finish_reason; /* of the log */
};

/* A task for body (taken over). Counted and in the list; NULL when out of memory. */
task *task_new(server *s, const char *route, void (*run)(task *), const task_sink *sink, void *to, buf *body);
/* Starts its work; may fail at once through the sink (too many requests). */
void task_start(task *t);
/* The server ends: frees a task that no worker has. */
void task_drop(task *t);
/* Its owner is gone or has had enough: no more output. */
void task_abandon(task *t);
/* Ends a running answer with what it has, as finish_reason "abort". */
void task_cancel(task *t);
/* An error of the request, on a worker or the loop; the first one counts. Returns -1. */
int task_fail(task *t, int status, const char *type, const char *param, const char *code, const char *fmt, ...)
    __attribute__((format(printf, 6, 7)));
/* The same for a failure of libqvl: status and type by its code, message from qvl_last_error. */
int task_fail_qvl(task *t, int code, const char *param);
void task_out_of_memory(task *t);

/* A model has become ready or has gone: tasks that waited for it go on or fail. */
void task_model_changed(server *s, model *m);
/* Called for every event of the engine, in order. */
void task_event(task *t, const model_event *v);
/* Error as {"error": {...}}. */
void task_error_json(buf *b, const task_error *e);

/* ---- openai.c: bodies to prompts; run functions ---- */
void openai_chat(task *t);
void openai_completion(task *t);
void openai_plan(task *t);
void openai_tokenize(task *t);
void openai_detokenize(task *t);
void openai_image(task *t);

/* ---- answer.c: an engine's events to text, reasoning, calls and log-probabilities ---- */
int answer_begin(task *t); /* makes the choices; 0 or -1 */
void answer_event(task *t, const model_event *v);
void answer_free(task *t);

/* ---- chunk.c: the JSON of answers ---- */
typedef struct chunk_delta {
    const char *text, *thought; /* NULL: none */
    size_t text_n, thought_n;
    const toolcall_event *call;
    bool role;
} chunk_delta;
void chunk_delta_out(choice *c, const chunk_delta *d);
void chunk_finish(choice *c);       /* finish_reason of one choice */
void chunk_usage(task *t);          /* the last chunk */
void chunk_whole(task *t, buf *out); /* the whole answer */

#endif
