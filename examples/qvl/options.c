/* options.c - the command line: parsing and help.
 *
 * Job:        a command's own options, and every library option of its scopes, made from qvl_option_info.
 * Input:      argv; the command's description.
 * Output:     tool_args; help texts; docs/options.md.
 * Invariants: --max-tokens and --max_tokens are the same option, --name=VALUE and --name VALUE too;
 *             a library option is checked by the library, so its range is written down in one place only;
 *             what is not understood ends the program with 2 and says where to look.
 */
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

#define WIDTH 100 /* of help texts */

typedef struct {
    const char *name, *type, *scope, *range, *dflt, *help;
} library_option;

static bool library_at(int i, library_option *o) {
    return qvl_option_info(i, &o->name, &o->type, &o->scope, &o->range, &o->dflt, &o->help) == 0;
}

/* Is word among the words of list? */
static bool has_word(const char *list, const char *word) {
    size_t n = strlen(word);
    for (const char *p = list; p && (p = strstr(p, word)); p += n)
        if ((p == list || p[-1] == ' ') && (p[n] == ' ' || !p[n])) return true;
    return false;
}

static bool offered(const tool_command *c, const library_option *o) { return has_word(c->scopes, o->scope) && !has_word(c->without, o->name); }

/* Compares a name as typed (n bytes, with - for _) with one of ours. */
static bool same_name(const char *typed, size_t n, const char *name) {
    for (size_t i = 0; i < n; i++)
        if (!name[i] || (typed[i] == '-' ? '_' : typed[i]) != (name[i] == '-' ? '_' : name[i])) return false;
    return !name[n];
}

static const tool_option model_option = {"model", 'm', "MODEL", "a Hugging Face directory; default: $QVL_MODEL, else the bundled qvl-tiny"};

static const tool_option *own_option(const tool_command *c, const char *typed, size_t n, char letter) {
    if (letter ? letter == 'm' : same_name(typed, n, "model")) return &model_option;
    for (const tool_option *o = c->options; o && o->name; o++)
        if (letter ? letter == o->letter : same_name(typed, n, o->name)) return o;
    return NULL;
}

static bool find_library(const tool_command *c, const char *typed, size_t n, library_option *o) {
    for (int i = 0; library_at(i, o); i++)
        if (offered(c, o) && same_name(typed, n, o->name)) return true;
    return false;
}

/* ---- parsing ---- */

static void remember(tool_args *a, const char *name, const char *value) {
    a->given[a->n_given].name = name;
    a->given[a->n_given++].value = value;
}

/* A json option may be given as plain text where it is one string: --stop END means --stop '"END"'. */
static int set_json(qvl_options *o, const char *name, const char *value) {
    if (*value && strchr("[{\"", *value)) return qvl_options_set(o, name, value);
    json_t *s = json_string(value);
    char *quoted = s ? json_dumps(s, JSON_ENCODE_ANY) : NULL;
    int rc = quoted ? qvl_options_set(o, name, quoted) : QVL_EINVAL;
    free(quoted);
    json_decref(s);
    return rc;
}

static int set_library(qvl_options *to, const char *name, const char *value) {
    library_option o;
    for (int i = 0; library_at(i, &o); i++)
        if (strcmp(o.name, name) == 0) return strcmp(o.type, "json") == 0 ? set_json(to, name, value) : qvl_options_set(to, name, value);
    return QVL_EINVAL;
}

static bool is_bool_text(const char *s) { return has_word("true false 1 0 yes no on off", s); }

