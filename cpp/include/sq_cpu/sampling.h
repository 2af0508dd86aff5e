// The next token of a row of logits.
//
// After the edits, with w = exp((x - max x) / temperature): of the tokens with w >= min_p, in the
// order of w, the lower id first among equals, the first top_k; of those the fewest whose w reach
// top_p of their sum. One of them by its w: where the sum of w, in the order of ids, passes u times
// the sum of all. u is of Philox-4x32-10 (Salmon et al., SC11), keyed by `stream`, at counter
// `position`: a sequence draws alike in any batch. The same on every ISA and for any thread count.
#pragma once

#include <cstdint>

namespace sq_cpu {

// x[id] becomes x[id] / divisor where it is positive, else x[id] * divisor; then + addend.
struct LogitEdits {
  int64_t count = 0;
  const int64_t* ids = nullptr;  // [count]
  const float* divisors = nullptr;
  const float* addends = nullptr;
};

struct SampledRow {
  float* logits;             // [vocabulary], changed by the edits
  float temperature = 0.0f;  // 0: the likeliest, the lowest id of equals
  int64_t top_k = 0;         // 0: all
  float top_p = 1.0f;
  float min_p = 0.0f;
  uint64_t stream = 0;
  uint64_t position = 0;
  LogitEdits edits = {};
  const uint32_t* allowed = nullptr;  // a bit for each id, 32 to a word; null: all are
};

constexpr int64_t kNotFinite = -1;  // a logit is NaN or infinite, before the edits
constexpr int64_t kNothingAllowed = -2;

// ids[i] = the token of row i, or one of the two above. Throws std::invalid_argument for options
// out of their ranges and edits of ids that there are not.
void sample(const SampledRow* rows, int64_t count, int64_t vocabulary, int64_t* ids);

}  // namespace sq_cpu
