// Layer norm over rows, alone or behind a residual add: one read of the inputs, statistics in float32 in two passes over
// a row that is in cache by then (a one-pass variance loses digits for rows with a large mean).

namespace fastgpt {
namespace {

template <class T, class P>
void layer_norm_rows(const T* x, const T* residual, const P* weight, const P* bias, T* y, T* total, float* mean,
                     float* rstd, int64_t begin, int64_t end, int64_t cols, float eps) {
  float* row = (float*)scratch(kKernelScratch, sizeof(float) * (cols + W));
  for (int64_t i = begin; i < end; i++) {
    const T* source = x + i * cols;
    Vec sum = {};
    for_columns(cols, [&](int64_t j, int lanes) {
      Vec a = load_lanes(source + j, lanes);
      if (residual) {
        a = a + load_lanes(residual + i * cols + j, lanes);
        store_lanes(total + i * cols + j, a, lanes);
        // What is normalised is the total as it is stored, so that backward sees the same numbers.
        if (sizeof(T) < sizeof(float)) a = load_lanes(total + i * cols + j, lanes);
      }
      store(row + j, a);
      sum = sum + a;
    });
    // The rounded mean m misses the true one by `rest`, which matters beside a large mean.
    float m = reduce_add(sum) / cols;
    Vec squares = {}, differences = {};
    for_columns(cols, [&](int64_t j, int lanes) {
      Vec d = first_lanes(load(row + j) - m, lanes);
      differences = differences + d;
      squares = squares + d * d;
    });
    float rest = reduce_add(differences) / cols;
    float r = 1.0f / sqrtf(reduce_add(squares) / cols - rest * rest + eps);
    if (mean) mean[i] = m + rest, rstd[i] = r;
    for_columns(cols, [&](int64_t j, int lanes) {
      Vec a = (load(row + j) - m - rest) * r * load_lanes(weight + j, lanes);
      store_lanes(y + i * cols + j, bias ? a + load_lanes(bias + j, lanes) : a, lanes);
    });
  }
}

// dx = r (g - mean(g) - xhat mean(g xhat)) with g = dy * weight; dweight sums dy * xhat, dbias sums dy.
template <class T, class P>
void layer_norm_backward_rows(const T* dy, const T* dtotal, const T* x, const P* weight, const float* mean,
                              const float* rstd, T* dx, float* dweight, float* dbias, int64_t begin, int64_t end,
                              int64_t cols) {
  for (int64_t j = 0; j < cols; j++) dweight[j] = dbias[j] = 0.0f;
  for (int64_t i = begin; i < end; i++) {
    const T *dy_row = dy + i * cols, *x_row = x + i * cols;
    float m = mean[i], r = rstd[i];
    Vec sum_g = {}, sum_gx = {};
    for_columns(cols, [&](int64_t j, int lanes) {
      Vec d = load_lanes(dy_row + j, lanes), xhat = (load_lanes(x_row + j, lanes) - m) * r;
      Vec g = d * load_lanes(weight + j, lanes);
      sum_g = sum_g + g;
      sum_gx = sum_gx + g * xhat;
      store_lanes(dweight + j, load_lanes(dweight + j, lanes) + d * xhat, lanes);
      store_lanes(dbias + j, load_lanes(dbias + j, lanes) + d, lanes);
    });
    float mean_g = reduce_add(sum_g) / cols, mean_gx = reduce_add(sum_gx) / cols;
    for_columns(cols, [&](int64_t j, int lanes) {
      Vec xhat = (load_lanes(x_row + j, lanes) - m) * r;
      Vec g = load_lanes(dy_row + j, lanes) * load_lanes(weight + j, lanes);
      Vec d = (g - mean_g - xhat * mean_gx) * r;
      store_lanes(dx + i * cols + j, dtotal ? d + load_lanes(dtotal + i * cols + j, lanes) : d, lanes);
    });
  }
}

template <class T, class P>
void layer_norm_forward(const void* x, const void* residual, const void* weight, const void* bias, void* y, void* total,
                        float* mean, float* rstd, int64_t rows, int64_t cols, float eps) {
  constexpr int64_t kRows = 16;
  parallel(ceil_div(rows, kRows), [=](int64_t t) {
    layer_norm_rows((const T*)x, (const T*)residual, (const P*)weight, (const P*)bias, (T*)y, (T*)total, mean, rstd,
                    t * kRows, min(rows, (t + 1) * kRows), cols, eps);
  });
}

// The partial sums of dweight and dbias: their number depends on the rows alone, not on the threads, and they are added
// in index order, so the gradients have the same bits on any number of threads.
constexpr int64_t kPartials = 16;

template <class T, class P>
void layer_norm_backward(const void* dy, const void* dtotal, const void* x, const void* weight, const float* mean,
                         const float* rstd, void* dx, float* dweight, float* dbias, int64_t rows, int64_t cols) {
  int64_t partials = min(kPartials, ceil_div(rows, 8)), chunk = partials ? ceil_div(rows, partials) : 0;
  float* sums = (float*)scratch(kKernelScratch, sizeof(float) * 2 * cols * (partials + 1));
  parallel(partials, [=](int64_t t) {
    layer_norm_backward_rows((const T*)dy, (const T*)dtotal, (const T*)x, (const P*)weight, mean, rstd, (T*)dx,
                             sums + 2 * t * cols, sums + (2 * t + 1) * cols, min(rows, t * chunk),
                             min(rows, (t + 1) * chunk), cols);
  });
  for (int which = 0; which < 2; which++) {
    float* out = which ? dbias : dweight;
    if (!out) continue;
    for (int64_t j = 0; j < cols; j++) out[j] = 0.0f;
    for (int64_t t = 0; t < partials; t++)
      for (int64_t j = 0; j < cols; j++) out[j] += sums[(2 * t + which) * cols + j];
  }
}

}  // namespace
}  // namespace fastgpt
