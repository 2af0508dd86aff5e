#include "amx_emulator.h"

#if !defined(__x86_64__) || !defined(__linux__)
#error "amx_emulator needs x86-64 Linux"
#endif

#include <asm/prctl.h>
#include <cpuid.h>
#include <emmintrin.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <mutex>

namespace sq_cpu::testing {
namespace {

// Palette 1, the only one that exists: 8 tiles of 16 rows of 64 bytes.
constexpr unsigned kTiles = 8;
constexpr unsigned kMaxRows = 16;
constexpr unsigned kRowBytes = 64;
constexpr unsigned kColumns = kRowBytes / 4;  // dwords in a row

// The 64-byte memory image of ldtilecfg and sttilecfg.
struct ConfigImage {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};
static_assert(sizeof(ConfigImage) == 64);

using Tile = uint8_t[kMaxRows][kRowBytes];

// One thread's registers. Invariant: every byte of a tile outside its rows x colsb is zero, which
// is what lets a dot work on whole 64-byte rows. All zero is the released state.
struct alignas(64) ThreadState {
  Tile tile[kTiles];
  ConfigImage config;
};

// ------------------------------------------------------------------------------------ thread state

// Only a pointer lives in static TLS: a dlopened library gets little of it (glibc reserves about
// 1.6 KB), and initial-exec keeps the access free of calls.
__attribute__((tls_model("initial-exec"))) thread_local ThreadState* t_state = nullptr;
pthread_key_t g_state_key;  // its destructor frees the state when the thread ends

void free_state(void* state) {
  munmap(state, sizeof(ThreadState));
  t_state = nullptr;
}

void write_stderr(const char* text) {
  const ssize_t written = write(STDERR_FILENO, text, strlen(text));
  static_cast<void>(written);  // nobody is left to tell
}

// The signal is synchronous, raised by an AMX instruction and never inside libc, so the calls here
// interrupt nothing.
ThreadState& thread_state() {
  if (t_state == nullptr) {
    void* memory = mmap(nullptr, sizeof(ThreadState), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || pthread_setspecific(g_state_key, memory) != 0) {
      write_stderr("amx_emulator: no memory for the tiles of a thread\n");
      abort();
    }
    t_state = static_cast<ThreadState*>(memory);
  }
  return *t_state;
}

// ---------------------------------------------------------------------------------------- counters

enum Counter { kConfigs, kReleases, kLoads, kStores, kZeros, kDots, kCounters };
std::atomic<uint64_t> g_counters[kCounters];
static_assert(std::atomic<uint64_t>::is_always_lock_free);

void count(Counter counter) { g_counters[counter].fetch_add(1, std::memory_order_relaxed); }

// ----------------------------------------------------------------------------------------- decoder

enum class Op { kLoadConfig, kStoreConfig, kRelease, kZero, kLoad, kStore, kDot };

struct Instruction {
  Op op;
  unsigned reg;             // ModRM.reg: the tile written, or stored; C of a dot
  unsigned rm;              // ModRM.rm of a register form: A of a dot
  unsigned vvvv;            // VEX.vvvv, complement undone: B of a dot
  bool a_signed, b_signed;  // of a dot
  uint64_t address;         // memory forms: of row 0
  uint64_t stride;          // tile loads and stores: the scaled index, 0 without one
  uint64_t next_rip;
};

// General registers in encoding order, as indices into the ucontext.
constexpr int kRegister[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                               REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                               REG_R12, REG_R13, REG_R14, REG_R15};

template <typename T>
T fetch(const uint8_t*& code) {
  T value;
  memcpy(&value, code, sizeof(value));
  code += sizeof(value);
  return value;
}

uint64_t segment_base(uint8_t override_prefix) {
  if (override_prefix == 0) return 0;
  uint64_t base = 0;
  syscall(SYS_arch_prctl, override_prefix == 0x64 ? ARCH_GET_FS : ARCH_GET_GS, &base);
  return base;
}

// Decodes the instruction at RIP. False: not one of the instructions emulated here, or an encoding
// of one that the hardware rejects. Reads no byte beyond the instruction, which may end a page.
bool decode(const greg_t* registers, Instruction* out) {
  const uint8_t* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);

