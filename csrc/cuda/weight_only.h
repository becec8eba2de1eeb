// Products of few tokens with weights of 8 or 4 bits, which take the time that reading the weights takes.
#pragma once
#include <stdint.h>

#include "kernels.h"

namespace fastgpt {
namespace cuda {

constexpr int64_t kMostTokens = 16;   // of a block
constexpr int64_t kTileOutputs = 16;  // outputs (rows of the weights) of a tile
constexpr int64_t kGroup = 32;        // neighbours of k that share a scale of the 4-bit weights

// Neighbours of k in a tile: a lane takes 16 bytes of each of two rows, four lanes share a row.
template <int kBits>
constexpr int kDepth = kBits == 8 ? 64 : 128;
inline int64_t tile_depth(int bits) { return bits == 8 ? kDepth<8> : kDepth<4>; }

// Weights (N, K), K a multiple of 8, as fastgpt/cuda/weight_only.py packs them: tiles of kTileOutputs x tile_depth, 1024
// bytes each, those of an output side by side, N and K filled up with zeros. Scales: of 8 bits float32 (N); of 4 bits
// bfloat16, for each tile (8, 2, 4): groups k / kGroup of the rows g and g + 8.
struct WeightOnly {
  int bits;
  const void *data, *scales;
  const float* bias;  // (N), or null
  int64_t N, K;
};

// Of a block, so that two of them find room: a thread of 8 bits takes up to 64 registers, one of 4 bits, whose tiles are
// deeper, up to 107.
template <int kBits>
constexpr int kMostWarps = kBits == 8 ? 16 : 8;

// The warps of a block share the tiles of its outputs, warp w taking tiles w, w + warps, ...: as many warps as give each
// the same number of tiles. K alone decides, so that a sum has one order whatever else is computed with it.
inline int64_t weight_only_warps(int bits, int64_t K) {
  const int64_t tiles = (K + tile_depth(bits) - 1) / tile_depth(bits), most = bits == 8 ? kMostWarps<8> : kMostWarps<4>;
  const int64_t turns = (tiles + most - 1) / most;
  return (tiles + turns - 1) / turns;
}

// out (M, N) = activation(x weight.T + bias) + residual, of x (M, K), all float16 or bfloat16; sums in float32. A row's bits
// depend on nothing but itself. x is 16-byte aligned and its stride a multiple of 8. activation: csrc/kernels.h's.
// residual.data may be null.
void weight_only_linear(const WeightOnly& weight, const Rows& x, const Rows& out, int64_t M, int activation,
                        const Rows& residual, Stream stream);

}  // namespace cuda
}  // namespace fastgpt
