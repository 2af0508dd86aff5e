// How one product is cut into tasks and blocks. Sizes only; no loop over data is here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace sq_cpu {

struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

int64_t ceil_div(int64_t a, int64_t b);

// Part `index` of `parts` near-equal parts of [0, count), cut at multiples of `step`.
Range part(int64_t count, int64_t step, int64_t parts, int64_t index);

// Every row of kernels.inc, worst first.
struct MicrokernelTable {
  const Microkernel* rows;
  size_t count;
  const Microkernel* begin() const { return rows; }
  const Microkernel* end() const { return rows + count; }
};
MicrokernelTable microkernels();

// The best microkernel among those the ISA in use may run, for codes up to max_code and m rows.
const Microkernel& choose_microkernel(Isa isa, int max_code, int64_t m);

const RowKernels& row_kernels(Isa isa);

// Rows are cut at multiples of this: whole blocks of codes, whole groups.
int64_t row_step(const Microkernel& kernel);

// Threads worth starting: each should stream at least 128 KB of weights or do as much arithmetic
// as that costs; a fork and join takes as long as about half of that.
int useful_threads(int64_t m, int64_t n, int64_t k, int available);

// A grid of row_parts x strip_parts tasks, one per thread. Within a task, from the outside in:
//
//   row block        `rows` rows of codes
//   unit             `unit_strips` strips: what a thread takes at a time
//     strip block    `strips` strips, whose int32 sums wait in the task's workspace if k is cut
//       k block      `k_blocks` tiles deep: of the codes and of a panel, what the caches hold
//         panel      `panel_strips` strips, each read once for all the rows of the block
//           group    Microkernel::rows rows: one call of the microkernel
// Rows that a panel of weights serves before it is read again. From 256 rows on, what is read for
// them takes a tenth of the arithmetic's time or less, on every machine measured.
constexpr int64_t kMostRows = 256;
constexpr int64_t kMostGroups = 64;  // of a row block: by 4 rows, the smallest MR

struct Blocking {
  int64_t row_parts;
  int64_t strip_parts;
  int64_t rows;          // MC; a multiple of row_step(), at most kMostRows
  int64_t strip_step;    // strips are dealt out to tasks in multiples of this
  int64_t panel_strips;  // NR / 16: 1 .. Microkernel::strips
  int64_t unit_strips;   // a multiple of panel_strips, as `strips` is
  int64_t strips;        // NC / 16
  int64_t k_blocks;      // KC / 64
};

Blocking choose_blocking(const Microkernel& kernel, int64_t m, int64_t strips, int64_t k_blocks,
                         int threads);

// int32 of workspace that each thread needs.
int64_t workspace_sums(const Microkernel& kernel, const Blocking& blocking, int64_t k_blocks);

// Rows of a whole call that are quantized before they are multiplied: bounds the workspace.
int64_t rows_per_pass(int64_t m, int64_t k);

}  // namespace sq_cpu
