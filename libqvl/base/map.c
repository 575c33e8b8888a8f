/* map.c - files: mapped read-only, read whole, or written.
 *
 * Job:        bytes of a file, with errors that name the path.
 * Input:      a path.
 * Output:     a mapping or a buffer.
 * Invariants: only regular files are read; sizes come from the open file, not from its name; what was not written whole is an error.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base.h"

/* Opens path and tells its size; the descriptor, or a negative code. */
static int open_regular(const char *path, size_t *size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return qvl__fail(QVL_EIO, "%s: cannot open: %s", path, strerror(errno));
    struct stat st;
    if (fstat(fd, &st) != 0) {
        int code = qvl__fail(QVL_EIO, "%s: cannot stat: %s", path, strerror(errno));
        close(fd);
        return code;
    }
    if (!S_ISREG(st.st_mode)) {
        close(fd);
        return qvl__fail(QVL_EIO, "%s: not a regular file", path);
    }
    *size = (size_t)st.st_size;
    return fd;
}

int qvl__map_open(qvl__map *m, const char *path) {
    *m = (qvl__map){0};
    size_t size;
    int fd = open_regular(path, &size);
    if (fd < 0) return fd;
    if (size > 0) {
        void *p = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) {
            int code = qvl__fail(QVL_EIO, "%s: cannot map %zu bytes: %s", path, size, strerror(errno));
            close(fd);
            return code;
        }
        m->data = p;
        m->size = size;
    }
    close(fd);
    return 0;
}

void qvl__map_close(qvl__map *m) {
    if (m->data) munmap((void *)(uintptr_t)m->data, m->size);
    *m = (qvl__map){0};
}

void qvl__map_forget(const qvl__map *m, size_t offset, size_t size) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t first = (offset + page - 1) / page * page, last = (offset + size) / page * page;
    if (m->data && last > first && last <= m->size) madvise((void *)(uintptr_t)(m->data + first), last - first, MADV_DONTNEED);
}

void qvl__map_huge(const qvl__map *m) {
    if (m->data) madvise((void *)(uintptr_t)m->data, m->size, MADV_HUGEPAGE);
}

int qvl__read_file(const char *path, size_t limit, char **data, size_t *size) {
    *data = NULL;
    *size = 0;
    size_t n;
    int fd = open_regular(path, &n);
    if (fd < 0) return fd;
    if (n > limit) {
        close(fd);
        return qvl__fail(QVL_ELIMIT, "%s: %zu bytes, more than the %zu that are read", path, n, limit);
    }
    char *p = qvl__malloc(n + 1);
    if (!p) {
        close(fd);
        return QVL_ENOMEM;
    }
    size_t got = 0;
    while (got < n) {
        ssize_t r = read(fd, p + got, n - got);
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0) {
            int code = qvl__fail(QVL_EIO, "%s: cannot read: %s", path, r < 0 ? strerror(errno) : "file became shorter");
            qvl__free(p);
            close(fd);
            return code;
        }
        got += (size_t)r;
    }
    close(fd);
    p[n] = 0;
    *data = p;
    *size = n;
    return 0;
}

int qvl__write_at(int fd, const char *path, const void *data, uint64_t n, uint64_t at) {
    const char *from = data;
    while (n) {
        ssize_t w = pwrite(fd, from, n > (1u << 30) ? 1u << 30 : (size_t)n, (off_t)at);
        if (w < 0 && errno == EINTR) continue;
        if (w <= 0) return qvl__fail(QVL_EIO, "%s: cannot write: %s", path, strerror(errno));
        from += w, at += (uint64_t)w, n -= (uint64_t)w;
    }
    return 0;
}

bool qvl__file_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}
