// New keys and values into their pages, and copies of whole pages.
#include "platform.cuh"

#include "errors.h"
#include "launch_rules.h"
#include "numbers.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kStoreWarps = 4;

struct StoreArguments {
  PagedCache cache;
  const void *k, *v;
  int64_t k_stride, v_stride;
  const int64_t* slots;
  int64_t N;
  bool aligned;  // whole 16 bytes of the source at every step
};

// E numbers from `from` on, of which n are there; zeros behind them.
template <class S, int E>
__device__ __forceinline__ void load_numbers(const S* from, int n, bool aligned, float (&x)[E]) {
  constexpr int kStep = 16 / sizeof(S);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < E; i += kStep) load_chunk<S>(from + i, x + i);
  } else {
#pragma unroll
    for (int i = 0; i < E; i++) x[i] = i < n ? to_float(from[i]) : 0.0f;
  }
}

// The scale of a row of a quantised cache: NaN where a number is not finite, so that whoever reads the row sees it.
template <class S, class T>
__device__ __forceinline__ float row_scale(const S* from, int D, int lane) {
  float top = 0.0f, odd = 0.0f;
  for (int d = lane; d < D; d += 32) {
    const float x = to_float(from[d]);
    top = fmaxf(top, fabsf(x));
    odd += x - x;
  }
#pragma unroll
  for (int o = 16; o; o /= 2) {
    top = fmaxf(top, __shfl_xor_sync(dev::kAllLanes, top, o));
    odd += __shfl_xor_sync(dev::kAllLanes, odd, o);
  }
  return top / kLargest<T> + odd;
}

// One row, 16 bytes of the cache at a time, one for each lane.
template <class S, class T>
__device__ __forceinline__ void store_row(const StoreArguments& a, const S* from, void* pages, float* scales, int64_t row,
                                          int lane) {
  constexpr int E = 16 / sizeof(T);
  const int D = (int)a.cache.D, chunks = (int)a.cache.row / E;
  float inverse = 1.0f;
  if constexpr (kLargest<T> > 0.0f) {
    const float scale = row_scale<S, T>(from, D, lane);
    inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    if (lane == 0) scales[row] = scale;
  }
  for (int c = lane; c < chunks; c += 32) {
    float x[E];
    load_numbers<S, E>(from + c * E, D - c * E, a.aligned, x);
    union {
      T numbers[E];
      uint4 bytes;
    } to = {};
#pragma unroll
    for (int i = 0; i < E; i++) {
      if constexpr (kLargest<T> > 0.0f) x[i] = fminf(fmaxf(x[i] * inverse, -kLargest<T>), kLargest<T>);
      round_to(x[i], &to.numbers[i]);
    }
    ((uint4*)pages)[row * chunks + c] = to.bytes;
  }
}

// A warp stores head g of token n's key, and of its value.
template <class S, class T>
__global__ void __launch_bounds__(32 * kStoreWarps) store_kv_kernel(StoreArguments a) {
  const PagedCache& cache = a.cache;
  const int64_t task = (int64_t)blockIdx.x * kStoreWarps + threadIdx.x / 32;
  if (task >= a.N * cache.G) return;
  const int64_t n = task / cache.G, g = task % cache.G, slot = a.slots[n];
  if (slot < 0 || slot >= cache.pages * cache.page_size) return;
  const int64_t row = (slot / cache.page_size * cache.G + g) * cache.page_size + slot % cache.page_size;
  const int lane = threadIdx.x % 32;
  store_row<S, T>(a, (const S*)a.k + n * a.k_stride + g * cache.D, cache.k, cache.k_scale, row, lane);
  store_row<S, T>(a, (const S*)a.v + n * a.v_stride + g * cache.D, cache.v, cache.v_scale, row, lane);
}

template <class S, class T>
void start_store_kv(StoreArguments a, Stream stream) {
  constexpr int E = 16 / sizeof(T);
  const uintptr_t bytes = (uintptr_t)a.k | (uintptr_t)a.v | a.k_stride * sizeof(S) | a.v_stride * sizeof(S) |
                          a.cache.D * sizeof(S);
  a.aligned = bytes % 16 == 0 && a.cache.D % E == 0;
  LAUNCH((store_kv_kernel<S, T>), dim3((unsigned)ceil_div(a.N * a.cache.G, kStoreWarps)), dim3(32 * kStoreWarps), 0, stream, a);
}

template <class S>
void store_kv_from(const StoreArguments& a, Stream stream) {
  if (a.cache.dtype == kInt8)
    start_store_kv<S, int8_t>(a, stream);
  else if (a.cache.dtype == kFloat8)
    start_store_kv<S, e4m3>(a, stream);
  else
    start_store_kv<S, S>(a, stream);
}

void store_kv(const PagedCache& cache, const Rows& k, const Rows& v, const int64_t* slots, int64_t N, Stream stream) {
  if (N == 0) return;
  const StoreArguments a = {cache, k.data, v.data, k.stride, v.stride, slots, N, false};
  if (k.dtype == kFloat32)
    store_kv_from<float>(a, stream);
  else if (k.dtype == kFloat16)
    store_kv_from<__half>(a, stream);
  else
    store_kv_from<__nv_bfloat16>(a, stream);
  check_launch("store_kv", "N", N, "G", cache.G, "D", cache.D, "page_size", cache.page_size);
}

// ---- pages ----------------------------------------------------------------------------------------------------------

constexpr int kCopyThreads = 256;

// Words of type W; blockIdx.y: which tensor, blockIdx.x: which copy.
template <class W>
__global__ void __launch_bounds__(kCopyThreads) copy_pages_kernel(char* data, int64_t stride, int64_t page_bytes, const int32_t* pairs) {
  char* tensor = data + blockIdx.y * stride;
  const W* from = (const W*)(tensor + pairs[2 * blockIdx.x] * page_bytes);
  W* to = (W*)(tensor + pairs[2 * blockIdx.x + 1] * page_bytes);
  for (int64_t i = threadIdx.x; i < page_bytes / (int64_t)sizeof(W); i += kCopyThreads) to[i] = from[i];
}

void copy_pages(void* data, int64_t count, int64_t stride, int64_t page_bytes, const int32_t* pairs, int64_t copies,
                Stream stream) {
  if (count == 0 || copies == 0) return;
  const dim3 grid((unsigned)copies, (unsigned)count);
  if (((uintptr_t)data | stride | page_bytes) % 16 == 0)
    LAUNCH((copy_pages_kernel<uint4>), grid, dim3(kCopyThreads), 0, stream, (char*)data, stride, page_bytes, pairs);
  else
    LAUNCH((copy_pages_kernel<uint32_t>), grid, dim3(kCopyThreads), 0, stream, (char*)data, stride, page_bytes, pairs);
  check_launch("copy_pages", "tensors", count, "copies", copies, "page_bytes", page_bytes);
}

}  // namespace cuda
}  // namespace fastgpt
