/* chat.c - qvl chat: a conversation about pictures.
 *
 * Job:        read a line, answer it with everything said before, remember both.
 * Input:      lines of stdin, a terminal or a pipe; commands begin with a slash.
 * Output:     answers on stdout, everything else on stderr.
 * Invariants: a picture goes through the vision tower once, when it is attached; its embedding serves all later turns;
 *             a turn that failed leaves the conversation as it was before.
 */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

typedef struct {
    char *file;
    qvl_embedding *embedding;
} picture;

typedef struct {
    const tool_args *args;
    qvl_model *model;
    qvl_engine *engine;
    char *system;    /* NULL: none */
    json_t *history; /* messages without the system one; image parts carry their file for /save */
    picture *pictures;
    size_t n_pictures, n_said; /* the first n_said are part of the history, the rest waits for the next message */
    bool terminal;             /* somebody types */
    bool failed;               /* something went wrong, which ends a script with 1 */
    bool leaving;              /* Ctrl-C was pressed; one more at the prompt ends the program */
    int turns;
    double encode_ms;
    double usage[QVL_USAGE_IMAGES_CACHED + 1]; /* of the last answer */
    double tokens_per_second, all_prompt, all_completion;
} session;

static void note(session *s, const char *fmt, ...) TOOL_PRINTF(2, 3);
static void note(session *s, const char *fmt, ...) {
    (void)s;
    va_list ap;
    va_start(ap, fmt);
    char line[1024];
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    fflush(stdout);
    bool dim = tool_has_color(stderr);
    if (dim) fputs("\033[2m", stderr);
    tool_write_text(stderr, line, strlen(line));
    fputs(dim ? "\033[0m\n" : "\n", stderr);
}

/* ---- pictures ---- */

static int attach(session *s, const char *file) {
    picture *grown = realloc(s->pictures, (s->n_pictures + 1) * sizeof *grown);
    if (!grown) return tool_fail("out of memory");
    s->pictures = grown;
    picture p = {.file = strdup(file)};
    qvl_image *im = NULL;
    double start = tool_now_ms();
    int code = p.file ? tool_image_load(s->args, file, &im) : tool_fail("out of memory"), tokens = 0;
    int width = qvl_image_width(im), height = qvl_image_height(im);
    if (code == TOOL_OK && qvl_encode_image(s->model, im, s->args->options, &p.embedding) < 0) code = tool_library_error(file);
    qvl_image_free(im);
    if (code) {
        free(p.file);
        return code;
    }
    double ms = tool_now_ms() - start;
    s->encode_ms += ms;
    s->pictures[s->n_pictures++] = p;
    qvl_embedding_data(p.embedding, NULL, NULL, &tokens, NULL);
    note(s, "picture %zu: %s, %d x %d, %d tokens, %.0f ms", s->n_pictures, file, width, height, tokens, ms);
    return TOOL_OK;
}

static void forget(session *s) {
    for (size_t i = 0; i < s->n_pictures; i++) {
        free(s->pictures[i].file);
        qvl_embedding_free(s->pictures[i].embedding);
    }
    s->n_pictures = s->n_said = 0;
    json_array_clear(s->history);
}

/* ---- messages ---- */

/* The user's next message: pictures that wait, then the text. NULL after a message. */
static json_t *user_message(session *s, const char *text, size_t len) {
    json_t *m = tool_text_message("user", text, len);
    if (!m || s->n_said == s->n_pictures) return m;
    json_t *content = json_array();
    for (size_t i = s->n_said; i < s->n_pictures; i++) {
        json_t *file = json_string(s->pictures[i].file); /* NULL when the name is not UTF-8: saved without it */
        json_array_append_new(content, json_pack("{s:s, s:o*}", "type", "image", "image", file));
    }
    json_array_append_new(content, json_pack("{s:s, s:O}", "type", "text", "text", json_object_get(m, "content")));
    json_object_set_new(m, "content", content);
    return m;
}

