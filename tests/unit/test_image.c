/* test_image.c - decoding: every golden picture has the pixels of the reference, every bad one a named error, and no
 * damaged file does harm. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "../../libqvl/encode/encode.h"

#define IMAGES "tests/golden/images/"

static const qvl__image_limits limits = {.pixels = 100000000, .bytes = 64 << 20};

static void hex_sha256(char out[65], const void *data, size_t n) {
    qvl__sha256 s;
    uint8_t h[32];
    qvl__sha256_init(&s);
    qvl__sha256_add(&s, data, n);
    qvl__sha256_end(&s, h);
    for (int i = 0; i < 32; i++) snprintf(out + 2 * i, 3, "%02x", h[i]);
}

static uint8_t *read_file(const char *path, size_t *size) {
    char *data;
    int code = qvl__read_file(path, 1 << 28, &data, size);
    if (code < 0) fail_msg("%s", qvl_last_error());
    return (uint8_t *)data;
}

/* Decodes a copy of exactly n bytes, so that the address sanitizer sees reads past the end. */
static int decode(qvl_image **out, const void *data, size_t n) {
    uint8_t *copy = malloc(n ? n : 1);
    memcpy(copy, data, n);
    int code = qvl__image_decode(out, copy, n, &limits);
    free(copy);
    return code;
}

static void expect_pixels(const char *path, int width, int height, const char *sha256) {
    qvl_image *im;
    int code = qvl_image_from_file(&im, path, NULL);
    if (code < 0) fail_msg("%s: %s", path, qvl_last_error());
    char got[65];
    hex_sha256(got, qvl_image_pixels(im), (size_t)qvl_image_width(im) * (size_t)qvl_image_height(im) * 3);
    if (qvl_image_width(im) != width || qvl_image_height(im) != height || strcmp(got, sha256) != 0)
        fail_msg("%s: %d x %d %s, expected %d x %d %s", path, qvl_image_width(im), qvl_image_height(im), got, width, height, sha256);
    qvl_image_free(im);
}

static void expect_error(const char *path, int expected, const char *part) {
    qvl_image *im = (qvl_image *)1;
    int code = qvl_image_from_file(&im, path, NULL);
    if (code != expected || !strstr(qvl_last_error(), part) || !strstr(qvl_last_error(), path))
        fail_msg("%s: %s %s, expected %s with \"%s\"", path, qvl_error_name(code), qvl_last_error(), qvl_error_name(expected), part);
    assert_null(im);
}

static void expect_refused(const void *data, size_t n, int expected, const char *part) {
    qvl_image *im;
    int code = decode(&im, data, n);
    if (code != expected || !strstr(qvl_last_error(), part))
        fail_msg("%s %s, expected %s with \"%s\"", qvl_error_name(code), code < 0 ? qvl_last_error() : "", qvl_error_name(expected),
                 part);
    assert_null(im);
}

static int manifest_pixels(const char *folder) {
    char path[256];
    snprintf(path, sizeof path, "%smanifest.json", folder);
    json_error_t e;
    json_t *m = json_load_file(path, 0, &e), *one;
    assert_non_null(m);
    size_t i;
    int n = 0;
    json_array_foreach(json_object_get(m, "images"), i, one) {
        const char *sha = json_string_value(json_object_get(one, "rgb_sha256"));
        if (json_is_false(json_object_get(one, "binding"))) {
            /* 16-bit grey, which Pillow clips to white: the high byte, goldens.safetensors' gray16_120x100.png.rgb_highbyte */
            assert_string_equal(json_string_value(json_object_get(one, "file")), "gray16_120x100.png");
            sha = "d4e54f8a140d269aaef55a7cf08df0782b0e831df37c387b43b2f7c961e9701f";
        }
        snprintf(path, sizeof path, "%s%s", folder, json_string_value(json_object_get(one, "file")));
        int width = (int)json_integer_value(json_object_get(one, "width"));
        int height = (int)json_integer_value(json_object_get(one, "height"));
        expect_pixels(path, width, height, sha);
        n++;
    }
    json_decref(m);
    return n;
}

static void golden_pixels(void **state) {
    (void)state;
    assert_int_equal(manifest_pixels(IMAGES), 33);
}

static void extra_pixels(void **state) {
    (void)state;
    assert_int_equal(manifest_pixels(IMAGES "extra/"), 25);
}

