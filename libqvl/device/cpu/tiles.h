/* tiles.h - the part of kern.c that computes on the tile registers of AMX.
 *
 * Job:        products of bf16, products of 8-bit and 4-bit weights for many rows, and the products of attention.
 * Input:      panels as panel.c lays them out, a cache as attention.c does. Included by kern.c behind integers.h.
 * Output:     gemm_dot, gemm_int, and what kern.h calls attention on tile registers.
 * Invariants: a row of a tile knows nothing of the other rows, and k runs in steps of 32 whatever the tile, so a row's bits are
 *             the same alone and among others; integer sums are exact, so those of tiles are those of integers.h;
 *             a thread's tile registers are taken and given back within a call, or between tiles(rows) and tiles(0): other code
 *             of the thread may have its own use of them.
 *
 * A register has 16 rows of 64 bytes. Here 0..3 are sums, 4 and 5 rows of activations (16 pairs of k, or 32 bytes), 6 and 7 weights:
 * 16 pairs, or 8 fours, of k for the 16 columns of a panel, which is how panels lie in memory.
 */
#ifndef QVL__TILES_H
#define QVL__TILES_H

#define REG_ROWS 16                 /* rows of a register */
#define STEP_BYTES (32 * PANEL * 2) /* of a bf16 panel: what a step of 32 in k takes */
#define DOT_AHEAD 2048              /* bytes of a panel that one register of rows asks ahead */

/* Registers of activations and sums get rows and rows2 (the second ones) rows; words: 32-bit words of k in a step. */
INLINE void tiles_take(int rows, int rows2, int words) {
    tile_shape s = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        bool second = t == 2 || t == 3 || t == 5, weights = t >= 6;
        s.rows[t] = (uint8_t)(weights ? words : second ? rows2 : rows);
        s.bytes[t] = (uint16_t)(t == 4 || t == 5 ? 4 * words : 4 * PANEL);
    }
    TILE_SHAPE(&s);
}

/* Where step s of panel j lies: panels that lie together, or a step in each of several blocks. */
typedef struct {
    const char *at;
    size_t panel;            /* bytes from panel to panel */
    const char *const *list; /* NULL: step follows step */
    size_t from;             /* bytes into the blocks of the list */
    size_t low;              /* bytes to what rounding left of the numbers; 0: nothing */
} tile_panels;
INLINE const char *tile_step(const tile_panels *b, int j, int s) {
    return (b->list ? b->list[s] + b->from : b->at + (size_t)s * STEP_BYTES) + (size_t)j * b->panel;
}

/* R registers of rows at x by the P panels (up to 2) in 6 and 7. */
#define DOT_STEP(R, P, x, ld)                                   \
    do {                                                        \
        TILE_PASS(4, x, ld);                                    \
        TILE_DOT(0, 4, 6);                                      \
        if (P > 1) TILE_DOT(1, 4, 7);                           \
        if (R > 1) {                                            \
            TILE_PASS(5, (const char *)(x) + REG_ROWS * (ld), ld); \
            TILE_DOT(2, 5, 6);                                  \
            if (P > 1) TILE_DOT(3, 5, 7);                       \
        }                                                       \
    } while (0)

/* R registers of rows by P panels, R P up to 4. split: activations are hi and lo, and both meet the weights; weights that have a low part
 * meet hi with it (not with four panels). near: few rows, whose weights come from memory as they are needed; else next: as in kern.c. */
