// GELU, exact and by tanh, and their derivatives: relative errors of a few units in the last place on the whole line,
// the negative tail included, where 1 + erf(x / sqrt 2) and 1 + tanh(u) would have cancelled.
//
// Both forms are gelu(x) = max(x, 0) - t q(t) with t = |x| and q the weight that x < 0 keeps: Phi(-t), or
// 1 / (1 + e**v) with v = 2 sqrt(2 / pi) (t + 0.044715 t**3). Nothing cancels, since q <= 1/2. By symmetry the
// derivative is d(t) for x < 0 and 1 - d(t) elsewhere. Where q falls below the smallest normal number it is taken as 0.

namespace fastgpt {
namespace {

// a * b - p in one rounding, for a p that is a * b rounded.
INLINE Vec residual(Vec a, Vec b, Vec p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)p);
#elif defined(__FMA__) && FASTGPT_VEC_WIDTH == 8
  return (Vec)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)p);
#else
  // Halves of 12 bits have exact products.
  Vec a_high = as_float(as_int(a) & ~0xFFF), b_high = as_float(as_int(b) & ~0xFFF);
  Vec a_low = a - a_high, b_low = b - b_high;
  return a_high * b_high - p + a_high * b_low + a_low * b_high + a_low * b_low;
#endif
}

// e**(high + low) to 1 ulp, for -88.376 < high <= 0 and a low that is a rounding error's size: 0 from -87.68 down, where
// the scale's exponent field becomes 0. The polynomial is (e**r - 1 - r) / r**2 on |r| < ln 2 / 2, a minimax fit
// (reweighted least squares in float64, coefficients rounded to float32 one by one); relative error of e**r 3.3e-9.
INLINE Vec exp_negative(Vec high, Vec low) {
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2**23: leaves n + 127 in the lowest bits
  Vec shifted = high * 1.44269504f + kRound;
  Vec n = shifted - kRound;
  Vec r = (high - n * 0.693359375f) + (n * 2.12194440e-4f + low);
  Vec p = r * 1.38142216e-3f + 8.36889911e-3f;
  p = p * r + 4.16684076e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * as_float(as_int(shifted) << 23);
}

// |x|, at most `limit`, from where q is 0; a NaN stays.
INLINE Vec magnitude(Vec x, float limit) { return min(splat(limit), as_float(as_int(x) & 0x7FFFFFFF)); }

constexpr float kErfLimit = 13.269f;  // limit**2 / 2 = 88.03
constexpr float kInvSqrt2Pi = 0.398942280f;

INLINE Vec exp_of_half_square(Vec t) {
  Vec square = t * t;
  return exp_negative(square * -0.5f, residual(t, t, square) * -0.5f);
}

// Phi(-t) e**(t**2 / 2) on [0, kErfLimit]: the best P4(t) / Q5(t) in relative error (reweighted least squares over 4000
// nodes in float64 against 40 digits, coefficients rounded to float32 one by one with the rest fitted again): 8.4e-9.
INLINE Vec normal_tail_ratio(Vec t) {
  Vec p = t * 3.98785621e-3f + 3.97887975e-2f;
  p = p * t + 1.80760816e-1f;
  p = p * t + 4.35002238e-1f;
  p = p * t + 0.5f;
  Vec q = t * 9.99592897e-3f + 9.97431725e-2f;
  q = q * t + 4.629291e-1f;
  q = q * t + 1.19230163f;
  q = q * t + 1.66788924f;
  q = q * t + 1.0f;
  return p / q;
}

INLINE Vec gelu_erf(Vec x) {
  Vec t = magnitude(x, kErfLimit);
  return max(splat(-0.0f), x) - exp_of_half_square(t) * (t * normal_tail_ratio(t));
}

// Phi(x) + x phi(x)
INLINE Vec gelu_erf_grad(Vec x) {
  Vec t = magnitude(x, kErfLimit);
  Vec d = exp_of_half_square(t) * (normal_tail_ratio(t) - t * kInvSqrt2Pi);
  return x < 0.0f ? d : 1.0f - d;
}

constexpr float kTanhLimit = 10.0311f;  // v = 88.03
// v = t (kLinear + kCubic t**2), each constant in two parts; kLinear has 20 bits after the point, so that taking it off
// a sum up to 8.9 is exact.
constexpr float kLinear = 1.595768929f, kLinearRest = 1.93077895e-7f;
constexpr float kCubic = 0.0713548139f, kCubicRest = 2.39883247e-9f;

// e**-v
INLINE Vec exp_of_tanh_argument(Vec t) {
  Vec square = t * t, square_rest = residual(t, t, square);
  Vec slope = square * kCubic + kLinear;
  Vec slope_rest = residual(square, splat(kCubic), slope - kLinear) +
                   (square_rest * kCubic + (square * kCubicRest + kLinearRest));
  Vec v = t * slope;
  return exp_negative(-v, -(residual(t, slope, v) + t * slope_rest));
}

INLINE Vec gelu_tanh(Vec x) {
  Vec t = magnitude(x, kTanhLimit);
  Vec e = exp_of_tanh_argument(t);
  return max(splat(-0.0f), x) - t * e / (e + 1.0f);
}

