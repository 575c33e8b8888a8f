/* error.c - error codes and the thread-local message.
 *
 * Job:        qvl__fail sets one line for the calling thread; qvl_last_error reads it.
 * Input:      a code and a printf format.
 * Output:     the code back, so that failing is one statement.
 * Invariants: no allocation (the message must hold after QVL_ENOMEM); a line never holds control characters, whatever
 *             text of a user went into it.
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base.h"

#define MESSAGE 512

static _Thread_local char message[MESSAGE];

/* Cuts at a character border when the line did not fit, and replaces control characters. */
static void tidy(char *s) {
    size_t n = strlen(s);
    if (n == MESSAGE - 1) {
        while (n > 0 && ((unsigned char)s[n - 1] & 0xC0) == 0x80) n--;
        if (n > 0 && (unsigned char)s[n - 1] >= 0xC0) n--;
        s[n] = 0;
    }
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7F) *s = ' ';
}

int qvl__fail(int code, const char *fmt, ...) {
    char line[MESSAGE]; /* the arguments may point into message */
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    tidy(line);
    memcpy(message, line, sizeof line);
    return code;
}

int qvl__context(int code, const char *fmt, ...) {
    char line[MESSAGE];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    if (n >= 0 && n < (int)sizeof line - 2) {
        size_t room = sizeof line - (size_t)n - 3, have = strlen(message);
        memcpy(line + n, ": ", 2);
        memcpy(line + n + 2, message, have < room ? have : room);
        line[(size_t)n + 2 + (have < room ? have : room)] = 0;
    }
    tidy(line);
    memcpy(message, line, sizeof line);
    return code;
}

const char *qvl_last_error(void) { return message; }

const char *qvl_error_name(int code) {
    switch (code) {
    case QVL_OK: return "QVL_OK";
#define X(number, name, text) \
    case number: return #name;
#include "error.def"
#undef X
    default: return "QVL_E?";
    }
}

/* error.def and the enum in qvl.h are the same list. */
#define X(number, name, text) _Static_assert(number == name, #name " differs from qvl.h");
#include "error.def"
#undef X

const char *qvl_version(void) { return QVL_VERSION; }
