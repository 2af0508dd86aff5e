// Programs: what add() refuses, and how a step runs through the stages in one region.
#include "sq_cpu/program.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "attend.h"
#include "blocking.h"
#include "check.h"
#include "dispatch.h"
#include "gemm.h"
#include "layout.h"
#include "operands.h"
#include "pack.h"
#include "quantize.h"
#include "scratch.h"
#include "team.h"

namespace sq_cpu {
namespace {

// A longer prompt goes through all layers in passes of so many rows: their activations stay in the
// caches, and weights that are read once for so many rows cost little beside the products.
constexpr int64_t kRowsOfPass = 256;
constexpr int64_t kPageInts = 1024;  // each worker's sums on pages of their own
constexpr int kCounterSets = 3;      // in use, to be used next, and being cleared

// Linears of a stage whose units alternate: one reads what the one before it writes.
struct Product {
  int first;
  int count;
};

struct Project {
  ProjectStage stage;
  std::vector<ProjectedLinear> linears;
  std::vector<Product> products;
  bool float_columns;
};

struct Attend {
  AttendStage stage;
  size_t plan;
};

using Stage = std::variant<EmbedStage, PackedEmbedStage, Project, Attend, MergeStage>;

// Layers that are alike here share a plan.
struct PlanKey {
  int64_t heads, kv_heads, head_dim, window;
  bool causal;
  bool operator==(const PlanKey& other) const {
    return heads == other.heads && kv_heads == other.kv_heads && head_dim == other.head_dim &&
           window == other.window && causal == other.causal;
  }
};

struct ProductPlan {
  const Microkernel* kernel;
  Blocking blocking;
};

// Of an embedding; 0 for other stages.
int64_t vocabulary_of(const Stage& stage) {
  if (const auto* const embed = std::get_if<EmbedStage>(&stage)) return embed->vocabulary;
  const auto* const packed = std::get_if<PackedEmbedStage>(&stage);
  return packed != nullptr ? packed->weight.n : 0;
}

void check_norm(const Norm& norm) {
  SQ_CHECK(is_one_of(norm.kind, Norm::Kind::kLayer), "unknown norm ", static_cast<int>(norm.kind));
  SQ_CHECK(norm.eps >= 0.0f && norm.eps < 1.0f, "a norm's eps is ", norm.eps);
}

// The rows of a step that a pass takes, as a step of its own.
struct Pass {
  Pass(const Step& step, Range rows) : first_row(step.sequences.count + 1) {
    const Sequences& all = step.sequences;
    length.resize(all.count);
    first_row[0] = 0;
    for (int64_t i = 0; i < all.count; ++i) {
      const int64_t begin = std::clamp(all.first_row[i], rows.begin, rows.end);
      const int64_t end = std::clamp(all.first_row[i + 1], rows.begin, rows.end);
      first_row[i + 1] = first_row[i] + end - begin;
      length[i] = all.length[i] - (all.first_row[i + 1] - end);
    }
    sequences = {all.count, first_row.data(), length.data(), all.table, all.table_stride};
    const int64_t* const kept_end = step.kept + step.kept_count;
    const int64_t* const from = std::lower_bound(step.kept, kept_end, rows.begin);
    const int64_t* const to = std::lower_bound(from, kept_end, rows.end);
    for (const int64_t* row = from; row != to; ++row) kept.push_back(*row - rows.begin);
    first_kept = from - step.kept;
  }
  std::vector<int64_t> first_row, length, kept;
  int64_t first_kept;
  Sequences sequences;
};

// The sequences as a cache has them.
Sequences sequences_of(const Step& step, const Sequences& all, int cache) {
  Sequences own = all;
  if (step.tables != nullptr) own.table = step.tables[cache];
  return own;
}

}  // namespace

struct Program::Implementation {
  std::vector<int64_t> widths;
  std::vector<Stage> stages;
  std::vector<PlanKey> plan_keys;
  Buffer result = kNoBuffer;

  // For so many rows, workers and this ISA; made again when they change.
  int64_t planned_rows = -1, planned_kept = -1;
  int planned_workers = 0;
  Isa isa{};
  std::vector<ProductPlan> product_plans;  // of all project stages, in order
  int64_t sums_bytes = 0;                  // of each worker's

