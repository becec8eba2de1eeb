// What the decode engine's kernels take: packed weights, a model of them, a paged KV cache, and a step's tokens.
// Raw pointers and sizes; the memory is the caller's.
#pragma once
#include <stdint.h>

namespace fastgpt {

enum PackedFormat : int { kPackedFloat32 = 0, kPackedBFloat16 = 1, kPackedInt8 = 2, kPackedInt4 = 3 };
enum CacheDtype : int { kCacheFloat32 = 0, kCacheBFloat16 = 1, kCacheInt8 = 2 };

// A weight (N, K) in panels (cpu/packed.inl), and its bias, padded to whole panels, or null.
struct Packed {
  int format;
  int64_t N, K;
  const uint8_t* data;
  const float* bias;
};

struct Norm {
  const float *weight, *bias;  // (C); bias may be null
};

struct Layer {
  Norm ln_1, ln_2;
  Packed qkv, proj, fc, out;
  float scale;  // of the attention scores
};

// The pages of one layer: k (pages, G, page_size / 16, D, 16), v (pages, G, page_size, D), of dtype; of int8 the scales
// (pages, G, page_size) of their rows. page_size: a multiple of 16.
struct KvCache {
  int dtype;
  void *k, *v;
  float *k_scale, *v_scale;
  int64_t page_size, G, D;
};

struct Model {
  int64_t C, H, inner, vocab;
  int activation;
  float eps;
  int64_t layers;
  const Layer* layer;
  const KvCache* cache;  // (layers)
  Norm ln_f;
  Packed head, embedding;  // embedding: columns are tokens; often the head itself
  const float* positions;  // (block_size, C)
};

// Tokens [row, row + rows) of a step, which are number `position` ... of their sequence; pages: its block table, for
// page_size keys each.
struct PagedSequence {
  int64_t row, rows, position;
  const int32_t* pages;
};

// A step: M tokens of some sequences, and the rows whose logits are wanted.
struct StepInput {
  const int32_t* tokens;  // (M)
  int64_t M;
  const PagedSequence* sequences;
  int64_t count;
  const int32_t* wanted;  // (L) rows
  int64_t L;
  float* logits;  // (L, vocab)
};

// How a row's next token is drawn; a null pointer where there is nothing of the kind.
struct Draw {
  float temperature;  // 0: the likeliest
  int64_t top_k;      // 0: all
  float top_p, min_p, repetition, presence, frequency;
  double uniform;  // in [0, 1): where the cumulative distribution is inverted
  const int32_t* history;  // the tokens of the sequence, prompt first
  int64_t prompt, length;
  const int32_t* bias_ids;
  const float* bias;
  int64_t biases;
};

}  // namespace fastgpt
