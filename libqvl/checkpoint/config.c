/* config.c - config.json and the small files beside it, as numbers that passed every check.
 *
 * Job:        read config.json, generation_config.json, the processor's files and the chat template.
 * Input:      a directory as published (rope_scaling + rope_theta, flat preprocessor files, chat_template.json) or as
 *             saved by transformers 5 (rope_parameters, processor_config.json, chat_template.jinja).
 * Output:     qvl__config.
 * Invariants: every number is inside bounds that make later products safe; what this engine does not compute
 *             (another architecture, activation, rope type) is refused here, with its key and value.
 */
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "checkpoint.h"

#define PATH 4096

static int join(char path[PATH], const char *dir, const char *file) {
    int n = snprintf(path, PATH, "%s/%s", dir, file);
    return n > 0 && n < PATH ? 0 : qvl__fail(QVL_EINVAL, "%.200s...: path is too long", dir);
}

/* A reader that remembers the first failure, so that a list of keys needs no error handling line by line. */
typedef struct {
    const char *file, *section;
    const json_t *obj;
    int rc;
} reader;

static void fail_key(reader *r, const char *key, const char *what) {
    if (r->rc == 0) r->rc = qvl__fail(QVL_EFORMAT, "%s: %s%s%s %s", r->file, r->section, *r->section ? "." : "", key, what);
}

static int64_t int_of(reader *r, const char *key, int64_t min, int64_t max, const int64_t *dflt) {
    const json_t *v = json_object_get(r->obj, key);
    if (!v || json_is_null(v)) {
        if (dflt) return *dflt;
        fail_key(r, key, "is missing");
        return min;
    }
    double real = json_is_real(v) ? json_real_value(v) : 0;
    int64_t n = json_is_integer(v) ? json_integer_value(v) : 0;
    if (json_is_real(v) && real == floor(real) && fabs(real) < 9e15) n = (int64_t)real;
    else if (!json_is_integer(v)) {
        fail_key(r, key, "is not an integer");
        return min;
    }
    if (n < min || n > max) {
        char text[96];
        snprintf(text, sizeof text, "is %lld, expected %lld to %lld", (long long)n, (long long)min, (long long)max);
        fail_key(r, key, text);
        return min;
    }
    return n;
}

static int need_int(reader *r, const char *key, int min, int max) { return (int)int_of(r, key, min, max, NULL); }

static int int_or(reader *r, const char *key, int min, int max, int dflt) {
    int64_t d = dflt;
    return (int)int_of(r, key, min, max, &d);
}

static double float_or(reader *r, const char *key, double min, double max, double dflt) {
    const json_t *v = json_object_get(r->obj, key);
    if (!v || json_is_null(v)) return dflt;
    double f = json_number_value(v);
    if (!json_is_number(v) || !(f >= min && f <= max)) {
        char text[96];
        snprintf(text, sizeof text, "is not a number from %g to %g", min, max);
        fail_key(r, key, text);
        return dflt;
    }
    return f;
}

/* Refuses a key whose value is there and is not the one we compute. */
static void only_string(reader *r, const char *key, const char *expected) {
    const json_t *v = json_object_get(r->obj, key);
    if (!v || json_is_null(v)) return;
    const char *s = json_string_value(v);
    if (r->rc == 0 && (!s || strcmp(s, expected) != 0))
        r->rc = qvl__fail(QVL_EUNSUPPORTED, "%s: %s.%s is \"%.80s\"; only \"%s\" is supported", r->file, r->section, key, s ? s : "(not a string)", expected);
}

static void only_int(reader *r, const char *key, int expected) {
    int n = int_or(r, key, INT_MIN, INT_MAX, expected);
    if (r->rc == 0 && n != expected)
        r->rc = qvl__fail(QVL_EUNSUPPORTED, "%s: %s.%s is %d; only %d is supported", r->file, r->section, key, n, expected);
}

static void only_false(reader *r, const char *key) {
    if (r->rc == 0 && json_is_true(json_object_get(r->obj, key)))
        r->rc = qvl__fail(QVL_EUNSUPPORTED, "%s: %s.%s is true; only false is supported", r->file, r->section, key);
}

static reader section(reader *top, const char *name) {
    const json_t *v = json_object_get(top->obj, name);
    if (!json_is_object(v)) fail_key(top, name, "is missing or not an object");
    return (reader){top->file, name, v, top->rc};
}

/* transformers modeling_rope_utils, _compute_yarn_parameters: "the attention factor as suggested in the paper". */
static double yarn_mscale(double factor, double mscale) { return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1; }

