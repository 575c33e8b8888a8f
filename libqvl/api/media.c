/* media.c - the list of images, embeddings and videos that fills the empty parts of messages.
 *
 * Job:        qvl_media_new, _free, _add_image, _add_embedding, _add_video.
 * Input:      handles; each is shared (its count goes up), so callers may free theirs right after.
 * Output:     struct qvl_media of encode.h, read by encode/parts.c.
 * Invariants: a failed add leaves the list as it was.
 */
#include <math.h>

#include "../encode/encode.h"

int qvl_media_new(qvl_media **out) {
    if (!out) return qvl__fail(QVL_EINVAL, "qvl_media_new: out is NULL");
    *out = qvl__calloc(1, sizeof **out);
    if (!*out) return QVL_ENOMEM;
    qvl__handle_born();
    return 0;
}

static void free_item(struct qvl__media_item *item) {
    for (size_t i = 0; i < item->n; i++) qvl__image_unref(item->frames[i]);
    qvl__free(item->frames);
    qvl__embedding_free(item->embedding);
}

void qvl_media_free(qvl_media *l) {
    if (!l) return;
    for (size_t i = 0; i < l->n; i++) free_item(&l->items[i]);
    qvl__free(l->items);
    qvl__free(l);
    qvl__handle_gone();
}

/* Room for one more item. */
static int reserve(qvl_media *l) {
    if (l->n < l->cap) return 0;
    size_t cap = l->cap ? 2 * l->cap : 8;
    struct qvl__media_item *p = qvl__array(l->items, cap, sizeof *p);
    if (!p) return QVL_ENOMEM;
    l->items = p;
    l->cap = cap;
    return 0;
}

static int add_frames(qvl_media *l, struct qvl__media_item item, const qvl_image *const *frames) {
    int rc = reserve(l);
    if (rc < 0) return rc;
    item.frames = qvl__array(NULL, item.n, sizeof *item.frames);
    if (!item.frames) return QVL_ENOMEM;
    for (size_t i = 0; i < item.n; i++) item.frames[i] = qvl__image_ref(frames[i]);
    l->items[l->n++] = item;
    return 0;
}

int qvl_media_add_image(qvl_media *l, const qvl_image *im) {
    if (!l || !im) return qvl__fail(QVL_EINVAL, "qvl_media_add_image: the list or the image is NULL");
    return add_frames(l, (struct qvl__media_item){.kind = QVL__MEDIA_IMAGE, .n = 1}, &im);
}

int qvl_media_add_embedding(qvl_media *l, const qvl_embedding *e) {
    if (!l || !e) return qvl__fail(QVL_EINVAL, "qvl_media_add_embedding: the list or the embedding is NULL");
    int rc = reserve(l);
    if (rc < 0) return rc;
    l->items[l->n++] = (struct qvl__media_item){.kind = QVL__MEDIA_EMBEDDING, .embedding = qvl__embedding_ref(e)};
    return 0;
}

int qvl_media_add_video(qvl_media *l, const qvl_image *const *frames, size_t n, double fps, int sample_frames) {
    if (!l || !frames) return qvl__fail(QVL_EINVAL, "qvl_media_add_video: the list or the frames are NULL");
    if (n == 0) return qvl__fail(QVL_EINVAL, "qvl_media_add_video: a video needs at least one frame");
    for (size_t i = 0; i < n; i++)
        if (!frames[i]) return qvl__fail(QVL_EINVAL, "qvl_media_add_video: frame %zu is NULL", i);
    if (!isfinite(fps) || fps <= 0)
        return qvl__fail(QVL_EINVAL, "qvl_media_add_video: fps is %g; give the frames a second of the video", fps);
    struct qvl__media_item item = {.kind = QVL__MEDIA_VIDEO, .n = n, .fps = fps, .sample = sample_frames != 0};
    return add_frames(l, item, frames);
}
