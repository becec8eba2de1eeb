// A vector of W floats over the compiler's vector extension: the same source for SSE2, NEON, AVX2 and AVX-512.
// Intrinsics stand only where the extension has no word for it (masked tails). All is internal to the file that
// includes it, which is compiled for one instruction set; only C headers may be included here.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#ifndef FASTGPT_VEC_WIDTH  // a test sets 16 with AVX2 flags, to run the AVX-512 shape of every kernel without AVX-512
#if defined(__AVX512F__)
#define FASTGPT_VEC_WIDTH 16
#elif defined(__AVX2__)
#define FASTGPT_VEC_WIDTH 8
#else
#define FASTGPT_VEC_WIDTH 4
#endif
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

namespace fastgpt {
namespace {

constexpr int W = FASTGPT_VEC_WIDTH;

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IntVec __attribute__((vector_size(4 * W)));
typedef uint32_t UintVec __attribute__((vector_size(4 * W)));
typedef float UnalignedVec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(2 * W)));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

INLINE Vec splat(float a) { return a - Vec{}; }
INLINE IntVec as_int(Vec a) { return (IntVec)a; }
INLINE Vec as_float(IntVec a) { return (Vec)a; }
INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }

// 16-bit lanes to and from the low half of 32-bit ones. GCC 12's own
// conversions take up to five times the instructions.
INLINE UintVec extend(HalfVec h) {
#if defined(__AVX512F__)
  return (UintVec)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)h);
#elif defined(__AVX2__) && FASTGPT_VEC_WIDTH == 8
  return (UintVec)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, UintVec);
#endif
}
INLINE HalfVec truncate(UintVec u) {  // of lanes below 2**16
#if defined(__AVX2__) && FASTGPT_VEC_WIDTH == 8
  return (HalfVec)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)u), _mm256_extracti128_si256((__m256i)u, 1));
#else
  return __builtin_convertvector(u, HalfVec);
#endif
}

INLINE Vec widen(HalfVec h) { return (Vec)(extend(h) << 16); }
// Its high half is the nearest bfloat16, of two the even one; a NaN stays a NaN.
INLINE UintVec round_to_half(Vec a) {
  UintVec u = (UintVec)a;
  return a == a ? u + 0x7FFF + ((u >> 16) & 1) : u | 0x400000;
}
INLINE HalfVec narrow(Vec a) { return truncate(round_to_half(a) >> 16); }
// `a` as a load from p would see it after store(p, a).
INLINE Vec stored(const float*, Vec a) { return a; }
INLINE Vec stored(const bf16*, Vec a) { return (Vec)(round_to_half(a) & 0xFFFF0000); }

INLINE Vec load(const float* p) { return *(const UnalignedVec*)p; }
INLINE Vec load(const bf16* p) { return widen(*(const UnalignedHalfVec*)p); }
INLINE void store(float* p, Vec a) { *(UnalignedVec*)p = a; }
INLINE void store(bf16* p, Vec a) { *(UnalignedHalfVec*)p = narrow(a); }

#if defined(__AVX2__) && FASTGPT_VEC_WIDTH == 8
INLINE __m256i tail_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first n < W elements; the lanes beyond are 0 and their memory is not touched.
INLINE Vec load(const float* p, int n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__) && FASTGPT_VEC_WIDTH == 8
  return (Vec)_mm256_maskload_ps(p, tail_mask(n));
#else
  Vec a = {};
  for (int i = 0; i < n && i < W; i++) a[i] = p[i];
  return a;
#endif
}
INLINE void store(float* p, Vec a, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)a);
#elif defined(__AVX2__) && FASTGPT_VEC_WIDTH == 8
  _mm256_maskstore_ps(p, tail_mask(n), (__m256)a);
#else
  for (int i = 0; i < n; i++) p[i] = a[i];
