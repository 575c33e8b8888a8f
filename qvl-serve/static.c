/* static.c - the page and its parts, from the binary.
 *
 * Job:        serve an asset with its type, ETag and policy.
 * Input:      a path; the table that the Makefile makes of web/ and Debian's script packages (tools/assets.sh).
 * Output:     200 with the bytes (gzip where the client takes it), 304, or 404.
 * Invariants: pages carry a Content-Security-Policy that lets them run their own scripts and nothing else.
 */
#include <string.h>

#include "http.h"

#define POLICY                                                                                                       \
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; " \
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

static const asset *find(const char *path) {
    for (size_t i = 0; i < assets_count; i++)
        if (strcmp(assets[i].path, path) == 0) return &assets[i];
    return NULL;
}

void asset_serve(exchange *x, const char *path) {
    const asset *a = find(path);
    if (!a) {
        exchange_fail(x, 404, "not_found_error", "route_not_found", "there is no %s here", path);
        return;
    }
    if (strncmp(a->type, "text/html", 9) == 0) {
        exchange_header(x, "content-security-policy", POLICY);
        exchange_header(x, "permissions-policy", "camera=(self), microphone=(), geolocation=()");
        exchange_header(x, "referrer-policy", "no-referrer");
    }
    exchange_header(x, "etag", a->etag);
    exchange_header(x, "cache-control", "no-cache"); /* ask each time: the answer is a 304 */
    if (a->packed) exchange_header(x, "vary", "accept-encoding");
    if (x->etag[0] && strstr(x->etag, a->etag)) {
        exchange_reply(x, 304, NULL, "", 0);
        return;
    }
    if (a->packed && x->deflate) {
        exchange_header(x, "content-encoding", "gzip");
        exchange_reply_fixed(x, 200, a->type, a->packed, a->packed_n);
    } else {
        exchange_reply_fixed(x, 200, a->type, a->plain, a->plain_n);
    }
}
