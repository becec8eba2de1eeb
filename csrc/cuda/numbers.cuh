// Numbers of every dtype as floats and back, and 16 bytes of them at a time.
#pragma once
#include "platform.cuh"

#include <string.h>

#include "kernels.h"

namespace fastgpt {
namespace cuda {

struct e4m3 {  // a sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities
  uint8_t bits;
};

template <class To, class From>
__device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Of two numbers that share a word, the lower half first.
__device__ __forceinline__ void halves_of(uint32_t word, float* x) {
  const float2 pair = __half22float2(bit_cast<__half2>(word));
  x[0] = pair.x, x[1] = pair.y;
}

// The 16 bytes of T in `words` as floats: x[0 .. 16 / sizeof(T)).
__device__ __forceinline__ void unpack(const uint32_t (&words)[4], float* x, float) {
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = bit_cast<float>(words[i]);
}
__device__ __forceinline__ void unpack(const uint32_t (&words)[4], float* x, __half) {
#pragma unroll
  for (int i = 0; i < 4; i++) halves_of(words[i], x + 2 * i);
}
__device__ __forceinline__ void unpack(const uint32_t (&words)[4], float* x, __nv_bfloat16) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = bit_cast<float>(words[i] << 16);
    x[2 * i + 1] = bit_cast<float>(words[i] & 0xFFFF0000u);
  }
}
template <class T>
__device__ __forceinline__ void load_chunk(const void* from, float* x) {
  const uint4 four = *(const uint4*)from;
  const uint32_t words[4] = {four.x, four.y, four.z, four.w};
  unpack(words, x, T{});
}

// A number u put into the lowest bits of a mantissa whose unit is 1 is kUnits + u; the subtraction of two of them is exact.
template <class T>
constexpr unsigned kUnits = 0;
template <>
constexpr unsigned kUnits<__half> = 0x64006400;  // 1024, twice
template <>
constexpr unsigned kUnits<__nv_bfloat16> = 0x43004300;  // 128, twice

__device__ __forceinline__ unsigned difference(unsigned a, unsigned b, __half) {
  return bit_cast<unsigned>(__hsub2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
}
__device__ __forceinline__ unsigned difference(unsigned a, unsigned b, __nv_bfloat16) {
  return bit_cast<unsigned>(__hsub2(bit_cast<__nv_bfloat162>(a), bit_cast<__nv_bfloat162>(b)));
}

constexpr int kAndOr = 0xEA, kAndXor = 0x6A;  // (a & b) | c and (a & b) ^ c

// Of four numbers + 128, the bytes of a word, the numbers 0 and 2 (odd: 1 and 3) as two T.
__device__ __forceinline__ unsigned of_bytes(unsigned word, bool odd, __half t) {
  const unsigned spread = dev::byte_perm(word, kUnits<__half>, odd ? 0x5351 : 0x5250);
  return difference(spread, kUnits<__half> + 0x00800080, t);
}
// bfloat16 has room for 7 bits: the eighth is in what is subtracted, 128 where it is set and 256 where not.
__device__ __forceinline__ unsigned of_bytes(unsigned word, bool odd, __nv_bfloat16 t) {
  const unsigned pair = odd ? word >> 8 : word, low = dev::lop3<kAndOr>(pair, 0x007F007F, kUnits<__nv_bfloat16>);
  return difference(low, dev::lop3<kAndXor>(pair, 0x00800080, kUnits<__nv_bfloat16> + 0x00800080), t);
}

__device__ __forceinline__ void round_to(float x, float* to) { *to = x; }
__device__ __forceinline__ void round_to(float x, __half* to) { *to = __float2half_rn(x); }
__device__ __forceinline__ void round_to(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(float x, int8_t* to) { *to = (int8_t)rintf(x); }
// |x| <= 448. A step of the subnormal numbers, below 2**-6, is 2**-9; of the others 2**-3 of their power of two.
__device__ __forceinline__ void round_to(float x, e4m3* to) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7FFFFFFF;
  if (magnitude < 0x3C800000) {  // 2**-6
    to->bits = (uint8_t)(sign | (uint32_t)rintf(fabsf(x) * 512.0f));
  } else {
    const uint32_t rounded = magnitude + 0x7FFFF + (magnitude >> 20 & 1);
    to->bits = (uint8_t)(sign | ((rounded >> 20) - (120 << 3)));
  }
}

// The largest magnitude that a quantised row is scaled to.
template <class T>
constexpr float kLargest = 0.0f;  // not quantised
template <>
constexpr float kLargest<int8_t> = 127.0f;
template <>
constexpr float kLargest<e4m3> = 448.0f;

// Element i of activations of any dtype.
__device__ __forceinline__ float load_number(const void* data, int dtype, int64_t i) {
  if (dtype == kFloat32) return ((const float*)data)[i];
  if (dtype == kFloat16) return to_float(((const __half*)data)[i]);
  return to_float(((const __nv_bfloat16*)data)[i]);
}
__device__ __forceinline__ void store_number(void* data, int dtype, int64_t i, float x) {
  if (dtype == kFloat32) return round_to(x, (float*)data + i);
  if (dtype == kFloat16) return round_to(x, (__half*)data + i);
  round_to(x, (__nv_bfloat16*)data + i);
}

}  // namespace cuda
}  // namespace fastgpt
