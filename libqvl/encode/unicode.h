/* unicode.h - UTF-8 taken apart and the one normal form that Qwen's tokenizer asks for.
 *
 * Job:        read one character of possibly broken UTF-8; repair text; normalize it to NFC.
 * Input:      untrusted bytes.
 * Output:     code points; valid UTF-8.
 * Invariants: broken bytes are cut into maximal subparts (Unicode 15, 3.9, "U+FFFD Substitution of Maximal Subparts"),
 *             which is what Python's errors="replace" and Rust's from_utf8_lossy do; time is linear in the text.
 */
#ifndef QVL__UNICODE_H
#define QVL__UNICODE_H

#include "../base/base.h"

#define QVL__UTF8_BROKEN UINT32_MAX /* *cp for a maximal subpart that is no character */
#define QVL__UTF8_REPLACEMENT "\xEF\xBF\xBD"

/* Takes one character (or one broken subpart) off s[0, n): returns its length in bytes, at least 1, and sets *cp.
 * Returns 0 when all of s is the beginning of a character that is not over yet; n = 0 included. */
size_t qvl__utf8_next(const uint8_t *s, size_t n, uint32_t *cp);

/* The number of bytes at the head of s that are valid UTF-8. */
size_t qvl__utf8_valid(const uint8_t *s, size_t n);

/* Appends text to out as valid UTF-8, U+FFFD for every broken subpart, in Unicode's normal form C if nfc. Failure to
 * allocate shows in out->failed. */
void qvl__utf8_clean(qvl__buf *out, const char *text, size_t n, bool nfc);

#endif