  TeamBarrier barrier;
  uint32_t turn = 0;
  std::atomic<bool> running{false};
  Scratch<float> buffer_memory;
  std::vector<float*> buffers;
  Scratch<uint8_t> codes;
  Scratch<float> scales;
  Scratch<int32_t> zero_points;
  Scratch<std::byte> workspace;  // of each worker: its sums, or attention's; and a row
  Scratch<float> partials;
  std::unique_ptr<std::atomic<int>[]> finished;
  int64_t finished_count = 0;
  std::vector<WorkCounter> counters;

  int64_t ld(Buffer buffer) const { return whole_vectors(widths[buffer]); }

  void check_columns(const char* what, Buffer buffer, int64_t column, int64_t columns) const {
    SQ_CHECK(buffer >= 0 && buffer < static_cast<Buffer>(widths.size()), what, ": no buffer ",
             buffer);
    SQ_CHECK(column >= 0 && columns >= 0 && column <= widths[buffer] - columns, what, ": ", columns,
             " columns from ", column, " on, of a buffer of ", widths[buffer]);
  }

  void plan(int64_t rows, int64_t kept, int workers);
  void append(Stage stage) {
    stages.push_back(std::move(stage));
    planned_rows = -1;
  }
  void run(const Step& step, const Pass& pass, Range rows, int workers);
  class Runner;
};

void Program::Implementation::plan(int64_t rows, int64_t kept, int workers) {
  const Isa now = active_isa();
  if (rows == planned_rows && kept == planned_kept && workers == planned_workers && now == isa &&
      !product_plans.empty()) {
    return;
  }
  product_plans.clear();
  isa = now;
  int64_t sums = 0;
  for (const Stage& stage : stages) {
    const auto* const project = std::get_if<Project>(&stage);
    if (project == nullptr) continue;
    const int64_t m = (project->stage.kept_rows ? kept : rows) * project->stage.quantizer.terms;
    for (const Product& product : project->products) {
      const PackedWeight& weight = project->linears[product.first].weight;
      const Microkernel& kernel = choose_microkernel(isa, project->stage.quantizer.max_code(), m);
      const int64_t k_blocks = k_block_count(weight.k);
      const Blocking blocking =
          choose_blocking(kernel, m, strip_count(weight.n), k_blocks, workers);
      product_plans.push_back({&kernel, blocking});
      sums = std::max(sums, workspace_sums(kernel, blocking, k_blocks));
    }
  }
  sums_bytes = ceil_div(sums, kPageInts) * kPageInts * int64_t{sizeof(int32_t)};
  planned_rows = rows;
  planned_kept = kept;
  planned_workers = workers;
}

// One worker's way through the stages.
class Program::Implementation::Runner {
 public:
  struct Shared {
    const Step& step;
    const Pass& pass;
    Range rows;
    const std::vector<AttentionPlan>& attention;
    int64_t worker_bytes;
    int64_t row_bytes;
  };

  Runner(Implementation& program, const Shared& shared, int worker, int workers, uint32_t turn)
      : program_(program),
        shared_(shared),
        kernels_(row_kernels(program.isa)),
        worker_(worker),
        workers_(workers),
        turn_(turn),
        memory_(program.workspace.get(0) + shared.worker_bytes * worker),
        row_(reinterpret_cast<float*>(memory_ + shared.worker_bytes - shared.row_bytes)) {}

  // Returns the turns of the barrier taken.
  uint32_t run() {
    for (const Stage& stage : program_.stages) {
      std::visit([this](const auto& each) { run(each); }, stage);
      wait();
    }
    copy_result();
    return turn_;
  }

 private:
  void wait() { program_.barrier.wait(worker_, workers_, ++turn_); }

  Range mine(int64_t count) const { return part(count, 1, workers_, worker_); }

  float* at(Buffer buffer, int64_t row, int64_t column) const {
    return program_.buffers[buffer] + row * program_.ld(buffer) + column;
  }

  // Counters that are 0. Those of the set before the last, which nobody uses any more, are cleared.
  WorkCounter* counters() {
    const int64_t count = static_cast<int64_t>(program_.counters.size()) / kCounterSets;
    WorkCounter* const all = program_.counters.data();
    if (worker_ == 0) {
      WorkCounter* const next = all + (set_ + 1) % kCounterSets * count;
      for (int64_t i = 0; i < count; ++i) next[i].taken.store(0, std::memory_order_relaxed);
    }
    WorkCounter* const now = all + set_ * count;
    set_ = (set_ + 1) % kCounterSets;
    return now;
  }

