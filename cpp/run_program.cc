// How a step runs through the stages of a program, in one region.
#include <algorithm>
#include <array>
#include <limits>
#include <set>
#include <type_traits>

#include "dispatch.h"
#include "layout.h"
#include "pack.h"
#include "program_stages.h"
#include "quantize.h"

namespace sq_cpu {
namespace {

constexpr int64_t kPageInts = 1024;  // each worker's sums on pages of their own
// Normalized and quantized by every worker on its own in less time than a barrier takes.
constexpr int64_t kFewElements = 2048;

void set_weights(const Project& project, const Product& product, GemmArgs* args) {
  for (int i = 0; i < product.count; ++i) {
    args[i].weight = project.linears[product.first + i].weight;
  }
}

int64_t sums_of(const ProductPlan& plan, const PackedWeight& weight) {
  return workspace_sums(*plan.kernel, plan.blocking, k_block_count(weight.k));
}

constexpr int kCounterSets = 3;  // in use, to be used next, and being cleared

// Columns of a product with a weight in float that a worker takes at a time: their weights stay in
// L2 while rows pass by, and there are enough for workers that are not equally fast.
int64_t columns_of_unit(const ProjectedLinear& linear, int workers) {
  constexpr int64_t kBytes = 128 << 10;
  const int64_t fit = kBytes / (linear.weight.k * bytes_of(linear.in_float.type));
  const int64_t columns = std::min(fit, ceil_div(linear.weight.n, 4 * workers));
  return std::max<int64_t>(columns / kStripColumns, 1) * kStripColumns;
}

}  // namespace

ProductPlan Program::Implementation::plan_product(const Project& project, const Product& product,
                                                  int64_t m, int workers) const {
  GemmArgs args[kMostLinears] = {};
  set_weights(project, product, args);
  const int64_t strips = joined_strips(args, product.count, product.order);
  const int64_t k = args[0].weight.k;
  const Microkernel& kernel = choose_microkernel(isa, project.stage.quantizer.max_code(), m);
  const bool dealt =
      useful_threads(m, strips * kStripColumns, k, std::numeric_limits<int>::max()) > workers;
  return {&kernel, choose_blocking(kernel, m, strips, k_block_count(k), workers), dealt};
}

void Program::Implementation::note_reads(const Project& project, const Product& product,
                                         const Blocking& blocking, int workers, int64_t first) {
  GemmArgs args[kMostLinears] = {};
  set_weights(project, product, args);
  const int64_t strips = joined_strips(args, product.count, product.order);
  const int64_t stride = strip_bytes(args[0].weight.k);
  for (int worker = 0; worker < workers; ++worker) {
    const Range own =
        part(strips, blocking.strip_step, blocking.strip_parts, worker % blocking.strip_parts);
    WeightRange* const ranges = &reads[read_count * worker + first];
    for_each_product(args, product.count, product.order, own, [&](int i, Range its) {
      ranges[i] = {args[i].weight.data + its.begin * stride, its.size() * stride};
    });
  }
}

void Program::Implementation::plan(int64_t rows, int64_t kept, int workers) {
  const Isa now = active_isa();
  if (rows == planned_rows && kept == planned_kept && workers == planned_workers && now == isa &&
      !product_plans.empty()) {
    return;
  }
  planned_rows = -1;  // stands if an allocation fails
  product_plans.clear();
  isa = now;
  read_count = 0;
  for (const Stage& stage : stages) {
    const auto* const project = std::get_if<Project>(&stage);
    if (project != nullptr && project->is_read_in_order()) read_count += project->linears.size();
  }
  reads.assign(read_count * workers, {});
  int64_t sums = 0, first_read = 0;
  std::set<std::array<int64_t, 4>> listed;  // products of a list's rows, of which there may be any
  for (const Stage& stage : stages) {
    const auto* const project = std::get_if<Project>(&stage);
    if (project == nullptr || project->in_float) continue;
    const ActivationQuantizer& quantizer = project->stage.quantizer;
    const int64_t m = (project->stage.kept_rows ? kept : rows) * quantizer.terms;
    for (const Product& product : project->products) {
      const PackedWeight& weight = project->linears[product.first].weight;
      if (project->is_read_in_order()) {
        product_plans.push_back(plan_product(*project, product, m, workers));
        sums = std::max(sums, sums_of(product_plans.back(), weight));
        note_reads(*project, product, product_plans.back().blocking, workers, first_read);
        first_read += product.count;
        continue;
      }
      GemmArgs args[kMostLinears] = {};
      set_weights(*project, product, args);
      const int64_t strips = joined_strips(args, product.count, product.order);
      if (!listed.insert({strips, weight.k, quantizer.max_code(), quantizer.terms}).second)
        continue;
      for (int64_t some = quantizer.terms; some <= m; some += quantizer.terms) {
        sums = std::max(sums, sums_of(plan_product(*project, product, some, workers), weight));
      }
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
        ahead_(program.reads.data() + program.read_count * worker, program.read_count),
        memory_(program.workspace.get(0) + shared.worker_bytes * worker),
        row_(reinterpret_cast<float*>(memory_ + shared.worker_bytes - shared.row_bytes)),
        rotated_(row_ + shared.row_bytes / 2 / sizeof(float)) {}

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
    return list >= 0 && program_.routes.size(list) == 0;
  }

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
    Routes& routes = program_.routes;
    float* const x = program_.float_rows.get(0);
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
      const float weight = stage.list >= 0 ? program_.routes.weights(stage.list)[row]
                           : gated         ? *at(stage.gate, row, 0)
                                           : 1.0f;
      const int64_t to = stage.list >= 0 ? program_.routes.rows(stage.list)[row] : row;
      kernels_.add_scaled(at(stage.in, row, 0), width, weight, gated, at(stage.out, to, 0));
    }
  }

