// Attention over caches of floats, and what follows it for all: see paged_attention.cuh.
#include "platform.cuh"

#include "paged_attention.cuh"

namespace fastgpt {
namespace cuda {

// How a warp reads keys of up to kD numbers of T, and R query rows.
template <class T, int kD, int R>
struct Shape {
  static constexpr int kPerLoad = 16 / sizeof(T);                         // numbers of a load
  static constexpr int kLanes = kD / kPerLoad < 32 ? kD / kPerLoad : 32;  // that share a key
  static constexpr int kLoads = kD / kPerLoad / kLanes;                   // of a lane for a key
  static constexpr int kNumbers = kPerLoad * kLoads;                      // of a lane for a key
  static constexpr int kKeys = 32 / kLanes;                               // of a warp at once
  static constexpr int kTurns = 4 / kLoads;                               // of a stage
  static constexpr int kStageKeys = kKeys * kTurns;                       // of a warp
  static constexpr int kBlockKeys = kStageKeys * kWarps;                  // of a block's stage
  static constexpr int kStageBytes = 2 * kTurns * 32 * 16 * kLoads;       // of a warp: k and v
  static_assert(kChunk % kBlockKeys == 0, "a chunk is whole stages");
};

// Keys of one warp, from their pages into its part of the shared memory and from there into registers. A key's row is shared by
// as many lanes as it has 16 bytes, so a warp reads several keys at once; every lane copies just what it will read itself.
template <class T, int kD, int R>
struct KeyQueue {
  typedef Shape<T, kD, R> S;
  Pages pages;
  char* buffer;  // this lane's first 16 bytes
  int lane;

