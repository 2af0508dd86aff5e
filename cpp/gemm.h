// The GEMM driver: runs inside a parallel region, each thread its own task of the grid.
#pragma once

#include <cstdint>

#include "blocking.h"
#include "kernel.h"

namespace sq_cpu {

struct GemmArgs {
  const uint8_t* u;  // [m, ldu]
  int64_t ldu;
  int64_t m;
  const float* row_scale;         // [m]; not read for kInt32
  const int32_t* row_zero_point;  // [m]
  PackedWeight weight;
  void* y;
  DType y_type;
  int64_t ldy;
};

int64_t element_bytes(DType type);
int64_t strip_count(int64_t n);
int64_t k_block_count(int64_t k);
int64_t strip_bytes(int64_t k);

// Task `thread` of `threads` of the whole product. Never throws, never allocates.
void gemm_task(const GemmArgs& args, const Microkernel& kernel, const RowKernels& rows, int thread,
               int threads);

}  // namespace sq_cpu