  void run(const EmbedStage& stage) {
    const Range rows = mine(shared_.rows.size());
    const int64_t width = program_.widths[stage.out];
    const int64_t bytes = stage.type == DType::kFloat32 ? 4 : 2;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t id = shared_.step.ids[shared_.rows.begin + row];
      kernels_.widen_row[static_cast<int>(stage.type)](
          static_cast<const char*>(stage.table) + id * width * bytes, width, stage.multiplier,
          at(stage.out, row, 0));
    }
  }

  void run(const PackedEmbedStage& stage) {
    const Range rows = mine(shared_.rows.size());
    const int64_t width = program_.widths[stage.out];
    constexpr auto kFloats = static_cast<int>(DType::kFloat32);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t id = shared_.step.ids[shared_.rows.begin + row];
      float* const x = at(stage.out, row, 0);
      kernels_.weight_row[kFloats](row_of(stage.weight, id, stage.inverse_smoothing), x);
      if (stage.multiplier != 1.0f) kernels_.widen_row[kFloats](x, width, stage.multiplier, x);
    }
  }

  void run(const MergeStage& stage) {
    const Range rows = mine(shared_.rows.size());
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      normalize(stage.norm, at(stage.in, row, 0), program_.widths[stage.in], at(stage.out, row, 0),
                true);
    }
  }

  void run(const Attend& attend) {
    const AttendStage& stage = attend.stage;
    const KvCache& cache = shared_.step.caches[stage.cache];
    const Sequences sequences = sequences_of(shared_.step, shared_.pass.sequences, stage.cache);
    const Rotary* const rotary = stage.rotary < 0 ? nullptr : shared_.step.rotaries + stage.rotary;
    const int64_t* const positions = shared_.step.positions + shared_.rows.begin;
    const int64_t ld = program_.ld(stage.in), head = stage.head_dim;
    const auto heads = [&](int64_t column) {
      return HeadRows{at(stage.in, 0, column), DType::kFloat32, ld, head};
    };
    append_pages(
        {cache, sequences, heads(stage.k), heads(stage.v), {stage.k_norm, rotary, positions}},
        kernels_, memory_, worker_, workers_);
    wait();
    const AttentionArgs args{cache,
                             sequences,
                             stage.heads,
                             heads(stage.q),
                             {stage.q_norm, rotary, positions},
                             stage.options,
                             {at(stage.out, 0, 0), DType::kFloat32, program_.ld(stage.out), head}};
    shared_.attention[attend.plan].run(args, program_.isa, *counters(), program_.finished.get(),
                                       memory_, program_.partials.get(0));
  }

  void run(const Project& project) {
    const ProjectStage& stage = project.stage;
    const int64_t m =
        stage.kept_rows ? static_cast<int64_t>(shared_.pass.kept.size()) : shared_.rows.size();
    WorkCounter* next = counters();
    if (m == 0) {
      plan_ += project.products.size();
      return;
    }
    const int64_t k = project.linears[0].weight.k;
    thread_local OwnCodes own;
    const int terms = stage.quantizer.terms;
    QuantizedActivation x{
        own.codes, own.scale, own.zero_point, m * terms, k, stage.quantizer.max_code(), terms};
    const bool alone = OwnCodes::hold(x.m, k);
    if (!alone) {
      x.codes = program_.codes.get(0);
      x.scale = program_.scales.get(0);
      x.zero_point = program_.zero_points.get(0);
    }
    const Range rows = alone ? Range{0, m} : mine(m);
    for (int64_t row = rows.begin; row < rows.end; ++row) quantize(project, row, x, alone);
    if (!alone || project.float_columns) wait();
    auto* const sums = reinterpret_cast<int32_t*>(memory_);
    for (const Product& product : project.products) {
      const ProductPlan& plan = program_.product_plans[plan_++];
      GemmArgs args[kMostLinears];
      EpilogueSteps steps[kMostLinears];
      for (int i = 0; i < product.count; ++i) {
        args[i] = gemm_args(stage, project.linears[product.first + i], x, steps[i]);
      }
      run_tasks(args, product.count, *plan.kernel, kernels_, plan.blocking, next, sums, worker_);
      next += workers_planned();
    }
  }

  int workers_planned() const { return program_.planned_workers; }

  // A row of x into codes, and its float columns into what they are added to. `alone`: every worker
  // does all rows, and a part of those columns.
  void quantize(const Project& project, int64_t row, const QuantizedActivation& x, bool alone) {
    const ProjectStage& stage = project.stage;
    const float* source =
        at(stage.in, stage.kept_rows ? shared_.pass.kept[row] : row, stage.column);
    if (stage.norm.kind != Norm::Kind::kNone) {
      normalize(stage.norm, source, x.k, row_, false);
      source = row_;
    }
    const Activations only{
        source, DType::kFloat32, x.m / x.terms, x.k, 0, stage.quantizer.inverse_smoothing};
    quantize_rows(only, {row, row + 1}, stage.quantizer, {}, kernels_, x);
    if (!project.float_columns) return;
    for (const ProjectedLinear& linear : project.linears) {
      const FloatColumns& columns = linear.float_columns;
      if (columns.count == 0) continue;
      const Range n = alone ? part(linear.weight.n, kStripColumns, workers_, worker_)
                            : Range{0, linear.weight.n};
      kernels_.add_columns({source, columns.columns, columns.count, columns.weight + n.begin,
                            linear.weight.n, n.size(), linear.accumulate,
                            output(stage, linear, row) + n.begin});
    }
  }

  float* output(const ProjectStage& stage, const ProjectedLinear& linear, int64_t row) const {
    if (!stage.kept_rows || linear.out != program_.result) {
      return at(linear.out, row, linear.column);
    }
    return shared_.step.result + (shared_.pass.first_kept + row) * program_.widths[linear.out] +
           linear.column;
  }

  GemmArgs gemm_args(const ProjectStage& stage, const ProjectedLinear& linear,
                     const QuantizedActivation& x, EpilogueSteps& steps) const {
    const bool result = stage.kept_rows && linear.out == program_.result;
    const int64_t ldy = result ? program_.widths[linear.out] : program_.ld(linear.out);
    float* const y = output(stage, linear, 0);
    steps = {};
    steps.activation = linear.activation;
    steps.operand_type = DType::kFloat32;
    if (linear.other != kNoBuffer) {
      steps.other = at(linear.other, 0, linear.column);
      steps.ld_other = program_.ld(linear.other);
    }
    if (linear.accumulate || linear.float_columns.count > 0) {
      steps.residual = y;
      steps.ld_residual = ldy;
    }
    const bool any = steps.activation != Activation::kNone || steps.other != nullptr ||
                     steps.residual != nullptr;
    return {x, linear.weight, y, Output::kFloat32, ldy, any ? &steps : nullptr};
  }

  void normalize(const Norm& norm, const float* x, int64_t k, float* y, bool sum) const {
    kernels_.normalize(
        {x, k, norm.weight, norm.bias, norm.kind == Norm::Kind::kLayer, norm.eps, sum, y});
  }

  // Where no stage wrote the result itself.
  void copy_result() const {
    const auto* const last = std::get_if<Project>(&program_.stages.back());
    if (last != nullptr && last->stage.kept_rows) return;
    const Range kept = mine(shared_.pass.kept.size());
    const int64_t width = program_.widths[program_.result];
    for (int64_t i = kept.begin; i < kept.end; ++i) {
      std::copy_n(at(program_.result, shared_.pass.kept[i], 0), width,
                  shared_.step.result + (shared_.pass.first_kept + i) * width);
    }
  }

  Implementation& program_;
  const Shared& shared_;
  const RowKernels& kernels_;
  const int worker_, workers_;
  uint32_t turn_;
  std::byte* const memory_;
  float* const row_;
  int64_t set_ = 0;
  size_t plan_ = 0;
};

