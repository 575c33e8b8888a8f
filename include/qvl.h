/* qvl.h - libqvl: Qwen3-VL (images, video frames and text to text) as a C library. The only public header.
 *
 * In five calls (examples/caption.c):
 *     qvl_model *m;  qvl_image *im;  qvl_media *media;  char *text;
 *     qvl_model_load(&m, "examples/models/qvl-tiny", NULL);
 *     qvl_image_from_file(&im, "cat.jpg", NULL);
 *     qvl_media_new(&media);  qvl_media_add_image(media, im);
 *     qvl_chat(m, "[{\"role\":\"user\",\"content\":[{\"type\":\"image\"},{\"type\":\"text\",\"text\":\"What is this?\"}]}]",
 *              media, NULL, NULL, NULL, &text);
 *
 * The order below: errors and hooks, options, model, tokenizer, images and media, embeddings, prompts, one call, engine.
 *
 * Rules that hold for every call
 *   Errors     int: 0 is success, a positive number is a documented count, a negative one is QVL_E*. After a failure
 *              qvl_last_error() tells what was wrong and where. Outputs (*out) are NULL or untouched after a failure.
 *              The library never prints, exits or aborts on bad input.
 *   Ownership  Arguments are copied or read before the call returns. What a call hands out through an opaque pointer is
 *              freed with that type's _free, char* and other buffers with qvl_free; const pointers are borrowed and say
 *              until when. Handles may be freed in any order (children keep their parents alive); free takes NULL.
 *   Threads    [any thread]: may be called at any time from any thread. All else: one thread at a time per handle.
 *              A model, a tokenizer, an image and an embedding are immutable: share them freely between threads.
 *   Text       UTF-8. Invalid input bytes are an error where text is parsed (JSON) and U+FFFD where it is tokenized.
 *   JSON       Messages are OpenAI chat messages; see qvl_prompt_new.
 */
#ifndef QVL_H
#define QVL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define QVL_API __attribute__((visibility("default")))
#else
#define QVL_API
#endif

#define QVL_VERSION "0.1.0"

typedef struct qvl_options qvl_options;
typedef struct qvl_model qvl_model;
typedef struct qvl_tokenizer qvl_tokenizer;
typedef struct qvl_image qvl_image;
typedef struct qvl_media qvl_media;
typedef struct qvl_embedding qvl_embedding;
typedef struct qvl_prompt qvl_prompt;
typedef struct qvl_engine qvl_engine;
typedef struct qvl_event qvl_event;

/* ------------------------------------------------------------------------------------------------ errors and hooks */

enum {
    QVL_OK = 0,
    QVL_EINVAL = -1,       /* an argument or option is wrong */
    QVL_ENOMEM = -2,       /* an allocation failed */
    QVL_EIO = -3,          /* a file cannot be read or written */
    QVL_EFORMAT = -4,      /* a file, image or JSON text is malformed */
    QVL_EUNSUPPORTED = -5, /* well-formed, but not something this library does; the message says what to do instead */
    QVL_ELIMIT = -6,       /* a configured limit (pixels, bytes, aspect ratio) is exceeded; the message has the numbers */
    QVL_ECONTEXT = -7,     /* the prompt or prompt + max_tokens can never fit max_context or the KV blocks */
    QVL_EBUSY = -8,        /* something is still in use */
    QVL_ECANCELLED = -9,   /* the caller's own callback or qvl_engine_cancel stopped it */
    QVL_ENODEV = -10,      /* the device or its plug-in is missing */
    QVL_ENUMERIC = -11,    /* the model produced non-finite logits */
    QVL_EMISUSE = -12,     /* the call is not allowed here (wrong thread, wrong state) */
    QVL_EINTERNAL = -13    /* a bug in the library */
};

/* QVL_VERSION of the library that is loaded. [any thread] */
QVL_API const char *qvl_version(void);
/* The calling thread's last failure as one line; "" when none. Borrowed until that thread's next failing call. Needs no
 * memory, so it holds after QVL_ENOMEM. [any thread] */
