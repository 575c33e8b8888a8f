/* http.c - HTTP/1.1 and HTTP/2 exchanges over libwebsockets.
 *
 * Job:        http.h.
 * Input:      libwebsockets' callbacks.
 * Output:     bytes to clients.
 * Invariants: one lws_write for each writable callback, as libwebsockets asks for;
 *             an HTTP/1.1 stream is chunked, so that a client sees whether it is whole and the connection lives on.
 */
#include "http.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "server.h"
#include "task.h"
#include "ws.h"

#define PIECE (32 << 10)
#define SMALL (16 << 10)
#define FRAME 16000 /* HTTP/2: a DATA frame of at most 16,384 bytes (RFC 9113 4.2) */
#define MAX_DISCARD_S 5 /* how long the rest of a refused body is read, so that the client gets to see why */

static exchange *streams;

static server *server_of(struct lws *wsi) { return lws_context_user(lws_get_context(wsi)); }

static void copy_header(struct lws *wsi, enum lws_token_indexes token, char *out, size_t size) {
    int n = lws_hdr_total_length(wsi, token);
    out[0] = 0;
    if (n > 0 && (size_t)n < size) lws_hdr_copy(wsi, out, (int)size, token);
}

static void want_write(exchange *x) {
    if (x->wsi) lws_callback_on_writable(x->wsi);
}

/* ---- responses ---- */
void exchange_header(exchange *x, const char *name, const char *value) { buf_printf(&x->headers, "%s: %s\r\n", name, value); }

static void respond(exchange *x, int status, const char *type) {
    x->status = status;
    if (type) exchange_header(x, "content-type", type);
    x->ready = true;
    want_write(x);
}

void exchange_reply(exchange *x, int status, const char *type, const char *body, size_t n) {
    if (x->ready) return;
    buf_add(&x->out, body, n);
    if (x->out.failed) { /* an empty answer with its status is all there is memory for */
        buf_clear(&x->out);
        status = 503;
    }
    x->over = true;
    respond(x, status, type);
}

void exchange_reply_fixed(exchange *x, int status, const char *type, const void *body, size_t n) {
    if (x->ready) return;
    x->fixed = body;
    x->fixed_n = n;
    x->over = true;
    respond(x, status, type);
}

void exchange_fail(exchange *x, int status, const char *type, const char *code, const char *fmt, ...) {
    task_error e = {.status = status, .type = type, .code = code};
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e.message, sizeof e.message, fmt, ap);
    va_end(ap);
    buf b = {0};
    task_error_json(&b, &e);
    exchange_reply(x, status, "application/json", b.data, b.len);
    buf_free(&b);
}

void exchange_begin(exchange *x, const char *type) {
    if (x->ready) return;
    x->streaming = true;
    x->last_write = server_now();
    exchange_header(x, "cache-control", "no-cache");
    exchange_header(x, "x-accel-buffering", "no"); /* nginx would hold events back */
    x->next = streams;
    if (streams) streams->prev = x;
    streams = x;
    meters_connection(x->server->meters, "sse", 1);
    respond(x, 200, type);
}

void exchange_write(exchange *x, const char *data, size_t n) {
    if (x->over) return;
    buf_add(&x->out, data, n);
    x->last_write = server_now();
    if (x->out.failed || x->out.len - x->out_at > x->server->config->send_buffer) {
        log_event(LOG_WARN, "slow_reader", x->id, LOG_STR("peer", x->peer), LOG_NUM("bytes", (int64_t)(x->out.len - x->out_at)));
        task *t = x->task;
        x->task = NULL;
        x->over = x->close = true;
        buf_free(&x->out);
        x->out_at = 0;
        if (t) task_abandon(t);
        lws_set_timeout(x->wsi, PENDING_TIMEOUT_USER_OK, LWS_TO_KILL_ASYNC);
        return;
    }
    want_write(x);
}

void exchange_end(exchange *x) {
    x->over = true;
    want_write(x);
}

/* ---- what goes out ---- */
static int add_header(exchange *x, const char *name, const char *value, unsigned char **p, unsigned char *end) {
    return lws_add_http_header_by_name(x->wsi, (const unsigned char *)name, (const unsigned char *)value, (int)strlen(value), p, end);
}

