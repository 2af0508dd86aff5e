// What the tests of the library share: checks that count themselves, memory between guard pages,
// the ISAs that run here, and integer problems with their exact results.
#pragma once

#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "amx_emulator.h"
#include "blocking.h"
#include "check.h"
#include "dispatch.h"
#include "gemm.h"
#include "layout.h"
#include "sq_cpu/isa.h"
#include "sq_cpu/linear.h"
#include "testing/use_isa.h"

namespace sq_cpu::testing {

// A problem takes some ten times as long then: of thousands alike, these programs take a part.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

inline int64_t g_passed = 0, g_failed = 0;

inline int finish() {
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(g_passed),
              static_cast<long long>(g_failed));
  return g_failed ? 1 : 0;
}

// A broken kernel fails everywhere: 20 failures are enough to see where. Whoever asks only whether
// anything fails sets SQ_CPU_FAIL_FAST.
inline void check(bool ok, const std::string& what) {
  static const int64_t most = std::getenv("SQ_CPU_FAIL_FAST") != nullptr ? 1 : 20;
  ++(ok ? g_passed : g_failed);
  if (ok) return;
  std::printf("FAILED: %s\n", what.c_str());
  if (g_failed == most) std::exit(finish());
}

// Prints whether all the checks of a part passed.
class Part {
 public:
  explicit Part(std::string name) : name_(std::move(name)) {}
  ~Part() {
    std::printf("%-26s %8lld checks %s\n", name_.c_str(), static_cast<long long>(total() - before_),
                g_failed == failed_ ? "ok" : "FAILED");
    std::fflush(stdout);
  }

 private:
  static int64_t total() { return g_passed + g_failed; }
  const std::string name_;
  const int64_t before_ = total(), failed_ = g_failed;
};

template <typename Call>
void check_refused(const std::string& message, Call call) {
  std::string found = "nothing";
  try {
    call();
  } catch (const std::invalid_argument& e) {
    found = e.what();
  }
  check(found.find(message) != std::string::npos, "refused with " + message + ": " + found);
}

// SplitMix64: any seed will do, and a new one costs nothing.
class Rng {
 public:
  using result_type = uint64_t;
  explicit Rng(uint64_t seed) : state_(seed) {}
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }
  uint64_t operator()() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t count) { return static_cast<int64_t>((*this)() >> 33) % count; }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool coin() { return below(2) == 0; }
  int threads() { return std::vector<int>{1, 1, 2, 3, 7}[below(5)]; }

 private:
  uint64_t state_;
};

// Memory between two inaccessible pages; a buffer lies against the one or the other.
class Guarded {
 public:
  Guarded() = default;
  Guarded(const Guarded&) = delete;
  ~Guarded() { release(); }
  template <typename T>
  T* place(size_t count, bool at_end) {
    const size_t bytes = count * sizeof(T);
    if (base_ == nullptr || bytes > size_) grow(bytes);
    char* begin = base_ + kPage;
    return reinterpret_cast<T*>(at_end ? begin + size_ - bytes : begin);
  }
  template <typename T>
  T* place_copy(const std::vector<T>& values, bool at_end) {
    T* p = place<T>(values.size(), at_end);
    std::copy(values.begin(), values.end(), p);
    return p;
  }
  template <typename T>
  T* place_filled(size_t count, bool at_end) {
    T* p = place<T>(count, at_end);
    std::memset(p, kFiller, count * sizeof(T));
    return p;
  }
  static constexpr char kFiller = 0x5a;

