/* jpeg.c - JPEG by libjpeg-turbo.
 *
 * Job:        baseline, progressive and arithmetic-coded JPEG of 1, 3 or 4 components to RGB.
 * Input:      the whole file, untrusted; limits.
 * Output:     qvl_image, turned as EXIF or XMP says.
 * Invariants: the same bytes as Pillow (accurate integer DCT, fancy upsampling, CMYK as Adobe stores it); a file that
 *             ends too soon is an error, never a half grey picture; work is bounded by size and number of scans;
 *             setjmp and longjmp stay inside this file, and no object with a destructor lives between them.
 */
#include <limits.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#include "encode.h"

/* Each scan of a progressive file costs a pass over the whole picture, and a scan may be a few bytes long. Encoders
 * write about 10; libjpeg-turbo's own advice is to stop at 500. The second bound keeps large pictures to seconds. */
#define MAX_SCANS 500
#define MAX_SCANNED_PIXELS 4000000000LL

/* Rows handed to libjpeg at once. */
#define ROWS 16

/* One decoding. Lives in qvl__jpeg_decode's frame, outside of the function that calls setjmp, so nothing in it is
 * lost by a longjmp. */
typedef struct {
    struct jpeg_decompress_struct cinfo;
    struct jpeg_error_mgr errors;
    struct jpeg_source_mgr source;
    struct jpeg_progress_mgr progress;
    jmp_buf jump;
    const qvl__image_limits *limits;
    qvl_image *image;
    uint8_t *cmyk; /* ROWS rows of 4 components */
    int code;      /* set before a jump by our own callbacks */
} job;

/* ---- callbacks; cinfo.client_data is the job ---- */

static void on_error(j_common_ptr cinfo) {
    job *j = cinfo->client_data;
    if (j->code == 0) {
        char text[JMSG_LENGTH_MAX];
        j->errors.format_message(cinfo, text);
        switch (j->errors.msg_code) {
        case JERR_OUT_OF_MEMORY: j->code = qvl__fail(QVL_ENOMEM, "JPEG: out of memory"); break;
        case JERR_IMAGE_TOO_BIG:
            j->code = qvl__fail(QVL_ELIMIT, "JPEG: image of %u x %u pixels: a JPEG side can be %ld at most", j->cinfo.image_width,
                                j->cinfo.image_height, JPEG_MAX_DIMENSION);
            break;
        case JERR_EMPTY_IMAGE:
            j->code = qvl__fail(QVL_EFORMAT, "JPEG: image of %u x %u pixels: both sides must be at least 1", j->cinfo.image_width,
                                j->cinfo.image_height);
            break;
        case JERR_BAD_PRECISION:
        case JERR_SOF_UNSUPPORTED:
        case JERR_ARITH_NOTIMPL:
        case JERR_CONVERSION_NOTIMPL:
            j->code = qvl__fail(QVL_EUNSUPPORTED, "JPEG: %s: convert to an 8-bit baseline or progressive JPEG", text);
            break;
        default: j->code = qvl__fail(QVL_EFORMAT, "JPEG is damaged: %s", text);
        }
    }
    longjmp(j->jump, 1);
}

static void on_message(j_common_ptr cinfo, int level) {
    if (level < 0) cinfo->err->num_warnings++;
}

static void print_nothing(j_common_ptr cinfo) { (void)cinfo; }

static void on_progress(j_common_ptr cinfo) {
    job *j = cinfo->client_data;
    int64_t scans = j->cinfo.input_scan_number;
    if (scans > MAX_SCANS || scans * j->cinfo.image_width * j->cinfo.image_height > MAX_SCANNED_PIXELS) {
        j->code = qvl__fail(QVL_ELIMIT,
                            "JPEG: %lld scans or more for %u x %u pixels; at most %d scans and %lld scanned pixels are decoded",
                            (long long)scans, j->cinfo.image_width, j->cinfo.image_height, MAX_SCANS, MAX_SCANNED_PIXELS);
        longjmp(j->jump, 1);
    }
}

/* The source holds the whole file. At its end it "suspends" (returns FALSE), so libjpeg's calls tell us that data is
 * missing; the usual memory source would make up an end marker and fill the picture with grey. Pillow does the same. */
static void source_nothing(j_decompress_ptr cinfo) { (void)cinfo; }
static boolean source_end(j_decompress_ptr cinfo) { return (void)cinfo, FALSE; }
static void source_skip(j_decompress_ptr cinfo, long n) {
    if (n <= 0) return;
    size_t have = cinfo->src->bytes_in_buffer, skip = (unsigned long)n < have ? (size_t)n : have;
    cinfo->src->next_input_byte += skip;
    cinfo->src->bytes_in_buffer -= skip;
}

/* ---- pixels ---- */

static uint8_t muldiv255(uint32_t a, uint32_t b) {
    uint32_t t = a * b + 128;
    return (uint8_t)((t + (t >> 8)) >> 8);
}

