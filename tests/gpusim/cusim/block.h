// The threads of the running block: the simulator's inside.
#pragma once
#include <deque>

#include "fibers.h"
#include "simulator.h"

namespace cusim {

struct Thread : Place {
  Fiber fiber;
  bool done, waits;
  Site site;                // where it waits
  std::deque<Copy> copies;  // not yet done
  unsigned groups;          // of copies, closed so far
};

inline Thread& this_thread() { return *static_cast<Thread*>(self); }

extern std::deque<Thread> threads;  // the first thread_count are the block's
extern int thread_count, alive;     // alive: that have not ended

void wait_at(const Site& site);  // leaves the running thread until another one clears its `waits`

void reset_barrier();
void finish_barrier();  // when all threads that are left stand at it
void reset_meetings();

}  // namespace cusim
