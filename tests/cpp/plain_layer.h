// The layer as linear.h defines it, in plain scalar code, for layers of random arguments.
#pragma once

#include <cmath>
#include <limits>
#include <random>

#include "activations.h"
#include "harness.h"

namespace sq_cpu::testing {
namespace {

// ------------------------------------------------------------------------------- the plain layer

int64_t bytes_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

float read(DType type, const void* p, int64_t i) {
  const auto* bytes = static_cast<const char*>(p) + i * bytes_of(type);
  float v;
  uint16_t half;
  switch (type) {
    case DType::kFloat32:
      std::memcpy(&v, bytes, sizeof v);
      return v;
    case DType::kBFloat16: {
      std::memcpy(&half, bytes, sizeof half);
      const uint32_t bits = uint32_t{half} << 16;
      std::memcpy(&v, &bits, sizeof v);
      return v;
    }
    case DType::kFloat16:
      break;
  }
  _Float16 value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

// The nearest bf16, of two equally near ones the even.
uint16_t nearest_bfloat16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const auto below = static_cast<uint16_t>(bits >> 16);  // towards zero
  if (std::isnan(v)) return below | 0x40;
  if (std::isinf(v)) return below;
  const auto above = static_cast<uint16_t>(below + 1);
  const double low = read(DType::kBFloat16, &below, 0), high = read(DType::kBFloat16, &above, 0);
  const double limit = std::isinf(high) ? std::copysign(0x1p128, v) : high;
  const double to_low = std::fabs(v - low), to_high = std::fabs(limit - v);
  return to_low < to_high || (to_low == to_high && below % 2 == 0) ? below : above;
}

void write(DType type, void* p, int64_t i, float v) {
  auto* bytes = static_cast<char*>(p) + i * bytes_of(type);
  if (type == DType::kFloat32) std::memcpy(bytes, &v, 4);
  if (type == DType::kBFloat16) {
    const uint16_t rounded = nearest_bfloat16(v);
    std::memcpy(bytes, &rounded, 2);
  }
  if (type == DType::kFloat16) {
    const auto rounded = static_cast<_Float16>(v);  // the compiler's conversion
    std::memcpy(bytes, &rounded, 2);
  }
}

// By the functions of activations.h, which test_activations holds against double precision.
float activate_plain(Activation activation, float v) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return relu(splat(v))[0];
    case Activation::kGelu:
      return gelu(splat(v))[0];
    case Activation::kGeluTanh:
      return gelu_tanh(splat(v))[0];
    case Activation::kSilu:
      break;
  }
  return silu(splat(v))[0];
}

struct Grid {
  float scale, inverse;
  int zero_point, low, high;  // low and high without the zero point

  uint8_t code(float v) const {
    const float q = std::nearbyint(v * inverse);
    return static_cast<uint8_t>(zero_point + (q > low ? q < high ? q : high : low));
  }
};

// The grid for values between low and high.
Grid plain_grid(const ActivationQuantizer& q, float low, float high) {
  const int levels = q.max_code(), most = levels / 2;
  if (q.granularity == Granularity::kStatic) {
    const int z = q.zero_point;
    return {q.scale, static_cast<float>(1.0 / q.scale), z, q.symmetric ? -most : -z,
            q.symmetric ? most : levels - z};
  }
  if (q.symmetric) {
    const double absmax = std::max({1e-30, -double{low}, double{high}});
    return {static_cast<float>(absmax / most), static_cast<float>(most / absmax), most + 1, -most,
            most};
  }
  const double range = std::max(1e-30, double{high} - low);
  const int z = static_cast<int>(std::nearbyint(-double{low} * levels / range));
  return {static_cast<float>(range / levels), static_cast<float>(levels / range), z, -z,
          levels - z};
}

