// Which rows of a mixture go to which expert.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernel.h"
#include "scratch.h"

namespace sq_cpu {

class Routes {
 public:
  void reserve(int64_t rows, int64_t experts, int64_t choices) {
    logits_.get(rows * experts);
    chosen_.get(choices);
    chosen_weight_.get(choices);
    first_.get(experts + 1);
    next_.get(experts);
    rows_.get(choices);
    weight_.get(choices);
  }

  float* logits() { return logits_.get(0); }  // [rows, experts]

  // The experts of a row of logits, the heaviest first, and of equals the first.
  void choose(int64_t row, int64_t experts, int64_t top, bool renormalize,
              const RowKernels& kernels) {
    float* const shares = logits() + row * experts;
    int64_t* const chosen = chosen_.get(0) + row * top;
    float* const weight = chosen_weight_.get(0) + row * top;
    kernels.softmax_row(shares, experts, shares);
    float sum = 0.0f;
    for (int64_t i = 0; i < top; ++i) {
      chosen[i] = std::max_element(shares, shares + experts) - shares;
      weight[i] = shares[chosen[i]];
      shares[chosen[i]] = -1.0f;
      sum += weight[i];
    }
    if (!renormalize) return;
    for (int64_t i = 0; i < top; ++i) weight[i] /= sum;
  }

  // A list of rows for each expert, when all rows have chosen.
  void fill(int64_t rows, int64_t experts, int64_t top) {
    int64_t* const first = first_.get(0);
    int64_t* const next = next_.get(0);
    const int64_t* const chosen = chosen_.get(0);
    std::fill_n(first, experts + 1, 0);
    for (int64_t i = 0; i < rows * top; ++i) ++first[chosen[i] + 1];
    for (int64_t i = 0; i < experts; ++i) first[i + 1] += first[i];
    std::copy_n(first, experts, next);
    for (int64_t i = 0; i < rows * top; ++i) {
      const int64_t to = next[chosen[i]]++;
      rows_.get(0)[to] = i / top;
      weight_.get(0)[to] = chosen_weight_.get(0)[i];
    }
  }

  int64_t size(int list) { return first_.get(0)[list + 1] - first_.get(0)[list]; }
  const int64_t* rows(int list) { return rows_.get(0) + first_.get(0)[list]; }  // ascending
  const float* weights(int list) { return weight_.get(0) + first_.get(0)[list]; }

 private:
  Scratch<float> logits_, chosen_weight_, weight_;
  Scratch<int64_t> chosen_;
  Scratch<int64_t> first_, next_;  // where each list begins, and is filled
  Scratch<int64_t> rows_;          // list after list
};

}  // namespace sq_cpu
