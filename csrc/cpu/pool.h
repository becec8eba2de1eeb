// The thread pool of the CPU kernels. C types only, so that the files compiled for one instruction set may include it.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fastgpt {

// Runs task(context, 0 .. tasks - 1), each once, on up to threads() threads, the caller among them. Which thread runs
// a task is left to chance, so a task's result must not depend on it. Called from within a task, or while another
// thread is using the pool, it runs them all on the calling thread.
void run_tasks(int64_t tasks, void (*task)(void* context, int64_t index), void* context);

int threads();
void set_threads(int count);

// A buffer of the calling thread, 64-byte aligned, that keeps its size between calls. One buffer a slot: a kernel that
// calls another must use another slot.
enum ScratchSlot { kGemmScratch, kAttentionScratch, kKernelScratch, kStepScratch, kScratchSlots };
void* scratch(ScratchSlot slot, size_t bytes);

}  // namespace fastgpt