/* System message and history. for_model: without the files, which media stands in for. NULL after a message. */
static json_t *all_messages(const session *s, bool for_model) {
    json_t *all = json_array(), *system = s->system ? tool_text_message("system", s->system, strlen(s->system)) : NULL;
    if (s->system && !system) {
        json_decref(all);
        return NULL;
    }
    if (system) json_array_append_new(all, system);
    json_t *history = json_deep_copy(s->history), *m, *part;
    size_t i, k;
    json_array_foreach(history, i, m) {
        json_array_foreach(json_object_get(m, "content"), k, part) {
            if (for_model) json_object_del(part, "image");
        }
    }
    json_array_extend(all, history);
    json_decref(history);
    return all;
}

static int make_prompt(const session *s, qvl_prompt **out) {
    *out = NULL;
    json_t *all = all_messages(s, true);
    char *text = all ? json_dumps(all, 0) : NULL;
    json_decref(all);
    if (!text) return TOOL_FAILED;
    qvl_media *media;
    int rc = qvl_media_new(&media);
    for (size_t i = 0; rc == 0 && i < s->n_pictures; i++) rc = qvl_media_add_embedding(media, s->pictures[i].embedding);
    if (rc == 0) rc = qvl_prompt_new(out, s->model, text, NULL, media, s->args->options);
    qvl_media_free(media);
    free(text);
    return rc < 0 ? tool_library_error(NULL) : TOOL_OK;
}

/* ---- a turn ---- */

static void remember_answer(session *s, const tool_answer *a) {
    json_t *m = tool_text_message("assistant", a->text, a->text_len);
    if (m && a->reasoning_len) json_object_set_new(m, "reasoning_content", json_stringn(a->reasoning, a->reasoning_len));
    if (m) json_array_append_new(s->history, m);
    s->n_said = s->n_pictures;
    s->turns++;
    memcpy(s->usage, a->usage, sizeof s->usage);
    s->tokens_per_second = tool_tokens_per_second(a);
    s->all_prompt += a->usage[QVL_USAGE_PROMPT_TOKENS];
    s->all_completion += a->usage[QVL_USAGE_COMPLETION_TOKENS];
}

static int ask(session *s, const char *text, size_t len) {
    json_t *m = user_message(s, text, len);
    if (!m) return TOOL_FAILED;
    json_array_append_new(s->history, m);
    qvl_prompt *p;
    tool_answer a = {0};
    int code = make_prompt(s, &p);
    if (code == TOOL_OK) code = tool_answer_run(&a, s->engine, p, s->args->options, stdout);
    qvl_prompt_free(p);
    if (a.text_len || a.reasoning_len) putchar('\n');
    fflush(stdout);
    bool kept = code == TOOL_OK && (a.text_len > 0 || !a.interrupted);
    if (kept) remember_answer(s, &a);
    else json_array_remove(s->history, json_array_size(s->history) - 1); /* as if it had not been asked; pictures wait on */
    if (a.interrupted) {
        note(s, kept ? "(stopped)" : "(stopped before an answer; the question is forgotten)");
        s->leaving = true;
    } else if (strcmp(a.finish_reason, "length") == 0)
        note(s, "(cut at %.0f tokens; --max-tokens or --max-context N allow more)", a.usage[QVL_USAGE_COMPLETION_TOKENS]);
    if (a.interrupted || code == TOOL_INTERRUPTED) tool_clear_interrupt(); /* one that came too late counts at the prompt */
    tool_answer_free(&a);
    return code == TOOL_INTERRUPTED ? TOOL_OK : code;
}

/* ---- commands ---- */

static int save(session *s, const char *file) {
    json_t *all = all_messages(s, false);
    if (!all) return TOOL_FAILED;
    errno = 0;
    int rc = json_dump_file(all, file, JSON_INDENT(2));
    size_t n = json_array_size(all);
    json_decref(all);
    if (rc < 0) return tool_fail("%s: %s", file, errno ? strerror(errno) : "cannot be written");
    note(s, "%zu messages saved to %s", n, file);
    return TOOL_OK;
}

