/* openai.c - bodies in OpenAI's form to prompts and options.
 *
 * Job:        read a request, refuse what is wrong with the field's name, make the prompt. Runs on a worker.
 * Input:      task.body.
 * Output:     task.prompt, task.options and the flags of an answer to generate; or task.reply; or task.error.
 * Invariants: a field that would change the answer and is not served is refused, never ignored; fields that nobody knows
 *             are accepted and logged; user text never becomes a control token (libqvl sees to it).
 */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "fetch.h"
#include "image.h"
#include "task.h"

#define BAD "invalid_request_error"
#define LOW_DETAIL_PIXELS (256 * 32 * 32) /* "detail": "low": at most 256 tokens */

static int bad(task *t, const char *param, const char *what) { return task_fail(t, 400, BAD, param, NULL, "%s: %s", param, what); }

/* ---- fields ---- */
typedef enum { INTEGER, NUMBER, BOOLEAN, ANY } kind;

static const struct field {
    const char *name, *option;
    kind kind;
} fields[] = {
    {"temperature", "temperature", NUMBER},
    {"top_p", "top_p", NUMBER},
    {"top_k", "top_k", INTEGER},
    {"min_p", "min_p", NUMBER},
    {"repetition_penalty", "repetition_penalty", NUMBER},
    {"presence_penalty", "presence_penalty", NUMBER},
    {"frequency_penalty", "frequency_penalty", NUMBER},
    {"seed", "seed", INTEGER},
    {"n", "n", INTEGER},
    {"min_tokens", "min_tokens", INTEGER},
    {"ignore_eos", "ignore_eos", BOOLEAN},
    {"priority", "priority", INTEGER},
    {"speculate", "speculate", INTEGER},
    {"logit_bias", "logit_bias", ANY},
    {"stop_token_ids", "stop_token_ids", ANY},
    {"stop", "stop", ANY},
};

/* Read elsewhere in this file, or known and without effect on the answer. */
static const char *const known[] = {
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "stream", "stream_options", "logprobs", "top_logprobs", "tools",
    "tool_choice", "parallel_tool_calls", "response_format", "include_reasoning", "chat_template_kwargs", "mm_processor_kwargs", "min_pixels",
    "max_pixels", "echo", "user", "add_generation_prompt", "add_vision_id", "deadline_ms", "metadata", "store", "service_tier", "request_id",
    "best_of", "skip_special_tokens", "safety_identifier", "prompt_cache_key", "verbosity"};

/* Would change the answer, and cannot be done: an answer that looks as if it had been is worse than none. */
static const struct {
    const char *name, *why;
} refused[] = {
    {"functions", "is the old form; send tools"},
    {"function_call", "is the old form; send tool_choice"},
    {"structured_outputs", "guided decoding is not served yet; leave it out"},
    {"guided_json", "guided decoding is not served yet; leave it out"},
    {"guided_regex", "guided decoding is not served yet; leave it out"},
    {"guided_choice", "guided decoding is not served yet; leave it out"},
    {"guided_grammar", "guided decoding is not served yet; leave it out"},
    {"grammar", "guided decoding is not served yet; leave it out"},
    {"json_schema", "guided decoding is not served yet; leave it out"},
    {"audio", "audio is not generated"},
    {"bad_words", "is not served; use logit_bias with -100"},
    {"cache_salt", "the prefix cache is shared by all keys; run one server for each tenant instead"},
    {"suffix", "fill-in-the-middle is not served"},
    {"thinking_token_budget", "is not served; use max_tokens"},
    {"prompt_logprobs", "is not served over HTTP; libqvl's engine has it"},
    {"use_beam_search", "beam search is not served"},
    {"continue_final_message", "is not served"},
};

static int set_option(task *t, const char *param, const char *option, kind k, const json_t *v) {
    int rc;
    if (k == INTEGER) {
        if (json_is_real(v) && json_real_value(v) == (double)(int64_t)json_real_value(v)) rc = qvl_options_set_i64(t->options, option, (int64_t)json_real_value(v));
        else if (json_is_integer(v)) rc = qvl_options_set_i64(t->options, option, json_integer_value(v));
        else return bad(t, param, "an integer is needed");
    } else if (k == NUMBER) {
        if (!json_is_number(v)) return bad(t, param, "a number is needed");
        rc = qvl_options_set_f64(t->options, option, json_number_value(v));
    } else if (k == BOOLEAN) {
        if (!json_is_boolean(v)) return bad(t, param, "true or false is needed");
        rc = qvl_options_set(t->options, option, json_is_true(v) ? "true" : "false");
    } else {
        char *text = json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY);
        if (!text) {
            task_out_of_memory(t);
            return -1;
        }
        rc = qvl_options_set(t->options, option, text);
        free(text);
    }
    return rc ? task_fail_qvl(t, rc, param) : 0;
}

