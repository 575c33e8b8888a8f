/* visual.c - one image or video as the vision tower takes it.
 *
 * Job:        resize images and video frames for the model's processor; give every visual its identity.
 * Input:      decoded images, the processor's settings, the options min_pixels, max_pixels, video_min_pixels, video_max_pixels.
 * Output:     qvl__visual: patch grid, resized pixels (or an embedding that is already there), hash.
 * Invariants: a visual does not change once it was handed out;
 *             equal hashes mean equal kind, grid and pixels, so whatever is cached under the hash is right.
 *
 * Semantics: transformers image_processing_qwen2_vl and video_processing_qwen3_vl.
 */
#include <string.h>

#include "encode.h"

static int visual_new(qvl__visual **out) {
    *out = qvl__calloc(1, sizeof **out);
    return *out ? 0 : QVL_ENOMEM;
}

void qvl__visual_free(qvl__visual *v) {
    if (!v) return;
    qvl__free(v->frames);
    qvl__embedding_free(v->embedding);
    qvl__free(v);
}

/* A minimum above the maximum is a mistake only when the caller set both; otherwise smart_resize does with it what
 * transformers does. */
int qvl__pixels_read(qvl__pixels *b, const qvl_options *o, const char *min_name, const char *max_name) {
    *b = (qvl__pixels){qvl__opt_i64(o, min_name), qvl__opt_i64(o, max_name)};
    if (b->min > 0 && b->max > 0 && b->min > b->max)
        return qvl__fail(QVL_EINVAL, "%s is %lld, above %s, which is %lld", min_name, (long long)b->min, max_name, (long long)b->max);
    return 0;
}

/* Sets the grid for count frames of height x width resized pixels and takes their memory. */
static int set_grid(qvl__visual *v, const qvl__processor *p, size_t count, int height, int width) {
    size_t bytes;
    v->t = v->video ? (int)(count / (size_t)p->temporal) : 1;
    v->h = height / p->patch;
    v->w = width / p->patch;
    if (__builtin_mul_overflow((size_t)height * 3, (size_t)width, &bytes) || __builtin_mul_overflow(bytes, count, &bytes) ||
        (int64_t)v->h * v->w > INT32_MAX / v->t)
        return qvl__fail(QVL_ELIMIT, "%zu frames of %d x %d pixels are too many; lower %s", count, width, height,
                         v->video ? "video_max_pixels" : "max_pixels");
    v->tokens = v->t * (v->h / p->merge) * (v->w / p->merge);
    v->frames = qvl__malloc(bytes);
    return v->frames ? 0 : QVL_ENOMEM;
}

static void set_hash(qvl__visual *v, const qvl__processor *p) {
    qvl__sha256 s;
    const uint32_t head[4] = {v->video ? 1 : 0, (uint32_t)v->t, (uint32_t)v->h, (uint32_t)v->w};
    const size_t frames = v->video ? (size_t)v->t * (size_t)p->temporal : 1;
    qvl__sha256_init(&s);
    qvl__sha256_add(&s, head, sizeof head);
    qvl__sha256_add(&s, v->frames, frames * (size_t)v->h * (size_t)p->patch * (size_t)v->w * (size_t)p->patch * 3);
    qvl__sha256_end(&s, v->hash);
}

int qvl__visual_from_image(qvl__visual **out, const qvl__config *c, const qvl_image *im, qvl__pixels b, qvl__pool *pool) {
    const qvl__processor *p = &c->processor;
    int64_t min = b.min > 0 ? b.min : p->min_pixels, max = b.max > 0 ? b.max : p->max_pixels;
    int h, w;
    qvl__visual *v;
    *out = NULL;
    int rc = qvl__smart_resize(im->height, im->width, p->patch * p->merge, min, max, &h, &w);
    if (rc < 0) return rc;
    if ((rc = visual_new(&v)) < 0) return rc;
    v->source_h = im->height;
    v->source_w = im->width;
    rc = set_grid(v, p, 1, h, w);
    if (rc == 0) rc = qvl__resize_bicubic(v->frames, h, w, im->rgb, im->height, im->width, pool);
    if (rc < 0) {
        qvl__visual_free(v);
        return rc;
    }
    set_hash(v, p);
    *out = v;
    return 0;
}

