// Weights packed once, in the order in which a product reads them: for decoding, where a product of few rows waits for
// memory alone, and for the prompt, where the same panels feed tiles of rows.
//
// A panel holds kTileCols columns. For each step of k it holds, for each of its columns, one number (float32), two (bfloat16),
// four (int8) or eight (int4), so that a vector load gives neighbouring columns. int8 has a scale for each column at the
// panel's end, int4 one for each column and group of kInt4Group numbers behind the group's steps.
//
// Integer weights are multiplied by rows of integers, with exact sums. int8 weights take 16-bit ones with a scale for the
// row: as fast as 8-bit ones without VNNI, and fine enough for the outliers of GPT-2's activations. int4 weights take
// 8-bit ones with a scale for each group, whose products fit into 16 bits for a whole group.

namespace fastgpt {
namespace {

constexpr int64_t kInt4Group = 32;
constexpr int64_t kChain = 256;       // products summed before they are added to the sum so far
constexpr int64_t kMostInteger = 32767;  // |16-bit row entry|: kChain products with int8 stay inside an int32

template <int kFormat>
struct Format;

template <bool kFirst, class A, class B>
struct Choose {
  typedef A Type;
};
template <class A, class B>
struct Choose<false, A, B> {
  typedef B Type;
};

// Input: what the products take of a row.
template <>
struct Format<kPackedFloat32> {
  typedef float Input;
};
#if defined(HALF_DOTS)
constexpr bool kHalfDots = true;
#else
constexpr bool kHalfDots = false;
#endif
template <>
struct Format<kPackedBFloat16> {
  typedef Choose<kHalfDots, bf16, float>::Type Input;
};
template <>
struct Format<kPackedInt8> {
  typedef int16_t Input;
};
template <>
struct Format<kPackedInt4> {
  typedef int8_t Input;
};

// A row's length as the kernels read it: whole steps and, of int4, whole groups.
INLINE int64_t padded_k(int format, int64_t K) {
  if (format == kPackedInt4) return ceil_div(K, kInt4Group) * kInt4Group;
  return format == kPackedInt8 ? ceil_div(K, 4) * 4 : format == kPackedBFloat16 ? ceil_div(K, 2) * 2 : K;
}

// In whole cache lines, so that every panel begins at one.
int64_t panel_bytes(int format, int64_t K) {
  int64_t Kp = padded_k(format, K), bytes = 4 * kTileCols * Kp;
  if (format == kPackedBFloat16) bytes /= 2;
  if (format == kPackedInt8) bytes = bytes / 4 + 4 * kTileCols;
  if (format == kPackedInt4) bytes = bytes / 8 + Kp / kInt4Group * 2 * kTileCols;
  return ceil_div(bytes, 64) * 64;
}

// ---- packing: a panel of floats (K, kTileCols) becomes a panel of a format -----------------------------------------

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

// Of a column of weights the nearest multiples of its scale, the largest magnitude / 127.
INLINE void pack_bytes(const float* from, int64_t K, uint8_t* to) {
  Vec inverse[kTileVecs];
  float* scales = (float*)(to + kTileCols * padded_k(kPackedInt8, K));
  for (int v = 0; v < kTileVecs; v++) {
    Vec top = {};
    for (int64_t k = 0; k < K; k++) top = max(top, absolute(load(from + k * kTileCols + v * W)));
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
  return best;
}

// Which of eight numbers lies in nibble i: the lower nibbles of the four bytes are the first four.
constexpr int kNibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

INLINE void pack_nibbles(const float* from, int64_t K, uint8_t* to) {
  for (int64_t group = 0; group < K; group += kInt4Group) {
    int64_t n = min(kInt4Group, K - group);
    bf16* scales = (bf16*)(to + kInt4Group / 2 * kTileCols);
    for (int v = 0; v < kTileVecs; v++) {
      const float* first = from + group * kTileCols + v * W;
      Vec scale = int4_scale(first, n), inverse = inverse_of(scale);
      store(scales + v * W, scale);
      for (int64_t k = 0; k < kInt4Group; k += 8) {
        IntVec eight = {};
        for (int i = 0; i < 8; i++) {
          int64_t at = k + kNibble[i];
          Vec ratio = at < n ? load(first + at * kTileCols) * inverse : Vec{};
          eight |= (round_to_int(max(splat(-8.0f), min(splat(7.0f), ratio))) + 8) << (4 * i);
        }
        memcpy(to + k / 2 * kTileCols + 4 * v * W, &eight, sizeof eight);
      }
    }
    to += kInt4Group / 2 * kTileCols + 2 * kTileCols;
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
      const uint8_t* group = panel + k / kInt4Group * (kInt4Group / 2 * kTileCols + 2 * kTileCols);
      const int64_t in_group = k % kInt4Group;
      uint32_t eight;
      memcpy(&eight, group + in_group / 8 * 4 * kTileCols + 4 * c, 4);
      int nibble = 0;
      while (kNibble[nibble] != in_group % 8) nibble++;
      out[k] = ((int)(eight >> (4 * nibble) & 15) - 8) * to_float(((const bf16*)(group + kInt4Group / 2 * kTileCols))[c]);
    }
  }
}

INLINE UintVec absorb(UintVec sum, const void* numbers) {
  UintVec mixed = (sum ^ (UintVec)load_ints(numbers)) * 0x9E3779B1u;
  return mixed ^ mixed >> 15;  // a product alone carries nothing downwards: flipped signs would cancel out
}
// A number that changes with any bit of the data: to see whether weights that were packed have changed since.
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

// ---- tiles: M rows by a panel --------------------------------------------------------------------------------------

// Rows up to which a product takes a panel's numbers as they are stored. For more it pays to unpack a panel first: to
// floats, or to the pairs of 16-bit integers that dot_pairs takes.
template <int kFormat>
constexpr int kDirectRows = kFormat == kPackedFloat32 || (kFormat == kPackedBFloat16 && kHalfDots) ? kTileRows : 4;
template <int kFormat>
constexpr bool kUnpacks = kDirectRows<kFormat> < kTileRows;
template <int kFormat>
constexpr int kUnpackedRows = kFormat == kPackedInt4 && FASTGPT_VEC_WIDTH < 16 ? 4 : kTileRows;

// What a tile asks memory for while it multiplies: at each of its steps what lies at `at`, which then moves on by `step`
// bytes. A single tile looks some way ahead in its own panel; of several each brings a part of the next panel, so that
// memory and arithmetic are busy all the time.
struct Ahead {
  const uint8_t* at;
  int64_t step;
  INLINE void prefetch() {
    UNROLL for (int64_t i = 0; i < 4 * kTileCols; i += 64) __builtin_prefetch(at + i);
    at += step;
  }
};
constexpr int64_t kAhead = 2048;  // bytes

// Input rows of a tile: row i begins at data + i * stride. Of integer rows, scale and sums: (rows, groups) where a group
// is kInt4Group numbers; of 16-bit rows the first scale is that of the whole row.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  const float* scale;
  const int32_t* sums;
  int64_t groups;
  INLINE Rows from(int64_t i) const { return {data + i * stride, stride, scale + i * groups, sums + i * groups, groups}; }
};

template <int M>
INLINE void clear(Vec (&sum)[M][kTileVecs]) {
  UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < kTileVecs; j++) sum[i][j] = Vec{};
}
template <int M>
INLINE void add_tile(Vec (&result)[M][kTileVecs], const Vec (&sum)[M][kTileVecs]) {
  UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < kTileVecs; j++) result[i][j] = result[i][j] + sum[i][j];
}

