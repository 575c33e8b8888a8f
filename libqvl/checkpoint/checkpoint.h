/* checkpoint.h - a Hugging Face directory as typed shapes and packed weights.
 *
 * Job:        config.json and friends to qvl__config; safetensors shards to qvl__weights on a device.
 * Input:      a directory as published (Qwen3-VL) or as saved by transformers 5.
 * Output:     shapes that passed every check; weights in the device's layout.
 * Invariants: shapes come from config.json alone; every tensor in the files is used exactly once, and an unknown,
 *             missing, extra or misshapen one is refused by name; offsets are checked before they are followed.
 */
#ifndef QVL__CHECKPOINT_H
#define QVL__CHECKPOINT_H

#include "../base/base.h"
#include "../device/device.h"

#define QVL__MAX_DEEPSTACK 8
#define QVL__MAX_EOS 16

/* What preprocessor_config.json and video_preprocessor_config.json say. */
typedef struct {
    int patch, merge, temporal;       /* 16, 2, 2 */
    int64_t min_pixels, max_pixels;   /* image: height x width */
    int64_t video_min_pixels, video_max_pixels; /* video: frames x height x width */
    int min_frames, max_frames;       /* 4, 768 */
    double fps;                       /* frames a second taken from a video, 2 */
    float mean[3], std[3];
} qvl__processor;

typedef struct {
    int vocab, hidden, layers, heads, kv_heads, head_dim, inter, max_positions;
    float eps;
    double rope_theta;
    int mrope_section[3];
    struct { /* YaRN (Peng et al. 2023); factor 1: none */
        double factor, attention, beta_fast, beta_slow; /* attention: cos and sin are multiplied by it */
        int original;                                   /* positions that the model was trained with */
        bool truncate;
    } yarn;
    bool tied;
    int experts, top_k, expert_inter; /* mixture of experts (qwen3_vl_moe); experts = 0: dense */
    uint8_t *dense_layer;             /* [layers]: 1 for layers of a mixture model that have one plain MLP; NULL: none */
} qvl__text_config;

typedef struct {
    int hidden, depth, heads, inter, out_hidden, in_channels, positions; /* positions = side * side */
    int deepstack[QVL__MAX_DEEPSTACK], n_deepstack;
} qvl__vision_config;

/* generation_config.json: what a request that sets nothing gets. */
typedef struct {
    double temperature, top_p, repetition_penalty;
    int top_k;
    int32_t eos[QVL__MAX_EOS];
    int n_eos;
} qvl__generation_config;

typedef struct {
    char family[32]; /* model_type */
    qvl__text_config text;
    qvl__vision_config vision;
    qvl__processor processor;
    qvl__generation_config generation;
    int32_t image_token, video_token, vision_start, vision_end;
    int fp8_block[2]; /* quantization_config of an FP8 checkpoint: rows and columns that share a scale; 0: none */
    char *chat_template; /* text, or NULL when the checkpoint has none */
} qvl__config;
int qvl__config_load(qvl__config *c, const char *dir);
/* Option rope_yarn_factor: YaRN for a checkpoint whose config has none. */
int qvl__config_set_yarn(qvl__text_config *t, double factor);
void qvl__config_free(qvl__config *c);

/* ---- safetensors.c ---- */

typedef struct qvl__tensor {
    char *name;
    char dtype[8]; /* as written: "BF16", "F16", "F32", "F8_E4M3", ... */
    int64_t shape[8];
    int rank;
    const uint8_t *data; /* inside a mapping */
    uint64_t bytes;
    int shard;
    bool used;
    const struct qvl__tensor *scale; /* FP8: [rows / block[0]][columns / block[1]], rounded up; set by who uses it */
    int block[2];
} qvl__tensor;
typedef struct {
    qvl__tensor *tensors; /* sorted by name */
    size_t n;
    qvl__map *maps;
    char **paths;
    int n_maps;
    char *packed; /* a packed directory (pack.c): what its weights are, "int4"; NULL: a plain one */
} qvl__safetensors;
int qvl__safetensors_open(qvl__safetensors *s, const char *dir);
void qvl__safetensors_close(qvl__safetensors *s);
qvl__tensor *qvl__safetensors_find(qvl__safetensors *s, const char *name);

/* ---- numbers.c ---- */

