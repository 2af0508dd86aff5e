// A random decoder: its program, and the same by the library's own functions, called one after
// another, with norms, rotary embeddings and weights in float in plain loops.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <numeric>
#include <string>
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
  Norm::Kind norm = Norm::Kind::kRms;
  bool interleaved = false, head_norms = false, sandwich = false, head = false;
  bool smoothed = false, hadamard = false, tied = false;
  bool in_float[5] = {};  // q, k and v; out; gate; up; down and the head
  DType float_type = DType::kFloat32;
  float multiplier = 1.0f;  // of what is added to the residual
  bool learned = false;     // positions, and a norm after them
  bool by_head = false;     // q, k and v lie side by side for each kv head
  bool whole_norms = false;
  int64_t experts = 0, top = 0;
  bool renormalize = false, shared = false;  // an expert of all rows
  Granularity granularity = Granularity::kPerToken;
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

// A sum through virtual lanes, then a tree; term(i, sum so far).
template <int kLanes, typename Term>
float lane_sum(int64_t count, Term term) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kLanes] = term(i, lanes[i % kLanes]);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

inline Floats normalized(const Norm& norm, const Floats& x) {
  if (norm.kind == Norm::Kind::kNone) return x;
  const auto n = static_cast<float>(x.size());
  const bool centred = norm.kind == Norm::Kind::kLayer;
  const auto count = static_cast<int64_t>(x.size());
  const auto plain = [&](int64_t i, float sum) { return sum + x[i]; };
  const float mean = centred ? lane_sum<32>(count, plain) / n : 0.0f;
  const float squares = lane_sum<32>(
      count, [&](int64_t i, float sum) { return std::fma(x[i] - mean, x[i] - mean, sum); });
  const float r = 1.0f / std::sqrt(squares / n + norm.eps);
  Floats y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    y[i] = (x[i] - mean) * r;
    if (norm.weight != nullptr) y[i] *= norm.weight[i];
    if (norm.bias != nullptr) y[i] += norm.bias[i];
  }
  return y;
}

inline void rotate(const Rotary& rotary, int64_t position, float* x) {
  const float* const cos = rotary.table + position * 2 * rotary.rotated;
  const float* const sin = cos + rotary.rotated;
  const Floats before(x, x + rotary.rotated);
  for (int64_t i = 0; i < rotary.rotated; ++i) {
    const int64_t half = rotary.rotated / 2;
    const int64_t partner = rotary.interleaved ? i ^ 1 : i < half ? i + half : i - half;
    x[i] = before[i] * cos[i] + before[partner] * sin[i];
  }
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
    if (s.granularity == Granularity::kStatic) q.scale = 0.02f, q.zero_point = 128;
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

// Steps in float, of dense operands; none or ReLU.
inline Floats stepped(Floats y, const Epilogue& steps, float multiplier) {
  for (size_t i = 0; i < y.size(); ++i) {
    if (steps.activation == Activation::kRelu && y[i] < 0) y[i] = 0;
    y[i] *= multiplier;
    if (steps.other != nullptr) y[i] *= static_cast<const float*>(steps.other)[i];
    if (steps.residual != nullptr) y[i] += static_cast<const float*>(steps.residual)[i];
  }
  return y;
}

inline Floats multiply(const Floats& x, int64_t m, const Model::Linear& linear,
                       const ActivationQuantizer& quantizer, const Epilogue& epilogue = {},
                       float multiplier = 1.0f) {
  const int64_t n = linear.weight.n, k = linear.weight.k;
  Floats y(m * n), columns;
  if (linear.dense != nullptr) {
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t j = 0; j < n; ++j) {
        const float* const w = linear.dense + j * k;
        y[row * n + j] = linear.in_float.bias[j] + lane_sum<16>(k, [&](int64_t i, float sum) {
                           return std::fma(x[row * k + i], w[i], sum);
                         });
      }
    }
    return stepped(std::move(y), epilogue, multiplier);
  }
  Epilogue steps = epilogue;
  if (linear.columns.count > 0) {
    columns.assign(m * n, 0.0f);
    if (steps.residual != nullptr) {
      const auto* const residual = static_cast<const float*>(steps.residual);
      columns.assign(residual, residual + m * n);
    }
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t c = 0; c < linear.columns.count; ++c) {
        for (int64_t j = 0; j < n; ++j) {
          float& sum = columns[row * n + j];
          sum = std::fma(linear.columns.weight[c * n + j], x[row * k + linear.columns.columns[c]],
                         sum);
        }
      }
    }
    steps.residual = columns.data();
    steps.ld_residual = n;
  }
  const bool plain = multiplier == 1.0f;
  sq_cpu::linear(x.data(), DType::kFloat32, m, k, linear.weight, quantizer, y.data(),
                 DType::kFloat32, n, plain ? steps : Epilogue{});
  return plain ? y : stepped(std::move(y), steps, multiplier);
}

