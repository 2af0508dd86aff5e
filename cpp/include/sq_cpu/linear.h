// The int8 linear layer: y = dequantize(quantize(x) * W^T) + bias, in one call.
//
//   x  [m, k]  fp32 | bf16 | fp16, rows ldx elements apart   -> u8, per row: scale and zero point
//   W  [n, k]  s8 in [-127, 127], one fp32 scale per row; packed once by pack_weight()
//   y  [m, n]  fp32 | bf16 | fp16, rows ldy elements apart
//
// Arithmetic, the same bits on every ISA, thread count and blocking:
//   u[m,k] = clamp(rne(x * inv_scale), lo - zp, hi - zp) + zp
//   t[m,n] = sum_k u * w - zp * colsum[n]                       (int32)
//   y[m,n] = fma(float(t), row_scale[m] * weight_scale[n], bias[n]), rounded once to y's type (RNE)
// A row of zeros gives y = bias. A row that holds NaN or Inf gives NaN in that row only. An
// absolute maximum below 1e-30 counts as 1e-30.
//
// Every function throws std::invalid_argument on bad arguments; the message names them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sq_cpu {

enum class DType { kFloat32, kBFloat16, kFloat16, kInt32 };

// Packed weights. Strips of 16 output columns, each one sequential stream:
//
//   strip s = columns 16s .. 16s+15; kb = ceil(k / 64) tiles of 1 KB, then a trailer of 192 bytes
//   +--------------------------------------------+--------------+-------------+------------+
//   | tile 0 | tile 1 | ... | tile kb-1          | colsum 16xi32 | scale 16xf32 | bias 16xf32 |
//   +--------------------------------------------+--------------+-------------+------------+
//   tile: 16 rows of 64 bytes; byte (g, c, i) at 64g + 4c + i holds W[16s + c][64b + 4g + i]
//
// One tile row is one operand of VPDPBUSD (16 columns x 4 k), one tile is one B tile of AMX. Rows
// of W beyond n and columns beyond k are zero. The trailer also keeps strips off power-of-two
// strides, which would map them all to the same cache sets.
constexpr int64_t kStripColumns = 16;
constexpr int64_t kTileDepth = 64;
constexpr int64_t kTileBytes = kStripColumns * kTileDepth;
constexpr int64_t kTrailerBytes = 3 * kStripColumns * 4;

// Largest k whose int32 accumulator cannot overflow for any u8 x s8 data: (2^31 - 1) / (255 * 127).
constexpr int64_t kMaxDepth = 66310;

struct PackedWeight {
  const std::byte* data;  // packed_bytes(n, k) bytes, any alignment (64 is fastest)
  int64_t n;
  int64_t k;
};

int64_t packed_bytes(int64_t n, int64_t k);

// weight: s8 [n, k] row-major; scale: fp32 [n]; bias: fp32 [n] or null (zeros). Writes
// packed_bytes(n, k) bytes to `packed`. Throws on a weight of -128 and on k > kMaxDepth.
void pack_weight(const int8_t* weight, const float* scale, const float* bias, int64_t n, int64_t k,
                 std::byte* packed);

// The exact inverse; null outputs are skipped.
void unpack_weight(const PackedWeight& packed, int8_t* weight, float* scale, float* bias);

enum class Granularity { kPerToken, kPerTensor, kStatic };

// How activations become u8. Symmetric: zero point 128, |q| <= 127; asymmetric: the range extended
// to hold 0, zero point and codes in 0..255. reduce_range halves both grids (64, 63; 0..127), which
// vpmaddubsw needs in order not to saturate.
struct ActivationQuantizer {
  Granularity granularity = Granularity::kPerToken;
  bool symmetric = true;
  bool reduce_range = false;
  float scale = 0.0f;      // kStatic only: > 0 and finite
  int32_t zero_point = 0;  // kStatic only: within the grid
};

// x is read, y written; both may be null when m == 0. k == 0 gives y = bias.
void linear(const void* x, DType x_type, int64_t m, int64_t ldx, const PackedWeight& weight,
            const ActivationQuantizer& quantizer, void* y, DType y_type, int64_t ldy);

// The first half alone. u: u8 [m, ldu] with ldu >= k rounded up to 64 (the padding is written too);
// row_scale: fp32 [m]; row_zero_point: i32 [m].
void quantize_activations(const void* x, DType x_type, int64_t m, int64_t k, int64_t ldx,
                          const ActivationQuantizer& quantizer, uint8_t* u, int64_t ldu,
                          float* row_scale, int32_t* row_zero_point);

// The second half alone. y_type kInt32 gives the integers t and does not read row_scale.
// max_code: the largest code in u (127 lets vpmaddubsw kernels run; 255 is always right).
void gemm(const uint8_t* u, int64_t m, int64_t ldu, const float* row_scale,
          const int32_t* row_zero_point, const PackedWeight& weight, int max_code, void* y,
          DType y_type, int64_t ldy);

}  // namespace sq_cpu
