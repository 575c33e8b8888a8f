/* parts.c - the pictures behind the image and video segments of a rendered chat.
 *
 * Job:        find each part's pixels (a data URI in the messages, or the next entry of media), choose video frames,
 *             resize, and write the timestamps of videos.
 * Input:      segments of chat.c with their JSON parts, media, options.
 * Output:     one qvl__part for each image or video segment, in the order of the text.
 * Invariants: nothing is opened or fetched because a message names it;
 *             number and kind of parts and media agree before anything is decoded;
 *             at most one source image is decoded at a time, and the whole is bounded by the model's context.
 */
#include <jansson.h>
#include <math.h>
#include <string.h>
#include <strings.h>

#include "encode.h"

typedef struct {
    const qvl__encoder *encoder;
    const qvl_options *options;
    qvl__image_limits limits;
    const qvl_media *media;
    size_t next;    /* entry of media that the next empty part gets */
    int64_t tokens; /* so far */
} resolver;

static bool given(const json_t *v) { return v && !json_is_null(v); }

/* Says where a failure happened. */
static int at(int rc, const qvl__segment *s) {
    if (s->item == QVL__NO_ITEM) return qvl__context(rc, "messages[%zu].content", s->message);
    return qvl__context(rc, "messages[%zu].content[%zu]", s->message, s->item);
}

/* --------------------------------------------------------------------------------------------------- data in parts */

/* The data of an image part: "image": URI, "image_url": {"url": URI} or "image_url": URI. 1: found, 0: the part is
 * empty and takes the next media entry. */
static int image_uri(const qvl__segment *s, const char **uri, size_t *len) {
    if (s->uri) {
        *uri = s->uri;
        *len = s->uri_len;
        return 1;
    }
    const json_t *v = json_object_get(s->part, "image");
    const char *key = "image";
    if (!given(v)) {
        v = json_object_get(s->part, "image_url");
        key = "image_url";
        if (json_is_object(v)) {
            v = json_object_get(v, "url");
            key = "image_url.url";
            if (!v) return at(qvl__fail(QVL_EINVAL, "image_url has no \"url\""), s);
        }
    }
    if (!given(v)) return 0;
    if (!json_is_string(v)) return at(qvl__fail(QVL_EINVAL, "%s must be a string that holds a data URI", key), s);
    *uri = json_string_value(v);
    *len = json_string_length(v);
    return 1;
}

/* Only data URIs are followed: a server must not open files or fetch URLs that a user names. */
static int decode(qvl_image **out, const char *uri, size_t len, const qvl__image_limits *l) {
    if (len >= 5 && strncasecmp(uri, "data:", 5) == 0) return qvl__image_from_data_uri(out, uri, len, l);
    size_t shown = len < 60 ? len : 60;
    while (shown < len && shown > 0 && ((unsigned char)uri[shown] & 0xC0) == 0x80) shown--; /* whole characters */
    return qvl__fail(QVL_EUNSUPPORTED, "\"%.*s%s\" is not a data URI, and files and URLs named in messages are not opened; load "
                     "the image yourself and pass it in media, or send data:image/...;base64,...", (int)shown, uri,
                     shown < len ? "..." : "");
}

/* The frames of a video part, an array of data URIs; 1: found, 0: empty part. */
static int video_frames(const qvl__segment *s, const json_t **frames) {
    const json_t *v = json_object_get(s->part, "video");
    if (!given(v)) return 0;
    if (json_is_string(v))
        return at(qvl__fail(QVL_EUNSUPPORTED, "video files are not decoded; pass frames in media, or as an array of data URIs"), s);
    if (!json_is_array(v) || json_array_size(v) == 0)
        return at(qvl__fail(QVL_EINVAL, "video must be an array of at least one data URI, one for each frame"), s);
    for (size_t i = 0; i < json_array_size(v); i++)
        if (!json_is_string(json_array_get(v, i))) return at(qvl__fail(QVL_EINVAL, "video[%zu] must be a data URI", i), s);
    *frames = v;
    return 1;
}

/* ---------------------------------------------------------------------------------------------------------- images */

/* The options' bounds, or a part's own: "min_pixels" and "max_pixels" beside its image, as qwen-vl-utils takes them. */
static int image_bounds(const resolver *r, const qvl__segment *s, qvl__pixels *b) {
    int rc = qvl__pixels_read(b, r->options, "min_pixels", "max_pixels");
    if (rc < 0) return rc;
    static const char *const names[] = {"min_pixels", "max_pixels"};
    for (int i = 0; i < 2; i++) {
        const json_t *v = s->uri ? NULL : json_object_get(s->part, names[i]);
        if (!given(v)) continue;
        if (!json_is_integer(v) || json_integer_value(v) < 1 || json_integer_value(v) > INT32_MAX)
            return at(qvl__fail(QVL_EINVAL, "%s must be an integer from 1 to %d", names[i], INT32_MAX), s);
        *(i ? &b->max : &b->min) = json_integer_value(v);
    }
    if (b->min > 0 && b->max > 0 && b->min > b->max)
        return at(qvl__fail(QVL_EINVAL, "min_pixels is %lld, above max_pixels, which is %lld", (long long)b->min, (long long)b->max), s);
    return 0;
}

