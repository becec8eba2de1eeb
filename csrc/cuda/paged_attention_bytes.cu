// Attention over caches of one byte a number, on the tensor cores: see paged_attention.cuh for what it shares with the other.
//
// On the ordinary pipes turning a byte into a float costs more than the product that it is for. Bytes are exact in float16,
// two of which are made at once, and one product of matrices serves the 8 query rows of a block; what is not exact there
// is the sum of two float16, 22 bits: a query's numbers and the weights of the values. Sums are float32.
//
// Lane 4 g + q has query row g. Scores: queries (8 of high parts, 8 of low ones) x 8 keys, over the head's numbers. Of it the lane
// gets the scores of two keys, and the next product takes from it the weights of just these. That one runs over the keys: but
// what lies side by side in a register are two numbers of one key. So it runs over (key, first or second of a pair), and its 16
// rows are each query's weights twice: once with a zero for every second number, once for every first.
#include "platform.cuh"

#include "paged_attention.cuh"

namespace fastgpt {
namespace cuda {

constexpr float kQueryUnits = 1024.0f;    // the power of two that a row's largest query number gets
constexpr float kWeightPower = 14.0f;     // its logarithm for the largest weight: room for smaller ones' low parts
constexpr float kLeastPower = -100.0f;    // of the scales' powers

template <int kD>
struct ByteShape {
  static constexpr int kLanes = kD / 16;                        // that copy a key together, 16 bytes each
  static constexpr int kKeys = 32 / kLanes, kTurns = 4;         // of a warp at once; of a stage
  static constexpr int kStageKeys = kKeys * kTurns;             // of a warp
  static constexpr int kBlockKeys = kStageKeys * kWarps;        // of a block's stage
  static constexpr int kStageBytes = 2 * kStageKeys * (kD + 4); // of a warp: k, v, their scales
  static constexpr int kTiles = kStageKeys / 8;                 // of scores
  static constexpr int kSteps = kD / 16;                        // of a score: products over 16 numbers
  static constexpr int kSumTiles = kD / 16;                     // of a row's sums, 16 numbers each
  static constexpr int kWords = kD / 32;                        // 4 numbers each, that a lane takes of a value
  static_assert(kChunk % kBlockKeys == 0, "a chunk is whole stages");
};

// Numbers 0 and 2 (odd: 1 and 3) of a word as two float16, of e4m3 divided by kUnit.
template <class T>
constexpr float kUnit = 1.0f;
template <>
constexpr float kUnit<e4m3> = 256.0f;

__device__ __forceinline__ uint32_t pair_of(uint32_t word, bool odd, int8_t) {
  return of_bytes(word ^ 0x80808080u, odd, __half{});
}
// e4m3's bits, moved to where float16 has them, are 2**-8 of the number, of subnormal ones too.
__device__ __forceinline__ uint32_t pair_of(uint32_t word, bool odd, e4m3) {
  const uint32_t two = odd ? word : word << 8;
  return (two & 0x80008000u) | (two >> 1 & 0x3F803F80u);
}

// Two numbers as float16, and what they lack.
struct Parts {
  uint32_t high, low;
};
__device__ __forceinline__ Parts parts_of(float x, float y) {
  const __half2 high = __floats2half2_rn(x, y);
  const float2 rounded = __half22float2(high);
  return {bit_cast<uint32_t>(high), bit_cast<uint32_t>(__floats2half2_rn(x - rounded.x, y - rounded.y))};
}

// Keys of one warp, from their pages into its part of the shared memory. Of a stage: the rows of k, those of v, the scales
// of k and of v. A row's pieces of 16 bytes are mixed so that the lanes that read at once find them in different banks.
template <int kD>
struct ByteQueue {
  typedef ByteShape<kD> S;
  Pages pages;
  char* buffer;
  const float* scales;  // that this lane copies: one lane of a key those of k, another those of v
  int lane;

