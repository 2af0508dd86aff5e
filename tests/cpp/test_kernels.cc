// Every row of kernels.inc against exact integers, under any blocking and team, with guard pages at
// both ends of every buffer. AMX runs natively where there is AMX, else under the emulator.
//
//   test_kernels [SEED [COUNT]]    all of it, or some of the fuzz
#include "harness.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;

// One problem in guarded memory, for any number of kernels.
class Bench {
 public:
  void load(const Problem& p, bool at_end) {
    p_ = &p;
    at_end_ = at_end;
    expected_ = exact(p);
    codes_ = place_codes(p, u_, at_end);
    packed_ = place_weight(p, weight_, at_end);
    zero_point_ = zeros_.place_copy(p.zero_point, at_end);
  }

  // True when every integer is right and the memory between the rows of y is as it was.
  bool run(const Microkernel& kernel, const Blocking& blocking, int threads, int64_t ldy) {
    const int64_t count = p_->m == 0 ? 0 : (p_->m - 1) * ldy + p_->n;
    auto* y = y_.place_filled<int32_t>(count, at_end_);
    const GemmArgs args{{codes_, nullptr, zero_point_, p_->m, p_->k, kernel.max_code},
                        {packed_, p_->n, p_->k},
                        y,
                        Output::kInt32,
                        ldy,
                        nullptr};
    run_blocked(args, kernel, blocking, threads, sums_, at_end_);
    int32_t filler;
    std::memset(&filler, Guarded::kFiller, sizeof filler);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i / ldy, column = i % ldy;
      if (y[i] != (column < p_->n ? expected_[row * p_->n + column] : filler)) return false;
    }
    return true;
  }

  bool run_chosen(const Microkernel& kernel, int threads) {
    return run(kernel,
               choose_blocking(kernel, p_->m, strip_count(p_->n), k_block_count(p_->k), threads),
               threads, p_->n);
  }

 private:
  const Problem* p_ = nullptr;
  bool at_end_ = false;
  std::vector<int64_t> expected_;
  Guarded u_, weight_, zeros_, y_, sums_;
  uint8_t* codes_ = nullptr;
  std::byte* packed_ = nullptr;
  int32_t* zero_point_ = nullptr;
};

std::vector<const Microkernel*> kernels_here() {
  std::vector<const Microkernel*> kernels;
  for (const Microkernel& kernel : microkernels()) {
    if (runs_here(kernel.isa)) kernels.push_back(&kernel);
  }
  return kernels;
}

// The emulator takes some 10 us for a tile's product: of the larger problems it gets one in
// `share`.
bool worth_it(const Microkernel& kernel, const Problem& p, uint64_t index, uint64_t share) {
  const int64_t products = ceil_div(p.m, 16) * strip_count(p.n) * k_block_count(p.k);
  return !emulated(kernel.isa) || products <= 4 || index % share == 0;
}

std::vector<int64_t> sizes(int64_t all_to, std::vector<int64_t> more) {
  std::vector<int64_t> sizes(all_to + 1);
  for (int64_t i = 0; i <= all_to; ++i) sizes[i] = i;
  sizes.insert(sizes.end(), more.begin(), more.end());
  return sizes;
}

// Around every multiple that a kernel or a layout has.
void test_grid(Bench& bench) {
  Part part("shape grid");
  Rng rng(1);
  const auto wide = sizes(20, {31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 1000});
  uint64_t index = 0;
  for (int64_t m : sizes(9, {15, 16, 17, 31, 32, 33, 48})) {
    for (int64_t n : wide) {
      for (int64_t k : wide) {
        ++index;
        if (kSanitized && index % 5) continue;  // a fifth meets every size, too
        for (int max_code : {127, 255}) {
          if (max_code == 127 && index % 3) continue;  // a third of them meets every size
          const auto fill = static_cast<Fill>(index % kFills);
          const Problem p = make_problem(m, n, k, max_code, fill, rng);
          bench.load(p, rng.coin());
          for (const Microkernel* kernel : kernels_here()) {
            if (kernel->max_code != max_code || !worth_it(*kernel, p, index, 7)) continue;
            check(bench.run_chosen(*kernel, 1), join(kernel->name, " ", describe(p)));
          }
        }
      }
    }
  }
}

