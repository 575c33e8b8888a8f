/* safetensors.c - headers of safetensors shards, checked and mapped.
 *
 * Job:        one sorted list of all tensors of a directory (model.safetensors, or the shards of
 *             model.safetensors.index.json).
 * Input:      files of anyone: truncated, hostile, huge.
 * Output:     name, type, shape and a pointer into a mapping for every tensor.
 * Invariants: the format's rules (github.com/huggingface/safetensors, format section): 8 bytes header length, JSON
 *             header, offsets inside the file that cover the data without gap or overlap, byte count = shape x type.
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"

#define PATH 4096
#define HEADER_LIMIT ((size_t)100 << 20) /* as the reference implementation */

static size_t element_size(const char *dtype) {
    static const struct { const char *name; size_t size; } types[] = {
        {"BF16", 2}, {"F16", 2}, {"F32", 4}, {"F64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I8", 1}, {"U8", 1},
        {"BOOL", 1}, {"I16", 2}, {"U16", 2}, {"I32", 4}, {"U32", 4}, {"I64", 8}, {"U64", 8}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(types[i].name, dtype) == 0) return types[i].size;
    return 0;
}

static int parse_tensor(qvl__tensor *t, const char *path, const char *name, const json_t *v, const qvl__map *map, size_t data_at) {
    const char *dtype = json_string_value(json_object_get(v, "dtype"));
    const json_t *shape = json_object_get(v, "shape"), *off = json_object_get(v, "data_offsets");
    if (!dtype || !json_is_array(shape) || json_array_size(shape) > 8 || !json_is_array(off) || json_array_size(off) != 2)
        return qvl__fail(QVL_EFORMAT, "%s: tensor %.120s: header entry is malformed", path, name);
    size_t size = element_size(dtype);
    if (!size) return qvl__fail(QVL_EUNSUPPORTED, "%s: tensor %.120s: type \"%.20s\" is not known", path, name, dtype);
    snprintf(t->dtype, sizeof t->dtype, "%s", dtype);
    uint64_t bytes = size;
    t->rank = (int)json_array_size(shape);
    for (int i = 0; i < t->rank; i++) {
        const json_t *d = json_array_get(shape, (size_t)i);
        t->shape[i] = json_is_integer(d) ? json_integer_value(d) : -1;
        if (t->shape[i] < 0 || __builtin_mul_overflow(bytes, (uint64_t)t->shape[i], &bytes))
            return qvl__fail(QVL_EFORMAT, "%s: tensor %.120s: shape is not valid", path, name);
    }
    const json_t *b = json_array_get(off, 0), *e = json_array_get(off, 1);
    uint64_t room = map->size - data_at;
    if (!json_is_integer(b) || !json_is_integer(e) || json_integer_value(b) < 0 || json_integer_value(e) < json_integer_value(b))
        return qvl__fail(QVL_EFORMAT, "%s: tensor %.120s: data_offsets are not valid", path, name);
    uint64_t begin = (uint64_t)json_integer_value(b), end = (uint64_t)json_integer_value(e);
    if (end > room)
        return qvl__fail(QVL_EFORMAT, "%s: tensor %.120s ends at byte %llu of the data, the file has %llu: it is truncated", path, name,
                         (unsigned long long)end, (unsigned long long)room);
    if (end - begin != bytes)
        return qvl__fail(QVL_EFORMAT, "%s: tensor %.120s: %llu bytes stored, its shape and type need %llu", path, name,
                         (unsigned long long)(end - begin), (unsigned long long)bytes);
    t->bytes = bytes;
    t->data = map->data ? map->data + data_at + begin : NULL;
    t->name = qvl__strndup(name, strlen(name));
    return t->name ? 0 : QVL_ENOMEM;
}

