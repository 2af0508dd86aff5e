// What a decoder computes, by the library's own functions called one after another, with norms,
// rotary embeddings and weights in float in plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "program_model.h"
#include "sq_cpu/attention.h"
#include "sq_cpu/linear.h"

namespace sq_cpu::testing {

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

}  // namespace sq_cpu::testing