static int resolve_image(resolver *r, const qvl__segment *s, qvl__visual **out) {
    const qvl__encoder *e = r->encoder;
    const char *uri;
    size_t len;
    qvl__pixels bounds;
    int rc = image_bounds(r, s, &bounds);
    if (rc == 0) rc = image_uri(s, &uri, &len);
    if (rc < 0) return rc;
    if (rc == 1) {
        qvl_image *im;
        if ((rc = decode(&im, uri, len, &r->limits)) < 0) return at(rc, s);
        rc = qvl__visual_from_image(out, e->config, im, bounds, e->pool);
        qvl__image_unref(im);
        return rc < 0 ? at(rc, s) : 0;
    }
    const struct qvl__media_item *item = &r->media->items[r->next++];
    if (item->kind == QVL__MEDIA_EMBEDDING) rc = qvl__visual_from_embedding(out, e->config, e->weights_id, item->embedding);
    else rc = qvl__visual_from_image(out, e->config, item->frames[0], bounds, e->pool);
    return rc < 0 ? at(rc, s) : 0;
}

/* ---------------------------------------------------------------------------------------------------------- videos */

typedef struct {
    const json_t *uris;                 /* frames in the part, or */
    const struct qvl__media_item *item; /* frames of media */
    size_t total;
    double fps;
    bool sample;
} source;

static int video_source(resolver *r, const qvl__segment *s, source *v) {
    *v = (source){.sample = true};
    int rc = video_frames(s, &v->uris);
    if (rc < 0) return rc;
    if (v->uris) {
        v->total = json_array_size(v->uris);
    } else {
        v->item = &r->media->items[r->next++];
        v->total = v->item->n;
        v->fps = v->item->fps;
        v->sample = v->item->sample;
    }
    const json_t *fps = json_object_get(s->part, "fps"), *sample = json_object_get(s->part, "do_sample_frames");
    if (given(fps)) {
        v->fps = json_number_value(fps);
        if (!json_is_number(fps) || !isfinite(v->fps) || v->fps <= 0)
            return at(qvl__fail(QVL_EINVAL, "fps must be a number above 0, the frames a second of the video"), s);
    } else if (v->uris) {
        return at(qvl__fail(QVL_EINVAL, "a video given as frames needs \"fps\", the frames a second of the video"), s);
    }
    if (given(sample)) {
        if (!json_is_boolean(sample)) return at(qvl__fail(QVL_EINVAL, "do_sample_frames must be true or false"), s);
        v->sample = json_is_true(sample);
    }
    if (v->total > INT32_MAX) return at(qvl__fail(QVL_ELIMIT, "%zu frames are too many for a video", v->total), s);
    return 0;
}

/* Frame i of the video; *owned is set when the caller has to free it. */
static int frame_at(resolver *r, const source *v, size_t i, const qvl_image **im, qvl_image **owned) {
    *owned = NULL;
    if (v->item) {
        *im = v->item->frames[i];
        return 0;
    }
    const json_t *uri = json_array_get(v->uris, i);
    int rc = decode(owned, json_string_value(uri), json_string_length(uri), &r->limits);
    *im = *owned;
    return rc;
}

/* Decodes, checks and resizes the chosen frames one after the other. */
static int build_video(resolver *r, const qvl__segment *s, const source *v, const int32_t *index, size_t n, qvl__visual **out) {
    const qvl__encoder *e = r->encoder;
    qvl__video b = {0};
    for (size_t i = 0; i < n; i++) {
        const qvl_image *im;
        qvl_image *owned;
        size_t k = index ? (size_t)index[i] : i;
        int rc = frame_at(r, v, k, &im, &owned);
        if (rc == 0 && i == 0) rc = qvl__video_begin(&b, e->config, n, im->height, im->width, r->options);
        if (rc == 0) rc = qvl__video_add(&b, im, e->pool);
        qvl__image_unref(owned);
        if (rc < 0) {
            qvl__video_abort(&b);
            return at(qvl__context(rc, "video[%zu]", k), s);
        }
    }
    *out = qvl__video_end(&b);
    return 0;
}

