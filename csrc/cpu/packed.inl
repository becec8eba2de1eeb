// Products of rows by packed panels (formats.inl): tiles of a few rows by one panel, for rows as few as one, which wait for
// memory alone, and for prompts, where a panel feeds many tiles.
//
// The order of every sum is fixed, for any tile: runs of kChain products (of integers, groups or runs) in order of k.

namespace fastgpt {
namespace {

// Rows up to which a product takes a panel's numbers as they are stored. For more it pays to unpack a panel first: to
// floats, or to the pairs of 16-bit integers that dot_pairs takes.
template <int kFormat>
constexpr int kDirectRows = kFormat == kPackedFloat32 || (kFormat == kPackedBFloat16 && kHalfDots) ||
                            (kFormat == kPackedInt8 && kByteDots) ? kTileRows : 4;
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
// Bytes. float32's stream is left to the processor, which keeps up with it: asking ahead cost 15 % there.
template <int kFormat>
constexpr int64_t kAhead = kFormat == kPackedFloat32 ? 0 : 2048;

// Input rows of a tile: row i begins at data + i * stride. Of integer rows, scale and sums: (rows, groups) where a group
// is kGroup numbers; of 16-bit rows the first scale is that of the whole row.
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

// The sums of a group whose weights are stored as, or made, unsigned by adding kOffset: they begin at the opposite of what
// the offset adds.
template <int kOffset, int M>
INLINE void start_sums(ByteSums (&sum)[M][kTileVecs], const Rows<int8_t>& a, int64_t g) {
  UNROLL for (int i = 0; i < M; i++)
    UNROLL for (int j = 0; j < kTileVecs; j++) sum[i][j] = byte_sums_from(a.sums[i * a.groups + g] * -kOffset);
}

#if defined(BYTE_DOTS)
template <int M>
struct Multiply<kPackedInt8, M> {
  static INLINE void run(Vec (&result)[M][kTileVecs], const Rows<int8_t>& a, const uint8_t* panel, int64_t K, Ahead ahead) {
    for (int64_t g = 0; g * kGroup < K; g++) {
      ByteSums sum[M][kTileVecs];
      start_sums<128>(sum, a, g);
      const int64_t end = min(K, (g + 1) * kGroup);
      for (int64_t s = g * kGroup; s < end; s += 4, panel += 4 * kTileCols) {
        ahead.prefetch();
        IntVec columns[kTileVecs];
        UNROLL for (int j = 0; j < kTileVecs; j++) columns[j] = load_ints(panel + 4 * j * W) ^ (int)0x80808080;
        UNROLL for (int i = 0; i < M; i++) {
          IntVec four = splat_word(a.data + i * a.stride + s);
          UNROLL for (int j = 0; j < kTileVecs; j++) sum[i][j] = dot_bytes(sum[i][j], columns[j], four);
        }
      }
      UNROLL for (int i = 0; i < M; i++)
        UNROLL for (int j = 0; j < kTileVecs; j++)
          result[i][j] = multiply_add(to_floats(sum[i][j]), splat(a.scale[i * a.groups + g]), result[i][j]);
    }
  }
};
#else
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
#endif

// int4 numbers are stored as weight + 8. Nothing leaves the 16 bits of half a sum: 16 products of at most 15 * 127, and a
// start that is the opposite of what the offset adds.
constexpr int kInt4Offset = 8;
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
    for (int64_t g = 0; g * kGroup < K; g++, panel += 2 * kTileCols) {
      ByteSums sum[M][kTileVecs];
      start_sums<kInt4Offset>(sum, a, g);
      for (int64_t s = g * kGroup; s < (g + 1) * kGroup; s += 8, panel += 4 * kTileCols) {
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
  for (int64_t group = 0; group < K; group += kGroup, panel += 2 * kTileCols)
    for (int64_t s = 0; s < kGroup; s += 8, panel += 4 * kTileCols, to += 8 * kTileCols)
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
#if !defined(BYTE_DOTS)
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
#endif
template <int M>
struct MultiplyUnpacked<kPackedInt4, M> {
  static INLINE void run(Vec (&result)[M][kTileVecs], const Rows<int8_t>& a, const Unpacked& b, int64_t K, Ahead ahead) {
    constexpr int64_t kGroupBytes = kGroup / 2 * kTileCols;
    const uint8_t *scales = b.panel + kGroupBytes, *numbers = b.numbers;
    for (int64_t g = 0; g * kGroup < K; g++, scales += kGroupBytes + 2 * kTileCols) {
      ByteSums sum[M][kTileVecs];
      start_sums<kInt4Offset>(sum, a, g);
      for (int64_t s = g * kGroup; s < (g + 1) * kGroup; s += 4, numbers += 4 * kTileCols) {
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
      if (kFormat == kPackedInt8) {
        const Vec scale = load(scales + j * W);
        sum = multiply_add(sum, kByteDots ? scale : scale * a.scale[i * a.groups], start);
      }
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
