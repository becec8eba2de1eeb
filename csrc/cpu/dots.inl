// Sums of products of small numbers: pairs of 16-bit integers, fours of bytes, pairs of bfloat16 numbers in each lane.
// FASTGPT_EMULATED_DOTS, which a test sets, gives every machine the forms of AVX-512's vnni and bf16.

#if defined(__AVX512VNNI__) || defined(FASTGPT_EMULATED_DOTS)
#define BYTE_DOTS 1
#endif
#if defined(__AVX512BF16__) || defined(FASTGPT_EMULATED_DOTS)
#define HALF_DOTS 1
#endif

// Sums of integers may be regrouped, and a compiler that does so keeps more of them than there are registers: behind
// this it must have the sum itself.
#if defined(__AVX512F__)
#define KEEP(a) asm("" : "+v"(a))
#elif defined(__x86_64__) && FASTGPT_VEC_WIDTH < 16
#define KEEP(a) asm("" : "+x"(a))
#elif defined(__aarch64__)
#define KEEP(a) asm("" : "+w"(a))
#else
#define KEEP(a)
#endif

namespace fastgpt {
namespace {

typedef int16_t ShortVec __attribute__((vector_size(4 * W)));

INLINE Vec absolute(Vec a) { return as_float(as_int(a) & 0x7FFFFFFF); }
// The bits of the larger of two magnitudes, of which `top` is such bits already. A NaN is above everything: one that is
// lost here would make a broken row or weight look sound.
INLINE IntVec higher_magnitude(IntVec top, Vec a) {
  const IntVec bits = as_int(absolute(a));
  return bits > top ? bits : top;
}
INLINE IntVec round_to_int(Vec a) {  // |a| < 2**22; halves to even
  return as_int(a + 12582912.0f) - as_int(splat(12582912.0f));
}
INLINE Vec to_floats(IntVec a) { return __builtin_convertvector(a, Vec); }

INLINE IntVec load_ints(const void* p) {
  IntVec a;
  memcpy(&a, p, sizeof a);
  return a;
}
INLINE void store_ints(uint8_t* p, IntVec a) { memcpy(p, &a, sizeof a); }
INLINE IntVec splat_word(const void* p) {
  int32_t a;
  memcpy(&a, p, 4);
  return a - IntVec{};
}

// Of the bytes of each 16-bit half the lower or the upper, with its sign.
INLINE IntVec low_bytes(IntVec a) { return (IntVec)(((ShortVec)a << 8) >> 8); }
INLINE IntVec high_bytes(IntVec a) { return (IntVec)((ShortVec)a >> 8); }

// acc + the sum of the products of each lane's two 16-bit halves.
INLINE IntVec dot_pairs(IntVec acc, IntVec a, IntVec b) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return acc + (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && FASTGPT_VEC_WIDTH == 8
  return acc + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && FASTGPT_VEC_WIDTH == 4
  return acc + (IntVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Sums of the products of four bytes in each lane, a's without a sign: with vnni in 32 bits, else in two halves of 16, which
// the caller must not let overflow.
#if defined(BYTE_DOTS)
typedef IntVec ByteSums;
INLINE ByteSums byte_sums_from(int32_t start) { return start - IntVec{}; }
INLINE IntVec total(ByteSums a) { return a; }
INLINE ByteSums dot_bytes(ByteSums acc, IntVec a, IntVec b) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#else
  for (int i = 0; i < 32; i += 8) acc = acc + ((a >> i) & 255) * (b << (24 - i) >> 24);
  return acc;
#endif
}
#else
typedef ShortVec ByteSums;
// start: even; half of it in each half.
INLINE ByteSums byte_sums_from(int32_t start) {
  const int16_t half = (int16_t)(start / 2);
  return half - ShortVec{};
}
INLINE IntVec total(ByteSums a) { return dot_pairs(IntVec{}, (IntVec)a, 0x00010001 - IntVec{}); }
INLINE ByteSums dot_bytes(ByteSums acc, IntVec a, IntVec b) {
#if defined(__AVX512BW__)
  return acc + (ShortVec)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && FASTGPT_VEC_WIDTH == 8
  return acc + (ShortVec)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
#else
  ShortVec low = (ShortVec)(a & 0x00FF00FF), high = (ShortVec)((UintVec)a >> 8) & 0x00FF;
  return acc + low * (ShortVec)low_bytes(b) + high * (ShortVec)high_bytes(b);
#endif
}
#endif

#if defined(HALF_DOTS)
// acc + the sum of the products of each lane's two bfloat16 numbers.
INLINE Vec dot_halves(Vec acc, IntVec a, IntVec b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  constexpr int kHigh = (int)0xFFFF0000;
  return acc + as_float(a & kHigh) * as_float(b & kHigh) + as_float(a << 16) * as_float(b << 16);
#endif
}
#endif

}  // namespace
}  // namespace fastgpt