  __device__ __forceinline__ ByteQueue(const AttentionArguments& a, const Place& place, char* shared)
      : pages(a, place), lane(threadIdx.x % 32) {
    buffer = shared + threadIdx.x / 32 * kStages * S::kStageBytes;
    scales = lane % S::kLanes ? a.cache.v_scale : a.cache.k_scale;
    dev::keep(scales);
  }
  __device__ __forceinline__ int first_key(int stage) const {
    return stage * S::kBlockKeys + threadIdx.x / 32 * S::kStageKeys;
  }
  // Piece i of key `key` of the 8 of a tile.
  __device__ __forceinline__ char* piece(int stage, int value, int tile, int key, int i) const {
    const int mixed = i ^ (((key & 2) | (key & 1) << 2) & (S::kLanes - 1));
    return buffer + stage % kStages * S::kStageBytes + (value * S::kStageKeys + tile * 8) * kD + key * kD + mixed * 16;
  }
  __device__ __forceinline__ float* scale(int stage, int value, int tile, int key) const {
    return (float*)(buffer + stage % kStages * S::kStageBytes + 2 * S::kStageKeys * kD) + value * S::kStageKeys + tile * 8 + key;
  }
  // Starts the copies of a stage. Numbers that nobody needs become zeros; their scales are not looked at.
  __device__ __forceinline__ void fetch(int stage) {
    const PagedCache& cache = pages.a.cache;
    const unsigned i = lane % S::kLanes, row_bytes = (unsigned)cache.row;
#pragma unroll
    for (int turn = 0; turn < S::kTurns; turn++) {
      const int tile = turn * S::kKeys / 8, key = turn * S::kKeys % 8 + lane / S::kLanes;
      uint64_t row;
      const bool wanted = pages.find(first_key(stage) + tile * 8 + key, row), there = wanted && i * 16 < row_bytes;
      const uint64_t at = row * row_bytes + i * 16;
      dev::cp_async<16>(piece(stage, 0, tile, key, i), (const char*)cache.k + at, there);
      dev::cp_async<16>(piece(stage, 1, tile, key, i), (const char*)cache.v + at, there);
      if (wanted && i < 2) dev::cp_async<4>(scale(stage, i, tile, key), scales + row, true);
    }
  }
};

// What a lane has of the queries, and of softmax(q k) v over the keys that the warp saw, for its query row.
template <class T, int kD>
struct ByteState {
  typedef ByteShape<kD> S;
  const AttentionArguments& a;
  const Place& p;
  Tops& tops;
  uint32_t q[S::kSteps][4];
  float sum[S::kSumTiles][4], top, weight, power;  // sum: in units of 2**(power - kWeightPower)
  float unit;                                      // of the scores
  int first, count;                                // the keys that the row sees

  __device__ __forceinline__ void clear() {
    top = -INFINITY, weight = 0.0f, power = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kSumTiles; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
  }
  static __device__ __forceinline__ int row() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int quarter() { return threadIdx.x % 4; }
  // Which key of 8 column c of the scores is: the lane's are columns 2 q and 2 q + 1.
  static __device__ __forceinline__ int key_of(int c) { return c >> 1 ^ (c & 1) * 5; }

