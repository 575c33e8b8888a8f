/* info.c - qvl info: what a model is.
 *
 * Job:        load a model, show its shapes, types and sizes, and what an engine of it would take.
 * Input:      a model.
 * Output:     a table for people, or the library's JSON object.
 * Invariants: every field the library reports is shown, also ones this program does not know yet.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

static void print_scalar(const json_t *v) {
    if (json_is_string(v)) tool_write_text(stdout, json_string_value(v), json_string_length(v));
    else {
        char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(9));
        fputs(text ? text : "?", stdout);
        free(text);
    }
}

/* 8767123456 as "8.77 G". */
static void print_count(json_int_t n, const char *unit) {
    static const char prefixes[] = " kMGT";
    double v = (double)n;
    int p = 0;
    while (v >= 999.5 && p < 4) v /= 1000, p++;
    if (p == 0) printf("%" JSON_INTEGER_FORMAT "%s%s", n, *unit ? " " : "", unit);
    else printf("%.3g %c%s", v, prefixes[p], unit);
}

static void print_list(const json_t *v) {
    size_t i;
    const json_t *item;
    json_array_foreach(v, i, item) {
        if (i) fputs(", ", stdout);
        print_scalar(item);
    }
}

/* Sizes of the engine's plan that are bytes. */
static bool is_bytes(const char *key) {
    static const char *const names[] = {"weights", "kv", "workspace", "vision", "total", "kv_block_bytes"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(key, names[i]) == 0) return true;
    return false;
}

static void print_object(json_t *o, int indent, bool engine) {
    const char *key;
    json_t *v;
    json_object_foreach(o, key, v) {
        if (json_is_object(v)) {
            printf("%*s%s\n", indent, "", key);
            print_object(v, indent + 2, strcmp(key, "engine") == 0);
            continue;
        }
        printf("%*s%-*s ", indent, "", 22 - indent, key);
        if (strcmp(key, "weight_bytes") == 0 || (engine && is_bytes(key))) print_count(json_integer_value(v), "B");
        else if (strcmp(key, "parameters") == 0) print_count(json_integer_value(v), "");
        else if (json_is_array(v)) print_list(v);
        else print_scalar(v);
        putchar('\n');
    }
}

static json_t *engine_plan(const qvl_model *m, const tool_args *a) {
    char *text;
    if (qvl_engine_plan(m, a->options, &text) < 0) {
        tool_library_error(NULL);
        return NULL;
    }
    json_t *plan = json_loads(text, 0, NULL);
    qvl_free(text);
    return plan;
}

static int run(const tool_args *a) {
    char path[PATH_MAX];
    qvl_model *m;
    int code = tool_model_path(a, path);
    if (code) return code;
    if ((code = tool_model_load(a, &m, NULL))) return code;
    json_t *info = tool_model_info(m), *plan = info ? engine_plan(m, a) : NULL, *out = json_pack("{s:o*}", "path", json_string(path)); /* left out when it is not UTF-8 */
    qvl_model_free(m);
    if (info) json_object_update(out, info);
    json_decref(info);
    if (plan) json_object_set(out, "engine", plan);
    json_decref(plan);
    if (!info || !plan) code = TOOL_FAILED;
    else if (tool_get(a, "json")) return tool_print_json(out);
    else print_object(out, 0, false);
    json_decref(out);
    return code;
}

static const tool_option options[] = {
    {"json", 0, NULL, "as a JSON object"},
    {0},
};

const tool_command tool_info = {
    .name = "info",
    .synopsis = "[-m MODEL] [--json] [OPTION]...",
    .summary = "what a model is: shapes, types, sizes, memory",
    .details = "Loads the model and tells its family, chat template, types, device, sizes, generation defaults, and the memory that an engine with these\n"
               "options would take: qvl info --max-context 262144 --kv-dtype int8.",
    .options = options,
    .scopes = "model engine",
    .without = "",
    .run = run,
};
