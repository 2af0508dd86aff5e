// A random decoder: its weights, caches of its layers, and calls with new tokens.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "harness.h"
#include "sq_cpu/program.h"

namespace sq_cpu::testing {

using Floats = std::vector<float>;

struct Aligned {
  explicit Aligned(int64_t bytes) : memory(bytes + 64) {}
  std::byte* data() {
    return reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 *
                                        64);
  }
  std::vector<std::byte> memory;
};

struct Shape {
  int64_t width = 48, head_dim = 16, kv_heads = 2, group = 2, ffn = 80, vocabulary = 40;
  int64_t layers = 2, rotated = 16, window = 0, float_columns = 0;
  int64_t longest = 300;  // prompt
  Norm::Kind norm = Norm::Kind::kRms;
  bool interleaved = false, head_norms = false, sandwich = false, head = false;
  bool smoothed = false, hadamard = false, tied = false, fallback = false;
  bool in_float[5] = {};  // q, k and v; out; gate; up; down and the head
  DType float_type = DType::kFloat32;
  float multiplier = 1.0f;  // of what is added to the residual
  bool learned = false;     // positions, and a norm after them
  bool by_head = false;     // q, k and v lie side by side for each kv head
  bool whole_norms = false;
  int64_t experts = 0, top = 0;
  bool renormalize = false, shared = false;  // an expert of all rows
  Granularity granularity = Granularity::kPerToken;
  RowCounter* counter = nullptr;  // of all quantizers
  Activation activation = Activation::kSilu;

  int64_t heads() const { return kv_heads * group; }
  std::string describe() const {
    std::string text = isa_name(active_isa());
    for (int64_t v : {width,
                      head_dim,
                      kv_heads,
                      group,
                      ffn,
                      layers,
                      rotated,
                      window,
                      float_columns,
                      int64_t(norm),
                      int64_t(interleaved),
                      int64_t(head_norms),
                      int64_t(sandwich),
                      int64_t(head),
                      int64_t(smoothed),
                      int64_t(hadamard),
                      int64_t(fallback),
                      int64_t(granularity),
                      int64_t(float_type),
                      int64_t(learned),
                      int64_t(by_head),
                      int64_t(whole_norms),
                      experts,
                      top,
                      int64_t(renormalize),
                      int64_t(shared)}) {
      text += join(" ", v);
    }
    for (bool v : in_float) text += v ? " float" : " int8";
    return text;
  }
};

inline Floats random_floats(int64_t count, Rng& rng, float spread = 1.0f) {
  Floats x(count);
  for (float& v : x) v = spread * (static_cast<float>(rng.below(2001)) / 1000 - 1);
  return x;
}

inline std::vector<int64_t> random_tokens(int64_t count, const Shape& s, Rng& rng) {
  std::vector<int64_t> ids(count);
  for (int64_t& id : ids) id = rng.below(s.vocabulary);
  return ids;
}

// What a model has, owned.
struct Model {
  Model(const Shape& shape, Rng& rng_) : s(shape), rng(rng_) {
    table = random_floats(s.vocabulary * s.width, rng);
    for (int64_t i = 0; i < s.layers; ++i) layers.push_back(make_layer());
    final_norm = make_norm(s.width);
    entry_norm = make_norm(s.width);
    positions = random_floats((kPositions + kOffset) * s.width, rng);
    head = make_linear(s.vocabulary, s.width, 0, s.in_float[4] && !s.tied);
    head_quantizer = make_quantizer(s.width);
    head_quantizer.granularity = Granularity::kPerToken;
    head_quantizer.terms = s.tied ? 2 : 1;
    rotary_table = random_floats(kPositions * 2 * std::max<int64_t>(s.rotated, 1), rng);
    rotary = {rotary_table.data(), kPositions, s.rotated, s.interleaved};
  }

