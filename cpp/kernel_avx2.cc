// AVX2, in two forms. vpmaddubsw adds two u8 * s8 products in saturating int16: 2 * 255 * 128 does
// not fit, 2 * 127 * 128 does. So the fast form takes 7-bit codes (reduce_range), and the exact
// form widens both sides to int16 first.
#include "rows.h"

namespace sq_cpu {
namespace {

// The empty asm keeps the compiler from regrouping a chain of additions: it would start those of
// several steps at once, and spill.
__m256i add(__m256i sum, __m256i products) {
  sum = _mm256_add_epi32(sum, products);
  asm("" : "+x"(sum));
  return sum;
}

// Calls step(weights, codes) for every four k: 64 bytes of the strip, and the first row's codes;
// rows are kTileDepth apart.
template <typename Step>
void for_each_step(const TileArgs& t, Step step) {
  const uint8_t* u = t.u;
  const std::byte* w = t.strip;
  for (int64_t kb = 0; kb < t.k_blocks; ++kb, u += t.u_tile, w += kTileBytes) {
#pragma GCC unroll 4
    for (int g = 0; g < 16; ++g) step(w + g * 64, u + g * 4);
  }
}

// Four codes of a row, repeated for every column.
int32_t code_quad(const uint8_t* u, int row) { return load_bits<int32_t>(u + row * kTileDepth); }

// Columns 8 half .. 8 half + 7 of c's row.
void put(const TileArgs& t, int row, int half, __m256i sum) {
  int32_t* c = t.c + row * kStripColumns + half * 8;
  store_bits(c, t.accumulate ? _mm256_add_epi32(sum, load_bits<__m256i>(c)) : sum);
}

template <int kRows>
void u7s8(const TileArgs& t) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[kRows][2] = {};
  for_each_step(t, [&](const std::byte* weights, const uint8_t* codes) {
    const auto* w = reinterpret_cast<const __m256i*>(weights);
    const __m256i w0 = _mm256_loadu_si256(w), w1 = _mm256_loadu_si256(w + 1);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const __m256i u = _mm256_set1_epi32(code_quad(codes, row));
      acc[row][0] = add(acc[row][0], _mm256_madd_epi16(_mm256_maddubs_epi16(u, w0), ones));
      acc[row][1] = add(acc[row][1], _mm256_madd_epi16(_mm256_maddubs_epi16(u, w1), ones));
    }
  });
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < 2; ++half) put(t, row, half, acc[row][half]);
  }
}

// The even and the odd bytes of both sides, widened to int16 where they lie: 8 accumulators, 4
// weights, 2 codes and a product are 15 of 16 registers.
template <int kRows>
void u8s8(const TileArgs& t) {
  const __m256i low_bytes = _mm256_set1_epi16(0xff);
  __m256i acc[kRows][2] = {};
  for_each_step(t, [&](const std::byte* weights, const uint8_t* codes) {
    const auto* w = reinterpret_cast<const __m256i*>(weights);
    __m256i even[2], odd[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i bytes = _mm256_loadu_si256(w + half);
      even[half] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
      odd[half] = _mm256_srai_epi16(bytes, 8);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const __m256i u = _mm256_set1_epi32(code_quad(codes, row));
      const __m256i even_u = _mm256_and_si256(u, low_bytes), odd_u = _mm256_srli_epi16(u, 8);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        acc[row][half] = add(acc[row][half], _mm256_madd_epi16(even_u, even[half]));
        acc[row][half] = add(acc[row][half], _mm256_madd_epi16(odd_u, odd[half]));
      }
    }
  });
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < 2; ++half) put(t, row, half, acc[row][half]);
  }
}

// What `put` and the register count above hold for: 16 registers, one strip.
template <typename Block>
constexpr bool kFits = Block::kRows <= 4 && Block::kStrips == 1;

}  // namespace

void u7s8_4x16_avx2(const TileArgs& t) {
  static_assert(kFits<u7s8_4x16_avx2_block>, "the register block does not fit AVX2");
  constexpr void (*kByRows[u7s8_4x16_avx2_block::kRows])(const TileArgs&) = {u7s8<1>, u7s8<2>,
                                                                             u7s8<3>, u7s8<4>};
  kByRows[t.rows - 1](t);
}

void u8s8_4x16_avx2(const TileArgs& t) {
  static_assert(kFits<u8s8_4x16_avx2_block>, "the register block does not fit AVX2");
  constexpr void (*kByRows[u8s8_4x16_avx2_block::kRows])(const TileArgs&) = {u8s8<1>, u8s8<2>,
                                                                             u8s8<3>, u8s8<4>};
  kByRows[t.rows - 1](t);
}

const RowKernels rows_avx2 = make_row_kernels();

}  // namespace sq_cpu