static void bad_files(void **state) {
    (void)state;
    expect_error(IMAGES "bad/empty.png", QVL_EFORMAT, "empty");
    expect_error(IMAGES "bad/not_an_image.png", QVL_EFORMAT, "not a JPEG, PNG or WebP");
    expect_error(IMAGES "bad/truncated.jpg", QVL_EFORMAT, "JPEG is truncated");
    expect_error(IMAGES "bad/truncated.png", QVL_EFORMAT, "PNG is truncated");
    expect_error(IMAGES "bad/zero_width.png", QVL_EFORMAT, "0 x 1 pixels");
    expect_error(IMAGES "extra/animated.webp", QVL_EUNSUPPORTED, "animated WebP");
    expect_error(IMAGES "none.png", QVL_EIO, "cannot open");
    expect_error("tests/golden", QVL_EIO, "not a regular file");
    /* ratio_201x1.png is a sound picture; what refuses it is smart_resize (test_resize.c). */
    qvl_image *im;
    assert_int_equal(qvl_image_from_file(&im, IMAGES "bad/ratio_201x1.png", NULL), 0);
    assert_int_equal(qvl_image_width(im), 201);
    qvl_image_free(im);
    size_t n; /* the pixels are all there, the end marker is not: an error as in Pillow */
    uint8_t *data = read_file(IMAGES "extra/quality_97.jpg", &n);
    expect_refused(data, n - 2, QVL_EFORMAT, "JPEG is truncated");
    qvl_free(data);
}

static void other_formats(void **state) {
    (void)state;
    static const struct {
        const char *bytes, *name;
        size_t n;
    } all[] = {{"GIF89a......", "GIF", 12},
               {"BM..........", "BMP", 12},
               {"II*\0........", "TIFF", 12},
               {"MM\0*........", "TIFF", 12},
               {"\0\0\0\30ftypheic....", "HEIC", 16},
               {"\0\0\0\30ftypmif1....", "HEIC", 16},
               {"\0\0\0\34ftypavif....", "AVIF", 16},
               {"\0\0\0\34ftypisom....", "MP4", 16},
               {"\xff\x0a..........", "JPEG XL", 12},
               {"%PDF-1.7....", "PDF", 12},
               {"<svg xmlns=..", "SVG", 13}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        char message[80];
        snprintf(message, sizeof message, "%s", all[i].name);
        expect_refused(all[i].bytes, all[i].n, QVL_EUNSUPPORTED, message);
        assert_non_null(strstr(qvl_last_error(), "convert to JPEG, PNG or WebP"));
    }
    expect_refused("G", 1, QVL_EFORMAT, "begin with 47");
    expect_refused("\xff\xd8\xff", 3, QVL_EFORMAT, "JPEG is truncated");
    expect_refused("\x89PNG\r\n\x1a\n", 8, QVL_EFORMAT, "PNG is truncated");
    expect_refused("RIFF\4\0\0\0WEBP", 12, QVL_EFORMAT, "WebP is truncated");
}

/* ---- limits ---- */

static void options_limit(void **state) {
    (void)state;
    qvl_options *o;
    qvl_image *im;
    assert_int_equal(qvl_options_new(&o), 0);
    assert_int_equal(qvl_options_set(o, "max_image_pixels", "76799"), 0);
    assert_int_equal(qvl_image_from_file(&im, IMAGES "photo_320x240.jpg", o), QVL_ELIMIT);
    assert_non_null(strstr(qvl_last_error(), "320 x 240"));
    assert_non_null(strstr(qvl_last_error(), "76799"));
    assert_int_equal(qvl_options_set(o, "max_image_pixels", "76800"), 0);
    assert_int_equal(qvl_image_from_file(&im, IMAGES "photo_320x240.jpg", o), 0);
    qvl_image_free(im);
    assert_int_equal(qvl_options_set(o, "max_image_bytes", "18617"), 0);
    assert_int_equal(qvl_image_from_file(&im, IMAGES "photo_320x240.jpg", o), QVL_ELIMIT);
    assert_non_null(strstr(qvl_last_error(), "max_image_bytes"));
    size_t n;
    uint8_t *data = read_file(IMAGES "photo_320x240.jpg", &n);
    assert_int_equal(qvl_image_from_bytes(&im, data, n, o), QVL_ELIMIT);
    assert_non_null(strstr(qvl_last_error(), "18618 bytes"));
    qvl_free(data);
    qvl_options_free(o);
}

