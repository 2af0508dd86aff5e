// What tests and benchmarks ask of the dispatch; not installed.
#pragma once

#include <cstdint>

#include "sq_cpu/isa.h"

namespace sq_cpu {

// The environment variable SQ_CPU_HIDE_FROM names an ISA that the library then takes this CPU not
// to have, nor those after it: it shows what runs on a lesser machine.

// Uses `isa` from now on, even where it is only emulated (`emulated` skips the usable check). Not
// thread-safe. Throws std::runtime_error when it is neither usable nor emulated.
void use_isa(Isa isa, bool emulated);

// The microkernel that active_isa() runs for codes up to max_code and m rows, as in kernels.inc.
const char* microkernel_name(int max_code, int64_t m);

}  // namespace sq_cpu
