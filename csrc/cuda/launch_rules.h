// How the kernels are launched: pure functions of sizes, so that they can be tested where there is no GPU.
#pragma once
#include <stdint.h>

#include "kernels.h"

namespace fastgpt {
namespace cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The most query rows (tokens times query heads of a key head) that a block of paged_attention takes together, so that a key
// is read once for all of them; more rows are more blocks, which find the keys in the L2 cache.
constexpr int kMostRows = 8;

// How many a block takes of a cache of floats: one where there is only one, else four. Eight would take twice as long.
inline int64_t rows_of_block(int64_t max_query, int64_t group) { return max_query * group == 1 ? 1 : 4; }

// The head size that a kernel is compiled for: the least that holds D.
inline int64_t head_class(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }

// How many chunks of keys one block walks over. A block's copies go on across the chunks, so longer walks keep more of
// them under way; but there should be 8 blocks for each processor before they grow longer. No longer than kLongestWalk: in a
// graph `chunks` is the longest context, and most sequences are shorter.
constexpr int64_t kLongestWalk = 4;
inline int64_t chunks_of_block(int64_t blocks_of_chunk, int64_t chunks, int64_t processors) {
  int64_t walk = 1;
  while (walk < chunks && walk < kLongestWalk && blocks_of_chunk * ceil_div(chunks, walk) > 8 * processors) walk *= 2;
  return walk;
}

// A divisor's reciprocal for keys below 2**22 and divisors up to 1024: key / divisor = key * reciprocal / 2**32. 0 for 1.
inline uint32_t reciprocal(int64_t divisor) {
  return divisor == 1 ? 0 : (uint32_t)(((int64_t(1) << 32) + divisor - 1) / divisor);
}

}  // namespace cuda
}  // namespace fastgpt
