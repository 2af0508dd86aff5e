// AVX2, in two forms. vpmaddubsw adds two u8 * s8 products in saturating int16: 2 * 255 * 127 does
// not fit, 2 * 127 * 127 does. So the fast form takes 7-bit codes (reduce_range), and the exact
// form widens both sides to int16 first.
#include "rows.h"

namespace sq_cpu {
namespace {

// Four codes of a row for every group of columns, repeated.
int32_t code_quad(const TileArgs& t, int row, int64_t g) {
  return load_bits<int32_t>(t.u + g / 16 * t.u_tile + row * kTileDepth + g % 16 * 4);
}

// Columns 8 half .. 8 half + 7 of c's row.
void put(const TileArgs& t, int row, int half, __m256i sum) {
  int32_t* c = t.c + row * kStripColumns + half * 8;
  store_bits(c, t.accumulate ? _mm256_add_epi32(sum, load_bits<__m256i>(c)) : sum);
}

template <int kRows>
void u7s8(const TileArgs& t) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[kRows][2] = {};
  for (int64_t g = 0; g < t.k_blocks * 16; ++g) {
    const auto* w = reinterpret_cast<const __m256i*>(t.strip + g * 64);
    const __m256i w0 = _mm256_loadu_si256(w), w1 = _mm256_loadu_si256(w + 1);
    for (int row = 0; row < kRows; ++row) {
      const __m256i u = _mm256_set1_epi32(code_quad(t, row, g));
      const __m256i p0 = _mm256_madd_epi16(_mm256_maddubs_epi16(u, w0), ones);
      const __m256i p1 = _mm256_madd_epi16(_mm256_maddubs_epi16(u, w1), ones);
      acc[row][0] = _mm256_add_epi32(acc[row][0], p0);
      acc[row][1] = _mm256_add_epi32(acc[row][1], p1);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < 2; ++half) put(t, row, half, acc[row][half]);
  }
}

template <int kRows>
void u8s8(const TileArgs& t) {
  // acc[row][j] holds two partial sums for each of the columns 4j .. 4j + 3.
  __m256i acc[kRows][4] = {};
  for (int64_t g = 0; g < t.k_blocks * 16; ++g) {
    const auto* w = reinterpret_cast<const __m128i*>(t.strip + g * 64);
    __m256i wide[4];
    for (int j = 0; j < 4; ++j) wide[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128(w + j));
    for (int row = 0; row < kRows; ++row) {
      const __m256i u = _mm256_cvtepu8_epi16(_mm_set1_epi32(code_quad(t, row, g)));
      for (int j = 0; j < 4; ++j) {
        acc[row][j] = _mm256_add_epi32(acc[row][j], _mm256_madd_epi16(u, wide[j]));
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int half = 0; half < 2; ++half) {
      // hadd gives columns 0 1 4 5 | 2 3 6 7 of its eight.
      const __m256i sum = _mm256_hadd_epi32(acc[row][2 * half], acc[row][2 * half + 1]);
      put(t, row, half, _mm256_permute4x64_epi64(sum, _MM_SHUFFLE(3, 1, 2, 0)));
    }
  }
}

}  // namespace

void u7s8_4x16_avx2(const TileArgs& t) {
  constexpr void (*kByRows[])(const TileArgs&) = {u7s8<1>, u7s8<2>, u7s8<3>, u7s8<4>};
  kByRows[t.rows - 1](t);
}

void u8s8_2x16_avx2(const TileArgs& t) {
  constexpr void (*kByRows[])(const TileArgs&) = {u8s8<1>, u8s8<2>};
  kByRows[t.rows - 1](t);
}

const RowKernels rows_avx2 = make_row_kernels();

}  // namespace sq_cpu
