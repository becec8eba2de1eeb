// Attention of a few query tokens a sequence over a paged KV cache (Kwon et al. 2023, arXiv:2309.06180), split over the
// keys (flash decoding: Dao et al. 2023).
//
// A block of 4 warps takes one key head of one sequence, some query rows, and a walk of chunks of kChunk keys. A key's row is
// shared by as many lanes as it has 16 bytes, so a warp reads several keys at once. Every lane copies, some stages ahead,
// just the 16 bytes that it will use itself: the shared memory is a queue of its own, and the loop needs no barrier.
// A chunk ends with a partial result (numerator, maximum, sum) of its own, whatever block walked over it; a second
// kernel adds the chunks up in order. So a row has the same bits in any batch and under any split.
#pragma once
#include "platform.cuh"

#include "errors.h"
#include "launch_rules.h"
#include "numbers.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kWarps = 4;
constexpr float kLog2e = 1.4426950408889634f;

struct AttentionArguments {
  PagedCache cache;
  const void* q;
  void* out;
  int64_t q_stride, out_stride;
  int dtype;  // of q and out
  Sequences sequences;
  int64_t H, window, chunks, walk;  // chunks: of max_context; walk: chunks of a block
  float scale;                      // times log2(e)
  uint32_t page_reciprocal;
  float* partial;  // (N, H, chunks, D + 2): numerator, maximum, sum; null where there is one chunk
};

// How a warp reads keys of up to kD numbers of T, and R query rows.
template <class T, int kD, int R>
struct Shape {
  static constexpr int kPerLoad = 16 / sizeof(T);                                       // numbers of a load
  static constexpr int kLanes = kD / kPerLoad < 32 ? kD / kPerLoad : 32;                // that share a key
  static constexpr int kLoads = kD / kPerLoad / kLanes;                                 // of a lane for a key
  static constexpr int kNumbers = kPerLoad * kLoads;                                    // of a lane for a key
  static constexpr int kKeys = 32 / kLanes;                                             // of a warp at once
  static constexpr int kTurns = 4 / kLoads;                                             // of a stage
  static constexpr int kStageKeys = kKeys * kTurns;                                     // of a warp
  static constexpr int kBlockKeys = kStageKeys * kWarps;                                // of a block's stage
  static constexpr bool kScaled = kLargest<T> > 0.0f;
  static constexpr int kStageBytes = 2 * kTurns * 32 * (16 * kLoads + (kScaled ? 4 : 0));  // of a warp: k, v, scales
  static constexpr int kStages = 3;                                                     // under way or in use
  static constexpr int kSharedBytes = kStages * kWarps * kStageBytes;
  static_assert(R * kD * 4 <= kStageBytes, "a warp's sums fit into a stage that has been used");
  static_assert(kChunk % kBlockKeys == 0, "a chunk is whole stages");
};

// What this block works on: keys [begin, end) of a sequence for R query rows; row r is token first_token + (row + r) / group.
struct Place {
  int64_t sequence, g, row, rows, first_token;
  int context, tokens, group, begin, end;

  __device__ __forceinline__ int position(int r) const { return context - tokens + (int)(row + r) / group; }
  __device__ __forceinline__ int64_t token(int r) const { return first_token + (row + r) / group; }
  __device__ __forceinline__ int64_t head(int r) const { return g * group + (row + r) % group; }
};

__device__ __forceinline__ int first_key(int position, int64_t window) {
  return window > 0 && position >= window ? position - (int)window + 1 : 0;
}

template <int R>
__device__ __forceinline__ Place find_place(const AttentionArguments& a) {
  Place p;
  p.sequence = blockIdx.z, p.g = blockIdx.x % (unsigned)a.cache.G;
  p.row = (int64_t)(blockIdx.x / (unsigned)a.cache.G) * R;
  p.group = (int)(a.H / a.cache.G);
  p.first_token = a.sequences.query_starts[p.sequence];
  p.tokens = a.sequences.query_starts[p.sequence + 1] - (int)p.first_token;
  p.context = a.sequences.context_lens[p.sequence];
  p.rows = (int64_t)p.tokens * p.group - p.row;
  p.rows = p.rows < R ? p.rows : R;
  if (p.rows <= 0) return p;
  const int walk = (int)(a.walk * kChunk);
  p.begin = max((int)blockIdx.y * walk, first_key(p.position(0), a.window));
  p.end = min((int)(blockIdx.y + 1) * walk, p.position((int)p.rows - 1) + 1);
  return p;
}

// Keys of one warp, from their pages into its part of the shared memory and from there into registers.
template <class T, int kD, int R>
struct KeyQueue {
  typedef Shape<T, kD, R> S;
  const AttentionArguments& a;
  const Place& place;
  const int32_t* table;
  char* buffer;  // this lane's first 16 bytes
  int lane;
  bool bad = false;  // a page that the cache does not have