static int write_head(exchange *x) {
    static unsigned char head[LWS_PRE + 4096 + SMALL]; /* the loop's: one thread */
    unsigned char *start = head + LWS_PRE, *p = start, *end = start + 4095;
    if (lws_add_http_header_status(x->wsi, (unsigned)x->status, &p, end)) return -1;
    char *save = NULL;
    for (char *line = x->headers.data ? strtok_r(x->headers.data, "\r\n", &save) : NULL; line; line = strtok_r(NULL, "\r\n", &save)) {
        char *colon = strchr(line, ':');
        if (!colon) continue;
        char *value = colon + 2;
        colon[1] = 0;
        if (add_header(x, line, value, &p, end)) return -1;
    }
    if (add_header(x, "x-request-id:", x->id, &p, end) || add_header(x, "x-content-type-options:", "nosniff", &p, end)) return -1;
    if (x->origin[0]) {
        if (add_header(x, "access-control-allow-origin:", x->origin, &p, end) || add_header(x, "vary:", "origin", &p, end) ||
            add_header(x, "access-control-expose-headers:", "x-request-id, retry-after", &p, end))
            return -1;
    }
    if (x->close && !x->http2 && add_header(x, "connection:", "close", &p, end)) return -1;
    size_t n = x->fixed ? x->fixed_n : x->out.len;
    bool bare = x->head || x->status == 204 || x->status == 304 || (!x->streaming && n == 0);
    if (x->streaming) {
        if (!x->http2 && add_header(x, "transfer-encoding:", "chunked", &p, end)) return -1;
    } else if (x->status != 204 && x->status != 304) {
        if (lws_add_http_header_content_length(x->wsi, n, &p, end)) return -1;
    }
    if (lws_finalize_http_header(x->wsi, &p, end)) return -1;
    int flags = LWS_WRITE_HTTP_HEADERS;
    if (bare && !x->streaming) {
        flags |= LWS_WRITE_H2_STREAM_END;
        x->fixed = NULL;
        x->fixed_n = 0;
        buf_clear(&x->out);
        x->out_at = 0;
    }
    bool small = !x->http2 && !x->streaming && !bare && n <= SMALL; /* head and body in one write */
    if (small) {
        memcpy(p, x->fixed ? x->fixed : x->out.data, n);
        p += n;
        x->bytes_out += n;
        x->out_at = n;
    }
    if (lws_write(x->wsi, start, (size_t)(p - start), (enum lws_write_protocol)flags) < 0) return -1;
    x->head_sent = true;
    return small || (bare && !x->streaming);
}

/* 1: everything was written. */
static int write_piece(exchange *x) {
    static unsigned char space[LWS_PRE + PIECE + 64]; /* the loop's: one thread */
    unsigned char *p = space + LWS_PRE;
    const char *data = x->fixed ? x->fixed : x->out.data;
    size_t left = (x->fixed ? x->fixed_n : x->out.len) - x->out_at, most = x->http2 ? FRAME : PIECE, n = left < most ? left : most, size = 0;
    lws_fileofs_t window = x->http2 ? lws_get_peer_write_allowance(x->wsi) : -1; /* flow control of HTTP/2; -1: none */
    if (window == 0 && left) return 0; /* the client's window update makes the stream writable */
    if (window > 0 && (size_t)window < n) n = (size_t)window;
    bool last = x->over && n == left;
    bool chunked = x->streaming && !x->http2;
    if (left == 0 && !last) return 0;
    if (chunked && n) size += (size_t)sprintf((char *)p, "%zx\r\n", n);
    if (n) memcpy(p + size, data + x->out_at, n);
    size += n;
    if (chunked && n) size += (size_t)sprintf((char *)p + size, "\r\n");
    if (chunked && last) size += (size_t)sprintf((char *)p + size, "0\r\n\r\n");
    if (size && lws_write(x->wsi, p, size, last ? LWS_WRITE_HTTP_FINAL : LWS_WRITE_HTTP) < 0) return -1;
    x->bytes_out += n;
    x->out_at += n;
    if (!x->fixed && x->out_at == x->out.len) {
        x->out.len = x->out_at = 0;
    } else if (!x->fixed && x->out_at > (64 << 10)) {
        buf_drop(&x->out, x->out_at);
        x->out_at = 0;
    }
    return last;
}

