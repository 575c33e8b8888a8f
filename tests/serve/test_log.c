/* The log: every line is JSON whatever goes in, one write each, levels, cuts, reopening, prompts only when asked for. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <pthread.h>
#include <unistd.h>

#include "../../qvl-serve/log.h"

static char folder[] = "/tmp/qvl-test-log-XXXXXX", path[64], moved[64];

static void open_log(log_level level, double slow_ms, bool access, bool prompts) {
    unlink(path);
    assert_int_equal(log_open(&(log_options){.path = path, .level = level, .slow_ms = slow_ms, .access = access, .prompts = prompts}), 0);
}

/* The log's lines, each parsed; strict: no duplicate keys, valid UTF-8. */
static json_t *lines(const char *file) {
    FILE *f = fopen(file, "r");
    assert_non_null(f);
    json_t *all = json_array();
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    while ((n = getline(&line, &cap, f)) > 0) {
        json_error_t e;
        assert_int_equal(line[n - 1], '\n');
        json_t *v = json_loadb(line, (size_t)n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &e);
        if (!v) fail_msg("%s in %s", e.text, line);
        json_array_append_new(all, v);
    }
    free(line);
    fclose(f);
    return all;
}

static const char *text(const json_t *all, size_t i, const char *key) {
    return json_string_value(json_object_get(json_array_get(all, i), key));
}

static void a_line_has_time_level_event_and_fields(void **state) {
    (void)state;
    open_log(LOG_DEBUG, 0, true, false);
    log_event(LOG_INFO, "listening", NULL, LOG_STR("host", "127.0.0.1"), LOG_NUM("port", 8080), LOG_MS("ms", 1.23456), LOG_FLAG("tls", 0));
    log_event(LOG_ERROR, "bad", "req-1", LOG_STR("why", NULL), LOG_MS("nan", NAN), LOG_MS("inf", INFINITY), LOG_NUM("least", INT64_MIN));
    log_event(LOG_WARN, "bare", NULL);
    json_t *all = lines(path);
    assert_int_equal(json_array_size(all), 3);
    const char *time = text(all, 0, "time");
    int y, mo, d, h, mi, s, ms, used = 0;
    assert_int_equal(sscanf(time, "%4d-%2d-%2dT%2d:%2d:%2d.%3dZ%n", &y, &mo, &d, &h, &mi, &s, &ms, &used), 7);
    assert_int_equal(used, 24);
    assert_int_equal(strlen(time), 24);
    assert_in_range(y, 2024, 9999);
    assert_string_equal(text(all, 0, "level"), "info");
    assert_string_equal(text(all, 0, "event"), "listening");
    assert_null(json_object_get(json_array_get(all, 0), "request"));
    assert_int_equal(json_integer_value(json_object_get(json_array_get(all, 0), "port")), 8080);
    assert_true(json_real_value(json_object_get(json_array_get(all, 0), "ms")) == 1.235);
    assert_true(json_is_false(json_object_get(json_array_get(all, 0), "tls")));
    assert_string_equal(text(all, 1, "request"), "req-1");
    assert_true(json_is_null(json_object_get(json_array_get(all, 1), "why")));
    assert_true(json_is_null(json_object_get(json_array_get(all, 1), "nan")));
    assert_true(json_is_null(json_object_get(json_array_get(all, 1), "inf")));
    assert_true(json_integer_value(json_object_get(json_array_get(all, 1), "least")) == INT64_MIN);
    json_decref(all);
}