/* An allocator that remembers the largest request. */
static size_t largest;
static void *counting_malloc(void *ud, size_t n) {
    (void)ud;
    if (n > largest) largest = n;
    return malloc(n);
}
static void *counting_realloc(void *ud, void *p, size_t n) {
    (void)ud;
    if (n > largest) largest = n;
    return realloc(p, n);
}
static void counting_free(void *ud, void *p) { (void)ud, free(p); }

/* Headers that claim huge pictures are refused before any memory is taken for them. */
static void huge_headers(void **state) {
    (void)state;
    qvl_allocator a = {sizeof a, NULL, counting_malloc, counting_realloc, counting_free};
    assert_int_equal(qvl_set_allocator(&a), 0);
    largest = 0;
    size_t n;
    uint8_t *data = read_file(IMAGES "photo_320x240.jpg", &n);
    uint8_t *sof = memmem(data, n, "\xff\xc0\x00\x11\x08", 5);
    assert_non_null(sof);
    memcpy(sof + 5, "\xff\xff\xff\xff", 4);
    expect_refused(data, n, QVL_ELIMIT, "65535 x 65535");
    memcpy(sof + 5, "\xff\x00\xff\x00", 4); /* within JPEG's own limit */
    expect_refused(data, n, QVL_ELIMIT, "65280 x 65280");
    qvl_free(data);

    data = read_file(IMAGES "rgb_256x256.png", &n);
    memcpy(data + 16, "\0\0\xff\xff\0\0\xff\xff", 8);
    expect_refused(data, n, QVL_ELIMIT, "65535 x 65535");
    memcpy(data + 16, "\xff\xff\xff\xff\xff\xff\xff\xff", 8);
    expect_refused(data, n, QVL_ELIMIT, "4294967295 x 4294967295");
    qvl_free(data);

    data = read_file(IMAGES "extra/exif6.webp", &n); /* VP8X: canvas minus one in 24 bits each */
    assert_memory_equal(data + 12, "VP8X", 4);
    memcpy(data + 24, "\xfe\xff\0\xfe\xff\0", 6);
    expect_refused(data, n, QVL_ELIMIT, "65535 x 65535");
    qvl_free(data);
    data = read_file(IMAGES "extra/lossy.webp", &n); /* VP8: 14 bits each */
    assert_memory_equal(data + 23, "\x9d\x01\x2a", 3);
    memcpy(data + 26, "\xff\x3f\xff\x3f", 4);
    expect_refused(data, n, QVL_ELIMIT, "16383 x 16383");
    qvl_free(data);
    data = read_file(IMAGES "extra/lossless.webp", &n); /* VP8L: 14 bits each, minus one */
    assert_memory_equal(data + 12, "VP8L", 4);
    memcpy(data + 21, "\xff\xff\xff\x0f", 4);
    expect_refused(data, n, QVL_ELIMIT, "16384 x 16384");
    qvl_free(data);
    assert_in_range(largest, 1, 1 << 20);
    assert_int_equal(qvl_set_allocator(NULL), 0);
}

/* Metadata that claims to be larger than the file: libpng must not see it, since it would take the memory first. */
static void huge_chunks(void **state) {
    (void)state;
    size_t n;
    uint8_t *data = read_file(IMAGES "extra/exif6.png", &n), *exif = memmem(data, n, "eXIf", 4);
    assert_non_null(exif);
    memcpy(exif - 4, "\x3f\xff\xff\xff", 4);
    expect_refused(data, n, QVL_EFORMAT, "PNG is truncated: the data ends in the header");
    qvl_free(data);
    data = read_file(IMAGES "extra/exif6.png", &n); /* behind the pixels: not missed */
    memcpy(data + n - 12, "\x3f\xff\xff\xfftEXt", 8);
    qvl_image *im;
    assert_int_equal(decode(&im, data, n), 0);
    assert_int_equal(im->width, 30);
    qvl_image_free(im);
    qvl_free(data);
}