QVL_API const char *qvl_last_error(void);
/* "QVL_EINVAL" for QVL_EINVAL, and so on; "QVL_E?" for an unknown code. Static. [any thread] */
QVL_API const char *qvl_error_name(int code);
/* Frees what a call returned through char** or another plain buffer. NULL is fine. [any thread] */
QVL_API void qvl_free(void *p);

/* Where the library's heap memory comes from. size = sizeof(qvl_allocator). The functions are called from any thread;
 * malloc_fn and realloc_fn return NULL when there is no memory. Weights, KV and workspaces are mapped from the system
 * directly; libjpeg, libpng, libwebp, PCRE2 and jansson use the C library's allocator. */
typedef struct qvl_allocator {
    size_t size;
    void *ud;
    void *(*malloc_fn)(void *ud, size_t size);
    void *(*realloc_fn)(void *ud, void *p, size_t size);
    void (*free_fn)(void *ud, void *p);
} qvl_allocator;
/* Replaces the allocator; NULL restores the C library's. QVL_EBUSY while any handle is alive. */
QVL_API int qvl_set_allocator(const qvl_allocator *a);

enum { QVL_LOG_ERROR = 0, QVL_LOG_WARN = 1, QVL_LOG_INFO = 2, QVL_LOG_DEBUG = 3 };
typedef void (*qvl_log_fn)(void *ud, int level, const char *line);
/* Receives finished lines, from any thread; fn must not call into the library. NULL (the default) is silence. */
QVL_API void qvl_set_log(qvl_log_fn fn, void *ud);

/* ---------------------------------------------------------------------------------------------------------- options */

/* One bag of named options serves model, image, prompt, engine and request; each call reads the ones it knows.
 * docs/options.md lists them all, qvl_option_info describes them. Unknown names, wrong types and values out of range
 * are QVL_EINVAL with the allowed range in the message. Everywhere below, options may be NULL for the defaults. */
QVL_API int qvl_options_new(qvl_options **out);
QVL_API void qvl_options_free(qvl_options *o);
/* value as text: "0.9", "true", "bf16"; for options of type json a JSON text such as ["\n\n", "END"]. */
QVL_API int qvl_options_set(qvl_options *o, const char *name, const char *value);
QVL_API int qvl_options_set_i64(qvl_options *o, const char *name, int64_t value);
QVL_API int qvl_options_set_f64(qvl_options *o, const char *name, double value);

/* Called while weights load: done of total bytes. Return non-zero to give up (the load fails with QVL_ECANCELLED). */
typedef int (*qvl_progress_fn)(void *ud, uint64_t done, uint64_t total);
QVL_API int qvl_options_set_progress(qvl_options *o, qvl_progress_fn fn, void *ud);

/* Describes option number index (from 0): name; type "bool", "int", "float", "string" or "json"; scope "model",
 * "quantize", "image", "prompt", "engine" or "request"; range ("0..2", "a|b|c" or ""); default; one line of help. All static; any
 * pointer may be NULL. Returns 0, or QVL_EINVAL past the last one. [any thread] */
QVL_API int qvl_option_info(int index, const char **name, const char **type, const char **scope, const char **range,
                            const char **dflt, const char **help);

/* ------------------------------------------------------------------------------------------------------------ model */

/* Loads a Hugging Face directory (config.json, tokenizer.json, *.safetensors ...), or one that qvl_quantize made, whose
 * weights are mapped: that takes no time, processes share them, and the file must stay as it is while the model lives.
 * Options: device, dtype, threads, chat_template, progress, gpu_memory_utilization, deterministic. QVL_ENODEV: device is "cuda"
 * and the plug-in, the driver or the GPU is missing, as the message says. QVL_EUNSUPPORTED names an unknown architecture,
 * tensor or template; QVL_EFORMAT a missing, extra, misshapen or truncated one. Other files are not needed after it returns. */
QVL_API int qvl_model_load(qvl_model **out, const char *path, const qvl_options *o);
QVL_API void qvl_model_free(qvl_model *m);
/* A JSON object: family, template, dtype, device, isa, threads, weight_bytes, parameters, vocab_size, max_context,
 * text {...} and vision {...} shapes, generation defaults, weights_id. *json with qvl_free. [any thread] */
