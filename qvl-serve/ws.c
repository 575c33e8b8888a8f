/* ws.c - requests over a WebSocket.
 *
 * Job:        ws.h.
 * Input:      frames, in fragments of any size.
 * Output:     frames, one for each writable callback.
 * Invariants: until a key is known (handshake header or first message "auth") nothing but "auth" is taken.
 */
#include "ws.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "task.h"

#define MAX_REQUESTS 64 /* at once on one connection */
#define AUTH_S 10       /* to send a key */

typedef struct frame {
    struct frame *next;
    size_t n;
    unsigned char data[]; /* LWS_PRE bytes first */
} frame;

typedef struct ws_connection ws_connection;

/* A request of a connection; its task's sink points here. */
typedef struct ws_request {
    struct ws_request *next;
    ws_connection *connection;
    task *task;
    bool entered;
    bool image;
    char id[128]; /* JSON text of the client's id: a string or a number */
} ws_request;

struct ws_connection {
    server *server;
    struct lws *wsi;
    char peer[48];
    auth_key *key;
    bool trusted, closing;
    buf in;
    bool binary;
    frame *first, **last;
    size_t queued;
    ws_request *requests;
    unsigned count;
    ws_connection *prev, *next;
};

static ws_connection *connections;

static void drop(ws_connection *c, int status, const char *why) {
    if (c->closing) return;
    c->closing = true;
    lws_close_reason(c->wsi, (enum lws_close_status)status, (unsigned char *)(uintptr_t)why, strlen(why));
    lws_set_timer_usecs(c->wsi, 1); /* its callback may close with a reason; a writable one may not */
}

static void send_text(ws_connection *c, const buf *b) {
    if (c->closing) return;
    if (b->failed || c->queued + b->len > c->server->config->send_buffer) {
        log_event(LOG_WARN, "slow_reader", NULL, LOG_STR("peer", c->peer), LOG_NUM("bytes", (int64_t)c->queued));
        drop(c, LWS_CLOSE_STATUS_POLICY_VIOLATION, "too slow a reader");
        return;
    }
    frame *f = malloc(sizeof *f + LWS_PRE + b->len);
    if (!f) {
        drop(c, LWS_CLOSE_STATUS_UNEXPECTED_CONDITION, "out of memory");
        return;
    }
    f->next = NULL;
    f->n = b->len;
    memcpy(f->data + LWS_PRE, b->data, b->len);
    *c->last = f;
    c->last = &f->next;
    c->queued += f->n;
    lws_callback_on_writable(c->wsi);
}

static void say(ws_connection *c, const char *id, const char *type, const char *name, const char *json, size_t n) {
    buf b = {0};
    buf_printf(&b, "{\"type\":\"%s\"", type);
    if (id && id[0]) buf_printf(&b, ",\"id\":%s", id);
    if (name) {
        buf_printf(&b, ",\"%s\":", name);
        buf_add(&b, json, n);
    }
    buf_puts(&b, "}");
    send_text(c, &b);
    buf_free(&b);
}

static void say_error(ws_connection *c, const char *id, const task_error *e) {
    buf b = {0};
    task_error_json(&b, e); /* {"error":{...}}: the inner object is what the message carries */
    if (!b.failed && b.len > 10) say(c, id, "error", "error", b.data + 9, b.len - 10);
    buf_free(&b);
}

__attribute__((format(printf, 4, 5))) static void refuse(ws_connection *c, const char *id, const char *code, const char *fmt, ...) {
    task_error e = {.status = 400, .type = "invalid_request_error", .code = code};
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e.message, sizeof e.message, fmt, ap);
    va_end(ap);
    say_error(c, id, &e);
}

/* ---- sinks ---- */
static void request_free(ws_request *r) {
    ws_connection *c = r->connection;
    if (r->entered) {
        task *t = r->task;
        long tokens = t && t->finish_reason ? (long)(t->usage[QVL_USAGE_PROMPT_TOKENS] + t->usage[QVL_USAGE_COMPLETION_TOKENS]) : 0;
        auth_leave(c->server->keys, c->key, server_now(), tokens);
    }
    for (ws_request **p = &c->requests; *p; p = &(*p)->next)
        if (*p == r) {
            *p = r->next;
            c->count--;
            break;
        }
    free(r);
}

