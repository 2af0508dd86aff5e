// Programs against the library's own functions, called one after another, with norms, rotary
// embeddings and the rest in plain loops: the same bits, on every ISA, for any threads, any batch,
// and any cut of a prompt into calls.
#include <cmath>
#include <string>
#include <vector>

#include "harness.h"
#include "model_program.h"
#include "model_reference.h"
#include "program_model.h"
#include "sq_cpu/program.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;

// One batch, whole, against the reference; then each sequence alone and in pieces; `thorough`: by
// more threads, and in smaller ones.
Floats test_shape(const Shape& shape, bool thorough) {
  Rng rng(7);
  const Model model(shape, rng);
  const std::vector<int64_t> lengths{1, 70, shape.longest, 3};
  std::vector<std::vector<int64_t>> tokens;
  for (int64_t length : lengths) tokens.push_back(random_tokens(length, shape, rng));
  Caches caches(shape, 4, 5);
  Call call(caches);
  for (int i = 0; i < 4; ++i) call.add(caches, i, tokens[i], 0, lengths[i]);
  const Floats wanted = reference(model, call, caches);
  Program program;
  build(model, program);
  const int threads = omp_get_max_threads();
  const bool some = is_slow(active_isa()) && !thorough;
  for (int count : {1, 2, 3, 7}) {
    if (count > 2 && !thorough) continue;  // more threads than cores take long
    if (some && count == 1) continue;
    omp_set_num_threads(count);
    Caches fresh(shape, 4, 5);
    check(run(model, program, call, fresh, count == 7 ? 5 : 0) == wanted,
          join(shape.describe(), " by ", count, " threads"));
  }
  const int64_t width = shape.head ? shape.vocabulary : shape.width;
  for (int64_t piece : {1, 17, 64, 299}) {
    if (piece < 64 && !thorough) continue;
    if (some && piece > 64) continue;
    omp_set_num_threads(2);
    Caches fresh(shape, 4, 5);
    Floats found;
    for (int i = 0; i < 4; ++i) {
      if (piece == 1 && i == 2) {  // 300 calls
        const auto from = wanted.begin() + 71 * width;
        found.insert(found.end(), from, from + lengths[i] * width);
        continue;
      }
      for (int64_t begin = 0; begin < lengths[i]; begin += piece) {
        Call next(fresh);
        next.add(fresh, i, tokens[i], begin, std::min(begin + piece, lengths[i]));
        const Floats y = run(model, program, next, fresh, 0);
        found.insert(found.end(), y.begin(), y.end());
      }
    }
    check(found == wanted, join(shape.describe(), " in pieces of ", piece));
  }
  omp_set_num_threads(threads);
  return wanted;
}

std::vector<Shape> shapes() {
  std::vector<Shape> all(21);
  all[1].width = 100, all[1].head_dim = 20, all[1].rotated = 12, all[1].ffn = 52;
  all[2].interleaved = true, all[2].norm = Norm::Kind::kLayer, all[2].rotated = 6;
  all[3].head_norms = true, all[3].head_dim = 64, all[3].rotated = 64, all[3].kv_heads = 1;
  all[4].sandwich = true, all[4].window = 40, all[4].activation = Activation::kGeluTanh;
  all[5].head = true, all[5].vocabulary = 301;
  all[6].float_columns = 3, all[6].smoothed = true, all[6].hadamard = true;
  all[7].granularity = Granularity::kStatic, all[7].rotated = 0;
  // Codes of 16 rows that a worker does not make for itself: wide, of fewer rows.
  for (int j : {8, 10}) all[j].longest = 40;
  all[8].width = 1200, all[8].ffn = 1100, all[8].layers = 1, all[8].float_columns = 2;
  all[8].hadamard = true;
  for (int j : {8, 19}) all[j].granularity = Granularity::kStatic, all[j].fallback = true;
  all[9].tied = true, all[9].head = true, all[9].smoothed = true, all[9].vocabulary = 77;
  // Two terms of more rows than a worker quantizes for itself.
  all[10].tied = true, all[10].head = true, all[10].width = 600, all[10].layers = 1;
  all[11].multiplier = 0.5f, all[11].float_columns = 2, all[11].learned = true;
  all[12].by_head = true, all[12].kv_heads = 3, all[12].head_norms = true, all[12].rotated = 10;
  all[13].by_head = true, all[13].group = 1, all[13].kv_heads = 4, all[13].in_float[0] = true;
  all[14].whole_norms = true, all[14].norm = Norm::Kind::kLayer, all[14].learned = true;
  // Weights in float: all of them, then the parts that lie beside packed ones.
  for (int i = 0; i < 5; ++i) {
    for (int j : {15, 16}) all[j].in_float[i] = true;
    all[17].in_float[i] = i % 3 == 0;  // up, whose gate is packed
  }
  for (int j : {15, 16}) all[j].activation = Activation::kRelu, all[j].head = true;
  all[15].multiplier = 0.3f, all[15].width = 75, all[15].ffn = 37, all[15].vocabulary = 91;
  // Mixtures, the second expert in float: of few rows each, and of more than one block of codes.
  all[18].experts = 7, all[18].top = 2, all[18].renormalize = true;
  all[19].experts = 3, all[19].top = 3, all[19].shared = true, all[19].smoothed = true;
  all[19].hadamard = true;
  all[20].experts = 20, all[20].top = 4, all[20].layers = 1;
  for (int j : {18, 19, 20}) all[j].activation = Activation::kRelu;
  all[16].float_type = DType::kBFloat16, all[16].sandwich = true, all[16].ffn = 300;
  return all;
}

