// Products of fp32 rows with a weight in float, row by row of it as torch stores it. Compiled once
// per vector width (vec.h), with the same bits on each: a sum goes through 16 virtual lanes and a
// fixed tree, whatever rows and columns are computed beside it.
#pragma once

#include "kernel.h"
#include "norm.h"
#include "softmax.h"
#include "vec.h"

namespace sq_cpu {
namespace {

constexpr int kDotParts = kVirtualLanes / kLanes;
// Rows and columns whose sums are in registers: 24 of 32 with AVX-512, 12 of 16 below.
constexpr int kDotRows = kLanes == 16 ? 6 : 3;
constexpr int kDotColumns = kLanes == 16 ? 4 : 2;
constexpr int kDotsOfOneRow = 4;  // columns, where there is one row: as many streams of memory

template <DType kType>
F32 load_weights(const char* w, int64_t count) {
  using E = Element<kType>;
  if (count >= kLanes) return E::load(w);
  char padded[kLanes * E::kBytes] = {};
  std::memcpy(padded, w, count * E::kBytes);
  return E::load(padded);
}

// sums[r * kStripColumns + c], of kRows rows and kColumns columns.
template <DType kType, int kRows, int kColumns>
void dots(const FloatProductArgs& a, int64_t row, int64_t column, float* sums) {
  constexpr int kBytes = Element<kType>::kBytes;
  const float* const x = a.x + row * a.ldx;
  const char* const w = static_cast<const char*>(a.weight) + column * a.k * kBytes;
  F32 sum[kRows][kColumns][kDotParts] = {};
  const auto add = [&](int64_t i, int part, int64_t count) {
    F32 weights[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      weights[c] = load_weights<kType>(w + (c * a.k + i) * kBytes, count);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const F32 v = load_first(x + r * a.ldx + i, count);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sum[r][c][part] = fma(v, weights[c], sum[r][c][part]);
    }
  };
  int64_t i = 0;
  for (; i + kVirtualLanes <= a.k; i += kVirtualLanes) {
#pragma GCC unroll 4
    for (int part = 0; part < kDotParts; ++part) add(i + part * kLanes, part, kLanes);
  }
#pragma GCC unroll 4
  for (int part = 0; part < kDotParts; ++part) {
    const int64_t at = i + part * kLanes;
    if (at < a.k) add(at, part, a.k - at);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sums[r * kStripColumns + c] = tree_sum(sum[r][c]);
  }
}

// `columns` of up to kStripColumns.
template <DType kType, int kRows>
void dot_columns(const FloatProductArgs& a, int64_t row, int64_t column, int64_t columns,
                 float* sums) {
  constexpr int kColumns = kRows == 1 ? kDotsOfOneRow : kDotColumns;
  int64_t c = 0;
  for (; c + kColumns <= columns; c += kColumns) {
    dots<kType, kRows, kColumns>(a, row, column + c, sums + c);
  }
  for (; c < columns; ++c) dots<kType, kRows, 1>(a, row, column + c, sums + c);
}

template <DType kType, int kRows>
void dot_rows(const FloatProductArgs& a, int64_t row, int rows, int64_t column, int64_t columns,
              float* sums) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return dot_rows<kType, kRows - 1>(a, row, rows, column, columns, sums);
  }
  dot_columns<kType, kRows>(a, row, column, columns, sums);
}

// finish(sums, row, column, how many) makes of a vector of sums what is stored.
template <DType kType, typename Finish>
void float_product(const FloatProductArgs& a, Finish finish) {
  float sums[kDotRows * kStripColumns];
  for (int64_t row = 0; row < a.rows; row += kDotRows) {
    const int rows = static_cast<int>(a.rows - row < kDotRows ? a.rows - row : kDotRows);
    for (int64_t column = 0; column < a.columns; column += kStripColumns) {
      const int64_t left = a.columns - column;
      const int64_t columns = left < kStripColumns ? left : kStripColumns;
      dot_rows<kType, kDotRows>(a, row, rows, column, columns, sums);
      for (int r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; c += kLanes) {
          const F32 v = load_first(sums + r * kStripColumns + c, columns - c);
          store_first(a.y + (row + r) * a.ldy + column + c,
                      finish(v, row + r, column + c, columns - c), columns - c);
        }
      }
    }
  }
}

}  // namespace
}  // namespace sq_cpu
