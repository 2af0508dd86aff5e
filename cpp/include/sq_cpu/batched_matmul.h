// Batched int8 matmul, the two products of attention: S = Q K^T and O = P V.
//
//   A  [batch, heads, m, k]     s8 (Q) or u8 (P), rows contiguous
//   B  [batch, kv_heads, ...]   s8: [n, k] (K: n keys of k = head_dim) or [k, n] (V: k keys of
//                               n = head_dim), rows contiguous
//   Y  [batch, heads, m, n]     fp32 | bf16 | fp16 | int32 | s8, rows contiguous
//
// Query heads g * heads / kv_heads ... share B's head g (grouped-query attention); heads must be a
// multiple of kv_heads. In integers, exact for every value that s8 and u8 have, -128 included:
//
//   t[i,j] = sum_k a[i,k] * b[j,k]                                                      (int32)
//   v[i,j] = float(t) * (a_scale[i] * (alpha * b_scale[j]))     each product rounded to fp32
//   y[i,j] = v rounded to the type (RNE) | t | clamp(rne(v), -127, 127), where NaN gives -127
//
// torch-int calls these BMM_S8T_S8N_F32T and BMM_S8T_S8N_S8T. P = softmax(S) is u8 with alpha
// 1 / 255, of which no zero point is to be subtracted; a scale per key of V must be multiplied into
// P before P is quantized. The same bits on every ISA and for every thread count.
//
// Any size may be 0 (k = 0 gives zeros) and k at most kMaxDepth. Strides count elements, may
// be 0 or negative for A and B, and are not read where there is one or none to step over. Y must
// overlap neither itself, which its strides are checked for, nor an input. Pointers need no
// alignment beyond their type's.
//
// Runs on the caller's OpenMP threads, alone when called inside a parallel region, and may be
// called from several threads at once. Workspace: up to 2 to 20 MB per thread, kept for the next
// call. Throws std::invalid_argument on bad arguments, std::bad_alloc without memory.
#pragma once

#include <cstdint>

#include "sq_cpu/linear.h"

namespace sq_cpu {

struct BatchedShape {
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t m;
  int64_t n;
  int64_t k;
};

struct BatchedStrides {
  int64_t batch;
  int64_t head;
  int64_t row;
};

struct BatchedLeft {
  const void* data;
  bool is_signed;  // s8, else u8
  BatchedStrides strides;
  const float* scale = nullptr;  // [batch, heads, m]; null: 1
  // u8 only: the largest code there is, 255 or 127. 127 runs faster on AVX2; a larger code is then
  // refused, with Y left unspecified.
  int max_code = 255;
};

struct BatchedRight {
  const int8_t* data;
  bool rows_are_n;  // [n, k], else [k, n]
  BatchedStrides strides;
  const float* scale = nullptr;  // [batch, kv_heads, n]; null: 1
};

enum class BatchedType { kFloat32, kBFloat16, kFloat16, kInt32, kInt8 };

struct BatchedResult {
  void* data;
  BatchedType type;
  BatchedStrides strides;
};

// alpha must be finite; for kInt32 neither it nor the scales are read.
void batched_matmul(const BatchedShape& shape, const BatchedLeft& a, const BatchedRight& b,
                    float alpha, const BatchedResult& y);

}  // namespace sq_cpu