  struct Linear {
    PackedWeight weight;
    FloatColumns columns;
    FloatWeight in_float;
    const float* dense = nullptr;  // what in_float holds
  };
  struct Expert {
    Linear gate, up, down;
    ActivationQuantizer quantizers[2];  // gate and up, down
  };
  struct Layer {
    std::vector<Expert> experts;  // the shared one last
    Linear router, shared_gate;
    Norm norms[6];  // attention, q, k, after attention, mlp, after mlp
    Linear q, k, v, qkv, out, gate, up, down;
    ActivationQuantizer quantizers[4];  // qkv, out, gate and up, down
  };

  const float* keep(Floats values) {
    kept.push_back(std::move(values));
    return kept.back().data();
  }
  Norm make_norm(int64_t n) {
    Norm norm{s.norm, keep(random_floats(n, rng)), nullptr, 1e-5f};
    if (s.norm == Norm::Kind::kLayer) norm.bias = keep(random_floats(n, rng));
    return norm;
  }
  Linear make_float(int64_t n, int64_t k) {
    Floats w = random_floats(n * k, rng, 0.2f);
    Linear linear{{nullptr, n, k}, {}, {nullptr, s.float_type, keep(random_floats(n, rng))}};
    if (s.float_type == DType::kBFloat16) {
      packed.emplace_back(n * k * 2);
      for (int64_t i = 0; i < n * k; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &w[i], 4);
        const auto high = static_cast<uint16_t>(bits >> 16);
        std::memcpy(packed.back().data() + 2 * i, &high, 2);
        bits = uint32_t{high} << 16;
        std::memcpy(&w[i], &bits, 4);
      }
      linear.in_float.data = packed.back().data();
    }
    linear.dense = keep(std::move(w));
    if (linear.in_float.data == nullptr) linear.in_float.data = linear.dense;
    return linear;
  }
  Linear make_linear(int64_t n, int64_t k, int64_t columns = 0, bool in_float = false) {
    if (in_float) return make_float(n, k);
    std::vector<int8_t> w(n * k);
    for (int8_t& code : w) code = static_cast<int8_t>(rng.between(-127, 127));
    Floats scale = random_floats(n, rng, 0.02f), bias = random_floats(n, rng);
    packed.emplace_back(packed_bytes(n, k));
    pack_weight(w.data(), scale.data(), bias.data(), n, k, packed.back().data());
    Linear linear{{packed.back().data(), n, k}, {}, {}};
    if (columns > 0) {
      indices.emplace_back(columns);
      std::iota(indices.back().begin(), indices.back().end(), 1);
      linear.columns = {columns, indices.back().data(), keep(random_floats(columns * n, rng))};
    }
    return linear;
  }
  ActivationQuantizer make_quantizer(int64_t k) {
    ActivationQuantizer q;
    q.granularity = s.granularity;
    if (s.granularity == Granularity::kStatic) {
      q.scale = 0.02f, q.zero_point = 128;
      q.dynamic_fallback = s.fallback, q.counter = s.counter;
    }
    if (s.smoothed) {
      Floats inverse = random_floats(k, rng, 0.5f);
      for (float& v : inverse) v += 1.0f;
      q.inverse_smoothing = keep(std::move(inverse));
    }
    if (s.hadamard) q.hadamard = 64;
    return q;
  }
  Layer make_layer() {
    const int64_t q = s.heads() * s.head_dim, kv = s.kv_heads * s.head_dim;
    Layer layer;
    layer.norms[0] = make_norm(s.width);
    if (s.head_norms)
      layer.norms[1] = make_norm(s.head_dim), layer.norms[2] = make_norm(s.head_dim);
    if (s.whole_norms) layer.norms[1] = make_norm(q), layer.norms[2] = make_norm(kv);
    if (s.sandwich) layer.norms[3] = make_norm(s.width), layer.norms[5] = make_norm(s.width);
    layer.norms[4] = make_norm(s.width);
    const bool* const floats = s.in_float;
    layer.q = make_linear(q, s.width, 0, floats[0]);
    layer.k = make_linear(kv, s.width, s.float_columns, floats[0]);
    layer.v = make_linear(kv, s.width, 0, floats[0]);
    if (s.by_head) layer.qkv = make_linear(q + 2 * kv, s.width, 0, floats[0]);
    layer.out = make_linear(s.width, q, 0, floats[1]);
    layer.gate = make_linear(s.ffn, s.width, 0, floats[2]);
    layer.up = make_linear(s.ffn, s.width, 0, floats[3]);
    layer.down = make_linear(s.width, s.ffn, s.float_columns, floats[4]);
    for (int64_t i = 0; i < s.experts + s.shared; ++i) {
      const bool in_float = i == 1;
      layer.experts.push_back({make_linear(s.ffn, s.width, 0, in_float),
                               make_linear(s.ffn, s.width, 0, in_float),
                               make_linear(s.width, s.ffn, 0, in_float),
                               {make_quantizer(s.width), make_quantizer(s.ffn)}});
    }
    if (s.experts > 0) layer.router = make_float(s.experts, s.width);
    if (s.shared) layer.shared_gate = make_linear(1, s.width);
    const int64_t depths[] = {s.width, q, s.width, s.ffn};
    for (int i = 0; i < 4; ++i) layer.quantizers[i] = make_quantizer(depths[i]);
    return layer;
  }
  AttentionOptions options() const {
    AttentionOptions options;
    options.scale = 0.25f;
    options.window = s.window;
    return options;
  }

  static constexpr int64_t kPositions = 400, kOffset = 2;
  const Shape s;
  Rng& rng;
  Floats table, rotary_table, positions;
  std::vector<Layer> layers;
  Norm final_norm, entry_norm;
  Linear head;
  ActivationQuantizer head_quantizer;
  Rotary rotary;
  std::deque<Floats> kept;
  std::deque<Aligned> packed;
  std::deque<std::vector<int64_t>> indices;
};

