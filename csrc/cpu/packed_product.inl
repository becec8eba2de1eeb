// y = activation(x @ weight.T + bias) + residual for packed weights, for any number of rows and the same bits for each.

namespace fastgpt {
namespace {

// The rows of an activation as a packed format takes them: of integer formats quantised, of the others as they are.
struct PackedRows {
  const float* floats;  // (M, stride)
  const int16_t* integers;
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

template <int kFormat>
void multiply_packed(const Packed& w, const PackedRows& x, int64_t M, const Finish& finish) {
  typedef typename Format<kFormat>::Input Input;
  const int64_t bytes = panel_bytes(kFormat, w.K);
  const Input* data;
  if constexpr (sizeof(Input) == sizeof(float))
    data = x.floats;
  else
    data = x.integers;
  const Rows<Input> rows = {data, x.stride, x.scale, x.sums, x.groups};
  const Runs runs(ceil_div(w.N, kTileCols), threads());
  parallel(runs.count, [&](int64_t t) {
    alignas(64) float sums[kPackedRows<kFormat> * kTileCols];
    for (int64_t p = runs.begin[t]; p < runs.begin[t + 1]; p++) {
      const int64_t col = p * kTileCols, cols = min(kTileCols, w.N - col);
      for (int64_t i = 0; i < M; i += kPackedRows<kFormat>) {
        const int64_t count = min(kPackedRows<kFormat>, M - i);
        multiply_rows<kFormat>(count, rows.from(i), w.data + p * bytes, w.K, w.bias ? w.bias + col : nullptr, sums);
        finish_rows(finish, sums, i, count, col, cols);
      }
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
  int16_t* integers;
  int32_t* sums;
  int64_t stride, groups;
  PackedRows rows() const { return {floats, integers, scale, sums, stride, groups}; }
};
constexpr int64_t kRowAlign = kInt4Group;  // rows are zeros from K up to a multiple of this
INLINE int64_t row_stride(int64_t K) { return ceil_div(K, kRowAlign) * kRowAlign; }

// One row as 16-bit integers times a scale, the largest magnitude / kMostInteger, and their sums by groups.
INLINE void quantize_row(const RowBuffer& b, int64_t i, int64_t K) {
  const float* x = b.floats + i * b.stride;
  int16_t* q = b.integers + i * b.stride;
  Vec top = {};
  for (int64_t k = 0; k < b.stride; k += W) top = max(top, absolute(load(x + k)));
  const float highest = reduce_max(top), inverse = highest > 0.0f ? kMostInteger / highest : 0.0f;
  b.scale[i] = highest / kMostInteger;
  for (int64_t g = 0; g * kInt4Group < ceil_div(K, 4) * 4; g++) {
    IntVec sum = {};
    for (int64_t k = g * kInt4Group; k < (g + 1) * kInt4Group; k += W) {
      // The bits below the rounding constant's are the integer: those of a NaN or an infinity are as good as any, since
      // the row's scale is NaN or infinite then.
      IntVec a = round_to_int(load(x + k) * inverse);
      int32_t numbers[W];
      sum = sum + a;
      memcpy(numbers, &a, sizeof a);
      UNROLL for (int n = 0; n < W; n += 4) {
        const int32_t* four = numbers + n;
        uint32_t even = (uint32_t)(four[0] & 0xFFFF) | (uint32_t)four[2] << 16;
        uint32_t odd = (uint32_t)(four[1] & 0xFFFF) | (uint32_t)four[3] << 16;
        memcpy(q + k + n, &even, 4);
        memcpy(q + k + n + 2, &odd, 4);
      }
    }
    int32_t parts[W], total = 0;
    memcpy(parts, &sum, sizeof sum);
    for (int n = 0; n < W; n++) total += parts[n];
    b.sums[i * b.groups + g] = total;
  }
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

void quantize_rows(const RowBuffer& b, int64_t M, int64_t K) {
  for_rows(M, K, [&](int64_t i) { quantize_row(b, i, K); });
}

INLINE RowBuffer take_rows(Arena& arena, int64_t M, int64_t K) {
  RowBuffer b;
  b.stride = row_stride(K), b.groups = b.stride / kInt4Group;
  b.floats = arena.take(M * b.stride);
  b.integers = (int16_t*)arena.take(M * b.stride / 2);
  b.scale = arena.take(M);
  b.sums = (int32_t*)arena.take(M * b.groups);
  if (K < b.stride)
    for (int64_t i = 0; i < M; i++) memset(b.floats + i * b.stride + K, 0, sizeof(float) * (b.stride - K));
  return b;
}
// What take_rows takes, alignment included.
INLINE int64_t row_buffer_floats(int64_t M, int64_t K) {
  return M * (row_stride(K) + row_stride(K) / 2 + 1 + row_stride(K) / kInt4Group) + 4 * 16;
}

void packed_linear(const Packed& w, const float* x, int64_t M, int activation, const float* residual, float* out) {
  Arena arena{(float*)scratch(kStepScratch, sizeof(float) * row_buffer_floats(M, w.K))};
  RowBuffer rows = take_rows(arena, M, w.K);
  for (int64_t i = 0; i < M; i++) memcpy(rows.floats + i * rows.stride, x + i * w.K, sizeof(float) * w.K);
  if (is_integer(w.format)) quantize_rows(rows, M, w.K);
  packed_product(w, rows.rows(), M, {out, w.N, activation, residual});
}

}  // namespace
}  // namespace fastgpt