static int stats(session *s) {
    char *text;
    if (qvl_engine_stats(s->engine, &text) < 0) return tool_library_error(NULL);
    json_t *e = json_loads(text, 0, NULL);
    qvl_free(text);
    const double *u = s->usage;
    if (s->turns > 0) {
        note(s, "last answer: prompt %.0f tokens (%.0f of pictures), answer %.0f tokens, first after %.0f ms, then %.1f tokens/s", u[QVL_USAGE_PROMPT_TOKENS],
             u[QVL_USAGE_IMAGE_TOKENS], u[QVL_USAGE_COMPLETION_TOKENS], u[QVL_USAGE_TTFT_MS], isnan(s->tokens_per_second) ? 0 : s->tokens_per_second);
        note(s, "in all: %d answers, %.0f prompt and %.0f answer tokens; context %.0f of %lld tokens", s->turns, s->all_prompt, s->all_completion,
             u[QVL_USAGE_PROMPT_TOKENS] + u[QVL_USAGE_COMPLETION_TOKENS], (long long)json_integer_value(json_object_get(e, "max_context")));
    } else note(s, "no answers yet; context of %lld tokens", (long long)json_integer_value(json_object_get(e, "max_context")));
    note(s, "pictures: %zu, each encoded once, %.0f ms in all", s->n_pictures, s->encode_ms);
    json_decref(e);
    return TOOL_OK;
}

static const char help_text[] = "/image FILE    show a picture with the next message; several may wait\n"
                                "/system TEXT   replace the system message; without TEXT: none\n"
                                "/clear         forget messages and pictures, keep the system message\n"
                                "/save FILE     the conversation as JSON messages\n"
                                "/stats         tokens and times\n"
                                "/help          this list\n"
                                "/quit          leave (also Ctrl-D)\n"
                                "A message that begins with a slash: type two. A line that ends with \\ goes on in the next.\n"
                                "Ctrl-C stops an answer; at the prompt, twice, it ends the program.";

/* The text behind "/name" when line is that command: "" without one. NULL for another command. */
static const char *command(const char *line, const char *name) {
    size_t n = strlen(name);
    if (strncmp(line, name, n) != 0 || (line[n] && line[n] != ' ')) return NULL;
    line += n;
    while (*line == ' ') line++;
    return line;
}

static int run_command(session *s, char *line, bool *quit) {
    size_t n = strlen(line);
    while (n > 0 && line[n - 1] == ' ') line[--n] = 0;
    const char *rest;
    if ((rest = command(line, "/image"))) return *rest ? attach(s, rest) : tool_fail("/image needs a FILE");
    if ((rest = command(line, "/save"))) return *rest ? save(s, rest) : tool_fail("/save needs a FILE");
    if ((rest = command(line, "/system"))) {
        free(s->system);
        s->system = *rest ? strdup(rest) : NULL;
        note(s, s->system ? "system message set" : "no system message");
        return TOOL_OK;
    }
    if ((rest = command(line, "/clear")) && !*rest) {
        forget(s);
        note(s, "forgotten");
        return TOOL_OK;
    }
    if ((rest = command(line, "/stats")) && !*rest) return stats(s);
    if ((rest = command(line, "/help")) && !*rest) {
        note(s, "%s", help_text);
        return TOOL_OK;
    }
    if ((rest = command(line, "/quit")) && !*rest) {
        *quit = true;
        return TOOL_OK;
    }
    return tool_fail("unknown command \"%s\"; /help lists them", line);
}

/* ---- the loop ---- */

