// The float work of attention: the rotation, the softmax of a page of keys, and the sums of values.
// Compiled once per vector width (vec.h), with the same bits on each: what is summed over lanes
// goes through 16 virtual ones and a fixed tree.
#pragma once

#include "activations.h"
#include "kernel.h"
#include "vec.h"

namespace sq_cpu {
namespace {

constexpr int kVirtualLanes = 16;
constexpr int kPageVectors = static_cast<int>(kPageTokens) / kLanes;

// 2^x for x <= 0, 0 below -126 and exactly 1 at 0: minimax on |r| <= 1/2 for the relative error,
// 2.9e-6, by Lawson's reweighted least squares. NaN stays NaN.
inline F32 exp2_weight(F32 x) {
  const F32 v = x < -126.0f ? splat(-126.0f) : x;
  const F32 shifted = v + kRoundMagic;
  const F32 r = v - (shifted - kRoundMagic);
  F32 p = fma(splat(0x1.3a02b8p-7f), r, splat(0x1.c9fc46p-5f));
  p = fma(p, r, splat(0x1.ec0378p-3f));
  p = fma(p, r, splat(0x1.62e12cp-1f));
  p = fma(p, r, splat(1.0f));
  return x < -126.0f ? F32{} : scale_exp2(p, shifted);
}

// a + b in lanes whose index lacks the bit, partner's a - b in the others.
template <int kBit>
F32 butterfly(F32 v) {
  I32 partner;
  F32 sign;
  for (int lane = 0; lane < kLanes; ++lane) {
    partner[lane] = lane ^ kBit;
    sign[lane] = lane & kBit ? -1.0f : 1.0f;
  }
  return __builtin_shuffle(v, partner) + v * sign;
}

template <int kBit>
void butterflies(F32& v, int64_t size) {
  if constexpr (kBit < kLanes) {
    if (kBit >= size) return;
    v = butterfly<kBit>(v);
    butterflies<2 * kBit>(v, size);
  }
}

// Multiplies each `size` elements, a power of two, by the Hadamard matrix without its factor
// size^-1/2. x is padded to whole vectors.
inline void hadamard(float* x, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; i += kLanes) {
    F32 v = load_bits<F32>(x + i);
    butterflies<1>(v, size);
    store_bits(x + i, v);
  }
  for (int64_t half = kLanes; half < size; half *= 2) {
    for (int64_t base = 0; base < count; base += 2 * half) {
      for (int64_t i = base; i < base + half; i += kLanes) {
        const F32 a = load_bits<F32>(x + i), b = load_bits<F32>(x + i + half);
        store_bits(x + i, a + b);
        store_bits(x + i + half, a - b);
      }
    }
  }
}

// Every lane and its partner, whose index has the bit turned over.
template <int kBit, typename Join>
F32 join_lanes(F32 v, Join join) {
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

template <typename See>
void weigh_row(const PageWeights& a, int row, See see) {
  constexpr float kHidden = -__builtin_inff();
  F32 s[kPageVectors], highest = splat(a.most[row]), poison = {};
  for (int i = 0; i < kPageVectors; ++i) {
    const int key = i * kLanes;
    const int32_t* sums = a.sums + key / a.panel * a.panel_stride + row * a.panel + key % a.panel;
    // The codes of q are 128 too large.
    const I32 t = (I32)(load_bits<U32>(sums) - (load_bits<U32>(a.key_sum + key) << 7));
    F32 v = __builtin_convertvector(t, F32) * (a.q_scale[row] * load_bits<F32>(a.key_scale + key));
    if (a.cap != 0.0f) {  // q_scale holds 2 log2(e) / softcap; cap is softcap log2(e)
      const F32 power = exp2_weight(v < 0.0f ? v : -v);
      const F32 ratio = (1.0f - power) / (1.0f + power);  // tanh |s / softcap|
      v = a.cap * (v < 0.0f ? -ratio : ratio);
    }
    if (a.slope != nullptr) {
      v = fma(splat(a.slope[row]), lane_numbers() + (a.distance[row] + static_cast<float>(key)), v);
    }
    s[i] = see(i, v, kHidden);
    poison += see(i, v * 0.0f, 0.0f);
    highest = max(s[i], highest);
  }
  const float before = a.most[row], now = highest_lane(highest);
  const bool any = now != kHidden;
  F32 sums[kVirtualLanes / kLanes] = {poison}, weights[kPageVectors], heaviest = {};
  for (int i = 0; i < kPageVectors; ++i) {
    const F32 p = any ? exp2_weight(s[i] - now) : F32{};
    weights[i] = see(i, p * load_bits<F32>(a.value_scale + i * kLanes), 0.0f);
    heaviest = max(weights[i], heaviest);
    F32& sum = sums[i % (kVirtualLanes / kLanes)];
    sum += p + weights[i] * 0.0f;  // NaN where a value is not finite
  }
  // So little that 255 / top might overflow adds nothing.
  const float top = highest_lane(heaviest);
  const bool heavy = top > 0x1p-100f;
  const float inverse = heavy ? 255.0f / top : 0.0f;
  a.most[row] = now;
  a.carry[row] = any ? exp2_weight(splat(before - now))[0] : 1.0f;
  a.unit[row] = heavy ? top / 255.0f : 0.0f;
  a.total[row] = a.total[row] * a.carry[row] + tree_sum(sums);
  uint8_t* const codes = a.codes + row * kPageTokens;
  for (int i = 0; i < kPageVectors; ++i) {
    const F32 shifted = weights[i] * inverse + kRoundMagic;
    store_bits(codes + i * kLanes, __builtin_convertvector((U32)shifted, U8));
  }
}

inline void weigh(const PageWeights& a) {
  for (int row = 0; row < a.rows; ++row) {
    const int first = a.first[row], last = a.last[row];
    if (first <= 0 && last >= kPageTokens) {
      weigh_row(a, row, AllVisible());
    } else {
      weigh_row(a, row, Visible(first, last));
    }
  }
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
