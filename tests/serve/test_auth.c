/* API keys: the file's grammar, recognising keys, limits against a clock that the test turns, reload. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "../../qvl-serve/auth.h"
#include "../../qvl-serve/id.h"

static char path[] = "/tmp/qvl-test-keys-XXXXXX";

static void write_file(const char *text) {
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* sha256 of "abc" (FIPS 180-4) and of "" */
#define ABC "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
#define NOTHING "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855"

static auth *load(const char *text) {
    auth *a;
    char err[256] = "";
    write_file(text);
    if (auth_load(&a, path, err, sizeof err) < 0) fail_msg("%s", err);
    return a;
}

static void keys_are_recognised(void **state) {
    (void)state;
    auth *a = load("# staff\n\nalice " ABC " admin\n  bob\t" NOTHING " rate=2 # short\n");
    assert_int_equal(auth_count(a), 2);
    auth_key *k = auth_find(a, "abc", 3);
    assert_non_null(k);
    assert_string_equal(auth_key_name(k), "alice");
    assert_true(auth_key_admin(k));
    k = auth_find(a, "", 0);
    assert_string_equal(auth_key_name(k), "bob");
    assert_false(auth_key_admin(k));
    assert_null(auth_find(a, "abd", 3));
    assert_null(auth_find(a, "abc\n", 4));
    assert_null(auth_find(a, "abc", 2));
    auth_free(a);
    a = load(""); /* a file without keys is in order: nobody gets in */
    assert_null(auth_find(a, "", 0));
    auth_free(a);
}

static void new_keys_work_and_differ(void **state) {
    (void)state;
    char key[2][AUTH_KEY_SIZE], line[AUTH_LINE_SIZE], text[512] = "", err[256];
    for (int i = 0; i < 2; i++) {
        assert_int_equal(auth_new_key(i ? "second" : "first", key[i], line, err, sizeof err), 0);
        assert_int_equal(strlen(key[i]), 47);
        assert_int_equal(strspn(key[i], "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"), 47);
        assert_null(strstr(line, key[i]));
        strcat(text, line);
        strcat(text, " concurrent=1\n");
    }
    assert_string_not_equal(key[0], key[1]);
    auth *a = load(text);
    assert_string_equal(auth_key_name(auth_find(a, key[0], 47)), "first");
    assert_string_equal(auth_key_name(auth_find(a, key[1], 47)), "second");
    assert_null(auth_find(a, key[1], 46));
    auth_free(a);
    assert_int_equal(auth_new_key("two words", key[0], line, err, sizeof err), -1);
    assert_int_equal(auth_new_key("", key[0], line, err, sizeof err), -1);
    assert_non_null(strstr(err, "letters"));
}

static void bad_lines_are_named_by_number(void **state) {
    (void)state;
    static const struct {
        const char *text, *where, *what;
    } bad[] = {
        {"a " ABC "\nb\n", ":2: ", "no digest"},
        {"a secret-in-clear-text\n", ":1: ", "never the key itself"},
        {"a md5:00\n", ":1: ", "sha256"},
        {"a sha256:ba78\n", ":1: ", "64 hexadecimal"},
        {"a " ABC "00\n", ":1: ", "64 hexadecimal"},
        {"\n\na " ABC " rats=3\n", ":3: ", "unknown option \"rats\""},
        {"a " ABC " rate\n", ":1: ", "unknown option"},
        {"a " ABC " rate=\n", ":1: ", "rate needs"},
        {"a " ABC " rate=0\n", ":1: ", "rate needs"},
        {"a " ABC " rate=-1\n", ":1: ", "rate needs"},
        {"a " ABC " rate=nan\n", ":1: ", "rate needs"},
        {"a " ABC " rate=1e9\n", ":1: ", "at most 1000000"},
        {"a " ABC " concurrent=1.5\n", ":1: ", "whole number"},
        {"a " ABC " tokens=5x\n", ":1: ", "tokens needs"},
        {"a " ABC " rate=1 rate=2\n", ":1: ", "twice"},
        {"a " ABC " burst=2\n", ":1: ", "without rate"},
        {"a " ABC "\na " NOTHING "\n", ":2: ", "there twice"},
        {"a " ABC "\nb " ABC "\n", ":2: ", "same key as \"a\""},
        {"a/b " ABC "\n", ":1: ", "a name has"},
    };
    char err[256];
    auth *a;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        write_file(bad[i].text);
        assert_int_equal(auth_load(&a, path, err, sizeof err), -1);
        assert_null(a);
        if (!strstr(err, bad[i].where) || !strstr(err, bad[i].what)) fail_msg("%s gave: %s", bad[i].text, err);
        assert_null(strstr(err, "secret-in-clear-text"));
        assert_int_equal(strncmp(err, path, strlen(path)), 0);
    }
    assert_int_equal(auth_load(&a, "/nonexistent/keys", err, sizeof err), -1);
    assert_non_null(strstr(err, "/nonexistent/keys: No such file"));
}

