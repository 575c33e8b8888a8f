/* image.c - kept images.
 *
 * Job:        image.h.
 * Input:      decoded images.
 * Output:     ids.
 * Invariants: a list in the order of use, newest first; few hundred entries at most, so a walk is cheap.
 */
#include "image.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct entry {
    struct entry *next;
    char id[ID_SIZE];
    qvl_image *image;
    size_t bytes, held; /* as sent; in memory */
    long created, expires;
} entry;

struct images {
    uv_mutex_t lock;
    entry *first;
    uint64_t held;
};

static void forget(images *m, entry **p) {
    entry *e = *p;
    *p = e->next;
    m->held -= e->held;
    qvl_image_free(e->image);
    free(e);
}

int images_start(server *s) {
    s->images = calloc(1, sizeof *s->images);
    if (!s->images) return -1;
    return uv_mutex_init(&s->images->lock) ? -1 : 0;
}

void images_stop(server *s) {
    if (!s->images) return;
    while (s->images->first) forget(s->images, &s->images->first);
    uv_mutex_destroy(&s->images->lock);
    free(s->images);
    s->images = NULL;
}

static void to_json(const entry *e, buf *out) {
    buf_printf(out, "{\"id\":\"%s\",\"object\":\"image\",\"created\":%ld,\"bytes\":%zu,\"width\":%d,\"height\":%d,\"expires_at\":%ld}", e->id,
               e->created, e->bytes, qvl_image_width(e->image), qvl_image_height(e->image), e->expires);
}

int images_keep(server *s, qvl_image *im, size_t bytes, buf *out) {
    images *m = s->images;
    entry *e = calloc(1, sizeof *e);
    size_t held = (size_t)qvl_image_width(im) * (size_t)qvl_image_height(im) * 3 + sizeof *e;
    if (!e || held > s->config->image_store || id_new(e->id, "img-")) {
        qvl_image_free(im);
        int failed = e && held > s->config->image_store ? 1 : -1;
        free(e);
        return failed;
    }
    e->image = im;
    e->bytes = bytes;
    e->held = held;
    e->created = (long)time(NULL);
    e->expires = e->created + (long)s->config->image_ttl_s;
    to_json(e, out);
    uv_mutex_lock(&m->lock);
    e->next = m->first;
    m->first = e;
    m->held += held;
    while (m->held > s->config->image_store) {
        entry **p = &m->first;
        while ((*p)->next) p = &(*p)->next;
        forget(m, p);
    }
    uv_mutex_unlock(&m->lock);
    return 0;
}

/* [lock held] Found: it is the first now. */
static entry *find(images *m, const char *id) {
    for (entry **p = &m->first; *p; p = &(*p)->next) {
        entry *e = *p;
        if (strcmp(e->id, id) != 0) continue;
        *p = e->next;
        e->next = m->first;
        m->first = e;
        return e;
    }
    return NULL;
}

int images_use(server *s, const char *id, qvl_media *media) {
    uv_mutex_lock(&s->images->lock);
    entry *e = find(s->images, id);
    int rc = e ? qvl_media_add_image(media, e->image) : 1;
    uv_mutex_unlock(&s->images->lock);
    return rc;
}

int images_json(server *s, const char *id, buf *out) {
    uv_mutex_lock(&s->images->lock);
    entry *e = find(s->images, id);
    if (e) to_json(e, out);
    uv_mutex_unlock(&s->images->lock);
    return e ? 0 : -1;
}

int images_delete(server *s, const char *id) {
    uv_mutex_lock(&s->images->lock);
    entry *e = find(s->images, id);
    if (e) forget(s->images, &s->images->first);
    uv_mutex_unlock(&s->images->lock);
    return e ? 0 : -1;
}

void images_tick(server *s) {
    long now = (long)time(NULL);
    uv_mutex_lock(&s->images->lock);
    for (entry **p = &s->images->first; *p;) {
        if ((*p)->expires <= now) forget(s->images, p);
        else p = &(*p)->next;
    }
    uv_mutex_unlock(&s->images->lock);
}
