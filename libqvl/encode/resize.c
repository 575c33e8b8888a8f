/* resize.c - how large a picture becomes, and making it so.
 *
 * Job:        Qwen's smart_resize for images and videos; antialiased bicubic resizing of 8-bit RGB.
 * Input:      sizes; pixels [h][w][3].
 * Output:     sizes that are multiples of patch x merge; pixels [h][w][3].
 * Invariants: the bits of torchvision's resize(BICUBIC, antialias=True) on uint8 tensors (PyTorch's
 *             aten/native/cpu/UpSampleKernel.cpp): Keys' cubic with a = -0.5, weights normalised in double and rounded
 *             to int16 with one shift per axis, horizontal pass first and rounded to 8 bits, an axis that keeps its
 *             size is skipped; the same for every instruction set and every number of threads.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "encode.h"

/* ---------------------------------------------------------------------------------------------------- smart_resize */

static int check_sides(int64_t height, int64_t width) {
    if (height <= 0 || width <= 0)
        return qvl__fail(QVL_EINVAL, "image of %lld x %lld pixels: both sides must be at least 1", (long long)width,
                         (long long)height);
    int64_t a = height < width ? height : width, b = height < width ? width : height;
    if (b > 200 * a)
        return qvl__fail(QVL_ELIMIT, "image is %lld pixels wide and %lld high: one side may be at most 200 times the other",
                         (long long)width, (long long)height);
    return 0;
}

/* Scales sides so that the area (times frames) comes under max or over min. Doubles in the order of the reference:
 * round() there is half to even, division of integers is exact to one rounding. */
static int fit(double height, double width, double frames, double frames_bar, int factor, int64_t min_pixels, int64_t max_pixels,
               int *out_h, int *out_w) {
    double f = factor, h = rint(height / f) * f, w = rint(width / f) * f;
    if (frames_bar * h * w > (double)max_pixels) {
        double beta = sqrt(frames * height * width / (double)max_pixels);
        h = fmax(f, floor(height / beta / f) * f);
        w = fmax(f, floor(width / beta / f) * f);
    } else if (frames_bar * h * w < (double)min_pixels) {
        double beta = sqrt((double)min_pixels / (frames * height * width));
        h = ceil(height * beta / f) * f;
        w = ceil(width * beta / f) * f;
    }
    if (!(h >= f && w >= f && h * w <= 2147483647.0))
        return qvl__fail(QVL_EINVAL,
                         "image of %.0f x %.0f pixels cannot be resized to %lld..%lld pixels (options min_pixels, max_pixels)", width,
                         height, (long long)min_pixels, (long long)max_pixels);
    *out_h = (int)h;
    *out_w = (int)w;
    return 0;
}

int qvl__smart_resize(int height, int width, int factor, int64_t min_pixels, int64_t max_pixels, int *out_h, int *out_w) {
    int code = check_sides(height, width);
    if (code < 0) return code;
    return fit(height, width, 1, 1, factor, min_pixels, max_pixels, out_h, out_w);
}

int qvl__smart_resize_video(int frames, int height, int width, int factor, int temporal, int64_t min_pixels, int64_t max_pixels,
                            int *out_h, int *out_w) {
    if (frames < temporal) frames = temporal; /* a single frame is shown twice */
    double h = height, w = width;
    if (height > 0 && width > 0 && (height < factor || width < factor)) {
        double scale = fmax((double)factor / h, (double)factor / w);
        h = trunc(h * scale);
        w = trunc(w * scale);
    }
    int code = check_sides((int64_t)h, (int64_t)w);
    if (code < 0) return code;
    return fit(h, w, frames, rint((double)frames / temporal) * temporal, factor, min_pixels, max_pixels, out_h, out_w);
}

/* --------------------------------------------------------------------------------------------------------- weights */

/* The weights of one axis: output i is the sum of w[i * stride + k] * in[first[i] + k] over k < taps, plus half, >> shift.
 * Weights past an output's own taps are zero up to stride; stride is a multiple of 4. */
typedef struct {
    int out, taps, stride, shift;
    int *first;
    int16_t *w;
} axis;