static int parse_yarn(reader *s, qvl__text_config *t) {
    const json_t *p = s->obj;
    if (!json_object_get(p, "original_max_position_embeddings") || json_is_null(json_object_get(p, "original_max_position_embeddings")))
        fail_key(s, "original_max_position_embeddings", "is missing: YaRN needs the length that the model was trained with");
    t->yarn.original = int_or(s, "original_max_position_embeddings", 1, 1 << 28, t->max_positions);
    t->yarn.factor = float_or(s, "factor", 1, 1024, (double)t->max_positions / t->yarn.original);
    t->yarn.beta_fast = float_or(s, "beta_fast", 0, 1e6, 32);
    t->yarn.beta_slow = float_or(s, "beta_slow", 0, 1e6, 1);
    if (t->yarn.beta_fast == 0) t->yarn.beta_fast = 32; /* as Python's "or" */
    if (t->yarn.beta_slow == 0) t->yarn.beta_slow = 1;
    const json_t *truncate = json_object_get(p, "truncate");
    t->yarn.truncate = !truncate || json_is_true(truncate);
    double mscale = float_or(s, "mscale", 0, 1e3, 0), all = float_or(s, "mscale_all_dim", 0, 1e3, 0);
    double own = mscale > 0 && all > 0 ? yarn_mscale(t->yarn.factor, mscale) / yarn_mscale(t->yarn.factor, all) : yarn_mscale(t->yarn.factor, 1);
    t->yarn.attention = float_or(s, "attention_factor", 1e-3, 1e3, own);
    return s->rc;
}

int qvl__config_set_yarn(qvl__text_config *t, double factor) {
    if (factor == 1) return 0;
    if (t->yarn.factor != 1)
        return qvl__fail(QVL_EINVAL, "option rope_yarn_factor: the checkpoint's config has YaRN already, with factor %g", t->yarn.factor);
    if (t->max_positions > (1 << 28) / factor)
        return qvl__fail(QVL_EINVAL, "option rope_yarn_factor: %g times %d positions are too many", factor, t->max_positions);
    t->yarn = (__typeof__(t->yarn)){factor, yarn_mscale(factor, 1), 32, 1, t->max_positions, true};
    t->max_positions = (int)(t->max_positions * factor);
    return 0;
}

static int parse_rope(reader *r, qvl__text_config *t) {
    /* published: rope_scaling {...} and rope_theta; transformers 5: rope_parameters {..., rope_theta} */
    const json_t *p = json_object_get(r->obj, "rope_parameters");
    const char *name = "text_config.rope_parameters";
    if (!json_is_object(p)) {
        p = json_object_get(r->obj, "rope_scaling");
        name = "text_config.rope_scaling";
    }
    if (!json_is_object(p)) {
        fail_key(r, "rope_scaling", "is missing or not an object");
        return r->rc;
    }
    reader s = {r->file, name, p, r->rc};
    const char *type = json_string_value(json_object_get(p, json_object_get(p, "rope_type") ? "rope_type" : "type"));
    bool yarn = type && strcmp(type, "yarn") == 0;
    if (s.rc == 0 && type && !yarn && strcmp(type, "default") != 0)
        s.rc = qvl__fail(QVL_EUNSUPPORTED, "%s: %s.rope_type is \"%.80s\"; only \"default\" and \"yarn\" are supported", r->file, name, type);
    t->yarn.factor = t->yarn.attention = 1;
    if (yarn) parse_yarn(&s, t);
    const json_t *inter = json_object_get(p, "mrope_interleaved");
    if (s.rc == 0 && inter && !json_is_true(inter))
        s.rc = qvl__fail(QVL_EUNSUPPORTED, "%s: %s.mrope_interleaved is not true; only interleaved M-RoPE is supported", r->file, name);
    const json_t *sec = json_object_get(p, "mrope_section");
    int sum = 0;
    if (!json_is_array(sec) || json_array_size(sec) != 3) fail_key(&s, "mrope_section", "is not a list of three integers");
    else
        for (int i = 0; i < 3; i++) {
            json_int_t n = json_integer_value(json_array_get(sec, (size_t)i));
            if (n < 0 || n > t->head_dim / 2) fail_key(&s, "mrope_section", "has an entry out of range");
            else sum += t->mrope_section[i] = (int)n;
        }
    if (s.rc == 0 && sum != t->head_dim / 2)
        s.rc = qvl__fail(QVL_EFORMAT, "%s: %s.mrope_section adds up to %d, expected head_dim / 2 = %d", r->file, name, sum, t->head_dim / 2);
    t->rope_theta = float_or(&s, "rope_theta", 1, 1e12, float_or(r, "rope_theta", 1, 1e12, 0));
    if (t->rope_theta == 0) fail_key(r, "rope_theta", "is missing");
    return s.rc ? s.rc : r->rc;
}

