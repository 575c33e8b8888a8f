/* image.c - what the image decoders share: recognising formats, limits, memory, orientation, data URIs.
 *
 * Job:        bytes of an unknown image to RGB pixels the right way up.
 * Input:      untrusted bytes, or a data URI; limits on pixels and bytes.
 * Output:     qvl_image: height x width x 3 bytes, reference-counted, never changed after decoding.
 * Invariants: the file's size is checked before anything is read and the picture's before memory is taken; metadata
 *             that is damaged is ignored, pixels that are damaged or missing are an error; what a file means is what
 *             Pillow and ImageOps.exif_transpose make of it (docs/images.md lists where we differ).
 */
#include <limits.h>
#include <string.h>

#include "encode.h"

/* ------------------------------------------------------------------------------------------------ memory and limits */

int qvl__image_alloc(qvl_image **out, int width, int height) {
    *out = NULL;
    size_t n;
    if (width <= 0 || height <= 0) return qvl__fail(QVL_EINVAL, "an image of %d x %d pixels cannot exist", width, height);
    if (__builtin_mul_overflow((size_t)width * 3, (size_t)height, &n))
        return qvl__fail(QVL_ENOMEM, "an image of %d x %d pixels does not fit into memory", width, height);
    qvl_image *im = qvl__malloc(sizeof *im);
    if (!im) return QVL_ENOMEM;
    im->rgb = qvl__malloc(n);
    if (!im->rgb) {
        qvl__free(im);
        return QVL_ENOMEM;
    }
    atomic_init(&im->refs, 1);
    im->width = width;
    im->height = height;
    qvl__handle_born();
    *out = im;
    return 0;
}

qvl_image *qvl__image_ref(const qvl_image *im) {
    qvl_image *shared = (qvl_image *)(uintptr_t)im; /* the count is the only thing that ever changes */
    atomic_fetch_add_explicit(&shared->refs, 1, memory_order_relaxed);
    return shared;
}

void qvl__image_unref(qvl_image *im) {
    if (!im || atomic_fetch_sub_explicit(&im->refs, 1, memory_order_acq_rel) != 1) return;
    qvl__free(im->rgb);
    qvl__free(im);
    qvl__handle_gone();
}

qvl__image_limits qvl__image_limits_of(const qvl_options *o) {
    return (qvl__image_limits){.pixels = qvl__opt_i64(o, "max_image_pixels"), .bytes = qvl__opt_i64(o, "max_image_bytes")};
}

int qvl__image_check_size(int64_t width, int64_t height, const qvl__image_limits *l) {
    if (width <= 0 || height <= 0)
        return qvl__fail(QVL_EFORMAT, "image of %lld x %lld pixels: both sides must be at least 1", (long long)width,
                         (long long)height);
    int64_t pixels;
    if (width > INT_MAX || height > INT_MAX || __builtin_mul_overflow(width, height, &pixels) || pixels > l->pixels)
        return qvl__fail(QVL_ELIMIT, "image of %lld x %lld pixels, more than the %lld that option max_image_pixels allows",
                         (long long)width, (long long)height, (long long)l->pixels);
    return 0;
}

/* --------------------------------------------------------------------------------------------------------- formats */

static bool begins(const uint8_t *data, size_t size, size_t at, const char *magic, size_t n) {
    return size >= at + n && memcmp(data + at, magic, n) == 0;
}