  uint8_t segment = 0;
  for (int prefixes = 0;; ++prefixes) {
    const uint8_t byte = *code;
    if (byte == 0x64 || byte == 0x65) {
      segment = byte;
    } else if (byte != 0x26 && byte != 0x2E && byte != 0x36 && byte != 0x3E) {  // no effect
      break;
    }
    if (prefixes == 4) return false;  // leaves room for the longest form within 15 bytes
    ++code;
  }

  // Three-byte VEX: C4 [~R ~X ~B mmmmm] [W ~vvvv L pp], then opcode and ModRM.
  if (fetch<uint8_t>(code) != 0xC4) return false;
  const uint8_t vex1 = fetch<uint8_t>(code);
  if ((vex1 & 0x1F) != 2) return false;  // map 0F38
  const uint8_t vex2 = fetch<uint8_t>(code);
  if ((vex2 & 0x84) != 0) return false;  // W0, 128
  const unsigned extend_r = (vex1 & 0x80) ? 0 : 8;
  const unsigned extend_x = (vex1 & 0x40) ? 0 : 8;
  const unsigned extend_b = (vex1 & 0x20) ? 0 : 8;
  enum : unsigned { kNone, k66, kF3, kF2 };
  const unsigned pp = vex2 & 3;
  const uint8_t opcode = fetch<uint8_t>(code);
  if (opcode != 0x49 && opcode != 0x4B && opcode != 0x5E) return false;
  const uint8_t modrm = fetch<uint8_t>(code);
  const unsigned mod = modrm >> 6;
  const unsigned rm = modrm & 7;

  *out = {};
  out->reg = ((modrm >> 3) & 7) | extend_r;
  out->rm = rm | extend_b;
  out->vvvv = (~vex2 >> 3) & 15;
  if (opcode != 0x5E && out->vvvv != 0) return false;

  if (mod == 3) {
    if (out->reg >= kTiles || out->rm >= kTiles || out->vvvv >= kTiles) return false;
    if (opcode == 0x5E) {
      out->op = Op::kDot;
      out->a_signed = pp == kF2 || pp == kF3;
      out->b_signed = pp == kF2 || pp == k66;
    } else if (opcode == 0x49 && pp == kNone && modrm == 0xC0) {
      out->op = Op::kRelease;
    } else if (opcode == 0x49 && pp == kF2 && rm == 0) {
      out->op = Op::kZero;
    } else {
      return false;
    }
    out->next_rip = reinterpret_cast<uint64_t>(code);
    return true;
  }

  if (opcode == 0x49 && out->reg == 0 && (pp == kNone || pp == k66)) {
    out->op = pp == kNone ? Op::kLoadConfig : Op::kStoreConfig;
  } else if (opcode == 0x4B && out->reg < kTiles && rm == 4 && pp != kNone) {  // a SIB is required
    out->op = pp == kF3 ? Op::kStore : Op::kLoad;
  } else {
    return false;
  }

