// Products of small matrices by the lanes of a warp together, whose layout platform.cuh tells.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "warp.h"

namespace cusim {

// The two numbers of T that share a register.
template <class T>
void numbers_of(unsigned bits, float* x) {
  T two[2];
  memcpy(two, &bits, sizeof bits);
  x[0] = (float)two[0], x[1] = (float)two[1];
}

struct Fragments {  // of one lane
  float a[4][2], b[2][2];  // of each register
};
static_assert(sizeof(Fragments) <= kMeetBytes, "");

inline float element_a(const Fragments* all, int row, int k) {
  return all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)][k % 2];
}
inline float element_b(const Fragments* all, int k, int column) {
  return all[column * 4 + k % 8 / 2].b[k / 8][k % 2];
}

}  // namespace cusim

namespace dev {

template <class T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  cusim::Fragments mine, all[cusim::kWarp];
  for (int i = 0; i < 4; i++) cusim::numbers_of<T>(a[i], mine.a[i]);
  for (int i = 0; i < 2; i++) cusim::numbers_of<T>(b[i], mine.b[i]);
  cusim::meet(0xFFFFFFFFu, &mine, sizeof mine, all, CUSIM_SITE("mma"));
  const int g = cusim::self->lane / 4, q = cusim::self->lane % 4;
  for (int i = 0; i < 4; i++) {
    float sum = 0.0f;
    for (int k = 0; k < 16; k++) sum += cusim::element_a(all, g + 8 * (i / 2), k) * cusim::element_b(all, k, 2 * q + i % 2);
    d[i] += sum;
  }
}

}  // namespace dev
