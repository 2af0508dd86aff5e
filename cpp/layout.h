// The sizes of the memory layouts that linear.h draws. Not for code compiled with an instruction
// set's flags: kernel.h says why.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sq_cpu/linear.h"

namespace sq_cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rounds up to pairs of cache lines, as the prefetcher fetches them: one worker's memory from
// another's.
constexpr int64_t whole_lines(int64_t bytes) { return ceil_div(bytes, 128) * 128; }

constexpr int64_t strip_count(int64_t n) { return ceil_div(n, kStripColumns); }

constexpr int64_t k_block_count(int64_t k) { return ceil_div(k, kTileDepth); }

constexpr int64_t whole_tiles(int64_t k) { return k_block_count(k) * kTileDepth; }

constexpr int64_t strip_bytes(int64_t k) { return k_block_count(k) * kTileBytes + kTrailerBytes; }

// Where blocked codes [m, k] lie.
struct CodeLayout {
  constexpr CodeLayout(int64_t m, int64_t k)
      : height(std::clamp<int64_t>(m, 1, kBlockRows)),
        tile(height * kTileDepth),
        block(tile * k_block_count(k)) {}
  constexpr int64_t offset(int64_t row) const {
    return row / height * block + row % height * kTileDepth;
  }
  int64_t height;  // rows of a block
  int64_t tile;    // bytes of a tile
  int64_t block;   // bytes of a block
};

}  // namespace sq_cpu
