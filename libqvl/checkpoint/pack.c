/* pack.c - writing weights as they lie in memory, so that the next load only maps them.
 *
 * Job:        one file, qvl.safetensors, whose tensors are the device's packed matrices and the float vectors.
 * Input:      weights one after the other, in the order of loading.
 * Output:     a valid safetensors file: matrices as bytes ("text.3.qkv.int4", type U8), vectors as F32; its metadata says
 *             format qvl-packed-1 and what most weights are. docs/quantize.md describes it.
 * Invariants: the file has its name only when it is whole: it grows under a temporary one, and is on disk before it is
 *             renamed; memory does not grow with the model; the bytes depend on neither CPU nor threads.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint.h"

#define ENTRY 224 /* bytes of the header for a weight: a name of at most 95, its type, shape and place */

static int fail_write(const qvl__packer *p) { return qvl__fail(QVL_EIO, "%s: cannot write: %s", p->temporary, strerror(errno)); }

int qvl__packer_begin(qvl__packer *p, const char *dir, size_t entries) {
    *p = (qvl__packer){.fd = -1};
    qvl__buf path = {0}, temporary = {0};
    qvl__buf_printf(&path, "%s/%s", dir, QVL__PACKED_FILE);
    qvl__buf_printf(&temporary, "%s/%s.part", dir, QVL__PACKED_FILE);
    p->path = path.data;
    p->temporary = temporary.data;
    if (path.failed || temporary.failed) return QVL_ENOMEM;
    if (qvl__file_exists(p->path)) return qvl__fail(QVL_EINVAL, "%s exists; remove it, or choose another directory", p->path);
    p->fd = open(p->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (p->fd < 0) return qvl__fail(QVL_EIO, "%s: cannot create: %s", p->temporary, strerror(errno));
    p->reserved = (8 + 512 + entries * ENTRY + 4095) / 4096 * 4096;
    return 0;
}

int qvl__packer_add(qvl__packer *p, const char *name, const char *dtype, int rank, const uint64_t *shape, const void *data) {
    uint64_t bytes = strcmp(dtype, "F32") == 0 ? 4 : 1;
    qvl__buf_printf(&p->header, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", name, dtype);
    for (int i = 0; i < rank; i++) {
        qvl__buf_printf(&p->header, "%s%" PRIu64, i ? "," : "", shape[i]);
        bytes *= shape[i];
    }
    qvl__buf_printf(&p->header, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", p->written, p->written + bytes);
    if (p->header.failed) return QVL_ENOMEM;
    int rc = qvl__write_at(p->fd, p->temporary, data, bytes, p->reserved + p->written);
    p->written += bytes;
    return rc;
}

void qvl__packer_note(qvl__packer *p, const char *name, uint64_t weights, uint64_t bytes, double error) {
    p->weights += weights;
    p->bytes += bytes;
    qvl__buf_printf(&p->report, "%s{\"name\": \"%s\", \"weights\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"error\": %.6g}", p->report.len ? ", " : "", name,
                    weights, bytes, error);
}

/* The header fills what was reserved with spaces, so that the data begin at a page. */
int qvl__packer_end(qvl__packer *p, const char *kind) {
    qvl__buf b = {0};
    uint64_t length = p->reserved - 8;
    p->kind = kind;
    for (int i = 0; i < 8; i++) qvl__buf_add(&b, &(uint8_t){(uint8_t)(length >> 8 * i)}, 1);
    qvl__buf_printf(&b, "{\"__metadata__\":{\"format\":\"%s\",\"weights\":\"%s\"}", QVL__PACKED_FORMAT, kind);
    qvl__buf_add(&b, p->header.data, p->header.len);
    qvl__buf_puts(&b, "}");
    int rc = 0;
    if (b.len > p->reserved) rc = qvl__fail(QVL_EINTERNAL, "%s: %zu bytes of header, %zu reserved", p->temporary, b.len, p->reserved);
    if (rc == 0) qvl__buf_printf(&b, "%*s", (int)(p->reserved - b.len), "");
    if (b.failed) rc = QVL_ENOMEM;
    if (rc == 0) rc = qvl__write_at(p->fd, p->temporary, b.data, b.len, 0);
    qvl__buf_free(&b);
    if (rc == 0 && fsync(p->fd) != 0) rc = fail_write(p);
    int fd = p->fd;
    p->fd = -1;
    if (close(fd) != 0 && rc == 0) rc = fail_write(p);
    if (rc == 0 && rename(p->temporary, p->path) != 0) rc = qvl__fail(QVL_EIO, "%s: cannot rename to %s: %s", p->temporary, p->path, strerror(errno));
    if (rc) unlink(p->temporary);
    return rc;
}

void qvl__packer_free(qvl__packer *p) {
    if (p->fd >= 0) {
        close(p->fd);
        unlink(p->temporary);
    }
    qvl__buf_free(&p->header);
    qvl__buf_free(&p->report);
    qvl__free(p->path);
    qvl__free(p->temporary);
}
