/* config.c - reads the configuration.
 *
 * Job:        config.h.
 * Input:      defaults, a YAML file, the environment, the command line, in this order.
 * Output:     a checked config, or one message.
 * Invariants: every key is described once, in the table below: the file, QVL_SERVE_*, --set, --print-config and
 *             docs/config.example.yaml all come from it;
 *             memory is the config's arena of strings: config_free needs no knowledge of the keys.
 *
 * libyaml rather than libcyaml on top of it: its document keeps the line of every key, and a schema of structures could not
 * serve the other three sources.
 */
#include "config.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <qvl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/auxv.h>
#include <unistd.h>
#include <yaml.h>

#include "auth.h"
#include "buf.h"

#ifndef QVL_DATADIR
#define QVL_DATADIR "/usr/local/share/qvl"
#endif

/* ---- the keys ---- */
typedef enum { TEXT, FLAG, WORD16, WORD32, SIZE, LIST } kind;

static const struct key {
    const char *path;
    kind kind;
    size_t offset, count_offset; /* count_offset: of a LIST */
    double low, high;
    const char *dflt, *help;
} keys[] = {
#define AT(member) offsetof(config, member), 0
    {"listen.host", TEXT, AT(host), 0, 0, "127.0.0.1", "address to listen on; 0.0.0.0 or :: for all of this machine"},
    {"listen.port", WORD16, AT(port), 0, 65535, "8080", "0: any free one; it is printed"},
    {"listen.tls.certificate", TEXT, AT(tls_certificate), 0, 0, "", "PEM chain; with key: HTTPS and HTTP/2. Read again on SIGHUP"},
    {"listen.tls.key", TEXT, AT(tls_key), 0, 0, "", "PEM private key"},
    {"auth.keys", TEXT, AT(keys), 0, 0, "", "file of API keys (qvl-serve --new-key NAME makes one); empty: nobody is asked"},
    {"auth.cors", LIST, offsetof(config, cors), offsetof(config, cors_count), 0, 0, "", "origins whose pages may call; \"*\" for all"},
    {"limits.max_body", SIZE, AT(max_body), 1024, 1e12, "64MiB", "largest request body"},
    {"limits.max_connections", WORD32, AT(max_connections), 1, 1e6, "12000", "open connections"},
    {"limits.max_queue", WORD32, AT(max_queue), 0, 1e6, "256", "requests of a model that may wait for their turn; more get 429"},
    {"limits.max_queue_bytes", SIZE, AT(max_queue_bytes), 1024, 1e15, "512MiB", "bodies and pixels of requests not yet running"},
    {"limits.max_images", WORD32, AT(max_images), 0, 100000, "32", "images of one request"},
    {"limits.max_frames", WORD32, AT(max_frames), 0, 100000, "768", "video frames of one request"},
    {"limits.max_image_pixels", SIZE, AT(max_image_pixels), 1, 2147483647, "100000000", "width x height of an image, before decoding"},
    {"limits.max_image_bytes", SIZE, AT(max_image_bytes), 1, 2147483647, "32MiB", "an encoded image"},
    {"limits.max_tokens", WORD32, AT(max_tokens), 0, 1048576, "0", "most tokens of an answer; 0: what the context holds"},
    {"limits.default_max_tokens", WORD32, AT(default_max_tokens), 0, 1048576, "0", "of chat requests that do not say; 0: what the context holds"},
    {"limits.send_buffer", SIZE, AT(send_buffer), 4096, 1e10, "1MiB", "unread output of one client; more cancels its request"},
    {"limits.deadline_ms", WORD32, AT(deadline_ms), 0, 86400000, "0", "longest time of a request; 0: no limit"},
    {"images.store", SIZE, AT(image_store), 0, 1e13, "256MiB", "decoded images kept by POST /v1/images"},
    {"images.ttl_s", WORD32, AT(image_ttl_s), 1, 31536000, "7200", "after which they are forgotten"},
    {"fetch.allow", LIST, offsetof(config, fetch_allow), offsetof(config, fetch_allow_count), 0, 0, "",
     "hosts from which http(s) images may be fetched: name, name:port, .domain, \"*\"; empty: none"},
    {"fetch.max_bytes", SIZE, AT(fetch_max_bytes), 1, 2147483647, "20MiB", "of one fetched image"},
    {"fetch.timeout_ms", WORD32, AT(fetch_timeout_ms), 1, 600000, "5000", "for all of one fetch"},
    {"log.file", TEXT, AT(log_file), 0, 0, "", "empty: stderr"},
    {"log.level", TEXT, AT(log_level), 0, 0, "info", "debug, info, warn or error"},
    {"log.access", FLAG, AT(log_access), 0, 0, "true", "a line for every request"},
    {"log.prompts", FLAG, AT(log_prompts), 0, 0, "false", "write what people ask and get"},
    {"log.slow_ms", WORD32, AT(log_slow_ms), 0, 86400000, "30000", "requests that took longer are warnings; 0: none"},
    {"life.drain_ms", WORD32, AT(drain_ms), 0, 86400000, "30000", "after SIGTERM running requests may take this long"},
    {"life.watchdog_ms", WORD32, AT(watchdog_ms), 0, 86400000, "120000", "a longer engine step makes /health say stuck; 0: never"},
    {"life.keepalive_s", WORD32, AT(keepalive_s), 0, 86400, "15", "a comment line on streams that are silent so long; 0: none"},
    {"life.idle_s", WORD32, AT(idle_s), 1, 86400, "60", "connections that owe a request and send nothing are closed"},
#undef AT
};
enum { KEYS = sizeof keys / sizeof *keys };

