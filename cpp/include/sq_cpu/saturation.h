// How often vpmaddubsw, the int8 product of AVX2 and of AVX-512 without VNNI, would saturate.
//
// vpmaddubsw adds two neighbouring products in int16,
//   s = u[2j] * w[2j] + u[2j+1] * w[2j+1],   j = 0 .. ceil(k / 2) - 1,
// and clips s to [-32768, 32767]; with 8-bit codes |s| reaches 2 * 255 * 128 = 65280. The kernels
// of this library never clip: they use vpmaddubsw with 7-bit codes only (reduce_range), where |s|
// is at most 2 * 127 * 128 = 32512. The count says how much clipping reduce_range, or exactness,
// avoids.
#pragma once

#include <cstdint>

#include "sq_cpu/linear.h"

namespace sq_cpu {

struct SaturationCount {
  int64_t pairs;      // m * n * ceil(k / 2); the last product of an odd k has no partner
  int64_t saturated;  // those with s outside [-32768, 32767]
};

// Exact, the same on every ISA and thread count. What pads k, m and n is not counted. Takes what
// gemm() takes; threads and errors are those of linear.h.
SaturationCount count_saturation(const QuantizedActivation& x, const PackedWeight& weight);

}  // namespace sq_cpu
