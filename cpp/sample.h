// What sampling does to all logits of a row. Compiled once per vector width (vec.h), with the same
// bits on each.
#pragma once

#include "kernel.h"
#include "norm.h"
#include "softmax.h"
#include "vec.h"

namespace sq_cpu {
namespace {

inline F32 load_logits(const float* x, int64_t count) {
  F32 v = load_first(x, count);
  for (int64_t lane = count; lane < kLanes; ++lane) v[lane] = kHidden;
  return v;
}

inline HighestLogit highest_logit(const float* x, int64_t n) {
  constexpr int kParts = 4;
  F32 highest[kParts], difference[kParts] = {};
  for (F32& v : highest) v = splat(kHidden);
  for (int64_t i = 0, part = 0; i < n; i += kLanes, part = (part + 1) % kParts) {
    highest[part] = max(highest[part], load_logits(x + i, n - i));
    const F32 v = load_first(x + i, n - i);
    difference[part] += v - v;  // NaN once a value is not finite
  }
  const F32 all = max(max(highest[0], highest[1]), max(highest[2], highest[3]));
  const F32 sum = difference[0] + difference[1] + (difference[2] + difference[3]);
  bool finite = true;
  for (int lane = 0; lane < kLanes; ++lane) finite &= sum[lane] == 0.0f;
  HighestLogit found{0, highest_lane(all), finite};
  while (found.index < n - 1 && x[found.index] != found.value) ++found.index;
  return found;
}

inline void weigh_logits(const LogitWeights& a) {
  for (int64_t block = 0; block * kLogitBlock < a.n; ++block) {
    const int64_t begin = block * kLogitBlock, end = std::min(a.n, begin + kLogitBlock);
    constexpr int kVectors = kVirtualLanes / kLanes;
    F32 sums[kVectors] = {};
    for (int64_t i = begin; i < end; i += kVirtualLanes) {
      for (int part = 0; part < kVectors; ++part) {
        const int64_t at = i + part * kLanes;
        if (at >= end) break;
        const F32 power = (load_logits(a.x + at, end - at) - a.highest) * a.scale;
        F32 w = power >= -126.0f ? exp2_weight(power) : F32{};
        w = w >= a.least ? w : F32{};
        sums[part] += w;
        store_first(a.w + at, w, end - at);
      }
    }
    a.sums[block] = tree_sum(sums);
  }
}

}  // namespace
}  // namespace sq_cpu
