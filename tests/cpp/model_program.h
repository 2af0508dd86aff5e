// The program of a decoder, and a call of it.
#pragma once

#include <cstdint>
#include <vector>

#include "program_model.h"
#include "sq_cpu/program.h"

namespace sq_cpu::testing {

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

}  // namespace sq_cpu::testing
