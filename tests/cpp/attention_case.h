// Tokens of several sequences, and a cache that is given them in calls.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "harness.h"
#include "sq_cpu/attention.h"

namespace sq_cpu::testing {

struct Case {
  int64_t head_dim = 64;
  int64_t kv_heads = 2;
  int64_t group = 3;
  std::vector<int64_t> before{0};  // tokens of each sequence that stand in the cache, and new ones
  std::vector<int64_t> rows{100};
  DType type = DType::kFloat32;
  bool causal = true;
  int64_t window = 0;
  float softcap = 0;
  bool sloped = false;
  bool sinks = false;
  float spread = 1;  // of q: how sharp the softmax is
  KvType kv = KvType::kInt8;

  int64_t heads() const { return kv_heads * group; }
  std::string describe() const {
    std::string text = join(isa_name(active_isa()), " head_dim=", head_dim, " kv_heads=", kv_heads,
                            " group=", group, " window=", window, " softcap=", softcap);
    for (int option : {int(type), int(causal), int(sloped), int(sinks), int(kv)})
      text += join(",", option);
    for (size_t i = 0; i < rows.size(); ++i) text += join(" ", before[i], "+", rows[i]);
    return text;
  }
};

// All tokens of all sequences: k, v [sequence][token][kv head][c], q of the new ones.
struct Tokens {
  std::vector<std::vector<float>> q, k, v;
  std::vector<float> slopes, sinks;
};

inline float rounded(DType type, float v) {
  if (type == DType::kFloat16) return static_cast<float>(static_cast<_Float16>(v));
  if (type == DType::kFloat32) return v;
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline std::vector<char> as_type(DType type, const std::vector<float>& values) {
  std::vector<char> bytes(values.size() * (type == DType::kFloat32 ? 4 : 2));
  for (size_t i = 0; i < values.size(); ++i) {
    const auto half = static_cast<_Float16>(values[i]);
    uint32_t bits;
    std::memcpy(&bits, &values[i], 4);
    const auto brain = static_cast<uint16_t>(bits >> 16);
    if (type == DType::kFloat32) std::memcpy(&bytes[4 * i], &values[i], 4);
    if (type == DType::kFloat16) std::memcpy(&bytes[2 * i], &half, 2);
    if (type == DType::kBFloat16) std::memcpy(&bytes[2 * i], &brain, 2);
  }
  return bytes;
}

inline float value_of(DType type, const char* p) {
  if (type == DType::kFloat32) {
    float v;
    std::memcpy(&v, p, 4);
    return v;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  if (type == DType::kBFloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return v;
  }
  _Float16 v;
  std::memcpy(&v, &bits, 2);
  return static_cast<float>(v);
}

inline Tokens make_tokens(const Case& c, Rng& rng) {
  const auto values = [&](int64_t count, float spread) {
    std::vector<float> x(count);
    for (float& v : x) {
      v = rounded(c.type, spread * (static_cast<float>(rng.below(2001)) / 1000 - 1));
      if (rng.below(50) == 0) v = rounded(c.type, 8 * v);  // channels that stand out
    }
    return x;
  };
  Tokens t;
  for (size_t i = 0; i < c.rows.size(); ++i) {
    const int64_t length = c.before[i] + c.rows[i];
    t.q.push_back(values(c.rows[i] * c.heads() * c.head_dim, c.spread));
    t.k.push_back(values(length * c.kv_heads * c.head_dim, 1));
    t.v.push_back(values(length * c.kv_heads * c.head_dim, 1));
  }
  for (int64_t h = 0; h < c.heads(); ++h) {
    t.slopes.push_back(
        std::exp2(-8.0f * static_cast<float>(h + 1) / static_cast<float>(c.heads())));
    t.sinks.push_back(static_cast<float>(rng.below(5)) - 2);
  }
  return t;
}

// A cache, its page table in random order, and calls that append and attend.
class Layer {
 public:
  Layer(const Case& c, int64_t spare_pages, Rng& rng)
      : c_(c), bytes_(page_bytes(c.head_dim, c.kv)) {
    for (size_t i = 0; i < c.rows.size(); ++i) {
      stride_ = std::max(stride_, (c.before[i] + c.rows[i] + kPageTokens - 1) / kPageTokens);
    }
    const auto used = static_cast<int64_t>(c.rows.size()) * stride_;
    page_count_ = used + spare_pages;
    std::vector<int32_t> pages(page_count_);
    std::iota(pages.begin(), pages.end(), 0);
    for (int64_t i = page_count_ - 1; i > 0; --i) std::swap(pages[i], pages[rng.below(i + 1)]);
    table_.assign(pages.begin(), pages.begin() + used);
    const int64_t size = page_count_ * c.kv_heads * bytes_;
    pages_ = memory_.place<std::byte>(size, false);
    std::memset(pages_, 0xff, size);
  }

  // Sequences `which`, each brought from from[i] to to[i] tokens; y of those rows.
  std::vector<std::vector<char>> run(const Tokens& t, const std::vector<size_t>& which,
                                     const std::vector<int64_t>& from,
                                     const std::vector<int64_t>& to) {
    const int64_t kv_width = c_.kv_heads * c_.head_dim, width = c_.heads() * c_.head_dim;
    std::vector<int64_t> first_row{0}, length;
    std::vector<int32_t> table;
    std::vector<float> q, k, v;
    for (size_t i = 0; i < which.size(); ++i) {
      const size_t s = which[i];
      first_row.push_back(first_row.back() + to[i] - from[i]);
      length.push_back(to[i]);
      table.insert(table.end(), table_.begin() + s * stride_, table_.begin() + (s + 1) * stride_);
      k.insert(k.end(), t.k[s].begin() + from[i] * kv_width, t.k[s].begin() + to[i] * kv_width);
      v.insert(v.end(), t.v[s].begin() + from[i] * kv_width, t.v[s].begin() + to[i] * kv_width);
      for (int64_t token = from[i]; token < to[i]; ++token) {
        const int64_t row = token - c_.before[s];  // those that stand before have no query
        for (int64_t e = 0; e < width; ++e) q.push_back(row < 0 ? 1 : t.q[s][row * width + e]);
      }
    }
    const KvCache cache{pages_, page_count_, c_.kv_heads, c_.head_dim, c_.kv};
    const Sequences sequences{static_cast<int64_t>(which.size()), first_row.data(), length.data(),
                              table.data(), stride_};
    const int64_t element = c_.type == DType::kFloat32 ? 4 : 2;
    const bool at_end = from[0] % 2 != 0;
    const HeadRows keys{k_.place_copy(as_type(c_.type, k), at_end), c_.type, kv_width, c_.head_dim};
    const HeadRows values{v_.place_copy(as_type(c_.type, v), at_end), c_.type, kv_width,
                          c_.head_dim};
    append(cache, sequences, keys, values);
    const HeadRows queries{q_.place_copy(as_type(c_.type, q), at_end), c_.type, width, c_.head_dim};
    const int64_t rows = first_row.back();
    char* const y = y_.place_filled<char>(rows * width * element, at_end);
    AttentionOptions options;
    options.scale = 1.0f / std::sqrt(static_cast<float>(c_.head_dim));
    options.causal = c_.causal;
    options.window = c_.window;
    options.softcap = c_.softcap;
    options.slopes = c_.sloped ? t.slopes.data() : nullptr;
    options.sinks = c_.sinks ? t.sinks.data() : nullptr;
    attention(cache, sequences, c_.heads(), queries, options, {y, c_.type, width, c_.head_dim});
    std::vector<std::vector<char>> results;
    for (size_t i = 0; i < which.size(); ++i) {
      results.emplace_back(y + first_row[i] * width * element,
                           y + first_row[i + 1] * width * element);
    }
    return results;
  }

  // All sequences in one call, after one that brings what stands before.
  std::vector<std::vector<char>> run(const Tokens& t) {
    std::vector<size_t> all(c_.rows.size());
    std::iota(all.begin(), all.end(), 0);
    std::vector<int64_t> to;
    for (size_t i = 0; i < all.size(); ++i) to.push_back(c_.before[i] + c_.rows[i]);
    run(t, all, std::vector<int64_t>(all.size(), 0), c_.before);
    return run(t, all, c_.before, to);
  }

 private:
  const Case c_;
  const int64_t bytes_;
  int64_t stride_ = 0, page_count_ = 0;
  std::vector<int32_t> table_;
  std::byte* pages_ = nullptr;
  Guarded memory_, q_, k_, v_, y_;
};

}  // namespace sq_cpu::testing