INLINE void dot_tiles(const int R, const int P, const bool split, const bool near, float *c, size_t ldc, const qvl__split *a, const tile_panels *b,
                      int steps, bool resume, ahead next) {
    const size_t c_bytes = ldc * sizeof(float), ld = a->ld * 2;
    float *c2 = c + (R > 1 ? REG_ROWS * ldc : 2 * PANEL); /* sums 2 and 3: the second rows, or the third and fourth panel */
    const size_t lines = STEP_BYTES / 64 * P, from = lines * (size_t)next.part / (size_t)next.parts, to = lines * (size_t)(next.part + 1) / (size_t)next.parts;
    if (resume) {
        TILE_LOAD(0, c, c_bytes);
        if (P > 1) TILE_LOAD(1, c + PANEL, c_bytes);
        if (R > 1 || P > 2) TILE_LOAD(2, c2, c_bytes);
        if ((R > 1 && P > 1) || P > 3) TILE_LOAD(3, c2 + PANEL, c_bytes);
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    for (int s = 0; s < steps; s++) {
        const char *x = (const char *)(a->hi + (size_t)s * 32);
        if (near)
            for (size_t i = 0; i < (size_t)(STEP_BYTES * P); i += 64) TO_NEAR(b->at + i / STEP_BYTES * b->panel + (size_t)s * STEP_BYTES + i % STEP_BYTES + DOT_AHEAD);
        else if (next.at)
            for (size_t i = from; i < to; i++) TO_L2(next.at + i / (STEP_BYTES / 64) * b->panel + (size_t)s * STEP_BYTES + i % (STEP_BYTES / 64) * 64);
        TILE_LOAD(6, tile_step(b, 0, s), 64);
        if (P > 1) TILE_LOAD(7, tile_step(b, 1, s), 64);
        if (P > 2) { /* one register of rows; four chains of sums */
            TILE_LOAD(4, x, ld);
            if (split) TILE_LOAD(5, x + a->low * 2, ld);
            TILE_DOT(0, 4, 6);
            TILE_DOT(1, 4, 7);
            if (split) TILE_DOT(0, 5, 6);
            if (split) TILE_DOT(1, 5, 7);
            TILE_LOAD(6, tile_step(b, 2, s), 64);
            TILE_LOAD(7, tile_step(b, 3, s), 64);
            TILE_DOT(2, 4, 6);
            TILE_DOT(3, 4, 7);
            if (split) TILE_DOT(2, 5, 6);
            if (split) TILE_DOT(3, 5, 7);
            continue;
        }
        DOT_STEP(R, P, x, ld);
        if (split) DOT_STEP(R, P, x + a->low * 2, ld);
        if (split && b->low) {
            TILE_LOAD(6, tile_step(b, 0, s) + b->low, 64);
            if (P > 1) TILE_LOAD(7, tile_step(b, 1, s) + b->low, 64);
            DOT_STEP(R, P, x, ld);
        }
    }
    TILE_STORE(0, c, c_bytes);
    if (P > 1) TILE_STORE(1, c + PANEL, c_bytes);
    if (R > 1 || P > 2) TILE_STORE(2, c2, c_bytes);
    if ((R > 1 && P > 1) || P > 3) TILE_STORE(3, c2 + PANEL, c_bytes);
}

/* np panels: 1, 2, or with one register of rows 4. */
INLINE void dot_panels(const int R, int np, const bool split, const bool near, float *c, size_t ldc, const qvl__split *a, const tile_panels *b, int steps, bool resume, ahead next) {
    if (np == 1) dot_tiles(R, 1, split, near, c, ldc, a, b, steps, resume, next);
    else if (np == 2 || R > 1) dot_tiles(R, 2, split, near, c, ldc, a, b, steps, resume, next);
    else dot_tiles(1, 4, split, near, c, ldc, a, b, steps, resume, next);
}

INLINE qvl__split rows_from(const qvl__split *a, int r) { return (qvl__split){a->hi + (size_t)r * a->ld, a->ld, a->low}; }

/* ---- bf16 weights ---- */

/* All rows, R registers of them at a time, by all panels; the shapes are set. */
INLINE void dot_rows(const int R, float *c, size_t ldc, const qvl__split *a, tile_panels b, int rows, int count, int steps, bool resume, bool ask) {
    const int wide = R > 1 ? 2 : 4, parts = (rows + R * REG_ROWS - 1) / (R * REG_ROWS);
    for (int p = 0, np; p < count; p += np, b.at += (size_t)np * b.panel) {
        np = count - p >= wide ? wide : count - p >= 2 ? 2 : 1;
        ahead next = {ask && count - p >= np + wide ? b.at + (size_t)np * b.panel : NULL, 0, parts};
        for (int r = 0; r < rows; r += R * REG_ROWS, next.part++) {
            qvl__split x = rows_from(a, r);
            if (a->low) dot_panels(R, np, true, R == 1, c + (size_t)r * ldc + (size_t)p * PANEL, ldc, &x, &b, steps, resume, next);
            else dot_panels(R, np, false, R == 1, c + (size_t)r * ldc + (size_t)p * PANEL, ldc, &x, &b, steps, resume, next);
        }
    }
}

/* Two registers of rows at a time, then what is left, as one or two. */
static void dot_steps(float *c, size_t ldc, const qvl__split *a, tile_panels b, int rows, int count, int steps, int words, bool resume) {
    int full = rows / (2 * REG_ROWS) * (2 * REG_ROWS), left = rows - full;
    bool ask = words == REG_ROWS;
    if (full) {
        tiles_take(REG_ROWS, REG_ROWS, words);
        dot_rows(2, c, ldc, a, b, full, count, steps, resume, ask);
    }
    if (!left) return;
    qvl__split rest = rows_from(a, full);
    if (left > REG_ROWS) {
        tiles_take(REG_ROWS, left - REG_ROWS, words);
        dot_rows(2, c + (size_t)full * ldc, ldc, &rest, b, left, count, steps, resume, ask);
    } else {
        tiles_take(left, left, words);
        dot_rows(1, c + (size_t)full * ldc, ldc, &rest, b, left, count, steps, resume, ask);
    }
}

static void gemm_dot(float *c, size_t ldc, const qvl__split *a, const void *panels, size_t panel_bytes, int rows, int count,
                     int pairs, bool resume) {
    qvl__split x = *a;
    tile_panels b = {.at = panels, .panel = panel_bytes};
    int steps = pairs / 16, rest = pairs % 16;
    if (steps) dot_steps(c, ldc, &x, b, rows, count, steps, 16, resume);
    if (rest || !steps) { /* what fills no step */
        x.hi += (size_t)steps * 32;
        b.at += (size_t)steps * STEP_BYTES;
        dot_steps(c, ldc, &x, b, rows, count, 1, rest, resume || steps);
    }
    TILE_RELEASE();
}

/* ---- integer weights ----
 *
 * Many rows: the weights of a block of groups become signed bytes in scratch once (zero is then zero, and no start is needed), a step is
 * a group, and the float step of integers.h follows on what the register held. Sums of one batch are turned while the registers
 * make the next one. */

#define BATCH 2        /* groups; by two panels they are the four sums */
#define INT_GROUPS 16  /* of a panel in scratch at a time */
#define INT_AHEAD 2560 /* bytes of a panel that one register of rows asks ahead; multiples of 1024 are slower by a tenth */
#define FEW_ROWS 6     /* up to so many integers.h is faster */

typedef struct {
    uint8_t q[2][INT_GROUPS][QVL__GROUP * PANEL];
    float scale[2][INT_GROUPS][PANEL];
    int32_t sum[2][BATCH][2][REG_ROWS][PANEL]; /* two batches in turn */
} int_scratch;

/* Where the weights of P panels lie. */
typedef struct {
    const char *panel;
    size_t step; /* bytes from panel to panel */
    int all_groups, g0;
} int_panels;

/* n groups from g on of P panels to scratch: their integers to its beginning, their scales to the groups' own places, which the float
 * step of a batch reads after the next one has come. */
INLINE void int_signed(const bool q8, const int P, int_scratch *s, const int_panels *w, int g, int n) {
    const size_t body = INT_BODY(q8);
    for (int p = 0; p < P; p++) {
        const char *panel = w->panel + (size_t)p * w->step, *from = panel + QVL__INT_HEAD(w->all_groups) + (size_t)(w->g0 + g) * body;
        for (int i = 0; i < n; i++, from += body) {
            vstore(s->scale[p][g + i], vload_bf16((const uint16_t *)(const void *)panel + (size_t)(w->g0 + g + i) * PANEL));
#pragma GCC unroll 8
            for (int j = 0; j < QVL__GROUP / 4; j++) {
                uint8_t *to = s->q[p][i] + j * 4 * PANEL;
                if (q8) vint_store(to, vint_signed(vint_load(from + j * 4 * PANEL)));
                else {
                    vint x = vint_load(from + j % 4 * 4 * PANEL);
                    vint_store(to, vint_signed_half(j < 4 ? vint_low(x) : vint_high(x)));
                }
            }
        }
    }
}

/* The sums of groups g.. (n of them) by P panels, whose weights are in scratch from slot on, into registers 0..3. */
INLINE void int_products(const int P, const int n, const int_scratch *s, const int8_t *q, size_t stride, int g, int slot) {
    TILE_LOAD(4, q + (size_t)g * QVL__GROUP, stride);
    TILE_LOAD(6, s->q[0][slot], 64);
    TILE_ZERO(0);
    TILE_INT(0, 4, 6);
    if (P > 1) {
        TILE_LOAD(7, s->q[1][slot], 64);
        TILE_ZERO(1);
        TILE_INT(1, 4, 7);
    }
    if (n > 1) {
        TILE_LOAD(5, q + (size_t)(g + 1) * QVL__GROUP, stride);
        TILE_LOAD(6, s->q[0][slot + 1], 64);
        TILE_ZERO(2);
        TILE_INT(2, 5, 6);
        if (P > 1) {
            TILE_LOAD(7, s->q[1][slot + 1], 64);
            TILE_ZERO(3);
            TILE_INT(3, 5, 7);
        }
    }
}

/* They, to buffer. */
INLINE void int_store(const int P, const int n, int_scratch *s, int buffer) {
    TILE_STORE(0, s->sum[buffer][0][0], 64);
    if (P > 1) TILE_STORE(1, s->sum[buffer][0][1], 64);
    if (n > 1) TILE_STORE(2, s->sum[buffer][1][0], 64);
    if (n > 1 && P > 1) TILE_STORE(3, s->sum[buffer][1][1], 64);
}

/* What is asked for from memory meanwhile, a line for each row, because many at once would wait for one another: of each panel
 * lines from at on, step bytes from panel to panel. */
typedef struct {
    const char *at;
    size_t step;
    int lines;
} int_ahead;

/* Their float steps. by: the scales of the first row. */
INLINE void int_floats(const int P, const int n, const int_scratch *s, int buffer, float *c, size_t ldc, const char *by, size_t stride, int g, int rows, int_ahead ask) {
    vf scale[BATCH][2];
#pragma GCC unroll 2
    for (int i = 0; i < n; i++)
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) scale[i][p] = vload(s->scale[p][g + i]);
    for (int r = 0; r < rows; r++, by += stride, c += ldc) {
        vf sum[2];
        for (int p = 0; r < ask.lines && p < P; p++) TO_NEAR(ask.at + (size_t)p * ask.step + (size_t)r * 64);
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) sum[p] = vload(c + p * PANEL);
#pragma GCC unroll 2
        for (int i = 0; i < n; i++) {
            vf x = vset(((const float *)(const void *)by)[g + i]);
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) sum[p] = vfma(vint_load_float(s->sum[buffer][i][p][r]), vmul(scale[i][p], x), sum[p]);
        }
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) vstore(c + p * PANEL, sum[p]);
    }
}