/* ---- the end of an exchange ---- */
static void finish(session *s) {
    exchange *x = s->exchange;
    if (!x) return;
    s->exchange = NULL;
    double now = server_now();
    if (x->task) {
        task *t = x->task;
        x->task = NULL;
        x->finish_reason = "disconnected";
        task_abandon(t);
    }
    if (x->streaming) {
        if (x->prev) x->prev->next = x->next;
        else streams = x->next;
        if (x->next) x->next->prev = x->prev;
        meters_connection(x->server->meters, "sse", -1);
    }
    if (x->entered) {
        long tokens = (x->prompt_tokens > 0 ? x->prompt_tokens : 0) + (x->completion_tokens > 0 ? x->completion_tokens : 0);
        auth_leave(x->server->keys, x->key, now, tokens);
    }
    int status = x->status ? x->status : 499; /* nginx's word for a client that left before it was answered */
    meters_http(x->server->meters, x->method, x->route ? route_pattern(x->route) : "other", status, now - x->started);
    log_request r = {.request = x->id, .peer = x->peer, .method = x->method, .path = x->path, .model = x->model,
                     .key = x->key ? auth_key_name(x->key) : NULL, .finish_reason = x->finish_reason, .agent = x->agent[0] ? x->agent : NULL,
                     .status = status, .bytes_in = x->body_bytes, .bytes_out = x->bytes_out, .total_ms = (now - x->started) * 1e3,
                     .queue_ms = x->queue_ms, .ttft_ms = x->ttft_ms, .vision_ms = x->vision_ms, .prompt_tokens = x->prompt_tokens,
                     .cached_tokens = x->cached_tokens, .image_tokens = x->image_tokens, .completion_tokens = x->completion_tokens};
    log_access(&r);
    buf_free(&x->body);
    buf_free(&x->headers);
    buf_free(&x->out);
    free(x);
}

/* ---- the beginning of one ---- */
static const char *const methods[] = {"GET", "POST", "OPTIONS", "PUT", "PATCH", "DELETE", "CONNECT", "HEAD"};

static exchange *begin(struct lws *wsi, session *s) {
    server *sv = server_of(wsi);
    finish(s); /* the one before on this connection, if it is still there */
    exchange *x = calloc(1, sizeof *x);
    if (!x) return NULL;
    s->exchange = x;
    x->server = sv;
    x->wsi = wsi;
    x->session = s;
    x->started = server_now();
    x->prompt_tokens = x->cached_tokens = x->image_tokens = x->completion_tokens = -1;
    x->queue_ms = x->ttft_ms = x->vision_ms = -1;
    x->http2 = lws_get_network_wsi(wsi) != wsi;
    id_new(x->id, "req-");
    char *uri = NULL;
    int uri_n = 0, method = lws_http_get_uri_and_method(wsi, &uri, &uri_n);
    snprintf(x->method, sizeof x->method, "%s", method >= 0 && method < 8 ? methods[method] : "?");
    if (uri_n > 0 && (size_t)uri_n < sizeof x->path) memcpy(x->path, uri, (size_t)uri_n);
    x->head = strcmp(x->method, "HEAD") == 0;
    lws_get_peer_simple(wsi, x->peer, sizeof x->peer);
    copy_header(wsi, WSI_TOKEN_HTTP_USER_AGENT, x->agent, sizeof x->agent);
    copy_header(wsi, WSI_TOKEN_HTTP_IF_NONE_MATCH, x->etag, sizeof x->etag);
    copy_header(wsi, WSI_TOKEN_HTTP_CONTENT_TYPE, x->content_type, sizeof x->content_type);
    char text[256];
    copy_header(wsi, WSI_TOKEN_HTTP_ACCEPT_ENCODING, text, sizeof text);
    x->deflate = strstr(text, "gzip") != NULL;
    copy_header(wsi, WSI_TOKEN_ORIGIN, text, sizeof text);
    if (text[0] && strlen(text) < sizeof x->origin && route_origin_allowed(sv, text)) strcpy(x->origin, text);
    return x;
}