/* A member that is there and not null. */
static json_t *get(const json_t *o, const char *name) {
    json_t *v = json_object_get(o, name);
    return json_is_null(v) ? NULL : v;
}

static int get_bool(task *t, const json_t *o, const char *name, bool *out) {
    const json_t *v = get(o, name);
    if (!v) return 0;
    if (!json_is_boolean(v)) return bad(t, name, "true or false is needed");
    *out = json_is_true(v);
    return 0;
}

static int get_int(task *t, const json_t *o, const char *name, int64_t low, int64_t high, int64_t *out) {
    const json_t *v = get(o, name);
    if (!v) return 0;
    if (!json_is_integer(v) || json_integer_value(v) < low || json_integer_value(v) > high)
        return task_fail(t, 400, BAD, name, NULL, "%s: an integer from %lld to %lld is needed", name, (long long)low, (long long)high);
    *out = json_integer_value(v);
    return 0;
}

static int read_fields(task *t) {
    const char *name;
    json_t *v;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        v = get(t->json, refused[i].name);
        if (v && !json_is_false(v)) return bad(t, refused[i].name, refused[i].why);
    }
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        v = get(t->json, fields[i].name);
        if (v && set_option(t, fields[i].name, fields[i].option, fields[i].kind, v)) return -1;
    }
    json_object_foreach(t->json, name, v) {
        bool found = false;
        for (size_t i = 0; !found && i < sizeof fields / sizeof *fields; i++) found = strcmp(name, fields[i].name) == 0;
        for (size_t i = 0; !found && i < sizeof known / sizeof *known; i++) found = strcmp(name, known[i]) == 0;
        for (size_t i = 0; !found && i < sizeof refused / sizeof *refused; i++) found = strcmp(name, refused[i].name) == 0;
        if (!found) log_event(LOG_INFO, "unknown_field", t->request_id, LOG_STR("field", name), LOG_STR("route", t->route));
    }
    return 0;
}

/* ---- the body and its model ---- */

/* 0: go on; 1: the model is being loaded, come back; -1: error. */
static int open_body(task *t) {
    if (!t->json) {
        json_error_t je;
        if (t->body.len == 0) return task_fail(t, 400, BAD, NULL, "invalid_json", "the body is empty; a JSON object is needed");
        t->json = json_loadb(t->body.data, t->body.len, JSON_REJECT_DUPLICATES, &je);
        if (!t->json)
            return task_fail(t, 400, BAD, NULL, "invalid_json", "the body is not JSON: %s (line %d, column %d)", je.text, je.line, je.column);
        if (!json_is_object(t->json)) return task_fail(t, 400, BAD, NULL, "invalid_json", "the body must be a JSON object");
        buf_free(&t->body);
        const json_t *name = get(t->json, "model");
        if (name && (!json_is_string(name) || json_string_length(name) >= sizeof t->model_name))
            return bad(t, "model", "a string of at most 127 bytes is needed");
        snprintf(t->model_name, sizeof t->model_name, "%s", name ? json_string_value(name) : "");
        t->model = models_find(t->server, t->model_name);
        if (!t->model)
            return task_fail(t, 404, "not_found_error", "model", "model_not_found", "there is no model \"%s\"; GET /v1/models lists them",
                             t->model_name);
        if (!t->model_name[0]) snprintf(t->model_name, sizeof t->model_name, "%s", model_name(t->model));
    }
    model_state st = model_state_of(t->model);
    if (st == MODEL_LOADING) {
        t->waiting = true;
        return 1;
    }
    if (st != MODEL_READY) {
        t->error.retry_after = 5;
        return task_fail(t, 503, "overloaded_error", "model", "model_unavailable", "\"%s\" is %s%s%s", t->model_name,
                         st == MODEL_DRAINING ? "being unloaded" : "not loaded", model_failure(t->model)[0] ? ": " : "", model_failure(t->model));
    }
    if (!t->options) {
        int rc = qvl_options_new(&t->options);
        if (rc) return task_fail_qvl(t, rc, NULL);
    }
    return 0;
}

