// Weights packed once, in the order in which a product reads them: for decoding, where a product of few rows waits for
// memory alone, and for the prompt, where the same panels feed tiles of rows.
//
// A panel holds kTileCols columns. For each step of k it holds, for each of its columns, one number (float32), two (bfloat16),
// four (int8) or eight (int4), so that a vector load gives neighbouring columns. int8 has a scale for each column at the
// panel's end, int4 one for each column and group of kGroup numbers behind the group's steps.
//
// Integer weights are multiplied by rows of integers, with exact sums. int8 weights take 16-bit ones with a scale for the
// row: as fast as 8-bit ones without VNNI, and fine enough for the outliers of GPT-2's activations. With VNNI, which
// multiplies bytes at twice the rate, they take 8-bit ones with a scale for each group of kGroup. int4 weights take
// 8-bit ones with a scale for each group, whose products fit into 16 bits for a whole group.

namespace fastgpt {
namespace {

constexpr int64_t kGroup = 32;   // numbers that share a scale
constexpr int64_t kChain = 256;  // products summed before they are added to the sum so far
constexpr int64_t kMostInteger = 32767;  // |16-bit row entry|: kChain products with int8 stay inside an int32

template <int kFormat>
struct Format;

// Input: what the products take of a row.
template <>
struct Format<kPackedFloat32> {
  typedef float Input;
};
template <>
struct Format<kPackedBFloat16> {
#if defined(HALF_DOTS)
  typedef bf16 Input;
#else
  typedef float Input;
#endif
};
template <>
struct Format<kPackedInt8> {
#if defined(BYTE_DOTS)
  typedef int8_t Input;
#else
  typedef int16_t Input;
#endif
};
template <>
struct Format<kPackedInt4> {
  typedef int8_t Input;
};

#if defined(HALF_DOTS)
constexpr bool kHalfDots = true;
#else
constexpr bool kHalfDots = false;
#endif
#if defined(BYTE_DOTS)
constexpr bool kByteDots = true;
#else
constexpr bool kByteDots = false;
#endif

// A row's length as the kernels read it: whole steps and, of int4, whole groups.
INLINE int64_t padded_k(int format, int64_t K) {
  if (format == kPackedInt4) return ceil_div(K, kGroup) * kGroup;
  return format == kPackedInt8 ? ceil_div(K, 4) * 4 : format == kPackedBFloat16 ? ceil_div(K, 2) * 2 : K;
}

// In whole cache lines, so that every panel begins at one.
int64_t panel_bytes(int format, int64_t K) {
  int64_t Kp = padded_k(format, K), bytes = 4 * kTileCols * Kp;
  if (format == kPackedBFloat16) bytes /= 2;
  if (format == kPackedInt8) bytes = bytes / 4 + 4 * kTileCols;
  if (format == kPackedInt4) bytes = bytes / 8 + Kp / kGroup * 2 * kTileCols;
  return ceil_div(bytes, 64) * 64;
}

// From here on: a panel of floats (K, kTileCols) becomes a panel of a format.

INLINE void pack_floats(const float* from, int64_t K, uint8_t* to) { memcpy(to, from, sizeof(float) * K * kTileCols); }

INLINE void pack_halves(const float* from, int64_t K, uint8_t* to) {
  for (int64_t k = 0; k < K; k += 2, to += 4 * kTileCols)
    for (int v = 0; v < kTileVecs; v++) {
      UintVec low = round_to_half(load(from + k * kTileCols + v * W)) >> 16;
      UintVec high = k + 1 < K ? round_to_half(load(from + (k + 1) * kTileCols + v * W)) & 0xFFFF0000 : UintVec{};
      UintVec pair = low | high;
      memcpy(to + 4 * v * W, &pair, sizeof pair);
    }
}

INLINE Vec highest_magnitudes(const float* from, int64_t n) {  // of each lane's column
  IntVec top = {};
  for (int64_t k = 0; k < n; k++) top = higher_magnitude(top, load(from + k * kTileCols));
  return as_float(top);
}

// Of a column of weights the nearest multiples of its scale, the largest magnitude / 127.
INLINE void pack_bytes(const float* from, int64_t K, uint8_t* to) {
  Vec inverse[kTileVecs];
  float* scales = (float*)(to + kTileCols * padded_k(kPackedInt8, K));
  for (int v = 0; v < kTileVecs; v++) {
    const Vec top = highest_magnitudes(from + v * W, K);
    inverse[v] = top > 0.0f ? 127.0f / top : Vec{};
    store(scales + v * W, top * (1.0f / 127.0f));
  }
  for (int64_t k = 0; k < K; k += 4, to += 4 * kTileCols)
    for (int v = 0; v < kTileVecs; v++) {
      IntVec four = {};
      for (int64_t i = 0; i < min(4, K - k); i++)
        four |= (round_to_int(load(from + (k + i) * kTileCols + v * W) * inverse[v]) & 255) << (int)(8 * i);
      memcpy(to + 4 * v * W, &four, sizeof four);
    }
}

// The numbers -8 .. 7 nearest to n weights over a scale, which lies in the vector's lanes; their squared error.
INLINE Vec int4_error(const float* from, int64_t n, Vec inverse, Vec scale) {
  Vec error = {};
  for (int64_t k = 0; k < n; k++) {
    Vec weight = load(from + k * kTileCols);
    Vec rounded = max(splat(-8.0f), min(splat(7.0f), to_floats(round_to_int(weight * inverse))));
    Vec d = weight - rounded * scale;
    error = error + d * d;
  }
  return error;
}
INLINE Vec inverse_of(Vec scale) { return as_float(as_int(1.0f / scale) & (scale != 0.0f)); }

// The scale, a bfloat16 number, that leaves the least squared error among some around the one that maps the group's
// largest weight to -8.
INLINE Vec int4_scale(const float* from, int64_t n) {
  constexpr int kTried = 12;
  Vec low = {}, high = {}, best = {}, least = splat(INFINITY);
  for (int64_t k = 0; k < n; k++) {
    Vec weight = load(from + k * kTileCols);
    low = min(low, weight), high = max(high, weight);
  }
  Vec extreme = -low > high ? low : high;
  for (int i = 0; i < kTried; i++) {
    Vec scale = stored((const bf16*)nullptr, extreme / (-9.5f + 0.25f * i));
    Vec error = int4_error(from, n, inverse_of(scale), scale);
    IntVec better = error < least;
    least = better ? error : least, best = better ? scale : best;
  }
  const Vec highest = highest_magnitudes(from, n);
  return highest == highest ? best : highest;
}

// Which of eight numbers lies in nibble i: the lower nibbles of the four bytes are the first four.
constexpr int kNibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

INLINE void pack_nibbles(const float* from, int64_t K, uint8_t* to) {
  for (int64_t group = 0; group < K; group += kGroup) {
    int64_t n = min(kGroup, K - group);
    bf16* scales = (bf16*)(to + kGroup / 2 * kTileCols);
    for (int v = 0; v < kTileVecs; v++) {
      const float* first = from + group * kTileCols + v * W;
      Vec scale = int4_scale(first, n), inverse = inverse_of(scale);
      store(scales + v * W, scale);
      for (int64_t k = 0; k < kGroup; k += 8) {
        IntVec eight = {};
        for (int i = 0; i < 8; i++) {
          int64_t at = k + kNibble[i];
          Vec ratio = at < n ? load(first + at * kTileCols) * inverse : Vec{};
          eight |= (round_to_int(max(splat(-8.0f), min(splat(7.0f), ratio))) + 8) << (4 * i);
        }
        memcpy(to + k / 2 * kTileCols + 4 * v * W, &eight, sizeof eight);
      }
    }
    to += kGroup / 2 * kTileCols + 2 * kTileCols;
  }
}

// weight: (N, K) of any strides, as `Matrix`; panels: ceil(N / kTileCols) of panel_bytes().
void pack_weight(int format, const Matrix& weight, uint8_t* panels) {
  const int64_t N = weight.rows, K = weight.cols, bytes = panel_bytes(format, K);
  const Matrix columns = {weight.dtype, weight.data, K, N, weight.col, weight.row};
  parallel(ceil_div(N, kTileCols), [&](int64_t t) {
    float* floats = (float*)scratch(kGemmScratch, sizeof(float) * panel_size<kTileCols>(K));
    uint8_t* to = panels + t * bytes;
    pack_columns(columns, t * kTileCols, min(N, (t + 1) * kTileCols), 0, K, floats);
    if (format == kPackedFloat32) pack_floats(floats, K, to);
    if (format == kPackedBFloat16) pack_halves(floats, K, to);
    if (format == kPackedInt8) pack_bytes(floats, K, to);
    if (format == kPackedInt4) pack_nibbles(floats, K, to);
  });
}

// Column n of packed weights as floats: an embedding's row, when the head and the embedding are one.
void unpack_column(const Packed& w, int64_t n, float* out) {
  const uint8_t* panel = w.data + n / kTileCols * panel_bytes(w.format, w.K);
  const int64_t c = n % kTileCols;
  const float scale = w.format == kPackedInt8 ? ((const float*)(panel + kTileCols * padded_k(w.format, w.K)))[c] : 1.0f;
  for (int64_t k = 0; k < w.K; k++) {
    if (w.format == kPackedFloat32) out[k] = ((const float*)panel)[k * kTileCols + c];
    if (w.format == kPackedBFloat16) out[k] = to_float(((const bf16*)panel)[k / 2 * 2 * kTileCols + 2 * c + k % 2]);
    if (w.format == kPackedInt8) out[k] = scale * ((const int8_t*)panel)[k / 4 * 4 * kTileCols + 4 * c + k % 4];
    if (w.format == kPackedInt4) {
      const uint8_t* group = panel + k / kGroup * (kGroup / 2 * kTileCols + 2 * kTileCols);
      const int64_t in_group = k % kGroup;
      uint32_t eight;
      memcpy(&eight, group + in_group / 8 * 4 * kTileCols + 4 * c, 4);
      int nibble = 0;
      while (kNibble[nibble] != in_group % 8) nibble++;
      out[k] = ((int)(eight >> (4 * nibble) & 15) - 8) * to_float(((const bf16*)(group + kGroup / 2 * kTileCols))[c]);
    }
  }
}

INLINE UintVec absorb(UintVec sum, const void* numbers) {
  UintVec mixed = (sum ^ (UintVec)load_ints(numbers)) * 0x9E3779B1u;
  return mixed ^ mixed >> 15;  // a product alone carries nothing downwards: flipped signs would cancel out
}
// A hash of the data: to see whether weights that were packed have changed since.
uint64_t fingerprint(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kBlock = 1 << 20;
  constexpr uint64_t kPrime = 0x9E3779B97F4A7C15ull;
  uint64_t parts[64] = {};
  const int64_t blocks = ceil_div(bytes, kBlock), tasks = min(64, blocks);
  parallel(tasks, [&](int64_t t) {
    for (int64_t b = t; b < blocks; b += tasks) {
      const uint8_t* at = data + b * kBlock;
      const int64_t n = min(kBlock, bytes - b * kBlock);
      uint32_t lanes[4 * W], tail[4 * W] = {};
      UintVec sum[4];
      for (int i = 0; i < 4; i++) sum[i] = (UintVec)lane_index() + (uint32_t)(b * 64 + i);
      int64_t k = 0;
      for (; k + 16 * W <= n; k += 16 * W)
        UNROLL for (int i = 0; i < 4; i++) sum[i] = absorb(sum[i], at + k + 4 * i * W);
      memcpy(tail, at + k, n - k);
      for (int i = 0; i < 4; i++) sum[i] = absorb(sum[i], tail + i * W);
      memcpy(lanes, sum, sizeof lanes);
      for (uint32_t lane : lanes) parts[t] = ((parts[t] ^ lane) * kPrime) ^ parts[t] >> 29;
    }
  });
  uint64_t all = (uint64_t)bytes;
  for (uint64_t part : parts) all = (all ^ part) * kPrime;
  return all;
}

}  // namespace
}  // namespace fastgpt
