/* fetch.c - safe fetching over libcurl.
 *
 * Job:        fetch.h.
 * Input:      a URL and a policy.
 * Output:     bytes.
 * Invariants: the check of an address happens in the callback that opens the socket: what was checked is what is connected.
 */
#include "fetch.h"

#include <arpa/inet.h>
#include <curl/curl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#define MAX_REDIRECTS 3

int fetch_start(void) { return curl_global_init(CURL_GLOBAL_DEFAULT) ? -1 : 0; }

/* ---- addresses ---- */

/* Blocks that are not the public internet: IANA's special-purpose registries (RFC 6890 and its successors). */
static const struct {
    uint32_t net;
    int bits;
} private4[] = {
    {0x00000000, 8},  /* this network */
    {0x0A000000, 8},  /* private */
    {0x64400000, 10}, /* carrier-grade NAT */
    {0x7F000000, 8},  /* loopback */
    {0xA9FE0000, 16}, /* link-local, cloud metadata */
    {0xAC100000, 12}, /* private */
    {0xC0000000, 24}, /* IETF protocols */
    {0xC0000200, 24}, /* documentation */
    {0xC0586300, 24}, /* 6to4 relays */
    {0xC0A80000, 16}, /* private */
    {0xC6120000, 15}, /* benchmarks */
    {0xC6336400, 24}, /* documentation */
    {0xCB007100, 24}, /* documentation */
    {0xE0000000, 4},  /* multicast */
    {0xF0000000, 4},  /* reserved, broadcast */
};

static bool public4(uint32_t a) {
    for (size_t i = 0; i < sizeof private4 / sizeof *private4; i++)
        if ((a ^ private4[i].net) >> (32 - private4[i].bits) == 0) return false;
    return true;
}

static uint32_t be32(const uint8_t *p) { return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3]; }

static bool public6(const uint8_t *a) {
    static const uint8_t zeros[12], mapped[12] = {[10] = 0xFF, [11] = 0xFF}, nat64[12] = {0x00, 0x64, 0xFF, 0x9B};
    if (memcmp(a, zeros, 12) == 0) return false;                              /* ::, ::1, IPv4-compatible */
    if (memcmp(a, mapped, 12) == 0 || memcmp(a, nat64, 12) == 0) return public4(be32(a + 12));
    if (a[0] == 0x20 && a[1] == 0x02) return public4(be32(a + 2));            /* 6to4 */
    if (a[0] == 0x20 && a[1] == 0x01 && a[2] == 0 && a[3] == 0) return false; /* Teredo */
    if (a[0] == 0x20 && a[1] == 0x01 && a[2] == 0x0D && a[3] == 0xB8) return false; /* documentation */
    if (a[0] == 0x3F && a[1] == 0xFF && a[2] < 0x10) return false;            /* documentation */
    return (a[0] & 0xE0) == 0x20; /* 2000::/3 is what is given out; all else is local, multicast or reserved */
}

bool fetch_address_public(const struct sockaddr *a) {
    if (a->sa_family == AF_INET) return public4(ntohl(((const struct sockaddr_in *)(const void *)a)->sin_addr.s_addr));
    if (a->sa_family == AF_INET6) return public6(((const struct sockaddr_in6 *)(const void *)a)->sin6_addr.s6_addr);
    return false;
}

/* ---- hosts ---- */
bool fetch_host_allowed(const fetch_policy *p, const char *host, int port) {
    char with_port[300];
    snprintf(with_port, sizeof with_port, "%s:%d", host, port);
    size_t n = strlen(host);
    for (unsigned i = 0; i < p->allow_count; i++) {
        const char *rule = p->allow[i];
        size_t m = strlen(rule);
        if (port && strcasecmp(rule, with_port) == 0) return true;
        if (port && port != 80 && port != 443) continue; /* other ports are allowed by name only */
        if (strcmp(rule, "*") == 0 || strcasecmp(rule, host) == 0) return true;
        if (rule[0] == '.' && n > m && strcasecmp(host + n - m, rule) == 0) return true;
    }
    return false;
}

/* ---- one transfer ---- */
typedef struct {
    const fetch_policy *policy;
    char *data;
    size_t n, cap;
    bool blocked, large, no_memory;
} transfer;

static curl_socket_t on_socket(void *ud, curlsocktype purpose, struct curl_sockaddr *a) {
    transfer *t = ud;
    (void)purpose;
    if (!t->policy->allow_private && !fetch_address_public(&a->addr)) {
        t->blocked = true;
        return CURL_SOCKET_BAD;
    }
    return socket(a->family, a->socktype | SOCK_CLOEXEC, a->protocol);
}

static size_t on_data(char *data, size_t size, size_t count, void *ud) {
    transfer *t = ud;
    size_t n = size * count;
    if (t->n + n > t->policy->max_bytes) {
        t->large = true;
        return 0;
    }
    if (t->n + n > t->cap) {
        size_t cap = t->cap ? t->cap : 64 << 10;
        while (cap < t->n + n) cap *= 2;
        char *p = realloc(t->data, cap);
        if (!p) {
            t->no_memory = true;
            return 0;
        }
        t->data = p;
        t->cap = cap;
    }
    memcpy(t->data + t->n, data, n);
    t->n += n;
    return n;
}

