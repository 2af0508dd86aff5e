#include "sq_cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "layout.h"
#include "philox.h"
#include "scratch.h"
#include "sq_cpu/isa.h"
#include "team.h"

namespace sq_cpu {
namespace {

constexpr float kHiddenLogit = -HUGE_VALF;
constexpr float kLog2E = 0x1.715476p+0f;
constexpr int kExponents = 256;   // of a float that is not negative
constexpr int64_t kFewest = 256;  // tokens that are put in order at first

struct Workspace {
  Scratch<float> weights, sums;
  std::vector<int32_t> order;
};

void edit(const SampledRow& row, int64_t vocabulary) {
  const LogitEdits& edits = row.edits;
  for (int64_t i = 0; i < edits.count; ++i) {
    float& x = row.logits[edits.ids[i]];
    x = (x > 0 ? x / edits.divisors[i] : x * edits.divisors[i]) + edits.addends[i];
  }
  if (row.allowed == nullptr) return;
  for (int64_t word = 0; word * 32 < vocabulary; ++word) {
    const int64_t begin = word * 32, end = std::min(vocabulary, begin + 32);
    const uint32_t bits = row.allowed[word];
    if (bits == ~0u) continue;
    for (int64_t id = begin; id < end; ++id) {
      if ((bits >> (id - begin) & 1) == 0) row.logits[id] = kHiddenLogit;
    }
  }
}

// The `count` tokens of the highest weights, and in their order; fewer where others weigh nothing.
void likeliest(const float* w, int64_t n, int64_t count, std::vector<int32_t>& order) {
  const auto exponent = [](float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits >> 23;
  };
  int64_t with[kExponents] = {};
  for (int64_t id = 0; id < n; ++id) ++with[exponent(w[id])];
  uint32_t least = kExponents - 1;
  for (int64_t found = with[least]; found < count && least > 1;) found += with[--least];
  order.clear();
  for (int64_t id = 0; id < n; ++id) {
    if (exponent(w[id]) >= least) order.push_back(static_cast<int32_t>(id));
  }
  const auto before = [w](int32_t a, int32_t b) { return w[a] != w[b] ? w[a] > w[b] : a < b; };
  const int64_t some = std::min<int64_t>(count, order.size());
  std::partial_sort(order.begin(), order.begin() + some, order.end(), before);
  order.resize(some);
}

// What top_k and top_p leave, in the order of ids.
void keep_likeliest(const SampledRow& row, const float* w, int64_t n, double total,
                    std::vector<int32_t>& order) {
  const int64_t most = row.top_k > 0 ? std::min(row.top_k, n) : n;
  for (int64_t count = most < n ? most : std::min(kFewest, n);;
       count = std::min(most, 16 * count)) {
    likeliest(w, n, count, order);
    const bool all = count == most || static_cast<int64_t>(order.size()) < count;
    if (most < n) {
      total = 0;
      for (const int32_t id : order) total += w[id];
    }
    size_t kept = 0;
    double sum = 0;
    while (kept < order.size() && sum < row.top_p * total) sum += w[order[kept++]];
    const bool reached = sum >= row.top_p * total;
    order.resize(std::max<size_t>(kept, 1));
    if (reached || all) break;
  }
  std::sort(order.begin(), order.end());
}

int64_t sample_row(const SampledRow& row, int64_t n, const RowKernels& kernels,
                   Workspace& workspace) {
  HighestLogit highest = kernels.highest_logit(row.logits, n);
  if (!highest.finite) return kNotFinite;
  if (row.edits.count > 0 || row.allowed != nullptr) {
    edit(row, n);
    highest = kernels.highest_logit(row.logits, n);
    if (highest.value == kHiddenLogit) return kNothingAllowed;
    if (highest.value == HUGE_VALF) return highest.index;  // edited beyond fp32: certain
  }
  if (row.temperature == 0.0f) return highest.index;
  const int64_t blocks = ceil_div(n, kLogitBlock);
  float* const w = workspace.weights.get(n);
  float* const sums = workspace.sums.get(blocks);
  kernels.weigh_logits({row.logits, n, highest.value, std::min(kLog2E / row.temperature, 0x1p100f),
                        row.min_p, w, sums});
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block) total += sums[block];
  const double u = static_cast<double>(random_bits(row.stream, row.position) >> 11) * 0x1p-53;
  double sum = 0;
  if (row.top_p < 1.0f || (row.top_k > 0 && row.top_k < n)) {
    std::vector<int32_t>& order = workspace.order;
    keep_likeliest(row, w, n, total, order);
    total = 0;
    for (const int32_t id : order) total += w[id];
    for (const int32_t id : order) {
      if ((sum += w[id]) > u * total) return id;
    }
    return order.back();
  }
  int64_t block = 0;
  while (block + 1 < blocks && sum + sums[block] <= u * total) sum += sums[block++];
  int64_t last = highest.index;
  for (int64_t id = block * kLogitBlock; id < n; ++id) {
    if (w[id] == 0.0f) continue;
    if ((sum += w[id]) > u * total) return id;
    last = id;
  }
  return last;  // the sums by blocks were higher by their rounding
}

void check(const SampledRow& row, int64_t vocabulary) {
  SQ_CHECK(row.logits != nullptr, "no logits");
  SQ_CHECK(row.temperature >= 0 && std::isfinite(row.temperature), "temperature is ",
           row.temperature);
  SQ_CHECK(row.top_k >= 0, "top_k is ", row.top_k);
  SQ_CHECK(row.top_p > 0 && row.top_p <= 1, "top_p is ", row.top_p);
  SQ_CHECK(row.min_p >= 0 && row.min_p <= 1, "min_p is ", row.min_p);
  const LogitEdits& edits = row.edits;
  SQ_CHECK(edits.count >= 0 && edits.count <= vocabulary, edits.count, " edits of ", vocabulary,
           " logits");
  SQ_CHECK(edits.count == 0 ||
               (edits.ids != nullptr && edits.divisors != nullptr && edits.addends != nullptr),
           "edits without ids, divisors or addends");
  for (int64_t i = 0; i < edits.count; ++i) {
    SQ_CHECK(edits.ids[i] >= 0 && edits.ids[i] < vocabulary, "an edit of token ", edits.ids[i],
             " of ", vocabulary);
    SQ_CHECK(edits.divisors[i] > 0 && std::isfinite(edits.divisors[i]) &&
                 std::isfinite(edits.addends[i]),
             "an edit divides by ", edits.divisors[i], " and adds ", edits.addends[i]);
  }
}

}  // namespace