/* transformers Qwen3VLMoeTextDecoderLayer: layer i has experts unless mlp_only_layers names it or decoder_sparse_step
 * skips it. norm_topk_prob is not read: transformers normalises always. */
static int parse_experts(reader *r, qvl__text_config *t) {
    t->experts = need_int(r, "num_experts", 1, 4096);
    t->top_k = need_int(r, "num_experts_per_tok", 1, 256);
    t->expert_inter = need_int(r, "moe_intermediate_size", 1, 1 << 20);
    int step = int_or(r, "decoder_sparse_step", 1, 1024, 1);
    const json_t *plain = json_object_get(r->obj, "mlp_only_layers");
    if (r->rc) return r->rc;
    if (t->top_k > t->experts)
        return qvl__fail(QVL_EFORMAT, "%s: num_experts_per_tok %d is more than num_experts %d", r->file, t->top_k, t->experts);
    t->dense_layer = qvl__calloc((size_t)t->layers, 1);
    if (!t->dense_layer) return QVL_ENOMEM;
    for (int i = 0; i < t->layers; i++) t->dense_layer[i] = (i + 1) % step != 0;
    for (size_t i = 0; i < json_array_size(plain); i++) {
        json_int_t n = json_integer_value(json_array_get(plain, i));
        if (!json_is_integer(json_array_get(plain, i)) || n < 0 || n >= t->layers)
            return qvl__fail(QVL_EFORMAT, "%s: text_config.mlp_only_layers names a layer that is not there", r->file);
        t->dense_layer[n] = 1;
    }
    return 0;
}

static int parse_text(reader r, const reader *top, bool moe, qvl__text_config *t) {
    if (r.rc) return r.rc;
    only_string(&r, "model_type", moe ? "qwen3_vl_moe_text" : "qwen3_vl_text");
    only_string(&r, "hidden_act", "silu");
    only_false(&r, "attention_bias");
    t->vocab = need_int(&r, "vocab_size", 1, 1 << 22);
    t->hidden = need_int(&r, "hidden_size", 1, 1 << 17);
    t->layers = need_int(&r, "num_hidden_layers", 1, 1024);
    t->heads = need_int(&r, "num_attention_heads", 1, 1024);
    t->kv_heads = need_int(&r, "num_key_value_heads", 1, 1024);
    t->head_dim = int_or(&r, "head_dim", 2, 1024, 128); /* transformers' Qwen3VLTextConfig default */
    t->inter = need_int(&r, "intermediate_size", 1, 1 << 20);
    t->max_positions = need_int(&r, "max_position_embeddings", 1, 1 << 28);
    t->eps = (float)float_or(&r, "rms_norm_eps", 1e-12, 1, 1e-6);
    const json_t *tie = json_object_get(top->obj, "tie_word_embeddings");
    if (!tie) tie = json_object_get(r.obj, "tie_word_embeddings");
    t->tied = json_is_true(tie);
    if (r.rc) return r.rc;
    if (t->heads % t->kv_heads)
        return qvl__fail(QVL_EFORMAT, "%s: num_attention_heads %d is not a multiple of num_key_value_heads %d", r.file, t->heads, t->kv_heads);
    if (t->head_dim % 2) return qvl__fail(QVL_EFORMAT, "%s: text_config.head_dim %d is odd", r.file, t->head_dim);
    int rc = moe ? parse_experts(&r, t) : 0;
    return rc ? rc : parse_rope(&r, t);
}