/* ---- pixels ---- */
static int set_pixels(task *t, const json_t *o, const char *name, const char *option) {
    const json_t *v = get(o, name);
    return v ? set_option(t, name, option, INTEGER, v) : 0;
}

static int read_pixels(task *t) {
    const config *c = t->server->config;
    const json_t *k = get(t->json, "mm_processor_kwargs");
    if (k && !json_is_object(k)) return bad(t, "mm_processor_kwargs", "an object is needed");
    const json_t *image = get(k, "images_kwargs"), *video = get(k, "videos_kwargs"), *size = get(k, "size");
    if (set_pixels(t, size, "shortest_edge", "min_pixels") || set_pixels(t, size, "longest_edge", "max_pixels") ||
        set_pixels(t, k, "min_pixels", "min_pixels") || set_pixels(t, k, "max_pixels", "max_pixels") ||
        set_pixels(t, image, "min_pixels", "min_pixels") || set_pixels(t, image, "max_pixels", "max_pixels") ||
        set_pixels(t, video, "min_pixels", "video_min_pixels") || set_pixels(t, video, "max_pixels", "video_max_pixels") ||
        set_pixels(t, t->json, "min_pixels", "min_pixels") || set_pixels(t, t->json, "max_pixels", "max_pixels"))
        return -1;
    int rc = qvl_options_set_i64(t->options, "max_image_pixels", (int64_t)c->max_image_pixels);
    if (!rc) rc = qvl_options_set_i64(t->options, "max_image_bytes", (int64_t)c->max_image_bytes);
    return rc ? task_fail_qvl(t, rc, NULL) : 0;
}

/* ---- messages ---- */
typedef struct {
    task *t;
    qvl_media *media;
    unsigned images, frames;
    size_t message, part;
} reader;

static int bad_part(reader *r, const char *what) {
    char param[64];
    snprintf(param, sizeof param, "messages[%zu].content[%zu]", r->message, r->part);
    return bad(r->t, param, what);
}

static int add_fetched(reader *r, const char *url) {
    const config *c = r->t->server->config;
    fetch_policy policy = {.allow = c->fetch_allow, .allow_count = c->fetch_allow_count, .max_bytes = c->fetch_max_bytes, .timeout_ms = c->fetch_timeout_ms};
    void *data = NULL;
    size_t size = 0;
    char err[512];
    if (fetch_url(&policy, url, &data, &size, err, sizeof err)) return bad_part(r, err);
    qvl_image *im = NULL;
    int rc = qvl_image_from_bytes(&im, data, size, r->t->options);
    free(data);
    if (!rc) rc = qvl_media_add_image(r->media, im);
    qvl_image_free(im);
    return rc ? task_fail_qvl(r->t, rc, "messages") : 0;
}

/* An image part's URL: data stays in the message; handles and fetched images go to media, and the part is emptied. */
static int read_image(reader *r, json_t *part) {
    json_t *holder = get(part, "image_url") ? get(part, "image_url") : get(part, "image");
    json_t *url = json_is_object(holder) ? get(holder, "url") : holder;
    json_t *detail = json_is_object(holder) ? get(holder, "detail") : get(part, "detail");
    if (++r->images > r->t->server->config->max_images)
        return task_fail(r->t, 400, BAD, "messages", "too_many_images", "more than %u images in one request (limits.max_images)", r->t->server->config->max_images);
    if (!json_is_string(url)) return bad_part(r, "an image needs image_url: {\"url\": \"data:image/...;base64,...\"}");
    const char *s = json_string_value(url);
    if (detail && (!json_is_string(detail) || (strcmp(json_string_value(detail), "low") != 0 && strcmp(json_string_value(detail), "high") != 0 &&
                                                strcmp(json_string_value(detail), "auto") != 0)))
        return bad_part(r, "detail is auto, low or high");
    bool low = detail && strcmp(json_string_value(detail), "low") == 0;
    if (low && !get(part, "max_pixels")) {
        json_object_set_new(part, "max_pixels", json_integer(LOW_DETAIL_PIXELS));
        if (!get(part, "min_pixels")) json_object_set_new(part, "min_pixels", json_integer(1024)); /* below the model's own */
    }
    if (strncasecmp(s, "data:", 5) == 0) return json_object_set_new(part, "type", json_string("image_url"));
    int rc = 0;
    if (strncmp(s, "img-", 4) == 0) {
        rc = images_use(r->t->server, s, r->media);
        if (rc == 1) return bad_part(r, "there is no image of this id: it was never kept, or has been forgotten");
        if (rc) return task_fail_qvl(r->t, rc, "messages");
    } else if (strncasecmp(s, "http://", 7) == 0 || strncasecmp(s, "https://", 8) == 0) {
        rc = add_fetched(r, s);
    } else {
        return bad_part(r, "an image's URL is data:image/...;base64,..., an id of POST /v1/images, or http(s) where the server allows it");
    }
    if (rc) return rc;
    json_object_del(part, "image_url");
    json_object_del(part, "image");
    return json_object_set_new(part, "type", json_string("image"));
}

