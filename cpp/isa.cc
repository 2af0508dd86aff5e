#include "sq_cpu/isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>

#include "check.h"
#include "testing/use_isa.h"

namespace sq_cpu {
namespace {

struct CpuidLeaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidLeaf cpuid(unsigned leaf, unsigned subleaf) {
  CpuidLeaf r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool bit(uint64_t word, int index) { return (word >> index) & 1; }

// XCR0: the register states that the operating system saves on a context switch.
uint64_t saved_states() {
  if (!bit(cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE: without it XGETBV faults
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

bool saves(std::initializer_list<int> states) {
  const uint64_t xcr0 = saved_states();
  for (int state : states) {
    if (!bit(xcr0, state)) return false;
  }
  return true;
}

bool detect_avx2() {
  const CpuidLeaf l1 = cpuid(1, 0), l7 = cpuid(7, 0);
  return bit(l1.ecx, 12) && bit(l1.ecx, 29) && bit(l7.ebx, 5);  // FMA, F16C, AVX2
}

bool detect_avx512bw() {
  const CpuidLeaf l7 = cpuid(7, 0);
  return detect_avx2() && bit(l7.ebx, 16) && bit(l7.ebx, 17) && bit(l7.ebx, 30) &&
         bit(l7.ebx, 31);  // AVX512 F, DQ, BW, VL
}

bool detect_avx512_vnni() { return detect_avx512bw() && bit(cpuid(7, 0).ecx, 11); }

bool detect_amx_int8() {
  const CpuidLeaf l7 = cpuid(7, 0);
  return detect_avx512_vnni() && bit(l7.edx, 24) && bit(l7.edx, 25);  // AMX-TILE, AMX-INT8
}

// Linux hands out the 8 KB of tile state only on request, once per process, and may refuse.
std::string request_tiles() {
  constexpr int kReqXcompPerm = 0x1023, kXtileData = 18;
  if (syscall(SYS_arch_prctl, kReqXcompPerm, kXtileData) == 0) return "";
  return join("the kernel refused AMX tile state: ", std::strerror(errno));
}

std::string grant(Isa isa) {
  switch (isa) {
    case Isa::kReference:
      return "";
    case Isa::kAvx2:
      return saves({1, 2}) ? "" : "the operating system does not save AVX registers";
    case Isa::kAvx512Bw:
    case Isa::kAvx512Vnni:
      return saves({1, 2, 5, 6, 7}) ? "" : "the operating system does not save AVX-512 registers";
    case Isa::kAmxInt8:
      if (!saves({1, 2, 5, 6, 7})) return "the operating system does not save AVX-512 registers";
      if (!saves({17, 18})) return "the operating system does not save AMX tiles";
      return request_tiles();
  }
  return "unknown";
}

#ifdef SQ_CPU_BUILT_AVX512BW
constexpr bool kBuiltAvx512Bw = true;
#else
constexpr bool kBuiltAvx512Bw = false;
#endif
#ifdef SQ_CPU_BUILT_AVX512_VNNI
constexpr bool kBuiltVnni = true;
#else
constexpr bool kBuiltVnni = false;
#endif
#ifdef SQ_CPU_BUILT_AMX_INT8
constexpr bool kBuiltAmx = true;
#else
constexpr bool kBuiltAmx = false;
#endif

std::vector<IsaStatus> probe() {
  std::vector<IsaStatus> all = {
      {Isa::kReference, "reference", true, true, false, ""},
      {Isa::kAvx2, "avx2", true, detect_avx2(), false, ""},
      {Isa::kAvx512Bw, "avx512bw", kBuiltAvx512Bw, detect_avx512bw(), false, ""},
      {Isa::kAvx512Vnni, "avx512_vnni", kBuiltVnni, detect_avx512_vnni(), false, ""},
      {Isa::kAmxInt8, "amx_int8", kBuiltAmx, detect_amx_int8(), false, ""},
  };
  const char* const from = std::getenv("SQ_CPU_HIDE_FROM");
  bool hidden = false;
  for (IsaStatus& s : all) {
    hidden |= from != nullptr && s.name == from;
    if (hidden) {
      s.detected = false;
      s.reason = join("hidden by SQ_CPU_HIDE_FROM=", from);
    } else if (!s.built) {
      s.reason = "not built: the compiler lacks its flags";
    } else if (!s.detected) {
      s.reason = "this CPU does not have it";
    } else {
      s.reason = grant(s.isa);
      s.granted = s.reason.empty();
    }
  }
  if (from != nullptr && !hidden) {
    throw std::runtime_error(join("SQ_CPU_HIDE_FROM=", from, " is not an ISA of sq_cpu"));
  }
  return all;
}

std::string usable_names() {
  std::string names;
  for (const IsaStatus& s : isa_status()) {
    if (s.usable()) names += (names.empty() ? "" : ", ") + s.name;
  }
  return names;
}

constexpr int kUndecided = -1;
std::atomic<int> g_active{kUndecided};
std::atomic<bool> g_forced{false};

const IsaStatus& status_of(Isa isa) {
  SQ_CHECK(is_one_of(isa, Isa::kAmxInt8), "unknown Isa ", static_cast<int>(isa));
  return isa_status()[static_cast<size_t>(isa)];
}

Isa choose() {
  const char* forced = std::getenv("SQ_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    Isa best = Isa::kReference;
    for (const IsaStatus& s : isa_status()) best = s.usable() ? s.isa : best;
    return best;
  }
  for (const IsaStatus& s : isa_status()) {
    if (s.name != forced) continue;
    if (s.usable()) {
      g_forced.store(true, std::memory_order_relaxed);
      return s.isa;
    }
    throw std::runtime_error(
        join("SQ_CPU_ISA=", forced, " cannot be used: ", s.reason, "; usable: ", usable_names()));
  }
  throw std::runtime_error(
      join("SQ_CPU_ISA=", forced, " is not an ISA of sq_cpu; usable here: ", usable_names()));
}

}  // namespace

const std::vector<IsaStatus>& isa_status() {
  static const std::vector<IsaStatus> status = probe();
  return status;
}

Isa active_isa() {
  int active = g_active.load(std::memory_order_relaxed);
  if (active == kUndecided) {
    active = static_cast<int>(choose());
    g_active.store(active, std::memory_order_relaxed);
  }
  return static_cast<Isa>(active);
}

bool isa_is_forced() { return g_forced.load(std::memory_order_relaxed); }

const std::string& isa_name(Isa isa) { return status_of(isa).name; }

void use_isa(Isa isa, bool emulated) {
  const IsaStatus& s = status_of(isa);
  if (!s.usable() && !(emulated && s.built)) {
    throw std::runtime_error(join(s.name, " cannot be used: ", s.reason));
  }
  g_active.store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace sq_cpu