/* A progressive file of thousands of scans, each of which is a few bytes and costs a pass over the picture. */
static void many_scans(void **state) {
    (void)state;
    size_t n;
    uint8_t *data = read_file(IMAGES "progressive_300x225.jpg", &n);
    uint8_t *last = NULL; /* the last scan, which refines what is there */
    for (uint8_t *p = data; (p = memmem(p, n - (size_t)(p - data), "\xff\xda", 2)) != NULL; p += 2) last = p;
    assert_non_null(last);
    size_t head = (size_t)(last - data), length = n - 2 - head, copies = 600;
    uint8_t *bomb = malloc(head + length * copies + 2);
    memcpy(bomb, data, head);
    for (size_t i = 0; i < copies; i++) memcpy(bomb + head + i * length, last, length);
    memcpy(bomb + head + copies * length, "\xff\xd9", 2);
    expect_refused(bomb, head + copies * length + 2, QVL_ELIMIT, "scans");
    free(bomb);
    qvl_free(data);
}

/* ---- orientation ---- */

static void orientation_blocks(void **state) {
    (void)state;
#define EXIF(text) qvl__exif_orientation((const uint8_t *)(text), sizeof(text) - 1)
    assert_int_equal(EXIF("Exif\0\0II*\0\10\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0"), 6);
    assert_int_equal(EXIF("Exif\0\0Exif\0\0II*\0\10\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0"), 6);
    assert_int_equal(EXIF("MM\0*\0\0\0\10\0\1\1\x12\0\3\0\0\0\1\0\10\0\0"), 8);
    assert_int_equal(EXIF("MM\0*\0\0\0\10\0\1\1\x12\0\4\0\0\0\1\0\0\0\3"), 3);     /* LONG */
    assert_int_equal(EXIF("MM\0*\0\0\0\10\0\1\1\x12\0\3\0\0\0\2\0\5\0\6"), 5);     /* two values: the first */
    assert_int_equal(EXIF("MM\0*\0\0\0\10\0\1\1\x12\0\1\0\0\0\1\6\0\0\0"), 1);     /* BYTE */
    assert_int_equal(EXIF("MM\0*\0\0\0\10\0\1\1\x12\0\3\0\0\0\1\0\11\0\0"), 1);    /* 9 */
    assert_int_equal(EXIF("MM\0*\0\0\0\10\0\1\1\x12\0\3\0\0\0\1\0\0\0\0"), 1);     /* 0 */
    assert_int_equal(EXIF("MM\0*\0\0\0\10\xff\xff\1\x12\0\3\0\0\0\1\0\7\0\0"), 7); /* more entries promised */
    assert_int_equal(EXIF("MM\0*\0\0\0\10\0\1\1\x12\0\3\0\0\0\1\0"), 1);           /* cut off */
    assert_int_equal(EXIF("MM\0*\xff\xff\xff\xff\0\1\1\x12\0\3\0\0\0\1\0\7\0\0"), 1);
    assert_int_equal(EXIF("MM\0*\0\0\0\10\0\1\1\x12\0\4\xff\xff\xff\xff\xff\xff\xff\xff"), 1);
    assert_int_equal(EXIF("XX\0*\0\0\0\10\0\1\1\x12\0\3\0\0\0\1\0\7\0\0"), 1);
    assert_int_equal(EXIF("Exif\0\0"), 1);
    assert_int_equal(qvl__exif_orientation(NULL, 0), 1);
#define XMP(text) qvl__image_orientation(NULL, 0, (const uint8_t *)(text), sizeof(text) - 1)
    assert_int_equal(XMP("<a tiff:Orientation=\"6\">"), 6);
    assert_int_equal(XMP("tiff:Orientation, <tiff:Orientation>8</tiff:Orientation>"), 8);
    assert_int_equal(XMP("<a tiff:Orientation=\"9\">"), 1);
    assert_int_equal(XMP("<a tiff:Orientation=\""), 1);
    assert_int_equal(XMP("tiff:Orientation"), 1);
}

static void orientation_turns(void **state) {
    (void)state;
    /* Where pixel (1, 0) and (0, 1) of a 3 x 2 picture go: the number of the pixel is its value. */
    static const uint8_t rgb[18] = {0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5};
    static const char *const expected[9] = {"", "012345", "210543", "543210", "345012", "031425", "304152", "524130", "251403"};
    for (int o = 0; o <= 9; o++) {
        qvl_image *im;
        assert_int_equal(qvl_image_from_pixels(&im, rgb, 3, 2, 0), 0);
        assert_int_equal(qvl__image_turn(&im, o), 0);
        assert_int_equal(im->width, o >= 5 && o <= 8 ? 2 : 3);
        for (int i = 0; i < 6; i++)
            for (int c = 0; c < 3; c++) assert_int_equal(im->rgb[3 * i + c], expected[o >= 1 && o <= 8 ? o : 1][i] - '0');
        qvl_image_free(im);
    }
}

