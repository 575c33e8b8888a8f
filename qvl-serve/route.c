/* route.c - who may ask what.
 *
 * Job:        the table of routes; keys, rates and CORS; the small routes that need no worker.
 * Input:      an exchange with its headers, later with its body.
 * Output:     a reply, or a task that will reply.
 * Invariants: a route is in the table or it does not exist: openapi.json is compared with it by a test;
 *             every route asks for a key when there are keys, but for those marked OPEN.
 */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "http.h"
#include "image.h"
#include "task.h"
#include "ws.h"

enum { OPEN = 1, ADMIN = 2, COUNTED = 4, PREFIX = 8, QUICK = 16 }; /* COUNTED: takes part in a key's rates; QUICK: a short body is no work */

struct route {
    const char *method, *pattern; /* PREFIX: up to '{', the rest is exchange.tail */
    int flags;
    void (*run)(exchange *x);
    void (*work)(task *t); /* run on a worker; NULL when run answers */
};

/* ---- replies of tasks ---- */
static void note(exchange *x) {
    task *t = x->task;
    if (!t) return;
    if (t->model) x->model = model_name(t->model);
    x->finish_reason = t->finish_reason;
    if (t->finish_reason) {
        x->queue_ms = t->usage[QVL_USAGE_QUEUE_MS];
        x->ttft_ms = t->usage[QVL_USAGE_TTFT_MS];
        x->vision_ms = t->usage[QVL_USAGE_VISION_MS];
        x->prompt_tokens = (long)t->usage[QVL_USAGE_PROMPT_TOKENS];
        x->cached_tokens = (long)t->usage[QVL_USAGE_CACHED_TOKENS];
        x->image_tokens = (long)t->usage[QVL_USAGE_IMAGE_TOKENS];
        x->completion_tokens = (long)t->usage[QVL_USAGE_COMPLETION_TOKENS];
    }
    x->task = NULL;
}

static void to_reply(void *to, int status, const char *type, const char *body, size_t n) {
    note(to);
    exchange_reply(to, status, type, body, n);
}

static void to_fail(void *to, const task_error *e) {
    exchange *x = to;
    note(x);
    if (e->retry_after > 0) {
        char text[16];
        snprintf(text, sizeof text, "%d", e->retry_after);
        exchange_header(x, "retry-after", text);
    }
    buf b = {0};
    task_error_json(&b, e);
    exchange_reply(x, e->status, "application/json", b.data, b.len);
    buf_free(&b);
}

static void to_begin(void *to) { exchange_begin(to, "text/event-stream; charset=utf-8"); }

static void to_chunk(void *to, const char *json, size_t n) {
    exchange *x = to;
    static buf line; /* the loop's: one thread */
    buf_clear(&line);
    buf_puts(&line, "data: ");
    buf_add(&line, json, n);
    buf_puts(&line, "\n\n");
    if (!line.failed) exchange_write(x, line.data, line.len);
}

static void to_end(void *to) {
    exchange *x = to;
    note(x);
    exchange_write(x, "data: [DONE]\n\n", 14);
    exchange_end(x);
}

static void to_break(void *to, const task_error *e) {
    buf b = {0};
    task_error_json(&b, e);
    if (!b.failed) to_chunk(to, b.data, b.len);
    buf_free(&b);
}

static const task_sink http_sink = {to_reply, to_fail, to_begin, to_chunk, to_end, to_break, false};

/* ---- the small routes ---- */
static void reply_buf(exchange *x, int status, const char *type, buf *b) {
    if (b->failed) exchange_fail(x, 503, "overloaded_error", "out_of_memory", "no memory for the answer");
    else exchange_reply(x, status, type, b->data, b->len);
    buf_free(b);
}

static void run_models(exchange *x) {
    buf b = {0};
    models_json(x->server, NULL, &b);
    reply_buf(x, 200, "application/json", &b);
}