/* One register of rows by groups of P panels. Weights are in scratch already, or (fresh) get there just before they are needed, so that
 * memory has no pause. next: the integers of the panels behind these, part of which are asked for. */
INLINE void int_rows(const bool q8, const int P, const bool fresh, int_scratch *s, float *c, size_t ldc, const qvl__ints *a, int row, int rows, const int_panels *w,
                     int groups, ahead next) {
    const size_t at = (size_t)row * a->stride, body = INT_BODY(q8);
    const size_t lines = BATCH * body / 64, from = lines * (size_t)next.part / (size_t)next.parts, to = lines * (size_t)(next.part + 1) / (size_t)next.parts;
    const int8_t *q = a->q + at;
    const char *by = (const char *)a->scale + at;
    int whole = groups / BATCH;
    int_ahead ask = {NULL, 0, 0};
    for (int i = 0; i <= whole; i++) {
        if (i < whole) {
            if (fresh) ask = (int_ahead){w->panel + QVL__INT_HEAD(w->all_groups) + (size_t)(w->g0 + i * BATCH) * body + INT_AHEAD, w->step, (int)lines};
            if (fresh) int_signed(q8, P, s, w, i * BATCH, BATCH);
            int_products(P, BATCH, s, q, a->stride, i * BATCH, fresh ? 0 : i * BATCH);
            for (size_t l = from; !fresh && next.at && l < to; l++)
                for (size_t p = 0; p < (size_t)P; p++) TO_L2(next.at + p * w->step + ((size_t)i * lines + l) * 64);
        }
        if (i > 0) int_floats(P, BATCH, s, (i - 1) % 2, c, ldc, by, a->stride, (i - 1) * BATCH, rows, ask);
        if (i < whole) int_store(P, BATCH, s, i % 2);
    }
    if (groups % BATCH) {
        if (fresh) int_signed(q8, P, s, w, groups - 1, 1);
        int_products(P, 1, s, q, a->stride, groups - 1, fresh ? 0 : groups - 1);
        int_store(P, 1, s, 0);
        int_floats(P, 1, s, 0, c, ldc, by, a->stride, groups - 1, rows, ask);
    }
}