/* Garbage in the metadata must neither hurt nor change the pixels. */
static void exif_garbage(void **state) {
    (void)state;
    size_t n;
    uint8_t *data = read_file(IMAGES "exif1_160x96.jpg", &n), *exif = memmem(data, n, "Exif\0\0", 6);
    assert_non_null(exif);
    qvl_image *plain;
    assert_int_equal(decode(&plain, data, n), 0);
    size_t length = (size_t)(exif[-2] << 8 | exif[-1]) - 8;
    srand(11);
    for (int round = 0; round < 300; round++) {
        for (size_t i = 8; i < length; i++) exif[6 + i] = (uint8_t)rand();
        qvl_image *im;
        assert_int_equal(decode(&im, data, n), 0);
        if (im->width == plain->width && qvl__exif_orientation(exif, length + 6) == 1)
            assert_memory_equal(im->rgb, plain->rgb, (size_t)im->width * (size_t)im->height * 3);
        qvl_image_free(im);
    }
    qvl_image_free(plain);
    qvl_free(data);
}

/* ---- data URIs ---- */

static size_t base64(char *out, const uint8_t *data, size_t n, bool url, bool pad, size_t line) {
    const char *digits = url ? "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
                             : "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t at = 0, column = 0;
    for (size_t i = 0; i < n; i += 3) {
        uint32_t v = (uint32_t)data[i] << 16 | (i + 1 < n ? (uint32_t)data[i + 1] << 8 : 0) | (i + 2 < n ? data[i + 2] : 0u);
        for (size_t k = 0; k < 4; k++) {
            if (i + k <= n) out[at++] = digits[v >> (18 - 6 * k) & 63];
            else if (pad) out[at++] = '=';
            if (line && ++column % line == 0) out[at++] = '\r', out[at++] = '\n';
        }
    }
    return at;
}

static void data_uris(void **state) {
    (void)state;
    static const char *const headers[] = {"data:image/png;base64,", "data:;base64,", "data:image;base64,", "DATA:Image/PNG;Base64,",
                                          "data:image/png;charset=utf-8;base64,", "data:image/jpeg; name=a.png ;base64,",
                                          "data:application/octet-stream;base64,"};
    static const char *const files[] = {IMAGES "tiny_10x10.png", IMAGES "one_1x1.png", IMAGES "gray1bit_interlaced_101x77.png"};
    for (size_t f = 0; f < sizeof files / sizeof *files; f++) {
        size_t n;
        uint8_t *data = read_file(files[f], &n);
        char *uri = malloc(4 * n + 200);
        for (size_t h = 0; h < sizeof headers / sizeof *headers; h++)
            for (int form = 0; form < 8; form++) {
                size_t at = strlen(headers[h]);
                memcpy(uri, headers[h], at);
                at += base64(uri + at, data, n, form & 1, form & 2, form & 4 ? 76 : 0);
                qvl_image *im, *expected;
                int code = qvl__image_from_data_uri(&im, uri, at, &limits);
                if (code < 0) fail_msg("%.*s...: %s", 40, uri, qvl_last_error());
                assert_int_equal(decode(&expected, data, n), 0);
                assert_int_equal(im->width, expected->width);
                assert_memory_equal(im->rgb, expected->rgb, (size_t)im->width * (size_t)im->height * 3);
                qvl_image_free(im);
                qvl_image_free(expected);
            }
        free(uri);
        qvl_free(data);
    }
}