 private:
  static constexpr size_t kPage = 4096;
  void release() {
    if (base_ != nullptr) munmap(base_, size_ + 2 * kPage);
  }
  void grow(size_t bytes) {
    release();
    size_ = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
    void* base = mmap(nullptr, size_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(base);
    mprotect(base_ + kPage, size_, PROT_READ | PROT_WRITE);
  }
  size_t size_ = 0;
  char* base_ = nullptr;
};

inline const IsaStatus& status_of(Isa isa) { return isa_status()[static_cast<size_t>(isa)]; }

// AMX alone is emulated. Its instructions are few, and fault where there is none; those of AVX-512
// are hundreds, on registers that only a CPU with it has.
inline bool runs_here(Isa isa) {
  return status_of(isa).usable() || (isa == Isa::kAmxInt8 && status_of(isa).built);
}
inline bool emulated(Isa isa) { return !status_of(isa).usable(); }

// At a hundredth of a native kernel's speed. How work is cut does not depend on the ISA: of the
// many cuts of one problem, these take some.
inline bool is_slow(Isa isa) { return isa == Isa::kReference || emulated(isa); }

inline void use(Isa isa) { use_isa(isa, emulated(isa)); }

inline std::vector<Isa> isas_here() {
  std::vector<Isa> isas;
  for (const IsaStatus& s : isa_status()) {
    if (runs_here(s.isa)) {
      isas.push_back(s.isa);
    } else {
      std::printf("%-26s not run: %s\n", s.name.c_str(), s.reason.c_str());
    }
  }
  return isas;
}

inline void start() {
  const bool native = status_of(Isa::kAmxInt8).usable();
  if (!native) install_amx_emulator();
  std::printf("AMX runs %s\n", native ? "natively" : "under the emulator");
}

// Which seeds a fuzz takes: `program SEED [COUNT]` runs some of them, and nothing else.
struct Seeds {
  uint64_t first;
  uint64_t count;
  bool chosen;
};

inline Seeds seeds(int argc, char** argv, uint64_t count) {
  if (kSanitized) count /= 4;
  if (argc < 2) return {0, count, false};
  return {std::strtoull(argv[1], nullptr, 10), argc < 3 ? 1 : std::strtoull(argv[2], nullptr, 10),
          true};
}

// A product of integers, t[m, n] = sum_k (u - zero_point) * w.
struct Problem {
  int64_t m, n, k;
  int max_code;
  std::vector<uint8_t> u;  // [m, k]
  std::vector<int8_t> w;   // [n, k]
  std::vector<int32_t> zero_point;
};

inline std::string describe(const Problem& p) {
  return join("m=", p.m, " n=", p.n, " k=", p.k, " codes to ", p.max_code);
}

inline std::vector<int64_t> exact(const Problem& p) {
  std::vector<int16_t> centred(p.m * p.k), wide(p.w.begin(), p.w.end());
  for (int64_t i = 0; i < p.m * p.k; ++i) {
    centred[i] = static_cast<int16_t>(p.u[i] - p.zero_point[i / p.k]);
  }
  std::vector<int64_t> t(p.m * p.n);
  for (int64_t i = 0; i < p.m * p.n; ++i) {
    const int16_t* a = centred.data() + i / p.n * p.k;
    const int16_t* b = wide.data() + i % p.n * p.k;
    constexpr int64_t kPart = 4096;  // 4096 * 255 * 128 < 2^31
    for (int64_t begin = 0; begin < p.k; begin += kPart) {
      const int64_t end = std::min(begin + kPart, p.k);
      int32_t sum = 0;
      for (int64_t k = begin; k < end; ++k) sum += a[k] * b[k];
      t[i] += sum;
    }
  }
  return t;
}

enum class Fill { kUniform, kHigh, kLow, kAlternating, kExtremes, kOneHotK, kOneHotN, kZeroRows };
constexpr int kFills = 8;

inline Problem make_problem(int64_t m, int64_t n, int64_t k, int max_code, Fill fill, Rng& rng) {
  Problem p{m,
            n,
            k,
            max_code,
            std::vector<uint8_t>(m * k),
            std::vector<int8_t>(n * k),
            std::vector<int32_t>(m)};
  const auto top = static_cast<uint8_t>(max_code);
  for (auto& z : p.zero_point) {
    z = static_cast<int32_t>(rng.below(4) ? rng.below(max_code + 1) : rng.coin() ? 0 : max_code);
  }
  const int64_t hot_n = rng.below(std::max<int64_t>(n, 1));
  for (int64_t i = 0; i < m * k; ++i) {
    const int64_t row = i / k, column = i % k;
    const auto any = static_cast<uint8_t>(rng.below(max_code + 1));
    p.u[i] = fill == Fill::kHigh || fill == Fill::kLow ? top
             : fill == Fill::kAlternating              ? (column % 2 ? top : 0)
             : fill == Fill::kExtremes                 ? (any % 2 ? top : 0)
             : fill == Fill::kOneHotK                  ? column == (row * 7) % k
             : fill == Fill::kZeroRows && row % 2      ? static_cast<uint8_t>(p.zero_point[row])
                                                       : any;
  }
  for (int64_t i = 0; i < n * k; ++i) {
    const auto any = static_cast<int8_t>(rng.below(256) - 128);
    p.w[i] = fill == Fill::kHigh                         ? 127
             : fill == Fill::kLow                        ? -128
             : fill == Fill::kAlternating                ? (i % 2 ? -128 : 127)
             : fill == Fill::kExtremes                   ? (any % 2 ? -128 : 127)
             : fill == Fill::kOneHotN && i / k != hot_n  ? 0
             : fill == Fill::kZeroRows && i / k % 3 == 1 ? 0
                                                         : any;
  }
  return p;
}

inline uint8_t* place_codes(const Problem& p, Guarded& memory, bool at_end) {
  const CodeLayout layout(p.m, p.k);
  const int64_t bytes = codes_bytes(p.m, p.k);
  auto* codes = memory.place<uint8_t>(bytes, at_end);
  std::memset(codes, 0xff, bytes);  // what pads k and m must not matter
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t k = 0; k < p.k; k += kTileDepth) {
      std::memcpy(codes + layout.offset(m) + k / kTileDepth * layout.tile, &p.u[m * p.k + k],
                  std::min(kTileDepth, p.k - k));
    }
  }
  return codes;
}