// q (1 - t (1 - q) dv/dt)
INLINE Vec gelu_tanh_grad(Vec x) {
  Vec t = magnitude(x, kTanhLimit);
  Vec e = exp_of_tanh_argument(t);
  Vec rest = 1.0f / (e + 1.0f);
  Vec d = e * rest * (1.0f - t * rest * (t * t * (3.0f * kCubic) + kLinear));
  return x < 0.0f ? d : 1.0f - d;
}

struct Erf {
  static INLINE Vec value(Vec x) { return gelu_erf(x); }
  static INLINE Vec grad(Vec x) { return gelu_erf_grad(x); }
};
struct Tanh {
  static INLINE Vec value(Vec x) { return gelu_tanh(x); }
  static INLINE Vec grad(Vec x) { return gelu_tanh_grad(x); }
};

INLINE Vec activate(Vec z, int activation) {
  if (activation == kGelu) return gelu_erf(z);
  if (activation == kGeluTanh) return gelu_tanh(z);
  return activation == kRelu ? (z < 0.0f ? Vec{} : z) : z;  // a NaN stays
}

constexpr int64_t kGeluCols = 2048;  // a task's columns at most: their biases and sums stay in L1

// f(first row, rows, first column, columns) for blocks of at most `height` rows, in parallel.
template <class F>
INLINE void for_blocks(int64_t rows, int64_t cols, int64_t height, F f) {
  int64_t across = ceil_div(cols, kGeluCols);
  parallel(ceil_div(rows, height) * across, [=](int64_t task) {
    int64_t i = task / across * height, j = task % across * kGeluCols;
    f(i, min(height, rows - i), j, min(kGeluCols, cols - j));
  });
}

// f(element, column, lanes) for the elements of a block, by rows: an array and the next may lie a multiple of 4 KB apart,
// so that columns of several rows would compete for a set of L1.
template <class F>
INLINE void for_elements(int64_t rows, int64_t stride, int64_t cols, F f) {
  for (int64_t i = 0; i < rows; i++) for_columns(cols, [&](int64_t j, int lanes) { f(i * stride + j, j, lanes); });
}

// y = gelu(x + bias)
template <class T, class Form>
void gelu_forward(const void* x, const void* bias, void* y, int64_t rows, int64_t cols) {
  int64_t height = max(1, 8 * kGeluCols / max(1, cols));
  for_blocks(rows, cols, height, [=](int64_t i, int64_t count, int64_t j0, int64_t width) {
    const T *in = (const T*)x + i * cols + j0, *b = (const T*)bias + j0;
    T* out = (T*)y + i * cols + j0;
    if (bias)
      for_elements(count, cols, width, [&](int64_t at, int64_t j, int lanes) {
        store_lanes(out + at, Form::value(load_lanes(in + at, lanes) + load_lanes(b + j, lanes)), lanes);
      });
    else
      for_elements(count, cols, width, [&](int64_t at, int64_t, int lanes) {
        store_lanes(out + at, Form::value(load_lanes(in + at, lanes)), lanes);
      });
  });
}

// dx = dy gelu'(x + bias); sums (cols), if not null, gets dx's sum over these rows.
template <class T, class Form>
void gelu_backward_block(const T* dy, const T* x, const T* bias, T* dx, float* sums, int64_t rows, int64_t stride,
                         int64_t cols) {
  if (!bias && !sums)
    return for_elements(rows, stride, cols, [&](int64_t at, int64_t, int lanes) {
      store_lanes(dx + at, load_lanes(dy + at, lanes) * Form::grad(load_lanes(x + at, lanes)), lanes);
    });
  float none[kGeluCols];
  if (!sums) sums = none;
  memset(sums, 0, sizeof(float) * cols);
  for_elements(rows, stride, cols, [&](int64_t at, int64_t j, int lanes) {
    Vec a = load_lanes(x + at, lanes);
    Vec d = load_lanes(dy + at, lanes) * Form::grad(bias ? a + load_lanes(bias + j, lanes) : a);
    store_lanes(dx + at, d, lanes);
    store_lanes(sums + j, load_lanes(sums + j, lanes) + d, lanes);
  });
}

template <class T, class Form>
void gelu_backward(const void* dy, const void* x, const void* bias, void* dx, float* dbias, int64_t rows,
                   int64_t cols) {
  Partials partials = partials_of(rows);
  float* sums = dbias ? (float*)scratch(kKernelScratch, sizeof(float) * partials.count * cols) : nullptr;
  int64_t height = dbias ? partials.rows : max(1, 8 * kGeluCols / max(1, cols));
  for_blocks(rows, cols, height, [=](int64_t i, int64_t count, int64_t j, int64_t width) {
    int64_t at = i * cols + j;
    gelu_backward_block<T, Form>((const T*)dy + at, (const T*)x + at, bias ? (const T*)bias + j : nullptr, (T*)dx + at,
                                 sums ? sums + i / height * cols + j : nullptr, count, cols, width);
  });
  if (dbias) add_partials(sums, cols, partials.count, dbias, cols);
}

}  // namespace
}  // namespace fastgpt
