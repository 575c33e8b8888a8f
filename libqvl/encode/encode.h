/* encode.h - from what the user sends (image bytes, messages) to what the model takes (pixels, tokens, positions).
 *
 * Job:        decode, resize, cut into patches; render the chat template; tokenize; put a prompt together.
 * Input:      untrusted bytes and JSON.
 * Output:     qvl_image, qvl_prompt; named errors for everything that is wrong.
 * Invariants: sizes are checked before memory is taken; bytes of users never become control tokens;
 *             pixels equal transformers' Qwen2VLImageProcessor (torchvision) to the last bit.
 */
#ifndef QVL__ENCODE_H
#define QVL__ENCODE_H

#include <stdatomic.h>

#include "../base/base.h"
#include "../checkpoint/checkpoint.h"

/* ---- image.c, jpeg.c, png.c, webp.c ---- */

struct qvl_image {
    atomic_int refs;
    int width, height;
    uint8_t *rgb; /* height x width x 3 */
};
qvl_image *qvl__image_ref(const qvl_image *im);
void qvl__image_unref(qvl_image *im); /* qvl_image_free */
int qvl__image_alloc(qvl_image **out, int width, int height); /* refs = 1, pixels not set */

typedef struct {
    int64_t pixels, bytes;
} qvl__image_limits;
qvl__image_limits qvl__image_limits_of(const qvl_options *o);

/* JPEG, PNG or WebP, recognised by the first bytes, to RGB; errors name the format. */
int qvl__image_decode(qvl_image **out, const uint8_t *data, size_t size, const qvl__image_limits *l);
/* The decoders behind it; each checks the header against limits before it takes memory. */
int qvl__jpeg_decode(qvl_image **out, const uint8_t *data, size_t size, const qvl__image_limits *l);
int qvl__png_decode(qvl_image **out, const uint8_t *data, size_t size, const qvl__image_limits *l);
int qvl__webp_decode(qvl_image **out, const uint8_t *data, size_t size, const qvl__image_limits *l);
int qvl__image_check_size(int64_t width, int64_t height, const qvl__image_limits *l); /* zero, too large */
/* Orientation 1..8 of an EXIF block (after "Exif\0\0", or a bare TIFF header); 1 when absent or damaged. */
int qvl__exif_orientation(const uint8_t *exif, size_t size);
/* The same for a file that may have EXIF and XMP blocks (NULL: none): EXIF decides, XMP where EXIF has no orientation. */
int qvl__image_orientation(const uint8_t *exif, size_t exif_size, const uint8_t *xmp, size_t xmp_size);
/* Turns im as EXIF orientation says; on success *im may be a new image and the old one is freed. */
int qvl__image_turn(qvl_image **im, int orientation);
/* Pixels with alpha laid over white: (s a + 255 (255 - a) + 127) / 255. */
void qvl__over_white(uint8_t *rgb, const uint8_t *rgba, size_t pixels);
/* "data:image/...;base64,..." (also data:;base64, and data:image;base64,) to an image. */
int qvl__image_from_data_uri(qvl_image **out, const char *uri, size_t len, const qvl__image_limits *l);

/* ---- resize.c ---- */

/* Qwen's smart_resize (transformers image_processing_qwen2_vl): sides multiple of factor, area in [min, max], round
 * half to even. QVL_ELIMIT when one side is over 200 times the other. */
int qvl__smart_resize(int height, int width, int factor, int64_t min_pixels, int64_t max_pixels, int *out_h, int *out_w);
/* The video form counts frames x height x width (video_processing_qwen3_vl). */
int qvl__smart_resize_video(int frames, int height, int width, int factor, int temporal, int64_t min_pixels, int64_t max_pixels,
                            int *out_h, int *out_w);
/* torchvision's antialiased bicubic on uint8, bit for bit; rgb in and out, [h][w][3]. pool may be NULL. */
int qvl__resize_bicubic(uint8_t *dst, int dst_h, int dst_w, const uint8_t *src, int src_h, int src_w, qvl__pool *pool);

/* ---- patches.c ---- */

/* Patches [first, first + count) of one temporal pair of resized frames (an image is its own pair: a == b) as
 * float[count][3 * 2 * patch * patch]: (u8 - 127.5) / 127.5, order block-row, block-col, 2x2 in the block; row content
 * channel, time, y, x. mean and std from the processor's config. */
void qvl__patches_cut(float *out, const uint8_t *a, const uint8_t *b, int height, int width, int first, int count,
                      const qvl__processor *p);

/* ---- video.c ---- */

/* The published processor's choice: n = int(total / fps * target_fps) clamped to [min_frames, max_frames] and total; indices are
 * round-half-even(linspace). *index (qvl__free) has *n entries. */
int qvl__sample_frames(size_t total, double fps, double target_fps, int min_frames, int max_frames, int32_t **index, size_t *n);
/* "<1.2 seconds>" for frame indices a, b of the original video. */
void qvl__timestamp(char out[48], int32_t a, int32_t b, double fps);

