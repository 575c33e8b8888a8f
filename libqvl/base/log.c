/* log.c - finished lines to the user's function, or to nobody.
 *
 * Job:        format a line and hand it over.
 * Input:      a level and a printf format.
 * Output:     a call of the function set with qvl_set_log.
 * Invariants: silent by default; no allocation; function and argument are read together under a lock.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>

#include "base.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static qvl_log_fn log_fn;
static void *log_ud;

void qvl_set_log(qvl_log_fn fn, void *ud) {
    pthread_mutex_lock(&lock);
    log_fn = fn;
    log_ud = ud;
    pthread_mutex_unlock(&lock);
}

void qvl__log(int level, const char *fmt, ...) {
    pthread_mutex_lock(&lock);
    if (log_fn) {
        char line[1024];
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(line, sizeof line, fmt, ap);
        va_end(ap);
        log_fn(log_ud, level, line);
    }
    pthread_mutex_unlock(&lock);
}
