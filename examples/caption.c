/* caption.c - the shortest program over libqvl: one picture, one call.
 *
 * Job:        load a model, load a picture, ask.
 * Input:      caption [PICTURE [MODEL]]
 * Output:     the answer on stdout.
 * Build:      cc caption.c $(pkg-config --cflags --libs qvl) -o caption
 */
#include <qvl.h>
#include <stdio.h>

static const char messages[] = "[{\"role\":\"user\",\"content\":[{\"type\":\"image\"},{\"type\":\"text\",\"text\":\"Describe this image.\"}]}]";

int main(int argc, char **argv) {
    const char *picture = argc > 1 ? argv[1] : "examples/images/shapes.png";
    const char *path = argc > 2 ? argv[2] : "examples/models/qvl-tiny";

    qvl_model *m = NULL;
    qvl_image *im = NULL;
    qvl_media *media = NULL;
    char *text = NULL;
    int rc = qvl_model_load(&m, path, NULL);
    if (rc == 0) rc = qvl_image_from_file(&im, picture, NULL);
    if (rc == 0) rc = qvl_media_new(&media);
    if (rc == 0) rc = qvl_media_add_image(media, im);
    if (rc == 0) rc = qvl_chat(m, messages, media, NULL, NULL, NULL, &text);
    if (rc == 0) puts(text);
    else fprintf(stderr, "%s: %s\n", qvl_error_name(rc), qvl_last_error());

    qvl_free(text); /* in any order; NULL is fine */
    qvl_media_free(media);
    qvl_image_free(im);
    qvl_model_free(m);
    return rc == 0 ? 0 : 1;
}
