#include "isa.h"

#include <string.h>

#include <atomic>
#include <initializer_list>

namespace fastgpt {
namespace {

std::atomic<const Level*> selected{nullptr};

// The compiler's own test looks at the processor and at whether the system saves its registers.
#if defined(__x86_64__)
#define CPU_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define CPU_HAS(feature) false
#endif
#define LACKING(feature) (CPU_HAS(feature) ? nullptr : feature)

const char* first(std::initializer_list<const char*> lacking) {
  for (const char* feature : lacking)
    if (feature) return feature;
  return nullptr;
}

const EngineKernels* engine_of_avx512() {
  if (cpu_has_vnni() && cpu_has_bf16()) return kEngineAvx512Bf16;
  return cpu_has_vnni() ? kEngineAvx512Vnni : kEngineAvx512;
}

}  // namespace

const Level* levels() {
  static const Level all[kLevels] = {
      {"baseline", kBaseline, kEngineBaseline, nullptr},
      {"avx2", kAvx2, kEngineAvx2, first({LACKING("avx2"), LACKING("fma")})},
      {"avx512", kAvx512, engine_of_avx512(),
       first({LACKING("fma"), LACKING("avx512f"), LACKING("avx512bw"), LACKING("avx512vl"), LACKING("avx512dq")})},
  };
  return all;
}

bool cpu_has_bf16() { return CPU_HAS("avx512bf16"); }
bool cpu_has_vnni() { return CPU_HAS("avx512vnni"); }

bool select_level(const char* name) {
  for (int i = 0; i < kLevels; i++) {
    const Level& level = levels()[i];
    if (!strcmp(level.name, name) && level.kernels && !level.lacking) {
      selected = &level;
      return true;
    }
  }
  return false;
}

namespace {
const Level& active_level() {
  for (int i = kLevels - 1; !selected; i--) select_level(levels()[i].name);
  return *selected;
}
}  // namespace

const Kernels& active() { return *active_level().kernels; }
const EngineKernels& active_engine() { return *active_level().engine; }

}  // namespace fastgpt
