// Attention without the T x S matrix (Dao et al. 2022, arXiv:2205.14135): the scores of some queries and a block of
// keys at a time, with a running maximum and sum of each row (the online softmax), all in float32.
//
// The bits of a row do not depend on what it is computed with: key blocks count from key 0, and every sum has one order
// (runs of kScoreChain over D in a score, a key block in the output), whatever the tile, the query block or the thread. Keys
// that key_mask hides and keys beyond a causal row are never multiplied into it, so a NaN there does not spread.

namespace fastgpt {
namespace {

constexpr int64_t kMostRows = 192;          // of a task: what the packing of a key block is spread over
constexpr int64_t kMostRowFloats = 24576;   // of a task's Q and O each: they stay in a second-level cache
constexpr int64_t kKeys = 128;              // of a block
constexpr int64_t kScoreChain = 64;         // a sum over D starts anew: one long chain of additions would lose digits
constexpr int64_t kSerialFlops = 400000;    // below, waking the other threads costs more than they spare

template <class F>
void parallel_if_worth(int64_t flops, int64_t tasks, const F& task) {
  if (flops >= kSerialFlops) return parallel(tasks, task);
  for (int64_t t = 0; t < tasks; t++) task(t);
}

// One call. Rows of packed blocks have Dp columns, D rounded up to whole vectors; those beyond D are zero.
struct Attention {
  Heads q, k, v;
  const uint8_t* key_mask;
  AttentionShape shape;
  AttentionOptions options;
  int64_t group = shape.H / max(shape.G, 1);  // query heads that share a key head
  int64_t Dp = ceil_div(shape.D, W) * W;
  uint32_t drop_below = dropout_threshold(options.dropout_p);
  float keep_scale = (float)(1.0 / (1.0 - options.dropout_p));

  // Query i sees the first visible(i) keys, less those that key_mask hides.
  int64_t visible(int64_t i) const { return options.causal ? max(0, i + 1 + shape.S - shape.T) : shape.S; }
  // The first query that sees key j.
  int64_t first_query(int64_t j) const { return options.causal ? max(0, j + shape.T - shape.S) : 0; }
  const uint8_t* mask_from(int64_t b, int64_t key) const { return key_mask ? key_mask + b * shape.S + key : nullptr; }
};

template <class T>
INLINE T* row_of(const Heads& x, int64_t b, int64_t h, int64_t i) {
  return (T*)x.data + b * x.batch + h * x.head + i * x.position;
}

// A matrix of floats: element (i, j) is data[i * row + j * col].
struct View {
  float* data;
  int64_t row, col = 1;
  INLINE View from(int64_t i, int64_t j = 0) const { return {data + i * row + j * col, row, col}; }
  INLINE View transposed() const { return {data, col, row}; }
};

// Successive pieces of a scratch buffer, each aligned to 64 bytes.
struct Arena {
  float* next;
  float* take(int64_t floats) {
    float* p = next;
    next += ceil_div(floats, 16) * 16;
    return p;
  }
  View view(int64_t rows, int64_t cols) { return {take(rows * cols), cols}; }
};

// What a product does with the c it finds: overwrite it, add to it, or go on with the sums that it holds.
enum Sums { kSet, kAdd, kContinue };

// Columns j to j + N * W of M rows of c = a b, K products in each.
template <int M, int N>
INLINE void product_tile(const View& c, const View& a, const View& b, int64_t j, int64_t K, Sums sums) {
  Vec acc[M][N] = {};
  float* to = c.data + j;
  if (sums == kContinue)
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++) acc[m][n] = load(to + m * c.row + n * W);
  multiply_tile<M, N>(acc, a.data, a.row, a.col, b.data + j, b.row, K);
  if (sums == kAdd)
    UNROLL for (int m = 0; m < M; m++) {
      UNROLL for (int n = 0; n < N; n++) acc[m][n] = load(to + m * c.row + n * W) + acc[m][n];
    }
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++) store(to + m * c.row + n * W, acc[m][n]);
}

// M rows of c = a b, cols rounded up to W. One or two rows take more vectors at a time to hide the latency.
template <int M, int N = (M == 1 ? 8 : M == 2 ? 4 : kTileVecs)>
void product_rows(const View& c, const View& a, const View& b, int64_t cols, int64_t K, Sums sums) {
  int64_t j = 0;
  for (; j + N * W <= cols; j += N * W) product_tile<M, N>(c, a, b, j, K, sums);
  if constexpr (N > 1)
    for (; j < cols; j += W) product_tile<M, 1>(c, a, b, j, K, sums);
}
// The same for 1 to kTileRows rows.
template <int M = kTileRows>
INLINE void product(int64_t rows, const View& c, const View& a, const View& b, int64_t cols, int64_t K, Sums sums) {
  if (rows == M) return product_rows<M>(c, a, b, cols, K, sums);
  if constexpr (M > 1) product<M - 1>(rows, c, a, b, cols, K, sums);
}

