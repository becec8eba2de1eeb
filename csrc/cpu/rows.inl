// What the kernels over rows share: loops over a row's vectors, and sums over rows that do not depend on the threads.

namespace fastgpt {
namespace {

// f(column, lanes): lanes is W but for the tail. Written once so that no loop below spells out its tail.
template <class F>
INLINE void for_columns(int64_t cols, F f) {
  int64_t j = 0;
  for (; j + W <= cols; j += W) f(j, W);
  if (j < cols) f(j, (int)(cols - j));
}
template <class T>
INLINE Vec load_lanes(const T* p, int lanes) {
  return lanes == W ? load(p) : load(p, lanes);
}
template <class T>
INLINE void store_lanes(T* p, Vec a, int lanes) {
  lanes == W ? store(p, a) : store(p, a, lanes);
}
// Results of this many bytes would push each other out of the caches: they are better streamed past them, and leave
// the room to what is read.
constexpr int64_t kStreamedBytes = 6 << 20;
template <class T>
INLINE bool past_caches(const T* results, int64_t rows, int64_t cols) {
  return rows * cols * (int64_t)sizeof(T) >= kStreamedBytes && cols % W == 0 && (uintptr_t)results % (W * sizeof(T)) == 0;
}
template <class T>
INLINE void store_result(bool streamed, T* p, Vec a, int lanes) {
  streamed ? stream(p, a) : store_lanes(p, a, lanes);
}

// Lanes beyond the row's end count as 0 in a sum of squares.
INLINE Vec first_lanes(Vec a, int lanes) {
  if (lanes == W) return a;
  for (int i = lanes; i < W; i++) a[i] = 0.0f;
  return a;
}

// Sums over rows (the gradients of biases and norm weights) are made of partial sums over runs of rows, added in index
// order. Their number depends on the rows alone: the same bits on any number of threads.
struct Partials {
  int64_t count, rows;  // in each but the last
};
INLINE Partials partials_of(int64_t rows) {
  constexpr int64_t kRows = 32, kMost = 64;
  int64_t each = max(kRows, ceil_div(rows, kMost));
  return {ceil_div(rows, each), each};
}
// out[j] = the sum over t of partial[t * stride + j], t < count
INLINE void add_partials(const float* partial, int64_t stride, int64_t count, float* out, int64_t cols) {
  constexpr int64_t kCols = 512;
  parallel(ceil_div(cols, kCols), [=](int64_t task) {
    int64_t begin = task * kCols;
    const float* from = partial + begin;
    for_columns(min(kCols, cols - begin), [&](int64_t j, int lanes) {
      Vec sum = {};
      for (int64_t t = 0; t < count; t++) sum = sum + load_lanes(from + t * stride + j, lanes);
      store_lanes(out + begin + j, sum, lanes);
    });
  });
}

}  // namespace
}  // namespace fastgpt
