// Activation functions on fp32 vectors, for the epilogue. Compiled once per vector width (vec.h).
//
// Only + - * /, fma, integer operations and selects: the same bits on every width. Relative errors,
// measured against double precision on every float of magnitude 2^-15 or more:
//
//               error     holds for        below that
//   relu        0         every x
//   silu        1.8e-7    x >= -88.375     -0; the true value is above -4e-37
//   gelu        3.5e-7    x >= -13.125     -0; the true value is above -2e-38
//   gelu_tanh   1.7e-7    x >= -10         -0; the true value is above -2e-37
//
// Their root mean square is 4e-8 (gelu: 5.4e-8). Only |x| < 2^-125 gives subnormal results; these
// err by up to half the smallest subnormal besides.
// NaN -> NaN, +Inf -> +Inf, -Inf -> -0 (relu: 0), +-0 -> +-0.
#pragma once

#include "vec.h"

namespace sq_cpu {
namespace {

// Adding it to |v| < 2^22 leaves rne(v) in the low bits of the sum.
constexpr float kRoundMagic = 0x1.8p23f;

inline F32 clamp(F32 x, float low, float high) {  // NaN becomes low
  x = x > low ? x : splat(low);
  return x < high ? x : splat(high);
}

// (2^r - 1) / r for |r| <= 0.501: minimax for the relative error of 2^r, 2.0e-9, by Lawson's
// reweighted least squares.
inline F32 exp2_slope(F32 r) {
  F32 p = fma(splat(0x1.41fa9ep-13f), r, splat(0x1.5f400ep-10f));
  p = fma(p, r, splat(0x1.3b2d52p-7f));
  p = fma(p, r, splat(0x1.c6aee6p-5f));
  p = fma(p, r, splat(0x1.ebfbdcp-3f));
  return fma(p, r, splat(0x1.62e430p-1f));
}

// v * 2^n for shifted = n + kRoundMagic; the result must be normal, or n = 0.
inline F32 scale_exp2(F32 v, F32 shifted) {
  return (F32)((U32)v + ((U32)shifted << 23));  // the magic number's own bits are shifted out
}

// 2^(n + r) for shifted = n + kRoundMagic.
inline F32 exp2_split(F32 shifted, F32 r) {
  return scale_exp2(fma(exp2_slope(r), r, splat(1.0f)), shifted);
}

inline F32 relu(F32 x) { return x < 0.0f ? F32{} : x; }

// x / (1 + exp(-x))
inline F32 silu(F32 x) {
  constexpr float kLow = -88.375f, kHigh = 87.0f;  // exp(-x) between 2^-126 and 2^127.5
  constexpr float kScale = -0x1.715476p+0f, kScaleLow = -0x1.4ae0c0p-26f;  // -log2(e) in two parts
  const F32 v = clamp(x, kLow, kHigh);
  const F32 shifted = fma(v, splat(kScale), splat(kRoundMagic));
  const F32 n = shifted - kRoundMagic;
  const F32 r = fma(v, splat(kScaleLow), fma(v, splat(kScale), -n));
  return (x < kLow ? splat(-0.0f) : x) / (1.0f + exp2_split(shifted, r));
}

// x Phi(x), Phi the normal distribution function (torch: approximate="none").
//
// With a = |x| and Phi(-a) = exp(-a^2 / 2) R(a) it is max(x, 0) - a Phi(-a): one form for both
// signs and no cancellation, since a Phi(-a) <= a / 2. R(a) = erfcx(a / sqrt(2)) / 2 is fitted on
// [0, 13.2] by N / D of degrees 4 and 5, all coefficients positive, with R(0) = 1/2 kept: minimax
// for the relative error, 5.1e-9, by Lawson's reweighted least squares of N - R D. Both are scaled
// by 1.875, which rounds best of the few scales tried.
inline F32 gelu(F32 x) {
  constexpr float kHigh = 13.125f;  // keeps exp(-a^2 / 2) and the result normal
  // -log2(e) / 2 in two parts
  constexpr float kScale = -0x1.715476p-1f, kScaleLow = -0x1.4ae0c0p-27f;
  const F32 magnitude = (F32)((U32)x & 0x7fffffffu);
  const F32 a = magnitude < kHigh ? magnitude : splat(kHigh);

  const F32 square = a * a;
  const F32 square_low = fma(a, a, -square);
  const F32 shifted = fma(square, splat(kScale), splat(kRoundMagic));
  const F32 n = shifted - kRoundMagic;
  F32 r = fma(square, splat(kScale), -n);
  r = fma(square, splat(kScaleLow), r);
  r = fma(square_low, splat(kScale), r);

  // Even and odd powers apart: fewer roundings in a row, and the error of a^2 cancels in N / D.
  F32 even = fma(square, splat(0x1.e95c3ap-8f), splat(0x1.5ac378p-2f));
  F32 odd = fma(square, splat(0x1.3137d6p-4f), splat(0x1.a16098p-1f));
  even = fma(even, square, splat(0x1.e00000p-1f));
  const F32 numerator = fma(odd, a, even) * a;
  even = fma(square, splat(0x1.7e903cp-3f), splat(0x1.1dfd04p+1f));
  odd = fma(square, splat(0x1.32a810p-6f), splat(0x1.bc0620p-1f));
  even = fma(even, square, splat(0x1.e00000p+0f));
  odd = fma(odd, square, splat(0x1.902e58p+1f));
  const F32 denominator = fma(odd, a, even);
  const F32 scaled = fma(numerator, exp2_slope(r) * r, numerator);
  const F32 tail = scale_exp2(scaled, shifted) / denominator;
  return (x < 0.0f ? splat(-0.0f) : x) - (magnitude <= kHigh ? tail : F32{});
}

// x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
// (torch: approximate="tanh").
//
// -2 u log2(e) = x q(x^2) with q linear. An error of q is multiplied by x q, up to 126, so q is
// kept in two parts; its constant has 21 bits, which makes kConstant - q exact.
inline F32 gelu_tanh(F32 x) {
  constexpr float kLow = -10.0f;  // exp(-2 u) < 2^126
  constexpr float kConstant = -0x1.26aec0p+1f, kConstantLow = -0x1.0de73ap-22f;
  constexpr float kSlope = -0x1.a5a7d0p-4f, kSlopeLow = 0x1.151aaep-29f;
  const F32 v = clamp(x, kLow, -kLow);
  const F32 square = v * v;
  const F32 square_low = fma(v, v, -square);
  const F32 q = fma(square, splat(kSlope), splat(kConstant));
  F32 q_low = fma(square, splat(kSlopeLow), splat(kConstantLow));
  q_low = fma(square_low, splat(kSlope), q_low);
  q_low += fma(square, splat(kSlope), kConstant - q);

  const F32 shifted = fma(v, q, splat(kRoundMagic));
  const F32 n = shifted - kRoundMagic;
  const F32 r = fma(v, q_low, fma(v, q, -n));
  return (x < kLow ? splat(-0.0f) : x) / (1.0f + exp2_split(shifted, r));
}

// cap tanh(x / cap), to 2^-22 of cap. NaN stays NaN.
inline F32 soft_cap(F32 x, float cap) {
  constexpr float kScale = -0x1.715476p+1f;  // -2 log2(e)
  const F32 magnitude = (F32)((U32)x & 0x7fffffffu);
  const F32 v = clamp(magnitude * (kScale / cap), -126.0f, 0.0f);
  const F32 shifted = v + kRoundMagic;
  const F32 power = exp2_split(shifted, v - (shifted - kRoundMagic));
  const F32 y = cap * ((1.0f - power) / (1.0f + power));
  return x != x ? x : x < 0.0f ? -y : y;
}

}  // namespace
}  // namespace sq_cpu
