// Runs AMX-TILE and AMX-INT8 machine code on an x86-64 CPU that has no usable AMX. Linux, tests
// only.
//
// An AMX instruction that the CPU or the kernel does not allow raises SIGILL with RIP on the
// instruction. The handler installed here decodes it, performs the tile operation on eight software
// tiles of the calling thread as the Intel SDM defines it, and steps RIP past it; the code under
// test runs unmodified.
//
// Emulated: ldtilecfg, sttilecfg, tilerelease, tilezero, tileloadd, tileloaddt1, tilestored,
//   tdpbssd, tdpbsud, tdpbusd, tdpbuud; every 64-bit addressing form (SIB with and without base or
//   index, RIP-relative, disp8/disp32, FS and GS overrides). Not emulated: the 67h address-size
//   prefix and the BF16/FP16/complex dots, which stay illegal instructions.
// Faults are the hardware's: a #UD (unconfigured tile, colsb % 4 != 0, start_row >= rows, dot
// shapes
//   or tile names that clash) goes to the SIGILL action that was in place before, a #GP (invalid
//   configuration) raises SIGSEGV, each after one line on stderr. Bad memory operands fault inside
//   the handler as ordinary SIGSEGV/SIGBUS. Fault priority is not modelled.
// Every other SIGILL goes to the previous action, so a genuine illegal instruction still kills.
// State: tiles and configuration belong to the thread and begin released. A forked child still sees
//   the tile data, which a real kernel drops; configure anew there.
//   The handler preserves errno and runs on the interrupted stack (under 4 KiB below the kernel's
//   frame). A run of adjacent AMX instructions is performed in one signal.
// Requirements: the thread has not blocked SIGILL (a blocked synchronous signal kills), nothing
//   replaces the SIGILL action afterwards (if it did, install again), and the library that holds
//   the handler is never unloaded.
#pragma once

#include <cstdint>

namespace sq_cpu::testing {

enum class AmxMode { kNative, kEmulated };

// Instructions completed by the emulator, over all threads; all zero in native mode. sttilecfg is
// not counted; `releases` counts tilerelease and ldtilecfg of palette 0, `configs` the other
// ldtilecfg, `loads` tileloadd and tileloaddt1, `dots` the four tdpb*.
struct AmxCounters {
  uint64_t configs, releases, loads, stores, zeros, dots;
};

// kNative: CPUID reports AMX-TILE and AMX-INT8, XCR0 enables both tile states and the kernel
// granted this process the use of tile data (asked for here); nothing is installed. kEmulated: the
// SIGILL handler is in place. Idempotent, thread-safe. The action found by the first call stays the
// one that foreign SIGILLs go to.
AmxMode install_amx_emulator();

AmxCounters amx_counters();
void reset_amx_counters();

}  // namespace sq_cpu::testing

// The same for ctypes: install returns 0 for native, 1 for emulated; `out` receives the counters in
// the order of AmxCounters.
extern "C" {
int sq_amx_install(void);
void sq_amx_counters(uint64_t out[6]);
void sq_amx_reset(void);
}
