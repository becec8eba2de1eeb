#include "fibers.h"

#include <sys/mman.h>

#include <new>

namespace cusim {
namespace {

constexpr size_t kStack = 256 * 1024;  // bytes
constexpr size_t kGuard = 4096;        // below it, without access

Context scheduler;
Known scheduler_known;

char* new_stack() {
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE)) throw std::bad_alloc();
  return static_cast<char*>(memory) + kGuard;
}

}  // namespace

#ifdef __x86_64__

// Keeps the registers that a function must keep, and goes on where the other stack was left.
extern "C" void cusim_switch(void** from, void* to);
asm(R"(
.text
.local cusim_switch
.type cusim_switch, @function
cusim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cusim_switch, .-cusim_switch
)");

static void swap(Context& from, Context& to) { cusim_switch(&from.stack_pointer, to.stack_pointer); }

static void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack - 64);
  *--top = nullptr;  // entry's return address: unwinding ends here
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context.stack_pointer = top;
}

#else

static void swap(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

static void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = kStack;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

#endif

void Fiber::start(void (*entry)()) {
  if (!stack_) stack_ = new_stack();
  know_stack(known_, stack_, kStack);
  known_.frames = nullptr;
  prepare(context_, stack_, entry);
}

void Fiber::enter() {
  know_scheduler(scheduler_known);
  leave_stack(scheduler_known, known_, false);
  swap(scheduler, context_);
  reach_stack(scheduler_known, nullptr);
}

void Fiber::arrive() { reach_stack(known_, &scheduler_known); }

void Fiber::leave(bool for_good) {
  leave_stack(known_, scheduler_known, for_good);
  swap(context_, scheduler);
  reach_stack(known_, &scheduler_known);
}

}  // namespace cusim
