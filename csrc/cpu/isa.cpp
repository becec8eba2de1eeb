#include "isa.h"

#include <string.h>

namespace fastgpt {
namespace {

const Kernels* selected = nullptr;

#if defined(__x86_64__)
#define CPU_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define CPU_HAS(feature) false
#endif

}  // namespace

const Level* levels() {
  static const Level all[kLevels] = {
      {"baseline", kBaseline, true},
      {"avx2", kAvx2, CPU_HAS("avx2") && CPU_HAS("fma")},
      {"avx512", kAvx512,
       CPU_HAS("avx512f") && CPU_HAS("avx512bw") && CPU_HAS("avx512vl") && CPU_HAS("avx512dq") && CPU_HAS("fma")},
  };
  return all;
}

bool cpu_has_bf16() { return CPU_HAS("avx512bf16"); }
bool cpu_has_vnni() { return CPU_HAS("avx512vnni"); }

bool select_level(const char* name) {
  for (int i = 0; i < kLevels; i++) {
    const Level& level = levels()[i];
    if (!strcmp(level.name, name) && level.kernels && level.supported) {
      selected = level.kernels;
      return true;
    }
  }
  return false;
}

const Kernels& active() {
  for (int i = kLevels - 1; !selected; i--) select_level(levels()[i].name);
  return *selected;
}

}  // namespace fastgpt
