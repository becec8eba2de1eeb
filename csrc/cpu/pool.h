// The thread pool of the CPU kernels. C types only, so that the files compiled for one instruction set may include it.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fastgpt {

// Runs task(context, 0 .. tasks - 1), each once, on up to threads() threads, the caller among them. Which thread runs
// a task is left to chance, so a task's result must not depend on it. Called from within a task, or while another
// thread is using the pool, it runs them all on the calling thread.
// spins: how long the other threads look out for the next job before they sleep.
void run_tasks(int64_t tasks, void (*task)(void* context, int64_t index), void* context, int spins);
constexpr int kOpSpins = 400;       // about 10 us, a pause takes 20 to 45 ns: other pools want the cores next
constexpr int kEngineSpins = 4000;  // about 100 us: the next step's first job comes after some Python

int threads();  // that a job of the calling thread gets at most
void set_threads(int count);

// While it lives, the calling thread's jobs get so many threads; 0 leaves the number that set_threads gave.
struct ThreadLimit {
  explicit ThreadLimit(int count);
  ~ThreadLimit();

 private:
  int before;
};

// A buffer of the calling thread, 64-byte aligned, that keeps its size between calls. One buffer a slot: a kernel that
// calls another must use another slot.
enum ScratchSlot { kGemmScratch, kAttentionScratch, kKernelScratch, kStepScratch, kScratchSlots };
void* scratch(ScratchSlot slot, size_t bytes);

}  // namespace fastgpt
