/* chat.c - a conversation over the engine, with text as it is generated.
 *
 * Job:        show one picture, then answer every line of stdin with all that was said before.
 * Input:      chat PICTURE [MODEL]; questions on stdin.
 * Output:     answers on stdout, piece by piece.
 * Build:      cc chat.c $(pkg-config --cflags --libs qvl) -o chat
 * Note:       the picture is encoded once; its embedding stands for it in every later prompt.
 */
#define _POSIX_C_SOURCE 200809L /* open_memstream */
#include <qvl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* s as a JSON string, quotes included. */
static void write_json(FILE *f, const char *s) {
    fputc('"', f);
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c < 0x20) fprintf(f, "\\u%04x", c);
        else fprintf(f, c == '"' || c == '\\' ? "\\%c" : "%c", c);
    }
    fputc('"', f);
}

static int failed(int rc) {
    fprintf(stderr, "%s: %s\n", qvl_error_name(rc), qvl_last_error());
    return rc;
}

/* Runs one prompt and streams its answer to stdout and to log, as the text of a JSON string. */
static int answer(qvl_engine *engine, const qvl_prompt *prompt, FILE *log) {
    uint64_t request;
    int rc = qvl_engine_submit(engine, prompt, NULL, &request);
    if (rc < 0) return failed(rc);
    char *said = NULL;
    size_t len = 0;
    FILE *all = open_memstream(&said, &len);
    for (int done = 0; all && !done;) {
        int n = qvl_engine_step(engine, -1); /* one step of work; events are valid until the next one */
        if (n < 0) done = rc = failed(n);
        for (int i = 0; i < n; i++) {
            const qvl_event *v = qvl_engine_event(engine, i);
            const char *why;
            fputs(qvl_event_text(v, NULL), stdout);
            fflush(stdout);
            fputs(qvl_event_text(v, NULL), all);
            if (qvl_event_type(v) == QVL_EVENT_FINISHED) done = 1;
            if ((rc = qvl_event_error(v, &why))) {
                fprintf(stderr, "%s: %s\n", qvl_error_name(rc), why);
                done = 1;
            }
        }
    }
    putchar('\n');
    if (!all || fclose(all) != 0) rc = QVL_ENOMEM;
    if (rc == 0) write_json(log, said);
    free(said);
    return rc;
}

/* Asks one question; messages is everything said so far, without the closing bracket. */
static int turn(qvl_model *m, qvl_engine *engine, const qvl_media *media, FILE *log, char *const *messages, const char *question, int first) {
    fprintf(log, "%s{\"role\":\"user\",\"content\":[%s{\"type\":\"text\",\"text\":", first ? "[" : ",", first ? "{\"type\":\"image\"}," : "");
    write_json(log, question);
    fprintf(log, "}]}");
    fflush(log);
    size_t size = strlen(*messages) + 2;
    char *whole = malloc(size);
    if (!whole) return QVL_ENOMEM;
    snprintf(whole, size, "%s]", *messages);
    qvl_prompt *prompt;
    int rc = qvl_prompt_new(&prompt, m, whole, NULL, media, NULL);
    free(whole);
    if (rc < 0) return failed(rc);
    fprintf(log, ",{\"role\":\"assistant\",\"content\":");
    rc = answer(engine, prompt, log);
    fprintf(log, "}");
    qvl_prompt_free(prompt);
    return rc;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: chat PICTURE [MODEL]\n");
        return 2;
    }
    qvl_model *m = NULL;
    qvl_engine *engine = NULL;
    qvl_image *im = NULL;
    qvl_embedding *seen = NULL;
    qvl_media *media = NULL;
    qvl_options *o = NULL;
    int rc = qvl_model_load(&m, argc > 2 ? argv[2] : "examples/models/qvl-tiny", NULL);
    if (rc == 0) rc = qvl_options_new(&o);
    if (rc == 0) rc = qvl_options_set_i64(o, "max_requests", 1);
    if (rc == 0) rc = qvl_engine_new(&engine, m, o);
    if (rc == 0) rc = qvl_image_from_file(&im, argv[1], NULL);
    if (rc == 0) rc = qvl_encode_image(m, im, NULL, &seen);
    if (rc == 0) rc = qvl_media_new(&media);
    if (rc == 0) rc = qvl_media_add_embedding(media, seen);
    if (rc < 0) failed(rc);

    char *messages = NULL, line[4096];
    size_t len = 0;
    FILE *log = open_memstream(&messages, &len);
    for (int first = 1; rc == 0 && log && fgets(line, sizeof line, stdin); first = 0) {
        line[strcspn(line, "\n")] = 0;
        rc = turn(m, engine, media, log, &messages, line, first);
    }
    if (log) fclose(log);
    free(messages);
    qvl_options_free(o);
    qvl_media_free(media);
    qvl_embedding_free(seen);
    qvl_image_free(im);
    qvl_engine_free(engine);
    qvl_model_free(m);
    return rc == 0 ? 0 : 1;
}
