/* test_fetch.c - remote images: which addresses and hosts, and what a hostile server may try. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "../../qvl-serve/fetch.h"

static bool is_public(const char *text) {
    struct sockaddr_storage a = {0};
    struct sockaddr_in *four = (struct sockaddr_in *)&a;
    struct sockaddr_in6 *six = (struct sockaddr_in6 *)&a;
    if (inet_pton(AF_INET, text, &four->sin_addr) == 1) a.ss_family = AF_INET;
    else {
        assert_int_equal(inet_pton(AF_INET6, text, &six->sin6_addr), 1);
        a.ss_family = AF_INET6;
    }
    return fetch_address_public((struct sockaddr *)&a);
}

static void test_addresses(void **state) {
    (void)state;
    static const char *const inside[] = {
        "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.255.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255",
        "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1",
        "2002:7f00:1::", "2002:a00:1::", "3fff::1", "fc00::1", "fd12:3456::1", "fe80::1", "fec0::1", "ff02::1", "4000::1"};
    static const char *const outside[] = {"1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.1", "100.63.255.255", "100.128.0.1", "126.0.0.1", "128.0.0.1", "169.253.0.1", "172.15.255.255",
                                          "172.32.0.1", "192.167.1.1", "192.169.0.1", "198.17.255.255", "198.20.0.1", "223.255.255.255", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8",
                                          "64:ff9b::808:808", "2002:808:808::1"};
    for (size_t i = 0; i < sizeof inside / sizeof *inside; i++)
        if (is_public(inside[i])) fail_msg("%s is taken for public", inside[i]);
    for (size_t i = 0; i < sizeof outside / sizeof *outside; i++)
        if (!is_public(outside[i])) fail_msg("%s is not taken for public", outside[i]);
}

static void test_hosts(void **state) {
    (void)state;
    char *list[] = {"images.example", ".cdn.example", "odd.example:8443"};
    fetch_policy p = {.allow = list, .allow_count = 3}, all = {.allow = (char *[]){"*"}, .allow_count = 1};
    assert_true(fetch_host_allowed(&p, "images.example", 443));
    assert_true(fetch_host_allowed(&p, "IMAGES.example", 80));
    assert_false(fetch_host_allowed(&p, "images.example", 22));
    assert_false(fetch_host_allowed(&p, "images.example.evil", 443));
    assert_false(fetch_host_allowed(&p, "evilimages.example", 443));
    assert_true(fetch_host_allowed(&p, "a.cdn.example", 443));
    assert_false(fetch_host_allowed(&p, "cdn.example", 443));
    assert_false(fetch_host_allowed(&p, "evilcdn.example", 443));
    assert_true(fetch_host_allowed(&p, "odd.example", 8443));
    assert_false(fetch_host_allowed(&p, "odd.example", 443));
    assert_true(fetch_host_allowed(&all, "any.example", 443));
    assert_false(fetch_host_allowed(&all, "any.example", 8080));
}

/* ---- a server that answers one connection after another by path ---- */
static int listener;
static char host[64];

static void answer(int c, const char *path) {
    char text[4096];
    if (strncmp(path, "/image ", 7) == 0) sprintf(text, "HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 5\r\n\r\nhello");
    else if (strncmp(path, "/html ", 6) == 0) sprintf(text, "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\nhello");
    else if (strncmp(path, "/large ", 7) == 0) sprintf(text, "HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 9999999\r\n\r\nhello");
    else if (strncmp(path, "/endless ", 9) == 0) {
        dprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n");
        memset(text, 'x', sizeof text);
        for (int i = 0; i < 1000 && write(c, text, sizeof text) > 0; i++) {}
        return;
    } else if (strncmp(path, "/slow ", 6) == 0) {
        dprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 50\r\n\r\n");
        for (int i = 0; i < 30 && write(c, "x", 1) > 0; i++) usleep(100000);
        return;
    } else if (strncmp(path, "/loop ", 6) == 0) sprintf(text, "HTTP/1.1 302 Found\r\nLocation: http://%s/loop\r\nContent-Length: 0\r\n\r\n", host);
    else if (strncmp(path, "/once ", 6) == 0) sprintf(text, "HTTP/1.1 302 Found\r\nLocation: /image\r\nContent-Length: 0\r\n\r\n");
    else if (strncmp(path, "/file ", 6) == 0) sprintf(text, "HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n");
    else if (strncmp(path, "/away ", 6) == 0) sprintf(text, "HTTP/1.1 302 Found\r\nLocation: http://localhost:1/x\r\nContent-Length: 0\r\n\r\n");
    else sprintf(text, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    if (write(c, text, strlen(text)) < 0) return;
}

static void *serve(void *arg) {
    for (;;) {
        int c = accept(listener, NULL, NULL);
        if (c < 0) return arg;
        char request[2048] = "";
        ssize_t n = read(c, request, sizeof request - 1);
        char *path = n > 4 ? strchr(request, ' ') : NULL;
        if (path) answer(c, path + 1);
        close(c);
    }
}

static void expect(const fetch_policy *p, const char *path, const char *word) {
    char url[200], err[512] = "";
    void *data = NULL;
    size_t size = 0;
    snprintf(url, sizeof url, "%s%s%s", path[0] == '/' ? "http://" : "", path[0] == '/' ? host : "", path);
    int rc = fetch_url(p, url, &data, &size, err, sizeof err);
    if (!word) {
        if (rc) fail_msg("%s: %s", path, err);
        assert_int_equal(size, 5);
        assert_memory_equal(data, "hello", 5);
    } else {
        if (rc == 0) fail_msg("%s was fetched", path);
        if (!strstr(err, word)) fail_msg("%s: \"%s\" does not say %s", path, err, word);
        assert_null(data);
    }
    free(data);
}

static void test_transfers(void **state) {
    (void)state;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof a;
    pthread_t t;
    signal(SIGPIPE, SIG_IGN);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(listener, 16), 0);
    getsockname(listener, (struct sockaddr *)&a, &n);
    snprintf(host, sizeof host, "127.0.0.1:%d", ntohs(a.sin_port));
    assert_int_equal(pthread_create(&t, NULL, serve, NULL), 0);
    assert_int_equal(fetch_start(), 0);
    char *list[] = {host};
    fetch_policy p = {.allow = list, .allow_count = 1, .max_bytes = 100000, .timeout_ms = 1000, .allow_private = true}, real = p, off = p;
    real.allow_private = false;
    off.allow_count = 0;
    setenv("http_proxy", "http://127.0.0.1:1", 1); /* must not be used */
    expect(&p, "/image", NULL);
    expect(&p, "/once", NULL);
    expect(&real, "/image", "not public");
    expect(&off, "/image", "fetch.allow");
    expect(&p, "/html", "text/html");
    expect(&p, "/missing", "404");
    expect(&p, "/large", "fetch.max_bytes");
    expect(&p, "/endless", "fetch.max_bytes");
    expect(&p, "/slow", "fetch.timeout_ms");
    expect(&p, "/loop", "more than 3 times");
    expect(&p, "/file", "http and https");
    expect(&p, "/away", "fetch.allow");
    expect(&p, "ftp://127.0.0.1/x", "http and https");
    expect(&p, "http://user:secret@127.0.0.1/x", "user name");
    expect(&p, "http://", "not a URL");
    expect(&p, "http://images.example/x", "fetch.allow");
    shutdown(listener, SHUT_RDWR);
    close(listener);
    pthread_join(t, NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_addresses), cmocka_unit_test(test_hosts), cmocka_unit_test(test_transfers)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
