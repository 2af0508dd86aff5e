#include "blocking.h"

#include <unistd.h>

#include <algorithm>

namespace sq_cpu {
namespace {

constexpr int64_t kWorkspaceBytes = 32 << 20;
constexpr int64_t kBytesPerThread = 128 << 10;

// Units of each task and row block, and panels of a task that waits for memory.
constexpr int64_t kUnits = 16;
constexpr int64_t kPanels = 8;

// With no more groups of rows than this, a panel is hardly read again from L1.
constexpr int64_t kFewGroups = 2;

int64_t cache_bytes(int level, int64_t otherwise) {
  const long reported = sysconf(level);
  return reported > 0 ? reported : otherwise;
}

int64_t l1_bytes() {
  static const int64_t bytes = cache_bytes(_SC_LEVEL1_DCACHE_SIZE, 32 << 10);
  return bytes;
}

// The length of near-equal parts of `count`, each a multiple of `step` and at most about `most`.
int64_t near_equal(int64_t count, int64_t step, int64_t most) {
  const int64_t parts = ceil_div(count, std::max(most, step));
  return std::max(ceil_div(ceil_div(count, std::max<int64_t>(parts, 1)), step) * step, step);
}

}  // namespace

int64_t l2_bytes() {
  static const int64_t bytes = cache_bytes(_SC_LEVEL2_CACHE_SIZE, 1 << 20);
  return bytes;
}

Range part(int64_t count, int64_t step, int64_t parts, int64_t index) {
  const int64_t units = ceil_div(count, step);
  return {std::min(count, units * index / parts * step),
          std::min(count, units * (index + 1) / parts * step)};
}

int useful_threads(int64_t m, int64_t n, int64_t k, int available) {
  // Up to 4 rows the weights' traffic is the cost; beyond, arithmetic grows with the rows.
  const double work = double(n) * k * std::max<int64_t>(1, m / 4);
  return static_cast<int>(std::clamp<double>(work / kBytesPerThread, 1, available));
}

Blocking choose_blocking(const Microkernel& kernel, int64_t m, int64_t strips, int64_t k_blocks,
                         int threads) {
  const int64_t step = row_step(kernel);
  Blocking best{};
  best.strip_step = 1;
  double least = -1;
  const int64_t most_row_parts =
      std::min<int64_t>(threads, std::max<int64_t>(1, ceil_div(m, step)));
  for (int64_t row_parts = 1; row_parts <= most_row_parts; ++row_parts) {
    const int64_t strip_parts = threads / row_parts;
    // The slowest task: its rows x columns of arithmetic, plus what it reads of weights and codes
    // from afar. The microkernel's area stands for the products it does while a byte arrives.
    const int64_t rows = std::min(m, ceil_div(ceil_div(m, step), row_parts) * step);
    const int64_t columns = ceil_div(strips, strip_parts) * kStripColumns;
    const double area = kernel.rows * kernel.strips;
    const double read = rows + double(columns) * ceil_div(rows, kMostRows);
    const double cost = double(rows) * columns + area * read;
    if (least < 0 || cost < least) {
      least = cost;
      best.row_parts = row_parts;
      best.strip_parts = strip_parts;
      best.rows = near_equal(rows, step, kMostRows);
    }
  }
  const int64_t task_strips = ceil_div(strips, best.strip_parts);
  // Whole panels, and whole cache lines of y, where that leaves the tasks near equal.
  if (task_strips >= 4 * kernel.strips) best.strip_step = kernel.strips;
  // A task's first panel is not fetched ahead. With one group of rows, which waits for memory, it
  // should be a small part of the task's.
  best.panel_strips = m > kernel.rows
                          ? kernel.strips
                          : std::clamp<int64_t>(task_strips / kPanels, 1, kernel.strips);
  // Whole panels. The last worker to finish is late by a unit: others took the rest of its task.
  best.unit_strips =
      std::max<int64_t>(1, ceil_div(task_strips, kUnits * best.panel_strips)) * best.panel_strips;
  const int64_t groups = most_groups(kernel, best.rows);
  int64_t deepest = k_blocks;
  if (m <= kFewGroups * kernel.rows) {
    // The panel passes by too: to cut k would only make it pass in pieces.
  } else if (kernel.home == PanelHome::kL1) {
    // Five sixths of L1 for the panel; the rest for codes and sums passing by.
    deepest = l1_bytes() * 5 / 6 / (best.panel_strips * kTileBytes);
  } else {
    // Half of L2 for the codes; the other half for two panels, in use and next, and the sums.
    deepest = l2_bytes() / 2 / (best.rows * kTileDepth);
  }
  best.k_blocks = near_equal(k_blocks, 1, deepest);
  best.strips = best.unit_strips;
  if (best.k_blocks < k_blocks) {
    // Codes that stay in L2 must not be read again for every panel; those passing by may.
    const int64_t waiting = kernel.home == PanelHome::kL1 ? 1 : l2_bytes() / 4;
    const int64_t panel = groups * kernel.rows * kernel.strips * kStripColumns * sizeof(int32_t);
    best.strips =
        std::min(best.unit_strips, std::max<int64_t>(1, waiting / panel) * best.panel_strips);
  }
  return best;
}

int64_t workspace_sums(const Microkernel& kernel, const Blocking& blocking, int64_t k_blocks) {
  const int64_t group = kernel.rows * kernel.strips * kStripColumns;
  if (blocking.k_blocks >= k_blocks) return 2 * group;  // one computed, one in its epilogue
  return ceil_div(blocking.strips, blocking.panel_strips) * most_groups(kernel, blocking.rows) *
         group;
}

int64_t rows_per_pass(int64_t m, int64_t k) {
  const int64_t rows = kWorkspaceBytes / std::max<int64_t>(k, 1) / kBlockRows * kBlockRows;
  return std::min(std::max(rows, kBlockRows), std::max<int64_t>(m, 1));
}

}  // namespace sq_cpu
