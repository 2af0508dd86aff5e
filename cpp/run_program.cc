// How a step runs through the stages of a program, in one region.
#include "run_program.h"

#include <algorithm>
#include <variant>

#include "dispatch.h"
#include "layout.h"
#include "pack.h"
#include "quantize.h"

namespace sq_cpu {
namespace {

// Normalized and quantized by every worker on its own in less time than a barrier takes.
constexpr int64_t kFewElements = 2048;

// Columns of a product with a weight in float that a worker takes at a time: their weights stay in
// L2 while rows pass by, and there are enough for workers that are not equally fast.
int64_t columns_of_unit(const ProjectedLinear& linear, int workers) {
  constexpr int64_t kBytes = 128 << 10;
  const int64_t fit = kBytes / (linear.weight.k * bytes_of(linear.in_float.type));
  const int64_t columns = std::min(fit, ceil_div(linear.weight.n, 4 * workers));
  return std::max<int64_t>(columns / kStripColumns, 1) * kStripColumns;
}

}  // namespace

// One worker's way through the stages.
class Program::Implementation::Runner {
 public:
  struct Shared {
    const Step& step;
    const Pass& pass;
    Range rows;
    const std::vector<AttentionPlan>& attention;
  };

  Runner(Implementation& program, const Shared& shared, int worker, int workers, uint32_t turn)
      : program_(program),
        shared_(shared),
        plan_(program.plan),
        memory_(program.memory),
        kernels_(row_kernels(plan_.isa())),
        worker_(worker),
        workers_(workers),
        turn_(turn),
        ahead_(plan_.reads(worker)),
        workspace_(memory_.workspace(worker)),
        row_(memory_.row(worker)),
        rotated_(memory_.rotated_row(worker)) {}

  // Returns the turns of the barrier taken.
  uint32_t run() {
    for (const Stage& stage : program_.stages) {
      if (has_no_rows(stage)) continue;
      std::visit([this](const auto& each) { run(each); }, stage);
      wait();
    }
    copy_result();
    return turn_;
  }

 private:
  void wait() {
    program_.barrier.wait(worker_, workers_, ++turn_, [this] { return ahead_.ask(); });
  }

  // Of an expert that no row has chosen: seen by all workers alike, who need not wait.
  bool has_no_rows(const Stage& stage) const {
    const auto* const project = std::get_if<Project>(&stage);
    const auto* const add = std::get_if<AddStage>(&stage);
    const int list = project != nullptr ? project->stage.list : add != nullptr ? add->list : -1;
    return list >= 0 && memory_.routes.size(list) == 0;
  }

  Range mine(int64_t count) const { return part(count, 1, workers_, worker_); }

  float* at(Buffer buffer, int64_t row, int64_t column) const {
    return memory_.buffers[buffer] + row * program_.ld(buffer) + column;
  }

  // Counters that are 0. Those of the set before the last, which nobody uses any more, are cleared.
  WorkCounter* counters() {
    if (worker_ == 0) {
      WorkCounter* const next = memory_.counter_set(set_ + 1);
      for (int64_t i = 0; i < memory_.counters_of_set(); ++i) {
        next[i].taken.store(0, std::memory_order_relaxed);
      }
    }
    return memory_.counter_set(set_++);
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

  void run(const PositionStage& stage) {
    const Range rows = mine(shared_.rows.size());
    const int64_t width = program_.widths[stage.out];
    constexpr float kOne = 1.0f;
    constexpr int64_t kFirst = 0;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t at_row = shared_.step.positions[shared_.rows.begin + row] + stage.offset;
      kernels_.add_columns({&kOne, &kFirst, 1, stage.table + at_row * width, width, width, true,
                            at(stage.out, row, 0)});
    }
  }

  void run(const NormStage& stage) {
    const Range rows = mine(shared_.rows.size());
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* const x = at(stage.buffer, row, stage.column);
      normalize(stage.norm, x, stage.columns, x, false);
    }
  }

