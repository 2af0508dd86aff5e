// The float work of the linear layer: row statistics, quantization to u8, and the one epilogue; and
// the table of all that is compiled once per vector width.
// Compiled once per vector width (vec.h); fp contraction is off, so every width gives the same
// bits.
#pragma once

#include <utility>

#include "activations.h"
#include "count_saturated.h"
#include "float_product.h"
#include "hadamard.h"
#include "kernel.h"
#include "norm.h"
#include "page_products.h"
#include "sample.h"
#include "softmax.h"
#include "strips.h"
#include "vec.h"

namespace sq_cpu {
namespace {

bool all_zero(F32 v) {
  bool zero = true;
  for (int lane = 0; lane < kLanes; ++lane) zero = zero && v[lane] == 0.0f;
  return zero;
}

// Calls step(first element, values, turn) for whole vectors, then once for the rest, padded with
// zeros. Turns alternate between 0 and 1, known when compiled: sums kept apart by them hide
// latency.
template <int kTurn>
struct Turn {
  static constexpr int value = kTurn;
};

// Elements of a row as the grid meets them.
template <DType kType, bool kSmooth>
struct RowLoader {
  using E = Element<kType>;
  F32 operator()(int64_t i) const {
    F32 v = E::load(static_cast<const char*>(row.x) + i * E::kBytes);
    if constexpr (kSmooth) v *= load_bits<F32>(row.inverse_smoothing + i);
    return v;
  }
  // The last ones, fewer than kLanes, padded with zeros.
  F32 tail(int64_t i) const {
    char padded[kLanes * E::kBytes] = {};
    std::memcpy(padded, static_cast<const char*>(row.x) + i * E::kBytes, (row.k - i) * E::kBytes);
    F32 v = E::load(padded);
    if constexpr (kSmooth) {
      F32 inverse = {};
      std::memcpy(&inverse, row.inverse_smoothing + i, (row.k - i) * sizeof(float));
      v *= inverse;
    }
    return v;
  }
  // Also beyond the last ones: zeros.
  F32 padded(int64_t i) const {
    return i + kLanes <= row.k ? (*this)(i) : i < row.k ? tail(i) : F32{};
  }
  RowArgs row;
};

template <DType kType, bool kSmooth, typename Step>
void for_each_vector(RowArgs row, Step step) {
  const RowLoader<kType, kSmooth> load{row};
  int64_t i = 0;
  for (; i + 2 * kLanes <= row.k; i += 2 * kLanes) {
    step(i, load(i), Turn<0>());
    step(i + kLanes, load(i + kLanes), Turn<1>());
  }
  if (i + kLanes <= row.k) {
    step(i, load(i), Turn<0>());
    i += kLanes;
  }
  if (i < row.k) step(i, load.tail(i), Turn<1>());
}

template <DType kType, typename Step>
void for_each_vector(RowArgs row, Step step) {
  return row.inverse_smoothing == nullptr ? for_each_vector<kType, false>(row, step)
                                          : for_each_vector<kType, true>(row, step);
}

// The statistics of the vectors that it has seen.
struct Measure {
  template <int kTurn>
  void operator()(F32 v, Turn<kTurn>) {
    low[kTurn] = min(v, low[kTurn]);
    high[kTurn] = max(v, high[kTurn]);
    poison[kTurn] += v * 0.0f;
  }
  RowStats stats() const {
    const F32 lowest = min(low[0], low[1]), highest = max(high[0], high[1]);
    RowStats all{0.0f, 0.0f, all_zero(poison[0] + poison[1])};
    for (int lane = 0; lane < kLanes; ++lane) {
      all.min = lowest[lane] < all.min ? lowest[lane] : all.min;
      all.max = highest[lane] > all.max ? highest[lane] : all.max;
    }
    return all;
  }
  F32 low[2] = {}, high[2] = {}, poison[2] = {};  // the poison turns NaN once any x * 0 is not 0
};

template <DType kType>
RowStats row_stats(const RowArgs& row) {
  Measure measure;
  for_each_vector<kType>(row, [&](int64_t, F32 v, auto turn) { measure(v, turn); });
  return measure.stats();
}

// The code of each value. |v| <= 255 after the clamp, so adding 1.5 * 2^23 leaves rne(v) in the low
// bits of the sum.
struct Coder {
  explicit Coder(const RowGrid& grid)
      : inv_scale(grid.inv_scale),
        low(splat(grid.low)),
        high(splat(grid.high)),
        bias(0x4b400000u - static_cast<uint32_t>(grid.zero_point)) {}
  U8 operator()(F32 v) const { return narrowed(biased(v)); }
  // rne(v) without the zero point, + 1.5 * 2^23.
  F32 biased(F32 v) const {
    v *= inv_scale;
    v = min(max(v, low), high);  // NaN becomes low; its row's scale is NaN
    return v + 0x1.8p23f;
  }
  U8 narrowed(F32 biased) const { return narrow((U32)biased - bias); }
  float inv_scale;
  F32 low, high;
  uint32_t bias;
};

// Of element i of a row.
uint8_t* code_at(uint8_t* u, uint64_t i, int64_t u_tile) {
  return u + i / kTileDepth * u_tile + i % kTileDepth;
}

template <DType kType>
void quantize_row(const RowArgs& row, const RowGrid& grid, uint8_t* u, int64_t u_tile) {
  const Coder code(grid);
  for_each_vector<kType>(
      row, [&](uint64_t i, F32 v, auto) { store_bits(code_at(u, i, u_tile), code(v)); });
}

template <DType kType>
RowStats quantize_measured(const RowArgs& row, const RowGrid& grid, uint8_t* u, int64_t u_tile) {
  const Coder code(grid);
  Measure measure;
  for_each_vector<kType>(row, [&](uint64_t i, F32 v, auto turn) {
    measure(v, turn);
    store_bits(code_at(u, i, u_tile), code(v));
  });
  return measure.stats();
}

template <DType kType>
void quantize_row_twice(const RowArgs& row, const RowGrid& grid, const ResidualGrid& residual,
                        uint8_t* u, int64_t u_tile) {
  const Coder code(grid), rest(residual.grid);
  const F32 minus_scale = splat(-residual.scale);
  for_each_vector<kType>(row, [&](uint64_t i, F32 v, auto) {
    uint8_t* const to = code_at(u, i, u_tile);
    const F32 biased = code.biased(v);
    store_bits(to, code.narrowed(biased));
    store_bits(to + kTileDepth, rest(fma(biased - 0x1.8p23f, minus_scale, v)));
  });
}

F32 first(F32 v, int64_t count) {
  for (int64_t lane = count; lane < kLanes; ++lane) v[lane] = 0.0f;
  return v;
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
  v = activate(steps.activation, v) * steps.multiplier;
  if (steps.softcap != 0.0f) v = soft_cap(v, steps.softcap);
  if (steps.other != nullptr) {
    v *= load_operand(steps.operand_type, steps.other, row * steps.ld_other + column, count);
  }
  if (steps.residual != nullptr) {
    v += load_operand(steps.operand_type, steps.residual, row * steps.ld_residual + column, count);
  }
  return v;
}

// One vector of columns of a panel.
struct Columns {
  const std::byte* trailer;  // its part of the strip's
  U32 correction[2];         // zero point of each term * colsum
  int64_t y;                 // bytes from the row's start

