// Programs: what add() and run() refuse.
#include "sq_cpu/program.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "operands.h"
#include "quantize.h"
#include "run_program.h"

namespace sq_cpu {
namespace {

// A longer prompt goes through all layers in passes of so many rows: their activations stay in the
// caches, and weights that are read once for so many rows cost little beside the products.
constexpr int64_t kRowsOfPass = 512;
constexpr int64_t kMostExperts = 1 << 16;

// Of an embedding; 0 for other stages.
int64_t vocabulary_of(const Stage& stage) {
  if (const auto* const embed = std::get_if<EmbedStage>(&stage)) return embed->vocabulary;
  const auto* const packed = std::get_if<PackedEmbedStage>(&stage);
  return packed != nullptr ? packed->weight.n : 0;
}

void check_float(const FloatWeight& weight, int64_t n, int64_t k) {
  check_dtype("a weight in float", weight.type);
  SQ_CHECK(weight.data != nullptr && n > 0 && k > 0, "a weight in float is empty: [", n, ", ", k,
           "]");
  SQ_CHECK(bounded_product(n, k, int64_t{sizeof(float)}) <= kMostBytes, "a weight [", n, ", ", k,
           "] is more than any machine has");
}

void check_norm(const Norm& norm) {
  SQ_CHECK(is_one_of(norm.kind, Norm::Kind::kLayer), "unknown norm ", static_cast<int>(norm.kind));
  SQ_CHECK(norm.eps >= 0.0f && norm.eps < 1.0f, "a norm's eps is ", norm.eps);
}

void check_linear(const Project& project, const ProjectedLinear& linear) {
  const ProjectStage& stage = project.stage;
  const int64_t n = linear.weight.n, k = project.linears[0].weight.k;
  SQ_CHECK((linear.in_float.data != nullptr) == project.in_float,
           "project: weights in float beside packed ones");
  project.in_float ? check_float(linear.in_float, n, linear.weight.k) : check_weight(linear.weight);
  SQ_CHECK(!project.in_float || linear.weight.data == nullptr,
           "project: a weight in float, packed");
  SQ_CHECK(stage.list < 0 || !linear.accumulate, "project: a list's rows are not added to");
  SQ_CHECK(linear.weight.k == k && n > 0, "project: a weight [", n, ", ", linear.weight.k,
           "] beside others of ", k, " columns");
  SQ_CHECK(linear.out != stage.in, "project: reads and writes buffer ", stage.in);
  SQ_CHECK(is_one_of(linear.activation, Activation::kSilu), "unknown Activation ",
           static_cast<int>(linear.activation));
  SQ_CHECK(std::isfinite(linear.multiplier), "project: multiplier is ", linear.multiplier);
  SQ_CHECK(linear.softcap == 0.0f || (linear.softcap >= 1e-6f && linear.softcap <= 1e6f),
           "project: softcap is ", linear.softcap);
}

// Whether linear i is multiplied by what the one before it writes.
bool is_joined(const Project& project, int i) {
  if (i == 0) return false;
  const ProjectedLinear& linear = project.linears[i];
  const ProjectedLinear& before = project.linears[i - 1];
  return linear.other != kNoBuffer && before.out == linear.other &&
         before.column == linear.column && before.weight.n == linear.weight.n;
}

void check_other(const Project& project, int i) {
  const ProjectedLinear& linear = project.linears[i];
  const auto writes = [&](const ProjectedLinear& each) { return each.out == linear.other; };
  const bool before = !project.stage.kept_rows &&
                      std::none_of(project.linears.begin(), project.linears.end(), writes);
  SQ_CHECK(linear.other != linear.out && (is_joined(project, i) || before),
           "project: other is not what the linear before writes, or a stage before");
}

void check_float_columns(const Project& project, const ProjectedLinear& linear) {
  const FloatColumns& columns = linear.float_columns;
  const int64_t k = linear.weight.k;
  SQ_CHECK(columns.count > 0 && columns.count <= k, "project: ", columns.count,
           " float columns of ", k);
  SQ_CHECK(columns.columns != nullptr && columns.weight != nullptr,
           "project: float columns are null");
  SQ_CHECK(!project.in_float, "project: float columns of a weight in float");
  SQ_CHECK(
      linear.activation == Activation::kNone && linear.other == kNoBuffer && linear.softcap == 0.0f,
      "project: float columns would be added after the activation");
  for (int64_t c = 0; c < columns.count; ++c) {
    SQ_CHECK(columns.columns[c] >= 0 && columns.columns[c] < k, "project: float column ",
             columns.columns[c], " of ", k);
  }
}

// Whether linear i writes what none before it does.
void check_apart(const Project& project, int i) {
  const ProjectedLinear& linear = project.linears[i];
  for (int j = 0; j < i; ++j) {
    const ProjectedLinear& before = project.linears[j];
    SQ_CHECK(before.out != linear.out || before.column + before.weight.n <= linear.column ||
                 linear.column + linear.weight.n <= before.column,
             "project: two linears write column ", linear.column, " of buffer ", linear.out);
  }
}

// Linear i goes into the products: to the one that it is joined with, or beside others.
void deal(Project& project, int i) {
  std::vector<Product>& products = project.products;
  const bool alternating = !products.empty() && products.back().order == Order::kAlternating;
  if (is_joined(project, i)) {
    if (!alternating && products.back().count > 1) {  // the one before is none of those
      --products.back().count;
      products.push_back({i - 1, 1, Order::kAlternating});
    }
    ++products.back().count;
    products.back().order = Order::kAlternating;
  } else if (products.empty() || alternating || project.in_float) {
    products.push_back({i, 1, Order::kSideBySide});
  } else {
    ++products.back().count;
  }
}

void check_ids(const Step& step, int64_t rows, int64_t vocabulary) {
  for (int64_t row = 0; row < rows; ++row) {
    SQ_CHECK(step.ids[row] >= 0 && step.ids[row] < vocabulary, "token ", step.ids[row],
             " is not in the vocabulary of ", vocabulary);
  }
}

void check_positions(const Step& step, int64_t rows, const PositionStage& learned) {
  const int64_t count = learned.count - learned.offset;
  for (int64_t row = 0; row < rows; ++row) {
    SQ_CHECK(step.positions[row] >= 0 && step.positions[row] < count, "position ",
             step.positions[row], " is not one of the ", count, " learned ones");
  }
}

// `checked`: the last table of pages that was found to be written once.
void check_attention(const Step& step, int64_t rows, const AttendStage& wanted,
                     const int32_t*& checked) {
  SQ_CHECK(wanted.cache < step.cache_count, "the step has ", step.cache_count, " caches");
  const KvCache& cache = step.caches[wanted.cache];
  SQ_CHECK(cache.kv_heads == wanted.kv_heads && cache.head_dim == wanted.head_dim, "cache ",
           wanted.cache, " has ", cache.kv_heads, " heads of ", cache.head_dim, ", not ",
           wanted.kv_heads, " of ", wanted.head_dim);
  const Sequences own = sequences_of(step, step.sequences, wanted.cache);
  check_cache(cache, own);
  if (own.table != checked) check_written_once(own);
  checked = own.table;
  if (wanted.rotary < 0) return;
  SQ_CHECK(wanted.rotary < step.rotary_count, "the step has ", step.rotary_count, " rotary tables");
  const Rotary& rotary = step.rotaries[wanted.rotary];
  SQ_CHECK(rotary.table != nullptr && rotary.rotated > 0 && rotary.rotated % 2 == 0 &&
               rotary.rotated <= wanted.head_dim,
           "a rotary table of ", rotary.rotated, " channels for heads of ", wanted.head_dim);
  for (int64_t row = 0; row < rows; ++row) {
    SQ_CHECK(step.positions[row] >= 0 && step.positions[row] < rotary.positions, "position ",
             step.positions[row], " is not in a rotary table of ", rotary.positions);
  }
}

void check_kept(const Step& step, int64_t rows) {
  SQ_CHECK(step.kept_count == 0 || (step.kept != nullptr && step.result != nullptr),
           "kept rows or the result are null");
  for (int64_t i = 0; i < step.kept_count; ++i) {
    SQ_CHECK(step.kept[i] >= (i == 0 ? 0 : step.kept[i - 1] + 1) && step.kept[i] < rows,
             "kept row ", step.kept[i], " of ", rows, ", which must ascend");
  }
}

}  // namespace

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

void Program::add(const PositionStage& stage) {
  Implementation& all = *implementation_;
  all.check_columns("position", stage.out, 0, 0);
  SQ_CHECK(stage.table != nullptr && stage.count > 0, "the learned positions have no rows");
  SQ_CHECK(stage.offset >= 0 && stage.offset < stage.count, "position 0 is row ", stage.offset,
           " of ", stage.count);
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
  SQ_CHECK(stage.list >= -1 && stage.list < all.lists && (stage.list >= 0 || !stage.gather),
           "project: list ", stage.list, " of ", all.lists);
  SQ_CHECK(stage.list < 0 || !stage.kept_rows, "project: kept rows of a list");
  Project project{stage, {stage.linears, stage.linears + stage.count}, {}, false, false};
  project.stage.linears = nullptr;  // they are copied
  project.in_float = stage.linears[0].in_float.data != nullptr;
  all.check_columns("project: in", stage.in, stage.column, stage.linears[0].weight.k);
  for (int i = 0; i < stage.count; ++i) {
    const ProjectedLinear& linear = project.linears[i];
    check_linear(project, linear);
    all.check_columns("project: out", linear.out, linear.column, linear.weight.n);
    if (linear.other != kNoBuffer) {
      all.check_columns("project: other", linear.other, linear.column, linear.weight.n);
      check_other(project, i);
    }
    if (linear.float_columns.count != 0) {
      check_float_columns(project, linear);
      project.float_columns = true;
    }
    check_apart(project, i);
    deal(project, i);
  }
  all.append(std::move(project));
}

void Program::add(const AttendStage& stage) {
  Implementation& all = *implementation_;
  page_bytes(stage.head_dim);  // checks it
  SQ_CHECK(stage.kv_heads > 0 && stage.heads > 0 && stage.heads % stage.kv_heads == 0 &&
               stage.heads <= kMostBytes / kMaxHeadDim,
           "attend: ", stage.heads, " heads are not a multiple of ", stage.kv_heads, " kv heads");
  const int64_t group = stage.heads / stage.kv_heads;
  SQ_CHECK(stage.stride == 0 || stage.stride >= group * stage.head_dim, "attend: ", group,
           " heads of ", stage.head_dim, " in a stride of ", stage.stride);
  const auto reach = [&](int64_t heads) {  // columns of so many heads of each kv head
    const int64_t apart = stage.stride == 0 ? heads * stage.head_dim : stage.stride;
    return bounded_product(stage.kv_heads - 1, apart) + heads * stage.head_dim;
  };
  all.check_columns("attend: q", stage.in, stage.q, reach(group));
  all.check_columns("attend: k", stage.in, stage.k, reach(1));
  all.check_columns("attend: v", stage.in, stage.v, reach(1));
  all.check_columns("attend: out", stage.out, 0, stage.heads * stage.head_dim);
  SQ_CHECK(stage.out != stage.in, "attend: reads and writes buffer ", stage.in);
  SQ_CHECK(stage.cache >= 0, "attend: cache ", stage.cache);
  check_norm(stage.q_norm);
  check_norm(stage.k_norm);
  check_options(stage.options);
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

void Program::add(const NormStage& stage) {
  Implementation& all = *implementation_;
  all.check_columns("norm", stage.buffer, stage.column, stage.columns);
  check_norm(stage.norm);
  SQ_CHECK(stage.norm.kind != Norm::Kind::kNone && stage.columns > 0,
           "norm: needs a norm and columns");
  all.append(stage);
}

void Program::add(const RouteStage& stage) {
  Implementation& all = *implementation_;
  check_norm(stage.norm);
  check_float(stage.weight, stage.experts, stage.width);
  all.check_columns("route: in", stage.in, stage.column, stage.width);
  all.check_columns("route: zero", stage.zero, 0, 0);
  SQ_CHECK(stage.zero != stage.in, "route: reads and writes buffer ", stage.in);
  SQ_CHECK(stage.top > 0 && stage.top <= stage.experts && stage.experts <= kMostExperts,
           "route: ", stage.top, " of ", stage.experts, " experts");
  all.lists = stage.experts;
  all.append(stage);
}

void Program::add(const AddStage& stage) {
  Implementation& all = *implementation_;
  all.check_columns("add: in", stage.in, 0, 0);
  all.check_columns("add: out", stage.out, 0, all.widths[stage.in]);
  SQ_CHECK(stage.in != stage.out, "add: reads and writes buffer ", stage.in);
  SQ_CHECK(stage.list >= -1 && stage.list < all.lists, "add: list ", stage.list, " of ", all.lists);
  if (stage.gate != kNoBuffer) {
    all.check_columns("add: gate", stage.gate, 0, 1);
    SQ_CHECK(stage.list < 0, "add: a gate beside the weights of a list");
  }
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
      check_ids(step, rows, vocabulary);
    } else if (const auto* const learned = std::get_if<PositionStage>(&stage)) {
      check_positions(step, rows, *learned);
    } else if (const auto* const attend = std::get_if<Attend>(&stage)) {
      check_attention(step, rows, attend->stage, checked);
    }
  }
  check_kept(step, rows);
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