static void to_reply(void *to, int status, const char *type, const char *body, size_t n) {
    ws_request *r = to;
    (void)status;
    (void)type;
    if (r->image) {
        say(r->connection, r->id, "image", "image", body, n);
    } else {
        say(r->connection, r->id, "result", "result", body, n);
    }
    request_free(r);
}
static void to_fail(void *to, const task_error *e) {
    ws_request *r = to;
    say_error(r->connection, r->id, e);
    request_free(r);
}
static void to_begin(void *to) { (void)to; }
static void to_chunk(void *to, const char *json, size_t n) {
    ws_request *r = to;
    say(r->connection, r->id, "chunk", "chunk", json, n);
}
static void to_break(void *to, const task_error *e) {
    ws_request *r = to;
    say_error(r->connection, r->id, e);
}
static void to_end(void *to) {
    ws_request *r = to;
    say(r->connection, r->id, "done", NULL, NULL, 0);
    request_free(r);
}
static const task_sink ws_sink = {to_reply, to_fail, to_begin, to_chunk, to_end, to_break, true};

/* ---- messages ---- */
static void start(ws_connection *c, const char *id, void (*run)(task *), buf *body, bool image) {
    server *s = c->server;
    task_error e = {.status = 429, .type = "rate_limit_error", .code = "rate_limit_exceeded"};
    if (s->draining) {
        e = (task_error){.status = 503, .type = "overloaded_error", .code = "draining"};
        snprintf(e.message, sizeof e.message, "the server is shutting down");
        say_error(c, id, &e);
        return;
    }
    if (c->count >= MAX_REQUESTS) {
        snprintf(e.message, sizeof e.message, "a connection takes %d requests at once; wait for one to end", MAX_REQUESTS);
        say_error(c, id, &e);
        return;
    }
    bool entered = false;
    if (c->key) {
        int wait = 0;
        auth_verdict v = auth_enter(c->key, server_now(), &wait);
        if (v != AUTH_OK) {
            snprintf(e.message, sizeof e.message, "this key's limit of %s is reached; try again in %d s", auth_verdict_text(v), wait);
            e.retry_after = wait;
            say_error(c, id, &e);
            return;
        }
        entered = true;
    }
    ws_request *r = calloc(1, sizeof *r);
    task *t = r ? task_new(s, "/ws", run, &ws_sink, r, body) : NULL;
    if (!t) {
        free(r);
        if (entered) auth_leave(s->keys, c->key, server_now(), 0);
        drop(c, LWS_CLOSE_STATUS_UNEXPECTED_CONDITION, "out of memory");
        return;
    }
    r->connection = c;
    r->task = t;
    r->entered = entered;
    r->image = image;
    snprintf(r->id, sizeof r->id, "%s", id);
    r->next = c->requests;
    c->requests = r;
    c->count++;
    t->key = c->key;
    id_new(t->request_id, "req-");
    snprintf(t->peer, sizeof t->peer, "%s", c->peer);
    task_start(t); /* may free r */
}

/* The client's id as JSON text, to be given back as it came. False: not one we take. */
static bool read_id(const json_t *message, char out[128]) {
    json_t *id = json_object_get(message, "id");
    out[0] = 0;
    if (!id) return true;
    if (!json_is_string(id) && !json_is_integer(id)) return false;
    size_t n = json_dumpb(id, out, 127, JSON_ENCODE_ANY);
    if (n == 0 || n > 127) return false;
    out[n] = 0;
    return true;
}

static void take_auth(ws_connection *c, const json_t *j) {
    const char *key = json_string_value(json_object_get(j, "key"));
    if (c->trusted || (key && route_key_valid(c->server, key, strlen(key), &c->key))) {
        c->trusted = true;
        lws_set_timeout(c->wsi, NO_PENDING_TIMEOUT, 0);
        say(c, NULL, "ready", NULL, NULL, 0);
        return;
    }
    meters_refused(c->server->meters, "unauthorized");
    drop(c, LWS_CLOSE_STATUS_POLICY_VIOLATION, "this API key is not known here");
}