static int read_part(reader *r, json_t *part) {
    const char *type = json_string_value(get(part, "type"));
    if (!json_is_object(part) || !type) return bad_part(r, "a part is an object with a type: text, image_url or video");
    if (strcmp(type, "text") == 0) return json_is_string(get(part, "text")) ? 0 : bad_part(r, "a text part needs text");
    if (strcmp(type, "image_url") == 0 || strcmp(type, "image") == 0) return read_image(r, part);
    if (strcmp(type, "video") == 0) {
        r->frames += (unsigned)json_array_size(get(part, "video"));
        if (r->frames > r->t->server->config->max_frames)
            return task_fail(r->t, 400, BAD, "messages", "too_many_frames", "more than %u video frames in one request (limits.max_frames)", r->t->server->config->max_frames);
        if (!json_is_array(get(part, "video"))) return bad_part(r, "a video is a list of frames, data URIs, and fps");
        return 0;
    }
    if (strcmp(type, "video_url") == 0)
        return bad_part(r, "video files are not read yet; send frames: {\"type\": \"video\", \"video\": [\"data:image/jpeg;base64,...\", ...], \"fps\": 2}");
    return bad_part(r, "the type is not one of text, image_url and video");
}

static int read_messages(reader *r, json_t *messages) {
    task *t = r->t;
    json_t *m, *part;
    if (!json_is_array(messages) || json_array_size(messages) == 0) return bad(t, "messages", "a list of at least one message is needed");
    json_array_foreach(messages, r->message, m) {
        char param[64];
        snprintf(param, sizeof param, "messages[%zu]", r->message);
        const char *role = json_string_value(get(m, "role"));
        if (!json_is_object(m) || !role) return bad(t, param, "a message is an object with role and content");
        static const char *const roles[] = {"system", "developer", "user", "assistant", "tool"};
        bool known_role = false; /* the chat templates leave out a message of another role without a word */
        for (size_t i = 0; i < sizeof roles / sizeof *roles; i++) known_role = known_role || strcmp(role, roles[i]) == 0;
        if (!known_role) return bad(t, param, "the role is one of system, developer, user, assistant and tool");
        if (strcmp(role, "developer") == 0) json_object_set_new(m, "role", json_string("system"));
        json_t *thought = get(m, "reasoning"), *content = get(m, "content");
        if (thought && !get(m, "reasoning_content")) json_object_set(m, "reasoning_content", thought); /* the template's name */
        if (!json_is_array(content)) continue;
        json_array_foreach(content, r->part, part)
            if (read_part(r, part)) return -1;
    }
    return 0;
}

static int read_tools(task *t) {
    const json_t *tools = get(t->json, "tools"), *wish = get(t->json, "tool_choice"), *part;
    if (tools && !json_is_array(tools)) return bad(t, "tools", "a list is needed");
    if (wish && !json_is_string(wish))
        return bad(t, "tool_choice", "a named tool needs guided decoding, which is not served yet; use auto or none");
    const char *word = wish ? json_string_value(wish) : "auto";
    if (strcmp(word, "none") == 0) return 0;
    if (strcmp(word, "auto") != 0) return bad(t, "tool_choice", "auto or none; required needs guided decoding, which is not served yet");
    size_t i;
    json_array_foreach(tools, i, part) {
        const json_t *f = get(part, "function");
        if (!json_is_string(get(f, "name"))) return bad(t, "tools", "each tool is {\"type\": \"function\", \"function\": {\"name\", ...}}");
    }
    if (json_array_size(tools) == 0) return 0;
    t->tools_json = json_dumps(tools, JSON_COMPACT);
    t->tools = true;
    if (!t->tools_json) task_out_of_memory(t);
    return t->tools_json ? 0 : -1;
}

