/* tool.h - what the files of the command-line tool share.
 *
 * Job:        one description of a command, its parsed arguments, and the few services all commands use.
 * Input:      argv; the library's own description of its options (qvl_option_info).
 * Output:     exit codes: 0 done, 1 it failed, 2 called wrongly, 130 stopped by Ctrl-C.
 * Invariants: stdout carries results and nothing else; messages, prompts and the progress bar go to stderr;
 *             only qvl.h and jansson are used, so this folder is also an example of a program over libqvl.
 */
#ifndef QVL_TOOL_H
#define QVL_TOOL_H

#include <jansson.h>
#include <limits.h>
#include <qvl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

enum { TOOL_OK = 0, TOOL_FAILED = 1, TOOL_USAGE = 2, TOOL_INTERRUPTED = 130 };

#define TOOL_PRINTF(f, a) __attribute__((format(printf, f, a)))

/* ---- options.c: what can be given on the command line ---- */

typedef struct {
    const char *name;  /* without dashes; NULL ends a list */
    char letter;       /* 'm' for -m, 0 for none */
    const char *value; /* what follows it, "FILE"; NULL for a flag */
    const char *help;
} tool_option;

typedef struct tool_args tool_args;

typedef struct {
    const char *name, *synopsis, *summary, *details;
    const tool_option *options; /* the command's own */
    const char *scopes;         /* library options offered, by scope: "model prompt" */
    const char *without;        /* names of those scopes that mean nothing here: "max_requests logprobs" */
    int max_words;              /* how many arguments that are no options it takes */
    int (*run)(const tool_args *a);
} tool_command;

struct tool_args {
    const tool_command *command;
    qvl_options *options; /* the library options that were given */
    const char **words;   /* the rest, in order */
    int n_words;
    struct {
        const char *name, *value;
    } *given; /* everything that was given, in order */
    int n_given;
};

/* Parses argv[first..]. Returns 0, or the exit code in *code and 1 (help was asked for, or the call was wrong). */
int tool_args_parse(tool_args *a, const tool_command *c, int argc, char **argv, int first, int *code);
void tool_args_free(tool_args *a);
/* The last value given for an option of the command or the library; "" for a flag, NULL when it was not given. */
const char *tool_get(const tool_args *a, const char *name);
/* A whole number in [min, max] given for one of the command's own options, or dflt. Returns 0, or TOOL_USAGE after a message. */
int tool_number(const tool_args *a, const char *name, long min, long max, long dflt, long *out);
/* The value of an integer option of the library: what was given, or its default. */
long long tool_library_number(const tool_args *a, const char *name);
/* A fresh set with the library options that were given: for a command that adds its own. NULL after a message. */
qvl_options *tool_options_copy(const tool_args *a);
void tool_help_command(FILE *f, const tool_command *c);
/* All options of the library: for people, or as docs/options.md. */
void tool_help_options(FILE *f, bool markdown);

/* ---- term.c: messages, terminal, Ctrl-C, input ---- */

/* "qvl: ..." on stderr; the return value is TOOL_FAILED or TOOL_USAGE, so that failing is one statement. */
int tool_fail(const char *fmt, ...) TOOL_PRINTF(1, 2);
int tool_usage(const tool_command *c, const char *fmt, ...) TOOL_PRINTF(2, 3);
/* The library's last error, after "what: " when what is not NULL. TOOL_INTERRUPTED when Ctrl-C was the reason. */
int tool_library_error(const char *what);

bool tool_is_terminal(FILE *f);
bool tool_has_color(FILE *f); /* a terminal that wants escapes: NO_COLOR and TERM=dumb turn them off */
double tool_now_ms(void);
/* Text of a model or a user to a terminal or a file: on a terminal, control characters cannot act. */
void tool_write_text(FILE *f, const char *s, size_t n);

/* From now on Ctrl-C sets a flag; a second one before the flag was cleared ends the program at once with 130. */
void tool_catch_interrupts(void);
bool tool_interrupted(void);
void tool_clear_interrupt(void);

/* A progress bar on stderr when that is a terminal, nothing otherwise; fits qvl_progress_fn with ud = a tool_progress. */
typedef struct {
    const char *label;
    double start, shown;
    bool visible;
} tool_progress;
int tool_progress_step(void *ud, uint64_t done, uint64_t total);
void tool_progress_clear(tool_progress *p);

/* All of stdin, at most limit bytes (0: no limit). *data is terminated; free() it. TOOL_FAILED after a message. */
int tool_read_stdin(char **data, size_t *size, size_t limit);
/* The next line of stdin without its newline (free() it); *line = NULL at the end of input or when Ctrl-C was pressed. */
int tool_read_line(char **line, size_t *size);
/* Flushes stdout; TOOL_FAILED after a message when something could not be written. */
int tool_finish_stdout(void);
/* One JSON value and a newline on stdout; drops v. */
int tool_print_json(json_t *v);

/* ---- model.c: finding and loading ---- */

/* The directory asked for, or the bundled model's. path has PATH_MAX bytes. TOOL_USAGE after a message. */
int tool_model_path(const tool_args *a, char *path);
int tool_model_load(const tool_args *a, qvl_model **m, double *ms);
json_t *tool_model_info(const qvl_model *m); /* NULL after a message */
int tool_image_load(const tool_args *a, const char *file, qvl_image **out);

/* ---- answer.c: one request through the engine ---- */

typedef struct {
    char *text, *reasoning; /* both terminated */
    size_t text_len, reasoning_len;
    char finish_reason[16];
    double usage[QVL_USAGE_IMAGES_CACHED + 1]; /* QVL_USAGE_* */
    json_t *tokens;  /* with option logprobs: [{"id", "logprob", "top": [[id, logprob], ...]}, ...] */
    bool interrupted;
} tool_answer;
/* Submits p and steps until its end. out (may be NULL) receives the answer as it comes, and the reasoning, dimmed, when
 * out is a terminal. TOOL_FAILED after a message; a is filled either way. */
int tool_answer_run(tool_answer *a, qvl_engine *e, const qvl_prompt *p, const qvl_options *o, FILE *out);
void tool_answer_free(tool_answer *a);
/* {"prompt_tokens", ...} and {"ttft_ms", ...} */
json_t *tool_usage_json(const tool_answer *a);
json_t *tool_timings_json(const tool_answer *a, double load_ms);
double tool_tokens_per_second(const tool_answer *a); /* of decoding; NaN with fewer than two tokens */
/* {"role": role, "content": text}, or NULL after a message when text is not UTF-8. */
json_t *tool_text_message(const char *role, const char *text, size_t len);

extern const tool_command tool_describe, tool_chat, tool_info, tool_tokenize, tool_quantize, tool_bench, tool_bench_serve;

#endif