/* The type in which a device takes t: its own, F32 for FP8 with scales. QVL_EUNSUPPORTED for others. */
int qvl__numbers_type(const qvl__tensor *t, qvl__type *out);
/* Rows [first, first + rows) of k numbers as floats. t has a type of the above. */
void qvl__numbers(float *out, const qvl__tensor *t, size_t first, size_t rows, size_t k);
/* Whether matrices of F8 (device.h) hold t exactly: FP8 whose scales are numbers of bf16, for whole groups. */
bool qvl__numbers_keep_fp8(const qvl__tensor *t);
/* The same rows as F8; t is as keep_fp8 asks. */
void qvl__numbers_fp8(uint8_t *out, const qvl__tensor *t, size_t first, size_t rows, size_t k);

/* ---- pack.c: weights as they lie in memory, in one file ---- */

#define QVL__PACKED_FILE "qvl.safetensors"
#define QVL__PACKED_FORMAT "qvl-packed-1"

typedef struct {
    char *path, *temporary;
    int fd;
    qvl__buf header, report;
    size_t reserved;  /* bytes of the file before the data */
    uint64_t written; /* bytes of data */
    uint64_t weights, bytes; /* of the matrices in the report */
    const char *kind; /* what most weights are, once it ended */
} qvl__packer;
/* Begins dir/qvl.safetensors under a temporary name, with room for about entries weights in its header. */
int qvl__packer_begin(qvl__packer *p, const char *dir, size_t entries);
int qvl__packer_add(qvl__packer *p, const char *name, const char *dtype, int rank, const uint64_t *shape, const void *data);
/* A line of the report: [{"name", "weights", "bytes", "error"}, ...] without the brackets. */
void qvl__packer_note(qvl__packer *p, const char *name, uint64_t weights, uint64_t bytes, double error);
/* Writes the header and gives the file its name. */
int qvl__packer_end(qvl__packer *p, const char *kind);
/* Also after a failure, when it removes what was begun. */
void qvl__packer_free(qvl__packer *p);

/* ---- weights.c ---- */

typedef struct {
    float *norm1_w, *norm1_b, *norm2_w, *norm2_b, *qkv_b, *proj_b, *fc1_b, *fc2_b;
    qvl__matrix qkv, proj, fc1, fc2;
} qvl__vision_layer;
typedef struct {
    float *norm_w, *norm_b, *fc1_b, *fc2_b;
    qvl__matrix fc1, fc2;
} qvl__merger;
typedef struct {
    float *input_norm, *post_norm, *q_norm, *k_norm;
    qvl__matrix qkv, o;
    qvl__matrix gate_up, down;            /* a plain MLP, or */
    qvl__matrix router;                   /* [experts][hidden] and */
    qvl__experts experts;
} qvl__text_layer;
typedef struct {
    qvl__matrix embed, lm_head; /* tied: lm_head is a copy of embed's descriptor */
    float *norm;
    qvl__text_layer *text;
    qvl__matrix patch;
    float *patch_b, *pos_embed;
    qvl__vision_layer *vision;
    qvl__merger merger, deepstack[QVL__MAX_DEEPSTACK];
    uint64_t bytes, parameters;
    uint8_t id[32]; /* SHA-256 over names, types, shapes and sampled contents */
    qvl__type type; /* type of most weights */
    qvl__map file;  /* a packed file, in which the matrices lie */
    qvl__matrix **matrices; /* all of them, in the order of loading */
    size_t n_matrices;
} qvl__weights;
/* A type for every matrix, in the order of loading; a mixture's routers are counted, but stay as they are. */
typedef struct {
    qvl__type *types;
    size_t n;
    qvl__type most; /* what most weights are */
} qvl__mix;
int qvl__weights_load(qvl__weights *w, const qvl__config *c, const char *dir, qvl__device *d, const char *dtype,
                      qvl_progress_fn progress, void *ud);
/* The same weights into a packed file, one after the other; with a plan, which may be NULL, of its types instead of dtype's. */
int qvl__weights_pack(qvl__packer *to, const qvl__config *c, const char *dir, qvl__device *d, const char *dtype, const qvl__mix *plan,
                      qvl_progress_fn progress, void *ud);
void qvl__weights_free(qvl__weights *w, const qvl__config *c, qvl__device *d);

#endif
