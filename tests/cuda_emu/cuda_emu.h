/* cuda_emu.h - CUDA C++ for a machine without a GPU: what a kernel may use, in plain C++17.
 *
 * Job:        launches, thread indices, shared memory, barriers, warp collectives, atomics, tensor-core and
 *             asynchronous-copy wrappers, so that unmodified kernels and host code compile with g++ or clang++.
 * Input:      the CUDA toolkit's own headers (types, bf16/fp16/fp8 conversions, runtime prototypes).
 * Output:     kernels that run as fibers, see emu_core.cpp; README.md says what is modelled.
 * Invariants: names and argument orders are those of CUDA; the wrappers qvl_* are those of port.cuh;
 *             every collective carries its source position, so that a misuse can be named.
 */
#ifndef CUDA_EMU_H
#define CUDA_EMU_H

#ifndef __x86_64__
#error "the CUDA emulator switches fibers with x86-64 instructions: build it on an x86-64 machine"
#endif
#if !__has_include(<cuda_runtime.h>)
#error "CUDA headers not found. The emulator needs the toolkit's headers, no GPU and no driver: install cuda-cudart-dev, cuda-crt, libcublas-dev and libnccl-dev (Debian/Ubuntu packages of NVIDIA's repository, version 13) or unpack the wheels nvidia-cuda-runtime, nvidia-cuda-crt, nvidia-cublas and nvidia-nccl-cu13, and give their folder: make CUDA_HOME=..."
#endif

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <tuple>
#include <type_traits>
#include <utility>

#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

/* The toolkit defines these for its own compiler only; the first ones it spells as GNU attributes that g++ would ignore. */
#undef __shared__
#define __shared__ static_assert(false, "the emulator has dynamic shared memory only: QVL_SHARED");
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#pragma GCC visibility push(hidden)
extern "C" {
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
extern const int warpSize;
}

namespace qvl_emu {

/* ---- emu_core.cpp ---- */

struct Site { /* where in the source a collective stands */
    const char *file;
    int line;
};
#define QVL_EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class Vote { any, all, ballot, count, orr, andd };
enum class Shuffle { idx, up, down, xorr };

void *shared_memory();
int block_sync(Vote how, int value, Site at);
void warp_sync(unsigned mask, Site at);
unsigned warp_vote(unsigned mask, Vote how, int value, Site at);
uint32_t warp_shuffle(unsigned mask, Shuffle how, uint32_t value, int lane, int width, Site at);
unsigned active_mask();
void mma_16816(float *d, const uint32_t *a, const uint32_t *b, Site at);
void ldmatrix_x4(uint32_t *r, const void *row, bool transposed, Site at);
void cp_async16(void *shared, const void *global, bool valid);
void cp_async_commit();
void cp_async_wait(int newest);
void atomic_access(void *at, size_t bytes); /* before an atomic operation: checks, and lets others run */
void fence();

/* ---- emu_rt.cpp: a launch as a unit of work ---- */

struct Kernel {
    const char *name;
    const void *function;
    void (*invoke)(const void *args);
    void (*free_args)(void *args);
    void *args;
    size_t args_bytes;
};
void launch(const Kernel &k, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream);

template <class... P> struct Call { /* a kernel and its arguments, converted at the launch as CUDA does */
    void (*kernel)(P...);
    std::tuple<P...> args;
    static void invoke(const void *self) {
        const Call *c = static_cast<const Call *>(self);
        std::apply(c->kernel, c->args);
    }
    static void free(void *self) { delete static_cast<Call *>(self); }
};

template <class... P, class... A> void launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A &&...args) {
    static_assert((std::is_trivially_copyable_v<P> && ...), "kernel arguments are copied as bytes");
    auto *call = new Call<P...>{kernel, std::tuple<P...>(static_cast<P>(args)...)};
    launch(Kernel{name, reinterpret_cast<const void *>(kernel), Call<P...>::invoke, Call<P...>::free, call, sizeof *call}, grid, block, shared_bytes, stream);
}

