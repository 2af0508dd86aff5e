// The public ops: check the arguments, quantize rows, run the product.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

#include "blocking.h"
#include "check.h"
#include "gemm.h"
#include "scratch.h"
#include "sq_cpu/linear.h"
#include "sq_cpu/saturation.h"
#include "team.h"

namespace sq_cpu {
namespace {

constexpr int64_t kPageInts = 1024;  // each thread's sums on pages of their own

constexpr double kFloor = 1e-30;  // of an absolute maximum: keeps 127 / absmax finite

struct RowCode {  // how the rows that share statistics become u8
  RowGrid grid;
  float scale;
};

// All in double, rounded once: the same bits as the reference in any language.
RowCode make_code(const ActivationQuantizer& q, const RowStats& stats) {
  const int levels = q.reduce_range ? 127 : 255;  // asymmetric codes are 0 .. levels
  const int absmax_code = levels / 2;             // symmetric ones are +-127 or +-63
  // The zero point of an infinite range is no number; the scale below marks the row.
  const double low = stats.finite ? stats.min : 0.0, high = stats.finite ? stats.max : 0.0;
  RowCode code;
  if (q.granularity == Granularity::kStatic) {
    code.scale = q.scale;
    code.grid.inv_scale = static_cast<float>(1.0 / q.scale);
    code.grid.zero_point = q.zero_point;
  } else if (q.symmetric) {
    const double absmax = std::max({kFloor, -low, high});
    code.scale = static_cast<float>(absmax / absmax_code);
    code.grid.inv_scale = static_cast<float>(absmax_code / absmax);
    code.grid.zero_point = absmax_code + 1;
  } else {
    const double range = std::max(kFloor, high - low);
    code.scale = static_cast<float>(range / levels);
    code.grid.inv_scale = static_cast<float>(levels / range);
    code.grid.zero_point = static_cast<int32_t>(std::nearbyint(-low * levels / range));
  }
  code.grid.low = static_cast<float>(q.symmetric ? -absmax_code : -code.grid.zero_point);
  code.grid.high = static_cast<float>(q.symmetric ? absmax_code : levels - code.grid.zero_point);
  if (!stats.finite) {
    code.scale = std::numeric_limits<float>::quiet_NaN();
    code.grid.inv_scale = 0.0f;
  }
  return code;
}

void check_quantizer(const ActivationQuantizer& q) {
  if (q.granularity != Granularity::kStatic) return;
  SQ_CHECK(q.scale > 0.0f && std::isfinite(q.scale) && std::isfinite(1.0f / q.scale),
           "static activation scale is ", q.scale,
           "; it must be positive and finite, and its reciprocal too");
  const int centre = q.reduce_range ? 64 : 128;
  SQ_CHECK(q.symmetric ? q.zero_point == centre : q.zero_point >= 0 && q.zero_point <= q.max_code(),
           "static zero point is ", q.zero_point, "; this grid needs ",
           q.symmetric ? join(centre) : join("0 .. ", q.max_code()));
}

struct Activations {
  const void* x;
  DType type;
  int64_t m, k, ldx;
  const float* inverse_smoothing;

  RowArgs row(int64_t i) const {
    const int64_t bytes = type == DType::kFloat32 ? 4 : 2;
    return {static_cast<const char*>(x) + i * ldx * bytes, inverse_smoothing, k};
  }
};

// Statistics over all finite rows, for a per-tensor scale.
RowStats tensor_stats(const Activations& x, const RowKernels& kernels) {
  const auto stats = kernels.stats[static_cast<int>(x.type)];
  RowStats whole{0.0f, 0.0f, true};
  run_team(worker_count(x.m, x.k, 1), [&](int worker, int workers) {
    float low = 0.0f, high = 0.0f;
    const Range rows = part(x.m, 1, workers, worker);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const RowStats s = stats(x.row(row));
      if (!s.finite) continue;
      low = std::min(low, s.min);
      high = std::max(high, s.max);
    }
#pragma omp critical(sq_cpu_tensor_stats)
    {
      whole.min = std::min(whole.min, low);
      whole.max = std::max(whole.max, high);
    }
  });
  return whole;
}

void quantize_rows(const Activations& x, Range rows, const ActivationQuantizer& q,
                   const RowStats& whole, const RowKernels& kernels,
                   const QuantizedActivation& out) {
  const auto stats = kernels.stats[static_cast<int>(x.type)];
  const auto quantize = kernels.quantize[static_cast<int>(x.type)];
  const CodeLayout layout(out.m, out.k);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const RowStats own = stats(x.row(row));
    const bool shared = q.granularity == Granularity::kPerTensor;
    const RowCode code = make_code(q, shared ? RowStats{whole.min, whole.max, own.finite} : own);
    quantize(x.row(row), code.grid, out.codes + layout.offset(row), layout.tile);
    out.scale[row] = code.scale;
    out.zero_point[row] = code.grid.zero_point;
  }
}

