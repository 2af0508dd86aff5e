// Every row of kernels.inc against plain int64 arithmetic, with guard pages at both ends of every
// buffer, and the float work of every vector width against the reference width, bit for bit.
// AMX runs natively where there is AMX, else under the emulator; the output says which.
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "amx_emulator.h"
#include "blocking.h"
#include "gemm.h"
#include "guarded.h"
#include "sq_cpu/isa.h"
#include "sq_cpu/linear.h"
#include "sq_cpu/saturation.h"

namespace {

using namespace sq_cpu;
using testing::Guarded;

int g_passed = 0, g_failed = 0;

void check(bool ok, const std::string& what) {
  ++(ok ? g_passed : g_failed);
  if (!ok && g_failed <= 20) std::printf("FAILED: %s\n", what.c_str());
}

enum class Fill { kRandom, kHigh, kLow, kAlternating, kOneHot };

struct Problem {
  int64_t m, n, k;
  std::vector<uint8_t> u;  // [m, k]
  std::vector<int8_t> w;   // [n, k]
  std::vector<int32_t> zero_point;
};

Problem make_problem(int64_t m, int64_t n, int64_t k, int max_code, Fill fill, std::mt19937& rng) {
  Problem p{
      m, n, k, std::vector<uint8_t>(m * k), std::vector<int8_t>(n * k), std::vector<int32_t>(m)};
  for (int64_t i = 0; i < m * k; ++i) {
    const int64_t row = k ? i / k : 0, column = k ? i % k : 0;
    switch (fill) {
      case Fill::kRandom:
        p.u[i] = rng() % (max_code + 1);
        break;
      case Fill::kHigh:
      case Fill::kLow:
        p.u[i] = max_code;
        break;
      case Fill::kAlternating:
        p.u[i] = column % 2 ? max_code : 0;
        break;
      case Fill::kOneHot:
        p.u[i] = column == (row * 7) % k;
        break;
    }
  }
  for (int64_t i = 0; i < n * k; ++i) {
    switch (fill) {
      case Fill::kHigh:
        p.w[i] = 127;
        break;
      case Fill::kLow:
        p.w[i] = -127;
        break;
      case Fill::kAlternating:
        p.w[i] = i % 2 ? -127 : 127;
        break;
      default:
        p.w[i] = static_cast<int>(rng() % 255) - 127;
    }
  }
  for (auto& z : p.zero_point) z = rng() % (max_code + 1);
  return p;
}

bool right(const Problem& p, const int32_t* y) {
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < p.k; ++k) {
        sum += (int64_t{p.u[m * p.k + k]} - p.zero_point[m]) * p.w[n * p.k + k];
      }
      if (y[m * p.n + n] != sum) return false;
    }
  }
  return true;
}

struct Buffers {
  Guarded u{2 << 20}, weight{2 << 20}, y{2 << 20};
};

uint8_t* place_codes(const Problem& p, Buffers& buffers, bool at_end) {
  const CodeLayout layout(p.m, p.k);
  const int64_t bytes = codes_bytes(p.m, p.k);
  auto* codes = buffers.u.place<uint8_t>(bytes, at_end);
  std::memset(codes, 0xff, bytes);  // what pads k and m must not matter
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t k = 0; k < p.k; ++k) {
      codes[layout.offset(m) + k / kTileDepth * layout.tile + k % kTileDepth] = p.u[m * p.k + k];
    }
  }
  return codes;
}

std::byte* place_weight(const Problem& p, Buffers& buffers, bool at_end) {
  auto* packed = buffers.weight.place<std::byte>(packed_bytes(p.n, p.k), at_end);
  const std::vector<float> ones(p.n, 1.0f);
  pack_weight(p.w.data(), ones.data(), nullptr, p.n, p.k, packed);
  return packed;
}

