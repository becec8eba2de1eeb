// One instruction set's table of the engine's kernels. Included by engine_*.cpp under level.inl's rules: internal linkage,
// no C++ header.
#define FASTGPT_ENGINE
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../engine.h"
#include "pool.h"
#include "vec.h"

#include "tile.inl"
#include "rows.inl"
#include "gelu.inl"
#include "layer_norm.inl"
#include "pack.inl"
#include "dropout.inl"
#include "attention.inl"
#include "dots.inl"
#include "formats.inl"
#include "packed.inl"
#include "packed_product.inl"
#include "paged_attention.inl"
#include "step.inl"
#include "sampling.inl"

namespace fastgpt {
namespace {

#if defined(HALF_DOTS)
constexpr char kDots[] = "vnni, bf16";
#elif defined(BYTE_DOTS)
constexpr char kDots[] = "vnni";
#else
constexpr char kDots[] = "";
#endif

const EngineKernels table = {
    kDots,
    []() -> int64_t { return kTileCols; },
    panel_bytes,
    pack_weight,
    fingerprint,
    unpack_column,
    packed_linear,
    [](const KvCache& cache, const float* k, const float* v, int64_t row, const PagedSequence* sequences, int64_t count) {
      BY_CACHE(cache.dtype, store_kv, cache, {k, v, row}, sequences, count);
    },
    [](const KvCache& cache, const float* q, int64_t q_row, int64_t H, float scale, const PagedSequence* sequences,
       int64_t count, float* out, int64_t out_row) {
      BY_CACHE(cache.dtype, paged_attention, cache, {q, out, q_row, out_row, H, scale}, sequences, count, nullptr);
    },
    step,
    sample,
};

}  // namespace
}  // namespace fastgpt
