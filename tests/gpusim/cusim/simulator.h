// What kernels and launchers ask of the simulator, which runs the threads of a block as fibers and the blocks one after
// another, on one thread of the CPU. The simulator is compiled apart from the kernels (see hooks.h).
#pragma once
#include <stddef.h>
#include <vector_types.h>

#include <functional>
#include <stdexcept>
#include <string>

namespace cusim {

constexpr int kWarp = 32;

// What a launch throws.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// A fault of a kernel: its threads are given up where they are, without unwinding, and the launch throws the message.
[[noreturn]] void fail(const std::string& message);

// Where in a source a thread waits.
struct Site {
  const char *what, *file;
  int line;
};
std::string text(const Site& site);

// The running thread.
struct Place {
  uint3 thread;
  int lane, warp;
};
extern Place* self;
extern uint3 block_index;
extern dim3 block_size, grid_size;

// Waits for all threads of the block that have not ended -> how many of them came with a predicate that holds.
int barrier(bool predicate, const Site& site);

// Waits for the lanes of mask; all: what each of the 32 came with, of `bytes` <= kMeetBytes each.
constexpr size_t kMeetBytes = 48;
void meet(unsigned mask, const void* mine, size_t bytes, void* all, const Site& site);

// Asynchronous copies of the running thread. next_copy takes the oldest one that a wait for all but the last `keep` groups
// must finish, if there is one; who takes it copies.
struct Copy {
  void* to;
  const void* from;      // null: zeros
  unsigned bytes, group;
};
extern uint64_t copied_bytes;  // by copies of 16 bytes so far
void count_copy();
extern bool copies_early;  // copies happen at once, instead of when they are waited for
void start_copy(void* to, const void* from, unsigned bytes);
void close_group();
bool next_copy(unsigned keep, Copy* copy);

unsigned char* dynamic_shared();

struct Argument {
  const void* data;
  size_t bytes;
};
struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  bool asked;  // whether the limit of dynamic shared memory was raised for it
  const Argument* arguments;
  int argument_count;
};
// Runs call(context) once for each thread of the launch, or hands the launch to the recorder.
void run(const Launch& launch, void (*call)(const void*), const void* context);

// What CUDA would say of the launches since the last question, or null.
const char* launch_error();

// ---- for those who test
void set_order(bool random, unsigned seed);                   // of threads and blocks, at every launch anew
void fail_next_launch(const std::string& error);              // launch_error() answers so
typedef std::function<void(const std::string& symbol, const Launch&)> Recorder;
void set_recorder(Recorder recorder);                         // launches go there instead of running; empty: they run
void add_static_shared(const std::string& symbol, size_t offset, size_t bytes);  // a kernel's array in this library

}  // namespace cusim
