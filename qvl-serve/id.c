/* id.c - random names.
 *
 * Job:        see id.h.
 * Input:      getrandom(2).
 * Output:     text.
 * Invariants: an id is never made from less than 128 random bits.
 */
#include "id.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

int id_random(void *out, size_t n) {
    unsigned char *p = out;
    while (n) {
        ssize_t got = getrandom(p, n, 0);
        if (got < 0) {
            if (errno == EINTR) continue;
            return -1;
        }
        p += got;
        n -= (size_t)got;
    }
    return 0;
}

int id_new(char out[ID_SIZE], const char *prefix) {
    unsigned char bits[16] = {0};
    int rc = id_random(bits, sizeof bits);
    size_t at = (size_t)snprintf(out, 17, "%s", prefix);
    if (at > 16) at = 16;
    for (size_t i = 0; i < sizeof bits; i++) at += (size_t)snprintf(out + at, 3, "%02x", bits[i]);
    return rc;
}