static void run_model(exchange *x) {
    buf b = {0};
    if (models_json(x->server, x->tail, &b)) {
        exchange_fail(x, 404, "not_found_error", "model_not_found", "there is no model \"%s\"; GET /v1/models lists them", x->tail);
        buf_free(&b);
        return;
    }
    reply_buf(x, 200, "application/json", &b);
}

static void run_image_get(exchange *x) {
    buf b = {0};
    if (images_json(x->server, x->tail, &b)) {
        exchange_fail(x, 404, "not_found_error", "image_not_found", "there is no image \"%s\": it was never kept, or has been forgotten", x->tail);
        buf_free(&b);
        return;
    }
    reply_buf(x, 200, "application/json", &b);
}

static void run_image_delete(exchange *x) {
    if (images_delete(x->server, x->tail)) {
        exchange_fail(x, 404, "not_found_error", "image_not_found", "there is no image \"%s\": it was never kept, or has been forgotten", x->tail);
        return;
    }
    buf b = {0};
    buf_puts(&b, "{\"id\":");
    buf_json(&b, x->tail, strlen(x->tail));
    buf_puts(&b, ",\"object\":\"image\",\"deleted\":true}");
    reply_buf(x, 200, "application/json", &b);
}

static void run_health(exchange *x) {
    const char *stuck = NULL;
    if (!models_stuck(x->server, x->server->config->watchdog_ms, &stuck)) {
        exchange_reply(x, 200, "application/json", "{\"status\":\"ok\"}", 15);
        return;
    }
    buf b = {0};
    buf_puts(&b, "{\"status\":\"stuck\",\"model\":");
    buf_json(&b, stuck, strlen(stuck));
    buf_puts(&b, "}");
    reply_buf(x, 503, "application/json", &b);
}

static void run_ready(exchange *x) {
    server *s = x->server;
    const char *status = s->draining ? "draining" : models_ready(s) ? "ready" : "loading";
    buf b = {0};
    buf_printf(&b, "{\"status\":\"%s\"}", status);
    reply_buf(x, strcmp(status, "ready") == 0 ? 200 : 503, "application/json", &b);
}

static void run_metrics(exchange *x) {
    buf b = {0};
    models_measure(x->server);
    if (meters_write(x->server->meters, &b)) b.failed = true;
    reply_buf(x, 200, METRICS_CONTENT_TYPE, &b);
}

static void run_admin_models(exchange *x) {
    buf b = {0};
    models_admin_json(x->server, &b);
    reply_buf(x, 200, "application/json", &b);
}

static void run_admin_load(exchange *x) {
    json_error_t je;
    json_t *j = json_loadb(x->body.data ? x->body.data : "", x->body.len, 0, &je);
    const char *name = j ? json_string_value(json_object_get(j, "name")) : NULL;
    const char *path = j ? json_string_value(json_object_get(j, "path")) : NULL;
    json_t *a = j ? json_object_get(j, "action") : NULL;
    const char *action = a ? json_string_value(a) : "load";
    char err[512] = "";
    if (!j) exchange_fail(x, 400, "invalid_request_error", "invalid_json", "the body is not JSON: %s (line %d)", je.text, je.line);
    else if (!name || !name[0] || strlen(name) > 127)
        exchange_fail(x, 400, "invalid_request_error", NULL, "name: the model's name is needed, 1 to 127 bytes");
    else if (!action || (strcmp(action, "load") != 0 && strcmp(action, "unload") != 0))
        exchange_fail(x, 400, "invalid_request_error", NULL, "action: load or unload");
    else if (strcmp(action, "load") == 0 ? model_load(x->server, name, path, err, sizeof err)
                                         : model_unload(x->server, name, err, sizeof err))
        exchange_fail(x, 400, "invalid_request_error", NULL, "%s", err);
    else {
        buf b = {0};
        models_admin_json(x->server, &b);
        reply_buf(x, 202, "application/json", &b);
    }
    json_decref(j);
}

static void run_asset(exchange *x) { asset_serve(x, x->path); }