#define QVL_EMU_PLAIN __attribute__((no_sanitize("thread"))) /* the checker learns of an atomic by atomic_access alone */
template <class T> QVL_EMU_PLAIN T atomic(T *at, T (*op)(T, T), T value) {
    atomic_access(at, sizeof(T));
    T old = *at;
    *at = op(old, value);
    return old;
}

template <class To, class From> To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

} // namespace qvl_emu

#define QVL_LAUNCH(kernel, grid, block, smem, stream, ...) qvl_emu::launch(#kernel, kernel, grid, block, smem, stream, ##__VA_ARGS__)
#define QVL_SHARED(type, name) type *name = static_cast<type *>(qvl_emu::shared_memory())

/* The runtime's overloads for kernels, which its header keeps for nvcc. */
template <class... P> inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attr, int value) {
    return ::cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), attr, value);
}
template <class... P> inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attr, void (*kernel)(P...)) {
    return ::cudaFuncGetAttributes(attr, reinterpret_cast<const void *>(kernel));
}

/* ---- barriers and warp collectives ---- */

inline void __syncthreads(QVL_EMU_HERE) { qvl_emu::block_sync(qvl_emu::Vote::any, 0, {file, line}); }
inline int __syncthreads_or(int v, QVL_EMU_HERE) { return qvl_emu::block_sync(qvl_emu::Vote::orr, v, {file, line}); }
inline int __syncthreads_and(int v, QVL_EMU_HERE) { return qvl_emu::block_sync(qvl_emu::Vote::andd, v, {file, line}); }
inline int __syncthreads_count(int v, QVL_EMU_HERE) { return qvl_emu::block_sync(qvl_emu::Vote::count, v, {file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, QVL_EMU_HERE) { qvl_emu::warp_sync(mask, {file, line}); }
inline unsigned __ballot_sync(unsigned mask, int v, QVL_EMU_HERE) { return qvl_emu::warp_vote(mask, qvl_emu::Vote::ballot, v, {file, line}); }
inline int __any_sync(unsigned mask, int v, QVL_EMU_HERE) { return (int)qvl_emu::warp_vote(mask, qvl_emu::Vote::any, v, {file, line}); }
inline int __all_sync(unsigned mask, int v, QVL_EMU_HERE) { return (int)qvl_emu::warp_vote(mask, qvl_emu::Vote::all, v, {file, line}); }
inline unsigned __activemask() { return qvl_emu::active_mask(); }

#define QVL_EMU_SHUFFLE(name, how, param)                                                                                            \
    template <class T> inline T name(unsigned mask, T v, param lane, int width = 32, QVL_EMU_HERE) {                                 \
        static_assert(sizeof(T) == 4, "shuffles of 32-bit values only");                                                             \
        return qvl_emu::bits<T>(qvl_emu::warp_shuffle(mask, how, qvl_emu::bits<uint32_t>(v), (int)lane, width, {file, line}));       \
    }
QVL_EMU_SHUFFLE(__shfl_sync, qvl_emu::Shuffle::idx, int)
QVL_EMU_SHUFFLE(__shfl_up_sync, qvl_emu::Shuffle::up, unsigned)
QVL_EMU_SHUFFLE(__shfl_down_sync, qvl_emu::Shuffle::down, unsigned)
QVL_EMU_SHUFFLE(__shfl_xor_sync, qvl_emu::Shuffle::xorr, int)

/* ---- tensor cores and asynchronous copies ---- */

inline void qvl_mma_16816(float d[4], const uint32_t a[4], const uint32_t b[2], QVL_EMU_HERE) { qvl_emu::mma_16816(d, a, b, {file, line}); }
inline void qvl_ldmatrix_x4(uint32_t r[4], const void *smem, QVL_EMU_HERE) { qvl_emu::ldmatrix_x4(r, smem, false, {file, line}); }
inline void qvl_ldmatrix_x4_trans(uint32_t r[4], const void *smem, QVL_EMU_HERE) { qvl_emu::ldmatrix_x4(r, smem, true, {file, line}); }
inline void qvl_cp_async16(void *smem, const void *global, bool valid) { qvl_emu::cp_async16(smem, global, valid); }
inline void qvl_cp_async_commit() { qvl_emu::cp_async_commit(); }
template <int N> inline void qvl_cp_async_wait() { qvl_emu::cp_async_wait(N); }

/* ---- atomics and fences ---- */

inline float atomicAdd(float *p, float v) { return qvl_emu::atomic<float>(p, [](float a, float b) { return a + b; }, v); }
inline int atomicAdd(int *p, int v) { return qvl_emu::atomic<int>(p, [](int a, int b) { return (int)((unsigned)a + (unsigned)b); }, v); }
inline unsigned long long atomicAdd(unsigned long long *p, unsigned long long v) {
    return qvl_emu::atomic<unsigned long long>(p, [](unsigned long long a, unsigned long long b) { return a + b; }, v);
}
inline unsigned atomicAdd(unsigned *p, unsigned v) { return qvl_emu::atomic<unsigned>(p, [](unsigned a, unsigned b) { return a + b; }, v); }
inline int atomicMax(int *p, int v) { return qvl_emu::atomic<int>(p, [](int a, int b) { return a > b ? a : b; }, v); }
inline int atomicMin(int *p, int v) { return qvl_emu::atomic<int>(p, [](int a, int b) { return a < b ? a : b; }, v); }
inline unsigned atomicMax(unsigned *p, unsigned v) { return qvl_emu::atomic<unsigned>(p, [](unsigned a, unsigned b) { return a > b ? a : b; }, v); }
inline unsigned atomicMin(unsigned *p, unsigned v) { return qvl_emu::atomic<unsigned>(p, [](unsigned a, unsigned b) { return a < b ? a : b; }, v); }
inline int atomicExch(int *p, int v) { return qvl_emu::atomic<int>(p, [](int, int b) { return b; }, v); }
inline unsigned atomicExch(unsigned *p, unsigned v) { return qvl_emu::atomic<unsigned>(p, [](unsigned, unsigned b) { return b; }, v); }
inline float atomicExch(float *p, float v) { return qvl_emu::atomic<float>(p, [](float, float b) { return b; }, v); }
template <class T> QVL_EMU_PLAIN inline T qvl_emu_cas(T *p, T expected, T v) {
    qvl_emu::atomic_access(p, sizeof(T));
    T old = *p;
    if (old == expected) *p = v;
    return old;
}
inline int atomicCAS(int *p, int expected, int v) { return qvl_emu_cas(p, expected, v); }
inline unsigned atomicCAS(unsigned *p, unsigned expected, unsigned v) { return qvl_emu_cas(p, expected, v); }
inline void __threadfence() { qvl_emu::fence(); }
inline void __threadfence_block() { qvl_emu::fence(); }

/* ---- arithmetic and bits ---- */

template <class T> inline T __ldg(const T *p) { return *p; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1u) << (31 - i);
    return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += (int)(int8_t)(a >> i) * (int8_t)(b >> i);
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 255u) * (b >> i & 255u);
    return c;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    uint64_t both = (uint64_t)y << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        unsigned sel = s >> 4 * i & 15u, byte = (unsigned)(both >> 8 * (sel & 7u)) & 255u;
        if (sel & 8u) byte = byte & 128u ? 255u : 0u; /* the sign, replicated */
        r |= byte << 8 * i;
    }
    return r;
}
inline float __int_as_float(int x) { return qvl_emu::bits<float>(x); }
inline int __float_as_int(float x) { return qvl_emu::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return qvl_emu::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return qvl_emu::bits<unsigned>(x); }
inline int __float2int_rn(float x) { return (int)lrintf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; } /* compiled with -ffp-contract=off */
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

#undef QVL_EMU_HERE
#undef QVL_EMU_SHUFFLE
#undef QVL_EMU_PLAIN
#pragma GCC visibility pop
#endif
