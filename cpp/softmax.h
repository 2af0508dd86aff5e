// The float work of attention: the softmax of a page of keys, and the sums of values. Compiled once
// per vector width (vec.h), with the same bits on each: what is summed over lanes goes through 16
// virtual ones and a fixed tree.
#pragma once

#include "activations.h"
#include "kernel.h"
#include "vec.h"

namespace sq_cpu {
namespace {

constexpr int kVirtualLanes = 16;
constexpr float kHidden = -__builtin_inff();  // a score that is not seen
constexpr int kPageVectors = static_cast<int>(kPageTokens) / kLanes;

// 2^x for x <= 0, at least 2^-126 and exactly 1 at 0: minimax on |r| <= 1/2 for the relative error,
// 2.9e-6, by Lawson's reweighted least squares. NaN stays NaN.
inline F32 exp2_weight(F32 x) {
  const F32 v = max(splat(-126.0f), x);
  const F32 shifted = v + kRoundMagic;
  const F32 r = v - (shifted - kRoundMagic);
  F32 p = fma(splat(0x1.3a02b8p-7f), r, splat(0x1.c9fc46p-5f));
  p = fma(p, r, splat(0x1.ec0378p-3f));
  p = fma(p, r, splat(0x1.62e12cp-1f));
  return scale_exp2(fma(p, r, splat(1.0f)), shifted);
}

// Every lane and its partner, whose index has the bit turned over.
template <int kBit, typename Join>
[[gnu::always_inline]] inline F32 join_lanes(F32 v, Join join) {
  if constexpr (kBit > 0) {
    I32 partner;
    for (int lane = 0; lane < kLanes; ++lane) partner[lane] = lane ^ kBit;
    return join_lanes<kBit / 2>(join(v, __builtin_shuffle(v, partner)), join);
  } else {
    return v;
  }
}

// Lane i and lane i + 8, then i and i + 4, and so on, whatever a vector's width.
inline float tree_sum(F32 (&parts)[kVirtualLanes / kLanes]) {
  for (int half = kVirtualLanes / kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return join_lanes<kLanes / 2>(parts[0], [](F32 a, F32 b) { return a + b; })[0];
}

inline float highest_lane(F32 v) {
  return join_lanes<kLanes / 2>(v, [](F32 a, F32 b) { return max(a, b); })[0];
}

inline F32 lane_numbers() {
  F32 v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = static_cast<float>(lane);
  return v;
}

// Where a row does not see the whole page.
struct Visible {
  Visible(int first_, int last_) : first(first_), last(last_) {}
  F32 operator()(int vector, F32 v, float hidden) const {
    I32 key;
    for (int lane = 0; lane < kLanes; ++lane) key[lane] = lane;
    key += vector * kLanes;
    return (key >= first) & (key < last) ? v : splat(hidden);
  }
  const int first, last;
};

struct AllVisible {
  F32 operator()(int, F32 v, float) const { return v; }
};

// Where the sums of a page's vectors of keys lie.
struct PageSums {
  explicit PageSums(const PageWeights& a) : row_bytes(a.panel * int64_t{sizeof(float)}) {
    for (int i = 0; i < kPageVectors; ++i) {
      const int64_t at = i * kLanes / a.panel * a.panel_stride + i * kLanes % a.panel;
      vector[i] = static_cast<const char*>(a.sums) + at * int64_t{sizeof(float)};
    }
  }
  const void* of(int row, int i) const { return vector[i] + row * row_bytes; }
  const char* vector[kPageVectors];  // in row 0
  const int64_t row_bytes;           // from a row to the next
};

// Products of codes, or of floats.
template <bool kCodes>
F32 products(const PageWeights& a, const PageSums& sums, int row, int i) {
  if constexpr (kCodes) {
    const U32 sum = load_bits<U32>(sums.of(row, i)) - load_bits<U32>(a.key_offset + i * kLanes);
    return __builtin_convertvector((I32)sum, F32);
  } else {
    return load_bits<F32>(sums.of(row, i));
  }
}

// A soft-capped and sloped score.
inline F32 bend(const PageWeights& a, int row, int key, F32 v) {
  if (a.cap != 0.0f) {  // q_scale holds 2 log2(e) / softcap; cap is softcap log2(e)
    const F32 power = exp2_weight(v < 0.0f ? v : -v);
    const F32 ratio = (1.0f - power) / (1.0f + power);  // tanh |s / softcap|
    v = a.cap * (v < 0.0f ? -ratio : ratio);
  }
  if (a.slope == nullptr) return v;
  return fma(splat(a.slope[row]), lane_numbers() + (a.distance[row] + static_cast<float>(key)), v);
}

// Scores in base 2, as far as the row sees them; returns the highest of them and of `most`.
template <bool kCodes, bool kBent, typename See>
float score_row(const PageWeights& a, const PageSums& sums, int row, See see,
                F32 (&s)[kPageVectors]) {
  F32 highest = splat(a.most[row]);
  for (int i = 0; i < kPageVectors; ++i) {
    const int key = i * kLanes;
    F32 v =
        products<kCodes>(a, sums, row, i) * (a.q_scale[row] * load_bits<F32>(a.key_scale + key));
    if constexpr (kBent) v = bend(a, row, key, v);
    s[i] = see(i, v, kHidden);
    highest = max(s[i], highest);
  }
  return highest_lane(highest);
}

template <bool kCodes>
void* weights_of(const PageWeights& a, int row, int key) {
  constexpr int64_t kBytes = kCodes ? 1 : sizeof(float);
  return static_cast<char*>(a.weights) + (row * kPageTokens + key) * kBytes;
}

// What a row without a score so far makes of a page: nothing, or NaN where it saw one.
template <bool kCodes>
void weigh_nothing(const PageWeights& a, int row, const F32 (&s)[kPageVectors]) {
  for (const F32& v : s) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (v[lane] != kHidden) a.total[row] = v[lane];
    }
  }
  a.carry[row] = 1.0f;
  a.unit[row] = 0.0f;
  std::memset(weights_of<kCodes>(a, row, 0), 0, kPageTokens * (kCodes ? 1 : sizeof(float)));
}

template <bool kCodes, bool kBent, typename See>
void weigh_row(const PageWeights& a, const PageSums& page, int row, See see) {
  F32 s[kPageVectors], heaviest = {};
  const float before = a.most[row], now = score_row<kCodes, kBent>(a, page, row, see, s);
  if (now == kHidden) return weigh_nothing<kCodes>(a, row, s);
  F32 sums[kVirtualLanes / kLanes] = {};
  for (int i = 0; i < kPageVectors; ++i) {
    const F32 p = exp2_weight(s[i] - now);
    s[i] = see(i, p * load_bits<F32>(a.value_scale + i * kLanes), 0.0f);
    heaviest = max(s[i], heaviest);
    // NaN where a value is not finite.
    sums[i % (kVirtualLanes / kLanes)] += fma(s[i], splat(0.0f), p);
  }
  const float carry = exp2_weight(splat(before - now))[0];
  a.most[row] = now;
  a.carry[row] = carry;
  a.total[row] = a.total[row] * carry + tree_sum(sums);
  if constexpr (!kCodes) {
    for (int i = 0; i < kPageVectors; ++i) {
      store_bits(weights_of<kCodes>(a, row, i * kLanes), s[i]);
    }
    return;
  }
  // So little that 255 / top might overflow adds nothing.
  const float top = highest_lane(heaviest);
  const bool heavy = top > 0x1p-100f;
  const float inverse = heavy ? 255.0f / top : 0.0f;
  a.unit[row] = heavy ? top * (1.0f / 255.0f) : 0.0f;
  for (int i = 0; i < kPageVectors; ++i) {
    const F32 shifted = fma(s[i], splat(inverse), splat(kRoundMagic));
    store_bits(weights_of<kCodes>(a, row, i * kLanes), narrow((U32)shifted));
  }
}

template <bool kCodes, bool kBent>
void weigh_rows(const PageWeights& a) {
  const PageSums page(a);
  for (int row = 0; row < a.rows; ++row) {
    const int first = a.first[row], last = a.last[row];
    if (first <= 0 && last >= kPageTokens) {
      weigh_row<kCodes, kBent>(a, page, row, AllVisible());
    } else {
      weigh_row<kCodes, kBent>(a, page, row, Visible(first, last));
    }
  }
}

template <bool kCodes>
void weigh(const PageWeights& a) {
  a.cap != 0.0f || a.slope != nullptr ? weigh_rows<kCodes, true>(a) : weigh_rows<kCodes, false>(a);
}

// o = o * carry + sums * unit
inline void gather_values(const ValueSums& a) {
  for (int64_t begin = 0; begin < a.columns; begin += a.panel) {
    const int64_t width = a.columns - begin < a.panel ? a.columns - begin : a.panel;
    const int32_t* sums = a.sums + begin / a.panel * a.panel_stride;
    for (int row = 0; row < a.rows; ++row, sums += width) {
      float* const o = a.o + row * a.ldo + begin;
      for (int64_t i = 0; i < width; i += kLanes) {
        const F32 sum = __builtin_convertvector(load_bits<I32>(sums + i), F32);
        const F32 before = load_bits<F32>(o + i) * a.carry[row];
        store_bits(o + i, fma(sum, splat(a.unit[row]), before));
      }
    }
  }
}

// Joins the softmax over other keys to `to`.
inline void merge(const SoftmaxRow& to, const SoftmaxRow& from, int64_t columns) {
  const float now = *from.most > *to.most ? *from.most : *to.most;
  const auto factor = [&](float most) {
    return most == now ? 1.0f : exp2_weight(splat(most - now))[0];
  };
  const float keep = factor(*to.most), take = factor(*from.most);
  *to.most = now;
  *to.total = *to.total * keep + *from.total * take;
  for (int64_t i = 0; i < columns; i += kLanes) {
    const F32 o = load_bits<F32>(from.o + i) * take;
    store_bits(to.o + i, fma(load_bits<F32>(to.o + i), splat(keep), o));
  }
}

// y = o / total; 0 for a row that saw nothing.
template <DType kType>
void finish_row(const SoftmaxRow& row, int64_t columns, void* y) {
  const float factor = *row.total == 0.0f ? 0.0f : 1.0f / *row.total;
  for (int64_t i = 0; i < columns; i += kLanes) {
    store_first(static_cast<char*>(y) + i * Element<kType>::kBytes,
                Element<kType>::round(load_bits<F32>(row.o + i) * factor), columns - i);
  }
}

}  // namespace
}  // namespace sq_cpu
