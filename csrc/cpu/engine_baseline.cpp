#include "engine.inl"

namespace fastgpt {
extern const EngineKernels* const kEngineBaseline = &table;
}