  int64_t count_of(int list) const {
    return list < 0 ? shared_.rows.size() : program_.routes.size(list);
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
      append_pages(append, kernels_, memory_, worker_, workers_);
      wait();
    }
    const AttentionArgs args{cache,
                             sequences,
                             stage.heads,
                             heads(stage.q, head),
                             {stage.q_norm, rotary, positions, group, gap},
                             stage.options,
                             {at(stage.out, 0, 0), DType::kFloat32, program_.ld(stage.out), head}};
    plan.run(args, program_.isa, *counters(), program_.finished.get(), memory_,
             program_.partials.get(0), within ? &append : nullptr);
  }

  void run(const Project& project) {
    const ProjectStage& stage = project.stage;
    const int64_t m =
        stage.kept_rows ? static_cast<int64_t>(shared_.pass.kept.size()) : count_of(stage.list);
    WorkCounter* next = counters();
    if (project.is_read_in_order()) ahead_.begin(project.linears.size());
    if (m == 0) {
      if (!project.in_float) plan_ += project.products.size();
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
      x.codes = program_.codes.get(0);
      x.scale = program_.scales.get(0);
      x.zero_point = program_.zero_points.get(0);
    }
    const Range rows = alone ? Range{0, m} : mine(m);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      // Others have written it.
      if (row + 1 < rows.end) ask_for(source_of(stage, row + 1), k * int64_t{sizeof(float)});
      quantize(project, row, x, alone);
    }
    if (!alone || project.float_columns) wait();
    auto* const sums = reinterpret_cast<int32_t*>(memory_);
    for (const Product& product : project.products) {
      const ProductPlan plan =
          stage.list < 0 ? program_.product_plans[plan_++]
                         : program_.plan_product(project, product, x.m, workers_planned());
      GemmArgs args[kMostLinears];
      EpilogueSteps steps[kMostLinears];
      for (int i = 0; i < product.count; ++i) {
        args[i] = gemm_args(stage, project.linears[product.first + i], x, steps[i]);
      }
      run_tasks(args, product.count, product.order, *plan.kernel, kernels_, plan.blocking,
                plan.dealt ? next : nullptr, sums, worker_, workers_);
      next += workers_planned();
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
      float* const rows = program_.float_rows.get(0);
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
      next += workers_planned();
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

  int workers_planned() const { return program_.planned_workers; }

  // A row of x into codes, and its float columns into what they are added to. `alone`: every worker
  // does all rows, and a part of those columns.
  void quantize(const Project& project, int64_t row, const QuantizedActivation& x, bool alone) {
    const ProjectStage& stage = project.stage;
    const float* source = source_of(stage, row);
    if (stage.norm.kind != Norm::Kind::kNone) {
      normalize(stage.norm, source, x.k, row_, false);
      source = row_;
    }
    const ActivationQuantizer& q = stage.quantizer;
    const Activations only{source, DType::kFloat32,     x.m / x.terms, x.k,
                           0,      q.inverse_smoothing, q.hadamard,    rotated_};
    quantize_rows(only, {row, row + 1}, q, {}, kernels_, 0, x);
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

  const float* source_of(const ProjectStage& stage, int64_t row) const {
    const int64_t from = stage.kept_rows ? shared_.pass.kept[row]
                         : stage.gather  ? program_.routes.rows(stage.list)[row]
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
  const RowKernels& kernels_;
  const int worker_, workers_;
  uint32_t turn_;
  ReadAhead ahead_;
  std::byte* const memory_;
  float* const row_;
  float* const rotated_;
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
  int64_t rows_of_codes = 0, row_floats = 0, append_bytes = 0, experts = 0, choices = 0;
  for (size_t i = 0; i < widths.size(); ++i) floats += m * ld(static_cast<Buffer>(i));
  int64_t most_products = 1;
  for (const Stage& stage : stages) {
    if (const auto* const project = std::get_if<Project>(&stage)) {
      const int64_t k = project->linears[0].weight.k;
      depth = std::max(depth, k);
      most_products = std::max<int64_t>(most_products, project->products.size());
      if (project->in_float) {
        row_floats = std::max(row_floats, m * whole_vectors(k));
        continue;
      }
      const int64_t coded = m * project->stage.quantizer.terms;
      codes_size = std::max(codes_size, codes_bytes(coded, k));
      rows_of_codes = std::max(rows_of_codes, coded);
    } else if (const auto* const route = std::get_if<RouteStage>(&stage)) {
      row_floats = std::max(row_floats, m * whole_vectors(route->width));
      experts = std::max(experts, route->experts);
      choices = std::max(choices, m * route->top);
    } else if (const auto* const attend = std::get_if<Attend>(&stage)) {
      append_bytes = std::max(append_bytes, append_workspace(attend->stage.head_dim));
    }
  }
  for (const AttentionPlan& each : attention) {
    own = std::max(own, each.workspace() + append_bytes);
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
  float_rows.get(row_floats);
  routes.reserve(m, experts, choices);
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
  const int64_t row_bytes = 2 * whole_lines(whole_tiles(depth) * int64_t{sizeof(float)});
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

}  // namespace sq_cpu
