/* id.h - names nobody can guess: chatcmpl-..., call_..., request ids.
 *
 * Job:        prefix + 32 hexadecimal digits of the system's random numbers.
 * Input:      a prefix of at most 16 bytes.
 * Output:     a terminated string.
 * Invariants: 128 random bits from getrandom, so two ids are never the same in practice.
 */
#ifndef SERVE_ID_H
#define SERVE_ID_H

#include <stddef.h>

#define ID_SIZE 50 /* 16 + 32 and the end, rounded up */

/* 0, or -1 when the system has no random numbers (errno tells why). out is a valid string in both cases. */
int id_new(char out[ID_SIZE], const char *prefix);
/* n random bytes; 0 or -1. */
int id_random(void *out, size_t n);

#endif
