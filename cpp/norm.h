// Norms and rotary embeddings of fp32 rows (program.h defines them). Compiled once per vector width
// (vec.h), with the same bits on each: sums go through 32 virtual lanes and a fixed tree.
#pragma once

#include "activations.h"
#include "kernel.h"
#include "softmax.h"
#include "vec.h"

namespace sq_cpu {
namespace {

inline F32 load_first(const float* p, int64_t count) {
  if (count >= kLanes) return load_bits<F32>(p);
  F32 v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

// The sum of f(i, values, how many count) over a row, whose values are 0 beyond it.
template <typename Function>
float sum_row(const float* x, int64_t k, Function f) {
  constexpr int kParts = kVirtualLanes / kLanes;
  F32 sums[2][kParts] = {};
  int part = 0;
  for (int64_t i = 0; i < k; i += kLanes) {
    F32& sum = sums[part / kParts][part % kParts];
    sum = f(load_first(x + i, k - i), k - i, sum);
    part = (part + 1) % (2 * kParts);
  }
  for (int i = 0; i < kParts; ++i) sums[0][i] += sums[1][i];
  return tree_sum(sums[0]);
}

inline F32 zero_beyond(F32 v, int64_t count) {
  for (int64_t lane = count; lane < kLanes; ++lane) v[lane] = 0.0f;
  return v;
}

inline void normalize(const NormArgs& a) {
  const float n = static_cast<float>(a.k);
  float mean = 0.0f;
  if (a.centred) mean = sum_row(a.x, a.k, [](F32 v, int64_t, F32 sum) { return sum + v; }) / n;
  const float squares = sum_row(a.x, a.k, [&](F32 v, int64_t count, F32 sum) {
    v -= mean;
    if (a.centred && count < kLanes) v = zero_beyond(v, count);
    return fma(v, v, sum);
  });
  const float r = 1.0f / __builtin_sqrtf(squares / n + a.eps);
  for (int64_t i = 0; i < a.k; i += kLanes) {
    const int64_t count = a.k - i;
    F32 v = (load_first(a.x + i, count) - mean) * r;
    if (a.weight != nullptr) v *= load_first(a.weight + i, count);
    if (a.bias != nullptr) v += load_first(a.bias + i, count);
    if (a.sum) v += load_first(a.y + i, count);
    store_first(a.y + i, v, count);
  }
}

// Weights that sum to 1; each is finite and at least 0, whatever x holds.
inline void softmax_row(const float* x, int64_t n, float* p) {
  F32 most = splat(kHidden);
  for (int64_t i = 0; i < n; i += kLanes) {
    F32 v = load_first(x + i, n - i);
    for (int64_t lane = n - i; lane < kLanes; ++lane) v[lane] = kHidden;
    most = max(v, most);
  }
  const float highest = highest_lane(most);
  for (int64_t i = 0; i < n; i += kLanes) {
    store_first(p + i, exp_of_minus(highest - load_first(x + i, n - i)), n - i);
  }
  const float sum = sum_row(p, n, [](F32 v, int64_t, F32 total) { return total + v; });
  for (int64_t i = 0; i < n; i += kLanes) {
    store_first(p + i, load_first(p + i, n - i) / sum, n - i);
  }
}

// y += weight * x, or sigmoid(weight) * x
inline void add_scaled(const float* x, int64_t n, float weight, bool gate, float* y) {
  const F32 factor = gate ? sigmoid(splat(weight)) : splat(weight);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 v = fma(load_first(x + i, n - i), factor, load_first(y + i, n - i));
    store_first(y + i, v, n - i);
  }
}

inline F32 swap_pairs(F32 v) {
  I32 partner;
  for (int lane = 0; lane < kLanes; ++lane) partner[lane] = lane ^ 1;
  return __builtin_shuffle(v, partner);
}

inline void rotate_positions(const RopeArgs& a) {
  const float* const cos = a.table;
  const float* const sin = a.table + a.rotated;
  if (a.interleaved) {
    for (int64_t i = 0; i < a.rotated; i += kLanes) {
      const int64_t count = a.rotated - i;
      const F32 x = load_first(a.x + i, count);
      const F32 y = x * load_first(cos + i, count) + swap_pairs(x) * load_first(sin + i, count);
      store_first(a.y + i, y, count);
    }
  } else {
    const int64_t half = a.rotated / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t count = half - i;
      const F32 low = load_first(a.x + i, count), high = load_first(a.x + half + i, count);
      store_first(a.y + i, low * load_first(cos + i, count) + high * load_first(sin + i, count),
                  count);
      store_first(
          a.y + half + i,
          high * load_first(cos + half + i, count) + low * load_first(sin + half + i, count),
          count);
    }
  }
  std::memmove(a.y + a.rotated, a.x + a.rotated, (a.k - a.rotated) * sizeof(float));
}

// y[n] = sum of x[c] * w[c, n] over the columns c, added to y or not.
inline void add_columns(const ColumnArgs& a) {
  for (int64_t i = 0; i < a.n; i += kLanes) {
    const int64_t count = a.n - i;
    F32 v = a.accumulate ? load_first(a.y + i, count) : F32{};
    for (int64_t c = 0; c < a.count; ++c) {
      v = fma(load_first(a.weight + c * a.ldw + i, count), splat(a.x[a.columns[c]]), v);
    }
    store_first(a.y + i, v, count);
  }
}

template <DType kType>
void widen_row(const void* x, int64_t k, float multiplier, float* y) {
  using E = Element<kType>;
  for (int64_t i = 0; i < k; i += kLanes) {
    const auto* p = static_cast<const char*>(x) + i * E::kBytes;
    char tail[kLanes * E::kBytes] = {};
    if (k - i < kLanes) {
      std::memcpy(tail, p, (k - i) * E::kBytes);
      p = tail;
    }
    store_first(y + i, E::load(p) * multiplier, k - i);
  }
}

}  // namespace
}  // namespace sq_cpu
