// What program.cc puts together and run_program.cc runs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "check.h"
#include "program_stages.h"
#include "sq_cpu/program.h"
#include "step_plan.h"
#include "team.h"

namespace sq_cpu {

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
  int64_t lists = 0;  // of the last route

  StepPlan plan;
  StepMemory memory;
  TeamBarrier barrier;
  uint32_t turn = 0;
  std::atomic<bool> running{false};

  int64_t ld(Buffer buffer) const { return whole_vectors(widths[buffer]); }

  void check_columns(const char* what, Buffer buffer, int64_t column, int64_t columns) const {
    SQ_CHECK(buffer >= 0 && buffer < static_cast<Buffer>(widths.size()), what, ": no buffer ",
             buffer);
    SQ_CHECK(column >= 0 && columns >= 0 && column <= widths[buffer] - columns, what, ": ", columns,
             " columns from ", column, " on, of a buffer of ", widths[buffer]);
  }

  void append(Stage stage) {
    stages.push_back(std::move(stage));
    plan.forget();
  }
  void run(const Step& step, const Pass& pass, Range rows, int workers);
  class Runner;
};

}  // namespace sq_cpu
