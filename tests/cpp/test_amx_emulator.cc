// Real AMX instructions, through the emulator or on the hardware, against plain references.
// Build: amx_emulator.cc and this file, no -m flags, -pthread. Exit status 0 when all checks
// passed.

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../cpp/testing/amx_emulator.h"

using sq_cpu::testing::amx_counters;
using sq_cpu::testing::AmxCounters;
using sq_cpu::testing::AmxMode;
using sq_cpu::testing::install_amx_emulator;
using sq_cpu::testing::reset_amx_counters;

namespace {

// ------------------------------------------------------------------------------------ check groups

int g_passed = 0, g_failed = 0;

class Group {
 public:
  explicit Group(const char* name) : name_(name) {}
  ~Group() {
    g_passed += passed_;
    g_failed += failed_;
    std::printf("%-34s %6d checks, %d failed\n", name_, passed_ + failed_, failed_);
    std::fflush(stdout);  // before the next fork
  }
  void check(bool ok, const std::string& what) {
    ok ? ++passed_ : ++failed_;
    if (!ok && failed_ <= 10) std::printf("  FAILED %s: %s\n", name_, what.c_str());
  }

 private:
  const char* name_;
  int passed_ = 0, failed_ = 0;
};

std::string text(const char* format, long a = 0, long b = 0, long c = 0, long d = 0) {
  char line[200];
  std::snprintf(line, sizeof(line), format, a, b, c, d);
  return line;
}

// --------------------------------------------------------------------------------- the
// instructions

// The memory image of a configuration.
struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};

  Config& tile(int t, int rows_, int colsb_) {
    rows[t] = static_cast<uint8_t>(rows_);
    colsb[t] = static_cast<uint16_t>(colsb_);
    return *this;
  }
  bool operator==(const Config& other) const { return std::memcmp(this, &other, 64) == 0; }
};
static_assert(sizeof(Config) == 64);

Config zero_config() {
  Config config;
  config.palette = 0;
  return config;
}

Config full_config() {
  Config config;
  for (int t = 0; t < 8; ++t) config.tile(t, 16, 64);
  return config;
}

void ldtilecfg(const Config& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }

Config sttilecfg() {
  Config config;
  std::memset(static_cast<void*>(&config), 0xAB, sizeof(config));
  __asm__ volatile("sttilecfg %0" : "=m"(config)::"memory");
  return config;
}

void tilerelease() { __asm__ volatile("tilerelease" ::: "memory"); }

// The tile number is part of the instruction: one case each.
#define EACH_TILE(t, INSTRUCTION) \
  switch (t) {                    \
    case 0:                       \
      INSTRUCTION("0");           \
      break;                      \
    case 1:                       \
      INSTRUCTION("1");           \
      break;                      \
    case 2:                       \
      INSTRUCTION("2");           \
      break;                      \
    case 3:                       \
      INSTRUCTION("3");           \
      break;                      \
    case 4:                       \
      INSTRUCTION("4");           \
      break;                      \
    case 5:                       \
      INSTRUCTION("5");           \
      break;                      \
    case 6:                       \
      INSTRUCTION("6");           \
      break;                      \
    case 7:                       \
      INSTRUCTION("7");           \
      break;                      \
    default:                      \
      std::abort();               \
  }

void tileloadd(int t, const void* base, int64_t stride) {
#define LOAD(n) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" n::"r"(base), "r"(stride) : "memory")
  EACH_TILE(t, LOAD)
#undef LOAD
}

void tileloaddt1(int t, const void* base, int64_t stride) {
#define LOAD(n) \
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" n::"r"(base), "r"(stride) : "memory")
  EACH_TILE(t, LOAD)
#undef LOAD
}

void tilestored(int t, void* base, int64_t stride) {
#define STORE(n) \
  __asm__ volatile("tilestored %%tmm" n ", (%0,%1,1)" ::"r"(base), "r"(stride) : "memory")
  EACH_TILE(t, STORE)
#undef STORE
}

void tilezero(int t) {
#define ZERO(n) __asm__ volatile("tilezero %%tmm" n::: "memory")
  EACH_TILE(t, ZERO)
#undef ZERO
}

enum Variant { kSS, kSU, kUS, kUU };  // signedness of A, of B
constexpr const char* kVariantName[] = {"tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud"};

// C, A, B by assignment: 0 the usual one, 1 and 2 other tile numbers. AT&T order is B, A, C.
constexpr int kAssignment[3][3] = {{0, 1, 2}, {7, 3, 5}, {4, 6, 0}};

void dot(Variant variant, int assignment) {
#define DOT(mnemonic)                                                    \
  switch (assignment) {                                                  \
    case 0:                                                              \
      __asm__ volatile(mnemonic " %%tmm2, %%tmm1, %%tmm0" ::: "memory"); \
      break;                                                             \
    case 1:                                                              \
      __asm__ volatile(mnemonic " %%tmm5, %%tmm3, %%tmm7" ::: "memory"); \
      break;                                                             \
    default:                                                             \
      __asm__ volatile(mnemonic " %%tmm0, %%tmm6, %%tmm4" ::: "memory"); \
  }
  switch (variant) {
    case kSS:
      DOT("tdpbssd") break;
    case kSU:
      DOT("tdpbsud") break;
    case kUS:
      DOT("tdpbusd") break;
    case kUU:
      DOT("tdpbuud") break;
  }
#undef DOT
}

// -------------------------------------------------------------------------------------- references

using TileBytes = uint8_t[16][64];

// C[m][n] += sum of A[m][4k+i] * B[k][4n+i], wrapping.
void reference_dot(Variant variant, const TileBytes a, const TileBytes b, int rows, int k_groups,
                   int columns, int32_t c[16][16]) {
  const bool a_signed = variant == kSS || variant == kSU;
  const bool b_signed = variant == kSS || variant == kUS;
  const auto widen = [](uint8_t byte, bool is_signed) {
    return is_signed ? static_cast<int8_t>(byte) : static_cast<int>(byte);
  };
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      uint32_t sum = static_cast<uint32_t>(c[m][n]);
      for (int k = 0; k < k_groups; ++k) {
        for (int i = 0; i < 4; ++i) {
          sum += static_cast<uint32_t>(widen(a[m][4 * k + i], a_signed) *
                                       widen(b[k][4 * n + i], b_signed));
        }
      }
      c[m][n] = static_cast<int32_t>(sum);
    }
  }
}

