/* unicode.c - UTF-8 taken apart and NFC over utf8proc's tables.
 *
 * Job:        see unicode.h. NFC is decompose, order, compose (Unicode 15, UAX 15): utf8proc decomposes single code
 *             points and composes; putting combining marks in order is done here, because utf8proc sorts by swapping
 *             neighbours, which takes minutes for a megabyte of marks in the wrong order.
 * Input:      untrusted bytes of any length.
 * Output:     code points; valid UTF-8 in a qvl__buf.
 * Invariants: linear time (marks: n log n within one run); memory through base/mem.c only.
 */
#include <string.h>
#include <utf8proc.h>

#include "unicode.h"

size_t qvl__utf8_next(const uint8_t *s, size_t n, uint32_t *cp) {
    if (n == 0) return 0;
    uint32_t c = s[0];
    if (c < 0x80) {
        *cp = c;
        return 1;
    }
    /* Table 3-7 of the standard: only the second byte has bounds other than 80..BF. */
    size_t need;
    uint8_t low = 0x80, high = 0xBF;
    if (c >= 0xC2 && c <= 0xDF) need = 2;
    else if (c >= 0xE0 && c <= 0xEF) {
        need = 3;
        if (c == 0xE0) low = 0xA0;  /* no overlong form */
        if (c == 0xED) high = 0x9F; /* no surrogate */
    } else if (c >= 0xF0 && c <= 0xF4) {
        need = 4;
        if (c == 0xF0) low = 0x90;
        if (c == 0xF4) high = 0x8F; /* nothing above U+10FFFF */
    } else {
        *cp = QVL__UTF8_BROKEN;
        return 1;
    }
    c &= 0xFFu >> (need + 1);
    for (size_t i = 1; i < need; i++) {
        if (i == n) return 0;
        if (s[i] < low || s[i] > high) {
            *cp = QVL__UTF8_BROKEN;
            return i;
        }
        c = c << 6 | (s[i] & 0x3F);
        low = 0x80;
        high = 0xBF;
    }
    *cp = c;
    return need;
}

/* Length of the ASCII at the head of s, eight bytes at a time. */
static size_t ascii_run(const uint8_t *s, size_t n) {
    size_t i = 0;
    for (uint64_t w; i + 8 <= n; i += 8) {
        memcpy(&w, s + i, 8);
        if (w & 0x8080808080808080u) break;
    }
    while (i < n && s[i] < 0x80) i++;
    return i;
}

size_t qvl__utf8_valid(const uint8_t *s, size_t n) {
    size_t i = 0;
    while ((i += ascii_run(s + i, n - i)) < n) {
        uint32_t cp;
        size_t k = qvl__utf8_next(s + i, n - i, &cp);
        if (k == 0 || cp == QVL__UTF8_BROKEN) break;
        i += k;
    }
    return i;
}

/* Ranges of code points that NFC leaves alone whatever stands beside them inside these ranges: combining class 0, not
 * decomposed, never the second half of a composition. Found over the whole of Unicode 15; tests/unit/test_tokenize.c
 * holds them against utf8proc. Text made of these alone (most of it) skips normalization. */
static const struct {
    uint32_t first, last;
} inert[] = {
    {0x0000, 0x02FF}, /* Latin with its composed letters, IPA */
    {0x0388, 0x0482}, /* Greek, Cyrillic */
    {0x2002, 0x20CF}, /* punctuation, currency */
    {0x2E00, 0x3029}, /* radicals, CJK punctuation */
    {0x3030, 0x3098}, /* Hiragana */
    {0x309B, 0xA66E}, /* Katakana, ideographs */
    {0xABEE, 0xF8FF}, /* Hangul syllables */
    {0xFE30, 0xFFFF}, /* full and half width forms */
    {0x1F000, 0x1FAFF} /* emoji */
};

static bool is_inert(uint32_t cp) {
    for (size_t i = 0; i < sizeof inert / sizeof *inert && cp >= inert[i].first; i++)
        if (cp <= inert[i].last) return true;
    return false;
}

