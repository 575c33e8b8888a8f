/* link.c - the ABI as it was promised: every public function with its exact type, every constant with its value.
 *
 * Job:        fail to compile or to link when a signature, a constant or a symbol changed.
 * Input:      qvl.h and libqvl.so.
 * Output:     "73 functions", exit code 0.
 * Invariants: lines are added when a function is; a changed line is a broken ABI and needs a new SOVERSION;
 *             check.sh holds this list, exported.txt, qvl.h and the library's symbols to be the same.
 */
#include <qvl.h>
#include <stdio.h>
#include <string.h>

#define FUNCTIONS(X) \
    X(const char *, qvl_version, (void)) \
    X(const char *, qvl_last_error, (void)) \
    X(const char *, qvl_error_name, (int)) \
    X(void, qvl_free, (void *)) \
    X(int, qvl_set_allocator, (const qvl_allocator *)) \
    X(void, qvl_set_log, (qvl_log_fn, void *)) \
    X(int, qvl_options_new, (qvl_options **)) \
    X(void, qvl_options_free, (qvl_options *)) \
    X(int, qvl_options_set, (qvl_options *, const char *, const char *)) \
    X(int, qvl_options_set_i64, (qvl_options *, const char *, int64_t)) \
    X(int, qvl_options_set_f64, (qvl_options *, const char *, double)) \
    X(int, qvl_options_set_progress, (qvl_options *, qvl_progress_fn, void *)) \
    X(int, qvl_option_info, (int, const char **, const char **, const char **, const char **, const char **, const char **)) \
    X(int, qvl_model_load, (qvl_model **, const char *, const qvl_options *)) \
    X(void, qvl_model_free, (qvl_model *)) \
    X(int, qvl_model_info, (const qvl_model *, char **)) \
    X(int, qvl_quantize, (const char *, const char *, const qvl_options *, char **)) \
    X(int, qvl_bench_kernels, (const qvl_options *, char **)) \
    X(const qvl_tokenizer *, qvl_model_tokenizer, (const qvl_model *)) \
    X(int, qvl_tokenizer_load, (qvl_tokenizer **, const char *)) \
    X(void, qvl_tokenizer_free, (qvl_tokenizer *)) \
    X(int, qvl_tokenize, (const qvl_tokenizer *, const char *, size_t, int, int32_t **, size_t *)) \
    X(int, qvl_detokenize, (const qvl_tokenizer *, const int32_t *, size_t, int, char **, size_t *)) \
    X(int, qvl_image_from_bytes, (qvl_image **, const void *, size_t, const qvl_options *)) \
    X(int, qvl_image_from_data_uri, (qvl_image **, const char *, size_t, const qvl_options *)) \
    X(int, qvl_image_from_file, (qvl_image **, const char *, const qvl_options *)) \
    X(int, qvl_image_from_pixels, (qvl_image **, const void *, int, int, size_t)) \
    X(void, qvl_image_free, (qvl_image *)) \
    X(int, qvl_image_width, (const qvl_image *)) \
    X(int, qvl_image_height, (const qvl_image *)) \
    X(const uint8_t *, qvl_image_pixels, (const qvl_image *)) \
    X(int, qvl_media_new, (qvl_media **)) \
    X(void, qvl_media_free, (qvl_media *)) \
    X(int, qvl_media_add_image, (qvl_media *, const qvl_image *)) \
    X(int, qvl_media_add_embedding, (qvl_media *, const qvl_embedding *)) \
    X(int, qvl_media_add_video, (qvl_media *, const qvl_image *const *, size_t, double, int)) \
    X(int, qvl_patches, (const qvl_model *, const qvl_image *, const qvl_options *, float **, int32_t *)) \
    X(int, qvl_encode_image, (const qvl_model *, const qvl_image *, const qvl_options *, qvl_embedding **)) \
    X(void, qvl_embedding_free, (qvl_embedding *)) \
    X(int, qvl_embedding_data, (const qvl_embedding *, const float **, int *, int *, int *)) \
    X(int, qvl_embedding_to_bytes, (const qvl_embedding *, void **, size_t *)) \
    X(int, qvl_embedding_from_bytes, (qvl_embedding **, const qvl_model *, const void *, size_t)) \
    X(int, qvl_render_chat, (const qvl_model *, const char *, const char *, const qvl_options *, char **)) \
    X(int, qvl_prompt_new, (qvl_prompt **, const qvl_model *, const char *, const char *, const qvl_media *, const qvl_options *)) \
    X(int, qvl_prompt_from_tokens, (qvl_prompt **, const qvl_model *, const int32_t *, size_t)) \
    X(void, qvl_prompt_free, (qvl_prompt *)) \
    X(int, qvl_prompt_tokens, (const qvl_prompt *, const int32_t **, size_t *)) \
    X(int, qvl_prompt_positions, (const qvl_prompt *, const int32_t **, size_t *)) \
    X(const char *, qvl_prompt_text, (const qvl_prompt *)) \
    X(int, qvl_logits, (const qvl_model *, const qvl_prompt *, float *, size_t)) \
    X(int, qvl_chat, (qvl_model *, const char *, const qvl_media *, const qvl_options *, qvl_text_fn, void *, char **)) \
    X(int, qvl_engine_new, (qvl_engine **, qvl_model *, const qvl_options *)) \
    X(void, qvl_engine_free, (qvl_engine *)) \
    X(int, qvl_engine_submit, (qvl_engine *, const qvl_prompt *, const qvl_options *, uint64_t *)) \
    X(int, qvl_engine_check, (qvl_engine *, const qvl_prompt *, const qvl_options *, char **)) \
    X(int, qvl_engine_cancel, (qvl_engine *, uint64_t)) \
    X(int, qvl_engine_plan, (const qvl_model *, const qvl_options *, char **)) \
    X(int, qvl_engine_configure, (qvl_engine *, const qvl_options *)) \
    X(int, qvl_engine_wake, (qvl_engine *)) \
    X(int, qvl_engine_step, (qvl_engine *, int)) \
    X(const qvl_event *, qvl_engine_event, (const qvl_engine *, int)) \
    X(int, qvl_engine_stats, (const qvl_engine *, char **)) \
    X(int, qvl_event_type, (const qvl_event *)) \
    X(uint64_t, qvl_event_request, (const qvl_event *)) \
    X(int, qvl_event_choice, (const qvl_event *)) \
    X(int32_t, qvl_event_token, (const qvl_event *)) \
    X(const char *, qvl_event_text, (const qvl_event *, size_t *)) \
    X(const char *, qvl_event_finish_reason, (const qvl_event *)) \
    X(int, qvl_event_error, (const qvl_event *, const char **)) \
    X(float, qvl_event_logprob, (const qvl_event *)) \
    X(int, qvl_event_top_logprobs, (const qvl_event *, const int32_t **, const float **)) \
    X(const float *, qvl_event_logits, (const qvl_event *, size_t *)) \
    X(double, qvl_event_usage, (const qvl_event *, int))

