// The Hadamard transform of fp32 vectors. Compiled once per vector width (vec.h).
//
// Butterflies a + b, a - b at strides 1, 2, 4, ...: an order that no width changes, and so the same
// bits on each.
#pragma once

#include "vec.h"

namespace sq_cpu {
namespace {

constexpr int64_t kTransform = 64;  // elements that are transformed in registers
constexpr int kTransformVectors = static_cast<int>(kTransform) / kLanes;

// a + b in lanes whose index lacks the bit, partner's a - b in the others.
template <int kBit>
F32 butterfly(F32 v) {
  I32 partner;
  F32 sign;
  for (int lane = 0; lane < kLanes; ++lane) {
    partner[lane] = lane ^ kBit;
    sign[lane] = lane & kBit ? -1.0f : 1.0f;
  }
  return fma(v, sign, __builtin_shuffle(v, partner));  // v * sign is exact: one rounding
}

template <int kBit>
[[gnu::always_inline]] inline void butterflies(F32& v, int64_t size) {
  if constexpr (kBit < kLanes) {
    if (kBit >= size) return;
    v = butterfly<kBit>(v);
    butterflies<2 * kBit>(v, size);
  }
}

// Between vectors that are kHalf apart, and then further.
template <int kHalf>
[[gnu::always_inline]] inline void across(F32 (&v)[kTransformVectors], int64_t size) {
  if constexpr (kHalf < kTransformVectors) {
    if (kHalf * kLanes >= size) return;
#pragma GCC unroll 8
    for (int pair = 0; pair < kTransformVectors / 2; ++pair) {
      const int i = pair / kHalf * 2 * kHalf + pair % kHalf;
      const F32 a = v[i], b = v[i + kHalf];
      v[i] = a + b;
      v[i + kHalf] = a - b;
    }
    across<2 * kHalf>(v, size);
  }
}

[[gnu::always_inline]] inline void transform_in_turn(F32 (&v)[kTransformVectors], int64_t size) {
#pragma GCC unroll 16
  for (F32& each : v) butterflies<1>(each, size);
  across<1>(v, size);
}

// Each `size` of 64 elements, a power of two, times the Hadamard matrix of ones and minus ones.
[[gnu::always_inline]] inline void transform(F32 (&v)[kTransformVectors], int64_t size) {
  size < kTransform ? transform_in_turn(v, size) : transform_in_turn(v, kTransform);
}

// The strides from 64 on, of elements in memory whose blocks of 64 are transformed.
inline void transform_further(float* x, int64_t count, int64_t size) {
  for (int64_t half = kTransform; half < size; half *= 2) {
    for (int64_t base = 0; base < count; base += 2 * half) {
      for (int64_t i = base; i < base + half; i += kLanes) {
        const F32 a = load_bits<F32>(x + i), b = load_bits<F32>(x + i + half);
        store_bits(x + i, a + b);
        store_bits(x + i + half, a - b);
      }
    }
  }
}

}  // namespace
}  // namespace sq_cpu