  __device__ __forceinline__ KeyQueue(const AttentionArguments& a, const Place& place, char* shared)
      : pages(a, place), lane(threadIdx.x % 32) {
    buffer = shared + threadIdx.x / 32 * kStages * S::kStageBytes + lane * 16;
  }
  __device__ __forceinline__ int key(int stage, int turn) const {
    return stage * S::kBlockKeys + (threadIdx.x / 32 * S::kTurns + turn) * S::kKeys + lane / S::kLanes;
  }
  __device__ __forceinline__ char* slot(int stage, int value, int turn) const {
    return buffer + stage % kStages * S::kStageBytes + (value * S::kTurns + turn) * S::kLoads * 512;
  }
  // Starts the copies of a stage; numbers that nobody needs become zeros.
  __device__ __forceinline__ void fetch(int stage) {
    const PagedCache& cache = pages.a.cache;
    const unsigned row_bytes = (unsigned)cache.row * sizeof(T);
#pragma unroll
    for (int turn = 0; turn < S::kTurns; turn++) {
      uint64_t row;
      const bool wanted = pages.find(key(stage, turn), row);
#pragma unroll
      for (int load = 0; load < S::kLoads; load++) {
        const unsigned column = (load * S::kLanes + lane % S::kLanes) * 16;
        const bool there = wanted && column < row_bytes;
        const uint64_t at = row * row_bytes + column;
        dev::cp_async<16>(slot(stage, 0, turn) + load * 512, (const char*)cache.k + at, there);
        dev::cp_async<16>(slot(stage, 1, turn) + load * 512, (const char*)cache.v + at, there);
      }
    }
  }
  __device__ __forceinline__ void read(int stage, int value, int turn, float (&x)[S::kNumbers]) const {
#pragma unroll
    for (int load = 0; load < S::kLoads; load++)
      load_chunk<T>(slot(stage, value, turn) + load * 512, x + load * S::kPerLoad);
  }
};

// R rows of one lane: its part of the queries, and of softmax(q k) v over the keys that it saw.
template <class T, int kD, int R>
struct RowState {
  typedef Shape<T, kD, R> S;
  const AttentionArguments& a;
  const Place& p;
  Tops& tops;
  float q[R][S::kNumbers], sum[R][S::kNumbers], top[R], weight[R];
  int first[R], last[R];  // the keys that a row sees

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < R; r++) {
      top[r] = -INFINITY, weight[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < S::kNumbers; i++) sum[r][i] = 0.0f;
    }
  }
  // The column of the head that number i is.
  static __device__ __forceinline__ int column(int lane, int i) {
    return (i / S::kPerLoad * S::kLanes + lane % S::kLanes) * S::kPerLoad + i % S::kPerLoad;
  }
  __device__ __forceinline__ void load_queries() {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < R; r++) {
      const bool there = r < p.rows;
      const int64_t at = there ? p.token(r) * a.q_stride + p.head(r) * a.cache.D : 0;
      last[r] = there ? p.position(r) : -1;
      first[r] = there ? first_key(last[r], a.window) : 0;
#pragma unroll
      for (int i = 0; i < S::kNumbers; i++)
        q[r][i] = there && column(lane, i) < a.cache.D ? load_number(a.q, a.dtype, at + column(lane, i)) * a.scale : 0.0f;
    }
  }
  __device__ __forceinline__ void scores(const KeyQueue<T, kD, R>& keys, int stage, float (&x)[R][S::kTurns]) const {
#pragma unroll
    for (int turn = 0; turn < S::kTurns; turn++) {
      float k[S::kNumbers];
      keys.read(stage, 0, turn, k);
      const int key = keys.key(stage, turn);
#pragma unroll
      for (int r = 0; r < R; r++) {
        float product = 0.0f;
#pragma unroll
        for (int i = 0; i < S::kNumbers; i++) product = fmaf(q[r][i], k[i], product);
#pragma unroll
        for (int o = S::kLanes / 2; o; o /= 2) product += __shfl_xor_sync(dev::kAllLanes, product, o);
        x[r][turn] = key >= first[r] && key <= last[r] ? product : -INFINITY;
      }
    }
  }
  __device__ __forceinline__ void take(const KeyQueue<T, kD, R>& keys, int stage) {
    float x[R][S::kTurns];
    scores(keys, stage, x);
#pragma unroll
    for (int r = 0; r < R; r++) {
      float new_top = top[r], added = 0.0f;
#pragma unroll
      for (int turn = 0; turn < S::kTurns; turn++) new_top = fmaxf(new_top, x[r][turn]);
      const float base = new_top == -INFINITY ? 0.0f : new_top, rescale = dev::ex2(top[r] - base);
#pragma unroll
      for (int turn = 0; turn < S::kTurns; turn++) added += x[r][turn] = dev::ex2(x[r][turn] - base);
      weight[r] = fmaf(weight[r], rescale, added), top[r] = new_top;
#pragma unroll
      for (int i = 0; i < S::kNumbers; i++) sum[r][i] *= rescale;
    }
#pragma unroll
    for (int turn = 0; turn < S::kTurns; turn++) {
      float v[S::kNumbers];
      keys.read(stage, 1, turn, v);
#pragma unroll
      for (int r = 0; r < R; r++) {
#pragma unroll
        for (int i = 0; i < S::kNumbers; i++) sum[r][i] = fmaf(x[r][turn], v[i], sum[r][i]);
      }
    }
  }
  // Of the lanes that hold the same columns of other keys: the first has them all then.
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int o = S::kLanes; o < 32; o *= 2)
#pragma unroll
      for (int r = 0; r < R; r++) {
        const float other = __shfl_xor_sync(dev::kAllLanes, top[r], o), new_top = fmaxf(top[r], other);
        const float base = new_top == -INFINITY ? 0.0f : new_top;
        const float mine = dev::ex2(top[r] - base), theirs = dev::ex2(other - base);
        weight[r] = fmaf(weight[r], mine, __shfl_xor_sync(dev::kAllLanes, weight[r], o) * theirs), top[r] = new_top;
#pragma unroll
        for (int i = 0; i < S::kNumbers; i++)
          sum[r][i] = fmaf(sum[r][i], mine, __shfl_xor_sync(dev::kAllLanes, sum[r][i], o) * theirs);
      }
  }
  __device__ __forceinline__ void end(const KeyQueue<T, kD, R>& keys, int chunk, float* stage) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    add_lanes();
    const bool bad = __ballot_sync(dev::kAllLanes, keys.pages.bad) != 0;
    __syncwarp();  // every lane has read its keys
    end_rows<kD, R, S::kStageBytes>(a, p, chunk, stage, tops, [&](int begin, int count, float* to) {
      if (lane >= S::kLanes) return;
#pragma unroll
      for (int r = 0; r < R; r++) {
        if (r < begin || r >= begin + count) continue;
#pragma unroll
        for (int i = 0; i < S::kNumbers; i++) to[(r - begin) * kD + column(lane, i)] = sum[r][i];
        if (lane == 0) tops[warp][r][0] = top[r], tops[warp][r][1] = bad ? NAN : weight[r];
      }
    });
  }
};

template <class T, int kD, int R>
__global__ void __launch_bounds__(32 * kWarps) paged_attention_kernel(AttentionArguments a) {
  DYNAMIC_SHARED(char, shared);
  __shared__ Tops tops;
  const Place place = find_place<R>(a);
  if (place.rows <= 0 || place.begin >= place.end) return;
  KeyQueue<T, kD, R> keys(a, place, shared);
  RowState<T, kD, R> state{a, place, tops};
  walk_keys<Shape<T, kD, R>>(place, keys, state, shared);
}

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

template <class T, int kD>
void start_rows(const AttentionArguments& a, int64_t processors, Stream stream) {
  const int64_t R = rows_of_block(a.sequences.max_query, a.H / a.cache.G);
  R == 1 ? start<Shape<T, kD, 1>, 1>(paged_attention_kernel<T, kD, 1>, a, processors, stream)
         : start<Shape<T, kD, 4>, 4>(paged_attention_kernel<T, kD, 4>, a, processors, stream);
}

template <class T>
void start_heads(const AttentionArguments& a, int64_t processors, Stream stream) {
  const int64_t D = head_class(a.cache.D);
  D == 64    ? start_rows<T, 64>(a, processors, stream)
  : D == 128 ? start_rows<T, 128>(a, processors, stream)
             : start_rows<T, 256>(a, processors, stream);
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