static void axis_free(axis *a) {
    qvl__free(a->first);
    qvl__free(a->w);
    *a = (axis){0};
}

/* Keys, "Cubic convolution interpolation for digital image processing", 1981, with a = -0.5. */
static double cubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

/* The inputs that output i takes: [*first, *first + result). */
static int span(int i, int in, double scale, double support, int limit, int *first) {
    double centre = scale * (i + 0.5), lo = centre - support + 0.5, hi = centre + support + 0.5;
    int a = lo > 0 ? (int)lo : 0, b = hi < in ? (int)hi : in, n = b - a;
    *first = a;
    return n < 0 ? 0 : n > limit ? limit : n;
}

static int axis_make(axis *a, int in, int out) {
    *a = (axis){.out = out};
    double scale = (double)in / out, support = scale >= 1 ? 2 * scale : 2, inverse = scale >= 1 ? 1 / scale : 1;
    int limit = (int)ceil(support) * 2 + 1, code = QVL_ENOMEM; /* fits: sides are at most MAX_SIDE */
    double *exact = NULL;
    if (!(a->first = qvl__array(NULL, (size_t)out, sizeof *a->first))) return code;
    for (int i = 0; i < out; i++) {
        int n = span(i, in, scale, support, limit, &a->first[i]);
        if (n > a->taps) a->taps = n;
    }
    a->stride = (a->taps + 3) & ~3;
    /* In double first: the shift depends on the largest weight of all. About 4 in + 8 out entries in total. */
    if (!(exact = qvl__calloc((size_t)out * (size_t)a->stride, sizeof *exact))) goto done;
    if (!(a->w = qvl__calloc((size_t)out * (size_t)a->stride, sizeof *a->w))) goto done;
    double largest = 0;
    for (int i = 0; i < out; i++) {
        double *w = exact + (size_t)i * (size_t)a->stride, sum = 0, from = a->first[i] - scale * (i + 0.5);
        int first, n = span(i, in, scale, support, limit, &first);
        for (int k = 0; k < n; k++) sum += w[k] = cubic((k + from + 0.5) * inverse);
        for (int k = 0; k < n && sum != 0; k++) {
            w[k] /= sum;
            if (w[k] > largest) largest = w[k];
        }
    }
    while (a->shift < 22 && (int)(0.5 + largest * (1 << (a->shift + 1))) < 1 << 15) a->shift++;
    for (size_t k = 0; k < (size_t)out * (size_t)a->stride; k++) {
        double v = exact[k] * (1 << a->shift);
        a->w[k] = (int16_t)(v < 0 ? v - 0.5 : v + 0.5);
    }
    code = 0;
done:
    qvl__free(exact);
    if (code < 0) axis_free(a);
    return code;
}

/* --------------------------------------------------------------------------------------------------------- kernels */

static inline uint8_t clamp(int32_t v) { return v < 0 ? 0 : v > 255 ? 255 : (uint8_t)v; }

/* Four rows through the horizontal axis. Reads past the ends of rows, as rows4_avx2 does, with weights of zero. */
static void rows4_plain(uint8_t *const dst[4], const uint8_t *const src[4], const axis *x) {
    for (int r = 0; r < 4; r++)
        for (int i = 0; i < x->out; i++) {
            const int16_t *w = x->w + (size_t)i * (size_t)x->stride;
            const uint8_t *s = src[r] + (size_t)x->first[i] * 3;
            int32_t half = 1 << (x->shift - 1), red = half, green = half, blue = half;
            for (int k = 0; k < x->taps; k++, s += 3) red += w[k] * s[0], green += w[k] * s[1], blue += w[k] * s[2];
            uint8_t *d = dst[r] + (size_t)i * 3;
            d[0] = clamp(red >> x->shift), d[1] = clamp(green >> x->shift), d[2] = clamp(blue >> x->shift);
        }
}

enum { BLOCK = 32 }; /* bytes of a row that the vertical kernels do at once */

/* One row of the vertical axis, bytes [at, n): dst = sum of w[k] * rows[k]. */
static void column_tail(uint8_t *dst, const uint8_t *const *rows, const int16_t *w, const axis *y, size_t at, size_t n) {
    for (; at < n; at++) {
        int32_t sum = 1 << (y->shift - 1);
        for (int k = 0; k < y->taps; k++) sum += w[k] * rows[k][at];
        dst[at] = clamp(sum >> y->shift);
    }
}