inline Floats rows_of(const Floats& x, int64_t m, const Norm& norm) {
  const auto n = static_cast<int64_t>(x.size()) / m;
  Floats y;
  for (int64_t row = 0; row < m; ++row) {
    const Floats one = normalized(norm, {x.begin() + row * n, x.begin() + (row + 1) * n});
    y.insert(y.end(), one.begin(), one.end());
  }
  return y;
}

// Of rows [q heads, k, v] for each kv head.
inline void take_heads(const Shape& s, int64_t m, const Floats& qkv, Floats& q, Floats& k,
                       Floats& v) {
  q.clear(), k.clear(), v.clear();
  auto at = qkv.begin();
  const auto take = [&](Floats& to, int64_t heads) {
    to.insert(to.end(), at, at + heads * s.head_dim);
    at += heads * s.head_dim;
  };
  for (int64_t i = 0; i < m * s.kv_heads; ++i) take(q, s.group), take(k, 1), take(v, 1);
}

// A row's experts, in ascending order; the softmax and the gate by the library's own kernels.
inline Floats mixture(const Shape& s, const Model::Layer& layer, const Floats& x) {
  const RowKernels& kernels = row_kernels(active_isa());
  Floats shares = multiply(x, 1, layer.router, {}), mixed(s.width);
  kernels.softmax_row(shares.data(), s.experts, shares.data());
  std::vector<int64_t> order(s.experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return shares[a] > shares[b]; });
  order.resize(s.top);
  float sum = 0.0f;
  for (int64_t e : order) sum += shares[e];
  const auto add = [&](const Model::Expert& expert, float weight, bool gate) {
    const Floats up = multiply(x, 1, expert.up, expert.quantizers[0]);
    Epilogue gated;
    gated.activation = s.activation;
    gated.other = up.data();
    gated.ld_other = s.ffn;
    const Floats y = multiply(multiply(x, 1, expert.gate, expert.quantizers[0], gated), 1,
                              expert.down, expert.quantizers[1]);
    kernels.add_scaled(y.data(), s.width, weight, gate, mixed.data());
  };
  std::sort(order.begin(), order.end());
  for (int64_t e : order) add(layer.experts[e], s.renormalize ? shares[e] / sum : shares[e], false);
  if (s.shared) {
    add(layer.experts.back(),
        multiply(x, 1, layer.shared_gate, layer.experts.back().quantizers[0])[0], true);
  }
  return mixed;
}

