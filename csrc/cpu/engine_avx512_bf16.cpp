// Compiled with the flags of setup.py's LEVEL_FLAGS on x86-64; elsewhere there is no such level.
#if defined(__AVX512BF16__)
#include "engine.inl"

namespace fastgpt {
extern const EngineKernels* const kEngineAvx512Bf16 = &table;
}
#else
#include "../engine.h"

namespace fastgpt {
extern const EngineKernels* const kEngineAvx512Bf16 = nullptr;
}
#endif