// How a row of values lies on a static grid.
RowCounts plain_fit(const ActivationQuantizer& q, const float* x, int64_t count) {
  const Grid grid = plain_grid(q, 0.0f, 0.0f);
  float least = 0.0f, most = 0.0f;  // of the codes, neither clamped nor moved
  bool zeros = true;
  for (int64_t i = 0; i < count; ++i) {
    const float code = std::nearbyint(x[i] * grid.inverse);
    least = std::min(least, code), most = std::max(most, code);
    zeros &= x[i] == 0.0f;
  }
  RowCounts fit;
  fit.rows = 1;
  fit.clipped = least < grid.low || most > grid.high;
  const float whole = static_cast<float>(q.max_code() + 1);
  const bool small = q.symmetric ? std::max(-least, most) < whole / 16 : most - least < whole / 8;
  fit.underflowed = !fit.clipped && !zeros && small;
  return fit;
}

// ---------------------------------------------------------------------------------- random layers

// The arguments of a layer, in guarded memory, and what it must give.
struct Layer {
  int64_t m, n, k, ldx, ldy;
  DType x_type, y_type;
  bool to_codes;  // int8 out instead of y_type
  bool at_end;
  ActivationQuantizer quantizer, y_quantizer;
  Epilogue epilogue;
  const char* x;
  PackedWeight weight;

  RowCounts counts;            // of one call
  std::vector<bool> finite;    // the rows whose codes, zero points and integers mean something
  std::vector<uint8_t> codes;  // [m * terms, depth()]
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  std::vector<int32_t> t;  // [m * terms, n]
  std::vector<float> v;    // [m, n], before the last rounding

  int64_t rows_of_codes() const { return m * quantizer.terms; }
  // Columns of the codes and the weight.
  int64_t depth() const { return quantizer.hadamard == 0 ? k : (k + 63) / 64 * 64; }
};

struct Inputs {
  Guarded x, weight, inverse_smoothing, other, residual;
};

// Ordinary values of many sizes, and rows with every kind of trouble.
float some_value(int64_t row, int64_t column, int64_t special, Rng& rng) {
  const float inf = std::numeric_limits<float>::infinity();
  std::normal_distribution<float> normal;
  const float v = std::ldexp(normal(rng), static_cast<int>(row * 5 % 24) - 12);
  const bool here = column == special;
  switch (row % 9) {
    case 1:
      return 0.0f;
    case 2:
      return here ? std::numeric_limits<float>::quiet_NaN() : v;
    case 3:
      return here ? inf : v;
    case 4:
      return here ? -inf : v;
    case 5:
      return 1e-40f * static_cast<float>(column % 3);
    case 6:
      return here ? 60000.0f : v;
    case 7:
      return std::fabs(v);
  }
  return v;
}

char* place_values(Guarded& memory, DType type, int64_t rows, int64_t columns, int64_t ld,
                   bool trouble, bool at_end, Rng& rng) {
  const int64_t count = rows == 0 ? 0 : (rows - 1) * ld + columns;
  char* p = memory.place_filled<char>(count * bytes_of(type), at_end);
  const int64_t first = trouble ? rng.below(9) : 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t special = rng.below(std::max<int64_t>(columns, 1));
    for (int64_t i = 0; i < columns; ++i) {
      write(type, p, row * ld + i, some_value(trouble ? first + row : 0, i, special, rng));
    }
  }
  return p;
}

ActivationQuantizer random_quantizer(Rng& rng) {
  ActivationQuantizer q;
  q.granularity = static_cast<Granularity>(rng.below(3));
  q.symmetric = rng.coin();
  q.reduce_range = rng.coin();
  q.dynamic_fallback = rng.coin();
  q.scale = std::ldexp(1.0f + rng.below(100) / 100.0f, static_cast<int>(rng.below(10)) - 8);
  q.zero_point =
      static_cast<int32_t>(q.symmetric ? q.max_code() / 2 + 1 : rng.below(q.max_code() + 1));
  return q;
}