  __device__ __forceinline__ void load_queries() {
    const int r = row();
    const bool there = r < p.rows;
    const int64_t at = there ? p.token(r) * a.q_stride + p.head(r) * a.cache.D : 0;
    first = there ? first_key(p.position(r), a.window) : 0;
    count = there ? p.position(r) + 1 - first : 0;
    const auto number = [&](int step, int i) {
      const int column = (step / 4 * 4 + quarter()) * 16 + step % 4 * 4 + i;
      return there && column < a.cache.D ? load_number(a.q, a.dtype, at + column) : 0.0f;
    };
    float most = 0x1p-100f;
#pragma unroll
    for (int step = 0; step < S::kSteps; step++)
#pragma unroll
      for (int i = 0; i < 4; i++) most = fmaxf(most, fabsf(number(step, i)));
    most = fmaxf(most, __shfl_xor_sync(dev::kAllLanes, most, 1));
    most = fmaxf(most, __shfl_xor_sync(dev::kAllLanes, most, 2));
    const float power = bit_cast<float>(bit_cast<uint32_t>(most) & 0x7F800000u), to_units = kQueryUnits / power;
    unit = power / kQueryUnits * (a.scale * kUnit<T>);
#pragma unroll
    for (int step = 0; step < S::kSteps; step++)
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const Parts two = parts_of(number(step, odd) * to_units, number(step, odd + 2) * to_units);
        q[step][2 * odd] = two.high, q[step][2 * odd + 1] = two.low;
      }
  }
  // Of the lane's keys of a tile: the scores and the values' scales.
  __device__ __forceinline__ void scores(const ByteQueue<kD>& keys, int stage, int tile, float (&x)[2], float (&scale)[2]) const {
    float d[4] = {};
#pragma unroll
    for (int step = 0; step < S::kSteps; step += 4) {
      const uint4 four = *(const uint4*)keys.piece(stage, 0, tile, key_of(row()), step + quarter());
      const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
        dev::mma_m16n8k16<__half>(d, q[step + i], {pair_of(words[i], false, T{}), pair_of(words[i], true, T{})});
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int key = key_of(2 * quarter() + j), position = keys.first_key(stage) + 8 * tile + key;
      const bool seen = (unsigned)(position - first) < (unsigned)count;
      x[j] = seen ? (d[j] + d[j + 2]) * (unit * *keys.scale(stage, 0, tile, key)) : -INFINITY;
      scale[j] = seen ? *keys.scale(stage, 1, tile, key) : 0.0f;
    }
  }
  // sum += the weights w of the lane's keys of a tile, times the values.
  __device__ __forceinline__ void add_values(const ByteQueue<kD>& keys, int stage, int tile, const float (&w)[2]) {
    const Parts both = parts_of(w[0], w[1]);
    const uint32_t high[4] = {both.high & 0xFFFF, both.high << 16, both.high >> 16, both.high & 0xFFFF0000u};
    const uint32_t low[4] = {both.low & 0xFFFF, both.low << 16, both.low >> 16, both.low & 0xFFFF0000u};
    uint32_t words[2][S::kWords];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int key = key_of(2 * quarter() + j);
      if constexpr (kD == 64) {
        const uint2 two = *(const uint2*)(keys.piece(stage, 1, tile, key, row() / 2) + row() % 2 * 8);
        words[j][0] = two.x, words[j][1] = two.y;
      } else {
#pragma unroll
        for (int i = 0; i < S::kWords; i += 4) {
          const uint4 four = *(const uint4*)keys.piece(stage, 1, tile, key, 2 * i + row());
          words[j][i] = four.x, words[j][i + 1] = four.y, words[j][i + 2] = four.z, words[j][i + 3] = four.w;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < S::kSumTiles; i++) {
      const uint32_t v[2] = {pair_of(words[0][i / 2], i % 2, T{}), pair_of(words[1][i / 2], i % 2, T{})};
      dev::mma_m16n8k16<__half>(sum[i], high, v);
      dev::mma_m16n8k16<__half>(sum[i], low, v);
    }
  }
  // The number of the head that sum[i][c] is of.
  static __device__ __forceinline__ int column(int i, int c) {
    const int of_value = 2 * quarter() + c % 2, in_word = i % 2 + c / 2 * 2;  // whose words the lane of that row takes
    if (kD == 64) return of_value * 8 + i / 2 * 4 + in_word;
    return (i / 8 * 8 + of_value) * 16 + i / 2 % 4 * 4 + in_word;
  }
  __device__ __forceinline__ void take(const ByteQueue<kD>& keys, int stage) {
    // highest: of the logarithms of the weights times their scales, by which these fit into float16.
    float x[S::kTiles][2], scale[S::kTiles][2], new_top = top, highest = -INFINITY, added = 0.0f;
#pragma unroll
    for (int tile = 0; tile < S::kTiles; tile++) {
      scores(keys, stage, tile, x[tile], scale[tile]);
#pragma unroll
      for (int j = 0; j < 2; j++)
        new_top = fmaxf(new_top, x[tile][j]), highest = fmaxf(highest, x[tile][j] + dev::lg2(scale[tile][j]));
    }
#pragma unroll
    for (int o = 1; o < 4; o *= 2) {
      new_top = fmaxf(new_top, __shfl_xor_sync(dev::kAllLanes, new_top, o));
      highest = fmaxf(highest, __shfl_xor_sync(dev::kAllLanes, highest, o));
    }
    const float base = new_top == -INFINITY ? 0.0f : new_top, lower = top - base;
    const float new_power = ceilf(fmaxf(fmaxf(highest - base, lower + power), kLeastPower));
    const float rescale = dev::ex2(lower + (power - new_power)), units = dev::ex2(kWeightPower - new_power);
#pragma unroll
    for (int i = 0; i < S::kSumTiles; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) sum[i][c] *= rescale;
#pragma unroll
    for (int tile = 0; tile < S::kTiles; tile++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float exponential = dev::ex2(x[tile][j] - base);
        added += exponential;
        x[tile][j] = exponential * scale[tile][j] * units;
      }
      add_values(keys, stage, tile, x[tile]);
    }
    weight = fmaf(weight, dev::ex2(lower), added), top = new_top, power = new_power;
  }
  __device__ __forceinline__ void end(const ByteQueue<kD>& keys, int chunk, float* stage) {
    weight += __shfl_xor_sync(dev::kAllLanes, weight, 1);
    weight += __shfl_xor_sync(dev::kAllLanes, weight, 2);
    const bool bad = __ballot_sync(dev::kAllLanes, keys.pages.bad) != 0;
    __syncwarp();  // every lane has read its keys
    end_rows<kD, kMostRows, S::kStageBytes>(a, p, chunk, stage, tops, [&](int begin, int count, float* to) {
      const int r = row(), warp = threadIdx.x / 32;
      const float units = dev::ex2(power - kWeightPower) * kUnit<T>;
      if (r < begin || r >= begin + count) return;
#pragma unroll
      for (int i = 0; i < S::kSumTiles; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) to[(r - begin) * kD + column(i, c)] = sum[i][c] * units;
      if (quarter() == 0) tops[warp][r][0] = top, tops[warp][r][1] = bad ? NAN : weight;
    });
  }
};

template <class T, int kD>
__global__ void __launch_bounds__(32 * kWarps) paged_attention_bytes_kernel(AttentionArguments a) {
  DYNAMIC_SHARED(char, shared);
  __shared__ Tops tops;
  const Place place = find_place<kMostRows>(a);
  if (place.rows <= 0 || place.begin >= place.end) return;
  ByteQueue<kD> keys(a, place, shared);
  ByteState<T, kD> state{a, place, tops};
  walk_keys<ByteShape<kD>>(place, keys, state, shared);
}

template <class T>
void start_byte_heads(const AttentionArguments& a, int64_t processors, Stream stream) {
  const int64_t D = head_class(a.cache.D);
  D == 64    ? start<ByteShape<64>, kMostRows>(paged_attention_bytes_kernel<T, 64>, a, processors, stream)
  : D == 128 ? start<ByteShape<128>, kMostRows>(paged_attention_bytes_kernel<T, 128>, a, processors, stream)
             : start<ByteShape<256>, kMostRows>(paged_attention_bytes_kernel<T, 256>, a, processors, stream);
}

void attend_bytes(const AttentionArguments& a, int64_t processors, Stream stream) {
  a.cache.dtype == kInt8 ? start_byte_heads<int8_t>(a, processors, stream) : start_byte_heads<e4m3>(a, processors, stream);
}

}  // namespace cuda
}  // namespace fastgpt
