// What this machine can do at most: int8 multiply-add loops on registers alone, and reading memory.
//
// Built on the fly by peak.py, with no ISA flags. The loops are assembly, so that no compiler can
// spill, reorder or drop them; each runs only where the CPU has its instructions and the operating
// system saves their registers. int8 GOPS count a multiply and an add as two.
#include <cpuid.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

struct CpuidLeaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidLeaf cpuid(unsigned leaf) {
  CpuidLeaf r;
  __get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(unsigned word, int index) { return (word >> index) & 1; }

// XCR0 names the register states that the operating system saves.
bool saves(unsigned states) {
  if (!bit(cpuid(1).ecx, 27)) return false;  // OSXSAVE: without it XGETBV faults
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & states) == states;
}

bool has_avx2() { return saves(0x6) && bit(cpuid(7).ebx, 5); }

bool has_avx512bw() {
  const CpuidLeaf l7 = cpuid(7);
  return saves(0xe6) && bit(l7.ebx, 16) && bit(l7.ebx, 30);  // F, BW
}

bool has_avx512_vnni() { return has_avx512bw() && bit(cpuid(7).ecx, 11); }

#define SQ_REGISTERS                                                                              \
  "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
      "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

alignas(64) const struct Operands {
  Operands() {
    std::memset(codes, 77, sizeof codes);  // u8 and s8; pairs stay below the saturation of int16
    std::fill(std::begin(ones), std::end(ones), int16_t{1});
  }
  uint8_t codes[1024];  // one tile, or one register from its start
  int16_t ones[32];
} kOperands;

// Twelve accumulators hide the latency of each instruction; registers 12 and 13 are its operands.
void avx2_turns(int64_t turns) {
  asm volatile(
      "vmovdqu (%1), %%ymm12\n"
      "vmovdqu (%1), %%ymm13\n"
      "vmovdqu (%2), %%ymm15\n"
      "0:\n"
      ".irp r,0,1,2,3,4,5,6,7,8,9,10,11\n"
      "vpmaddubsw %%ymm13, %%ymm12, %%ymm14\n"
      "vpmaddwd %%ymm15, %%ymm14, %%ymm14\n"
      "vpaddd %%ymm14, %%ymm\\r, %%ymm\\r\n"
      ".endr\n"
      "dec %0\n"
      "jnz 0b\n"
      "vzeroupper"
      : "+r"(turns)
      : "r"(kOperands.codes), "r"(kOperands.ones)
      : SQ_REGISTERS);
}

void avx512bw_turns(int64_t turns) {
  asm volatile(
      "vmovdqu64 (%1), %%zmm12\n"
      "vmovdqu64 (%1), %%zmm13\n"
      "vmovdqu64 (%2), %%zmm15\n"
      "0:\n"
      ".irp r,0,1,2,3,4,5,6,7,8,9,10,11\n"
      "vpmaddubsw %%zmm13, %%zmm12, %%zmm14\n"
      "vpmaddwd %%zmm15, %%zmm14, %%zmm14\n"
      "vpaddd %%zmm14, %%zmm\\r, %%zmm\\r\n"
      ".endr\n"
      "dec %0\n"
      "jnz 0b\n"
      "vzeroupper"
      : "+r"(turns)
      : "r"(kOperands.codes), "r"(kOperands.ones)
      : SQ_REGISTERS);
}

void avx512_vnni_turns(int64_t turns) {
  asm volatile(
      "vmovdqu64 (%1), %%zmm12\n"
      "vmovdqu64 (%1), %%zmm13\n"
      "0:\n"
      ".irp r,0,1,2,3,4,5,6,7,8,9,10,11\n"
      "vpdpbusd %%zmm13, %%zmm12, %%zmm\\r\n"
      ".endr\n"
      "dec %0\n"
      "jnz 0b\n"
      "vzeroupper"
      : "+r"(turns)
      : "r"(kOperands.codes)
      : SQ_REGISTERS);
}

#if __has_include(<amxint8intrin.h>)  // an older compiler's assembler knows no tiles
bool has_amx_int8() {
  constexpr int kReqXcompPerm = 0x1023, kXtileData = 18;
  const CpuidLeaf l7 = cpuid(7);
  return saves(0x60000) && bit(l7.edx, 24) && bit(l7.edx, 25) &&  // AMX-TILE, AMX-INT8
         syscall(SYS_arch_prctl, kReqXcompPerm, kXtileData) == 0;
}

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 2x2: tiles 0 to 3 accumulate the products of 4, 5 (A) and 6, 7 (B).
void amx_int8_turns(int64_t turns) {
  alignas(64) const TileConfig config;
  asm volatile(
      "ldtilecfg (%1)\n"
      ".irp r,0,1,2,3\n"
      "tilezero %%tmm\\r\n"
      ".endr\n"
      ".irp r,4,5,6,7\n"
      "tileloadd (%2,%3,1), %%tmm\\r\n"
      ".endr\n"
      "0:\n"
      "tdpbusd %%tmm6, %%tmm4, %%tmm0\n"
      "tdpbusd %%tmm7, %%tmm4, %%tmm1\n"
      "tdpbusd %%tmm6, %%tmm5, %%tmm2\n"
      "tdpbusd %%tmm7, %%tmm5, %%tmm3\n"
      "dec %0\n"
      "jnz 0b\n"
      "tilerelease"
      : "+r"(turns)
      : "r"(&config), "r"(kOperands.codes), "r"(int64_t{64})
      : "cc", "memory");
}
#endif