template <int kFormat, int M>
struct Multiply;

template <int M>
struct Multiply<kPackedFloat32, M> {
  static INLINE void run(Vec (&result)[M][kTileVecs], const Rows<float>& a, const uint8_t* panel, int64_t K, Ahead ahead) {
    const float* b = (const float*)panel;
    for (int64_t k = 0; k < K; k += kChain) {
      Vec sum[M][kTileVecs];
      clear(sum);
      const int64_t end = min(K, k + kChain);
      for (int64_t s = k; s < end; s++) {
        ahead.prefetch();
        Vec columns[kTileVecs];
        UNROLL for (int j = 0; j < kTileVecs; j++) columns[j] = load(b + s * kTileCols + j * W);
        UNROLL for (int i = 0; i < M; i++) {
          Vec number = splat(a.data[i * a.stride + s]);
          UNROLL for (int j = 0; j < kTileVecs; j++) sum[i][j] = sum[i][j] + number * columns[j];
        }
      }
      add_tile(result, sum);
    }
  }
};

#if defined(HALF_DOTS)
template <int M>
struct Multiply<kPackedBFloat16, M> {
  static INLINE void run(Vec (&result)[M][kTileVecs], const Rows<bf16>& a, const uint8_t* panel, int64_t K, Ahead ahead) {
    for (int64_t k = 0; k < K; k += kChain) {
      Vec sum[M][kTileVecs];
      clear(sum);
      const int64_t end = min(K, k + kChain);
      for (int64_t s = k; s < end; s += 2, panel += 4 * kTileCols) {
        ahead.prefetch();
        IntVec columns[kTileVecs];
        UNROLL for (int j = 0; j < kTileVecs; j++) columns[j] = load_ints(panel + 4 * j * W);
        UNROLL for (int i = 0; i < M; i++) {
          IntVec pair = splat_word(a.data + i * a.stride + s);
          UNROLL for (int j = 0; j < kTileVecs; j++) sum[i][j] = dot_halves(sum[i][j], pair, columns[j]);
        }
      }
      add_tile(result, sum);
    }
  }
};
#else
template <int M>
struct Multiply<kPackedBFloat16, M> {
  static INLINE void run(Vec (&result)[M][kTileVecs], const Rows<float>& a, const uint8_t* panel, int64_t K, Ahead ahead) {
    for (int64_t k = 0; k < K; k += kChain) {
      Vec sum[M][kTileVecs];
      clear(sum);
      const int64_t end = min(K, k + kChain);
      for (int64_t s = k; s < end; s += 2, panel += 4 * kTileCols) {
        ahead.prefetch();
        UNROLL for (int half = 0; half < 2; half++) {
          Vec columns[kTileVecs];
          UNROLL for (int j = 0; j < kTileVecs; j++) {
            IntVec pair = load_ints(panel + 4 * j * W);
            columns[j] = as_float(half ? pair & (int)0xFFFF0000 : pair << 16);
          }
          UNROLL for (int i = 0; i < M; i++) {
            Vec number = splat(a.data[i * a.stride + s + half]);
            UNROLL for (int j = 0; j < kTileVecs; j++) sum[i][j] = sum[i][j] + number * columns[j];
          }
        }
      }
      add_tile(result, sum);
    }
  }
};
#endif

