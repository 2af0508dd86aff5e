// Checks of the operands that the public functions share.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>

#include "check.h"
#include "sq_cpu/linear.h"

namespace sq_cpu {

inline void check_matrix(const char* name, const void* data, int64_t rows, int64_t columns,
                         int64_t ld) {
  SQ_CHECK(rows >= 0, name, " has ", rows, " rows");
  SQ_CHECK(ld >= columns, name, " has rows of ", columns, " elements only ", ld, " apart");
  SQ_CHECK(bounded_product(rows, ld, int64_t{sizeof(float)}) <= kMostBytes, name, " of ", rows,
           " rows, ", ld, " elements apart, is more than any machine has");
  SQ_CHECK(data != nullptr || rows == 0 || columns == 0, name, " is null");
}

inline void check_dtype(const char* name, DType type) {
  SQ_CHECK(is_one_of(type, DType::kFloat16), name, " has the unknown DType ",
           static_cast<int>(type));
}

inline void check_terms(const char* name, int terms) {
  SQ_CHECK(terms == 1 || terms == 2, name, ".terms is ", terms, "; it is 1 or 2");
}

inline void check_weight(const PackedWeight& weight) {
  const int64_t bytes = packed_bytes(weight.n, weight.k);  // checks the shape
  SQ_CHECK(weight.data != nullptr || bytes == 0, "the packed weight is null");
}

inline void check_activation(const char* name, const QuantizedActivation& x) {
  const int64_t bytes = codes_bytes(x.m, x.k);  // checks the shape
  SQ_CHECK(x.codes != nullptr || bytes == 0, name, ".codes is null");
  SQ_CHECK(x.zero_point != nullptr || x.m == 0, name, ".zero_point is null");
  SQ_CHECK(x.max_code == 127 || x.max_code == 255, name, ".max_code is ", x.max_code,
           "; codes reach 127 or 255");
  check_terms(name, x.terms);
  SQ_CHECK(x.m % x.terms == 0, name, " has ", x.m, " rows of codes, which are no pairs");
}

inline void check_product(const QuantizedActivation& x, const PackedWeight& weight) {
  check_weight(weight);
  check_activation("x", x);
  SQ_CHECK(x.k == weight.k, "x has ", x.k, " columns, the weight takes ", weight.k);
}

inline void check_scale(const char* name, const QuantizedActivation& x) {
  SQ_CHECK(x.scale != nullptr || x.m == 0, name, ".scale is null");
}

// So many strides along a dimension of an operand.
struct Steps {
  int64_t stride;
  int64_t count;
};

// Steps that stay within any machine's memory.
template <size_t kSteps>
void check_reach(const char* function, const char* name, const std::array<Steps, kSteps>& steps) {
  for (const auto& [stride, count] : steps) {
    const bool fits = stride >= -kMostBytes && stride <= kMostBytes &&
                      bounded_product(count, std::abs(stride)) <= kMostBytes;
    SQ_CHECK(count <= 1 || fits, function, ": ", count, " strides of ", stride, " in ", name,
             " are more than any machine has");
  }
}

// Rows of `width` elements that do not overlap: each stride clears what the smaller ones reach.
template <size_t kSteps>
void check_apart(const char* function, std::array<Steps, kSteps> steps, int64_t width) {
  std::sort(steps.begin(), steps.end(),
            [](const Steps& a, const Steps& b) { return a.stride < b.stride; });
  for (const auto& [stride, count] : steps) {
    if (count <= 1) continue;
    SQ_CHECK(stride >= width, function, ": y overlaps itself: ", count, " strides of ", stride,
             " over ", width, " elements each");
    width += stride * (count - 1);
  }
}

}  // namespace sq_cpu
