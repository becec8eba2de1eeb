// The register tile of every matrix product: M rows by N vectors of sums that stay in registers over a whole run of k.
// Each step loads N vectors of B once and multiplies them by M numbers of A, each broadcast to all lanes.

// Before a loop over a tile's rows or vectors, wherever it touches the sums: unless all such loops are unrolled the
// compiler keeps the sums in memory.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

namespace fastgpt {
namespace {

// The tile that hides the latency of the multiply-add and leaves the fewest loads to each of them: M * N sums, N vectors
// of B and one broadcast number must fit in the registers (16, from W = 16 on 32).
#if FASTGPT_VEC_WIDTH == 16
constexpr int kTileRows = 14, kTileVecs = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 8, kTileVecs = 3;
#elif FASTGPT_VEC_WIDTH == 4
constexpr int kTileRows = 4, kTileVecs = 2;
#else
constexpr int kTileRows = 6, kTileVecs = 2;
#endif
constexpr int kTileCols = kTileVecs * W;

// acc[i][j] += the sum over k of A[i, k] * B[k, j], k in order, so that a sum does not depend on the tile it is in.
// A[i, k] is a[i * a_row + k * a_k]; B's row k is N vectors from b + k * b_row on.
template <int M, int N>
INLINE void multiply_tile(Vec (&acc)[M][N], const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row,
                          int64_t K) {
  for (int64_t k = 0; k < K; k++, a += a_k, b += b_row) {
    Vec columns[N];
    UNROLL for (int j = 0; j < N; j++) columns[j] = load(b + j * W);
    UNROLL for (int i = 0; i < M; i++) {
      Vec number = splat(a[i * a_row]);
      UNROLL for (int j = 0; j < N; j++) acc[i][j] = acc[i][j] + number * columns[j];
    }
  }
}

}  // namespace
}  // namespace fastgpt
