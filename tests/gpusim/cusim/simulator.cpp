// Runs launches: every thread of a block a fiber, until all have ended or one has failed.
#include "simulator.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "block.h"

namespace cusim {

Place* self = nullptr;
uint3 block_index;
dim3 block_size, grid_size;
uint64_t copied_bytes = 0;
bool copies_early = false;
std::deque<Thread> threads;
int thread_count = 0, alive = 0;

namespace {

constexpr size_t kMostShared = 64 * 1024;  // that a block can have on every architecture from sm_75 on, static memory included
constexpr size_t kUnaskedShared = 48 * 1024;  // of that, what it gets where its kernel's limit was not raised
constexpr unsigned kMostThreads = 1024, kMostBlocks = 65535;  // blocks: of y and z

bool random_order = false;
unsigned random_seed = 0;
std::mt19937 random_source;
Recorder recorder;
std::string error_of_launch, told_error;
std::map<std::string, std::vector<std::pair<size_t, size_t>>> static_shared;  // of a kernel: offset, bytes
std::unique_ptr<unsigned char, void (*)(void*)> dynamic_memory(nullptr, free);
std::string failure;  // of a thread: no other one goes on then
void (*call)(const void*) = nullptr;
const void* context = nullptr;
char at_start, at_end;  // of a block: addresses for the order between the launch and its threads

std::string text(const char* name, uint3 at) {
  return std::string(name) + " (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

void end_thread() {
  Thread& t = this_thread();
  t.done = true, alive--;
  release(&at_end);
  finish_barrier();
  t.fiber.leave(true);
}

void run_thread() {
  this_thread().fiber.arrive();
  acquire(&at_start);
  call(context);
  if (!this_thread().copies.empty()) fail("a thread ends with copies that it did not wait for");
  end_thread();
}

void resume(Thread& t) {
  self = &t;
  t.fiber.enter();
  self = nullptr;
}

// Every thread that can go on runs until it waits -> whether there was one.
bool turn(std::vector<Thread*>& order) {
  bool moved = false;
  if (random_order) std::shuffle(order.begin(), order.end(), random_source);
  for (Thread* t : order) {
    if (t->done || t->waits) continue;
    resume(*t);
    moved = true;
    if (!failure.empty()) return true;
  }
  return moved;
}

std::string deadlock() {
  std::map<std::string, std::pair<int, const Thread*>> sites;  // how many threads wait there, and one of them
  for (int i = 0; i < thread_count; i++) {
    if (threads[i].done) continue;
    auto& [count, example] = sites[text(threads[i].site)];
    count++, example = &threads[i];
  }
  std::string message = "deadlock in " + text("block", block_index);
  for (const auto& [site, found] : sites) {
    message += ", " + std::to_string(found.first) + " at " + site + " (" + text("thread", found.second->thread) + ")";
  }
  return message;
}

unsigned char* new_shared(size_t bytes) {
  void* memory = nullptr;
  if (bytes && posix_memalign(&memory, 128, bytes)) throw std::bad_alloc();
  return static_cast<unsigned char*>(memory);
}

// Shared memory holds NaN when a block starts.
void fill_shared(const Launch& launch, const Dl_info& found) {
  memset(dynamic_memory.get(), 0xFF, launch.shared_bytes);
  char* library = static_cast<char*>(found.dli_fbase);
  for (auto [offset, bytes] : static_shared[found.dli_sname]) memset(library + offset, 0xFF, bytes);
}

void start_threads() {
  const dim3 size = block_size;
  for (int i = 0; i < thread_count; i++) {
    Thread& t = threads[i];
    t.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    t.lane = i % kWarp, t.warp = i / kWarp;
    t.done = t.waits = false;
    t.copies.clear();
    t.groups = 0;
    t.fiber.start(run_thread);
  }
  alive = thread_count;
}

void run_block() {
  std::vector<Thread*> order;
  for (int i = 0; i < thread_count; i++) order.push_back(&threads[i]);
  reset_barrier();
  reset_meetings();
  start_threads();
  release(&at_start);
  while (alive && failure.empty()) {
    if (!turn(order)) failure = deadlock();
  }
  acquire(&at_end);
  if (!failure.empty()) throw Error(std::exchange(failure, ""));
}

std::vector<uint3> blocks_of(dim3 grid) {
  std::vector<uint3> blocks;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) blocks.push_back({x, y, z});
  if (random_order) std::shuffle(blocks.begin(), blocks.end(), random_source);
  return blocks;
}

std::string refusal(const Launch& l, const std::string& symbol) {
  const uint64_t block_threads = (uint64_t)l.block.x * l.block.y * l.block.z;
  const bool empty = !block_threads || !l.grid.x || !l.grid.y || !l.grid.z;
  const bool many = l.grid.x > INT32_MAX || l.grid.y > kMostBlocks || l.grid.z > kMostBlocks || l.block.z > 64;
  if (empty || many || block_threads > kMostThreads) return "invalid configuration argument";
  size_t shared = l.shared_bytes;
  for (auto [offset, bytes] : static_shared[symbol]) shared += bytes;
  if (shared <= (l.asked ? kMostShared : kUnaskedShared)) return "";
  return "invalid argument (" + std::to_string(shared) + " bytes of shared memory, " +
         (l.asked ? "sm_75 has " + std::to_string(kMostShared) : std::to_string(kUnaskedShared) + " are given unasked") + ")";
}

void run_blocks(const Launch& launch, const Dl_info& found) {
  grid_size = launch.grid, block_size = launch.block;
  thread_count = block_size.x * block_size.y * block_size.z;
  while ((int)threads.size() < thread_count) threads.emplace_back();
  dynamic_memory.reset(new_shared(launch.shared_bytes));
  random_source.seed(random_seed);
  for (uint3 block : blocks_of(launch.grid)) {
    block_index = block;
    fill_shared(launch, found);
    run_block();
  }
}

}  // namespace

std::string text(const Site& site) {
  const char* name = strrchr(site.file, '/');
  return std::string(site.what) + " " + (name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

void fail(const std::string& message) {
  if (!self) throw Error(message);
  if (failure.empty()) failure = message + " [" + text("block", block_index) + ", " + text("thread", self->thread) + "]";
  end_thread();
  abort();  // what has ended is not entered again
}

void wait_at(const Site& site) {
  Thread& t = this_thread();
  t.site = site;
  t.waits = true;
  t.fiber.leave(false);
}

void start_copy(void* to, const void* from, unsigned bytes) {
  this_thread().copies.push_back({to, from, bytes, this_thread().groups});
}

void close_group() { this_thread().groups++; }

bool next_copy(unsigned keep, Copy* copy) {
  Thread& t = this_thread();
  if (t.copies.empty() || t.copies.front().group + keep >= t.groups) return false;
  *copy = t.copies.front();
  t.copies.pop_front();
  return true;
}

unsigned char* dynamic_shared() {
  if (!dynamic_memory) fail("DYNAMIC_SHARED in a launch without shared bytes");
  return dynamic_memory.get();
}

void run(const Launch& launch, void (*body)(const void*), const void* arguments) {
  if (self) fail("a launch inside a kernel");
  Dl_info found;
  if (!dladdr(launch.kernel, &found) || found.dli_saddr != launch.kernel) {
    throw Error("a kernel without a symbol: it is static, or in a namespace without a name");
  }
  const std::string refused = told_error.empty() ? refusal(launch, found.dli_sname) : std::exchange(told_error, "");
  if (!refused.empty()) {
    error_of_launch = refused;
  } else if (recorder) {
    recorder(found.dli_sname, launch);
  } else {
    call = body, context = arguments;
    run_blocks(launch, found);
  }
}

const char* launch_error() {
  static std::string answer;
  answer = std::exchange(error_of_launch, "");
  return answer.empty() ? nullptr : answer.c_str();
}

void set_order(bool random, unsigned seed) { random_order = random, random_seed = seed; }
void fail_next_launch(const std::string& error) { told_error = error; }
void set_recorder(Recorder to) { recorder = std::move(to); }
void add_static_shared(const std::string& symbol, size_t offset, size_t bytes) {
  static_shared[symbol].push_back({offset, bytes});
}

void count_copy() { copied_bytes += 16; }

}  // namespace cusim