inline Floats reference(const Model& model, const Call& call, Caches& caches) {
  const Shape& s = model.s;
  const auto m = static_cast<int64_t>(call.ids.size());
  Floats x;
  for (int64_t id : call.ids) {
    Floats row(model.table.begin() + id * s.width, model.table.begin() + (id + 1) * s.width);
    if (s.tied) {
      gather_rows(model.head.weight, &id, 1, model.head_quantizer.inverse_smoothing, row.data(),
                  DType::kFloat32, s.width);
    }
    for (const float v : row) x.push_back(v * 1.5f);
  }
  if (s.learned) {
    for (int64_t row = 0; row < m; ++row) {
      const int64_t at = (call.positions[row] + Model::kOffset) * s.width;
      for (int64_t i = 0; i < s.width; ++i) x[row * s.width + i] += model.positions[at + i];
    }
    x = rows_of(x, m, model.entry_norm);
  }
  const auto residual = [&] {
    Epilogue e;
    e.residual = x.data();
    e.ld_residual = s.width;
    return e;
  };
  const auto add = [&](const Floats& y, int64_t rows, const Model::Linear& linear,
                       const ActivationQuantizer& quantizer, const Norm& after) {
    if (!s.sandwich) {
      x = multiply(y, rows, linear, quantizer, residual(), s.multiplier);
      return;
    }
    const Floats apart = rows_of(multiply(y, rows, linear, quantizer), rows, after);
    for (size_t i = 0; i < x.size(); ++i) x[i] = apart[i] + x[i];
  };
  for (int64_t i = 0; i < s.layers; ++i) {
    const Model::Layer& layer = model.layers[i];
    const Floats input = rows_of(x, m, layer.norms[0]);
    Floats q = multiply(input, m, layer.q, layer.quantizers[0]);
    Floats k = multiply(input, m, layer.k, layer.quantizers[0]);
    Floats v = multiply(input, m, layer.v, layer.quantizers[0]);
    if (s.by_head) take_heads(s, m, multiply(input, m, layer.qkv, layer.quantizers[0]), q, k, v);
    const auto transform = [&](Floats& heads, int64_t count, const Norm& norm) {
      heads = rows_of(heads, s.whole_norms ? m : m * count, norm);
      for (int64_t row = 0; s.rotated > 0 && row < m * count; ++row) {
        rotate(model.rotary, call.positions[row / count], &heads[row * s.head_dim]);
      }
    };
    transform(q, s.heads(), layer.norms[1]);
    transform(k, s.kv_heads, layer.norms[2]);
    const int64_t kv = s.kv_heads * s.head_dim, width = s.heads() * s.head_dim;
    const Sequences sequences = call.sequences(caches, i);
    append(caches.caches[i], sequences, {k.data(), DType::kFloat32, kv, s.head_dim},
           {v.data(), DType::kFloat32, kv, s.head_dim});
    Floats o(m * width);
    attention(caches.caches[i], sequences, s.heads(),
              {q.data(), DType::kFloat32, width, s.head_dim}, model.options(),
              {o.data(), DType::kFloat32, width, s.head_dim});
    add(o, m, layer.out, layer.quantizers[1], layer.norms[3]);
    const Floats mlp = rows_of(x, m, layer.norms[4]);
    if (s.experts > 0) {
      for (int64_t row = 0; row < m; ++row) {
        const auto from = mlp.begin() + row * s.width;
        const Floats mixed = mixture(s, layer, {from, from + s.width});
        for (int64_t i = 0; i < s.width; ++i) x[row * s.width + i] += mixed[i];
      }
      continue;
    }
    const Floats up = multiply(mlp, m, layer.up, layer.quantizers[2]);
    Epilogue gated;
    gated.activation = s.activation;
    gated.other = up.data();
    gated.ld_other = s.ffn;
    add(multiply(mlp, m, layer.gate, layer.quantizers[2], gated), m, layer.down,
        layer.quantizers[3], layer.norms[5]);
  }
  Floats result;
  for (int64_t row : call.kept) {
    const Floats one(x.begin() + row * s.width, x.begin() + (row + 1) * s.width);
    const Floats y =
        s.head ? multiply(normalized(model.final_norm, one), 1, model.head, model.head_quantizer)
               : one;
    result.insert(result.end(), y.begin(), y.end());
  }
  return result;
}

inline ProjectStage project(Buffer in, const Norm& norm, const ActivationQuantizer& quantizer,
                            const std::vector<ProjectedLinear>& linears) {
  return {in, 0, norm, quantizer, false, linears.data(), static_cast<int>(linears.size())};
}

inline ProjectedLinear part(const Model::Linear& linear, Buffer out, int64_t column = 0) {
  ProjectedLinear projected{linear.weight, out};
  projected.column = column;
  projected.float_columns = linear.columns;
  projected.in_float = linear.in_float;
  return projected;
}

struct MixtureBuffers {
  Buffer x, up, gated, apart, mixed, shared_gate;
};

inline void add_mixture(const Model& model, const Model::Layer& layer, Program& program,
                        const MixtureBuffers& to) {
  const Shape& s = model.s;
  const Norm& norm = layer.norms[4];
  FloatWeight router = layer.router.in_float;
  program.add(
      RouteStage{to.x, 0, norm, router, s.experts, s.width, s.top, s.renormalize, to.mixed});
  for (int64_t i = 0; i < s.experts + s.shared; ++i) {
    const Model::Expert& expert = layer.experts[i];
    const bool shared = i == s.experts;
    const int list = shared ? -1 : static_cast<int>(i);
    ProjectedLinear gate = part(expert.gate, to.gated);
    gate.activation = s.activation;
    gate.other = to.up;
    std::vector<ProjectedLinear> linears{part(expert.up, to.up), gate};
    if (shared) linears.push_back(part(layer.shared_gate, to.shared_gate));
    ProjectStage into = project(to.x, norm, expert.quantizers[0], linears);
    into.list = list, into.gather = !shared;
    program.add(into);
    const std::vector<ProjectedLinear> down{part(expert.down, to.apart)};
    ProjectStage out = project(to.gated, {}, expert.quantizers[1], down);
    out.list = list;
    program.add(out);
    program.add(AddStage{to.apart, list, shared ? to.shared_gate : kNoBuffer, to.mixed});
  }
  program.add(AddStage{to.mixed, -1, kNoBuffer, to.x});
}

