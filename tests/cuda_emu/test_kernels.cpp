/* test_kernels.cpp - kernels with planted faults and the same kernels without them; the models of instructions.
 *
 * Job:        cases for the checks of emu_core.cpp and emu_check.cpp.
 * Input:      planted: whether the fault is in.
 * Output:     kernel_cases.
 * Invariants: the right version passes in every order; a fault is the only difference.
 */
#include <stdio.h>
#include <algorithm>

#include "test_emu.h"

namespace {

constexpr unsigned all = 0xffffffffu;

__global__ void reverse(float *y, const float *x, bool planted) {
    QVL_SHARED(float, s);
    s[threadIdx.x] = x[threadIdx.x];
    if (!planted) __syncthreads();
    y[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
template <class... P> int run_reverse(void (*kernel)(P...), bool planted, unsigned n = 128, size_t extra = 0) {
    Array<float> x(counting(n)), y(n);
    QVL_LAUNCH(kernel, dim3(1), dim3(n), n * 4 + extra, 0, y.p, x.p, planted);
    OK(cudaGetLastError());
    std::vector<float> want = counting(n);
    std::reverse(want.begin(), want.end());
    return same(y.get(), want);
}
int missing_syncthreads(bool planted) { return run_reverse(reverse, planted); }

__global__ void reverse_warp(float *y, const float *x, bool planted) {
    QVL_SHARED(float, s);
    s[threadIdx.x] = x[threadIdx.x];
    if (!planted) __syncwarp();
    y[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
int missing_syncwarp(bool planted) { return run_reverse(reverse_warp, planted, 32); }

__global__ void reverse_shuffle(float *y, const float *x, bool planted) {
    QVL_SHARED(float, s);
    s[threadIdx.x] = x[threadIdx.x];
    float same_value = __shfl_xor_sync(all, 1.0f, 1); /* orders no memory */
    if (!planted) __syncwarp();
    y[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x] * same_value;
}
int shuffle_for_barrier(bool planted) { return run_reverse(reverse_shuffle, planted, 32); }

__global__ void reverse_split(float *y, const float *x, bool planted) {
    QVL_SHARED(float, s);
    s[threadIdx.x] = x[threadIdx.x];
    if (planted && threadIdx.x < 64)
        __syncthreads();
    else
        __syncthreads();
    y[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
int divergent_barrier(bool planted) { return run_reverse(reverse_split, planted); }

__global__ void barrier_and_shuffle(float *y, const float *x, bool planted) {
    float v = x[threadIdx.x];
    if (!planted || threadIdx.x < 16) v = __shfl_xor_sync(all, v, 1);
    __syncthreads();
    y[threadIdx.x ^ 1] = v;
}
int divergent_shuffle(bool planted) {
    Array<float> x(counting(64)), y(64);
    QVL_LAUNCH(barrier_and_shuffle, dim3(1), dim3(64), 0, 0, y.p, x.p, planted);
    return same(y.get(), counting(64));
}

__global__ void shuffle_mask(float *y, const float *x, bool planted) {
    unsigned half = threadIdx.x < 16 ? 0xffffu : 0xffff0000u;
    y[threadIdx.x ^ 16] = __shfl_xor_sync(planted ? half : all, x[threadIdx.x], 16);
}
int wrong_mask(bool planted) {
    Array<float> x(counting(32)), y(32);
    QVL_LAUNCH(shuffle_mask, dim3(1), dim3(32), 0, 0, y.p, x.p, planted);
    return same(y.get(), counting(32));
}

__global__ void copy_to(float *y, const float *x, unsigned n) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i];
}
int global_overrun(bool planted) {
    Array<float> x(counting(101)), y(100);
    QVL_LAUNCH(copy_to, dim3(4), dim3(32), 0, 0, y.p, x.p, planted ? 101u : 100u);
    return same(y.get(), counting(100));
}

__global__ void next_of(float *y, const float *x, unsigned n, bool planted) {
    unsigned i = threadIdx.x;
    if (i < n) y[i] = x[planted ? i + 1 : i];
}
int off_by_one(bool planted) {
    Array<float> x(counting(100)), y(100);
    QVL_LAUNCH(next_of, dim3(1), dim3(128), 0, 0, y.p, x.p, 100u, planted);
    return same(y.get(), counting(100));
}

__global__ void reverse_overrun(float *y, const float *x, bool planted) {
    QVL_SHARED(float, s);
    s[threadIdx.x] = x[threadIdx.x];
    if (planted && threadIdx.x == 0) s[blockDim.x] = 1;
    __syncthreads();
    y[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
int shared_overrun(bool planted) { return run_reverse(reverse_overrun, planted); }

__global__ void reverse_never_written(float *y, const float *x, bool planted) {
    QVL_SHARED(float, s);
    if (!planted || threadIdx.x != 5) s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
int uninitialised_shared(bool planted) { return run_reverse(reverse_never_written, planted); }

__global__ void async_copy(float4 *y, const float4 *x, bool planted) {
    QVL_SHARED(float4, s);
    qvl_cp_async16(&s[threadIdx.x], &x[threadIdx.x], true);
    qvl_cp_async_commit();
    if (planted)
        qvl_cp_async_wait<1>();
    else
        qvl_cp_async_wait<0>();
    y[threadIdx.x] = s[threadIdx.x];
}
template <class F> int run_async(F kernel, bool planted, unsigned steps = 1) {
    std::vector<float> h = counting(64 * 4 * steps);
    Array<float> x(h), y(h.size());
    QVL_LAUNCH(kernel, dim3(1), dim3(64), 64 * 16, 0, (float4 *)y.p, (const float4 *)x.p, planted);
    return same(y.get(), h);
}
int async_before_wait(bool planted) { return run_async(async_copy, planted); }

__global__ void async_others(float4 *y, const float4 *x, bool planted) {
    QVL_SHARED(float4, s);
    unsigned t = threadIdx.x;
    qvl_cp_async16(&s[t], &x[t], true);
    qvl_cp_async_commit();
    qvl_cp_async_wait<0>(); /* each thread waits for its own copies only */
    if (!planted) __syncthreads();
    y[t ^ 32] = s[t ^ 32];
}
int async_without_barrier(bool planted) { return run_async(async_others, planted); }

__global__ void async_again(float4 *y, const float4 *x, bool planted) {
    QVL_SHARED(float4, s);
    unsigned t = threadIdx.x;
    for (int step = 0; step < 4; step++) {
        qvl_cp_async16(&s[t], &x[step * 64 + t], true);
        qvl_cp_async_commit();
        qvl_cp_async_wait<0>();
        __syncthreads();
        y[step * 64 + (t ^ 32)] = s[t ^ 32];
        if (!planted) __syncthreads(); /* before the next copy overwrites it */
    }
}
int async_closing_barrier(bool planted) { return run_async(async_again, planted, 4); }

__global__ void count_up(int *n, bool planted) {
    if (planted)
        *n += 1;
    else
        atomicAdd(n, 1);
}
int lost_update(bool planted) {
    Array<int> n(std::vector<int>{0});
    QVL_LAUNCH(count_up, dim3(8), dim3(64), 0, 0, n.p, planted);
    return n.get()[0] == 512 ? right : wrong;
}

__global__ void load_wide(float *y, const float *x, bool planted) {
    float4 v = *reinterpret_cast<const float4 *>(x + (planted ? 1 : 4));
    float first = planted ? 1.0f : 4.0f;
    *y = v.x - first + v.w - first;
}
int misaligned(bool planted) {
    Array<float> x(counting(16)), y(1);
    QVL_LAUNCH(load_wide, dim3(1), dim3(1), 0, 0, y.p, x.p, planted);
    return same(y.get(), {3.0f});
}

int host_pointer(bool planted) {
    std::vector<float> h = counting(64);
    Array<float> x(h), y(64);
    QVL_LAUNCH(copy_to, dim3(1), dim3(64), 0, 0, y.p, planted ? h.data() : x.p, 64u);
    return same(y.get(), h);
}

int wrong_device(bool planted) {
    Array<float> x(counting(64));
    OK(cudaSetDevice(planted ? 1 : 0));
    Array<float> y(64);
    QVL_LAUNCH(copy_to, dim3(1), dim3(64), 0, 0, y.p, x.p, 64u);
    return same(y.get(), counting(64));
}

__global__ void block_race(float *y, const float *x, bool planted) {
    unsigned i = planted ? threadIdx.x : blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[threadIdx.x] + (float)(planted ? 0 : blockIdx.x * 32);
}
int two_blocks_one_place(bool planted) { /* all write the same numbers: right today */
    Array<float> x(counting(32)), y(counting(64));
    QVL_LAUNCH(block_race, dim3(2), dim3(32), 0, 0, y.p, x.p, planted);
    return same(y.get(), counting(64));
}

/* d = a b for a 16 x 16 and b 16 x 8 through ldmatrix; b is given row-major and comes in transposed, or column-major. */
__global__ void product(float *d, const __nv_bfloat16 *a, const __nv_bfloat16 *b, bool b_turned, bool planted) {
    QVL_SHARED(__nv_bfloat16, s);
    unsigned l = threadIdx.x;
    for (unsigned i = l; i < 256; i += 32) s[i] = a[i];
    for (unsigned i = l; i < 256; i += 32) s[256 + i] = i < 128 ? b[i] : __float2bfloat16_rn(0);
    __syncwarp();
    uint32_t fa[4], fb[4];
    float sum[4] = {};
    qvl_ldmatrix_x4(fa, &s[(l % 8 + l / 8 % 2 * 8) * 16 + l / 16 * 8]);
    if (b_turned) /* b[k][n], 8 wide: matrices k 0-7 and k 8-15, transposed; the other two are zeros */
        qvl_ldmatrix_x4_trans(fb, &s[256 + l * 8]);
    else /* b[n][k], 16 wide: the halves of k are beside each other */
        qvl_ldmatrix_x4(fb, &s[256 + l % 8 * 16 + l / 8 % 2 * 8 + l / 16 * 128]);
    if (planted && l >= 16) return;
    qvl_mma_16816(sum, fa, fb);
    for (unsigned i = 0; i < 4; i++) d[(l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2] = sum[i];
}
int mma_with_half_a_warp(bool planted) {
    for (int turned = 0; turned < 2; turned++) {
        std::vector<__nv_bfloat16> a(256), b(128);
        std::vector<float> want(128);
        auto value = [](int i, int j) { return (float)((i * 7 + j * 5) % 11 - 5) * 0.25f; };
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 16; k++) a[(size_t)(i * 16 + k)] = __float2bfloat16_rn(value(i, k));
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) b[(size_t)(turned ? k * 8 + n : n * 16 + k)] = __float2bfloat16_rn(value(n + 3, k + 1));
        for (int i = 0; i < 16; i++)
            for (int n = 0; n < 8; n++)
                for (int k = 0; k < 16; k++) want[(size_t)(i * 8 + n)] += value(i, k) * value(n + 3, k + 1);
        Array<__nv_bfloat16> da(a), db(b);
        Array<float> d(128);
        QVL_LAUNCH(product, dim3(1), dim3(32), 1024, 0, d.p, da.p, db.p, turned != 0, planted);
        if (same(d.get(), want)) return wrong; /* quarters: exact in every order */
    }
    return right;
}

/* ---- what needs no planted fault ---- */

template <int WIDTH> __global__ void intrinsics(int *bad) {
    int t = (int)threadIdx.x, lane = t % 32, start = lane & ~(WIDTH - 1);
    auto expect = [&](bool right_value, int number) {
        if (!right_value) atomicExch(bad, number);
    };
    expect(__shfl_sync(all, t, 3, WIDTH) == t / 32 * 32 + start + 3 % WIDTH, 1);
    int up = lane - 1 < start ? lane : lane - 1, down = lane + 2 > start + WIDTH - 1 ? lane : lane + 2;
    expect(__shfl_up_sync(all, lane, 1, WIDTH) == up, 2);
    expect(__shfl_down_sync(all, lane, 2, WIDTH) == down, 3);
    expect(__shfl_xor_sync(all, (float)lane, 1, WIDTH) == (float)(lane ^ 1), 4);
    expect(__ballot_sync(all, lane % 3 == 0) == 0x49249249u, 5);
    expect(__any_sync(all, lane == 7) && !__any_sync(all, 0) && __all_sync(all, 1) && !__all_sync(all, lane), 6);
    expect(__syncthreads_or(t == 40) == 1 && __syncthreads_and(t != 40) == 0 && __syncthreads_count(t < 50) == 50, 7);
    expect(__syncthreads_or(0) == 0 && __syncthreads_and(1) == 1, 8);
    if (lane < 8) expect(__shfl_xor_sync(0xffu, lane, 4) == (lane ^ 4), 9);
    expect((__activemask() >> lane & 1u) == 1u, 10);
    expect(__popc(0xf0f0u) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __ffs(0) == 0 && __brev(1u) == 0x80000000u, 11);
    expect(__umulhi(0x80000000u, 6u) == 3u && __dp4a(0x01ff0203, 0x01020304, 10) == 10 + 1 - 2 + 6 + 12 && __byte_perm(0x33221100u, 0x77665544u, 0x7410u) == 0x77441100u, 12);
    expect(__float2int_rn(2.5f) == 2 && __float2int_rn(3.5f) == 4 && __int_as_float(0x3f800000) == 1.0f && __float_as_uint(-0.0f) == 0x80000000u, 13);
    expect(blockDim.x == 64 && gridDim.y == 3 && warpSize == 32 && blockIdx.x < 2 && blockIdx.y < 3, 14);
    expect(min(3, 5) == 3 && max(3u, 5u) == 5u && fmaxf(1, 2) == 2, 15);
}
int intrinsics_case(bool) {
    Array<int> bad(std::vector<int>{0});
    QVL_LAUNCH((intrinsics<32>), dim3(2, 3), dim3(64), 0, 0, bad.p);
    QVL_LAUNCH((intrinsics<8>), dim3(2, 3), dim3(64), 0, 0, bad.p);
    int n = bad.get()[0];
    if (n) fprintf(stderr, "intrinsic %d\n", n);
    return n ? wrong : right;
}

__global__ void atomics(int *v, unsigned *u, float *f) {
    QVL_SHARED(int, s);
    if (threadIdx.x == 0) s[0] = 0;
    __syncthreads();
    int t = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(s, 1);
    atomicMax(&v[0], t);
    atomicMin(&v[1], t);
    atomicAdd(&u[0], 2u);
    atomicAdd(f, 0.5f);
    if (atomicCAS(&v[2], 0, t + 1) == 0) atomicExch(&v[3], t);
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(&v[4], s[0]);
}
int atomics_case(bool) {
    Array<int> v(std::vector<int>{-1, 1000, 0, -1, 0});
    Array<unsigned> u(std::vector<unsigned>{1});
    Array<float> f(std::vector<float>{0});
    QVL_LAUNCH(atomics, dim3(3), dim3(50), 4, 0, v.p, u.p, f.p);
    auto h = v.get();
    return h[0] == 149 && h[1] == 0 && h[2] == h[3] + 1 && h[4] == 150 && u.get()[0] == 301 && f.get()[0] == 75.0f ? right : wrong;
}

__global__ void early_exit(float *y, const float *x, unsigned n) { /* a barrier counts the threads that are left */
    if (threadIdx.x >= n) return;
    QVL_SHARED(float, s);
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[n - 1 - threadIdx.x];
}
int early_exit_case(bool) {
    Array<float> x(counting(100)), y(100);
    QVL_LAUNCH(early_exit, dim3(1), dim3(128), 400, 0, y.p, x.p, 100u);
    std::vector<float> want = counting(100);
    std::reverse(want.begin(), want.end());
    return same(y.get(), want);
}

__global__ void halves(__nv_bfloat16 *y, uint8_t *z) { /* neighbours write the two halves of a word, and bytes of a half */
    y[threadIdx.x] = __float2bfloat16_rn((float)threadIdx.x);
    z[threadIdx.x] = (uint8_t)threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = __float2bfloat16_rn(__bfloat162float(y[threadIdx.x]) + (float)z[63 - threadIdx.x]);
}
int halves_case(bool) {
    Array<__nv_bfloat16> y(64);
    Array<uint8_t> z(64);
    QVL_LAUNCH(halves, dim3(1), dim3(64), 0, 0, y.p, z.p);
    for (auto v : y.get())
        if (__bfloat162float(v) != 63.0f) return wrong;
    return right;
}

__global__ void zero_filled(float4 *y, const float4 *x) {
    QVL_SHARED(float4, s);
    qvl_cp_async16(&s[threadIdx.x], &x[threadIdx.x], threadIdx.x < 3);
    qvl_cp_async_commit();
    qvl_cp_async_wait<0>();
    y[threadIdx.x] = s[threadIdx.x];
}
int zero_filled_case(bool) {
    std::vector<float> want = counting(16);
    Array<float> x(counting(12)), y(16);
    std::fill(want.begin() + 12, want.end(), 0.0f);
    QVL_LAUNCH(zero_filled, dim3(1), dim3(4), 64, 0, (float4 *)y.p, (const float4 *)x.p);
    return same(y.get(), want);
}

} // namespace

const std::vector<Case> kernel_cases = {
    {"missing __syncthreads", missing_syncthreads, "race:|uninitialised:", nullptr, {"order", "named", "order"}},
    {"missing __syncwarp", missing_syncwarp, "race:|uninitialised:", nullptr, {"wrong", "named", "wrong"}},
    {"shuffle taken for a memory barrier", shuffle_for_barrier, "race:", nullptr, {"silent", "named", "silent"}},
    {"divergent __syncthreads", divergent_barrier, "divergent barrier", nullptr, {"named", "named", "named"}},
    {"full-mask shuffle in divergent code", divergent_shuffle, "divergence:", nullptr, {"named", "named", "named"}},
    {"wrong shuffle mask", wrong_mask, "the mask does not name", nullptr, {"named", "named", "named"}},
    {"write after the end of global memory", global_overrun, "out of bounds|AddressSanitizer", nullptr, {"named", "named", "named"}},
    {"index one too far", off_by_one, "out of bounds|AddressSanitizer", nullptr, {"wrong", "named", "named"}},
    {"write after the end of shared memory", shared_overrun, "out of bounds|AddressSanitizer", nullptr, {"named", "named", "named"}},
    {"shared word that nobody wrote", uninitialised_shared, "uninitialised:", nullptr, {"wrong", "named", "wrong"}},
    {"cp.async: read before the wait", async_before_wait, "not waited for", nullptr, {"wrong", "named", "wrong"}},
    {"cp.async: no barrier after the wait", async_without_barrier, "race:|not waited for|uninitialised:", nullptr, {"order", "named", "order"}},
    {"cp.async: no barrier before the next copy", async_closing_barrier, "race:|not waited for", nullptr, {"order", "named", "order"}},
    {"lost update", lost_update, "race:", nullptr, {"silent", "named", "silent"}},
    {"misaligned load", misaligned, "misaligned", nullptr, {"silent", "named", "named"}},
    {"kernel reads host memory", host_pointer, "host memory", nullptr, {"silent", "named", "silent"}},
    {"memory of another device", wrong_device, "device", nullptr, {"named", "named", "named"}},
    {"two blocks write one place", two_blocks_one_place, "race:", nullptr, {"silent", "named", "silent"}},
    {"mma with half a warp", mma_with_half_a_warp, "needs all 32 lanes", nullptr, {"named", "named", "named"}},
    {"intrinsics", intrinsics_case, nullptr, nullptr, {}},
    {"atomics", atomics_case, nullptr, nullptr, {}},
    {"threads that end early", early_exit_case, nullptr, nullptr, {}},
    {"halves and bytes of a word", halves_case, nullptr, nullptr, {}},
    {"cp.async: zero fill", zero_filled_case, nullptr, nullptr, {}},
};
