// Where a row of packed weights lies.
#pragma once

#include <cstring>

#include "kernel.h"
#include "layout.h"

namespace sq_cpu {

inline WeightRow row_of(const PackedWeight& weight, int64_t id, const float* inverse_smoothing) {
  const std::byte* const strip = weight.data + id / kStripColumns * strip_bytes(weight.k);
  WeightRow row{strip, id % kStripColumns, weight.k, 0.0f, inverse_smoothing};
  const int64_t scales = k_block_count(weight.k) * kTileBytes + kStripColumns * 4;
  std::memcpy(&row.scale, strip + scales + 4 * row.column, sizeof row.scale);
  return row;
}

}  // namespace sq_cpu
