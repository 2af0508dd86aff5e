// Programs against the library's own functions, called one after another, with norms, rotary
// embeddings and the rest in plain loops: the same bits, on every ISA, for any threads, any batch,
// and any cut of a prompt into calls.
#include <array>
#include <cmath>
#include <deque>
#include <numeric>
#include <string>
#include <vector>

#include "harness.h"
#include "sq_cpu/program.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;
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
  bool smoothed = false, tied = false;
  Granularity granularity = Granularity::kPerToken;
  Activation activation = Activation::kSilu;

  int64_t heads() const { return kv_heads * group; }
  std::string describe() const {
    std::string text = isa_name(active_isa());
    for (int64_t v : {width, head_dim, kv_heads, group, ffn, layers, rotated, window, float_columns,
                      int64_t(norm), int64_t(interleaved), int64_t(head_norms), int64_t(sandwich),
                      int64_t(head), int64_t(smoothed), int64_t(granularity)}) {
      text += join(" ", v);
    }
    return text;
  }
};

Floats random_floats(int64_t count, Rng& rng, float spread = 1.0f) {
  Floats x(count);
  for (float& v : x) v = spread * (static_cast<float>(rng.below(2001)) / 1000 - 1);
  return x;
}

// The sum of a row: 32 virtual lanes, then a tree.
template <typename Term>
float lane_sum(const Floats& x, Term term) {
  float lanes[32] = {};
  for (size_t i = 0; i < x.size(); ++i) lanes[i % 32] = term(x[i], lanes[i % 32]);
  for (int half = 16; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

Floats normalized(const Norm& norm, const Floats& x) {
  if (norm.kind == Norm::Kind::kNone) return x;
  const auto n = static_cast<float>(x.size());
  const bool centred = norm.kind == Norm::Kind::kLayer;
  const float mean = centred ? lane_sum(x, [](float v, float sum) { return sum + v; }) / n : 0.0f;
  const float squares =
      lane_sum(x, [&](float v, float sum) { return std::fma(v - mean, v - mean, sum); });
  const float r = 1.0f / std::sqrt(squares / n + norm.eps);
  Floats y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    y[i] = (x[i] - mean) * r;
    if (norm.weight != nullptr) y[i] *= norm.weight[i];
    if (norm.bias != nullptr) y[i] += norm.bias[i];
  }
  return y;
}

void rotate(const Rotary& rotary, int64_t position, float* x) {
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
    head = make_linear(s.vocabulary, s.width);
    head_quantizer = make_quantizer(s.width);
    head_quantizer.granularity = Granularity::kPerToken;
    head_quantizer.terms = s.tied ? 2 : 1;
    rotary_table = random_floats(kPositions * 2 * std::max<int64_t>(s.rotated, 1), rng);
    rotary = {rotary_table.data(), kPositions, s.rotated, s.interleaved};
  }

  struct Linear {
    PackedWeight weight;
    FloatColumns columns;
  };
  struct Layer {
    Norm norms[6];  // attention, q, k, after attention, mlp, after mlp
    Linear q, k, v, out, gate, up, down;
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
  Linear make_linear(int64_t n, int64_t k, int64_t columns = 0) {
    std::vector<int8_t> w(n * k);
    for (int8_t& code : w) code = static_cast<int8_t>(rng.between(-127, 127));
    Floats scale = random_floats(n, rng, 0.02f), bias = random_floats(n, rng);
    packed.emplace_back(packed_bytes(n, k));
    pack_weight(w.data(), scale.data(), bias.data(), n, k, packed.back().data());
    Linear linear{{packed.back().data(), n, k}, {}};
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
    return q;
  }
  Layer make_layer() {
    const int64_t q = s.heads() * s.head_dim, kv = s.kv_heads * s.head_dim;
    Layer layer;
    layer.norms[0] = make_norm(s.width);
    if (s.head_norms)
      layer.norms[1] = make_norm(s.head_dim), layer.norms[2] = make_norm(s.head_dim);
    if (s.sandwich) layer.norms[3] = make_norm(s.width), layer.norms[5] = make_norm(s.width);
    layer.norms[4] = make_norm(s.width);
    layer.q = make_linear(q, s.width);
    layer.k = make_linear(kv, s.width, s.float_columns);
    layer.v = make_linear(kv, s.width);
    layer.out = make_linear(s.width, q);
    layer.gate = make_linear(s.ffn, s.width);
    layer.up = make_linear(s.ffn, s.width);
    layer.down = make_linear(s.width, s.ffn, s.float_columns);
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

  static constexpr int64_t kPositions = 400;
  const Shape s;
  Rng& rng;
  Floats table, rotary_table;
  std::vector<Layer> layers;
  Norm final_norm;
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

Floats multiply(const Floats& x, int64_t m, const Model::Linear& linear,
                const ActivationQuantizer& quantizer, const Epilogue& epilogue = {}) {
  const int64_t n = linear.weight.n, k = linear.weight.k;
  Floats y(m * n), columns;
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
  sq_cpu::linear(x.data(), DType::kFloat32, m, k, linear.weight, quantizer, y.data(),
                 DType::kFloat32, n, steps);
  return y;
}

Floats rows_of(const Floats& x, int64_t m, const Norm& norm) {
  const auto n = static_cast<int64_t>(x.size()) / m;
  Floats y;
  for (int64_t row = 0; row < m; ++row) {
    const Floats one = normalized(norm, {x.begin() + row * n, x.begin() + (row + 1) * n});
    y.insert(y.end(), one.begin(), one.end());
  }
  return y;
}

Floats reference(const Model& model, const Call& call, Caches& caches) {
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
  const auto residual = [&] {
    Epilogue e;
    e.residual = x.data();
    e.ld_residual = s.width;
    return e;
  };
  const auto add = [&](const Floats& y, int64_t rows, const Model::Linear& linear,
                       const ActivationQuantizer& quantizer, const Norm& after) {
    if (!s.sandwich) {
      x = multiply(y, rows, linear, quantizer, residual());
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
    const Floats v = multiply(input, m, layer.v, layer.quantizers[0]);
    const auto transform = [&](Floats& heads, int64_t count, const Norm& norm) {
      heads = rows_of(heads, m * count, norm);
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

ProjectStage project(Buffer in, const Norm& norm, const ActivationQuantizer& quantizer,
                     const std::vector<ProjectedLinear>& linears) {
  return {in, 0, norm, quantizer, false, linears.data(), static_cast<int>(linears.size())};
}

ProjectedLinear part(const Model::Linear& linear, Buffer out, int64_t column = 0) {
  ProjectedLinear projected{linear.weight, out};
  projected.column = column;
  projected.float_columns = linear.columns;
  return projected;
}

void build(const Model& model, Program& program) {
  const Shape& s = model.s;
  const int64_t q = s.heads() * s.head_dim, kv = s.kv_heads * s.head_dim;
  const Buffer x = program.buffer(s.width), qkv = program.buffer(q + 2 * kv);
  const Buffer o = program.buffer(q), up = program.buffer(s.ffn), gated = program.buffer(s.ffn);
  const Buffer apart = program.buffer(s.width), logits = program.buffer(s.vocabulary);
  if (s.tied) {
    program.add(
        PackedEmbedStage{model.head.weight, model.head_quantizer.inverse_smoothing, 1.5f, x});
  } else {
    program.add(EmbedStage{model.table.data(), DType::kFloat32, s.vocabulary, 1.5f, x});
  }
  const auto add = [&](Buffer in, const Model::Linear& linear, const ActivationQuantizer& quantizer,
                       const Norm& after) {
    ProjectedLinear projected = part(linear, s.sandwich ? apart : x);
    projected.accumulate = !s.sandwich;
    program.add(project(in, {}, quantizer, {projected}));
    if (s.sandwich) program.add(MergeStage{apart, after, x});
  };
  for (int64_t i = 0; i < s.layers; ++i) {
    const Model::Layer& layer = model.layers[i];
    program.add(project(x, layer.norms[0], layer.quantizers[0],
                        {part(layer.q, qkv), part(layer.k, qkv, q), part(layer.v, qkv, q + kv)}));
    program.add(AttendStage{qkv, 0, q, q + kv, s.heads(), layer.norms[1], layer.norms[2],
                            s.rotated > 0 ? 0 : -1, static_cast<int>(i), s.kv_heads, s.head_dim,
                            model.options(), o});
    add(o, layer.out, layer.quantizers[1], layer.norms[3]);
    ProjectedLinear gate = part(layer.gate, gated);
    gate.activation = s.activation;
    gate.other = up;
    program.add(project(x, layer.norms[4], layer.quantizers[2], {part(layer.up, up), gate}));
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

Floats run(const Model& model, Program& program, const Call& call, Caches& caches, int threads) {
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

std::vector<int64_t> random_tokens(int64_t count, const Shape& s, Rng& rng) {
  std::vector<int64_t> ids(count);
  for (int64_t& id : ids) id = rng.below(s.vocabulary);
  return ids;
}

// One batch, whole, against the reference; then each sequence alone and in pieces; `thorough`: by
// more threads, and in smaller ones.
Floats test_shape(const Shape& shape, bool thorough) {
  Rng rng(7);
  const Model model(shape, rng);
  const std::vector<int64_t> lengths{1, 70, 300, 3};
  std::vector<std::vector<int64_t>> tokens;
  for (int64_t length : lengths) tokens.push_back(random_tokens(length, shape, rng));
  Caches caches(shape, 4, 5);
  Call call(caches);
  for (int i = 0; i < 4; ++i) call.add(caches, i, tokens[i], 0, lengths[i]);
  const Floats wanted = reference(model, call, caches);
  Program program;
  build(model, program);
  const int threads = omp_get_max_threads();
  for (int count : {1, 2, 3, 7}) {
    if (count > 2 && !thorough) continue;  // more threads than cores take long
    omp_set_num_threads(count);
    Caches fresh(shape, 4, 5);
    check(run(model, program, call, fresh, count == 7 ? 5 : 0) == wanted,
          join(shape.describe(), " by ", count, " threads"));
  }
  const int64_t width = shape.head ? shape.vocabulary : shape.width;
  for (int64_t piece : {1, 17, 64, 299}) {
    if (piece < 64 && !thorough) continue;
    omp_set_num_threads(2);
    Caches fresh(shape, 4, 5);
    Floats found;
    for (int i = 0; i < 4; ++i) {
      if (piece == 1 && i == 2) {  // 300 calls
        found.insert(found.end(), wanted.begin() + 71 * width, wanted.begin() + 371 * width);
        continue;
      }
      for (int64_t begin = 0; begin < lengths[i]; begin += piece) {
        Call some(fresh);
        some.add(fresh, i, tokens[i], begin, std::min(begin + piece, lengths[i]));
        const Floats y = run(model, program, some, fresh, 0);
        found.insert(found.end(), y.begin(), y.end());
      }
    }
    check(found == wanted, join(shape.describe(), " in pieces of ", piece));
  }
  omp_set_num_threads(threads);
  return wanted;
}

std::vector<Shape> shapes() {
  std::vector<Shape> all(11);
  all[1].width = 100, all[1].head_dim = 20, all[1].rotated = 12, all[1].ffn = 52;
  all[2].interleaved = true, all[2].norm = Norm::Kind::kLayer, all[2].rotated = 6;
  all[3].head_norms = true, all[3].head_dim = 64, all[3].rotated = 64, all[3].kv_heads = 1;
  all[4].sandwich = true, all[4].window = 40, all[4].activation = Activation::kGeluTanh;
  all[5].head = true, all[5].vocabulary = 301;
  all[6].float_columns = 3, all[6].smoothed = true;
  all[7].granularity = Granularity::kStatic, all[7].rotated = 0;
  // Codes of 16 rows that a worker does not make for itself.
  all[8].width = 1200, all[8].ffn = 1100, all[8].layers = 1, all[8].float_columns = 2;
  all[9].tied = true, all[9].head = true, all[9].smoothed = true, all[9].vocabulary = 77;
  // Two terms of more rows than a worker quantizes for itself.
  all[10].tied = true, all[10].head = true, all[10].width = 600, all[10].layers = 1;
  return all;
}

void test_kept_rows() {
  const Part part("kept rows");
  Rng rng(11);
  for (bool head : {false, true}) {
    Shape shape;
    shape.head = head;
    const Model model(shape, rng);
    const std::vector<int64_t> tokens = random_tokens(310, shape, rng);
    Caches caches(shape, 1, 5);
    Call call(caches);
    call.add(caches, 0, tokens, 0, 310);
    Program program;
    build(model, program);
    const Floats all = run(model, program, call, caches, 0);
    call.kept = {0, 5, 255, 256, 309};
    const Floats some = run(model, program, call, caches, 0);
    const int64_t width = head ? shape.vocabulary : shape.width;
    Floats wanted;
    for (int64_t row : call.kept) {
      wanted.insert(wanted.end(), all.begin() + row * width, all.begin() + (row + 1) * width);
    }
    check(some == wanted, join("head=", int(head)));
    call.kept.clear();
    check(run(model, program, call, caches, 0).empty(), "none kept");
  }
}

void test_refusals() {
  const Part part("refusals");
  Rng rng(13);
  const Shape shape;
  Model model(shape, rng);
  const Model::Linear square = model.make_linear(shape.width, shape.width);
  const Model::Layer& layer = model.layers[0];
  Program program;
  const Buffer x = program.buffer(shape.width), y = program.buffer(shape.width);
  const auto add = [&](Buffer in, const ProjectedLinear& linear, ActivationQuantizer quantizer) {
    const std::vector<ProjectedLinear> linears{linear};
    program.add(project(in, {}, quantizer, linears));
  };
  check_refused("0 columns", [&] { program.buffer(0); });
  check_refused("no buffer 9", [&] { add(9, {layer.q.weight, y}, {}); });
  check_refused("no buffer 9", [&] { add(x, {layer.q.weight, 9}, {}); });
  check_refused("64 columns from 0 on, of a buffer of 48",
                [&] { add(x, {layer.q.weight, y}, {}); });
  check_refused("reads and writes", [&] { add(x, {square.weight, x}, {}); });
  ActivationQuantizer per_tensor;
  per_tensor.granularity = Granularity::kPerTensor;
  check_refused("other rows of a batch", [&] { add(x, {layer.q.weight, y}, per_tensor); });
  check_refused("1 .. 8", [&] { program.add(ProjectStage{x, 0, {}, {}, false, nullptr, 0}); });
  check_refused("two linears write column 0", [&] {
    const std::vector<ProjectedLinear> twice{{square.weight, y}, {square.weight, y}};
    program.add(project(x, {}, {}, twice));
  });
  ProjectedLinear gate{layer.k.weight, y};
  gate.other = x;
  check_refused("is not what the linear before writes", [&] { add(x, gate, {}); });
  check_refused("not a multiple", [&] {
    AttendStage stage{};
    stage.head_dim = 16, stage.heads = 3, stage.kv_heads = 2;
    program.add(stage);
  });
  check_refused("no rows", [&] { program.add(EmbedStage{nullptr, DType::kFloat32, 1, 1.0f, x}); });
  check_refused("embed: 64 columns from 0 on, of a buffer of 48",
                [&] { program.add(PackedEmbedStage{layer.out.weight, nullptr, 1.0f, x}); });
  check_refused("needs a norm", [&] { program.add(MergeStage{x, {}, y}); });
  check_refused("no result", [&] { program.run({}); });

  Program whole;
  build(model, whole);
  Caches caches(shape, 1, 1);
  Call call(caches);
  call.add(caches, 0, {1, 2, 3}, 0, 3);
  const auto refused = [&](const char* message, Call changed) {
    check_refused(message, [&] { run(model, whole, changed, caches, 0); });
  };
  Call changed = call;
  changed.ids[1] = 40;
  refused("token 40 is not in the vocabulary of 40", changed);
  changed = call;
  changed.positions[2] = 400;
  refused("position 400", changed);
  changed = call;
  changed.kept = {1, 1};
  refused("must ascend", changed);
  changed = call;
  changed.kept = {3};
  refused("kept row 3 of 3", changed);
  changed = call;
  changed.length[0] = 65;
  refused("only 1 pages", changed);
  changed = call;
  changed.tables[1][0] = 1;
  refused("page 1 of a cache of 1", changed);
  check(run(model, whole, call, caches, 0) == reference(model, call, caches), "after refusals");
  // A stage that is added after a run is planned, too.
  const Buffer apart = whole.buffer(shape.width);
  for (int i = 0; i < 20; ++i) {
    const std::vector<ProjectedLinear> linears{{square.weight, apart}};
    whole.add(project(0, {}, {}, linears));
  }
  check(run(model, whole, call, caches, 0) == reference(model, call, caches), "after more stages");
  const std::vector<ProjectedLinear> head{{square.weight, apart}};
  ProjectStage stage = project(0, {}, {}, head);
  stage.kept_rows = true;
  whole.add(stage);
  refused("does not write the result", call);
}

}  // namespace

int main() {
  start();
  std::vector<Floats> first;
  for (Isa isa : isas_here()) {
    use(isa);
    const Part part("same bits " + isa_name(isa));
    std::vector<Floats> results;
    for (const Shape& shape : shapes()) results.push_back(test_shape(shape, results.empty()));
    if (first.empty()) first = results;
    check(results == first, isa_name(isa) + ": other bits than the reference ISA");
  }
  test_kept_rows();
  test_refusals();
  return finish();
}
