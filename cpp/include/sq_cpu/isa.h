// Which instruction sets this library can use here, and which one it uses.
//
// An ISA is usable when it is built (the compiler knew its flags), detected (cpuid), and granted
// (the operating system saves its registers: XCR0; for AMX also arch_prctl). Usable ISAs are tried
// from the last enumerator down, so each failure falls back one step, and isa_status() says why.
#pragma once

#include <string>
#include <vector>

namespace sq_cpu {

// In order of preference; each one may use the kernels of all before it.
enum class Isa { kReference, kAvx2, kAvx512Bw, kAvx512Vnni, kAmxInt8 };

struct IsaStatus {
  Isa isa;
  std::string name;  // "reference", "avx2", "avx512bw", "avx512_vnni", "amx_int8"
  bool built;
  bool detected;
  bool granted;
  std::string reason;  // why it is not usable; empty when it is

  bool usable() const { return built && detected && granted; }
};

// One entry per Isa, in the order of the enumeration.
const std::vector<IsaStatus>& isa_status();

// The ISA in use: the best usable one, or the one that the environment variable SQ_CPU_ISA names.
// Throws std::runtime_error when SQ_CPU_ISA is unknown or not usable here; never falls back
// silently.
Isa active_isa();

const std::string& isa_name(Isa isa);

// Whether SQ_CPU_ISA chose active_isa().
bool isa_is_forced();

}  // namespace sq_cpu
