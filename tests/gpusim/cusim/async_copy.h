// Asynchronous copies into shared memory. A kernel must not depend on when they happen: at the latest moment, the wait,
// or at the earliest, so tests run it both ways.
#pragma once
#include <stdint.h>
#include <string.h>

#include "simulator.h"

namespace cusim {

inline void copy_now(void* to, const void* from, unsigned bytes) {
  if (from) memcpy(to, from, bytes);
  else memset(to, 0, bytes);
}

template <unsigned Bytes>
void copy_async(void* shared, const void* global, bool ok) {
  const void* from = ok ? global : nullptr;
  const bool aligned = ((uintptr_t)shared | (uintptr_t)from) % Bytes == 0;
  if (!aligned) fail("cp.async: an address is not a multiple of " + std::to_string(Bytes));
  if (ok && Bytes == 16) count_copy();  // of fewer bytes, lanes share an address
  if (copies_early) copy_now(shared, from, Bytes);
  else start_copy(shared, from, Bytes);
}

}  // namespace cusim

namespace dev {

template <int kBytes>
void cp_async(void* shared, const void* global, bool ok) {
  cusim::copy_async<kBytes>(shared, global, ok);
}
inline void cp_commit() { cusim::close_group(); }
template <int N>
void cp_wait() {
  cusim::Copy copy;
  while (cusim::next_copy(N, &copy)) cusim::copy_now(copy.to, copy.from, copy.bytes);
}

}  // namespace dev