bool run(const Problem& p, const Microkernel& kernel, Buffers& buffers, bool at_end, int threads) {
  uint8_t* codes = place_codes(p, buffers, at_end);
  std::byte* packed = place_weight(p, buffers, at_end);
  auto* y = buffers.y.place<int32_t>(p.m * p.n, at_end);
  std::memset(y, 0x5a, p.m * p.n * sizeof *y);
  const auto zero_point = const_cast<int32_t*>(p.zero_point.data());
  const GemmArgs args{{codes, nullptr, zero_point, p.m, p.k, kernel.max_code},
                      {packed, p.n, p.k},
                      y,
                      Output::kInt32,
                      p.n,
                      nullptr};
  const int64_t k_blocks = k_block_count(p.k);
  const Blocking blocking = choose_blocking(kernel, p.m, strip_count(p.n), k_blocks, threads);
  std::vector<WorkCounter> taken(blocking.row_parts * blocking.strip_parts);
  const int64_t own = workspace_sums(kernel, blocking, k_blocks) + 16;
  std::vector<int32_t> sums(own * threads + 16);
#pragma omp parallel num_threads(threads)
  {
    int32_t* mine = sums.data() + own * omp_get_thread_num();
    mine += (64 - reinterpret_cast<uintptr_t>(mine) % 64) % 64 / sizeof *mine;
    run_tasks(args, kernel, row_kernels(kernel.isa), blocking, taken.data(), mine,
              omp_get_thread_num());
  }
  return right(p, y);
}

std::string describe(const Microkernel& kernel, const Problem& p, int fill) {
  return std::string(kernel.name) + " m=" + std::to_string(p.m) + " n=" + std::to_string(p.n) +
         " k=" + std::to_string(p.k) + " fill=" + std::to_string(fill);
}

void test_products(const Microkernel& kernel, Buffers& buffers) {
  std::mt19937 rng(1);
  const int before = g_failed;
  for (int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48}) {
    for (int64_t n : {0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100}) {
      for (int64_t k : {0, 1, 3, 4, 5, 63, 64, 65, 127, 128, 129, 200}) {
        const auto fill = static_cast<Fill>((m + n + k) % 5);
        const Problem p = make_problem(m, n, k, kernel.max_code, fill, rng);
        check(run(p, kernel, buffers, (m + n) % 2, 1), describe(kernel, p, static_cast<int>(fill)));
      }
    }
  }
  for (int fill = 0; fill < 5; ++fill) {
    const Problem p = make_problem(33, 65, 1000, kernel.max_code, static_cast<Fill>(fill), rng);
    check(run(p, kernel, buffers, true, 1), describe(kernel, p, fill));
  }
  for (int threads : {2, 3, 7}) {
    for (int64_t m : {1, 5, 33, 100}) {
      const Problem p = make_problem(m, 100, 129, kernel.max_code, Fill::kRandom, rng);
      check(run(p, kernel, buffers, true, threads),
            describe(kernel, p, 0) + " threads=" + std::to_string(threads));
    }
  }
  std::printf("%-26s %s\n", kernel.name, g_failed == before ? "ok" : "FAILED");
}

SaturationCount plain_saturation(const Problem& p) {
  SaturationCount count{0, 0};
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      for (int64_t k = 0; k < p.k; k += 2) {
        int sum = p.u[m * p.k + k] * p.w[n * p.k + k];
        if (k + 1 < p.k) sum += p.u[m * p.k + k + 1] * p.w[n * p.k + k + 1];
        ++count.pairs;
        count.saturated += sum < -32768 || sum > 32767;
      }
    }
  }
  return count;
}

SaturationCount count_of(const Problem& p, int max_code, Buffers& buffers, bool at_end) {
  const auto zero_point = const_cast<int32_t*>(p.zero_point.data());
  return count_saturation(
      {place_codes(p, buffers, at_end), nullptr, zero_point, p.m, p.k, max_code},
      {place_weight(p, buffers, at_end), p.n, p.k});
}

