/* cuda_emu.h - CUDA C++ for the CPU: what kernels see.
 *
 * Job:        let unmodified kernel and host sources of libqvl/device/cuda be compiled by a C++ compiler and run here.
 * Input:      the toolkit's own headers for types, conversions and prototypes.
 * Output:     the names that port.cuh promises (QVL_LAUNCH, QVL_SHARED, qvl_mma_16816, ...), thread indices, barriers, warp
 *             collectives, atomics.
 * Invariants: each CUDA thread is a fiber; a block's threads run in random order, one at a time, from one barrier or
 *             collective to the next (core.cpp). Shared memory is NaN before anything is written, and so is the target
 *             of an asynchronous copy until the thread that asked for it has waited.
 */
#ifndef CUDA_EMU_H
#define CUDA_EMU_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace emu {

struct thread; /* a fiber */
extern thread *current;
extern uint3 thread_index, block_index;
extern dim3 block_dim, grid_dim;

/* What a warp does together; the last lane to come computes the results of all. */
enum op { SHUFFLE, SHUFFLE_XOR, SHUFFLE_DOWN, SHUFFLE_UP, BALLOT, SYNC_WARP, MMA, LDMATRIX, LDMATRIX_TRANS };
struct operands {
    uint32_t value, result; /* shuffles and votes */
    int lane, width;
    float *d; /* mma */
    const uint32_t *a, *b;
    uint32_t *r; /* ldmatrix */
    const void *row;
};
void collective(op what, unsigned mask, operands *o);
int barrier(int kind, int vote); /* kind 0: plain, 1: or, 2: and, 3: count */
void *shared();
void async_copy(void *shared, const void *global, bool valid);
void async_commit();
void async_wait(int left);

void launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t smem, cudaStream_t s, std::function<void()> body);

template <class K, class... A> static inline std::function<void()> bound(K k, A... a) {
    return [=] { k(a...); };
}

template <class T> static inline uint32_t bits(T x) {
    static_assert(sizeof(T) == 4, "shuffles move 32 bits");
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
template <class T> static inline T of_bits(uint32_t u) {
    T x;
    memcpy(&x, &u, 4);
    return x;
}
template <class T> static inline T shuffle(op what, unsigned mask, T x, int lane, int width) {
    operands o = {};
    o.value = bits(x), o.lane = lane, o.width = width;
    collective(what, mask, &o);
    return of_bits<T>(o.result);
}
static inline unsigned ballot(unsigned mask, int vote) {
    operands o = {};
    o.value = vote != 0;
    collective(BALLOT, mask, &o);
    return o.result;
}

} // namespace emu

#define threadIdx emu::thread_index
#define blockIdx emu::block_index
#define blockDim emu::block_dim
#define gridDim emu::grid_dim

#undef __launch_bounds__
#define __launch_bounds__(...)

#define QVL_LAUNCH(kernel, grid, block, smem, stream, ...) \
    emu::launch(#kernel, reinterpret_cast<const void *>(kernel), (grid), (block), (smem), (stream), emu::bound(kernel, __VA_ARGS__))
#define QVL_SHARED(type, name) type *name = static_cast<type *>(emu::shared())

#define __syncthreads() ((void)emu::barrier(0, 0))
#define __syncthreads_or(x) emu::barrier(1, (x) != 0)
#define __syncthreads_and(x) emu::barrier(2, (x) != 0)
#define __syncthreads_count(x) emu::barrier(3, (x) != 0)
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emu::operands o = {};
    emu::collective(emu::SYNC_WARP, mask, &o);
}
template <class T> static inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32) { return emu::shuffle(emu::SHUFFLE, mask, x, lane, width); }
template <class T> static inline T __shfl_xor_sync(unsigned mask, T x, int lane, int width = 32) { return emu::shuffle(emu::SHUFFLE_XOR, mask, x, lane, width); }
template <class T> static inline T __shfl_down_sync(unsigned mask, T x, int by, int width = 32) { return emu::shuffle(emu::SHUFFLE_DOWN, mask, x, by, width); }
template <class T> static inline T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) { return emu::shuffle(emu::SHUFFLE_UP, mask, x, by, width); }
static inline unsigned __ballot_sync(unsigned mask, int vote) { return emu::ballot(mask, vote); }
static inline int __any_sync(unsigned mask, int vote) { return emu::ballot(mask, vote) != 0; }
static inline int __all_sync(unsigned mask, int vote) { return emu::ballot(mask, vote) == mask; }

template <class T> static inline T atomicAdd(T *p, T x) {
    T old = *p;
    *p = old + x;
    return old;
}
static inline int atomicMax(int *p, int x) {
    int old = *p;
    *p = old > x ? old : x;
    return old;
}
template <class T> static inline T atomicExch(T *p, T x) {
    T old = *p;
    *p = x;
    return old;
}
template <class T> static inline T atomicCAS(T *p, T expected, T x) {
    T old = *p;
    if (old == expected) *p = x;
    return old;
}
static inline void __threadfence() {}

template <class T> static inline T __ldg(const T *p) { return *p; }
static inline float __uint_as_float(uint32_t u) { return emu::of_bits<float>(u); }
static inline uint32_t __float_as_uint(float x) { return emu::bits(x); }
static inline float __int_as_float(int u) { return emu::of_bits<float>((uint32_t)u); }
static inline int __float_as_int(float x) { return (int)emu::bits(x); }

static inline void qvl_mma_16816(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    emu::operands o = {};
    o.d = d, o.a = a, o.b = b;
    emu::collective(emu::MMA, 0xffffffffu, &o);
}
static inline void qvl_ldmatrix_x4(uint32_t r[4], const void *row) {
    emu::operands o = {};
    o.r = r, o.row = row;
    emu::collective(emu::LDMATRIX, 0xffffffffu, &o);
}
static inline void qvl_ldmatrix_x4_trans(uint32_t r[4], const void *row) {
    emu::operands o = {};
    o.r = r, o.row = row;
    emu::collective(emu::LDMATRIX_TRANS, 0xffffffffu, &o);
}
static inline void qvl_cp_async16(void *smem, const void *global, bool valid) { emu::async_copy(smem, global, valid); }
static inline void qvl_cp_async_commit() { emu::async_commit(); }
template <int N> static inline void qvl_cp_async_wait() { emu::async_wait(N); }

#endif
