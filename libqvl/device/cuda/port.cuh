/* port.cuh - CUDA C++ as the kernels use it, spelled for nvcc or for the emulator (tests/cuda_emu).
 *
 * Job:        launches, shared memory, tensor-core and asynchronous-copy instructions, bf16 pairs.
 * Input:      QVL_CUDA_EMU: the emulator's header defines the same names in plain C++.
 * Output:     one text of every kernel for both.
 * Invariants: all inline PTX of the backend is here, each piece behind a function that the emulator models; on a GPU the op
 *             tests (make check-gpu) hold the kernels made of them to the reference; all shared memory is dynamic.
 */
#ifndef QVL__PORT_CUH
#define QVL__PORT_CUH

#include <stdint.h>

#ifdef QVL_CUDA_EMU
#include "cuda_emu.h"
#include <cuda_fp8.h>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#define QVL_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__)
#define QVL_SHARED(type, name)                                    \
    extern __shared__ __align__(16) unsigned char qvl_shared[]; \
    type *name = reinterpret_cast<type *>(qvl_shared)

/* d += a b for a 16 x 16 (row-major), b 16 x 8 (column-major), both bf16; PTX ISA 9.7.14, m16n8k16. */
__device__ __forceinline__ void qvl_mma_16816(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l gives the address of row l % 8 of matrix l / 8. */
__device__ __forceinline__ void qvl_ldmatrix_x4(uint32_t r[4], const void *smem) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(smem);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void qvl_ldmatrix_x4_trans(uint32_t r[4], const void *smem) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(smem);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

/* 16 bytes from global to shared memory, zeros when !valid; there after wait and a barrier. */
__device__ __forceinline__ void qvl_cp_async16(void *smem, const void *global, bool valid) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(smem);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void qvl_cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N> __device__ __forceinline__ void qvl_cp_async_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory"); }
#endif

typedef __nv_bfloat16 bf16;

/* Two bf16 in a register, a in the low half; rounded to nearest even. */
__device__ __forceinline__ uint32_t pack_bf16(float a, float b) {
    return (uint32_t)__bfloat16_as_ushort(__float2bfloat16_rn(a)) | (uint32_t)__bfloat16_as_ushort(__float2bfloat16_rn(b)) << 16;
}
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float wide_bf16(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }
/* E4M3. Before sm_89 by its exponent and mantissa as a float's, 120 powers of two too small. */
__device__ __forceinline__ float wide_e4m3(uint8_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    return __half2float(__ushort_as_half(__nv_cvt_fp8_to_halfraw(b, __NV_E4M3).x));
#else
    uint32_t size = b & 0x7fu, sign = (uint32_t)(b & 0x80u) << 24;
    float x = size == 0x7f ? __uint_as_float(0x7fc00000u) : __uint_as_float(size << 20) * 0x1p120f;
    return __uint_as_float(__float_as_uint(x) | sign);
#endif
}
/* Two neighbours. */
__device__ __forceinline__ float2 wide_e4m3x2(uint16_t two) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
    return make_float2(__half2float(__ushort_as_half(h.x)), __half2float(__ushort_as_half(h.y)));
#else
    return make_float2(wide_e4m3((uint8_t)two), wide_e4m3((uint8_t)(two >> 8)));
#endif
}
/* Rounded to nearest even; what is larger becomes 448. */
__device__ __forceinline__ uint8_t round_e4m3(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
/* x as a bf16 has it. */
__device__ __forceinline__ float round_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

/* 64 bits of another lane. */
__device__ __forceinline__ uint64_t join_halves(uint32_t low, uint32_t high) { return (uint64_t)high << 32 | low; }
__device__ __forceinline__ uint64_t shuffle(uint64_t x, int lane) {
    return join_halves(__shfl_sync(0xffffffffu, (uint32_t)x, lane), __shfl_sync(0xffffffffu, (uint32_t)(x >> 32), lane));
}
__device__ __forceinline__ uint64_t shuffle_xor(uint64_t x, int i) {
    return join_halves(__shfl_xor_sync(0xffffffffu, (uint32_t)x, i), __shfl_xor_sync(0xffffffffu, (uint32_t)(x >> 32), i));
}
__device__ __forceinline__ uint64_t shuffle_up(uint64_t x, int i) {
    return join_halves(__shfl_up_sync(0xffffffffu, (uint32_t)x, i), __shfl_up_sync(0xffffffffu, (uint32_t)(x >> 32), i));
}

/* Sum and maximum over the 32 lanes of a warp, the same in every lane and always added in the same order. */
__device__ __forceinline__ float warp_sum(float x) {
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int i = 16; i; i >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

#endif