/* Adobe stores CMYK inverted; that is assumed of every file. Ink to RGB is Pillow's cmyk2rgb: R = (255-K) - C (255-K). */
static void cmyk_to_rgb(uint8_t *rgb, const uint8_t *s, size_t pixels) {
    for (size_t i = 0; i < pixels; i++, rgb += 3, s += 4)
        for (int c = 0; c < 3; c++) rgb[c] = (uint8_t)(s[3] - muldiv255(255u - s[c], s[3]));
}

static int truncated(const job *j) {
    return qvl__fail(QVL_EFORMAT, "JPEG is truncated: the data ends at row %u of %u", j->cinfo.output_scanline, j->cinfo.image_height);
}

static int read_rows(job *j) {
    struct jpeg_decompress_struct *c = &j->cinfo;
    size_t width = c->output_width;
    while (c->output_scanline < c->output_height) {
        JSAMPROW rows[ROWS];
        JDIMENSION first = c->output_scanline, n = c->output_height - first < ROWS ? c->output_height - first : ROWS;
        for (JDIMENSION i = 0; i < n; i++)
            rows[i] = j->cmyk ? j->cmyk + i * width * 4 : j->image->rgb + (first + i) * width * 3;
        JDIMENSION got = jpeg_read_scanlines(c, rows, n);
        if (got == 0) return truncated(j);
        if (j->cmyk) cmyk_to_rgb(j->image->rgb + first * width * 3, j->cmyk, got * width);
    }
    return 0;
}

/* Orientation from the saved APP1 markers: EXIF, or an XMP packet. */
static int orientation(const struct jpeg_decompress_struct *c) {
    static const char xmp_name[] = "http://ns.adobe.com/xap/1.0/"; /* the terminating zero is part of it */
    const uint8_t *exif = NULL, *xmp = NULL;
    size_t exif_size = 0, xmp_size = 0;
    for (jpeg_saved_marker_ptr m = c->marker_list; m; m = m->next) {
        if (!exif && m->data_length >= 6 && memcmp(m->data, "Exif\0\0", 6) == 0) exif = m->data, exif_size = m->data_length;
        if (m->data_length >= sizeof xmp_name && memcmp(m->data, xmp_name, sizeof xmp_name) == 0)
            xmp = m->data + sizeof xmp_name, xmp_size = m->data_length - sizeof xmp_name;
    }
    return qvl__image_orientation(exif, exif_size, xmp, xmp_size);
}

static int decode(job *j) {
    struct jpeg_decompress_struct *c = &j->cinfo;
    if (setjmp(j->jump)) return j->code;
    jpeg_create_decompress(c); /* keeps err and client_data */
    c->src = &j->source;
    c->progress = &j->progress;
    jpeg_save_markers(c, JPEG_APP0 + 1, 0xFFFF);
    if (jpeg_read_header(c, TRUE) != JPEG_HEADER_OK) return qvl__fail(QVL_EFORMAT, "JPEG is truncated: the data ends in the header");
    int code = qvl__image_check_size(c->image_width, c->image_height, j->limits);
    if (code < 0) return qvl__context(code, "JPEG");
    if (c->num_components != 1 && c->num_components != 3 && c->num_components != 4)
        return qvl__fail(QVL_EUNSUPPORTED, "JPEG: %d components; grey (1), colour (3) and CMYK (4) are supported", c->num_components);
    bool cmyk = c->num_components == 4;
    c->out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    c->dct_method = JDCT_ISLOW;
    c->do_fancy_upsampling = TRUE;
    if (!jpeg_start_decompress(c)) return truncated(j); /* a progressive file is read to its end here */
    code = qvl__image_alloc(&j->image, (int)c->output_width, (int)c->output_height);
    if (code < 0) return code;
    if (cmyk && !(j->cmyk = qvl__malloc((size_t)c->output_width * 4 * ROWS))) return QVL_ENOMEM;
    code = read_rows(j);
    if (code < 0) return code;
    if (c->err->num_warnings)
        qvl__log(QVL_LOG_WARN, "JPEG: %ld places of %u x %u pixels are damaged", c->err->num_warnings, c->image_width,
                 c->image_height);
    return qvl__image_turn(&j->image, orientation(c)); /* the end marker may be missing: nothing after the pixels matters */
}

int qvl__jpeg_decode(qvl_image **out, const uint8_t *data, size_t size, const qvl__image_limits *l) {
    *out = NULL;
    job j = {.limits = l};
    j.cinfo.err = jpeg_std_error(&j.errors);
    j.cinfo.client_data = &j;
    j.errors.error_exit = on_error;
    j.errors.emit_message = on_message;
    j.errors.output_message = print_nothing;
    j.progress.progress_monitor = on_progress;
    j.source = (struct jpeg_source_mgr){.next_input_byte = data,
                                        .bytes_in_buffer = size,
                                        .init_source = source_nothing,
                                        .fill_input_buffer = source_end,
                                        .skip_input_data = source_skip,
                                        .resync_to_restart = jpeg_resync_to_restart,
                                        .term_source = source_nothing};
    int code = decode(&j);
    jpeg_destroy_decompress(&j.cinfo);
    qvl__free(j.cmyk);
    if (code < 0) {
        qvl__image_unref(j.image);
        return code;
    }
    *out = j.image;
    return 0;
}
