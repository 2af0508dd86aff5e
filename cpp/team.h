// How the library runs on several threads: the caller's OpenMP pool, in one kind of region.
#pragma once

#include <omp.h>
#include <xmmintrin.h>

#include <cstdint>

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

// The threads there are. Serial inside another parallel region: the team's others are busy there.
inline int whole_team() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// Those worth starting for a product of [m, k] and [n, k].
inline int team_size(int64_t m, int64_t n, int64_t k) {
  return useful_threads(m, n, k, whole_team());
}

// Calls task(thread, threads) in each thread of a team. The runtime may give fewer than asked for.
// Alone without a parallel region: opening one takes as long as a small layer.
template <typename Task>
void run_team(int team, Task task) {
  const auto run = [&](int thread, int threads) {
    const DefaultFloatMode mode;
    task(thread, threads);
  };
  if (team == 1) return run(0, 1);
#pragma omp parallel num_threads(team)
  run(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace sq_cpu