// c = a b for sums over D.
INLINE void scores_of_rows(int64_t rows, const View& c, const View& a, const View& b, int64_t cols, int64_t D) {
  for (int64_t d = 0; d < D; d += kScoreChain)
    product(rows, c, a.from(0, d), b.from(d), cols, min(kScoreChain, D - d), d ? kAdd : kSet);
}

// Columns 0 to 3 of W rows. Vector i takes rows i, i + 4, ... by quarters, so that squares of 4 x 4 turn side by side:
// fewer shuffles than a transpose of whole vectors.
INLINE void four_columns(const float* rows, int64_t stride, Vec (&columns)[4]) {
  Vec a = load_quarters(rows, 4 * stride), b = load_quarters(rows + stride, 4 * stride);
  Vec c = load_quarters(rows + 2 * stride, 4 * stride), d = load_quarters(rows + 3 * stride, 4 * stride);
  Vec ab_low = SHUFFLE(a, b, IN_QUARTERS(LOW_PAIRS)), ab_high = SHUFFLE(a, b, IN_QUARTERS(HIGH_PAIRS));
  Vec cd_low = SHUFFLE(c, d, IN_QUARTERS(LOW_PAIRS)), cd_high = SHUFFLE(c, d, IN_QUARTERS(HIGH_PAIRS));
  columns[0] = SHUFFLE(ab_low, cd_low, IN_QUARTERS(LOW_HALVES));
  columns[1] = SHUFFLE(ab_low, cd_low, IN_QUARTERS(HIGH_HALVES));
  columns[2] = SHUFFLE(ab_high, cd_high, IN_QUARTERS(LOW_HALVES));
  columns[3] = SHUFFLE(ab_high, cd_high, IN_QUARTERS(HIGH_HALVES));
}

// The same for one query against count keys, a multiple of W, as they lie in memory, D rounded up to 4: making a
// transposed block would not pay.
template <int N = 4>
INLINE void scores_of_whole(float* scores, const float* query, const View& keys, int64_t count, int64_t D) {
  int64_t j = 0;
  for (; j + N * W <= count; j += N * W)
    for (int64_t start = 0; start < D; start += kScoreChain) {
      Vec acc[N] = {};
      for (int64_t d = start; d < min(D, start + kScoreChain); d += 4)
        UNROLL for (int n = 0; n < N; n++) {
          Vec columns[4];
          four_columns(keys.from(j + n * W, d).data, keys.row, columns);
          UNROLL for (int i = 0; i < 4; i++) acc[n] = acc[n] + query[d + i] * columns[i];
        }
      UNROLL for (int n = 0; n < N; n++) {
        float* to = scores + j + n * W;
        store(to, start ? load(to) + acc[n] : acc[n]);
      }
    }
  if constexpr (N > 1)
    if (j < count) scores_of_whole<1>(scores + j, query, keys.from(j), count - j, D);
}
// Any count, up to whole vectors. spare: W rows of width floats, which may be the first keys' own.
INLINE void scores_of_one(float* scores, const float* query, const View& keys, int64_t count, int64_t D,
                          const View& spare, int64_t width) {
  const int64_t whole = count / W * W;
  scores_of_whole(scores, query, keys, whole, D);
  if (whole == count) return;
  for (int64_t i = 0; i < W; i++)
    memmove(spare.from(i).data, keys.from(min(whole + i, count - 1)).data, sizeof(float) * width);
  scores_of_whole(scores + whole, query, spare, W, D);
}

// A row of D elements as float32, times factor, zeros up to whole vectors.
template <class T>
INLINE void widen_row(float* to, const T* row, int64_t D, float factor) {
  for_columns(D, [&](int64_t j, int lanes) { store(to + j, load_lanes(row + j, lanes) * factor); });
}
template <class T>
INLINE void narrow_row(T* to, const float* row, int64_t D, float factor) {
  for_columns(D, [&](int64_t j, int lanes) { store_lanes(to + j, load(row + j) * factor, lanes); });
}

// A key block's rows as float32 in whole vectors: in place where they are that already, else copied, those that mask
// hides as zeros (their numbers may be garbage, and 0 times NaN is NaN).
template <class T>
INLINE View key_rows(const T* source, int64_t stride, int64_t keys, int64_t D, const uint8_t* mask, const View& copy) {
  if (sizeof(T) == sizeof(float) && !mask && D % W == 0) return {(float*)source, stride};
  for (int64_t j = 0; j < keys; j++) {
    float* to = copy.from(j).data;
    if (mask && !mask[j])
      memset(to, 0, sizeof(float) * ceil_div(D, W) * W);
    else
      widen_row(to, source + j * stride, D, 1.0f);
  }
  return copy;
}

