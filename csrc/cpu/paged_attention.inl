// Attention over a paged KV cache (Kwon et al. 2023, arXiv:2309.06180). Keys lie in a page by 16 neighbours, (D, 16), so that
// scores come out as vectors of keys; values lie row by row.
//
// A query's bits depend on neither the pages nor the other queries: blocks of kKeys keys count from key 0, and every sum
// has one order, that of attention.inl.

namespace fastgpt {
namespace {

constexpr int64_t kKeyLanes = 16;
constexpr int64_t kQueryRows = 4;  // of a tile
constexpr int64_t kQueryBlock = 64;  // of a task

// GCC 12's own conversions of bytes go lane by lane.
INLINE Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  return to_floats((IntVec)_mm512_maskz_cvtepi8_epi32(0xFFFF, _mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__) && FASTGPT_VEC_WIDTH == 8
  return to_floats((IntVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef int8_t ByteVec __attribute__((vector_size(W)));
  ByteVec bytes;
  memcpy(&bytes, p, W);
  return __builtin_convertvector(__builtin_convertvector(bytes, IntVec), Vec);
#endif
}
INLINE Vec load(const int8_t* p, int n) {
#if defined(__AVX512BW__)
  const __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p);
  return to_floats((IntVec)_mm512_maskz_cvtepi8_epi32(0xFFFF, bytes));
#else
  int8_t bytes[W] = {};
  memcpy(bytes, p, n);
  return load(bytes);
#endif
}

// Two vectors of numbers from p on. Of bfloat16 ones that lie side by side the first vector gets the even ones and the
// second the odd ones: a shift and a mask, which is half the work of widening them in their order.
template <class T>
INLINE void load_pair(const T* p, Vec& a, Vec& b) {
  a = load(p), b = load(p + W);
}
INLINE void load_pair(const bf16* p, Vec& a, Vec& b) {
  const IntVec both = load_ints(p);
  a = as_float(both << 16), b = as_float(both & (int)0xFFFF0000);
}
// Sums of such vectors into the numbers' order, and back.
#define FIRST_ALTERNATE(q) q / 2, W + q / 2, q / 2 + 1, W + q / 2 + 1
#define SECOND_ALTERNATE(q) W / 2 + q / 2, W / 2 + W + q / 2, W / 2 + q / 2 + 1, W / 2 + W + q / 2 + 1
#define EVENS(q) 2 * q, 2 * q + 2, 2 * q + 4, 2 * q + 6
#define ODDS(q) 2 * q + 1, 2 * q + 3, 2 * q + 5, 2 * q + 7
template <class T>
INLINE void order_pair(Vec&, Vec&) {}
template <>
INLINE void order_pair<bf16>(Vec& a, Vec& b) {
  const Vec first = SHUFFLE(a, b, IN_QUARTERS(FIRST_ALTERNATE)), second = SHUFFLE(a, b, IN_QUARTERS(SECOND_ALTERNATE));
  a = first, b = second;
}
template <class T>
INLINE void split_pair(Vec&, Vec&) {}
template <>
INLINE void split_pair<bf16>(Vec& a, Vec& b) {
  const Vec even = SHUFFLE(a, b, IN_QUARTERS(EVENS)), odd = SHUFFLE(a, b, IN_QUARTERS(ODDS));
  a = even, b = odd;
}

// One head's pages of one sequence.
template <class T>
struct HeadPages {
  const KvCache& cache;
  const int32_t* table;
  int64_t g;
  INLINE int64_t slot(int64_t key) const {  // the row of a key, counted from the first page's
    return table[key / cache.page_size] * cache.page_rows + g * cache.page_size + key % cache.page_size;
  }
  INLINE T* keys(int64_t key) const {  // (D, kKeyLanes) of the 16 keys that `key` is the first of
    return (T*)cache.k + slot(key) * cache.D;
  }
  INLINE T* value(int64_t key) const { return (T*)cache.v + slot(key) * cache.D; }
};

// ---- storing --------------------------------------------------------------------------------------------------------

INLINE void put(float* p, float a, float) { *p = a; }
INLINE void put(bf16* p, float a, float) {
  uint32_t u;
  memcpy(&u, &a, 4);
  p->bits = (uint16_t)((a == a ? u + 0x7FFF + ((u >> 16) & 1) : u | 0x400000) >> 16);
}
INLINE void put(int8_t* p, float a, float inverse) { *p = (int8_t)lrintf(a * inverse); }

// The scale of a row of int8 numbers, NaN where one of them is not finite; 1 of the other types.
template <class T>
INLINE float row_scale(const float* x, int64_t D) {
  if (sizeof(T) > 1) return 1.0f;
  float top = 0.0f, odd = 0.0f;
  for (int64_t d = 0; d < D; d++) {
    top = fabsf(x[d]) > top ? fabsf(x[d]) : top;
    odd += x[d] - x[d];
  }
  return top / 127.0f + odd;
}

template <class T>
INLINE void store_key_value(const HeadPages<T>& pages, int64_t key, const float* k, const float* v) {
  const int64_t D = pages.cache.D, lane = key % kKeyLanes;
  T *to_k = pages.keys(key - lane) + lane, *to_v = pages.value(key);
  const float k_scale = row_scale<T>(k, D), v_scale = row_scale<T>(v, D);
  const float k_inverse = k_scale > 0.0f ? 1.0f / k_scale : 0.0f, v_inverse = v_scale > 0.0f ? 1.0f / v_scale : 0.0f;
  for (int64_t d = 0; d < D; d++) put(to_k + d * kKeyLanes, k[d], k_inverse);
  for (int64_t d = 0; d < D; d++) put(to_v + d, v[d], v_inverse);
  if (sizeof(T) > 1) return;
  pages.cache.k_scale[pages.slot(key)] = k_scale;
  pages.cache.v_scale[pages.slot(key)] = v_scale;
}

// ---- scores and sums ------------------------------------------------------------------------------------------------

// The numbers d of 16 keys.
template <class T>
INLINE void load_keys(const T* p, Vec* columns) {
  if constexpr (kKeyLanes == W)
    columns[0] = load(p);
  else
    UNROLL for (int n = 0; n < kKeyLanes / W; n += 2) load_pair(p + n * W, columns[n], columns[n + 1]);
}

// Scores of R queries against N groups of 16 keys from `key` on; q: (R, q_row), to: (R, kKeys).
template <int R, int N, class T>
INLINE void score_groups(const HeadPages<T>& pages, int64_t key, const float* q, int64_t q_row, float* to) {
  constexpr int kVecs = kKeyLanes / W;
  const int64_t D = pages.cache.D;
  const T* k[N];
  UNROLL for (int n = 0; n < N; n++) k[n] = pages.keys(key + n * kKeyLanes);
  for (int64_t start = 0; start < D; start += kScoreChain) {
    Vec sum[R][N * kVecs] = {};
    for (int64_t d = start; d < min(D, start + kScoreChain); d++) {
      Vec columns[N * kVecs];
      UNROLL for (int n = 0; n < N; n++) load_keys(k[n] + d * kKeyLanes, columns + n * kVecs);
      UNROLL for (int r = 0; r < R; r++) {
        Vec number = splat(q[r * q_row + d]);
        UNROLL for (int n = 0; n < N * kVecs; n++) sum[r][n] = multiply_add(number, columns[n], sum[r][n]);
      }
    }
    if constexpr (kVecs > 1)
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N * kVecs; n += 2) order_pair<T>(sum[r][n], sum[r][n + 1]);
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int n = 0; n < N * kVecs; n++) {
        float* at = to + r * kKeys + n * W;
        store(at, start ? load(at) + sum[r][n] : sum[r][n]);
      }
  }
}

// Multiplies rows of weights or scores by the numbers of the keys from `key` on.
template <class T>
INLINE void scale_keys(const HeadPages<T>& pages, const float* scales, int64_t key, int64_t keys, int64_t R, float* rows) {
  for (int64_t j = 0; j < keys; j += kKeyLanes) {
    const float* group = scales + pages.slot(key + j);
    for (int64_t r = 0; r < R; r++)
      for (int64_t n = 0; n < kKeyLanes; n += W) {
        float* at = rows + r * kKeys + j + n;
        store(at, load(at) * load(group + n));
      }
  }
}

template <int R, class T>
INLINE void scores_of_keys(const HeadPages<T>& pages, int64_t key, int64_t keys, const float* q, int64_t q_row, float* to) {
  int64_t j = 0;
  if constexpr (R <= 2)
    for (; j + kKeyLanes < keys; j += 2 * kKeyLanes) score_groups<R, 2>(pages, key + j, q, q_row, to + j);
  for (; j < keys; j += kKeyLanes) score_groups<R, 1>(pages, key + j, q, q_row, to + j);
  if (sizeof(T) == 1) scale_keys(pages, pages.cache.k_scale, key, keys, R, to);
}

// Columns of R rows of out: the sum over keys [begin, end) of the block at `key` of weight times value, going on with
// what out holds if begin > 0. N vectors, or one of which `lanes` count.
template <int R, int N, class T>
INLINE void sum_values(const HeadPages<T>& pages, int64_t key, int64_t begin, int64_t end, const float* weights,
                       int64_t col, int lanes, float* out, int64_t out_row) {
  constexpr int kPair = N > 1 ? 2 : 1;
  Vec sum[R][N] = {};
  if (begin)
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int n = 0; n < N; n++) sum[r][n] = load(out + r * out_row + col + n * W);
      UNROLL for (int n = 0; n + 1 < N; n += 2) split_pair<T>(sum[r][n], sum[r][n + 1]);
    }
  const int64_t size = pages.cache.page_size, D = pages.cache.D;
  for (int64_t j = begin; j < end;) {
    const int64_t stop = min(end, j + size - (key + j) % size);  // a page's end
    const T* v = pages.value(key + j) + col;
    for (; j < stop; j++, v += D) {
      Vec weight[R];
      UNROLL for (int r = 0; r < R; r++) weight[r] = splat(weights[r * kKeys + j]);
      UNROLL for (int n = 0; n < N; n += kPair) {
        Vec columns[kPair];
        if constexpr (N > 1)
          load_pair(v + n * W, columns[0], columns[1]);
        else
          columns[0] = lanes < W ? load(v, lanes) : load(v);
        UNROLL for (int r = 0; r < R; r++)
          UNROLL for (int i = 0; i < kPair; i++) sum[r][n + i] = multiply_add(weight[r], columns[i], sum[r][n + i]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int n = 0; n + 1 < N; n += 2) order_pair<T>(sum[r][n], sum[r][n + 1]);
    UNROLL for (int n = 0; n < N; n++) store(out + r * out_row + col + n * W, sum[r][n]);
  }
}

template <int R, class T>
INLINE void values_of_keys(const HeadPages<T>& pages, int64_t key, int64_t begin, int64_t end, const float* weights,
                           float* out, int64_t out_row) {
  constexpr int N = R == 1 ? 8 : R == 2 ? 4 : 2;
  const int64_t D = pages.cache.D;
  int64_t col = 0;
  for (; col + N * W <= D; col += N * W) sum_values<R, N>(pages, key, begin, end, weights, col, W, out, out_row);
  for (; col < D; col += W)
    sum_values<R, 1>(pages, key, begin, end, weights, col, (int)min(W, D - col), out, out_row);
}

// ---- attention of a run of queries ------------------------------------------------------------------------------------

// What is common to the queries of a step: row r of q and out is r * row, head h is h * D behind; heads in groups of
// H / G share keys.
struct PagedQueries {
  const float* q;
  float* out;
  int64_t q_row, out_row, H;
  float scale;
};

template <int R, class T>
NOINLINE void attend_tile(const HeadPages<T>& pages, int64_t key, int64_t first, float* Q, int64_t Dp, SoftmaxRow* rows,
                        float* P, float* PV, float* O) {
  int64_t most = 0, least = kKeys;
  for (int64_t i = 0; i < R; i++) {
    rows[i].n = max(0, min(kKeys, first + i + 1 - key));
    rows[i].scores = P + i * kKeys;
    most = max(most, rows[i].n), least = min(least, rows[i].n);
  }
  if (most == 0) return;
  scores_of_keys<R>(pages, key, most, Q, Dp, P);
  float factor[kQueryRows + W] = {};
  softmax_rows(rows, R, nullptr, factor);
  if (sizeof(T) == 1) scale_keys(pages, pages.cache.v_scale, key, most, R, P);
  values_of_keys<R>(pages, key, 0, least, P, PV, Dp);
  for (int64_t i = 0; i < R; i++) {
    // The keys beyond the least are not every query's: each goes on alone, so that nothing hidden is multiplied in.
    if (rows[i].n > least) values_of_keys<1>(pages, key, least, rows[i].n, P + i * kKeys, PV + i * Dp, Dp);
    if (rows[i].n == 0) continue;
    float *o = O + i * Dp, *part = PV + i * Dp;
    for (int64_t j = 0; j < Dp; j += W) store(o + j, load(o + j) * factor[i] + load(part + j));
  }
}

// The first rows, as many as a tile takes (4, 2 or 1); returns their number.
template <class T>
INLINE int64_t attend_rows(int64_t count, const HeadPages<T>& pages, int64_t key, int64_t first, float* Q, int64_t Dp,
                           SoftmaxRow* rows, float* P, float* PV, float* O) {
  if (count >= 4) return attend_tile<4>(pages, key, first, Q, Dp, rows, P, PV, O), 4;
  if (count >= 2) return attend_tile<2>(pages, key, first, Q, Dp, rows, P, PV, O), 2;
  return attend_tile<1>(pages, key, first, Q, Dp, rows, P, PV, O), 1;
}

// Head h of `count` queries of a sequence from position `position` on, which are rows `row` ... of q.
template <class T>
void attend_queries(const PagedQueries& a, const HeadPages<T>& pages, int64_t h, int64_t row, int64_t position,
                    int64_t count) {
  const int64_t D = pages.cache.D, Dp = ceil_div(D, W) * W;
  Arena arena{(float*)scratch(kAttentionScratch, sizeof(float) * (2 * count * Dp + kQueryRows * (kKeys + Dp) + 4 * 16))};
  float *Q = arena.take(count * Dp), *O = arena.take(count * Dp);
  float *P = arena.take(kQueryRows * kKeys), *PV = arena.take(kQueryRows * Dp);
  SoftmaxRow rows[kQueryBlock];
  for (int64_t i = 0; i < count; i++) {
    widen_row(Q + i * Dp, a.q + (row + i) * a.q_row + h * D, D, a.scale);
    rows[i] = {Vec{}, -INFINITY, 0, 0, nullptr};
  }
  memset(O, 0, sizeof(float) * count * Dp);
  for (int64_t key = 0; key < position + count; key += kKeys)
    for (int64_t i = 0; i < count;)
      i += attend_rows<T>(count - i, pages, key, position + i, Q + i * Dp, Dp, rows + i, P, PV, O + i * Dp);
  for (int64_t i = 0; i < count; i++)
    narrow_row(a.out + (row + i) * a.out_row + h * D, O + i * Dp, D, 1.0f / reduce_add(rows[i].sum));
}

// The new keys and values of a step: row r at r * row, head g at g * D behind.
struct NewKeys {
  const float *k, *v;
  int64_t row;
};

template <class T>
void store_rows(const KvCache& cache, const NewKeys& kv, const PagedSequence& s, int64_t g, int64_t begin, int64_t end) {
  const HeadPages<T> pages = {cache, s.pages, g};
  for (int64_t i = begin; i < end; i++) {
    const int64_t at = (s.row + i) * kv.row + g * cache.D;
    store_key_value<T>(pages, s.position + i, kv.k + at, kv.v + at);
  }
}

template <class T>
void store_kv(const KvCache& cache, const NewKeys& kv, const PagedSequence* sequences, int64_t count) {
  parallel(count * cache.G, [&](int64_t t) {
    const PagedSequence& s = sequences[t / cache.G];
    store_rows<T>(cache, kv, s, t % cache.G, 0, s.rows);
  });
}

// The queries of all sequences; with kv (one key head a query head) their keys and values are stored on the way, by the
// task that needs them, when every sequence is a single task a head.
template <class T>
void paged_attention(const KvCache& cache, const PagedQueries& a, const PagedSequence* sequences, int64_t count,
                     const NewKeys* kv) {
  int64_t most = 0;
  for (int64_t s = 0; s < count; s++) most = max(most, sequences[s].rows);
  const int64_t blocks = ceil_div(most, kQueryBlock), group = a.H / cache.G;
  if (kv && (blocks > 1 || group > 1)) {
    store_kv<T>(cache, *kv, sequences, count);
    kv = nullptr;
  }
  parallel(count * blocks * a.H, [&](int64_t t) {
    // The last queries first: they see the most keys.
    const int64_t block = blocks - 1 - t / (count * a.H), h = t % a.H;
    const PagedSequence& s = sequences[t / a.H % count];
    const int64_t begin = block * kQueryBlock, rows = min(kQueryBlock, s.rows - begin);
    if (rows <= 0) return;
    if (kv) store_rows<T>(cache, *kv, s, h, 0, s.rows);
    attend_queries<T>(a, {cache, s.pages, h / group}, h, s.row + begin, s.position + begin, rows);
  });
}

// Calls FUNCTION<T>(...) for the element type of a KV cache.
#define BY_CACHE(dtype, FUNCTION, ...)                              \
  ((dtype) == kCacheFloat32    ? FUNCTION<float>(__VA_ARGS__)       \
   : (dtype) == kCacheBFloat16 ? FUNCTION<bf16>(__VA_ARGS__)        \
                               : FUNCTION<int8_t>(__VA_ARGS__))

}  // namespace
}  // namespace fastgpt