void fill_random(std::mt19937& random, void* data, size_t bytes) {
  auto* out = static_cast<uint8_t*>(data);
  for (size_t i = 0; i < bytes; ++i) out[i] = static_cast<uint8_t>(random() >> 13);
}

// What tile t holds in all 16 rows of 64 bytes cannot be seen under its own shape, so this writes
// every visible byte into an image whose other bytes are `fill`.
void store_image(int t, uint8_t fill, TileBytes image) {
  std::memset(image, fill, sizeof(TileBytes));
  tilestored(t, image, 64);
}

// --------------------------------------------------------------------------------------- the
// groups

// One multiplication in the shape (rows, k_groups, columns); false if any byte of the stored C, or
// a byte around it, differs from the reference.
bool dot_agrees(Variant variant, int assignment, const TileBytes a, const TileBytes b,
                const TileBytes c, int rows, int k_groups, int columns) {
  const int* tile = kAssignment[assignment];
  Config config;
  config.tile(tile[0], rows, 4 * columns);
  config.tile(tile[1], rows, 4 * k_groups);
  config.tile(tile[2], k_groups, 4 * columns);
  ldtilecfg(config);
  tileloadd(tile[0], c, 64);
  tileloadd(tile[1], a, 64);
  tileloadd(tile[2], b, 64);
  dot(variant, assignment);
  TileBytes stored;
  store_image(tile[0], 0xEE, stored);

  int32_t expected_c[16][16];
  std::memcpy(expected_c, c, sizeof(expected_c));
  reference_dot(variant, a, b, rows, k_groups, columns, expected_c);
  TileBytes expected;
  std::memset(expected, 0xEE, sizeof(expected));
  for (int m = 0; m < rows; ++m) {
    std::memcpy(expected[m], expected_c[m], static_cast<size_t>(4 * columns));
  }
  return std::memcmp(stored, expected, sizeof(stored)) == 0;
}

void test_dots() {
  std::mt19937 random(1);
  alignas(64) TileBytes a, b, c;
  for (Variant variant : {kSS, kSU, kUS, kUU}) {
    Group group(kVariantName[variant]);
    for (int rows = 1; rows <= 16; ++rows) {
      for (int k_groups = 1; k_groups <= 16; ++k_groups) {
        for (int columns = 1; columns <= 16; ++columns) {
          fill_random(random, a, sizeof(a));
          fill_random(random, b, sizeof(b));
          fill_random(random, c, sizeof(c));
          const int assignment = (rows + k_groups + columns) % 3;
          group.check(dot_agrees(variant, assignment, a, b, c, rows, k_groups, columns),
                      text("random, rows %ld, k/4 %ld, columns %ld, assignment %ld", rows, k_groups,
                           columns, assignment));
        }
      }
    }
    // Extremes of both signs, with an accumulator that wraps.
    const uint8_t extremes[] = {0x00, 0x01, 0x7F, 0x80, 0x81, 0xFF};
    for (uint8_t value_a : extremes) {
      for (uint8_t value_b : extremes) {
        for (int32_t value_c : {0, -1, INT32_MAX, INT32_MIN}) {
          std::memset(a, value_a, sizeof(a));
          std::memset(b, value_b, sizeof(b));
          for (int i = 0; i < 256; ++i) std::memcpy(&c[0][0] + 4 * i, &value_c, 4);
          group.check(dot_agrees(variant, 0, a, b, c, 16, 16, 16),
                      text("extremes, A %ld, B %ld, C %ld", value_a, value_b, value_c));
        }
      }
    }
    // Signs that alternate within a group of four.
    for (int i = 0; i < 1024; ++i) {
      (&a[0][0])[i] = (i & 1) ? 0x80 : 0x7F;
      (&b[0][0])[i] = (i & 2) ? 0xFF : 0x80;
    }
    group.check(dot_agrees(variant, 1, a, b, c, 16, 16, 16), "alternating signs");
  }
}

void test_dot_accumulates() {
  Group group("repeated dots accumulate");
  std::mt19937 random(2);
  alignas(64) TileBytes a, b, stored;
  int32_t expected[16][16] = {};
  ldtilecfg(full_config());
  tilezero(0);
  for (int step = 0; step < 50; ++step) {
    fill_random(random, a, sizeof(a));
    fill_random(random, b, sizeof(b));
    tileloadd(1, a, 64);
    tileloaddt1(2, b, 64);
    dot(static_cast<Variant>(step % 4), 0);
    reference_dot(static_cast<Variant>(step % 4), a, b, 16, 16, 16, expected);
  }
  tilestored(0, stored, 64);
  group.check(std::memcmp(stored, expected, sizeof(stored)) == 0, "50 dots of all variants");
  tilerelease();
}

// A run of instructions without anything between.
void test_adjacent() {
  Group group("adjacent instructions");
  std::mt19937 random(11);
  alignas(64) TileBytes a, b, stored;
  fill_random(random, a, sizeof(a));
  fill_random(random, b, sizeof(b));
  int32_t expected[16][16] = {};
  ldtilecfg(full_config());
  __asm__ volatile(
      "tileloadd (%[a],%[stride],1), %%tmm1\n"
      "tileloaddt1 (%[b],%[stride],1), %%tmm2\n"
      "tilezero %%tmm0\n"
      "tdpbssd %%tmm2, %%tmm1, %%tmm0\n"
      "tdpbusd %%tmm2, %%tmm1, %%tmm0\n"
      "tilestored %%tmm0, (%[c],%[stride],1)\n"
      "tilerelease\n" ::[a] "r"(a),
      [b] "r"(b), [c] "r"(stored), [stride] "r"(int64_t{64})
      : "memory");
  reference_dot(kSS, a, b, 16, 16, 16, expected);
  reference_dot(kUS, a, b, 16, 16, 16, expected);
  group.check(std::memcmp(stored, expected, sizeof(stored)) == 0, "loads, zero, dots, store");
  group.check(sttilecfg() == zero_config(), "release at the end of the run");
}

