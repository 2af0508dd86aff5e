// The AVX-512 register block, MR rows x NV strips of 16 columns, for any instruction sequence that
// adds four products to each of 16 int32 sums.
//
// MR = 6, NV = 4 fills the register file: 24 accumulators + 4 weights + 1 activation = 29 of 32.
// Each step of four k then needs 10 loads for 24 products of 64 bytes; with VPDPBUSD on two ports
// that is 12 cycles, so arithmetic alone binds.
#pragma once

#include <utility>

#include "kernel.h"
#include "vec.h"

namespace sq_cpu {
namespace {

// VPDPBUSD takes 5 cycles and two start in each: fewer than 10 independent sums leave ports idle,
// so small blocks split k over several sets of accumulators.
constexpr int accumulator_sets(int sums) { return sums >= 10 ? 1 : sums >= 5 ? 2 : 4; }

// One row reads the weights as fast as memory gives them: strip after strip, a single stream that
// the processor's own prefetch sees, too, and far enough ahead of it to cover an access.
constexpr int64_t kPrefetchBytes = 4096;

template <typename Dot>
void stream_row(const TileArgs& t) {
  constexpr int kSets = accumulator_sets(1);
  const Dot dot;
  for (int64_t s = 0; s < t.strips; ++s) {
    __m512i acc[kSets] = {};
    const uint8_t* u = t.u;
    const std::byte* w = t.strip + s * t.strip_stride;
    for (int64_t kb = 0; kb < t.k_blocks; ++kb, u += t.u_tile, w += kTileBytes) {
#pragma GCC unroll 16
      for (int g = 0; g < 16; ++g) {
        const __m512i codes = _mm512_set1_epi32(load_bits<int32_t>(u + g * 4));
        acc[g % kSets] = dot(acc[g % kSets], codes, _mm512_loadu_si512(w + g * 64));
        _mm_prefetch(reinterpret_cast<const char*>(w + g * 64 + kPrefetchBytes), _MM_HINT_T1);
      }
    }
    __m512i sum = acc[0];
    for (int set = 1; set < kSets; ++set) sum = _mm512_add_epi32(sum, acc[set]);
    int32_t* c = t.c + s * kStripColumns;
    if (t.accumulate) sum = _mm512_add_epi32(sum, _mm512_loadu_si512(c));
    store_bits(c, sum);
  }
}

// A few rows wait for memory, too. Their strips are asked for by the panel before; long ones leave
// L2 until they are read, and are asked for again.
constexpr int kFewRows = 4;
constexpr int64_t kAgainBytes = 2048;
constexpr int64_t kLongStrip = 32 << 10;

// Dot: __m512i operator()(__m512i sum, __m512i codes, __m512i weights).
template <typename Dot, int kRows, int kStrips>
void register_block(const TileArgs& t) {
  constexpr int kSets = accumulator_sets(kRows * kStrips);
  const Dot dot;
  __m512i acc[kSets][kRows][kStrips] = {};
  const uint8_t* u = t.u;
  const std::byte* w[kStrips];
  for (int s = 0; s < kStrips; ++s) w[s] = t.strip + s * t.strip_stride;
  const std::byte* next = t.prefetch;
  const int64_t again = t.k_blocks * kTileBytes > kLongStrip ? kAgainBytes : 0;
  for (int64_t kb = 0; kb < t.k_blocks; ++kb) {
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
      for (int line = 0; line < t.prefetch_lines; ++line, next += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
      }
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) {
        const int g = quarter * 4 + step;
        __m512i weights[kStrips];
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) {
          weights[s] = _mm512_loadu_si512(w[s] + g * 64);
          if constexpr (kRows <= kFewRows) {
            _mm_prefetch(reinterpret_cast<const char*>(w[s] + g * 64 + again), _MM_HINT_T0);
          }
        }
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) {
          const __m512i codes = _mm512_set1_epi32(load_bits<int32_t>(u + row * kTileDepth + g * 4));
#pragma GCC unroll 4
          for (int s = 0; s < kStrips; ++s) {
            __m512i& sum = acc[step % kSets][row][s];
            sum = dot(sum, codes, weights[s]);
          }
        }
      }
    }
    // The next group's codes, from L2: mostly the rows that follow in the block.
#pragma GCC unroll 6
    for (int row = kRows; row < 2 * kRows; ++row) {
      _mm_prefetch(reinterpret_cast<const char*>(u + row * kTileDepth), _MM_HINT_T0);
    }
    u += t.u_tile;
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) w[s] += kTileBytes;
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) {
      __m512i sum = acc[0][row][s];
      for (int set = 1; set < kSets; ++set) sum = _mm512_add_epi32(sum, acc[set][row][s]);
      int32_t* c = t.c + (row * kStrips + s) * kStripColumns;
      if (t.accumulate) sum = _mm512_add_epi32(sum, _mm512_loadu_si512(c));
      store_bits(c, sum);
    }
  }
}

constexpr int kWidestBlock = 4;  // strips

template <typename Dot, int kRows>
constexpr void (*kByStrips[kWidestBlock])(const TileArgs&) = {
    register_block<Dot, kRows, 1>, register_block<Dot, kRows, 2>, register_block<Dot, kRows, 3>,
    register_block<Dot, kRows, 4>};

template <typename Dot, int kRows>
void run_strips(const TileArgs& t) {
  kByStrips<Dot, kRows>[t.strips - 1](t);
}

template <typename Dot, int... kMoreRows>
void run_rows(const TileArgs& t, std::integer_sequence<int, kMoreRows...>) {
  constexpr void (*kBlocks[])(const TileArgs&) = {stream_row<Dot>,
                                                  run_strips<Dot, kMoreRows + 2>...};
  kBlocks[t.rows - 1](t);
}

// Block: the RegisterBlock of the table, whose sums must fit the register file beside what Dot
// needs.
template <typename Dot, typename Block>
void run_block(const TileArgs& t) {
  static_assert(Block::kStrips <= kWidestBlock, "kByStrips has no block so wide");
  static_assert(Block::kRows * Block::kStrips <= 24, "the sums leave no registers of 32");
  run_rows<Dot>(t, std::make_integer_sequence<int, Block::kRows - 1>());
}

}  // namespace
}  // namespace sq_cpu