static int parse_vision(reader r, const qvl__text_config *t, qvl__vision_config *v) {
    if (r.rc) return r.rc;
    const char *type = json_string_value(json_object_get(r.obj, "model_type"));
    if (type && strcmp(type, "qwen3_vl") != 0 && strcmp(type, "qwen3_vl_vision") != 0 && strcmp(type, "qwen3_vl_moe") != 0 &&
        strcmp(type, "qwen3_vl_moe_vision") != 0)
        return qvl__fail(QVL_EUNSUPPORTED, "%s: vision_config.model_type is \"%.80s\"; only \"qwen3_vl\" is supported", r.file, type);
    only_string(&r, "hidden_act", "gelu_pytorch_tanh");
    only_int(&r, "patch_size", 16);
    only_int(&r, "spatial_merge_size", 2);
    only_int(&r, "temporal_patch_size", 2);
    only_int(&r, "in_channels", 3);
    v->in_channels = 3;
    v->hidden = need_int(&r, "hidden_size", 1, 1 << 16);
    v->depth = need_int(&r, "depth", 1, 1024);
    v->heads = need_int(&r, "num_heads", 1, 1024);
    v->inter = need_int(&r, "intermediate_size", 1, 1 << 20);
    v->out_hidden = need_int(&r, "out_hidden_size", 1, 1 << 17);
    v->positions = need_int(&r, "num_position_embeddings", 1, 1 << 24);
    const json_t *deep = json_object_get(r.obj, "deepstack_visual_indexes");
    if (!json_is_array(deep) || json_array_size(deep) > QVL__MAX_DEEPSTACK) fail_key(&r, "deepstack_visual_indexes", "is not a short list of layers");
    else
        for (size_t i = 0; i < json_array_size(deep); i++) {
            const json_t *n = json_array_get(deep, i);
            if (!json_is_integer(n) || json_integer_value(n) < 0 || json_integer_value(n) >= v->depth ||
                (i && json_integer_value(n) <= v->deepstack[i - 1])) {
                fail_key(&r, "deepstack_visual_indexes", "is not a rising list of layers of the vision tower");
                break;
            }
            v->deepstack[v->n_deepstack++] = (int)json_integer_value(n);
        }
    if (r.rc) return r.rc;
    if (v->hidden % v->heads || v->hidden / v->heads % 4)
        return qvl__fail(QVL_EFORMAT, "%s: vision_config.hidden_size %d does not split into %d heads of a multiple of 4", r.file, v->hidden, v->heads);
    if (v->out_hidden != t->hidden)
        return qvl__fail(QVL_EFORMAT, "%s: vision_config.out_hidden_size %d is not text_config.hidden_size %d", r.file, v->out_hidden, t->hidden);
    if (v->n_deepstack > t->layers)
        return qvl__fail(QVL_EFORMAT, "%s: %d deepstack features for %d text layers", r.file, v->n_deepstack, t->layers);
    int side = (int)lround(sqrt(v->positions));
    if (side * side != v->positions)
        return qvl__fail(QVL_EFORMAT, "%s: vision_config.num_position_embeddings %d is not a square", r.file, v->positions);
    return 0;
}

/* What is quantised in a checkpoint; tensors tell which of them are. */
static int parse_fp8(qvl__config *c, const char *path, const json_t *q) {
    if (!q || json_is_null(q)) return 0;
    const char *method = json_string_value(json_object_get(q, "quant_method")), *fmt = json_string_value(json_object_get(q, "fmt"));
    const json_t *block = json_object_get(q, "weight_block_size");
    if (!method || strcmp(method, "fp8") != 0 || (fmt && strcmp(fmt, "e4m3") != 0) || json_array_size(block) != 2)
        return qvl__fail(QVL_EUNSUPPORTED, "%s: quantization_config: quant_method %.40s%s is not supported; FP8 (e4m3) with a weight_block_size is, and so is the BF16 original", path,
                         method ? method : "unnamed", method && strcmp(method, "fp8") == 0 ? " of this kind" : "");
    for (size_t i = 0; i < 2; i++) {
        const json_t *n = json_array_get(block, i);
        if (!json_is_integer(n) || json_integer_value(n) < 1 || json_integer_value(n) > 1 << 20)
            return qvl__fail(QVL_EFORMAT, "%s: quantization_config.weight_block_size is not two sizes", path);
        c->fp8_block[i] = (int)json_integer_value(n);
    }
    return 0;
}

