// C = A B for matrices of any strides, and what follows it in a linear layer (Goto & van de Geijn 2008, "Anatomy of
// high-performance matrix multiplication"): blocks of B and A are packed for the caches, tiles of C stay in registers.
//
// The order of every sum is fixed: the bias, then runs of kBlockK products in order of k. It depends on neither the
// shape, the tile, the part nor the thread, so a row's result has the same bits in any batch.

namespace fastgpt {
namespace {

constexpr int64_t kBlockK = 256;                            // a panel of B, 16 or 32 KB, in L1; the chain of additions
constexpr int64_t kBlockRows = 192 / kTileRows * kTileRows;  // a block of A, up to 192 KB, in L2
constexpr int64_t kBlockCols = 1024 / kTileCols * kTileCols;  // a block of B, 1 MB, in L3
constexpr int64_t kKeptRows = 32;                            // up to here A is packed once, for all of K
constexpr int64_t kKeptCols = 4 * kTileCols;                 // and beside it the block of B, 64 or 128 KB, stays in L2

struct Product {
  Matrix a, b, c;
  bool accumulate;
  Epilogue epilogue;
};

// A rectangle of C, or of a block of it.
struct Part {
  int64_t row, rows, col, cols;
};

// Where a sum starts: nothing (null), the bias (row 0), or the sum over the blocks of K before.
struct Start {
  const float* data;
  int64_t row;
  Start from(int64_t i, int64_t j) const { return {data ? data + i * row + j : nullptr, row}; }
};

// out (M, kTileCols) = start + a panel of A times a panel of B.
template <int M>
void multiply_panels(const float* a, const float* b, int64_t K, Start start, float* out, int64_t out_row) {
  Vec sums[M][kTileVecs];
  UNROLL for (int i = 0; i < M; i++) {
    UNROLL for (int j = 0; j < kTileVecs; j++) sums[i][j] = Vec{};
    __builtin_prefetch(out + i * out_row);
    __builtin_prefetch(out + i * out_row + kTileCols - 1);
  }
  multiply_tile(sums, a, 1, kTileRows, b, kTileCols, K);
  UNROLL for (int i = 0; i < M; i++) {
    UNROLL for (int j = 0; j < kTileVecs; j++) {
      Vec sum = start.data ? load(start.data + i * start.row + j * W) + sums[i][j] : sums[i][j];
      store(out + i * out_row + j * W, sum);
    }
  }
}

typedef void (*PanelKernel)(const float*, const float*, int64_t, Start, float*, int64_t);
template <int M = kTileRows>
INLINE PanelKernel panel_kernel(int64_t rows) {
  if constexpr (M > 1)
    return rows == M ? multiply_panels<M> : panel_kernel<M - 1>(rows);
  else
    return multiply_panels<1>;
}

INLINE Vec load_any(int dtype, const void* p, int64_t index, int lanes) {
  return dtype == kFloat32 ? load_lanes((const float*)p + index, lanes) : load_lanes((const bf16*)p + index, lanes);
}
INLINE void store_any(int dtype, void* p, int64_t index, Vec a, int lanes) {
  dtype == kFloat32 ? store_lanes((float*)p + index, a, lanes) : store_lanes((bf16*)p + index, a, lanes);
}

// C = activation(sums) + residual for one tile.
void finish_tile(const Product& p, Part tile, const float* sums) {
  const Epilogue& e = p.epilogue;
  for (int64_t i = 0; i < tile.rows; i++) {
    int64_t at = (tile.row + i) * p.c.row + tile.col;
    for_columns(tile.cols, [&](int64_t j, int lanes) {
      Vec z = load(sums + i * kTileCols + j);
      if (e.pre) store_any(p.c.dtype, e.pre, at + j, z, lanes);
      z = activate(z, e.activation);
      if (e.residual) z = z + load_any(p.c.dtype, e.residual, at + j, lanes);
      store_any(p.c.dtype, p.c.data, at + j, z, lanes);
    });
  }
}

// A tile's rows lie far apart: none of their lines would come by itself while the product is made.
INLINE void prefetch_residual(const Product& p, Part tile) {
  const char* residual = (const char*)p.epilogue.residual;
  int64_t size = p.c.dtype == kFloat32 ? sizeof(float) : sizeof(bf16);
  for (int64_t i = 0; i < tile.rows; i++) {
    const char* row = residual + ((tile.row + i) * p.c.row + tile.col) * size;
    __builtin_prefetch(row);
    __builtin_prefetch(row + (tile.cols - 1) * size);
  }
}

// Copies a tile whose rows lie kTileCols apart here, out_row there.
void store_tile(Part tile, const float* sums, float* out, int64_t out_row) {
  for (int64_t i = 0; i < tile.rows; i++)
    for_columns(tile.cols, [&](int64_t j, int lanes) {
      store_lanes(out + i * out_row + j, load(sums + i * kTileCols + j), lanes);
    });
}
// A start that can be read in whole vectors: a copy of the tile's columns.
Start load_start(Part tile, Start start, float* copy) {
  if (!start.data) return start;
  for (int64_t i = 0; i < tile.rows; i++)
    for_columns(tile.cols, [&](int64_t j, int lanes) {
      store(copy + i * kTileCols + j, load_lanes(start.data + i * start.row + j, lanes));
    });
  return {copy, kTileCols};
}

// The partial sums of a part between blocks of K: C itself where it is float32.
struct Partial {
  float* data;
  int64_t stride, row, col;
  float* at(int64_t i, int64_t j) const { return data + (i - row) * stride + j - col; }
};

struct Step {
  int64_t K;
  bool first, last;
};

// A packed block of A times a packed block of B. start: of the first block of K, from the block's first column on.
void multiply_block(const Product& p, Part block, Step step, const float* a, const float* b, Start start,
                    Partial partial) {
  alignas(64) float sums[kTileRows * kTileCols];
  const Epilogue& e = p.epilogue;
  bool store_now = !step.last || (p.c.dtype == kFloat32 && !e.residual && !e.pre && e.activation == kNoActivation);
  for (int64_t j = 0; j < block.cols; j += kTileCols)
    for (int64_t i = 0; i < block.rows; i += kTileRows) {
      Part tile = {block.row + i, min(kTileRows, block.rows - i), block.col + j, min(kTileCols, block.cols - j)};
      const float* a_panel = a + i / kTileRows * panel_size<kTileRows>(step.K);
      const float* b_panel = b + j / kTileCols * panel_size<kTileCols>(step.K);
      float* out = partial.at(tile.row, tile.col);
      PanelKernel multiply = panel_kernel(tile.rows);
      Start from = step.first ? start.from(i, j) : Start{out, partial.stride};
      bool whole = tile.cols == kTileCols;
      if (step.last && e.residual) prefetch_residual(p, tile);
      if (store_now && whole) {
        multiply(a_panel, b_panel, step.K, from, out, partial.stride);
        continue;
      }
      multiply(a_panel, b_panel, step.K, whole ? from : load_start(tile, from, sums), sums, kTileCols);
      if (store_now)
        store_tile(tile, sums, out, partial.stride);
      else
        finish_tile(p, tile, sums);
    }
}

// Few rows, k contiguous in B's columns (decoding): the multiply-adds wait for the weights, so B is not packed but
// transposed in registers and used at once. kFewGroups groups of W columns together: their sums are independent.
constexpr int64_t kFewRows = 3;
constexpr int kFewGroups = 2;
constexpr int64_t kFewCols = kFewGroups * W;

// sums += n steps of A's panel times those of W columns of B.
template <int M, class T>
INLINE void multiply_few_steps(const float* a, const T* const* line, int64_t k, int n, Vec (&sums)[M]) {
  Vec steps[W];
  load_transposed(line, k, n, steps);
  UNROLL for (int s = 0; s < W; s++) {
    if (s == n) break;
    UNROLL for (int i = 0; i < M; i++) sums[i] = sums[i] + splat(a[s * kTileRows + i]) * steps[s];
  }
  // No later load before this: the compiler would hold more vectors than there are registers.
  asm volatile("" ::: "memory");
}

// total = or += a block of K for kFewCols columns; a is a panel of A.
template <int M, class T>
NOINLINE void multiply_few_block(const float* a, const T* const* line, int64_t k, int64_t K, bool add,
                                 Vec (&total)[kFewGroups][M]) {
  Vec sums[kFewGroups][M];
  UNROLL for (int g = 0; g < kFewGroups; g++) UNROLL for (int i = 0; i < M; i++) sums[g][i] = Vec{};
  int64_t begin = 0;
  for (; begin + kLine<T> <= K; begin += kLine<T>) {
    UNROLL for (int g = 0; g < kFewGroups; g++)
      UNROLL for (int64_t s = begin; s < begin + kLine<T>; s += W)
        multiply_few_steps<M>(a + s * kTileRows, line + g * W, k + s, W, sums[g]);
  }
  for (; begin < K; begin += W) {
    UNROLL for (int g = 0; g < kFewGroups; g++)
      multiply_few_steps<M>(a + begin * kTileRows, line + g * W, k + begin, (int)min(W, K - begin), sums[g]);
  }
  UNROLL for (int g = 0; g < kFewGroups; g++)
    UNROLL for (int i = 0; i < M; i++) total[g][i] = add ? total[g][i] + sums[g][i] : sums[g][i];
}

template <int M>
INLINE void load_few(Start start, int64_t cols, Vec (&total)[kFewGroups][M]) {
  for (int g = 0; g < kFewGroups && g * W < cols; g++)
    for (int i = 0; i < M; i++) total[g][i] = load_lanes(start.data + i * start.row + g * W, (int)min(W, cols - g * W));
}

template <int M, class T>
void multiply_few(const Product& p, Part part, const float* a, int64_t a_size, Start start) {
  alignas(64) float out[kTileRows * kTileCols];
  for (int64_t j = 0; j < part.cols; j += kFewCols) {
    Lines<kFewCols, T> b((const T*)p.b.data + (part.col + j) * p.b.col, p.b.col, part.cols - j);
    Vec total[kFewGroups][M];
    if (start.data) load_few(start.from(0, j), part.cols - j, total);
    for (int64_t k = 0; k == 0 || k < p.a.cols; k += kBlockK)
      multiply_few_block<M>(a + k / kBlockK * a_size, b.line, k, min(kBlockK, p.a.cols - k), k > 0 || start.data, total);
    for (int g = 0; g < kFewGroups && j + g * W < part.cols; g++) {
      for (int i = 0; i < M; i++) store(out + i * kTileCols, total[g][i]);
      finish_tile(p, {part.row, M, part.col + j + g * W, min(W, part.cols - j - g * W)}, out);
    }
  }
}

template <class T>
INLINE void multiply_few_rows(const Product& p, Part part, const float* a, int64_t a_size, Start start) {
  if (part.rows == 1) multiply_few<1, T>(p, part, a, a_size, start);
  if (part.rows == 2) multiply_few<2, T>(p, part, a, a_size, start);
  if (part.rows == 3) multiply_few<3, T>(p, part, a, a_size, start);
}

// The buffers of one thread for one part, all in its scratch: packed A, packed B, partial sums where C can't hold them,
// the bias where it is not float32.
struct Workspace {
  bool keeps_a;
  int64_t block_cols, a_size;  // a_size: floats for one block of A
  float *a, *b, *partial, *bias;
};

Workspace workspace(const Product& p, Part part) {
  int64_t K = p.a.cols, blocks = max(1, ceil_div(K, kBlockK)), block_k = min(K, kBlockK);
  Workspace w;
  w.keeps_a = part.rows <= kKeptRows;
  w.block_cols = min(part.cols, w.keeps_a ? kKeptCols : kBlockCols);
  w.a_size = ceil_div(min(part.rows, kBlockRows), kTileRows) * panel_size<kTileRows>(block_k);
  int64_t a_floats = w.a_size * (w.keeps_a ? blocks : 1);
  int64_t b_floats = ceil_div(w.block_cols, kTileCols) * panel_size<kTileCols>(block_k);
  int64_t partial_floats = p.c.dtype != kFloat32 && blocks > 1 ? part.rows * w.block_cols : 0;
  int64_t bias_floats = p.epilogue.bias && p.epilogue.bias_dtype != kFloat32 ? part.cols : 0;
  w.a = (float*)scratch(kGemmScratch, sizeof(float) * (a_floats + b_floats + partial_floats + bias_floats));
  w.b = w.a + a_floats;
  w.partial = partial_floats ? w.b + b_floats : nullptr;
  w.bias = bias_floats ? w.b + b_floats + partial_floats : nullptr;
  return w;
}

Start start_of(const Product& p, Part part, const Workspace& w) {
  const Epilogue& e = p.epilogue;
  if (p.accumulate) return {(const float*)p.c.data + part.row * p.c.row + part.col, p.c.row};
  if (!w.bias) return {e.bias ? (const float*)e.bias + part.col : nullptr, 0};
  for_columns(part.cols, [&](int64_t j, int lanes) {
    store_lanes(w.bias + j, load_any(e.bias_dtype, e.bias, part.col + j, lanes), lanes);
  });
  return {w.bias, 0};
}

// One thread's part of C.
void multiply_part(const Product& p, Part part) {
  int64_t K = p.a.cols;
  Workspace w = workspace(p, part);
  Start start = start_of(p, part, w);
  if (w.keeps_a)
    for (int64_t k = 0; k < K; k += kBlockK)
      pack_rows(p.a, part.row, part.row + part.rows, k, min(kBlockK, K - k), w.a + k / kBlockK * w.a_size);
  if (part.rows <= kFewRows && p.b.row == 1)
    return p.b.dtype == kFloat32 ? multiply_few_rows<float>(p, part, w.a, w.a_size, start)
                                 : multiply_few_rows<bf16>(p, part, w.a, w.a_size, start);
  for (int64_t j = 0; j < part.cols; j += w.block_cols) {
    int64_t col = part.col + j, cols = min(w.block_cols, part.cols - j);
    Partial partial = {(float*)p.c.data, p.c.row, 0, 0};
    if (w.partial) partial = {w.partial, w.block_cols, part.row, col};
    for (int64_t k = 0; k == 0 || k < K; k += kBlockK) {
      Step step = {min(kBlockK, K - k), k == 0, k + kBlockK >= K};
      pack_columns(p.b, col, col + cols, k, step.K, w.b);
      for (int64_t i = 0; i < part.rows; i += kBlockRows) {
        int64_t row = part.row + i, rows = min(kBlockRows, part.rows - i);
        if (!w.keeps_a) pack_rows(p.a, row, row + rows, k, step.K, w.a);
        const float* a = w.keeps_a ? w.a + k / kBlockK * w.a_size : w.a;
        multiply_block(p, {row, rows, col, cols}, step, a, w.b, start.from(i, j), partial);
      }
    }
  }
}

INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Into how many parts C is cut, along its rows and its columns.
struct Grid {
  int64_t rows, cols;
};

INLINE Grid choose_grid(int64_t M, int64_t N, int64_t K) {
  int64_t parts = threads();
  if (M * N * K < (1 << 17)) return {1, 1};
  Grid best = {1, 1};
  double least = 1e300;
  for (int64_t r = 1; r <= parts; r++) {
    int64_t c = parts / r;
    double m = round_up(ceil_div(M, r), kTileRows), n = round_up(ceil_div(N, c), kTileCols);
    double cost = m * n / kTileCols * kTileVecs + m + n;
    if (cost < least) least = cost, best = {r, c};
  }
  return best;
}

void gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Epilogue& epilogue) {
  int64_t M = c.rows, N = c.cols, K = a.cols;
  if (M == 0 || N == 0) return;
  Product product = {a, b, c, accumulate, epilogue};
  Grid grid = choose_grid(M, N, K);
  int64_t rows = round_up(ceil_div(M, grid.rows), kTileRows), cols = round_up(ceil_div(N, grid.cols), kTileCols);
  parallel(ceil_div(M, rows) * ceil_div(N, cols), [&](int64_t t) {
    int64_t row = t / ceil_div(N, cols) * rows, col = t % ceil_div(N, cols) * cols;
    multiply_part(product, {row, min(rows, M - row), col, min(cols, N - col)});
  });
}

}  // namespace
}  // namespace fastgpt