void check_matrix(const char* name, const void* data, int64_t rows, int64_t columns, int64_t ld) {
  SQ_CHECK(rows >= 0, name, " has ", rows, " rows");
  SQ_CHECK(ld >= columns, name, " has rows of ", columns, " elements only ", ld, " apart");
  SQ_CHECK(data != nullptr || rows == 0 || columns == 0, name, " is null");
}

void check_weight(const PackedWeight& weight) {
  const int64_t bytes = packed_bytes(weight.n, weight.k);  // checks the shape
  SQ_CHECK(weight.data != nullptr || bytes == 0, "the packed weight is null");
}

void check_activation(const char* name, const QuantizedActivation& x) {
  const int64_t bytes = codes_bytes(x.m, x.k);  // checks the shape
  SQ_CHECK(x.codes != nullptr || bytes == 0, name, ".codes is null");
  SQ_CHECK(x.zero_point != nullptr || x.m == 0, name, ".zero_point is null");
  SQ_CHECK(x.max_code == 127 || x.max_code == 255, name, ".max_code is ", x.max_code,
           "; codes reach 127 or 255");
}

void check_product(const QuantizedActivation& x, const PackedWeight& weight) {
  check_weight(weight);
  check_activation("x", x);
  SQ_CHECK(x.k == weight.k, "x has ", x.k, " columns, the weight takes ", weight.k);
}

void check_scale(const char* name, const QuantizedActivation& x) {
  SQ_CHECK(x.scale != nullptr || x.m == 0, name, ".scale is null");
}

// The steps that the kernels take; `steps` keeps them. Null when there are none.
const EpilogueSteps* make_steps(const Epilogue& epilogue, int64_t m, int64_t n,
                                EpilogueSteps& steps) {
  if (epilogue.other != nullptr) {
    check_matrix("epilogue.other", epilogue.other, m, n, epilogue.ld_other);
  }
  if (epilogue.residual != nullptr) {
    check_matrix("epilogue.residual", epilogue.residual, m, n, epilogue.ld_residual);
  }
  steps = {epilogue.activation,
           epilogue.other,
           epilogue.ld_other,
           epilogue.residual,
           epilogue.ld_residual,
           epilogue.operand_type,
           {},
           nullptr};
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
    run_tasks(own, kernel, rows, blocking, counters, sums + own_sums * worker, worker);
  });
}

void run_product(const GemmArgs& args) {
  run_product(args, [](GemmArgs&, int, int) {});
}

// So little that every thread quantizes it all, for itself: quicker than to share it and wait.
struct OwnCodes {
  static constexpr int64_t kBytes = 16 << 10;  // 3 us of quantizing; a barrier takes 1 to 5
  static bool hold(int64_t m, int64_t k) { return m <= kBlockRows && codes_bytes(m, k) <= kBytes; }

  alignas(64) uint8_t codes[kBytes];
  float scale[kBlockRows];
  int32_t zero_point[kBlockRows];
};

// Whole rows quantized, then multiplied, by one team.
void run_linear(const GemmArgs& args, const Activations& x, const ActivationQuantizer& quantizer,
                const RowStats& whole) {
  const RowKernels& rows = row_kernels(active_isa());
  if (OwnCodes::hold(x.m, x.k)) {
    // Not in the lambda's own frame: the codes must outlive it.
    thread_local OwnCodes storage;
    run_product(args, [&](GemmArgs& own, int, int) {
      own.x.codes = storage.codes;
      own.x.scale = storage.scale;
      own.x.zero_point = storage.zero_point;
      quantize_rows(x, {0, x.m}, quantizer, whole, rows, own.x);
    });
  } else {
    Barrier quantized;
    run_product(args, [&](GemmArgs& own, int worker, int workers) {
      quantize_rows(x, part(x.m, 1, workers, worker), quantizer, whole, rows, own.x);
      quantized.wait(workers);
    });
  }
}

}  // namespace

int64_t codes_bytes(int64_t m, int64_t k) {
  SQ_CHECK(m >= 0 && k >= 0, "activation shape [", m, ", ", k, "] is negative");
  const CodeLayout layout(m, k);
  return ceil_div(m, layout.height) * layout.block;
}