  __device__ __forceinline__ KeyQueue(const AttentionArguments& a, const Place& place, char* shared)
      : a(a), place(place), table(a.sequences.tables + place.sequence * a.sequences.table_stride), lane(threadIdx.x % 32) {
    buffer = shared + threadIdx.x / 32 * S::kStages * S::kStageBytes + lane * 16;
  }
  __device__ __forceinline__ int key(int stage, int turn) const {
    return stage * S::kBlockKeys + (threadIdx.x / 32 * S::kTurns + turn) * S::kKeys + lane / S::kLanes;
  }
  __device__ __forceinline__ char* slot(int stage, int value, int turn) const {
    return buffer + stage % S::kStages * S::kStageBytes + (value * S::kTurns + turn) * S::kLoads * 512;
  }
  __device__ __forceinline__ float* scale_slot(int stage, int value, int turn) const {
    return (float*)(buffer - lane * 12 + stage % S::kStages * S::kStageBytes + 2 * S::kTurns * S::kLoads * 512) +
           (value * S::kTurns + turn) * 32;
  }
  // Starts the copies of a stage; numbers that nobody needs become zeros.
  __device__ __forceinline__ void fetch(int stage) {
    const int size = (int)a.cache.page_size, row_bytes = (int)a.cache.row * (int)sizeof(T);
#pragma unroll
    for (int turn = 0; turn < S::kTurns; turn++) {
      const int k = key(stage, turn);
      bool wanted = k >= place.begin && k < place.end;
      int64_t row = 0;
      if (wanted) {
        const int page_of = a.page_reciprocal ? (int)__umulhi((unsigned)k, a.page_reciprocal) : k, page = table[page_of];
        wanted = page >= 0 && page < a.cache.pages;
        bad |= !wanted;
        if (wanted) row = ((int64_t)page * a.cache.G + place.g) * size + (k - page_of * size);
      }
#pragma unroll
      for (int load = 0; load < S::kLoads; load++) {
        const int column = (load * S::kLanes + lane % S::kLanes) * 16;
        const bool there = wanted && column < row_bytes;
        const int64_t at = there ? row * row_bytes + column : 0;
        dev::cp_async<16>(slot(stage, 0, turn) + load * 512, (const char*)a.cache.k + at, there);
        dev::cp_async<16>(slot(stage, 1, turn) + load * 512, (const char*)a.cache.v + at, there);
      }
      if (S::kScaled) {
        dev::cp_async<4>(scale_slot(stage, 0, turn), a.cache.k_scale + row, wanted);
        dev::cp_async<4>(scale_slot(stage, 1, turn), a.cache.v_scale + row, wanted);
      }
    }
  }
  __device__ __forceinline__ void read(int stage, int value, int turn, float (&x)[S::kNumbers]) const {
#pragma unroll
    for (int load = 0; load < S::kLoads; load++)
      load_chunk<T>(slot(stage, value, turn) + load * 512, x + load * S::kPerLoad);
  }
  __device__ __forceinline__ float scale(int stage, int value, int turn) const {
    return S::kScaled ? *scale_slot(stage, value, turn) * kUnit<T> : 1.0f;
  }
};