/* Well-known formats that are not decoded here; NULL when the bytes look like nothing known. */
static const char *foreign_format(const uint8_t *data, size_t size) {
    static const struct {
        size_t at, n;
        const char *magic, *name;
    } known[] = {
        {0, 4, "GIF8", "GIF"},
        {0, 2, "BM", "BMP"},
        {0, 4, "II*\0", "TIFF"},
        {0, 4, "MM\0*", "TIFF"},
        {4, 8, "ftypavif", "AVIF"},
        {4, 8, "ftypavis", "AVIF"},
        {4, 8, "ftypheic", "HEIC"},
        {4, 8, "ftypheix", "HEIC"},
        {4, 8, "ftyphevc", "HEIC"},
        {4, 8, "ftypmif1", "HEIC"},
        {4, 8, "ftypmsf1", "HEIC"},
        {4, 4, "ftyp", "MP4 or another video format"},
        {0, 12, "\0\0\0\14JXL \r\n\x87\n", "JPEG XL"},
        {0, 2, "\xff\x0a", "JPEG XL"},
        {0, 12, "\0\0\0\14jP  \r\n\x87\n", "JPEG 2000"},
        {0, 4, "\xff\x4f\xff\x51", "JPEG 2000"},
        {0, 4, "\0\0\1\0", "ICO"},
        {0, 4, "8BPS", "Photoshop"},
        {0, 5, "%PDF-", "PDF"},
        {0, 4, "<svg", "SVG"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (begins(data, size, known[i].at, known[i].magic, known[i].n)) return known[i].name;
    return NULL;
}

int qvl__image_decode(qvl_image **out, const uint8_t *data, size_t size, const qvl__image_limits *l) {
    *out = NULL;
    if (size == 0) return qvl__fail(QVL_EFORMAT, "image is empty: 0 bytes");
    if (l->bytes < 0 || size > (uint64_t)l->bytes)
        return qvl__fail(QVL_ELIMIT, "image of %zu bytes, more than the %lld that option max_image_bytes allows", size,
                         (long long)l->bytes);
    if (begins(data, size, 0, "\xff\xd8\xff", 3)) return qvl__jpeg_decode(out, data, size, l);
    if (begins(data, size, 0, "\x89PNG\r\n\x1a\n", 8)) return qvl__png_decode(out, data, size, l);
    if (begins(data, size, 0, "RIFF", 4) && begins(data, size, 8, "WEBP", 4)) return qvl__webp_decode(out, data, size, l);
    const char *name = foreign_format(data, size);
    if (name) return qvl__fail(QVL_EUNSUPPORTED, "%s is not supported: convert to JPEG, PNG or WebP", name);
    char head[3 * 8 + 1] = "";
    size_t n = size < 8 ? size : 8;
    for (size_t i = 0; i < n; i++) {
        static const char hex[] = "0123456789abcdef";
        memcpy(head + 3 * i, (char[]){hex[data[i] >> 4], hex[data[i] & 15], i + 1 < n ? ' ' : 0, 0}, 4);
    }
    return qvl__fail(QVL_EFORMAT, "not a JPEG, PNG or WebP image: the bytes begin with %s", head);
}

void qvl__over_white(uint8_t *rgb, const uint8_t *rgba, size_t pixels) {
    for (size_t i = 0; i < pixels; i++, rgb += 3, rgba += 4) {
        uint32_t a = rgba[3], white = 255 * (255 - a) + 127;
        for (int c = 0; c < 3; c++) rgb[c] = (uint8_t)((rgba[c] * a + white) / 255);
    }
}

/* ----------------------------------------------------------------------------------------------------- orientation */

static uint32_t number(const uint8_t *p, int bytes, bool big) {
    uint32_t v = 0;
    for (int i = 0; i < bytes; i++) v = v << 8 | p[big ? i : bytes - 1 - i];
    return v;
}

/* Tag 0x0112 of the first directory of a TIFF structure (TIFF 6.0, section 2): its value, or 0 when there is none.
 * As Pillow does: the first entry of a known type decides, by its first value; a value that is no orientation, or no
 * integer, means "no turn" (1). */
static int exif_tag(const uint8_t *p, size_t size) {
    for (int i = 0; i < 2 && size >= 6 && memcmp(p, "Exif\0\0", 6) == 0; i++) p += 6, size -= 6;
    if (size < 8) return 0;
    bool big = p[0] == 'M';
    if (memcmp(p, "II*\0", 4) != 0 && memcmp(p, "MM\0*", 4) != 0) return 0;
    uint32_t at = number(p + 4, 4, big);
    if (at > size || size - at < 2) return 0;
    uint32_t entries = number(p + at, 2, big);
    const uint8_t *e = p + at + 2, *end = p + size;
    for (uint32_t i = 0; i < entries && end - e >= 12; i++, e += 12) {
        if (number(e, 2, big) != 0x0112) continue;
        static const uint8_t unit[] = {0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4};
        uint32_t type = number(e + 2, 2, big), count = number(e + 4, 4, big);
        if (type == 0 || type >= sizeof unit || count == 0) continue;
        const uint8_t *value = e + 8;
        if ((uint64_t)count * unit[type] > 4) { /* stored elsewhere */
            uint64_t to = number(value, 4, big);
            if (to + (uint64_t)count * unit[type] > size) continue;
            value = p + to;
        }
        bool integer = type == 3 || type == 4 || type == 8 || type == 9 || type == 13; /* SHORT, LONG, SSHORT, SLONG, IFD */
        if (!integer) return 1;
        uint32_t v = number(value, unit[type], big);
        return v >= 1 && v <= 8 ? (int)v : 1;
    }
    return 0;
}

int qvl__exif_orientation(const uint8_t *exif, size_t size) {
    int v = exif && size > 0 ? exif_tag(exif, size) : 0;
    return v ? v : 1;
}

/* The first tiff:Orientation="N" or <tiff:Orientation>N in an XMP packet, 1 when there is none. */
static int xmp_orientation(const uint8_t *p, size_t size) {
    static const char name[] = "tiff:Orientation";
    for (const uint8_t *end = p + size; (p = memmem(p, (size_t)(end - p), name, sizeof name - 1)) != NULL;) {
        p += sizeof name - 1;
        size_t skip = begins(p, (size_t)(end - p), 0, "=\"", 2) ? 2 : begins(p, (size_t)(end - p), 0, ">", 1) ? 1 : 0;
        if (skip && (size_t)(end - p) > skip && p[skip] >= '0' && p[skip] <= '9')
            return p[skip] >= '1' && p[skip] <= '8' ? p[skip] - '0' : 1;
    }
    return 1;
}

int qvl__image_orientation(const uint8_t *exif, size_t exif_size, const uint8_t *xmp, size_t xmp_size) {
    int v = exif && exif_size > 0 ? exif_tag(exif, exif_size) : 0;
    if (v) return v;
    return xmp && xmp_size > 0 ? xmp_orientation(xmp, xmp_size) : 1;
}

int qvl__image_turn(qvl_image **im, int orientation) {
    if (orientation <= 1 || orientation > 8) return 0;
    const qvl_image *a = *im;
    bool swap = orientation >= 5;
    qvl_image *b;
    int code = qvl__image_alloc(&b, swap ? a->height : a->width, swap ? a->width : a->height);
    if (code < 0) return code;
    /* Pixel (x, y) of the result is pixel origin + x * dx + y * dy of the source (EXIF 2.3, tag 0x0112). */
    ptrdiff_t w = a->width, h = a->height, last_x = w - 1, last_y = (h - 1) * w;
    ptrdiff_t origin = 0, dx = 0, dy = 0;
    switch (orientation) {
    case 2: origin = last_x, dx = -1, dy = w; break;
    case 3: origin = last_x + last_y, dx = -1, dy = -w; break;
    case 4: origin = last_y, dx = 1, dy = -w; break;
    case 5: origin = 0, dx = w, dy = 1; break;
    case 6: origin = last_y, dx = -w, dy = 1; break;
    case 7: origin = last_x + last_y, dx = -w, dy = -1; break;
    case 8: origin = last_x, dx = w, dy = -1; break;
    }
    enum { TILE = 32 }; /* keeps both sides of a transposition in the cache */
    for (int y0 = 0; y0 < b->height; y0 += TILE)
        for (int x0 = 0; x0 < b->width; x0 += TILE) {
            int y1 = y0 + TILE < b->height ? y0 + TILE : b->height, x1 = x0 + TILE < b->width ? x0 + TILE : b->width;
            for (int y = y0; y < y1; y++) {
                uint8_t *d = b->rgb + ((size_t)y * (size_t)b->width + (size_t)x0) * 3;
                ptrdiff_t from = origin + x0 * dx + y * dy;
                for (int x = x0; x < x1; x++, d += 3, from += dx) {
                    const uint8_t *s = a->rgb + from * 3;
                    d[0] = s[0], d[1] = s[1], d[2] = s[2];
                }
            }
        }
    qvl__image_unref(*im);
    *im = b;
    return 0;
}

/* ------------------------------------------------------------------------------------------------------- data URIs */

static bool same_text(const char *s, size_t n, const char *lower) {
    if (n != strlen(lower)) return false;
    for (size_t i = 0; i < n; i++)
        if ((s[i] >= 'A' && s[i] <= 'Z' ? s[i] + 32 : s[i]) != lower[i]) return false;
    return true;
}

/* Value 0..63 of a base64 character (RFC 4648, both alphabets), 64 for white space, 65 for '=', 255 for anything else. */
enum { B64_SPACE = 64, B64_PAD = 65, B64_BAD = 255 };
static uint8_t base64_value(uint8_t c) {
    if (c >= 'A' && c <= 'Z') return (uint8_t)(c - 'A');
    if (c >= 'a' && c <= 'z') return (uint8_t)(c - 'a' + 26);
    if (c >= '0' && c <= '9') return (uint8_t)(c - '0' + 52);
    switch (c) {
    case '+': case '-': return 62;
    case '/': case '_': return 63;
    case ' ': case '\t': case '\r': case '\n': case '\f': return B64_SPACE;
    case '=': return B64_PAD;
    default: return B64_BAD;
    }
}

/* The values of four characters at once; false unless all are digits. */
static inline bool four_digits(const uint8_t *s, const uint8_t table[256], uint32_t *bits) {
    uint8_t a = table[s[0]], b = table[s[1]], c = table[s[2]], d = table[s[3]];
    *bits = (uint32_t)a << 18 | (uint32_t)b << 12 | (uint32_t)c << 6 | d;
    return (a | b | c | d) < 64;
}

/* Checks base64 text from byte at of uri to its end and counts its digits. */
static int base64_check(const char *uri, size_t at, size_t len, const uint8_t table[256], size_t *digits) {
    const uint8_t *s = (const uint8_t *)uri;
    size_t n = 0, pads = 0;
    for (size_t i = at; i < len; i++) {
        for (uint32_t bits; pads == 0 && len - i > 4 && four_digits(s + i, table, &bits); i += 4) n += 4;
        uint8_t c = s[i], v = table[c];
        if (v < 64 && pads == 0) n++;
        else if (v == B64_PAD && n % 4 >= 2 && pads < 4 - n % 4) pads++;
        else if (v != B64_SPACE) {
            if (v == B64_BAD)
                return qvl__fail(QVL_EFORMAT, "data URI: byte %zu (0x%02x) is not base64", i, c);
            return qvl__fail(QVL_EFORMAT, "data URI: %s at byte %zu", v == B64_PAD ? "misplaced '='" : "text after '='", i);
        }
    }
    if (n == 0) return qvl__fail(QVL_EFORMAT, "data URI: nothing follows the comma at byte %zu", at - 1);
    if (n % 4 == 1)
        return qvl__fail(QVL_EFORMAT, "data URI: base64 is cut off at byte %zu, %zu digits do not make whole bytes", len, n);
    *digits = n;
    return 0;
}

/* Bytes of text that base64_check has passed; returns their number. */
static size_t base64_decode(uint8_t *out, const char *uri, size_t at, size_t len, const uint8_t table[256]) {
    const uint8_t *s = (const uint8_t *)uri;
    uint32_t bits = 0, four;
    int have = 0; /* bits not yet written */
    size_t n = 0;
    for (size_t i = at; i < len; i++) {
        for (; have == 0 && len - i > 4 && four_digits(s + i, table, &four); i += 4) {
            out[n++] = (uint8_t)(four >> 16);
            out[n++] = (uint8_t)(four >> 8);
            out[n++] = (uint8_t)four;
        }
        uint8_t v = table[s[i]];
        if (v >= 64) continue;
        bits = bits << 6 | v;
        if ((have += 6) >= 8) out[n++] = (uint8_t)(bits >> (have -= 8));
    }
    return n;
}

/* Finds the comma of data:[type][;parameter...][;base64], in uri and checks what stands before it. */
static int uri_header(const char *uri, size_t len, size_t *data_at) {
    if (len < 5 || !same_text(uri, 5, "data:")) return qvl__fail(QVL_EINVAL, "not a data URI: it does not begin with \"data:\"");
    const char *comma = memchr(uri, ',', len);
    if (!comma) return qvl__fail(QVL_EFORMAT, "data URI: no comma between header and data in %zu bytes", len);
    bool base64 = false;
    const char *p = uri + 5;
    for (int field = 0;; field++) {
        const char *end = memchr(p, ';', (size_t)(comma - p));
        if (!end) end = comma;
        const char *a = p, *b = end;
        while (a < b && *a == ' ') a++;
        while (b > a && b[-1] == ' ') b--;
        size_t n = (size_t)(b - a);
        if (field == 0) { /* the type: the bytes tell more than it does, so only what can't be an image is refused */
            bool image = n >= 5 && same_text(a, 5, "image") && (n == 5 || a[5] == '/');
            if (n > 0 && !image && !same_text(a, n, "application/octet-stream"))
                return qvl__fail(QVL_EUNSUPPORTED, "data URI: type %.*s is not an image", n < 80 ? (int)n : 80, a);
        } else if (same_text(a, n, "base64")) {
            base64 = true;
        }
        if (end == comma) break;
        p = end + 1;
    }
    if (!base64)
        return qvl__fail(QVL_EUNSUPPORTED, "data URI: no \";base64\" before the comma at byte %zu; only base64 is read",
                         (size_t)(comma - uri));
    *data_at = (size_t)(comma - uri) + 1;
    return 0;
}

int qvl__image_from_data_uri(qvl_image **out, const char *uri, size_t len, const qvl__image_limits *l) {
    *out = NULL;
    size_t at = 0, digits = 0;
    int code = uri_header(uri, len, &at);
    if (code < 0) return code;
    uint8_t table[256];
    for (int i = 0; i < 256; i++) table[i] = base64_value((uint8_t)i);
    code = base64_check(uri, at, len, table, &digits);
    if (code < 0) return code;
    size_t bytes = digits / 4 * 3 + (digits % 4 ? digits % 4 - 1 : 0);
    if (l->bytes < 0 || bytes > (uint64_t)l->bytes)
        return qvl__fail(QVL_ELIMIT, "data URI: image of %zu bytes, more than the %lld that option max_image_bytes allows", bytes,
                         (long long)l->bytes);
    uint8_t *data = qvl__malloc(bytes);
    if (!data) return QVL_ENOMEM;
    size_t n = base64_decode(data, uri, at, len, table);
    code = qvl__image_decode(out, data, n, l);
    qvl__free(data);
    return code;
}
