/* image.c - the public image functions.
 *
 * Job:        check arguments, read options, call encode/.
 * Input:      bytes, a path or pixels of the caller.
 * Output:     qvl_image handles.
 * Invariants: *out is NULL after a failure; errors of a file begin with its path.
 */
#include <string.h>

#include "../encode/encode.h"

int qvl_image_from_bytes(qvl_image **out, const void *data, size_t size, const qvl_options *o) {
    if (!out) return qvl__fail(QVL_EINVAL, "qvl_image_from_bytes: out is NULL");
    *out = NULL;
    if (!data && size > 0) return qvl__fail(QVL_EINVAL, "qvl_image_from_bytes: data is NULL");
    qvl__image_limits limits = qvl__image_limits_of(o);
    return qvl__image_decode(out, data, size, &limits);
}

int qvl_image_from_data_uri(qvl_image **out, const char *uri, size_t len, const qvl_options *o) {
    if (!out) return qvl__fail(QVL_EINVAL, "qvl_image_from_data_uri: out is NULL");
    *out = NULL;
    if (!uri) return qvl__fail(QVL_EINVAL, "qvl_image_from_data_uri: uri is NULL");
    qvl__image_limits limits = qvl__image_limits_of(o);
    return qvl__image_from_data_uri(out, uri, len, &limits);
}

int qvl_image_from_file(qvl_image **out, const char *path, const qvl_options *o) {
    if (!out) return qvl__fail(QVL_EINVAL, "qvl_image_from_file: out is NULL");
    *out = NULL;
    if (!path) return qvl__fail(QVL_EINVAL, "qvl_image_from_file: path is NULL");
    qvl__image_limits limits = qvl__image_limits_of(o);
    char *data;
    size_t size;
    /* Read, not mapped: a file that becomes shorter meanwhile must not kill the process. */
    int code = qvl__read_file(path, (size_t)limits.bytes, &data, &size);
    if (code == QVL_ELIMIT) return qvl__fail(code, "%s (option max_image_bytes)", qvl_last_error());
    if (code < 0) return code;
    code = qvl__image_decode(out, (const uint8_t *)data, size, &limits);
    qvl__free(data);
    return code < 0 ? qvl__context(code, "%s", path) : 0;
}

int qvl_image_from_pixels(qvl_image **out, const void *rgb, int width, int height, size_t row_bytes) {
    if (!out) return qvl__fail(QVL_EINVAL, "qvl_image_from_pixels: out is NULL");
    *out = NULL;
    if (!rgb) return qvl__fail(QVL_EINVAL, "qvl_image_from_pixels: rgb is NULL");
    if (width <= 0 || height <= 0)
        return qvl__fail(QVL_EINVAL, "qvl_image_from_pixels: %d x %d pixels: both sides must be at least 1", width, height);
    size_t row = (size_t)width * 3;
    if (row_bytes == 0) row_bytes = row;
    if (row_bytes < row)
        return qvl__fail(QVL_EINVAL, "qvl_image_from_pixels: row_bytes is %zu, but a row of %d pixels has %zu bytes", row_bytes, width,
                         row);
    int code = qvl__image_alloc(out, width, height);
    if (code < 0) return code;
    for (size_t y = 0; y < (size_t)height; y++) memcpy((*out)->rgb + y * row, (const uint8_t *)rgb + y * row_bytes, row);
    return 0;
}

void qvl_image_free(qvl_image *im) { qvl__image_unref(im); }
int qvl_image_width(const qvl_image *im) { return im ? im->width : 0; }
int qvl_image_height(const qvl_image *im) { return im ? im->height : 0; }
const uint8_t *qvl_image_pixels(const qvl_image *im) { return im ? im->rgb : NULL; }