// R rows of one lane: its part of the queries, and of softmax(q k) v over the keys that it saw.
template <class T, int kD, int R>
struct RowState {
  typedef Shape<T, kD, R> S;
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
  __device__ __forceinline__ void load_queries(const AttentionArguments& a, const Place& p) {
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
      const float scale = keys.scale(stage, 0, turn);
#pragma unroll
      for (int r = 0; r < R; r++) {
        float product = 0.0f;
#pragma unroll
        for (int i = 0; i < S::kNumbers; i++) product = fmaf(q[r][i], k[i], product);
#pragma unroll
        for (int o = S::kLanes / 2; o; o /= 2) product += __shfl_xor_sync(dev::kAllLanes, product, o);
        if (S::kScaled) product *= scale;
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
      const float scale = keys.scale(stage, 1, turn);
#pragma unroll
      for (int r = 0; r < R; r++) {
        const float p = S::kScaled ? x[r][turn] * scale : x[r][turn];
#pragma unroll
        for (int i = 0; i < S::kNumbers; i++) sum[r][i] = fmaf(p, v[i], sum[r][i]);
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
};

// One number of a row from `count` partial results: its numerators at parts[c * stride], (maximum, sum of the weights) at
// tops[c * tops_stride]. The result is again such a one: {numerator, maximum, sum}.
__device__ __forceinline__ float3 add_partials(const float* parts, int64_t stride, const float* tops, int64_t tops_stride,
                                               int count) {
  float top = -INFINITY, sum = 0.0f, weight = 0.0f;
  for (int c = 0; c < count; c++) top = fmaxf(top, tops[c * tops_stride]);
  const float base = top == -INFINITY ? 0.0f : top;
  for (int c = 0; c < count; c++) {
    const float factor = dev::ex2(tops[c * tops_stride] - base);
    weight = fmaf(tops[c * tops_stride + 1], factor, weight);
    sum = fmaf(parts[c * stride], factor, sum);
  }
  return {sum, top, weight};
}

// The warps' results of a chunk into one, which goes to `partial` or, where it is the only chunk, to out. sums: the
// first warp's part of the shared memory that the last stage has left free, a warp's (R, kD) numerators; tops: the maxima and the
// sums of the weights.
template <class T, int kD, int R>
__device__ __forceinline__ void end_chunk(const AttentionArguments& a, const Place& p, RowState<T, kD, R>& state, int chunk,
                                          bool bad, float* sums, float (&tops)[kWarps][R][2]) {
  typedef Shape<T, kD, R> S;
  constexpr int kWarpFloats = S::kStages * S::kStageBytes / 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = (int)a.cache.D;
  state.add_lanes();
  bad = __ballot_sync(dev::kAllLanes, bad) != 0;
  __syncwarp();  // every lane has read its keys
  if (lane < S::kLanes)
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
      for (int i = 0; i < S::kNumbers; i++) sums[warp * kWarpFloats + r * kD + state.column(lane, i)] = state.sum[r][i];
      if (lane == 0) tops[warp][r][0] = state.top[r], tops[warp][r][1] = bad ? NAN : state.weight[r];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < R * kD; i += 32 * kWarps) {
    const int r = i / kD, d = i % kD;
    if (r >= p.rows || d >= D) continue;
    const float3 all = add_partials(sums + i, kWarpFloats, tops[0][r], 2 * R, kWarps);
    if (!a.partial) {
      store_number(a.out, a.dtype, p.token(r) * a.out_stride + p.head(r) * D + d, all.x / all.z);
      continue;
    }
    float* to = a.partial + ((p.token(r) * a.H + p.head(r)) * a.chunks + chunk) * (D + 2);
    to[d] = all.x;
    if (d == 0) to[D] = all.y, to[D + 1] = all.z;
  }
  __syncthreads();  // the sums have been read
}

template <class T, int kD, int R>
__global__ void __launch_bounds__(32 * kWarps) paged_attention_kernel(AttentionArguments a) {
  typedef Shape<T, kD, R> S;
  DYNAMIC_SHARED(char, shared);
  __shared__ float tops[kWarps][R][2];
  const Place place = find_place<R>(a);
  if (place.rows <= 0 || place.begin >= place.end) return;
  KeyQueue<T, kD, R> keys(a, place, shared);
  RowState<T, kD, R> state;
  const int begin = place.begin / S::kBlockKeys, end = (place.end + S::kBlockKeys - 1) / S::kBlockKeys;
#pragma unroll
  for (int ahead = 0; ahead < S::kStages - 1; ahead++) {
    if (begin + ahead < end) keys.fetch(begin + ahead);
    dev::cp_commit();
  }
  state.load_queries(a, place);
  state.clear();
  for (int stage = begin; stage < end; stage++) {
    if (stage + S::kStages - 1 < end) keys.fetch(stage + S::kStages - 1);
    dev::cp_commit();
    dev::cp_wait<S::kStages - 1>();
    state.take(keys, stage);
    if ((stage + 1) % (kChunk / S::kBlockKeys) != 0 && stage + 1 < end) continue;
    end_chunk<T, kD, R>(a, place, state, stage / (kChunk / S::kBlockKeys), keys.bad,
                        (float*)(shared + stage % S::kStages * S::kStageBytes), tops);
    state.clear();
  }
  dev::cp_wait<0>();
}

// ---- launching ------------------------------------------------------------------------------------------------------

template <class T, int kD, int R>
void start(const AttentionArguments& a, Stream stream) {
  const Sequences& s = a.sequences;
  const int64_t row_blocks = ceil_div(s.max_query * (a.H / a.cache.G), R);
  const dim3 grid((unsigned)(a.cache.G * row_blocks), (unsigned)ceil_div(a.chunks, a.walk), (unsigned)s.count);
  LAUNCH((paged_attention_kernel<T, kD, R>), grid, dim3(32 * kWarps), (Shape<T, kD, R>::kSharedBytes), stream, a);
}

template <class T, int kD>
void start_rows(AttentionArguments a, int64_t processors, Stream stream) {
  const int64_t group = a.H / a.cache.G, R = rows_of_block(a.sequences.max_query, group);
  const int64_t blocks = a.sequences.count * a.cache.G * ceil_div(a.sequences.max_query * group, R);
  a.walk = chunks_of_block(blocks, a.chunks, processors);
  R == 1 ? start<T, kD, 1>(a, stream) : start<T, kD, 4>(a, stream);
}

template <class T>
void start_heads(const AttentionArguments& a, int64_t processors, Stream stream) {
  const int64_t D = head_class(a.cache.D);
  D == 64    ? start_rows<T, 64>(a, processors, stream)
  : D == 128 ? start_rows<T, 128>(a, processors, stream)
             : start_rows<T, 256>(a, processors, stream);
}

// Of a cache of int8 and float8: paged_attention_bytes.cu, which compiles beside the others.
void attend_bytes(const AttentionArguments& a, int64_t processors, Stream stream);

}  // namespace cuda
}  // namespace fastgpt