void sample(const SampledRow* rows, int64_t count, int64_t vocabulary, int64_t* ids) {
  SQ_CHECK(count >= 0 && vocabulary > 0 && vocabulary <= INT32_MAX, count, " rows of ", vocabulary,
           " logits");
  SQ_CHECK(count == 0 || (rows != nullptr && ids != nullptr), "no rows or no ids");
  for (int64_t i = 0; i < count; ++i) check(rows[i], vocabulary);
  const RowKernels& kernels = row_kernels(active_isa());
  // Threads of their own rows; what they need is reserved before.
  const int workers = static_cast<int>(std::min<int64_t>(count, pool_size()));
  if (workers == 0) return;
  thread_local std::vector<Workspace> workspaces;
  if (static_cast<int>(workspaces.size()) < workers) workspaces = std::vector<Workspace>(workers);
  for (int worker = 0; worker < workers; ++worker) {
    workspaces[worker].weights.get(vocabulary);
    workspaces[worker].sums.get(ceil_div(vocabulary, kLogitBlock));
    workspaces[worker].order.reserve(vocabulary);
  }
  Workspace* const own = workspaces.data();
  run_team(workers, [&](int worker, int team) {
    for (int64_t i = worker; i < count; i += team) {
      ids[i] = sample_row(rows[i], vocabulary, kernels, own[worker]);
    }
  });
}

}  // namespace sq_cpu
