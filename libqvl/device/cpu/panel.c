/* panel.c - weights in column panels: layout, packing, embedding rows.
 *
 * Job:        the one weight layout that every instruction set computes from.
 * Input:      rows [count][k] of a checkpoint in F32, BF16 or F16.
 * Output:     panels of 16 output features, zero-padded: feature f is column f % 16 of panel f / 16.
 *               F32, F16: [panel][k][16]
 *               BF16:     [panel][k / 2][16][2], k rounded up to even: two neighbours in k share 32 bits, so AVX2 gets
 *                         floats by a shift (even k) or a mask (odd k), and vdpbf16ps takes the pairs as they are.
 *               Q8, Q4:   [groups][16] scales in bf16, then from the next cache line on for each group of 32 in k
 *                         Q8: [8][16][4] bytes: four neighbours in k of each column share 32 bits, as vpdpbusd wants them;
 *                         Q4: [4][16][4] bytes: the low half is k, the high half k + 16 of the group. k past the end is zero.
 *             gate_up: panel 2 i holds gate features 16 i.., panel 2 i + 1 the up features 16 i.. .
 * Invariants: a panel is contiguous, so a matrix row times one panel reads memory once, in order;
 *             conversion rounds to nearest even; padding stays zero (fresh pages are).
 */
#include <string.h>

#include "cpu.h"
#include "half.h"

#define CHUNK 64 /* k per packing step: 16 rows of it fit the first-level cache beside what they become */

size_t qvl__cpu_panel_bytes(qvl__type type, int k) {
    if (qvl__type_quantised(type)) {
        size_t groups = (size_t)qvl__div_up(k, QVL__GROUP);
        return QVL__INT_HEAD(groups) + groups * QVL__GROUP * QVL__PANEL / (type == QVL__Q4 ? 2 : 1);
    }
    size_t padded = type == QVL__BF16 ? ((size_t)k + 1) / 2 * 2 : (size_t)k;
    return padded * QVL__PANEL * qvl__type_size(type);
}

/* A matrix without its data. */
static int describe(qvl__matrix *m, qvl__type type, int n, int k, qvl__role role) {
    memset(m, 0, sizeof *m);
    if (n <= 0 || k <= 0 || (role.gate_up && n % 2))
        return qvl__fail(QVL_EINVAL, "a weight cannot have %d outputs and %d inputs", n, k);
    if (k > QVL__MAX_K) return qvl__fail(QVL_EUNSUPPORTED, "a weight of %d inputs: at most %d are supported", k, QVL__MAX_K);
    size_t panels = role.gate_up ? 2 * (size_t)qvl__div_up(n / 2, QVL__PANEL) : (size_t)qvl__div_up(n, QVL__PANEL);
    size_t one = qvl__cpu_panel_bytes(type, k);
    if (panels > SIZE_MAX / one) return qvl__fail(QVL_ENOMEM, "a weight of %d by %d does not fit the address space", n, k);
    *m = (qvl__matrix){.type = type, .n = n, .k = k, .role = role, .bytes = panels * one};
    return 0;
}

int qvl__cpu_matrix_new(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, qvl__role role) {
    (void)d;
    int rc = describe(m, type, n, k, role);
    if (rc) return rc;
    m->data = qvl__pages(m->bytes);
    return m->data ? 0 : QVL_ENOMEM;
}

int qvl__cpu_matrix_map(qvl__device *d, qvl__matrix *m, qvl__type type, int n, int k, qvl__role role, const void *data, uint64_t bytes) {
    (void)d;
    int rc = describe(m, type, n, k, role);
    if (rc) return rc;
    if (bytes != m->bytes)
        return qvl__fail(QVL_EFORMAT, "%llu bytes stored, %d outputs of %d inputs need %zu", (unsigned long long)bytes, n, k, m->bytes);
    if ((uintptr_t)data % sizeof(float)) return qvl__fail(QVL_EFORMAT, "does not begin at a whole number of words");
    m->mapped = true;
    m->data = (void *)(uintptr_t)data; /* nothing writes to a matrix after matrix_put */
    return 0;
}