/* All rows by P panels. */
INLINE void int_block(const bool q8, const int P, float *c, size_t ldc, const qvl__ints *a, int rows, int_panels w, int groups, bool more) {
    int_scratch s;
    const int registers = (rows + REG_ROWS - 1) / REG_ROWS, g0 = w.g0;
    const size_t body = INT_BODY(q8);
    for (int g = 0, n; g < groups; g += n) {
        n = groups - g < INT_GROUPS ? groups - g : INT_GROUPS;
        w.g0 = g0 + g;
        if (registers > 1) int_signed(q8, P, &s, &w, 0, n);
        ahead next = {more ? w.panel + P * w.step + QVL__INT_HEAD(w.all_groups) + (size_t)w.g0 * body : NULL, 0, registers};
        qvl__ints x = {a->q + (size_t)g * QVL__GROUP, a->scale + g, NULL, a->stride};
        for (int r = 0, some; r < rows; r += some, next.part++) {
            some = rows - r < REG_ROWS ? rows - r : REG_ROWS;
            if (some != REG_ROWS && r > 0) tiles_take(some, some, QVL__GROUP / 4);
            if (registers > 1) int_rows(q8, P, false, &s, c + (size_t)r * ldc, ldc, &x, r, some, &w, n, next);
            else int_rows(q8, P, true, &s, c, ldc, &x, 0, some, &w, n, next);
        }
        if (registers > 1 && rows % REG_ROWS) tiles_take(REG_ROWS, REG_ROWS, QVL__GROUP / 4);
    }
}

