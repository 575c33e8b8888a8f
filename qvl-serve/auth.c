/* auth.c - API keys: the file, the comparison, the limits.
 *
 * Job:        see auth.h.
 * Input:      a key file; tokens; times.
 * Output:     entries and verdicts.
 * Invariants: entries live in one list; gone ones are no longer found and are freed with their last running request;
 *             a bucket is filled when it is looked at, so idle keys cost nothing.
 */
#include "auth.h"

#include <errno.h>
#include <math.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "id.h"

enum { DIGEST = 32, KEYS_MAX = 10000 };

/* A token bucket: level rises by rate a second up to size. rate 0: no limit. */
typedef struct {
    double rate, size, level, when;
} bucket;

struct auth_key {
    auth_key *next;
    uint8_t digest[DIGEST];
    char name[AUTH_NAME];
    bool admin, gone;
    int concurrent, running; /* concurrent 0: no limit */
    bucket requests, tokens;
};

struct auth {
    auth_key *keys;
};

static int complain(char *err, size_t size, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static int complain(char *err, size_t size, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    if (size) vsnprintf(err, size, fmt, ap);
    va_end(ap);
    return -1;
}

/* ---- buckets ---- */

static void fill(bucket *b, double now) {
    if (now > b->when) b->level = fmin(b->size, b->level + (now - b->when) * b->rate);
    b->when = now;
}

/* Seconds until the level is at least wanted, rounded up to whole ones. */
static int wait_for(const bucket *b, double wanted) {
    double s = ceil((wanted - b->level) / b->rate);
    return s < 1 ? 1 : s > 86400 ? 86400 : (int)s;
}

/* New limits, the same use: what was missing from the old bucket is missing from the new one. */
static void rearrange(bucket *b, const bucket *limits) {
    double used = b->rate > 0 ? b->size - b->level : 0;
    b->rate = limits->rate;
    b->size = limits->size;
    b->level = limits->size - used;
}

/* ---- the file ---- */

static bool name_ok(const char *s) {
    size_t n = strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-@");
    return n && n < AUTH_NAME && !s[n];
}

static int hex_digit(char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static bool digest_ok(uint8_t out[DIGEST], const char *hex) {
    for (int i = 0; i < DIGEST; i++) {
        int high = hex_digit(hex[2 * i]), low = high < 0 ? -1 : hex_digit(hex[2 * i + 1]);
        if (low < 0) return false;
        out[i] = (uint8_t)(high << 4 | low);
    }
    return !hex[2 * DIGEST];
}

/* What is wrong with one line is written to why; the digest is never part of it. */
static int parse_line(auth_key *k, char *line, char *why, size_t why_size) {
    char *save, *name = strtok_r(line, " \t\r\n", &save), *digest = strtok_r(NULL, " \t\r\n", &save), *word;
    if (!name_ok(name)) return complain(why, why_size, "a name has 1 to %d letters, digits, or . _ - @", AUTH_NAME - 1);
    snprintf(k->name, sizeof k->name, "%s", name);
    if (!digest) return complain(why, why_size, "key \"%s\" has no digest; \"qvl-serve --new-key NAME\" makes a whole line", k->name);
    if (strncmp(digest, "sha256:", 7))
        return complain(why, why_size, "key \"%s\": the digest must be sha256:64-hex-digits, never the key itself", k->name);
    if (!digest_ok(k->digest, digest + 7)) return complain(why, why_size, "key \"%s\": sha256: needs 64 hexadecimal digits", k->name);
    double rate = 0, burst = 0, tokens = 0, concurrent = 0;
    const struct {
        const char *name;
        double *value, max;
        bool whole;
    } options[] = {{"rate", &rate, 1e6, false}, {"burst", &burst, 1e6, true}, {"concurrent", &concurrent, 1e6, true}, {"tokens", &tokens, 1e12, true}};
    enum { N = sizeof options / sizeof options[0] };
    while ((word = strtok_r(NULL, " \t\r\n", &save))) {
        if (!strcmp(word, "admin")) {
            k->admin = true;
            continue;
        }
        char *value = strchr(word, '='), *end;
        size_t i = 0;
        if (value) *value++ = 0;
        while (i < N && strcmp(word, options[i].name)) i++;
        if (!value || i == N)
            return complain(why, why_size, "key \"%s\": unknown option \"%.40s\"; there are rate, burst, concurrent, tokens, admin", k->name, word);
        if (*options[i].value > 0) return complain(why, why_size, "key \"%s\": %s is given twice", k->name, word);
        errno = 0;
        double v = strtod(value, &end);
        if (end == value || *end || !(v > 0 && v <= options[i].max) || (options[i].whole && v != floor(v)))
            return complain(why, why_size, "key \"%s\": %s needs a%s number above 0 and at most %.0f", k->name, word,
                            options[i].whole ? " whole" : "", options[i].max);
        *options[i].value = v;
    }
    if (burst > 0 && !(rate > 0)) return complain(why, why_size, "key \"%s\": burst means nothing without rate", k->name);
    double size = burst > 0 ? burst : fmax(1, rate);
    if (rate > 0) k->requests = (bucket){.rate = rate / 60, .size = size, .level = size};
    if (tokens > 0) k->tokens = (bucket){.rate = tokens / 60, .size = tokens, .level = tokens};
    k->concurrent = (int)concurrent;
    return 0;
}

static void free_list(auth_key *k) {
    while (k) {
        auth_key *next = k->next;
        free(k);
        k = next;
    }
}

/* Adds the key of one line to the end of the list. */
static int add_line(auth_key **list, char *line, char *why, size_t why_size) {
    auth_key *k = calloc(1, sizeof *k), **tail = list;
    if (!k) return complain(why, why_size, "out of memory");
    if (parse_line(k, line, why, why_size) < 0) {
        free(k);
        return -1;
    }
    for (int count = 0; *tail; tail = &(*tail)->next) {
        const auth_key *o = *tail;
        int rc = 0;
        if (++count == KEYS_MAX) rc = complain(why, why_size, "more than %d keys", KEYS_MAX);
        else if (!strcmp(o->name, k->name)) rc = complain(why, why_size, "the name \"%s\" is there twice", k->name);
        else if (!memcmp(o->digest, k->digest, DIGEST)) rc = complain(why, why_size, "\"%s\" has the same key as \"%s\"", k->name, o->name);
        if (rc < 0) {
            free(k);
            return rc;
        }
    }
    *tail = k;
    return 0;
}

static int read_keys(FILE *f, const char *path, auth_key **list, char *err, size_t err_size) {
    char *line = NULL, why[256];
    size_t cap = 0;
    ssize_t n;
    int rc = 0;
    for (int number = 1; !rc && (n = getline(&line, &cap, f)) >= 0; number++) {
        char *comment = strchr(line, '#');
        if (memchr(line, 0, (size_t)n)) rc = complain(why, sizeof why, "a zero byte");
        if (comment) *comment = 0;
        if (!rc && line[strspn(line, " \t\r\n")]) rc = add_line(list, line, why, sizeof why);
        if (rc < 0) complain(err, err_size, "%s:%d: %s", path, number, why);
    }
    free(line);
    return !rc && ferror(f) ? complain(err, err_size, "%s: %s", path, strerror(errno)) : rc;
}

static int load(auth_key **list, const char *path, char *err, size_t err_size) {
    *list = NULL;
    FILE *f = fopen(path, "re");
    if (!f) return complain(err, err_size, "%s: %s", path, strerror(errno));
    int rc = read_keys(f, path, list, err, err_size);
    fclose(f);
    if (rc < 0) {
        free_list(*list);
        *list = NULL;
    }
    return rc;
}

int auth_load(auth **out, const char *path, char *err, size_t err_size) {
    *out = NULL;
    auth *a = calloc(1, sizeof *a);
    if (!a) return complain(err, err_size, "%s: out of memory", path);
    if (load(&a->keys, path, err, err_size) < 0) {
        free(a);
        return -1;
    }
    *out = a;
    return 0;
}

static auth_key *same_key(auth *a, const auth_key *k) {
    for (auth_key *o = a->keys; o; o = o->next)
        if (!memcmp(o->digest, k->digest, DIGEST)) return o;
    return NULL;
}

int auth_reload(auth *a, const char *path, char *err, size_t err_size) {
    auth_key *list, *fresh = NULL;
    if (load(&list, path, err, err_size) < 0) return -1;
    for (auth_key *o = a->keys; o; o = o->next) o->gone = true;
    while (list) {
        auth_key *k = list, *old = same_key(a, k);
        list = k->next;
        if (!old) {
            k->next = fresh;
            fresh = k;
            continue;
        }
        memcpy(old->name, k->name, sizeof old->name);
        old->admin = k->admin;
        old->gone = false;
        old->concurrent = k->concurrent;
        rearrange(&old->requests, &k->requests);
        rearrange(&old->tokens, &k->tokens);
        free(k);
    }
    auth_key **at = &a->keys;
    while (*at) {
        auth_key *k = *at;
        if (k->gone && !k->running) {
            *at = k->next;
            free(k);
        } else {
            at = &k->next;
        }
    }
    *at = fresh;
    return 0;
}

void auth_free(auth *a) {
    if (!a) return;
    free_list(a->keys);
    free(a);
}

size_t auth_count(const auth *a) {
    size_t n = 0;
    for (const auth_key *k = a->keys; k; k = k->next) n += !k->gone;
    return n;
}

/* ---- use ---- */

static bool digest_of(uint8_t out[DIGEST], const char *token, size_t n) {
    unsigned len = DIGEST;
    return EVP_Digest(token, n, out, &len, EVP_sha256(), NULL) == 1 && len == DIGEST;
}

auth_key *auth_find(auth *a, const char *token, size_t n) {
    uint8_t digest[DIGEST];
    if (!digest_of(digest, token, n)) return NULL;
    auth_key *found = NULL;
    for (auth_key *k = a->keys; k; k = k->next) {
        bool same = CRYPTO_memcmp(k->digest, digest, DIGEST) == 0;
        if (same & !k->gone) found = k;
    }
    return found;
}

const char *auth_key_name(const auth_key *k) {
    return k->name;
}

bool auth_key_admin(const auth_key *k) {
    return k->admin;
}

auth_verdict auth_enter(auth_key *k, double now, int *retry_after) {
    fill(&k->requests, now);
    fill(&k->tokens, now);
    *retry_after = 0;
    if (k->concurrent && k->running >= k->concurrent) {
        *retry_after = 1;
        return AUTH_CONCURRENT;
    }
    if (k->requests.rate > 0 && k->requests.level < 1) {
        *retry_after = wait_for(&k->requests, 1);
        return AUTH_RATE;
    }
    if (k->tokens.rate > 0 && k->tokens.level < 1) {
        *retry_after = wait_for(&k->tokens, 1);
        return AUTH_TOKENS;
    }
    k->requests.level -= 1;
    k->running++;
    return AUTH_OK;
}

void auth_leave(auth *a, auth_key *k, double now, long tokens) {
    fill(&k->tokens, now);
    if (tokens > 0) k->tokens.level -= (double)tokens;
    if (--k->running || !k->gone) return;
    for (auth_key **at = &a->keys; *at; at = &(*at)->next)
        if (*at == k) {
            *at = k->next;
            free(k);
            return;
        }
}

const char *auth_verdict_text(auth_verdict v) {
    static const char *const texts[] = {"", "requests per minute", "concurrent requests", "tokens per minute"};
    return texts[v];
}

int auth_new_key(const char *name, char key[AUTH_KEY_SIZE], char line[AUTH_LINE_SIZE], char *err, size_t err_size) {
    uint8_t bits[32], digest[DIGEST];
    if (!name_ok(name)) return complain(err, err_size, "a key's name has 1 to %d letters, digits, or . _ - @", AUTH_NAME - 1);
    if (id_random(bits, sizeof bits) < 0) return complain(err, err_size, "no random numbers: %s", strerror(errno));
    /* base64url without padding: 43 characters that survive shells, URLs and YAML */
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    size_t at = (size_t)snprintf(key, AUTH_KEY_SIZE, "qvl-");
    unsigned have = 0, n_bits = 0;
    for (size_t i = 0; i < sizeof bits; i++) {
        have = have << 8 | bits[i];
        for (n_bits += 8; n_bits >= 6; n_bits -= 6) key[at++] = alphabet[have >> (n_bits - 6) & 63];
    }
    key[at++] = alphabet[have << (6 - n_bits) & 63];
    key[at] = 0;
    if (!digest_of(digest, key, at)) return complain(err, err_size, "SHA-256 is not available");
    int n = snprintf(line, AUTH_LINE_SIZE, "%s sha256:", name);
    for (int i = 0; i < DIGEST; i++) n += snprintf(line + n, AUTH_LINE_SIZE - (size_t)n, "%02x", digest[i]);
    OPENSSL_cleanse(bits, sizeof bits);
    return 0;
}
