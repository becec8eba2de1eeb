// y = activation(x @ weight.T + bias) + residual for packed weights, for any number of rows and the same bits for each.

namespace fastgpt {
namespace {

// M rows of K numbers in the forms that products take: floats, which whoever makes them writes, and what a format's
// products take instead.
struct RowBuffer {
  float *floats, *scale;  // floats: (M, stride)
  void* converted;
  int32_t* sums;
  int64_t stride, groups;
};

// Where a product's results go: out (M, N), rows `row` apart; residual, null or of the same strides, may be out itself.
struct Finish {
  float* out;
  int64_t row;
  int activation;
  const float* residual;
};

constexpr int64_t kRowAlign = kGroup;  // rows are zeros from K up to a multiple of this
INLINE int64_t row_stride(int64_t K) { return ceil_div(K, kRowAlign) * kRowAlign; }

// Whether a format's products take the rows in another form than floats.
constexpr bool converts_rows(int format) { return format != kPackedFloat32 && (format != kPackedBFloat16 || kHalfDots); }

// Runs of neighbouring panels for the threads to take: long ones first, so that each thread streams through memory, and
// shorter ones at the end, so that none waits long for the last.
constexpr int kMostRuns = 256;
struct Runs {
  int count = 0;
  int64_t begin[kMostRuns + 1];
  INLINE Runs(int64_t panels, int64_t threads) {
    int64_t at = 0, wave = min(threads, kMostRuns / 8);
    while (at < panels && count < kMostRuns - wave) {
      const int64_t length = max(1, (panels - at) / (2 * wave));
      for (int64_t i = 0; i < wave && at < panels; i++, at += length) begin[count++] = at;
    }
    if (at < panels) begin[count++] = at;
    begin[count] = panels;
  }
};

NOINLINE void finish_rows(const Finish& f, const float* sums, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  for (int64_t i = 0; i < rows; i++) {
    const int64_t at = (row + i) * f.row + col;
    for_columns(cols, [&](int64_t j, int lanes) {
      Vec y = activate(load(sums + i * kTileCols + j), f.activation);
      if (f.residual) y = y + load_lanes(f.residual + at + j, lanes);
      store_lanes(f.out + at + j, y, lanes);
    });
  }
}

// How many steps of k a tile's loop takes.
template <int kFormat>
INLINE int64_t loop_steps(int64_t K, bool unpacked) {
  const int64_t pairs = ceil_div(K, 2), fours = ceil_div(K, 4);
  if (kFormat == kPackedInt8) return unpacked ? 2 * fours : fours;
  if (kFormat == kPackedInt4) return unpacked ? fours : ceil_div(K, 8);
  return kFormat == kPackedBFloat16 && !unpacked ? pairs : K;
}

// One panel, and where the next lies that this thread will take.
struct PanelAt {
  const uint8_t *panel, *next;
  int64_t bytes, col, cols;
};

// The columns of a panel of all M rows, R rows at a time.
template <template <int, int> class Kernel, int kFormat, int R, class Panel>
INLINE void multiply_rows_of(const Rows<typename Format<kFormat>::Input>& rows, int64_t M, const PanelAt& at,
                             const Panel& b, const Packed& w, const Finish& finish) {
  alignas(64) float sums[R * kTileCols];
  const bool unpacked = sizeof(Panel) > sizeof(const uint8_t*);
  const int64_t steps = loop_steps<kFormat>(w.K, unpacked), tiles = ceil_div(M, R);
  Ahead ahead = {at.panel + kAhead<kFormat>, 4 * kTileCols};
  if (tiles > 1 || unpacked) ahead = {at.next, ceil_div(at.bytes, steps * tiles)};
  for (int64_t i = 0; i < M;) {
    const int64_t count = multiply_rows<Kernel, kFormat, R>(M - i, rows.from(i), b, at.panel, w.K,
                                                            w.bias ? w.bias + at.col : nullptr, ahead, sums);
    finish_rows(finish, sums, i, count, at.col, at.cols);
    if (tiles > 1) ahead.at += steps * ahead.step;
    i += count;
  }
}

template <int kFormat>
INLINE Unpacked unpack(const uint8_t* panel, int64_t K) {
  uint8_t* numbers = (uint8_t*)scratch(kGemmScratch, 4 * kTileCols * row_stride(K));
  if (kFormat == kPackedBFloat16) unpack_halves(panel, K, numbers);
  if (kFormat == kPackedInt8) unpack_bytes(panel, K, numbers);
  if (kFormat == kPackedInt4) unpack_nibbles(panel, K, numbers);
  return {numbers, panel};
}

template <int kFormat>
void multiply_packed(const Packed& w, const RowBuffer& x, int64_t M, const Finish& finish) {
  typedef typename Format<kFormat>::Input Input;
  const int64_t bytes = panel_bytes(kFormat, w.K);
  const void* data = converts_rows(kFormat) ? x.converted : x.floats;
  const Rows<Input> rows = {(const Input*)data, x.stride, x.scale, x.sums, x.groups};
  const Runs runs(ceil_div(w.N, kTileCols), threads());
  parallel(runs.count, [&](int64_t t) {
    for (int64_t p = runs.begin[t]; p < runs.begin[t + 1]; p++) {
      const uint8_t* panel = w.data + p * bytes;
      const PanelAt at = {panel, p + 1 < runs.begin[t + 1] ? panel + bytes : panel, bytes, p * kTileCols,
                          min(kTileCols, w.N - p * kTileCols)};
      if constexpr (kUnpacks<kFormat>) {
        if (M > kDirectRows<kFormat>) {
          const Unpacked unpacked = unpack<kFormat>(panel, w.K);
          multiply_rows_of<MultiplyUnpacked, kFormat, kUnpackedRows<kFormat>>(rows, M, at, unpacked, w, finish);
          continue;
        }
      }
      multiply_rows_of<Multiply, kFormat, kDirectRows<kFormat>>(rows, M, at, panel, w, finish);
    }
  });
}

void packed_product(const Packed& w, const RowBuffer& x, int64_t M, const Finish& finish) {
  if (w.format == kPackedFloat32) multiply_packed<kPackedFloat32>(w, x, M, finish);
  if (w.format == kPackedBFloat16) multiply_packed<kPackedBFloat16>(w, x, M, finish);
  if (w.format == kPackedInt8) multiply_packed<kPackedInt8>(w, x, M, finish);
  if (w.format == kPackedInt4) multiply_packed<kPackedInt4>(w, x, M, finish);
}

// Integers in pairs as dot_pairs meets them: of four numbers the first and the third, the second and the fourth.
INLINE void store_pairs(int16_t* to, IntVec a) {
  int32_t numbers[W];
  memcpy(numbers, &a, sizeof a);
  UNROLL for (int n = 0; n < W; n += 4) {
    const int32_t* four = numbers + n;
    const uint32_t even = (uint32_t)(four[0] & 0xFFFF) | (uint32_t)four[2] << 16;
    const uint32_t odd = (uint32_t)(four[1] & 0xFFFF) | (uint32_t)four[3] << 16;
    memcpy(to + n, &even, 4);
    memcpy(to + n + 2, &odd, 4);
  }
}
INLINE void store_bytes(int8_t* to, IntVec a) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)a));
#else
  typedef int8_t ByteVec __attribute__((vector_size(W)));
  ByteVec bytes = __builtin_convertvector(a, ByteVec);
  memcpy(to, &bytes, sizeof bytes);