static int read_template_options(task *t) {
    const json_t *k = get(t->json, "chat_template_kwargs");
    if (k && !json_is_object(k)) return bad(t, "chat_template_kwargs", "an object is needed");
    const char *name;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)k, name, v) {
        if (strcmp(name, "add_vision_id") == 0 || strcmp(name, "add_generation_prompt") == 0) {
            if (set_option(t, name, name, BOOLEAN, v)) return -1;
        } else {
            log_event(LOG_INFO, "unknown_field", t->request_id, LOG_STR("field", name), LOG_STR("route", "chat_template_kwargs"));
        }
    }
    bool on = true;
    if (get_bool(t, t->json, "add_generation_prompt", &on)) return -1;
    return on ? 0 : set_option(t, "add_generation_prompt", "add_generation_prompt", BOOLEAN, json_false());
}

/* What its pixels take until an engine has encoded them: patches of 3 x 16 x 16 x 2 bytes and four of them a token. */
static uint64_t prompt_bytes(const qvl_prompt *p) {
    size_t n = 0;
    qvl_prompt_tokens(p, NULL, &n);
    return (uint64_t)n * 4 * 16 * 16 * 3;
}

static int make_chat_prompt(task *t) {
    reader r = {.t = t};
    int rc = qvl_media_new(&r.media);
    if (rc) return task_fail_qvl(t, rc, NULL);
    json_t *messages = get(t->json, "messages");
    char *text = NULL;
    rc = read_pixels(t) || read_template_options(t) || read_tools(t) || read_messages(&r, messages) ? -1 : 0;
    if (!rc && !(text = json_dumps(messages, JSON_COMPACT))) {
        task_out_of_memory(t);
        rc = -1;
    }
    if (!rc) {
        log_prompt("prompt", t->request_id, text, strlen(text));
        json_object_del(t->json, "messages"); /* images as text: of no more use */
        rc = qvl_prompt_new(&t->prompt, model_weights(t->model), text, t->tools_json, r.media, t->options);
        if (rc) task_fail_qvl(t, rc, "messages");
    }
    free(text);
    qvl_media_free(r.media);
    if (rc) return -1;
    const char *rendered = qvl_prompt_text(t->prompt);
    size_t n = strlen(rendered);
    t->opened = n >= 8 && strcmp(rendered + n - 8, "<think>\n") == 0; /* Thinking templates begin the answer's thought */
    t->held_after = prompt_bytes(t->prompt);
    return 0;
}

/* ---- what both kinds of answers share ---- */
static int read_answer(task *t) {
    const config *c = t->server->config;
    const json_t *so = get(t->json, "stream_options"), *rf = get(t->json, "response_format");
    if (read_fields(t) || get_bool(t, t->json, "stream", &t->stream)) return -1;
    t->include_reasoning = true;
    if (get_bool(t, t->json, "include_reasoning", &t->include_reasoning)) return -1;
    if (so && !json_is_object(so)) return bad(t, "stream_options", "an object is needed");
    if (so && !t->stream && !t->sink->chunks) return bad(t, "stream_options", "only with stream: true");
    if (get_bool(t, so, "include_usage", &t->include_usage) || get_bool(t, so, "continuous_usage_stats", &t->continuous_usage)) return -1;
    if (t->sink->chunks) t->include_usage = true; /* the answer's last message tells it */
    if (rf) {
        const char *type = json_string_value(get(rf, "type"));
        if (!type || strcmp(type, "text") != 0)
            return bad(t, "response_format", "only {\"type\": \"text\"}: JSON schemas need guided decoding, which is not served yet; ask for JSON in words");
    }
    int64_t best = 1, n = 1;
    if (get_int(t, t->json, "best_of", 1, 64, &best) || get_int(t, t->json, "n", 1, 64, &n)) return -1;
    if (best > n) return bad(t, "best_of", "is not served; use n");
    t->n = (int)n;
    int64_t deadline = c->deadline_ms;
    if (get_int(t, t->json, "deadline_ms", 1, 86400000, &deadline)) return -1;
    if (c->deadline_ms && deadline > c->deadline_ms) deadline = c->deadline_ms;
    int rc = deadline ? qvl_options_set_i64(t->options, "deadline_ms", deadline) : 0;
    return rc ? task_fail_qvl(t, rc, "deadline_ms") : 0;
}

