// Packing: a block of a matrix as float32 panels, in the order in which multiply_tile reads them.
// A panel holds P neighbouring lines (rows of A or columns of B), for each k the P numbers side by side. With the lines
// apart in memory and k contiguous it is a transpose, done in registers; with the lines contiguous a copy.

namespace fastgpt {
namespace {

static_assert(kTileCols % W == 0 && (kTileRows % W == 0 || kTileRows < W), "panels are stored by whole vectors");

// Four numbers at a time in each 128-bit quarter: shuffles that cost one instruction on every processor.
#define LOW_PAIRS(q) q, W + q, q + 1, W + q + 1
#define HIGH_PAIRS(q) q + 2, W + q + 2, q + 3, W + q + 3
#define LOW_HALVES(q) q, q + 1, W + q, W + q + 1
#define HIGH_HALVES(q) q + 2, q + 3, W + q + 2, W + q + 3
#if FASTGPT_VEC_WIDTH == 4
#define QUARTERS(PATTERN) PATTERN(0)
#elif FASTGPT_VEC_WIDTH == 8
#define QUARTERS(PATTERN) PATTERN(0), PATTERN(4)
#else
#define QUARTERS(PATTERN) PATTERN(0), PATTERN(4), PATTERN(8), PATTERN(12)
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, PATTERN) __builtin_shufflevector(a, b, QUARTERS(PATTERN))
#else
#define SHUFFLE(a, b, PATTERN) __builtin_shuffle(a, b, (IntVec){QUARTERS(PATTERN)})
#endif

// Four numbers from each of the lines line[0], line[4], line[8] ... side by side.
INLINE Vec load_quarters(const float* const* line, int64_t k) {
#if FASTGPT_VEC_WIDTH == 16 && defined(__AVX512F__)
  __m512 a = _mm512_castps128_ps512(_mm_loadu_ps(line[0] + k));
  a = _mm512_insertf32x4(a, _mm_loadu_ps(line[4] + k), 1);
  a = _mm512_insertf32x4(a, _mm_loadu_ps(line[8] + k), 2);
  return (Vec)_mm512_insertf32x4(a, _mm_loadu_ps(line[12] + k), 3);
#elif FASTGPT_VEC_WIDTH == 8 && defined(__AVX2__)
  return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(line[0] + k)), _mm_loadu_ps(line[4] + k), 1);
#else
  Vec a;
  for (int q = 0; q < W / 4; q++) memcpy((char*)&a + 16 * q, line[4 * q] + k, 16);
  return a;
#endif
}
INLINE Vec load_quarters(const bf16* const* line, int64_t k) {
  typedef uint64_t Quarters __attribute__((vector_size(2 * W)));
  Quarters a;
  for (int q = 0; q < W / 4; q++) {
    uint64_t four;
    memcpy(&four, line[4 * q] + k, 8);
    a[q] = four;
  }
  return widen((HalfVec)a);
}

// W lines, k contiguous in each, into the panel's next W columns. Lines beyond the last repeat it: what they give is
// never stored. When P < W a store spills into the next k's numbers, which are written after it.
template <int P, class T>
void transpose_lines(const T* source, int64_t across, int64_t lines, int64_t K, float* panel) {
  const T* line[W];
  for (int i = 0; i < W; i++) line[i] = source + min(i, lines - 1) * across;
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    Vec a = load_quarters(line, k), b = load_quarters(line + 1, k);
    Vec c = load_quarters(line + 2, k), d = load_quarters(line + 3, k);
    Vec ab_low = SHUFFLE(a, b, LOW_PAIRS), ab_high = SHUFFLE(a, b, HIGH_PAIRS);
    Vec cd_low = SHUFFLE(c, d, LOW_PAIRS), cd_high = SHUFFLE(c, d, HIGH_PAIRS);
    store(panel + (k + 0) * P, SHUFFLE(ab_low, cd_low, LOW_HALVES));
    store(panel + (k + 1) * P, SHUFFLE(ab_low, cd_low, HIGH_HALVES));
    store(panel + (k + 2) * P, SHUFFLE(ab_high, cd_high, LOW_HALVES));
    store(panel + (k + 3) * P, SHUFFLE(ab_high, cd_high, HIGH_HALVES));
  }
  for (; k < K; k++)
    for (int i = 0; i < (P < W ? P : W); i++) panel[k * P + i] = to_float(line[i][k]);
}

// W lines side by side in memory, each k in its own row.
template <int P, class T>
void copy_lines(const T* source, int64_t along, int64_t lines, int64_t K, float* panel) {
  if (lines >= W)
    for (int64_t k = 0; k < K; k++) store(panel + k * P, load(source + k * along));
  else
    for (int64_t k = 0; k < K; k++) store(panel + k * P, load(source + k * along, (int)lines));
}

template <int P, class T>
void gather_lines(const T* source, int64_t across, int64_t along, int64_t lines, int64_t K, float* panel) {
  for (int64_t k = 0; k < K; k++)
    for (int i = 0; i < (P < W ? P : W); i++)
      panel[k * P + i] = i < lines ? to_float(source[i * across + k * along]) : 0.0f;
}

// Line p, step k is source[p * across + k * along]. Panels of P lines follow each other, P * K floats each; the last
// one may be written up to W floats beyond its end.
template <int P, class T>
void pack_panels(const T* source, int64_t across, int64_t along, int64_t lines, int64_t K, float* panels) {
  for (int64_t p = 0; p < lines; p += P, panels += P * K)
    for (int g = 0; g < P; g += W) {
      const T* first = source + (p + g) * across;
      int64_t rest = lines - p - g;
      if (rest <= 0)  // zeros, not what the memory held: arithmetic on denormal numbers is slow
        for (int64_t k = 0; k < K; k++) store(panels + k * P + g, Vec{});
      else if (across == 1)
        copy_lines<P>(first, along, rest, K, panels + g);
      else if (along == 1)
        transpose_lines<P>(first, across, rest, K, panels + g);
      else
        gather_lines<P>(first, across, along, rest, K, panels + g);
    }
}

// Lines [begin, end) of rows (A) or of columns (B), k from `k` to `k + K`.
INLINE void pack_rows(const Matrix& a, int64_t begin, int64_t end, int64_t k, int64_t K, float* panels) {
  int64_t offset = begin * a.row + k * a.col;
  if (a.dtype == kFloat32)
    pack_panels<kTileRows>((const float*)a.data + offset, a.row, a.col, end - begin, K, panels);
  else
    pack_panels<kTileRows>((const bf16*)a.data + offset, a.row, a.col, end - begin, K, panels);
}
INLINE void pack_columns(const Matrix& b, int64_t begin, int64_t end, int64_t k, int64_t K, float* panels) {
  int64_t offset = k * b.row + begin * b.col;
  if (b.dtype == kFloat32)
    pack_panels<kTileCols>((const float*)b.data + offset, b.col, b.row, end - begin, K, panels);
  else
    pack_panels<kTileCols>((const bf16*)b.data + offset, b.col, b.row, end - begin, K, panels);
}

}  // namespace
}  // namespace fastgpt