static void any_bytes_give_valid_json(void **state) {
    (void)state;
    open_log(LOG_DEBUG, 0, true, false);
    static const char hostile[] = "\"},\n{\"level\":\"error\\ \r\t\b\f\x01\x1b[31m\x7f";
    log_event(LOG_INFO, "a", hostile, LOG_STR("v", hostile), LOG_STRN("zero", "a\0b", 3));
    static const char *const broken[] = {"\xff", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe4\xbd", "a\x80z", "\xf0\x9f\x98"};
    for (size_t i = 0; i < sizeof broken / sizeof broken[0]; i++) log_event(LOG_INFO, broken[i], NULL, LOG_STR("v", broken[i]));
    uint64_t seed = 3;
    for (int i = 0; i < 200; i++) {
        char noise[64];
        for (size_t k = 0; k < sizeof noise; k++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            noise[k] = (char)(seed >> 40);
        }
        log_event(LOG_INFO, "noise", NULL, LOG_STRN("v", noise, sizeof noise));
    }
    log_event(LOG_INFO, "good", NULL, LOG_STR("v", "é 图 😀"));
    json_t *all = lines(path);
    assert_int_equal(json_array_size(all), 1 + 7 + 200 + 1);
    assert_string_equal(text(all, 0, "v"), hostile);
    assert_string_equal(text(all, 0, "request"), hostile);
    assert_int_equal(json_string_length(json_object_get(json_array_get(all, 0), "zero")), 3);
    assert_string_equal(text(all, 1, "v"), "\xEF\xBF\xBD");
    assert_string_equal(text(all, 6, "v"), "a\xEF\xBF\xBDz");
    assert_string_equal(text(all, 208, "v"), "é 图 😀");
    json_decref(all);
}

static void long_values_are_cut_with_a_mark(void **state) {
    (void)state;
    open_log(LOG_DEBUG, 0, true, false);
    char *s = malloc(100001);
    memset(s, 'x', 100000);
    s[100000] = 0;
    log_event(LOG_INFO, "x", NULL, LOG_STRN("v", s, LOG_VALUE), LOG_STR("w", s));
    for (int i = 0; i + 2 < 100000; i += 3) memcpy(s + i, "图", 3);
    log_event(LOG_INFO, "x", NULL, LOG_STR("v", s));
    memset(s, 0x80, 100000); /* no character to cut between */
    log_event(LOG_INFO, "x", NULL, LOG_STR("v", s));
    free(s);
    json_t *all = lines(path);
    assert_int_equal(strlen(text(all, 0, "v")), LOG_VALUE);
    assert_string_equal(text(all, 0, "w") + LOG_VALUE, "... (97952 bytes more)");
    assert_string_equal(text(all, 1, "v") + LOG_VALUE - LOG_VALUE % 3, "... (97954 bytes more)");
    assert_null(strstr(text(all, 1, "v"), "\xEF\xBF\xBD"));
    assert_true(strlen(text(all, 2, "v")) < 4 * LOG_VALUE);
    json_decref(all);
}

static void levels(void **state) {
    (void)state;
    open_log(LOG_WARN, 0, true, false);
    log_event(LOG_DEBUG, "no", NULL);
    log_event(LOG_INFO, "no", NULL);
    log_event(LOG_WARN, "yes", NULL);
    log_event(LOG_ERROR, "yes", NULL);
    log_access(&(log_request){.method = "GET", .status = 200, .total_ms = 1});
    assert_false(log_wanted(LOG_INFO));
    json_t *all = lines(path);
    assert_int_equal(json_array_size(all), 2);
    assert_string_equal(text(all, 0, "event"), "yes");
    json_decref(all);
    log_level l;
    assert_int_equal(log_level_parse(&l, "debug"), 0);
    assert_int_equal(l, LOG_DEBUG);
    assert_int_equal(log_level_parse(&l, "warning"), 0);
    assert_int_equal(l, LOG_WARN);
    assert_int_equal(log_level_parse(&l, "loud"), -1);
}

static void access_and_slow_lines(void **state) {
    (void)state;
    open_log(LOG_INFO, 100, true, false);
    log_request r = {.request = "r1", .peer = "127.0.0.1", .method = "POST", .path = "/v1/chat/completions", .key = "alice", .model = "qwen",
                     .finish_reason = "stop", .status = 200, .bytes_in = 10, .bytes_out = 20, .total_ms = 50, .queue_ms = 0, .ttft_ms = NAN,
                     .vision_ms = -1, .prompt_tokens = 7, .cached_tokens = 0, .image_tokens = -1, .completion_tokens = 3};
    log_access(&r);
    r.total_ms = 100.5;
    log_access(&r);
    open_log(LOG_INFO, 100, false, false); /* access off: slow ones only */
    json_t *all;
    r.total_ms = 5;
    log_access(&r);
    r.total_ms = 500;
    log_access(&r);
    all = lines(path);
    assert_int_equal(json_array_size(all), 1);
    assert_string_equal(text(all, 0, "event"), "slow_request");
    assert_string_equal(text(all, 0, "level"), "warn");
    json_t *o = json_array_get(all, 0);
    assert_int_equal(json_integer_value(json_object_get(o, "status")), 200);
    assert_int_equal(json_integer_value(json_object_get(o, "prompt_tokens")), 7);
    assert_int_equal(json_integer_value(json_object_get(o, "cached_tokens")), 0);
    assert_true(json_real_value(json_object_get(o, "queue_ms")) == 0);
    assert_null(json_object_get(o, "ttft_ms"));
    assert_null(json_object_get(o, "vision_ms"));
    assert_null(json_object_get(o, "image_tokens"));
    assert_null(json_object_get(o, "agent"));
    assert_string_equal(text(all, 0, "key"), "alice");
    json_decref(all);
}

static void prompts_only_when_asked_for(void **state) {
    (void)state;
    open_log(LOG_DEBUG, 0, true, false);
    log_prompt("prompt", "r1", "secret words", 12);
    json_t *all = lines(path);
    assert_int_equal(json_array_size(all), 0);
    json_decref(all);
    open_log(LOG_DEBUG, 0, true, true);
    log_prompt("prompt", "r1", "secret words", 12);
    all = lines(path);
    assert_string_equal(text(all, 0, "text"), "secret words");
    json_decref(all);
}

static void reopening_after_rotation(void **state) {
    (void)state;
    open_log(LOG_INFO, 0, true, false);
    log_event(LOG_INFO, "one", NULL);
    assert_int_equal(rename(path, moved), 0);
    log_event(LOG_INFO, "two", NULL); /* still the moved file */
    assert_int_equal(log_reopen(), 0);
    log_event(LOG_INFO, "three", NULL);
    json_t *old = lines(moved), *new = lines(path);
    assert_int_equal(json_array_size(old), 2);
    assert_int_equal(json_array_size(new), 1);
    assert_string_equal(text(new, 0, "event"), "three");
    json_decref(old);
    json_decref(new);
    /* a path that cannot be opened leaves the log where it was */
    errno = 0;
    assert_int_equal(log_open(&(log_options){.path = "/nonexistent/log"}), -1);
    assert_int_equal(errno, ENOENT);
    log_event(LOG_INFO, "four", NULL);
    new = lines(path);
    assert_int_equal(json_array_size(new), 2);
    json_decref(new);
}

static void lost_lines_are_counted(void **state) {
    (void)state;
    assert_int_equal(log_open(&(log_options){.path = "/dev/full", .level = LOG_INFO}), 0);
    errno = EPERM;
    for (int i = 0; i < 3; i++) log_event(LOG_INFO, "gone", NULL);
    assert_int_equal(errno, EPERM);
    open_log(LOG_INFO, 0, true, false);
    log_event(LOG_INFO, "back", NULL);
    log_event(LOG_INFO, "more", NULL);
    json_t *all = lines(path);
    assert_int_equal(json_integer_value(json_object_get(json_array_get(all, 0), "lines_lost")), 3);
    assert_null(json_object_get(json_array_get(all, 1), "lines_lost"));
    json_decref(all);
}

static void *writer(void *who) {
    for (int i = 0; i < 500; i++) {
        char id[16];
        snprintf(id, sizeof id, "%d", i);
        log_event(LOG_INFO, who, id, LOG_STR("filler", "0123456789012345678901234567890123456789\n"));
        if (i % 50 == 0) log_reopen();
    }
    return NULL;
}

static void threads_do_not_mix_their_lines(void **state) {
    (void)state;
    open_log(LOG_INFO, 0, true, false);
    pthread_t t[4];
    static char names[4][2] = {"a", "b", "c", "d"};
    for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&t[i], NULL, writer, names[i]), 0);
    for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
    json_t *all = lines(path);
    assert_int_equal(json_array_size(all), 2000);
    json_decref(all);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_line_has_time_level_event_and_fields),
        cmocka_unit_test(any_bytes_give_valid_json),
        cmocka_unit_test(long_values_are_cut_with_a_mark),
        cmocka_unit_test(levels),
        cmocka_unit_test(access_and_slow_lines),
        cmocka_unit_test(prompts_only_when_asked_for),
        cmocka_unit_test(reopening_after_rotation),
        cmocka_unit_test(lost_lines_are_counted),
        cmocka_unit_test(threads_do_not_mix_their_lines),
    };
    if (!mkdtemp(folder)) return 2;
    snprintf(path, sizeof path, "%s/log", folder);
    snprintf(moved, sizeof moved, "%s/log.1", folder);
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    log_open(&(log_options){.path = NULL, .level = LOG_INFO});
    unlink(path);
    unlink(moved);
    rmdir(folder);
    return rc;
}