QVL_API int qvl_model_info(const qvl_model *m, char **json);
/* Writes the directory out (made if missing): the model at path with its weights as option dtype asks (int4, int8, bf16, f32,
 * or auto: as stored), in the layout that they have in memory, and copies of its other files. A weight at a time, so memory
 * stays near the largest one. With option bits instead of dtype each matrix gets a type of its own, by what its rounding costs
 * the model on conversations (option calibration), for which the model is loaded as stored. Options: dtype, bits, calibration,
 * chat_template (for the conversations), threads, progress. *report (may be NULL) is a JSON object: dtype (what most weights are),
 * bytes, bits (mean of a weight), matrices [{name, weights, bytes, error}], error being the root of the squared error of a matrix'
 * numbers over that of the numbers; *report with qvl_free. QVL_EINVAL when out has packed weights already. After a failure or a progress
 * callback that stops it there is no packed file. [any thread] */
QVL_API int qvl_quantize(const char *path, const char *out, const qvl_options *o, char **report);
/* Times the kernels of the CPU one by one, without a model: about ten seconds and a gigabyte. Options: dtype (f32: no bf16
 * products), threads, progress. *json is an object: device, isa, threads, limits {read_gb_s, f32_gop_s, bf16_gop_s, int8_gop_s,
 * int4_gop_s}, measured in the same run on all threads, and kernels [{kernel, type, rows, ms, gb_s, gop_s, bound, percent}]:
 * percent of the limit, which is memory or arithmetic (bound), whichever needs longer. *json with qvl_free. [any thread] */
QVL_API int qvl_bench_kernels(const qvl_options *o, char **json);
/* The model's tokenizer; borrowed, lives as long as the model. [any thread] */
QVL_API const qvl_tokenizer *qvl_model_tokenizer(const qvl_model *m);

/* -------------------------------------------------------------------------------------------------------- tokenizer */

/* A tokenizer without weights, from a directory with tokenizer.json (or vocab.json + merges.txt). */
QVL_API int qvl_tokenizer_load(qvl_tokenizer **out, const char *dir);
QVL_API void qvl_tokenizer_free(qvl_tokenizer *t);
/* Text of len bytes to *n ids (*ids with qvl_free). parse_special = 0: everything is ordinary text, "<|im_end|>" too;
 * 1: added tokens become their ids. NFC, then the pre-tokenizer, then byte-level BPE, as transformers' Qwen2Tokenizer.
 * [any thread] */
QVL_API int qvl_tokenize(const qvl_tokenizer *t, const char *text, size_t len, int parse_special, int32_t **ids, size_t *n);
/* ids to text (*text with qvl_free, terminated; *len bytes). Bytes that are not UTF-8 become U+FFFD, one per maximal
 * invalid part. skip_special leaves out tokens marked special. An id out of range is QVL_EINVAL. [any thread] */
QVL_API int qvl_detokenize(const qvl_tokenizer *t, const int32_t *ids, size_t n, int skip_special, char **text, size_t *len);

/* ------------------------------------------------------------------------------------------------- images and media */

/* JPEG, PNG or WebP to RGB: EXIF orientation applied, alpha laid over white, grey replicated, 16 bit cut to the high
 * byte, CMYK converted as Pillow does. Options: max_image_pixels, max_image_bytes, checked before decoding. [any thread] */
QVL_API int qvl_image_from_bytes(qvl_image **out, const void *data, size_t size, const qvl_options *o);
QVL_API int qvl_image_from_file(qvl_image **out, const char *path, const qvl_options *o);
/* "data:image/jpeg;base64,..." of len bytes, in the forms that clients send (data:image;base64, and data:;base64, too). */
QVL_API int qvl_image_from_data_uri(qvl_image **out, const char *uri, size_t len, const qvl_options *o);
/* Copies width x height RGB pixels (8 bits each); row_bytes is the distance of rows, 0 for 3 * width. [any thread] */
QVL_API int qvl_image_from_pixels(qvl_image **out, const void *rgb, int width, int height, size_t row_bytes);
QVL_API void qvl_image_free(qvl_image *im);
QVL_API int qvl_image_width(const qvl_image *im);
QVL_API int qvl_image_height(const qvl_image *im);
/* height x width x 3 bytes; borrowed until the image is freed. */
QVL_API const uint8_t *qvl_image_pixels(const qvl_image *im);

