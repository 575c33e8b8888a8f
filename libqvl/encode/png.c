/* png.c - PNG by libpng.
 *
 * Job:        PNG of every colour type, bit depth and interlacing to RGB.
 * Input:      the whole file, untrusted; limits.
 * Output:     qvl_image, alpha laid over white, turned as EXIF or XMP says; of an animation the default picture.
 * Invariants: 16 bits are cut to the high byte; gamma, profiles and background are ignored, as Pillow does; missing
 *             pixels are an error, damage after the last pixel is not; setjmp and longjmp stay inside this file.
 */
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include <png.h>

#include "encode.h"

/* Memory for one metadata chunk; metadata is only read for the orientation. */
#define MAX_CHUNK ((png_alloc_size_t)4 << 20)

/* One decoding; lives outside of the function that calls setjmp. */
typedef struct {
    png_structp png;
    png_infop info;
    const uint8_t *data;
    size_t size, at;
    bool ended; /* libpng asked for bytes after the end */
    char message[128];
    const qvl__image_limits *limits;
    qvl_image *image;
    uint8_t *rgba;    /* with alpha: one row, or all rows when interlaced */
    png_bytep *rows;  /* interlaced: all rows */
    bool pixels_done;
} job;

static void on_error(png_structp png, png_const_charp text) {
    job *j = png_get_error_ptr(png);
    strncpy(j->message, text, sizeof j->message - 1);
    png_longjmp(png, 1);
}

static void on_warning(png_structp png, png_const_charp text) { (void)png, (void)text; }

static void on_read(png_structp png, png_bytep out, size_t n) {
    job *j = png_get_io_ptr(png);
    if (n > j->size - j->at) {
        j->ended = true;
        png_error(png, "the data ends too soon");
    }
    memcpy(out, j->data + j->at, n);
    j->at += n;
}

/* The size, before libpng sees it: 8 bytes of signature, length, "IHDR", width, height, 5 bytes of types, checksum. */
static int check_header(const job *j) {
    const uint8_t *p = j->data;
    if (j->size < 33) return qvl__fail(QVL_EFORMAT, "PNG is truncated: %zu bytes do not hold the header", j->size);
    if (memcmp(p + 12, "IHDR", 4) != 0) return qvl__fail(QVL_EFORMAT, "PNG is damaged: the first chunk is not IHDR");
    int code = qvl__image_check_size(png_get_uint_32(p + 16), png_get_uint_32(p + 20), j->limits);
    return code < 0 ? qvl__context(code, "PNG") : 0;
}

/* Bytes of the file that libpng gets to see: up to the first chunk that claims more than there is. libpng would take memory
 * for such a chunk before it found out. Image data is read in pieces, so a cut there may stay. */
static size_t sound_size(const uint8_t *p, size_t size) {
    for (size_t at = 8; size - at >= 12;) {
        size_t n = png_get_uint_32(p + at);
        if (n > size - at - 12) return memcmp(p + at + 4, "IDAT", 4) == 0 ? size : at;
        at += 12 + n;
    }
    return size;
}

/* EXIF as ImageMagick writes it into PNG text: "\nexif\n   <length>\n<hex digits, wrapped>\n". Decoded in place. */
static size_t unhex_profile(char *text, size_t n) {
    size_t at = 0, out = 0;
    for (int lines = 0; lines < 3; lines++) {
        char *nl = memchr(text + at, '\n', n - at);
        if (!nl) return 0;
        at = (size_t)(nl - text) + 1;
    }
    int half = -1;
    for (; at < n; at++) {
        char c = text[at];
        int v = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (v < 0) continue;
        if (half < 0) half = v;
        else text[out++] = (char)(half << 4 | v), half = -1;
    }
    return out;
}

/* Orientation from an eXIf chunk, a "Raw profile type exif" text or an XMP text, in this order. */
static int orientation(const job *j) {
    png_bytep exif = NULL;
    png_uint_32 exif_size = 0;
    const uint8_t *xmp = NULL;
    size_t xmp_size = 0;
    png_get_eXIf_1(j->png, j->info, &exif_size, &exif);
    png_textp text = NULL;
    int n = 0;
    png_get_text(j->png, j->info, &text, &n);
    for (int i = 0; i < n; i++) {
        size_t length = text[i].compression >= PNG_ITXT_COMPRESSION_NONE ? text[i].itxt_length : text[i].text_length;
        if (!text[i].text || length == 0) continue;
        if (!exif && strcmp(text[i].key, "Raw profile type exif") == 0) {
            exif = (png_bytep)text[i].text;
            exif_size = (png_uint_32)unhex_profile(text[i].text, length);
        } else if (strcmp(text[i].key, "XML:com.adobe.xmp") == 0) {
            xmp = (const uint8_t *)text[i].text;
            xmp_size = length;
        }
    }
    return qvl__image_orientation(exif, exif_size, xmp, xmp_size);
}

