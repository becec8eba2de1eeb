// What the processor does at best, for the benchmarks to divide by: arithmetic on registers alone, and reading memory.
// Each task leaves its result in the sink, so that no compiler can drop the work; every chain starts from another
// number, since equal ones would be computed once (and one from a fixed point, 1 = 0.999 * 1 + 0.001, not at all).

namespace fastgpt {
namespace {

constexpr int kChains = 12;  // independent sums: what hides a latency of 4 to 6 cycles on two units

float multiply_adds(int64_t steps) {
  Vec sums[kChains], factor = splat(0.999f), term = splat(0.001f), total = {};
  for (int i = 0; i < kChains; i++) sums[i] = splat(i + 2.0f);
  for (int64_t s = 0; s < steps; s++)
    for (int i = 0; i < kChains; i++) sums[i] = sums[i] * factor + term;
  for (int i = 0; i < kChains; i++) total = total + sums[i];
  return reduce_add(total);
}

#if defined(__AVX512F__)
// Called only where the processor has the instructions. Zeros are as fast as other numbers here.
__attribute__((target("avx512bf16"))) float bfloat16_dots(int64_t steps) {
  Vec sums[kChains], zeros = {}, total = {};
  for (int i = 0; i < kChains; i++) sums[i] = splat(i + 2.0f);
  for (int64_t s = 0; s < steps; s++)
    for (int i = 0; i < kChains; i++)
      sums[i] = (Vec)_mm512_dpbf16_ps((__m512)sums[i], (__m512bh)zeros, (__m512bh)zeros);
  for (int i = 0; i < kChains; i++) total = total + sums[i];
  return reduce_add(total);
}

__attribute__((target("avx512vnni"))) float int8_dots(int64_t steps) {
  IntVec sums[kChains], zeros = {}, total = {};
  for (int i = 0; i < kChains; i++) sums[i] = zeros + i;
  for (int64_t s = 0; s < steps; s++)
    for (int i = 0; i < kChains; i++)
      sums[i] = (IntVec)_mm512_dpbusd_epi32((__m512i)sums[i], (__m512i)zeros, (__m512i)zeros);
  for (int i = 0; i < kChains; i++) total |= sums[i];
  return reduce_add(as_float(total));
}
#endif

float arithmetic_chains(int kind, int64_t steps) {
#if defined(__AVX512F__)
  if (kind == kBFloat16Dots) return bfloat16_dots(steps);
  if (kind == kInt8Dots) return int8_dots(steps);
#endif
  return multiply_adds(steps);
}

void arithmetic(int kind, float* sink, int64_t tasks, int64_t steps) {
  parallel(tasks, [=](int64_t t) { sink[t] = arithmetic_chains(kind, steps); });
}

// Whole groups of kUnroll vectors; a rest shorter than that is not read.
float read_all(const float* p, int64_t floats) {
  constexpr int kUnroll = 8;
  IntVec seen[kUnroll] = {}, all = {};
  for (int64_t j = 0; j + kUnroll * W <= floats; j += kUnroll * W)
    for (int i = 0; i < kUnroll; i++) seen[i] |= as_int(load(p + j + i * W));
  for (int i = 0; i < kUnroll; i++) all |= seen[i];
  return reduce_add(as_float(all));
}

void read_memory(const float* data, int64_t floats, int64_t repeats, float* sink, int64_t tasks) {
  int64_t part = floats / tasks;
  parallel(tasks, [=](int64_t t) {
    for (int64_t r = 0; r < repeats; r++) sink[t] = read_all(data + t * part, part);
  });
}

}  // namespace
}  // namespace fastgpt
