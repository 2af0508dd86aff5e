// Sampling against a plain reading of sampling.h, the same on every ISA and for any threads;
// Philox-4x32-10 against the known answers of its authors (Random123, kat_vectors).
#include <cmath>
#include <numeric>

#include "harness.h"
#include "philox.h"
#include "sq_cpu/sampling.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;

void test_random_bits() {
  const Part part("random_bits");
  check(random_bits(0, 0) == 0xe169c58d6627e8d5, "key 0, counter 0");
  uint64_t ones = 0, all = 0;
  for (uint64_t i = 0; i < 4096; ++i) {
    const uint64_t bits = random_bits(i % 7, i);
    ones += __builtin_popcountll(bits);
    all |= bits;
  }
  // 2^18 bits: five standard deviations.
  check(std::abs(static_cast<double>(ones) - 131072) < 5 * 256, "half of the bits are ones");
  check(~all == 0, "every bit is a one at times");
  check(random_bits(1, 0) != random_bits(0, 1), "key and counter differ");
}

// The tokens that may be chosen and their weights, in double precision; the reference of which
// token u stands for is left to the shares that the Python tests count.
std::vector<int64_t> may_be_chosen(const SampledRow& row, const std::vector<float>& x) {
  const auto n = static_cast<int64_t>(x.size());
  const float highest = *std::max_element(x.begin(), x.end());
  std::vector<double> w(n);
  for (int64_t i = 0; i < n; ++i) w[i] = std::exp((x[i] - double{highest}) / row.temperature);
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return w[a] > w[b]; });
  while (w[order.back()] < row.min_p * (1 - 1e-5)) order.pop_back();
  if (row.top_k > 0 && row.top_k < static_cast<int64_t>(order.size())) order.resize(row.top_k);
  double total = 0, sum = 0;
  for (const int64_t i : order) total += w[i];
  size_t kept = 0;
  while (kept < order.size() && sum < row.top_p * total * (1 + 1e-5)) sum += w[order[kept++]];
  order.resize(kept);
  return order;
}

void test_rows(uint64_t seed, const std::vector<Isa>& isas) {
  Rng rng(seed);
  const int64_t n = 1 + rng.below(seed % 4 == 0 ? 60000 : 200), rows = 1 + rng.below(5);
  Guarded logits_memory, ids_memory, allowed_memory;
  std::vector<float> logits(rows * n);
  const float spread = static_cast<float>(1 + rng.below(20));
  for (float& x : logits) x = spread * (static_cast<float>(rng.below(2001)) / 1000 - 1);
  const int64_t words = ceil_div(n, 32);
  auto* const allowed = allowed_memory.place<uint32_t>(words, true);
  for (int64_t i = 0; i < words; ++i) allowed[i] = static_cast<uint32_t>(rng.below(1LL << 32));
  allowed[0] |= 1;
  const int64_t edited[] = {rng.below(n), rng.below(n)};
  const float divisors[] = {1.5f, 1.0f}, addends[] = {0.0f, 2.0f};
  std::vector<SampledRow> settings(rows);
  for (SampledRow& row : settings) {
    row.temperature = rng.below(3) == 0 ? 0.0f : 0.25f * static_cast<float>(1 + rng.below(8));
    row.top_k = rng.below(2) * rng.below(n + 2);
    row.top_p = rng.below(2) == 0 ? 1.0f : static_cast<float>(1 + rng.below(100)) / 100;
    row.min_p = rng.below(3) == 0 ? static_cast<float>(rng.below(101)) / 100 : 0.0f;
    row.stream = static_cast<uint64_t>(rng.below(1LL << 40));
    row.position = static_cast<uint64_t>(rng.below(100));
    if (rng.below(3) == 0) row.edits = {2, edited, divisors, addends};
    if (rng.below(3) == 0) row.allowed = allowed;
  }
  std::vector<int64_t> first;
  for (const Isa isa : isas) {
    use(isa);
    for (const int threads : {1, 3}) {
      omp_set_num_threads(threads);
      auto* const x = logits_memory.place<float>(rows * n, true);
      std::copy(logits.begin(), logits.end(), x);
      auto* const ids = ids_memory.place<int64_t>(rows, true);
      for (int64_t i = 0; i < rows; ++i) settings[i].logits = x + i * n;
      sample(settings.data(), rows, n, ids);
      const std::vector<int64_t> made(ids, ids + rows);
      if (first.empty()) {
        first = made;
        for (int64_t i = 0; i < rows; ++i) {
          const std::vector<float> changed(x + i * n, x + (i + 1) * n);
          const auto highest = std::max_element(changed.begin(), changed.end());
          if (settings[i].temperature == 0.0f) {
            check(made[i] == highest - changed.begin(), join("the likeliest, seed ", seed));
          } else {
            const auto left = may_be_chosen(settings[i], changed);
            check(std::find(left.begin(), left.end(), made[i]) != left.end(),
                  join("one that may be chosen: ", made[i], ", seed ", seed));
          }
        }
      }
      check(made == first, join("the same on ", isa_name(isa), " by ", threads, ", seed ", seed));
    }
  }
}

void test_not_finite(const std::vector<Isa>& isas) {
  const Part part("not finite");
  for (const Isa isa : isas) {
    use(isa);
    for (const int64_t n : {1, 15, 16, 17, 1000}) {
      for (const float bad : {HUGE_VALF, -HUGE_VALF, std::nanf("")}) {
        for (const int64_t at : {int64_t{0}, n / 2, n - 1}) {
          std::vector<float> x(n, 1.0f);
          x[at] = bad;
          SampledRow row{x.data()};
          int64_t id = 0;
          sample(&row, 1, n, &id);
          check(id == kNotFinite, join(isa_name(isa), ", ", n, " logits, one ", bad));
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Seeds chosen = seeds(argc, argv, 300);
  start();
  const std::vector<Isa> isas = isas_here();
  test_random_bits();
  {
    const Part part("rows");
    for (uint64_t i = 0; i < chosen.count; ++i) test_rows(chosen.first + i, isas);
  }
  test_not_finite(isas);
  return finish();
}