static void column_plain(uint8_t *dst, const uint8_t *const *rows, const int16_t *w, const axis *y, size_t n) {
    size_t at = 0;
    for (; at + BLOCK <= n; at += BLOCK) { /* fixed lengths: the compiler makes vectors of them */
        int32_t sum[BLOCK];
        for (int j = 0; j < BLOCK; j++) sum[j] = 1 << (y->shift - 1);
        for (int k = 0; k < y->taps; k++) {
            const uint8_t *s = rows[k] + at;
            int32_t wk = w[k];
            for (int j = 0; j < BLOCK; j++) sum[j] += wk * s[j];
        }
        for (int j = 0; j < BLOCK; j++) dst[at + (size_t)j] = clamp(sum[j] >> y->shift);
    }
    column_tail(dst, rows, w, y, at, n);
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))

/* Four taps of one row: bytes R0 G0 B0 R1 ... B3 become pairs (R0,R1) (G0,G1) (B0,B1) - in the low half, (R2,R3) ... in
 * the high half, are multiplied with (w0,w1), (w2,w3) and summed in pairs. */
AVX2 static inline __m256i four_taps(__m256i sum, const uint8_t *s, __m256i w, __m256i pick) {
    __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)s));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(v, pick), w));
}

/* Reads 16 bytes for every 4 of stride taps, so up to read_pad bytes past the row; writes one byte past its end. */
AVX2 static void rows4_avx2(uint8_t *const dst[4], const uint8_t *const src[4], const axis *x) {
    const __m256i pick = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, /* taps 0, 1 */
                                          6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1 /* taps 2, 3 */);
    const __m256i pairs = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, /* w0, w1 */
                                           4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7 /* w2, w3 */);
    const __m128i half = _mm_set1_epi32(1 << (x->shift - 1)), shift = _mm_cvtsi32_si128(x->shift);
    const int16_t *w = x->w;
    for (int i = 0; i < x->out; i++) {
        size_t at = (size_t)x->first[i] * 3;
        __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
        for (int k = 0; k < x->stride; k += 4, w += 4, at += 12) {
            int64_t four;
            memcpy(&four, w, sizeof four);
            __m256i wk = _mm256_shuffle_epi8(_mm256_set1_epi64x(four), pairs);
            a = four_taps(a, src[0] + at, wk, pick);
            b = four_taps(b, src[1] + at, wk, pick);
            c = four_taps(c, src[2] + at, wk, pick);
            d = four_taps(d, src[3] + at, wk, pick);
        }
        __m128i sum[4] = {_mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)),
                          _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1)),
                          _mm_add_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1)),
                          _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1))};
        for (int r = 0; r < 4; r++) sum[r] = _mm_sra_epi32(_mm_add_epi32(sum[r], half), shift);
        __m128i rgb = _mm_packus_epi16(_mm_packs_epi32(sum[0], sum[1]), _mm_packs_epi32(sum[2], sum[3]));
        uint32_t px[4];
        memcpy(px, &rgb, sizeof px);
        for (int r = 0; r < 4; r++) memcpy(dst[r] + (size_t)i * 3, &px[r], 4);
    }
}

