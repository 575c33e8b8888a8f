/* attention.cu - the paged KV cache and attention over it; the same for vision.
 *
 * Job:        cache memory, qk_norm_rope_kv, attention_paged, attention_pack, attention_full.
 * Input:      see device.h.
 * Output:     see device.h.
 * Invariants: single rows (decode), and everything without bf16_math or with a head_dim that flash cannot have, take attend;
 *             the rest, and everything in deterministic mode, takes flash.
 */
#include "cuda.h"

#include <limits.h>
#include <string.h>

#include "kernels/flash.cuh"

#define MOST_DIM 256

/* ---- cache ---- */

static size_t half_bytes(qvl__type type, int head_dim) {
    return (size_t)QVL__KV_BLOCK * ((size_t)head_dim * qvl__type_size(type) + (type == QVL__I8 ? sizeof(float) : 0));
}

static int kv_block_bytes(qvl__device *d, qvl__type type, int layers, int kv_heads, int head_dim, size_t *bytes) {
    cuda *c = of(d);
    if (layers <= 0 || kv_heads <= 0 || head_dim <= 0)
        return c->host->fail(QVL_EINVAL, "a KV cache cannot have %d layers and %d heads of %d", layers, kv_heads, head_dim);
    if (head_dim % 2 || head_dim > MOST_DIM) return c->host->fail(QVL_EUNSUPPORTED, "head_dim is %d: it must be even and at most %d", head_dim, MOST_DIM);
    size_t block = 2 * half_bytes(type, head_dim);
    if ((size_t)layers > SIZE_MAX / block / (size_t)kv_heads) return c->host->fail(QVL_ENOMEM, "a KV block of %d layers does not fit the address space", layers);
    *bytes = block * (size_t)layers * (size_t)heads_of(c, kv_heads).count;
    return 0;
}

static int kv_new(qvl__device *d, qvl__kv *kv, qvl__type type, int layers, int kv_heads, int head_dim, int blocks) {
    cuda *c = of(d);
    memset(kv, 0, sizeof *kv);
    size_t block = 0;
    int rc = kv_block_bytes(d, type, layers, kv_heads, head_dim, &block);
    if (rc) return rc;
    if (blocks <= 0) return c->host->fail(QVL_EINVAL, "a KV cache cannot have %d blocks", blocks);
    if ((size_t)blocks > SIZE_MAX / block) return c->host->fail(QVL_ENOMEM, "a KV cache of %d blocks does not fit the address space", blocks);
    void *data = cuda_alloc(d, block * (size_t)blocks);
    if (!data) return QVL_ENOMEM;
    *kv = qvl__kv{type, layers, kv_heads, head_dim, blocks, block, data};
    return 0;
}

static void kv_free(qvl__device *d, qvl__kv *kv) {
    cuda_free(d, kv->data, kv->block_bytes * (size_t)kv->blocks);
    memset(kv, 0, sizeof *kv);
}

static void kv_copy(qvl__device *d, qvl__kv *kv, int from, int to) {
    entered c(d);
    char *base = (char *)kv->data;
    cuda_ok(c, cudaMemcpyAsync(base + (size_t)to * kv->block_bytes, base + (size_t)from * kv->block_bytes, kv->block_bytes, cudaMemcpyDeviceToDevice, c->stream),
            "copy of a KV block");
}

static keys_of keys(const cuda *c, const qvl__kv *kv, int layer, const qvl__ragged *b) {
    size_t half = half_bytes(kv->type, kv->head_dim);
    int heads = heads_of(c, kv->kv_heads).count;
    return keys_of{kv->type, heads, kv->head_dim, (char *)kv->data + (size_t)layer * (size_t)heads * 2 * half, kv->block_bytes, half, b->table, b->stride};
}