static int parse_config(qvl__config *c, const char *path, const json_t *root) {
    reader top = {path, "", root, 0};
    if (!json_is_object(root)) return qvl__fail(QVL_EFORMAT, "%s: not a JSON object", path);
    const char *type = json_string_value(json_object_get(root, "model_type"));
    const char *arch = json_string_value(json_array_get(json_object_get(root, "architectures"), 0));
    if (!type) return qvl__fail(QVL_EFORMAT, "%s: model_type is missing", path);
    bool moe = strcmp(type, "qwen3_vl_moe") == 0;
    if ((!moe && strcmp(type, "qwen3_vl") != 0) ||
        (arch && strcmp(arch, moe ? "Qwen3VLMoeForConditionalGeneration" : "Qwen3VLForConditionalGeneration") != 0))
        return qvl__fail(QVL_EUNSUPPORTED, "%s: architecture %.80s (model_type %.80s) is not supported; this library runs Qwen3-VL "
                         "(Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration)", path, arch ? arch : "unnamed", type);
    snprintf(c->family, sizeof c->family, "%s", type);
    int rc = parse_fp8(c, path, json_object_get(root, "quantization_config"));
    if (rc == 0) rc = parse_text(section(&top, "text_config"), &top, moe, &c->text);
    if (rc == 0) rc = parse_vision(section(&top, "vision_config"), &c->text, &c->vision);
    if (rc) return rc;
    int last = c->text.vocab - 1;
    c->image_token = need_int(&top, "image_token_id", 0, last);
    c->video_token = need_int(&top, "video_token_id", 0, last);
    c->vision_start = need_int(&top, "vision_start_token_id", 0, last);
    c->vision_end = need_int(&top, "vision_end_token_id", 0, last);
    return top.rc;
}

/* One processor description: flat preprocessor_config.json, or an entry of processor_config.json. */
static int parse_processor(qvl__processor *p, const char *path, const char *sec, const json_t *obj, bool video) {
    reader r = {path, sec, obj, 0};
    only_int(&r, "patch_size", 16);
    only_int(&r, "merge_size", 2);
    only_int(&r, "temporal_patch_size", 2);
    const json_t *size = json_object_get(obj, "size");
    reader s = {path, "size", json_is_object(size) ? size : obj, r.rc};
    int64_t *min = video ? &p->video_min_pixels : &p->min_pixels, *max = video ? &p->video_max_pixels : &p->max_pixels;
    int64_t limit = (int64_t)1 << 40;
    *min = int_of(&s, json_object_get(s.obj, "shortest_edge") ? "shortest_edge" : "min_pixels", 1, limit, min);
    *max = int_of(&s, json_object_get(s.obj, "longest_edge") ? "longest_edge" : "max_pixels", 1, limit, max);
    r.rc = s.rc;
    if (!video)
        for (int k = 0; k < 2; k++) {
            const char *key = k ? "image_std" : "image_mean";
            const json_t *a = json_object_get(obj, key);
            if (!a) continue;
            for (int i = 0; i < 3; i++) {
                double f = json_number_value(json_array_get(a, (size_t)i));
                if (!json_is_number(json_array_get(a, (size_t)i)) || fabs(f) > 1e6 || (k && f <= 0)) fail_key(&r, key, "is not a list of three sensible numbers");
                (k ? p->std : p->mean)[i] = (float)f;
            }
        }
    else {
        p->min_frames = int_or(&r, "min_frames", 1, 1 << 20, p->min_frames);
        p->max_frames = int_or(&r, "max_frames", 1, 1 << 20, p->max_frames);
        p->fps = float_or(&r, "fps", 1e-6, 1e6, p->fps);
    }
    if (r.rc == 0 && *min > *max)
        return qvl__fail(QVL_EFORMAT, "%s: %s: smallest size %lld is above largest size %lld", path, sec, (long long)*min, (long long)*max);
    return r.rc;
}

static int load_processor_file(qvl__config *c, const char *dir, const char *file, bool video) {
    char path[PATH];
    if (join(path, dir, file) < 0) return QVL_EINVAL;
    if (!qvl__file_exists(path)) return 0; /* the defaults are Qwen3-VL's */
    json_t *root;
    int rc = qvl__json_file(&root, path);
    if (rc == 0) rc = parse_processor(&c->processor, path, "", root, video);
    json_decref(root);
    return rc;
}

static int load_processor(qvl__config *c, const char *dir) {
    c->processor = (qvl__processor){.patch = 16, .merge = 2, .temporal = 2,
        .min_pixels = 65536, .max_pixels = 16777216, .video_min_pixels = 4096, .video_max_pixels = 25165824,
        .min_frames = 4, .max_frames = 768, .fps = 2, .mean = {.5f, .5f, .5f}, .std = {.5f, .5f, .5f}};
    char path[PATH];
    if (join(path, dir, "processor_config.json") < 0) return QVL_EINVAL;
    int rc = 0;
    if (qvl__file_exists(path)) {
        json_t *root;
        rc = qvl__json_file(&root, path);
        const json_t *image = json_object_get(root, "image_processor"), *video = json_object_get(root, "video_processor");
        if (rc == 0 && image) rc = parse_processor(&c->processor, path, "image_processor", image, false);
        if (rc == 0 && video) rc = parse_processor(&c->processor, path, "video_processor", video, true);
        json_decref(root);
    }
    if (rc == 0) rc = load_processor_file(c, dir, "preprocessor_config.json", false);
    if (rc == 0) rc = load_processor_file(c, dir, "video_preprocessor_config.json", true);
    return rc;
}