/* max_tokens as asked, or what the context leaves. */
static int read_max_tokens(task *t, int64_t dflt) {
    const config *c = t->server->config;
    int64_t want = 0, other = 0;
    if (get_int(t, t->json, "max_tokens", 1, 1 << 20, &want) || get_int(t, t->json, "max_completion_tokens", 1, 1 << 20, &other)) return -1;
    if (other) want = other;
    const int32_t *ids;
    size_t n = 0;
    qvl_prompt_tokens(t->prompt, &ids, &n);
    int64_t room = (int64_t)model_max_context(t->model) - (int64_t)n;
    if (room < 1)
        return task_fail(t, 400, BAD, t->chat ? "messages" : "prompt", "context_length_exceeded",
                         "the prompt has %zu tokens; this model's context is %d and must leave room for an answer", n, model_max_context(t->model));
    if (!want) want = dflt && dflt < room ? dflt : room;
    if (c->max_tokens && want > c->max_tokens) {
        if (get(t->json, "max_tokens") || other)
            return task_fail(t, 400, BAD, "max_tokens", NULL, "max_tokens: %lld is more than this server's limit of %u (limits.max_tokens)", (long long)want, c->max_tokens);
        want = c->max_tokens;
    }
    if (want > room)
        return task_fail(t, 400, BAD, "max_tokens", "context_length_exceeded", "prompt of %zu tokens and max_tokens %lld are more than this model's context of %d; "
                         "shorten the prompt or lower max_tokens", n, (long long)want, model_max_context(t->model));
    t->prompt_tokens = (long)n;
    t->max_tokens = (int)want;
    int rc = qvl_options_set_i64(t->options, "max_tokens", want);
    return rc ? task_fail_qvl(t, rc, "max_tokens") : 0;
}

static int read_chat(task *t) {
    int rc = open_body(t);
    if (rc) return rc;
    t->chat = true;
    id_new(t->id, "chatcmpl-");
    if (read_answer(t)) return -1;
    int64_t top = 0;
    if (get_bool(t, t->json, "logprobs", &t->want_logprobs) || get_int(t, t->json, "top_logprobs", 0, 64, &top)) return -1;
    if (top && !t->want_logprobs) return bad(t, "top_logprobs", "only with logprobs: true");
    t->top_logprobs = (int)top;
    rc = t->want_logprobs ? qvl_options_set_i64(t->options, "logprobs", top) : 0;
    if (rc) return task_fail_qvl(t, rc, "top_logprobs");
    if (make_chat_prompt(t) || read_max_tokens(t, t->server->config->default_max_tokens)) return -1;
    return 0;
}

void openai_chat(task *t) {
    if (read_chat(t) == 0) t->generate = true;
}

void openai_plan(task *t) {
    if (read_chat(t)) return;
    char *json = NULL;
    int rc = qvl_engine_check(model_engine(t->model), t->prompt, t->options, &json);
    bool fits = rc != QVL_ECONTEXT;
    if (rc && fits) {
        task_fail_qvl(t, rc, NULL);
        return;
    }
    buf_puts(&t->reply, "{\"object\":\"chat.completion.plan\",\"model\":");
    buf_json(&t->reply, t->model_name, strlen(t->model_name));
    if (fits) buf_printf(&t->reply, ",\"fits\":true,%s", json + 1);
    else {
        size_t n = 0;
        qvl_prompt_tokens(t->prompt, NULL, &n);
        buf_printf(&t->reply, ",\"fits\":false,\"prompt_tokens\":%zu,\"images\":[],\"max_tokens\":%d,\"max_context\":%d,\"reason\":", n, t->max_tokens,
                   model_max_context(t->model));
        buf_json(&t->reply, qvl_last_error(), strlen(qvl_last_error()));
        buf_puts(&t->reply, "}");
    }
    qvl_free(json);
}