// The codes [m, k] of a layout, row-major.
inline std::vector<uint8_t> gather_codes(const uint8_t* codes, int64_t m, int64_t k) {
  const CodeLayout layout(m, k);
  std::vector<uint8_t> u(m * k);
  for (int64_t i = 0; i < m * k; ++i) {
    u[i] = codes[layout.offset(i / k) + i % k / kTileDepth * layout.tile + i % k % kTileDepth];
  }
  return u;
}

inline std::byte* place_weight(const Problem& p, Guarded& memory, bool at_end) {
  auto* packed = memory.place_filled<std::byte>(packed_bytes(p.n, p.k), at_end);
  const std::vector<float> ones(p.n, 1.0f);
  pack_weight(p.w.data(), ones.data(), nullptr, p.n, p.k, packed);
  return packed;
}

// Any blocking within what blocking.h demands.
inline Blocking random_blocking(const Microkernel& kernel, int64_t k_blocks, Rng& rng) {
  Blocking b;
  b.row_parts = rng.between(1, 4);
  b.strip_parts = rng.between(1, 4);
  b.rows = rng.between(1, 3) * row_step(kernel);
  b.strip_step = rng.coin() ? kernel.strips : 1;
  b.panel_strips = rng.between(1, kernel.strips);
  const int64_t unit_panels = rng.between(1, 4);
  b.unit_strips = unit_panels * b.panel_strips;
  b.strips = rng.between(1, unit_panels) * b.panel_strips;
  b.k_blocks = std::max<int64_t>(1, rng.coin() ? k_blocks : rng.between(1, k_blocks + 1));
  return b;
}

inline std::string describe(const Blocking& b) {
  return join("blocking ", b.row_parts, "x", b.strip_parts, " rows=", b.rows,
              " strip_step=", b.strip_step, " panel_strips=", b.panel_strips,
              " unit_strips=", b.unit_strips, " strips=", b.strips, " k_blocks=", b.k_blocks);
}

// The driver as ops.cc calls it, but for any kernel, blocking and team; a team may have fewer
// threads than there are tasks.
inline void run_blocked(const GemmArgs& args, const Microkernel& kernel, const Blocking& blocking,
                        int threads, Guarded& memory, bool at_end) {
  std::vector<WorkCounter> counters(blocking.row_parts * blocking.strip_parts);
  const int64_t own = workspace_sums(kernel, blocking, k_block_count(args.x.k));
  int32_t* const sums = memory.place_filled<int32_t>(own * threads, at_end);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    run_tasks(&args, 1, Order::kAlternating, kernel, row_kernels(kernel.isa), blocking,
              counters.data(), sums + own * thread, thread, threads);
  }
}

}  // namespace sq_cpu::testing