static void qk_norm_rope_kv(qvl__device *d, float *qkv, int heads, const float *q_norm, const float *k_norm, float eps, const float *cos, const float *sin, qvl__kv *kv,
                            int layer, const qvl__ragged *b) {
    entered c(d);
    if (b->rows <= 0) return;
    keys_of k = keys(c, kv, layer, b);
    size_t ld = (size_t)(heads + 2 * kv->kv_heads) * (size_t)kv->head_dim;
    int mine = heads_of(c, heads).count;
    dim3 grid(b->rows, div_up(mine + 2 * k.kv_heads, CACHE_WARPS));
    LAUNCH(c, write_rows, grid, dim3(CACHE_WARPS * 32), 0, qkv, ld, mine, q_norm, k_norm, eps, cos, sin, k, b->seq, b->pos);
}

/* ---- rows one by one ---- */

template <int COLS> static void launch_attend(cuda *c, const attend_args &a, const keys_of &k, int rows) {
    size_t shared = ATTEND_SHARED(k.head_dim);
    allow_shared(c, attend<COLS>, shared);
    LAUNCH(c, attend<COLS>, dim3(rows, k.kv_heads * div_up(a.group, ATTEND_HEADS), a.pieces), dim3(ATTEND_WARPS * 32), shared, a, k);
}

/* The same for rows [first, first + rows). longest: at least the keys of each. */
static void by_rows(cuda *c, attend_args a, const keys_of &k, int first, int rows, int longest) {
    int pieces = div_up(longest, ATTEND_PIECE), n = k.head_dim;
    a.pieces = pieces > ATTEND_PIECES ? ATTEND_PIECES : pieces;
    size_t row = (size_t)a.heads * (size_t)a.pieces * (size_t)(n + 2) * sizeof(float);
    int most = a.pieces == 1 ? rows : (int)(ARENA_BYTES / row);
    if (most < 1) { /* many long heads: a KV head's group at a time would be the way; no published model needs it */
        cuda_ok(c, cudaErrorInvalidValue, "attention of more heads than the workspace holds");
        return;
    }
    for (int r = first; r < first + rows; r += most) {
        int some = first + rows - r < most ? first + rows - r : most;
        attend_args b = a;
        b.q += (size_t)r * a.q_stride, b.out += (size_t)r * a.out_stride;
        if (a.pos) b.pos += r, b.seq += r;
        b.partial = a.pieces == 1 ? NULL : (float *)c->arena;
        if (n <= 32) launch_attend<1>(c, b, k, some);
        else if (n <= 64) launch_attend<2>(c, b, k, some);
        else if (n <= 96) launch_attend<3>(c, b, k, some);
        else if (n <= 128) launch_attend<4>(c, b, k, some);
        else launch_attend<8>(c, b, k, some);
        if (a.pieces > 1) LAUNCH(c, attend_join, dim3(some, a.heads), dim3(32), 0, b, n);
    }
}

/* ---- rows in tiles ---- */

template <int DT> static void launch_flash(cuda *c, const attend_args &a, const keys_of &k, int rows) {
    int chunks = div_up(a.group, FLASH_WARPS), heads = a.group < FLASH_WARPS ? a.group : FLASH_WARPS;
    /* a last chunk of fewer heads has more rows in a tile: as many tiles as the first chunks need is enough for all */
    dim3 grid(div_up(rows, FLASH_WARPS / heads * 16), k.kv_heads * chunks);
    allow_shared(c, flash<DT>, FLASH_SHARED(DT));
    LAUNCH(c, flash<DT>, grid, dim3(FLASH_WARPS * 32), FLASH_SHARED(DT), a, k, rows);
}

static bool can_flash(qvl__device *d, int head_dim) { return d->bf16_math && head_dim % 8 == 0 && head_dim <= 128; }

static void by_tiles(cuda *c, attend_args a, const keys_of &k, int first, int rows) {
    a.q += (size_t)first * a.q_stride, a.out += (size_t)first * a.out_stride;
    if (a.pos) a.pos += first, a.seq += first;
    int n = k.head_dim;
    if (n <= 16) launch_flash<1>(c, a, k, rows);
    else if (n <= 32) launch_flash<2>(c, a, k, rows);
    else if (n <= 64) launch_flash<4>(c, a, k, rows);
    else if (n <= 80) launch_flash<5>(c, a, k, rows);
    else launch_flash<8>(c, a, k, rows);
}