/* ---- /v1/completions ---- */
static int tokens_prompt(task *t, const json_t *list) {
    size_t n = json_array_size(list), i;
    int32_t *ids = calloc(n ? n : 1, sizeof *ids);
    const json_t *v;
    if (!ids) {
        task_out_of_memory(t);
        return -1;
    }
    json_array_foreach(list, i, v) {
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX) {
            free(ids);
            return bad(t, "prompt", "a list of token ids holds integers from 0 on");
        }
        ids[i] = (int32_t)json_integer_value(v);
    }
    int rc = qvl_prompt_from_tokens(&t->prompt, model_weights(t->model), ids, n);
    if (!rc && t->echo) {
        size_t len;
        char *text = NULL;
        rc = qvl_detokenize(qvl_model_tokenizer(model_weights(t->model)), ids, n, 0, &text, &len);
        t->prefix = text ? strdup(text) : NULL;
        qvl_free(text);
    }
    free(ids);
    return rc ? task_fail_qvl(t, rc, "prompt") : 0;
}

static int text_prompt(task *t, const char *text, size_t len) {
    int32_t *ids = NULL;
    size_t n = 0;
    int rc = qvl_tokenize(qvl_model_tokenizer(model_weights(t->model)), text, len, 0, &ids, &n);
    if (!rc) rc = qvl_prompt_from_tokens(&t->prompt, model_weights(t->model), ids, n);
    qvl_free(ids);
    if (rc) return task_fail_qvl(t, rc, "prompt");
    log_prompt("prompt", t->request_id, text, len);
    if (t->echo && !(t->prefix = strdup(text))) {
        task_out_of_memory(t);
        return -1;
    }
    return 0;
}

void openai_completion(task *t) {
    if (open_body(t)) return;
    id_new(t->id, "cmpl-");
    int64_t top = -1;
    if (read_answer(t) || get_bool(t, t->json, "echo", &t->echo) || get_int(t, t->json, "logprobs", 0, 64, &top)) return;
    if (top >= 0) {
        t->want_logprobs = true;
        t->top_logprobs = (int)top;
        int rc = qvl_options_set_i64(t->options, "logprobs", top);
        if (rc) {
            task_fail_qvl(t, rc, "logprobs");
            return;
        }
    }
    const json_t *p = get(t->json, "prompt");
    if (json_is_array(p) && json_array_size(p) == 1 && !json_is_integer(json_array_get(p, 0))) p = json_array_get(p, 0);
    if (json_is_array(p) && json_array_size(p) && (json_is_string(json_array_get(p, 0)) || json_is_array(json_array_get(p, 0)))) {
        bad(t, "prompt", "several prompts in one request are not served; send one request for each (they run together)");
        return;
    }
    if (json_is_string(p) && json_string_length(p)) {
        if (text_prompt(t, json_string_value(p), json_string_length(p))) return;
    } else if (json_is_array(p) && json_array_size(p)) {
        if (tokens_prompt(t, p)) return;
    } else {
        bad(t, "prompt", "a text or a list of token ids is needed, not empty");
        return;
    }
    if (read_max_tokens(t, 16)) return; /* OpenAI's default of this route */
    t->generate = true;
}

/* ---- tokens ---- */
void openai_tokenize(task *t) {
    if (open_body(t)) return;
    const json_t *p = get(t->json, "prompt"), *m = get(t->json, "messages");
    bool special = false, strings = false;
    if (get_bool(t, t->json, "parse_special", &special) || get_bool(t, t->json, "return_token_strs", &strings)) return;
    const qvl_tokenizer *tok = qvl_model_tokenizer(model_weights(t->model));
    int32_t *made = NULL;
    const int32_t *ids = NULL;
    size_t n = 0;
    if (json_is_string(p)) {
        int rc = qvl_tokenize(tok, json_string_value(p), json_string_length(p), special, &made, &n);
        if (rc) {
            task_fail_qvl(t, rc, "prompt");
            return;
        }
        ids = made;
    } else if (m) {
        if (make_chat_prompt(t)) return;
        qvl_prompt_tokens(t->prompt, &ids, &n);
    } else {
        bad(t, "prompt", "prompt (a text) or messages is needed");
        return;
    }
    buf_printf(&t->reply, "{\"count\":%zu,\"max_model_len\":%d,\"tokens\":[", n, model_max_context(t->model));
    for (size_t i = 0; i < n; i++) buf_printf(&t->reply, "%s%d", i ? "," : "", ids[i]);
    buf_puts(&t->reply, "],\"token_strs\":");
    if (!strings) buf_puts(&t->reply, "null");
    for (size_t i = 0; strings && i < n; i++) {
        char *text = NULL;
        size_t len = 0;
        if (qvl_detokenize(tok, &ids[i], 1, 0, &text, &len)) len = 0;
        buf_puts(&t->reply, i ? "," : "[");
        buf_json(&t->reply, text ? text : "", len);
        qvl_free(text);
    }
    buf_puts(&t->reply, strings ? (n ? "]}" : "[]}") : "}");
    qvl_free(made);
}