/* ---- tokenize.c ---- */

int qvl__tokenizer_load(qvl_tokenizer **out, const char *dir);
void qvl__tokenizer_free(qvl_tokenizer *t);
/* A range of bytes in which added tokens ("<|im_end|>", "<think>") are recognised. Outside of all ranges they are
 * ordinary text. Ranges ascend and do not overlap; a token must lie inside one range. The pre-tokenizer sees the text
 * between recognised tokens as one piece, across range borders. */
typedef struct {
    size_t start, end;
} qvl__span;
int qvl__tokenize_spans(const qvl_tokenizer *t, const char *text, size_t len, const qvl__span *spans, size_t n_spans, int32_t **ids,
                        size_t *n_ids);
int32_t qvl__token_id(const qvl_tokenizer *t, const char *added); /* id of an added token, -1 if there is none */
/* Bytes of a token; *len = 0 and NULL for an id that the tokenizer does not have. */
const char *qvl__token_bytes(const qvl_tokenizer *t, int32_t id, size_t *len);
bool qvl__token_is_special(const qvl_tokenizer *t, int32_t id); /* added with special: true */
int32_t qvl__token_limit(const qvl_tokenizer *t);               /* largest id + 1 */

/* ---- messages.c ---- */

/* qvl__json_parse and qvl__json_dump for messages and tools: integers beyond 64 bits are kept (as {"\xFF": "digits"}). */
int qvl__messages_parse(struct json_t **out, const char *text, size_t len, const char *name);
void qvl__messages_dump(qvl__buf *b, const struct json_t *v);

/* ---- chat.c ---- */

typedef enum { QVL__TEMPLATE_UNKNOWN = 0, QVL__TEMPLATE_INSTRUCT, QVL__TEMPLATE_THINKING, QVL__TEMPLATE_TINY } qvl__template;
/* Recognises a template by its text (a trailing newline aside); UNKNOWN when it is none of ours. */
qvl__template qvl__template_recognise(const char *text, size_t len);
const char *qvl__template_name(qvl__template t);

typedef enum {
    QVL__SEG_TEMPLATE, /* the template's own text: added tokens are recognised */
    QVL__SEG_USER,     /* what somebody sent: never a control token */
    QVL__SEG_IMAGE,    /* "<|vision_start|><|image_pad|><|vision_end|>" */
    QVL__SEG_VIDEO     /* "<|vision_start|><|video_pad|><|vision_end|>" */
} qvl__segment_kind;
#define QVL__NO_ITEM SIZE_MAX
typedef struct {
    qvl__segment_kind kind;
    size_t start, end;         /* bytes of qvl__chat.text; consecutive segments cover all of it */
    size_t message, item;      /* IMAGE, VIDEO: messages[message].content[item]; QVL__NO_ITEM: inside a string content */
    const struct json_t *part; /* IMAGE, VIDEO: the content part (borrowed from messages), NULL for markdown images */
    const char *uri;           /* IMAGE from markdown: the data URI, uri_len bytes borrowed from messages */
    size_t uri_len;
} qvl__segment;
typedef struct {
    qvl__buf text;
    qvl__segment *seg;
    size_t n, cap;
} qvl__chat;
/* Renders messages (a JSON array, from qvl__messages_parse) and tools (array or NULL) exactly as the published jinja does. markdown: data-URI
 * images written as ![alt](data:image/...) in string contents of user messages become image parts. Errors name the
 * message and part: messages[2].content[0]: ... */
int qvl__chat_render(qvl__chat *out, qvl__template t, const struct json_t *messages, const struct json_t *tools,
                     bool add_generation_prompt, bool add_vision_id, bool markdown);
void qvl__chat_free(qvl__chat *c);

/* ---- embedding.c ---- */

/* What the vision tower made of one image or video. */
struct qvl_embedding {
    atomic_int refs;
    int layers, tokens, hidden; /* layers = 1 + deepstack features */
    int t, h, w;                /* patch grid */
    bool video;
    float *data;                /* [layers][tokens][hidden] */
    uint8_t weights_id[32];     /* of the model that made it */
    uint8_t hash[32];           /* of the visual it was made from */
};
int qvl__embedding_alloc(qvl_embedding **out, int layers, int tokens, int hidden); /* refs = 1; data, grid, ids not set */
qvl_embedding *qvl__embedding_ref(const qvl_embedding *e);
void qvl__embedding_free(qvl_embedding *e); /* drops one reference */
/* The bytes that a cache outside stores; from_bytes refuses (QVL_EFORMAT) other weights and damage. */
int qvl__embedding_to_bytes(const qvl_embedding *e, void **data, size_t *size);
int qvl__embedding_from_bytes(qvl_embedding **out, const uint8_t weights_id[32], const void *data, size_t size);

/* ---- visual.c ---- */

