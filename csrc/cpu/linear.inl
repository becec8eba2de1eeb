// Backward through what follows the product in a linear layer: the activation's gradient and, in the same pass, the bias's.

namespace fastgpt {
namespace {

struct Relu {
  static INLINE Vec grad(Vec x) { return x > 0.0f ? splat(1.0f) : Vec{}; }
};

constexpr int64_t kSumRows = 4;  // that share a look at their sums

// sums (cols) = the sum of these rows of dy
template <class T>
void sum_rows(const T* dy, float* sums, int64_t rows, int64_t stride, int64_t cols) {
  memset(sums, 0, sizeof(float) * cols);
  for (int64_t i0 = 0; i0 < rows; i0 += kSumRows)
    for_columns(cols, [&](int64_t j, int lanes) {
      Vec sum = {};
      for (int64_t i = i0; i < min(rows, i0 + kSumRows); i++) sum = sum + load_lanes(dy + i * stride + j, lanes);
      store_lanes(sums + j, load_lanes(sums + j, lanes) + sum, lanes);
    });
}

template <class T>
void column_sums(const T* dy, float* dbias, int64_t rows, int64_t cols) {
  Partials partials = partials_of(rows);
  float* sums = (float*)scratch(kKernelScratch, sizeof(float) * partials.count * cols);
  for_blocks(rows, cols, partials.rows, [=](int64_t i, int64_t count, int64_t j, int64_t width) {
    sum_rows(dy + i * cols + j, sums + i / partials.rows * cols + j, count, cols, width);
  });
  add_partials(sums, cols, partials.count, dbias, cols);
}

template <class T>
void activation_backward(int activation, const void* dy, const void* pre, void* dz, float* dbias, int64_t rows,
                         int64_t cols) {
  if (activation == kGelu) return gelu_backward<T, Erf>(dy, pre, nullptr, dz, dbias, rows, cols);
  if (activation == kGeluTanh) return gelu_backward<T, Tanh>(dy, pre, nullptr, dz, dbias, rows, cols);
  if (activation == kRelu) return gelu_backward<T, Relu>(dy, pre, nullptr, dz, dbias, rows, cols);
  if (dbias) column_sums((const T*)dy, dbias, rows, cols);
}

}  // namespace
}  // namespace fastgpt
