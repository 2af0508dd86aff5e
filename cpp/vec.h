// One vector type per translation unit: as wide as the flags it is compiled with allow.
// Everything is in an anonymous namespace, so that no two widths are ever merged by the linker.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "sq_cpu/linear.h"

namespace sq_cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using F32 = float __attribute__((vector_size(4 * kLanes)));
using I32 = int32_t __attribute__((vector_size(4 * kLanes)));
using U32 = uint32_t __attribute__((vector_size(4 * kLanes)));
using U16 = uint16_t __attribute__((vector_size(2 * kLanes)));
using U8 = uint8_t __attribute__((vector_size(kLanes)));

template <typename V>
V load_bits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
void store_bits(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// The first `count` elements, or all.
template <typename V>
void store_first(void* y, V value, int64_t count) {
  if (count >= kLanes) return store_bits(y, value);
  std::memcpy(y, &value, count * (sizeof value / kLanes));
}

inline F32 splat(float v) { return v - F32{}; }

inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = std::fma(a[i], b[i], c[i]);
  return a;
#endif
}

// gcc widens in halves of its own accord.
inline U32 widen(U16 v) {
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, U32);
#endif
}

// The low byte of each; gcc goes byte by byte of its own accord.
inline U8 narrow(U32 v) {
#if defined(__AVX512F__)
  return (U8)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
  const __m256i bytes = (__m256i)(v & 0xffu);
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  U8 low;
  const __m128i packed = _mm_packus_epi16(words, words);
  std::memcpy(&low, &packed, sizeof low);
  return low;
#else
  return __builtin_convertvector(v, U8);
#endif
}

// a > b ? a : b and a < b ? a : b, so b where one is NaN; gcc makes two instructions of those.
inline F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return _mm_max_ps(a, b);
#endif
}

inline F32 min(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return _mm_min_ps(a, b);
#endif
}

inline F32 from_half(U16 h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)h);
#else
  const U32 bits = widen(h);
  const U32 sign = (bits & 0x8000u) << 16;
  const U32 magnitude = bits & 0x7fffu;
  const U32 normal = (magnitude << 13) + (112u << 23);   // rebias the exponent: 127 - 15
  const U32 special = (magnitude << 13) | (255u << 23);  // Inf, NaN
  const F32 tiny = __builtin_convertvector(magnitude, F32) * 0x1p-24f;  // subnormal halves
  const U32 finite = magnitude < 0x400u ? (U32)tiny : normal;
  const U32 quiet = magnitude > 0x7c00u ? special | (1u << 22) : special;
  return (F32)((magnitude >= 0x7c00u ? quiet : finite) | sign);
#endif
}

inline U16 to_half(F32 v) {
#if defined(__AVX512F__)
  return (U16)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (U16)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const U32 bits = (U32)v;
  const U32 sign = (bits >> 16) & 0x8000u;
  const U32 magnitude = bits & 0x7fffffffu;
  const U32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Subnormal halves count units of 2^-24; adding 1.5 * 2^23 rounds to a whole number of them.
  const U32 tiny = (U32)((F32)magnitude * 0x1p24f + 0x1.8p23f) - 0x4b400000u;
  const U32 nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const U32 finite = magnitude < 0x38800000u ? tiny : normal;
  const U32 large = magnitude > 0x7f800000u ? nan : U32{} + 0x7c00u;  // from 65520 on: Inf
  return __builtin_convertvector((magnitude >= 0x477ff000u ? large : finite) | sign, U16);
#endif
}

// Loads kLanes elements as fp32; rounds kLanes fp32 once, to nearest even.
template <DType kType>
struct Element;

template <>
struct Element<DType::kFloat32> {
  static constexpr int kBytes = 4;
  static F32 load(const void* p) { return load_bits<F32>(p); }
  static F32 round(F32 v) { return v; }
};

template <>
struct Element<DType::kBFloat16> {
  static constexpr int kBytes = 2;
  static F32 load(const void* p) { return (F32)(widen(load_bits<U16>(p)) << 16); }
  static U16 round(F32 v) {
    const U32 bits = (U32)v;
    const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(v != v ? U32{} + 0x7fc0u : rounded, U16);
  }
};

template <>
struct Element<DType::kFloat16> {
  static constexpr int kBytes = 2;
  static F32 load(const void* p) { return from_half(load_bits<U16>(p)); }
  static U16 round(F32 v) { return to_half(v); }
};

}  // namespace
}  // namespace sq_cpu