// to (D, kRow): the transpose of some rows of D elements. Its columns beyond them repeat the last.
template <int kRow, class T>
INLINE void transpose_rows(float* to, const T* source, int64_t stride, int64_t rows, int64_t D) {
  for (int64_t j = 0; j < rows; j += W) {
    const T* line[W];
    for (int i = 0; i < W; i++) line[i] = source + min(j + i, rows - 1) * stride;
    for_columns(D, [&](int64_t d, int count) { transpose_lines(line, d, count, to + d * kRow + j, kRow); });
  }
}

// Zeroes the dropped ones of a row's first n weights, which are those of the keys from first_key on.
INLINE void drop(float* weights, int64_t n, uint32_t row_key, int64_t first_key, uint32_t drop_below) {
  for (int64_t j = 0; j < n; j += W)
    store(weights + j, as_float(as_int(load(weights + j)) & kept(row_key, first_key + j, drop_below)));
}

// +infinity for a key that takes part, -infinity for one that does not: min(score, limit) hides a key even behind a
// NaN.
INLINE const float* key_limits(float* limits, const uint8_t* mask, int64_t keys) {
  if (!mask) return nullptr;
  for (int64_t j = 0; j < ceil_div(keys, W) * W; j++) limits[j] = j < keys && mask[j] ? INFINITY : -INFINITY;
  return limits;
}

// One row: the maximum of the scores so far and the sum of e**(score - top), in W parts; in the block at hand its
// scores, of which it sees the first n.
struct SoftmaxRow {
  Vec sum;
  float top;
  uint32_t dropout_key;
  int64_t n;
  float* scores;
};

// The scores of a few rows become weights e**(score - top); factor: what the rows' outputs so far are to be multiplied
// by (room for whole vectors). Step by step over all rows, so that one row's latency hides behind the others' work.
INLINE void softmax_rows(SoftmaxRow* rows, int64_t count, const float* limits, float* factor) {
  float shift[kTileRows];
  for (int64_t i = 0; i < count; i++) {
    SoftmaxRow& row = rows[i];
    shift[i] = factor[i] = 0.0f;
    if (row.n == 0) continue;
    const int64_t last = ceil_div(row.n, W) * W - W;
    Vec top = lane_index() < (int32_t)(row.n - last) ? load(row.scores + last) : splat(-INFINITY);
    if (limits) top = min(top, load(limits + last));
    store(row.scores + last, top);
    for (int64_t j = 0; j < last; j += W) {
      Vec s = load(row.scores + j);
      if (limits) store(row.scores + j, s = min(s, load(limits + j)));
      top = max(s, top);
    }
    const float before = row.top, highest = reduce_max(top);
    row.top = highest > before ? highest : before;
    shift[i] = row.top == -INFINITY ? 0.0f : row.top;  // nothing seen yet: the weights are e**-infinity = 0
    factor[i] = before - shift[i];
  }
  for (int64_t i = 0; i < count; i += W) store(factor + i, exp_nonpositive(load(factor + i)));
  for (int64_t i = 0; i < count; i++) {
    Vec sum = rows[i].sum * factor[i];
    for (int64_t j = 0; j < rows[i].n; j += W) {
      Vec p = exp_nonpositive(load(rows[i].scores + j) - shift[i]);
      sum = sum + p;
      store(rows[i].scores + j, p);
    }
    rows[i].sum = sum;
  }
}

// What a forward task computes: some of the query heads of key head g, a run of queries. Row n is query n % queries of
// head n / queries, counted from the task's first.
struct QueryBlock {
  int64_t b, g, head, heads, query, queries;
};