/* What fills the image and video parts of messages that carry no data of their own, in order. Added handles are
 * shared, not copied, and may be freed right after. */
QVL_API int qvl_media_new(qvl_media **out);
QVL_API void qvl_media_free(qvl_media *l);
QVL_API int qvl_media_add_image(qvl_media *l, const qvl_image *im);
QVL_API int qvl_media_add_embedding(qvl_media *l, const qvl_embedding *e);
/* n frames of a video of fps frames a second. sample_frames != 0: frames are picked as the published processor does
 * (2 a second, 4 to 768); 0: all are used. */
QVL_API int qvl_media_add_video(qvl_media *l, const qvl_image *const *frames, size_t n, double fps, int sample_frames);

/* The processor's output for one image (smart_resize, antialiased bicubic, normalise, patches): *patches is
 * float[n][1536] (qvl_free), thw = {1, rows, columns} with n = rows * columns. Options: min_pixels, max_pixels. [any
 * thread] */
QVL_API int qvl_patches(const qvl_model *m, const qvl_image *im, const qvl_options *o, float **patches, int32_t thw[3]);

/* ------------------------------------------------------------------------------------------------------- embeddings */

/* Runs the vision tower on one image. Options: min_pixels, max_pixels. The result can stand for the image in any
 * prompt of the same model. [any thread] */
QVL_API int qvl_encode_image(const qvl_model *m, const qvl_image *im, const qvl_options *o, qvl_embedding **out);
QVL_API void qvl_embedding_free(qvl_embedding *e);
/* float[layers][tokens][hidden], layers = 1 (merged) + number of deepstack features; borrowed until e is freed. Any
 * pointer may be NULL. */
QVL_API int qvl_embedding_data(const qvl_embedding *e, const float **data, int *layers, int *tokens, int *hidden);
/* To and from bytes (*data with qvl_free). They carry the identity of the weights and a checksum: bytes of another
 * model or damaged ones are refused with QVL_EFORMAT. [any thread] */
QVL_API int qvl_embedding_to_bytes(const qvl_embedding *e, void **data, size_t *size);
QVL_API int qvl_embedding_from_bytes(qvl_embedding **out, const qvl_model *m, const void *data, size_t size);

/* ---------------------------------------------------------------------------------------------------------- prompts */

/* The chat template's text. messages and tools (may be NULL) are JSON arrays in OpenAI's form. Options:
 * add_generation_prompt, add_vision_id. *text with qvl_free. [any thread] */
QVL_API int qvl_render_chat(const qvl_model *m, const char *messages, const char *tools, const qvl_options *o, char **text);

/* Messages to tokens, M-RoPE positions and pixels. A content is a string or a list of parts:
 *   {"type":"text","text":T}
 *   {"type":"image"} (from media) or {"type":"image_url","image_url":{"url":"data:image/...;base64,..."}}, both with
 *   "min_pixels" and "max_pixels" of their own if they like
 *   {"type":"video"} (from media) or {"type":"video","video":["data:...", ...],"fps":F,"do_sample_frames":B}
 * A plain string content may hold images as markdown, ![alt](data:image/...;base64,...). Local paths and remote URLs
 * are refused: load them and pass them by media. User text never becomes a control token. Options: those of
 * qvl_render_chat, min_pixels, max_pixels, video_min_pixels, video_max_pixels, video_layout, max_image_*. QVL_EINVAL
 * when the parts and media do not match in number or kind. [any thread] */
QVL_API int qvl_prompt_new(qvl_prompt **out, const qvl_model *m, const char *messages, const char *tools, const qvl_media *media,
                           const qvl_options *o);