void Program::Implementation::run(const Step& step, const Pass& pass, Range rows, int workers) {
  const int64_t m = rows.size();
  plan(m, pass.kept.size(), workers);
  std::vector<AttentionPlan> attention;
  attention.reserve(plan_keys.size());
  for (const PlanKey& key : plan_keys) {
    AttentionOptions visible;
    visible.causal = key.causal;
    visible.window = key.window;
    attention.emplace_back(pass.sequences, key.heads, key.kv_heads, key.head_dim, visible, workers);
  }
  // Memory: nothing is allocated inside the region.
  int64_t floats = 0, depth = 0, codes_size = 0, own = sums_bytes, part_floats = 0, blocks = 0;
  int64_t rows_of_codes = 0;
  for (size_t i = 0; i < widths.size(); ++i) floats += m * ld(static_cast<Buffer>(i));
  int64_t most_products = 1;
  for (const Stage& stage : stages) {
    if (const auto* const project = std::get_if<Project>(&stage)) {
      const int64_t k = project->linears[0].weight.k;
      depth = std::max(depth, k);
      const int64_t coded = m * project->stage.quantizer.terms;
      codes_size = std::max(codes_size, codes_bytes(coded, k));
      rows_of_codes = std::max(rows_of_codes, coded);
      most_products = std::max<int64_t>(most_products, project->products.size());
    } else if (const auto* const attend = std::get_if<Attend>(&stage)) {
      own = std::max(own, append_workspace(attend->stage.head_dim));
    }
  }
  for (const AttentionPlan& each : attention) {
    own = std::max(own, each.workspace());
    part_floats = std::max(part_floats, each.partials());
    blocks = std::max(blocks, each.blocks());
  }
  float* memory = buffer_memory.get(floats);
  buffers.resize(widths.size());
  for (size_t i = 0; i < widths.size(); ++i) {
    buffers[i] = memory;
    memory += m * ld(static_cast<Buffer>(i));
  }
  codes.get(codes_size);
  scales.get(rows_of_codes);
  zero_points.get(rows_of_codes);
  partials.get(part_floats);
  if (blocks > finished_count) {
    finished.reset(new std::atomic<int>[blocks] {});
    finished_count = blocks;
  }
  const int64_t counter_count = kCounterSets * most_products * workers;
  if (counter_count > static_cast<int64_t>(counters.size())) {
    counters = std::vector<WorkCounter>(counter_count);
  }
  for (WorkCounter& counter : counters) counter.taken.store(0, std::memory_order_relaxed);
  const int64_t row_bytes = whole_lines(whole_vectors(depth) * int64_t{sizeof(float)});
  const int64_t worker_bytes = whole_lines(own) + row_bytes;
  workspace.get(worker_bytes * workers);
  barrier.reserve(workers);

  const Runner::Shared shared{step, pass, rows, attention, worker_bytes, row_bytes};
  uint32_t after = turn;
  run_team(workers, [&](int worker, int count) {
    const uint32_t taken = Runner(*this, shared, worker, count, turn).run();
    if (worker == 0) after = taken;
  });
  turn = after;
}

