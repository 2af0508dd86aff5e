#include "team.h"

#include <pthread.h>

namespace sq_cpu {
namespace {

// Written once, by the only thread that a new child has.
bool g_forked = false;

[[maybe_unused]] const int kRegistered = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

}  // namespace

int pool_size() { return g_forked || omp_in_parallel() ? 1 : omp_get_max_threads(); }

}  // namespace sq_cpu
