// Weights of 8 or 4 bits times few tokens on the tensor cores: 16 outputs x 16 k of weights, made numbers of the
// activations' type in registers, times 16 k x 8 tokens. Every weight is read once, 16 bytes at a time.
//
// k may be in any order if it is the same on both sides. Of a tile lane 4 g + q has the rows g and g + 8, and of every 32
// neighbours of k the 8 from 8 q on: two products' worth, whose activations are 16 contiguous bytes.
#include "platform.cuh"

#include "weight_only.h"

#include "../kernels.h"
#include "errors.h"
#include "launch_rules.h"
#include "numbers.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kTileVectors = 64;  // 16 bytes each
// For which the registers of a multiprocessor must suffice.
template <int kBits, int kTokenTiles>
constexpr int kBlocks = kBits == 4 && kTokenTiles == 1 ? 3 : 2;

struct WeightOnlyArguments {
  WeightOnly weight;
  const void *x, *residual;
  void* out;
  int64_t x_stride, residual_stride, out_stride;
  int M, activation, tiles, groups;  // tiles: of an output; groups: of tokens
};

namespace {

// Two weights + 8 in the lowest nibbles of a word's halves.
template <class T>
__device__ __forceinline__ unsigned of_nibbles(unsigned word) {
  return difference(dev::lop3<kAndOr>(word, 0x000F000F, kUnits<T>), kUnits<T> + 0x00080008, T{});
}

// What a lane has of a tile.
template <int kBits>
struct Tile {
  uint4 rows[2];  // g and g + 8
  uint4 scales;   // of 4 bits: bfloat16, those of four groups of row g, then of row g + 8

  __device__ __forceinline__ void load(const uint4* data, const uint4* of_scales) {
    rows[0] = __ldg(data);
    rows[1] = __ldg(data + 32);
    if (kBits == 4) scales = __ldg(of_scales);
  }
  // Row r's weights at the 8 k of piece j, as four pairs.
  template <class T>
  __device__ __forceinline__ void pairs(int r, int j, unsigned (&to)[4]) const {
    const unsigned words[4] = {rows[r].x, rows[r].y, rows[r].z, rows[r].w};
    if (kBits == 8) {
#pragma unroll
      for (int i = 0; i < 4; i++) to[i] = of_bytes(words[2 * j + i / 2], i % 2, T{});
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) to[i] = of_nibbles<T>(words[j] >> 4 * i);
    }
  }
  __device__ __forceinline__ float scale(int r, int j) const {
    const unsigned words[4] = {scales.x, scales.y, scales.z, scales.w}, word = words[2 * r + j / 2];
    return bit_cast<float>(j % 2 ? word & 0xFFFF0000u : word << 16);
  }
};

// sums[token tile][c] += a tile's products; c: the row g or g + 8 (c / 2), the token 2 q + c % 2. x: of the lane's tokens,
// from its first k in the tile on, where `left` are left.
template <class T, int kBits, int kTokenTiles>
__device__ __forceinline__ void add_tile(const Tile<kBits>& tile, const T* const (&x)[kTokenTiles], int left,
                                         float (&sums)[kTokenTiles][4]) {
#pragma unroll
  for (int j = 0; j < kDepth<kBits> / kGroup; j++) {
    unsigned low[4], high[4];
    tile.template pairs<T>(0, j, low);
    tile.template pairs<T>(1, j, high);
#pragma unroll
    for (int n = 0; n < kTokenTiles; n++) {
      const uint4 eight = j * kGroup < left ? __ldg((const uint4*)(x[n] + j * kGroup)) : make_uint4(0, 0, 0, 0);
      float part[4] = {};
      float(&to)[4] = kBits == 8 ? sums[n] : part;
      dev::mma_m16n8k16<T>(to, {low[0], high[0], low[1], high[1]}, {eight.x, eight.y});
      dev::mma_m16n8k16<T>(to, {low[2], high[2], low[3], high[3]}, {eight.z, eight.w});
      if (kBits == 4)
#pragma unroll
        for (int c = 0; c < 4; c++) sums[n][c] = fmaf(tile.scale(c / 2, j), part[c], sums[n][c]);
    }
  }
}

__device__ __forceinline__ float activated(float y, int activation) {
  if (activation == kGelu) return 0.5f * y * (1.0f + erff(y * 0.70710678f));
  if (activation == kGeluTanh) return 0.5f * y * (1.0f + tanhf(0.79788456f * fmaf(0.044715f * y * y, y, y)));
  return activation == kRelu ? fmaxf(y, 0.0f) : y;
}