/* One image or video of a prompt: resized pixels, or an embedding that is already there. Owned by its prompt. */
typedef struct {
    int t, h, w;          /* patch grid: temporal pairs, rows, columns */
    int tokens;           /* t * h * w / merge^2 */
    int source_h, source_w; /* pixels before resizing; 0 of an embedding */
    bool video;
    uint8_t *frames;      /* 1 (image) or 2t frames of [h * patch][w * patch][3]; NULL when embedding is given */
    qvl_embedding *embedding; /* owned reference when the embedding was given, else NULL */
    uint8_t hash[32];     /* SHA-256 over kind, grid and pixels */
} qvl__visual;
void qvl__visual_free(qvl__visual *v);
/* Bounds on an image's pixels after resizing; 0 for the model's own. */
typedef struct {
    int64_t min, max;
} qvl__pixels;
/* Those of the options. QVL_EINVAL when min is above max. */
int qvl__pixels_read(qvl__pixels *b, const qvl_options *o, const char *min_name, const char *max_name);
/* Resizes im for the model's processor. */
int qvl__visual_from_image(qvl__visual **out, const qvl__config *c, const qvl_image *im, qvl__pixels b, qvl__pool *pool);
/* An embedding in the place of its image; QVL_EINVAL when another model made it. */
int qvl__visual_from_embedding(qvl__visual **out, const qvl__config *c, const uint8_t weights_id[32], const qvl_embedding *e);

/* A video frame by frame, so that only one source frame need be in memory: begin with the number and size of frames,
 * add each (QVL_EINVAL when its size differs), end. An odd last frame is repeated. After a failed begin nothing is to be
 * freed; after a failed add, abort. */
typedef struct {
    const qvl__processor *processor;
    qvl__visual *visual;
    size_t n, done;
    int src_height, src_width, height, width;
} qvl__video;
int qvl__video_begin(qvl__video *b, const qvl__config *c, size_t n, int height, int width, const qvl_options *o);
int qvl__video_add(qvl__video *b, const qvl_image *im, qvl__pool *pool);
qvl__visual *qvl__video_end(qvl__video *b);
void qvl__video_abort(qvl__video *b);

/* ---- parts.c ---- */

/* The parts of a model that encoding needs. */
typedef struct {
    const qvl__config *config;
    const qvl_tokenizer *tokenizer;
    qvl__template template_;
    const uint8_t *weights_id;
    qvl__pool *pool;
} qvl__encoder;

/* What an IMAGE or VIDEO segment stands for. */
typedef struct {
    qvl__visual *visual;
    char (*stamp)[48]; /* VIDEO: "<1.2 seconds>" for each of visual->t frame pairs */
} qvl__part;
/* One part for each IMAGE and VIDEO segment of chat, in order: data URIs decoded, empty parts filled from media (may be
 * NULL). QVL_EINVAL when number or kind do not match. */
int qvl__parts_resolve(qvl__part **out, size_t *n, const qvl__chat *chat, const qvl__encoder *e, const qvl_media *media,
                       const qvl_options *o);
void qvl__parts_free(qvl__part *parts, size_t n);

/* ---- prompt.c ---- */

typedef struct {
    size_t start;  /* first token */
    int tokens;    /* run length */
    int visual;    /* index into visuals */
    int offset;    /* first token of the run within the visual's tokens */
} qvl__run;

struct qvl_prompt {
    atomic_int refs;
    qvl_model *model; /* reference set and dropped by api/ */
    int32_t *tokens;
    int32_t *positions; /* [3][n] */
    size_t n;
    int32_t rope_delta; /* position of token i >= n is i + rope_delta */
    char *text;
    qvl__visual **visuals;
    int n_visuals;
    qvl__run *runs; /* pad runs in prompt order */
    int n_runs;
};

/* qvl_prompt_new and qvl_prompt_from_tokens without the model handle; only ids may be NULL here. */
int qvl__prompt_new(qvl_prompt **out, const qvl__encoder *e, const char *messages, const char *tools, const qvl_media *media,
                    const qvl_options *o);
int qvl__prompt_from_tokens(qvl_prompt **out, const qvl__encoder *e, const int32_t *ids, size_t n);
/* Drops one reference; true when it was the last, so that the caller then drops the model (read p->model before). */
bool qvl__prompt_free(qvl_prompt *p);
/* The text of qvl_render_chat, which is that of the prompt of the same messages; *text with qvl__free. */
int qvl__render_chat(qvl__template t, const char *messages, const char *tools, const qvl_options *o, char **text);

struct qvl_media {
    struct qvl__media_item {
        enum { QVL__MEDIA_IMAGE, QVL__MEDIA_EMBEDDING, QVL__MEDIA_VIDEO } kind;
        qvl_image **frames; /* IMAGE: 1, VIDEO: n */
        size_t n;
        double fps;
        bool sample;
        qvl_embedding *embedding;
    } *items;
    size_t n, cap;
};

#endif