/* A text-only prompt of given ids. Image and video pad tokens are refused. [any thread] */
QVL_API int qvl_prompt_from_tokens(qvl_prompt **out, const qvl_model *m, const int32_t *ids, size_t n);
QVL_API void qvl_prompt_free(qvl_prompt *p);
/* n token ids, placeholders expanded; borrowed until p is freed. */
QVL_API int qvl_prompt_tokens(const qvl_prompt *p, const int32_t **ids, size_t *n);
/* int32[3][n]: M-RoPE position of every token in time, height and width; borrowed until p is freed. */
QVL_API int qvl_prompt_positions(const qvl_prompt *p, const int32_t **positions, size_t *n);
/* The rendered template, placeholders not expanded; "" for qvl_prompt_from_tokens. Borrowed until p is freed. */
QVL_API const char *qvl_prompt_text(const qvl_prompt *p);

/* Teacher-forced logits of every position: out is float[n][vocab_size] for the prompt's n tokens, out_floats its size
 * in floats (checked). [any thread] */
QVL_API int qvl_logits(const qvl_model *m, const qvl_prompt *p, float *out, size_t out_floats);

/* --------------------------------------------------------------------------------------------------------- one call */

/* Called with each piece of text (whole UTF-8 characters) as it is generated. Return non-zero to stop. */
typedef int (*qvl_text_fn)(void *ud, const char *piece, size_t len);
/* Answers messages: prompt, prefill, decode, text. on_text may be NULL; *text (may be NULL) gets the whole answer
 * (terminated, qvl_free). Options: those of prompt, engine and request. Stopped by on_text: QVL_ECANCELLED, *text not
 * set. */
QVL_API int qvl_chat(qvl_model *m, const char *messages, const qvl_media *media, const qvl_options *o, qvl_text_fn on_text,
                     void *ud, char **text);

/* ----------------------------------------------------------------------------------------------------------- engine */

/* Continuous batching over a paged KV cache. Options: those of scope "engine". All memory of the engine is taken here,
 * but for embeddings and a request's own state, which submit takes; steps take none. */
QVL_API int qvl_engine_new(qvl_engine **out, qvl_model *m, const qvl_options *o);
QVL_API void qvl_engine_free(qvl_engine *e);
/* What qvl_engine_new would take with these options, without taking it: a JSON object {"weights", "kv", "workspace",
 * "vision", "total"} in bytes and {"kv_blocks", "kv_block_tokens", "max_requests", "max_context", "max_batched_tokens",
 * "max_image_tokens", "kv_dtype"}. *json with qvl_free. [any thread] */
QVL_API int qvl_engine_plan(const qvl_model *m, const qvl_options *o, char **json);
/* Changes a living engine: the options max_requests, max_batched_tokens, step_ms and embedding_cache that are set in o,
 * from the next step on. max_requests and max_batched_tokens can go down and up again, to what the engine was made with.
 * QVL_EINVAL names one that cannot change. [any thread] */
QVL_API int qvl_engine_configure(qvl_engine *e, const qvl_options *o);
/* Queues a request; *request gets its number (from 1, never reused). Options: max_tokens, temperature, ... (scope
 * "request"); unset ones come from generation_config.json. QVL_ECONTEXT when it can never fit, with the numbers. With
 * option n the request has n choices, each with its own events and its own finish; choice i is what seed + i alone would
 * give. [any thread] */
QVL_API int qvl_engine_submit(qvl_engine *e, const qvl_prompt *p, const qvl_options *o, uint64_t *request);
/* What qvl_engine_submit would say and take, without queuing: the same errors, or a JSON object {"prompt_tokens",
 * "cached_tokens" (in the prefix cache now), "image_tokens", "max_tokens", "kv_blocks", "max_context", "images": [{"type",
 * "width", "height", "resized_width", "resized_height", "frame_pairs", "tokens", "cached"}]}. *json with qvl_free. [any thread] */
QVL_API int qvl_engine_check(qvl_engine *e, const qvl_prompt *p, const qvl_options *o, char **json);
/* Ends a request at the next step, with a finished event of reason "cancelled". Unknown or ended numbers are fine:
 * returns 1 if it was alive, else 0. [any thread] */