template <class T>
void attention_forward_block(const Attention& a, const QueryBlock& block, const Heads& out, float* lse) {
  const int64_t rows = block.heads * block.queries, D = a.shape.D, Dp = a.Dp;
  const int64_t floats = 2 * rows * Dp + kTileRows * (kKeys + Dp) + D * kKeys + 2 * kKeys * Dp;
  Arena arena{(float*)scratch(kAttentionScratch, sizeof(float) * (floats + 7 * 16))};
  View Q = arena.view(rows, Dp), O = arena.view(rows, Dp);
  View P = arena.view(kTileRows, kKeys), PV = arena.view(kTileRows, Dp);
  View Kt = arena.view(D, kKeys), K_copy = arena.view(kKeys, Dp), V_copy = arena.view(kKeys, Dp);
  float limits_buffer[kKeys];
  SoftmaxRow softmax[kMostRows];
  for (int64_t n = 0; n < rows; n++) {
    const int64_t h = block.head + n / block.queries, i = block.query + n % block.queries;
    widen_row(Q.from(n).data, row_of<T>(a.q, block.b, h, i), D, a.options.scale);
    const uint32_t dropout_key = a.drop_below ? dropout_row_key(a.options.seed, block.b, h, i) : 0;
    softmax[n] = {Vec{}, -INFINITY, dropout_key, 0, P.from(n % kTileRows).data};
  }
  memset(O.data, 0, sizeof(float) * rows * Dp);
  const int64_t last_visible = a.visible(block.query + block.queries - 1);
  for (int64_t key = 0; key < last_visible; key += kKeys) {
    const int64_t keys = min(kKeys, a.shape.S - key);
    const T *k = row_of<T>(a.k, block.b, block.g, key), *v = row_of<T>(a.v, block.b, block.g, key);
    const uint8_t* mask = a.mask_from(block.b, key);
    const float* limits = key_limits(limits_buffer, mask, keys);
    View K = K_copy, V = key_rows(v, a.v.position, keys, D, mask, V_copy);
    if (rows > 1)
      transpose_rows<kKeys>(Kt.data, k, a.k.position, keys, D);
    else
      K = key_rows(k, a.k.position, keys, D, mask, K_copy);
    for (int64_t n = 0; n < rows; n += kTileRows) {
      SoftmaxRow* tile = softmax + n;
      const int64_t count = min(kTileRows, rows - n);
      int64_t most = 0, least = keys;
      for (int64_t i = 0; i < count; i++) {
        tile[i].n = max(0, min(keys, a.visible(block.query + (n + i) % block.queries) - key));
        most = max(most, tile[i].n), least = min(least, tile[i].n);
      }
      if (most == 0) continue;
      if (rows > 1)
        scores_of_rows(count, P, Q.from(n), Kt, most, D);
      else
        scores_of_one(P.data, Q.data, K, most, D, K_copy, Dp);
      float factor[kTileRows + W] = {};
      softmax_rows(tile, count, limits, factor);
      for (int64_t i = 0; i < count && a.drop_below; i++)
        drop(tile[i].scores, tile[i].n, tile[i].dropout_key, key, a.drop_below);
      product(count, PV, P, V, Dp, least, kSet);
      for (int64_t i = 0; i < count; i++) {
        // The keys beyond the least are not every row's: each row goes on alone.
        if (tile[i].n > least)
          product_rows<1>(PV.from(i), P.from(i, least), V.from(least), Dp, tile[i].n - least, kContinue);
        float *o = O.from(n + i).data, *part = PV.from(i).data;
        for (int64_t j = 0; j < Dp; j += W) store(o + j, load(o + j) * factor[i] + load(part + j));
      }
    }
  }
  for (int64_t n = 0; n < rows; n++) {
    const int64_t h = block.head + n / block.queries, i = block.query + n % block.queries;
    const float sum = reduce_add(softmax[n].sum), factor = sum == 0.0f ? 0.0f : a.keep_scale / sum;
    narrow_row(row_of<T>(out, block.b, h, i), O.from(n).data, D, factor);
    if (lse) lse[(block.b * a.shape.H + h) * a.shape.T + i] = sum == 0.0f ? -INFINITY : softmax[n].top + logf(sum);
  }
}

template <class T>
void attention_forward(const Attention& a, const Heads& out, float* lse) {
  const int64_t B = a.shape.B, G = a.shape.G, length = a.shape.T;
  if (B * a.shape.H * length == 0) return;
  const int64_t most_rows = max(kTileRows, min(kMostRows, kMostRowFloats / a.Dp));
  const int64_t heads = min(a.group, most_rows), head_blocks = ceil_div(a.group, heads);
  // Enough tasks for every thread to have four, but no shorter ones than the packing allows.
  const int64_t even = ceil_div(B * G * head_blocks * length, 4 * threads());
  const int64_t queries = min(length, max(1, min(most_rows, max(48, even * heads)) / heads));
  const int64_t query_blocks = ceil_div(length, queries), tasks = query_blocks * B * G * head_blocks;
  auto task = [&](int64_t t) {
    // The last queries first: they see the most keys.
    const int64_t query = (query_blocks - 1 - t / (B * G * head_blocks)) * queries;
    const int64_t b = t / (G * head_blocks) % B, g = t / head_blocks % G, head = t % head_blocks * heads;
    QueryBlock block{b, g, g * a.group + head, min(heads, a.group - head), query, min(queries, length - query)};
    attention_forward_block<T>(a, block, out, lse);
  };
  parallel_if_worth(4 * B * a.shape.H * length * a.shape.S * a.shape.D, tasks, task);
}

}  // namespace
}  // namespace fastgpt
