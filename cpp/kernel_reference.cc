// The definition of the product: plain loops, baseline x86-64, right on any machine.
#include "rows.h"

namespace sq_cpu {

void u8s8_4x16_reference(const TileArgs& t) {
  static_assert(u8s8_4x16_reference_block::kStrips == 1, "these loops run over one strip");
  for (int row = 0; row < t.rows; ++row) {
    for (int column = 0; column < kStripColumns; ++column) {
      uint32_t sum = 0;  // wraps; only the final value must fit
      for (int64_t k = 0; k < t.k_blocks * kTileDepth; ++k) {
        const int64_t tile = k / kTileDepth * kTileBytes;
        const int64_t within = k % kTileDepth / 4 * 64 + column * 4 + k % 4;
        const uint8_t u = t.u[k / kTileDepth * t.u_tile + row * kTileDepth + k % kTileDepth];
        sum += u * static_cast<int>(static_cast<int8_t>(t.strip[tile + within]));
      }
      int32_t& c = t.c[row * kStripColumns + column];
      c = static_cast<int32_t>(sum + (t.accumulate ? static_cast<uint32_t>(c) : 0u));
    }
  }
}

const RowKernels rows_reference = make_row_kernels();

}  // namespace sq_cpu
