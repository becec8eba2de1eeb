// Packing: a block of a matrix as float32 panels, in the order in which multiply_tile reads them.
// A panel holds P neighbouring lines (rows of A or columns of B), for each k the P numbers side by side. With the lines
// apart in memory and k contiguous it is a transpose, done in registers; with the lines contiguous a copy.

namespace fastgpt {
namespace {

static_assert(kTileCols % W == 0 && (kTileRows % W == 0 || kTileRows < W), "panels are stored by whole vectors");

// W vectors as the columns of the matrix whose rows they were. Four by four within the 128-bit quarters first, by
// shuffles that cost one instruction on every processor, then the quarters as wholes.
#define LOW_PAIRS(q) q, W + q, q + 1, W + q + 1
#define HIGH_PAIRS(q) q + 2, W + q + 2, q + 3, W + q + 3
#define LOW_HALVES(q) q, q + 1, W + q, W + q + 1
#define HIGH_HALVES(q) q + 2, q + 3, W + q + 2, W + q + 3
#define QUARTER(q) q, q + 1, q + 2, q + 3
#if FASTGPT_VEC_WIDTH == 4
#define IN_QUARTERS(PATTERN) PATTERN(0)
#define EVEN_QUARTERS QUARTER(0)
#define ODD_QUARTERS QUARTER(0)
#elif FASTGPT_VEC_WIDTH == 8
#define IN_QUARTERS(PATTERN) PATTERN(0), PATTERN(4)
#define EVEN_QUARTERS QUARTER(0), QUARTER(8)
#define ODD_QUARTERS QUARTER(4), QUARTER(12)
#else
#define IN_QUARTERS(PATTERN) PATTERN(0), PATTERN(4), PATTERN(8), PATTERN(12)
#define EVEN_QUARTERS QUARTER(0), QUARTER(8), QUARTER(16), QUARTER(24)
#define ODD_QUARTERS QUARTER(4), QUARTER(12), QUARTER(20), QUARTER(28)
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IntVec){__VA_ARGS__})
#endif

INLINE void transpose(Vec (&rows)[W]) {
  UNROLL for (int i = 0; i < W; i += 4) {
    Vec* r = rows + i;
    Vec ab_low = SHUFFLE(r[0], r[1], IN_QUARTERS(LOW_PAIRS)), ab_high = SHUFFLE(r[0], r[1], IN_QUARTERS(HIGH_PAIRS));
    Vec cd_low = SHUFFLE(r[2], r[3], IN_QUARTERS(LOW_PAIRS)), cd_high = SHUFFLE(r[2], r[3], IN_QUARTERS(HIGH_PAIRS));
    r[0] = SHUFFLE(ab_low, cd_low, IN_QUARTERS(LOW_HALVES));
    r[1] = SHUFFLE(ab_low, cd_low, IN_QUARTERS(HIGH_HALVES));
    r[2] = SHUFFLE(ab_high, cd_high, IN_QUARTERS(LOW_HALVES));
    r[3] = SHUFFLE(ab_high, cd_high, IN_QUARTERS(HIGH_HALVES));
  }
  // Vector i now holds column i % 4 of every quarter, of the rows i / 4 * 4 .. i / 4 * 4 + 3.
  UNROLL for (int step = W / 2; step >= 4; step /= 2) {
    Vec before[W];
    UNROLL for (int i = 0; i < W; i++) before[i] = rows[i];
    UNROLL for (int i = 0; i < W; i += 8) {
      UNROLL for (int j = 0; j < 4; j++) {
        rows[i / 2 + j] = SHUFFLE(before[i + j], before[i + 4 + j], EVEN_QUARTERS);
        rows[W / 2 + i / 2 + j] = SHUFFLE(before[i + j], before[i + 4 + j], ODD_QUARTERS);
      }
    }
  }
}