// As long and as wide as layers are; the deepest at the extremes, where int32 just holds the sum.
void test_large(Bench& bench) {
  Part part("large shapes");
  Rng rng(2);
  const struct {
    int64_t m, n, k;
    Fill fill;
  } shapes[] = {
      {1, 17, 4096, Fill::kUniform},   {5, 65, 4096, Fill::kExtremes},
      {33, 33, 4096, Fill::kUniform},  {2, 16, 11008, Fill::kHigh},
      {17, 20, 11008, Fill::kUniform}, {4, 4096, 65, Fill::kUniform},
      {18, 4096, 20, Fill::kExtremes}, {1, 11008, 64, Fill::kUniform},
      {33, 11008, 3, Fill::kUniform},  {1, 1, kMaxDepth, Fill::kHigh},
      {1, 1, kMaxDepth, Fill::kLow},
  };
  for (const auto& s : shapes) {
    for (int max_code : {127, 255}) {
      const Problem p = make_problem(s.m, s.n, s.k, max_code, s.fill, rng);
      bench.load(p, true);
      for (const Microkernel* kernel : kernels_here()) {
        if (kernel->max_code != max_code) continue;
        for (int threads : {1, 3}) {
          check(bench.run_chosen(*kernel, threads), join(kernel->name, " ", describe(p)));
        }
      }
    }
  }
}

void fuzz(Bench& bench, const Seeds& seeds) {
  Part part("fuzz");
  for (uint64_t seed = seeds.first; seed < seeds.first + seeds.count; ++seed) {
    Rng rng(seed);
    const int64_t size = rng.below(50);
    const int64_t m = rng.below(size == 0 ? 151 : size < 15 ? 41 : 20);
    const int64_t n = rng.below(size == 0 ? 301 : size < 15 ? 131 : 50);
    const int64_t k = rng.below(size == 0 ? 1501 : size < 15 ? 401 : 130);
    const int max_code = rng.coin() ? 255 : 127;
    const auto fill = static_cast<Fill>(rng.below(kFills));
    const int threads = rng.threads();  // of all kernels: a new team costs more than the product
    const Problem p = make_problem(m, n, k, max_code, fill, rng);
    bench.load(p, rng.coin());
    for (const Microkernel* kernel : kernels_here()) {
      const Blocking blocking = random_blocking(*kernel, k_block_count(k), rng);
      const int64_t ldy = n + rng.below(4);
      if (kernel->max_code < max_code || (!seeds.chosen && !worth_it(*kernel, p, seed, 15))) {
        continue;
      }
      check(bench.run(*kernel, blocking, threads, ldy),
            join("seed ", seed, ": ", kernel->name, " ", describe(p),
                 " fill=", static_cast<int>(fill), " threads=", threads, " ", describe(blocking)));
    }
  }
}

// Whatever blocking the library chooses for a team, and whichever of the team comes: a lone thread
// of any number does the tasks of all.
void test_teams(Bench& bench) {
  Part part("teams");
  Rng rng(3);
  const int64_t shapes[][3] = {{1, 700, 300}, {5, 200, 129}, {33, 130, 700}, {100, 100, 129}};
  for (const auto& [m, n, k] : shapes) {
    for (int max_code : {127, 255}) {
      const Problem p = make_problem(m, n, k, max_code, Fill::kUniform, rng);
      bench.load(p, true);
      for (const Microkernel* kernel : kernels_here()) {
        if (kernel->max_code != max_code) continue;
        for (int threads : {2, 3, 7}) {
          const std::string what = join(kernel->name, " ", describe(p), " threads=", threads);
          check(bench.run_chosen(*kernel, threads), what);
          const Blocking blocking =
              choose_blocking(*kernel, m, strip_count(n), k_block_count(k), threads);
          check(bench.run(*kernel, blocking, 1, n), what + ", of which one came");
        }
      }
    }
  }
}

// Each of the four tiles of a step is loaded once and used twice.
void test_tile_reuse(Bench& bench) {
  if (!runs_here(Isa::kAmxInt8) || !emulated(Isa::kAmxInt8)) return;
  Rng rng(4);
  const Problem p = make_problem(64, 64, 640, 255, Fill::kUniform, rng);
  bench.load(p, true);
  const Microkernel& amx = choose_microkernel(Isa::kAmxInt8, 255, p.m);
  constexpr Blocking kUncut{1, 1, 64, 1, 2, 4, 4, 10};
  const AmxCounters before = amx_counters();
  check(bench.run(amx, kUncut, 1, p.n), "a product of whole 2 x 2 tiles");
  const AmxCounters after = amx_counters();
  const uint64_t dots = after.dots - before.dots, loads = after.loads - before.loads;
  const uint64_t stores = after.stores - before.stores;
  std::printf("%-26s %llu TDPs, %llu tile loads: %.2f TDPs per load\n", amx.name,
              static_cast<unsigned long long>(dots), static_cast<unsigned long long>(loads),
              static_cast<double>(dots) / static_cast<double>(loads));
  check(dots == 4 * 4 * 10, "one TDP for each pair of tiles");  // 4 x 4 tiles of y, 10 of k
  check(loads == dots, "a TDP per tile load");
  check(stores == 4 * 4, "one store for each tile of y");
  check(after.configs - before.configs == 1 && after.releases - before.releases == 1,
        "one configuration for a task, put back at its end");
}

