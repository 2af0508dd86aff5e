// The float work of the linear layer: row statistics, quantization to u8, and the one epilogue.
// Compiled once per vector width (vec.h); fp contraction is off, so every width gives the same
// bits.
#pragma once

#include "kernel.h"
#include "vec.h"

namespace sq_cpu {
namespace {

// Calls step(first element, count) for whole vectors, then once for the rest in a zero-padded copy.
template <DType kType, typename Step>
void for_each_vector(const void* x, int64_t k, Step step) {
  using E = Element<kType>;
  const auto* bytes = static_cast<const char*>(x);
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) step(i, E::load(bytes + i * E::kBytes));
  if (i < k) {
    char tail[kLanes * E::kBytes] = {};
    std::memcpy(tail, bytes + i * E::kBytes, (k - i) * E::kBytes);
    step(i, E::load(tail));
  }
}

template <DType kType>
RowStats row_stats(const void* x, int64_t k) {
  // Two sets of accumulators hide the latency; the poison turns NaN once any x * 0 is not 0.
  F32 low[2] = {}, high[2] = {}, poison[2] = {};
  for_each_vector<kType>(x, k, [&](int64_t i, F32 v) {
    const int set = (i / kLanes) & 1;
    low[set] = v < low[set] ? v : low[set];
    high[set] = v > high[set] ? v : high[set];
    poison[set] += v * 0.0f;
  });
  const F32 check = poison[0] + poison[1];
  RowStats stats{0.0f, 0.0f, true};
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int set = 0; set < 2; ++set) {
      stats.min = low[set][lane] < stats.min ? low[set][lane] : stats.min;
      stats.max = high[set][lane] > stats.max ? high[set][lane] : stats.max;
    }
    stats.finite = stats.finite && check[lane] == 0.0f;
  }
  return stats;
}

template <DType kType>
void quantize_row(const void* x, int64_t k, const RowGrid& grid, uint8_t* u) {
  // |v| <= 255 after the clamp, so adding 1.5 * 2^23 leaves rne(v) in the low bits of the sum.
  const float magic = 0x1.8p23f;
  const uint32_t bias = 0x4b400000u - static_cast<uint32_t>(grid.zero_point);
  const F32 low = splat(grid.low), high = splat(grid.high);
  for_each_vector<kType>(x, k, [&](int64_t i, F32 v) {
    v *= grid.inv_scale;
    v = v > low ? v : low;  // NaN becomes low; its row's scale is NaN
    v = v < high ? v : high;
    store_bits(u + i, __builtin_convertvector((U32)(v + magic) - bias, U8));
  });
}

template <DType kType, typename V>
void store_first(void* y, V value, int64_t count) {
  using E = Element<kType>;
  if (count >= kLanes) return E::store(y, value);
  char whole[kLanes * E::kBytes];
  E::store(whole, value);
  std::memcpy(y, whole, count * E::kBytes);
}

template <DType kType>
void epilogue(const EpilogueArgs& args) {
  for (int64_t column = 0; column < args.columns; column += kLanes) {
    const std::byte* trailer = args.trailer + column / kStripColumns * args.strip_stride +
                               column % kStripColumns * sizeof(float);
    const U32 colsum = load_bits<U32>(trailer);
    const F32 weight_scale = load_bits<F32>(trailer + kStripColumns * sizeof(float));
    const F32 bias = load_bits<F32>(trailer + 2 * kStripColumns * sizeof(float));
    auto* y = static_cast<char*>(args.y) + column * Element<kType>::kBytes;
    for (int row = 0; row < args.rows; ++row, y += args.ldy * Element<kType>::kBytes) {
      const U32 acc = load_bits<U32>(args.c + row * args.ldc + column);
      const I32 t = (I32)(acc - colsum * static_cast<uint32_t>(args.row_zero_point[row]));
      if constexpr (kType == DType::kInt32) {
        store_first<kType>(y, t, args.columns - column);
      } else {
        const F32 scale = weight_scale * args.row_scale[row];
        store_first<kType>(y, fma(__builtin_convertvector(t, F32), scale, bias),
                           args.columns - column);
      }
    }
  }
}

// The table of one vector width; each kernel_<isa>.cc defines one from it.
constexpr RowKernels make_row_kernels() {
  return {{row_stats<DType::kFloat32>, row_stats<DType::kBFloat16>, row_stats<DType::kFloat16>},
          {quantize_row<DType::kFloat32>, quantize_row<DType::kBFloat16>,
           quantize_row<DType::kFloat16>},
          {epilogue<DType::kFloat32>, epilogue<DType::kBFloat16>, epilogue<DType::kFloat16>,
           epilogue<DType::kInt32>}};
}

}  // namespace
}  // namespace sq_cpu