void linear(const void* x, DType x_type, int64_t m, int64_t ldx, const PackedWeight& weight,
            const ActivationQuantizer& quantizer, void* y, DType y_type, int64_t ldy,
            const Epilogue& epilogue) {
  check_quantizer(quantizer);
  check_weight(weight);
  check_matrix("x", x, m, weight.k, ldx);
  check_matrix("y", y, m, weight.n, ldy);
  EpilogueSteps steps;
  const EpilogueSteps* const given = make_steps(epilogue, m, weight.n, steps);
  if (m == 0 || weight.n == 0) return;

  Activations part_x{x, x_type, m, weight.k, ldx, quantizer.inverse_smoothing};
  RowStats whole{0.0f, 0.0f, true};
  if (quantizer.granularity == Granularity::kPerTensor) {
    whole = tensor_stats(part_x, row_kernels(active_isa()));
  }
  const int64_t pass = rows_per_pass(m, weight.k);
  thread_local Scratch<uint8_t> codes;
  thread_local Scratch<float> scales;
  thread_local Scratch<int32_t> zero_points;
  GemmArgs args{{nullptr, nullptr, nullptr, 0, weight.k, quantizer.max_code()},
                weight,
                y,
                static_cast<Output>(y_type),
                ldy,
                given};
  if (!OwnCodes::hold(pass, weight.k)) {
    args.x.codes = codes.get(codes_bytes(pass, weight.k));
    args.x.scale = scales.get(pass);
    args.x.zero_point = zero_points.get(pass);
  }
  for (int64_t m0 = 0; m0 < m; m0 += pass) {
    args.x.m = part_x.m = std::min(pass, m - m0);
    run_linear(args, part_x, quantizer, whole);
    part_x.x = part_x.row(args.x.m).x;
    args.y = static_cast<char*>(args.y) + args.x.m * ldy * element_bytes(args.output);
    advance(steps, args.x.m);
  }
}

void quantize_activations(const void* x, DType x_type, int64_t ldx,
                          const ActivationQuantizer& quantizer, const QuantizedActivation& out) {
  check_quantizer(quantizer);
  check_activation("out", out);
  check_scale("out", out);
  check_matrix("x", x, out.m, out.k, ldx);
  SQ_CHECK(out.max_code == quantizer.max_code(), "out.max_code is ", out.max_code,
           ", the quantizer's is ", quantizer.max_code());
  const RowKernels& rows = row_kernels(active_isa());
  const Activations all{x, x_type, out.m, out.k, ldx, quantizer.inverse_smoothing};
  RowStats whole{0.0f, 0.0f, true};
  if (quantizer.granularity == Granularity::kPerTensor) whole = tensor_stats(all, rows);
  run_team(worker_count(out.m, out.k, 1), [&](int worker, int workers) {
    quantize_rows(all, part(out.m, 1, workers, worker), quantizer, whole, rows, out);
  });
}

void linear(const QuantizedActivation& x, const PackedWeight& weight, void* y, DType y_type,
            int64_t ldy, const Epilogue& epilogue) {
  check_product(x, weight);
  check_scale("x", x);
  check_matrix("y", y, x.m, weight.n, ldy);
  EpilogueSteps steps;
  const EpilogueSteps* const given = make_steps(epilogue, x.m, weight.n, steps);
  if (x.m == 0 || weight.n == 0) return;
  run_product({x, weight, y, static_cast<Output>(y_type), ldy, given});
}

void linear(const QuantizedActivation& x, const PackedWeight& weight,
            const ActivationQuantizer& y_quantizer, const QuantizedActivation& y,
            const Epilogue& epilogue) {
  check_product(x, weight);
  check_scale("x", x);
  check_quantizer(y_quantizer);
  SQ_CHECK(
      y_quantizer.granularity == Granularity::kStatic && y_quantizer.inverse_smoothing == nullptr,
      "int8 out needs a static quantizer without smoothing");
  check_activation("y", y);
  check_scale("y", y);
  SQ_CHECK(y.m == x.m && y.k == weight.n, "y is [", y.m, ", ", y.k, "], the product [", x.m, ", ",
           weight.n, "]");
  SQ_CHECK(y.max_code == y_quantizer.max_code(), "y.max_code is ", y.max_code,
           ", its quantizer's is ", y_quantizer.max_code());
  EpilogueSteps steps;
  make_steps(epilogue, x.m, weight.n, steps);
  const RowCode code = make_code(y_quantizer, {0.0f, 0.0f, true});
  steps.grid = code.grid;
  steps.code_scale = y.scale;
  std::fill_n(y.scale, y.m, code.scale);
  std::fill_n(y.zero_point, y.m, code.grid.zero_point);
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
  return {x.m * weight.n * ceil_div(x.k, 2), saturated};
}

}  // namespace sq_cpu
