// AMX-INT8: 2 x 2 tiles, 32 rows x 32 columns.
//
//             B6 (strip 0)   B7 (strip 1)
//   A4 (0-15)     C0             C1          per 64 of k: 4 tile loads (8 cycles each) hide behind
//   A5 (16-31)    C2             C3          4 TDPBUSD (16 cycles each)
//
// The instructions are written as asm, for three reasons: gcc's intrinsics carry no memory clobber
// (vector stores may sink below a tile load), _tile_loadconfig declares only 8 of the 64 bytes it
// reads, and the tile number must be a literal. The compiler itself never uses tile registers.
#include <cstring>

#include "kernel.h"

#define TILE_LOAD(tile, address, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(address), "r"(stride) : "memory")
#define TILE_STORE(tile, address, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(address), "r"(stride) : "memory")
#define TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::: "memory")
// C += A (u8) * B (s8); operands in the assembler's order: B, A, C.
#define TILE_DOT(c, a, b) asm volatile("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #c::: "memory")

namespace sq_cpu {
namespace {

constexpr int64_t kTileRows = 16;

void load_config(const uint8_t* config) { asm volatile("ldtilecfg (%0)" ::"r"(config) : "memory"); }

// Tiles 0 to 3 are C, 4 and 5 are A, 6 and 7 are B; all are 64 bytes wide. Rows of A and C follow
// the call, so no memory beyond the last row is read.
void configure(TaskState& state, int rows) {
  const uint8_t upper = rows < kTileRows ? rows : kTileRows;
  const uint8_t lower =
      rows > kTileRows ? rows - kTileRows : upper;  // unused tiles still need rows
  const uint8_t tile_rows[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
  std::memset(state.config, 0, sizeof state.config);
  state.config[0] = 1;  // palette
  for (int tile = 0; tile < 8; ++tile) {
    state.config[16 + 2 * tile] = 64;  // bytes per row, 16 bits each
    state.config[48 + tile] = tile_rows[tile];
  }
  load_config(state.config);
  state.rows = rows;
}

// From L2 to L1, two steps of 64 cycles before it is loaded: L2 answers in 15 to 30, more when all
// cores ask. Further ahead was slower, by up to 30 %: L1 holds only 6 steps' tiles.
constexpr int64_t kTilesAhead = 2;

void fetch_tile(const void* tile) {
  for (int row = 0; row < kTileRows; ++row) {
    __builtin_prefetch(static_cast<const char*>(tile) + row * 64);
  }
}

// Rows of an epilogue at a time: what it loads for its columns is loaded once for these.
constexpr int64_t kEpilogueRows = 4;

// Part `step` of `steps` of an epilogue: vector work, while the tile unit is busy.
void work_on(const TileArgs& t, int64_t step, int64_t steps) {
  const int64_t due = t.waiting->rows * step / steps;
  if (step < steps && due < t.waiting->row + kEpilogueRows) return;
  EpilogueArgs part = *t.waiting;
  part.rows = static_cast<int>(due) / part.terms * part.terms;
  if (part.rows <= part.row) return;
  t.epilogue(part);
  t.waiting->row = part.rows;
}

}  // namespace

// Another library on this thread (oneDNN) may have a configuration loaded and believe it stays:
// ours is loaded for the task only, and the one found is put back.
void amx_begin(TaskState& state) {
  asm volatile("sttilecfg (%0)" ::"r"(state.saved) : "memory");
  state.rows = 0;
}

void amx_end(TaskState& state) { load_config(state.saved); }

void u8s8_32x32_amx_int8(const TileArgs& t) {
  using Block = u8s8_32x32_amx_int8_block;
  static_assert(Block::kRows == 2 * kTileRows && Block::kStrips == 2, "2 x 2 tiles");
  if (t.state->rows != t.rows) configure(*t.state, t.rows);
  const bool lower = t.rows > kTileRows;
  const bool right = t.strips > 1;
  const uint8_t* a = t.u;
  const uint8_t* a_lower = t.u + t.u_block;
  const std::byte* b = t.strip;
  const std::byte* b_right = t.strip + t.strip_stride;
  const std::byte* next = t.prefetch;
  const int64_t row_bytes = 64;
  const int64_t ldc = t.strips * kStripColumns;
  const int64_t c_stride = ldc * 4;
  int32_t* c[4] = {t.c, t.c + kStripColumns, t.c + kTileRows * ldc,
                   t.c + kTileRows * ldc + kStripColumns};
  if (t.accumulate) {
    TILE_LOAD(0, c[0], c_stride);
    if (right) TILE_LOAD(1, c[1], c_stride);
    if (lower) TILE_LOAD(2, c[2], c_stride);
    if (lower && right) TILE_LOAD(3, c[3], c_stride);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int64_t kb = 0; kb < t.k_blocks; ++kb) {
    for (int line = 0; line < 4 * t.prefetch_lines; ++line, next += 64) {
      __builtin_prefetch(next, 0, 2);
    }
    TILE_LOAD(4, a, row_bytes);
    fetch_tile(a + kTilesAhead * t.u_tile);
    TILE_LOAD(6, b, row_bytes);
    TILE_DOT(0, 4, 6);
    fetch_tile(b + kTilesAhead * kTileBytes);
    if (right) {
      TILE_LOAD(7, b_right, row_bytes);
      fetch_tile(b_right + kTilesAhead * kTileBytes);
      TILE_DOT(1, 4, 7);
    }
    if (lower) {
      TILE_LOAD(5, a_lower, row_bytes);
      fetch_tile(a_lower + kTilesAhead * t.u_tile);
      TILE_DOT(2, 5, 6);
      if (right) TILE_DOT(3, 5, 7);
    }
    if (t.waiting != nullptr) work_on(t, kb + 1, t.k_blocks);
    a += t.u_tile;
    a_lower += t.u_tile;
    b += kTileBytes;
    b_right += kTileBytes;
  }
  TILE_STORE(0, c[0], c_stride);
  if (right) TILE_STORE(1, c[1], c_stride);
  if (lower) TILE_STORE(2, c[2], c_stride);
  if (lower && right) TILE_STORE(3, c[3], c_stride);
}

}  // namespace sq_cpu
