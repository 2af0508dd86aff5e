// How one product is cut into tasks and blocks. Sizes only; no loop over data is here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernel.h"
#include "layout.h"

namespace sq_cpu {

struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

// Part `index` of `parts` near-equal parts of [0, count), cut at multiples of `step`.
Range part(int64_t count, int64_t step, int64_t parts, int64_t index);

// Of a core.
int64_t l2_bytes();

// Threads of the pool that get work: each should stream at least 128 KB of weights or do as much
// arithmetic as that costs, 9 us at one core's 15 GB/s. From two such shares on, a second thread
// saves more than the 2 to 8 us that opening a region and joining it take; below, the caller is
// alone.
int useful_threads(int64_t m, int64_t n, int64_t k, int available);

// Rows are cut at multiples of this: whole blocks of codes, whole groups.
constexpr int64_t row_step(const Microkernel& kernel) {
  return kernel.rows > kBlockRows ? kernel.rows : kBlockRows;
}

// Groups of a block of so many rows, at most.
constexpr int64_t most_groups(const Microkernel& kernel, int64_t rows) {
  return ceil_div(rows, row_step(kernel)) * ceil_div(row_step(kernel), kernel.rows);
}

// Calls f(group) for groups of rows that a call of the microkernel takes: near-equal parts of a
// block of 16, cut at multiples of `step`, or whole blocks for a kernel that takes more. A last
// group of a row or two would wait for its own latency. `rows` begin at a multiple of row_step().
template <typename Function>
void for_each_group(const Microkernel& kernel, Range rows, Function f, int64_t step = 1) {
  for (int64_t row = rows.begin; row < rows.end; row += row_step(kernel)) {
    const int64_t size = std::min(row_step(kernel), rows.end - row);
    const int64_t parts = ceil_div(size, kernel.rows);
    for (int64_t index = 0; index < parts; ++index) {
      const Range group = part(size, step, parts, index);
      f(Range{row + group.begin, row + group.end});
    }
  }
}

// Rows that a panel of weights serves before it is read again. From 256 rows on, what is read for
// them takes a tenth of the arithmetic's time or less, on every machine measured.
constexpr int64_t kMostRows = 256;
constexpr int64_t kMostGroups = 64;  // of such a row block: by 4 rows, the smallest MR

// A product is a grid of row_parts x strip_parts tasks, one for each worker. A task:
//
//                   n, in strips of 16 columns
//           |<-------- unit_strips -------->|
//           |<---- strips --->|
//       +-- +-----+-----+-----+-----+-----+-----     a box is a panel, panel_strips wide and
//  rows |   | MR rows: one group                     k_blocks tiles deep
//       |   +-----+-----+-----+-----+-----+-----
//  m    |   |     |     |     |     |     |
//       +-- +-----+-----+-----+-----+-----+-----
//
//   for each row block of `rows`                  MC
//     for each unit of `unit_strips`                  what a worker takes at a time
//       for each strip block of `strips`          NC  whose int32 sums wait if k is cut
//         for each k block of `k_blocks`          KC  what the caches hold of codes and a panel
//           for each panel of `panel_strips`      NR  read once for all rows of the block
//             for each group of Microkernel::rows MR
//               microkernel: sums[MR, NR] (+)= codes[MR, KC] * panel[KC, NR]
//
// Right of the loops: BLIS' names.
struct Blocking {
  int64_t row_parts;     // 1 or more
  int64_t strip_parts;   // 1 or more; row_parts * strip_parts is at most the threads
  int64_t rows;          // a multiple of row_step(), at most kMostRows
  int64_t strip_step;    // strips are dealt out to tasks in multiples of this, at least 1
  int64_t panel_strips;  // 1 .. Microkernel::strips
  int64_t unit_strips;   // a multiple of panel_strips
  int64_t strips;        // a multiple of panel_strips, at most unit_strips
  int64_t k_blocks;      // 1 .. all of them
};

Blocking choose_blocking(const Microkernel& kernel, int64_t m, int64_t strips, int64_t k_blocks,
                         int threads);

// int32 of workspace that each worker needs: two groups' sums, or where k is cut those of a strip
// block, which choose_blocking() keeps within a quarter of L2 or one panel.
int64_t workspace_sums(const Microkernel& kernel, const Blocking& blocking, int64_t k_blocks);

// Rows of a whole call that are quantized before they are multiplied: bounds the workspace.
int64_t rows_per_pass(int64_t m, int64_t k);

}  // namespace sq_cpu
