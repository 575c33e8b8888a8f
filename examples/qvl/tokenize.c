/* tokenize.c - qvl tokenize: text to token ids and back.
 *
 * Job:        show what a model's tokenizer makes of a text; no weights are read.
 * Input:      a text or ids, as an argument or on stdin.
 * Output:     ids on one line, a text, or JSON.
 * Invariants: the text is taken byte by byte as it is: nothing is trimmed or added.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

/* {"ids": [...], "pieces": [...]}; a piece that is not a whole character holds U+FFFD. */
static int print_pieces(const qvl_tokenizer *t, const int32_t *ids, size_t n) {
    json_t *list = json_array(), *pieces = json_array();
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < n; i++) {
        char *text;
        size_t len;
        rc = qvl_detokenize(t, ids + i, 1, 0, &text, &len);
        if (rc < 0) break;
        json_array_append_new(list, json_integer(ids[i]));
        json_array_append_new(pieces, json_stringn(text, len));
        qvl_free(text);
    }
    json_t *out = json_pack("{s:o, s:o}", "ids", list, "pieces", pieces);
    if (rc == 0) return tool_print_json(out);
    json_decref(out);
    return tool_library_error(NULL);
}

static int encode(const tool_args *a, const qvl_tokenizer *t, const char *text, size_t len) {
    int32_t *ids;
    size_t n;
    if (qvl_tokenize(t, text, len, tool_get(a, "special") != NULL, &ids, &n) < 0) return tool_library_error(NULL);
    int code = TOOL_OK;
    if (tool_get(a, "json")) code = print_pieces(t, ids, n);
    else {
        for (size_t i = 0; i < n; i++) printf("%s%d", i ? " " : "", (int)ids[i]);
        putchar('\n');
    }
    qvl_free(ids);
    return code;
}

/* Numbers parted by blanks or commas; a JSON list's brackets are fine too. */
static int parse_ids(const tool_args *a, const char *text, int32_t **ids, size_t *n) {
    static const char between[] = " \t\r\n,[]";
    *n = 0;
    *ids = malloc((strlen(text) / 2 + 1) * sizeof **ids); /* an id and what parts it from the next take two bytes or more */
    if (!*ids) return tool_fail("out of memory");
    for (const char *p = text + strspn(text, between); *p; p += strspn(p, between)) {
        char *end;
        errno = 0;
        long v = strtol(p, &end, 10);
        if (end == p || (*end && !strchr(between, *end)) || errno || v < INT32_MIN || v > INT32_MAX)
            return tool_usage(a->command, "\"%.*s\" is not a token id", (int)strcspn(p, between), p);
        (*ids)[(*n)++] = (int32_t)v;
        p = end;
    }
    return TOOL_OK;
}

static int decode(const tool_args *a, const qvl_tokenizer *t, const char *text, size_t len) {
    int32_t *ids;
    size_t n;
    if (strlen(text) != len) return tool_usage(a->command, "the ids hold a zero byte");
    int code = parse_ids(a, text, &ids, &n);
    char *out = NULL;
    size_t out_len;
    if (code == TOOL_OK && qvl_detokenize(t, ids, n, 0, &out, &out_len) < 0) code = tool_library_error(NULL);
    if (out && tool_get(a, "json")) {
        json_t *list = json_array();
        for (size_t i = 0; i < n; i++) json_array_append_new(list, json_integer(ids[i]));
        code = tool_print_json(json_pack("{s:o, s:o}", "ids", list, "text", json_stringn(out, out_len)));
    } else if (out) {
        tool_write_text(stdout, out, out_len);
        putchar('\n');
    }
    qvl_free(out);
    free(ids);
    return code;
}

static int run(const tool_args *a) {
    char path[PATH_MAX];
    int code = tool_model_path(a, path);
    if (code) return code;
    qvl_tokenizer *t;
    if (qvl_tokenizer_load(&t, path) < 0) return tool_library_error(NULL);
    char *read = NULL;
    const char *text = a->n_words ? a->words[0] : "-";
    size_t len = strlen(text);
    if (strcmp(text, "-") == 0) {
        code = tool_read_stdin(&read, &len, 0);
        text = read;
    }
    if (code == TOOL_OK) code = tool_get(a, "decode") ? decode(a, t, text, len) : encode(a, t, text, len);
    free(read);
    qvl_tokenizer_free(t);
    return code;
}

static const tool_option options[] = {
    {"special", 0, NULL, "special tokens in the text, such as <|im_end|>, become their ids; decoding always writes them"},
    {"decode", 0, NULL, "the other way: TEXT is a list of ids"},
    {"json", 0, NULL, "{\"ids\", \"pieces\"}, or with --decode {\"ids\", \"text\"}"},
    {0},
};

const tool_command tool_tokenize = {
    .name = "tokenize",
    .synopsis = "[--special] [--decode] [--json] [-m MODEL] [TEXT|-]",
    .summary = "text to token ids and back",
    .details = "Writes the ids of TEXT, or of standard input, on one line. Every byte counts, a last newline too: printf %s \"$text\" | qvl "
               "tokenize. With --decode a newline is written behind the text; --json has it exactly. A TEXT that begins with a dash "
               "goes behind --.",
    .options = options,
    .scopes = "",
    .max_words = 1,
    .run = run,
};
