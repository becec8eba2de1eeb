// Attention over caches of one byte a number: see paged_attention.cuh.
#include "platform.cuh"

#include "paged_attention.cuh"

namespace fastgpt {
namespace cuda {

void attend_bytes(const AttentionArguments& a, int64_t processors, Stream stream) {
  a.cache.dtype == kInt8 ? start_heads<int8_t>(a, processors, stream) : start_heads<e4m3>(a, processors, stream);
}

}  // namespace cuda
}  // namespace fastgpt
