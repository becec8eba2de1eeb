// Attention of a few query tokens a sequence over a paged KV cache (Kwon et al. 2023, arXiv:2309.06180), split over the
// keys (flash decoding: Dao et al. 2023): what the kernels share. paged_attention.cu has the one for caches of floats,
// paged_attention_bytes.cu the one for caches of one byte a number.
//
// A block of 4 warps takes one key head of one sequence, up to 8 query rows, and a walk of chunks of kChunk keys. Each warp
// copies its keys into its own part of the shared memory, some stages ahead, so that the loop needs no barrier.
// A chunk ends with a partial result (numerator, maximum, sum) of its own, whatever block walked over it; a second
// kernel adds the chunks up in order. So a row has the same bits in any batch and under any split.
#pragma once
#include "platform.cuh"

#include "errors.h"
#include "launch_rules.h"
#include "numbers.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kWarps = 4, kStages = 3;  // stages: under way or in use
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

// The rows of the cache that hold the keys of a block's sequence.
struct Pages {
  const AttentionArguments& a;
  const Place& place;
  const int32_t* table;
  unsigned page_rows, first;  // of all key heads; this one's first
  bool bad = false;           // a page that the cache does not have

  __device__ __forceinline__ Pages(const AttentionArguments& a, const Place& place)
      : a(a), place(place), table(a.sequences.tables + place.sequence * a.sequences.table_stride) {
    page_rows = (unsigned)(a.cache.G * a.cache.page_size), first = (unsigned)(place.g * a.cache.page_size);
    dev::keep(table);
  }
  // Whether somebody needs key k and there is a page that has it, in that row. Of another key it looks for a neighbour
  // that is needed, which spares a branch.
  __device__ __forceinline__ bool find(int k, uint64_t& row) {
    const int near = min(max(k, place.begin), place.end - 1);
    const int page_of = a.page_reciprocal ? (int)__umulhi((unsigned)near, a.page_reciprocal) : near, page = __ldg(table + page_of);
    const bool there = (unsigned)page < (unsigned)a.cache.pages;
    bad |= !there;
    row = (uint64_t)(unsigned)page * page_rows + (first + near - page_of * (unsigned)a.cache.page_size);
    return there && near == k;
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

// (maximum, sum of the weights) of the rows of each warp.
typedef float Tops[kWarps][kMostRows][2];

// The warps' results of rows [first, first + count) of a chunk into one, which goes to `partial` or, where it is the only
// chunk, to out. sums: the first warp's (count, kD) numerators, the others' `pitch` floats apart.
template <int kD>
__device__ __forceinline__ void combine_warps(const AttentionArguments& a, const Place& p, int first, int count, int chunk,
                                              const float* sums, int pitch, const Tops& tops) {
  const int D = (int)a.cache.D;
  for (int i = threadIdx.x; i < count * kD; i += 32 * kWarps) {
    const int r = first + i / kD, d = i % kD;
    if (r >= p.rows || d >= D) continue;
    const float3 all = add_partials(sums + i, pitch, tops[0][r], 2 * kMostRows, kWarps);
    if (!a.partial) {
      store_number(a.out, a.dtype, p.token(r) * a.out_stride + p.head(r) * D + d, all.x / all.z);
      continue;
    }
    float* to = a.partial + ((p.token(r) * a.H + p.head(r)) * a.chunks + chunk) * (D + 2);
    to[d] = all.x;
    if (d == 0) to[D] = all.y, to[D + 1] = all.z;
  }
}

// Ends a chunk of kRows rows of kD numbers, as many at a time as find room in the stage that the walk has just used, a warp's
// `pitch` floats behind the other's. write(first, count, to): a lane's numerators of those rows to a warp's (count, kD).
template <int kD, int kRows, int kStageBytes, class Write>
__device__ __forceinline__ void end_rows(const AttentionArguments& a, const Place& p, int chunk, float* stage, const Tops& tops,
                                         Write write) {
  constexpr int kFit = kStageBytes / (kD * 4), kCount = kFit < kRows ? kFit : kRows, kPitch = kStages * kStageBytes / 4;
#pragma unroll
  for (int first = 0; first < kRows; first += kCount) {
    if (first >= p.rows) break;
    write(first, kCount, stage + threadIdx.x / 32 * kPitch);
    __syncthreads();
    combine_warps<kD>(a, p, first, kCount, chunk, stage, kPitch, tops);
    __syncthreads();  // the sums have been read
  }
}

// A block's walk over its keys. Queue: fetch(stage) starts the copies of a stage; State: load_queries(), clear(), take(queue,
// stage), end(queue, chunk, the first warp's part of that stage).
template <class S, class Queue, class State>
__device__ __forceinline__ void walk_keys(const Place& place, Queue& keys, State& state, char* shared) {
  const int begin = place.begin / S::kBlockKeys, end = (place.end + S::kBlockKeys - 1) / S::kBlockKeys;
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ahead++) {
    if (begin + ahead < end) keys.fetch(begin + ahead);
    dev::cp_commit();
  }
  state.load_queries();
  state.clear();
  for (int stage = begin; stage < end; stage++) {
    dev::cp_wait<kStages - 2>();
    __syncwarp();  // what all lanes have copied is there, and what they have read may be written over
    if (stage + kStages - 1 < end) keys.fetch(stage + kStages - 1);
    dev::cp_commit();
    state.take(keys, stage);
    if ((stage + 1) % (kChunk / S::kBlockKeys) != 0 && stage + 1 < end) continue;
    state.end(keys, stage / (kChunk / S::kBlockKeys), (float*)(shared + stage % kStages * S::kStageBytes));
    state.clear();
  }
  dev::cp_wait<0>();
}

// ---- launching ------------------------------------------------------------------------------------------------------

// kernel: for heads of up to kD and R query rows a block.
template <class S, int R, class Kernel>
void start(Kernel kernel, AttentionArguments a, int64_t processors, Stream stream) {
  const Sequences& s = a.sequences;
  const int64_t heads = a.cache.G * ceil_div(s.max_query * (a.H / a.cache.G), R);
  a.walk = chunks_of_block(s.count * heads, a.chunks, processors);
  const dim3 grid((unsigned)heads, (unsigned)ceil_div(a.chunks, a.walk), (unsigned)s.count);
  LAUNCH((kernel), grid, dim3(32 * kWarps), (kStages * kWarps * S::kStageBytes), stream, a);
}

// Of a cache of int8 and float8.
void attend_bytes(const AttentionArguments& a, int64_t processors, Stream stream);

}  // namespace cuda
}  // namespace fastgpt