/* ---- the ops ---- */

static void attention_paged(qvl__device *d, float *out, const float *qkv, int heads, const qvl__kv *kv, int layer, const qvl__ragged *b) {
    entered c(d);
    if (b->rows <= 0) return;
    size_t n = (size_t)kv->head_dim;
    keys_of k = keys(c, kv, layer, b);
    int mine = heads_of(c, heads).count;
    attend_args a = {out, qkv, (size_t)(heads + 2 * kv->kv_heads) * n, (size_t)heads * n, mine, mine / k.kv_heads, b->seq, b->pos, 0, NULL, 1};
    int alone = !can_flash(d, kv->head_dim) ? b->rows : c->deterministic ? 0 : b->singles;
    if (alone) by_rows(c, a, k, 0, alone, b->longest ? b->longest : b->stride * QVL__KV_BLOCK);
    if (alone < b->rows) by_tiles(c, a, k, alone, b->rows - alone);
}

/* Blocks of keys of n heads, in scratch. */
static keys_of packed_keys(qvl__device *d, void *scratch, int head_dim, int n) {
    qvl__type type = can_flash(d, head_dim) ? QVL__BF16 : QVL__F32;
    size_t half = half_bytes(type, head_dim);
    return keys_of{type, n, head_dim, (char *)scratch, 2 * half * (size_t)n, half, NULL, 0};
}

static size_t attention_full_scratch(qvl__device *d, int span, int head_dim, int n) {
    return (size_t)div_up(span, QVL__KV_BLOCK) * packed_keys(d, NULL, head_dim, n).block;
}

/* Of heads [head, head + n) those that this GPU has, numbered as its own. */
static run own(const cuda *c, int heads, int head, int n) {
    run mine = heads_of(c, heads);
    int lo = head > mine.from ? head : mine.from, hi = head + n < mine.from + mine.count ? head + n : mine.from + mine.count;
    return run{lo - mine.from, hi - lo};
}

static void attention_pack(qvl__device *d, void *scratch, const float *qkv, int span, int heads, int head_dim, int head, int n) {
    entered c(d);
    run r = own(c, heads, head, n);
    size_t ld = 3 * (size_t)heads * (size_t)head_dim;
    if (span > 0 && r.count > 0)
        LAUNCH(c, pack_rows, dim3(div_up(span, QVL__KV_BLOCK), r.count), dim3(128), 0, qkv, ld, span, heads_of(c, heads).count, r.from, packed_keys(d, scratch, head_dim, r.count));
}

/* Each block reads its own queries before it writes their outputs to the same place. */
static void attention_full(qvl__device *d, float *qkv, int span, int heads, int head_dim, int head, int n, int row, int rows, const void *scratch) {
    entered c(d);
    run r = own(c, heads, head, n);
    if (rows <= 0 || r.count <= 0) return;
    size_t ld = 3 * (size_t)heads * (size_t)head_dim;
    float *q = qkv + (size_t)r.from * (size_t)head_dim;
    attend_args a = {q, q, ld, ld, r.count, 1, NULL, NULL, span, NULL, 1};
    keys_of k = packed_keys(d, (void *)(uintptr_t)scratch, head_dim, r.count);
    if (can_flash(d, head_dim)) by_tiles(c, a, k, row, rows);
    else by_rows(c, a, k, row, rows, span);
}

void cuda_attention(qvl__device *d) {
    d->kv_new = kv_new;
    d->kv_block_bytes = kv_block_bytes;
    d->kv_free = kv_free;
    d->kv_copy = kv_copy;
    d->qk_norm_rope_kv = qk_norm_rope_kv;
    d->attention_paged = attention_paged;
    d->attention_pack = attention_pack;
    d->attention_full = attention_full;
    d->attention_full_scratch = attention_full_scratch;
}