static void gemm_int_tiles(qvl__type type, float *c, size_t ldc, const qvl__ints *a, const void *panels, size_t panel_bytes, int rows,
                           int count, int all_groups, int g0, int groups, bool resume) {
    if (rows <= FEW_ROWS) {
        gemm_int(type, c, ldc, a, panels, panel_bytes, rows, count, all_groups, g0, groups, resume);
        return;
    }
    if (!resume)
        for (int r = 0; r < rows; r++) memset(c + (size_t)r * ldc, 0, (size_t)count * PANEL * sizeof(float));
    int first = rows < REG_ROWS ? rows : REG_ROWS;
    tiles_take(first, first, QVL__GROUP / 4);
    for (int p = 0; p < count; p += 2) {
        int_panels w = {(const char *)panels + (size_t)p * panel_bytes, panel_bytes, all_groups, g0};
        float *to = c + (size_t)p * PANEL;
        bool q8 = type == QVL__Q8, more = count - p >= 4;
        if (count - p == 1 && q8) int_block(true, 1, to, ldc, a, rows, w, groups, more);
        else if (count - p == 1) int_block(false, 1, to, ldc, a, rows, w, groups, more);
        else if (q8) int_block(true, 2, to, ldc, a, rows, w, groups, more);
        else int_block(false, 2, to, ldc, a, rows, w, groups, more);
    }
    TILE_RELEASE();
}

/* ---- attention ---- */