static void a_file_of_noise_is_refused_or_read(void **state) {
    (void)state;
    for (int i = 0; i < 300; i++) {
        unsigned char noise[300];
        char err[256];
        auth *a = NULL;
        assert_int_equal(id_random(noise, sizeof noise), 0);
        FILE *f = fopen(path, "w");
        assert_non_null(f);
        fputs(i & 1 ? "name sha256:" : "x", f);
        fwrite(noise, 1, sizeof noise, f);
        fclose(f);
        assert_int_equal(auth_load(&a, path, err, sizeof err), -1);
        auth_free(a);
    }
}

static void the_rate_is_a_token_bucket(void **state) {
    (void)state;
    auth *a = load("a " ABC " rate=6 burst=2\n"); /* one in ten seconds, two at once */
    auth_key *k = auth_find(a, "abc", 3);
    int wait = -1;
    double now = 1000;
    assert_int_equal(auth_enter(k, now, &wait), AUTH_OK);
    assert_int_equal(wait, 0);
    assert_int_equal(auth_enter(k, now, &wait), AUTH_OK);
    assert_int_equal(auth_enter(k, now, &wait), AUTH_RATE);
    assert_int_equal(wait, 10);
    assert_int_equal(auth_enter(k, now + 4.5, &wait), AUTH_RATE);
    assert_int_equal(wait, 6);
    assert_int_equal(auth_enter(k, now + 4.5 + wait, &wait), AUTH_OK); /* Retry-After is true */
    assert_int_equal(auth_enter(k, now + 11, &wait), AUTH_RATE);
    assert_int_equal(auth_enter(k, now + 3, &wait), AUTH_RATE); /* a clock that jumps back gives nothing away */
    for (int i = 0; i < 4; i++) auth_leave(a, k, now, 0);
    assert_int_equal(auth_enter(k, now + 1e6, &wait), AUTH_OK); /* a long rest fills no more than the burst */
    assert_int_equal(auth_enter(k, now + 1e6, &wait), AUTH_OK);
    assert_int_equal(auth_enter(k, now + 1e6, &wait), AUTH_RATE);
    auth_free(a);
    /* over a long time it is the rate, however often one asks */
    a = load("a " ABC " rate=30\n");
    k = auth_find(a, "abc", 3);
    int passed = 0;
    for (double t = 0; t < 3600; t += 0.25)
        if (auth_enter(k, t, &wait) == AUTH_OK) {
            auth_leave(a, k, t, 0);
            passed++;
        }
    assert_in_range(passed, 30 + 1799, 30 + 1800);
    auth_free(a);
}

static void concurrent_requests(void **state) {
    (void)state;
    auth *a = load("a " ABC " concurrent=2 rate=100\n");
    auth_key *k = auth_find(a, "abc", 3);
    int wait;
    assert_int_equal(auth_enter(k, 1, &wait), AUTH_OK);
    assert_int_equal(auth_enter(k, 1, &wait), AUTH_OK);
    for (int i = 0; i < 500; i++) assert_int_equal(auth_enter(k, 1, &wait), AUTH_CONCURRENT); /* refusals use up no rate */
    assert_int_equal(wait, 1);
    auth_leave(a, k, 1, 5);
    assert_int_equal(auth_enter(k, 1, &wait), AUTH_OK);
    assert_string_equal(auth_verdict_text(AUTH_CONCURRENT), "concurrent requests");
    auth_free(a);
}

