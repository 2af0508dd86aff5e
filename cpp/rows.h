// The float work of the linear layer: row statistics, quantization to u8, and the one epilogue.
// Compiled once per vector width (vec.h); fp contraction is off, so every width gives the same
// bits.
#pragma once

#include "activations.h"
#include "kernel.h"
#include "vec.h"

namespace sq_cpu {
namespace {

// Calls step(first element, values) for whole vectors, then once for the rest, padded with zeros.
template <DType kType, bool kSmooth, typename Step>
void for_each_vector(const RowArgs& row, Step step) {
  using E = Element<kType>;
  const auto* x = static_cast<const char*>(row.x);
  int64_t i = 0;
  for (; i + kLanes <= row.k; i += kLanes) {
    F32 v = E::load(x + i * E::kBytes);
    if constexpr (kSmooth) v *= load_bits<F32>(row.inverse_smoothing + i);
    step(i, v);
  }
  if (i < row.k) {
    char tail[kLanes * E::kBytes] = {};
    std::memcpy(tail, x + i * E::kBytes, (row.k - i) * E::kBytes);
    F32 v = E::load(tail);
    if constexpr (kSmooth) {
      F32 inverse = {};
      std::memcpy(&inverse, row.inverse_smoothing + i, (row.k - i) * sizeof(float));
      v *= inverse;
    }
    step(i, v);
  }
}

template <DType kType, typename Step>
void for_each_vector(const RowArgs& row, Step step) {
  return row.inverse_smoothing == nullptr ? for_each_vector<kType, false>(row, step)
                                          : for_each_vector<kType, true>(row, step);
}

template <DType kType>
RowStats row_stats(const RowArgs& row) {
  // Two sets of accumulators hide the latency; the poison turns NaN once any x * 0 is not 0.
  F32 low[2] = {}, high[2] = {}, poison[2] = {};
  for_each_vector<kType>(row, [&](int64_t i, F32 v) {
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

// The code of each value. |v| <= 255 after the clamp, so adding 1.5 * 2^23 leaves rne(v) in the low
// bits of the sum.
struct Coder {
  explicit Coder(const RowGrid& grid)
      : inv_scale(grid.inv_scale),
        low(splat(grid.low)),
        high(splat(grid.high)),
        bias(0x4b400000u - static_cast<uint32_t>(grid.zero_point)) {}
  U8 operator()(F32 v) const {
    v *= inv_scale;
    v = v > low ? v : low;  // NaN becomes low; its row's scale is NaN
    v = v < high ? v : high;
    return __builtin_convertvector((U32)(v + 0x1.8p23f) - bias, U8);
  }
  float inv_scale;
  F32 low, high;
  uint32_t bias;
};

template <DType kType>
void quantize_row(const RowArgs& row, const RowGrid& grid, uint8_t* u, int64_t u_tile) {
  const Coder code(grid);
  for_each_vector<kType>(row, [&](int64_t i, F32 v) {
    store_bits(u + i / kTileDepth * u_tile + i % kTileDepth, code(v));
  });
}

template <typename V>
void store_first(void* y, V value, int64_t count) {
  std::memcpy(y, &value, (count < kLanes ? count : kLanes) * (sizeof value / kLanes));
}

F32 first(F32 v, int64_t count) {
  for (int64_t lane = count; lane < kLanes; ++lane) v[lane] = 0.0f;
  return v;
}

bool all_zero(F32 v) {
  bool zero = true;
  for (int lane = 0; lane < kLanes; ++lane) zero = zero && v[lane] == 0.0f;
  return zero;
}

// Several tasks may find the same row not finite.
void store_nan(float* scale) {
  const float nan = __builtin_nanf("");
  __atomic_store(scale, &nan, __ATOMIC_RELAXED);
}

F32 load_operand(DType type, const void* base, int64_t element, int64_t count) {
  const int bytes = type == DType::kFloat32 ? 4 : 2;
  char padded[4 * kLanes];
  const auto* p = static_cast<const char*>(base) + element * bytes;
  if (count < kLanes) {
    std::memcpy(padded, p, count * bytes);
    p = padded;
  }
  switch (type) {
    case DType::kFloat32:
      return Element<DType::kFloat32>::load(p);
    case DType::kBFloat16:
      return Element<DType::kBFloat16>::load(p);
    case DType::kFloat16:
      break;
  }
  return Element<DType::kFloat16>::load(p);
}

F32 activate(Activation activation, F32 v) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return relu(v);
    case Activation::kGelu:
      return gelu(v);
    case Activation::kGeluTanh:
      return gelu_tanh(v);
    case Activation::kSilu:
      return silu(v);
  }
  return v;
}

F32 apply(const EpilogueSteps& steps, F32 v, int64_t row, int64_t column, int64_t count) {
  v = activate(steps.activation, v);
  if (steps.other != nullptr) {
    v *= load_operand(steps.operand_type, steps.other, row * steps.ld_other + column, count);
  }
  if (steps.residual != nullptr) {
    v += load_operand(steps.operand_type, steps.residual, row * steps.ld_residual + column, count);
  }
  return v;
}

template <Output kOutput, bool kSteps>
void epilogue(const EpilogueArgs& args) {
  constexpr bool kHalf = kOutput == Output::kBFloat16 || kOutput == Output::kFloat16;
  constexpr int kBytes = kHalf ? 2 : 4;
  [[maybe_unused]] F32 poison[kMaxRows] = {};  // of each row; NaN once any v * 0 is not 0
  for (int64_t offset = 0; offset < args.columns; offset += kLanes) {
    const std::byte* trailer = args.trailer + offset / kStripColumns * args.strip_stride +
                               offset % kStripColumns * sizeof(float);
    const U32 colsum = load_bits<U32>(trailer);
    const F32 weight_scale = load_bits<F32>(trailer + kStripColumns * sizeof(float));
    const F32 bias = load_bits<F32>(trailer + 2 * kStripColumns * sizeof(float));
    const int64_t column = args.column + offset, count = args.columns - offset;
    char* y = static_cast<char*>(args.y);
    y += kOutput == Output::kCode ? column / kTileDepth * args.ldy + column % kTileDepth
                                  : column * kBytes;
    const int64_t y_row = kOutput == Output::kCode ? kTileDepth : args.ldy * kBytes;
    for (int row = 0; row < args.rows; ++row, y += y_row) {
      const U32 acc = load_bits<U32>(args.c + row * args.ldc + offset);
      const I32 t = (I32)(acc - colsum * static_cast<uint32_t>(args.row_zero_point[row]));
      if constexpr (kOutput == Output::kInt32) {
        store_first(y, t, count);
      } else {
        F32 v = fma(__builtin_convertvector(t, F32), weight_scale * args.row_scale[row], bias);
        if constexpr (kSteps) v = apply(*args.steps, v, row, column, count);
        if constexpr (kOutput == Output::kCode) {
          store_first(y, Coder(args.steps->grid)(v), count);
          poison[row] += (count < kLanes ? first(v, count) : v) * 0.0f;
        } else {
          store_first(y, Element<static_cast<DType>(kOutput)>::round(v), count);
        }
      }
    }
  }
  if constexpr (kOutput == Output::kCode) {
    for (int row = 0; row < args.rows; ++row) {
      if (!all_zero(poison[row])) store_nan(args.steps->code_scale + row);
    }
  }
}

template <Output kOutput>
void epilogue(const EpilogueArgs& args) {
  if constexpr (kOutput == Output::kInt32) {
    epilogue<kOutput, false>(args);
  } else {
    args.steps == nullptr ? epilogue<kOutput, false>(args) : epilogue<kOutput, true>(args);
  }
}

// The table of one vector width; each kernel_<isa>.cc defines one from it.
constexpr RowKernels make_row_kernels() {
  return {{row_stats<DType::kFloat32>, row_stats<DType::kBFloat16>, row_stats<DType::kFloat16>},
          {quantize_row<DType::kFloat32>, quantize_row<DType::kBFloat16>,
           quantize_row<DType::kFloat16>},
          {epilogue<Output::kFloat32>, epilogue<Output::kBFloat16>, epilogue<Output::kFloat16>,
           epilogue<Output::kInt32>, epilogue<Output::kCode>}};
}

}  // namespace
}  // namespace sq_cpu
