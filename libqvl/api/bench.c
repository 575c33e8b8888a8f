/* bench.c - the kernels alone against the limits of the machine (public function).
 *
 * Job:        open the CPU as loading a model would and have it time its kernels.
 * Input:      options dtype, threads, progress.
 * Output:     a JSON object.
 * Invariants: no model is needed.
 */
#include <string.h>

#include "../device/device.h"

int qvl_bench_kernels(const qvl_options *o, char **json) {
    if (!json) return qvl__fail(QVL_EINVAL, "qvl_bench_kernels: json is NULL");
    *json = NULL;
    qvl_progress_fn progress;
    void *ud;
    qvl__opt_progress(o, &progress, &ud);
    qvl__pool *pool = NULL;
    qvl__device *d = NULL;
    qvl__buf b = {0};
    int rc = qvl__pool_new(&pool, (int)qvl__opt_i64(o, "threads"));
    if (rc == 0) rc = qvl__cpu_open(&d, pool, strcmp(qvl__opt_str(o, "dtype"), "f32") != 0);
    if (rc == 0) rc = qvl__cpu_bench(d, &b, progress, ud);
    if (rc == 0) *json = b.data;
    else qvl__buf_free(&b);
    if (d) d->close(d);
    qvl__pool_free(pool);
    return rc;
}