Program::Program() : implementation_(new Implementation) {}
Program::~Program() = default;

Buffer Program::buffer(int64_t width) {
  SQ_CHECK(width > 0 && width <= kMostBytes / 1024, "a buffer of ", width, " columns");
  implementation_->widths.push_back(width);
  return static_cast<Buffer>(implementation_->widths.size() - 1);
}

void Program::add(const EmbedStage& stage) {
  Implementation& all = *implementation_;
  all.check_columns("embed", stage.out, 0, 0);
  check_dtype("the embedding", stage.type);
  SQ_CHECK(stage.table != nullptr && stage.vocabulary > 0, "the embedding has no rows");
  all.append(stage);
}

void Program::add(const PackedEmbedStage& stage) {
  Implementation& all = *implementation_;
  check_weight(stage.weight);
  all.check_columns("embed", stage.out, 0, stage.weight.k);
  SQ_CHECK(stage.weight.n > 0 && stage.weight.k == all.widths[stage.out], "the embedding is [",
           stage.weight.n, ", ", stage.weight.k, "], not of ", all.widths[stage.out], " columns");
  all.append(stage);
}

void Program::add(const ProjectStage& stage) {
  Implementation& all = *implementation_;
  SQ_CHECK(stage.linears != nullptr && stage.count > 0 && stage.count <= kMostLinears,
           "a project stage has ", stage.count, " linears, not 1 .. ", kMostLinears);
  check_quantizer(stage.quantizer);
  SQ_CHECK(stage.quantizer.granularity != Granularity::kPerTensor,
           "a scale per tensor would depend on the other rows of a batch");
  check_norm(stage.norm);
  Project project{stage, {stage.linears, stage.linears + stage.count}, {}, false};
  const int64_t k = stage.linears[0].weight.k;
  all.check_columns("project: in", stage.in, stage.column, k);
  for (int i = 0; i < stage.count; ++i) {
    const ProjectedLinear& linear = project.linears[i];
    check_weight(linear.weight);
    const int64_t n = linear.weight.n;
    SQ_CHECK(linear.weight.k == k && n > 0, "project: a weight [", n, ", ", linear.weight.k,
             "] beside others of ", k, " columns");
    all.check_columns("project: out", linear.out, linear.column, n);
    SQ_CHECK(linear.out != stage.in, "project: reads and writes buffer ", stage.in);
    SQ_CHECK(is_one_of(linear.activation, Activation::kSilu), "unknown Activation ",
             static_cast<int>(linear.activation));
    bool joined = false;
    if (linear.other != kNoBuffer) {
      all.check_columns("project: other", linear.other, linear.column, n);
      joined = i > 0 && project.linears[i - 1].out == linear.other &&
               project.linears[i - 1].column == linear.column &&
               project.linears[i - 1].weight.n == n && linear.other != linear.out;
      SQ_CHECK(joined, "project: other is not what the linear before writes");
    }
    const FloatColumns& columns = linear.float_columns;
    SQ_CHECK(columns.count >= 0 && columns.count <= k, "project: ", columns.count,
             " float columns of ", k);
    if (columns.count > 0) {
      project.float_columns = true;
      SQ_CHECK(columns.columns != nullptr && columns.weight != nullptr,
               "project: float columns are null");
      SQ_CHECK(linear.activation == Activation::kNone && linear.other == kNoBuffer,
               "project: float columns would be added after the activation");
      for (int64_t c = 0; c < columns.count; ++c) {
        SQ_CHECK(columns.columns[c] >= 0 && columns.columns[c] < k, "project: float column ",
                 columns.columns[c], " of ", k);
      }
    }
    for (int j = 0; j < i; ++j) {
      const ProjectedLinear& before = project.linears[j];
      SQ_CHECK(before.out != linear.out || before.column + before.weight.n <= linear.column ||
                   linear.column + n <= before.column,
               "project: two linears write column ", linear.column, " of buffer ", linear.out);
    }
    if (joined) {
      ++project.products.back().count;
    } else {
      project.products.push_back({i, 1});
    }
  }
  project.stage.linears = nullptr;  // they are copied
  all.append(std::move(project));
}