static const route routes[] = {
    {"POST", "/v1/chat/completions", COUNTED, NULL, openai_chat},
    {"POST", "/v1/chat/completions/plan", COUNTED, NULL, openai_plan},
    {"POST", "/v1/completions", COUNTED, NULL, openai_completion},
    {"GET", "/v1/models", 0, run_models, NULL},
    {"GET", "/v1/models/{model}", PREFIX, run_model, NULL},
    {"POST", "/v1/images", COUNTED, NULL, openai_image},
    {"GET", "/v1/images/{id}", PREFIX, run_image_get, NULL},
    {"DELETE", "/v1/images/{id}", PREFIX, run_image_delete, NULL},
    {"POST", "/tokenize", COUNTED | QUICK, NULL, openai_tokenize},
    {"POST", "/detokenize", COUNTED | QUICK, NULL, openai_detokenize},
    {"GET", "/ws", OPEN, NULL, NULL}, /* the handshake is ws.c's, and so is its key */
    {"GET", "/health", OPEN, run_health, NULL},
    {"GET", "/ready", OPEN, run_ready, NULL},
    {"GET", "/metrics", 0, run_metrics, NULL},
    {"GET", "/admin/models", ADMIN, run_admin_models, NULL},
    {"POST", "/admin/models", ADMIN, run_admin_load, NULL},
    {"GET", "/openapi.json", OPEN, run_asset, NULL},
    {"GET", "/docs", OPEN, run_asset, NULL},
    {"GET", "/", OPEN, run_asset, NULL},
    {"GET", "/status", OPEN, run_asset, NULL},
    {"GET", "/static/{name}", OPEN | PREFIX, run_asset, NULL},
};

const char *route_pattern(const route *r) { return r->pattern; }

uint64_t route_max_body(const exchange *x) {
    if (x->route && x->route->run) return 64 << 10; /* the small ones */
    return x->server->config->max_body;
}

static bool matches(const route *r, exchange *x) {
    if (!(r->flags & PREFIX)) return strcmp(r->pattern, x->path) == 0;
    size_t n = strcspn(r->pattern, "{");
    if (strncmp(r->pattern, x->path, n) != 0 || !x->path[n] || strlen(x->path + n) >= sizeof x->tail) return false;
    strcpy(x->tail, x->path + n);
    return true;
}

/* ---- keys ---- */
const char *route_bearer(const char *header, size_t *n) {
    if (strncasecmp(header, "Bearer ", 7) != 0) return NULL;
    header += 7;
    while (*header == ' ') header++;
    *n = strlen(header);
    return *n ? header : NULL;
}

bool route_key_valid(server *s, const char *token, size_t n, auth_key **key) {
    *key = NULL;
    if (!s->keys) return true;
    if (token) *key = auth_find(s->keys, token, n);
    return *key != NULL;
}

bool route_origin_allowed(const server *s, const char *origin) {
    for (unsigned i = 0; i < s->config->cors_count; i++)
        if (strcmp(s->config->cors[i], "*") == 0 || strcmp(s->config->cors[i], origin) == 0) return true;
    return false;
}