/* Orders the marks of one run by combining class, equal ones as they came: merge sort, tmp has room for n. */
static void order_marks(int32_t *cp, int32_t *tmp, size_t n) {
    if (n < 2) return;
    if (n <= 16) {
        for (size_t i = 1; i < n; i++) {
            int32_t c = cp[i];
            int ccc = utf8proc_get_property(c)->combining_class;
            size_t j = i;
            for (; j > 0 && utf8proc_get_property(cp[j - 1])->combining_class > ccc; j--) cp[j] = cp[j - 1];
            cp[j] = c;
        }
        return;
    }
    size_t half = n / 2, a = 0, b = half, k = 0;
    order_marks(cp, tmp, half);
    order_marks(cp + half, tmp, n - half);
    while (a < half && b < n) {
        bool left = utf8proc_get_property(cp[a])->combining_class <= utf8proc_get_property(cp[b])->combining_class;
        tmp[k++] = left ? cp[a++] : cp[b++];
    }
    while (a < half) tmp[k++] = cp[a++];
    memcpy(cp, tmp, k * sizeof *cp); /* what is left of the right half already stands where it belongs */
}

/* Appends NFC(text) to out; text is valid UTF-8. */
static void normalize(qvl__buf *out, const uint8_t *text, size_t n) {
    /* The densest ones: U+01D5 makes three code points of two bytes, U+1F82 four of three; two per byte is enough. */
    enum { PER_BYTE = 2 };
    int32_t *cp = qvl__array(NULL, n, PER_BYTE * sizeof *cp), *tmp = NULL;
    if (!cp) {
        out->failed = true;
        return;
    }
    size_t count = 0, room = n * PER_BYTE, longest = 0, run = 0;
    for (size_t i = 0; i < n;) {
        uint32_t c = 0;
        i += qvl__utf8_next(text + i, n - i, &c);
        utf8proc_ssize_t k = utf8proc_decompose_char((int32_t)c, cp + count, (utf8proc_ssize_t)(room - count),
                                                     UTF8PROC_STABLE | UTF8PROC_COMPOSE, NULL);
        if (k < 1 || (size_t)k > room - count) { /* tables of a later Unicode that break the bound above */
            cp[count] = (int32_t)c;
            k = 1;
        }
        count += (size_t)k;
    }
    for (size_t i = 0; i < count; i++) {
        run = utf8proc_get_property(cp[i])->combining_class ? run + 1 : 0;
        if (run > longest) longest = run;
    }
    if (longest > 1) {
        tmp = qvl__array(NULL, longest, sizeof *tmp);
        if (!tmp) {
            out->failed = true;
            qvl__free(cp);
            return;
        }
        for (size_t i = 0; i < count; i++) {
            size_t from = i;
            while (i < count && utf8proc_get_property(cp[i])->combining_class) i++;
            order_marks(cp + from, tmp, i - from);
        }
    }
    utf8proc_ssize_t left = utf8proc_normalize_utf32(cp, (utf8proc_ssize_t)count, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    uint8_t block[256];
    size_t used = 0;
    for (utf8proc_ssize_t i = 0; i < left; i++) {
        used += (size_t)utf8proc_encode_char(cp[i], block + used);
        if (used > sizeof block - 4 || i + 1 == left) {
            qvl__buf_add(out, block, used);
            used = 0;
        }
    }
    qvl__free(tmp);
    qvl__free(cp);
}

void qvl__utf8_clean(qvl__buf *out, const char *text, size_t n, bool nfc) {
    const uint8_t *s = (const uint8_t *)text;
    size_t start = out->len, i = 0, from = 0;
    bool all_inert = true;
    while ((i += ascii_run(s + i, n - i)) < n) {
        uint32_t cp;
        size_t k = qvl__utf8_next(s + i, n - i, &cp);
        if (k && cp != QVL__UTF8_BROKEN) {
            all_inert = all_inert && is_inert(cp);
            i += k;
            continue;
        }
        qvl__buf_add(out, text + from, i - from);
        qvl__buf_puts(out, QVL__UTF8_REPLACEMENT);
        i = from = k ? i + k : n; /* a character cut off by the end is one subpart */
    }
    if (nfc && !all_inert) {
        if (start == out->len && from == 0) { /* nothing was broken: no need for a copy */
            normalize(out, s, n);
            return;
        }
        qvl__buf whole = {0};
        qvl__buf_add(out, text + from, n - from);
        if (out->failed) return;
        normalize(&whole, (const uint8_t *)out->data + start, out->len - start);
        out->len = start;
        if (whole.failed) out->failed = true;
        else qvl__buf_add(out, whole.data, whole.len);
        qvl__buf_free(&whole);
        return;
    }
    qvl__buf_add(out, text + from, n - from);
}