template <int M>
struct Multiply<kPackedInt8, M> {
  static INLINE void run(Vec (&result)[M][kTileVecs], const Rows<int16_t>& a, const uint8_t* panel, int64_t K, Ahead ahead) {
    for (int64_t k = 0; k < K; k += kChain) {
      IntVec sum[M][kTileVecs];
      UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < kTileVecs; j++) sum[i][j] = IntVec{};
      const int64_t end = min(K, k + kChain);
      for (int64_t s = k; s < end; s += 4, panel += 4 * kTileCols) {
        ahead.prefetch();
        UNROLL for (int half = 0; half < 2; half++) {
          IntVec columns[kTileVecs];
          UNROLL for (int j = 0; j < kTileVecs; j++) {
            IntVec four = load_ints(panel + 4 * j * W);
            columns[j] = half ? high_bytes(four) : low_bytes(four);
          }
          UNROLL for (int i = 0; i < M; i++) {
            IntVec pair = splat_word(a.data + i * a.stride + s + 2 * half);
            UNROLL for (int j = 0; j < kTileVecs; j++) {
              sum[i][j] = dot_pairs(sum[i][j], columns[j], pair);
              KEEP(sum[i][j]);
            }
          }
        }
      }
      UNROLL for (int i = 0; i < M; i++)
        UNROLL for (int j = 0; j < kTileVecs; j++) result[i][j] = result[i][j] + to_floats(sum[i][j]);
    }
  }
};

// The sums of a group of int4 numbers, which hold weight + 8: they begin at -8 times the sum of the row's numbers. Nothing
// leaves the 16 bits of half a sum: 16 products of at most 15 * 127, and a start that is the opposite of what the offset
// adds.
template <int M>
INLINE void start_int4(ByteSums (&sum)[M][kTileVecs], const Rows<int8_t>& a, int64_t g) {
  UNROLL for (int i = 0; i < M; i++)
    UNROLL for (int j = 0; j < kTileVecs; j++) sum[i][j] = byte_sums_from(a.sums[i * a.groups + g] * -8);
}
template <int M>
INLINE void add_int4(Vec (&result)[M][kTileVecs], const ByteSums (&sum)[M][kTileVecs], const Rows<int8_t>& a, int64_t g,
                     const uint8_t* scales) {
  UNROLL for (int j = 0; j < kTileVecs; j++) {
    Vec scale = load((const bf16*)scales + j * W);
    UNROLL for (int i = 0; i < M; i++)
      result[i][j] = multiply_add(to_floats(total(sum[i][j])), scale * a.scale[i * a.groups + g], result[i][j]);
  }
}

