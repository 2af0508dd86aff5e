// Weights and the right operands of batched_matmul() into strips, rows of its left operands into
// blocks of codes (linear.h draws both). Compiled once per vector width.
#pragma once

#include "kernel.h"
#include "vec.h"

namespace sq_cpu {
namespace {

#if defined(__AVX512F__)
using Bits = __m512i;
#define SQ_WIDE(name) _mm512_##name
#elif defined(__AVX2__)
using Bits = __m256i;
#define SQ_WIDE(name) _mm256_##name
#else
using Bits = __m128i;
#define SQ_WIDE(name) _mm_##name
#endif

inline __m128i load16(const void* p) { return load_bits<__m128i>(p); }

// 16 bytes from each of kLanes / 4 places `step` bytes apart.
inline Bits load16s(const int8_t* p, [[maybe_unused]] int64_t step) {
#if defined(__AVX512F__)
  __m512i v = _mm512_castsi128_si512(load16(p));
  v = _mm512_inserti32x4(v, load16(p + step), 1);
  v = _mm512_inserti32x4(v, load16(p + 2 * step), 2);
  return _mm512_inserti32x4(v, load16(p + 3 * step), 3);
#elif defined(__AVX2__)
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p)), load16(p + step), 1);
#else
  return load16(p);
#endif
}

// A tile from 16 rows of 64 bytes: a transpose of its 16 x 16 groups of four bytes. Loading 16
// bytes per 128-bit lane leaves 4 x 4 transposes within the lanes.
inline void transpose_tile(const int8_t* w, int64_t ld, std::byte* tile) {
  for (int column = 0; column < kStripColumns; column += kLanes) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int8_t* p = w + column * ld + 16 * quarter;
      const Bits r0 = load16s(p, 4 * ld), r1 = load16s(p + ld, 4 * ld);
      const Bits r2 = load16s(p + 2 * ld, 4 * ld), r3 = load16s(p + 3 * ld, 4 * ld);
      const Bits low01 = SQ_WIDE(unpacklo_epi32)(r0, r1), low23 = SQ_WIDE(unpacklo_epi32)(r2, r3);
      const Bits high01 = SQ_WIDE(unpackhi_epi32)(r0, r1), high23 = SQ_WIDE(unpackhi_epi32)(r2, r3);
      std::byte* out = tile + 256 * quarter + 4 * column;
      store_bits(out, SQ_WIDE(unpacklo_epi64)(low01, low23));
      store_bits(out + 64, SQ_WIDE(unpackhi_epi64)(low01, low23));
      store_bits(out + 128, SQ_WIDE(unpacklo_epi64)(high01, high23));
      store_bits(out + 192, SQ_WIDE(unpackhi_epi64)(high01, high23));
    }
  }
}

// A tile row from four rows of 16 bytes: byte 4c + i is byte c of row i.
inline void interleave(const int8_t* w, int64_t ld, std::byte* out) {
  const __m128i r0 = load16(w), r1 = load16(w + ld);
  const __m128i r2 = load16(w + 2 * ld), r3 = load16(w + 3 * ld);
  const __m128i low01 = _mm_unpacklo_epi8(r0, r1), high01 = _mm_unpackhi_epi8(r0, r1);
  const __m128i low23 = _mm_unpacklo_epi8(r2, r3), high23 = _mm_unpackhi_epi8(r2, r3);
  store_bits(out, _mm_unpacklo_epi16(low01, low23));
  store_bits(out + 16, _mm_unpackhi_epi16(low01, low23));
  store_bits(out + 32, _mm_unpacklo_epi16(high01, high23));
  store_bits(out + 48, _mm_unpackhi_epi16(high01, high23));
}

// The sums of adjacent pairs of s8, int16.
inline Bits pair_sums(Bits v) {
#if defined(__AVX2__)
  return SQ_WIDE(maddubs_epi16)(SQ_WIDE(set1_epi8)(1), v);
#else
  return _mm_add_epi16(_mm_srai_epi16(_mm_slli_epi16(v, 8), 8), _mm_srai_epi16(v, 8));
#endif
}