static const struct {
    const char *section, *help;
} sections[] = {{"listen", "Where to listen."},
                {"auth", "Who may use it."},
                {"limits", "How much of anything. Sizes: plain bytes or KiB, MiB, GiB, kB, MB, GB."},
                {"images", "Images sent once and named later (POST /v1/images)."},
                {"fetch", "Images by http(s) URL: off unless hosts are listed. Private addresses are never fetched."},
                {"log", "JSON lines."},
                {"life", "Times of the server's life."}};

/* ---- messages ---- */
typedef struct {
    config *c;
    const char *file; /* of the YAML being read */
    char *err;
    size_t err_size;
} reader;

__attribute__((format(printf, 3, 4))) static int fail(reader *r, size_t line, const char *fmt, ...) {
    char text[700];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (line) snprintf(r->err, r->err_size, "%s:%zu: %s", r->file, line, text);
    else snprintf(r->err, r->err_size, "%s", text);
    return -1;
}

/* ---- the arena ---- */
struct block {
    struct block *next;
    max_align_t data[];
};

static void *take(config *c, size_t n) {
    struct block *b = calloc(1, sizeof *b + n);
    if (!b) return NULL;
    b->next = c->memory;
    c->memory = b;
    return b->data;
}

static char *keep(reader *r, const char *s) {
    char *p = take(r->c, strlen(s) + 1);
    if (p) strcpy(p, s);
    else fail(r, 0, "no memory for the configuration");
    return p;
}

void config_free(config *c) {
    if (!c) return;
    for (struct block *b = c->memory, *next; b; b = next) {
        next = b->next;
        free(b);
    }
    free(c);
}

/* list + one more */
static int append(reader *r, char ***list, unsigned *count, const char *s) {
    char **grown = take(r->c, (*count + 1) * sizeof *grown);
    char *copy = grown ? keep(r, s) : NULL;
    if (!copy) return fail(r, 0, "no memory for the configuration");
    if (*count) memcpy(grown, *list, *count * sizeof *grown);
    grown[(*count)++] = copy;
    *list = grown;
    return 0;
}

