/* kernels.c - qvl bench --kernels: each kernel against what the machine can do.
 *
 * Job:        call qvl_bench_kernels and show its lines.
 * Input:      options dtype and threads.
 * Output:     a table, or the library's JSON object.
 * Invariants: no model is loaded.
 */
#include "bench.h"

static double number(const json_t *object, const char *key) { return json_number_value(json_object_get(object, key)); }
static const char *text(const json_t *object, const char *key) { return json_string_value(json_object_get(object, key)); }

static void print_table(const json_t *all) {
    const json_t *limits = json_object_get(all, "limits"), *k;
    printf("%s %s, threads %d: reads %.1f GB/s; computes f32 %.0f, bf16 %.0f, int8 %.0f, int4 %.0f GOP/s\n", text(all, "device"), text(all, "isa"),
           (int)number(all, "threads"), number(limits, "read_gb_s"), number(limits, "f32_gop_s"), number(limits, "bf16_gop_s"), number(limits, "int8_gop_s"),
           number(limits, "int4_gop_s"));
    printf("%-16s %-5s %6s %10s %8s %8s %6s  limit\n", "kernel", "type", "rows", "ms", "GB/s", "GOP/s", "%");
    size_t i;
    json_array_foreach(json_object_get(all, "kernels"), i, k)
        printf("%-16s %-5s %6d %10.3f %8.1f %8.1f %6.0f  %s\n", text(k, "kernel"), text(k, "type"), (int)number(k, "rows"), number(k, "ms"), number(k, "gb_s"),
               number(k, "gop_s"), number(k, "percent"), text(k, "bound"));
}

int bench_kernels(const tool_args *a) {
    static const char *const others[] = {"prefill", "decode", "depth", "streams", "image", "load", "repeat"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (tool_get(a, others[i])) return tool_usage(a->command, "--kernels measures no model: --%s does not go with it", others[i]);
    tool_progress bar = {.label = "measuring", .start = tool_now_ms()};
    qvl_options_set_progress(a->options, tool_progress_step, &bar);
    char *json = NULL;
    int rc = qvl_bench_kernels(a->options, &json);
    qvl_options_set_progress(a->options, NULL, NULL);
    tool_progress_clear(&bar);
    if (rc < 0) return tool_library_error(NULL);
    json_t *all = json_loads(json, 0, NULL);
    qvl_free(json);
    if (!all) return tool_fail("the report is not JSON");
    if (tool_get(a, "json")) return tool_print_json(all);
    print_table(all);
    json_decref(all);
    return TOOL_OK;
}
