// AVX512-VNNI: a register block of MR rows x NV strips of 16 columns.
//
// MR = 6, NV = 4 fills the register file: 24 accumulators + 4 weights + 1 activation = 29 of 32,
// and needs 10 loads for 24 VPDPBUSD (12 cycles on two ports), so it is bound by arithmetic alone.
#include "rows.h"

namespace sq_cpu {
namespace {

// VPDPBUSD takes 5 cycles and two start in each: fewer than 10 independent sums leave ports idle,
// so small blocks split k over several sets of accumulators.
constexpr int accumulator_sets(int sums) { return sums >= 10 ? 1 : sums >= 5 ? 2 : 4; }

// Far enough ahead to cover a memory access at one core's bandwidth: 15 GB/s * 100 ns.
constexpr int64_t kPrefetchBytes = 2048;

template <int kRows, int kStrips>
void block(const TileArgs& t) {
  constexpr int kSets = accumulator_sets(kRows * kStrips);
  __m512i acc[kSets][kRows][kStrips] = {};
  const uint8_t* u = t.u;
  const std::byte* w = t.strip;
  for (int64_t kb = 0; kb < t.k_blocks; ++kb, u += kTileDepth, w += kTileBytes) {
#pragma GCC unroll 4
    for (int g = 0; g < 16; ++g) {
      __m512i weights[kStrips];
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) {
        const std::byte* p = w + s * t.strip_stride + g * 64;
        weights[s] = _mm512_loadu_si512(p);
        if constexpr (kRows <= 4) {
          _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes), _MM_HINT_T0);
        }
      }
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
        const __m512i codes = _mm512_set1_epi32(load_bits<int32_t>(u + row * t.ldu + g * 4));
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) {
          __m512i& sum = acc[g % kSets][row][s];
          sum = _mm512_dpbusd_epi32(sum, codes, weights[s]);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) {
      __m512i sum = acc[0][row][s];
      for (int set = 1; set < kSets; ++set) sum = _mm512_add_epi32(sum, acc[set][row][s]);
      store_bits(t.c + (row * kStrips + s) * kStripColumns, sum);
    }
  }
}

using Block = void (*)(const TileArgs&);

template <int kRows>
constexpr Block kByStrips[] = {block<kRows, 1>, block<kRows, 2>, block<kRows, 3>, block<kRows, 4>};

}  // namespace

void u8s8_6x64_avx512_vnni(const TileArgs& t) {
  constexpr const Block* kBlocks[] = {kByStrips<1>, kByStrips<2>, kByStrips<3>,
                                      kByStrips<4>, kByStrips<5>, kByStrips<6>};
  kBlocks[t.rows - 1][t.strips - 1](t);
}

const RowKernels rows_avx512_vnni = make_row_kernels();

}  // namespace sq_cpu
