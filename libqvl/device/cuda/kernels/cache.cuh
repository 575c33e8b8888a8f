/* cache.cuh - the paged KV cache: layout, writing keys and values, reading them back.
 *
 * Job:        RMSNorm and rotation of q and k, k and v into the cache; vision's keys and values into blocks.
 * Input:      qkv rows.
 * Output:     q and k turned in place; blocks.
 * Invariants: a block is [layer][KV head] of K, then V: [32 tokens][head_dim] in the cache's type; I8: behind K and
 *             behind V a float scale for each token. A token's place is written by one warp, nothing else in the block
 *             is touched: old contents (NaN included) stay, and readers stop at a row's last key.
 */
#ifndef QVL__CACHE_CUH
#define QVL__CACHE_CUH

#include "layout.cuh"

#define CACHE_WARPS 4

/* Keys and values of one layer. table NULL: block b lies b-th. */
struct keys_of {
    int type, kv_heads, head_dim;
    char *data;          /* block 0, KV head 0 of the layer */
    size_t block, half;  /* bytes from one block to the next; of K (or V) of one block and head */
    const int32_t *table; /* [seqs][stride] */
    int stride;
};

__device__ __forceinline__ char *keys_at(const keys_of &c, int seq, int token, int head) {
    int b = token / QVL__KV_BLOCK;
    size_t block = c.table ? (size_t)c.table[(size_t)seq * c.stride + b] : (size_t)b;
    return c.data + block * c.block + (size_t)head * 2 * c.half;
}

__device__ __forceinline__ const float *scales_at(const keys_of &c, const char *half) {
    return (const float *)(half + (size_t)QVL__KV_BLOCK * c.head_dim);
}

/* A lane's part of one token's key or value: elements lane, lane + 32, ... of x, into place t of a block. Whole warps. */
__device__ __forceinline__ void cache_store(const keys_of &c, char *half, int t, const float *x, int lane) {
    int n = c.head_dim;
    size_t at = (size_t)t * n;
    if (c.type != QVL__I8) {
        for (int i = lane; i < n; i += 32) store_number(c.type, half, at + i, x[i]);
        return;
    }
    float max = 0;
    for (int i = lane; i < n; i += 32) max = fmaxf(max, fabsf(x[i])), max = x[i] != x[i] ? x[i] : max;
    for (int i = 16; i; i >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, max, i);
        max = other > max || other != other ? other : max;
    }
    float inverse = max > 0 ? 127.0f / max : 0.0f;
    for (int i = lane; i < n; i += 32) {
        float q = rintf(x[i] * inverse);
        ((int8_t *)half)[at + i] = (int8_t)(q > 127.0f ? 127 : q < -127.0f ? -127 : (int)q);
    }
    if (lane == 0) ((float *)scales_at(c, half))[t] = max / 127.0f;
}

/* Number i of place t. */
__device__ __forceinline__ float cache_at(const keys_of &c, const char *half, int t, int i) {
    size_t at = (size_t)t * c.head_dim + i;
    if (c.type == QVL__I8) return (float)((const int8_t *)half)[at] * scales_at(c, half)[t];
    return number_at(c.type, half, at);
}

/* Numbers i to i + 7 of place t; i and head_dim are multiples of 8, so that they begin on as many bytes. */
__device__ __forceinline__ void cache_eight(const keys_of &c, const char *half, int t, int i, float x[8]) {
    size_t at = (size_t)t * c.head_dim + i;
    if (c.type == QVL__I8) {
        uint2 q = *(const uint2 *)(half + at);
        float by = scales_at(c, half)[t];
        for (int j = 0; j < 8; j++) x[j] = (float)(int8_t)((j < 4 ? q.x : q.y) >> j % 4 * 8) * by;
    } else if (c.type == QVL__F8) {
        uint2 q = *(const uint2 *)(half + at);
        const uint32_t four[2] = {q.x, q.y};
        for (int j = 0; j < 8; j += 2) {
            float2 two = wide_e4m3x2((uint16_t)(four[j / 4] >> j % 4 * 8));
            x[j] = two.x, x[j + 1] = two.y;
        }
    } else if (c.type == QVL__F32) {
        float4 low = ((const float4 *)half)[at / 4], high = ((const float4 *)half)[at / 4 + 1];
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
        uint4 pairs = ((const uint4 *)half)[at / 8];
        const uint32_t two[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
        for (int j = 0; j < 8; j++) {
            uint16_t h = (uint16_t)(two[j / 2] >> j % 2 * 16);
            x[j] = c.type == QVL__BF16 ? wide_bf16(h) : __half2float(__ushort_as_half(h));
        }
    }
}

/* Block (row, ·): CACHE_WARPS heads of q, k or v, a warp each; from one row of qkv to the next it is ld. */
static __global__ void write_rows(float *qkv, size_t ld, int heads, const float *q_norm, const float *k_norm, float eps, const float *cos, const float *sin, keys_of c,
                           const int32_t *seq, const int32_t *pos) {
    int r = blockIdx.x, lane = threadIdx.x % 32, h = blockIdx.y * CACHE_WARPS + threadIdx.x / 32, n = c.head_dim, half = n / 2;
    if (h >= heads + 2 * c.kv_heads) return;
    float *x = qkv + (size_t)r * ld + (size_t)h * n;
    if (h < heads + c.kv_heads) {
        const float *w = h < heads ? q_norm : k_norm;
        float sum = 0;
        for (int i = lane; i < n; i += 32) sum = fmaf(x[i], x[i], sum);
        float inv = 1.0f / sqrtf(warp_sum(sum) / (float)n + eps);
        __syncwarp(); /* all have read what others write now */
        for (int i = lane; i < half; i += 32) {
            float a = x[i] * inv * w[i], b = x[i + half] * inv * w[i + half], cs = cos[(size_t)r * half + i], sn = sin[(size_t)r * half + i];
            x[i] = a * cs - b * sn;
            x[i + half] = b * cs + a * sn;
        }
        __syncwarp();
    }
    if (h < heads) return;
    int g = h - heads, p = pos[r];
    char *to = keys_at(c, seq[r], p, g % c.kv_heads);
    cache_store(c, g < c.kv_heads ? to : to + c.half, p % QVL__KV_BLOCK, x, lane);
}

/* Vision: tokens of a span of qkv (q, k, v of `heads` heads at the beginning of each ld) into blocks, c.kv_heads heads from head on. Block (32 tokens,
 * head): a warp for each token in turn. Places behind the span become zeros. */
static __global__ void pack_rows(const float *qkv, size_t ld, int span, int heads, int head, keys_of c) {
    int lane = threadIdx.x % 32, n = c.head_dim, g = blockIdx.y;
    char *to = c.data + (size_t)blockIdx.x * c.block + (size_t)g * 2 * c.half;
    for (int t = threadIdx.x / 32; t < QVL__KV_BLOCK; t += blockDim.x / 32) {
        int token = blockIdx.x * QVL__KV_BLOCK + t;
        const float *key = qkv + (size_t)token * ld + (size_t)(heads + head + g) * n;
        for (int i = lane; i < n; i += 32) {
            store_number(c.type, to, (size_t)t * n + i, token < span ? key[i] : 0.0f);
            store_number(c.type, to + c.half, (size_t)t * n + i, token < span ? key[(size_t)heads * n + i] : 0.0f);
        }
    }
}

#endif
