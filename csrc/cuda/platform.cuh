// CUDA for kernel sources that also run on a CPU; a .cu includes this first. Under nvcc: CUDA's headers, the launch, and
// the instructions that C++ has no name for, which is all the inline PTX there is. Under g++: tests/gpusim/cusim, which
// gives the same names.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace dev {

// Bytes of dynamic shared memory for which no limit has to be raised: a block gets 48 KB unasked, its static memory among them.
constexpr size_t kSharedUnasked = 32 * 1024;

constexpr unsigned kAllLanes = 0xFFFFFFFFu;  // of a warp: a mask

}  // namespace dev

#ifndef __CUDACC__
#include "cusim.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// LAUNCH((kernel<T>), grid, block, shared_bytes, stream, arguments...): shared_bytes of dynamic shared memory, which the
// kernel names by DYNAMIC_SHARED. Kernels are functions of a named namespace, and not static.
#define LAUNCH(...) ::dev::launch(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name)                                   \
  extern __shared__ __align__(128) unsigned char dynamic_shared_[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared_)

namespace dev {

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, const A&... arguments) {
  if (shared_bytes > kSharedUnasked) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
}

// What went wrong since the last question, or null.
inline const char* launch_error() {
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FASTGPT_SM75 1
#endif

// Copies kBytes (16 or 4) to shared memory, or writes zeros when !ok; both addresses are multiples of that, and one that is not
// ok is not read. Done when its group, closed by cp_commit, is waited for: cp_wait<n> leaves the last n groups under way.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool ok) {
  static_assert(kBytes == 16 || kBytes == 4, "");
#ifdef FASTGPT_SM75
  if constexpr (kBytes == 16)
    *static_cast<uint4*>(shared) = ok ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
  else
    *static_cast<uint32_t*>(shared) = ok ? *static_cast<const uint32_t*>(global) : 0;
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared)), read = ok ? kBytes : 0;
  if constexpr (kBytes == 16)  // past the first cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global), "r"(read) : "memory");
#endif
}
__device__ __forceinline__ void cp_commit() {
#ifndef FASTGPT_SM75
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
__device__ __forceinline__ void cp_wait() {
#ifndef FASTGPT_SM75
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// 2 to the x, subnormal numbers taken as 0.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The logarithm to base 2, of subnormal numbers taken as 0.
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four of the eight bytes of a (the lower four) and b, numbered by the selector's nibbles.
__device__ __forceinline__ unsigned byte_perm(unsigned a, unsigned b, unsigned selector) {
  return __byte_perm(a, b, selector);
}

// Keeps the compiler from computing a pointer anew at each use instead of moving it on.
template <class T>
__device__ __forceinline__ void keep(const T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// A function of three bits, for each bit of a, b and c: bit 4 a + 2 b + c of the table. For two constants, of which the
// compiler would make two instructions.
template <int kTable>
__device__ __forceinline__ unsigned lop3(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// d (16, 8) += a (16, 16) b (16, 8) over a warp. Lane 4 g + q has of a the rows g (registers 0 and 2) and g + 8 (1 and 3),
// of each two neighbours of k at 2 q (0 and 1) and 2 q + 8 (2 and 3); of b column g, k as in a; of d the rows g (0 and 1)
// and g + 8 (2 and 3), columns 2 q and 2 q + 1.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

#ifdef FASTGPT_SM75
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  mma_m16n8k8(d, a[0], a[1], b[0]);
  mma_m16n8k8(d, a[2], a[3], b[1]);
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&)[4], const unsigned (&)[4], const unsigned (&)[2]) {
  __trap();  // sm_75 has no products of bfloat16: its launchers refuse them
}
#else
#define FASTGPT_MMA(type)                                                                          \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, "    \
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                     \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  FASTGPT_MMA("f16");
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4],
                                                            const unsigned (&b)[2]) {
  FASTGPT_MMA("bf16");
}
#undef FASTGPT_MMA
#endif

}  // namespace dev
#endif