template <int M>
struct Multiply<kPackedInt4, M> {
  static INLINE void run(Vec (&result)[M][kTileVecs], const Rows<int8_t>& a, const uint8_t* panel, int64_t K, Ahead ahead) {
    for (int64_t g = 0; g * kInt4Group < K; g++, panel += 2 * kTileCols) {
      ByteSums sum[M][kTileVecs];
      start_int4(sum, a, g);
      for (int64_t s = g * kInt4Group; s < (g + 1) * kInt4Group; s += 8, panel += 4 * kTileCols) {
        ahead.prefetch();
        UNROLL for (int half = 0; half < 2; half++) {
          IntVec columns[kTileVecs];
          UNROLL for (int j = 0; j < kTileVecs; j++)
            columns[j] = (IntVec)((UintVec)load_ints(panel + 4 * j * W) >> (4 * half)) & 0x0F0F0F0F;
          UNROLL for (int i = 0; i < M; i++) {
            IntVec four = splat_word(a.data + i * a.stride + s + 4 * half);
            UNROLL for (int j = 0; j < kTileVecs; j++) {
              sum[i][j] = dot_bytes(sum[i][j], columns[j], four);
              KEEP(sum[i][j]);
            }
          }
        }
      }
      add_int4(result, sum, a, g, panel);
    }
  }
};

// An unpacked panel: the products' operands (floats, pairs of 16-bit integers, fours of bytes) side by side, and the
// packed panel, for its scales.
struct Unpacked {
  const uint8_t* numbers;
  const uint8_t* panel;
};

void unpack_halves(const uint8_t* panel, int64_t K, uint8_t* to) {
  for (int64_t s = 0; s < K; s += 2, panel += 4 * kTileCols, to += 8 * kTileCols)
    UNROLL for (int j = 0; j < kTileVecs; j++) {
      IntVec pair = load_ints(panel + 4 * j * W);
      store_ints(to + 4 * j * W, pair << 16);
      store_ints(to + 4 * (kTileCols + j * W), pair & (int)0xFFFF0000);
    }
}
void unpack_bytes(const uint8_t* panel, int64_t K, uint8_t* to) {
  for (int64_t s = 0; s < K; s += 4, panel += 4 * kTileCols, to += 8 * kTileCols)
    UNROLL for (int j = 0; j < kTileVecs; j++) {
      IntVec four = load_ints(panel + 4 * j * W);
      store_ints(to + 4 * j * W, low_bytes(four));
      store_ints(to + 4 * (kTileCols + j * W), high_bytes(four));
    }
}
void unpack_nibbles(const uint8_t* panel, int64_t K, uint8_t* to) {
  for (int64_t group = 0; group < K; group += kInt4Group, panel += 2 * kTileCols)
    for (int64_t s = 0; s < kInt4Group; s += 8, panel += 4 * kTileCols, to += 8 * kTileCols)
      UNROLL for (int j = 0; j < kTileVecs; j++) {
        UintVec eight = (UintVec)load_ints(panel + 4 * j * W);
        store_ints(to + 4 * j * W, (IntVec)eight & 0x0F0F0F0F);
        store_ints(to + 4 * (kTileCols + j * W), (IntVec)(eight >> 4) & 0x0F0F0F0F);
      }
}

// sum += pairs [begin, end) of an unpacked panel of integers.
template <int M>
INLINE void add_pairs(IntVec (&sum)[M][kTileVecs], const Rows<int16_t>& a, const uint8_t* numbers, int64_t begin,
                      int64_t end, Ahead& ahead) {
  const uint8_t* b = numbers + 4 * begin * kTileCols;
  for (int64_t p = begin; p < end; p++, b += 4 * kTileCols) {
    ahead.prefetch();
    IntVec columns[kTileVecs];
    UNROLL for (int j = 0; j < kTileVecs; j++) columns[j] = load_ints(b + 4 * j * W);
    UNROLL for (int i = 0; i < M; i++) {
      IntVec pair = splat_word(a.data + i * a.stride + 2 * p);
      UNROLL for (int j = 0; j < kTileVecs; j++) sum[i][j] = dot_pairs(sum[i][j], columns[j], pair);
    }
  }
}

template <int kFormat, int M>
struct MultiplyUnpacked;

