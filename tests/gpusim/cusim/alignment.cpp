// The compiler checks every pointer of the kernels that it follows (-fsanitize=alignment,null), and calls this.
#include <stdint.h>
#include <stdio.h>

#include "block.h"

// As GCC and Clang lay it out.
struct Mismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};

extern "C" void __ubsan_handle_type_mismatch_v1(const Mismatch* found, uintptr_t address) {
  const cusim::Site site = {address ? "misaligned access at" : "null pointer at", found->file, (int)found->line};
  char detail[80];
  snprintf(detail, sizeof detail, ": 0x%zx is not a multiple of %d", (size_t)address, 1 << found->log_alignment);
  cusim::fail(text(site) + (address ? detail : ""));
}
