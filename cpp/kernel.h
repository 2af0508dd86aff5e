// The contract between the driver and the kernels of each ISA. Only plain data in here: this header
// is compiled with every ISA's flags, and an inline library function compiled with AVX-512 could
// win the linker's choice and crash on a machine without it.
#pragma once

#include <cstdint>

#include "sq_cpu/isa.h"
#include "sq_cpu/linear.h"

namespace sq_cpu {

// What a task keeps between calls of a microkernel: AMX stores the tile configuration that it found
// (another library's), and the row count that its own is made for.
struct alignas(64) TaskState {
  uint8_t saved[64];
  uint8_t config[64];
  int rows;
};

// c[rows, 16 * strips] = u[rows, 64 * k_blocks] * W strips, int32, c's rows 16 * strips apart.
struct TileArgs {
  const uint8_t* u;  // rows ldu bytes apart
  int64_t ldu;
  const std::byte* strip;  // first strip
  int64_t strip_stride;    // bytes
  int64_t k_blocks;
  int rows;    // 1 .. Microkernel::rows
  int strips;  // 1 .. Microkernel::strips
  int32_t* c;  // 64-byte aligned
  TaskState* state;
};

struct Microkernel {
  const char* name;
  Isa isa;
  int rows;      // MR: most rows a call takes
  int row_step;  // rows are best given in multiples of this
  int strips;    // NR / 16: most strips a call takes
  int max_code;  // largest u for which it is exact
  int from_m;    // fewest rows of the whole product for which it is preferred
  void (*run)(const TileArgs&);
  void (*begin)(TaskState&);  // at the start and the end of each thread's task; may be null
  void (*end)(TaskState&);
};

// Largest MR x NR of all rows of the table: the size of a task's int32 scratch.
constexpr int kMaxTileInts = 32 * 32;

struct RowStats {
  float min;  // <= 0
  float max;  // >= 0
  bool finite;
};

// u = clamp(rne(x * inv_scale), low, high) + zero_point
struct RowGrid {
  float inv_scale;
  float low;
  float high;
  int32_t zero_point;
};

// y[rows, columns] from c[rows, ldc]; columns beyond `columns` are not stored.
struct EpilogueArgs {
  const int32_t* c;
  int64_t ldc;
  int rows;
  const float* row_scale;
  const int32_t* row_zero_point;
  const std::byte* trailer;  // of the first strip
  int64_t strip_stride;
  void* y;  // first element of the block
  int64_t ldy;
  int64_t columns;
};

// The float work beside the product, compiled once per vector width from rows.h.
struct RowKernels {
  RowStats (*stats[3])(const void* x, int64_t k);                           // by DType of x
  void (*quantize[3])(const void* x, int64_t k, const RowGrid&, uint8_t*);  // by DType of x
  void (*epilogue[4])(const EpilogueArgs&);                                 // by DType of y
};

#define SQ_MICROKERNEL(isa, name, ...) void name(const TileArgs&);
#define SQ_ROW_KERNELS(isa, name) extern const RowKernels name;
#include "kernels.inc"
#undef SQ_MICROKERNEL
#undef SQ_ROW_KERNELS

void amx_begin(TaskState&);
void amx_end(TaskState&);

}  // namespace sq_cpu