#endif
}

INLINE float highest_magnitude(const float* x, int64_t n) {
  IntVec top = {};
  for (int64_t k = 0; k < n; k += W) top = higher_magnitude(top, load(x + k));
  int32_t lanes[W], highest = 0;
  memcpy(lanes, &top, sizeof top);
  for (int32_t lane : lanes) highest = lane > highest ? lane : highest;
  float magnitude;
  memcpy(&magnitude, &highest, 4);
  return magnitude;
}

// A row, or a group of one, with a NaN or an infinity: integers 1 and a scale NaN, so that no product is finite.
INLINE bool is_finite(float a) { return a - a == 0.0f; }

// One row as 16-bit integers times a scale, the largest magnitude / kMostInteger.
INLINE void quantize_to_16_bits(const RowBuffer& b, int64_t i) {
  const float* x = b.floats + i * b.stride;
  const float highest = highest_magnitude(x, b.stride), inverse = highest > 0.0f ? kMostInteger / highest : 0.0f;
  b.scale[i * b.groups] = is_finite(highest) ? highest / kMostInteger : NAN;
  int16_t* to = (int16_t*)b.converted + i * b.stride;
  for (int64_t k = 0; k < b.stride; k += W)
    store_pairs(to + k, is_finite(highest) ? round_to_int(load(x + k) * inverse) : 1 - IntVec{});
}