void test_saturation(Isa isa, bool emulated, Buffers& buffers) {
  use_isa(isa, emulated);
  std::mt19937 rng(4);
  const int before = g_failed;
  const auto check_count = [&](const Problem& p, int max_code, const std::string& what) {
    const SaturationCount expected = plain_saturation(p);
    const SaturationCount found = count_of(p, max_code, buffers, (p.m + p.n) % 2);
    check(found.pairs == expected.pairs && found.saturated == expected.saturated,
          isa_name(isa) + " saturation of " + what + ": " + std::to_string(found.saturated) +
              ", not " + std::to_string(expected.saturated));
    return expected.saturated;
  };
  int64_t seen = 0;
  for (int64_t m : {0, 1, 3, 4, 5, 16, 17, 40}) {
    for (int64_t n : {0, 1, 15, 16, 17, 33}) {
      for (int64_t k : {0, 1, 2, 3, 63, 64, 65, 130}) {
        for (int fill = 0; fill < 5; ++fill) {
          const Problem p = make_problem(m, n, k, 255, static_cast<Fill>(fill), rng);
          seen += check_count(p, 255,
                              "m=" + std::to_string(m) + " n=" + std::to_string(n) +
                                  " k=" + std::to_string(k) + " fill=" + std::to_string(fill));
        }
        const Problem p = make_problem(m, n, k, 127, Fill::kHigh, rng);
        check(check_count(p, 127, "7-bit codes") == 0, "7-bit codes never saturate");
      }
    }
  }
  check(seen > 0, "some pairs of the test saturate");
  const struct {
    uint8_t u[2];
    int8_t w[2];
    int64_t saturated;
  } limits[] = {{{255, 191}, {127, 2}, 0},     // 32767
                {{254, 255}, {127, 2}, 1},     // 32768
                {{254, 255}, {-127, -2}, 0},   // -32768
                {{255, 128}, {-127, -3}, 1}};  // -32769
  for (const auto& limit : limits) {
    const Problem p{1, 1, 2, {limit.u[0], limit.u[1]}, {limit.w[0], limit.w[1]}, {0}};
    check(check_count(p, 255, "a sum at the limit") == limit.saturated, "which side of the limit");
  }
  // As many in one lane as there can be.
  Problem deep{1, 1, kMaxDepth, {}, std::vector<int8_t>(kMaxDepth, -127), {0}};
  deep.u.assign(kMaxDepth, 255);
  check_count(deep, 255, "the deepest product");
  omp_set_num_threads(3);
  check_count(make_problem(64, 100, 600, 255, Fill::kRandom, rng), 255, "a product for 3 threads");
  omp_set_num_threads(omp_get_num_procs());
  std::printf("saturation on %-12s %s\n", isa_name(isa).c_str(),
              g_failed == before ? "ok" : "FAILED");
}

// The deepest product that pack_weight accepts, at the extremes: the sum stays within int32.
void test_deepest(const Microkernel& kernel) {
  const int64_t k = kMaxDepth;
  Problem p{1, 1, k, std::vector<uint8_t>(k, kernel.max_code), std::vector<int8_t>(k, -127), {0}};
  Buffers buffers;
  check(run(p, kernel, buffers, true, 1), std::string(kernel.name) + " at the largest depth");
}

