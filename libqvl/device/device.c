/* device.c - what all devices share: the names of types.
 *
 * Job:        types to text and back.
 * Input:      option values.
 * Output:     qvl__type; names.
 * Invariants: the names are those of the options dtype and kv_dtype.
 */
#include <string.h>

#include "device.h"

static const char *const names[] = {[QVL__F32] = "f32", [QVL__BF16] = "bf16", [QVL__F16] = "f16", [QVL__I8] = "int8", [QVL__Q8] = "int8", [QVL__Q4] = "int4"};

const char *qvl__type_name(qvl__type t) { return names[t]; }

bool qvl__kv_type_of(const char *name, qvl__type *out) {
    for (size_t i = 0; i <= QVL__I8; i++)
        if (strcmp(name, names[i]) == 0) {
            *out = (qvl__type)i;
            return true;
        }
    return false;
}