constexpr int64_t kPanelPad = 16;  // floats between panels: for spilling stores, and against equal cache sets
template <int P>
INLINE int64_t panel_size(int64_t K) {
  return P * K + kPanelPad;
}
// Lanes that a panel's store touches: where P < W a store spills into the next k's numbers, which are written after it.
template <int P>
constexpr int kLanes = P < W ? W : P;

// The numbers of a cache line, all used before the next lines are touched: lines a multiple of 4 KB apart share a set of
// the cache, which holds 8 to 12 of them.
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

// Numbers k .. k + n - 1 of W lines as n vectors over the lines.
template <class T>
INLINE void load_transposed(const T* const* line, int64_t k, int n, Vec (&steps)[W]) {
  UNROLL for (int i = 0; i < W; i++) steps[i] = n == W ? load(line[i] + k) : load(line[i] + k, n);
  transpose(steps);
}

template <class T>
INLINE void transpose_lines(const T* const* line, int64_t k, int n, float* out, int64_t stride) {
  Vec steps[W];
  load_transposed(line, k, n, steps);
  UNROLL for (int s = 0; s < W; s++) {
    if (s == n) break;
    store(out + s * stride, steps[s]);
  }
}

// Numbers k .. k + K - 1 from each of a panel's lines.
template <int P, class T>
void transpose_panel(const T* const* line, int64_t k, int64_t K, float* panel) {
  for (int64_t begin = 0; begin < K; begin += kLine<T>)
    for (int g = 0; g < P; g += W) {
      int64_t s = begin, end = min(begin + kLine<T>, K);
      for (; s + W <= end; s += W) transpose_lines(line + g, k + s, W, panel + s * P + g, P);
      if (s < end) transpose_lines(line + g, k + s, (int)(end - s), panel + s * P + g, P);
    }
}

// Where each of a panel's lines begins. Lines beyond the last repeat it: what they give is never stored in C.
template <int P, class T>
struct Lines {
  const T* line[kLanes<P>];
  Lines(const T* source, int64_t across, int64_t lines) {
    for (int i = 0; i < kLanes<P>; i++) line[i] = source + min(i, lines - 1) * across;
  }
};

// Lines side by side in memory, each k in a row of its own: several panels at a time, since a cache line feeds several
// panels of A, and rows a power of two apart push each other out of the cache.
template <int P, class T>
void copy_panels(const T* source, int64_t along, int64_t lines, int64_t K, float* panels) {
  constexpr int64_t kGroup = 8;
  for (int64_t p = 0; p < lines; p += kGroup * P, panels += kGroup * panel_size<P>(K)) {
    int64_t count = min(kGroup * P, lines - p);
    for (int64_t k = 0; k < K; k++) {
      const T* row = source + k * along + p;
      float* out = panels + k * P;
      int64_t i = 0;
      for (; i + kLanes<P> <= count; i += P, out += panel_size<P>(K)) {
        UNROLL for (int g = 0; g < P; g += W) store(out + g, load(row + i + g));
      }
      for (; i < count; i += P, out += panel_size<P>(K))
        for (int g = 0; g < P; g += W) store(out + g, load(row + i + g, (int)max(0, min(W, count - i - g))));
    }
  }
}

template <int P, class T>
void gather_panel(const T* source, int64_t across, int64_t along, int64_t lines, int64_t K, float* panel) {
  for (int64_t k = 0; k < K; k++)
    for (int i = 0; i < P; i++) panel[k * P + i] = i < lines ? to_float(source[i * across + k * along]) : 0.0f;
}

// Line p, step k is source[p * across + k * along]. Panels of P lines, panel_size<P>(K) floats each, follow each other.
template <int P, class T>
void pack_panels(const T* source, int64_t across, int64_t along, int64_t lines, int64_t K, float* panels) {
  if (across == 1) return copy_panels<P>(source, along, lines, K, panels);
  for (int64_t p = 0; p < lines; p += P, source += P * across, panels += panel_size<P>(K))
    if (along == 1)
      transpose_panel<P>(Lines<P, T>(source, across, lines - p).line, 0, K, panels);
    else
      gather_panel<P>(source, across, along, lines - p, K, panels);
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
