// linear() gives the same bits whatever the team: any number of threads, fewer than asked for, a
// caller that is itself in a parallel region, several callers at once. AMX under the emulator
// counts the threads that worked: each puts back the tile configuration it found, once.
//
// No call ends a thread of the pool or starts one, whatever its size.
#include <dirent.h>
#include <sys/wait.h>

#include <functional>
#include <memory>
#include <set>
#include <thread>

#include "harness.h"
#include "sq_cpu/batched_matmul.h"
#include "sq_cpu/saturation.h"
#include "team.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;

// Enough work for seven threads, in every regime: codes that each thread makes for itself, codes
// that they share; one row block, several.
struct Layer {
  int64_t m, n, k;
  Granularity granularity;
};
constexpr Layer kLayers[] = {
    {1, 900, 1100, Granularity::kPerToken},  {1, 900, 1100, Granularity::kPerTensor},
    {4, 600, 1700, Granularity::kPerToken},  {16, 400, 1000, Granularity::kPerToken},
    {17, 500, 500, Granularity::kPerTensor}, {70, 200, 400, Granularity::kPerToken},
    {400, 40, 300, Granularity::kStatic},    {1, 900, 1100, Granularity::kStatic},
};

std::string describe(const Layer& l) { return join("m=", l.m, " n=", l.n, " k=", l.k); }

class Caller {
 public:
  explicit Caller(const Layer& layer)
      : layer_(layer),
        x_(layer.m * layer.k),
        operand_(layer.m * layer.n),
        packed_(packed_bytes(layer.n, layer.k)) {
    Rng rng(7);
    for (auto& v : x_) v = static_cast<float>(rng.below(2001) - 1000) / 1000.0f;
    x_[layer.k / 2] = 77.0f;
    for (auto& v : operand_) v = static_cast<float>(rng.below(100));
    const Problem p = make_problem(0, layer.n, layer.k, 255, Fill::kUniform, rng);
    std::vector<float> scale(layer.n);
    for (auto& v : scale) v = 1e-4f * static_cast<float>(1 + rng.below(50));
    pack_weight(p.w.data(), scale.data(), operand_.data(), layer.n, layer.k, packed_.data());
    quantizer_.granularity = layer.granularity;
    quantizer_.scale = 0.01f;
    quantizer_.zero_point = 128;
    quantizer_.dynamic_fallback = true;
    quantizer_.counter = counter_.get();
  }

  // Rows since it was last asked.
  int64_t counted() const { return counter_->reset().rows; }

  std::vector<float> run() const {
    std::vector<float> y(layer_.m * layer_.n);
    const Epilogue epilogue{Activation::kSilu, operand_.data(), layer_.n,
                            operand_.data(),   layer_.n,        DType::kFloat32};
    linear(x_.data(), DType::kFloat32, layer_.m, layer_.k, {packed_.data(), layer_.n, layer_.k},
           quantizer_, y.data(), DType::kFloat32, layer_.n, epilogue);
    return y;
  }

 private:
  const Layer layer_;
  std::vector<float> x_, operand_;
  std::vector<std::byte> packed_;
  std::shared_ptr<RowCounter> counter_ = std::make_shared<RowCounter>();
  ActivationQuantizer quantizer_;
};

// How many threads took part in products of the emulated AMX kernel since the last call.
class Team {
 public:
  Team(Isa isa, const Layer& layer)
      : counted_(isa == Isa::kAmxInt8 && emulated(isa) &&
                 choose_microkernel(isa, 255, layer.m).isa == isa) {
    reset_amx_counters();
  }
  void check_size(int64_t least, int64_t most, const std::string& what) const {
    if (!counted_) return;
    const auto size = static_cast<int64_t>(amx_counters().releases);
    check(least <= size && size <= most, join(what, ": ", size, " threads worked"));
    reset_amx_counters();
  }

 private:
  const bool counted_;
};