/* ---- values ---- */
static bool parse_size(const char *text, double *out) {
    static const struct {
        const char *unit;
        double factor;
    } units[] = {{"", 1},           {"B", 1},         {"kB", 1e3},       {"KB", 1e3},      {"MB", 1e6},        {"GB", 1e9},        {"TB", 1e12},
                 {"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1099511627776.0}};
    char *end;
    *out = strtod(text, &end);
    if (end == text || !isfinite(*out)) return false;
    while (isspace((unsigned char)*end)) end++;
    for (size_t i = 0; i < sizeof units / sizeof *units; i++)
        if (strcmp(end, units[i].unit) == 0) {
            *out *= units[i].factor;
            return *out == floor(*out);
        }
    return false;
}

static int set_number(reader *r, const struct key *k, const char *text, size_t line) {
    double v = 0;
    char *end = NULL;
    bool ok = k->kind == SIZE ? parse_size(text, &v) : (v = strtod(text, &end), end != text && *end == 0 && v == floor(v));
    if (!ok) return fail(r, line, "%s: \"%.60s\" is not a %s", k->path, text, k->kind == SIZE ? "size such as 64MiB" : "whole number");
    if (!(v >= k->low && v <= k->high)) return fail(r, line, "%s: %.60s is out of range, which is %.0f to %.0f", k->path, text, k->low, k->high);
    void *at = (char *)r->c + k->offset;
    if (k->kind == WORD16) *(uint16_t *)at = (uint16_t)v;
    else if (k->kind == WORD32) *(uint32_t *)at = (uint32_t)v;
    else *(uint64_t *)at = (uint64_t)v;
    return 0;
}

static int set_value(reader *r, const struct key *k, const char *text, size_t line) {
    void *at = (char *)r->c + k->offset;
    if (k->kind == TEXT) {
        if (strcmp(k->path, "log.level") == 0 && strcmp(text, "debug") != 0 && strcmp(text, "info") != 0 && strcmp(text, "warn") != 0 && strcmp(text, "error") != 0)
            return fail(r, line, "log.level: \"%.60s\" is not debug, info, warn or error", text);
        return (*(char **)at = keep(r, text)) ? 0 : -1;
    }
    if (k->kind == FLAG) {
        bool on = strcasecmp(text, "true") == 0 || strcasecmp(text, "yes") == 0 || strcasecmp(text, "on") == 0 || strcmp(text, "1") == 0;
        if (!on && strcasecmp(text, "false") != 0 && strcasecmp(text, "no") != 0 && strcasecmp(text, "off") != 0 && strcmp(text, "0") != 0)
            return fail(r, line, "%s: \"%.60s\" is not true or false", k->path, text);
        *(bool *)at = on;
        return 0;
    }
    if (k->kind != LIST) return set_number(r, k, text, line);
    /* one text for a whole list: from the environment or --set */
    unsigned *count = (unsigned *)(void *)((char *)r->c + k->count_offset);
    *count = 0;
    char *copy = keep(r, text), *save = NULL;
    if (!copy) return -1;
    for (char *s = strtok_r(copy, ", ", &save); s; s = strtok_r(NULL, ", ", &save))
        if (append(r, (char ***)at, count, s)) return -1;
    return 0;
}

static const struct key *find_key(const char *path) {
    for (size_t i = 0; i < KEYS; i++)
        if (strcmp(keys[i].path, path) == 0) return &keys[i];
    return NULL;
}

/* Edits between two words: for "did you mean". */
static size_t distance(const char *a, const char *b) {
    size_t row[128], n = strlen(b);
    if (n > 126 || strlen(a) > 126) return 1000;
    for (size_t j = 0; j <= n; j++) row[j] = j;
    for (size_t i = 1; a[i - 1]; i++) {
        size_t before = row[0];
        row[0] = i;
        for (size_t j = 1; j <= n; j++) {
            size_t old = row[j], best = before + (a[i - 1] != b[j - 1]);
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            row[j] = best;
            before = old;
        }
    }
    return row[n];
}

static int unknown_key(reader *r, const char *path, size_t line) {
    const struct key *best = NULL;
    size_t least = 4;
    for (size_t i = 0; i < KEYS; i++)
        if (distance(path, keys[i].path) < least) {
            least = distance(path, keys[i].path);
            best = &keys[i];
        }
    if (best) return fail(r, line, "%.100s: there is no such key; did you mean %s?", path, best->path);
    return fail(r, line, "%.100s: there is no such key (docs/config.example.yaml has them all)", path);
}

/* ---- models ---- */
static config_model *add_model(reader *r) {
    config_model *list = take(r->c, (r->c->models_count + 1) * sizeof *list);
    if (!list) {
        fail(r, 0, "no memory for the configuration");
        return NULL;
    }
    if (r->c->models_count) memcpy(list, r->c->models, r->c->models_count * sizeof *list);
    r->c->models = list;
    return &list[r->c->models_count++];
}

/* NAME=PATH, or PATH alone, named after its last part. */
static int add_model_text(reader *r, const char *text) {
    config_model *m = add_model(r);
    if (!m) return -1;
    const char *eq = strchr(text, '='), *slash = strchr(text, '/');
    if (eq && slash && slash < eq && !strchr(eq, '/')) eq = NULL; /* a path that holds '=' */
    m->path = keep(r, eq ? eq + 1 : text);
    m->name = eq ? keep(r, text) : NULL;
    if (!m->path || (eq && !m->name)) return -1;
    if (eq) m->name[eq - text] = 0;
    else {
        char *path = keep(r, text);
        if (!path) return -1;
        size_t n = strlen(path);
        while (n > 1 && path[n - 1] == '/') path[--n] = 0;
        m->name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    }
    if (!m->name[0] || !m->path[0] || strlen(m->name) > 127) return fail(r, 0, "--model %s: NAME=PATH is needed, a name of 1 to 127 bytes", text);
    return 0;
}

/* Whether name is an option of model or engine, and value one that it takes. */
static int check_option(reader *r, const config_model *m, const char *name, const char *value, size_t line) {
    const char *n, *scope = NULL;
    int i = 0;
    while (qvl_option_info(i, &n, NULL, &scope, NULL, NULL, NULL) == 0 && strcmp(n, name) != 0) i++;
    if (qvl_option_info(i, &n, NULL, &scope, NULL, NULL, NULL) || (strcmp(scope, "model") != 0 && strcmp(scope, "engine") != 0))
        return fail(r, line, "models: %s: there is no model or engine option \"%.60s\" (docs/options.md lists them)", m->name ? m->name : "?", name);
    qvl_options *o = NULL;
    int rc = qvl_options_new(&o);
    if (!rc) rc = qvl_options_set(o, name, value);
    qvl_options_free(o);
    return rc ? fail(r, line, "models: %s: %s", m->name ? m->name : "?", qvl_last_error()) : 0;
}

/* ---- the file ---- */
static const char *scalar(const yaml_node_t *n) { return n->type == YAML_SCALAR_NODE ? (const char *)n->data.scalar.value : NULL; }
static size_t line_of(const yaml_node_t *n) { return n->start_mark.line + 1; }

static int read_list(reader *r, yaml_document_t *d, const yaml_node_t *v, const char *path, char ***list, unsigned *count) {
    *count = 0;
    if (scalar(v) && !scalar(v)[0]) return 0;
    if (v->type != YAML_SEQUENCE_NODE) return fail(r, line_of(v), "%s: a list is needed, such as [a, b]", path);
    for (yaml_node_item_t *i = v->data.sequence.items.start; i < v->data.sequence.items.top; i++) {
        const yaml_node_t *item = yaml_document_get_node(d, *i);
        if (!scalar(item)) return fail(r, line_of(item), "%s: the list holds plain texts", path);
        if (append(r, list, count, scalar(item))) return -1;
    }
    return 0;
}

static int read_options(reader *r, yaml_document_t *d, const yaml_node_t *v, config_model *m) {
    if (v->type != YAML_MAPPING_NODE) return fail(r, line_of(v), "models: options: a mapping of option names is needed");
    for (yaml_node_pair_t *p = v->data.mapping.pairs.start; p < v->data.mapping.pairs.top; p++) {
        const yaml_node_t *k = yaml_document_get_node(d, p->key), *value = yaml_document_get_node(d, p->value);
        if (!scalar(k) || !scalar(value)) return fail(r, line_of(k), "models: options: names with plain values are needed");
        char text[512];
        if (snprintf(text, sizeof text, "%s=%s", scalar(k), scalar(value)) >= (int)sizeof text) return fail(r, line_of(k), "models: options: too long a value");
        if (check_option(r, m, scalar(k), scalar(value), line_of(k)) || append(r, &m->options, &m->options_count, text)) return -1;
    }
    return 0;
}

static int read_model(reader *r, yaml_document_t *d, const yaml_node_t *v) {
    if (v->type != YAML_MAPPING_NODE) return fail(r, line_of(v), "models: each is a mapping with name and path");
    config_model *m = add_model(r);
    if (!m) return -1;
    const yaml_node_t *options = NULL;
    for (yaml_node_pair_t *p = v->data.mapping.pairs.start; p < v->data.mapping.pairs.top; p++) {
        const yaml_node_t *k = yaml_document_get_node(d, p->key), *value = yaml_document_get_node(d, p->value);
        const char *name = scalar(k) ? scalar(k) : "";
        if (strcmp(name, "aliases") == 0) {
            if (read_list(r, d, value, "models: aliases", &m->aliases, &m->aliases_count)) return -1;
        } else if (strcmp(name, "options") == 0) {
            options = value;
        } else if (strcmp(name, "name") == 0 || strcmp(name, "path") == 0) {
            if (!scalar(value) || !scalar(value)[0]) return fail(r, line_of(value), "models: %s: a text is needed", name);
            char **at = name[0] == 'n' ? &m->name : &m->path;
            if (!(*at = keep(r, scalar(value)))) return -1;
        } else {
            return fail(r, line_of(k), "models: %.60s: there is no such key; a model has name, path, aliases and options", name);
        }
    }
    if (!m->name || !m->path || strlen(m->name) > 127) return fail(r, line_of(v), "models: each needs name (1 to 127 bytes) and path");
    return options ? read_options(r, d, options, m) : 0;
}

static int read_mapping(reader *r, yaml_document_t *d, const yaml_node_t *map, const char *above) {
    if (map->type != YAML_MAPPING_NODE) {
        if (scalar(map) && !scalar(map)[0]) return 0; /* an empty section */
        return fail(r, line_of(map), "%s: a mapping is needed", above[0] ? above : "the file");
    }
    for (yaml_node_pair_t *p = map->data.mapping.pairs.start; p < map->data.mapping.pairs.top; p++) {
        const yaml_node_t *k = yaml_document_get_node(d, p->key), *v = yaml_document_get_node(d, p->value);
        if (!scalar(k)) return fail(r, line_of(k), "a key must be a plain word");
        char path[128];
        if (snprintf(path, sizeof path, "%s%s%s", above, above[0] ? "." : "", scalar(k)) >= (int)sizeof path) return unknown_key(r, scalar(k), line_of(k));
        const struct key *key = find_key(path);
        if (strcmp(path, "models") == 0) {
            if (v->type != YAML_SEQUENCE_NODE) return fail(r, line_of(v), "models: a list is needed");
            for (yaml_node_item_t *i = v->data.sequence.items.start; i < v->data.sequence.items.top; i++)
                if (read_model(r, d, yaml_document_get_node(d, *i))) return -1;
        } else if (key && key->kind == LIST) {
            if (read_list(r, d, v, path, (char ***)(void *)((char *)r->c + key->offset), (unsigned *)(void *)((char *)r->c + key->count_offset))) return -1;
        } else if (key) {
            if (!scalar(v)) return fail(r, line_of(v), "%s: a plain value is needed", path);
            if (set_value(r, key, scalar(v), line_of(v))) return -1;
        } else {
            bool section = false;
            size_t n = strlen(path);
            for (size_t i = 0; i < KEYS; i++) section = section || (strncmp(keys[i].path, path, n) == 0 && keys[i].path[n] == '.');
            if (!section) return unknown_key(r, path, line_of(k));
            if (read_mapping(r, d, v, path)) return -1;
        }
    }
    return 0;
}

static int read_file(reader *r, const char *file) {
    r->file = file;
    FILE *f = fopen(file, "re");
    if (!f) return fail(r, 0, "%s: %s", file, strerror(errno));
    yaml_parser_t p;
    yaml_document_t d;
    if (!yaml_parser_initialize(&p)) {
        fclose(f);
        return fail(r, 0, "no memory for the configuration");
    }
    yaml_parser_set_input_file(&p, f);
    int rc = -1;
    if (!yaml_parser_load(&p, &d)) {
        fail(r, p.problem_mark.line + 1, "not YAML: %s%s%s", p.context ? p.context : "", p.context ? ": " : "", p.problem ? p.problem : "unreadable");
    } else {
        const yaml_node_t *root = yaml_document_get_root_node(&d);
        rc = root ? read_mapping(r, &d, root, "") : 0;
        yaml_document_delete(&d);
    }
    yaml_parser_delete(&p);
    fclose(f);
    if (rc == 0 && !(r->c->file = keep(r, file))) rc = -1;
    return rc;
}

/* ---- the environment ---- */
extern char **environ;

static void env_name(const char *path, char out[128]) {
    size_t n = (size_t)snprintf(out, 128, "QVL_SERVE_%s", path);
    for (size_t i = 0; i < n && i < 128; i++) out[i] = out[i] == '.' ? '_' : (char)toupper((unsigned char)out[i]);
}

static int read_environment(reader *r) {
    for (char **e = environ; *e; e++) {
        if (strncmp(*e, "QVL_SERVE_", 10) != 0) continue;
        size_t n = strcspn(*e, "=");
        const struct key *key = NULL;
        char name[128];
        for (size_t i = 0; i < KEYS && !key; i++) {
            env_name(keys[i].path, name);
            if (strlen(name) == n && strncmp(name, *e, n) == 0) key = &keys[i];
        }
        if (!key) return fail(r, 0, "environment: %.*s names no key (QVL_SERVE_LIMITS_MAX_BODY is limits.max_body)", (int)n, *e);
        if (set_value(r, key, *e + n + 1, 0)) return -1;
    }
    return 0;
}

/* ---- text for people ---- */
static void print_example(void) {
    puts("# qvl-serve configuration: every key with its default. Made by `qvl-serve --print-config`; a test compares.\n"
         "# Order of precedence: this file, then the environment (QVL_SERVE_LIMITS_MAX_BODY), then --set limits.max_body=...\n");
    puts("# Models to serve. Options are those of scope model and engine in docs/options.md.\n"
         "models:\n"
         "  - name: qvl-tiny\n"
         "    path: examples/models/qvl-tiny\n"
         "    aliases: []\n"
         "    options: {max_requests: 16}");
    const char *tls = "listen.tls.";
    for (size_t s = 0; s < sizeof sections / sizeof *sections; s++) {
        printf("\n# %s\n%s:\n", sections[s].help, sections[s].section);
        size_t n = strlen(sections[s].section);
        bool nested = false;
        for (size_t i = 0; i < KEYS; i++) {
            const struct key *k = &keys[i];
            if (strncmp(k->path, sections[s].section, n) != 0 || k->path[n] != '.') continue;
            bool inner = strncmp(k->path, tls, strlen(tls)) == 0;
            if (inner && !nested) puts("  tls:");
            nested = inner;
            char value[64];
            if (k->kind == LIST) snprintf(value, sizeof value, "[%s]", k->dflt);
            else if (k->kind == TEXT && !k->dflt[0]) snprintf(value, sizeof value, "\"\"");
            else snprintf(value, sizeof value, "%s", k->dflt);
            char text[128];
            snprintf(text, sizeof text, "%s%s: %s", inner ? "    " : "  ", k->path + (inner ? strlen(tls) : n + 1), value);
            printf("%-36s # %s\n", text, k->help);
        }
    }
}

static void print_help(void) {
    puts("qvl-serve - Qwen3-VL over HTTP: an OpenAI-compatible API, a WebSocket, and a web page.\n\n"
         "usage: qvl-serve [-c config.yaml] [--model NAME=PATH]... [--host H] [--port P] [--set KEY=VALUE]...\n\n"
         "  -c, --config FILE      configuration; docs/config.example.yaml explains every key\n"
         "      --model NAME=PATH  serve this checkpoint under NAME (again for more); the bundled qvl-tiny when none is named\n"
         "      --host H           listen.host (127.0.0.1)\n"
         "      --port P           listen.port (8080; 0: any free one)\n"
         "      --set KEY=VALUE    any key of the configuration, e.g. limits.max_queue=64\n"
         "      --check-config     say whether the configuration is fine, and leave\n"
         "      --print-config     print the example configuration with all defaults\n"
         "      --new-key NAME     make an API key; --new-admin-key NAME for one that may load and unload models\n"
         "      --help, --version\n\n"
         "Every key is also an environment variable: QVL_SERVE_LIMITS_MAX_QUEUE=64.\n"
         "Signals: SIGTERM ends after running requests (life.drain_ms), SIGHUP reads keys, certificates and limits again.\n"
         "Exit codes: 0 ended as asked, 1 could not start, 2 wrong command line or configuration.");
}

static int new_key(const char *name, bool admin, char *err, size_t err_size) {
    char key[AUTH_KEY_SIZE], line[AUTH_LINE_SIZE];
    if (auth_new_key(name, key, line, err, err_size)) return CONFIG_EXIT_USAGE;
    printf("%s\n\nThis is the client's key; it is shown only now. Put this line into the file that auth.keys names:\n%s%s\n", key, line, admin ? " admin" : "");
    return CONFIG_EXIT_OK;
}

/* ---- the command line ---- */
static int read_arguments(reader *r, int argc, char **argv, bool files, bool *check) {
    for (int i = 1; i < argc; i++) {
        char name[64];
        const char *a = argv[i], *eq = strncmp(a, "--", 2) == 0 ? strchr(a, '=') : NULL, *value = eq ? eq + 1 : NULL;
        snprintf(name, sizeof name, "%.*s", eq ? (int)(eq - a) : 60, a);
        bool config_file = strcmp(name, "-c") == 0 || strcmp(name, "--config") == 0;
        if (strcmp(name, "--check-config") == 0) {
            *check = true;
            continue;
        }
        static const char *const with_value[] = {"-c", "--config", "--model", "--host", "--port", "--set"};
        bool is_known = false;
        for (size_t k = 0; k < sizeof with_value / sizeof *with_value; k++) is_known = is_known || strcmp(name, with_value[k]) == 0;
        if (!is_known) return fail(r, 0, "%s: there is no such option; qvl-serve --help lists them", a);
        if (!value && !(value = i + 1 < argc ? argv[++i] : NULL)) return fail(r, 0, "%s needs a value", name);
        if (config_file != files) continue; /* files first, whatever the order */
        int rc = 0;
        if (config_file) rc = read_file(r, value);
        else if (strcmp(name, "--model") == 0) rc = add_model_text(r, value);
        else if (strcmp(name, "--host") == 0) rc = set_value(r, find_key("listen.host"), value, 0);
        else if (strcmp(name, "--port") == 0) rc = set_value(r, find_key("listen.port"), value, 0);
        else {
            const char *mid = strchr(value, '=');
            char path[128];
            if (!mid) return fail(r, 0, "--set %s: KEY=VALUE is needed", value);
            snprintf(path, sizeof path, "%.*s", (int)(mid - value), value);
            const struct key *key = find_key(path);
            rc = key ? set_value(r, key, mid + 1, 0) : unknown_key(r, path, 0);
        }
        if (rc) return rc;
    }
    return 0;
}

/* The bundled model: beside the source tree or below the PREFIX. */
static const char *bundled(void) {
    static char path[4400];
    char exe[4096], test[4500];
    static const char *const places[] = {"examples/models/qvl-tiny", "share/qvl/models/qvl-tiny"};
    const char *started = (const char *)getauxval(AT_EXECFN);
    if (started && realpath(started, exe)) {
        for (int up = 0; up < 4; up++) {
            char *slash = strrchr(exe, '/');
            if (!slash) break;
            *slash = 0;
            for (int i = 0; i < 2; i++) {
                snprintf(path, sizeof path, "%s/%s", exe, places[i]);
                snprintf(test, sizeof test, "%s/config.json", path);
                if (access(test, R_OK) == 0) return path;
            }
        }
    }
    snprintf(path, sizeof path, QVL_DATADIR "/models/qvl-tiny");
    return path;
}

static int check_whole(reader *r) {
    const config *c = r->c;
    if (!c->tls_certificate[0] != !c->tls_key[0]) return fail(r, 0, "listen.tls: certificate and key are needed, both or none");
    for (unsigned i = 0; i < c->models_count; i++)
        for (unsigned k = 0; k < i; k++)
            if (strcmp(c->models[i].name, c->models[k].name) == 0) return fail(r, 0, "models: \"%s\" is there twice", c->models[i].name);
    if (c->models_count) return 0;
    config_model *m = add_model(r);
    if (!m || !(m->name = keep(r, "qvl-tiny")) || !(m->path = keep(r, bundled()))) return -1;
    return 0;
}

static int read_all(config **out, int argc, char **argv, bool *check, char *err, size_t err_size) {
    *out = NULL;
    reader r = {.c = calloc(1, sizeof(config)), .err = err, .err_size = err_size};
    if (!r.c) return fail(&r, 0, "no memory for the configuration");
    int rc = 0;
    for (size_t i = 0; i < KEYS && !rc; i++) rc = set_value(&r, &keys[i], keys[i].dflt, 0);
    if (!rc) rc = read_arguments(&r, argc, argv, true, check);
    if (!rc) rc = read_environment(&r);
    if (!rc) rc = read_arguments(&r, argc, argv, false, check);
    if (!rc) rc = check_whole(&r);
    if (rc) config_free(r.c);
    else *out = r.c;
    return rc;
}

int config_main(config **out, int argc, char **argv, char *err, size_t err_size) {
    *out = NULL;
    for (int i = 1; i < argc; i++) {
        bool admin = strcmp(argv[i], "--new-admin-key") == 0;
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) print_help();
        else if (strcmp(argv[i], "--version") == 0) printf("qvl-serve %s\n", QVL_VERSION);
        else if (strcmp(argv[i], "--print-config") == 0) print_example();
        else if (admin || strcmp(argv[i], "--new-key") == 0) {
            if (i + 1 < argc) return new_key(argv[i + 1], admin, err, err_size);
            snprintf(err, err_size, "%s needs a name", argv[i]);
            return CONFIG_EXIT_USAGE;
        } else continue;
        return CONFIG_EXIT_OK;
    }
    bool check = false;
    if (read_all(out, argc, argv, &check, err, err_size)) return CONFIG_EXIT_USAGE;
    if (!check) return CONFIG_RUN;
    printf("%s: fine; %u model%s\n", (*out)->file ? (*out)->file : "the configuration", (*out)->models_count, (*out)->models_count == 1 ? "" : "s");
    config_free(*out);
    *out = NULL;
    return CONFIG_EXIT_OK;
}

int config_reload(config **out, int argc, char **argv, char *err, size_t err_size) {
    bool check = false;
    return read_all(out, argc, argv, &check, err, err_size);
}
