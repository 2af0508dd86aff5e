#include "blocking.h"

#include <unistd.h>

#include <algorithm>

namespace sq_cpu {
namespace {

constexpr Microkernel kMicrokernels[] = {
#define SQ_MICROKERNEL(isa, name, rows, step, strips, max_code, from_m, begin, end) \
  {#name, Isa::isa, rows, step, strips, max_code, from_m, name, begin, end},
#define SQ_ROW_KERNELS(isa, name)
#include "kernels.inc"
#undef SQ_MICROKERNEL
#undef SQ_ROW_KERNELS
};

struct RowKernelsOf {
  Isa isa;
  const RowKernels& kernels;
};

const RowKernelsOf kRowKernels[] = {
#define SQ_MICROKERNEL(...)
#define SQ_ROW_KERNELS(isa, name) {Isa::isa, name},
#include "kernels.inc"
#undef SQ_MICROKERNEL
#undef SQ_ROW_KERNELS
};

constexpr int64_t kWorkspaceBytes = 32 << 20;
constexpr int64_t kBytesPerThread = 128 << 10;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t l2_bytes() {
  static const int64_t bytes = [] {
    const long reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return reported > 0 ? static_cast<int64_t>(reported) : int64_t{1} << 20;
  }();
  return bytes;
}

}  // namespace

Range part(int64_t count, int64_t step, int64_t parts, int64_t index) {
  const int64_t units = ceil_div(count, step);
  return {std::min(count, units * index / parts * step),
          std::min(count, units * (index + 1) / parts * step)};
}

MicrokernelTable microkernels() { return {kMicrokernels, std::size(kMicrokernels)}; }

const Microkernel& choose_microkernel(Isa isa, int max_code, int64_t m) {
  const Microkernel* best = &kMicrokernels[0];
  for (const Microkernel& kernel : kMicrokernels) {
    if (kernel.isa <= isa && kernel.max_code >= max_code && m >= kernel.from_m) best = &kernel;
  }
  return *best;
}

const char* microkernel_name(int max_code, int64_t m) {
  return choose_microkernel(active_isa(), max_code, m).name;
}

const RowKernels& row_kernels(Isa isa) {
  const RowKernels* best = &kRowKernels[0].kernels;
  for (const RowKernelsOf& row : kRowKernels) {
    if (row.isa <= isa) best = &row.kernels;
  }
  return *best;
}

int useful_threads(int64_t m, int64_t n, int64_t k, int available) {
  // Up to 4 rows the weights' traffic is the cost; beyond, arithmetic grows with the rows.
  const int64_t work = n * k * std::max<int64_t>(1, m / 4);
  return static_cast<int>(std::clamp<int64_t>(work / kBytesPerThread, 1, available));
}

TaskGrid task_grid(const Microkernel& kernel, int64_t m, int64_t strips, int threads) {
  TaskGrid best{1, 1};
  double least = -1;
  for (int64_t row_parts = 1; row_parts <= threads; ++row_parts) {
    const int64_t strip_parts = threads / row_parts;
    // The slowest task: its rows x strips of arithmetic, plus what it reads of weights and codes.
    const int64_t rows =
        std::min(m, ceil_div(ceil_div(m, kernel.row_step), row_parts) * kernel.row_step);
    const int64_t columns = ceil_div(strips, strip_parts) * kStripColumns;
    const double cost = double(rows) * columns + 16.0 * (rows + columns);
    if (least < 0 || cost < least) {
      least = cost;
      best = {row_parts, strip_parts};
    }
  }
  return best;
}

int64_t rows_per_block(const Microkernel& kernel, int64_t ldu) {
  const int64_t rows = l2_bytes() / 2 / ldu;
  return std::max<int64_t>(kernel.rows, rows / kernel.rows * kernel.rows);
}

int64_t rows_per_pass(int64_t m, int64_t ldu) {
  return std::clamp<int64_t>(kWorkspaceBytes / ldu, 1, std::max<int64_t>(m, 1));
}

}  // namespace sq_cpu