/* Whether a body will come, and whether it is one that we take. False: answered. */
static bool body_allowed(exchange *x, bool *comes) {
    char text[64];
    copy_header(x->wsi, WSI_TOKEN_HTTP_CONTENT_LENGTH, text, sizeof text);
    if (lws_hdr_total_length(x->wsi, WSI_TOKEN_HTTP_CONTENT_LENGTH) > 19 || text[strspn(text, "0123456789")]) {
        x->close = true; /* sent twice or not a number: nobody can tell where the body ends (RFC 9112 6.3) */
        exchange_fail(x, 400, "invalid_request_error", "bad_content_length", "the Content-Length header has to be one number");
        return false;
    }
    *comes = text[0] && strtoull(text, NULL, 10) > 0;
    bool untold = x->http2 ? strcmp(x->method, "POST") == 0 : lws_hdr_total_length(x->wsi, WSI_TOKEN_HTTP_TRANSFER_ENCODING) > 0;
    if (!text[0] && untold) {
        x->close = true; /* what follows cannot be told from the next request */
        exchange_fail(x, 411, "invalid_request_error", "length_required",
                      "a body in chunks is not taken: send a Content-Length header (most clients do when the body is one string)");
        return false;
    }
    if (!*comes) return true;
    uint64_t most = route_max_body(x);
    if (strtoull(text, NULL, 10) > most) {
        exchange_fail(x, 413, "invalid_request_error", "body_too_large",
                      "the body has %s bytes; this route takes %llu at most (limits.max_body)", text, (unsigned long long)most);
        return false;
    }
    /* All of it may be sent at once. libwebsockets 4.1 miscounts what arrives before a stream's action has begun, believes
     * that the client may still send, and leaves it waiting for a window update: one upload in seven stood still. */
    uint64_t credit = strtoull(text, NULL, 10);
    if (credit > 1 << 30) credit = 1 << 30; /* a window ends at 2^31 - 1 (RFC 9113 6.9.1) */
    if (x->http2 && lws_wsi_tx_credit(x->wsi, LWSTXCR_PEER_TO_US, (int)credit)) {
        exchange_fail(x, 503, "overloaded_error", "out_of_memory", "no memory for the body");
        return false;
    }
    copy_header(x->wsi, WSI_TOKEN_HTTP_EXPECT, text, sizeof text);
    if (!x->http2 && strcasecmp(text, "100-continue") == 0) {
        unsigned char go[LWS_PRE + 32];
        int n = sprintf((char *)go + LWS_PRE, "HTTP/1.1 100 Continue\r\n\r\n");
        lws_write(x->wsi, go + LWS_PRE, (size_t)n, LWS_WRITE_HTTP_HEADERS);
    }
    return true;
}

/* Once: libwebsockets may tell of the end of one body twice, when more bytes follow it. */
static void run(exchange *x) {
    if (x->ready || x->ran) return;
    x->ran = true;
    route_run(x);
}

static int on_request(struct lws *wsi, session *s) {
    exchange *x = begin(wsi, s);
    if (!x) return -1;
    bool comes = false;
    bool open = route_open(x) && body_allowed(x, &comes);
    if (!open) {
        char text[32];
        copy_header(wsi, WSI_TOKEN_HTTP_CONTENT_LENGTH, text, sizeof text);
        if (text[0] && strtoull(text, NULL, 10) > 0) { /* read what is on its way, so that the client sees the answer */
            x->discard = x->close = true;
            lws_set_timeout(wsi, PENDING_TIMEOUT_USER_OK, MAX_DISCARD_S);
        }
        return 0;
    }
    if (!comes) run(x);
    return 0;
}

