/* model.c - finding and loading the model, and pictures.
 *
 * Job:        -m MODEL, or the bundled qvl-tiny wherever the program was started from; a progress bar while it loads.
 * Input:      arguments, the environment variable QVL_MODEL, the place of the executable.
 * Output:     handles.
 * Invariants: the bundled model is found beside the source tree, or below the PREFIX the program was installed to.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

#include "tool.h"

#ifndef QVL_DATADIR
#define QVL_DATADIR "/usr/local/share/qvl"
#endif

/* dir/rest when a model is there; path has PATH_MAX bytes. */
static bool is_model(char *path, const char *dir, int dir_len, const char *rest) {
    char config[PATH_MAX];
    if (snprintf(path, PATH_MAX, "%.*s/%s", dir_len, dir, rest) >= PATH_MAX) return false;
    return snprintf(config, sizeof config, "%s/config.json", path) < PATH_MAX && access(config, R_OK) == 0;
}

static bool find_bundled(char *path) {
    char exe[PATH_MAX];
    const char *started = (const char *)getauxval(AT_EXECFN); /* as it was executed; needs no /proc */
    ssize_t n = started && realpath(started, exe) ? (ssize_t)strlen(exe) : 0;
    for (int up = 0; n > 0 && up < 4; up++) { /* build/release/qvl: three up is the source tree; bin/qvl: two is PREFIX */
        while (n > 0 && exe[n - 1] != '/') n--;
        if (n > 0) n--; /* the directory without its slash; "" is the root */
        if (is_model(path, exe, (int)n, "examples/models/qvl-tiny") || is_model(path, exe, (int)n, "share/qvl/models/qvl-tiny")) return true;
    }
    return is_model(path, ".", 1, "examples/models/qvl-tiny") || is_model(path, QVL_DATADIR, sizeof QVL_DATADIR - 1, "models/qvl-tiny");
}

int tool_model_path(const tool_args *a, char *path) {
    const char *asked = tool_get(a, "model"), *env = getenv("QVL_MODEL");
    if (!asked && env && *env) asked = env;
    if (!asked && find_bundled(path)) return TOOL_OK;
    if (!asked) return tool_usage(a->command, "the bundled model is not found; name one with -m MODEL or the environment variable QVL_MODEL");
    if (snprintf(path, PATH_MAX, "%s", asked) >= PATH_MAX) return tool_usage(a->command, "the model's path is too long");
    return TOOL_OK;
}

int tool_model_load(const tool_args *a, qvl_model **m, double *ms) {
    char path[PATH_MAX];
    *m = NULL;
    int code = tool_model_path(a, path);
    if (code) return code;
    tool_progress bar = {.label = "loading", .start = tool_now_ms()};
    qvl_options_set_progress(a->options, tool_progress_step, &bar);
    int rc = qvl_model_load(m, path, a->options);
    qvl_options_set_progress(a->options, NULL, NULL);
    tool_progress_clear(&bar);
    if (ms) *ms = tool_now_ms() - bar.start;
    return rc < 0 ? tool_library_error(NULL) : TOOL_OK;
}

json_t *tool_model_info(const qvl_model *m) {
    char *text;
    if (qvl_model_info(m, &text) < 0) {
        tool_library_error(NULL);
        return NULL;
    }
    json_error_t error;
    json_t *info = json_loads(text, 0, &error);
    if (!info) tool_fail("the model's info is not JSON: %s", error.text);
    qvl_free(text);
    return info;
}

int tool_image_load(const tool_args *a, const char *file, qvl_image **out) {
    if (strcmp(file, "-") != 0) return qvl_image_from_file(out, file, a->options) < 0 ? tool_library_error(NULL) : TOOL_OK;
    char *data;
    size_t size;
    *out = NULL;
    int code = tool_read_stdin(&data, &size, (size_t)tool_library_number(a, "max_image_bytes"));
    if (code) return code;
    int rc = qvl_image_from_bytes(out, data, size, a->options);
    free(data);
    return rc < 0 ? tool_library_error("standard input") : TOOL_OK;
}
