/* fuzz_safetensors.c - any bytes as a weights file: a list of tensors inside the file, or an error. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "../../libqvl/checkpoint/checkpoint.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char dir[] = "/tmp/qvl-fuzz-XXXXXX", path[64];
    if (!path[0]) {
        if (!mkdtemp(dir)) abort();
        snprintf(path, sizeof path, "%s/model.safetensors", dir);
    }
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f) != 0) abort();
    qvl__safetensors s;
    int rc = qvl__safetensors_open(&s, dir);
    if (rc < 0 && !*qvl_last_error()) abort();
    volatile uint8_t sum = 0;
    for (size_t i = 0; rc == 0 && i < s.n; i++) /* every byte that a tensor claims must be there */
        for (uint64_t k = 0; k < s.tensors[i].bytes; k += 61) sum ^= s.tensors[i].data[k];
    if (rc == 0) qvl__safetensors_close(&s);
    unlink(path);
    return 0;
}