void test_strides() {
  Group group("load and store strides");
  std::mt19937 random(3);
  std::vector<uint8_t> memory(16 * 5000 * 2 + 256), written(memory.size());
  fill_random(random, memory.data(), memory.size());
  uint8_t* const middle = memory.data() + memory.size() / 2;
  for (int t = 0; t < 8; ++t) {
    for (int rows : {1, 3, 16}) {
      for (int colsb : {4, 12, 60, 64}) {
        for (int64_t stride : {64, 0, 4, 65, 200, 4096, 5000, -64, -77, -5000}) {
          for (bool t1 : {false, true}) {
            ldtilecfg(Config().tile(t, rows, colsb));
            t1 ? tileloaddt1(t, middle + 1, stride) : tileloadd(t, middle + 1, stride);
            TileBytes image, expected;
            store_image(t, 0x5C, image);
            std::memset(expected, 0x5C, sizeof(expected));
            for (int r = 0; r < rows; ++r) {
              std::memcpy(expected[r], middle + 1 + r * stride, static_cast<size_t>(colsb));
            }
            group.check(
                std::memcmp(image, expected, sizeof(image)) == 0,
                text("load tile %ld, rows %ld, colsb %ld, stride %ld", t, rows, colsb, stride));
          }
          // The same tile stored with that stride; rows in order where they overlap.
          TileBytes source;
          fill_random(random, source, sizeof(source));
          tileloadd(t, source, 64);
          std::fill(written.begin(), written.end(), uint8_t{0x33});
          std::vector<uint8_t> expected = written;
          const size_t start = written.size() / 2 + 3;
          tilestored(t, written.data() + start, stride);
          for (int r = 0; r < rows; ++r) {
            std::memcpy(expected.data() + start + r * stride, source[r],
                        static_cast<size_t>(colsb));
          }
          group.check(written == expected, text("store tile %ld, rows %ld, colsb %ld, stride %ld",
                                                t, rows, colsb, stride));
        }
      }
    }
  }
  tilerelease();
}

void test_config() {
  Group group("configuration");
  std::mt19937 random(4);
  tilerelease();
  group.check(sttilecfg() == zero_config(), "sttilecfg after release stores zeros");
  for (int i = 0; i < 200; ++i) {
    Config config;
    config.start_row = static_cast<uint8_t>(random() % 16);
    for (int t = 0; t < 8; ++t) {
      if (random() % 4 == 0) continue;  // left unconfigured
      config.tile(t, 1 + static_cast<int>(random() % 16), 1 + static_cast<int>(random() % 64));
    }
    ldtilecfg(config);
    group.check(sttilecfg() == config, text("round trip %ld", i));
  }
  tilerelease();
  group.check(sttilecfg() == zero_config(), "tilerelease");
  ldtilecfg(full_config());
  ldtilecfg(zero_config());
  group.check(sttilecfg() == zero_config(), "palette 0 releases");

  // Save, reconfigure, restore: the kernel's protocol.
  const Config outer = Config().tile(3, 7, 20);
  ldtilecfg(outer);
  const Config saved = sttilecfg();
  ldtilecfg(full_config());
  ldtilecfg(saved);
  group.check(sttilecfg() == outer, "saved configuration restored");
  tilerelease();
}

void test_zeroing() {
  Group group("zeroing");
  std::mt19937 random(5);
  TileBytes bytes, image;
  const TileBytes zeros = {};
  for (int t = 0; t < 8; ++t) {
    fill_random(random, bytes, sizeof(bytes));
    ldtilecfg(full_config());
    store_image(t, 0x77, image);
    group.check(std::memcmp(image, zeros, sizeof(image)) == 0, "ldtilecfg zeroes the tiles");
    tileloadd(t, bytes, 64);
    tilezero(t);
    store_image(t, 0x77, image);
    group.check(std::memcmp(image, zeros, sizeof(image)) == 0, "tilezero");
    for (int other = 0; other < 8; ++other) tileloadd(other, bytes, 64);
    tilezero(t);
    for (int other = 0; other < 8; ++other) {
      store_image(other, 0x77, image);
      group.check(std::memcmp(image, other == t ? zeros : bytes, sizeof(image)) == 0,
                  "tilezero touches one tile");
    }
    tilerelease();
    ldtilecfg(full_config());
    store_image(t, 0x77, image);
    group.check(std::memcmp(image, zeros, sizeof(image)) == 0, "tilerelease zeroes the tiles");
  }

  // start_row: rows below it are kept, it is consumed by the instruction, and the bytes right of
  // colsb were zero all along (seen through a dot whose B has 16 rows).
  for (int start : {1, 5, 15}) {
    Config config = full_config();
    config.start_row = static_cast<uint8_t>(start);
    ldtilecfg(config);
    tileloadd(0, bytes, 64);
    group.check(sttilecfg() == full_config(), "load consumes start_row");
    store_image(0, 0x77, image);
    bool ok = true;
    for (int r = 0; r < 16; ++r) {
      ok &= std::memcmp(image[r], r < start ? zeros[r] : bytes[r], 64) == 0;
    }
    group.check(ok, text("load from start_row %ld", start));

    ldtilecfg(config);
    store_image(0, 0x77, image);
    ok = true;
    for (int r = 0; r < 16; ++r) {
      for (int i = 0; i < 64; ++i) ok &= image[r][i] == (r < start ? 0x77 : 0);
    }
    group.check(ok, text("store from start_row %ld", start));
    ldtilecfg(config);
    tilezero(0);
    group.check(sttilecfg() == full_config(), "tilezero resets start_row");
  }
  tilerelease();
}

// ------------------------------------------------------------------------------- addressing forms

// One thunk of 128 bytes for each operation, base, index (rsp in the list stands for no index) and
// form; thunk(base value, index value) puts the values into the registers the instruction names.
// rsp is kept in xmm2, which both the handler and the hardware preserve.
#define THUNK_REGISTERS "rax,rcx,rdx,rbx,rsp,rbp,rsi,rdi,r8,r9,r10,r11,r12,r13,r14,r15"

