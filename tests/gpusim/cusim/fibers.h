// Stacks for the threads of a block, and the switch between one of them and the scheduler.
#pragma once
#include "hooks.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cusim {

#ifdef __x86_64__
struct Context {
  void* stack_pointer = nullptr;
};
#else
struct Context {
  ucontext_t registers;
};
#endif

class Fiber {
 public:
  // The next enter() calls entry on an empty stack. entry does not return: its last call is leave(true).
  void start(void (*entry)());
  void enter();               // from the scheduler; comes back when the fiber leaves
  void arrive();              // entry's first call
  void leave(bool for_good);  // back to the scheduler; comes back at the next enter()

 private:
  char* stack_ = nullptr;
  Context context_;
  Known known_;
};

}  // namespace cusim