template <int M>
struct MultiplyUnpacked<kPackedBFloat16, M> {
  static INLINE void run(Vec (&result)[M][kTileVecs], const Rows<float>& a, const Unpacked& b, int64_t K, Ahead ahead) {
    Multiply<kPackedFloat32, M>::run(result, a, b.numbers, K, ahead);
  }
};
template <int M>
struct MultiplyUnpacked<kPackedInt8, M> {
  static INLINE void run(Vec (&result)[M][kTileVecs], const Rows<int16_t>& a, const Unpacked& b, int64_t K, Ahead ahead) {
    const int64_t pairs = ceil_div(K, 4) * 2;
    for (int64_t p = 0; p < pairs; p += kChain / 2) {
      IntVec sum[M][kTileVecs];
      UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < kTileVecs; j++) sum[i][j] = IntVec{};
      add_pairs(sum, a, b.numbers, p, min(pairs, p + kChain / 2), ahead);
      UNROLL for (int i = 0; i < M; i++)
        UNROLL for (int j = 0; j < kTileVecs; j++) result[i][j] = result[i][j] + to_floats(sum[i][j]);
    }
  }
};
template <int M>
struct MultiplyUnpacked<kPackedInt4, M> {
  static INLINE void run(Vec (&result)[M][kTileVecs], const Rows<int8_t>& a, const Unpacked& b, int64_t K, Ahead ahead) {
    constexpr int64_t kGroupBytes = kInt4Group / 2 * kTileCols;
    const uint8_t *scales = b.panel + kGroupBytes, *numbers = b.numbers;
    for (int64_t g = 0; g * kInt4Group < K; g++, scales += kGroupBytes + 2 * kTileCols) {
      ByteSums sum[M][kTileVecs];
      start_int4(sum, a, g);
      for (int64_t s = g * kInt4Group; s < (g + 1) * kInt4Group; s += 4, numbers += 4 * kTileCols) {
        ahead.prefetch();
        IntVec columns[kTileVecs];
        UNROLL for (int j = 0; j < kTileVecs; j++) columns[j] = load_ints(numbers + 4 * j * W);
        UNROLL for (int i = 0; i < M; i++) {
          IntVec four = splat_word(a.data + i * a.stride + s);
          UNROLL for (int j = 0; j < kTileVecs; j++) sum[i][j] = dot_bytes(sum[i][j], columns[j], four);
        }
      }
      add_int4(result, sum, a, g, scales);
    }
  }
};

// out (M, kTileCols) = bias + the product of M rows and a panel.
template <template <int, int> class Kernel, int kFormat, int M, class Panel>
NOINLINE void multiply_panel(const Rows<typename Format<kFormat>::Input>& a, const Panel& b, const uint8_t* panel,
                             int64_t K, const float* bias, Ahead ahead, float* out) {
  constexpr bool kInteger = kFormat == kPackedInt8 || kFormat == kPackedInt4;
  Vec result[M][kTileVecs];
  UNROLL for (int j = 0; j < kTileVecs; j++) {
    Vec start = bias && !kInteger ? load(bias + j * W) : Vec{};
    UNROLL for (int i = 0; i < M; i++) result[i][j] = start;
  }
  Kernel<kFormat, M>::run(result, a, b, K, ahead);
  const float* scales = (const float*)(panel + kTileCols * padded_k(kFormat, K));
  UNROLL for (int j = 0; j < kTileVecs; j++) {
    Vec start = bias ? load(bias + j * W) : Vec{};
    UNROLL for (int i = 0; i < M; i++) {
      Vec sum = result[i][j];
      if (kFormat == kPackedInt8) sum = multiply_add(sum, load(scales + j * W) * a.scale[i * a.groups], start);
      store(out + i * kTileCols + j * W, kFormat == kPackedInt4 ? sum + start : sum);
    }
  }
}

// Tiles come in few heights: a run of rows is cut into the largest that fit.
constexpr int smaller(int M) { return M > 8 ? 8 : M > 4 ? 4 : M > 2 ? 2 : 1; }

// The first rows, as many as a tile takes; returns their number.
template <template <int, int> class Kernel, int kFormat, int M, class Panel>
INLINE int64_t multiply_rows(int64_t rows, const Rows<typename Format<kFormat>::Input>& a, const Panel& b,
                             const uint8_t* panel, int64_t K, const float* bias, Ahead ahead, float* out) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<Kernel, kFormat, smaller(M)>(rows, a, b, panel, K, bias, ahead, out);
  }
  multiply_panel<Kernel, kFormat, M>(a, b, panel, K, bias, ahead, out);
  return M;
}

}  // namespace
}  // namespace fastgpt