void qvl__cpu_matrix_free(qvl__device *d, qvl__matrix *m) {
    (void)d;
    if (m->data && !m->mapped) qvl__pages_free(m->data, m->bytes);
    memset(m, 0, sizeof *m);
}

/* ---- conversion of one stretch of a row ---- */

/* dst[0..n) of type to from element at.. of a row of type from. Source rows may lie at any address. */
static void convert(qvl__type to, void *dst, qvl__type from, const char *row, size_t at, int n) {
    const char *src = row + at * qvl__type_size(from);
    if (to == from) {
        memcpy(dst, src, (size_t)n * qvl__type_size(to));
        return;
    }
    float f[CHUNK] = {0};
    if (from == QVL__F32) {
        memcpy(f, src, (size_t)n * 4);
    } else {
        uint16_t h[CHUNK] = {0};
        memcpy(h, src, (size_t)n * 2);
        if (from == QVL__BF16)
            for (int i = 0; i < CHUNK; i++) f[i] = bf16_to_f32(h[i]);
        else
            for (int i = 0; i < n; i++) f[i] = f16_to_f32(h[i]);
    }
    uint16_t h[CHUNK];
    if (to == QVL__F32) {
        memcpy(dst, f, (size_t)n * 4);
        return;
    }
    if (to == QVL__BF16)
        for (int i = 0; i < CHUNK; i++) h[i] = f32_to_bf16(f[i]);
    else
        for (int i = 0; i < n; i++) h[i] = f32_to_f16(f[i]);
    memcpy(dst, h, (size_t)n * 2);
}

/* ---- packing ---- */

typedef struct {
    const struct qvl__kern *k;
    qvl__matrix *m;
    int first, end;    /* features of this part (the gate half, the up half or all) */
    int unit, part;    /* panel p of the part is panel p * unit + part of the matrix */
    qvl__type src_type;
    const char *src;   /* feature first */
} put_job;

typedef uint32_t quad __attribute__((vector_size(16), aligned(4), may_alias));

/* out[i][j] = t[j][i] for words i < n of rows j < cols; whole squares of 4 by 4 in vectors. */
static void turn(uint32_t *out, const uint32_t t[][CHUNK], int cols, int n) {
    int j = 0, n4 = n / 4 * 4;
    for (; j + 4 <= cols; j += 4) {
        for (int i = 0; i < n4; i += 4) {
            quad a = *(const quad *)&t[j][i], b = *(const quad *)&t[j + 1][i], c = *(const quad *)&t[j + 2][i],
                d = *(const quad *)&t[j + 3][i];
            quad ab_lo = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_hi = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            quad cd_lo = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_hi = __builtin_shufflevector(c, d, 2, 6, 3, 7);
            uint32_t *to = out + (size_t)i * QVL__PANEL + j;
            *(quad *)to = __builtin_shufflevector(ab_lo, cd_lo, 0, 1, 4, 5);
            *(quad *)(to + QVL__PANEL) = __builtin_shufflevector(ab_lo, cd_lo, 2, 3, 6, 7);
            *(quad *)(to + 2 * QVL__PANEL) = __builtin_shufflevector(ab_hi, cd_hi, 0, 1, 4, 5);
            *(quad *)(to + 3 * QVL__PANEL) = __builtin_shufflevector(ab_hi, cd_hi, 2, 3, 6, 7);
        }
        for (int i = n4; i < n; i++)
            for (int l = j; l < j + 4; l++) out[(size_t)i * QVL__PANEL + (size_t)l] = t[l][i];
    }
    for (; j < cols; j++)
        for (int i = 0; i < n; i++) out[(size_t)i * QVL__PANEL + (size_t)j] = t[j][i];
}

/* Where the integer of element i of a group lies in the group's bytes. */
static size_t int_at(qvl__type type, int i, int column) {
    int four = type == QVL__Q8 ? i / 4 : i % 16 / 4;
    return (size_t)((four * QVL__PANEL + column) * 4 + i % 4);
}