static void take_text(ws_connection *c) {
    json_error_t je;
    json_t *j = json_loadb(c->in.data ? c->in.data : "", c->in.len, 0, &je);
    char id[128] = "";
    const char *type = json_string_value(json_object_get(j, "type"));
    if (!json_is_object(j)) refuse(c, NULL, "invalid_json", "the message is not a JSON object: %s", j ? "an object is needed" : je.text);
    else if (!read_id(j, id)) refuse(c, NULL, NULL, "id: a string or an integer of at most 120 bytes");
    else if (!type) refuse(c, id, NULL, "type: one of auth, chat, completion, cancel, ping");
    else if (strcmp(type, "auth") == 0) take_auth(c, j);
    else if (!c->trusted) drop(c, LWS_CLOSE_STATUS_POLICY_VIOLATION, "an API key is needed: send {\"type\":\"auth\",\"key\":...} first");
    else if (strcmp(type, "ping") == 0) say(c, id, "pong", NULL, NULL, 0);
    else if (strcmp(type, "cancel") == 0) {
        ws_request *r = c->requests;
        while (r && strcmp(r->id, id) != 0) r = r->next;
        if (r) task_cancel(r->task);
        else refuse(c, id, "request_not_found", "no request with this id is running");
    } else if (strcmp(type, "chat") == 0 || strcmp(type, "completion") == 0) {
        bool chat = type[1] == 'h';
        json_t *request = json_object_get(j, "request");
        ws_request *r = c->requests;
        while (r && strcmp(r->id, id) != 0) r = r->next;
        if (!id[0]) refuse(c, NULL, NULL, "id: a request needs one, to tell its answer from others");
        else if (r) refuse(c, id, "request_exists", "a request with this id is running");
        else if (!json_is_object(request)) refuse(c, id, NULL, "request: the object that %s takes is needed", chat ? "/v1/chat/completions" : "/v1/completions");
        else {
            char *text = json_dumps(request, JSON_COMPACT);
            buf body = {0};
            if (text) buf_puts(&body, text);
            free(text);
            start(c, id, chat ? openai_chat : openai_completion, &body, false);
            buf_free(&body);
        }
    } else refuse(c, id, NULL, "type: one of auth, chat, completion, cancel, ping, not \"%.40s\"", type);
    json_decref(j);
}

static void take_image(ws_connection *c) {
    if (!c->trusted) drop(c, LWS_CLOSE_STATUS_POLICY_VIOLATION, "an API key is needed");
    else start(c, "", openai_image, &c->in, true);
}

static void receive(ws_connection *c, const void *data, size_t n) {
    if (c->closing) return;
    if (lws_is_first_fragment(c->wsi)) {
        buf_clear(&c->in);
        c->binary = lws_frame_is_binary(c->wsi);
    }
    if (c->in.len + n > (c->trusted ? c->server->config->max_body : 4096)) {
        drop(c, LWS_CLOSE_STATUS_MESSAGE_TOO_LARGE, "the message is larger than limits.max_body");
        return;
    }
    buf_add(&c->in, data, n);
    if (c->in.failed) {
        drop(c, LWS_CLOSE_STATUS_UNEXPECTED_CONDITION, "out of memory");
        return;
    }
    if (!lws_is_final_fragment(c->wsi) || lws_remaining_packet_payload(c->wsi)) return;
    if (c->binary) take_image(c);
    else take_text(c);
    buf_free(&c->in); /* idle connections hold nothing */
}

