/* numbers.c - what the tensors of a checkpoint hold, as floats.
 *
 * Job:        BF16, F16, F32, and FP8 (E4M3) with a scale for each block of rows and columns, as the published FP8 checkpoints
 *             have it (config.json's quantization_config; transformers integrations/finegrained_fp8.py).
 * Input:      tensors in mapped files, at any address.
 * Output:     floats, or rows of F8 for devices that have it; the type in which a device takes a tensor.
 * Invariants: a number in FP8 is its E4M3 value times its scale, in float; the others are exact.
 */
#include <string.h>

#include "checkpoint.h"

int qvl__numbers_type(const qvl__tensor *t, qvl__type *out) {
    if (strcmp(t->dtype, "BF16") == 0) *out = QVL__BF16;
    else if (strcmp(t->dtype, "F16") == 0) *out = QVL__F16;
    else if (strcmp(t->dtype, "F32") == 0 || t->scale) *out = QVL__F32;
    else return qvl__fail(QVL_EUNSUPPORTED, "tensor %.120s: type %s is not supported; use a BF16, F16, F32 or FP8 checkpoint", t->name, t->dtype);
    return 0;
}

static float from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = h >> 10 & 31, man = h & 1023;
    if (exp == 0) return sign ? -(float)man * 0x1p-24f : (float)man * 0x1p-24f;
    return from_bits(sign | (exp == 31 ? 0x7F800000 : (exp + 112) << 23) | man << 13);
}

/* One sign, four exponent and three mantissa bits; no infinity, all ones is NaN (Micikevicius et al. 2022). */
static float e4m3_to_float(uint8_t b) {
    uint32_t sign = (uint32_t)(b & 0x80) << 24, exp = b >> 3 & 15, man = b & 7;
    if ((b & 0x7F) == 0x7F) return from_bits(sign | 0x7FC00000);
    if (exp == 0) return sign ? -(float)man * 0x1p-9f : (float)man * 0x1p-9f;
    return from_bits(sign | (exp + 120) << 23 | man << 20);
}

/* Of a type that numbers_type takes as it is: the letters that tell F32, BF16 and F16 apart. */
static void widen(float *out, const qvl__tensor *t, size_t first, size_t n) {
    if (t->dtype[0] == 'F' && t->dtype[1] == '3') memcpy(out, t->data + first * sizeof(float), n * sizeof(float));
    else for (size_t i = 0; i < n; i++) {
        uint16_t u;
        memcpy(&u, t->data + 2 * (first + i), 2);
        out[i] = t->dtype[0] == 'B' ? from_bits((uint32_t)u << 16) : half_to_float(u);
    }
}

/* Scale number i of an FP8 tensor, as the bits of a float. */
static uint32_t scale_bits(const qvl__tensor *t, size_t i) {
    float scale;
    uint32_t bits;
    widen(&scale, t->scale, i, 1);
    memcpy(&bits, &scale, 4);
    return bits;
}

bool qvl__numbers_keep_fp8(const qvl__tensor *t) {
    if (!t->scale || t->block[1] % QVL__GROUP) return false;
    for (size_t i = 0; i < (size_t)(t->scale->shape[0] * t->scale->shape[1]); i++)
        if (scale_bits(t, i) & 0xFFFF) return false;
    return true;
}

void qvl__numbers_fp8(uint8_t *out, const qvl__tensor *t, size_t first, size_t rows, size_t k) {
    size_t high = (size_t)t->block[0], wide = (size_t)t->block[1], across = (k + wide - 1) / wide;
    for (size_t r = 0; r < rows; r++, out += qvl__row_bytes(QVL__F8, k)) {
        memcpy(out, t->data + (first + r) * k, k);
        for (size_t g = 0; g * QVL__GROUP < k; g++) {
            uint16_t half = (uint16_t)(scale_bits(t, (first + r) / high * across + g * QVL__GROUP / wide) >> 16);
            memcpy(out + (k + 1) / 2 * 2 + 2 * g, &half, 2);
        }
    }
}

void qvl__numbers(float *out, const qvl__tensor *t, size_t first, size_t rows, size_t k) {
    if (!t->scale) {
        widen(out, t, first * k, rows * k);
        return;
    }
    float value[256];
    for (int b = 0; b < 256; b++) value[b] = e4m3_to_float((uint8_t)b);
    size_t high = (size_t)t->block[0], wide = (size_t)t->block[1], across = (k + wide - 1) / wide;
    for (size_t r = 0; r < rows; r++, out += k) {
        const uint8_t *from = t->data + (first + r) * k;
        for (size_t b = 0; b < across; b++) {
            float scale;
            widen(&scale, t->scale, (first + r) / high * across + b, 1);
            for (size_t i = b * wide; i < k && i < (b + 1) * wide; i++) out[i] = value[from[i]] * scale;
        }
    }
}
