/* bare.c - the least that a libwebsockets HTTP server can do: takes a body and answers with fixed bytes.
 *
 * Job:        the yardstick of overhead.py.
 * Input:      bare PORT BYTES [STEP]: every request is answered with BYTES bytes of JSON type.
 * Output:     "listening" on stdout.
 * Invariants: the same library, loop and options as qvl-serve; nothing else.
 */
#include <libwebsockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <uv.h>

static char body[65536];
static size_t body_n;

static int answer(struct lws *wsi) {
    unsigned char head[LWS_PRE + 1024], *start = head + LWS_PRE, *p = start, *end = head + sizeof head - 1;
    if (lws_add_http_common_headers(wsi, 200, "application/json", body_n, &p, end) || lws_finalize_write_http_header(wsi, start, &p, end)) return -1;
    lws_callback_on_writable(wsi);
    return 0;
}

static int callback(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in, size_t n) {
    static unsigned char space[LWS_PRE + sizeof body];
    (void)user;
    (void)in;
    (void)n;
    switch (reason) {
    case LWS_CALLBACK_HTTP: return lws_hdr_total_length(wsi, WSI_TOKEN_HTTP_CONTENT_LENGTH) > 0 ? 0 : answer(wsi);
    case LWS_CALLBACK_HTTP_BODY_COMPLETION: return answer(wsi);
    case LWS_CALLBACK_HTTP_WRITEABLE:
        memcpy(space + LWS_PRE, body, body_n);
        if (lws_write(wsi, space + LWS_PRE, body_n, LWS_WRITE_HTTP_FINAL) < 0) return -1;
        return lws_http_transaction_completed(wsi) ? -1 : 0;
    default: return 0;
    }
}

int main(int argc, char **argv) {
    static const struct lws_protocols protocols[] = {{"bare", callback, 8, 65536, 0, NULL, 65536}, {NULL, NULL, 0, 0, 0, NULL, 0}};
    uv_loop_t loop;
    void *loops[1] = {&loop};
    struct lws_context_creation_info info = {0};
    if (argc < 3 || (body_n = strtoul(argv[2], NULL, 10)) > sizeof body) {
        fputs("usage: bare PORT BYTES\n", stderr);
        return 2;
    }
    memset(body, 'x', sizeof body);
    lws_set_log_level(0, NULL);
    uv_loop_init(&loop);
    info.port = atoi(argv[1]);
    info.iface = "127.0.0.1";
    info.uid = (uid_t)-1;
    info.gid = (gid_t)-1;
    info.options = LWS_SERVER_OPTION_LIBUV | LWS_SERVER_OPTION_DISABLE_IPV6;
    info.foreign_loops = loops;
    info.protocols = protocols;
    info.pt_serv_buf_size = 65536;
    if (!lws_create_context(&info)) return 1;
    puts("listening");
    fflush(stdout);
    return uv_run(&loop, UV_RUN_DEFAULT);
}