/* Scheme, host and port of url; what is wrong with them in err. */
static int check_url(const fetch_policy *p, const char *url, char *err, size_t err_size) {
    CURLU *u = curl_url();
    char *scheme = NULL, *host = NULL, *port = NULL, *user = NULL;
    int rc = -1;
    if (!u || curl_url_set(u, CURLUPART_URL, url, CURLU_NON_SUPPORT_SCHEME) || curl_url_get(u, CURLUPART_SCHEME, &scheme, 0)) {
        snprintf(err, err_size, "this is not a URL that can be fetched");
    } else if (strcasecmp(scheme, "http") != 0 && strcasecmp(scheme, "https") != 0) {
        snprintf(err, err_size, "only http and https URLs are fetched");
    } else if (curl_url_get(u, CURLUPART_HOST, &host, 0) || curl_url_get(u, CURLUPART_PORT, &port, CURLU_DEFAULT_PORT)) {
        snprintf(err, err_size, "this is not a URL that can be fetched: it names no host");
    } else if (curl_url_get(u, CURLUPART_USER, &user, 0) == CURLUE_OK) {
        snprintf(err, err_size, "a URL with a user name is not fetched");
    } else if (!fetch_host_allowed(p, host, atoi(port))) {
        snprintf(err, err_size, "the host %.200s port %s is not on this server's list (fetch.allow); send the image as data:image/...;base64,...", host, port);
    } else {
        rc = 0;
    }
    curl_free(scheme);
    curl_free(host);
    curl_free(port);
    curl_free(user);
    curl_url_cleanup(u);
    return rc;
}

/* One request. 0: t holds the body; 1: *next is where it points to; -1: err. */
static int get(CURL *c, transfer *t, const char *url, long left_ms, char **next, char *err, size_t err_size) {
    curl_easy_reset(c);
    curl_easy_setopt(c, CURLOPT_URL, url);
    curl_easy_setopt(c, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(c, CURLOPT_FOLLOWLOCATION, 0L);
    curl_easy_setopt(c, CURLOPT_PROXY, "");
    curl_easy_setopt(c, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(c, CURLOPT_TIMEOUT_MS, left_ms);
    curl_easy_setopt(c, CURLOPT_MAXFILESIZE_LARGE, (curl_off_t)t->policy->max_bytes);
    curl_easy_setopt(c, CURLOPT_OPENSOCKETFUNCTION, on_socket);
    curl_easy_setopt(c, CURLOPT_OPENSOCKETDATA, t);
    curl_easy_setopt(c, CURLOPT_WRITEFUNCTION, on_data);
    curl_easy_setopt(c, CURLOPT_WRITEDATA, t);
    curl_easy_setopt(c, CURLOPT_USERAGENT, "qvl-serve");
    curl_easy_setopt(c, CURLOPT_HTTPHEADER, NULL);
    t->n = 0;
    t->blocked = t->large = t->no_memory = false;
    CURLcode rc = curl_easy_perform(c);
    long status = 0;
    curl_easy_getinfo(c, CURLINFO_RESPONSE_CODE, &status);
    char *where = NULL, *type = NULL;
    if (t->blocked) snprintf(err, err_size, "the URL's host has an address that is not public; it is not fetched");
    else if (t->large || rc == CURLE_FILESIZE_EXCEEDED) snprintf(err, err_size, "what the URL gives is larger than %llu bytes (fetch.max_bytes)", (unsigned long long)t->policy->max_bytes);
    else if (t->no_memory) snprintf(err, err_size, "no memory for what the URL gives");
    else if (rc == CURLE_OPERATION_TIMEDOUT) snprintf(err, err_size, "the URL did not answer within %u ms (fetch.timeout_ms)", t->policy->timeout_ms);
    else if (rc) snprintf(err, err_size, "the URL cannot be fetched: %s", curl_easy_strerror(rc));
    else if (status >= 300 && status < 400) {
        curl_easy_getinfo(c, CURLINFO_REDIRECT_URL, &where);
        if (where && (*next = strdup(where))) return 1;
        snprintf(err, err_size, "the URL answers with status %ld and no new place", status);
    } else if (status != 200) snprintf(err, err_size, "the URL answers with status %ld", status);
    else {
        curl_easy_getinfo(c, CURLINFO_CONTENT_TYPE, &type);
        if (!type || strncasecmp(type, "image/", 6) == 0 || strncasecmp(type, "application/octet-stream", 24) == 0) return 0;
        snprintf(err, err_size, "the URL gives %.80s, not an image", type);
    }
    return -1;
}

static double now_ms(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e3 + (double)ts.tv_nsec / 1e6;
}

int fetch_url(const fetch_policy *p, const char *url, void **data, size_t *size, char *err, size_t err_size) {
    *data = NULL;
    *size = 0;
    if (!p->allow_count) {
        snprintf(err, err_size, "this server fetches no URLs (fetch.allow is empty); send the image as data:image/...;base64,...");
        return -1;
    }
    CURL *c = curl_easy_init();
    char *at = strdup(url);
    transfer t = {.policy = p};
    double end = now_ms() + p->timeout_ms;
    int rc = -1;
    if (!c || !at) snprintf(err, err_size, "no memory to fetch the URL");
    for (int hops = 0; c && at; hops++) {
        char *next = NULL;
        long left = (long)(end - now_ms());
        rc = check_url(p, at, err, err_size);
        if (!rc && left < 1) {
            snprintf(err, err_size, "the URL did not answer within %u ms (fetch.timeout_ms)", p->timeout_ms);
            rc = -1;
        }
        if (!rc) rc = get(c, &t, at, left, &next, err, err_size);
        if (rc != 1) break;
        free(at);
        at = next;
        if (hops == MAX_REDIRECTS) {
            snprintf(err, err_size, "the URL points on more than %d times", MAX_REDIRECTS);
            rc = -1;
            break;
        }
    }
    free(at);
    curl_easy_cleanup(c);
    if (rc) {
        free(t.data);
        return -1;
    }
    *data = t.data;
    *size = t.n;
    return 0;
}