static void tokens_are_paid_back(void **state) {
    (void)state;
    auth *a = load("a " ABC " tokens=600\n"); /* ten a second */
    auth_key *k = auth_find(a, "abc", 3);
    int wait;
    assert_int_equal(auth_enter(k, 0, &wait), AUTH_OK);
    auth_leave(a, k, 0, 1000); /* 400 more than there were */
    assert_int_equal(auth_enter(k, 0, &wait), AUTH_TOKENS);
    assert_int_equal(wait, 41);
    assert_int_equal(auth_enter(k, 40, &wait), AUTH_TOKENS);
    assert_int_equal(auth_enter(k, 41, &wait), AUTH_OK);
    auth_free(a);
}

static void no_limits_no_refusals(void **state) {
    (void)state;
    auth *a = load("a " ABC "\n");
    auth_key *k = auth_find(a, "abc", 3);
    int wait;
    for (int i = 0; i < 10000; i++) assert_int_equal(auth_enter(k, 0, &wait), AUTH_OK);
    for (int i = 0; i < 10000; i++) auth_leave(a, k, 0, 1L << 40);
    assert_int_equal(auth_enter(k, 0, &wait), AUTH_OK);
    auth_free(a);
}

static void reload_keeps_counters_and_is_all_or_nothing(void **state) {
    (void)state;
    char err[256];
    int wait;
    auth *a = load("a " ABC " rate=6 burst=3\nb " NOTHING " concurrent=1\n");
    auth_key *k = auth_find(a, "abc", 3), *b = auth_find(a, "", 0);
    for (int i = 0; i < 3; i++) assert_int_equal(auth_enter(k, 0, &wait), AUTH_OK);
    assert_int_equal(auth_enter(b, 0, &wait), AUTH_OK);
    /* a bad file changes nothing */
    write_file("nobody\n");
    assert_int_equal(auth_reload(a, path, err, sizeof err), -1);
    assert_ptr_equal(auth_find(a, "abc", 3), k);
    /* renamed, allowed one more at once: what was used stays used */
    write_file("anna " ABC " rate=6 burst=4 admin\n");
    assert_int_equal(auth_reload(a, path, err, sizeof err), 0);
    assert_ptr_equal(auth_find(a, "abc", 3), k);
    assert_string_equal(auth_key_name(k), "anna");
    assert_true(auth_key_admin(k));
    assert_int_equal(auth_enter(k, 0, &wait), AUTH_OK);
    assert_int_equal(auth_enter(k, 0, &wait), AUTH_RATE);
    /* b is gone, its running request is not */
    assert_int_equal(auth_count(a), 1);
    assert_null(auth_find(a, "", 0));
    assert_string_equal(auth_key_name(b), "b");
    /* and it comes back while that runs: still counted */
    write_file("anna " ABC "\nb " NOTHING " concurrent=1\n");
    assert_int_equal(auth_reload(a, path, err, sizeof err), 0);
    assert_ptr_equal(auth_find(a, "", 0), b);
    assert_int_equal(auth_enter(b, 0, &wait), AUTH_CONCURRENT);
    assert_int_equal(auth_enter(k, 0, &wait), AUTH_OK); /* no rate any more */
    write_file("anna " ABC "\n");
    assert_int_equal(auth_reload(a, path, err, sizeof err), 0);
    auth_leave(a, b, 1, 10); /* the last use frees it (AddressSanitizer would tell) */
    assert_int_equal(auth_count(a), 1);
    auth_free(a);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keys_are_recognised),
        cmocka_unit_test(new_keys_work_and_differ),
        cmocka_unit_test(bad_lines_are_named_by_number),
        cmocka_unit_test(a_file_of_noise_is_refused_or_read),
        cmocka_unit_test(the_rate_is_a_token_bucket),
        cmocka_unit_test(concurrent_requests),
        cmocka_unit_test(tokens_are_paid_back),
        cmocka_unit_test(no_limits_no_refusals),
        cmocka_unit_test(reload_keeps_counters_and_is_all_or_nothing),
    };
    int fd = mkstemp(path);
    if (fd < 0) return 2;
    close(fd);
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    return rc;
}