  void run(const RouteStage& stage) {
    const int64_t m = shared_.rows.size(), k = stage.width, ldx = whole_vectors(k);
    Routes& routes = memory_.routes;
    float* const x = memory_.float_rows.get(0);
    const Range rows = mine(m);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float* const source = at(stage.in, row, stage.column);
      copy_normalized(stage.norm, source, k, x + row * ldx);
      std::fill_n(at(stage.zero, row, 0), program_.widths[stage.zero], 0.0f);
    }
    wait();
    // Each worker some experts of all rows: the weight is read once, by all of them.
    const Range own = part(stage.experts, kStripColumns, workers_, worker_);
    const FloatWeight& weight = stage.weight;
    kernels_.multiply_floats[static_cast<int>(weight.type)](
        {x, ldx, m, static_cast<const char*>(weight.data) + own.begin * k * bytes_of(weight.type),
         k, own.size(), weight.bias == nullptr ? nullptr : weight.bias + own.begin, nullptr,
         routes.logits() + own.begin, stage.experts});
    wait();
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      routes.choose(row, stage.experts, stage.top, stage.renormalize, kernels_);
    }
    wait();
    if (worker_ == 0) routes.fill(m, stage.experts, stage.top);
  }

  void run(const AddStage& stage) {
    const int64_t width = program_.widths[stage.in];
    const bool gated = stage.gate != kNoBuffer;
    const Range rows = mine(count_of(stage.list));
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float weight = stage.list >= 0 ? memory_.routes.weights(stage.list)[row]
                           : gated         ? *at(stage.gate, row, 0)
                                           : 1.0f;
      const int64_t to = stage.list >= 0 ? memory_.routes.rows(stage.list)[row] : row;
      kernels_.add_scaled(at(stage.in, row, 0), width, weight, gated, at(stage.out, to, 0));
    }
  }

  int64_t count_of(int list) const {
    return list < 0 ? shared_.rows.size() : memory_.routes.size(list);
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
    const auto heads = [&](int64_t column, int64_t stride) {
      return HeadRows{at(stage.in, 0, column), DType::kFloat32, ld, stride};
    };
    const int64_t group = stage.heads / stage.kv_heads;
    const int64_t kv_stride = stage.stride == 0 ? head : stage.stride;
    const int64_t gap = stage.stride == 0 ? 0 : stage.stride - group * head;
    const AppendArgs append{cache,
                            sequences,
                            heads(stage.k, kv_stride),
                            heads(stage.v, kv_stride),
                            {stage.k_norm, rotary, positions}};
    const AttentionPlan& plan = shared_.attention[attend.plan];
    const bool within = plan.appends_within();
    if (!within) {
      append_pages(append, kernels_, workspace_, worker_, workers_);
      wait();
    }
    const AttentionArgs args{cache,
                             sequences,
                             stage.heads,
                             heads(stage.q, head),
                             {stage.q_norm, rotary, positions, group, gap},
                             stage.options,
                             {at(stage.out, 0, 0), DType::kFloat32, program_.ld(stage.out), head}};
    plan.run(args, plan_.isa(), *counters(), memory_.finished.get(), workspace_,
             memory_.partials.get(0), within ? &append : nullptr);
  }

  void run(const Project& project) {
    const ProjectStage& stage = project.stage;
    const int64_t m =
        stage.kept_rows ? static_cast<int64_t>(shared_.pass.kept.size()) : count_of(stage.list);
    WorkCounter* next = counters();
    if (project.is_read_in_order()) ahead_.begin(project.linears.size());
    if (m == 0) {
      if (!project.in_float) product_ += project.products.size();
      return;
    }
    if (project.in_float) return multiply_floats(project, m, next);
    const int64_t k = project.linears[0].weight.k;
    thread_local OwnCodes own;
    const int terms = stage.quantizer.terms;
    QuantizedActivation x{
        own.codes, own.scale, own.zero_point, m * terms, k, stage.quantizer.max_code(), terms};
    const bool alone = OwnCodes::hold(x.m, k) && (m == 1 || m * k <= kFewElements);
    if (!alone) {
      x.codes = memory_.codes.get(0);
      x.scale = memory_.scales.get(0);
      x.zero_point = memory_.zero_points.get(0);
    }
    const Range rows = alone ? Range{0, m} : mine(m);
    RowCounts counts;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      // Others have written it.
      if (row + 1 < rows.end) ask_for(source_of(stage, row + 1), k * int64_t{sizeof(float)});
      counts += quantize(project, row, x, alone);
    }
    if (!alone || worker_ == 0) count_rows(stage.quantizer, counts, worker_);
    if (!alone || project.float_columns) wait();
    auto* const sums = reinterpret_cast<int32_t*>(workspace_);
    for (const Product& product : project.products) {
      const ProductPlan plan =
          stage.list < 0 ? plan_.known(product_++) : plan_.choose(project, product, x.m);
      GemmArgs args[kMostLinears];
      EpilogueSteps steps[kMostLinears];
      for (int i = 0; i < product.count; ++i) {
        args[i] = gemm_args(stage, project.linears[product.first + i], x, steps[i]);
      }
      run_tasks(args, product.count, product.order, *plan.kernel, kernels_, plan.blocking,
                plan.dealt ? next : nullptr, sums, worker_, workers_);
      next += plan_.workers();
    }
  }

  // The rows are read where they lie, unless they are to be normalized or picked.
  void multiply_floats(const Project& project, int64_t m, WorkCounter* next) {
    const ProjectStage& stage = project.stage;
    const int64_t k = project.linears[0].weight.k;
    const float* x = at(stage.in, 0, stage.column);
    int64_t ldx = program_.ld(stage.in);
    if (stage.kept_rows || stage.gather || stage.norm.kind != Norm::Kind::kNone) {
      ldx = whole_vectors(k);
      float* const rows = memory_.float_rows.get(0);
      const Range own = mine(m);
      for (int64_t row = own.begin; row < own.end; ++row) {
        copy_normalized(stage.norm, source_of(stage, row), k, rows + row * ldx);
      }
      x = rows;
      wait();
    }
    for (const Product& product : project.products) {
      const ProjectedLinear* const linears = &project.linears[product.first];
      const int64_t n = linears->weight.n, step = columns_of_unit(*linears, workers_);
      for (int i = 0; i < workers_; ++i) {
        const int task = (worker_ + i) % workers_;
        const Range own = part(n, step, workers_, task);
        const int64_t units = ceil_div(own.size(), step);
        for (int64_t unit; (unit = next[task].take(units)) < units;) {
          const int64_t begin = own.begin + unit * step;
          for (int each = 0; each < product.count; ++each) {
            multiply_floats(stage, linears[each], x, ldx, m, {begin, std::min(begin + step, n)});
          }
        }
      }
      next += plan_.workers();
    }
  }

  void multiply_floats(const ProjectStage& stage, const ProjectedLinear& linear, const float* x,
                       int64_t ldx, int64_t m, Range columns) const {
    const FloatWeight& weight = linear.in_float;
    const int64_t k = linear.weight.k, first = columns.begin;
    EpilogueSteps steps;
    const Target y = target(stage, linear, first, steps);
    kernels_.multiply_floats[static_cast<int>(weight.type)](
        {x, ldx, m, static_cast<const char*>(weight.data) + first * k * bytes_of(weight.type), k,
         columns.size(), weight.bias == nullptr ? nullptr : weight.bias + first,
         y.steps ? &steps : nullptr, y.data, y.ld});
  }

  // A row of x into codes, and its float columns into what they are added to. `alone`: every worker
  // does all rows, and a part of those columns.
  RowCounts quantize(const Project& project, int64_t row, const QuantizedActivation& x,
                     bool alone) {
    const ProjectStage& stage = project.stage;
    const float* source = source_of(stage, row);
    if (stage.norm.kind != Norm::Kind::kNone) {
      normalize(stage.norm, source, x.k, row_, false);
      source = row_;
    }
    const ActivationQuantizer& q = stage.quantizer;
    const Activations only{source, DType::kFloat32,     x.m / x.terms, x.k,
                           0,      q.inverse_smoothing, q.hadamard,    rotated_};
    const RowCounts counts = quantize_rows(only, {row, row + 1}, q, {}, kernels_, 0, x);
    if (!project.float_columns) return counts;
    for (const ProjectedLinear& linear : project.linears) {
      const FloatColumns& columns = linear.float_columns;
      if (columns.count == 0) continue;
      const Range n = alone ? part(linear.weight.n, kStripColumns, workers_, worker_)
                            : Range{0, linear.weight.n};
      kernels_.add_columns({source, columns.columns, columns.count, columns.weight + n.begin,
                            linear.weight.n, n.size(), linear.accumulate,
                            output(stage, linear, row) + n.begin});
    }
    return counts;
  }

  const float* source_of(const ProjectStage& stage, int64_t row) const {
    const int64_t from = stage.kept_rows ? shared_.pass.kept[row]
                         : stage.gather  ? memory_.routes.rows(stage.list)[row]
                                         : row;
    return at(stage.in, from, stage.column);
  }

  float* output(const ProjectStage& stage, const ProjectedLinear& linear, int64_t row) const {
    if (!stage.kept_rows || linear.out != program_.result) {
      return at(linear.out, row, linear.column);
    }
    return shared_.step.result + (shared_.pass.first_kept + row) * program_.widths[linear.out] +
           linear.column;
  }

  // Where a linear writes, from its column `first` on.
  struct Target {
    float* data;
    int64_t ld;
    bool steps;  // whether there are any
  };

  Target target(const ProjectStage& stage, const ProjectedLinear& linear, int64_t first,
                EpilogueSteps& steps) const {
    const bool result = stage.kept_rows && linear.out == program_.result;
    const int64_t ldy = result ? program_.widths[linear.out] : program_.ld(linear.out);
    float* const y = output(stage, linear, 0) + first;
    steps = {};
    steps.activation = linear.activation;
    steps.operand_type = DType::kFloat32;
    steps.multiplier = linear.multiplier;
    steps.softcap = linear.softcap;
    if (linear.other != kNoBuffer) {
      steps.other = at(linear.other, 0, linear.column + first);
      steps.ld_other = program_.ld(linear.other);
    }
    if (linear.accumulate || linear.float_columns.count > 0) {
      steps.residual = y;
      steps.ld_residual = ldy;
    }
    const bool any = steps.activation != Activation::kNone || steps.multiplier != 1.0f ||
                     steps.softcap != 0.0f || steps.other != nullptr || steps.residual != nullptr;
    return {y, ldy, any};
  }

  GemmArgs gemm_args(const ProjectStage& stage, const ProjectedLinear& linear,
                     const QuantizedActivation& x, EpilogueSteps& steps) const {
    const Target y = target(stage, linear, 0, steps);
    return {x, linear.weight, y.data, Output::kFloat32, y.ld, y.steps ? &steps : nullptr};
  }

  void normalize(const Norm& norm, const float* x, int64_t k, float* y, bool sum) const {
    kernels_.normalize(
        {x, k, norm.weight, norm.bias, norm.kind == Norm::Kind::kLayer, norm.eps, sum, y});
  }

  void copy_normalized(const Norm& norm, const float* x, int64_t k, float* y) const {
    if (norm.kind == Norm::Kind::kNone) {
      std::copy_n(x, k, y);
    } else {
      normalize(norm, x, k, y, false);
    }
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
  const StepPlan& plan_;
  StepMemory& memory_;
  const RowKernels& kernels_;
  const int worker_, workers_;
  uint32_t turn_;
  ReadAhead ahead_;
  std::byte* const workspace_;
  float* const row_;
  float* const rotated_;
  int64_t set_ = 0;
  size_t product_ = 0;  // of those that are planned
};

void Program::Implementation::run(const Step& step, const Pass& pass, Range rows, int workers) {
  const int64_t m = rows.size();
  plan.make(stages, m, pass.kept.size(), workers);
  std::vector<AttentionPlan> attention;
  attention.reserve(plan_keys.size());
  for (const PlanKey& key : plan_keys) {
    AttentionOptions visible;
    visible.causal = key.causal;
    visible.window = key.window;
    attention.emplace_back(pass.sequences, key.heads, key.kv_heads, key.head_dim, visible, workers);
  }
  memory.reserve(stages, widths, m, plan, attention);
  barrier.reserve(workers);

  const Runner::Shared shared{step, pass, rows, attention};
  uint32_t after = turn;
  run_team(workers, [&](int worker, int count) {
    const uint32_t taken = Runner(*this, shared, worker, count, turn).run();
    if (worker == 0) after = taken;
  });
  turn = after;
}

}  // namespace sq_cpu