void test_packing() {
  std::mt19937 rng(2);
  for (int64_t n : {1, 15, 16, 17, 40}) {
    for (int64_t k : {1, 63, 64, 65, 130}) {
      const Problem p = make_problem(0, n, k, 255, Fill::kRandom, rng);
      std::vector<float> scale(n), bias(n), scale2(n), bias2(n);
      for (int64_t i = 0; i < n; ++i) scale[i] = 0.5f + i, bias[i] = -3.0f * i;
      std::vector<std::byte> packed(packed_bytes(n, k));
      pack_weight(p.w.data(), scale.data(), bias.data(), n, k, packed.data());
      std::vector<int8_t> w(n * k);
      unpack_weight({packed.data(), n, k}, w.data(), scale2.data(), bias2.data());
      check(w == p.w && scale == scale2 && bias == bias2, "pack and unpack");
    }
  }
  for (const int64_t k : {kMaxDepth + 1, int64_t{-1}}) {
    bool refused = false;
    try {
      packed_bytes(1, k);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    check(refused, "depth " + std::to_string(k) + " is refused");
  }
  const int8_t minus128 = -128;
  const float one = 1.0f;
  std::vector<std::byte> packed(packed_bytes(1, 1));
  bool refused = false;
  try {
    pack_weight(&minus128, &one, nullptr, 1, 1, packed.data());
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  check(refused, "a weight of -128 is refused");
}

// Rows that hold every kind of trouble, and rows of ordinary size.
std::vector<float> trouble(int64_t m, int64_t k, std::mt19937& rng) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::normal_distribution<float> normal;
  std::vector<float> x(m * k);
  for (int64_t row = 0; row < m; ++row) {
    const float size = std::ldexp(1.0f, static_cast<int>(rng() % 24) - 12);
    for (int64_t i = 0; i < k; ++i) x[row * k + i] = size * normal(rng);
    float& one = x[row * k + rng() % k];
    switch (row % 8) {
      case 1:
        std::fill_n(x.begin() + row * k, k, 0.0f);
        break;
      case 2:
        one = nan;
        break;
      case 3:
        one = inf;
        break;
      case 4:
        one = -inf;
        break;
      case 5:
        for (int64_t i = 0; i < k; ++i) x[row * k + i] = 1e-40f * (i % 3);
        break;
      case 6:
        one = 60000.0f;
        break;
    }
  }
  return x;
}

std::vector<char> as_type(const std::vector<float>& x, DType type) {
  std::vector<char> out(x.size() * element_bytes(static_cast<Output>(type)));
  for (size_t i = 0; i < x.size(); ++i) {
    if (type == DType::kFloat32) std::memcpy(&out[4 * i], &x[i], 4);
    if (type == DType::kBFloat16)
      std::memcpy(&out[2 * i], reinterpret_cast<const char*>(&x[i]) + 2, 2);
    if (type == DType::kFloat16) {
      const auto half = static_cast<_Float16>(x[i]);
      std::memcpy(&out[2 * i], &half, 2);
    }
  }
  return out;
}

// Runs linear() with `isa` on guarded copies; the bytes of y.
std::vector<char> run_linear(Isa isa, bool emulated, const std::vector<char>& x, DType type,
                             int64_t m, const PackedWeight& weight, const ActivationQuantizer& q,
                             Buffers& buffers) {
  use_isa(isa, emulated);
  auto* xs = buffers.u.place<char>(x.size(), true);
  std::memcpy(xs, x.data(), x.size());
  const size_t bytes = m * weight.n * element_bytes(static_cast<Output>(type));
  auto* y = buffers.y.place<char>(bytes, true);
  std::memset(y, 0x5a, bytes);
  linear(xs, type, m, weight.k, weight, q, y, type, weight.n);
  return {y, y + bytes};
}

void test_linear(Isa isa, bool emulated, Buffers& buffers) {
  std::mt19937 rng(3);
  const int before = g_failed;
  for (int64_t k : {1, 17, 64, 100}) {
    const int64_t n = 37;
    const Problem p = make_problem(0, n, k, 255, Fill::kRandom, rng);
    std::vector<float> scale(n), bias(n);
    for (int64_t i = 0; i < n; ++i) scale[i] = 1e-3f * (i + 1), bias[i] = 0.25f * i - 3;
    std::vector<std::byte> packed(packed_bytes(n, k));
    pack_weight(p.w.data(), scale.data(), bias.data(), n, k, packed.data());
    for (int64_t m : {1, 2, 8, 17, 40}) {
      const std::vector<float> values = trouble(m, k, rng);
      for (DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        const std::vector<char> x = as_type(values, type);
        for (int variant = 0; variant < 12; ++variant) {
          ActivationQuantizer q;
          q.granularity = static_cast<Granularity>(variant % 3);
          q.symmetric = variant / 3 % 2;
          q.reduce_range = variant / 6;
          q.scale = 0.03f;
          q.zero_point = q.symmetric ? (q.reduce_range ? 64 : 128) : 77;
          const PackedWeight weight{packed.data(), n, k};
          const auto expected = run_linear(Isa::kReference, false, x, type, m, weight, q, buffers);
          const auto found = run_linear(isa, emulated, x, type, m, weight, q, buffers);
          check(expected == found, isa_name(isa) + " linear m=" + std::to_string(m) + " k=" +
                                       std::to_string(k) + " variant " + std::to_string(variant) +
                                       " type " + std::to_string(static_cast<int>(type)));
        }
      }
    }
  }
  std::printf("linear on %-16s %s\n", isa_name(isa).c_str(), g_failed == before ? "ok" : "FAILED");
}

// All 65,536 half-precision values in, and a sweep of fp32 out, against the compiler's conversions.
void test_half(Isa isa, bool emulated) {
  use_isa(isa, emulated);
  std::vector<uint16_t> halves(65536);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<uint8_t> u(codes_bytes(65536, 1));
  std::vector<float> scale(65536);
  std::vector<int32_t> zero_point(65536);
  quantize_activations(halves.data(), DType::kFloat16, 1, {},
                       {u.data(), scale.data(), zero_point.data(), 65536, 1, 255});
  bool same = true;
  for (size_t i = 0; i < halves.size(); ++i) {
    _Float16 half;
    std::memcpy(&half, &halves[i], 2);
    const double value = std::fabs(static_cast<double>(half));
    const auto expected = static_cast<float>(std::max(1e-30, value) / 127);
    same &= std::isfinite(value) ? scale[i] == expected : std::isnan(scale[i]);
  }
  check(same, isa_name(isa) + " reads every half");

  // k = 0 turns the layer into y = bias: the bias sweeps every fp32 exponent and rounding case.
  std::vector<float> bias;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 0x3fff1) {
    const auto word = static_cast<uint32_t>(bits);
    float value;
    std::memcpy(&value, &word, 4);
    if (!std::isnan(value)) bias.push_back(value);
  }
  for (int i = 0; i < 2048; ++i) {  // ties between two halves, subnormal ones included
    bias.push_back(std::ldexp(2 * i + 1, -25));
    bias.push_back(std::ldexp(2049 + 2 * i, -10));
  }
  const auto n = static_cast<int64_t>(bias.size());
  const std::vector<float> ones(n, 1.0f);
  std::vector<std::byte> packed(packed_bytes(n, 0));
  pack_weight(nullptr, ones.data(), bias.data(), n, 0, packed.data());
  std::vector<uint16_t> y(n);
  const float x = 0;
  linear(&x, DType::kFloat32, 1, 0, {packed.data(), n, 0}, {}, y.data(), DType::kFloat16, n);
  same = true;
  for (int64_t i = 0; i < n; ++i) {
    const auto half = static_cast<_Float16>(bias[i] + 0.0f);
    same &= std::memcmp(&half, &y[i], 2) == 0;
  }
  check(same, isa_name(isa) + " rounds to half once, to nearest even");
}