static int load_generation(qvl__config *c, const char *dir, const json_t *config) {
    qvl__generation_config *g = &c->generation;
    *g = (qvl__generation_config){.temperature = 0, .top_p = 1, .repetition_penalty = 1};
    char path[PATH];
    if (join(path, dir, "generation_config.json") < 0) return QVL_EINVAL;
    json_t *root = NULL;
    int rc = 0;
    const json_t *eos = json_object_get(json_object_get(config, "text_config"), "eos_token_id");
    if (qvl__file_exists(path)) {
        rc = qvl__json_file(&root, path);
        if (rc) return rc;
        reader r = {path, "", root, 0};
        if (json_is_true(json_object_get(root, "do_sample"))) { /* otherwise greedy, as transformers' generate */
            g->temperature = float_or(&r, "temperature", 0, 100, 1);
            g->top_p = float_or(&r, "top_p", 0, 1, 1);
            g->top_k = int_or(&r, "top_k", 0, 1 << 20, 50); /* transformers' default */
        }
        g->repetition_penalty = float_or(&r, "repetition_penalty", 0.01, 100, 1);
        if (json_object_get(root, "eos_token_id")) eos = json_object_get(root, "eos_token_id");
        rc = r.rc;
    }
    for (size_t i = 0; rc == 0 && eos && i < (json_is_array(eos) ? json_array_size(eos) : 1); i++) {
        const json_t *e = json_is_array(eos) ? json_array_get(eos, i) : eos;
        if (json_is_null(e)) continue;
        if (!json_is_integer(e) || json_integer_value(e) < 0 || json_integer_value(e) >= c->text.vocab || g->n_eos == QVL__MAX_EOS)
            rc = qvl__fail(QVL_EFORMAT, "%s: eos_token_id is not a token of the vocabulary (or a list of at most %d)", path, QVL__MAX_EOS);
        else g->eos[g->n_eos++] = (int32_t)json_integer_value(e);
    }
    if (rc == 0 && g->n_eos == 0) qvl__log(QVL_LOG_WARN, "%s: no eos_token_id: answers end by length only", dir);
    json_decref(root);
    return rc;
}

/* chat_template.jinja, chat_template.json, or the key in tokenizer_config.json: the first that is there. */
static int load_template(qvl__config *c, const char *dir) {
    char path[PATH];
    size_t n;
    if (join(path, dir, "chat_template.jinja") < 0) return QVL_EINVAL;
    if (qvl__file_exists(path)) return qvl__read_file(path, 1 << 20, &c->chat_template, &n);
    static const char *const files[] = {"chat_template.json", "tokenizer_config.json"};
    for (int i = 0; i < 2; i++) {
        if (join(path, dir, files[i]) < 0) return QVL_EINVAL;
        if (!qvl__file_exists(path)) continue;
        json_t *root;
        int rc = qvl__json_file(&root, path);
        if (rc) return rc;
        const json_t *t = json_object_get(root, "chat_template");
        if (json_is_string(t)) {
            c->chat_template = qvl__strndup(json_string_value(t), json_string_length(t));
            if (!c->chat_template) rc = QVL_ENOMEM;
        }
        json_decref(root);
        if (rc || c->chat_template) return rc;
    }
    return 0;
}

int qvl__config_load(qvl__config *c, const char *dir) {
    *c = (qvl__config){0};
    char path[PATH];
    if (join(path, dir, "config.json") < 0) return QVL_EINVAL;
    json_t *root;
    int rc = qvl__json_file(&root, path);
    if (rc) return rc;
    rc = parse_config(c, path, root);
    if (rc == 0) rc = load_generation(c, dir, root);
    json_decref(root);
    if (rc == 0) rc = load_processor(c, dir);
    if (rc == 0) rc = load_template(c, dir);
    if (rc) qvl__config_free(c);
    return rc;
}

void qvl__config_free(qvl__config *c) {
    qvl__free(c->chat_template);
    qvl__free(c->text.dense_layer);
    c->chat_template = NULL;
    c->text.dense_layer = NULL;
}
