// CUDA's functions of numbers that a host compiler lacks. Those that approximate are exact here.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "simulator.h"

namespace cusim {
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cusim

inline int __float_as_int(float x) { return cusim::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return cusim::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return cusim::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return cusim::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return cusim::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return cusim::bits_as<double>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
[[noreturn]] inline void __trap() { cusim::fail("__trap"); }

namespace dev {

inline float ex2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float lg2(float x) { return log2f(fabsf(x) < 0x1p-126f ? 0.0f : x); }

inline unsigned byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned chosen = 0;
  for (int i = 0; i < 4; i++) chosen |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return chosen;
}

template <class T>
void keep(const T*&) {}

template <int kTable>
unsigned lop3(unsigned a, unsigned b, unsigned c) {
  const auto of = [](bool in_table, unsigned a, unsigned b, unsigned c) { return in_table ? a & b & c : 0; };
  return of(kTable & 1, ~a, ~b, ~c) | of(kTable & 2, ~a, ~b, c) | of(kTable & 4, ~a, b, ~c) | of(kTable & 8, ~a, b, c) |
         of(kTable & 16, a, ~b, ~c) | of(kTable & 32, a, ~b, c) | of(kTable & 64, a, b, ~c) | of(kTable & 128, a, b, c);
}

}  // namespace dev

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) { return dev::byte_perm(a, b, selector); }
