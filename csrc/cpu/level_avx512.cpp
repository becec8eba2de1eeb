// Compiled with the flags of setup.py's LEVEL_FLAGS on x86-64; elsewhere there is no such level.
#if defined(__AVX512F__)
#define LEVEL "avx512"
#include "level.inl"

namespace fastgpt {
extern const Kernels* const kAvx512 = &table;
}
#else
#include "../kernels.h"

namespace fastgpt {
extern const Kernels* const kAvx512 = nullptr;
}
#endif
