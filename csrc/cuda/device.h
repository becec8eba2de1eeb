// What the CUDA part of the extension can run on.
#pragma once
#include <stdint.h>

namespace fastgpt {
namespace cuda {

struct Device {
  char name[256];
  int major, minor;  // compute capability
  uint64_t memory;   // bytes
};

// Fills in at most `capacity` devices and returns their number. When there is none, `reason` (at least 256 characters)
// says why; needs no driver to be asked.
int devices(Device* found, int capacity, char* reason);

}  // namespace cuda
}  // namespace fastgpt
