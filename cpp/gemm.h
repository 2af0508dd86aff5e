// The GEMM driver: runs inside a parallel region, each thread its own task of the grid.
#pragma once

#include <atomic>
#include <cstdint>

#include "blocking.h"
#include "kernel.h"

namespace sq_cpu {

struct GemmArgs {
  QuantizedActivation x;
  PackedWeight weight;
  void* y;
  Output output;
  int64_t ldy;                 // elements; kCode: bytes between tiles
  const EpilogueSteps* steps;  // operands at row 0; null: none
};

int64_t element_bytes(Output output);

// Moves the operands of `steps` on to a later row.
void advance(EpilogueSteps& steps, int64_t rows);

// How many units of a task have been taken. One cache line each: threads count without disturbing
// each other.
struct alignas(64) WorkCounter {
  std::atomic<int64_t> taken{0};

  // The next unit; `units` or more when none is left, which is seen without writing.
  int64_t take(int64_t units) {
    const int64_t seen = taken.load(std::memory_order_relaxed);
    return seen < units ? taken.fetch_add(1, std::memory_order_relaxed) : seen;
  }
};

// How several products of one x are dealt out as one.
enum class Order {
  kAlternating,  // weights of one shape; a unit of the one is followed by the same unit of the
                 // next, which may read what that wrote
  kSideBySide,   // their strips one after another
};

// The strips of `count` weights with so many columns as one product has.
int64_t joined_strips(const GemmArgs* products, int count, Order order);

// Calls f(product, its strips) for what is of a product among strips of all.
template <typename Function>
void for_each_product(const GemmArgs* products, int count, Order order, Range strips, Function f) {
  int64_t before = 0;
  for (int product = 0; product < count; ++product) {
    const int64_t all = strip_count(products[product].weight.n);
    const Range own{std::clamp(strips.begin - before, int64_t{0}, all),
                    std::clamp(strips.end - before, int64_t{0}, all)};
    if (own.size() > 0) f(product, own);
    if (order == Order::kSideBySide) before += all;
  }
}

// This thread's part of the whole product, or of `count` products: the units of its own task, so
// that it reads the same weights at every call, then what the others have left. Cores are not
// equally fast: hyperthreads and virtual machines see to that. `counters`: one for each task of the
// blocking, all 0 at first; or null, and every thread does its own tasks alone. `sums`:
// workspace_sums() ints of this thread's own, 64-byte aligned. Never throws, never allocates.
void run_tasks(const GemmArgs* products, int count, Order order, const Microkernel& kernel,
               const RowKernels& rows, const Blocking& blocking, WorkCounter* counters,
               int32_t* sums, int thread, int threads);

}  // namespace sq_cpu
