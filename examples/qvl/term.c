/* term.c - the outside world: messages, the terminal, Ctrl-C, standard input and output.
 *
 * Job:        tell people things, read what they type.
 * Input:      stdin, SIGINT.
 * Output:     stderr; stdout where a result is written.
 * Invariants: a signal handler only sets a flag or ends the process;
 *             Ctrl-C at any moment is noticed: it is blocked except while waiting for input.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "tool.h"

/* ---- messages ---- */

static void message(const char *command, const char *fmt, va_list ap) {
    fflush(stdout);
    fprintf(stderr, "qvl%s%s: ", command ? " " : "", command ? command : "");
    char line[2048];
    vsnprintf(line, sizeof line, fmt, ap);
    tool_write_text(stderr, line, strlen(line));
    fputc('\n', stderr);
}

int tool_fail(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    message(NULL, fmt, ap);
    va_end(ap);
    return TOOL_FAILED;
}

int tool_usage(const tool_command *c, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    message(c->name, fmt, ap);
    va_end(ap);
    fprintf(stderr, "usage: qvl %s %s\n\"qvl %s --help\" tells the rest\n", c->name, c->synopsis, c->name);
    return TOOL_USAGE;
}

int tool_library_error(const char *what) {
    if (tool_interrupted()) return TOOL_INTERRUPTED;
    return tool_fail("%s%s%s", what ? what : "", what ? ": " : "", qvl_last_error());
}

/* ---- terminal ---- */

bool tool_is_terminal(FILE *f) { return isatty(fileno(f)) == 1; }

bool tool_has_color(FILE *f) {
    const char *off = getenv("NO_COLOR"), *term = getenv("TERM");
    return tool_is_terminal(f) && !(off && *off) && !(term && strcmp(term, "dumb") == 0);
}

double tool_now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* C0 controls but newline and tab, DEL, and the C1 controls U+0080..U+009F can move the cursor or worse. */
void tool_write_text(FILE *f, const char *s, size_t n) {
    if (!tool_is_terminal(f)) {
        fwrite(s, 1, n, f);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i], next = i + 1 < n ? (unsigned char)s[i + 1] : 0;
        bool c1 = c == 0xC2 && next >= 0x80 && next < 0xA0;
        if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7F || c1) {
            fputs("\xEF\xBF\xBD", f); /* U+FFFD */
            i += c1;
        } else fputc(c, f);
    }
}

/* ---- Ctrl-C ---- */

static volatile sig_atomic_t interrupts;

static void on_interrupt(int sig) {
    (void)sig;
    if (interrupts++ == 0) return;
    static const char reset[] = "\033[0m\n"; /* the answer may have been dimmed */
    if (isatty(STDERR_FILENO)) (void)!write(STDERR_FILENO, reset, sizeof reset - 1);
    _exit(TOOL_INTERRUPTED);
}

void tool_catch_interrupts(void) {
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_handler = on_interrupt;
    sigaction(SIGINT, &sa, NULL);
}

bool tool_interrupted(void) { return interrupts > 0; }
void tool_clear_interrupt(void) { interrupts = 0; }

/* ---- progress ---- */

static int terminal_width(void) {
    struct winsize w;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_col > 0 ? w.ws_col : 80;
}

static void draw(tool_progress *p, uint64_t done, uint64_t total, double seconds) {
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB"};
    double unit = 1, share = total ? (double)done / (double)total : 1;
    int u = 0;
    while (u < 4 && (double)total >= 1000 * unit) unit *= 1000, u++;
    char tail[96], bar[64];
    int n = snprintf(tail, sizeof tail, " %3.0f%% %.1f/%.1f %s %.1f s", 100 * share, (double)done / unit, (double)total / unit, units[u], seconds);
    int width = terminal_width() - n - (int)strlen(p->label) - 4;
    if (width > (int)sizeof bar - 1) width = sizeof bar - 1;
    if (width < 5) fprintf(stderr, "\r\033[K%s", tail + 1);
    else {
        int full = (int)(share * width);
        for (int i = 0; i < width; i++) bar[i] = i < full ? '#' : '.';
        bar[width] = 0;
        fprintf(stderr, "\r\033[K%s [%s]%s", p->label, bar, tail);
    }
    fflush(stderr);
    p->visible = true;
}

