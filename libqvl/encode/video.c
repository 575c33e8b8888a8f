/* video.c - which frames of a video are looked at, and what time they are given.
 *
 * Job:        the published video processor's choice of frames and the text of their timestamps.
 * Input:      number of frames, frames a second of the video, the processor's settings.
 * Output:     indices; "<1.2 seconds>".
 * Invariants: equal to transformers' Qwen3VLVideoProcessor.sample_frames (numpy.linspace, round half to even) and to the
 *             processor's "<{:.1f} seconds>", whatever the program's locale.
 */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "encode.h"

int qvl__sample_frames(size_t total, double fps, double target_fps, int min_frames, int max_frames, int32_t **index, size_t *n) {
    *index = NULL;
    *n = 0;
    if (total == 0 || total > INT32_MAX) return qvl__fail(QVL_EINVAL, "video of %zu frames: it must have 1 to %d", total, INT32_MAX);
    if (!(fps > 0) || !isfinite(fps)) return qvl__fail(QVL_EINVAL, "video of %g frames a second: fps must be above 0", fps);
    if (!(target_fps > 0) || !isfinite(target_fps) || min_frames < 1 || max_frames < min_frames)
        return qvl__fail(QVL_EINVAL, "video processor: fps %g, min_frames %d, max_frames %d", target_fps, min_frames, max_frames);
    double frames = trunc((double)total / fps * target_fps);
    frames = fmin(fmin(fmax(frames, min_frames), max_frames), (double)total);
    size_t count = (size_t)frames;
    int32_t *ix = qvl__array(NULL, count, sizeof *ix);
    if (!ix) return QVL_ENOMEM;
    /* numpy.linspace(0, total - 1, count): i * step, and the exact end. */
    double step = count > 1 ? (double)(total - 1) / (double)(count - 1) : 0;
    for (size_t i = 0; i < count; i++) ix[i] = (int32_t)rint((double)i * step);
    if (count > 1) ix[count - 1] = (int32_t)(total - 1);
    *index = ix;
    *n = count;
    return 0;
}

void qvl__timestamp(char out[48], int32_t a, int32_t b, double fps) {
    /* printf rounds the exact double as Python does, but writes the locale's decimal separator: keep the digits only. */
    char text[352];
    /* The mean of the pair in one rounding, as in the golden tables. (transformers 5.23 adds two rounded times: where
     * the mean ends in exactly 5 hundredths, its last digit can be one off from this.) */
    int n = snprintf(text, sizeof text, "%.1f", ((double)a + (double)b) / 2 / fps);
    size_t whole = strspn(text, "-0123456789");
    if (n > 0 && n < (int)sizeof text && whole > 0 && text[whole])
        snprintf(out, 48, "<%.*s.%c seconds>", whole < 32 ? (int)whole : 32, text, text[n - 1]);
    else snprintf(out, 48, "<%.32s seconds>", text); /* not finite */
}
