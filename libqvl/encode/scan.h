/* scan.h - a cursor over JSON text, for tables too large to be worth a tree.
 *
 * Job:        the two large tables of tokenizer.json (a hundred and fifty thousand tokens, as many merges) without an
 *             allocation for each string; jansson takes five times as long and reads the rest.
 * Input:      text in memory, valid UTF-8, terminated by a zero byte; strings are unescaped in place.
 * Output:     strings, integers, ranges.
 * Invariants: never reads beyond the text; errors are QVL_EFORMAT and name the byte.
 */
#ifndef QVL__SCAN_H
#define QVL__SCAN_H

#include "../base/base.h"

typedef struct {
    char *start; /* of the whole text, for messages */
    char *at, *end;
} qvl__scan;

/* Takes the character c, and whitespace before it; false when something else comes next. */
bool qvl__scan_char(qvl__scan *s, char c);
/* Takes a string and unescapes it where it stands: the text is changed and *text[*len] becomes a zero byte. */
int qvl__scan_string(qvl__scan *s, char **text, size_t *len);
int qvl__scan_integer(qvl__scan *s, int64_t *v);
/* Takes one value of any kind without a look at what is inside; *value (may be NULL) is its range. */
int qvl__scan_skip(qvl__scan *s, qvl__scan *value);
/* Finds members of the object at s; values[i].at = NULL when keys[i] is not there; the last of equal keys counts. */
int qvl__scan_members(qvl__scan s, const char *const *keys, qvl__scan *values, int n);
/* The number of elements of the array at s. */
int qvl__scan_count(qvl__scan s, size_t *n);
/* Fails with "byte N: what". */
int qvl__scan_fail(const qvl__scan *s, const char *what);

#endif
