/* batch.c - many pictures at once: requests that share the engine's steps.
 *
 * Job:        submit one request for every picture, print every piece of text as it comes, with whose it is.
 * Input:      batch PICTURE... (the bundled model is in examples/models/qvl-tiny; environment variable MODEL names another)
 * Output:     "[picture] text" lines: first the pieces in the order in which the engine made them, then the whole answers.
 * Build:      cc batch.c $(pkg-config --cflags --libs qvl) -o batch
 * Note:       an answer does not depend on what else runs: alone or in a batch, it is the same.
 */
#include <qvl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *file;
    uint64_t request;
    char text[4096];
    char end[16]; /* why it ended; "" while it runs */
} job;

static const char messages[] = "[{\"role\":\"user\",\"content\":[{\"type\":\"image\"},{\"type\":\"text\",\"text\":\"Describe this image.\"}]}]";

static int submit(job *j, qvl_model *m, qvl_engine *engine) {
    qvl_image *im = NULL;
    qvl_media *media = NULL;
    qvl_prompt *prompt = NULL;
    int rc = qvl_image_from_file(&im, j->file, NULL);
    if (rc == 0) rc = qvl_media_new(&media);
    if (rc == 0) rc = qvl_media_add_image(media, im);
    if (rc == 0) rc = qvl_prompt_new(&prompt, m, messages, NULL, media, NULL);
    if (rc == 0) rc = qvl_engine_submit(engine, prompt, NULL, &j->request);
    qvl_prompt_free(prompt); /* the engine keeps what it needs */
    qvl_media_free(media);
    qvl_image_free(im);
    return rc;
}

/* Takes one event; 1 when its request has ended. */
static int take(job *jobs, int n, const qvl_event *v) {
    for (int i = 0; i < n; i++) {
        job *j = &jobs[i];
        if (j->request != qvl_event_request(v)) continue;
        const char *text = qvl_event_text(v, NULL), *why;
        size_t have = strlen(j->text);
        snprintf(j->text + have, sizeof j->text - have, "%s", text);
        if (*text) printf("[%s] %s\n", j->file, text);
        if (qvl_event_type(v) == QVL_EVENT_FINISHED) snprintf(j->end, sizeof j->end, "%s", qvl_event_finish_reason(v));
        if (qvl_event_error(v, &why)) {
            fprintf(stderr, "%s: %s\n", j->file, why);
            snprintf(j->end, sizeof j->end, "error");
        }
        return j->end[0] != 0;
    }
    return 0;
}

int main(int argc, char **argv) {
    int n = argc - 1, running = 0;
    if (n < 1) {
        fprintf(stderr, "usage: batch PICTURE...\n");
        return 2;
    }
    const char *path = getenv("MODEL");
    job *jobs = calloc((size_t)n, sizeof *jobs);
    qvl_model *m = NULL;
    qvl_engine *engine = NULL;
    int rc = jobs ? qvl_model_load(&m, path ? path : "examples/models/qvl-tiny", NULL) : QVL_ENOMEM;
    if (rc == 0) rc = qvl_engine_new(&engine, m, NULL);
    for (int i = 0; rc == 0 && i < n; i++) {
        jobs[i].file = argv[i + 1];
        rc = submit(&jobs[i], m, engine);
        running += rc == 0;
    }
    while (rc == 0 && running > 0) {
        int events = qvl_engine_step(engine, -1);
        if (events < 0) rc = events;
        for (int i = 0; i < events; i++) running -= take(jobs, n, qvl_engine_event(engine, i));
    }
    if (rc < 0) fprintf(stderr, "%s: %s\n", qvl_error_name(rc), qvl_last_error());
    else printf("\n");
    for (int i = 0; rc == 0 && i < n; i++) printf("%s (%s): %s\n", jobs[i].file, jobs[i].end, jobs[i].text);
    qvl_engine_free(engine);
    qvl_model_free(m);
    free(jobs);
    return rc == 0 ? 0 : 1;
}