void test_refusals() {
  bool refused = false;
  std::byte some_weight[4096] = {};
  const struct {
    const std::byte* weight;
    const char* message;
  } nulls[] = {{some_weight, "x is null"}, {nullptr, "the packed weight is null"}};
  for (const auto& bad : nulls) {
    refused = false;
    try {
      linear(nullptr, DType::kFloat32, 1, 4, {bad.weight, 4, 4}, {}, nullptr, DType::kFloat32, 4);
    } catch (const std::invalid_argument& e) {
      refused = std::string(e.what()) == bad.message;
    }
    check(refused, bad.message);
  }
  float x = 1, y = 0;
  ActivationQuantizer q;
  q.granularity = Granularity::kStatic;
  for (float scale : {0.0f, -1.0f, std::numeric_limits<float>::quiet_NaN()}) {
    q.scale = scale;
    q.zero_point = 128;
    refused = false;
    try {
      linear(&x, DType::kFloat32, 1, 1, {some_weight, 1, 1}, q, &y, DType::kFloat32, 1);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    check(refused, "a static scale of " + std::to_string(scale) + " is refused");
  }
}

}  // namespace

int main() {
  bool amx_native = false;
  for (const IsaStatus& s : isa_status()) amx_native |= s.isa == Isa::kAmxInt8 && s.usable();
  if (!amx_native) testing::install_amx_emulator();
  std::printf("AMX runs %s\n", amx_native ? "natively" : "under the emulator");
  const auto runs_here = [](const IsaStatus& s) {
    return s.usable() || (s.isa == Isa::kAmxInt8 && s.built &&
                          isa_status()[static_cast<int>(Isa::kAvx512Vnni)].usable());
  };

  Buffers buffers;
  test_packing();
  test_refusals();
  for (const Microkernel& kernel : microkernels()) {
    const IsaStatus& s = isa_status()[static_cast<int>(kernel.isa)];
    if (!runs_here(s)) {
      std::printf("%-26s not run: %s\n", kernel.name, s.reason.c_str());
      continue;
    }
    test_products(kernel, buffers);
    test_deepest(kernel);
  }
  for (const IsaStatus& s : isa_status()) {
    if (!runs_here(s)) continue;
    test_linear(s.isa, !s.usable(), buffers);
    test_half(s.isa, !s.usable());
    test_saturation(s.isa, !s.usable(), buffers);
  }
  if (!amx_native && isa_status()[static_cast<int>(Isa::kAmxInt8)].built) {
    const auto counters = testing::amx_counters();
    std::printf("emulated: %llu dots, %llu loads, %llu stores\n",
                static_cast<unsigned long long>(counters.dots),
                static_cast<unsigned long long>(counters.loads),
                static_cast<unsigned long long>(counters.stores));
    check(counters.dots > 0, "the AMX kernel executed TDPBUSD");
  }
  std::printf("%d passed, %d failed\n", g_passed, g_failed);
  return g_failed ? 1 : 0;
}
