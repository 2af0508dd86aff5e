// The choices made before anything runs, for every microkernel of the table, those of other
// machines included: the dispatch takes the last row that may run, and choose_blocking() keeps the
// bounds that blocking.h states.
#include "harness.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;

struct Product {
  int64_t m, strips, k_blocks;
  int threads;
};

// Parts that follow each other from 0 to `count`, each cut at multiples of `step`.
bool covers(int64_t count, int64_t step, int64_t parts) {
  int64_t end = 0;
  for (int64_t index = 0; index < parts; ++index) {
    const Range range = part(count, step, parts, index);
    if (range.begin != end || range.size() < 0 || range.begin % step != 0) return false;
    end = range.end;
  }
  return end == count;
}

// The first bound that a blocking breaks; null when it keeps all.
const char* broken(const Microkernel& kernel, const Product& p, const Blocking& b) {
  if (b.row_parts < 1 || b.strip_parts < 1) return "an empty grid";
  if (b.row_parts * b.strip_parts > p.threads) return "more tasks than threads";
  if (b.rows < row_step(kernel) || b.rows % row_step(kernel) != 0) return "rows of no whole step";
  if (b.rows > kMostRows) return "rows beyond kMostRows";
  if (most_groups(kernel, b.rows) > kMostGroups) return "more groups than kMostGroups";
  if (b.strip_step < 1) return "no strip step";
  if (b.panel_strips < 1 || b.panel_strips > kernel.strips) return "a panel of no microkernel";
  if (b.unit_strips < 1 || b.unit_strips % b.panel_strips != 0) return "a unit of no whole panels";
  if (b.strips < 1 || b.strips % b.panel_strips != 0) return "a strip block of no whole panels";
  if (b.strips > b.unit_strips) return "a strip block beyond its unit";
  if (b.k_blocks < 1 || b.k_blocks > std::max<int64_t>(p.k_blocks, 1)) return "a k block";
  if (!covers(p.m, row_step(kernel), b.row_parts)) return "rows left out";
  if (!covers(p.strips, b.strip_step, b.strip_parts)) return "strips left out";

  const int64_t group = int64_t{kernel.rows} * kernel.strips * kStripColumns;
  const int64_t sums = workspace_sums(kernel, b, p.k_blocks);
  if (b.k_blocks >= p.k_blocks) return sums == 2 * group ? nullptr : "sums of whole products";
  const long reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
  const int64_t quarter = (reported > 0 ? reported : 1 << 20) / 4 / int64_t{sizeof(int32_t)};
  const int64_t panel = most_groups(kernel, b.rows) * group;
  return sums <= std::max(quarter, panel) ? nullptr : "sums beyond a quarter of L2 and a panel";
}

void test_bounds(const Microkernel& kernel) {
  Part part(kernel.name);
  std::vector<int64_t> rows = {47,  48,  49,  63,  64,   65,   100,  255,
                               256, 257, 271, 511, 1000, 4096, 99999};
  for (int64_t m = 1; m <= 34; ++m) rows.push_back(m);
  for (int64_t m : rows) {
    for (int64_t strips : {1, 2, 3, 4, 5, 7, 8, 15, 16, 33, 64, 256, 688, 2001}) {
      for (int64_t k_blocks : {0, 1, 2, 7, 9, 10, 64, 172, 1037}) {
        for (int threads : {1, 2, 3, 4, 7, 16, 56, 112}) {
          const Product p{m, strips, k_blocks, threads};
          const Blocking b = choose_blocking(kernel, m, strips, k_blocks, threads);
          const char* const what = broken(kernel, p, b);
          check(what == nullptr, what == nullptr ? std::string()
                                                 : join(kernel.name, ": ", what, ": m=", m,
                                                        " strips=", strips, " k_blocks=", k_blocks,
                                                        " threads=", threads, ": ", describe(b)));
        }
      }
    }
  }
}

void test_workers() {
  Part part("workers and passes");
  for (int64_t m : {1, 3, 4, 8, 64, 5000}) {
    for (int64_t n : {1, 16, 576, 4096, 32000}) {
      for (int64_t k : {0, 1, 576, 4096, 65793}) {
        for (int threads : {1, 2, 16, 112}) {
          const int workers = useful_threads(m, n, k, threads);
          check(1 <= workers && workers <= threads, "workers beyond the pool");
          check(useful_threads(2 * m, n, k, threads) >= workers, "fewer workers for more rows");
        }
        const int64_t pass = rows_per_pass(m, k);
        check(1 <= pass && pass <= std::max<int64_t>(m, 1), "rows of a pass");
        check(pass == m || pass % kBlockRows == 0, "a pass that cuts a block of codes");
        check(pass <= kBlockRows || pass * k <= 32 << 20, "a pass beyond the workspace");
      }
    }
  }
}

void test_dispatch() {
  Part part("dispatch");
  for (const IsaStatus& status : isa_status()) {
    for (int max_code : {127, 255}) {
      for (int64_t m = 1; m <= 40; ++m) {
        const Microkernel* last = nullptr;
        for (const Microkernel& kernel : microkernels()) {
          const bool here = kernel.isa == status.isa || status_of(kernel.isa).usable();
          const bool may_run = !(kernel.isa > status.isa) && max_code <= kernel.max_code;
          if (here && may_run && kernel.from_m <= m) last = &kernel;
        }
        const Microkernel& chosen = choose_microkernel(status.isa, max_code, m);
        check(&chosen == last,
              join(status.name, " codes to ", max_code, " m=", m, ": ", chosen.name));
      }
    }
  }
}

}  // namespace

int main() {
  test_dispatch();
  for (const Microkernel& kernel : microkernels()) test_bounds(kernel);
  test_workers();
  return finish();
}