// Output n of a token from the sum of its products.
template <class T, int kBits>
__device__ __forceinline__ void finish(const WeightOnlyArguments& a, int64_t token, int64_t n, float sum) {
  const float scale = kBits == 8 ? ((const float*)a.weight.scales)[n] : 1.0f;
  float y = activated(fmaf(sum, scale, a.weight.bias ? a.weight.bias[n] : 0.0f), a.activation);
  if (a.residual) y += to_float(((const T*)a.residual)[token * a.residual_stride + n]);
  round_to(y, (T*)a.out + token * a.out_stride + n);
}

}  // namespace

// A block: 16 outputs of a group of 8 or 16 tokens. The groups of the same outputs are neighbours, so that the L2 cache has
// the weights for all but the first.
template <class T, int kBits, int kTokenTiles>
__global__ void __launch_bounds__(32 * kMostWarps<kBits>, kBlocks<kBits, kTokenTiles>)
    weight_only_kernel(WeightOnlyArguments a) {
  constexpr int kPitch = kTileOutputs + 4;  // floats: the lanes of a warp write to 32 banks
  __shared__ float partial[kMostWarps<kBits>][8 * kTokenTiles][kPitch];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int outputs = blockIdx.x / (unsigned)a.groups, token0 = blockIdx.x % (unsigned)a.groups * (8 * kTokenTiles);
  const int64_t first = (int64_t)outputs * a.tiles + warp;
  const uint4* data = (const uint4*)a.weight.data + first * kTileVectors + lane;
  const uint4* scales = (const uint4*)a.weight.scales + first * 8 + lane / 4;
  const int k = warp * kDepth<kBits> + lane % 4 * 8;
  const T* x[kTokenTiles];  // a token beyond the last gives what nobody looks at
#pragma unroll
  for (int n = 0; n < kTokenTiles; n++) x[n] = (const T*)a.x + min(token0 + 8 * n + lane / 4, a.M - 1) * a.x_stride + k;
  float sums[kTokenTiles][4] = {};
  Tile<kBits> next;
  next.load(data, scales);
#pragma unroll 1
  for (int t = warp, left = (int)a.weight.K - k; t < a.tiles; t += warps, left -= warps * kDepth<kBits>) {
    const Tile<kBits> tile = next;
    data += warps * kTileVectors, scales += warps * 8;
    dev::keep(data);
    if (kBits == 4) dev::keep(scales);
    if (t + warps < a.tiles) next.load(data, scales);
    add_tile<T, kBits, kTokenTiles>(tile, x, left, sums);
#pragma unroll
    for (int n = 0; n < kTokenTiles; n++) {
      x[n] += warps * kDepth<kBits>;
      dev::keep(x[n]);
    }
  }
#pragma unroll
  for (int n = 0; n < kTokenTiles; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) partial[warp][8 * n + lane % 4 * 2 + c % 2][lane / 4 + c / 2 * 8] = sums[n][c];
  __syncthreads();
  for (int i = threadIdx.x; i < 8 * kTokenTiles * kTileOutputs; i += blockDim.x) {
    const int token = i / kTileOutputs, row = i % kTileOutputs;
    const int64_t n = outputs * kTileOutputs + row;
    if (token0 + token >= a.M || n >= a.weight.N) continue;
    float sum = 0.0f;
#pragma unroll 4
    for (int w = 0; w < warps; w++) sum += partial[w][token][row];
    finish<T, kBits>(a, token0 + token, n, sum);
  }
}

namespace {

template <class T, int kBits>
void start(const WeightOnlyArguments& a, Stream stream) {
  const dim3 grid((unsigned)(ceil_div(a.weight.N, kTileOutputs) * a.groups));
  const dim3 block(32 * (unsigned)weight_only_warps(kBits, a.weight.K));
  if (a.M <= 8)
    LAUNCH((weight_only_kernel<T, kBits, 1>), grid, block, 0, stream, a);
  else
    LAUNCH((weight_only_kernel<T, kBits, 2>), grid, block, 0, stream, a);
}

}  // namespace

void weight_only_linear(const WeightOnly& weight, const Rows& x, const Rows& out, int64_t M, int activation,
                        const Rows& residual, Stream stream) {
  if (M == 0 || weight.N == 0) return;
  const int tiles = (int)ceil_div(weight.K, tile_depth(weight.bits)), groups = (int)ceil_div(M, kMostTokens);
  const WeightOnlyArguments a = {weight, x.data, residual.data, out.data, x.stride, residual.stride, out.stride, (int)M,
                                 activation, tiles, groups};
  if (x.dtype == kFloat16)
    weight.bits == 8 ? start<__half, 8>(a, stream) : start<__half, 4>(a, stream);
  else
    weight.bits == 8 ? start<__nv_bfloat16, 8>(a, stream) : start<__nv_bfloat16, 4>(a, stream);
  check_launch("weight_only_linear", "bits", weight.bits, "M", M, "N", weight.N, "K", weight.K);
}

}  // namespace cuda
}  // namespace fastgpt
