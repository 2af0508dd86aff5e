#include "gemm.h"

#include <algorithm>

namespace sq_cpu {

int64_t element_bytes(DType type) {
  return type == DType::kFloat32 || type == DType::kInt32 ? 4 : 2;
}

int64_t strip_count(int64_t n) { return (n + kStripColumns - 1) / kStripColumns; }

int64_t k_block_count(int64_t k) { return (k + kTileDepth - 1) / kTileDepth; }

int64_t strip_bytes(int64_t k) { return k_block_count(k) * kTileBytes + kTrailerBytes; }

void gemm_task(const GemmArgs& args, const Microkernel& kernel, const RowKernels& rows, int thread,
               int threads) {
  const int64_t strips = strip_count(args.weight.n);
  const TaskGrid grid = task_grid(kernel, args.m, strips, threads);
  if (thread >= grid.row_parts * grid.strip_parts) return;
  const Range my_rows = part(args.m, kernel.row_step, grid.row_parts, thread / grid.strip_parts);
  const Range my_strips = part(strips, 1, grid.strip_parts, thread % grid.strip_parts);

  const int64_t stride = strip_bytes(args.weight.k);
  const int64_t k_blocks = k_block_count(args.weight.k);
  const int64_t y_bytes = element_bytes(args.y_type);
  const int64_t block_rows = rows_per_block(kernel, args.ldu);
  const auto epilogue = rows.epilogue[static_cast<int>(args.y_type)];
  alignas(64) int32_t c[kMaxTileInts];
  TaskState state;
  if (kernel.begin != nullptr) kernel.begin(state);

  // A block of activations stays in L2; each panel of weights is read once for it.
  for (int64_t m0 = my_rows.begin; m0 < my_rows.end; m0 += block_rows) {
    const int64_t block = std::min(block_rows, my_rows.end - m0);
    const int64_t groups = (block + kernel.rows - 1) / kernel.rows;
    for (int64_t s = my_strips.begin; s < my_strips.end; s += kernel.strips) {
      const int panel = static_cast<int>(std::min<int64_t>(kernel.strips, my_strips.end - s));
      const std::byte* strip = args.weight.data + s * stride;
      const int64_t n0 = s * kStripColumns;
      for (int64_t group = 0; group < groups; ++group) {
        // Near-equal groups: a last one of a row or two would wait for its own latency.
        const Range r = part(block, kernel.row_step, groups, group);
        const int64_t row = m0 + r.begin;
        const int count = static_cast<int>(r.size());
        kernel.run(
            {args.u + row * args.ldu, args.ldu, strip, stride, k_blocks, count, panel, c, &state});
        epilogue({c, panel * kStripColumns, count, args.row_scale + row, args.row_zero_point + row,
                  strip + k_blocks * kTileBytes, stride,
                  static_cast<char*>(args.y) + (row * args.ldy + n0) * y_bytes, args.ldy,
                  std::min(panel * kStripColumns, args.weight.n - n0)});
      }
    }
  }
  if (kernel.end != nullptr) kernel.end(state);
}

}  // namespace sq_cpu