static int on_body(exchange *x, const void *data, size_t n) {
    x->body_bytes += n;
    if (x->discard) return 0;
    if (x->body_bytes > route_max_body(x)) { /* HTTP/2 may come without a length */
        x->discard = x->close = true;
        buf_free(&x->body);
        lws_set_timeout(x->wsi, PENDING_TIMEOUT_USER_OK, MAX_DISCARD_S);
        exchange_fail(x, 413, "invalid_request_error", "body_too_large", "the body has more than %llu bytes (limits.max_body)",
                      (unsigned long long)route_max_body(x));
        return 0;
    }
    if (x->ran) return 0;
    buf_add(&x->body, data, n);
    if (x->body.failed) {
        x->discard = x->close = true;
        exchange_fail(x, 503, "overloaded_error", "out_of_memory", "no memory for the body");
    }
    return 0;
}

static int on_writable(session *s) {
    exchange *x = s->exchange;
    if (!x || !x->ready) return 0;
    int done;
    if (!x->head_sent) {
        done = write_head(x);
        if (done == 0) lws_callback_on_writable(x->wsi);
    } else {
        done = write_piece(x);
        if (done == 0 && x->out_at < (x->fixed ? x->fixed_n : x->out.len)) lws_callback_on_writable(x->wsi);
    }
    if (done < 0) return -1;
    if (!done) return 0;
    struct lws *wsi = x->wsi;
    if (x->discard && !x->drained && !x->http2) return 0; /* the end of the body, or the timeout, closes it */
    bool close = x->close;
    finish(s);
    if (close) return -1;
    return lws_http_transaction_completed(wsi) ? -1 : 0;
}

/* An answer that is there at once goes out at once: a socket that just brought a request takes one. */
static int answer_now(session *s) {
    exchange *x = s->exchange;
    return x && x->ready && x->over && !x->head_sent && !x->discard && !x->http2 ? on_writable(s) : 0;
}

static int callback(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in, size_t len) {
    session *s = user;
    switch (reason) {
    case LWS_CALLBACK_HTTP: return on_request(wsi, s) ? -1 : answer_now(s);
    case LWS_CALLBACK_HTTP_BODY: return s->exchange ? on_body(s->exchange, in, len) : 0;
    case LWS_CALLBACK_HTTP_BODY_COMPLETION:
        if (!s->exchange) return 0;
        if (s->exchange->discard) {
            exchange *x = s->exchange;
            bool said = x->head_sent && x->out_at == (x->fixed ? x->fixed_n : x->out.len);
            x->drained = true;
            return said && !x->http2 ? -1 : 0;
        }
        lws_set_timeout(wsi, NO_PENDING_TIMEOUT, 0);
        run(s->exchange);
        return answer_now(s);
    case LWS_CALLBACK_HTTP_WRITEABLE: return on_writable(s);
    case LWS_CALLBACK_HTTP_DROP_PROTOCOL:
    case LWS_CALLBACK_CLOSED_HTTP:
        if (s) finish(s);
        return 0;
    case LWS_CALLBACK_FILTER_PROTOCOL_CONNECTION:
    case LWS_CALLBACK_ESTABLISHED:
    case LWS_CALLBACK_RECEIVE:
    case LWS_CALLBACK_SERVER_WRITEABLE:
    case LWS_CALLBACK_TIMER:
    case LWS_CALLBACK_CLOSED: return ws_callback(server_of(wsi), wsi, reason, s, in, len);
    default: return 0;
    }
}

/* ---- the listening socket ---- */
static const struct lws_protocols protocols[] = {
    {"qvl", callback, sizeof(session), 64 << 10, 0, NULL, 64 << 10},
    {NULL, NULL, 0, 0, 0, NULL, 0},
};

static char lws_last[256]; /* libwebsockets says why by its log only */

static void lws_line(int level, const char *line) {
    size_t n = strlen(line);
    while (n && (line[n - 1] == '\n' || line[n - 1] == ' ')) n--;
    if (level & LLL_ERR) {
        snprintf(lws_last, sizeof lws_last, "%.*s", (int)(n < 250 ? n : 250), line);
        log_event(LOG_WARN, "libwebsockets", NULL, LOG_STRN("message", line, n));
    }
}