AVX2 static void column_avx2(uint8_t *dst, const uint8_t *const *rows, const int16_t *w, const axis *y, size_t n) {
    const __m256i half = _mm256_set1_epi32(1 << (y->shift - 1)), zero = _mm256_setzero_si256();
    const __m128i shift = _mm_cvtsi32_si128(y->shift);
    size_t at = 0;
    for (; at + BLOCK <= n; at += BLOCK) {
        __m256i a = half, b = half, c = half, d = half;
        for (int k = 0; k < y->taps; k += 2) { /* an odd last tap is paired with a row of weight zero */
            int32_t two;
            memcpy(&two, w + k, sizeof two);
            __m256i wk = _mm256_set1_epi32(two);
            __m256i s = _mm256_loadu_si256((const __m256i *)(const void *)(rows[k] + at));
            __m256i t = _mm256_loadu_si256((const __m256i *)(const void *)(rows[k + 1] + at));
            __m256i lo = _mm256_unpacklo_epi8(s, t), hi = _mm256_unpackhi_epi8(s, t);
            a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_unpacklo_epi8(lo, zero), wk));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_unpackhi_epi8(lo, zero), wk));
            c = _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_unpacklo_epi8(hi, zero), wk));
            d = _mm256_add_epi32(d, _mm256_madd_epi16(_mm256_unpackhi_epi8(hi, zero), wk));
        }
        a = _mm256_packs_epi32(_mm256_sra_epi32(a, shift), _mm256_sra_epi32(b, shift));
        c = _mm256_packs_epi32(_mm256_sra_epi32(c, shift), _mm256_sra_epi32(d, shift));
        _mm256_storeu_si256((__m256i *)(void *)(dst + at), _mm256_packus_epi16(a, c));
    }
    column_tail(dst, rows, w, y, at, n);
}
#endif

/* ----------------------------------------------------------------------------------------------------------- bands */

#define MAX_SIDE (1 << 28)
#define MIN_BAND 32 /* output rows of a band: neighbours both make the few source rows between them */

/* One call. Output rows are cut into bands; a band resizes the source rows it needs horizontally into a ring of as many
 * rows as the vertical axis takes, and combines them, while they are in the cache. */
typedef struct {
    uint8_t *dst;
    const uint8_t *src;
    int dst_h, dst_w, src_h, src_w;
    bool wide, high;      /* which axes change */
    axis x, y;
    int bands, threads, ring_rows;
    size_t read_pad;      /* bytes that rows4 may read past the end of a row */
    size_t ring_stride, line_bytes, rows_bytes, scratch_bytes; /* a scratch: row pointers, ring, 4 lines */
    uint8_t *scratch;
    void (*rows4)(uint8_t *const dst[4], const uint8_t *const src[4], const axis *x);
    void (*column)(uint8_t *dst, const uint8_t *const *rows, const int16_t *w, const axis *y, size_t n);
} job;

/* A source row that may be read read_pad bytes past its end: in place, but for the last rows a copy in line. */
static const uint8_t *source_row(const job *j, int row, uint8_t *line) {
    size_t bytes = (size_t)j->src_w * 3, at = (size_t)row * bytes;
    if ((size_t)(j->src_h - row - 1) * bytes >= j->read_pad) return j->src + at;
    memcpy(line, j->src + at, bytes);
    memset(line + bytes, 0, j->read_pad);
    return line;
}

static void band(void *ctx, int task, int worker) {
    const job *j = ctx;
    uint8_t *scratch = j->scratch + (size_t)(j->bands <= j->threads ? task : worker) * j->scratch_bytes;
    const uint8_t **rows = (const uint8_t **)(void *)scratch;
    uint8_t *ring = scratch + j->rows_bytes, *lines = ring + (size_t)j->ring_rows * j->ring_stride;
    int first = (int)((int64_t)j->dst_h * task / j->bands), last = (int)((int64_t)j->dst_h * (task + 1) / j->bands);
    size_t row_bytes = (size_t)j->dst_w * 3;
    int done = j->high ? j->y.first[first] : first; /* source rows below done are in the ring */
    for (int i = first; i < last; i++) {
        int from = j->high ? j->y.first[i] : i, to = j->high ? from + j->y.taps : i + 1;
        if (to > j->src_h) to = j->src_h;
        while (j->wide && done < to) {
            uint8_t *out[4];
            const uint8_t *in[4];
            for (int r = 0; r < 4; r++) {
                int row = done + r < j->src_h ? done + r : j->src_h - 1; /* past the end: the last row again */
                in[r] = source_row(j, row, lines + (size_t)r * j->line_bytes);
                out[r] = ring + (size_t)((done + r) % j->ring_rows) * j->ring_stride;
            }
            j->rows4(out, in, &j->x);
            done += 4;
        }
        uint8_t *dst = j->dst + (size_t)i * row_bytes;
        if (!j->high) {
            memcpy(dst, ring + (size_t)(i % j->ring_rows) * j->ring_stride, row_bytes);
            continue;
        }
        for (int k = 0; k <= j->y.taps; k++) { /* rows past the last one have weight zero, but must be there */
            int row = from + k < to ? from + k : to - 1;
            rows[k] = j->wide ? ring + (size_t)(row % j->ring_rows) * j->ring_stride : j->src + (size_t)row * row_bytes;
        }
        j->column(dst, rows, j->y.w + (size_t)i * (size_t)j->y.stride, &j->y, row_bytes);
    }
}

