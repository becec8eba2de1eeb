// The CUDA kernels' launchers: raw pointers and sizes, checked by the caller, and a stream (cudaStream_t). Each starts its
// kernels and returns; an error of the launch is thrown as std::runtime_error that names the kernel and its arguments.
// The same sources run on a CPU, thread by thread, under tests/gpusim/cusim.
#pragma once
#include <stdint.h>

namespace fastgpt {
namespace cuda {

typedef void* Stream;

// The first three are those of activations; all five those of a KV cache. kFloat8 is e4m3 without infinities.
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kFloat8 = 4 };

// Activations (rows, heads, D) or (rows, columns): row r at data + r * stride elements, a row's own elements contiguous.
struct Rows {
  int dtype;
  void* data;
  int64_t stride;
};

// The pages of one layer: k and v (pages, G, page_size, row) of dtype, of each row the first D elements are used; a row
// is a multiple of 16 bytes, and zero behind D. Of int8 and float8 the scales (pages, G, page_size) of the rows.
struct PagedCache {
  int dtype;
  void *k, *v;
  float *k_scale, *v_scale;
  int64_t pages, page_size, G, D, row;
};

// The last query tokens of `count` sequences: those of sequence s are rows query_starts[s] .. query_starts[s + 1] of q, and
// its length with them is context_lens[s]; page p of it is tables[s * table_stride + p]. All on the device, so that a
// captured graph reads them anew; max_query and max_context bound what they hold.
struct Sequences {
  const int32_t *tables, *query_starts, *context_lens;
  int64_t table_stride, count, max_query, max_context;
};

// Row n of k and v (N, G, D) goes to slot slots[n] = page * page_size + place in the page; a slot that no page has is
// left out: padding has -1.
void store_kv(const PagedCache& cache, const Rows& k, const Rows& v, const int64_t* slots, int64_t N, Stream stream);

// How many keys are one partial result: a row's bits depend on nothing but its keys, since every row's are cut at the
// multiples of this and combined in order.
constexpr int64_t kChunk = 256;

// q, out (N, H, D). scale: of the scores; window: how many keys a query sees, its own included, or 0 for all.
// partial: float32 of partial_floats(...); processors: how many the device has. A row whose pages are not all in [0,
// pages) is NaN.
void paged_attention(const PagedCache& cache, const Rows& q, const Rows& out, const Sequences& sequences, int64_t H,
                     float scale, int64_t window, float* partial, int64_t processors, Stream stream);
// Of the N rows of q.
int64_t partial_floats(int64_t N, int64_t H, int64_t D, int64_t max_context);

// Copies page pairs[2 * i] to page pairs[2 * i + 1] (int32, on the device) of `count` tensors, which lie `stride` bytes
// apart and whose pages have page_bytes each; both multiples of 4.
void copy_pages(void* data, int64_t count, int64_t stride, int64_t page_bytes, const int32_t* pairs, int64_t copies,
                Stream stream);

}  // namespace cuda
}  // namespace fastgpt