/* Columns c0.. of a Q8 or Q4 panel: a chunk of every row as floats, turned, then group by group. The kernel does whole
 * panels; columns that are not meant are left out of what it gives. */
static void quantise_panel(const struct qvl__kern *kern, const qvl__matrix *m, char *panel, int c0, int cols, qvl__type src_type, const char *src) {
    size_t row_bytes = (size_t)m->k * qvl__type_size(src_type), body = QVL__GROUP * QVL__PANEL / (m->type == QVL__Q4 ? 2 : 1);
    int groups = qvl__div_up(m->k, QVL__GROUP);
    union {
        uint32_t w[QVL__PANEL][CHUNK];
        float f[QVL__PANEL][CHUNK];
    } t;
    union {
        uint32_t w[CHUNK][QVL__PANEL];
        float f[CHUNK][QVL__PANEL];
    } turned;
    memset(&t, 0, sizeof t);
    for (int k0 = 0; k0 < m->k; k0 += CHUNK) {
        int n = m->k - k0 < CHUNK ? m->k - k0 : CHUNK;
        for (int j = 0; j < cols; j++) {
            convert(QVL__F32, t.f[j], src_type, src + (size_t)j * row_bytes, (size_t)k0, n);
            memset(t.f[j] + n, 0, (size_t)(CHUNK - n) * sizeof(float));
        }
        turn(turned.w[0], t.w, QVL__PANEL, CHUNK);
        for (int g = k0 / QVL__GROUP; g < groups && g < (k0 + CHUNK) / QVL__GROUP; g++) {
            uint8_t q[QVL__GROUP * QVL__PANEL], *to = (uint8_t *)panel + QVL__INT_HEAD(groups) + (size_t)g * body;
            uint16_t scales[QVL__PANEL];
            kern->quantize_weights(m->type, q, scales, turned.f[g * QVL__GROUP - k0]);
            memcpy((uint16_t *)(void *)panel + g * QVL__PANEL + c0, scales, (size_t)cols * sizeof *scales);
            for (size_t four = 0; four < body; four += 4 * QVL__PANEL) memcpy(to + four + 4 * c0, q + four, 4 * (size_t)cols);
        }
    }
}

/* Columns c0.. of a panel from rows at src. A chunk of every row is converted into t, then t is turned. */
static void pack_panel(const qvl__matrix *m, char *panel, int c0, int cols, qvl__type src_type, const char *src) {
    size_t row_bytes = (size_t)m->k * qvl__type_size(src_type);
    union {
        uint32_t w[QVL__PANEL][CHUNK];
        uint16_t h[QVL__PANEL][2 * CHUNK];
    } t;
    for (int k0 = 0; k0 < m->k; k0 += CHUNK) {
        int n = m->k - k0 < CHUNK ? m->k - k0 : CHUNK;
        for (int j = 0; j < cols; j++) {
            convert(m->type, t.w[j], src_type, src + (size_t)j * row_bytes, (size_t)k0, n);
            if (m->type == QVL__BF16 && n % 2) t.h[j][n] = 0;
        }
        if (m->type == QVL__F16) {
            uint16_t *out = (uint16_t *)(void *)panel + (size_t)k0 * QVL__PANEL + c0;
            for (int i = 0; i < n; i++)
                for (int j = 0; j < cols; j++) out[(size_t)i * QVL__PANEL + (size_t)j] = t.h[j][i];
        } else {
            bool pairs = m->type == QVL__BF16;
            turn((uint32_t *)(void *)panel + (size_t)(pairs ? k0 / 2 : k0) * QVL__PANEL + c0, t.w, cols, pairs ? (n + 1) / 2 : n);
        }
    }
}

