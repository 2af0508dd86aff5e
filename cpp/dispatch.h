// Which microkernel and which row kernels run: the tables made of kernels.inc, and the choice.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace sq_cpu {

// Every microkernel of kernels.inc, worst first.
struct MicrokernelTable {
  const Microkernel* rows;
  size_t count;
  const Microkernel* begin() const { return rows; }
  const Microkernel* end() const { return rows + count; }
};
MicrokernelTable microkernels();

// The best microkernel among those that `isa` may run, for codes up to max_code and m rows.
const Microkernel& choose_microkernel(Isa isa, int max_code, int64_t m);

const RowKernels& row_kernels(Isa isa);

}  // namespace sq_cpu
