/* embedding.c - what the vision tower made of one image, as a handle and as bytes.
 *
 * Job:        allocate, share and free embeddings; write them to bytes and read them back (a cache outside stores these).
 * Input:      sizes from the forward pass; bytes from anywhere.
 * Output:     qvl_embedding; a self-describing byte string.
 * Invariants: an embedding does not change once it was handed out;
 *             bytes are used only when magic, version, weights, sizes and checksum are all right.
 *
 * The bytes, all little endian: magic "QVLEMBED"; u32 version (1), flags (bit 0: video), layers, tokens, hidden, t, h, w;
 * weights_id[32]; hash[32]; float data[layers][tokens][hidden]; SHA-256 of everything before it.
 */
#include <string.h>

#include "encode.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "floats are written as they lie in memory");
_Static_assert(sizeof(float) == 4, "IEEE binary32");

static const char magic[8] = {'Q', 'V', 'L', 'E', 'M', 'B', 'E', 'D'};
enum { VERSION = 1, FIELDS = 8, AT_WEIGHTS = 8 + 4 * FIELDS, AT_HASH = AT_WEIGHTS + 32, HEADER = AT_HASH + 32, CHECKSUM = 32 };

static bool data_bytes(int layers, int tokens, int hidden, size_t *bytes) {
    size_t n;
    return layers > 0 && tokens > 0 && hidden > 0 && !__builtin_mul_overflow((size_t)layers, (size_t)tokens, &n) &&
           !__builtin_mul_overflow(n, (size_t)hidden, &n) && !__builtin_mul_overflow(n, sizeof(float), bytes) &&
           *bytes <= SIZE_MAX - HEADER - CHECKSUM;
}

int qvl__embedding_alloc(qvl_embedding **out, int layers, int tokens, int hidden) {
    size_t bytes;
    *out = NULL;
    if (!data_bytes(layers, tokens, hidden, &bytes))
        return qvl__fail(QVL_EINVAL, "embedding: %d layers of %d tokens of %d floats is not a possible size", layers, tokens,
                         hidden);
    qvl_embedding *e = qvl__calloc(1, sizeof *e);
    if (!e) return QVL_ENOMEM;
    e->data = qvl__malloc(bytes);
    if (!e->data) {
        qvl__free(e);
        return QVL_ENOMEM;
    }
    atomic_init(&e->refs, 1);
    e->layers = layers;
    e->tokens = tokens;
    e->hidden = hidden;
    qvl__handle_born();
    *out = e;
    return 0;
}

qvl_embedding *qvl__embedding_ref(const qvl_embedding *e) {
    qvl_embedding *m = (qvl_embedding *)(uintptr_t)e; /* only the count of a shared embedding changes */
    atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
    return m;
}

void qvl__embedding_free(qvl_embedding *e) {
    if (!e || atomic_fetch_sub_explicit(&e->refs, 1, memory_order_acq_rel) != 1) return;
    qvl__free(e->data);
    qvl__free(e);
    qvl__handle_gone();
}

static void checksum(uint8_t out[32], const uint8_t *data, size_t n) {
    qvl__sha256 s;
    qvl__sha256_init(&s);
    qvl__sha256_add(&s, data, n);
    qvl__sha256_end(&s, out);
}

int qvl__embedding_to_bytes(const qvl_embedding *e, void **data, size_t *size) {
    size_t bytes;
    if (!data_bytes(e->layers, e->tokens, e->hidden, &bytes)) return qvl__fail(QVL_EINTERNAL, "embedding of impossible size");
    uint8_t *b = qvl__malloc(HEADER + bytes + CHECKSUM);
    if (!b) return QVL_ENOMEM;
    const uint32_t field[FIELDS] = {VERSION,           e->video ? 1 : 0, (uint32_t)e->layers, (uint32_t)e->tokens,
                                    (uint32_t)e->hidden, (uint32_t)e->t,   (uint32_t)e->h,      (uint32_t)e->w};
    memcpy(b, magic, 8);
    memcpy(b + 8, field, sizeof field);
    memcpy(b + AT_WEIGHTS, e->weights_id, 32);
    memcpy(b + AT_HASH, e->hash, 32);
    memcpy(b + HEADER, e->data, bytes);
    checksum(b + HEADER + bytes, b, HEADER + bytes);
    *data = b;
    *size = HEADER + bytes + CHECKSUM;
    return 0;
}

/* A token is a square of merge x merge patches. */
static bool grid_fits(uint64_t t, uint64_t h, uint64_t w, uint64_t tokens) {
    for (uint64_t merge = 1, n; merge <= 8; merge++)
        if (h % merge == 0 && w % merge == 0 && !__builtin_mul_overflow((h / merge) * (w / merge), t, &n) && n == tokens)
            return true;
    return false;
}

int qvl__embedding_from_bytes(qvl_embedding **out, const uint8_t weights_id[32], const void *data, size_t size) {
    const uint8_t *b = data;
    uint32_t f[FIELDS];
    uint8_t sum[32];
    size_t bytes;
    *out = NULL;
    if (size < HEADER + CHECKSUM || memcmp(b, magic, 8) != 0)
        return qvl__fail(QVL_EFORMAT, "embedding: these %zu bytes do not begin with an embedding's header", size);
    memcpy(f, b + 8, sizeof f);
    if (f[0] != VERSION)
        return qvl__fail(QVL_EFORMAT, "embedding: version %u is unknown, this library reads version %d; encode the image again",
                         f[0], VERSION);
    for (int i = 2; i < FIELDS; i++)
        if (f[i] == 0 || f[i] > INT32_MAX)
            return qvl__fail(QVL_EFORMAT, "embedding: damaged header, size %u is impossible", f[i]);
    if (f[1] > 1 || (!(f[1] & 1) && f[5] != 1) || !grid_fits(f[5], f[6], f[7], f[3]))
        return qvl__fail(QVL_EFORMAT, "embedding: damaged header, a %u x %u x %u grid does not give %u tokens", f[5], f[6], f[7],
                         f[3]);
    if (!data_bytes((int)f[2], (int)f[3], (int)f[4], &bytes) || size != HEADER + bytes + CHECKSUM)
        return qvl__fail(QVL_EFORMAT, "embedding: %zu bytes do not hold %u layers of %u tokens of %u floats; cut off or damaged",
                         size, f[2], f[3], f[4]);
    checksum(sum, b, HEADER + bytes);
    if (memcmp(sum, b + HEADER + bytes, 32) != 0)
        return qvl__fail(QVL_EFORMAT, "embedding: wrong checksum, the bytes are damaged");
    if (memcmp(b + AT_WEIGHTS, weights_id, 32) != 0)
        return qvl__fail(QVL_EFORMAT, "embedding: made by a model with other weights; encode the image again with this one");
    qvl_embedding *e;
    int rc = qvl__embedding_alloc(&e, (int)f[2], (int)f[3], (int)f[4]);
    if (rc < 0) return rc;
    e->video = f[1] & 1;
    e->t = (int)f[5];
    e->h = (int)f[6];
    e->w = (int)f[7];
    memcpy(e->weights_id, b + AT_WEIGHTS, 32);
    memcpy(e->hash, b + AT_HASH, 32);
    memcpy(e->data, b + HEADER, bytes);
    *out = e;
    return 0;
}
