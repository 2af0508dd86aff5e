// The linear layer's public functions: check the arguments, run the product in one team, quantizing
// on the way where x comes in floats.
#include <algorithm>
#include <atomic>
#include <memory>

#include "blocking.h"
#include "check.h"
#include "dispatch.h"
#include "gemm.h"
#include "layout.h"
#include "operands.h"
#include "quantize.h"
#include "scratch.h"
#include "sq_cpu/linear.h"
#include "sq_cpu/saturation.h"
#include "team.h"

namespace sq_cpu {
namespace {

constexpr int64_t kPageInts = 1024;  // each thread's sums on pages of their own

// The steps that the kernels take; `steps` keeps them. Null when there are none.
const EpilogueSteps* make_steps(const Epilogue& epilogue, int64_t m, int64_t n,
                                EpilogueSteps& steps) {
  SQ_CHECK(is_one_of(epilogue.activation, Activation::kSilu), "the epilogue has the unknown ",
           "Activation ", static_cast<int>(epilogue.activation));
  check_dtype("the epilogue", epilogue.operand_type);
  if (epilogue.other != nullptr) {
    check_matrix("epilogue.other", epilogue.other, m, n, epilogue.ld_other);
  }
  if (epilogue.residual != nullptr) {
    check_matrix("epilogue.residual", epilogue.residual, m, n, epilogue.ld_residual);
  }
  steps = {};
  steps.activation = epilogue.activation;
  steps.other = epilogue.other;
  steps.ld_other = epilogue.ld_other;
  steps.residual = epilogue.residual;
  steps.ld_residual = epilogue.ld_residual;
  steps.operand_type = epilogue.operand_type;
  const bool any = epilogue.activation != Activation::kNone || epilogue.other != nullptr ||
                   epilogue.residual != nullptr;
  return any ? &steps : nullptr;
}

// One parallel region: each worker prepares its view of the product, then takes its part of it.
// Prepare: void operator()(GemmArgs& own, int worker, int workers), called by every worker.
template <typename Prepare>
void run_product(const GemmArgs& args, Prepare prepare) {
  const Isa isa = active_isa();
  const Microkernel& kernel = choose_microkernel(isa, args.x.max_code, args.x.m);
  const RowKernels& rows = row_kernels(isa);
  const int workers = worker_count(args.x.m, args.weight.n, args.weight.k);
  const int64_t k_blocks = k_block_count(args.weight.k);
  const Blocking blocking =
      choose_blocking(kernel, args.x.m, strip_count(args.weight.n), k_blocks, workers);
  const int64_t own_sums =
      ceil_div(workspace_sums(kernel, blocking, k_blocks), kPageInts) * kPageInts;
  const int64_t tasks = blocking.row_parts * blocking.strip_parts;
  thread_local Scratch<int32_t> sums_scratch;
  thread_local Scratch<WorkCounter> counter_scratch;
  int32_t* const sums = sums_scratch.get(own_sums * workers);
  WorkCounter* const counters = counter_scratch.get(tasks);
  std::uninitialized_default_construct_n(counters, tasks);
  run_team(workers, [&](int worker, int count) {
    GemmArgs own = args;
    prepare(own, worker, count);
    run_tasks(&own, 1, Order::kAlternating, kernel, rows, blocking, counters,
              sums + own_sums * worker, worker, count);
  });
}

void run_product(const GemmArgs& args) {
  run_product(args, [](GemmArgs&, int, int) {});
}

// Whole rows quantized, then multiplied, by one team.
void run_linear(const GemmArgs& args, const Activations& x, const ActivationQuantizer& quantizer,
                const RowStats& whole) {
  const RowKernels& rows = row_kernels(active_isa());
  if (OwnCodes::hold(args.x.m, x.k)) {
    // Not in the lambda's own frame: the codes must outlive it.
    thread_local OwnCodes storage;
    run_product(args, [&](GemmArgs& own, int worker, int) {
      own.x.codes = storage.codes;
      own.x.scale = storage.scale;
      own.x.zero_point = storage.zero_point;
      const RowCounts all = quantize_rows(x, {0, x.m}, quantizer, whole, rows, worker, own.x);
      if (worker == 0) count_rows(quantizer, all, worker);
    });
  } else {
    Barrier quantized;
    run_product(args, [&](GemmArgs& own, int worker, int workers) {
      const Range mine = part(x.m, 1, workers, worker);
      count_rows(quantizer, quantize_rows(x, mine, quantizer, whole, rows, worker, own.x), worker);
      quantized.wait(workers);
    });
  }
}

}  // namespace

void linear(const void* x, DType x_type, int64_t m, int64_t ldx, const PackedWeight& weight,
            const ActivationQuantizer& quantizer, void* y, DType y_type, int64_t ldy,
            const Epilogue& epilogue) {
  check_quantizer(quantizer);
  check_weight(weight);
  check_dtype("x", x_type);
  check_matrix("x", x, m, weight.k, ldx);
  check_dtype("y", y_type);
  check_matrix("y", y, m, weight.n, ldy);
  EpilogueSteps steps;
  const EpilogueSteps* const given = make_steps(epilogue, m, weight.n, steps);
  if (m == 0 || weight.n == 0) return;

  Activations part_x{x,
                     x_type,
                     m,
                     weight.k,
                     ldx,
                     quantizer.inverse_smoothing,
                     quantizer.hadamard,
                     rotated_rows(quantizer, m, weight.k)};
  RowStats whole{0.0f, 0.0f, true};
  if (quantizer.granularity == Granularity::kPerTensor) {
    whole = tensor_stats(part_x, row_kernels(active_isa()));
  }
  const int terms = quantizer.terms;
  const int64_t pass = rows_per_pass(m * terms, weight.k) / terms;
  thread_local Scratch<uint8_t> codes;
  thread_local Scratch<float> scales;
  thread_local Scratch<int32_t> zero_points;
  GemmArgs args{};
  args.x.k = weight.k;
  args.x.max_code = quantizer.max_code();
  args.x.terms = terms;
  args.weight = weight;
  args.y = y;
  args.output = static_cast<Output>(y_type);
  args.ldy = ldy;
  args.steps = given;
  if (!OwnCodes::hold(pass * terms, weight.k)) {
    args.x.codes = codes.get(codes_bytes(pass * terms, weight.k));
    args.x.scale = scales.get(pass * terms);
    args.x.zero_point = zero_points.get(pass * terms);
  }
  for (int64_t m0 = 0; m0 < m; m0 += pass) {
    part_x.m = std::min(pass, m - m0);
    args.x.m = part_x.m * terms;
    run_linear(args, part_x, quantizer, whole);
    part_x.x = part_x.row(part_x.m).x;
    args.y = static_cast<char*>(args.y) + part_x.m * ldy * element_bytes(args.output);
    advance(steps, part_x.m);
  }
}

void linear(const QuantizedActivation& x, const PackedWeight& weight, void* y, DType y_type,
            int64_t ldy, const Epilogue& epilogue) {
  check_product(x, weight);
  check_scale("x", x);
  check_dtype("y", y_type);
  check_matrix("y", y, x.m / x.terms, weight.n, ldy);
  EpilogueSteps steps;
  const EpilogueSteps* const given = make_steps(epilogue, x.m / x.terms, weight.n, steps);
  if (x.m == 0 || weight.n == 0) return;
  run_product({x, weight, y, static_cast<Output>(y_type), ldy, given});
}

void linear(const QuantizedActivation& x, const PackedWeight& weight,
            const ActivationQuantizer& y_quantizer, const QuantizedActivation& y,
            const Epilogue& epilogue) {
  check_product(x, weight);
  check_scale("x", x);
  check_quantizer(y_quantizer);
  SQ_CHECK(y_quantizer.granularity == Granularity::kStatic &&
               y_quantizer.inverse_smoothing == nullptr && y_quantizer.hadamard == 0 &&
               y_quantizer.terms == 1 && y.terms == 1,
           "int8 out needs a static quantizer of one term, without smoothing or a Hadamard matrix");
  check_activation("y", y);
  check_scale("y", y);
  const int64_t m = x.m / x.terms;
  SQ_CHECK(y.m == m && y.k == weight.n, "y is [", y.m, ", ", y.k, "], the product [", m, ", ",
           weight.n, "]");
  SQ_CHECK(y.max_code == y_quantizer.max_code(), "y.max_code is ", y.max_code,
           ", its quantizer's is ", y_quantizer.max_code());
  EpilogueSteps steps;
  make_steps(epilogue, m, weight.n, steps);
  const RowCode code = make_code(y_quantizer, {0.0f, 0.0f, true});
  steps.grid = code.grid;
  steps.code_scale = y.scale;
  std::fill_n(y.scale, y.m, code.scale);
  std::fill_n(y.zero_point, y.m, code.grid.zero_point);
  RowCounts counts;
  counts.chained = m;
  count_rows(y_quantizer, counts, 0);
  if (x.m == 0 || weight.n == 0) return;
  run_product({x, weight, y.codes, Output::kCode, CodeLayout(y.m, y.k).tile, &steps});
}

void gemm(const QuantizedActivation& x, const PackedWeight& weight, int32_t* y, int64_t ldy) {
  check_product(x, weight);
  check_matrix("y", y, x.m, weight.n, ldy);
  if (x.m == 0 || weight.n == 0) return;
  run_product({x, weight, y, Output::kInt32, ldy, nullptr});
}

SaturationCount count_saturation(const QuantizedActivation& x, const PackedWeight& weight) {
  check_product(x, weight);
  const int64_t pairs = bounded_product(x.m, weight.n, ceil_div(x.k, 2));
  SQ_CHECK(pairs <= kMostBytes, "the pairs of a product [", x.m, ", ", weight.n, "] of ", x.k,
           " each cannot be counted");
  if (pairs == 0) return {0, 0};
  const auto count = row_kernels(active_isa()).count_saturated;
  const CodeLayout layout(x.m, x.k);
  const int64_t k_blocks = k_block_count(x.k), strips = strip_count(weight.n);
  std::atomic<int64_t> saturated{0};
  run_team(worker_count(x.m, weight.n, x.k), [&](int worker, int workers) {
    int64_t own = 0;
    const Range mine = part(strips, 1, workers, worker);
    for (int64_t s = mine.begin; s < mine.end; ++s) {
      for (int64_t row = 0; row < x.m; row += layout.height) {
        const auto rows = static_cast<int>(std::min(layout.height, x.m - row));
        own += count({x.codes + layout.offset(row), layout.tile, weight.data + s * strip_bytes(x.k),
                      k_blocks, rows});
      }
    }
    saturated += own;
  });
  return {pairs, saturated};
}

}  // namespace sq_cpu