void Program::add(const AttendStage& stage) {
  Implementation& all = *implementation_;
  page_bytes(stage.head_dim);  // checks it
  SQ_CHECK(stage.kv_heads > 0 && stage.heads > 0 && stage.heads % stage.kv_heads == 0 &&
               stage.heads <= kMostBytes / kMaxHeadDim,
           "attend: ", stage.heads, " heads are not a multiple of ", stage.kv_heads, " kv heads");
  all.check_columns("attend: q", stage.in, stage.q, stage.heads * stage.head_dim);
  all.check_columns("attend: k", stage.in, stage.k, stage.kv_heads * stage.head_dim);
  all.check_columns("attend: v", stage.in, stage.v, stage.kv_heads * stage.head_dim);
  all.check_columns("attend: out", stage.out, 0, stage.heads * stage.head_dim);
  SQ_CHECK(stage.out != stage.in, "attend: reads and writes buffer ", stage.in);
  SQ_CHECK(stage.cache >= 0, "attend: cache ", stage.cache);
  check_norm(stage.q_norm);
  check_norm(stage.k_norm);
  check_options(stage.options, stage.head_dim);
  const PlanKey key{stage.heads, stage.kv_heads, stage.head_dim, stage.options.window,
                    stage.options.causal};
  const auto found = std::find(all.plan_keys.begin(), all.plan_keys.end(), key);
  const size_t plan = found - all.plan_keys.begin();
  if (found == all.plan_keys.end()) all.plan_keys.push_back(key);
  all.append(Attend{stage, plan});
}