void make_weight(Layer& layer, Inputs& in, Rng& rng) {
  const auto [n, k] = std::pair{layer.n, layer.depth()};
  const Problem p = make_problem(layer.m, n, k, 255, Fill::kUniform, rng);
  std::vector<float> scale(n), bias(n);
  for (int64_t i = 0; i < n; ++i) scale[i] = 1e-3f * (1 + rng.below(50));
  for (int64_t i = 0; i < n; ++i) bias[i] = 0.25f * (rng.below(40) - 20);
  const bool with_bias = rng.coin();
  auto* packed = in.weight.place_filled<std::byte>(packed_bytes(n, k), layer.at_end);
  pack_weight(p.w.data(), scale.data(), with_bias ? bias.data() : nullptr, n, k, packed);
  layer.weight = {packed, n, layer.k};
}

// Blocks of 64, times the orthonormal Hadamard matrix.
void rotate_plainly(float* x, int64_t count) {
  for (int64_t half = 1; half < 64; half *= 2) {
    for (int64_t i = 0; i < count; ++i) {
      if (i & half) continue;
      const float a = x[i], b = x[i + half];
      x[i] = a + b;
      x[i + half] = a - b;
    }
  }
  for (int64_t i = 0; i < count; ++i) x[i] *= 0.125f;
}

// What the layer must give, by its definition in linear.h.
void compute_plainly(Layer& layer) {
  const int64_t m = layer.m, n = layer.n, k = layer.depth();
  const ActivationQuantizer& q = layer.quantizer;
  std::vector<float> x(m * k), low(m), high(m);
  layer.finite.assign(m, true);
  float lowest = 0.0f, highest = 0.0f;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < layer.k; ++i) {
      float v = read(layer.x_type, layer.x, row * layer.ldx + i);
      if (q.inverse_smoothing != nullptr) v *= q.inverse_smoothing[i];
      x[row * k + i] = v;
    }
    if (q.hadamard != 0) rotate_plainly(x.data() + row * k, k);
    for (int64_t i = 0; i < k; ++i) {
      const float v = x[row * k + i];
      if (!std::isfinite(v)) layer.finite[row] = false;
      low[row] = std::min(low[row], v), high[row] = std::max(high[row], v);
    }
    if (!layer.finite[row]) {
      low[row] = high[row] = 0.0f;
      continue;
    }
    lowest = std::min(lowest, low[row]), highest = std::max(highest, high[row]);
  }

  const int64_t terms = q.terms;
  Problem p{m * terms,
            n,
            k,
            q.max_code(),
            std::vector<uint8_t>(m * terms * k),
            std::vector<int8_t>(n * k),
            {}};
  std::vector<float> weight_scale(n), bias(n);
  unpack_weight({layer.weight.data, n, k}, p.w.data(), weight_scale.data(), bias.data());
  layer.scale.clear(), layer.v.resize(m * n);
  for (int64_t row = 0; row < m; ++row) {
    const bool shared = q.granularity == Granularity::kPerTensor;
    ActivationQuantizer here = q;
    if (q.granularity == Granularity::kStatic) {
      const RowCounts fit = plain_fit(q, x.data() + row * k, layer.finite[row] ? k : 0);
      layer.counts += fit;
      const bool own = q.dynamic_fallback && fit.clipped + fit.underflowed > 0;
      if (own) here.granularity = Granularity::kPerToken;
    }
    const Grid grid =
        shared ? plain_grid(q, lowest, highest) : plain_grid(here, low[row], high[row]);
    const int most = q.max_code() / 2;
    const double steps = 2.0 * most;
    const Grid rest{static_cast<float>(grid.scale / steps), static_cast<float>(steps / grid.scale),
                    most + 1, -most, most};
    for (int64_t term = 0; term < terms; ++term) {
      const Grid& own = term == 0 ? grid : rest;
      layer.scale.push_back(layer.finite[row] ? own.scale
                                              : std::numeric_limits<float>::quiet_NaN());
      p.zero_point.push_back(layer.finite[row] ? own.zero_point : 0);
    }
    for (int64_t i = 0; layer.finite[row] && i < k; ++i) {
      const float v = x[row * k + i];
      const uint8_t code = grid.code(v);
      p.u[row * terms * k + i] = code;
      if (terms == 1) continue;
      const auto q_of_code = static_cast<float>(code - grid.zero_point);
      p.u[(row * terms + 1) * k + i] = rest.code(std::fma(-grid.scale, q_of_code, v));
    }
  }
  const std::vector<int64_t> t = exact(p);
  layer.t.assign(t.begin(), t.end());
  const Epilogue& e = layer.epilogue;
  for (int64_t i = 0; i < m * n; ++i) {
    const int64_t row = i / n, column = i % n;
    float v = bias[column];
    for (int64_t term = row * terms + terms - 1; term >= row * terms; --term) {
      const float scale = layer.scale[term] * weight_scale[column];
      v = std::fma(static_cast<float>(layer.t[term * n + column]), scale, v);
    }
    v = activate_plain(e.activation, v);
    if (e.other != nullptr) v *= read(e.operand_type, e.other, row * e.ld_other + column);
    if (e.residual != nullptr) v += read(e.operand_type, e.residual, row * e.ld_residual + column);
    layer.v[i] = v;
  }
  layer.codes = p.u;
  layer.zero_point = p.zero_point;
}

