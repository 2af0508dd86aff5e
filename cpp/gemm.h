// The GEMM driver: runs inside a parallel region, each thread its own task of the grid.
#pragma once

#include <cstdint>

#include "blocking.h"
#include "kernel.h"

namespace sq_cpu {

struct GemmArgs {
  QuantizedActivation x;
  PackedWeight weight;
  void* y;
  Output output;
  int64_t ldy;                 // elements; kCode: bytes between tiles
  const EpilogueSteps* steps;  // operands at row 0; null: none
};

int64_t element_bytes(Output output);
int64_t strip_count(int64_t n);
int64_t k_block_count(int64_t k);
int64_t strip_bytes(int64_t k);

// Moves the operands of `steps` on to a later row.
void advance(EpilogueSteps& steps, int64_t rows);

// Where blocked codes lie (linear.h draws them).
struct CodeLayout {
  CodeLayout(int64_t m, int64_t k);
  int64_t offset(int64_t row) const { return row / height * block + row % height * kTileDepth; }
  int64_t height;  // rows of a block
  int64_t tile;    // bytes of a tile
  int64_t block;   // bytes of a block
};

// Task `thread` of `threads` of the whole product; the threads may be fewer than the tasks of
// `blocking`. `sums`: blocking.sums ints of this thread's own. Never throws, never allocates.
void gemm_task(const GemmArgs& args, const Microkernel& kernel, const RowKernels& rows,
               const Blocking& blocking, int32_t* sums, int thread, int threads);

}  // namespace sq_cpu