static void put_task(void *ctx, int task, int worker) {
    (void)worker;
    const put_job *p = ctx;
    int panel = p->first / QVL__PANEL + task;
    int lo = panel * QVL__PANEL, hi = lo + QVL__PANEL;
    if (lo < p->first) lo = p->first;
    if (hi > p->end) hi = p->end;
    size_t at = ((size_t)panel * (size_t)p->unit + (size_t)p->part) * qvl__cpu_panel_bytes(p->m->type, p->m->k);
    char *to = (char *)p->m->data + at;
    const char *src = p->src + (size_t)(lo - p->first) * (size_t)p->m->k * qvl__type_size(p->src_type);
    if (qvl__type_quantised(p->m->type)) quantise_panel(p->k, p->m, to, lo % QVL__PANEL, hi - lo, p->src_type, src);
    else pack_panel(p->m, to, lo % QVL__PANEL, hi - lo, p->src_type, src);
}

void qvl__cpu_matrix_put(qvl__device *d, qvl__matrix *m, int first, int count, qvl__type src_type, const void *src) {
    int parts = m->role.gate_up ? 2 : 1, size = m->n / parts;
    for (int part = 0; part < parts; part++) {
        int lo = first > part * size ? first : part * size;
        int hi = first + count < (part + 1) * size ? first + count : (part + 1) * size;
        if (lo >= hi) continue;
        put_job p = {qvl__cpu_kern(d), m, lo - part * size, hi - part * size, parts, part, src_type,
                     (const char *)src + (size_t)(lo - first) * (size_t)m->k * qvl__type_size(src_type)};
        qvl__pool_run(d->pool, (p.end - 1) / QVL__PANEL - p.first / QVL__PANEL + 1, put_task, &p);
    }
}

/* ---- embedding: one column of a panel back into a row ---- */

typedef struct {
    float *y;
    const qvl__matrix *m;
    const int32_t *ids;
    int rows, tasks;
} embed_job;

static void embed_task(void *ctx, int task, int worker) {
    (void)worker;
    const embed_job *e = ctx;
    size_t k = (size_t)e->m->k, bytes = qvl__cpu_panel_bytes(e->m->type, e->m->k);
    for (int r = qvl__cpu_cut(e->rows, task, e->tasks); r < qvl__cpu_cut(e->rows, task + 1, e->tasks); r++) {
        int id = e->ids[r], half = e->m->role.gate_up ? e->m->n / 2 : e->m->n, up = id >= half;
        id -= up * half;
        const char *panel = (const char *)e->m->data + (size_t)(id / QVL__PANEL * (e->m->role.gate_up ? 2 : 1) + up) * bytes;
        size_t j = (size_t)(id % QVL__PANEL);
        float *y = e->y + (size_t)r * k;
        const float *f = (const float *)(const void *)panel;
        const uint16_t *h = (const uint16_t *)(const void *)panel;
        if (qvl__type_quantised(e->m->type)) {
            int groups = qvl__div_up(e->m->k, QVL__GROUP), q8 = e->m->type == QVL__Q8;
            size_t body = QVL__GROUP * QVL__PANEL / (q8 ? 1 : 2);
            for (size_t i = 0; i < k; i++) {
                size_t g = i / QVL__GROUP;
                int in = (int)(i % QVL__GROUP);
                int q = ((const uint8_t *)panel)[QVL__INT_HEAD(groups) + g * body + int_at(e->m->type, in, (int)j)];
                y[i] = bf16_to_f32(h[g * QVL__PANEL + j]) * (float)(q8 ? q - 128 : (in < 16 ? q & 15 : q >> 4) - 8);
            }
        } else if (e->m->type == QVL__F32)
            for (size_t i = 0; i < k; i++) y[i] = f[i * QVL__PANEL + j];
        else if (e->m->type == QVL__F16)
            for (size_t i = 0; i < k; i++) y[i] = f16_to_f32(h[i * QVL__PANEL + j]);
        else
            for (size_t i = 0; i < k; i++) y[i] = bf16_to_f32(h[i / 2 * 2 * QVL__PANEL + 2 * j + i % 2]);
    }
}

void qvl__cpu_embed(qvl__device *d, float *y, const qvl__matrix *table, const int32_t *ids, int rows) {
    embed_job e = {y, table, ids, rows, qvl__cpu_tasks(d, rows, (size_t)table->k)};
    qvl__pool_run(d->pool, rows ? e.tasks : 0, embed_task, &e);
}