struct Loop {
  const char* isa;
  bool (*usable)();
  void (*run)(int64_t turns);
  double operations;  // of one turn
};

const Loop kLoops[] = {
    {"avx2", has_avx2, avx2_turns, 12 * 32 * 2},
    {"avx512bw", has_avx512bw, avx512bw_turns, 12 * 64 * 2},
    {"avx512_vnni", has_avx512_vnni, avx512_vnni_turns, 12 * 64 * 2},
#if __has_include(<amxint8intrin.h>)
    {"amx_int8", has_amx_int8, amx_int8_turns, 4 * 16 * 16 * 64 * 2},
#endif
};

// These read [from, to), whole kilobytes, and ask for the lines `ahead` bytes further on.
void read_avx2(const char* from, const char* to, int64_t ahead) {
  asm volatile(
      "0:\n"
      ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
      "prefetcht0 64*\\r(%0,%2)\n"
      "vmovdqa 32*\\r(%0), %%ymm\\r\n"
      "vmovdqa 32*\\r+512(%0), %%ymm\\r\n"
      ".endr\n"
      "add $1024, %0\n"
      "cmp %1, %0\n"
      "jb 0b\n"
      "vzeroupper"
      : "+r"(from)
      : "r"(to), "r"(ahead)
      : SQ_REGISTERS);
}

void read_avx512(const char* from, const char* to, int64_t ahead) {
  asm volatile(
      "0:\n"
      ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
      "prefetcht0 64*\\r(%0,%2)\n"
      "vmovdqa64 64*\\r(%0), %%zmm\\r\n"
      ".endr\n"
      "add $1024, %0\n"
      "cmp %1, %0\n"
      "jb 0b\n"
      "vzeroupper"
      : "+r"(from)
      : "r"(to), "r"(ahead)
      : SQ_REGISTERS);
}

// Runs `work` on every thread at once, `rounds` times; seconds of the quickest round, from the
// first start to the last end. `prepare` runs once a thread before.
template <typename Prepare, typename Work>
double best_of(int threads, int rounds, Prepare prepare, Work work) {
  std::vector<double> begins(static_cast<size_t>(threads) * rounds), ends(begins.size());
  std::atomic<int> arrived{0};
  const auto body = [&](int thread) {
    prepare(thread);
    for (int round = 0; round < rounds; ++round) {
      arrived.fetch_add(1);
      while (arrived.load() < threads * (round + 1)) std::this_thread::yield();
      const size_t slot = static_cast<size_t>(round) * threads + thread;
      begins[slot] = now();
      work(thread);
      ends[slot] = now();
    }
  };
  std::vector<std::thread> team;
  for (int thread = 1; thread < threads; ++thread) team.emplace_back(body, thread);
  body(0);
  for (std::thread& thread : team) thread.join();
  double best = 0.0;
  for (int round = 0; round < rounds; ++round) {
    const auto slot = static_cast<std::ptrdiff_t>(round) * threads;
    const double seconds =
        *std::max_element(ends.begin() + slot, ends.begin() + slot + threads) -
        *std::min_element(begins.begin() + slot, begins.begin() + slot + threads);
    best = round == 0 ? seconds : std::min(best, seconds);
  }
  return best;
}

}  // namespace

extern "C" {

// int8 GOPS of an instruction set's loop on `threads` threads, for about `seconds` in all;
// 0 where it cannot run or has no loop.
double sq_peak_gops(const char* isa, int threads, double seconds) {
  constexpr int kRounds = 8;
  for (const Loop& loop : kLoops) {
    if (std::strcmp(loop.isa, isa) != 0 || !loop.usable()) continue;
    constexpr int64_t kTrial = 1 << 16;
    loop.run(kTrial);  // wakes the wide units up
    const double start = now();
    loop.run(kTrial);
    const auto turns = static_cast<int64_t>(seconds / kRounds / (now() - start) * kTrial) + 1;
    const double best = best_of(threads, kRounds, [](int) {}, [&](int) { loop.run(turns); });
    return loop.operations * turns * threads / best / 1e9;
  }
  return 0.0;
}

// GB/s (1e9) that `threads` threads read at together, each from bytes / threads of its own,
// touched by itself, in huge pages where granted; 0 without AVX2, -1 without the memory.
double sq_peak_read_gb_per_s(int threads, int64_t bytes) {
  if (!has_avx2()) return 0.0;
  constexpr int kRounds = 4;
  constexpr int64_t kHugePage = 2 << 20;
  const auto read = has_avx512bw() ? read_avx512 : read_avx2;
  const int64_t share = std::max(bytes / threads / kHugePage, int64_t{1}) * kHugePage;
  const size_t whole = static_cast<size_t>(share) * threads + kHugePage;
  void* map = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return -1.0;
  madvise(map, whole, MADV_HUGEPAGE);
  char* data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(map) + kHugePage - 1) /
                                       kHugePage * kHugePage);
  double best = 0.0;
  for (const int64_t ahead : {0, 1024, 2048, 4096, 8192}) {  // the best distance is the machine's
    const double seconds = best_of(
        threads, kRounds,
        [&](int thread) {
          if (ahead == 0) std::memset(data + thread * share, 1, share);
        },
        [&](int thread) { read(data + thread * share, data + (thread + 1) * share, ahead); });
    const double rate = static_cast<double>(share) * threads / seconds / 1e9;
    best = std::max(best, rate);
  }
  munmap(map, whole);
  return best;
}
}
