/* describe.c - qvl describe: pictures and a question in, an answer out.
 *
 * Job:        one user message of several pictures and a text, answered by one request.
 * Input:      picture files (or - for stdin), a prompt.
 * Output:     the answer on stdout as it comes, or one JSON object.
 * Invariants: the engine is made just large enough for this request, unless its size was asked for.
 */
#include <stdlib.h>
#include <string.h>

#include "tool.h"

typedef struct {
    qvl_model *model;
    qvl_media *media;
    qvl_prompt *prompt;
    qvl_engine *engine;
    double load_ms;
} job;

/* [{"role": "system", ...},] {"role": "user", "content": [image, ..., text]} as JSON text, or NULL after a message. */
static char *messages_text(const tool_args *a) {
    const char *prompt = tool_get(a, "prompt"), *system = tool_get(a, "system");
    if (!prompt) prompt = "Describe this image.";
    json_t *list = json_array(), *user = tool_text_message("user", prompt, strlen(prompt)), *content = json_array();
    json_t *system_message = user && system ? tool_text_message("system", system, strlen(system)) : NULL;
    char *text = NULL;
    if (user && (!system || system_message)) {
        for (int i = 0; i < a->n_words; i++) json_array_append_new(content, json_pack("{s:s}", "type", "image"));
        json_array_append_new(content, json_pack("{s:s, s:O}", "type", "text", "text", json_object_get(user, "content")));
        json_object_set(user, "content", content);
        if (system_message) json_array_append(list, system_message);
        json_array_append(list, user);
        text = json_dumps(list, 0);
        if (!text) tool_fail("out of memory");
    }
    json_decref(content);
    json_decref(system_message);
    json_decref(user);
    json_decref(list);
    return text;
}

static int load_images(job *j, const tool_args *a) {
    if (qvl_media_new(&j->media) < 0) return tool_library_error(NULL);
    int code = TOOL_OK;
    for (int i = 0; code == TOOL_OK && i < a->n_words; i++) {
        qvl_image *im;
        code = tool_image_load(a, a->words[i], &im);
        if (code == TOOL_OK && qvl_media_add_image(j->media, im) < 0) code = tool_library_error(a->words[i]);
        qvl_image_free(im);
    }
    return code;
}

/* An engine for one request: its context is the prompt and the longest answer, as far as the model goes. */
static int make_engine(job *j, const tool_args *a) {
    json_t *info = tool_model_info(j->model);
    qvl_options *o = info ? tool_options_copy(a) : NULL;
    size_t n = 0;
    int rc = o ? qvl_prompt_tokens(j->prompt, NULL, &n) : QVL_ENOMEM;
    if (o) {
        int64_t most = json_integer_value(json_object_get(info, "max_context")), want = (int64_t)n + tool_library_number(a, "max_tokens");
        rc = qvl_options_set_i64(o, "max_requests", 1);
        if (rc == 0 && !tool_get(a, "max_context")) rc = qvl_options_set_i64(o, "max_context", want < most ? want : most);
        if (rc == 0) rc = qvl_engine_new(&j->engine, j->model, o);
        if (rc < 0) rc = -tool_library_error(NULL);
    }
    qvl_options_free(o);
    json_decref(info);
    return rc == 0 ? TOOL_OK : o ? -rc : TOOL_FAILED;
}

static int print_json(const job *j, const tool_args *a, const tool_answer *answer) {
    char path[PATH_MAX];
    int code = tool_model_path(a, path);
    if (code) return code;
    json_t *out = json_pack("{s:s, s:s#}", "model", path, "text", answer->text, answer->text_len);
    if (!out) return tool_fail("the answer does not fit JSON");
    if (answer->reasoning_len) json_object_set_new(out, "reasoning", json_stringn(answer->reasoning, answer->reasoning_len));
    json_object_set_new(out, "finish_reason", json_string(answer->finish_reason));
    json_object_set_new(out, "usage", tool_usage_json(answer));
    json_object_set_new(out, "timings", tool_timings_json(answer, j->load_ms));
    if (answer->tokens) json_object_set(out, "tokens", answer->tokens);
    return tool_print_json(out);
}

static int answer(job *j, const tool_args *a) {
    bool json = tool_get(a, "json") != NULL;
    tool_answer out;
    int code = tool_answer_run(&out, j->engine, j->prompt, a->options, json ? NULL : stdout);
    if (!json && out.text_len > 0) putchar('\n');
    if (code == TOOL_OK && out.interrupted) code = TOOL_INTERRUPTED;
    if (code == TOOL_OK && json) code = print_json(j, a, &out);
    tool_answer_free(&out);
    return code;
}

static int run(const tool_args *a) {
    if (a->n_words == 0) return tool_usage(a->command, "no picture given");
    int from_stdin = 0;
    for (int i = 0; i < a->n_words; i++) from_stdin += strcmp(a->words[i], "-") == 0;
    if (from_stdin > 1) return tool_usage(a->command, "standard input (-) can be one picture only");
    if (tool_get(a, "logprobs") && !tool_get(a, "json")) return tool_usage(a->command, "--logprobs needs --json");

    job j = {0};
    char *messages = messages_text(a);
    int code = messages ? load_images(&j, a) : TOOL_FAILED; /* before the model: a wrong file name should fail at once */
    if (code == TOOL_OK) code = tool_model_load(a, &j.model, &j.load_ms);
    if (code == TOOL_OK && qvl_prompt_new(&j.prompt, j.model, messages, NULL, j.media, a->options) < 0) code = tool_library_error(NULL);
    if (code == TOOL_OK) code = make_engine(&j, a);
    if (code == TOOL_OK) code = answer(&j, a);
    qvl_engine_free(j.engine);
    qvl_prompt_free(j.prompt);
    qvl_media_free(j.media);
    qvl_model_free(j.model);
    free(messages);
    return code;
}

static const tool_option options[] = {
    {"prompt", 'p', "TEXT", "what to ask; default \"Describe this image.\""},
    {"system", 0, "TEXT", "a system message before it"},
    {"json", 0, NULL, "one JSON object: text, reasoning, finish_reason, usage, timings"},
    {0},
};

const tool_command tool_describe = {
    .name = "describe",
    .synopsis = "IMAGE... [-p PROMPT] [-m MODEL] [OPTION]...",
    .summary = "ask about pictures",
    .details = "Shows the pictures (JPEG, PNG, WebP; - reads one from standard input), in this order and in one message, to the model "
               "and writes its answer to standard output while it is made. A model that thinks first shows that, dimmed, on a "
               "terminal only; --json keeps it apart as \"reasoning\".",
    .options = options,
    .scopes = "model image prompt engine request",
    .without = "max_requests n priority step_ms embedding_cache video_min_pixels video_max_pixels video_layout prompt_logprobs return_logits",
    .max_words = INT_MAX,
    .run = run,
};