/* Descriptors: one for each connection and some for ourselves. */
static void raise_descriptors(server *s) {
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r)) return;
    rlim_t want = s->config->max_connections + 256;
    if (r.rlim_cur >= want) return;
    r.rlim_cur = r.rlim_max == RLIM_INFINITY || r.rlim_max > want ? want : r.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &r) == 0 && r.rlim_cur < want)
        log_event(LOG_WARN, "few_descriptors", NULL, LOG_NUM("have", (int64_t)r.rlim_cur), LOG_NUM("want", (int64_t)want),
                  LOG_STR("hint", "raise ulimit -n or lower limits.max_connections"));
}

int http_start(server *s, char *err, size_t err_size) {
    lws_set_log_level(LLL_ERR, lws_line);
    raise_descriptors(s);
    const config *c = s->config;
    void *loops[1] = {&s->loop};
    struct lws_context_creation_info info = {0};
    info.port = CONTEXT_PORT_NO_LISTEN;
    info.options = LWS_SERVER_OPTION_LIBUV | LWS_SERVER_OPTION_EXPLICIT_VHOSTS | LWS_SERVER_OPTION_DISABLE_OS_CA_CERTS;
    if (c->tls_certificate[0]) info.options |= LWS_SERVER_OPTION_DO_SSL_GLOBAL_INIT;
    info.foreign_loops = loops;
    info.user = s;
    info.uid = (uid_t)-1;
    info.gid = (gid_t)-1;
    info.max_http_header_data = 8192;
    info.max_http_header_pool = (unsigned short)(c->max_connections < 60000 ? c->max_connections : 60000);
    info.timeout_secs = c->idle_s;
    info.timeout_secs_ah_idle = c->idle_s;
    info.pt_serv_buf_size = 64 << 10; /* reads: bodies of several megabytes are common here */
    info.fd_limit_per_thread = c->max_connections + 64;
    info.server_string = "qvl-serve";
    s->lws = lws_create_context(&info);
    if (!s->lws) {
        snprintf(err, err_size, "libwebsockets does not start: %s (its libuv plug-in is Debian's libwebsockets-evlib-uv)", lws_last);
        return -1;
    }
    info.port = c->port;
    info.iface = c->host[0] && strcmp(c->host, "0.0.0.0") != 0 && strcmp(c->host, "::") != 0 ? c->host : NULL;
    if (strcmp(c->host, "0.0.0.0") == 0) info.options |= LWS_SERVER_OPTION_DISABLE_IPV6;
    if (strchr(c->host, ':') == NULL) info.options |= LWS_SERVER_OPTION_DISABLE_IPV6;
    info.protocols = protocols;
    info.keepalive_timeout = (int)c->idle_s;
    info.vhost_name = "qvl";
    if (c->tls_certificate[0]) {
        info.ssl_cert_filepath = c->tls_certificate;
        info.ssl_private_key_filepath = c->tls_key;
        info.alpn = "h2,http/1.1";
        info.ssl_options_set = SSL_OP_NO_TLSv1 | SSL_OP_NO_TLSv1_1;
    }
    lws_last[0] = 0;
    s->vhost = lws_create_vhost(s->lws, &info);
    if (!s->vhost) {
        snprintf(err, err_size, "cannot listen on %s port %d: %s", c->host, c->port, lws_last[0] ? lws_last : "libwebsockets gave no reason");
        return -1;
    }
    s->port = lws_get_vhost_listen_port(s->vhost);
    return 0;
}

void http_reload(server *s) {
    const config *c = s->config;
    if (!c->tls_certificate[0]) return;
    if (lws_tls_cert_updated(s->lws, c->tls_certificate, c->tls_key, NULL, 0, NULL, 0))
        log_event(LOG_ERROR, "certificate_not_read", NULL, LOG_STR("file", c->tls_certificate), LOG_STR("reason", lws_last));
    else log_event(LOG_INFO, "certificate_read", NULL, LOG_STR("file", c->tls_certificate));
}

void http_tick(server *s) {
    double now = server_now(), limit = s->config->keepalive_s;
    if (!(limit > 0)) return;
    for (exchange *x = streams; x; x = x->next)
        if (!x->over && x->head_sent && now - x->last_write >= limit) exchange_write(x, ": alive\n\n", 9);
}