// One row as 8-bit integers times a scale for each group, with the groups' sums.
INLINE void quantize_to_8_bits(const RowBuffer& b, int64_t i) {
  int8_t* to = (int8_t*)b.converted + i * b.stride;
  for (int64_t g = 0; g < b.groups; g++) {
    const float* x = b.floats + i * b.stride + g * kGroup;
    const float highest = highest_magnitude(x, kGroup), inverse = highest > 0.0f ? 127.0f / highest : 0.0f;
    b.scale[i * b.groups + g] = is_finite(highest) ? highest / 127.0f : NAN;
    IntVec sum = {};
    for (int64_t k = 0; k < kGroup; k += W) {
      IntVec a = is_finite(highest) ? round_to_int(load(x + k) * inverse) : 1 - IntVec{};
      sum = sum + a;
      store_bytes(to + g * kGroup + k, a);
    }
    int32_t parts[W], total = 0;
    memcpy(parts, &sum, sizeof sum);
    for (int n = 0; n < W; n++) total += parts[n];
    b.sums[i * b.groups + g] = total;
  }
}

INLINE void narrow_to_halves(const RowBuffer& b, int64_t i) {
  bf16* to = (bf16*)b.converted + i * b.stride;
  for (int64_t k = 0; k < b.stride; k += W) store(to + k, load(b.floats + i * b.stride + k));
}

INLINE void convert_row(int format, const RowBuffer& b, int64_t i) {
  if (format == kPackedBFloat16 && kHalfDots) narrow_to_halves(b, i);
  if (format == kPackedInt8 && !kByteDots) quantize_to_16_bits(b, i);
  if (format == kPackedInt4 || (format == kPackedInt8 && kByteDots)) quantize_to_8_bits(b, i);
}

// f(i) for rows 0 .. M - 1: few of them on the calling thread, since waking the others would take longer.
template <class F>
INLINE void for_rows(int64_t M, int64_t K, F f) {
  constexpr int64_t kSerial = 16384;
  const int64_t each = max(1, kSerial / 4 / max(1, K));
  if (M * K < kSerial) {
    for (int64_t i = 0; i < M; i++) f(i);
    return;
  }
  parallel(ceil_div(M, each), [&](int64_t t) {
    for (int64_t i = t * each; i < min(M, (t + 1) * each); i++) f(i);
  });
}

// The rows in b.floats as the products with w take them.
void convert_rows(const Packed& w, const RowBuffer& b, int64_t M) {
  if (converts_rows(w.format)) for_rows(M, w.K, [&](int64_t i) { convert_row(w.format, b, i); });
}

INLINE RowBuffer take_rows(Arena& arena, int64_t M, int64_t K) {
  RowBuffer b;
  b.stride = row_stride(K), b.groups = b.stride / kGroup;
  b.floats = arena.take(M * b.stride);
  b.converted = arena.take(M * b.stride / 2);
  b.scale = arena.take(M * b.groups);
  b.sums = (int32_t*)arena.take(M * b.groups);
  if (K < b.stride)
    for (int64_t i = 0; i < M; i++) memset(b.floats + i * b.stride + K, 0, sizeof(float) * (b.stride - K));
  return b;
}
// What take_rows takes, alignment included.
INLINE int64_t row_buffer_floats(int64_t M, int64_t K) {
  return M * (row_stride(K) + row_stride(K) / 2 + 2 * row_stride(K) / kGroup) + 4 * 16;
}

void packed_linear(const Packed& w, const float* x, int64_t M, int activation, const float* residual, float* out) {
  Arena arena{(float*)scratch(kStepScratch, sizeof(float) * row_buffer_floats(M, w.K))};
  RowBuffer rows = take_rows(arena, M, w.K);
  for (int64_t i = 0; i < M; i++) memcpy(rows.floats + i * rows.stride, x + i * w.K, sizeof(float) * w.K);
  convert_rows(w, rows, M);
  packed_product(w, rows, M, {out, w.N, activation, residual});
}

}  // namespace
}  // namespace fastgpt
