// Compiled with the flags of setup.py's LEVEL_FLAGS on x86-64; elsewhere there is no such level.
#if defined(__AVX2__)
#include "engine.inl"

namespace fastgpt {
extern const EngineKernels* const kEngineAvx2 = &table;
}
#else
#include "../engine.h"

namespace fastgpt {
extern const EngineKernels* const kEngineAvx2 = nullptr;
}
#endif
