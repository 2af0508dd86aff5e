// count_saturation() against plain loops, on every ISA, with guard pages at both ends of its
// buffers.
#include "harness.h"
#include "sq_cpu/saturation.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;

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

void test_saturation(Isa isa) {
  use(isa);
  Part part("saturation on " + isa_name(isa));
  Rng rng(4);
  Guarded u, weight;
  const auto check_count = [&](const Problem& p, const std::string& what) {
    const SaturationCount expected = plain_saturation(p);
    const bool at_end = rng.coin();
    auto* zero_point = const_cast<int32_t*>(p.zero_point.data());
    const SaturationCount found =
        count_saturation({place_codes(p, u, at_end), nullptr, zero_point, p.m, p.k, p.max_code},
                         {place_weight(p, weight, at_end), p.n, p.k});
    check(found.pairs == expected.pairs && found.saturated == expected.saturated,
          isa_name(isa) + " saturation of " + what + ": " + std::to_string(found.saturated) +
              ", not " + std::to_string(expected.saturated));
    return expected.saturated;
  };
  int64_t seen = 0;
  for (int64_t m : {0, 1, 3, 4, 5, 16, 17, 40}) {
    for (int64_t n : {0, 1, 15, 16, 17, 33}) {
      for (int64_t k : {0, 1, 2, 3, 63, 64, 65, 130}) {
        for (int fill = 0; fill < kFills; ++fill) {
          const Problem p = make_problem(m, n, k, 255, static_cast<Fill>(fill), rng);
          seen += check_count(p, join(describe(p), " fill=", fill));
        }
        const Problem p = make_problem(m, n, k, 127, Fill::kHigh, rng);
        check(check_count(p, "7-bit codes") == 0, "7-bit codes never saturate");
      }
    }
  }
  check(seen > 0, "some pairs of the test saturate");
  const struct {
    uint8_t u[2];
    int8_t w[2];
    int64_t saturated;
  } limits[] = {{{255, 191}, {127, 2}, 0},       // 32767
                {{254, 255}, {127, 2}, 1},       // 32768
                {{254, 255}, {-127, -2}, 0},     // -32768
                {{255, 128}, {-127, -3}, 1},     // -32769
                {{128, 128}, {-128, -128}, 0},   // -32768
                {{128, 129}, {-128, -128}, 1},   // -32896
                {{255, 255}, {-128, -128}, 1}};  // -65280, which wraps to 256
  for (const auto& limit : limits) {
    const Problem p{1, 1, 2, 255, {limit.u[0], limit.u[1]}, {limit.w[0], limit.w[1]}, {0}};
    check(check_count(p, "a sum at the limit") == limit.saturated, "which side of the limit");
  }
  // As many in one lane as there can be.
  Problem deep{1, 1, kMaxDepth, 255, {}, std::vector<int8_t>(kMaxDepth, -128), {0}};
  deep.u.assign(kMaxDepth, 255);
  check_count(deep, "the deepest product");
  omp_set_num_threads(3);
  check_count(make_problem(64, 100, 600, 255, Fill::kUniform, rng), "a product for 3 threads");
  omp_set_num_threads(omp_get_num_procs());
}

}  // namespace

int main() {
  start();
  for (Isa isa : isas_here()) test_saturation(isa);
  return finish();
}
