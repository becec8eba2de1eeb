// Rows of logits to tokens, a block a row: the tokens that csrc/cpu/sampling.inl and fastgpt/torch_sampling.py draw.
#pragma once
#include <stdint.h>

#include "kernels.h"

namespace fastgpt {
namespace cuda {

constexpr int64_t kMostVocabulary = 1 << 20;

// How each of R rows is drawn: arrays (R) on the device, of what fastgpt.SamplingParams says under these names.
// temperature: 0 for the likeliest; top_k: 0 for all. (seed, sample, position) give the number that is drawn
// (fastgpt/sampling.py's uniform). repetition, presence and frequency are null where no row has a penalty; with them row r's
// sequence is history[r * history_stride + 0 .. length[r]), of which the first prompt[r] are the prompt's, and counts (R, V)
// holds zeros, before and after. bias_starts (R + 1): where a row's entries of bias_ids, no two of them equal, and bias
// begin and end, or null. Ids outside [0, V) are left out.
struct Draws {
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p;
  const int64_t* seed;
  const int32_t *sample, *position;
  const float *repetition, *presence, *frequency;
  const int32_t* history;
  int64_t history_stride;
  const int32_t *prompt, *length;
  int32_t* counts;
  const int32_t *bias_starts, *bias_ids;
  const float* bias;
};

// Threads of a block: at most 8 ids for each as long as there may be more threads; a power of 2.
inline int64_t sampling_threads(int64_t V) {
  int64_t threads = 64;
  while (threads < 1024 && threads * 8 < V) threads *= 2;
  return threads;
}

// out (R): the token of each row of logits (R, V), V up to kMostVocabulary, or -1 where the row is no distribution: where
// its largest is not finite, or an entry is not a number. work: float32 (R, V), overwritten; the logits themselves where
// these are float32 and may go, and then of their stride.
void sample(const Rows& logits, const Rows& work, int64_t R, int64_t V, const Draws& draws, int32_t* out, Stream stream);

}  // namespace cuda
}  // namespace fastgpt
