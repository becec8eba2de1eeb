// Cross entropy over rows of logits (rows, V), and in their place the gradient: what stands between the two products of
// a language model's head. A row is read from the cache three times: its maximum, the sum of e**(logit - maximum) in one
// order whatever the chunk, the gradient.

namespace fastgpt {
namespace {

constexpr int64_t kSumCols = 4096;  // added up in float32, these sums in double

template <class T>
INLINE float row_max(const T* logits, int64_t V) {
  Vec most = splat(-INFINITY);
  for_columns(V / W * W, [&](int64_t j, int lanes) { most = max(load_lanes(logits + j, lanes), most); });
  float m = reduce_max(most);
  for (int64_t j = V / W * W; j < V; j++) m = to_float(logits[j]) > m ? to_float(logits[j]) : m;
  return m;
}

// e**(a - m) for m >= a. Below -88 it is 0, a NaN stays.
INLINE Vec exp_below(Vec a, float m) { return exp_negative(max(splat(-88.03f), a - m), Vec{}); }

template <class T>
INLINE double sum_of_exp(const T* logits, int64_t V, float m) {
  double total = 0;
  for (int64_t begin = 0; begin < V; begin += kSumCols) {
    Vec sum = {};
    for_columns(min(kSumCols, V - begin), [&](int64_t j, int lanes) {
      sum = sum + first_lanes(exp_below(load_lanes(logits + begin + j, lanes), m), lanes);
    });
    total += reduce_add(sum);
  }
  return total;
}

template <class T>
INLINE double sum_of(const T* logits, int64_t V) {
  double total = 0;
  for (int64_t begin = 0; begin < V; begin += kSumCols) {
    Vec sum = {};
    for_columns(min(kSumCols, V - begin), [&](int64_t j, int lanes) {
      sum = sum + load_lanes(logits + begin + j, lanes);
    });
    total += reduce_add(sum);
  }
  return total;
}

// Returns the loss; with a scale, the row becomes scale times its gradient: with p the softmax
// (1 + 2 z_loss lse) p - smoothing / V, less 1 - smoothing at the target.
template <class T>
float cross_entropy_row(T* logits, int64_t target, const float* scale, int64_t V, const LossOptions& options) {
  float m = row_max(logits, V), at_target = to_float(logits[target]);
  double sum = sum_of_exp(logits, V, m), log_sum = log(sum), lse = m + log_sum;
  double loss = log_sum - (at_target - m), smoothing = options.smoothing;
  if (smoothing != 0) loss += smoothing * (at_target - sum_of(logits, V) / V);
  loss += options.z_loss * lse * lse;
  if (scale) {
    double weight = 1 + 2 * options.z_loss * lse, each = smoothing / V;
    float factor = (float)(*scale * weight / sum), others = (float)(*scale * each);
    for_columns(V, [&](int64_t j, int lanes) {
      store_lanes(logits + j, exp_below(load_lanes(logits + j, lanes), m) * factor - others, lanes);
    });
    // (p - 1) without its cancellation: p comes in units of 1 / sum
    double p = exp_below(splat(at_target), m)[0];
    double slope = (p * weight - sum) / sum + smoothing - each;
    store(logits + target, splat((float)(slope * *scale)), 1);
  }
  return (float)loss;
}

// An ignored row has no loss and no gradient.
template <class T>
void cross_entropy(void* logits, const int64_t* targets, const float* scales, bool scale_of_row, float* losses,
                   int64_t rows, int64_t V, const LossOptions& options) {
  parallel(rows, [=](int64_t i) {
    T* row = (T*)logits + i * V;
    const float* scale = scales ? scales + (scale_of_row ? i : 0) : nullptr;
    bool counts = targets[i] != options.ignored;
    losses[i] = counts ? cross_entropy_row(row, targets[i], scale, V, options) : 0.0f;
    if (!counts && scale) memset(row, 0, sizeof(T) * V);
  });
}

// result: how many targets are not ignored, and the index of the first one outside [0, V), or -1.
void check_targets(const int64_t* targets, int64_t count, int64_t V, int64_t ignored, int64_t* result) {
  result[0] = 0;
  result[1] = -1;
  for (int64_t i = count; i-- > 0;) {
    if (targets[i] == ignored) continue;
    result[0]++;
    if (targets[i] < 0 || targets[i] >= V) result[1] = i;
  }
}

// sums[j] += the sum over i of x[i, j], in order of i.
template <class T>
void add_rows(const void* x, float* sums, int64_t rows, int64_t cols) {
  constexpr int64_t kCols = 256;
  parallel(ceil_div(cols, kCols), [=](int64_t task) {
    for_columns(min(kCols, cols - task * kCols), [&](int64_t j, int lanes) {
      const T* column = (const T*)x + task * kCols + j;
      float* out = sums + task * kCols + j;
      Vec sum = load_lanes(out, lanes);
      for (int64_t i = 0; i < rows; i++) sum = sum + load_lanes(column + i * cols, lanes);
      store_lanes(out, sum, lanes);
    });
  });
}

}  // namespace
}  // namespace fastgpt
