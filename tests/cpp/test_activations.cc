// The activation functions of every vector width: the same bits on all, and the bounds that
// activations.h states against double precision. This file is compiled once per width: where
// ACTIVATIONS_OF is given, it is that width's functions under that name and nothing else; where
// not, the reference width's and the test.
#include "activations.h"

#ifndef ACTIVATIONS_OF
#define ACTIVATIONS_OF activations_reference
#define ACTIVATIONS_TEST
#endif

enum Function { kRelu, kSilu, kGelu, kGeluTanh };

// y[i] = function(x[i]); n is a multiple of every width.
void ACTIVATIONS_OF(Function function, const float* x, float* y, int64_t n) {
  using namespace sq_cpu;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 v = load_bits<F32>(x + i);
    switch (function) {
      case kRelu:
        store_bits(y + i, relu(v));
        break;
      case kSilu:
        store_bits(y + i, silu(v));
        break;
      case kGelu:
        store_bits(y + i, gelu(v));
        break;
      case kGeluTanh:
        store_bits(y + i, gelu_tanh(v));
        break;
    }
  }
}

#ifdef ACTIVATIONS_TEST
#include <cstdio>
#include <limits>
#include <vector>

#include "sq_cpu/isa.h"

void activations_avx2(Function, const float*, float*, int64_t);
void activations_avx512bw(Function, const float*, float*, int64_t);

namespace {

using sq_cpu::Isa;

struct Spec {
  Function function;
  const char* name;
  double (*reference)(double);
  double bound;  // of the relative error
  double low;    // below it the result is -0 ...
  double lost;   // ... and the true value above this
};

// 1 + tanh(u) = 2 / (1 + exp(-2 u)), which does not cancel where u is negative.
double reference_gelu_tanh(double x) {
  const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  return x > -1 ? 0.5 * x * (1 + std::tanh(u)) : x / (1 + std::exp(-2 * u));
}

const Spec kSpecs[] = {
    {kRelu, "relu", [](double x) { return x > 0 ? x : 0.0; }, 0.0, -HUGE_VAL, 0.0},
    {kSilu, "silu", [](double x) { return x / (1 + std::exp(-x)); }, 1.8e-7, -88.375, -4e-37},
    {kGelu, "gelu", [](double x) { return 0.5 * x * std::erfc(-x * M_SQRT1_2); }, 3.5e-7, -13.125,
     -2e-38},
    {kGeluTanh, "gelu_tanh", reference_gelu_tanh, 1.7e-7, -10.0, -2e-37},
};

int g_failed = 0;

void check(bool ok, const char* name, float x, float y, const char* what) {
  g_failed += !ok;
  if (!ok && g_failed <= 20) std::printf("FAILED: %s(%a) = %a: %s\n", name, x, y, what);
}

uint32_t bits(float v) {
  uint32_t b;
  std::memcpy(&b, &v, sizeof b);
  return b;
}

// Every 4099th bit pattern; every 257th where the functions bend, 2^-6 <= |x| < 2^7; special values
// and the neighbours of the limits.
std::vector<float> make_inputs() {
  std::vector<float> x;
  const auto add = [&](uint32_t pattern) { x.push_back(sq_cpu::load_bits<float>(&pattern)); };
  for (uint64_t p = 0; p <= 0xffffffffu; p += 4099) add(p);
  for (uint32_t p = bits(0x1p-6f); p < bits(0x1p7f); p += 257) add(p), add(p | 0x80000000u);
  for (uint32_t p : {0x00000000u, 0x00000001u, 0x007fffffu, 0x00800000u, 0x7f7fffffu, 0x7f800000u,
                     0x7f800001u, 0x7fc00000u, 0x7fffffffu}) {
    add(p), add(p | 0x80000000u);
  }
  for (float limit : {10.0f, 13.125f, 87.0f, 88.375f}) {
    for (uint32_t p = bits(limit) - 2; p <= bits(limit) + 2; ++p) add(p), add(p | 0x80000000u);
  }
  while (x.size() % 16) x.push_back(0.0f);
  return x;
}

void test_accuracy(const Spec& spec, const std::vector<float>& inputs, const float* y) {
  double worst = 0.0;
  float worst_at = 0.0f;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const float x = inputs[i];
    if (std::isnan(x)) {
      check(std::isnan(y[i]), spec.name, x, y[i], "NaN is kept");
    } else if (std::isinf(x)) {
      check(y[i] == (x > 0 ? x : 0.0f), spec.name, x, y[i], "the limit");
    } else if (x < spec.low) {
      check(bits(y[i]) == 0x80000000u, spec.name, x, y[i], "-0 below the limit");
      check(spec.reference(x) > spec.lost, spec.name, x, y[i], "what -0 leaves out");
    } else {
      // Half the smallest subnormal besides: no rounded result below 2^-126 can be nearer.
      const double exact = spec.reference(x), error = std::fabs(y[i] - exact) - 0x1p-150;
      check(error <= spec.bound * std::fabs(exact), spec.name, x, y[i], "the error bound");
      check(spec.function == kRelu || std::signbit(y[i]) == std::signbit(x), spec.name, x, y[i],
            "the sign");
      if (exact != 0.0 && error > worst * std::fabs(exact)) {
        worst = error / std::fabs(exact), worst_at = x;
      }
    }
  }
  std::printf("%-10s largest relative error %.3g, at %.9g\n", spec.name, worst, worst_at);
}

}  // namespace

int main() {
  struct Width {
    Isa isa;
    void (*run)(Function, const float*, float*, int64_t);
  };
  const Width widths[] = {
#ifdef SQ_CPU_BUILT_AVX2
      {Isa::kAvx2, activations_avx2},
#endif
#ifdef SQ_CPU_BUILT_AVX512BW
      {Isa::kAvx512Bw, activations_avx512bw},
#endif
  };
  const std::vector<float> x = make_inputs();
  const int64_t n = x.size();
  std::vector<float> reference(n), y(n);
  for (const Spec& spec : kSpecs) {
    activations_reference(spec.function, x.data(), reference.data(), n);
    test_accuracy(spec, x, reference.data());
    for (const Width& width : widths) {
      const sq_cpu::IsaStatus& s = sq_cpu::isa_status()[static_cast<int>(width.isa)];
      if (!s.usable()) {
        std::printf("%-10s not run on %s: %s\n", spec.name, s.name.c_str(), s.reason.c_str());
        continue;
      }
      width.run(spec.function, x.data(), y.data(), n);
      for (int64_t i = 0; i < n; ++i) {
        check(bits(y[i]) == bits(reference[i]), spec.name, x[i], y[i], s.name.c_str());
      }
    }
  }
  std::printf("%lld inputs, %d failed\n", static_cast<long long>(n), g_failed);
  return g_failed ? 1 : 0;
}
#endif