// The steps of the epilogue and the type out go through all their combinations as seeds count on.
Layer random_layer(uint64_t seed, Inputs& in, Rng& rng) {
  Layer layer{};
  const bool large = rng.below(8) == 0;
  layer.m = rng.below(large ? 80 : 20);
  layer.n = rng.below(large ? 200 : 70);
  layer.k = rng.below(large ? 300 : 70);
  layer.ldx = layer.k + rng.below(4);
  layer.ldy = layer.n + rng.below(4);
  layer.x_type = static_cast<DType>(rng.below(3));
  layer.at_end = rng.coin();
  layer.quantizer = random_quantizer(rng);
  layer.quantizer.terms = 1 + rng.coin();
  layer.quantizer.hadamard = rng.coin() ? 64 : 0;
  if (rng.coin()) {
    auto* s = in.inverse_smoothing.place<float>(layer.k, layer.at_end);
    for (int64_t i = 0; i < layer.k; ++i) s[i] = std::ldexp(1.0f + i % 7 / 7.0f, i % 5 - 2);
    // Large enough for a finite x to become infinite.
    if (layer.k > 0 && rng.below(8) == 0) s[rng.below(layer.k)] = 3e38f;
    layer.quantizer.inverse_smoothing = s;
  }
  layer.x = place_values(in.x, layer.x_type, layer.m, layer.k, layer.ldx, true, layer.at_end, rng);
  make_weight(layer, in, rng);

  const auto digit = [&seed](uint64_t base) {
    const uint64_t value = seed % base;
    seed /= base;
    return static_cast<int>(value);
  };
  Epilogue& e = layer.epilogue;
  e.activation = static_cast<Activation>(digit(5));
  const int type = digit(4);
  layer.to_codes = type == 3;
  layer.y_type = static_cast<DType>(type % 3);
  const bool other = digit(2), residual = digit(2);
  e.operand_type = static_cast<DType>(digit(3));
  if (other) {
    e.ld_other = layer.n + rng.below(5);
    e.other = place_values(in.other, e.operand_type, layer.m, layer.n, e.ld_other,
                           rng.below(4) == 0, layer.at_end, rng);
  }
  if (residual) {
    e.ld_residual = layer.n + rng.below(5);
    e.residual = place_values(in.residual, e.operand_type, layer.m, layer.n, e.ld_residual,
                              rng.below(4) == 0, layer.at_end, rng);
  }
  layer.y_quantizer = random_quantizer(rng);
  layer.y_quantizer.granularity = Granularity::kStatic;
  compute_plainly(layer);
  return layer;
}

