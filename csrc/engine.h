// What the decode engine's kernels take: packed weights, a model of them, a paged KV cache, and a step's tokens.
// Raw pointers and sizes; the memory is the caller's.
#pragma once
#include <stdint.h>

#include "kernels.h"

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
// (pages, G, page_size) of their rows. page_size: a multiple of 16. Pages may lie apart, as other layers' lie between them.
struct KvCache {
  int dtype;
  void *k, *v;
  float *k_scale, *v_scale;
  int64_t page_size, G, D;
  int64_t page_rows;  // from a page's first row of D numbers to the next page's: G * page_size where nothing lies between
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

// The engine's kernels: one instance per instruction set, and of AVX-512 per set of dot products.
struct EngineKernels {
  const char* dots;  // which dot products of the processor it uses beside the level's, as text

  // Of a weight (N, K), ceil(N / panel_columns()) panels of panel_bytes() each.
  int64_t (*panel_columns)();
  int64_t (*panel_bytes)(int format, int64_t K);
  void (*pack_weight)(int format, const Matrix& weight, uint8_t* panels);
  uint64_t (*fingerprint)(const uint8_t* data, int64_t bytes);  // a hash of the data
  // out (K): column n as the products see it.
  void (*unpack_column)(const Packed& weight, int64_t n, float* out);
  // out (M, N) = activation(x weight.T + bias) + residual, of x (M, K), all float32 and contiguous; residual may be out or
  // null.
  void (*packed_linear)(const Packed& weight, const float* x, int64_t M, int activation, const float* residual,
                        float* out);
  // k, v: row r of the step's tokens at r * row, head g at g * D behind; all float32.
  void (*store_kv)(const KvCache& cache, const float* k, const float* v, int64_t row, const PagedSequence* sequences,
                   int64_t count);
  // q, out: row r at r * q_row or r * out_row, head h of H at h * D behind. Query i of a sequence sees the keys up to
  // number position + i.
  void (*paged_attention)(const KvCache& cache, const float* q, int64_t q_row, int64_t H, float scale,
                          const PagedSequence* sequences, int64_t count, float* out, int64_t out_row);
  void (*step)(const Model& model, const StepInput& input);
  // Draws a token from the first V entries of each row of logits, which lie `stride` apart and are overwritten; -1 where
  // they are no distribution.
  void (*sample)(float* logits, int64_t stride, int64_t V, const Draw* draws, int64_t rows, int32_t* out);
};

// Null where this build has no such level.
extern const EngineKernels* const kEngineBaseline;
extern const EngineKernels* const kEngineAvx2;
extern const EngineKernels* const kEngineAvx512;
extern const EngineKernels* const kEngineAvx512Vnni;
extern const EngineKernels* const kEngineAvx512Bf16;  // and vnni

}  // namespace fastgpt
