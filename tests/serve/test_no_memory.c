/* Every single allocation of the server's modules made to fail in turn: no crash, no leak (AddressSanitizer), an error
 * where one is promised. The Makefile links this program with --wrap for malloc and its kin. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <unistd.h>

#include "../../qvl-serve/auth.h"
#include "../../qvl-serve/log.h"
#include "../../qvl-serve/meters.h"
#include "../../qvl-serve/toolcall.h"

static long until = -1; /* allocations before the one that fails; -1: none does */
static bool hit;

static bool fails(void) {
    if (until < 0 || until--) return false;
    return hit = true;
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t count, size_t n);
void *__real_realloc(void *p, size_t n);
char *__real_strdup(const char *s);
char *__real_strndup(const char *s, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t count, size_t n);
void *__wrap_realloc(void *p, size_t n);
char *__wrap_strdup(const char *s);
char *__wrap_strndup(const char *s, size_t n);

void *__wrap_malloc(size_t n) {
    return fails() ? NULL : __real_malloc(n);
}
void *__wrap_calloc(size_t count, size_t n) {
    return fails() ? NULL : __real_calloc(count, n);
}
void *__wrap_realloc(void *p, size_t n) {
    return fails() ? NULL : __real_realloc(p, n);
}
char *__wrap_strdup(const char *s) {
    return fails() ? NULL : __real_strdup(s);
}
char *__wrap_strndup(const char *s, size_t n) {
    return fails() ? NULL : __real_strndup(s, n);
}

/* Runs work with the first, second, ... allocation failing, until none is left to fail. Returns how many there were. */
static long each_in_turn(void (*work)(bool failing)) {
    for (long i = 0;; i++) {
        until = i;
        hit = false;
        work(true);
        until = -1;
        if (!hit) return i;
    }
}

#define LONG "0123456789012345678901234567890123456789012345678901234567890123456789"

static void parse_calls(bool failing) {
    static const char text[] = "Hi <tool_call>{\"arguments\": {\"a\": \"" LONG "\"}, \"name\": \"" LONG "\"}</tool_call>"
                               "<tool_call>{\"name\": \"g\", \"arguments\": \"{}\"}</tool_call>";
    toolcall_result r = {0};
    int rc = -1;
    toolcall *t = toolcall_new(toolcall_collect, &r);
    if (t) {
        rc = 0;
        for (const char *s = text; *s && !rc; s++) rc = toolcall_feed(t, s, 1);
        if (!rc) rc = toolcall_finish(t);
    }
    bool told = rc < 0 || r.failed;
    if (!failing) assert_false(told);
    else if (!told) assert_int_equal(json_array_size(r.calls), 2);
    if (!told) assert_string_equal(r.content.data, "Hi");
    toolcall_free(t);
    toolcall_result_free(&r);
}

static void measure(bool failing) {
    meters *m = meters_new("1");
    if (!m) {
        assert_true(failing);
        return;
    }
    meters_model *mm = meters_of_model(m, "a");
    meters_model_state(mm, METERS_READY);
    meters_finished(mm, &(meters_request){.finish_reason = "stop", .e2e_s = 1});
    meters_inter_token(mm, 1);
    meters_refused(m, "rate");
    meters_http(m, "GET", "/", 200, 1);
    meters_connection(m, "ws", 1);
    meters_cache(m, "image", "disk", 1);
    buf b = {0};
    int rc = meters_write(m, &b);
    if (!failing) assert_int_equal(rc, 0);
    buf_free(&b);
    meters_free(m);
}

static char keys[] = "/tmp/qvl-test-keys-XXXXXX";

static void check_keys(bool failing) {
    auth *a;
    char err[256] = "";
    if (auth_load(&a, keys, err, sizeof err) < 0) {
        assert_true(failing);
        assert_non_null(strstr(err, "memory"));
        return;
    }
    if (auth_reload(a, keys, err, sizeof err) < 0) assert_true(failing);
    assert_int_equal(auth_count(a), 1); /* a reload that failed changed nothing */
    auth_free(a);
}

static void write_lines(bool failing) {
    (void)failing;
    log_event(LOG_ERROR, "event", "request", LOG_STR("key", LONG));
    log_reopen();
}

static void tool_calls(void **state) {
    (void)state;
    parse_calls(false);
    assert_true(each_in_turn(parse_calls) > 10);
}

static void metrics_of_the_server(void **state) {
    (void)state;
    measure(false);
    assert_true(each_in_turn(measure) > 200);
}

static void keys_of_clients(void **state) {
    (void)state;
    check_keys(false);
    assert_true(each_in_turn(check_keys) >= 3);
}

static void log_lines(void **state) {
    (void)state;
    assert_int_equal(log_open(&(log_options){.path = "/dev/null"}), 0);
    assert_true(each_in_turn(write_lines) >= 3);
    log_open(&(log_options){.path = NULL, .level = LOG_INFO});
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tool_calls),
        cmocka_unit_test(metrics_of_the_server),
        cmocka_unit_test(keys_of_clients),
        cmocka_unit_test(log_lines),
    };
    int fd = mkstemp(keys);
    if (fd < 0) return 2;
    const char *line = "a sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad rate=3\n";
    if (write(fd, line, strlen(line)) < 0) return 2;
    close(fd);
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(keys);
    return rc;
}