void test_teams(Isa isa, const Layer& layer) {
  use(isa);
  const std::string what = join(isa_name(isa), " ", describe(layer));
  const Caller caller(layer);
  omp_set_num_threads(1);
  const std::vector<float> expected = caller.run();
  const Team team(isa, layer);
  for (int threads : {2, 3, 7}) {
    omp_set_num_threads(threads);
    caller.counted();
    check(caller.run() == expected, join(what, " threads=", threads));
    const bool counts = layer.granularity == Granularity::kStatic;
    check(caller.counted() == (counts ? layer.m : 0), join(what, ": counted, threads=", threads));
    team.check_size(threads, threads, what);
  }

  omp_set_dynamic(1);  // the runtime looks at the machine's load
  check(caller.run() == expected, what + ", a dynamic team");
  omp_set_dynamic(0);
  team.check_size(1, 7, what);

#pragma omp teams num_teams(1) thread_limit(2)
  check(caller.run() == expected, what + ", 2 of 7 threads");
  team.check_size(1, 2, what + ", of at most 2");

  // Nested teams are allowed, and yet each call is its thread's own.
  std::vector<std::vector<float>> found(3);
  omp_set_max_active_levels(2);
#pragma omp parallel num_threads(3)
  found[omp_get_thread_num()] = caller.run();
  omp_set_max_active_levels(1);
  for (const auto& y : found) check(y == expected, what + ", inside a parallel region");
  team.check_size(3, 3, what + ", three serial calls");

  std::vector<std::thread> threads;
  for (auto& y : found) {
    threads.emplace_back([&] {
      omp_set_num_threads(2);
      for (int i = 0; i < 3; ++i) y = caller.run();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& y : found) check(y == expected, what + ", several callers");
}

// A product with work for two: the other threads of the pool leave at once.
void test_few_workers(Isa isa) {
  use(isa);
  const Layer layer{4, 500, 600, Granularity::kPerToken};
  check(useful_threads(layer.m, layer.n, layer.k, 7) == 2, "a layer for two threads");
  const Caller caller(layer);
  omp_set_num_threads(1);
  const std::vector<float> expected = caller.run();
  omp_set_num_threads(7);
  const Team team(isa, layer);
  check(caller.run() == expected, isa_name(isa) + ", two workers of 7 threads");
  team.check_size(2, 2, "two workers of 7 threads");
}

std::set<std::string> thread_ids() {
  std::set<std::string> ids;
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) throw std::runtime_error("/proc/self/task cannot be read");
  while (const dirent* entry = readdir(tasks)) ids.insert(entry->d_name);
  closedir(tasks);
  return ids;
}

// Calls of every function, with work for one thread, for some and for all.
class Calls {
 public:
  struct Call {
    std::string name;
    std::function<void()> run;
  };

  Calls() {
    for (const Layer& layer : {kLayers[5], Layer{1, 8, 64, Granularity::kPerToken}, kLayers[0],
                               Layer{4, 500, 600, Granularity::kPerToken},
                               Layer{64, 64, 96, Granularity::kPerToken}, kLayers[4]}) {
      calls_.push_back({describe(layer), [caller = Caller(layer)] { caller.run(); }});
    }
    calls_.push_back({"quantize", [this] { quantize({}); }});
    ActivationQuantizer whole;
    whole.granularity = Granularity::kPerTensor;
    calls_.push_back({"quantize per tensor", [this, whole] { quantize(whole); }});
    calls_.push_back({"pack and unpack", [this] {
                        pack_weight(w_.data(), ones_.data(), nullptr, kN, kK, packed_.data());
                        unpack_weight(weight_, w_.data(), nullptr, nullptr);
                      }});
    calls_.push_back({"gemm", [this] { gemm(quantized_, weight_, sums_.data(), kN); }});
    calls_.push_back({"count_saturation", [this] { count_saturation(quantized_, weight_); }});
    for (int64_t m : {1, 40}) calls_.push_back({"attention", [this, m] { attention(m); }});
  }

  const std::vector<Call>& all() const { return calls_; }

 private:
  static constexpr int64_t kM = 512, kN = 160, kK = 1024;

  void quantize(const ActivationQuantizer& quantizer) {
    quantize_activations(x_.data(), DType::kFloat32, kK, quantizer, quantized_);
  }

  void attention(int64_t m) {  // 4 heads of m queries and kN keys
    batched_matmul({1, 4, 4, m, kN, 64}, {w_.data(), true, {0, m * 64, 64}},
                   {w_.data(), true, {0, 0, 64}}, 1.0f,
                   {sums_.data(), BatchedType::kInt32, {0, m * kN, kN}});
  }

  std::vector<float> x_ = std::vector<float>(kM * kK, 0.5f), scale_ = std::vector<float>(kM);
  std::vector<float> ones_ = std::vector<float>(kN, 1.0f);
  std::vector<int32_t> zero_point_ = std::vector<int32_t>(kM),
                       sums_ = std::vector<int32_t>(kM * kN);
  std::vector<uint8_t> codes_ = std::vector<uint8_t>(codes_bytes(kM, kK));
  std::vector<int8_t> w_ = std::vector<int8_t>(kN * kK, 3);
  std::vector<std::byte> packed_ = std::vector<std::byte>(packed_bytes(kN, kK));
  QuantizedActivation quantized_{codes_.data(), scale_.data(), zero_point_.data(), kM, kK, 255};
  PackedWeight weight_{packed_.data(), kN, kK};
  std::vector<Call> calls_;
};

void test_pool_stays() {
  Part part("the pool stays");
  omp_set_num_threads(7);
  const Calls calls;
  calls.all().front().run();
  const std::set<std::string> before = thread_ids();
  check(before.size() >= 7 + 2, "the pool is there");  // with . and ..
  for (const Calls::Call& first : calls.all()) {
    for (const Calls::Call& second : calls.all()) {
      first.run();
      second.run();
      check(thread_ids() == before, join("other threads after ", first.name, ", ", second.name));
    }
  }
}

// A child has the pool's data but none of its threads: it runs alone, and gives the same bits.
void test_fork(Isa isa) {
  use(isa);
  omp_set_num_threads(7);
  const Calls calls;
  std::vector<Caller> callers(std::begin(kLayers), std::end(kLayers));
  std::vector<std::vector<float>> expected;
  for (const Caller& caller : callers) expected.push_back(caller.run());
  const pid_t child = fork();
  if (child == 0) {
    if (pool_size() != 1) _exit(2);
    alarm(120);  // ends one that waits
    bool same = true;
    for (size_t i = 0; i < callers.size(); ++i) same &= callers[i].run() == expected[i];
    for (const Calls::Call& call : calls.all()) call.run();
    _exit(same ? 0 : 1);
  }
  int status = 0;
  check(waitpid(child, &status, 0) == child && status == 0,
        join(isa_name(isa), " in a forked child: status ", status));
  check(pool_size() == 7 && callers[0].run() == expected[0], "the parent after a fork");
}

}  // namespace

int main() {
  start();
  test_pool_stays();
  std::vector<std::vector<float>> reference;
  for (Isa isa : isas_here()) {
    Part part("teams on " + isa_name(isa));
    for (const Layer& layer : kLayers) test_teams(isa, layer);
    test_few_workers(isa);
    test_fork(isa);
    for (size_t i = 0; i < std::size(kLayers); ++i) {
      omp_set_num_threads(3);
      const std::vector<float> y = Caller(kLayers[i]).run();
      if (isa == Isa::kReference) reference.push_back(y);
      check(y == reference[i], join(isa_name(isa), " ", describe(kLayers[i]), ": the reference"));
    }
  }
  return finish();
}