int tool_progress_step(void *ud, uint64_t done, uint64_t total) {
    tool_progress *p = ud;
    double now = tool_now_ms();
    if (tool_is_terminal(stderr) && (!p->visible || done >= total || now - p->shown >= 80)) {
        draw(p, done, total, (now - p->start) / 1e3);
        p->shown = now;
    }
    return tool_interrupted();
}

void tool_progress_clear(tool_progress *p) {
    if (p->visible) fputs("\r\033[K", stderr);
    p->visible = false;
}

/* ---- input ---- */

int tool_read_stdin(char **data, size_t *size, size_t limit) {
    size_t cap = 65536, n = 0;
    char *buf = malloc(cap);
    for (;;) {
        if (buf && n + 1 == cap) {
            char *grown = realloc(buf, cap *= 2);
            if (!grown) free(buf);
            buf = grown;
        }
        if (!buf) return tool_fail("standard input: out of memory after %zu bytes", n);
        ssize_t got = read(STDIN_FILENO, buf + n, cap - n - 1);
        if (got == 0) break;
        bool too_large = got > 0 && limit && n + (size_t)got > limit;
        if (got < 0 && errno == EINTR && !tool_interrupted()) continue;
        if (got < 0 || too_large) {
            int code = got < 0 && errno == EINTR ? TOOL_INTERRUPTED
                       : too_large               ? tool_fail("standard input: more than %zu bytes", limit)
                                                 : tool_fail("standard input: %s", strerror(errno));
            free(buf);
            return code;
        }
        n += (size_t)got;
    }
    buf[n] = 0;
    *data = buf;
    *size = n;
    return TOOL_OK;
}

static char pending[65536]; /* bytes of stdin that are not yet part of a line */
static size_t pending_start, pending_end;

/* Waits for input with SIGINT let in only while waiting, so that it cannot slip by between a check and the wait.
 * 1: bytes came, 0: end of input, -1: Ctrl-C or an error. */
static int more_input(void) {
    sigset_t block, before;
    sigemptyset(&block);
    sigaddset(&block, SIGINT);
    sigprocmask(SIG_BLOCK, &block, &before);
    struct pollfd in = {.fd = STDIN_FILENO, .events = POLLIN};
    int rc = -1;
    while (!tool_interrupted()) {
        rc = ppoll(&in, 1, NULL, &before);
        if (rc > 0 || (rc < 0 && errno != EINTR)) break;
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (rc <= 0 || tool_interrupted()) return -1;
    ssize_t got = read(STDIN_FILENO, pending, sizeof pending);
    pending_start = 0;
    pending_end = got > 0 ? (size_t)got : 0;
    return got > 0 ? 1 : got == 0 ? 0 : -1;
}

int tool_read_line(char **line, size_t *size) {
    char *text = NULL;
    size_t n = 0;
    *line = NULL;
    for (;;) {
        if (pending_start == pending_end) {
            int rc = more_input();
            if (rc < 0 && !tool_interrupted()) tool_fail("standard input: %s", strerror(errno));
            if (rc < 0 || (rc == 0 && n == 0)) { /* a line begun when Ctrl-C came is dropped */
                free(text);
                return rc < 0 && !tool_interrupted() ? TOOL_FAILED : TOOL_OK;
            }
            if (rc == 0) break; /* a last line without newline */
        }
        const char *from = pending + pending_start, *end = memchr(from, '\n', pending_end - pending_start);
        size_t take = end ? (size_t)(end - from) : pending_end - pending_start;
        char *grown = realloc(text, n + take + 1);
        if (!grown) {
            free(text);
            return tool_fail("out of memory");
        }
        text = grown;
        memcpy(text + n, from, take);
        n += take;
        pending_start += take + (end != NULL);
        if (end) break;
    }
    if (n > 0 && text[n - 1] == '\r') n--;
    text[n] = 0;
    *line = text;
    *size = n;
    return TOOL_OK;
}

/* ---- output ---- */

int tool_finish_stdout(void) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return TOOL_OK;
    return tool_fail("cannot write to standard output: %s", strerror(errno));
}

int tool_print_json(json_t *v) {
    if (!v) return tool_fail("out of memory");
    int rc = json_dumpf(v, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(v);
    return rc < 0 ? tool_fail("cannot write to standard output") : tool_finish_stdout();
}
