// Runs the microkernels of one ISA against exact integers, or says why it cannot: ctest's list then
// shows what ran natively, what emulated, and what not at all.
//
//   test_isa NAME natively|emulated|emulated_beside_avx2
#include <set>

#include "harness.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;

constexpr int kSkipped = 77;  // CMakeLists.txt has it too

void run(Isa isa, std::set<std::string>& kernels) {
  use(isa);
  Rng rng(1);
  Guarded codes, weight;
  for (int max_code : {127, 255}) {
    for (int64_t m : {1, 2, 5, 40}) {
      const Problem p = make_problem(m, 70, 200, max_code, Fill::kExtremes, rng);
      kernels.insert(choose_microkernel(isa, max_code, m).name);
      std::vector<int32_t> zero_point = p.zero_point, y(p.m * p.n);
      gemm({place_codes(p, codes, true), nullptr, zero_point.data(), p.m, p.k, max_code},
           {place_weight(p, weight, true), p.n, p.k}, y.data(), p.n);
      const std::vector<int64_t> expected = exact(p);
      check(std::equal(y.begin(), y.end(), expected.begin()), describe(p));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "", how = argc > 2 ? argv[2] : "";
  const bool native = how == "natively";
  start();
  for (const IsaStatus& s : isa_status()) {
    if (s.name != name) continue;
    if (native ? !s.usable() : !runs_here(s.isa)) {
      std::printf("%s does not run: %s\n", name.c_str(), s.reason.c_str());
      return kSkipped;
    }
    if (!native && s.usable()) {
      std::printf("%s is not emulated: it runs natively\n", name.c_str());
      return kSkipped;
    }
    std::set<std::string> kernels;
    run(s.isa, kernels);
    for (const std::string& kernel : kernels) {
      std::printf("%s ran %s\n", kernel.c_str(), how.c_str());
      check(how != "emulated_beside_avx2" || kernel.find("avx512") == std::string::npos,
            kernel + " beside AVX2");
    }
    return finish();
  }
  std::printf("%s is not an ISA of sq_cpu\n", name.c_str());
  return 1;
}
