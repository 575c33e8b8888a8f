/* webp.c - WebP by libwebp.
 *
 * Job:        lossy and lossless WebP, with or without alpha, to RGB.
 * Input:      the whole file, untrusted; limits.
 * Output:     qvl_image, alpha laid over white, turned as EXIF or XMP says.
 * Invariants: the size in every header is checked before libwebp is called; animations are refused by name; a file
 *             that ends too soon is an error.
 *
 * The container (RIFF, WebP Container Specification) is walked here for the canvas size and the metadata, so that
 * libwebpdemux is not needed.
 */
#include <string.h>

#include <webp/decode.h>

#include "encode.h"

typedef struct {
    const uint8_t *exif, *xmp;
    size_t exif_size, xmp_size;
} metadata;

static uint32_t u24(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16; }

/* Walks the chunks: checks the canvas of VP8X, refuses animations, finds EXIF and XMP. What is cut off or damaged behind
 * is left to libwebp to judge. */
static int walk(metadata *m, const uint8_t *data, size_t size, const qvl__image_limits *l) {
    for (size_t at = 12; size - at >= 8;) {
        const uint8_t *p = data + at + 8;
        size_t room = size - at - 8, n = (size_t)u24(data + at + 4) | (size_t)data[at + 7] << 24;
        if (memcmp(data + at, "VP8X", 4) == 0 && room >= 10) {
            int code = qvl__image_check_size((int64_t)u24(p + 4) + 1, (int64_t)u24(p + 7) + 1, l);
            if (code < 0) return qvl__context(code, "WebP");
            if (p[0] & 2)
                return qvl__fail(QVL_EUNSUPPORTED, "animated WebP is not supported: pass its frames as images or as a video");
        }
        if (n > room) break;
        if (memcmp(data + at, "EXIF", 4) == 0 && !m->exif) m->exif = p, m->exif_size = n;
        if (memcmp(data + at, "XMP ", 4) == 0 && !m->xmp) m->xmp = p, m->xmp_size = n;
        n += n & 1; /* chunks are padded to even sizes */
        if (n > room) break;
        at += 8 + n;
    }
    return 0;
}

static int failed(VP8StatusCode status) {
    switch (status) {
    case VP8_STATUS_OUT_OF_MEMORY: return qvl__fail(QVL_ENOMEM, "WebP: out of memory");
    case VP8_STATUS_NOT_ENOUGH_DATA:
    case VP8_STATUS_SUSPENDED: return qvl__fail(QVL_EFORMAT, "WebP is truncated: the data ends before the last pixel");
    case VP8_STATUS_UNSUPPORTED_FEATURE:
        return qvl__fail(QVL_EUNSUPPORTED, "WebP: the file uses a feature that libwebp does not decode: convert to JPEG or PNG");
    default: return qvl__fail(QVL_EFORMAT, "WebP is damaged");
    }
}

static int decode(qvl_image *im, const uint8_t *data, size_t size, bool alpha) {
    WebPDecoderConfig config;
    if (!WebPInitDecoderConfig(&config)) return qvl__fail(QVL_EINTERNAL, "libwebp is not the version that libqvl was built for");
    size_t pixels = (size_t)im->width * (size_t)im->height, channels = alpha ? 4 : 3;
    uint8_t *buffer = im->rgb;
    if (alpha && !(buffer = qvl__array(NULL, pixels, 4))) return QVL_ENOMEM;
    config.output.colorspace = alpha ? MODE_RGBA : MODE_RGB;
    config.output.is_external_memory = 1;
    config.output.u.RGBA.rgba = buffer;
    config.output.u.RGBA.stride = im->width * (int)channels;
    config.output.u.RGBA.size = pixels * channels;
    VP8StatusCode status = WebPDecode(data, size, &config);
    WebPFreeDecBuffer(&config.output);
    int code = status == VP8_STATUS_OK ? 0 : failed(status);
    if (alpha) {
        if (code == 0) qvl__over_white(im->rgb, buffer, pixels);
        qvl__free(buffer);
    }
    return code;
}

int qvl__webp_decode(qvl_image **out, const uint8_t *data, size_t size, const qvl__image_limits *l) {
    *out = NULL;
    if (size < 20) return qvl__fail(QVL_EFORMAT, "WebP is truncated: %zu bytes do not hold the header", size);
    metadata m = {0};
    int code = walk(&m, data, size, l);
    if (code < 0) return code;
    WebPBitstreamFeatures f;
    VP8StatusCode status = WebPGetFeatures(data, size, &f);
    if (status != VP8_STATUS_OK) return failed(status);
    code = qvl__image_check_size(f.width, f.height, l);
    if (code < 0) return qvl__context(code, "WebP");
    qvl_image *im;
    code = qvl__image_alloc(&im, f.width, f.height);
    if (code < 0) return code;
    code = decode(im, data, size, f.has_alpha);
    if (code == 0) code = qvl__image_turn(&im, qvl__image_orientation(m.exif, m.exif_size, m.xmp, m.xmp_size));
    if (code < 0) {
        qvl__image_unref(im);
        return code;
    }
    *out = im;
    return 0;
}
