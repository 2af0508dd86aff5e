#include "step_plan.h"

#include <algorithm>
#include <array>
#include <limits>
#include <set>
#include <variant>

#include "dispatch.h"
#include "layout.h"
#include "pack.h"
#include "quantize.h"

namespace sq_cpu {
namespace {

constexpr int64_t kPageInts = 1024;  // each worker's sums on pages of their own

// The linears of a product as the driver takes them, as far as they are known before a step.
struct Weights {
  Weights(const Project& project, const Product& product)
      : count(product.count), order(product.order) {
    for (int i = 0; i < count; ++i) {
      args[i].weight = project.linears[product.first + i].weight;
    }
    strips = joined_strips(args, count, order);
    k = args[0].weight.k;
  }

  GemmArgs args[kMostLinears] = {};
  int count;
  Order order;
  int64_t strips;
  int64_t k;
};

int64_t sums_of(const ProductPlan& plan, int64_t k) {
  return workspace_sums(*plan.kernel, plan.blocking, k_block_count(k));
}

// The most that any stage of a step needs.
struct Needs {
  Needs(const std::vector<Stage>& stages, int64_t rows);

  int64_t products = 1;               // of a stage
  int64_t depth = 0;                  // columns of x
  int64_t codes = 0, coded_rows = 0;  // of x, in bytes and rows
  int64_t floats = 0;                 // of rows that are multiplied in float
  int64_t experts = 0, choices = 0;   // of a route
  int64_t append = 0;                 // bytes of each worker's
};

Needs::Needs(const std::vector<Stage>& stages, int64_t rows) {
  for (const Stage& stage : stages) {
    if (const auto* const project = std::get_if<Project>(&stage)) {
      const int64_t k = project->linears[0].weight.k;
      depth = std::max(depth, k);
      products = std::max<int64_t>(products, project->products.size());
      if (project->in_float) {
        floats = std::max(floats, rows * whole_vectors(k));
        continue;
      }
      const int64_t coded = rows * project->stage.quantizer.terms;
      codes = std::max(codes, codes_bytes(coded, k));
      coded_rows = std::max(coded_rows, coded);
    } else if (const auto* const route = std::get_if<RouteStage>(&stage)) {
      floats = std::max(floats, rows * whole_vectors(route->width));
      experts = std::max(experts, route->experts);
      choices = std::max(choices, rows * route->top);
    } else if (const auto* const attend = std::get_if<Attend>(&stage)) {
      append = std::max(append, append_workspace(attend->stage.head_dim));
    }
  }
}

}  // namespace

ProductPlan StepPlan::choose(const Project& project, const Product& product, int64_t m) const {
  const Weights weights(project, product);
  const int64_t strips = weights.strips, k = weights.k;
  const Microkernel& kernel = choose_microkernel(isa_, project.stage.quantizer.max_code(), m);
  const bool dealt =
      useful_threads(m, strips * kStripColumns, k, std::numeric_limits<int>::max()) > workers_;
  return {&kernel, choose_blocking(kernel, m, strips, k_block_count(k), workers_), dealt};
}

// What each worker reads of a product becomes `reads_`, from linear `first` on.
void StepPlan::note_reads(const Project& project, const Product& product, const Blocking& blocking,
                          int64_t first) {
  const Weights weights(project, product);
  const int64_t stride = strip_bytes(weights.k);
  for (int worker = 0; worker < workers_; ++worker) {
    const Range own = part(weights.strips, blocking.strip_step, blocking.strip_parts,
                           worker % blocking.strip_parts);
    WeightRange* const ranges = &reads_[read_count_ * worker + first];
    for_each_product(weights.args, weights.count, weights.order, own, [&](int i, Range its) {
      ranges[i] = {weights.args[i].weight.data + its.begin * stride, its.size() * stride};
    });
  }
}

void StepPlan::make(const std::vector<Stage>& stages, int64_t rows, int64_t kept, int workers) {
  const Isa isa = active_isa();
  if (rows == rows_ && kept == kept_ && workers == workers_ && isa == isa_) return;
  rows_ = -1;  // stands if an allocation fails
  kept_ = kept;
  workers_ = workers;
  isa_ = isa;
  products_.clear();
  read_count_ = 0;
  for (const Stage& stage : stages) {
    const auto* const project = std::get_if<Project>(&stage);
    if (project != nullptr && project->is_read_in_order()) read_count_ += project->linears.size();
  }
  reads_.assign(read_count_ * workers, {});
  int64_t sums = 0, first_read = 0;
  std::set<std::array<int64_t, 4>> seen;  // experts are many, and alike
  for (const Stage& stage : stages) {
    const auto* const project = std::get_if<Project>(&stage);
    if (project == nullptr || project->in_float) continue;
    const ActivationQuantizer& quantizer = project->stage.quantizer;
    const int64_t m = (project->stage.kept_rows ? kept : rows) * quantizer.terms;
    for (const Product& product : project->products) {
      if (project->is_read_in_order()) {
        products_.push_back(choose(*project, product, m));
        sums = std::max(sums, sums_of(products_.back(), project->linears[product.first].weight.k));
        note_reads(*project, product, products_.back().blocking, first_read);
        first_read += product.count;
        continue;
      }
      const Weights weights(*project, product);
      if (!seen.insert({weights.strips, weights.k, quantizer.max_code(), quantizer.terms}).second)
        continue;
      // An expert may get any number of the rows.
      for (int64_t some = quantizer.terms; some <= m; some += quantizer.terms) {
        sums = std::max(sums, sums_of(choose(*project, product, some), weights.k));
      }
    }
  }
  sums_bytes_ = ceil_div(sums, kPageInts) * kPageInts * int64_t{sizeof(int32_t)};
  rows_ = rows;
}

void StepMemory::reserve(const std::vector<Stage>& stages, const std::vector<int64_t>& widths,
                         int64_t rows, const StepPlan& plan,
                         const std::vector<AttentionPlan>& attention) {
  int64_t floats = 0;
  for (const int64_t width : widths) floats += rows * whole_vectors(width);
  float* next = buffer_memory.get(floats);
  buffers.clear();
  for (const int64_t width : widths) {
    buffers.push_back(next);
    next += rows * whole_vectors(width);
  }

  const Needs needs(stages, rows);
  codes.get(needs.codes);
  scales.get(needs.coded_rows);
  zero_points.get(needs.coded_rows);
  float_rows.get(needs.floats);
  routes.reserve(rows, needs.experts, needs.choices);

  int64_t own = plan.sums_bytes(), shared = 0, blocks = 0;
  for (const AttentionPlan& each : attention) {
    own = std::max(own, each.workspace() + needs.append);
    shared = std::max(shared, each.partials());
    blocks = std::max(blocks, each.blocks());
  }
  partials.get(shared);
  if (blocks > finished_count) {
    finished.reset(new std::atomic<int>[blocks] {});
    finished_count = blocks;
  }
  const int64_t counter_count = kCounterSets * needs.products * plan.workers();
  if (counter_count > static_cast<int64_t>(counters.size())) {
    counters = std::vector<WorkCounter>(counter_count);
  }
  for (WorkCounter& counter : counters) counter.taken.store(0, std::memory_order_relaxed);
  row_bytes = whole_lines(whole_tiles(needs.depth) * int64_t{sizeof(float)});
  worker_bytes = whole_lines(own) + 2 * row_bytes;
  workspaces.get(worker_bytes * plan.workers());
}

}  // namespace sq_cpu