static bool may_use(exchange *x) {
    const route *r = x->route;
    server *s = x->server;
    if (r->flags & OPEN) return true;
    if (!s->keys) {
        if (!(r->flags & ADMIN)) return true;
        exchange_fail(x, 403, "permission_error", "no_keys",
                      "%s needs an admin key, and this server has no keys: see auth.keys and qvl-serve --new-admin-key", r->pattern);
        return false;
    }
    char header[256] = "";
    int n = lws_hdr_total_length(x->wsi, WSI_TOKEN_HTTP_AUTHORIZATION);
    if (n > 0 && n < (int)sizeof header) lws_hdr_copy(x->wsi, header, sizeof header, WSI_TOKEN_HTTP_AUTHORIZATION);
    size_t token_n = 0;
    const char *token = route_bearer(header, &token_n);
    bool known = route_key_valid(s, token, token_n, &x->key);
    memset(header, 0, sizeof header);
    if (!known) {
        meters_refused(s->meters, "unauthorized");
        exchange_header(x, "www-authenticate", "Bearer");
        exchange_fail(x, 401, "authentication_error", "invalid_api_key",
                      token ? "this API key is not known here" : "an API key is needed: send the header Authorization: Bearer KEY");
        return false;
    }
    if ((r->flags & ADMIN) && !auth_key_admin(x->key)) {
        exchange_fail(x, 403, "permission_error", "not_admin", "%s needs an admin key", r->pattern);
        return false;
    }
    if (!(r->flags & COUNTED)) return true;
    int wait = 0;
    auth_verdict v = auth_enter(x->key, server_now(), &wait);
    if (v == AUTH_OK) {
        x->entered = true;
        return true;
    }
    char text[16];
    snprintf(text, sizeof text, "%d", wait);
    exchange_header(x, "retry-after", text);
    meters_refused(s->meters, v == AUTH_RATE ? "rate" : v == AUTH_CONCURRENT ? "concurrency" : "tokens");
    exchange_fail(x, 429, "rate_limit_error", "rate_limit_exceeded", "this key's limit of %s is reached; try again in %d s",
                  auth_verdict_text(v), wait);
    return false;
}

bool route_open(exchange *x) {
    bool path_known = false;
    char allow[64] = "";
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
        if (!matches(&routes[i], x)) continue;
        path_known = true;
        if (!strstr(allow, routes[i].method))
            snprintf(allow + strlen(allow), sizeof allow - strlen(allow), "%s%s", allow[0] ? ", " : "", routes[i].method);
        if (strcmp(routes[i].method, x->method) == 0 || (x->head && strcmp(routes[i].method, "GET") == 0)) x->route = &routes[i];
    }
    if (!path_known) {
        exchange_fail(x, 404, "not_found_error", "route_not_found", "there is no %s here; GET /docs lists what is", x->path);
        return false;
    }
    if (!x->route) {
        strncat(allow, ", OPTIONS", sizeof allow - strlen(allow) - 1);
        exchange_header(x, "allow", allow);
        if (strcmp(x->method, "OPTIONS") == 0) {
            if (x->origin[0]) {
                exchange_header(x, "access-control-allow-methods", allow);
                exchange_header(x, "access-control-allow-headers", "authorization, content-type, x-request-id");
                exchange_header(x, "access-control-max-age", "600");
            }
            exchange_reply(x, 204, NULL, "", 0);
        } else {
            exchange_fail(x, 405, "invalid_request_error", "method_not_allowed", "%s does not take %s, only %s", x->path, x->method, allow);
        }
        return false;
    }
    if (!may_use(x)) return false;
    if (x->server->draining && (x->route->flags & COUNTED)) {
        x->close = true;
        exchange_header(x, "retry-after", "5");
        exchange_fail(x, 503, "overloaded_error", "draining", "the server is shutting down");
        return false;
    }
    return true;
}

void route_run(exchange *x) {
    const route *r = x->route;
    if (r->run) {
        r->run(x);
        return;
    }
    if (!r->work) {
        exchange_fail(x, 400, "invalid_request_error", "websocket_only", "%s is a WebSocket: connect with its handshake", r->pattern);
        return;
    }
    task *t = task_new(x->server, r->pattern, r->work, &http_sink, x, &x->body);
    if (!t) {
        exchange_fail(x, 503, "overloaded_error", "out_of_memory", "no memory for the request");
        return;
    }
    x->task = t;
    t->key = x->key;
    t->quick = r->flags & QUICK;
    snprintf(t->request_id, sizeof t->request_id, "%s", x->id);
    snprintf(t->peer, sizeof t->peer, "%s", x->peer);
    snprintf(t->content_type, sizeof t->content_type, "%s", x->content_type);
    task_start(t);
}