inline void build(const Model& model, Program& program) {
  const Shape& s = model.s;
  const int64_t q = s.heads() * s.head_dim, kv = s.kv_heads * s.head_dim;
  const Buffer x = program.buffer(s.width), qkv = program.buffer(q + 2 * kv);
  const Buffer o = program.buffer(q), up = program.buffer(s.ffn), gated = program.buffer(s.ffn);
  const Buffer apart = program.buffer(s.width), logits = program.buffer(s.vocabulary);
  const Buffer mixed = program.buffer(s.width), shared_gate = program.buffer(1);
  if (s.tied) {
    program.add(
        PackedEmbedStage{model.head.weight, model.head_quantizer.inverse_smoothing, 1.5f, x});
  } else {
    program.add(EmbedStage{model.table.data(), DType::kFloat32, s.vocabulary, 1.5f, x});
  }
  if (s.learned) {
    program.add(PositionStage{model.positions.data(), Model::kPositions + Model::kOffset,
                              Model::kOffset, x});
    program.add(NormStage{x, 0, s.width, model.entry_norm});
  }
  const auto add = [&](Buffer in, const Model::Linear& linear, const ActivationQuantizer& quantizer,
                       const Norm& after) {
    ProjectedLinear projected = part(linear, s.sandwich ? apart : x);
    projected.accumulate = !s.sandwich;
    if (!s.sandwich) projected.multiplier = s.multiplier;
    program.add(project(in, {}, quantizer, {projected}));
    if (s.sandwich) program.add(MergeStage{apart, after, x});
  };
  for (int64_t i = 0; i < s.layers; ++i) {
    const Model::Layer& layer = model.layers[i];
    std::vector<ProjectedLinear> projections{part(layer.q, qkv), part(layer.k, qkv, q),
                                             part(layer.v, qkv, q + kv)};
    if (s.by_head) projections = {part(layer.qkv, qkv)};
    program.add(project(x, layer.norms[0], layer.quantizers[0], projections));
    AttendStage attend{qkv,
                       0,
                       q,
                       q + kv,
                       s.heads(),
                       layer.norms[1],
                       layer.norms[2],
                       s.rotated > 0 ? 0 : -1,
                       static_cast<int>(i),
                       s.kv_heads,
                       s.head_dim,
                       model.options(),
                       o};
    if (s.by_head) {
      attend.k = s.group * s.head_dim;
      attend.v = attend.k + s.head_dim;
      attend.stride = attend.v + s.head_dim;
    }
    if (s.whole_norms) {
      program.add(NormStage{qkv, 0, q, layer.norms[1]});
      program.add(NormStage{qkv, q, kv, layer.norms[2]});
      attend.q_norm = attend.k_norm = {};
    }
    program.add(attend);
    add(o, layer.out, layer.quantizers[1], layer.norms[3]);
    if (s.experts > 0) {
      add_mixture(model, layer, program, {x, up, gated, apart, mixed, shared_gate});
      continue;
    }
    ProjectedLinear gate = part(layer.gate, gated);
    gate.activation = s.activation;
    gate.other = up;
    if (s.in_float[2] == s.in_float[3]) {
      program.add(project(x, layer.norms[4], layer.quantizers[2], {part(layer.up, up), gate}));
    } else {
      program.add(project(x, layer.norms[4], layer.quantizers[2], {part(layer.up, up)}));
      program.add(project(x, layer.norms[4], layer.quantizers[2], {gate}));
    }
    add(gated, layer.down, layer.quantizers[3], layer.norms[5]);
  }
  if (s.head) {
    const std::vector<ProjectedLinear> head{part(model.head, logits)};
    ProjectStage stage = project(x, model.final_norm, model.head_quantizer, head);
    stage.kept_rows = true;
    program.add(stage);
  }
  program.set_result(s.head ? logits : x);
}

inline Floats run(const Model& model, Program& program, const Call& call, Caches& caches,
                  int threads) {
  const int64_t width = model.s.head ? model.s.vocabulary : model.s.width;
  Floats result(call.kept.size() * width);
  std::vector<const int32_t*> tables;
  for (const auto& table : call.tables) tables.push_back(table.data());
  program.run(
      {call.ids.data(), call.positions.data(), call.sequences(caches, 0), caches.caches.data(),
       static_cast<int>(caches.caches.size()), tables.data(), &model.rotary, 1, call.kept.data(),
       static_cast<int64_t>(call.kept.size()), result.data()},
      threads);
  return result;
}

inline std::vector<int64_t> random_tokens(int64_t count, const Shape& s, Rng& rng) {
  std::vector<int64_t> ids(count);
  for (int64_t& id : ids) id = rng.below(s.vocabulary);
  return ids;
}

}  // namespace sq_cpu::testing