/* The timestamp of each frame pair; an odd last frame pairs with itself. */
static int write_stamps(qvl__part *part, const source *v, const int32_t *index, size_t n, int temporal) {
    part->stamp = qvl__array(NULL, (size_t)part->visual->t, sizeof *part->stamp);
    if (!part->stamp) return QVL_ENOMEM;
    for (size_t i = 0; i < (size_t)part->visual->t; i++) {
        size_t a = i * (size_t)temporal, b = a + (size_t)temporal - 1;
        if (b >= n) b = n - 1;
        qvl__timestamp(part->stamp[i], index ? index[a] : (int32_t)a, index ? index[b] : (int32_t)b, v->fps);
    }
    return 0;
}

static int resolve_video(resolver *r, const qvl__segment *s, qvl__part *part) {
    const qvl__processor *p = &r->encoder->config->processor;
    source v;
    int32_t *index = NULL; /* NULL: all frames */
    int rc = video_source(r, s, &v);
    if (rc < 0) return rc;
    size_t n = v.total;
    if (v.sample) rc = qvl__sample_frames(v.total, v.fps, p->fps, p->min_frames, p->max_frames, &index, &n);
    if (rc < 0) return at(rc, s);
    rc = build_video(r, s, &v, index, n, &part->visual);
    if (rc == 0) rc = write_stamps(part, &v, index, n, p->temporal);
    qvl__free(index);
    return rc;
}

/* ------------------------------------------------------------------------------------------------------------- all */

static bool is_visual(const qvl__segment *s) { return s->kind == QVL__SEG_IMAGE || s->kind == QVL__SEG_VIDEO; }

/* Pairs empty parts with media in order; every mismatch is found before the first image is decoded. */
static int match_media(const qvl__chat *chat, const qvl_media *media, size_t *visuals) {
    static const char *const kinds[] = {"an image", "an image's embedding", "a video"};
    const size_t have = media ? media->n : 0;
    size_t empty = 0;
    *visuals = 0;
    for (size_t i = 0; i < chat->n; i++) {
        const qvl__segment *s = &chat->seg[i];
        if (!is_visual(s)) continue;
        ++*visuals;
        const char *uri;
        const json_t *frames;
        size_t len;
        bool video = s->kind == QVL__SEG_VIDEO;
        int rc = video ? video_frames(s, &frames) : image_uri(s, &uri, &len);
        if (rc < 0) return rc;
        if (rc == 1) continue;
        if (empty < have && (media->items[empty].kind == QVL__MEDIA_VIDEO) != video)
            return at(qvl__fail(QVL_EINVAL, "the part is %s, but entry %zu of media is %s", video ? "a video" : "an image", empty,
                                kinds[media->items[empty].kind]), s);
        empty++;
    }
    if (empty == have) return 0;
    return qvl__fail(QVL_EINVAL, "the messages have %zu image or video parts without data, media has %zu entries; each part needs "
                     "its own entry (parts that the chat template leaves out need none)", empty, have);
}

int qvl__parts_resolve(qvl__part **out, size_t *n, const qvl__chat *chat, const qvl__encoder *e, const qvl_media *media,
                       const qvl_options *o) {
    resolver r = {.encoder = e, .options = o, .limits = qvl__image_limits_of(o), .media = media};
    const int most = e->config->text.max_positions;
    size_t count, done = 0;
    *out = NULL;
    *n = 0;
    int rc = match_media(chat, media, &count);
    if (rc < 0 || count == 0) return rc;
    qvl__part *parts = qvl__calloc(count, sizeof *parts);
    if (!parts) return QVL_ENOMEM;
    for (size_t i = 0; rc == 0 && i < chat->n; i++) {
        const qvl__segment *s = &chat->seg[i];
        if (!is_visual(s)) continue;
        qvl__part *part = &parts[done++];
        rc = s->kind == QVL__SEG_IMAGE ? resolve_image(&r, s, &part->visual) : resolve_video(&r, s, part);
        if (rc < 0) break;
        r.tokens += part->visual->tokens;
        if (most > 0 && r.tokens > most)
            rc = at(qvl__fail(QVL_ECONTEXT, "images and videos up to here take %lld tokens, the model's context is %d; send fewer or "
                              "lower max_pixels", (long long)r.tokens, most), s);
    }
    if (rc < 0) {
        qvl__parts_free(parts, count);
        return rc;
    }
    *out = parts;
    *n = count;
    return 0;
}

void qvl__parts_free(qvl__part *parts, size_t n) {
    for (size_t i = 0; i < n; i++) {
        qvl__visual_free(parts[i].visual);
        qvl__free(parts[i].stamp);
    }
    qvl__free(parts);
}