  U32 colsum() const { return load_bits<U32>(trailer); }
  F32 scale() const { return load_bits<F32>(trailer + kStripColumns * sizeof(float)); }
  F32 bias() const { return load_bits<F32>(trailer + 2 * kStripColumns * sizeof(float)); }
};

// Row by row, so that whole cache lines of y are written at once.
template <Output kOutput, bool kSteps, int kTerms>
void epilogue(const EpilogueArgs& args) {
  constexpr bool kHalf = kOutput == Output::kBFloat16 || kOutput == Output::kFloat16;
  constexpr int64_t kBytes = kOutput == Output::kInt8 ? 1 : kHalf ? 2 : 4;
  const int vectors = static_cast<int>((args.columns + kLanes - 1) / kLanes);
  const int whole = static_cast<int>(args.columns / kLanes);
  Columns columns[kMaxColumns / kLanes];
  for (int v = 0; v < vectors; ++v) {
    const int64_t offset = v * kLanes, column = args.column + offset;
    columns[v].trailer = args.trailer + offset / kStripColumns * args.strip_stride +
                         offset % kStripColumns * sizeof(float);
    columns[v].y = kOutput == Output::kCode ? column / kTileDepth * args.ldy + column % kTileDepth
                                            : column * kBytes;
  }
  [[maybe_unused]] F32 poison[kMaxRows] = {};  // of each row; NaN once any v * 0 is not 0
  for (int row = args.row; row < args.rows; row += kTerms) {
    // A group of more than one block begins with one; of fewer rows, it never leaves its own.
    const int y_row = row / kTerms;
    char* const y = static_cast<char*>(args.y) +
                    (kOutput == Output::kCode
                         ? y_row / kBlockRows * args.y_block + y_row % kBlockRows * kTileDepth
                         : y_row * args.ldy * kBytes);
    if constexpr (kOutput != Output::kCode) {  // written next, and not to be waited for then
      const int64_t further = (args.rows - args.row) / kTerms * args.ldy * kBytes;
      for (int v = 0; v < vectors; v += 64 / kBytes / kLanes) {
        __builtin_prefetch(y + further + columns[v].y, 1);
      }
    }
    for (int term = 0; term < kTerms; ++term) {
      const int32_t* const zero_point = args.row_zero_point + row + term;
      if (row == args.row || zero_point[0] != zero_point[-kTerms]) {
        for (int v = 0; v < vectors; ++v) {
          columns[v].correction[term] = columns[v].colsum() * static_cast<uint32_t>(*zero_point);
        }
      }
    }
    const auto one = [&](int index, int64_t count) {
      const Columns& at = columns[index];
      const auto sum = [&](int term) {
        const int32_t* const c = args.c + (row + term) * args.ldc + index * kLanes;
        return (I32)(load_bits<U32>(c) - at.correction[term]);
      };
      if constexpr (kOutput == Output::kInt32) {
        store_first(y + at.y, sum(0), count);
      } else {
        F32 v = at.bias();
        for (int term = kTerms - 1; term >= 0; --term) {
          const F32 scale = at.scale() * args.row_scale[row + term];
          v = fma(__builtin_convertvector(sum(term), F32), scale, v);
        }
        if constexpr (kSteps) {
          v = apply(*args.steps, v, y_row, args.column + index * kLanes, count);
        }
        if constexpr (kOutput == Output::kCode) {
          store_first(y + at.y, Coder(args.steps->grid)(v), count);
          poison[y_row] += (count < kLanes ? first(v, count) : v) * 0.0f;
        } else if constexpr (kOutput == Output::kInt8) {
          store_first(y + at.y, Coder({1.0f, -127.0f, 127.0f, 0})(v), count);
        } else {
          store_first(y + at.y, Element<static_cast<DType>(kOutput)>::round(v), count);
        }
      }
    };
    for (int v = 0; v < whole; ++v) one(v, kLanes);
    if (whole < vectors) one(whole, args.columns - whole * kLanes);
  }
  if constexpr (kOutput == Output::kCode) {
    for (int row = args.row / kTerms; row < args.rows / kTerms; ++row) {
      if (!all_zero(poison[row])) store_nan(args.steps->code_scale + row);
    }
  }
}

template <Output kOutput, int kTerms>
void epilogue(const EpilogueArgs& args) {
  args.steps == nullptr ? epilogue<kOutput, false, kTerms>(args)
                        : epilogue<kOutput, true, kTerms>(args);
}

template <Output kOutput>
void epilogue(const EpilogueArgs& args) {
  if constexpr (kOutput == Output::kInt32) {
    epilogue<kOutput, false, 1>(args);
  } else {
    args.terms == 1 ? epilogue<kOutput, 1>(args) : epilogue<kOutput, 2>(args);
  }
}

template <DType kType>
void weight_row(const WeightRow& row, void* y) {
  using Codes = int8_t __attribute__((vector_size(kLanes)));
  const std::byte* const first_group = row.strip + 4 * row.column;
  for (int64_t i = 0; i < row.k; i += kLanes) {  // weights beyond k are there, and zero
    char groups[kLanes];
    for (int64_t group = 0; group < kLanes / 4; ++group) {
      std::memcpy(groups + 4 * group, first_group + (i / 4 + group) * 4 * kStripColumns, 4);
    }
    const int64_t count = row.k - i;
    F32 v = __builtin_convertvector(load_bits<Codes>(groups), F32) * row.scale;
    if (row.inverse_smoothing != nullptr) {
      v *= load_operand(DType::kFloat32, row.inverse_smoothing, i, count);
    }
    store_first(static_cast<char*>(y) + i * Element<kType>::kBytes, Element<kType>::round(v),
                count);
  }
}

template <DType kType>
void multiply_floats(const FloatProductArgs& args) {
  float_product<kType>(args, [&](F32 v, int64_t row, int64_t column, int64_t count) {
    if (args.bias != nullptr) v += load_first(args.bias + column, count);
    if (args.steps != nullptr) v = apply(*args.steps, v, row, column, count);
    return v;
  });
}

template <DType kType, bool kSmooth>
void rotate(const RowArgs& row, int64_t size, float factor, float* out) {
  const RowLoader<kType, kSmooth> load{row};
  const int64_t end = (row.k + size - 1) / size * size;
  F32 v[kTransformVectors];
  int64_t i = 0;
  for (; i + kTransform <= row.k; i += kTransform) {
#pragma GCC unroll 16
    for (int n = 0; n < kTransformVectors; ++n) v[n] = load(i + n * kLanes);
    transform(v, size);
#pragma GCC unroll 16
    for (int n = 0; n < kTransformVectors; ++n) store_bits(out + i + n * kLanes, v[n] * factor);
  }
  if (i < end) {
    for (int n = 0; n < kTransformVectors; ++n) v[n] = load.padded(i + n * kLanes);
    transform(v, size);
    for (int n = 0; i + n * kLanes < end && n < kTransformVectors; ++n) {
      store_bits(out + i + n * kLanes, v[n] * factor);
    }
  }
  transform_further(out, end, size);
}

template <DType kType>
void rotate(const RowArgs& row, int64_t size, float factor, float* out) {
  row.inverse_smoothing == nullptr ? rotate<kType, false>(row, size, factor, out)
                                   : rotate<kType, true>(row, size, factor, out);
}

template <int... kTypes, int... kResults>
constexpr RowKernels make_row_kernels(std::integer_sequence<int, kTypes...>,
                                      std::integer_sequence<int, kResults...>) {
  return {{row_stats<static_cast<DType>(kTypes)>...},
          {quantize_row<static_cast<DType>(kTypes)>...},
          {quantize_measured<static_cast<DType>(kTypes)>...},
          {quantize_row_twice<static_cast<DType>(kTypes)>...},
          {epilogue<static_cast<Output>(kResults)>...},
          count_saturated,
          pack_nk,
          pack_kn,
          {weight_row<static_cast<DType>(kTypes)>...},
          arrange,
          {rotate<static_cast<DType>(kTypes)>...},
          weigh<true>,
          gather_values,
          multiply_keys,
          weigh<false>,
          add_values,
          merge,
          {finish_row<static_cast<DType>(kTypes)>...},
          {multiply_floats<static_cast<DType>(kTypes)>...},
          normalize,
          softmax_row,
          add_scaled,
          rotate_positions,
          add_columns,
          {widen_row<static_cast<DType>(kTypes)>...},
          highest_logit,
          weigh_logits};
}

// The table of one vector width; each kernel_<isa>.cc defines one from it. A function for each type
// by its number, so that none is missing or in another's place.
constexpr RowKernels make_row_kernels() {
  return make_row_kernels(std::make_integer_sequence<int, kDTypes>(),
                          std::make_integer_sequence<int, kOutputs>());
}

}  // namespace
}  // namespace sq_cpu