  const auto value_of = [registers](unsigned n) {
    return static_cast<uint64_t>(registers[kRegister[n]]);
  };
  bool rip_relative = false;
  bool wide = mod == 2;  // disp32
  if (rm == 4) {
    const uint8_t sib = fetch<uint8_t>(code);
    const unsigned index = ((sib >> 3) & 7) | extend_x;
    if (index != 4) out->stride = value_of(index) << (sib >> 6);  // 4 (rsp) means none; 12 is r12
    if (mod == 0 && (sib & 7) == 5) {                             // no base, r13's number included
      wide = true;
    } else {
      out->address = value_of((sib & 7) | extend_b);
    }
  } else if (mod == 0 && rm == 5) {
    wide = rip_relative = true;
  } else {
    out->address = value_of(rm | extend_b);
  }
  if (wide) {
    out->address += static_cast<int64_t>(fetch<int32_t>(code));
  } else if (mod == 1) {
    out->address += static_cast<int64_t>(fetch<int8_t>(code));
  }
  out->next_rip = reinterpret_cast<uint64_t>(code);
  if (rip_relative) out->address += out->next_rip;
  out->address += segment_base(segment);
  if (opcode == 0x49) out->address += out->stride;  // a plain operand: the index is part of it
  return true;
}

// -------------------------------------------------------------------------------------- operations

// What an instruction ended in: nothing, or the exception and its cause.
struct Fault {
  enum Kind { kNone, kUndefined, kProtection } kind = kNone;
  const char* cause = nullptr;
};
constexpr Fault undefined(const char* cause) { return {Fault::kUndefined, cause}; }
constexpr Fault protection(const char* cause) { return {Fault::kProtection, cause}; }

Fault load_config(ThreadState& state, uint64_t address) {
  ConfigImage image;
  memcpy(&image, reinterpret_cast<const void*>(address), sizeof(image));
  if (image.palette > 1) return protection("ldtilecfg: palette other than 0 and 1");
  if (image.palette == 0) {
    memset(&state, 0, sizeof(state));
    count(kReleases);
    return {};
  }
  for (uint8_t byte : image.reserved) {
    if (byte != 0) return protection("ldtilecfg: reserved bytes 2..15 not zero");
  }
  for (unsigned t = 0; t < kTiles; ++t) {
    if (image.colsb[t] > kRowBytes) return protection("ldtilecfg: colsb > 64");
    if (image.rows[t] > kMaxRows) return protection("ldtilecfg: rows > 16");
    if ((image.colsb[t] == 0) != (image.rows[t] == 0)) {
      return protection("ldtilecfg: only one of rows and colsb is zero");
    }
  }
  for (unsigned t = kTiles; t < 16; ++t) {
    if (image.colsb[t] != 0) return protection("ldtilecfg: reserved bytes 32..47 not zero");
    if (image.rows[t] != 0) return protection("ldtilecfg: reserved bytes 56..63 not zero");
  }
  memset(state.tile, 0, sizeof(state.tile));
  state.config = image;
  count(kConfigs);
  return {};
}

// A tile that is not part of the configuration, or none loaded, has no rows.
bool configured(const ThreadState& state, unsigned t) { return state.config.rows[t] != 0; }

Fault check_transfer(const ThreadState& state, unsigned t) {
  if (!configured(state, t)) return undefined("tile load or store: tile not configured");
  if (state.config.colsb[t] % 4 != 0) return undefined("tile load or store: colsb % 4 != 0");
  if (state.config.start_row >= state.config.rows[t]) {
    return undefined("tile load or store: start_row >= rows");
  }
  return {};
}

Fault load_tile(ThreadState& state, const Instruction& insn) {
  if (const Fault fault = check_transfer(state, insn.reg); fault.kind) return fault;
  const unsigned colsb = state.config.colsb[insn.reg];
  // A fault in row r leaves start_row at r, as on the hardware.
  for (; state.config.start_row < state.config.rows[insn.reg]; ++state.config.start_row) {
    const unsigned row = state.config.start_row;
    const uint64_t address = insn.address + row * insn.stride;
    memcpy(state.tile[insn.reg][row], reinterpret_cast<const void*>(address), colsb);
  }
  state.config.start_row = 0;
  count(kLoads);
  return {};
}

Fault store_tile(ThreadState& state, const Instruction& insn) {
  if (const Fault fault = check_transfer(state, insn.reg); fault.kind) return fault;
  const unsigned colsb = state.config.colsb[insn.reg];
  for (; state.config.start_row < state.config.rows[insn.reg]; ++state.config.start_row) {
    const unsigned row = state.config.start_row;
    const uint64_t address = insn.address + row * insn.stride;
    memcpy(reinterpret_cast<void*>(address), state.tile[insn.reg][row], colsb);
  }
  state.config.start_row = 0;
  count(kStores);
  return {};
}

Fault zero_tile(ThreadState& state, unsigned t) {
  if (!configured(state, t)) return undefined("tilezero: tile not configured");
  memset(state.tile[t], 0, sizeof(Tile));
  state.config.start_row = 0;
  count(kZeros);
  return {};
}

// Widens a row of bytes to 16-bit lanes and splits every dword b0 b1 b2 b3 into the pairs (b0, b1)
// and (b2, b3), which pmaddwd multiplies and adds exactly: |pair sum| <= 2 * 255 * 255.
void split_row(const uint8_t* row, bool is_signed, __m128i low[4], __m128i high[4]) {
  for (unsigned i = 0; i < 4; ++i) {
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(row) + i);
    const __m128i sign =
        is_signed ? _mm_cmpgt_epi8(_mm_setzero_si128(), bytes) : _mm_setzero_si128();
    const __m128 first = _mm_castsi128_ps(_mm_unpacklo_epi8(bytes, sign));
    const __m128 second = _mm_castsi128_ps(_mm_unpackhi_epi8(bytes, sign));
    low[i] = _mm_castps_si128(_mm_shuffle_ps(first, second, _MM_SHUFFLE(2, 0, 2, 0)));
    high[i] = _mm_castps_si128(_mm_shuffle_ps(first, second, _MM_SHUFFLE(3, 1, 3, 1)));
  }
}

