/* rope.c - rotary angles of text and vision, and the interpolated position embedding.
 *
 * Job:        turn positions into cos/sin tables and table rows with weights.
 * Input:      M-RoPE positions; patch grids.
 * Output:     plain float arrays on the host.
 * Invariants: angles are products of two floats, as transformers computes them, so that long contexts agree with it;
 *             cos and sin are taken in double and rounded once.
 * Source:     transformers modeling_qwen3_vl: Qwen3VLTextRotaryEmbedding, Qwen3VLVisionRotaryEmbedding,
 *             fast_pos_embed_interpolate.
 */
#include <math.h>

#include "forward.h"

/* How much of frequency i is slowed down: 0 for those that turn often within the trained length, 1 for those that turn
 * seldom, a ramp between (YaRN, Peng et al. 2023, section 3.2; transformers _compute_yarn_parameters). */
static float yarn_ramp(const qvl__text_config *t, int i) {
    double turns[] = {t->yarn.beta_fast, t->yarn.beta_slow}, at[2];
    for (int k = 0; k < 2; k++)
        at[k] = t->head_dim * log(t->yarn.original / (turns[k] * 2 * 3.14159265358979323846)) / (2 * log(t->rope_theta));
    double low = t->yarn.truncate ? floor(at[0]) : at[0], high = t->yarn.truncate ? ceil(at[1]) : at[1];
    if (low < 0) low = 0;
    if (high > t->head_dim - 1) high = t->head_dim - 1;
    if (low == high) high += 0.001;
    float r = ((float)i - (float)low) / (float)(high - low);
    return r < 0 ? 0 : r > 1 ? 1 : r;
}

int qvl__rope_init(qvl_model *m) {
    const qvl__text_config *t = &m->config.text;
    int half = t->head_dim / 2;
    m->text_rope_scale = (float)t->yarn.attention;
    m->text_inv_freq = qvl__array(NULL, (size_t)half, sizeof(float));
    m->text_axis = qvl__calloc((size_t)half, 1);
    if (!m->text_inv_freq || !m->text_axis) return QVL_ENOMEM;
    for (int i = 0; i < half; i++) {
        float period = powf((float)t->rope_theta, (float)(2 * i) / (float)t->head_dim);
        m->text_inv_freq[i] = 1.0f / period;
        if (t->yarn.factor != 1) {
            float kept = 1.0f - yarn_ramp(t, i);
            m->text_inv_freq[i] = 1.0f / ((float)t->yarn.factor * period) * (1.0f - kept) + 1.0f / period * kept;
        }
        /* interleaved sections: T H W T H W ..., what is left over follows time */
        int axis = i % 3;
        m->text_axis[i] = (uint8_t)(axis && i < 3 * t->mrope_section[axis] ? axis : 0);
    }
    return 0;
}

void qvl__rope_text(const qvl_model *m, float *cos_out, float *sin_out, const int32_t *positions, int stride, int rows) {
    int half = m->config.text.head_dim / 2;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < half; i++) {
            float angle = (float)positions[m->text_axis[i] * stride + r] * m->text_inv_freq[i];
            cos_out[r * half + i] = (float)cos((double)angle) * m->text_rope_scale;
            sin_out[r * half + i] = (float)sin((double)angle) * m->text_rope_scale;
        }
}

/* Row and column of patch number n of a grid w patches wide, in the order of 2x2 blocks. */
static void place(int n, int w, int *row, int *col) {
    int block = n / 4, in = n % 4, per_row = w / 2;
    *row = block / per_row * 2 + in / 2;
    *col = block % per_row * 2 + in % 2;
}

void qvl__rope_vision(float *cos_out, float *sin_out, int first, int n, int w, int head_dim) {
    int half = head_dim / 2, quarter = head_dim / 4;
    for (int i = 0; i < half; i++) {
        float inv = 1.0f / powf(10000.0f, (float)(2 * (i % quarter)) / (float)half);
        for (int k = 0; k < n; k++) {
            int at[2];
            place(first + k, w, &at[0], &at[1]);
            float angle = (float)at[i / quarter] * inv;
            cos_out[k * half + i] = (float)cos((double)angle);
            sin_out[k * half + i] = (float)sin((double)angle);
        }
    }
}

/* The two neighbours of grid line i of n in a table of side lines, and how far it is from the first. */
static float neighbours(int i, int n, int side, int *low, int *high) {
    float f = (float)(i * (side - 1)) / (float)(n > 1 ? n - 1 : 1);
    *low = (int)f;
    *high = *low + 1 < side ? *low + 1 : side - 1;
    return f - (float)*low;
}

void qvl__pos_embed(int32_t *index, float *weight, int first, int n, int h, int w, int side) {
    for (int k = 0; k < n; k++) {
        int row, col, y0, y1, x0, x1;
        place(first + k, w, &row, &col);
        float dy = neighbours(row, h, side, &y0, &y1), dx = neighbours(col, w, side, &x0, &x1);
        int32_t *i = index + 4 * k;
        float *c = weight + 4 * k;
        i[0] = y0 * side + x0, c[0] = (1 - dy) * (1 - dx);
        i[1] = y0 * side + x1, c[1] = (1 - dy) * dx;
        i[2] = y1 * side + x0, c[2] = dy * (1 - dx);
        i[3] = y1 * side + x1, c[3] = dy * dx;
    }
}
