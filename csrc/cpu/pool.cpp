// Workers spin for some microseconds after a job, in case the next one follows at once, then park on a condition
// variable: a spinning worker takes the core that another pool needs, and waking one costs 9 us. Measured on two cores:
// layer norms of 50 us that alternate with OpenMP regions of 30 us take 1.1 times the sum of both with a spin of 10 us,
// 1.5 times with 40 us, 1.9 times with 150 us.
// A worker that comes late finds the job closed and does not touch it, so the caller never waits for a thread that the
// system has not scheduled.
#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <pthread.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define PAUSE() asm volatile("isb")  // as long as x86's pause; "yield" is a no-op on most cores
#else
#define PAUSE() std::this_thread::yield()
#endif

namespace fastgpt {
namespace {

constexpr int kCallerSpins = 1500;  // for the last tasks of a job, which are running already
constexpr int kCacheLine = 64;

#if defined(__linux__)
int current_cpu() { return sched_getcpu(); }  // 3 ns

// Moves the calling thread to another processor, if it may use another, and leaves it free to move again.
void leave_cpu(int cpu) {
  cpu_set_t allowed, others;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  others = allowed;
  CPU_CLR(cpu, &others);
  if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others))
    sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
int current_cpu() { return -1; }
void leave_cpu(int) {}
#endif

// All atomics are sequentially consistent: each side must see the other's store (generation and parked, open and
// inside).
struct Pool {
  std::mutex busy;  // held by the thread whose job runs, and while the workers change
  std::vector<std::thread> workers;

  std::mutex mutex;  // of the two conditions and of the error
  std::condition_variable wake, done;
  std::atomic<int> parked{0};
  bool stop = false;
  std::exception_ptr error;

  int64_t tasks = 0;  // the job: written only while it is closed and nobody is inside
  void (*task)(void*, int64_t) = nullptr;
  void* context = nullptr;
  std::atomic<int> caller_cpu{-1};
  std::atomic<int> spins{kOpSpins};
  alignas(kCacheLine) std::atomic<uint64_t> generation{0};  // counts the jobs: what the workers watch
  alignas(kCacheLine) std::atomic<int64_t> next{0};         // the first task that nobody has taken
  alignas(kCacheLine) std::atomic<int> inside{0};           // workers that may look at the job
  std::atomic<int> seats{0};                                // workers that the job still takes
  std::atomic<bool> open{false};

  // Starts as many workers as the system allows, at most count; returns their number. No job runs meanwhile.
  int resize(int count) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
    }
    wake.notify_all();
    for (auto& worker : workers) worker.join();
    workers.clear();
    stop = false;
    try {
      while ((int)workers.size() < count) workers.emplace_back([this, seen = generation.load()] { work(seen); });
    } catch (const std::system_error&) {  // out of threads or of memory for a stack
    }
    return (int)workers.size();
  }

  void run(int64_t count, void (*function)(void*, int64_t), void* argument, int patience, int limit) {
    spins.store(patience);
    seats.store(limit - 1);
    tasks = count;
    task = function;
    context = argument;
    caller_cpu.store(current_cpu());
    next.store(0);
    open.store(true);
    generation.fetch_add(1);
    wake_parked(count - 1 < limit - 1 ? count - 1 : limit - 1);
    drain();
    open.store(false);
    for (int i = 0; inside.load() != 0 && i < kCallerSpins; i++) PAUSE();
    if (inside.load() != 0) {
      std::unique_lock<std::mutex> lock(mutex);
      done.wait(lock, [&] { return inside.load() == 0; });
    }
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
  }

 private:
  void work(uint64_t seen);

  // No more workers than there are tasks for them: on a large machine a small job must not wake everyone.
  void wake_parked(int64_t wanted) {
    int sleeping = parked.load();
    if (sleeping == 0) return;
    { std::lock_guard<std::mutex> lock(mutex); }  // a worker between its last look at generation and its sleep
    if (wanted >= sleeping) return wake.notify_all();
    for (int64_t i = 0; i < wanted; i++) wake.notify_one();
  }

  void drain() {
    try {
      for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(context, i);
    } catch (...) {
      next.store(tasks);  // the tasks that nobody has taken are dropped
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }

  bool wait_for_job(uint64_t seen) {
    for (int i = 0; i < spins.load(); i++) {
      if (generation.load() != seen) return true;
      PAUSE();
    }
    std::unique_lock<std::mutex> lock(mutex);
    parked++;
    wake.wait(lock, [&] { return stop || generation.load() != seen; });
    parked--;
    bool goes_on = !stop;
    lock.unlock();
    // On a crowded machine the system may wake a worker on the caller's own processor: the two would take turns there.
    int cpu = current_cpu();
    if (goes_on && cpu >= 0 && cpu == caller_cpu.load()) leave_cpu(cpu);
    return goes_on;
  }
};