// C[m][n] += sum over k and i of A[m][4k + i] * B[k][4n + i], dwords wrapping. Always over all 16
// columns: those beyond colsb are zero in B and stay zero in C.
Fault dot(ThreadState& state, const Instruction& insn) {
  const unsigned c = insn.reg, a = insn.rm, b = insn.vvvv;
  const ConfigImage& config = state.config;
  if (c == a || a == b || c == b) return undefined("dot: tiles not distinct");
  for (unsigned t : {c, a, b}) {
    if (!configured(state, t)) return undefined("dot: tile not configured");
    if (config.colsb[t] % 4 != 0) return undefined("dot: colsb % 4 != 0");
  }
  if (config.colsb[a] / 4 != config.rows[b]) return undefined("dot: A.colsb / 4 != B.rows");
  if (config.rows[c] != config.rows[a]) return undefined("dot: C.rows != A.rows");
  if (config.colsb[c] != config.colsb[b]) return undefined("dot: C.colsb != B.colsb");

  const unsigned k_groups = config.rows[b];
  __m128i b_low[kMaxRows][4], b_high[kMaxRows][4];
  for (unsigned k = 0; k < k_groups; ++k) {
    split_row(state.tile[b][k], insn.b_signed, b_low[k], b_high[k]);
  }
  for (unsigned m = 0; m < config.rows[c]; ++m) {
    alignas(16) int32_t a_low[kColumns], a_high[kColumns];
    split_row(state.tile[a][m], insn.a_signed, reinterpret_cast<__m128i*>(a_low),
              reinterpret_cast<__m128i*>(a_high));
    __m128i* row = reinterpret_cast<__m128i*>(state.tile[c][m]);
    __m128i sum[4] = {row[0], row[1], row[2], row[3]};
    for (unsigned k = 0; k < k_groups; ++k) {
      const __m128i low = _mm_set1_epi32(a_low[k]), high = _mm_set1_epi32(a_high[k]);
      for (unsigned i = 0; i < 4; ++i) {
        sum[i] = _mm_add_epi32(sum[i], _mm_madd_epi16(low, b_low[k][i]));
        sum[i] = _mm_add_epi32(sum[i], _mm_madd_epi16(high, b_high[k][i]));
      }
    }
    for (unsigned i = 0; i < 4; ++i) row[i] = sum[i];
  }
  state.config.start_row = 0;
  count(kDots);
  return {};
}

Fault execute(const Instruction& insn) {
  ThreadState& state = thread_state();
  switch (insn.op) {
    case Op::kLoadConfig:
      return load_config(state, insn.address);
    case Op::kStoreConfig:
      memcpy(reinterpret_cast<void*>(insn.address), &state.config, sizeof(state.config));
      return {};
    case Op::kRelease:
      memset(&state, 0, sizeof(state));
      count(kReleases);
      return {};
    case Op::kZero:
      return zero_tile(state, insn.reg);
    case Op::kLoad:
      return load_tile(state, insn);
    case Op::kStore:
      return store_tile(state, insn);
    case Op::kDot:
      return dot(state, insn);
  }
  __builtin_unreachable();
}

// ----------------------------------------------------------------------------------------- signals

struct sigaction g_previous;  // written once, before the handler can run

void report(const Fault& fault, uint64_t rip) {
  char line[160] = "amx_emulator: #";
  strcat(line, fault.kind == Fault::kUndefined ? "UD" : "GP");
  strcat(line, " at 0x");
  char* end = line + strlen(line);
  for (int shift = 60; shift >= 0; shift -= 4) *end++ = "0123456789abcdef"[(rip >> shift) & 15];
  *end = '\0';
  strcat(strcat(strcat(line, ": "), fault.cause), "\n");
  write_stderr(line);
}

void raise_default(int number) {
  signal(number, SIG_DFL);
  raise(number);
}