void test_kept_rows() {
  const Part part("kept rows");
  Rng rng(11);
  for (int kind = 0; kind < 3; ++kind) {
    Shape shape;
    const bool head = shape.head = kind > 0;
    shape.in_float[4] = kind == 2;
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
    check(some == wanted, join("head ", kind));
    call.kept.clear();
    check(run(model, program, call, caches, 0).empty(), "none kept");
  }
}

// Each row once a layer's input, by whatever team; q, k and v share theirs, as gate and up do.
void test_counts() {
  const Part part("counted rows");
  const int threads = omp_get_max_threads();
  for (const int64_t m : {1, 310}) {
    RowCounts expected;
    for (const int workers : {1, 5}) {
      omp_set_num_threads(workers);
      Rng rng(17);
      RowCounter counter;
      Shape shape;
      shape.granularity = Granularity::kStatic, shape.counter = &counter;
      const Model model(shape, rng);
      const std::vector<int64_t> tokens = random_tokens(m, shape, rng);
      Caches caches(shape, 1, 5);
      Call call(caches);
      call.add(caches, 0, tokens, 0, m);
      Program program;
      build(model, program);
      run(model, program, call, caches, 0);
      const RowCounts found = counter.read();
      check(found.rows == 4 * shape.layers * m && found.chained == 0, join(found.rows, " of ", m));
      if (workers == 1) expected = found;
      check(found.clipped > 0 && found.clipped == expected.clipped &&
                found.underflowed == expected.underflowed,
            join(found.clipped, " and ", found.underflowed, " of ", m, " by ", workers));
    }
  }
  omp_set_num_threads(threads);
}

