// y = activation(x @ weight.T + bias) + residual for packed weights, for any number of rows and the same bits for each.

namespace fastgpt {
namespace {

// The rows of an activation as a packed format takes them: of integer formats quantised, of the others as they are.
struct PackedRows {
  const float* floats;  // (M, stride)
  const void* integers;
  const float* scale;
  const int32_t* sums;
  int64_t stride, groups;
};

// Where a product's results go: out (M, N), rows `row` apart; residual, null or of the same strides, may be out itself.
struct Finish {
  float* out;
  int64_t row;
  int activation;
  const float* residual;
};

constexpr int64_t kRowAlign = kInt4Group;  // rows are zeros from K up to a multiple of this
INLINE int64_t row_stride(int64_t K) { return ceil_div(K, kRowAlign) * kRowAlign; }

INLINE bool is_integer(int format) { return format == kPackedInt8 || format == kPackedInt4; }

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

INLINE void finish_rows(const Finish& f, const float* sums, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  for (int64_t i = 0; i < rows; i++) {
    const int64_t at = (row + i) * f.row + col;
    for_columns(cols, [&](int64_t j, int lanes) {
      Vec y = activate(load(sums + i * kTileCols + j), f.activation);
      if (f.residual) y = y + load_lanes(f.residual + at + j, lanes);
      store_lanes(f.out + at + j, y, lanes);
    });
  }
}

// A panel's columns of the rows `part`, R rows at a time.
template <template <int, int> class Kernel, int kFormat, int R, class Panel>
INLINE void multiply_part_of(const Rows<typename Format<kFormat>::Input>& rows, Part part, const Panel& b,
                             const uint8_t* panel, int64_t K, const float* bias, const Finish& finish) {
  alignas(64) float sums[R * kTileCols];
  for (int64_t i = 0; i < part.rows; i += R) {
    const int64_t count = min(R, part.rows - i);
    multiply_rows<Kernel, kFormat, R>(count, rows.from(i), b, panel, K, bias, sums);
    finish_rows(finish, sums, i, count, part.col, part.cols);
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
void multiply_packed(const Packed& w, const PackedRows& x, int64_t M, const Finish& finish) {
  typedef typename Format<kFormat>::Input Input;
  const int64_t bytes = panel_bytes(kFormat, w.K);
  const void* data = is_integer(kFormat) ? x.integers : x.floats;
  const Rows<Input> rows = {(const Input*)data, x.stride, x.scale, x.sums, x.groups};
  const Runs runs(ceil_div(w.N, kTileCols), threads());
  parallel(runs.count, [&](int64_t t) {
    for (int64_t p = runs.begin[t]; p < runs.begin[t + 1]; p++) {
      const int64_t col = p * kTileCols;
      Part part = {0, M, col, min(kTileCols, w.N - col)};
      const uint8_t* panel = w.data + p * bytes;
      const float* bias = w.bias ? w.bias + col : nullptr;
      if (kFormat == kPackedFloat32 || M <= kDirectRows<kFormat>)
        multiply_part_of<Multiply, kFormat, kDirectRows<kFormat>>(rows, part, panel, panel, w.K, bias, finish);
      else
        multiply_part_of<MultiplyUnpacked, kFormat, kUnpackedRows<kFormat>>(rows, part, unpack<kFormat>(panel, w.K), panel,
                                                                            w.K, bias, finish);
    }
  });
}

void packed_product(const Packed& w, const PackedRows& x, int64_t M, const Finish& finish) {
  if (w.format == kPackedFloat32) multiply_packed<kPackedFloat32>(w, x, M, finish);
  if (w.format == kPackedBFloat16) multiply_packed<kPackedBFloat16>(w, x, M, finish);
  if (w.format == kPackedInt8) multiply_packed<kPackedInt8>(w, x, M, finish);
  if (w.format == kPackedInt4) multiply_packed<kPackedInt4>(w, x, M, finish);
}

// Buffers for M rows of at most K numbers in the forms that products take; `floats` is where they are written.
struct RowBuffer {
  float *floats, *scale;
  void* integers;
  int32_t* sums;
  int64_t stride, groups;
  PackedRows rows() const { return {floats, integers, scale, sums, stride, groups}; }
};

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
  typedef int8_t ByteVec __attribute__((vector_size(W)));
  ByteVec bytes = __builtin_convertvector(a, ByteVec);
  memcpy(to, &bytes, sizeof bytes);
}

INLINE float highest_magnitude(const float* x, int64_t n) {
  Vec top = {};
  for (int64_t k = 0; k < n; k += W) top = max(top, absolute(load(x + k)));
  return reduce_max(top);
}

// One row as 16-bit integers times a scale, the largest magnitude / kMostInteger. Of a row with a NaN or an infinity the
// integers are as good as any: its scale is NaN or infinite, or its products are.
INLINE void quantize_to_16_bits(const RowBuffer& b, int64_t i) {
  const float* x = b.floats + i * b.stride;
  const float highest = highest_magnitude(x, b.stride), inverse = highest > 0.0f ? kMostInteger / highest : 0.0f;
  b.scale[i * b.groups] = highest / kMostInteger;
  int16_t* to = (int16_t*)b.integers + i * b.stride;
  for (int64_t k = 0; k < b.stride; k += W) store_pairs(to + k, round_to_int(load(x + k) * inverse));
}

// One row as 8-bit integers times a scale for each group, with the groups' sums.
INLINE void quantize_to_8_bits(const RowBuffer& b, int64_t i) {
  int8_t* to = (int8_t*)b.integers + i * b.stride;
  for (int64_t g = 0; g < b.groups; g++) {
    const float* x = b.floats + i * b.stride + g * kInt4Group;
    const float highest = highest_magnitude(x, kInt4Group), inverse = highest > 0.0f ? 127.0f / highest : 0.0f;
    b.scale[i * b.groups + g] = highest / 127.0f;
    IntVec sum = {};
    for (int64_t k = 0; k < kInt4Group; k += W) {
      IntVec a = round_to_int(load(x + k) * inverse);
      sum = sum + a;
      store_bytes(to + g * kInt4Group + k, a);
    }
    int32_t parts[W], total = 0;
    memcpy(parts, &sum, sizeof sum);
    for (int n = 0; n < W; n++) total += parts[n];
    b.sums[i * b.groups + g] = total;
  }
}

INLINE void quantize_row(int format, const RowBuffer& b, int64_t i) {
  if (format == kPackedInt8) quantize_to_16_bits(b, i);
  if (format == kPackedInt4) quantize_to_8_bits(b, i);
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
void quantize_rows(const Packed& w, const RowBuffer& b, int64_t M) {
  if (is_integer(w.format)) for_rows(M, w.K, [&](int64_t i) { quantize_row(w.format, b, i); });
}

INLINE RowBuffer take_rows(Arena& arena, int64_t M, int64_t K) {
  RowBuffer b;
  b.stride = row_stride(K), b.groups = b.stride / kInt4Group;
  b.floats = arena.take(M * b.stride);
  b.integers = arena.take(M * b.stride / 2);
  b.scale = arena.take(M * b.groups);
  b.sums = (int32_t*)arena.take(M * b.groups);
  if (K < b.stride)
    for (int64_t i = 0; i < M; i++) memset(b.floats + i * b.stride + K, 0, sizeof(float) * (b.stride - K));
  return b;
}
// What take_rows takes, alignment included.
INLINE int64_t row_buffer_floats(int64_t M, int64_t K) {
  return M * (row_stride(K) + row_stride(K) / 2 + 2 * row_stride(K) / kInt4Group) + 4 * 16;
}

void packed_linear(const Packed& w, const float* x, int64_t M, int activation, const float* residual, float* out) {
  Arena arena{(float*)scratch(kStepScratch, sizeof(float) * row_buffer_floats(M, w.K))};
  RowBuffer rows = take_rows(arena, M, w.K);
  for (int64_t i = 0; i < M; i++) memcpy(rows.floats + i * rows.stride, x + i * w.K, sizeof(float) * w.K);
  quantize_rows(w, rows, M);
  packed_product(w, rows.rows(), M, {out, w.N, activation, residual});
}

}  // namespace
}  // namespace fastgpt
