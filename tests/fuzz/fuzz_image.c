/* fuzz_image.c - any bytes as an image file: an image or an error. */
#include <stdlib.h>

#include "../../include/qvl.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static qvl_options *o;
    if (!o && (qvl_options_new(&o) < 0 || qvl_options_set_i64(o, "max_image_pixels", 4000000) < 0)) abort();
    qvl_image *im = NULL;
    int rc = qvl_image_from_bytes(&im, data, size, o);
    if ((rc == 0) != (im != NULL) || (rc < 0 && !*qvl_last_error())) abort();
    qvl_image_free(im);
    return 0;
}
