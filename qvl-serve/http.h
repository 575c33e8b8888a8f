/* http.h - one HTTP exchange: a request's body in, a response out, over libwebsockets.
 *
 * Job:        collect the body within its limits, hand it to the route, write what the route answers.
 * Input:      callbacks of libwebsockets (HTTP/1.1, HTTP/2).
 * Output:     exchange_reply, or exchange_begin, exchange_write and exchange_end.
 * Invariants: everything runs on the loop; output waits in the exchange until the client reads it, at most
 *             limits.send_buffer of a stream (then the request is cancelled and the connection closed);
 *             the access line and the metrics of an exchange are written once, when it is over.
 */
#ifndef SERVE_HTTP_H
#define SERVE_HTTP_H

#include "asset.h"
#include "server.h"

typedef struct exchange exchange;
typedef struct route route;
struct ws_connection;

/* What libwebsockets keeps for every connection (HTTP/2: every stream). */
typedef struct session {
    exchange *exchange;
    struct ws_connection *ws;
    bool counted;
} session;

struct exchange {
    server *server;
    struct lws *wsi;
    session *session;
    const route *route; /* NULL until known */
    char id[ID_SIZE];
    char method[8];
    char path[256];
    char peer[48];
    char agent[128];
    char origin[128]; /* allowed by CORS; "" otherwise */
    char etag[40];    /* If-None-Match */
    char tail[160];   /* what follows the route's prefix */
    char content_type[64];
    auth_key *key;
    bool entered;     /* auth_enter counted it */
    bool head, http2, deflate, discard, drained; /* discard: the rest of the body is not wanted; drained: and has come */
    bool ran;         /* route_run was called: it is, once */
    buf body;
    uint64_t body_bytes;
    double started;

    task *task;
    int status;
    buf headers; /* name: value lines of the response */
    buf out;
    size_t out_at;
    const void *fixed; /* a body that outlives the exchange, in place of out */
    size_t fixed_n;
    bool streaming, ready, head_sent, over, close;
    uint64_t bytes_out;
    double last_write;
    /* for the access line */
    const char *model, *finish_reason;
    double queue_ms, ttft_ms, vision_ms;
    long prompt_tokens, cached_tokens, image_tokens, completion_tokens;
    exchange *prev, *next; /* streams, for keep-alive */
};

/* Opens the listening socket and all that belongs to it. 0 or -1 with err. */
int http_start(server *s, char *err, size_t err_size);
/* Certificates read again. */
void http_reload(server *s);
/* Comment lines for streams that were silent for long. Once a second. */
void http_tick(server *s);

void exchange_header(exchange *x, const char *name, const char *value);
/* A whole response; body is copied. */
void exchange_reply(exchange *x, int status, const char *type, const char *body, size_t n);
/* A whole response whose body is static. */
void exchange_reply_fixed(exchange *x, int status, const char *type, const void *body, size_t n);
/* An error in OpenAI's form. */
void exchange_fail(exchange *x, int status, const char *type, const char *code, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));
/* A stream of events. */
void exchange_begin(exchange *x, const char *type);
void exchange_write(exchange *x, const char *data, size_t n);
void exchange_end(exchange *x);

/* ---- route.c ---- */
/* Finds the route and checks who may use it, from the headers alone. It has answered already when it returns false. */
bool route_open(exchange *x);
/* The body is complete (or there is none). */
void route_run(exchange *x);
uint64_t route_max_body(const exchange *x);
const char *route_pattern(const route *r);
/* Whether token opens the server; NULL key when none is asked for. Answers for ws.c as well. */
bool route_key_valid(server *s, const char *token, size_t n, auth_key **key);
/* The token of an Authorization header, in place; NULL when it has another form. */
const char *route_bearer(const char *header, size_t *n);
/* The allowed form of an Origin header, or NULL. */
bool route_origin_allowed(const server *s, const char *origin);

/* ---- static.c ---- */
void asset_serve(exchange *x, const char *path);

#endif
