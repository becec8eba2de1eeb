// A linear layer's activations: backward through the one behind the product and, in the same pass, the bias's gradient;
// the one before the product, which backward makes anew together with its gradient.

namespace fastgpt {
namespace {

struct Relu {
  static INLINE Vec value(Vec x) { return activate(x, kRelu); }
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

template <class T, class Form>
void apply_form(const T* x, T* y, const T* dy, T* dx, int64_t size) {
  for_blocks(1, size, 1, [=](int64_t, int64_t, int64_t begin, int64_t width) {
    for_elements(1, size, width, [=](int64_t, int64_t j, int lanes) {
      int64_t at = begin + j;
      Vec a = load_lanes(x + at, lanes);
      if (dy) store_lanes(dx + at, load_lanes(dy + at, lanes) * Form::grad(a), lanes);
      store_lanes(y + at, Form::value(a), lanes);
    });
  });
}

template <class T>
void apply_activation(int activation, const void* x, void* y, const void* dy, void* dx, int64_t size) {
  auto apply = activation == kGelu ? apply_form<T, Erf> : activation == kGeluTanh ? apply_form<T, Tanh> : apply_form<T, Relu>;
  apply((const T*)x, (T*)y, (const T*)dy, (T*)dx, size);
}

}  // namespace
}  // namespace fastgpt
