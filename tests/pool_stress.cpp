// Hammers the thread pool; tests/test_pool.py builds it plainly and with the sanitizers. Exits 0, or says what broke.
//   pool_stress SECONDS [fork]
#include "../csrc/cpu/pool.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

using namespace fastgpt;
using Clock = std::chrono::steady_clock;

namespace {

void expect(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "pool_stress: %s\n", what);
  _exit(1);
}

template <class F>
void parallel(int64_t tasks, F f) {
  run_tasks(tasks, [](void* context, int64_t i) { (*(F*)context)(i); }, &f, kOpSpins);
}

// The tasks write plain integers: a task that ran twice, or after its job had ended, is a data race too.
void check_job(int64_t tasks, int spin) {
  std::vector<int> counts(tasks, 0);
  parallel(tasks, [&](int64_t i) {
    for (volatile int s = 0; s < spin; s = s + 1) {
    }
    counts[i] += (int)i + 1;
  });
  for (int64_t i = 0; i < tasks; i++) expect(counts[i] == i + 1, "a task did not run exactly once");
}

void check_exception(int64_t tasks) {
  std::atomic<int> ran{0};
  try {
    parallel(tasks, [&](int64_t i) {
      ran++;
      if (i == tasks / 2) throw std::runtime_error("planned");
    });
    expect(false, "an exception was lost");
  } catch (const std::runtime_error&) {
  }
  expect(ran >= 1 && ran <= tasks, "a task ran twice beside an exception");
}

void check_nested() {
  std::vector<std::atomic<int64_t>> sums(6);
  parallel(6, [&](int64_t i) { parallel(10, [&, i](int64_t j) { sums[i] += j; }); });
  for (auto& sum : sums) expect(sum == 45, "a nested job lost a task");
}

void check_scratch() {
  parallel(8, [](int64_t i) {
    char* p = (char*)scratch(kKernelScratch, 64 + 100 * i);
    expect((uintptr_t)p % 64 == 0, "scratch is not aligned");
    for (int64_t j = 0; j < 64 + 100 * i; j++) p[j] = (char)i;
  });
}

// Parked workers must come for tasks that the caller alone would take long for.
void check_workers_wake() {
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  std::atomic<int> by_workers{0};
  auto caller = std::this_thread::get_id();
  parallel(8, [&](int64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    if (std::this_thread::get_id() != caller) by_workers++;
  });
  expect(by_workers > 0, "no parked worker came");
}

// Waits about as long as a worker spins, so that jobs arrive while it parks.
void pause_near_parking(std::mt19937& random) {
  auto end = Clock::now() + std::chrono::nanoseconds(random() % 40000);
  while (Clock::now() < end) {
  }
}

void user_thread(unsigned seed, Clock::time_point end) {
  std::mt19937 random(seed);
  while (Clock::now() < end) {
    switch (random() % 8) {
      case 0: check_exception(1 + random() % 20); break;
      case 1: check_nested(); break;
      case 2: check_scratch(); break;
      default: check_job(random() % 40, random() % 300);
    }
    if (random() % 2) pause_near_parking(random);
  }
}

void fork_child(unsigned seed) {
  pid_t child = fork();
  expect(child >= 0, "fork failed");
  if (child == 0) {
    alarm(20);
    for (int i = 0; i < 20; i++) check_job(17, 100);
    set_threads(3);
    user_thread(seed, Clock::now() + std::chrono::milliseconds(5));
    _exit(0);
  }
  int status = -1;
  expect(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
         "the child of a fork hung or failed");
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = argc > 1 ? atof(argv[1]) : 1;
  bool forks = argc > 2;
  alarm(60 + (int)(10 * seconds));
  auto end = Clock::now() + std::chrono::microseconds((int64_t)(seconds * 1e6));
  set_threads(4);
  std::vector<std::thread> users;
  for (unsigned seed = 1; seed <= 3; seed++) users.emplace_back(user_thread, seed, end);
  std::mt19937 random(0);
  for (unsigned round = 0; Clock::now() < end; round++) {
    set_threads(1 + random() % 5);
    if (forks) fork_child(round);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
  }
  for (auto& user : users) user.join();
  set_threads(4);
  for (int i = 0; i < 50; i++) {
    check_job(20, 100);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
  }
  check_workers_wake();
  set_threads(1);
  puts("ok");
}
