/* quantize.c - qvl quantize: a model in fewer bits, as a directory that loads at once.
 *
 * Job:        call qvl_quantize and show what it did to every layer.
 * Input:      a model, a directory to make.
 * Output:     a table by layer, or the library's report.
 * Invariants: int4 is meant when nothing is said; the directory has packed weights only when all of it was written.
 */
#include <math.h>
#include <string.h>

#include "tool.h"

/* Matrices of one layer: those whose names are alike up to the second point ("text.3."), or that stand for themselves. */
typedef struct {
    char name[64];
    double weights, bytes, square; /* square: of the error, weighted by the numbers */
} layer;

static void layer_of(char out[64], const char *name) {
    const char *dot = strchr(name, '.'), *second = dot ? strchr(dot + 1, '.') : NULL;
    snprintf(out, 64, "%.*s", (int)(second ? second - name : (long)strlen(name)), name);
}

static void print_layer(const layer *l) {
    printf("%-26s %10.2f %10.2f %6.2f %10.5f\n", l->name, l->weights / 1e6, l->bytes / 1e6, 8 * l->bytes / l->weights, sqrt(l->square / l->weights));
}

static void print_table(const json_t *report, const char *out, double seconds) {
    printf("%-26s %10s %10s %6s %10s\n", "layer", "M weights", "MB", "bits", "error");
    layer now = {0}, all = {.name = "all matrices"};
    size_t i;
    json_t *m;
    json_array_foreach(json_object_get(report, "matrices"), i, m) {
        char name[64];
        layer_of(name, json_string_value(json_object_get(m, "name")));
        double w = json_number_value(json_object_get(m, "weights")), b = json_number_value(json_object_get(m, "bytes")), e = json_number_value(json_object_get(m, "error"));
        if (strcmp(name, now.name) != 0) {
            if (now.weights > 0) print_layer(&now);
            now = (layer){0};
            memcpy(now.name, name, sizeof name);
        }
        now.weights += w, now.bytes += b, now.square += e * e * w;
        all.weights += w, all.bytes += b, all.square += e * e * w;
    }
    if (now.weights > 0) print_layer(&now);
    if (all.weights > 0) print_layer(&all);
    printf("\n%s: %s, %.2f bits a weight, %.1f MB in %.1f s; use it with -m\n", out, json_string_value(json_object_get(report, "dtype")),
           json_number_value(json_object_get(report, "bits")), json_number_value(json_object_get(report, "bytes")) / 1e6, seconds);
}

static int run(const tool_args *a) {
    char path[PATH_MAX];
    int code = tool_model_path(a, path);
    if (code) return code;
    if (a->n_words != 1) return tool_usage(a->command, "say which directory to make");
    if (!tool_get(a, "dtype") && !tool_get(a, "bits")) qvl_options_set(a->options, "dtype", "int4");
    tool_progress bar = {.label = "quantizing", .start = tool_now_ms()};
    qvl_options_set_progress(a->options, tool_progress_step, &bar);
    char *text = NULL;
    int rc = qvl_quantize(path, a->words[0], a->options, &text);
    qvl_options_set_progress(a->options, NULL, NULL);
    tool_progress_clear(&bar);
    if (rc < 0) return tool_library_error(NULL);
    json_t *report = json_loads(text, 0, NULL);
    qvl_free(text);
    if (!report) return tool_fail("the report is not JSON");
    if (tool_get(a, "json")) return tool_print_json(report);
    print_table(report, a->words[0], (tool_now_ms() - bar.start) / 1e3);
    json_decref(report);
    return TOOL_OK;
}

static const tool_option options[] = {
    {"json", 0, NULL, "the report as a JSON object, an entry for every matrix"},
    {0},
};

const tool_command tool_quantize = {
    .name = "quantize",
    .synopsis = "[-m MODEL] [--dtype int4|int8|bf16|f32 | --bits N] [--json] DIRECTORY",
    .summary = "a model in fewer bits, in a directory that loads at once",
    .details = "Writes DIRECTORY: the weights as --dtype asks (default int4; auto keeps them as stored), laid out as they are used, so that\n"
               "loading only maps them, and the model's other files. With --bits each matrix becomes int4, int8 or bf16, where they are worth most. The table tells the error of each layer: how far its rounded weights\n"
               "are from the stored ones, relative to their size, over up to 256 rows of every matrix.",
    .options = options,
    .scopes = "model quantize",
    .without = "device rope_yarn_factor",
    .max_words = 1,
    .run = run,
};
