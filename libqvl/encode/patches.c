/* patches.c - resized pixels to the rows that the vision tower multiplies.
 *
 * Job:        normalise 8-bit pixels and lay them out as patches.
 * Input:      one frame (an image) or two (a temporal pair of a video), [height][width][3], sides multiples of
 *             patch x merge; mean and std of the processor's config.
 * Output:     float[count][3 * 2 * patch * patch], in any slice, so that a large picture never exists as floats.
 * Invariants: the bits of transformers' Qwen2VLImageProcessor: rescaling by 1/255 is folded into mean and std, so a value is
 *             (u8 - 255 mean) / (255 std) in float, one rounding each.
 */
#include <string.h>

#include "encode.h"

/* The 256 values of each channel. */
static void make_table(float table[3][256], const qvl__processor *p) {
    for (int c = 0; c < 3; c++) {
        float mean = p->mean[c] * 255.0f, std = p->std[c] * 255.0f;
        for (int v = 0; v < 256; v++) table[c][v] = ((float)v - mean) / std;
    }
}

/* One patch of one frame: out[c * 2 * size * size + y * size + x] for its three channels. */
static void cut(float *out, const uint8_t *s, size_t row_bytes, int size, const float table[3][256]) {
    size_t plane = (size_t)size * (size_t)size * 2; /* both times */
    float *red = out, *green = out + plane, *blue = out + 2 * plane;
    for (int y = 0; y < size; y++, s += row_bytes) {
        const uint8_t *q = s;
        for (int x = 0; x < size; x++, q += 3) {
            *red++ = table[0][q[0]];
            *green++ = table[1][q[1]];
            *blue++ = table[2][q[2]];
        }
    }
}

void qvl__patches_cut(float *out, const uint8_t *a, const uint8_t *b, int height, int width, int first, int count,
                      const qvl__processor *p) {
    float table[3][256];
    make_table(table, p);
    int size = p->patch, merge = p->merge, blocks = width / (size * merge); /* merge x merge patches are one token */
    size_t row_bytes = (size_t)width * 3, area = (size_t)size * (size_t)size;
    (void)height;
    for (int i = first; i < first + count; i++, out += 6 * area) {
        int block = i / (merge * merge), inside = i % (merge * merge);
        size_t y = (size_t)(block / blocks * merge + inside / merge) * (size_t)size;
        size_t x = (size_t)(block % blocks * merge + inside % merge) * (size_t)size;
        size_t at = y * row_bytes + x * 3;
        cut(out, a + at, row_bytes, size, table);
        if (a != b) cut(out + area, b + at, row_bytes, size, table);
        else
            for (int c = 0; c < 3; c++) memcpy(out + (size_t)(2 * c + 1) * area, out + (size_t)(2 * c) * area, area * sizeof *out);
    }
}
