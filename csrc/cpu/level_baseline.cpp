#define LEVEL "baseline"
#include "level.inl"

namespace fastgpt {
extern const Kernels* const kBaseline = &table;
}