// The process's own SIGSEGV action first, as it would be for a #GP; it must not return to the
// instruction, which has not been performed.
[[noreturn]] void raise_protection() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGSEGV);
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  raise(SIGSEGV);
  raise_default(SIGSEGV);
  abort();
}

void chain(int number, siginfo_t* info, void* context) {
  const bool synchronous = info->si_code > 0;
  if (g_previous.sa_flags & SA_SIGINFO) {
    g_previous.sa_sigaction(number, info, context);
  } else if (g_previous.sa_handler != SIG_DFL && g_previous.sa_handler != SIG_IGN) {
    g_previous.sa_handler(number);
  } else if (synchronous) {
    // Returning runs the instruction again, which now kills with the right RIP. The kernel does not
    // let a process ignore it either.
    signal(SIGILL, SIG_DFL);
  } else if (g_previous.sa_handler == SIG_DFL) {
    raise_default(SIGILL);
  }
}

void on_sigill(int number, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  // si_code <= 0: sent by kill or raise, RIP is any instruction.
  bool advanced = false;
  Instruction insn;
  while (info->si_code > 0 && decode(registers, &insn)) {
    const Fault fault = execute(insn);
    if (fault.kind != Fault::kNone) {
      report(fault, static_cast<uint64_t>(registers[REG_RIP]));
      if (fault.kind == Fault::kProtection) raise_protection();
      advanced = false;
      break;
    }
    // A run of adjacent instructions costs one signal (5 to 10 us, ten times an operation): none of
    // them changes a general register.
    registers[REG_RIP] = static_cast<greg_t>(insn.next_rip);
    advanced = true;
  }
  if (!advanced) chain(number, info, context);
  errno = saved_errno;
}

// ---------------------------------------------------------------------------------------- install

bool native_amx_granted() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;  // OSXSAVE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & (1u << 24)) || !(d & (1u << 25))) return false;  // AMX-TILE, AMX-INT8
  unsigned xcr0_low, xcr0_high;
  __asm__ volatile("xgetbv" : "=a"(xcr0_low), "=d"(xcr0_high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // XTILECFG, XTILEDATA
  if ((xcr0_low & kTileState) != kTileState) return false;
  constexpr long kReqXcompPerm = 0x1023, kXtiledata = 18;
  return syscall(SYS_arch_prctl, kReqXcompPerm, kXtiledata) == 0;
}

}  // namespace

AmxMode install_amx_emulator() {
  static std::mutex mutex;
  static bool prepared = false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (native_amx_granted()) return AmxMode::kNative;
  if (!prepared) {
    if (pthread_key_create(&g_state_key, free_state) != 0) {
      write_stderr("amx_emulator: no thread-specific key left\n");
      abort();
    }
    sigaction(SIGILL, nullptr, &g_previous);
    prepared = true;
  }
  struct sigaction action = {};
  action.sa_sigaction = on_sigill;
  // SA_NODEFER: a jump out of a SIGSEGV handler (bad memory operand) must not leave SIGILL blocked,
  // and a foreign SIGILL below the handler must kill rather than be held. No SA_ONSTACK: the
  // interrupted stack is a compute kernel's, an alternative stack may be minimal.
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGILL, &action, nullptr);
  return AmxMode::kEmulated;
}

AmxCounters amx_counters() {
  const auto get = [](Counter counter) {
    return g_counters[counter].load(std::memory_order_relaxed);
  };
  return {get(kConfigs), get(kReleases), get(kLoads), get(kStores), get(kZeros), get(kDots)};
}

void reset_amx_counters() {
  for (auto& counter : g_counters) counter.store(0, std::memory_order_relaxed);
}

}  // namespace sq_cpu::testing

extern "C" {

int sq_amx_install(void) {
  return sq_cpu::testing::install_amx_emulator() == sq_cpu::testing::AmxMode::kEmulated;
}

void sq_amx_counters(uint64_t out[6]) {
  const sq_cpu::testing::AmxCounters counters = sq_cpu::testing::amx_counters();
  static_assert(sizeof(counters) == 6 * sizeof(uint64_t));
  memcpy(out, &counters, sizeof(counters));
}

void sq_amx_reset(void) { sq_cpu::testing::reset_amx_counters(); }

}  // extern "C"