void Program::add(const MergeStage& stage) {
  Implementation& all = *implementation_;
  all.check_columns("merge: in", stage.in, 0, 0);
  all.check_columns("merge: out", stage.out, 0, all.widths[stage.in]);
  check_norm(stage.norm);
  SQ_CHECK(stage.norm.kind != Norm::Kind::kNone && stage.in != stage.out,
           "merge: needs a norm and two buffers");
  all.append(stage);
}

void Program::set_result(Buffer buffer) {
  implementation_->check_columns("result", buffer, 0, 0);
  implementation_->result = buffer;
}

void Program::run(const Step& step, int threads) {
  Implementation& all = *implementation_;
  const Sequences& sequences = step.sequences;
  SQ_CHECK(!all.stages.empty() && all.result != kNoBuffer, "the program has no result");
  if (const auto* const last = std::get_if<Project>(&all.stages.back());
      last != nullptr && last->stage.kept_rows) {
    const auto writes = [&](const ProjectedLinear& linear) { return linear.out == all.result; };
    SQ_CHECK(std::any_of(last->linears.begin(), last->linears.end(), writes),
             "the last stage takes the kept rows alone and does not write the result");
  }
  const int64_t rows = sequences.count > 0 ? sequences.first_row[sequences.count] : 0;
  SQ_CHECK(rows == 0 || (step.ids != nullptr && step.positions != nullptr), "ids are null");
  const int32_t* checked = nullptr;
  for (const Stage& stage : all.stages) {
    if (const int64_t vocabulary = vocabulary_of(stage); vocabulary > 0) {
      for (int64_t row = 0; row < rows; ++row) {
        SQ_CHECK(step.ids[row] >= 0 && step.ids[row] < vocabulary, "token ", step.ids[row],
                 " is not in the vocabulary of ", vocabulary);
      }
    } else if (const auto* const attend = std::get_if<Attend>(&stage)) {
      const AttendStage& wanted = attend->stage;
      SQ_CHECK(wanted.cache < step.cache_count, "the step has ", step.cache_count, " caches");
      const KvCache& cache = step.caches[wanted.cache];
      SQ_CHECK(cache.kv_heads == wanted.kv_heads && cache.head_dim == wanted.head_dim, "cache ",
               wanted.cache, " has ", cache.kv_heads, " heads of ", cache.head_dim, ", not ",
               wanted.kv_heads, " of ", wanted.head_dim);
      const Sequences own = sequences_of(step, sequences, wanted.cache);
      check_cache(cache, own);
      if (own.table != checked) check_written_once(own);
      checked = own.table;
      if (wanted.rotary < 0) continue;
      SQ_CHECK(wanted.rotary < step.rotary_count, "the step has ", step.rotary_count,
               " rotary tables");
      const Rotary& rotary = step.rotaries[wanted.rotary];
      SQ_CHECK(rotary.table != nullptr && rotary.rotated > 0 && rotary.rotated % 2 == 0 &&
                   rotary.rotated <= wanted.head_dim,
               "a rotary table of ", rotary.rotated, " channels for heads of ", wanted.head_dim);
      for (int64_t row = 0; row < rows; ++row) {
        SQ_CHECK(step.positions[row] >= 0 && step.positions[row] < rotary.positions, "position ",
                 step.positions[row], " is not in a rotary table of ", rotary.positions);
      }
    }
  }
  SQ_CHECK(step.kept_count == 0 || (step.kept != nullptr && step.result != nullptr),
           "kept rows or the result are null");
  for (int64_t i = 0; i < step.kept_count; ++i) {
    SQ_CHECK(step.kept[i] >= (i == 0 ? 0 : step.kept[i - 1] + 1) && step.kept[i] < rows,
             "kept row ", step.kept[i], " of ", rows, ", which must ascend");
  }
  if (rows == 0) return;
  SQ_CHECK(!all.running.exchange(true), "the program runs already, in another thread");
  struct Stop {
    std::atomic<bool>& running;
    ~Stop() { running.store(false); }
  } stop{all.running};
  const int pool = pool_size();
  const int workers = threads > 0 ? std::min(threads, pool) : pool;
  for (int64_t row = 0; row < rows; row += kRowsOfPass) {
    const Range part{row, std::min(row + kRowsOfPass, rows)};
    all.run(step, Pass(step, part), part, workers);
  }
}

}  // namespace sq_cpu
