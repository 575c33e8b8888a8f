/* device.c - what all devices share: the names of types, and which device a model gets.
 *
 * Job:        types to text and back; opening by name, from a plug-in where it is not the CPU.
 * Input:      option values; the environment variable QVL_CUDA_PLUGIN.
 * Output:     qvl__type; names; a qvl__device.
 * Invariants: the names are those of the options dtype and kv_dtype; libqvl links to no GPU library: libqvl-cuda.so is
 *             looked for beside the program or library that this code is part of, then where the system looks;
 *             "auto" never fails for want of a GPU, unless several are asked for; "cuda" never falls back.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plugin.h"

static const char *const names[] = {[QVL__F32] = "f32", [QVL__BF16] = "bf16", [QVL__F16] = "f16", [QVL__I8] = "int8", [QVL__Q8] = "int8", [QVL__Q4] = "int4", [QVL__F8] = "fp8"};

const char *qvl__type_name(qvl__type t) { return names[t]; }

bool qvl__kv_type_of(const char *name, qvl__type *out) {
    static const qvl__type types[] = {QVL__F32, QVL__BF16, QVL__F16, QVL__I8, QVL__F8};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(name, names[types[i]]) == 0) {
            *out = types[i];
            return true;
        }
    return false;
}

/* ---- the plug-in ---- */

#define FILE_NAME "libqvl-cuda.so"

/* The shared object's handle, NULL with a message. */
static void *load(void) {
    const char *asked = getenv("QVL_CUDA_PLUGIN");
    if (asked && *asked) {
        void *so = dlopen(asked, RTLD_NOW | RTLD_LOCAL);
        if (!so) qvl__fail(QVL_ENODEV, "QVL_CUDA_PLUGIN: %s", dlerror());
        return so;
    }
    /* The plug-in brings large libraries with it, for which a machine without a driver has no use. */
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (!driver) {
        qvl__fail(QVL_ENODEV, "no NVIDIA driver is installed (%s)", dlerror());
        return NULL;
    }
    dlclose(driver);
    char beside[4096];
    Dl_info here;
    const char *end = dladdr((void *)(uintptr_t)names, &here) && here.dli_fname ? strrchr(here.dli_fname, '/') : NULL;
    void *so = NULL;
    if (end && snprintf(beside, sizeof beside, "%.*s/" FILE_NAME, (int)(end - here.dli_fname), here.dli_fname) < (int)sizeof beside) so = dlopen(beside, RTLD_NOW | RTLD_LOCAL);
    if (!so) so = dlopen(FILE_NAME, RTLD_NOW | RTLD_LOCAL);
    if (!so) qvl__fail(QVL_ENODEV, "%s (the CUDA plug-in is made by \"make cuda\"; QVL_CUDA_PLUGIN may name it)", dlerror());
    return so;
}

/* It stays loaded once it has been: a GPU runtime does not survive being unloaded. */
static const qvl__plugin *plugin(void) {
    void *so = load();
    if (!so) return NULL;
    const qvl__plugin *p = dlsym(so, QVL__PLUGIN_SYMBOL);
    if (!p) qvl__fail(QVL_ENODEV, FILE_NAME " is no plug-in of libqvl: it has no symbol " QVL__PLUGIN_SYMBOL);
    else if (strcmp(p->version, QVL__PLUGIN_VERSION) != 0 || p->device_size != sizeof(qvl__device)) {
        qvl__fail(QVL_ENODEV, FILE_NAME " was built for another libqvl (%s, %zu bytes; this one: %s, %zu): build both from the same source", p->version, p->device_size,
                  QVL__PLUGIN_VERSION, sizeof(qvl__device));
        p = NULL;
    }
    if (!p) dlclose(so);
    return p;
}

static int open_cuda(qvl__device **out, qvl__pool *pool, const qvl__device_options *o) {
    static const qvl__host host = {qvl__fail, qvl__log, qvl__calloc, qvl__free};
    const qvl__plugin *p = plugin();
    if (!p) return QVL_ENODEV;
    qvl__device *cpu;
    int rc = qvl__cpu_open(&cpu, pool, false);
    if (rc) return rc;
    if ((rc = p->open(out, cpu, o, &host)) < 0) cpu->close(cpu);
    return rc;
}

int qvl__device_open(qvl__device **out, qvl__pool *pool, const char *name, const qvl__device_options *o) {
    *out = NULL;
    if (strcmp(name, "cpu") != 0) {
        int rc = open_cuda(out, pool, o);
        if (rc == 0) return 0;
        if (strcmp(name, "cuda") == 0) return qvl__context(rc, "option device: cuda");
        if (rc != QVL_ENODEV || o->gpus > 1) return qvl__context(rc, "option tensor_parallel_size: %d GPUs", o->gpus);
        qvl__log(QVL_LOG_INFO, "no GPU is used: %s", qvl_last_error());
    }
    if (o->gpus > 1) return qvl__fail(QVL_EINVAL, "option tensor_parallel_size is %d: only GPUs can share a model, and option device is cpu", o->gpus);
    return qvl__cpu_open(out, pool, o->bf16_math);
}
