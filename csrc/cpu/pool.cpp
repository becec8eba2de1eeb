// Workers spin for some microseconds after a job, in case the next one follows at once, then park on a condition
// variable: beside another busy pool a spinning worker would take the core that the other one needs.
// A worker that comes late finds the job closed and does not touch it, so the caller never waits for a thread that the
// system has not scheduled.
#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include <pthread.h>
#include <stdlib.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() std::this_thread::yield()
#endif

namespace fastgpt {
namespace {

constexpr int kSpins = 1500;  // about 30 us with a 20 ns pause

struct Pool {
  std::mutex busy;  // held by the thread whose job runs
  std::mutex mutex;
  std::condition_variable wake, done;
  std::vector<std::thread> workers;
  std::atomic<int> parked{0};
  bool stop = false;

  std::atomic<uint64_t> generation{0};
  std::atomic<bool> open{false};
  std::atomic<int> inside{0};  // workers that look at the job
  std::atomic<int64_t> next{0};
  int64_t tasks = 0;
  void (*task)(void*, int64_t) = nullptr;
  void* context = nullptr;
  std::exception_ptr error;

  ~Pool() { resize(0); }

  void resize(size_t count) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
    }
    wake.notify_all();
    for (auto& worker : workers) worker.join();
    workers.clear();
    stop = false;
    for (size_t i = 0; i < count; i++) workers.emplace_back([this] { work(); });
  }

  void drain() {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i);
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }

  bool wait_for_job(uint64_t seen) {
    for (int i = 0; i < kSpins; i++) {
      if (generation.load() != seen) return true;
      PAUSE();
    }
    std::unique_lock<std::mutex> lock(mutex);
    parked++;
    wake.wait(lock, [&] { return stop || generation.load() != seen; });
    parked--;
    return !stop;
  }

  void work();

  void run(int64_t count, void (*function)(void*, int64_t), void* argument) {
    tasks = count;
    task = function;
    context = argument;
    error = nullptr;
    next.store(0);
    open.store(true);
    generation.fetch_add(1);
    if (parked.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex); }
      wake.notify_all();
    }
    drain();
    open.store(false);
    for (int i = 0; inside.load() != 0 && i < kSpins; i++) PAUSE();
    if (inside.load() != 0) {
      std::unique_lock<std::mutex> lock(mutex);
      done.wait(lock, [&] { return inside.load() == 0; });
    }
    if (error) std::rethrow_exception(error);
  }
};

thread_local bool in_task = false;

void Pool::work() {
  in_task = true;
  uint64_t seen = 0;
  while (wait_for_job(seen)) {
    seen = generation.load();
    inside.fetch_add(1);
    if (open.load()) drain();
    if (inside.fetch_sub(1) == 1 && !open.load()) {
      { std::lock_guard<std::mutex> lock(mutex); }
      done.notify_one();
    }
  }
}

// Never destroyed: a worker may outlive the static objects of a process that exits.
Pool* pool = nullptr;
int thread_count = 1;
std::mutex setup;

// The child of a fork has none of the workers: it gets a new pool at its first job.
void forget_pool() {
  pool = nullptr;
  new (&setup) std::mutex;
}

Pool& current_pool() {
  std::lock_guard<std::mutex> lock(setup);
  if (!pool) {
    static bool registered = (pthread_atfork(nullptr, nullptr, forget_pool), true);
    (void)registered;
    pool = new Pool;
    pool->resize(thread_count - 1);
  }
  return *pool;
}

struct InTask {
  bool before = in_task;
  InTask() { in_task = true; }
  ~InTask() { in_task = before; }
};

struct ScratchBuffers {
  void* data[kScratchSlots] = {};
  size_t bytes[kScratchSlots] = {};
  ~ScratchBuffers() {
    for (void* p : data) free(p);
  }
};

}  // namespace

void run_tasks(int64_t tasks, void (*task)(void*, int64_t), void* context) {
  if (tasks > 1 && thread_count > 1 && !in_task) {
    Pool& p = current_pool();
    std::unique_lock<std::mutex> owner(p.busy, std::try_to_lock);
    if (owner) {
      InTask mark;
      p.run(tasks, task, context);
      return;
    }
  }
  for (int64_t i = 0; i < tasks; i++) task(context, i);
}

int threads() { return thread_count; }

void set_threads(int count) {
  std::unique_lock<std::mutex> lock(setup);
  Pool* p = pool;
  lock.unlock();
  if (p) {
    std::lock_guard<std::mutex> owner(p->busy);
    p->resize(count - 1);
  }
  thread_count = count;
}

void* scratch(ScratchSlot slot, size_t bytes) {
  thread_local ScratchBuffers buffers;
  if (buffers.bytes[slot] < bytes) {
    free(buffers.data[slot]);
    buffers.data[slot] = nullptr;
    buffers.bytes[slot] = 0;
    size_t rounded = (bytes + 63) / 64 * 64;
    if (posix_memalign(&buffers.data[slot], 64, rounded)) throw std::bad_alloc();
    buffers.bytes[slot] = rounded;
  }
  return buffers.data[slot];
}

}  // namespace fastgpt
