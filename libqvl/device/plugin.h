/* plugin.h - what libqvl and a device in a shared object of its own agree on.
 *
 * Job:        open a device without linking to it: libqvl has no CUDA dependency.
 * Input:      the symbol QVL__PLUGIN_SYMBOL of the shared object, a qvl__plugin.
 * Output:     a qvl__device.
 * Invariants: both sides were built from the same device.h (version and size of the op table are compared);
 *             a plug-in reports, logs and allocates through the host's functions, so messages and memory hooks work.
 */
#ifndef QVL__PLUGIN_H
#define QVL__PLUGIN_H

#include "device.h"

#define QVL__PLUGIN_SYMBOL "qvl_device_plugin"
/* Changes with device.h and with this file. */
#define QVL__PLUGIN_VERSION "qvl-device-3"

typedef struct {
    int (*fail)(int code, const char *fmt, ...) QVL__PRINTF(2, 3);
    void (*log)(int level, const char *fmt, ...) QVL__PRINTF(2, 3);
    void *(*calloc)(size_t count, size_t size);
    void (*free)(void *p);
} qvl__host;

typedef struct {
    const char *version;
    size_t device_size; /* sizeof(qvl__device) */
    /* cpu rounds weights to integers, as it does for itself; it belongs to the device once that is open.
     * QVL_ENODEV: no usable GPU, the message says why. */
    int (*open)(qvl__device **out, qvl__device *cpu, const qvl__device_options *o, const qvl__host *host);
} qvl__plugin;

#endif
