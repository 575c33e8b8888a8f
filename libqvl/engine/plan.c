/* plan.c - how much memory an engine takes, before it takes it.
 *
 * Job:        sizes from options, and the report of them.
 * Input:      a model, options.
 * Output:     qvl__plan; JSON.
 * Invariants: engine.c takes what the plan says and nothing else; sizes are products of checked numbers.
 */
#include <inttypes.h>
#include <string.h>

#include "engine.h"

#define OUT_ROWS 32      /* rows that may give logits beside one for each request: guesses, prompt_logprobs */
#define PICTURE_ROWS 1024 /* patches of small pictures that are encoded together */

static int plan_context(const qvl_model *m, const qvl_options *o) {
    int64_t asked = qvl__opt_i64(o, "max_context"), most = m->config.text.max_positions;
    if (asked > most)
        return qvl__fail(QVL_EINVAL, "option max_context: %" PRId64 " is more than the model's max_position_embeddings %" PRId64, asked, most);
    return (int)(asked ? asked : most < 8192 ? most : 8192);
}

/* On a device with memory of its own the bound is what is left there beside the workspaces. */
static int plan_blocks(const qvl__plan *p, const qvl_model *m, const qvl_options *o) {
    int64_t asked = qvl__opt_i64(o, "kv_blocks");
    if (asked) return (int)asked;
    int64_t one = qvl__blocks_for(p->max_context), all = one * p->max_requests, workspace = (int64_t)(p->text_bytes + p->vision_bytes);
    int64_t room = (int64_t)m->device->room(m->device), bytes = room ? room - workspace : (int64_t)1 << 30, bound = bytes / (int64_t)p->block_bytes;
    if (room && bound < one)
        return qvl__fail(QVL_ENOMEM, "the GPU has %" PRId64 " MiB left, %" PRId64 " MiB of them are workspace; one context of %d tokens needs %" PRId64 " MiB of KV cache: lower max_context, "
                         "use kv_dtype int8 or raise gpu_memory_utilization", room >> 20, workspace >> 20, p->max_context, one * (int64_t)p->block_bytes >> 20);
    int64_t n = all < bound ? all : bound;
    if (n < one) n = one;
    return n < INT32_MAX / QVL__KV_BLOCK ? (int)n : INT32_MAX / QVL__KV_BLOCK;
}

/* Patches of the largest picture: what a context can hold, and what the processor makes at most. */
static int plan_image_rows(const qvl__plan *p, const qvl_model *m, const qvl_options *o) {
    const qvl__processor *c = &m->config.processor;
    int64_t unit = c->merge * c->merge, patch = (int64_t)c->patch * c->patch, asked = qvl__opt_i64(o, "max_image_tokens");
    if (asked) return (int)(asked * unit);
    int64_t video = c->video_max_pixels / patch / c->temporal, image = c->max_pixels / patch, most = video > image ? video : image;
    most = most / unit * unit;
    int64_t context = p->max_context * unit;
    return (int)(context < most ? context : most);
}

int qvl__plan_make(qvl__plan *p, const qvl_model *m, const qvl_options *o) {
    const qvl__text_config *t = &m->config.text;
    *p = (qvl__plan){.max_requests = (int)qvl__opt_i64(o, "max_requests"), .max_batched = (int)qvl__opt_i64(o, "max_batched_tokens")};
    if ((p->max_context = plan_context(m, o)) < 0) return p->max_context;
    p->max_out = p->max_requests + OUT_ROWS;
    p->kv_type = m->kv_type;
    qvl__kv_type_of(qvl__opt_str(o, "kv_dtype"), &p->kv_type);
    int rc = m->device->kv_block_bytes(m->device, p->kv_type, t->layers, t->kv_heads, t->head_dim, &p->block_bytes);
    if (rc) return rc;
    p->table_stride = qvl__blocks_for(p->max_context);
    p->image_rows = plan_image_rows(p, m, o);
    p->batch_rows = p->image_rows > PICTURE_ROWS ? p->image_rows : PICTURE_ROWS;
    p->text_bytes = qvl__text_ws_bytes(m, p->max_batched, p->max_out, p->max_requests, p->table_stride);
    p->vision_bytes = qvl__tower_bytes(m, p->batch_rows, p->max_requests);
    p->kv_blocks = plan_blocks(p, m, o);
    return p->kv_blocks < 0 ? p->kv_blocks : 0;
}

int qvl_engine_plan(const qvl_model *m, const qvl_options *o, char **json) {
    if (!m || !json) return qvl__fail(QVL_EINVAL, "qvl_engine_plan: model or json is NULL");
    *json = NULL;
    qvl__plan p;
    int rc = qvl__plan_make(&p, m, o);
    if (rc) return rc;
    uint64_t kv = (uint64_t)p.block_bytes * (uint64_t)p.kv_blocks;
    qvl__buf b = {0};
    qvl__buf_printf(&b, "{\"weights\": %" PRIu64 ", \"kv\": %" PRIu64 ", \"workspace\": %zu, \"vision\": %zu, \"total\": %" PRIu64 ", ", m->weights.bytes, kv,
                    p.text_bytes, p.vision_bytes, m->weights.bytes + kv + p.text_bytes + p.vision_bytes);
    qvl__buf_printf(&b, "\"kv_blocks\": %d, \"kv_block_tokens\": %d, \"kv_block_bytes\": %zu, \"kv_dtype\": \"%s\", \"max_requests\": %d, \"max_context\": %d, "
                    "\"max_batched_tokens\": %d, \"max_image_tokens\": %d}", p.kv_blocks, QVL__KV_BLOCK, p.block_bytes, qvl__type_name(p.kv_type), p.max_requests,
                    p.max_context, p.max_batched, p.image_rows / (m->config.processor.merge * m->config.processor.merge));
    if (b.failed) {
        qvl__buf_free(&b);
        return QVL_ENOMEM;
    }
    *json = b.data;
    return 0;
}
