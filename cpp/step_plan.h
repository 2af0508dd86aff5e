// What is settled before a step's region opens: how products are cut, and where its memory lies.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "attend.h"
#include "blocking.h"
#include "gemm.h"
#include "program_stages.h"
#include "read_ahead.h"
#include "route.h"
#include "scratch.h"
#include "sq_cpu/isa.h"

namespace sq_cpu {

struct ProductPlan {
  const Microkernel* kernel;
  Blocking blocking;
  bool dealt;  // else so small that to look for others' units would take longer than they do
};

// How the products of a program are cut for so many rows, workers and the active ISA.
class StepPlan {
 public:
  // For `rows` rows, of which the last stages may take `kept`. A plan for the same stands.
  void make(const std::vector<Stage>& stages, int64_t rows, int64_t kept, int workers);

  // To be called when the stages change.
  void forget() { rows_ = -1; }

  Isa isa() const { return isa_; }
  int workers() const { return workers_; }
  int64_t sums_bytes() const { return sums_bytes_; }  // that each worker needs

  // Of the products whose rows are known before the step, in the order of the stages.
  const ProductPlan& known(size_t index) const { return products_[index]; }

  // Of an expert's product, whose `m` rows of codes are known when rows have chosen their experts.
  ProductPlan choose(const Project& project, const Product& product, int64_t m) const;

  // The weights that a worker reads, in order.
  ReadAhead reads(int worker) const { return {reads_.data() + read_count_ * worker, read_count_}; }

 private:
  void note_reads(const Project& project, const Product& product, const Blocking& blocking,
                  int64_t first);

  int64_t rows_ = -1, kept_ = -1;  // -1 rows: there is no plan
  int workers_ = 0;
  Isa isa_{};
  std::vector<ProductPlan> products_;
  int64_t read_count_ = 0;          // linears that are read in order
  std::vector<WeightRange> reads_;  // [workers, read_count]
  int64_t sums_bytes_ = 0;
};

// The memory of a step, which stays for later ones: inside the region nothing is allocated.
struct StepMemory {
  static constexpr int kCounterSets = 3;  // in use, to be used next, and being cleared

  void reserve(const std::vector<Stage>& stages, const std::vector<int64_t>& widths, int64_t rows,
               const StepPlan& plan, const std::vector<AttentionPlan>& attention);

  // Counters of a stage's products; the set of the next stage is `set` + 1.
  WorkCounter* counter_set(int64_t set) {
    return counters.data() + set % kCounterSets * counters_of_set();
  }
  int64_t counters_of_set() const { return static_cast<int64_t>(counters.size()) / kCounterSets; }

  // A worker's own: its sums, or what attention needs.
  std::byte* workspace(int worker) { return workspaces.get(0) + worker_bytes * worker; }
  // And two rows of floats behind it: as it is read, and rotated.
  float* row(int worker) { return rotated_row(worker) - row_bytes / sizeof(float); }
  float* rotated_row(int worker) {
    return reinterpret_cast<float*>(workspace(worker) + worker_bytes - row_bytes);
  }

  Scratch<float> buffer_memory;
  std::vector<float*> buffers;  // [rows, ld] each
  Scratch<uint8_t> codes;       // of the rows that a stage multiplies
  Scratch<float> scales;
  Scratch<int32_t> zero_points;
  Scratch<float> float_rows;  // what products with weights in float read
  Routes routes;
  Scratch<float> partials;                       // attention's, of all workers
  std::unique_ptr<std::atomic<int>[]> finished;  // and its blocks
  int64_t finished_count = 0;
  std::vector<WorkCounter> counters;  // [kCounterSets, products of a stage, workers]
  Scratch<std::byte> workspaces;
  int64_t worker_bytes = 0, row_bytes = 0;
};

}  // namespace sq_cpu
