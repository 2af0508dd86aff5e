// What program.cc makes of stages and run_program.cc runs.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "attend.h"
#include "blocking.h"
#include "check.h"
#include "gemm.h"
#include "kv_page.h"
#include "scratch.h"
#include "sq_cpu/program.h"
#include "team.h"

namespace sq_cpu {

// Linears of a stage whose units alternate: one reads what the one before it writes.
struct Product {
  int first;
  int count;
};

struct Project {
  ProjectStage stage;
  std::vector<ProjectedLinear> linears;
  std::vector<Product> products;
  bool float_columns;
  bool in_float;
};

struct Attend {
  AttendStage stage;
  size_t plan;
};

using Stage = std::variant<EmbedStage, PackedEmbedStage, PositionStage, Project, Attend, MergeStage,
                           NormStage>;

// Layers that are alike here share a plan.
struct PlanKey {
  int64_t heads, kv_heads, head_dim, window;
  bool causal;
  bool operator==(const PlanKey& other) const {
    return heads == other.heads && kv_heads == other.kv_heads && head_dim == other.head_dim &&
           window == other.window && causal == other.causal;
  }
};

struct ProductPlan {
  const Microkernel* kernel;
  Blocking blocking;
};

// The rows of a step that a pass takes, as a step of its own.
struct Pass {
  Pass(const Step& step, Range rows) : first_row(step.sequences.count + 1) {
    const Sequences& all = step.sequences;
    length.resize(all.count);
    first_row[0] = 0;
    for (int64_t i = 0; i < all.count; ++i) {
      const int64_t begin = std::clamp(all.first_row[i], rows.begin, rows.end);
      const int64_t end = std::clamp(all.first_row[i + 1], rows.begin, rows.end);
      first_row[i + 1] = first_row[i] + end - begin;
      length[i] = all.length[i] - (all.first_row[i + 1] - end);
    }
    sequences = {all.count, first_row.data(), length.data(), all.table, all.table_stride};
    const int64_t* const kept_end = step.kept + step.kept_count;
    const int64_t* const from = std::lower_bound(step.kept, kept_end, rows.begin);
    const int64_t* const to = std::lower_bound(from, kept_end, rows.end);
    for (const int64_t* row = from; row != to; ++row) kept.push_back(*row - rows.begin);
    first_kept = from - step.kept;
  }
  std::vector<int64_t> first_row, length, kept;
  int64_t first_kept;
  Sequences sequences;
};

// The sequences as a cache has them.
inline Sequences sequences_of(const Step& step, const Sequences& all, int cache) {
  Sequences own = all;
  if (step.tables != nullptr) own.table = step.tables[cache];
  return own;
}

struct Program::Implementation {
  std::vector<int64_t> widths;
  std::vector<Stage> stages;
  std::vector<PlanKey> plan_keys;
  Buffer result = kNoBuffer;

  // For so many rows, workers and this ISA; made again when they change.
  int64_t planned_rows = -1, planned_kept = -1;
  int planned_workers = 0;
  Isa isa{};
  std::vector<ProductPlan> product_plans;  // of all project stages, in order
  int64_t sums_bytes = 0;                  // of each worker's

  TeamBarrier barrier;
  uint32_t turn = 0;
  std::atomic<bool> running{false};
  Scratch<float> buffer_memory;
  std::vector<float*> buffers;
  Scratch<uint8_t> codes;
  Scratch<float> scales;
  Scratch<int32_t> zero_points;
  Scratch<float> float_rows;     // what products with weights in float read
  Scratch<std::byte> workspace;  // of each worker: its sums, or attention's; and a row
  Scratch<float> partials;
  std::unique_ptr<std::atomic<int>[]> finished;
  int64_t finished_count = 0;
  std::vector<WorkCounter> counters;

  int64_t ld(Buffer buffer) const { return whole_vectors(widths[buffer]); }

  void check_columns(const char* what, Buffer buffer, int64_t column, int64_t columns) const {
    SQ_CHECK(buffer >= 0 && buffer < static_cast<Buffer>(widths.size()), what, ": no buffer ",
             buffer);
    SQ_CHECK(column >= 0 && columns >= 0 && column <= widths[buffer] - columns, what, ": ", columns,
             " columns from ", column, " on, of a buffer of ", widths[buffer]);
  }

  void plan(int64_t rows, int64_t kept, int workers);
  void append(Stage stage) {
    stages.push_back(std::move(stage));
    planned_rows = -1;
  }
  void run(const Step& step, const Pass& pass, Range rows, int workers);
  class Runner;
};

}  // namespace sq_cpu
