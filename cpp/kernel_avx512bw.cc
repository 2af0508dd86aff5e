// AVX-512 without VNNI, in two forms, as AVX2 has them: vpmaddubsw for 7-bit codes, whose pair sums
// fit int16, and vpmaddwd for any codes.
#include "avx512.h"
#include "rows.h"

namespace sq_cpu {
namespace {

// The empty asm keeps the compiler from regrouping a chain of additions: it would start those of
// several steps at once, and spill.
__m512i add(__m512i sum, __m512i products) {
  sum = _mm512_add_epi32(sum, products);
  asm("" : "+v"(sum));
  return sum;
}

// 3 instructions for 64 products.
// MR = 6: 24 accumulators + 4 weights + 1 code + the ones + the product = 31 of 32 registers.
struct Vpmaddubsw {
  __m512i operator()(__m512i sum, __m512i codes, __m512i weights) const {
    const __m512i pairs = _mm512_maddubs_epi16(codes, weights);
    return add(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
};

// 4 instructions for 64 products: the even and the odd bytes of both sides, widened to int16 where
// they lie. The compiler widens codes once a row and weights once a step.
// MR = 4: 16 accumulators + 8 weights + 2 codes + the product = 27 of 32 registers.
struct Vpmaddwd {
  __m512i operator()(__m512i sum, __m512i codes, __m512i weights) const {
    const __m512i even_codes = _mm512_maskz_mov_epi8(0x5555555555555555, codes);
    const __m512i odd_codes = _mm512_srli_epi16(codes, 8);
    const __m512i even_weights = _mm512_srai_epi16(_mm512_slli_epi16(weights, 8), 8);
    const __m512i odd_weights = _mm512_srai_epi16(weights, 8);
    sum = add(sum, _mm512_madd_epi16(even_codes, even_weights));
    return add(sum, _mm512_madd_epi16(odd_codes, odd_weights));
  }
};

}  // namespace

void u8s8_4x64_avx512bw(const TileArgs& t) { run_block<Vpmaddwd, u8s8_4x64_avx512bw_block>(t); }

void u7s8_6x64_avx512bw(const TileArgs& t) { run_block<Vpmaddubsw, u7s8_6x64_avx512bw_block>(t); }

const RowKernels rows_avx512bw = make_row_kernels();

}  // namespace sq_cpu