__asm__(R"(
    .macro sq_thunk before, after, base, index, scale, disp
    .p2align 7
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    movq %rsp, %xmm2
    movq %rdi, %xmm0
    movq %rsi, %xmm1
    movq %xmm0, %\base
    .ifc \index, rsp
    \before \disp(%\base) \after
    .else
    movq %xmm1, %\index
    \before \disp(%\base, %\index, \scale) \after
    .endif
    movq %xmm2, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret
    .endm
    .macro sq_thunk_forms before, after
    .irp base, )" THUNK_REGISTERS R"(
    .irp index, )" THUNK_REGISTERS R"(
    sq_thunk "\before", "\after", \base, \index, 1,
    sq_thunk "\before", "\after", \base, \index, 2, -64
    sq_thunk "\before", "\after", \base, \index, 4, -70000
    sq_thunk "\before", "\after", \base, \index, 8, 4096
    .endr
    .endr
    .endm
    .text
    .p2align 7
    sq_load_thunks:
    sq_thunk_forms "tileloadd", ", %tmm0"
    .p2align 7
    sq_store_thunks:
    sq_thunk_forms "tilestored %tmm0, ", ""
    .p2align 7
    sq_ldtilecfg_thunks:
    sq_thunk_forms "ldtilecfg", ""
    .p2align 7
    sq_sttilecfg_thunks:
    sq_thunk_forms "sttilecfg", ""
)");

#define HIDDEN __attribute__((visibility("hidden")))
extern "C" HIDDEN char sq_load_thunks[], sq_store_thunks[];
extern "C" HIDDEN char sq_ldtilecfg_thunks[], sq_sttilecfg_thunks[];

