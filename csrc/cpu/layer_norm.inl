// Layer norm over rows, alone or behind a residual add: statistics in float32 in two passes over rows that are in L1 by
// then (a one-pass variance loses digits for rows with a large mean). Some rows go side by side: their chains of
// additions hide each other's latency, and they share the loads of weights and of the weights' gradients.
// Tried: prefetching the next rows' inputs or results from here: no gain, the processor does.

namespace fastgpt {
namespace {

// At a time: more rows backward, with twice the inputs, would not stay in L1.
constexpr int kForwardRows = 4, kBackwardRows = 2;

template <class T, class P>
struct NormForward {
  const T *x, *residual;  // residual, bias, total, mean and rstd may be null
  const P *weight, *bias;
  T *y, *total;
  float *mean, *rstd;
  int64_t cols;
  float eps;
  bool streamed;
};

// step(j, lanes, part) adds what column j gives to the sums `part`; a chain of more additions would lose more
// than their own rounding.
constexpr int64_t kNormCols = 1024;
template <int N, class F>
INLINE void sum_columns(int64_t cols, Vec (&sums)[N], F&& step) {
  for (int64_t begin = 0; begin < cols; begin += kNormCols) {
    Vec part[N] = {};
    for_columns(min(kNormCols, cols - begin), [&](int64_t j, int lanes) { step(begin + j, lanes, part); });
    UNROLL for (int i = 0; i < N; i++) sums[i] = sums[i] + part[i];
  }
}

// The rows as float32, (R, cols), and their sums; makes total = x + residual on the way.
template <int R, class T, class P>
INLINE const float* load_rows(NormForward<T, P> p, int64_t at, Vec (&sum)[R]) {
  bool copy = sizeof(T) < sizeof(float) || (p.residual && p.streamed);  // a streamed total is not in the cache
  float* rows = copy ? (float*)scratch(kKernelScratch, sizeof(float) * R * p.cols) : nullptr;
  sum_columns(p.cols, sum, [&](int64_t j, int lanes, Vec(&part)[R]) {
    UNROLL for (int i = 0; i < R; i++) {
      int64_t k = i * p.cols + j;
      Vec a = load_lanes(p.x + at + k, lanes);
      if (p.residual) {
        a = a + load_lanes(p.residual + at + k, lanes);
        store_result(p.streamed, p.total + at + k, a, lanes);
        // What is normalised is the total as it is stored, so that backward sees the same numbers.
        a = stored(p.total, a);
      }
      if (copy) store_lanes(rows + k, a, lanes);
      part[i] = part[i] + a;
    }
  });
  return copy ? rows : (const float*)(p.residual ? p.total : p.x) + at;
}

template <int R, class T, class P>
void layer_norm_rows(NormForward<T, P> p, int64_t row) {
  int64_t at = row * p.cols;
  float mean[R], rest[R], rstd[R];
  Vec sum[R] = {}, deviations[2 * R] = {};  // these: of the differences from the mean, then of their squares
  const float* rows = load_rows<R>(p, at, sum);
  UNROLL for (int i = 0; i < R; i++) mean[i] = reduce_add(sum[i]) / p.cols;
  sum_columns(p.cols, deviations, [&](int64_t j, int lanes, Vec(&part)[2 * R]) {
    UNROLL for (int i = 0; i < R; i++) {
      Vec d = first_lanes(load_lanes(rows + i * p.cols + j, lanes) - mean[i], lanes);
      part[i] = part[i] + d;
      part[R + i] = part[R + i] + d * d;
    }
  });
  UNROLL for (int i = 0; i < R; i++) {
    // The rounded mean misses the true one by `rest`, which matters beside a large mean.
    rest[i] = reduce_add(deviations[i]) / p.cols;
    rstd[i] = 1.0f / sqrtf(reduce_add(deviations[R + i]) / p.cols - rest[i] * rest[i] + p.eps);
    if (p.mean) p.mean[row + i] = mean[i] + rest[i], p.rstd[row + i] = rstd[i];
    rest[i] *= rstd[i];
  }
  for_columns(p.cols, [&](int64_t j, int lanes) {
    Vec weight = load_lanes(p.weight + j, lanes), bias = p.bias ? load_lanes(p.bias + j, lanes) : Vec{};
    UNROLL for (int i = 0; i < R; i++) {
      Vec xhat = (load_lanes(rows + i * p.cols + j, lanes) - mean[i]) * rstd[i] - rest[i];
      store_result(p.streamed, p.y + at + i * p.cols + j, xhat * weight + bias, lanes);
    }
  });
}

template <class T, class P>
struct NormBackward {
  const T *dy, *dtotal, *x;  // dtotal may be null
  const P* weight;
  const float *mean, *rstd;
  T* dx;
  int64_t cols;
  bool streamed;
};

// dx = r (g - mean(g) - xhat mean(g xhat)) + dtotal with g = dy * weight; adds dy * xhat to dweight and dy to dbias.
template <int R, class T, class P>
void layer_norm_backward_rows(NormBackward<T, P> p, int64_t row, float* dweight, float* dbias) {
  int64_t at = row * p.cols;
  float mean[R], rstd[R];
  UNROLL for (int i = 0; i < R; i++) mean[i] = p.mean[row + i], rstd[i] = p.rstd[row + i];
  Vec sum_g[R] = {}, sum_gx[R] = {};  // sum_gx: without the factor rstd
  for_columns(p.cols, [&](int64_t j, int lanes) {
    Vec weight = load_lanes(p.weight + j, lanes);
    Vec dw = load_lanes(dweight + j, lanes), db = load_lanes(dbias + j, lanes);
    UNROLL for (int i = 0; i < R; i++) {
      Vec dy = load_lanes(p.dy + at + i * p.cols + j, lanes);
      Vec centred = load_lanes(p.x + at + i * p.cols + j, lanes) - mean[i];
      Vec product = dy * centred;
      sum_g[i] = multiply_add(dy, weight, sum_g[i]);
      sum_gx[i] = multiply_add(product, weight, sum_gx[i]);
      dw = dw + product * rstd[i];
      db = db + dy;
    }
    store_lanes(dweight + j, dw, lanes);
    store_lanes(dbias + j, db, lanes);
  });
  float mean_g[R], slope[R];
  UNROLL for (int i = 0; i < R; i++) {
    mean_g[i] = reduce_add(sum_g[i]) / p.cols;
    slope[i] = reduce_add(sum_gx[i]) / p.cols * rstd[i] * rstd[i];
  }
  for_columns(p.cols, [&](int64_t j, int lanes) {
    Vec weight = load_lanes(p.weight + j, lanes);
    UNROLL for (int i = 0; i < R; i++) {
      int64_t k = at + i * p.cols + j;
      Vec centred = load_lanes(p.x + k, lanes) - mean[i];
      Vec d = multiply_add(load_lanes(p.dy + k, lanes), weight, splat(-mean_g[i]));
      d = multiply_add(centred, splat(-slope[i]), d);
      // -0, so that without a dtotal it is the product alone.
      Vec dtotal = p.dtotal ? load_lanes(p.dtotal + k, lanes) : splat(-0.0f);
      store_result(p.streamed, p.dx + k, multiply_add(d, splat(rstd[i]), dtotal), lanes);
    }
  });
}

template <class T, class P>
void layer_norm_forward(const void* x, const void* residual, const void* weight, const void* bias, void* y, void* total,
                        float* mean, float* rstd, int64_t rows, int64_t cols, float eps) {
  constexpr int64_t kTaskRows = 16;
  bool streamed = past_caches((T*)y, rows, cols) && (!total || past_caches((T*)total, rows, cols));
  NormForward<T, P> p = {(const T*)x, (const T*)residual, (const P*)weight, (const P*)bias, (T*)y, (T*)total, mean,
                         rstd,        cols,               eps,              streamed};
  parallel(ceil_div(rows, kTaskRows), [&](int64_t t) {
    int64_t i = t * kTaskRows, end = min(rows, i + kTaskRows);
    for (; i + kForwardRows <= end; i += kForwardRows) layer_norm_rows<kForwardRows>(p, i);
    for (; i < end; i++) layer_norm_rows<1>(p, i);
    if (streamed) finish_streams();
  });
}

template <class T, class P>
void layer_norm_backward(const void* dy, const void* dtotal, const void* x, const void* weight, const float* mean,
                         const float* rstd, void* dx, float* dweight, float* dbias, int64_t rows, int64_t cols) {
  bool streamed = past_caches((T*)dx, rows, cols);
  NormBackward<T, P> p = {(const T*)dy, (const T*)dtotal, (const T*)x, (const P*)weight, mean,
                          rstd,         (T*)dx,           cols,        streamed};
  Partials partials = partials_of(rows);
  float* sums = (float*)scratch(kKernelScratch, sizeof(float) * 2 * cols * partials.count);
  parallel(partials.count, [&](int64_t t) {
    float *dw = sums + 2 * t * cols, *db = dw + cols;
    memset(dw, 0, sizeof(float) * 2 * cols);
    int64_t i = t * partials.rows, end = min(rows, i + partials.rows);
    for (; i + kBackwardRows <= end; i += kBackwardRows) layer_norm_backward_rows<kBackwardRows>(p, i, dw, db);
    for (; i < end; i++) layer_norm_backward_rows<1>(p, i, dw, db);
    if (streamed) finish_streams();
  });
  if (dweight) add_partials(sums, 2 * cols, partials.count, dweight, cols);
  if (dbias) add_partials(sums + cols, 2 * cols, partials.count, dbias, cols);
}

}  // namespace
}  // namespace fastgpt