/* One option at argv[*i]. Returns 0, 1 when help was asked for, or TOOL_USAGE. */
static int parse_option(tool_args *a, int argc, char **argv, int *i) {
    const char *arg = argv[*i], *value = NULL;
    bool is_long = arg[1] == '-';
    const char *typed = is_long ? arg + 2 : arg + 1;
    const char *equals = is_long ? strchr(typed, '=') : NULL;
    size_t n = equals ? (size_t)(equals - typed) : is_long ? strlen(typed) : 1;
    if (equals) value = equals + 1;
    else if (!is_long && typed[1]) value = typed + 1; /* -mMODEL */

    if (is_long ? same_name(typed, n, "help") : *typed == 'h') return 1;
    const tool_option *own = own_option(a->command, typed, n, is_long ? 0 : *typed);
    library_option lib = {0};
    bool negated = false;
    if (!own) {
        if (!is_long && *typed == 't') typed = "threads", n = 7, is_long = true;
        bool known = is_long && find_library(a->command, typed, n, &lib);
        if (!known && is_long && !value && n > 3 && strncmp(typed, "no-", 3) == 0) {
            negated = known = find_library(a->command, typed + 3, n - 3, &lib) && strcmp(lib.type, "bool") == 0;
        }
        if (!known) return tool_usage(a->command, "unknown option %s", arg);
    }
    const char *name = own ? own->name : lib.name;
    bool flag = own ? !own->value : strcmp(lib.type, "bool") == 0;
    if (own && flag && value) return tool_usage(a->command, "option --%s takes no value", name);
    if (flag && !own && !value) /* --ignore-eos, --ignore-eos true, --no-ignore-eos */
        value = negated ? "false" : *i + 1 < argc && is_bool_text(argv[*i + 1]) ? argv[++*i] : "true";
    if (!flag && !value) {
        if (*i + 1 >= argc) return tool_usage(a->command, "option %s needs a value", arg);
        value = argv[++*i];
    }
    if (!own && set_library(a->options, name, value) < 0) return tool_usage(a->command, "%s", qvl_last_error());
    remember(a, name, value ? value : "");
    return 0;
}

int tool_args_parse(tool_args *a, const tool_command *c, int argc, char **argv, int first, int *code) {
    memset(a, 0, sizeof *a);
    a->command = c;
    a->words = calloc((size_t)argc + 1, sizeof *a->words);
    a->given = calloc((size_t)argc + 1, sizeof *a->given);
    *code = TOOL_FAILED;
    if (!a->words || !a->given || qvl_options_new(&a->options) < 0) {
        tool_fail("out of memory");
        return 1;
    }
    bool only_words = false;
    for (int i = first; i < argc; i++) {
        if (only_words || argv[i][0] != '-' || !argv[i][1]) a->words[a->n_words++] = argv[i];
        else if (strcmp(argv[i], "--") == 0) only_words = true;
        else {
            int rc = parse_option(a, argc, argv, &i);
            if (rc == 1) {
                tool_help_command(stdout, c);
                *code = tool_finish_stdout();
            } else *code = rc;
            if (rc) return 1;
        }
    }
    if (a->n_words > c->max_words) {
        *code = tool_usage(c, "what is \"%s\" for?", a->words[c->max_words]);
        return 1;
    }
    *code = TOOL_OK;
    return 0;
}

void tool_args_free(tool_args *a) {
    qvl_options_free(a->options);
    free(a->words);
    free(a->given);
}

const char *tool_get(const tool_args *a, const char *name) {
    for (int i = a->n_given - 1; i >= 0; i--)
        if (strcmp(a->given[i].name, name) == 0) return a->given[i].value;
    return NULL;
}

int tool_number(const tool_args *a, const char *name, long min, long max, long dflt, long *out) {
    const char *s = tool_get(a, name);
    *out = dflt;
    if (!s) return TOOL_OK;
    char *end;
    errno = 0;
    long v = strtol(s, &end, 10);
    if (end == s || *end || errno || v < min || v > max) return tool_usage(a->command, "option --%s: \"%s\" is not a number in %ld..%ld", name, s, min, max);
    *out = v;
    return TOOL_OK;
}

long long tool_library_number(const tool_args *a, const char *name) {
    const char *s = tool_get(a, name);
    library_option o;
    for (int i = 0; !s && library_at(i, &o); i++)
        if (strcmp(o.name, name) == 0) s = o.dflt;
    return s ? strtoll(s, NULL, 10) : 0;
}

qvl_options *tool_options_copy(const tool_args *a) {
    qvl_options *o;
    int rc = qvl_options_new(&o);
    library_option lib;
    for (int i = 0; rc == 0 && i < a->n_given; i++)
        if (find_library(a->command, a->given[i].name, strlen(a->given[i].name), &lib)) rc = set_library(o, lib.name, a->given[i].value);
    if (rc == 0) return o;
    tool_library_error(NULL);
    qvl_options_free(o);
    return NULL;
}

/* ---- help ---- */

/* Words of text in lines of WIDTH, each indented. */
static void wrap(FILE *f, const char *text, int indent) {
    int column = 0;
    for (const char *p = text; *p;) {
        if (*p == '\n') { /* a line break of the text's own */
            fputc('\n', f);
            column = 0;
            p++;
            continue;
        }
        int n = (int)strcspn(p, " \n");
        if (column > 0 && column + 1 + n > WIDTH) {
            fputc('\n', f);
            column = 0;
        }
        column += column ? fprintf(f, " %.*s", n, p) : fprintf(f, "%*s%.*s", indent, "", n, p);
        p += n;
        if (*p == ' ') p++;
    }
    fputc('\n', f);
}

