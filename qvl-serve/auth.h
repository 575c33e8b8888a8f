/* auth.h - API keys and what each of them may use.
 *
 * Job:        read the key file; recognise a key; keep its rates and its number of running requests.
 * Input:      the key file (below); tokens from clients; the time, passed in.
 * Output:     a key's entry; admitted or refused with the seconds to wait.
 * Invariants: a token is never stored, compared as text or logged; all entries are compared, each in constant time;
 *             reload is all or nothing and keeps the counters of keys that stay;
 *             not locked: used by one thread (the server's loop).
 *
 * The file: one key a line, # starts a comment:
 *     NAME sha256:64-hex-digits [rate=60] [burst=10] [concurrent=4] [tokens=100000] [admin]
 * rate: requests a minute; burst: how many of them may come at once (default: rate, at least 1); concurrent: requests
 * running at a time; tokens: prompt and answer tokens a minute. What is left out is not limited.
 *
 * Why one round of SHA-256 and not scrypt: a slow hash protects secrets that people choose. Keys are 256 random bits
 * (auth_new_key): no dictionary holds them, and a slow hash would let anyone burn the server's CPU with wrong keys.
 */
#ifndef SERVE_AUTH_H
#define SERVE_AUTH_H

#include <stdbool.h>
#include <stddef.h>

#define AUTH_NAME 64      /* longest name and its end */
#define AUTH_KEY_SIZE 64  /* a key's text and its end */
#define AUTH_LINE_SIZE 192

typedef struct auth auth;
typedef struct auth_key auth_key;

/* Reads a key file. 0, or -1 with "FILE:LINE: what is wrong" in err. */
int auth_load(auth **out, const char *path, char *err, size_t err_size);
/* Reads it again. On -1 everything stays as it was. Keys that are gone are refused from now on; requests that they
 * have running may go on, and their auth_key stays valid until the last auth_leave. */
int auth_reload(auth *a, const char *path, char *err, size_t err_size);
/* Frees all entries; no auth_key may be used after it. */
void auth_free(auth *a);
size_t auth_count(const auth *a);

/* The key of a token (n bytes: what follows "Bearer "), or NULL. Borrowed; see auth_enter. */
auth_key *auth_find(auth *a, const char *token, size_t n);
const char *auth_key_name(const auth_key *k);
bool auth_key_admin(const auth_key *k);

typedef enum { AUTH_OK = 0, AUTH_RATE, AUTH_CONCURRENT, AUTH_TOKENS } auth_verdict;

/* Asks for one request at time now (seconds of a clock that only goes forward). AUTH_OK: it counts as running until
 * auth_leave. Otherwise nothing was counted and *retry_after is the whole number of seconds (at least 1) after which
 * the same request would pass, for concurrency an honest guess of 1. */
auth_verdict auth_enter(auth_key *k, double now, int *retry_after);
/* The request has ended and used so many tokens, which are taken from the minute's allowance (it may go below zero and
 * then refuses until it is paid back). */
void auth_leave(auth *a, auth_key *k, double now, long tokens);
/* What a refusal is about, for the error message: "requests per minute", "concurrent requests", "tokens per minute". */
const char *auth_verdict_text(auth_verdict v);

/* A new key for NAME: key is what the client sends, line what goes into the file. 0 or -1 with err. */
int auth_new_key(const char *name, char key[AUTH_KEY_SIZE], char line[AUTH_LINE_SIZE], char *err, size_t err_size);

#endif