// Caches of all layers, and sequences that grow in them.
struct Caches {
  Caches(const Shape& s, int64_t sequences, int64_t pages_each) : stride(pages_each) {
    for (int64_t i = 0; i < s.layers; ++i) {
      memory.emplace_back(sequences * pages_each * s.kv_heads * page_bytes(s.head_dim));
      caches.push_back({memory.back().data(), sequences * pages_each, s.kv_heads, s.head_dim});
    }
    // Pages of odd layers ascend.
    for (int64_t i = 0; i < s.layers; ++i) {
      tables.emplace_back(sequences * pages_each);
      std::iota(tables[i].begin(), tables[i].end(), 0);
      if (i % 2 == 0) std::reverse(tables[i].begin(), tables[i].end());
    }
  }
  std::deque<Aligned> memory;
  std::vector<KvCache> caches;
  std::vector<std::vector<int32_t>> tables;
  int64_t stride;
};

// New tokens of some sequences.
struct Call {
  explicit Call(const Caches& caches) : tables(caches.tables.size()) {}
  std::vector<int64_t> ids, positions, first_row{0}, length, kept;
  std::vector<std::vector<int32_t>> tables;
  void add(const Caches& caches, int64_t sequence, const std::vector<int64_t>& tokens,
           int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kept.push_back(static_cast<int64_t>(ids.size()));
      ids.push_back(tokens[i]);
      positions.push_back(i);
    }
    first_row.push_back(static_cast<int64_t>(ids.size()));
    length.push_back(end);
    for (size_t i = 0; i < tables.size(); ++i) {
      const auto row = caches.tables[i].begin() + sequence * caches.stride;
      tables[i].insert(tables[i].end(), row, row + caches.stride);
    }
  }
  Sequences sequences(const Caches& caches, int64_t layer) const {
    return {static_cast<int64_t>(length.size()), first_row.data(), length.data(),
            tables[layer].data(), caches.stride};
  }
};

}  // namespace sq_cpu::testing