static void dashed(FILE *f, const char *name) {
    for (; *name; name++) fputc(*name == '_' ? '-' : *name, f);
}

static void help_own(FILE *f, const tool_option *o) {
    char head[80];
    snprintf(head, sizeof head, "%s%.1s%s--%s%s%s", o->letter ? "-" : "", o->letter ? &o->letter : "", o->letter ? ", " : "    ", o->name,
             o->value ? " " : "", o->value ? o->value : "");
    if (strlen(head) > 26) fprintf(f, "  %s\n%30s", head, "");
    else fprintf(f, "  %-26s  ", head);
    fprintf(f, "%s\n", o->help);
}

static const struct {
    const char *scope, *title;
} groups[] = {{"model", "Model"}, {"quantize", "Packing"}, {"image", "Reading pictures"}, {"prompt", "Prompt"}, {"engine", "Engine"}, {"request", "Answer"}};
enum { N_GROUPS = sizeof groups / sizeof *groups };

static void help_library(FILE *f, const library_option *o, bool short_threads) {
    fprintf(f, "  %s--", short_threads && strcmp(o->name, "threads") == 0 ? "-t, " : "");
    dashed(f, o->name);
    if (strcmp(o->type, "bool") == 0) fprintf(f, ", --no-");
    if (strcmp(o->type, "bool") == 0) dashed(f, o->name);
    else {
        fputc(' ', f);
        for (const char *t = o->type; *t; t++) fputc(toupper((unsigned char)*t), f);
    }
    if (*o->range) fprintf(f, "  (%s)", o->range);
    if (*o->dflt) fprintf(f, "  [%s]", o->dflt);
    fputc('\n', f);
    wrap(f, o->help, 8);
}

static void help_groups(FILE *f, const tool_command *c) {
    library_option o;
    for (int g = 0; g < N_GROUPS; g++) {
        bool titled = false;
        for (int i = 0; library_at(i, &o); i++) {
            if (strcmp(o.scope, groups[g].scope) != 0 || (c && !offered(c, &o))) continue;
            if (!titled) fprintf(f, "\n%s: (range) [default]\n", groups[g].title);
            titled = true;
            help_library(f, &o, c != NULL);
        }
    }
}

void tool_help_command(FILE *f, const tool_command *c) {
    fprintf(f, "usage: qvl %s %s\n\n", c->name, c->synopsis);
    wrap(f, c->details, 0);
    fputc('\n', f);
    help_own(f, &model_option);
    for (const tool_option *o = c->options; o && o->name; o++) help_own(f, o);
    help_own(f, &(tool_option){"help", 'h', NULL, "this text"});
    help_groups(f, c);
}

/* A cell of a Markdown table. */
static void cell(FILE *f, const char *s) {
    for (; *s; s++) {
        if (*s == '|') fputc('\\', f);
        fputc(*s, f);
    }
}

static void markdown_options(FILE *f) {
    library_option o;
    fprintf(f, "# Options\n\n"
               "<!-- Made by `qvl help options --markdown` from libqvl/api/options.def; a test compares them. Do not edit. -->\n\n"
               "One set of named options serves model, image, prompt, engine and request (`qvl_options_set` in C, keyword arguments in Python,\n"
               "`--name VALUE` on the command line, where `-` may stand for `_`). Each call reads those it knows. A value out of range is refused\n"
               "with the range in the message.\n");
    for (int g = 0; g < N_GROUPS; g++) {
        fprintf(f, "\n## %s: scope `%s`\n\n| option | type | range | default | meaning |\n|---|---|---|---|---|\n", groups[g].title, groups[g].scope);
        for (int i = 0; library_at(i, &o); i++) {
            if (strcmp(o.scope, groups[g].scope) != 0) continue;
            fprintf(f, "| `%s` | %s | ", o.name, o.type);
            cell(f, o.range);
            fprintf(f, " | %s%s%s | ", *o.dflt ? "`" : "", o.dflt, *o.dflt ? "`" : "");
            cell(f, o.help);
            fprintf(f, " |\n");
        }
    }
}

void tool_help_options(FILE *f, bool markdown) {
    if (markdown) {
        markdown_options(f);
        return;
    }
    fprintf(f, "Options of the library; the commands take those that concern them.\n");
    help_groups(f, NULL);
}