static void bad_data_uris(void **state) {
    (void)state;
    static const struct {
        const char *uri;
        int code;
        const char *part;
    } all[] = {
        {"http://example.com/a.png", QVL_EINVAL, "data:"},
        {"dat", QVL_EINVAL, "data:"},
        {"data:image/png;base64", QVL_EFORMAT, "comma"},
        {"data:image/png,abc", QVL_EUNSUPPORTED, "base64"},
        {"data:text/html;base64,AAAA", QVL_EUNSUPPORTED, "text/html"},
        {"data:imagery;base64,AAAA", QVL_EUNSUPPORTED, "imagery"},
        {"data:image/png;base64,", QVL_EFORMAT, "byte 21"},
        {"data:image/png;base64,\n \n", QVL_EFORMAT, "byte 21"},
        {"data:image/png;base64,AAA*", QVL_EFORMAT, "byte 25 (0x2a)"},
        {"data:image/png;base64,AAA\xc3\xa4", QVL_EFORMAT, "byte 25 (0xc3)"},
        {"data:image/png;base64,AAAAA", QVL_EFORMAT, "cut off at byte 27"},
        {"data:image/png;base64,AA=A", QVL_EFORMAT, "text after '=' at byte 25"},
        {"data:image/png;base64,=AAA", QVL_EFORMAT, "misplaced '=' at byte 22"},
        {"data:image/png;base64,AAA==", QVL_EFORMAT, "misplaced '=' at byte 26"},
        {"data:image/png;base64,AAAA", QVL_EFORMAT, "not a JPEG, PNG or WebP"},
        {"data:image/gif;base64,R0lGODlhAQAB", QVL_EUNSUPPORTED, "GIF"},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        qvl_image *im = (qvl_image *)1;
        int code = qvl__image_from_data_uri(&im, all[i].uri, strlen(all[i].uri), &limits);
        if (code != all[i].code || !strstr(qvl_last_error(), all[i].part))
            fail_msg("%s: %s %s", all[i].uri, qvl_error_name(code), qvl_last_error());
        assert_null(im);
    }
    qvl__image_limits few = {.pixels = 100, .bytes = 2};
    qvl_image *im;
    assert_int_equal(qvl__image_from_data_uri(&im, "data:;base64,AAAA", 17, &few), QVL_ELIMIT);
}

/* ---- handles ---- */