static void hold_tiles(int rows) {
    if (rows == 0) TILE_RELEASE();
    else tiles_take(rows < REG_ROWS ? rows : REG_ROWS, rows < REG_ROWS ? rows : REG_ROWS, 16);
}

INLINE void split_some(uint16_t *hi, size_t low, const float *x) {
    vf a = vload(x), b = vload(x + W);
    vstore_bf16(hi, a, b);
    vstore_bf16(hi + low, vsub(a, vload_bf16(hi)), vsub(b, vload_bf16(hi + W)));
}

static void split(uint16_t *hi, size_t low, const float *x, int n) {
    int i = 0;
    for (; i + 2 * W <= n; i += 2 * W) split_some(hi + i, low, x + i);
    if (i == n) return;
    float rest[2 * W] = {0};
    memcpy(rest, x + i, (size_t)(n - i) * sizeof(float));
    split_some(hi + i, low, rest);
}

/* next: lines of another block for each block, asked for by the first rows. */
static void scores(float *s, size_t lds, qvl__split q, const qvl__kv_list *keys, int rows, int dim) {
    const size_t panel = (size_t)dim * PANEL * 2;
    for (int i = 0; i < keys->n; i++) {
        tile_panels b = {.at = keys->at[i], .panel = panel, .low = keys->low};
        ahead next = {keys->next[i], 0, 1};
        int r = 0;
        for (; rows - r >= 2 * REG_ROWS; r += 2 * REG_ROWS, next.at = NULL) {
            qvl__split x = rows_from(&q, r);
            dot_tiles(2, 2, true, false, s + (size_t)r * lds + i * QVL__KV_BLOCK, lds, &x, &b, dim / 32, false, next);
        }
        if (r < rows) {
            qvl__split x = rows_from(&q, r);
            dot_tiles(1, 2, true, false, s + (size_t)r * lds + i * QVL__KV_BLOCK, lds, &x, &b, dim / 32, false, next);
        }
    }
}

/* Four panels for a single register of rows, whose next values are asked for as well. */
static void values(float *o, size_t ldo, qvl__split p, const qvl__kv_list *values, int rows, int dim) {
    const int panels = dim / PANEL;
    const bool few = rows <= REG_ROWS && !values->low;
    const ahead none = {NULL, 0, 1};
    for (int j = 0, np; j < panels; j += np) {
        tile_panels b = {.list = values->at, .from = (size_t)j * STEP_BYTES, .panel = STEP_BYTES, .low = values->low};
        np = few && panels - j >= 4 ? 4 : panels - j > 1 ? 2 : 1;
        for (int i = 0; np == 4 && i < values->n && values->next[i]; i++)
            for (size_t l = (size_t)j * STEP_BYTES; l < (size_t)(j + 4) * STEP_BYTES; l += 64) TO_L2(values->next[i] + l);
        int r = 0;
        for (; rows - r >= 2 * REG_ROWS; r += 2 * REG_ROWS) {
            qvl__split x = rows_from(&p, r);
            dot_panels(2, np, true, false, o + (size_t)r * ldo + j * PANEL, ldo, &x, &b, values->n, true, none);
        }
        qvl__split x = rows_from(&p, r);
        if (r < rows) dot_panels(1, np, true, false, o + (size_t)r * ldo + j * PANEL, ldo, &x, &b, values->n, true, none);
    }
}

static bool first_values(uint16_t *to, const uint16_t *from, int dim, int n) {
    const uint32_t *src = (const uint32_t *)(const void *)from;
    uint32_t *dst = (uint32_t *)(void *)to, bad = 0;
    for (int p = 0; p < dim / PANEL; p++)
        for (int pair = 0; pair < QVL__KV_BLOCK / 2; pair++, src += PANEL, dst += PANEL) {
            uint32_t mask = 2 * pair + 1 < n ? 0xffffffffu : 2 * pair < n ? 0xffffu : 0;
            for (int j = 0; j < PANEL; j++) {
                dst[j] = src[j] & mask;
                bad |= (dst[j] & 0x7f807f80u) + 0x00800080u; /* an exponent of ones overflows */
            }
        }
    return !(bad & 0x80008000u);
}

#endif