void openai_detokenize(task *t) {
    if (open_body(t)) return;
    const json_t *list = get(t->json, "tokens"), *v;
    bool skip = false;
    if (get_bool(t, t->json, "skip_special_tokens", &skip)) return;
    if (!json_is_array(list)) {
        bad(t, "tokens", "a list of token ids is needed");
        return;
    }
    size_t n = json_array_size(list), i, len = 0;
    int32_t *ids = calloc(n ? n : 1, sizeof *ids);
    char *text = NULL;
    if (!ids) {
        task_out_of_memory(t);
        return;
    }
    json_array_foreach(list, i, v) {
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX) {
            bad(t, "tokens", "token ids are integers from 0 on");
            free(ids);
            return;
        }
        ids[i] = (int32_t)json_integer_value(v);
    }
    int rc = qvl_detokenize(qvl_model_tokenizer(model_weights(t->model)), ids, n, skip, &text, &len);
    free(ids);
    if (rc) {
        task_fail_qvl(t, rc, "tokens");
        return;
    }
    buf_puts(&t->reply, "{\"prompt\":");
    buf_json(&t->reply, text, len);
    buf_puts(&t->reply, "}");
    qvl_free(text);
}

/* ---- /v1/images ---- */

/* The image behind a data URI or a URL that may be fetched. */
static int image_of_url(task *t, const char *url, qvl_image **im, size_t *bytes) {
    const config *c = t->server->config;
    if (strncasecmp(url, "data:", 5) == 0) {
        *bytes = strlen(url);
        int rc = qvl_image_from_data_uri(im, url, strlen(url), t->options);
        return rc ? task_fail_qvl(t, rc, "url") : 0;
    }
    fetch_policy policy = {.allow = c->fetch_allow, .allow_count = c->fetch_allow_count, .max_bytes = c->fetch_max_bytes, .timeout_ms = c->fetch_timeout_ms};
    void *data = NULL;
    char err[512];
    if (fetch_url(&policy, url, &data, bytes, err, sizeof err)) return bad(t, "url", err);
    int rc = qvl_image_from_bytes(im, data, *bytes, t->options);
    free(data);
    return rc ? task_fail_qvl(t, rc, "url") : 0;
}

void openai_image(task *t) {
    qvl_image *im = NULL;
    size_t bytes = t->body.len;
    int rc = qvl_options_new(&t->options);
    if (!rc) rc = qvl_options_set_i64(t->options, "max_image_pixels", (int64_t)t->server->config->max_image_pixels);
    if (!rc) rc = qvl_options_set_i64(t->options, "max_image_bytes", (int64_t)t->server->config->max_image_bytes);
    if (rc) {
        task_fail_qvl(t, rc, NULL);
        return;
    }
    if (strncasecmp(t->content_type, "application/json", 16) == 0) {
        json_error_t je;
        t->json = json_loadb(t->body.data ? t->body.data : "", t->body.len, 0, &je);
        const char *url = json_string_value(get(t->json, "url"));
        if (!t->json) {
            task_fail(t, 400, BAD, NULL, "invalid_json", "the body is not JSON: %s (line %d)", je.text, je.line);
            return;
        }
        if (!url) {
            bad(t, "url", "a data URI is needed, or send the image's bytes with content-type: image/...");
            return;
        }
        if (image_of_url(t, url, &im, &bytes)) return;
    } else {
        rc = qvl_image_from_bytes(&im, t->body.data ? t->body.data : "", t->body.len, t->options);
        if (rc) {
            task_fail_qvl(t, rc, NULL);
            return;
        }
    }
    rc = images_keep(t->server, im, bytes, &t->reply);
    if (rc > 0) task_fail(t, 400, BAD, NULL, "image_too_large", "decoded, the image is larger than the store (images.store)");
    else if (rc) task_out_of_memory(t);
}
