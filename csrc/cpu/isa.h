// Which instruction-set levels this build and this processor have, and the one in use.
#pragma once
#include "../engine.h"
#include "../kernels.h"

namespace fastgpt {

struct Level {
  const char* name;
  const Kernels* kernels;  // null when this build has none
  const EngineKernels* engine;
  const char* lacking;     // an instruction set that the level needs and the processor lacks; null when it has them all
};

constexpr int kLevels = 3;
const Level* levels();  // from the least to the most capable
bool cpu_has_bf16();    // avx512_bf16: vdpbf16ps
bool cpu_has_vnni();    // avx512_vnni: vpdpbusd

const Kernels& active();
const EngineKernels& active_engine();
bool select_level(const char* name);  // false when it cannot run here

}  // namespace fastgpt