static int by_address(const void *a, const void *b) {
    const qvl__tensor *x = a, *y = b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static int by_name(const void *a, const void *b) { return strcmp(((const qvl__tensor *)a)->name, ((const qvl__tensor *)b)->name); }

/* A packed file says so here; a plain one may say anything. */
static int read_metadata(qvl__safetensors *s, const char *path, const json_t *v) {
    const char *format = json_string_value(json_object_get(v, "format")), *kind = json_string_value(json_object_get(v, "weights"));
    if (!format || strncmp(format, "qvl-packed-", 11) != 0) return 0;
    if (strcmp(format, QVL__PACKED_FORMAT) != 0)
        return qvl__fail(QVL_EUNSUPPORTED, "%s: format %.40s is not known to this version (%s); quantize the model again", path, format, QVL__PACKED_FORMAT);
    if (!kind || s->n_maps != 1) return qvl__fail(QVL_EFORMAT, "%s: the header of a packed file, but not all of it", path);
    s->packed = qvl__strndup(kind, strlen(kind));
    return s->packed ? 0 : QVL_ENOMEM;
}

static int open_shard(qvl__safetensors *s, int shard) {
    const char *path = s->paths[shard];
    qvl__map *map = &s->maps[shard];
    int rc = qvl__map_open(map, path);
    if (rc) return rc;
    if (map->size < 8) return qvl__fail(QVL_EFORMAT, "%s: %zu bytes: too short for a safetensors file", path, map->size);
    uint64_t header = 0;
    for (int i = 7; i >= 0; i--) header = header << 8 | map->data[i];
    if (header > HEADER_LIMIT || header > map->size - 8)
        return qvl__fail(QVL_EFORMAT, "%s: header of %llu bytes in a file of %zu: it is truncated or not safetensors", path, (unsigned long long)header, map->size);
    json_t *root;
    rc = qvl__json_parse(&root, (const char *)map->data + 8, (size_t)header, path);
    if (rc) return rc;
    size_t first = s->n, count = json_object_size(root), data_at = 8 + (size_t)header;
    qvl__tensor *grown = json_is_object(root) ? qvl__array(s->tensors, s->n + count + 1, sizeof *grown) : NULL;
    if (!json_is_object(root)) rc = qvl__fail(QVL_EFORMAT, "%s: header is not a JSON object", path);
    else if (!grown) rc = QVL_ENOMEM;
    else s->tensors = grown;
    const char *name;
    json_t *v;
    if (rc == 0) json_object_foreach(root, name, v) {
        if (strcmp(name, "__metadata__") == 0) {
            rc = read_metadata(s, path, v);
            if (rc) break;
            continue;
        }
        qvl__tensor *t = &s->tensors[s->n];
        *t = (qvl__tensor){.shard = shard};
        rc = parse_tensor(t, path, name, v, map, data_at);
        if (rc) break;
        s->n++;
    }
    json_decref(root);
    if (rc || s->n == first) return rc;
    qsort(s->tensors + first, s->n - first, sizeof *s->tensors, by_address);
    const uint8_t *at = map->data + data_at;
    for (size_t i = first; i < s->n; i++) {
        if (s->tensors[i].data != at)
            return qvl__fail(QVL_EFORMAT, "%s: tensor %.120s overlaps another one or leaves a gap", path, s->tensors[i].name);
        at += s->tensors[i].bytes;
    }
    if (at != map->data + map->size) return qvl__fail(QVL_EFORMAT, "%s: %zu bytes follow the last tensor", path, (size_t)(map->data + map->size - at));
    return 0;
}

static int add_shard(qvl__safetensors *s, const char *dir, const char *file) {
    for (const char *p = file; *p; p++)
        if (*p == '/' || *p == '\\') return qvl__fail(QVL_EFORMAT, "%s: the index names a shard outside of the directory: %.120s", dir, file);
    char path[PATH];
    int n = snprintf(path, sizeof path, "%s/%s", dir, file);
    if (n < 0 || n >= PATH) return qvl__fail(QVL_EINVAL, "%.200s...: path is too long", dir);
    for (int i = 0; i < s->n_maps; i++)
        if (strcmp(s->paths[i], path) == 0) return 0;
    char **paths = qvl__array(s->paths, (size_t)s->n_maps + 1, sizeof *paths);
    if (paths) s->paths = paths;
    qvl__map *maps = qvl__array(s->maps, (size_t)s->n_maps + 1, sizeof *maps);
    if (maps) s->maps = maps;
    if (!paths || !maps) return QVL_ENOMEM;
    s->maps[s->n_maps] = (qvl__map){0};
    s->paths[s->n_maps] = qvl__strndup(path, strlen(path));
    if (!s->paths[s->n_maps]) return QVL_ENOMEM;
    s->n_maps++;
    return 0;
}

static int list_shards(qvl__safetensors *s, const char *dir) {
    char path[PATH];
    int n = snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    if (n < 0 || n >= PATH) return qvl__fail(QVL_EINVAL, "%.200s...: path is too long", dir);
    char packed[PATH];
    snprintf(packed, sizeof packed, "%s/" QVL__PACKED_FILE, dir);
    if (qvl__file_exists(packed)) return add_shard(s, dir, QVL__PACKED_FILE);
    if (!qvl__file_exists(path)) return add_shard(s, dir, "model.safetensors");
    json_t *root;
    int rc = qvl__json_file(&root, path);
    if (rc) return rc;
    const json_t *weights = json_object_get(root, "weight_map");
    const char *name;
    json_t *file;
    if (!json_is_object(weights) || json_object_size(weights) == 0) rc = qvl__fail(QVL_EFORMAT, "%s: weight_map is missing or empty", path);
    else json_object_foreach((json_t *)(uintptr_t)weights, name, file) {
        if (!json_is_string(file)) rc = qvl__fail(QVL_EFORMAT, "%s: weight_map.%.120s is not a file name", path, name);
        else rc = add_shard(s, dir, json_string_value(file));
        if (rc) break;
    }
    json_decref(root);
    return rc;
}

int qvl__safetensors_open(qvl__safetensors *s, const char *dir) {
    *s = (qvl__safetensors){0};
    int rc = list_shards(s, dir);
    for (int i = 0; rc == 0 && i < s->n_maps; i++) rc = open_shard(s, i);
    if (rc == 0 && s->n) {
        qsort(s->tensors, s->n, sizeof *s->tensors, by_name);
        for (size_t i = 1; rc == 0 && i < s->n; i++)
            if (strcmp(s->tensors[i].name, s->tensors[i - 1].name) == 0)
                rc = qvl__fail(QVL_EFORMAT, "%s: tensor %.120s is stored twice", s->paths[s->tensors[i].shard], s->tensors[i].name);
    }
    if (rc) qvl__safetensors_close(s);
    return rc;
}

void qvl__safetensors_close(qvl__safetensors *s) {
    for (size_t i = 0; i < s->n; i++) qvl__free(s->tensors[i].name);
    for (int i = 0; i < s->n_maps; i++) {
        qvl__map_close(&s->maps[i]);
        qvl__free(s->paths[i]);
    }
    qvl__free(s->tensors);
    qvl__free(s->maps);
    qvl__free(s->paths);
    qvl__free(s->packed);
    *s = (qvl__safetensors){0};
}

qvl__tensor *qvl__safetensors_find(qvl__safetensors *s, const char *name) {
    size_t lo = 0, hi = s->n;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        int c = strcmp(s->tensors[mid].name, name);
        if (c == 0) return &s->tensors[mid];
        if (c < 0) lo = mid + 1;
        else hi = mid;
    }
    return NULL;
}