static void from_pixels(void **state) {
    (void)state;
    uint8_t rgb[2 * 10] = {1, 2, 3, 4, 5, 6, 99, 99, 99, 99, 7, 8, 9, 10, 11, 12};
    qvl_image *im;
    assert_int_equal(qvl_image_from_pixels(&im, rgb, 2, 2, 10), 0);
    static const uint8_t expected[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    assert_memory_equal(qvl_image_pixels(im), expected, sizeof expected);
    qvl_allocator a = {sizeof a, NULL, counting_malloc, counting_realloc, counting_free};
    assert_int_equal(qvl_set_allocator(&a), QVL_EBUSY); /* an image is alive */
    qvl_image *again = qvl__image_ref(im);
    qvl_image_free(im);
    assert_int_equal(qvl_image_width(again), 2);
    qvl_image_free(again);
    assert_int_equal(qvl_set_allocator(&a), 0);
    assert_int_equal(qvl_set_allocator(NULL), 0);

    assert_int_equal(qvl_image_from_pixels(NULL, rgb, 2, 2, 0), QVL_EINVAL);
    assert_int_equal(qvl_image_from_pixels(&im, NULL, 2, 2, 0), QVL_EINVAL);
    assert_int_equal(qvl_image_from_pixels(&im, rgb, 0, 2, 0), QVL_EINVAL);
    assert_int_equal(qvl_image_from_pixels(&im, rgb, 2, -1, 0), QVL_EINVAL);
    assert_int_equal(qvl_image_from_pixels(&im, rgb, 2, 2, 5), QVL_EINVAL);
    assert_int_equal(qvl_image_from_bytes(&im, NULL, 2, NULL), QVL_EINVAL);
    assert_int_equal(qvl_image_from_bytes(&im, NULL, 0, NULL), QVL_EFORMAT);
    assert_int_equal(qvl_image_from_file(&im, NULL, NULL), QVL_EINVAL);
    assert_null(im);
    qvl_image_free(NULL);
    assert_int_equal(qvl_image_width(NULL), 0);
    assert_int_equal(qvl_image_height(NULL), 0);
    assert_null(qvl_image_pixels(NULL));
}

/* ---- damaged files: every outcome is a picture or a named error ---- */

static long damaged, survived;

static void try_damaged(const char *file, const uint8_t *data, size_t n) {
    qvl_image *im;
    int code = decode(&im, data, n);
    damaged++;
    if (code == 0) {
        survived++;
        assert_non_null(im);
        assert_true(im->width > 0 && im->height > 0);
        qvl_image_free(im);
        return;
    }
    assert_null(im);
    if ((code != QVL_EFORMAT && code != QVL_EUNSUPPORTED && code != QVL_ELIMIT) || !qvl_last_error()[0])
        fail_msg("%s of %zu bytes: %s %s", file, n, qvl_error_name(code), qvl_last_error());
}

static void damage_folder(const char *folder) {
    char path[256];
    snprintf(path, sizeof path, "%smanifest.json", folder);
    json_error_t e;
    json_t *m = json_load_file(path, 0, &e), *one;
    assert_non_null(m);
    size_t i;
    json_array_foreach(json_object_get(m, "images"), i, one) {
        snprintf(path, sizeof path, "%s%s", folder, json_string_value(json_object_get(one, "file")));
        int64_t pixels = json_integer_value(json_object_get(one, "width")) * json_integer_value(json_object_get(one, "height"));
        size_t n;
        uint8_t *data = read_file(path, &n);
        srand(7);
        int cuts = pixels > 1000000 ? 6 : 60, flips = pixels > 1000000 ? 4 : 200;
        for (int k = 0; k < cuts; k++) try_damaged(path, data, k < 20 ? n * (size_t)k / 200 : n * (size_t)k / (size_t)cuts);
        for (int k = 0; k < flips; k++) { /* half of them in the headers */
            size_t at = (size_t)rand() % (k % 2 && n > 700 ? 700 : n);
            uint8_t old = data[at];
            data[at] = (uint8_t)(k % 4 < 2 ? rand() : old ^ 1 << rand() % 8);
            try_damaged(path, data, n);
            data[at] = old;
        }
        qvl_free(data);
    }
    json_decref(m);
}

static void damaged_files(void **state) {
    (void)state;
    damage_folder(IMAGES);
    damage_folder(IMAGES "extra/");
    print_message("%ld damaged files, %ld of them still pictures\n", damaged, survived);
    assert_true(damaged > 10000 && survived > 100 && survived < damaged * 3 / 4);
}

/* Every allocation of ours fails once: an error, no leak (the address sanitizer looks), no crash. */
static long allocations_left;
static void *failing_malloc(void *ud, size_t n) { return (void)ud, allocations_left-- > 0 ? malloc(n) : NULL; }
static void *failing_realloc(void *ud, void *p, size_t n) { return (void)ud, allocations_left-- > 0 ? realloc(p, n) : NULL; }

static void out_of_memory(void **state) {
    (void)state;
    static const char *const files[] = {IMAGES "exif6_160x96.jpg", IMAGES "cmyk_180x140.jpg", IMAGES "interlaced_rgb_133x97.png",
                                        IMAGES "rgba_160x120.png", IMAGES "extra/exif6.png", IMAGES "extra/lossless_alpha.webp",
                                        IMAGES "extra/exif6.webp"};
    qvl_allocator a = {sizeof a, NULL, failing_malloc, failing_realloc, counting_free};
    assert_int_equal(qvl_set_allocator(&a), 0);
    for (size_t f = 0; f < sizeof files / sizeof *files; f++)
        for (long k = 0;; k++) {
            assert_true(k < 100);
            allocations_left = k;
            qvl_image *im;
            int code = qvl_image_from_file(&im, files[f], NULL);
            if (code == 0) {
                assert_true(k >= 3); /* file, handle, pixels */
                qvl_image_free(im);
                break;
            }
            assert_int_equal(code, QVL_ENOMEM);
            assert_null(im);
        }
    allocations_left = 0;
    assert_int_equal(qvl_set_allocator(NULL), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_pixels),  cmocka_unit_test(extra_pixels),       cmocka_unit_test(bad_files),
        cmocka_unit_test(other_formats),  cmocka_unit_test(options_limit),      cmocka_unit_test(huge_headers),
        cmocka_unit_test(huge_chunks),    cmocka_unit_test(many_scans),         cmocka_unit_test(orientation_blocks),
        cmocka_unit_test(orientation_turns),
        cmocka_unit_test(exif_garbage),   cmocka_unit_test(data_uris),          cmocka_unit_test(bad_data_uris),
        cmocka_unit_test(from_pixels),    cmocka_unit_test(damaged_files),      cmocka_unit_test(out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
