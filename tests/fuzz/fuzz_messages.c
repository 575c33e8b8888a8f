/* fuzz_messages.c - any text as messages: a prompt or an error, and no control token out of what was sent. */
#include <stdlib.h>
#include <string.h>

#include "../../include/qvl.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static qvl_model *m;
    if (!m && qvl_model_load(&m, "tests/golden/checkpoints/tiny-dense-untied", NULL) < 0) abort();
    char *text = malloc(size + 1);
    if (!text) abort();
    memcpy(text, data, size);
    text[size] = 0;
    qvl_prompt *p = NULL;
    int rc = qvl_prompt_new(&p, m, text, NULL, NULL, NULL);
    if ((rc == 0) != (p != NULL) || (rc < 0 && !*qvl_last_error())) abort();
    if (p) {
        const int32_t *ids;
        size_t n;
        if (qvl_prompt_tokens(p, &ids, &n) < 0 || n == 0) abort();
        for (size_t i = 0; i < n; i++)
            if (ids[i] < 0 || ids[i] >= 4096) abort();
    }
    qvl_prompt_free(p);
    free(text);
    return 0;
}