// 2^-22 of the cap, and the half ulps of the product and of tanh here.
void test_caps() {
  const Part part("caps");
  std::vector<Floats> first;
  for (Isa isa : isas_here()) {
    use(isa);
    std::vector<Floats> results;
    for (bool in_float : {false, true}) {
      Rng rng(5);
      Shape shape;
      shape.in_float[4] = in_float;
      shape.vocabulary = 203;
      Model model(shape, rng);
      const std::vector<int64_t> tokens = random_tokens(40, shape, rng);
      Caches caches(shape, 1, 1);
      Call call(caches);
      call.add(caches, 0, tokens, 0, 40);
      for (const float cap : {0.01f, 2.0f, 30.0f}) {
        Floats raw;
        for (const bool capped : {false, true}) {
          Program program;
          build(model, program);
          ProjectedLinear linear = sq_cpu::testing::part(model.head, program.buffer(203));
          if (capped) linear.multiplier = 0.75f, linear.softcap = cap;
          const std::vector<ProjectedLinear> linears{linear};
          ProjectStage stage = project(0, model.final_norm, model.head_quantizer, linears);
          stage.kept_rows = true;
          program.add(stage);
          program.set_result(linear.out);
          Floats result(40 * 203);
          std::vector<const int32_t*> tables;
          for (const auto& table : call.tables) tables.push_back(table.data());
          program.run({call.ids.data(), call.positions.data(), call.sequences(caches, 0),
                       caches.caches.data(), static_cast<int>(caches.caches.size()), tables.data(),
                       &model.rotary, 1, call.kept.data(), 40, result.data()});
          if (!capped) {
            raw = result;
            continue;
          }
          double worst = 0;
          for (size_t i = 0; i < raw.size(); ++i) {
            const double wanted = cap * std::tanh(double{raw[i]} * 0.75 / cap);
            worst = std::max(worst, std::abs(result[i] - wanted) / cap);
          }
          check(worst < 0x1p-21, join("cap ", cap, " off by ", worst, " of it"));
          results.push_back(result);
        }
      }
    }
    if (first.empty()) first = results;
    check(results == first, isa_name(isa) + ": other bits than the reference ISA");
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
  gate.other = y;
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
  check_refused("norm: needs a norm", [&] { program.add(NormStage{x, 0, 8, {}}); });
  check_refused("norm: 8 columns from 41", [&] { program.add(NormStage{x, 41, 8, {}}); });
  const FloatWeight router{model.table.data(), DType::kFloat32, nullptr};
  check_refused("3 of 2 experts",
                [&] { program.add(RouteStage{x, 0, {}, router, 2, shape.width, 3, false, y}); });
  check_refused("route: reads and writes",
                [&] { program.add(RouteStage{x, 0, {}, router, 2, shape.width, 1, false, x}); });
  check_refused("weight in float is empty",
                [&] { program.add(RouteStage{x, 0, {}, {}, 2, shape.width, 1, false, y}); });
  check_refused("add: list 0 of 0", [&] { program.add(AddStage{x, 0, kNoBuffer, y}); });
  program.add(RouteStage{x, 0, {}, router, 2, shape.width, 1, false, y});
  check_refused("add: list 2 of 2", [&] { program.add(AddStage{x, 2, kNoBuffer, y}); });
  check_refused("a gate beside", [&] { program.add(AddStage{x, 1, y, y}); });
  check_refused("add: reads and writes", [&] { program.add(AddStage{x, 1, kNoBuffer, x}); });
  const auto add_listed = [&](int list, bool gather, bool kept, bool accumulate) {
    ProjectedLinear linear{square.weight, y};
    linear.accumulate = accumulate;
    const std::vector<ProjectedLinear> linears{linear};
    ProjectStage stage = project(x, {}, {}, linears);
    stage.list = list, stage.gather = gather, stage.kept_rows = kept;
    program.add(stage);
  };
  check_refused("list 2 of 2", [&] { add_listed(2, false, false, false); });
  check_refused("list -2 of 2", [&] { add_listed(-2, false, false, false); });
  check_refused("list -1 of 2", [&] { add_listed(-1, true, false, false); });
  check_refused("kept rows of a list", [&] { add_listed(1, true, true, false); });
  check_refused("rows are not added to", [&] { add_listed(1, true, false, true); });
  check_refused("have no rows", [&] { program.add(PositionStage{nullptr, 1, 0, x}); });
  check_refused("position 0 is row 3 of 3",
                [&] { program.add(PositionStage{model.positions.data(), 3, 3, x}); });
  const Model::Linear dense = model.make_float(shape.width, shape.width);
  ProjectedLinear in_float = sq_cpu::testing::part(dense, y);
  check_refused("in float beside packed ones", [&] {
    const std::vector<ProjectedLinear> both{in_float, {square.weight, program.buffer(48)}};
    program.add(project(x, {}, {}, both));
  });
  in_float.weight.data = square.weight.data;
  check_refused("a weight in float, packed", [&] { add(x, in_float, {}); });
  in_float.weight = {nullptr, int64_t{1} << 46, shape.width};
  check_refused("more than any machine has", [&] { add(x, in_float, {}); });
  in_float.weight = dense.weight;
  in_float.softcap = -1.0f;
  check_refused("softcap is -1", [&] { add(x, in_float, {}); });
  in_float.softcap = 0.0f;
  in_float.multiplier = std::nanf("");
  check_refused("multiplier is nan", [&] { add(x, in_float, {}); });
  check_refused("2 heads of 16 in a stride of 31", [&] {
    program.add(AttendStage{
        program.buffer(128), 0, 32, 48, 4, {}, {}, -1, 0, 2, 16, {}, program.buffer(64), 31});
  });
  check_refused("attend: q: ", [&] {  // the second head's last columns
    program.add(AttendStage{
        program.buffer(127), 0, 32, 48, 4, {}, {}, -1, 0, 2, 16, {}, program.buffer(64), 96});
  });
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

// An argument: the one ISA whose programs run.
int main(int argc, char** argv) {
  start();
  std::vector<Floats> first;
  for (Isa isa : isas_here()) {
    if (argc > 1 && isa_name(isa) != argv[1]) continue;
    use(isa);
    const Part part("same bits " + isa_name(isa));
    std::vector<Floats> results;
    for (const Shape& shape : shapes()) results.push_back(test_shape(shape, results.empty()));
    if (first.empty()) first = results;
    check(results == first, isa_name(isa) + ": other bits than the reference ISA");
  }
  test_kept_rows();
  test_counts();
  test_caps();
  test_refusals();
  return finish();
}
