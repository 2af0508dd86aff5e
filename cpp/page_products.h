// Products with the keys and values of a page that are bf16 (attention.h). A lane is a token of a
// key, or a channel of a value, and sums go one after another: the same bits on each vector width.
#pragma once

#include "kernel.h"
#include "layout.h"
#include "vec.h"

namespace sq_cpu {
namespace {

using PageFloat = Element<DType::kBFloat16>;
constexpr int64_t kPageFloatLine = kStripColumns * PageFloat::kBytes;  // bytes
constexpr int kStripVectors = static_cast<int>(kStripColumns) / kLanes;
constexpr int kRowsAtOnce = 4;  // sums that wait for nothing but themselves

// sums[row][token] = q[row] . key[token], channel by channel.
template <int kRows>
void multiply_keys(const KeyProducts& a, int row) {
  const auto* key = static_cast<const char*>(a.keys);
  for (int64_t strip = 0; strip < kPageTokens; strip += kStripColumns) {
    F32 sums[kRows][kStripVectors] = {};
    for (int64_t c = 0; c < a.head_dim; ++c, key += kPageFloatLine) {
      for (int i = 0; i < kStripVectors; ++i) {
        const F32 k = PageFloat::load(key + i * kLanes * PageFloat::kBytes);
        for (int r = 0; r < kRows; ++r) {
          sums[r][i] = fma(splat(a.q[(row + r) * a.ldq + c]), k, sums[r][i]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kStripVectors; ++i) {
        store_bits(a.sums + (row + r) * kPageTokens + strip + i * kLanes, sums[r][i]);
      }
    }
  }
}

inline void multiply_keys(const KeyProducts& a) {
  int row = 0;
  for (; row + kRowsAtOnce <= a.rows; row += kRowsAtOnce) multiply_keys<kRowsAtOnce>(a, row);
  for (; row < a.rows; ++row) multiply_keys<1>(a, row);
}

// o = o * carry + p v, token by token of those that the row sees: what others hold may be NaN.
template <int kVectors>
void add_values(const ValueProducts& a, int row, int64_t column) {
  float* const o = a.o + row * a.ldo + column;
  F32 sums[kVectors];
  for (int i = 0; i < kVectors; ++i) sums[i] = load_bits<F32>(o + i * kLanes) * a.carry[row];
  const auto* const tile =
      static_cast<const char*>(a.values) + column / kStripColumns * kPageTokens * kPageFloatLine;
  for (int64_t token = a.first[row]; token < a.last[row]; ++token) {
    const F32 weight = splat(a.weights[row * kPageTokens + token]);
    for (int i = 0; i < kVectors; ++i) {
      const int64_t lane = i * kLanes;
      const char* const v = tile + (lane / kStripColumns * kPageTokens + token) * kPageFloatLine +
                            lane % kStripColumns * PageFloat::kBytes;
      sums[i] = fma(weight, PageFloat::load(v), sums[i]);
    }
  }
  for (int i = 0; i < kVectors; ++i) store_bits(o + i * kLanes, sums[i]);
}

inline void add_values(const ValueProducts& a) {
  constexpr int64_t kWide = 4 * kStripColumns;
  for (int row = 0; row < a.rows; ++row) {
    int64_t column = 0;
    for (; column + kWide <= a.columns; column += kWide) {
      add_values<4 * kStripVectors>(a, row, column);
    }
    for (; column < a.columns; column += kStripColumns) add_values<kStripVectors>(a, row, column);
  }
}

}  // namespace
}  // namespace sq_cpu