#endif
}
// A copy of n elements is a call, before which every sum in a register goes to memory.
INLINE Vec load(const bf16* p, int n) {
#if defined(__AVX512BW__)
  return widen((HalfVec)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
#else
  HalfVec h = {};
  memcpy(&h, p, 2 * n);
  return widen(h);
#endif
}
INLINE void store(bf16* p, Vec a, int n) {
#if defined(__AVX512BW__)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)narrow(a));
#else
  HalfVec h = narrow(a);
  memcpy(p, &h, 2 * n);
#endif
}

// a * b + c, rounded once where the level has the instruction: for sums whose bits must not depend on what the compiler
// fuses in one instance of a template and not in another.
INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && FASTGPT_VEC_WIDTH == 8
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  for (int i = 0; i < W; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// Quarters of 4 floats, from p, p + stride, ...
INLINE Vec load_quarters(const float* p, int64_t stride) {
#if defined(__AVX512F__)
  __m512 a = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
  a = _mm512_insertf32x4(a, _mm_loadu_ps(p + 2 * stride), 2);
  return (Vec)_mm512_insertf32x4(a, _mm_loadu_ps(p + 3 * stride), 3);
#elif defined(__AVX2__) && FASTGPT_VEC_WIDTH == 8
  return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
#else
  Vec a;
  for (int q = 0; q < W / 4; q++) memcpy((char*)&a + 16 * q, p + q * stride, 16);
  return a;
#endif
}

// Sums of neighbours in a tree: one order for a given W.
INLINE float reduce_add(Vec a) {
  float s[W];
  memcpy(s, &a, sizeof s);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; i++) s[i] += s[i + step];
  return s[0];
}
INLINE float reduce_max(Vec a) {
  float m[W];
  memcpy(m, &a, sizeof m);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; i++) m[i] = m[i] > m[i + step] ? m[i] : m[i + step];
  return m[0];
}

// Past the caches, for results that are too many to stay in them; p is aligned to the vector. Other threads see them
// after finish_streams().
#if defined(__AVX512F__)
INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, (__m512)a); }
INLINE void stream(bf16* p, Vec a) { _mm256_stream_si256((__m256i*)p, (__m256i)narrow(a)); }
INLINE void finish_streams() { _mm_sfence(); }
#elif defined(__AVX2__) && FASTGPT_VEC_WIDTH == 8
INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, (__m256)a); }
INLINE void stream(bf16* p, Vec a) { _mm_stream_si128((__m128i*)p, (__m128i)narrow(a)); }
INLINE void finish_streams() { _mm_sfence(); }
#else
template <class T>
INLINE void stream(T* p, Vec a) {
  store(p, a);
}
INLINE void finish_streams() {}
#endif

INLINE float to_float(float a) { return a; }
INLINE float to_float(bf16 a) {
  uint32_t u = (uint32_t)a.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// e**x for x <= 0 (or a rounding error above), to about 1 ulp: 0 below -87, NaN for NaN. Short in latency: no
// clamp (what lies below -87 is discarded at the end), a polynomial in pairs, 2**n added to the exponent's bits.
INLINE Vec exp_nonpositive(Vec x) {
  Vec shifted = x * 1.44269504f + 12582912.0f;
  Vec n = shifted - 12582912.0f;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec r2 = r * r;
  Vec high = r * 1.9875691500e-4f + 1.3981999507e-3f, middle = r * 8.3334519073e-3f + 4.1665795894e-2f;
  Vec low = r * 1.6666665459e-1f + 5.0000001201e-1f;
  Vec p = ((high * r2 + middle) * r2 + low) * r2 + (r + 1.0f);
  return as_float((as_int(p) + (as_int(shifted) << 23)) & ~(x < -87.0f));
}

INLINE IntVec lane_index() {
  IntVec a;
  for (int i = 0; i < W; i++) a[i] = i;
  return a;
}

#if defined(FASTGPT_ENGINE)
constexpr int kSpins = kEngineSpins;
#else
constexpr int kSpins = kOpSpins;
#endif
// Calls task(i) for i in 0 .. count - 1 on the pool.
template <class Task>
INLINE void parallel(int64_t count, Task task) {
  run_tasks(count, [](void* context, int64_t index) { (*(Task*)context)(index); }, &task, kSpins);
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace fastgpt
