/* fetch.h - images from http(s) URLs that clients name, for servers that allow it.
 *
 * Job:        fetch one URL within the policy. Blocks: call it on a worker.
 * Input:      a URL of a client, who may be an attacker.
 * Output:     the body's bytes, or one message.
 * Invariants: nothing is fetched while the allow-list is empty;
 *             every address that is really connected to is checked, after name resolution and for each redirect, so a name
 *             cannot point inside (SSRF, DNS rebinding); size and time are bounded; no proxy, cookie or credential is used.
 */
#ifndef SERVE_FETCH_H
#define SERVE_FETCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

typedef struct {
    char **allow; /* host, host:port, ".domain" for all below it, "*" */
    unsigned allow_count;
    uint64_t max_bytes;
    uint32_t timeout_ms;
    bool allow_private; /* tests only: no key of the configuration sets it */
} fetch_policy;

/* *data with free. 0, or -1 with err. */
int fetch_url(const fetch_policy *p, const char *url, void **data, size_t *size, char *err, size_t err_size);
/* Whether an address is one of the public internet. */
bool fetch_address_public(const struct sockaddr *a);
/* Whether host (and port, 0 for the scheme's own) is on the list. */
bool fetch_host_allowed(const fetch_policy *p, const char *host, int port);
/* Once, before other threads run. 0 or -1. */
int fetch_start(void);

#endif
