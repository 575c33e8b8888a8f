/* quantize.c - a model in fewer bits, packed into a directory of its own (public function).
 *
 * Job:        open the model as loading would, send its weights to a packed file, copy the files beside them.
 * Input:      a Hugging Face directory, where to, option dtype or bits.
 * Output:     a directory that qvl_model_load takes; a report.
 * Invariants: everything small is written before the weights, so that a directory with packed weights is complete.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mixed.h"

/* All that loading looks at, and what people look for. */
static const char *const files[] = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                                    "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "video_preprocessor_config.json",
                                    "processor_config.json", "chat_template.json", "chat_template.jinja", "README.md", "LICENSE"};

static int path_in(qvl__buf *b, const char *dir, const char *file) {
    *b = (qvl__buf){0};
    qvl__buf_printf(b, "%s/%s", dir, file);
    return b->failed ? QVL_ENOMEM : 0;
}

static int write_file(const char *path, const char *data, size_t n) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) return qvl__fail(QVL_EIO, "%s: cannot create: %s", path, strerror(errno));
    int rc = qvl__write_at(fd, path, data, n, 0);
    if (close(fd) != 0 && rc == 0) rc = qvl__fail(QVL_EIO, "%s: cannot write: %s", path, strerror(errno));
    return rc;
}

static int copy(const char *from_dir, const char *to_dir, const char *file) {
    qvl__buf from, to = {0};
    char *data = NULL;
    size_t n;
    int rc = path_in(&from, from_dir, file);
    if (rc == 0) rc = path_in(&to, to_dir, file);
    if (rc == 0 && qvl__file_exists(from.data)) {
        rc = qvl__read_file(from.data, (size_t)256 << 20, &data, &n);
        if (rc == 0) rc = write_file(to.data, data, n);
    }
    qvl__free(data);
    qvl__buf_free(&from);
    qvl__buf_free(&to);
    return rc;
}

/* The directory out, which must not be the one that is read. */
static int make_directory(const char *path, const char *out) {
    struct stat a, b;
    if (stat(path, &a) != 0) return qvl__fail(QVL_EIO, "%s: cannot open: %s", path, strerror(errno));
    if (mkdir(out, 0755) != 0 && errno != EEXIST) return qvl__fail(QVL_EIO, "%s: cannot create: %s", out, strerror(errno));
    if (stat(out, &b) != 0 || !S_ISDIR(b.st_mode)) return qvl__fail(QVL_EIO, "%s: not a directory", out);
    if (a.st_dev == b.st_dev && a.st_ino == b.st_ino) return qvl__fail(QVL_EINVAL, "%s: the packed model needs a directory of its own", out);
    return 0;
}

static int write_report(const qvl__packer *p, char **out) {
    qvl__buf b = {0};
    qvl__buf_printf(&b, "{\"dtype\": \"%s\", \"bytes\": %" PRIu64 ", \"bits\": %.4g, \"matrices\": [", p->kind, p->written,
                    8.0 * (double)p->bytes / (double)p->weights);
    qvl__buf_add(&b, p->report.data ? p->report.data : "", p->report.len);
    qvl__buf_puts(&b, "]}");
    if (b.failed || p->report.failed) {
        qvl__buf_free(&b);
        return QVL_ENOMEM;
    }
    *out = b.data;
    return 0;
}

int qvl_quantize(const char *path, const char *out, const qvl_options *o, char **report) {
    if (!path || !out) return qvl__fail(QVL_EINVAL, "qvl_quantize: path or out is NULL");
    if (report) *report = NULL;
    const char *dtype = qvl__opt_str(o, "dtype");
    bool mixed = qvl__opt_f64(o, "bits") > 0;
    if (mixed && qvl__opt_is_set(o, "dtype")) return qvl__fail(QVL_EINVAL, "option bits chooses the types itself: leave out dtype");
    qvl_progress_fn progress;
    void *ud;
    qvl__opt_progress(o, &progress, &ud);
    qvl__config c = {0};
    qvl__pool *pool = NULL;
    qvl__device *d = NULL;
    qvl__packer p = {.fd = -1};
    qvl__mix plan = {0};
    int rc = qvl__config_load(&c, path);
    if (rc == 0) rc = make_directory(path, out);
    if (rc == 0 && mixed) rc = qvl__mixed_choose(&plan, path, o);
    for (size_t i = 0; rc == 0 && i < sizeof files / sizeof *files; i++) rc = copy(path, out, files[i]);
    if (rc == 0) rc = qvl__pool_new(&pool, (int)qvl__opt_i64(o, "threads"));
    if (rc == 0) rc = qvl__cpu_open(&d, pool, false);
    /* Room for more weights than there are: a layer has 8 and a mixture's 7 and its experts, one of vision 12, a merger 6. */
    size_t entries = (size_t)c.text.layers * (12 + 2 * (size_t)c.text.experts) + (size_t)c.vision.depth * 16 + 64;
    if (rc == 0) rc = qvl__packer_begin(&p, out, entries);
    if (rc == 0) rc = qvl__weights_pack(&p, &c, path, d, dtype, mixed ? &plan : NULL, progress, ud);
    if (rc == 0 && report && (rc = write_report(&p, report)) < 0) unlink(p.path);
    qvl__packer_free(&p);
    qvl__free(plan.types);
    if (d) d->close(d);
    qvl__pool_free(pool);
    qvl__config_free(&c);
    return rc;
}