constexpr const char* kRegisterName[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                           "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
constexpr int kRsp = 4;
constexpr int64_t kFormDisp[4] = {0, -64, -70000, 4096};

void call_thunk(char* thunks, int base, int index, int form, void* base_value,
                int64_t index_value) {
  char* thunk = thunks + 128 * ((base * 16 + index) * 4 + form);
  reinterpret_cast<void (*)(void*, int64_t)>(thunk)(base_value, index_value);
}

void test_addressing() {
  Group group("addressing forms");
  std::mt19937 random(6);
  // With rsp as base the kernel puts the signal frame below base - 128: room on that side.
  constexpr size_t kBytes = 512 * 1024;
  std::vector<uint8_t> memory(kBytes);
  fill_random(random, memory.data(), kBytes);
  constexpr int64_t kIndexValue = 104;

  for (int base = 0; base < 16; ++base) {
    for (int index = 0; index < 16; ++index) {
      for (int form = 0; form < 4; ++form) {
        uint8_t* const base_value = memory.data() + kBytes / 2 + 16 * base + index;
        const bool no_index = index == kRsp;
        const int64_t stride = no_index ? 0 : kIndexValue << form;
        // One register as both: row 0 alone has an address that makes sense.
        const int rows = base == index && !no_index ? 1 : 11;
        const std::string name = text("disp %ld, scale %ld, base ", kFormDisp[form], 1 << form) +
                                 kRegisterName[base] + ", index " +
                                 (no_index ? "none" : kRegisterName[index]);
        // base == index: the second move, of the index, must still give the base.
        const int64_t index_value = rows == 1 ? reinterpret_cast<int64_t>(base_value) : kIndexValue;
        uint8_t* const target =
            base_value + kFormDisp[form] + (rows == 1 ? index_value << form : 0);
        if (rows == 1) {
          // The address of row 0 does not contain the index; ldtilecfg's does, so it is left out.
          ldtilecfg(Config().tile(0, 1, 48));
          call_thunk(sq_load_thunks, base, index, form, base_value, index_value);
          TileBytes image;
          store_image(0, 0, image);
          group.check(std::memcmp(image, base_value + kFormDisp[form], 48) == 0, "load " + name);
          continue;
        }

        ldtilecfg(Config().tile(0, rows, 48));
        call_thunk(sq_load_thunks, base, index, form, base_value, index_value);
        TileBytes image, expected = {};
        store_image(0, 0, image);
        for (int r = 0; r < rows; ++r) std::memcpy(expected[r], target + r * stride, 48);
        group.check(std::memcmp(image, expected, sizeof(image)) == 0, "load " + name);

        TileBytes source;
        fill_random(random, source, sizeof(source));
        tileloadd(0, source, 64);
        call_thunk(sq_store_thunks, base, index, form, base_value, index_value);
        bool ok = true;
        for (int r = no_index ? rows - 1 : 0; r < rows; ++r) {
          ok &= std::memcmp(target + r * stride, source[r], 48) == 0;
        }
        group.check(ok, "store " + name);

        // A configuration is at base + index * scale + disp.
        uint8_t* const image_at = target + stride;
        const Config config = Config().tile(base % 8, 1 + index, 4 + 4 * form);
        ldtilecfg(zero_config());
        std::memcpy(image_at, &config, sizeof(config));
        call_thunk(sq_ldtilecfg_thunks, base, index, form, base_value, index_value);
        group.check(sttilecfg() == config, "ldtilecfg " + name);
        std::memset(image_at, 0xAB, sizeof(config));
        call_thunk(sq_sttilecfg_thunks, base, index, form, base_value, index_value);
        group.check(std::memcmp(image_at, &config, sizeof(config)) == 0, "sttilecfg " + name);
      }
    }
  }
  tilerelease();
}

alignas(64) Config g_static_config;
thread_local Config t_config;

void test_special_addressing() {
  Group group("RIP-relative, absolute, FS");
  g_static_config = Config().tile(1, 2, 8);
  __asm__ volatile("ldtilecfg %0" ::"m"(g_static_config) : "memory");  // RIP-relative
  group.check(sttilecfg() == g_static_config, "ldtilecfg RIP-relative");
  const Config expected = g_static_config;
  std::memset(static_cast<void*>(&g_static_config), 0xAB, sizeof(g_static_config));
  __asm__ volatile("sttilecfg %0" : "=m"(g_static_config)::"memory");
  group.check(g_static_config == expected, "sttilecfg RIP-relative");

  t_config = Config().tile(5, 9, 36);
  uint64_t fs_base;
  __asm__("mov %%fs:0, %0" : "=r"(fs_base));
  const uint64_t offset = reinterpret_cast<uint64_t>(&t_config) - fs_base;
  __asm__ volatile("ldtilecfg %%fs:(%0)" ::"r"(offset) : "memory");
  group.check(sttilecfg() == t_config, "ldtilecfg with FS override");
  __asm__ volatile("ldtilecfg %%fs:16(%0,%1,2)" ::"r"(offset - 116), "r"(uint64_t{50}) : "memory");
  group.check(sttilecfg() == t_config, "ldtilecfg with FS override, index and displacement");
  tilerelease();
  __asm__ volatile(".byte 0x2e\n ldtilecfg (%0)" ::"r"(&t_config) : "memory");
  group.check(sttilecfg() == t_config, "segment override without effect");

  // An address that fits a disp32, for the forms without a base.
  constexpr uintptr_t kLow = 0x10000000;
  void* low = mmap(reinterpret_cast<void*>(kLow), 65536, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (low != reinterpret_cast<void*>(kLow)) {
    group.check(false, "no memory at 0x10000000 for the absolute forms");
    return;
  }
  auto* bytes = static_cast<uint8_t*>(low);
  std::mt19937 random(7);
  fill_random(random, bytes, 65536);
  ldtilecfg(Config().tile(6, 13, 28));
  TileBytes image, wanted = {};
  __asm__ volatile("tileloadd 0x10000000(,%0,8), %%tmm6" ::"r"(int64_t{9}) : "memory");
  store_image(6, 0, image);
  for (int r = 0; r < 13; ++r) std::memcpy(wanted[r], bytes + r * 72, 28);
  group.check(std::memcmp(image, wanted, sizeof(image)) == 0, "tileloadd without base");
  register int64_t r12 __asm__("r12") = 100;
  __asm__ volatile("tileloadd 0x10000100(,%0,1), %%tmm6" ::"r"(r12) : "memory");
  store_image(6, 0, image);
  for (int r = 0; r < 13; ++r) std::memcpy(wanted[r], bytes + 0x100 + r * 100, 28);
  group.check(std::memcmp(image, wanted, sizeof(image)) == 0, "tileloadd without base, index r12");
  // The same with VEX.B set, which a missing base ignores: 0x10000000(,%rax,8).
  __asm__ volatile(".byte 0xC4, 0xC2, 0x7B, 0x4B, 0x34, 0xC5, 0, 0, 0, 0x10" ::"a"(int64_t{7})
                   : "memory");
  store_image(6, 0, image);
  for (int r = 0; r < 13; ++r) std::memcpy(wanted[r], bytes + r * 56, 28);
  group.check(std::memcmp(image, wanted, sizeof(image)) == 0, "tileloadd without base, VEX.B");
  const Config config = Config().tile(2, 4, 16);
  std::memcpy(bytes + 0x200, &config, sizeof(config));
  __asm__ volatile("ldtilecfg 0x10000200" ::: "memory");
  group.check(sttilecfg() == config, "ldtilecfg absolute");
  munmap(low, 65536);
  tilerelease();
}

void test_page_ends() {
  Group group("page ends");
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  auto* memory = static_cast<uint8_t*>(mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE | PROT_EXEC,
                                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED || mprotect(memory + page, page, PROT_NONE) != 0) {
    group.check(false, "no memory");
    return;
  }
  std::mt19937 random(8);
  fill_random(random, memory, page);
  // Operands whose last byte is the page's last.
  TileBytes image, expected = {};
  ldtilecfg(Config().tile(0, 5, 20));
  tileloadd(0, memory + page - 4 * 30 - 20, 30);
  store_image(0, 0, image);
  for (int r = 0; r < 5; ++r) std::memcpy(expected[r], memory + page - 20 - (4 - r) * 30, 20);
  group.check(std::memcmp(image, expected, sizeof(image)) == 0, "tileloadd");
  tilestored(0, memory + page - 100, 20);
  group.check(std::memcmp(memory + page - 20, image[4], 20) == 0, "tilestored");
  auto* last = reinterpret_cast<Config*>(memory + page - sizeof(Config));
  *last = Config().tile(1, 1, 4);
  ldtilecfg(*last);
  group.check(sttilecfg() == *last, "ldtilecfg");
  // The code itself: tilerelease (C4 E2 78 49 C0) and ret, the page's last bytes, and one form
  // whose ModRM says that no SIB follows: ldtilecfg (%rdi) (C4 E2 78 49 07).
  const uint8_t release[] = {0xC4, 0xE2, 0x78, 0x49, 0xC0, 0xC3};
  std::memcpy(memory + page - sizeof(release), release, sizeof(release));
  reinterpret_cast<void (*)()>(memory + page - sizeof(release))();
  group.check(sttilecfg() == zero_config(), "tilerelease in a page's last bytes");
  const uint8_t load[] = {0xC4, 0xE2, 0x78, 0x49, 0x07, 0xC3};
  std::memcpy(memory + page - sizeof(load), load, sizeof(load));
  const Config config = full_config();
  reinterpret_cast<void (*)(const void*)>(memory + page - sizeof(load))(&config);
  group.check(sttilecfg() == config, "ldtilecfg in a page's last bytes");
  munmap(memory, 2 * page);
  tilerelease();
}

void test_context_kept() {
  Group group("registers, flags and errno kept");
  std::mt19937 random(9);
  alignas(64) TileBytes bytes;
  fill_random(random, bytes, sizeof(bytes));
  ldtilecfg(full_config());
  uint64_t before[8], after[8];
  for (auto& word : before) word = (static_cast<uint64_t>(random()) << 32) | random();
  uint8_t carry, parity;
  errno = 4242;
  __asm__ volatile(
      "movdqu (%[before]), %%xmm0\n movdqu 16(%[before]), %%xmm7\n"
      "movdqu 32(%[before]), %%xmm8\n movdqu 48(%[before]), %%xmm15\n"
      "stc\n"
      "tileloadd (%[bytes],%[stride],1), %%tmm1\n"
      "tileloadd (%[bytes],%[stride],1), %%tmm2\n"
      "tilezero %%tmm0\n tdpbuud %%tmm2, %%tmm1, %%tmm0\n"
      "setc %[carry]\n setp %[parity]\n"
      "movdqu %%xmm0, (%[after])\n movdqu %%xmm7, 16(%[after])\n"
      "movdqu %%xmm8, 32(%[after])\n movdqu %%xmm15, 48(%[after])\n"
      : [carry] "=&q"(carry), [parity] "=&q"(parity)
      : [before] "r"(before), [after] "r"(after), [bytes] "r"(bytes), [stride] "r"(uint64_t{64})
      : "xmm0", "xmm7", "xmm8", "xmm15", "cc", "memory");
  group.check(std::memcmp(before, after, sizeof(before)) == 0, "xmm registers");
  group.check(carry == 1, "carry flag");
  group.check(errno == 4242, "errno");
  // Data in the red zone of a leaf: the handler runs on this stack, below it.
  uint64_t red;
  __asm__ volatile(
      "movq $0x1234567, -128(%%rsp)\n movq $0x1234567, -8(%%rsp)\n"
      "tilezero %%tmm3\n"
      "movq -128(%%rsp), %0\n addq -8(%%rsp), %0\n"
      : "=r"(red)::"memory", "cc");
  group.check(red == 2 * 0x1234567, "red zone");
  tilerelease();
}

void test_threads() {
  Group group("threads with their own tiles");
  constexpr int kThreads = 6;
  int failures[kThreads] = {};
  std::vector<std::thread> threads;
  for (int id = 0; id < kThreads; ++id) {
    threads.emplace_back([id, &failures] {
      failures[id] += !(sttilecfg() == zero_config());  // a new thread begins released
      std::mt19937 random(static_cast<unsigned>(100 + id));
      alignas(64) TileBytes a, b, c;
      for (int i = 0; i < 300; ++i) {
        const int rows = 1 + (id + i) % 16, k_groups = 1 + (3 * id + i) % 16;
        const int columns = 1 + (7 * id + i) % 16;
        fill_random(random, a, sizeof(a));
        fill_random(random, b, sizeof(b));
        fill_random(random, c, sizeof(c));
        failures[id] +=
            !dot_agrees(static_cast<Variant>(i % 4), i % 3, a, b, c, rows, k_groups, columns);
        const Config current = sttilecfg();
        failures[id] += current.rows[kAssignment[i % 3][0]] != rows;
        failures[id] += current.colsb[kAssignment[i % 3][0]] != 4 * columns;
        if (i % 16 == id) std::this_thread::yield();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (int id = 0; id < kThreads; ++id) {
    group.check(failures[id] == 0, text("thread %ld: %ld failures", id, failures[id]));
  }
  // Threads that come and go give their state back: one more mapping each would show here.
  const auto mappings = [] {
    std::FILE* maps = std::fopen("/proc/self/maps", "r");
    int lines = 0;
    for (int c; maps && (c = std::fgetc(maps)) != EOF;) lines += c == '\n';
    if (maps) std::fclose(maps);
    return lines;
  };
  const auto virtual_pages = [] {
    long pages = 0;
    std::FILE* statm = std::fopen("/proc/self/statm", "r");
    if (statm == nullptr || std::fscanf(statm, "%ld", &pages) != 1) pages = -1;
    if (statm) std::fclose(statm);
    return pages;
  };
  const auto one_thread = [] {
    std::thread([] {
      ldtilecfg(full_config());
      tilezero(0);
    }).join();
  };
  for (int i = 0; i < 20; ++i) one_thread();  // stacks and arenas settle
  const long pages = virtual_pages();
  const int lines = mappings();
  for (int i = 0; i < 300; ++i) one_thread();
  group.check(mappings() - lines < 100, "mappings grow with finished threads");
  group.check(virtual_pages() - pages < 300, "memory grows with finished threads");
}

void test_fork() {
  Group group("fork");
  std::mt19937 random(10);
  TileBytes bytes, image;
  fill_random(random, bytes, sizeof(bytes));
  ldtilecfg(full_config());
  tileloadd(4, bytes, 64);
  // The kernel drops tile data at fork, so the child configures anew.
  const pid_t child = fork();
  if (child == 0) {
    ldtilecfg(Config().tile(4, 3, 12));
    tileloadd(4, bytes[8], 64);
    store_image(4, 0, image);
    const bool same = std::memcmp(image[2], bytes[10], 12) == 0 && image[3][0] == 0;
    tilerelease();
    _exit(same ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  group.check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child has tiles");
  store_image(4, 0, image);
  group.check(std::memcmp(image, bytes, sizeof(image)) == 0, "the parent keeps its own");
  tilerelease();
}

void test_counters(AmxMode mode) {
  Group group("counters");
  TileBytes bytes = {};
  reset_amx_counters();
  ldtilecfg(full_config());
  ldtilecfg(full_config());
  for (int i = 0; i < 3; ++i) tilezero(i);
  for (int i = 0; i < 4; ++i) tileloadd(i, bytes, 64);
  tileloaddt1(4, bytes, 64);
  for (int i = 0; i < 6; ++i) tilestored(i, bytes, 64);
  for (int i = 0; i < 7; ++i) dot(static_cast<Variant>(i % 4), i % 3);
  sttilecfg();
  ldtilecfg(zero_config());
  for (int i = 0; i < 7; ++i) tilerelease();
  const uint64_t emulated[6] = {2, 8, 5, 6, 3, 7}, none[6] = {};
  const uint64_t* expected = mode == AmxMode::kEmulated ? emulated : none;
  const AmxCounters counters = amx_counters();
  group.check(std::memcmp(&counters, expected, sizeof(counters)) == 0, "amx_counters");
  uint64_t out[6];
  sq_amx_counters(out);
  group.check(std::memcmp(out, expected, sizeof(out)) == 0, "sq_amx_counters");
  sq_amx_reset();
  sq_amx_counters(out);
  group.check(std::memcmp(out, none, sizeof(out)) == 0, "reset");
}

// -------------------------------------------------------------------------------------------
// deaths

// Runs `body` in a child without core dump and with stderr into `message`; the wait status.
template <typename Body>
int run_child(Body body, std::string* message = nullptr) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    const rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    dup2(ends[1], STDERR_FILENO);
    signal(SIGSEGV, SIG_DFL);  // a sanitizer has its own
    body();
    _exit(0);
  }
  close(ends[1]);
  char buffer[256];
  ssize_t got;
  while ((got = read(ends[0], buffer, sizeof(buffer))) > 0) {
    if (message) message->append(buffer, static_cast<size_t>(got));
  }
  close(ends[0]);
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

void test_deaths(AmxMode mode) {
  Group group("violations kill");
  const auto dies = [&](int number, const char* named, auto body) {
    std::string message;
    const int status = run_child(body, &message);
    group.check(WIFSIGNALED(status) && WTERMSIG(status) == number,
                text("signal %ld expected, wait status %ld: ", number, status) + named);
    if (mode == AmxMode::kEmulated) {
      const bool ok = *named ? message.find(named) != std::string::npos : message.empty();
      group.check(ok, named + (" expected, not: " + message));
    }
  };
  static TileBytes bytes;
  const auto load = [](int t) { tileloadd(t, bytes, 64); };

  dies(SIGILL, "", [] { __asm__ volatile("ud2"); });
  dies(SIGILL, "", [] { raise(SIGILL); });
  dies(SIGILL, "", [] {  // sent while RIP may stand anywhere
    kill(getpid(), SIGILL);
    pause();
  });
  dies(SIGILL, "", [] {  // sent with RIP on a tilezero, which must not pass for its cause
    ldtilecfg(full_config());
    __asm__ volatile("syscall\n tilezero %%tmm0" ::"a"(SYS_kill), "D"(getpid()), "S"(SIGILL)
                     : "rcx", "r11", "memory");
  });
  // Not encodings of these instructions: VEX.W1, VEX.L1, vvvv used by a tilezero, tiles 8 and 9.
  dies(SIGILL, "", [] {
    ldtilecfg(full_config());
    __asm__ volatile(".byte 0xC4, 0xE2, 0xFB, 0x49, 0xC0");
  });
  dies(SIGILL, "", [] {
    ldtilecfg(full_config());
    __asm__ volatile(".byte 0xC4, 0xE2, 0x7F, 0x49, 0xC0");
  });
  dies(SIGILL, "", [] {
    ldtilecfg(full_config());
    __asm__ volatile(".byte 0xC4, 0xE2, 0x73, 0x49, 0xC0");
  });
  dies(SIGILL, "", [] {
    ldtilecfg(full_config());
    __asm__ volatile(".byte 0xC4, 0xC2, 0x6B, 0x5E, 0xC1");
  });
  dies(SIGILL, "", [] {
    ldtilecfg(full_config());
    __asm__ volatile(".byte 0xC4, 0x62, 0x6B, 0x5E, 0xC1");
  });
  dies(SIGILL, "", [] {
    ldtilecfg(full_config());
    __asm__ volatile(".byte 0xC4, 0x62, 0x7B, 0x49, 0xC0");
  });
  dies(SIGILL, "", [] {
    ldtilecfg(full_config());
    __asm__ volatile(".byte 0xC4, 0x62, 0x7B, 0x4B, 0x04, 0x0F" ::"D"(bytes), "c"(int64_t{64}));
  });

  dies(SIGILL, "not configured", [&] { load(0); });
  dies(SIGILL, "not configured", [&] { tilestored(0, bytes, 64); });
  dies(SIGILL, "not configured", [] { tilezero(0); });
  dies(SIGILL, "not configured", [] { dot(kSS, 0); });
  dies(SIGILL, "not configured", [] {  // second of a run
    ldtilecfg(Config().tile(0, 16, 64));
    __asm__ volatile("tilezero %tmm0\n tilezero %tmm1");
  });
  dies(SIGILL, "", [] {  // after an instruction that works
    ldtilecfg(full_config());
    __asm__ volatile("tilezero %tmm0\n ud2");
  });
  dies(SIGILL, "not configured", [&] {
    ldtilecfg(Config().tile(0, 16, 64));
    load(1);
  });
  dies(SIGILL, "not configured", [&] {
    ldtilecfg(full_config());
    tilerelease();
    load(0);
  });
  dies(SIGILL, "colsb % 4", [&] {
    ldtilecfg(Config().tile(0, 16, 62));
    load(0);
  });
  dies(SIGILL, "start_row >= rows", [&] {
    Config config = Config().tile(0, 4, 64);
    config.start_row = 4;
    ldtilecfg(config);
    load(0);
  });

  // Dots: C rows x columns, A rows x K, B K/4 x columns, one of them off.
  const auto bad_dot = [](int c_rows, int c_colsb, int a_rows, int a_colsb, int b_rows,
                          int b_colsb) {
    return [=] {
      ldtilecfg(
          Config().tile(0, c_rows, c_colsb).tile(1, a_rows, a_colsb).tile(2, b_rows, b_colsb));
      dot(kUS, 0);
    };
  };
  dies(SIGILL, "A.colsb / 4 != B.rows", bad_dot(16, 64, 16, 64, 15, 64));
  dies(SIGILL, "A.colsb / 4 != B.rows", bad_dot(16, 64, 16, 60, 16, 64));
  dies(SIGILL, "C.rows != A.rows", bad_dot(15, 64, 16, 64, 16, 64));
  dies(SIGILL, "C.colsb != B.colsb", bad_dot(16, 60, 16, 64, 16, 64));
  dies(SIGILL, "C.colsb != B.colsb", bad_dot(16, 64, 16, 64, 16, 60));
  dies(SIGILL, "colsb % 4", bad_dot(16, 62, 16, 64, 16, 62));
  dies(SIGILL, "not configured", bad_dot(16, 64, 16, 64, 0, 0));
  // tdpbssd with A = B, C = A and C = B, which the assembler refuses.
  dies(SIGILL, "not distinct", [] {
    ldtilecfg(full_config());
    __asm__ volatile(".byte 0xC4, 0xE2, 0x73, 0x5E, 0xC1");
  });
  dies(SIGILL, "not distinct", [] {
    ldtilecfg(full_config());
    __asm__ volatile(".byte 0xC4, 0xE2, 0x6B, 0x5E, 0xC0");
  });
  dies(SIGILL, "not distinct", [] {
    ldtilecfg(full_config());
    __asm__ volatile(".byte 0xC4, 0xE2, 0x7B, 0x5E, 0xC2");
  });

  // Configurations the hardware answers with #GP.
  const auto bad_config = [](void (*change)(Config&)) {
    return [change] {
      Config config = full_config();
      change(config);
      ldtilecfg(config);
    };
  };
  dies(SIGSEGV, "palette", bad_config([](Config& c) { c.palette = 2; }));
  dies(SIGSEGV, "2..15", bad_config([](Config& c) { c.reserved[0] = 1; }));
  dies(SIGSEGV, "2..15", bad_config([](Config& c) { c.reserved[13] = 1; }));
  dies(SIGSEGV, "32..47", bad_config([](Config& c) { c.colsb[8] = 64; }));
  dies(SIGSEGV, "56..63", bad_config([](Config& c) { c.rows[15] = 1; }));
  dies(SIGSEGV, "colsb > 64", bad_config([](Config& c) { c.colsb[3] = 68; }));
  dies(SIGSEGV, "rows > 16", bad_config([](Config& c) { c.rows[7] = 17; }));
  dies(SIGSEGV, "only one of", bad_config([](Config& c) { c.rows[2] = 0; }));
  dies(SIGSEGV, "only one of", bad_config([](Config& c) { c.colsb[2] = 0; }));

  // Operands that reach one byte into a guard page.
  static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  static auto* const memory = static_cast<uint8_t*>(
      mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(memory + page, page, PROT_NONE);
  dies(SIGSEGV, "", [] {
    ldtilecfg(Config().tile(0, 2, 20));
    tileloadd(0, memory + page - 39, 20);
  });
  dies(SIGSEGV, "", [] {
    ldtilecfg(Config().tile(0, 2, 20));
    tilestored(0, memory + page - 39, 20);
  });
  dies(SIGSEGV, "", [] { __asm__ volatile("ldtilecfg (%0)" ::"r"(memory + page - 63)); });
  dies(SIGSEGV, "", [] { __asm__ volatile("sttilecfg (%0)" ::"r"(memory + page - 63)); });
  munmap(memory, 2 * page);
}

void exit_42(int) { _exit(42); }
void exit_43(int, siginfo_t* info, void*) { _exit(info->si_code > 0 ? 43 : 44); }

// Needs a process in which nothing is installed yet, so it runs first, in children.
void test_chaining() {
  Group group("other SIGILLs go to the old action");
  const auto install_and_work = [] {
    install_amx_emulator();
    ldtilecfg(full_config());
    tilezero(0);
  };
  const auto exits = [&](int code, const char* name, auto body) {
    const int status = run_child(body);
    group.check(WIFEXITED(status) && WEXITSTATUS(status) == code,
                text("exit %ld expected, wait status %ld: ", code, status) + name);
  };
  exits(42, "plain handler, ud2", [&] {
    signal(SIGILL, exit_42);
    install_and_work();
    __asm__ volatile("ud2");
  });
  exits(42, "plain handler, shape violation", [&] {
    signal(SIGILL, exit_42);
    install_and_work();
    tilerelease();
    tilezero(0);
  });
  struct sigaction action = {};
  action.sa_sigaction = exit_43;
  action.sa_flags = SA_SIGINFO;
  exits(43, "siginfo handler, ud2", [&] {
    sigaction(SIGILL, &action, nullptr);
    install_and_work();
    __asm__ volatile("ud2");
  });
  exits(44, "siginfo handler, raise", [&] {
    sigaction(SIGILL, &action, nullptr);
    install_and_work();
    raise(SIGILL);
  });
  exits(42, "SIGSEGV handler, invalid configuration", [&] {
    signal(SIGSEGV, exit_42);
    install_and_work();
    Config config;
    config.palette = 9;
    ldtilecfg(config);
  });
  exits(0, "ignored, raise", [&] {
    signal(SIGILL, SIG_IGN);
    install_and_work();
    raise(SIGILL);
  });
  exits(0, "installed twice", [&] {
    install_and_work();
    install_and_work();
  });
  exits(0, "installed again after a replacement", [&] {
    install_and_work();
    signal(SIGILL, SIG_DFL);
    install_and_work();
  });
  const int status = run_child([&] {
    signal(SIGILL, SIG_IGN);
    install_and_work();
    __asm__ volatile("ud2");
  });
  group.check(WIFSIGNALED(status) && WTERMSIG(status) == SIGILL, "ignored, ud2 kills");
}

void report_speed() {
  const auto time = [](const char* name, int repeats, auto body) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repeats; ++i) body();
    const std::chrono::duration<double, std::micro> elapsed =
        std::chrono::steady_clock::now() - start;
    std::printf("%-34s %8.3f us\n", name, elapsed.count() / repeats);
  };
  static TileBytes bytes;
  ldtilecfg(full_config());
  time("time of tilezero", 20000, [] { tilezero(0); });
  time("time of tileloadd 16 x 64", 20000, [] { tileloadd(1, bytes, 64); });
  time("time of tdpbusd 16 x 64 x 16", 20000, [] { dot(kUS, 0); });
  time("time of 8 adjacent tdpbusd", 20000, [] {
    __asm__ volatile(".rept 8\n tdpbusd %%tmm2, %%tmm1, %%tmm0\n .endr" ::: "memory");
  });
  tilerelease();
}

}  // namespace

int main() {
  test_chaining();
  const AmxMode mode = install_amx_emulator();
  std::printf("mode: %s\n", mode == AmxMode::kNative ? "native AMX" : "emulated AMX");
  std::fflush(stdout);
  test_dots();
  test_dot_accumulates();
  test_adjacent();
  test_strides();
  test_config();
  test_zeroing();
  test_addressing();
  test_special_addressing();
  test_page_ends();
  test_context_kept();
  test_threads();
  test_fork();
  test_counters(mode);
  test_deaths(mode);
  report_speed();
  std::printf("%s AMX: %d passed, %d failed\n", mode == AmxMode::kNative ? "native" : "emulated",
              g_passed, g_failed);
  return g_failed != 0;
}