/* A message of one or more lines; *text = NULL at the end of input or on Ctrl-C. */
static int read_message(session *s, char **text, size_t *size) {
    *text = NULL;
    *size = 0;
    for (;;) {
        char *line;
        size_t n;
        if (s->terminal && tool_is_terminal(stderr)) fputs(*text ? ". " : "> ", stderr);
        int code = tool_read_line(&line, &n);
        if (code || !line) {
            if (code || tool_interrupted()) {
                free(*text);
                *text = NULL;
            }
            return code; /* at the end of input, what was begun is the message */
        }
        bool more = n > 0 && line[n - 1] == '\\';
        if (more) line[n - 1] = '\n';
        char *grown = realloc(*text, *size + n + 1);
        if (!grown) {
            free(line);
            return tool_fail("out of memory");
        }
        memcpy(grown + *size, line, n);
        free(line);
        *text = grown;
        *size += n;
        grown[*size] = 0;
        if (!more) return TOOL_OK;
    }
}

static int talk(session *s) {
    for (bool quit = false; !quit;) {
        char *text;
        size_t n;
        int code = read_message(s, &text, &n);
        if (code) {
            free(text);
            return code;
        }
        if (!text && tool_interrupted()) {
            if (s->terminal) fputc('\n', stderr);
            if (s->leaving || !s->terminal) return TOOL_INTERRUPTED;
            note(s, "(Ctrl-C once more, or /quit, ends the program)");
            s->leaving = true;
            tool_clear_interrupt();
            continue;
        }
        if (!text) break;
        s->leaving = false;
        if (text[0] == '/' && text[1] != '/') code = run_command(s, text, &quit);
        else if (n > 0) code = ask(s, text + (text[0] == '/'), n - (text[0] == '/'));
        free(text);
        if (code == TOOL_INTERRUPTED) { /* while a picture was read */
            tool_clear_interrupt();
            s->leaving = true;
        } else if (code) s->failed = true;
    }
    if (s->terminal) fputc('\n', stderr);
    return s->failed && !s->terminal ? TOOL_FAILED : TOOL_OK;
}

static int start(session *s, const tool_args *a) {
    const char *system = tool_get(a, "system");
    s->history = json_array();
    s->system = system && *system ? strdup(system) : NULL;
    int code = tool_model_load(a, &s->model, NULL);
    if (code) return code;
    qvl_options *o = tool_options_copy(a);
    if (!o) return TOOL_FAILED;
    int rc = qvl_options_set_i64(o, "max_requests", 1);
    if (rc == 0) rc = qvl_engine_new(&s->engine, s->model, o);
    qvl_options_free(o);
    if (rc < 0) return tool_library_error(NULL);
    for (int i = 0; code == TOOL_OK && i < a->n_words; i++) code = attach(s, a->words[i]);
    return code;
}

static int run(const tool_args *a) {
    session s = {.args = a, .terminal = tool_is_terminal(stdin)};
    for (int i = 0; i < a->n_words; i++)
        if (strcmp(a->words[i], "-") == 0) return tool_usage(a->command, "standard input has the conversation; give pictures as files");
    int code = start(&s, a);
    if (code == TOOL_OK && s.terminal) note(&s, "/image FILE shows a picture, /help lists the rest");
    if (code == TOOL_OK) code = talk(&s);
    if (s.history) forget(&s);
    json_decref(s.history);
    free(s.pictures);
    free(s.system);
    qvl_engine_free(s.engine);
    qvl_model_free(s.model);
    return code;
}

static const tool_option options[] = {
    {"system", 0, "TEXT", "a system message"},
    {0},
};

const tool_command tool_chat = {
    .name = "chat",
    .synopsis = "[IMAGE]... [-m MODEL] [OPTION]...",
    .summary = "talk about pictures",
    .details = "Every line of standard input is a message; answers go to standard output, all else to standard error. Pictures named "
               "on the command line come with the first message. A thought before the answer is shown, dimmed, on a terminal only. "
               "When the input is no terminal, a failed line makes the exit code 1. Lines that begin with a slash are commands:\n\n"
               "/image FILE, /system TEXT, /clear, /save FILE, /stats, /help, /quit",
    .options = options,
    .scopes = "model image prompt engine request",
    .without = "max_requests n priority step_ms embedding_cache video_min_pixels video_max_pixels video_layout logprobs prompt_logprobs return_logits",
    .max_words = INT_MAX,
    .run = run,
};
