// Barriers, and what the lanes of a warp exchange.
#pragma once
#include <stdint.h>
#include <string.h>

#include "simulator.h"

#define CUSIM_SITE(what) (::cusim::Site{what, __FILE__, __LINE__})

#define __syncthreads() ((void)::cusim::barrier(false, CUSIM_SITE("__syncthreads")))
#define __syncthreads_count(p) ::cusim::barrier(p, CUSIM_SITE("__syncthreads_count"))
#define __syncthreads_or(p) ((int)(::cusim::barrier(p, CUSIM_SITE("__syncthreads_or")) != 0))
#define __syncthreads_and(p) ((int)(::cusim::barrier(!(p), CUSIM_SITE("__syncthreads_and")) == 0))

#define __syncwarp(...) ::cusim::sync_warp(CUSIM_SITE("__syncwarp") __VA_OPT__(,) __VA_ARGS__)
#define __ballot_sync(mask, p) ::cusim::ballot(CUSIM_SITE("__ballot_sync"), mask, p)
#define __any_sync(mask, p) ((int)(::cusim::ballot(CUSIM_SITE("__any_sync"), mask, p) != 0))
#define __all_sync(mask, p) ((int)(::cusim::ballot(CUSIM_SITE("__all_sync"), mask, p) == (mask)))
#define __shfl_sync(...) ::cusim::shuffle_from(CUSIM_SITE("__shfl_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) ::cusim::shuffle_up(CUSIM_SITE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) ::cusim::shuffle_down(CUSIM_SITE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) ::cusim::shuffle_xor(CUSIM_SITE("__shfl_xor_sync"), __VA_ARGS__)

namespace cusim {

inline void sync_warp(const Site& site, unsigned mask = 0xFFFFFFFFu) {
  char nothing = 0, all[kWarp];
  meet(mask, &nothing, 1, all, site);
}

inline unsigned ballot(const Site& site, unsigned mask, bool holds) {
  bool all[kWarp];
  meet(mask, &holds, 1, all, site);
  unsigned bits = 0;
  for (int i = 0; i < kWarp; i++) {
    if (mask >> i & 1) bits |= (unsigned)all[i] << i;
  }
  return bits;
}

// The value of lane `from`, or the own one when that is none of the lanes that may be read.
template <class T>
T shuffle(const Site& site, unsigned mask, const T& value, int from, bool readable) {
  static_assert(sizeof(T) <= 8, "a shuffle takes at most 8 bytes");
  unsigned char all[kWarp][sizeof(T)];
  meet(mask, &value, sizeof value, all, site);
  if (!readable) return value;
  if (!(mask >> from & 1)) fail(text(site) + ": reads lane " + std::to_string(from) + ", which is not in the mask");
  T read;
  memcpy(&read, all[from], sizeof read);
  return read;
}
template <class T>
T shuffle_from(const Site& site, unsigned mask, T value, int lane, int width = kWarp) {
  return shuffle(site, mask, value, (self->lane & -width) + (lane & (width - 1)), true);
}
template <class T>
T shuffle_up(const Site& site, unsigned mask, T value, unsigned by, int width = kWarp) {
  const int from = self->lane - (int)by;
  return shuffle(site, mask, value, from, from >= (self->lane & -width));
}
template <class T>
T shuffle_down(const Site& site, unsigned mask, T value, unsigned by, int width = kWarp) {
  const int from = self->lane + (int)by;
  return shuffle(site, mask, value, from, from < (self->lane & -width) + width);
}
template <class T>
T shuffle_xor(const Site& site, unsigned mask, T value, int bits, int width = kWarp) {
  const int from = self->lane ^ bits;
  return shuffle(site, mask, value, from, from < (self->lane & -width) + width);
}

}  // namespace cusim
