/* test_prompt.c - prompts: tokens, M-RoPE positions, images and videos from media and from messages, bad input.
 *
 * Goldens: tests/golden/model/NAME (transformers 5.23), NAME = tiny-dense-tied, tiny-dense-untied, tiny-moe. All three
 * checkpoints have the same tokenizer, processor and special tokens. Of tiny-moe only the manifest and the CASE.position_ids
 * tensors are here (positions.safetensors).
 */
#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
/* cmocka.h needs the four above */
#include <cmocka.h>

#include "../../libqvl/encode/encode.h"

#define CHECKPOINT "tests/golden/checkpoints/tiny-dense-tied"
#define IMAGES "tests/golden/images/"
#define VIDEOS "tests/golden/videos/"

static qvl__config config;
static qvl_tokenizer *tokenizer;
static const uint8_t weights_id[32] = {1, 2, 3};

static qvl__encoder encoder(qvl__template t) {
    return (qvl__encoder){.config = &config, .tokenizer = tokenizer, .template_ = t, .weights_id = weights_id};
}

#define OK(call) \
    do { \
        int rc_ = (call); \
        if (rc_ < 0) fail_msg("%s: %s (%d)", #call, qvl_last_error(), rc_); \
    } while (0)

static int setup(void **state) {
    (void)state;
    if (qvl__config_load(&config, CHECKPOINT) == 0 && qvl__tokenizer_load(&tokenizer, CHECKPOINT) == 0) return 0;
    print_error("%s\n", qvl_last_error());
    return -1;
}
static int teardown(void **state) {
    (void)state;
    qvl__tokenizer_free(tokenizer);
    qvl__config_free(&config);
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------- helpers */

static char *path_of(const char *fmt, ...) {
    static char path[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(path, sizeof path, fmt, ap);
    va_end(ap);
    return path;
}

static qvl_image *image(const char *path) {
    qvl_image *im;
    OK(qvl_image_from_file(&im, path, NULL));
    return im;
}

/* A file as "data:image/png;base64,..." appended to b. */
static void add_uri(qvl__buf *b, const char *path) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *data;
    size_t n;
    OK(qvl__read_file(path, 1 << 24, &data, &n));
    qvl__buf_puts(b, "data:image/png;base64,");
    for (size_t i = 0; i < n; i += 3) {
        unsigned v = 0;
        for (size_t k = 0; k < 3; k++) v = v << 8 | (i + k < n ? (unsigned char)data[i + k] : 0);
        char q[4] = {digits[v >> 18], digits[v >> 12 & 63], '=', '='};
        if (i + 1 < n) q[2] = digits[v >> 6 & 63];
        if (i + 2 < n) q[3] = digits[v & 63];
        qvl__buf_add(b, q, 4);
    }
    qvl__free(data);
}

/* messages with one user turn of the given content: JSON in which ' stands for ". */
static char *user(const char *content) {
    qvl__buf b = {0};
    qvl__buf_printf(&b, "[{'role':'user','content':%s}]", content);
    for (char *p = b.data; *p; p++)
        if (*p == '\'') *p = '"';
    return b.data;
}

static int try_prompt(qvl_prompt **p, const char *content, const qvl_media *media, const qvl_options *o) {
    qvl__encoder e = encoder(QVL__TEMPLATE_INSTRUCT);
    char *messages = user(content);
    int rc = qvl__prompt_new(p, &e, messages, NULL, media, o);
    qvl__free(messages);
    return rc;
}
static qvl_prompt *prompt(const char *content, const qvl_media *media, const qvl_options *o) {
    qvl_prompt *p;
    OK(try_prompt(&p, content, media, o));
    return p;
}

static qvl_options *options(const char *name, const char *value) {
    qvl_options *o;
    OK(qvl_options_new(&o));
    OK(qvl_options_set(o, name, value));
    return o;
}

static void expect_same(const qvl_prompt *a, const qvl_prompt *b) {
    assert_true(a->n == b->n && a->n_visuals == b->n_visuals && a->n_runs == b->n_runs && a->rope_delta == b->rope_delta);
    assert_memory_equal(a->tokens, b->tokens, a->n * sizeof *a->tokens);
    assert_memory_equal(a->positions, b->positions, 3 * a->n * sizeof *a->positions);
    assert_string_equal(a->text, b->text);
    for (int i = 0; i < a->n_visuals; i++) assert_memory_equal(a->visuals[i]->hash, b->visuals[i]->hash, 32);
    for (int i = 0; i < a->n_runs; i++)
        assert_true(a->runs[i].start == b->runs[i].start && a->runs[i].offset == b->runs[i].offset);
}

/* What holds for every prompt: runs are the pad tokens, in order, and belong to their visuals. */
static void check_runs(const qvl_prompt *p) {
    size_t at = 0;
    for (int r = 0; r < p->n_runs; r++) {
        const qvl__run *run = &p->runs[r];
        const qvl__visual *v = p->visuals[run->visual];
        const int32_t pad = v->video ? config.video_token : config.image_token;
        assert_true(run->start >= at && run->tokens == v->tokens / v->t && run->offset % run->tokens == 0);
        for (; at < run->start; at++) assert_true(p->tokens[at] != config.image_token && p->tokens[at] != config.video_token);
        for (; at < run->start + (size_t)run->tokens; at++) assert_int_equal(p->tokens[at], pad);
        bool goes_on = r && run->visual == p->runs[r - 1].visual;
        assert_int_equal(run->offset, goes_on ? p->runs[r - 1].offset + run->tokens : 0);
    }
    for (; at < p->n; at++) assert_true(p->tokens[at] != config.image_token && p->tokens[at] != config.video_token);
    for (int i = 0; i < p->n_visuals; i++) {
        const qvl__visual *v = p->visuals[i];
        assert_int_equal(v->tokens * 4, v->t * v->h * v->w);
        assert_true((v->frames == NULL) == (v->embedding != NULL));
    }
}

/* --------------------------------------------------------------------------------------------------------- goldens */

static const struct {
    const char *name;
    int frames;
    double fps;
} videos[] = {{"v1", 8, 2}, {"v2", 5, 1}, {"v3", 4, 25}};

static void add_video(qvl_media *l, const char *name) {
    for (size_t i = 0; i < sizeof videos / sizeof *videos; i++) {
        if (strcmp(videos[i].name, name) != 0) continue;
        qvl_image *frames[8] = {0};
        for (int k = 0; k < videos[i].frames; k++) frames[k] = image(path_of(VIDEOS "%s/frame_%03d.png", name, k));
        OK(qvl_media_add_video(l, (const qvl_image *const *)frames, (size_t)videos[i].frames, videos[i].fps, 0));
        for (int k = 0; k < videos[i].frames; k++) qvl_image_free(frames[k]);
        return;
    }
    fail_msg("no video %s", name);
}

/* Takes the names out of the parts of messages and puts what they name into media. */
static void to_media(json_t *messages, qvl_media *l) {
    size_t i, k;
    json_t *m, *part;
    json_array_foreach(messages, i, m) {
        json_array_foreach(json_object_get(m, "content"), k, part) {
            const char *im = json_string_value(json_object_get(part, "image"));
            const char *video = json_string_value(json_object_get(part, "video"));
            if (im) {
                qvl_image *pixels = image(path_of(IMAGES "%s", im));
                OK(qvl_media_add_image(l, pixels));
                qvl_image_free(pixels);
                json_object_del(part, "image");
            } else if (video) {
                add_video(l, video);
                json_object_del(part, "video");
            }
        }
    }
}

static json_t *golden_header;
static char *golden_data;

static void open_goldens(const char *path) {
    size_t n;
    uint64_t header;
    OK(qvl__read_file(path, 1 << 26, &golden_data, &n));
    memcpy(&header, golden_data, 8);
    assert_true(8 + header <= n);
    OK(qvl__json_parse(&golden_header, golden_data + 8, header, path));
    memmove(golden_data, golden_data + 8 + header, n - 8 - header);
}
static void close_goldens(void) {
    json_decref(golden_header);
    qvl__free(golden_data);
}

static void check_grid(const qvl_prompt *p, const json_t *grids, bool video) {
    size_t k = 0;
    for (int i = 0; i < p->n_visuals; i++) {
        const qvl__visual *v = p->visuals[i];
        if (v->video != video) continue;
        const json_t *g = json_array_get(grids, k++);
        assert_int_equal(v->t, json_integer_value(json_array_get(g, 0)));
        assert_int_equal(v->h, json_integer_value(json_array_get(g, 1)));
        assert_int_equal(v->w, json_integer_value(json_array_get(g, 2)));
    }
    assert_true(k == json_array_size(grids));
}

static void golden_case(const char *model, const char *name, json_t *c, qvl__template t) {
    qvl_media *media;
    qvl_prompt *p;
    qvl_options *o = options("video_layout", json_is_true(json_object_get(c, "v5_video_layout")) ? "nested" : "published");
    qvl__encoder e = encoder(t);
    qvl__buf text = {0};
    char *rendered;
    OK(qvl_media_new(&media));
    to_media(json_object_get(c, "messages"), media);
    qvl__json_dump(&text, json_object_get(c, "messages"));
    if (qvl__prompt_new(&p, &e, text.data, NULL, media, o) < 0) fail_msg("%s %s: %s", model, name, qvl_last_error());
    OK(qvl__render_chat(t, text.data, NULL, o, &rendered));
    qvl_media_free(media);
    qvl__buf_free(&text);
    qvl_options_free(o);
    assert_string_equal(p->text, json_string_value(json_object_get(c, "prompt_text")));
    assert_string_equal(rendered, p->text);
    qvl_free(rendered);
    const json_t *ids = json_object_get(c, "input_ids");
    if (p->n != json_array_size(ids)) fail_msg("%s %s: %zu tokens, not %zu", model, name, p->n, json_array_size(ids));
    for (size_t i = 0; i < p->n; i++)
        if (p->tokens[i] != json_integer_value(json_array_get(ids, i))) fail_msg("%s %s: token %zu", model, name, i);
    assert_int_equal(p->rope_delta, json_integer_value(json_object_get(c, "rope_delta")));
    check_grid(p, json_object_get(c, "image_grid_thw"), false);
    check_grid(p, json_object_get(c, "video_grid_thw"), true);
    check_runs(p);
    const json_t *h = json_object_get(golden_header, path_of("%s.position_ids", name));
    if (h) {
        const char *want = golden_data + json_integer_value(json_array_get(json_object_get(h, "data_offsets"), 0));
        assert_string_equal(json_string_value(json_object_get(h, "dtype")), "I32");
        assert_int_equal(json_integer_value(json_array_get(json_object_get(h, "shape"), 1)), p->n);
        if (memcmp(want, p->positions, 3 * p->n * 4) != 0) fail_msg("%s %s: positions", model, name);
    } else {
        assert_int_equal(p->n_visuals, 0);
        for (size_t i = 0; i < 3 * p->n; i++) assert_int_equal(p->positions[i], i % p->n);
    }
    assert_true(qvl__prompt_free(p));
}

static void goldens(void **state) {
    (void)state;
    static const struct {
        const char *name, *tensors;
        qvl__template t;
    } models[] = {{"tiny-dense-tied", "goldens", QVL__TEMPLATE_INSTRUCT},
                  {"tiny-dense-untied", "goldens", QVL__TEMPLATE_THINKING},
                  {"tiny-moe", "positions", QVL__TEMPLATE_INSTRUCT}};
    int cases = 0;
    for (int i = 0; i < 3; i++) {
        json_t *manifest, *c;
        const char *name;
        OK(qvl__json_file(&manifest, path_of("tests/golden/model/%s/manifest.json", models[i].name)));
        open_goldens(path_of("tests/golden/model/%s/%s.safetensors", models[i].name, models[i].tensors));
        json_object_foreach(json_object_get(manifest, "cases"), name, c) {
            golden_case(models[i].name, name, c, models[i].t);
            cases++;
        }
        close_goldens();
        json_decref(manifest);
    }
    print_message("%d cases: tokens, positions, rope_delta and grids equal\n", cases);
    assert_int_equal(cases, 45);
}

/* ------------------------------------------------------------------------------------- the same image by other ways */

static void images_in_messages(void **state) {
    (void)state;
    qvl_media *media;
    qvl_image *im = image(IMAGES "rgba_160x120.png");
    OK(qvl_media_new(&media));
    OK(qvl_media_add_image(media, im));
    qvl_image_free(im);
    qvl_prompt *by_media = prompt("[{'type':'text','text':'a '},{'type':'image'},{'type':'text','text':' b'}]", media, NULL);
    check_runs(by_media);
    static const char *const forms[] = {
        "[{'type':'text','text':'a '},{'type':'image_url','image_url':{'url':'@','detail':'high'}},{'type':'text','text':' b'}]",
        "[{'type':'text','text':'a '},{'type':'image','image':'@'},{'text':' b'}]",
        "[{'text':'a '},{'image':'@'},{'text':' b'}]",
        "[{'text':'a '},{'image_url':'@','image':null},{'text':' b'}]",
        "'a ![alt text](@) b'"};
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        qvl__buf b = {0};
        const char *at = strchr(forms[i], '@');
        qvl__buf_add(&b, forms[i], (size_t)(at - forms[i]));
        add_uri(&b, IMAGES "rgba_160x120.png");
        qvl__buf_puts(&b, at + 1);
        qvl_prompt *p = prompt(b.data, NULL, NULL);
        expect_same(p, by_media);
        qvl__prompt_free(p);
        qvl__buf_free(&b);
    }
    qvl__prompt_free(by_media);
    qvl_media_free(media);
}

static void pixel_limits(void **state) {
    (void)state;
    qvl_media *media;
    qvl_image *im = image(IMAGES "photo_320x240.jpg");
    OK(qvl_media_new(&media));
    OK(qvl_media_add_image(media, im));
    qvl_image_free(im);
    const char *part = "[{'type':'image'}]";
    qvl_prompt *p = prompt(part, media, NULL);
    uint8_t hash[32];
    assert_true(p->visuals[0]->h == 16 && p->visuals[0]->w == 20);
    memcpy(hash, p->visuals[0]->hash, 32);
    qvl__prompt_free(p);
    qvl_options *o = options("min_pixels", "262144");
    p = prompt(part, media, o);
    assert_true(p->visuals[0]->h * p->visuals[0]->w * 256 >= 262144);
    assert_memory_not_equal(p->visuals[0]->hash, hash, 32);
    qvl__prompt_free(p);
    OK(qvl_options_set(o, "max_pixels", "20000"));
    assert_int_equal(try_prompt(&p, part, media, o), QVL_EINVAL); /* both set, minimum above maximum */
    assert_non_null(strstr(qvl_last_error(), "min_pixels is 262144, above max_pixels, which is 20000"));
    OK(qvl_options_set(o, "min_pixels", "0")); /* back to the checkpoint's */
    p = prompt(part, media, o);
    assert_true(p->visuals[0]->h * p->visuals[0]->w * 256 <= 20000);
    qvl__prompt_free(p);
    qvl_options_free(o);
    qvl_media_free(media);
}

/* --------------------------------------------------------------------------------------------------------- videos */

/* A video part with frames of v1 (96 x 64) in the message. */
static char *video_part(int frames, const char *more) {
    qvl__buf b = {0};
    qvl__buf_puts(&b, "[{'type':'video','video':[");
    for (int i = 0; i < frames; i++) {
        qvl__buf_puts(&b, i ? ",'" : "\"");
        add_uri(&b, path_of(VIDEOS "v1/frame_%03d.png", i % 8));
        qvl__buf_puts(&b, "\"");
    }
    qvl__buf_printf(&b, "]%s}]", more);
    return b.data;
}

static void expect_text_of(const qvl_prompt *p, const char *want) {
    char *text;
    size_t n, to = 0;
    OK(qvl_detokenize(tokenizer, p->tokens, p->n, 0, &text, &n));
    for (const char *from = text, *pad = "<|video_pad|>"; *from;) { /* one pad for each run */
        bool again = to >= strlen(pad) && memcmp(text + to - strlen(pad), pad, strlen(pad)) == 0;
        if (again && strncmp(from, pad, strlen(pad)) == 0) from += strlen(pad);
        else text[to++] = *from++;
    }
    text[to] = 0;
    assert_string_equal(text, want);
    qvl_free(text);
}

#define PAIR "<|vision_start|><|video_pad|><|vision_end|>"
#define BEFORE "<|im_start|>user\n"
#define AFTER "<|im_end|>\n<|im_start|>assistant\n"

static void videos_in_messages(void **state) {
    (void)state;
    /* 8 frames at 2 a second: all are used; the same as media */
    qvl_media *media;
    OK(qvl_media_new(&media));
    add_video(media, "v1");
    char *part = video_part(8, ",'fps':2.0");
    qvl_prompt *a = prompt(part, NULL, NULL), *b = prompt("[{'type':'video'}]", media, NULL);
    expect_same(a, b);
    check_runs(a);
    expect_text_of(a, BEFORE "<0.2 seconds>" PAIR "<1.2 seconds>" PAIR "<2.2 seconds>" PAIR "<3.2 seconds>" PAIR AFTER);
    qvl__prompt_free(a);
    qvl__prompt_free(b);
    /* the part's own keys win over media's */
    a = prompt("[{'type':'video','fps':4,'do_sample_frames':true}]", media, NULL);
    expect_text_of(a, BEFORE "<0.2 seconds>" PAIR "<1.5 seconds>" PAIR AFTER); /* 0 2 5 7 */
    assert_int_equal(a->visuals[0]->t, 2);
    qvl__prompt_free(a);
    qvl_media_free(media);
    qvl__free(part);
    /* 24 frames at 8 a second: 6 are looked at, 0 5 9 14 18 23 */
    part = video_part(24, ",'fps':8");
    a = prompt(part, NULL, NULL);
    expect_text_of(a, BEFORE "<0.3 seconds>" PAIR "<1.4 seconds>" PAIR "<2.6 seconds>" PAIR AFTER);
    check_runs(a);
    qvl__prompt_free(a);
    qvl__free(part);
    /* 3 frames as they are: the odd one pairs with itself; nested layout */
    part = video_part(3, ",'fps':1,'do_sample_frames':false");
    qvl_options *o = options("video_layout", "nested");
    a = prompt(part, NULL, o);
    expect_text_of(a, BEFORE "<|vision_start|><0.5 seconds>" PAIR "<2.0 seconds>" PAIR "<|vision_end|>" AFTER);
    const size_t frame = (size_t)a->visuals[0]->h * 16 * (size_t)a->visuals[0]->w * 16 * 3;
    assert_memory_equal(a->visuals[0]->frames + 2 * frame, a->visuals[0]->frames + 3 * frame, frame);
    assert_memory_not_equal(a->visuals[0]->frames + frame, a->visuals[0]->frames + 2 * frame, frame);
    qvl__prompt_free(a);
    /* a smaller video on request */
    OK(qvl_options_set(o, "video_max_pixels", "4096"));
    a = prompt(part, NULL, o);
    assert_true(a->visuals[0]->h == 2 && a->visuals[0]->w == 2);
    qvl__prompt_free(a);
    qvl_options_free(o);
    qvl__free(part);
    /* one frame, and an image of the same pixels: not the same visual */
    part = video_part(1, ",'fps':1");
    a = prompt(part, NULL, NULL);
    assert_true(a->visuals[0]->t == 1 && a->visuals[0]->video);
    qvl__prompt_free(a);
    qvl__free(part);
}

static void visual_identity(void **state) {
    (void)state;
    qvl_image *im, *other;
    uint8_t rgb[256 * 256 * 3];
    for (size_t i = 0; i < sizeof rgb; i++) rgb[i] = (uint8_t)(i * 7 ^ i >> 9);
    OK(qvl_image_from_pixels(&im, rgb, 256, 256, 0));
    rgb[1000] ^= 1;
    OK(qvl_image_from_pixels(&other, rgb, 256, 256, 0));
    qvl__visual *a, *b, *c, *v;
    OK(qvl__visual_from_image(&a, &config, im, (qvl__pixels){0}, NULL));
    OK(qvl__visual_from_image(&b, &config, im, (qvl__pixels){0}, NULL));
    OK(qvl__visual_from_image(&c, &config, other, (qvl__pixels){0}, NULL));
    assert_memory_equal(a->hash, b->hash, 32);
    assert_memory_not_equal(a->hash, c->hash, 32); /* one bit of one pixel */
    qvl__video build;
    OK(qvl__video_begin(&build, &config, 1, 256, 256, NULL));
    OK(qvl__video_add(&build, im, NULL));
    v = qvl__video_end(&build);
    assert_true(v->t == 1 && v->h == a->h && v->w == a->w);
    assert_memory_equal(v->frames, a->frames, sizeof rgb);
    assert_memory_not_equal(v->hash, a->hash, 32);
    assert_int_equal(a->tokens, 64);
    qvl__visual_free(a);
    qvl__visual_free(b);
    qvl__visual_free(c);
    qvl__visual_free(v);
    qvl__visual_free(NULL);
    qvl_image_free(im);
    qvl_image_free(other);
}

/* ------------------------------------------------------------------------------------------------------ embeddings */

static qvl_embedding *embedding(int h, int w) {
    qvl_embedding *e;
    OK(qvl__embedding_alloc(&e, 1 + config.vision.n_deepstack, h * w / 4, config.text.hidden));
    e->t = 1;
    e->h = h;
    e->w = w;
    e->video = false;
    memcpy(e->weights_id, weights_id, 32);
    memset(e->hash, 9, 32);
    return e;
}

static void embeddings_stand_for_images(void **state) {
    (void)state;
    qvl_media *media;
    qvl_embedding *e = embedding(16, 20);
    qvl_image *im = image(IMAGES "photo_320x240.jpg");
    OK(qvl_media_new(&media));
    OK(qvl_media_add_embedding(media, e));
    OK(qvl_media_add_image(media, im));
    const char *two = "[{'type':'image'},{'type':'image'}]";
    qvl_prompt *p = prompt(two, media, NULL);
    check_runs(p);
    assert_ptr_equal(p->visuals[0]->embedding, e);
    assert_memory_equal(p->visuals[0]->hash, e->hash, 32);
    assert_int_equal(p->runs[0].tokens, p->runs[1].tokens); /* the image has the same grid */
    qvl_embedding_free(e);
    qvl_media_free(media); /* the prompt keeps what it needs */
    assert_int_equal(p->visuals[0]->embedding->tokens, 80);
    qvl__prompt_free(p);
    qvl_image_free(im);
    /* whatever does not fit is refused */
    for (int k = 0; k < 8; k++) {
        e = embedding(16, 20);
        if (k == 0) e->weights_id[31] ^= 1;
        if (k == 1) e->video = true;
        if (k == 2) e->t = 2;
        if (k == 3) e->h = 18;
        if (k == 4) e->layers--;
        if (k == 5) e->hidden /= 2;
        if (k == 6) e->w = -20, e->h = -16;
        if (k == 7) e->h = 1, e->w = 320;
        OK(qvl_media_new(&media));
        OK(qvl_media_add_embedding(media, e));
        assert_int_equal(try_prompt(&p, "[{'type':'image'}]", media, NULL), QVL_EINVAL);
        assert_non_null(strstr(qvl_last_error(), "messages[0].content[0]: "));
        assert_non_null(strstr(qvl_last_error(), k == 0 ? "other weights" : k == 1 ? "made from a video" : "does not fit"));
        qvl_media_free(media);
        qvl_embedding_free(e);
    }
}

/* ------------------------------------------------------------------------------------------------------- bad input */

static void bad_prompts(void **state) {
    (void)state;
    static const struct {
        const char *content;
        int code;
        const char *error;
    } cases[] = {
        {"[{'type':'image'}]", QVL_EINVAL, "the messages have 1 image or video parts without data, media has 0 entries"},
        {"[{'type':'image'},{'type':'video'},{'type':'image'}]", QVL_EINVAL, "have 3 image or video parts"},
        {"[{'type':'image','image':'cat.png'}]", QVL_EUNSUPPORTED, "messages[0].content[0]: \"cat.png\" is not a data URI"},
        {"[{'text':'a'},{'type':'image','image':'file:///etc/passwd'}]", QVL_EUNSUPPORTED,
         "messages[0].content[1]: \"file:///etc/passwd\""},
        {"[{'type':'image_url','image_url':{'url':'http://host/a.png'}}]", QVL_EUNSUPPORTED,
         "are not opened; load the image yourself"},
        {"[{'type':'image_url','image_url':'https://host/a.png'}]", QVL_EUNSUPPORTED, "\"https://host/a.png\" is not a data URI"},
        {"[{'type':'image_url','image_url':{}}]", QVL_EINVAL, "messages[0].content[0]: image_url has no \"url\""},
        {"[{'type':'image_url','image_url':{'url':5}}]", QVL_EINVAL, "messages[0].content[0]: image_url.url must be a string"},
        {"[{'type':'image','image':[1]}]", QVL_EINVAL, "messages[0].content[0]: image must be a string"},
        {"[{'type':'image','image':''}]", QVL_EUNSUPPORTED, "messages[0].content[0]: \"\" is not a data URI"},
        {"[{'type':'image','image':'data:image/png;base64,AAAA'}]", 0, "messages[0].content[0]: "},
        {"[{'type':'image','image':'data:image/png;base64,?'}]", 0, "messages[0].content[0]: "},
        {"[{'type':'image','image':'data:,'}]", 0, "messages[0].content[0]: "},
        {"'x ![a](data:image/png;base64,iVBORw0KGgo=)'", 0, "messages[0].content: "},
        {"[{'type':'video','video':'clip.mp4'}]", QVL_EUNSUPPORTED, "messages[0].content[0]: video files are not decoded"},
        {"[{'type':'video','video':[]}]", QVL_EINVAL, "messages[0].content[0]: video must be an array of at least one data URI"},
        {"[{'type':'video','video':{}}]", QVL_EINVAL, "messages[0].content[0]: video must be an array"},
        {"[{'type':'video','video':['data:,',7],'fps':1}]", QVL_EINVAL, "messages[0].content[0]: video[1] must be a data URI"},
        {"[{'type':'video','video':['data:,']}]", QVL_EINVAL, "messages[0].content[0]: a video given as frames needs \"fps\""},
        {"[{'type':'video','video':['data:,'],'fps':0}]", QVL_EINVAL, "messages[0].content[0]: fps must be a number above 0"},
        {"[{'type':'video','video':['data:,'],'fps':-2.5}]", QVL_EINVAL, "fps must be"},
        {"[{'type':'video','video':['data:,'],'fps':'2'}]", QVL_EINVAL, "fps must be"},
        {"[{'type':'video','video':['data:,'],'fps':123456789012345678901234567890}]", QVL_EINVAL, "fps must be"},
        {"[{'type':'video','video':['data:,'],'fps':2,'do_sample_frames':1}]", QVL_EINVAL,
         "do_sample_frames must be true or false"},
        {"[{'type':'video','video':['data:,','data:,'],'fps':2}]", 0, "messages[0].content[0]: video[0]: "},
        {"[{'type':'video','video':['a.png'],'fps':2}]", QVL_EUNSUPPORTED,
         "messages[0].content[0]: video[0]: \"a.png\" is not a data URI"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        qvl_prompt *p;
        int rc = try_prompt(&p, cases[i].content, NULL, NULL);
        if (rc >= 0 || (cases[i].code && rc != cases[i].code)) fail_msg("%s: %d %s", cases[i].content, rc, qvl_last_error());
        if (!strstr(qvl_last_error(), cases[i].error))
            fail_msg("%s:\ngot  %s\nwant %s", cases[i].content, qvl_last_error(), cases[i].error);
        assert_null(p);
    }
    /* JSON itself */
    static const char *const json[] = {"", "[", "{\"role\":", "[\"\\ud800\"]", "[\"\xff\"]", "[] x"};
    for (size_t i = 0; i < sizeof json / sizeof *json; i++) {
        qvl__encoder e = encoder(QVL__TEMPLATE_THINKING);
        qvl_prompt *p;
        assert_int_equal(qvl__prompt_new(&p, &e, json[i], NULL, NULL, NULL), QVL_EFORMAT);
        assert_non_null(strstr(qvl_last_error(), "messages: line 1"));
        assert_int_equal(qvl__prompt_new(&p, &e, "[{\"role\":\"user\"}]", json[i], NULL, NULL), QVL_EFORMAT);
        assert_non_null(strstr(qvl_last_error(), "tools: line 1"));
    }
    /* nothing left to say */
    qvl_options *o = options("add_generation_prompt", "false");
    qvl__encoder e = encoder(QVL__TEMPLATE_INSTRUCT);
    qvl_prompt *p;
    assert_int_equal(qvl__prompt_new(&p, &e, "[{\"role\":\"developer\",\"content\":\"x\"}]", NULL, NULL, o), QVL_EINVAL);
    assert_non_null(strstr(qvl_last_error(), "empty"));
    qvl_options_free(o);
}

static void media_must_match(void **state) {
    (void)state;
    qvl_media *media;
    qvl_image *im = image(IMAGES "tiny_10x10.png");
    qvl_prompt *p;
    OK(qvl_media_new(&media));
    OK(qvl_media_add_image(media, im));
    add_video(media, "v3");
    static const struct {
        const char *content, *error;
    } cases[] = {
        {"'no parts'", "have 0 image or video parts without data, media has 2 entries"},
        {"[{'type':'image'}]", "have 1 image or video parts without data, media has 2 entries"},
        {"[{'type':'image'},{'type':'video'},{'type':'image'}]", "have 3 image or video parts without data, media has 2 entries"},
        {"[{'type':'video'},{'type':'image'}]", "messages[0].content[0]: the part is a video, but entry 0 of media is an image"},
        {"[{'type':'image'},{'text':'x'},{'type':'image'}]",
         "messages[0].content[2]: the part is an image, but entry 1 of media is a video"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(try_prompt(&p, cases[i].content, media, NULL), QVL_EINVAL);
        if (!strstr(qvl_last_error(), cases[i].error)) fail_msg("got  %s\nwant %s", qvl_last_error(), cases[i].error);
    }
    p = prompt("[{'type':'image'},{'type':'video'}]", media, NULL);
    check_runs(p);
    qvl__prompt_free(p);
    /* Instruct leaves an assistant's images out: they take no entry */
    qvl__encoder e = encoder(QVL__TEMPLATE_INSTRUCT);
    OK(qvl__prompt_new(&p, &e, "[{\"role\":\"assistant\",\"content\":[{\"type\":\"image\"}]},"
                               "{\"role\":\"user\",\"content\":[{\"type\":\"image\"},{\"type\":\"video\"}]}]", NULL, media, NULL));
    qvl__prompt_free(p);
    qvl_media_free(media);
    qvl_image_free(im);
    /* frames of two sizes */
    qvl__buf b = {0};
    qvl__buf_puts(&b, "[{'type':'video','fps':1,'do_sample_frames':false,'video':['");
    add_uri(&b, VIDEOS "v1/frame_000.png");
    qvl__buf_puts(&b, "','");
    add_uri(&b, VIDEOS "v1/frame_001.png");
    qvl__buf_puts(&b, "','");
    add_uri(&b, VIDEOS "v2/frame_000.png");
    qvl__buf_puts(&b, "']}]");
    assert_int_equal(try_prompt(&p, b.data, NULL, NULL), QVL_EINVAL);
    assert_non_null(strstr(qvl_last_error(), "messages[0].content[0]: video[2]: this frame is 64 x 80 pixels, "
                                             "the frames before it are 96 x 64"));
    qvl__buf_free(&b);
}

static void context_bounds_images(void **state) {
    (void)state;
    qvl__config small = config;
    qvl__encoder e = {.config = &small, .tokenizer = tokenizer, .template_ = QVL__TEMPLATE_INSTRUCT, .weights_id = weights_id};
    qvl_media *media;
    qvl_image *im = image(IMAGES "tiny_10x10.png"); /* 64 tokens */
    qvl_prompt *p;
    OK(qvl_media_new(&media));
    for (int i = 0; i < 3; i++) OK(qvl_media_add_image(media, im));
    char *messages = user("[{'type':'image'},{'type':'image'},{'type':'image'}]");
    small.text.max_positions = 128;
    assert_int_equal(qvl__prompt_new(&p, &e, messages, NULL, media, NULL), QVL_ECONTEXT);
    assert_non_null(strstr(qvl_last_error(), "messages[0].content[2]: images and videos up to here take 192 tokens, "
                                             "the model's context is 128"));
    small.text.max_positions = 192;
    OK(qvl__prompt_new(&p, &e, messages, NULL, media, NULL));
    qvl__prompt_free(p);
    /* a checkpoint whose parts disagree */
    small.image_token = 4000;
    assert_int_equal(qvl__prompt_new(&p, &e, messages, NULL, media, NULL), QVL_EFORMAT);
    assert_non_null(strstr(qvl_last_error(), "disagree about <|image_pad|>"));
    small.image_token = config.image_token;
    small.text.vocab = 4070;
    assert_int_equal(qvl__prompt_new(&p, &e, messages, NULL, media, NULL), QVL_EFORMAT);
    assert_non_null(strstr(qvl_last_error(), "do not belong together"));
    qvl__free(messages);
    qvl_image_free(im);
    qvl_media_free(media);
}

static void pads_in_text_stay_text(void **state) {
    (void)state;
    qvl_media *media;
    qvl_image *im = image(IMAGES "tiny_10x10.png");
    OK(qvl_media_new(&media));
    OK(qvl_media_add_image(media, im));
    qvl_image_free(im);
    qvl_prompt *p = prompt("[{'text':'<|image_pad|><|vision_start|><|video_pad|>'},{'type':'image'},"
                           "{'text':'<|image_pad|><|im_end|>'}]", media, NULL);
    check_runs(p);
    int pads = 0, ends = 0;
    for (size_t i = 0; i < p->n; i++) {
        pads += p->tokens[i] == config.image_token || p->tokens[i] == config.video_token;
        ends += p->tokens[i] == qvl__token_id(tokenizer, "<|im_end|>");
    }
    assert_int_equal(pads, 64);
    assert_int_equal(ends, 1);
    qvl__prompt_free(p);
    qvl_media_free(media);
}

static void from_tokens(void **state) {
    (void)state;
    qvl__encoder e = encoder(QVL__TEMPLATE_INSTRUCT);
    const int32_t ids[] = {5, 0, 4095, 4071};
    qvl_prompt *p;
    OK(qvl__prompt_from_tokens(&p, &e, ids, 4));
    assert_true(p->n == 4 && p->rope_delta == 0 && p->n_visuals == 0 && p->n_runs == 0);
    assert_memory_equal(p->tokens, ids, sizeof ids);
    for (int i = 0; i < 12; i++) assert_int_equal(p->positions[i], i % 4);
    assert_string_equal(p->text, "");
    atomic_fetch_add(&p->refs, 1);
    assert_false(qvl__prompt_free(p));
    assert_true(qvl__prompt_free(p));
    const struct {
        int32_t id;
        const char *error;
    } bad[] = {{-1, "token 1 is -1, the model has tokens 0..4095"},
               {4096, "token 1 is 4096"},
               {4082, "token 1 is <|image_pad|>"},
               {4083, "token 1 is <|video_pad|>"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const int32_t two[] = {3, bad[i].id};
        assert_int_equal(qvl__prompt_from_tokens(&p, &e, two, 2), QVL_EINVAL);
        assert_non_null(strstr(qvl_last_error(), bad[i].error));
        assert_null(p);
    }
    assert_int_equal(qvl__prompt_from_tokens(&p, &e, ids, 0), QVL_EINVAL);
    assert_int_equal(qvl__prompt_from_tokens(&p, &e, NULL, 4), QVL_EINVAL);
}

static void media_arguments(void **state) {
    (void)state;
    qvl_media *l;
    qvl_image *im = image(IMAGES "one_1x1.png");
    const qvl_image *frames[2] = {im, NULL};
    OK(qvl_media_new(&l));
    assert_int_equal(qvl_media_new(NULL), QVL_EINVAL);
    assert_int_equal(qvl_media_add_image(l, NULL), QVL_EINVAL);
    assert_int_equal(qvl_media_add_image(NULL, im), QVL_EINVAL);
    assert_int_equal(qvl_media_add_embedding(l, NULL), QVL_EINVAL);
    assert_int_equal(qvl_media_add_video(l, frames, 0, 1, 0), QVL_EINVAL);
    assert_int_equal(qvl_media_add_video(l, NULL, 1, 1, 0), QVL_EINVAL);
    assert_int_equal(qvl_media_add_video(l, frames, 2, 1, 0), QVL_EINVAL);
    assert_non_null(strstr(qvl_last_error(), "frame 1 is NULL"));
    const double fps[] = {0, -1, 0.0 / 0.0, 1 / 0.0};
    for (int i = 0; i < 4; i++) assert_int_equal(qvl_media_add_video(l, frames, 1, fps[i], 0), QVL_EINVAL);
    assert_true(l->n == 0);
    for (int i = 0; i < 20; i++) OK(qvl_media_add_video(l, frames, 1, 1, 1));
    assert_true(l->n == 20);
    qvl_media_free(l);
    qvl_media_free(NULL);
    assert_int_equal(im->refs, 1);
    qvl_image_free(im);
}

/* ---------------------------------------------------------------------------------------------------- out of memory */

static int countdown = -1; /* -1: never fail */
static bool may_take(void) { return countdown < 0 || countdown-- > 0; }
static void *failing_malloc(void *ud, size_t n) { (void)ud; return may_take() ? malloc(n) : NULL; }
static void *failing_realloc(void *ud, void *p, size_t n) { (void)ud; return may_take() ? realloc(p, n) : NULL; }
static void plain_free(void *ud, void *p) { (void)ud; free(p); }

static void memory_may_run_out_anywhere(void **state) {
    (void)state;
    char *part = video_part(3, ",'fps':2");
    qvl__buf b = {0};
    qvl__buf_add(&b, part, strlen(part) - 1);
    qvl__buf_puts(&b, ",{'type':'image'},{'type':'text','text':'what?'}]");
    qvl__encoder e = encoder(QVL__TEMPLATE_THINKING);
    char *messages = user(b.data);
    qvl_media *media;
    qvl_image *im = image(IMAGES "tiny_10x10.png");
    int k = 0;
    for (;; k++) {
        qvl_prompt *p = NULL;
        countdown = k;
        int rc = qvl_media_new(&media);
        if (rc == 0) rc = qvl_media_add_image(media, im);
        if (rc == 0) rc = qvl__prompt_new(&p, &e, messages, NULL, media, NULL);
        countdown = -1;
        qvl_media_free(media);
        if (rc == 0) {
            check_runs(p);
            qvl__prompt_free(p);
            break;
        }
        assert_int_equal(rc, QVL_ENOMEM);
        assert_true(k < 5000);
    }
    print_message("%d allocations, each failed once\n", k);
    assert_true(k > 20);
    qvl_image_free(im);
    qvl__free(messages);
    qvl__free(part);
    qvl__buf_free(&b);
}

int main(void) {
    const qvl_allocator a = {sizeof a, NULL, failing_malloc, failing_realloc, plain_free};
    if (qvl_set_allocator(&a) < 0) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(goldens),
        cmocka_unit_test(images_in_messages),
        cmocka_unit_test(pixel_limits),
        cmocka_unit_test(videos_in_messages),
        cmocka_unit_test(visual_identity),
        cmocka_unit_test(embeddings_stand_for_images),
        cmocka_unit_test(bad_prompts),
        cmocka_unit_test(media_must_match),
        cmocka_unit_test(context_bounds_images),
        cmocka_unit_test(pads_in_text_stay_text),
        cmocka_unit_test(from_tokens),
        cmocka_unit_test(media_arguments),
        cmocka_unit_test(memory_may_run_out_anywhere),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
