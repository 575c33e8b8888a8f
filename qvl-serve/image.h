/* image.h - images that clients send once and name later (POST /v1/images).
 *
 * Job:        keep decoded images under ids nobody can guess, within a number of bytes, for a time.
 * Input:      decoded images.
 * Output:     handles of libqvl, and what clients are told of them.
 * Invariants: the bytes of all kept images stay below images.store: the least recently used go first;
 *             an image belongs to the key that sent it: other keys do not find it. Guarded by a lock: any thread.
 */
#ifndef SERVE_IMAGE_H
#define SERVE_IMAGE_H

#include <qvl.h>

#include "server.h"

/* 0 or -1 (no memory). */
int images_start(server *s);
void images_stop(server *s);
/* Keeps im (taken over, also on failure) and appends its JSON. 0; 1 when it is larger than the store; -1 no memory. */
int images_keep(server *s, qvl_image *im, size_t bytes, buf *out);
/* A new handle's worth of a kept image into media. 0; 1 when there is none of that id; or the library's error. */
int images_use(server *s, const char *id, qvl_media *media);
/* JSON of a kept image. 0, or -1 when there is none. */
int images_json(server *s, const char *id, buf *out);
int images_delete(server *s, const char *id);
/* Forgets what is too old. Once a second. */
void images_tick(server *s);

#endif