/* ---- connections ---- */
static int open_connection(server *s, struct lws *wsi, session *ss) {
    ws_connection *c = calloc(1, sizeof *c);
    if (!c) return -1;
    c->server = s;
    c->wsi = wsi;
    c->last = &c->first;
    lws_get_peer_simple(wsi, c->peer, sizeof c->peer);
    char header[256] = "";
    int n = lws_hdr_total_length(wsi, WSI_TOKEN_HTTP_AUTHORIZATION);
    if (n > 0 && n < (int)sizeof header) lws_hdr_copy(wsi, header, sizeof header, WSI_TOKEN_HTTP_AUTHORIZATION);
    size_t token_n = 0;
    const char *token = route_bearer(header, &token_n);
    c->trusted = route_key_valid(s, token, token_n, &c->key);
    memset(header, 0, sizeof header);
    if (!c->trusted) lws_set_timeout(wsi, PENDING_TIMEOUT_USER_OK, AUTH_S);
    c->next = connections;
    if (connections) connections->prev = c;
    connections = c;
    ss->ws = c;
    meters_connection(s->meters, "ws", 1);
    return 0;
}

static void close_connection(session *ss) {
    ws_connection *c = ss->ws;
    if (!c) return;
    ss->ws = NULL;
    c->closing = true;
    while (c->requests) {
        task *t = c->requests->task;
        request_free(c->requests);
        task_abandon(t);
    }
    for (frame *f = c->first, *next; f; f = next) {
        next = f->next;
        free(f);
    }
    if (c->prev) c->prev->next = c->next;
    else connections = c->next;
    if (c->next) c->next->prev = c->prev;
    meters_connection(c->server->meters, "ws", -1);
    buf_free(&c->in);
    free(c);
}

static int write_frame(ws_connection *c) {
    if (c->closing) return 0;
    frame *f = c->first;
    if (!f) return 0;
    int n = lws_write(c->wsi, f->data + LWS_PRE, f->n, LWS_WRITE_TEXT);
    c->first = f->next;
    if (!c->first) c->last = &c->first;
    c->queued -= f->n;
    free(f);
    if (n < 0) return -1;
    if (c->first) lws_callback_on_writable(c->wsi);
    return 0;
}

int ws_callback(server *s, struct lws *wsi, enum lws_callback_reasons reason, session *ss, void *in, size_t n) {
    switch (reason) {
    case LWS_CALLBACK_FILTER_PROTOCOL_CONNECTION: {
        char path[64] = "", origin[128] = "";
        lws_hdr_copy(wsi, path, sizeof path, WSI_TOKEN_GET_URI);
        if (!path[0]) lws_hdr_copy(wsi, path, sizeof path, WSI_TOKEN_HTTP_COLON_PATH);
        if (strcmp(path, "/ws") != 0) {
            lws_return_http_status(wsi, 404, NULL);
            return -1;
        }
        /* Any page may open a WebSocket, whatever CORS says: a browser's origin must be this server or an allowed one. */
        int length = lws_hdr_total_length(wsi, WSI_TOKEN_ORIGIN);
        if (length >= (int)sizeof origin) return -1;
        if (length > 0) {
            char host[128] = "";
            lws_hdr_copy(wsi, origin, sizeof origin, WSI_TOKEN_ORIGIN);
            lws_hdr_copy(wsi, host, sizeof host, WSI_TOKEN_HOST);
            const char *name = strstr(origin, "://");
            if (!(name && strcmp(name + 3, host) == 0) && !route_origin_allowed(s, origin)) {
                lws_return_http_status(wsi, 403, NULL);
                return -1;
            }
        }
        return 0;
    }
    case LWS_CALLBACK_ESTABLISHED: return open_connection(s, wsi, ss);
    case LWS_CALLBACK_RECEIVE:
        if (ss->ws) receive(ss->ws, in, n);
        return 0;
    case LWS_CALLBACK_SERVER_WRITEABLE: return ss->ws ? write_frame(ss->ws) : -1;
    case LWS_CALLBACK_TIMER: return ss->ws && ss->ws->closing ? -1 : 0;
    case LWS_CALLBACK_CLOSED:
        close_connection(ss);
        return 0;
    default: return 0;
    }
}

void ws_goodbye(void) {
    for (ws_connection *c = connections; c; c = c->next) drop(c, LWS_CLOSE_STATUS_GOINGAWAY, "the server is shutting down");
}
