// The pair sums of vpmaddubsw that leave int16 (sq_cpu/saturation.h), for the vector width of the
// file that includes this.
#pragma once

#include "kernel.h"
#include "vec.h"

namespace sq_cpu {
namespace {

// A pair per lane: its first byte is the low one.
using Pairs = uint16_t __attribute__((vector_size(4 * kLanes)));
using SignedPairs = int16_t __attribute__((vector_size(4 * kLanes)));

// Each product fits int16 (255 * 128 = 32640), so the sum of two left int16 where it wrapped: where
// its sign is neither's. A lane counts at most once a group of four k, 65793 / 4 times.
template <int kRows>
int64_t count_rows(const PairArgs& t) {
  constexpr int kParts = 16 / kLanes;  // vectors to a tile row
  int64_t total = 0;
  for (int part = 0; part < kParts; ++part) {
    Pairs count[kRows] = {};
    for (int64_t g = 0; g < t.k_blocks * 16; ++g) {
      const auto w = load_bits<SignedPairs>(t.strip + g * 64 + part * 4 * kLanes);
      const Pairs even = (Pairs)((SignedPairs)((Pairs)w << 8) >> 8), odd = (Pairs)(w >> 8);
      const uint8_t* u = t.u + g / 16 * t.u_tile + g % 16 * 4;
      for (int row = 0; row < kRows; ++row) {
        const auto codes = (Pairs)(U32{} + load_bits<uint32_t>(u + row * kTileDepth));
        const Pairs first = (codes & 0xff) * even, second = (codes >> 8) * odd;
        const Pairs sum = first + second;
        count[row] += ((first ^ sum) & (second ^ sum)) >> 15;
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int lane = 0; lane < 2 * kLanes; ++lane) total += count[row][lane];
    }
  }
  return total;
}

int64_t count_saturated(const PairArgs& args) {
  PairArgs t = args;
  int64_t total = 0;
  for (; t.rows >= 4; t.rows -= 4, t.u += 4 * kTileDepth) total += count_rows<4>(t);
  for (; t.rows > 0; --t.rows, t.u += kTileDepth) total += count_rows<1>(t);
  return total;
}

}  // namespace
}  // namespace sq_cpu