thread_local bool in_task = false;

void Pool::work(uint64_t seen) {
  in_task = true;
  while (wait_for_job(seen)) {
    seen = generation.load();
    inside.fetch_add(1);
    if (open.load() && seats.fetch_sub(1) > 0) drain();
    if (inside.fetch_sub(1) == 1 && !open.load()) {
      { std::lock_guard<std::mutex> lock(mutex); }
      done.notify_one();
    }
  }
}

struct InTask {
  InTask() { in_task = true; }
  ~InTask() { in_task = false; }
};

std::mutex setup;      // of pool; taken before Pool::busy
Pool* pool = nullptr;  // never destroyed: its workers may outlive the static objects of a process that exits
std::atomic<int> thread_count{1};  // of a job, unless its caller has a ThreadLimit
thread_local int own_limit = 0;
int capacity = 0;  // threads that the pool was last asked for; guarded by setup

// The child of a fork has none of the workers: it gets a new pool at its first job, and the old one stays as it is.
void forget_pool() {
  pool = nullptr;
  new (&setup) std::mutex;
}
// When the extension is loaded, before any thread can hold the mutex.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_pool);

// With room for `limit` threads, as far as the system gives them.
Pool& current_pool(int limit) {
  std::lock_guard<std::mutex> lock(setup);
  if (!pool) {
    pool = new Pool;
    capacity = 1;
  }
  if (capacity < limit) {
    std::lock_guard<std::mutex> owner(pool->busy);
    capacity = limit;
    const int granted = 1 + pool->resize(limit - 1);
    if (granted < thread_count) thread_count = granted;
  }
  return *pool;
}

constexpr size_t kHugePage = 2 << 20;

struct ScratchBuffers {
  void* data[kScratchSlots] = {};
  size_t bytes[kScratchSlots] = {};
  ~ScratchBuffers() {
    for (void* p : data) free(p);
  }
};

}  // namespace

void run_tasks(int64_t tasks, void (*task)(void*, int64_t), void* context, int spins) {
  const int limit = threads();
  if (tasks > 1 && limit > 1 && !in_task) {
    Pool& p = current_pool(limit);
    std::unique_lock<std::mutex> owner(p.busy, std::try_to_lock);
    if (owner) {
      InTask mark;
      p.run(tasks, task, context, spins, limit);
      return;
    }
  }
  for (int64_t i = 0; i < tasks; i++) task(context, i);
}

int threads() { return own_limit ? own_limit : thread_count.load(); }

ThreadLimit::ThreadLimit(int count) : before(own_limit) { own_limit = count; }
ThreadLimit::~ThreadLimit() { own_limit = before; }

void set_threads(int count) {
  std::lock_guard<std::mutex> lock(setup);
  thread_count = count;
  if (!pool) return;
  std::lock_guard<std::mutex> owner(pool->busy);
  capacity = count;
  thread_count = 1 + pool->resize(count - 1);
}

void* scratch(ScratchSlot slot, size_t bytes) {
  thread_local ScratchBuffers buffers;
  if (buffers.bytes[slot] < bytes) {
    free(buffers.data[slot]);
    buffers.data[slot] = nullptr;
    buffers.bytes[slot] = 0;
    // Large buffers in huge pages: the packed blocks of a matrix product touch more small pages than the TLB holds.
    size_t page = bytes < kHugePage / 2 ? 64 : kHugePage, rounded = (bytes + page - 1) / page * page;
    if (posix_memalign(&buffers.data[slot], page, rounded)) throw std::bad_alloc();
#if defined(__linux__)
    if (page == kHugePage) madvise(buffers.data[slot], rounded, MADV_HUGEPAGE);
#endif
    buffers.bytes[slot] = rounded;
  }
  return buffers.data[slot];
}

}  // namespace fastgpt