QVL_API int qvl_engine_cancel(qvl_engine *e, uint64_t request);
/* Makes a waiting qvl_engine_step return. [any thread] */
QVL_API int qvl_engine_wake(qvl_engine *e);
/* Does one step of work, or waits up to timeout_ms (-1: for ever) for some when there is none. Returns the number of
 * events, 0 when none. The thread that steps first owns the engine; another one gets QVL_EMISUSE. */
QVL_API int qvl_engine_step(qvl_engine *e, int timeout_ms);
/* Event i of the last step; borrowed until the next step. NULL when out of range. */
QVL_API const qvl_event *qvl_engine_event(const qvl_engine *e, int i);
/* A JSON object: requests, KV blocks, memory, counters. *json with qvl_free. [any thread] */
QVL_API int qvl_engine_stats(const qvl_engine *e, char **json);

enum {
    QVL_EVENT_TOKEN = 1,    /* a token was generated */
    QVL_EVENT_FINISHED = 2, /* the last event of a choice that ended well; may carry a rest of text */
    QVL_EVENT_ERROR = 3,    /* the last event of a choice that failed; the engine and all others go on */
    QVL_EVENT_PROMPT = 4    /* option prompt_logprobs: one token of the prompt, in order, before the first answer token */
};
QVL_API int qvl_event_type(const qvl_event *v);
QVL_API uint64_t qvl_event_request(const qvl_event *v);
/* Which choice of the request (option n), from 0. The request is over when all of them are. */
QVL_API int qvl_event_choice(const qvl_event *v);
/* The token's id, -1 when the event has none. */
QVL_API int32_t qvl_event_token(const qvl_event *v);
/* Text that became whole with this event (may be ""): never half a character, never part of a stop string. Terminated;
 * *len (may be NULL) counts its bytes, which may include zeros. */
QVL_API const char *qvl_event_text(const qvl_event *v, size_t *len);
/* "stop" (end token, stop token or stop string), "length", "cancelled", "deadline"; "" unless finished. */
QVL_API const char *qvl_event_finish_reason(const qvl_event *v);
/* Code and message of an error event; 0 and "" otherwise. */
QVL_API int qvl_event_error(const qvl_event *v, const char **message);
/* With option logprobs >= 0 on a token event: the log-probability of the chosen token; with prompt_logprobs >= 0 on a
 * prompt event: that of the prompt's token (NaN for the first one, which nothing precedes). NaN otherwise. */
QVL_API float qvl_event_logprob(const qvl_event *v);
/* The most likely tokens (option logprobs or prompt_logprobs = their number): returns n, *ids and *logprobs have n
 * entries, best first. */
QVL_API int qvl_event_top_logprobs(const qvl_event *v, const int32_t **ids, const float **logprobs);
/* With option return_logits: the raw logits that chose the token, float[vocab_size]; else NULL and *n = 0. */
QVL_API const float *qvl_event_logits(const qvl_event *v, size_t *n);

enum {
    QVL_USAGE_PROMPT_TOKENS = 1,
    QVL_USAGE_COMPLETION_TOKENS = 2,
    QVL_USAGE_IMAGE_TOKENS = 3, /* image and video tokens among the prompt's */
    QVL_USAGE_QUEUE_MS = 4,     /* submit to first work */
    QVL_USAGE_VISION_MS = 5,    /* vision tower */
    QVL_USAGE_TTFT_MS = 6,      /* submit to first token */
    QVL_USAGE_TOTAL_MS = 7,     /* submit to end */
    QVL_USAGE_CACHED_TOKENS = 8, /* prompt tokens whose keys and values were in the prefix cache */
    QVL_USAGE_PREFILL_MS = 9,    /* first work to first token, without vision_ms */
    QVL_USAGE_DECODE_MS = 10,    /* first token to end */
    QVL_USAGE_SPECULATED_TOKENS = 11, /* answer tokens that were guessed right (option speculate) */
    QVL_USAGE_IMAGES = 12,            /* images and videos of the prompt */
    QVL_USAGE_IMAGES_CACHED = 13      /* those whose embedding or keys were there already */
};
/* One figure of a finished choice; NaN when v is not a finished event or what is unknown. */
QVL_API double qvl_event_usage(const qvl_event *v, int what);

#ifdef __cplusplus
}
#endif
#endif
