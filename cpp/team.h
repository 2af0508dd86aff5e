// How the library runs on several threads: the caller's OpenMP pool, in one kind of region.
//
// A region takes the whole pool, and threads without work leave it at once. It never asks for a
// part of the pool: libgomp ends the threads that a region leaves over and creates them again for
// the next one, ours or torch's, which takes longer than most layers.
#pragma once

#include <linux/futex.h>
#include <omp.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "blocking.h"

namespace sq_cpu {

// Round to nearest even and keep denormals, whatever the thread's mode: a flush-to-zero that the
// caller has set would reach some threads of a team and not others.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(kAllExceptionsMasked); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  ~DefaultFloatMode() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kAllExceptionsMasked = 0x1f80;
  unsigned saved_;
};

// The threads there are. Serial inside another parallel region: the pool's others are busy there.
// Serial in a process that was forked: they stayed behind, and a region would wait for them for
// ever.
int pool_size();

// Those that get work in a product of [m, k] and [n, k].
inline int worker_count(int64_t m, int64_t n, int64_t k) {
  return useful_threads(m, n, k, pool_size());
}

// Where the workers of one region wait for each other, once. OpenMP's own barrier would wait for
// the threads without work as well.
class Barrier {
 public:
  // Called by each of `workers` threads; what they wrote before is seen by all after.
  void wait(int workers) {
    if (arrived_.fetch_add(1) + 1 >= workers) {
      if (sleepers_.load()) futex(FUTEX_WAKE_PRIVATE, workers);
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins, _mm_pause()) {
      if (arrived_.load() >= workers) return;
    }
    sleepers_.store(true);  // before the last look: the last to arrive sees it, or is seen
    for (int seen; (seen = arrived_.load()) < workers;) futex(FUTEX_WAIT_PRIVATE, seen);
  }

 private:
  // Some 30 us. Workers come within that unless there are more threads than cores; then the core is
  // due to the one that has not come yet.
  static constexpr int kSpins = 1000;

  void futex(int operation, int value) {
    static_assert(sizeof arrived_ == sizeof(int), "a futex is an int in memory");
    syscall(SYS_futex, &arrived_, operation, value, nullptr, nullptr, 0);
  }

  alignas(64) std::atomic<int> arrived_{0};
  std::atomic<bool> sleepers_{false};
};

// The same again and again: a barrier of one counter takes 1.4 us for 16 threads of a Xeon, and one
// where each thread arrives on a cache line of its own 0.85 us.
class TeamBarrier {
 public:
  // For up to so many workers; not while any waits.
  void reserve(int workers) {
    if (workers > reserved_) lines_.reset(new Line[reserved_ = workers]);
  }

  // Called by each of the `workers`, with its number, and with turns that count upwards, the same
  // for all; what they wrote before is seen by all after. Until then bool idle() is called, until
  // it says that there is nothing to do.
  template <typename Idle>
  void wait(int worker, int workers, uint32_t turn, Idle idle) {
    if (workers == 1) return;
    if (worker != 0) {
      lines_[worker].arrived.store(turn, std::memory_order_release);
      return wait_for(lines_[0].arrived, turn, idle);
    }
    for (int other = 1; other < workers; ++other) wait_for(lines_[other].arrived, turn, idle);
    lines_[0].arrived.store(turn, std::memory_order_release);
  }

 private:
  struct alignas(128) Line {
    std::atomic<uint32_t> arrived{0};
  };

  // Beyond some 60 us there are more threads than cores, and the core is due to another.
  static constexpr int kSpins = 2000;

  template <typename Idle>
  static void wait_for(const std::atomic<uint32_t>& arrived, uint32_t turn, Idle& idle) {
    for (int spins = 0; arrived.load(std::memory_order_acquire) != turn;) {
      if (idle()) continue;
      spins++ < kSpins ? _mm_pause() : static_cast<void>(sched_yield());
    }
  }

  std::unique_ptr<Line[]> lines_;
  int reserved_ = 0;
};

// Calls task(worker, workers) in so many threads of the pool, or in fewer where the runtime gives
// fewer. One worker runs without a region: opening one takes as long as a small layer.
template <typename Task>
void run_team(int workers, Task task) {
  const auto run = [&](int worker, int count) {
    const DefaultFloatMode mode;
    task(worker, count);
  };
  if (workers == 1) return run(0, 1);
#pragma omp parallel
  {
    const int worker = omp_get_thread_num(), count = std::min(workers, omp_get_num_threads());
    if (worker < count) run(worker, count);
  }
}

}  // namespace sq_cpu