/* Types: a pointer of the promised type takes the function's address; a difference is a warning, and an error here. */
typedef void (*any_fn)(void);
#define POINTER(ret, name, args) static ret(*const p_##name) args = name;
FUNCTIONS(POINTER)
#define ADDRESS(ret, name, args) (any_fn)p_##name,

#define CONSTANTS(X) \
    X(QVL_OK, 0) X(QVL_EINVAL, -1) X(QVL_ENOMEM, -2) X(QVL_EIO, -3) X(QVL_EFORMAT, -4) X(QVL_EUNSUPPORTED, -5) X(QVL_ELIMIT, -6) \
    X(QVL_ECONTEXT, -7) X(QVL_EBUSY, -8) X(QVL_ECANCELLED, -9) X(QVL_ENODEV, -10) X(QVL_ENUMERIC, -11) X(QVL_EMISUSE, -12) \
    X(QVL_EINTERNAL, -13) X(QVL_LOG_ERROR, 0) X(QVL_LOG_WARN, 1) X(QVL_LOG_INFO, 2) X(QVL_LOG_DEBUG, 3) X(QVL_EVENT_TOKEN, 1) \
    X(QVL_EVENT_FINISHED, 2) X(QVL_EVENT_ERROR, 3) X(QVL_USAGE_PROMPT_TOKENS, 1) X(QVL_USAGE_COMPLETION_TOKENS, 2) \
    X(QVL_USAGE_IMAGE_TOKENS, 3) X(QVL_USAGE_QUEUE_MS, 4) X(QVL_USAGE_VISION_MS, 5) X(QVL_USAGE_TTFT_MS, 6) X(QVL_USAGE_TOTAL_MS, 7)
#define CONSTANT(name, value) typedef char is_##name[(name) == (value) ? 1 : -1];
CONSTANTS(CONSTANT)

/* The one struct callers fill in; it grows at its end only, told apart by size. */
typedef char allocator_size[sizeof(qvl_allocator) == 2 * sizeof(void *) + 3 * sizeof(any_fn) ? 1 : -1];

int main(void) {
    static const any_fn all[] = {FUNCTIONS(ADDRESS)};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        any_fn null = 0;
        if (memcmp(&all[i], &null, sizeof null) == 0) return 1;
    }
    if (strcmp(p_qvl_version(), QVL_VERSION) != 0) return 2;
    printf("%u functions\n", (unsigned)(sizeof all / sizeof *all));
    return 0;
}