int qvl__visual_from_embedding(qvl__visual **out, const qvl__config *c, const uint8_t weights_id[32], const qvl_embedding *e) {
    const int unit = c->processor.merge * c->processor.merge;
    *out = NULL;
    if (memcmp(e->weights_id, weights_id, 32) != 0)
        return qvl__fail(QVL_EINVAL, "this embedding was made by a model with other weights; encode the image with this one");
    if (e->video) return qvl__fail(QVL_EINVAL, "this embedding was made from a video and cannot stand for an image");
    if (e->layers != 1 + c->vision.n_deepstack || e->hidden != c->text.hidden || e->t != 1 || e->h <= 0 || e->w <= 0 ||
        e->h % c->processor.merge || e->w % c->processor.merge || (int64_t)e->h * e->w != (int64_t)e->tokens * unit)
        return qvl__fail(QVL_EINVAL, "an embedding of %d layers, %d tokens, %d floats on a %d x %d x %d grid does not fit this model",
                         e->layers, e->tokens, e->hidden, e->t, e->h, e->w);
    qvl__visual *v;
    int rc = visual_new(&v);
    if (rc < 0) return rc;
    v->t = e->t;
    v->h = e->h;
    v->w = e->w;
    v->tokens = e->tokens;
    v->embedding = qvl__embedding_ref(e);
    memcpy(v->hash, e->hash, 32);
    *out = v;
    return 0;
}

int qvl__video_begin(qvl__video *b, const qvl__config *c, size_t n, int height, int width, const qvl_options *o) {
    const qvl__processor *p = &c->processor;
    qvl__pixels bounds;
    *b = (qvl__video){.processor = p, .n = n, .src_height = height, .src_width = width};
    if (n == 0) return qvl__fail(QVL_EINVAL, "a video needs at least one frame");
    if (n > INT32_MAX - (size_t)p->temporal) return qvl__fail(QVL_ELIMIT, "%zu frames are too many for a video", n);
    int rc = qvl__pixels_read(&bounds, o, "video_min_pixels", "video_max_pixels");
    if (rc < 0) return rc;
    int64_t min = bounds.min > 0 ? bounds.min : p->video_min_pixels, max = bounds.max > 0 ? bounds.max : p->video_max_pixels;
    rc = qvl__smart_resize_video((int)n, height, width, p->patch * p->merge, p->temporal, min, max, &b->height, &b->width);
    if (rc < 0 || (rc = visual_new(&b->visual)) < 0) return rc;
    b->visual->video = true;
    b->visual->source_h = height;
    b->visual->source_w = width;
    const size_t pairs = (n + (size_t)p->temporal - 1) / (size_t)p->temporal;
    if ((rc = set_grid(b->visual, p, pairs * (size_t)p->temporal, b->height, b->width)) < 0) qvl__video_abort(b);
    return rc;
}

int qvl__video_add(qvl__video *b, const qvl_image *im, qvl__pool *pool) {
    const size_t frame = (size_t)b->height * (size_t)b->width * 3;
    if (im->height != b->src_height || im->width != b->src_width)
        return qvl__fail(QVL_EINVAL, "this frame is %d x %d pixels, the frames before it are %d x %d; a video has one size",
                         im->width, im->height, b->src_width, b->src_height);
    return qvl__resize_bicubic(b->visual->frames + b->done++ * frame, b->height, b->width, im->rgb, im->height, im->width, pool);
}

qvl__visual *qvl__video_end(qvl__video *b) {
    const size_t frame = (size_t)b->height * (size_t)b->width * 3, all = (size_t)b->visual->t * (size_t)b->processor->temporal;
    uint8_t *frames = b->visual->frames;
    for (; b->done < all; b->done++) memcpy(frames + b->done * frame, frames + (b->done - 1) * frame, frame);
    set_hash(b->visual, b->processor);
    qvl__visual *v = b->visual;
    b->visual = NULL;
    return v;
}

void qvl__video_abort(qvl__video *b) {
    qvl__visual_free(b->visual);
    b->visual = NULL;
}
