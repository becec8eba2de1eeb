// Attention over caches of floats, and what follows it for all: see paged_attention.cuh.
#include "platform.cuh"

#include "paged_attention.cuh"

namespace fastgpt {
namespace cuda {

// A block a token and head: its chunks, from the first that its window touches on, in order.
__global__ void __launch_bounds__(128) combine_chunks_kernel(AttentionArguments a) {
  const int64_t s = blockIdx.z;
  const int64_t token = a.sequences.query_starts[s] + (int64_t)(blockIdx.x / (unsigned)a.H), h = blockIdx.x % (unsigned)a.H;
  if (token >= a.sequences.query_starts[s + 1]) return;
  const int position = a.sequences.context_lens[s] - (a.sequences.query_starts[s + 1] - (int)token);
  const int D = (int)a.cache.D, first = first_key(position, a.window) / (int)kChunk, last = position / (int)kChunk;
  const float* parts = a.partial + ((token * a.H + h) * a.chunks + first) * (D + 2);
  for (int d = threadIdx.x; d < D; d += 128) {
    const float3 all = add_partials(parts + d, D + 2, parts + D, D + 2, last - first + 1);
    store_number(a.out, a.dtype, token * a.out_stride + h * D + d, all.x / all.z);
  }
}

int64_t partial_floats(int64_t N, int64_t H, int64_t D, int64_t max_context) {
  const int64_t chunks = ceil_div(max_context, kChunk);
  return chunks > 1 ? N * H * chunks * (D + 2) : 0;
}

void paged_attention(const PagedCache& cache, const Rows& q, const Rows& out, const Sequences& sequences, int64_t H,
                     float scale, int64_t window, float* partial, int64_t processors, Stream stream) {
  if (sequences.count == 0 || sequences.max_query == 0) return;
  const int64_t chunks = ceil_div(sequences.max_context, kChunk);
  const AttentionArguments a = {cache, q.data, out.data, q.stride, out.stride, q.dtype, sequences, H, window, chunks, 1,
                                scale * kLog2e, reciprocal(cache.page_size), chunks > 1 ? partial : nullptr};
  cache.dtype == kFloat32    ? start_heads<float>(a, processors, stream)
  : cache.dtype == kFloat16  ? start_heads<__half>(a, processors, stream)
  : cache.dtype == kBFloat16 ? start_heads<__nv_bfloat16>(a, processors, stream)
                             : attend_bytes(a, processors, stream);
  if (chunks > 1)
    LAUNCH((combine_chunks_kernel), dim3((unsigned)(H * sequences.max_query), 1, (unsigned)sequences.count), dim3(128), 0, stream,
           a);
  check_launch("paged_attention", "sequences", sequences.count, "H", H, "G", cache.G, "D", cache.D,
                                   "max_query", sequences.max_query, "max_context", sequences.max_context);
}

}  // namespace cuda
}  // namespace fastgpt