static int read_pixels(job *j) {
    png_structp png = j->png;
    size_t width = (size_t)j->image->width, height = (size_t)j->image->height;
    size_t channels = png_get_channels(png, j->info);
    bool interlaced = png_get_interlace_type(png, j->info) != PNG_INTERLACE_NONE;
    if (png_get_bit_depth(png, j->info) != 8 || (channels != 3 && channels != 4) || png_get_rowbytes(png, j->info) != width * channels)
        return qvl__fail(QVL_EINTERNAL, "PNG: libpng gives %zu channels of %d bits", channels, png_get_bit_depth(png, j->info));
    if (channels == 4 && !(j->rgba = qvl__array(NULL, width * (interlaced ? height : 1), 4))) return QVL_ENOMEM;
    if (interlaced) { /* every pass touches all rows */
        if (!(j->rows = qvl__array(NULL, height, sizeof *j->rows))) return QVL_ENOMEM;
        for (size_t y = 0; y < height; y++) j->rows[y] = channels == 4 ? j->rgba + y * width * 4 : j->image->rgb + y * width * 3;
        png_read_image(png, j->rows);
        if (channels == 4) qvl__over_white(j->image->rgb, j->rgba, width * height);
        return 0;
    }
    for (size_t y = 0; y < height; y++) {
        uint8_t *row = j->image->rgb + y * width * 3;
        png_read_row(png, channels == 4 ? j->rgba : row, NULL);
        if (channels == 4) qvl__over_white(row, j->rgba, width);
    }
    return 0;
}

static int decode(job *j) {
    png_structp png = j->png;
    if (setjmp(png_jmpbuf(png))) {
        if (j->pixels_done) return 0; /* only metadata after the picture is damaged or missing */
        if (j->ended && j->image) return qvl__fail(QVL_EFORMAT, "PNG is truncated: the data ends before the last row");
        if (j->ended) return qvl__fail(QVL_EFORMAT, "PNG is truncated: the data ends in the header");
        return qvl__fail(strstr(j->message, "emory") ? QVL_ENOMEM : QVL_EFORMAT, "PNG is damaged: %s", j->message);
    }
    png_set_read_fn(png, j, on_read);
    png_set_user_limits(png, 0x7fffffff, 0x7fffffff); /* ours were checked already */
    png_set_chunk_malloc_max(png, MAX_CHUNK);
    static const png_byte unused[] = "iCCP\0sPLT\0pCAL\0sCAL"; /* not even inflated */
    png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_NEVER, unused, 4);
    png_read_info(png, j->info);

    int type = png_get_color_type(png, j->info);
    png_set_expand(png); /* palette to RGB, grey of 1, 2, 4 bits to 8, tRNS to alpha */
    png_set_strip_16(png);
    if (!(type & PNG_COLOR_MASK_COLOR)) png_set_gray_to_rgb(png);
    png_set_interlace_handling(png);
    png_read_update_info(png, j->info);

    int code = qvl__image_alloc(&j->image, (int)png_get_image_width(png, j->info), (int)png_get_image_height(png, j->info));
    if (code == 0) code = read_pixels(j);
    if (code < 0) return code;
    j->pixels_done = true;
    png_read_end(png, j->info);
    return 0;
}

int qvl__png_decode(qvl_image **out, const uint8_t *data, size_t size, const qvl__image_limits *l) {
    *out = NULL;
    job j = {.data = data, .size = size, .limits = l};
    int code = check_header(&j);
    if (code < 0) return code;
    j.size = sound_size(data, size);
    j.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &j, on_error, on_warning);
    j.info = j.png ? png_create_info_struct(j.png) : NULL;
    code = j.info ? decode(&j) : qvl__fail(QVL_ENOMEM, "PNG: out of memory");
    if (code == 0) code = qvl__image_turn(&j.image, orientation(&j));
    png_destroy_read_struct(&j.png, &j.info, NULL);
    qvl__free(j.rgba);
    qvl__free(j.rows);
    if (code < 0) {
        qvl__image_unref(j.image);
        return code;
    }
    *out = j.image;
    return 0;
}