// The packed weight as linear.h draws it; without a bias where that is empty.
std::vector<std::byte> pack_plainly(const Problem& p, const std::vector<float>& scale,
                                    const std::vector<float>& bias) {
  std::vector<std::byte> packed(packed_bytes(p.n, p.k));
  const int64_t tiles = k_block_count(p.k) * kTileBytes;
  for (int64_t n = 0; n < p.n; ++n) {
    std::byte* strip = packed.data() + n / kStripColumns * (tiles + kTrailerBytes);
    const int64_t c = n % kStripColumns;
    int32_t sum = 0;
    for (int64_t k = 0; k < p.k; ++k) {
      const int64_t b = k / kTileDepth, g = k % kTileDepth / 4, i = k % 4;
      strip[b * kTileBytes + 64 * g + 4 * c + i] = static_cast<std::byte>(p.w[n * p.k + k]);
      sum += p.w[n * p.k + k];
    }
    std::byte* trailer = strip + tiles;
    std::memcpy(trailer + 4 * c, &sum, 4);
    std::memcpy(trailer + 4 * (kStripColumns + c), &scale[n], 4);
    if (!bias.empty()) std::memcpy(trailer + 4 * (2 * kStripColumns + c), &bias[n], 4);
  }
  return packed;
}

void test_packing(Isa isa) {
  use(isa);
  Part part("packing on " + isa_name(isa));
  Rng rng(5);
  Guarded w_memory, scale_memory, bias_memory, packed_memory;
  for (int64_t n : {0, 1, 15, 16, 17, 40}) {
    for (int64_t k : {0, 1, 63, 64, 65, 130, 1000}) {
      for (Fill fill : {Fill::kUniform, Fill::kLow, Fill::kHigh}) {
        const Problem p = make_problem(0, n, k, 255, fill, rng);
        std::vector<float> scale(n), bias(n);
        for (int64_t i = 0; i < n; ++i) scale[i] = 0.5f + i, bias[i] = -3.0f * i;
        const bool with_bias = rng.coin(), at_end = rng.coin();
        const int64_t bytes = packed_bytes(n, k);
        auto* packed = packed_memory.place_filled<std::byte>(bytes, at_end);
        pack_weight(w_memory.place_copy(p.w, at_end), scale_memory.place_copy(scale, at_end),
                    with_bias ? bias_memory.place_copy(bias, at_end) : nullptr, n, k, packed);
        const auto expected = pack_plainly(p, scale, with_bias ? bias : std::vector<float>());
        check(std::equal(expected.begin(), expected.end(), packed),
              "the layout of " + describe(p) + (with_bias ? " with a bias" : ""));

        std::vector<int8_t> w(n * k);
        std::vector<float> scale2(n), bias2(n);
        unpack_weight({packed, n, k}, w.data(), scale2.data(), bias2.data());
        const std::vector<float> zeros(n);
        check(w == p.w && scale == scale2 && bias2 == (with_bias ? bias : zeros), "unpack");
      }
    }
  }
}

void test_packing_refusals() {
  Part part("packing refuses");
  check_refused("exceeds 65793", [] { packed_bytes(1, kMaxDepth + 1); });
  check_refused("is negative", [] { packed_bytes(1, -1); });
}

}  // namespace

int main(int argc, char** argv) {
  const Seeds fuzzed = seeds(argc, argv, 10000);
  start();
  const std::vector<Isa> isas = isas_here();  // says what is not run
  Bench bench;
  if (!fuzzed.chosen) {
    for (Isa isa : isas) test_packing(isa);
    test_packing_refusals();
    test_grid(bench);
    test_large(bench);
    test_teams(bench);
    test_tile_reuse(bench);
  }
  fuzz(bench, fuzzed);
  return finish();
}