// Fills the column sums of a packed strip's trailer.
inline void sum_columns(std::byte* strip, int64_t k_blocks, bool wanted) {
  std::byte* sums = strip + k_blocks * kTileBytes;
  for (int column = 0; column < kStripColumns; column += kLanes) {
    I32 total = {};
    for (int64_t b = 0; b < (wanted ? k_blocks : 0); ++b) {
      Bits pairs = {};  // int16 holds a tile's: 32 values of at most 128
      for (int g = 0; g < 16; ++g) {
        const Bits v = load_bits<Bits>(strip + b * kTileBytes + 64 * g + 4 * column);
        pairs = SQ_WIDE(add_epi16)(pairs, pair_sums(v));
      }
      total += (I32)SQ_WIDE(madd_epi16)(pairs, SQ_WIDE(set1_epi16)(1));
    }
    store_bits(sums + 4 * column, total);
  }
}

// A corner of w, padded with zeros to `kRows` x `kColumns`; no byte beyond the corner is read.
template <int kRows, int kColumns>
struct Padded {
  Padded(const int8_t* w, int64_t ld, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; ++row)
      std::memcpy(bytes + row * kColumns, w + row * ld, columns);
  }
  int8_t bytes[kRows * kColumns] = {};
};

inline int64_t at_most(int64_t count, int64_t most) {
  return count < 0 ? 0 : count < most ? count : most;
}

inline void pack_nk(const StripArgs& a) {
  const int64_t k_blocks = (a.k + kTileDepth - 1) / kTileDepth;
  std::byte* strip = a.packed;
  for (int64_t n0 = 0; n0 < a.n; n0 += kStripColumns) {
    const int64_t columns = at_most(a.n - n0, kStripColumns);
    for (int64_t b = 0; b < k_blocks; ++b) {
      const int8_t* w = a.w + n0 * a.ld + b * kTileDepth;
      const int64_t depth = at_most(a.k - b * kTileDepth, kTileDepth);
      if (columns == kStripColumns && depth == kTileDepth) {
        transpose_tile(w, a.ld, strip + b * kTileBytes);
      } else {
        const Padded<kStripColumns, kTileDepth> padded(w, a.ld, columns, depth);
        transpose_tile(padded.bytes, kTileDepth, strip + b * kTileBytes);
      }
    }
    sum_columns(strip, k_blocks, a.column_sums);
    strip += k_blocks * kTileBytes + kTrailerBytes;
  }
}

// Four rows of w at a time through all strips: a cache line of w holds columns of several.
inline void pack_kn(const StripArgs& a) {
  const int64_t k_blocks = (a.k + kTileDepth - 1) / kTileDepth;
  const int64_t stride = k_blocks * kTileBytes + kTrailerBytes;
  for (int64_t g = 0; g < k_blocks * 16; ++g) {
    const int64_t depth = at_most(a.k - 4 * g, 4);
    const int8_t* w = depth > 0 ? a.w + 4 * g * a.ld : a.w;
    std::byte* out = a.packed + 64 * g;
    for (int64_t n0 = 0; n0 < a.n; n0 += kStripColumns, out += stride) {
      const int64_t columns = at_most(a.n - n0, kStripColumns);
      if (columns == kStripColumns && depth == 4) {
        interleave(w + n0, a.ld, out);
      } else {
        const Padded<4, kStripColumns> padded(w + n0, a.ld, depth, columns);
        interleave(padded.bytes, kStripColumns, out);
      }
    }
  }
  std::byte* strip = a.packed;
  for (int64_t n0 = 0; n0 < a.n; n0 += kStripColumns, strip += stride) {
    sum_columns(strip, k_blocks, a.column_sums);
  }
}

inline uint64_t arrange(const void* x, int64_t k, uint8_t flip, uint8_t* u, int64_t u_tile) {
  const Bits flips = SQ_WIDE(set1_epi8)(static_cast<char>(flip));
  const auto* from = static_cast<const uint8_t*>(x);
  Bits all = {};
  for (int64_t i = 0; i < k; i += kTileDepth, from += kTileDepth, u += u_tile) {
    uint8_t tail[kTileDepth];
    const uint8_t* p = from;
    if (k - i < kTileDepth) {
      std::memset(tail, flip, sizeof tail);
      std::memcpy(tail, from, k - i);
      p = tail;
    }
    for (size_t j = 0; j < kTileDepth; j += sizeof(Bits)) {
      const Bits codes = load_bits<Bits>(p + j) ^ flips;
      all |= codes;
      store_bits(u + j, codes);
    }
  }
  uint64_t words[sizeof all / sizeof(uint64_t)], bits = 0;
  std::memcpy(words, &all, sizeof all);
  for (const uint64_t word : words) bits |= word;
  return bits;
}

#undef SQ_WIDE

}  // namespace
}  // namespace sq_cpu