// ------------------------------------------------------------------------------------ comparisons

std::string describe(const Layer& layer) {
  const ActivationQuantizer& q = layer.quantizer;
  const Epilogue& e = layer.epilogue;
  return join("m=", layer.m, " n=", layer.n, " k=", layer.k, " types ",
              static_cast<int>(layer.x_type), " ", layer.to_codes ? 3 : int(layer.y_type),
              " granularity ", static_cast<int>(q.granularity), q.symmetric ? " symmetric" : "",
              q.reduce_range ? " reduced" : "", q.terms == 2 ? " twice" : "",
              q.inverse_smoothing != nullptr ? " smooth" : "",
              q.dynamic_fallback ? " falls back" : "", q.hadamard != 0 ? " rotated" : "",
              " activation ", static_cast<int>(e.activation), e.other ? " other" : "",
              e.residual ? " residual" : "", " operands ", static_cast<int>(e.operand_type));
}

// Whether the rows of `found`, [m, columns], are those of `expected` where these mean something.
template <typename T>
bool rows_are_right(const Layer& layer, const std::vector<T>& expected, const T* found) {
  const int64_t columns = layer.m == 0 ? 0 : static_cast<int64_t>(expected.size()) / layer.m;
  for (int64_t i = 0; i < layer.m * columns; ++i) {
    if (layer.finite[i / columns] && found[i] != expected[i]) return false;
  }
  return true;
}

bool same_counts(const RowCounts& a, const RowCounts& b) {
  return a.rows == b.rows && a.clipped == b.clipped && a.underflowed == b.underflowed &&
         a.chained == b.chained;
}

bool same(float a, float b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

int64_t y_bytes(const Layer& layer) {
  return layer.m == 0 ? 0 : ((layer.m - 1) * layer.ldy + layer.n) * bytes_of(layer.y_type);
}

// Every element of y, and the filler between its rows.
bool y_is_right(const Layer& layer, const char* y) {
  const int64_t size = bytes_of(layer.y_type);
  std::vector<char> expected(y_bytes(layer), Guarded::kFiller);
  for (int64_t i = 0; i < layer.m * layer.n; ++i) {
    const int64_t at = i / layer.n * layer.ldy + i % layer.n;
    write(layer.y_type, expected.data(), at, layer.v[i]);
    const bool nan = std::isnan(layer.v[i]) && std::isnan(read(layer.y_type, y, at));
    if (nan) std::memcpy(&expected[at * size], y + at * size, size);
  }
  return std::equal(expected.begin(), expected.end(), y);
}

bool codes_are_right(const Layer& layer, const QuantizedActivation& y) {
  const Grid grid = plain_grid(layer.y_quantizer, 0.0f, 0.0f);
  const std::vector<uint8_t> codes = gather_codes(y.codes, y.m, y.k);
  for (int64_t row = 0; row < y.m; ++row) {
    const float* v = layer.v.data() + row * y.k;
    const bool finite = std::all_of(v, v + y.k, [](float one) { return std::isfinite(one); });
    if (y.zero_point[row] != grid.zero_point) return false;
    if (!same(y.scale[row], finite ? grid.scale : std::numeric_limits<float>::quiet_NaN())) {
      return false;
    }
    for (int64_t i = 0; finite && i < y.k; ++i) {
      if (codes[row * y.k + i] != grid.code(v[i])) return false;
    }
  }
  return true;
}

QuantizedActivation place_activation(int64_t m, int64_t k, int max_code, Guarded& codes,
                                     Guarded& scale, Guarded& zero_point, bool at_end,
                                     int terms = 1) {
  return {codes.place_filled<uint8_t>(codes_bytes(m, k), at_end),
          scale.place_filled<float>(m, at_end),
          zero_point.place_filled<int32_t>(m, at_end),
          m,
          k,
          max_code,
          terms};
}

}  // namespace
}  // namespace sq_cpu::testing