static void choose_kernels(job *j) {
    j->rows4 = rows4_plain;
    j->column = column_plain;
#if defined(__x86_64__)
    const char *cap = getenv("QVL_CPU"); /* the level asked for in device/cpu/dispatch.c */
    if (__builtin_cpu_supports("avx2") && !(cap && strcmp(cap, "generic") == 0)) {
        j->rows4 = rows4_avx2;
        j->column = column_avx2;
    }
#endif
}

/* Sizes of the bands and their scratch. Few output rows make few bands, so all rings together are a fraction of the
 * picture: (4 in / out + 8) rows each, at most out / MIN_BAND of them. */
static int plan(job *j, qvl__pool *pool) {
    j->threads = pool ? qvl__pool_threads(pool) : 1;
    j->bands = j->dst_h / MIN_BAND < 1 ? 1 : j->dst_h / MIN_BAND;
    if (j->bands > 2 * j->threads) j->bands = 2 * j->threads;
    if (j->threads == 1) j->bands = 1;
    j->ring_rows = j->wide ? (j->high ? j->y.taps : 1) + 4 : 0;
    size_t slots = (size_t)(j->bands < j->threads ? j->bands : j->threads), n, ring;
    j->ring_stride = ((size_t)j->dst_w * 3 + 1 + 63) & ~(size_t)63;
    j->read_pad = (size_t)j->x.stride * 3 + 16;
    j->line_bytes = ((size_t)j->src_w * 3 + j->read_pad + 63) & ~(size_t)63;
    j->rows_bytes = (((size_t)j->y.taps + 1) * sizeof(uint8_t *) + 63) & ~(size_t)63;
    if (__builtin_mul_overflow((size_t)j->ring_rows, j->ring_stride, &ring)) return qvl__fail(QVL_ENOMEM, "resize: out of memory");
    j->scratch_bytes = j->rows_bytes + ring + (j->wide ? 4 * j->line_bytes : 0);
    if (__builtin_mul_overflow(j->scratch_bytes, slots, &n)) return qvl__fail(QVL_ENOMEM, "resize: out of memory");
    return (j->scratch = qvl__malloc(n)) ? 0 : QVL_ENOMEM;
}

int qvl__resize_bicubic(uint8_t *dst, int dst_h, int dst_w, const uint8_t *src, int src_h, int src_w, qvl__pool *pool) {
    const int sides[4] = {dst_h, dst_w, src_h, src_w};
    for (int i = 0; i < 4; i++)
        if (sides[i] <= 0 || sides[i] > MAX_SIDE)
            return qvl__fail(QVL_EINVAL, "resize from %d x %d to %d x %d pixels: sides must be 1 to %d", src_w, src_h, dst_w, dst_h,
                             MAX_SIDE);
    job j = {.dst = dst, .src = src, .dst_h = dst_h, .dst_w = dst_w, .src_h = src_h, .src_w = src_w};
    j.wide = dst_w != src_w;
    j.high = dst_h != src_h;
    if (!j.wide && !j.high) {
        memcpy(dst, src, (size_t)dst_h * (size_t)dst_w * 3);
        return 0;
    }
    choose_kernels(&j);
    int code = j.wide ? axis_make(&j.x, src_w, dst_w) : 0;
    if (code == 0 && j.high) code = axis_make(&j.y, src_h, dst_h);
    if (code == 0) code = plan(&j, pool);
    if (code == 0) {
        if (pool) qvl__pool_run(pool, j.bands, band, &j);
        else
            for (int i = 0; i < j.bands; i++) band(&j, i, 0);
    }
    qvl__free(j.scratch);
    if (j.wide) axis_free(&j.x);
    if (j.high) axis_free(&j.y);
    return code;
}
