#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "dispatch.h"
#include "layout.h"
#include "operands.h"
#include "scratch.h"
#include "team.h"

namespace sq_cpu {
namespace {

constexpr double kFloor = 1e-30;  // of an absolute maximum: keeps 127 / absmax finite

}  // namespace

void check_quantizer(const ActivationQuantizer& q) {
  SQ_CHECK(is_one_of(q.granularity, Granularity::kStatic), "the quantizer has the unknown ",
           "Granularity ", static_cast<int>(q.granularity));
  check_terms("the quantizer", q.terms);
  SQ_CHECK(q.hadamard == 0 || q.hadamard == kTileDepth, "the quantizer's Hadamard blocks are of ",
           q.hadamard, " columns; they are of ", kTileDepth, ", or 0: none");
  if (q.granularity != Granularity::kStatic) return;
  SQ_CHECK(q.scale > 0.0f && std::isfinite(q.scale) && std::isfinite(1.0f / q.scale),
           "static activation scale is ", q.scale,
           "; it must be positive and finite, and its reciprocal too");
  const int centre = q.reduce_range ? 64 : 128;
  SQ_CHECK(q.symmetric ? q.zero_point == centre : q.zero_point >= 0 && q.zero_point <= q.max_code(),
           "static zero point is ", q.zero_point, "; this grid needs ",
           q.symmetric ? join(centre) : join("0 .. ", q.max_code()));
}

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

RowCode own_code(ActivationQuantizer q, const RowStats& stats) {
  q.granularity = Granularity::kPerToken;
  return make_code(q, stats);
}

RowFit fit_of(const ActivationQuantizer& q, const RowGrid& grid, const RowStats& stats) {
  if (!stats.finite || (stats.min == 0.0f && stats.max == 0.0f)) return RowFit::kWithin;
  // The codes of the extremes, not clamped.
  const float low = std::nearbyint(stats.min * grid.inv_scale);
  const float high = std::nearbyint(stats.max * grid.inv_scale);
  if (low < grid.low || high > grid.high) return RowFit::kClips;
  const float span = q.symmetric ? 2 * std::max(-low, high) : high - low;
  return 8 * span < static_cast<float>(q.max_code() + 1) ? RowFit::kUnderflows : RowFit::kWithin;
}

RowCode residual_code(const ActivationQuantizer& q, const RowCode& code) {
  const int absmax_code = q.max_code() / 2;
  const double steps = 2.0 * absmax_code;
  RowCode residual;
  residual.scale = static_cast<float>(code.scale / steps);
  residual.grid.inv_scale = static_cast<float>(steps / code.scale);
  residual.grid.zero_point = absmax_code + 1;
  residual.grid.low = static_cast<float>(-absmax_code);
  residual.grid.high = static_cast<float>(absmax_code);
  return residual;
}

float* rotated_rows(const ActivationQuantizer& q, int64_t m, int64_t k) {
  thread_local Scratch<float> rotated;
  return q.hadamard == 0 || m == 0 ? nullptr : rotated.get(pool_size() * whole_tiles(k));
}

TypedRow Activations::rotated_row(int64_t i, const RowKernels& kernels, int worker) const {
  const int source = static_cast<int>(type);
  if (hadamard == 0) return {row(i), source};
  constexpr float kOrthonormal = 1.0f / 8;  // 64^-1/2
  float* const own = rotated + worker * whole_tiles(k);
  kernels.rotate[source](row(i), hadamard, kOrthonormal, own);
  return {{own, nullptr, whole_tiles(k)}, static_cast<int>(DType::kFloat32)};
}

RowStats tensor_stats(const Activations& x, const RowKernels& kernels) {
  RowStats whole{0.0f, 0.0f, true};
  run_team(worker_count(x.m, x.k, 1), [&](int worker, int workers) {
    float low = 0.0f, high = 0.0f;
    const Range rows = part(x.m, 1, workers, worker);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const TypedRow from = x.rotated_row(row, kernels, worker);
      const RowStats s = kernels.stats[from.type](from.args);
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

RowCounts quantize_rows(const Activations& x, Range rows, const ActivationQuantizer& q,
                        const RowStats& whole, const RowKernels& kernels, int worker,
                        const QuantizedActivation& out) {
  const CodeLayout layout(out.m, out.k);
  const bool fixed = q.granularity == Granularity::kStatic;
  const bool at_once = fixed && q.terms == 1;  // most rows need the one pass that measures them
  const bool shared = q.granularity == Granularity::kPerTensor;
  const RowCode static_code = fixed ? make_code(q, {0.0f, 0.0f, true}) : RowCode{};
  RowCounts counts;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const TypedRow from = x.rotated_row(row, kernels, worker);
    const int64_t first = row * q.terms;  // of the rows of codes
    uint8_t* const codes = out.codes + layout.offset(first);
    const RowStats own = at_once ? kernels.quantize_measured[from.type](from.args, static_code.grid,
                                                                        codes, layout.tile)
                                 : kernels.stats[from.type](from.args);
    const RowFit fit = fixed ? fit_of(q, static_code.grid, own) : RowFit::kWithin;
    counts.rows += fixed;
    counts.clipped += fit == RowFit::kClips;
    counts.underflowed += fit == RowFit::kUnderflows;
    const bool falls_back = q.dynamic_fallback && fit != RowFit::kWithin;
    const bool as_fixed = fixed && own.finite && !falls_back;
    const RowCode code =
        as_fixed     ? static_code
        : falls_back ? own_code(q, own)
                     : make_code(q, shared ? RowStats{whole.min, whole.max, own.finite} : own);
    out.scale[first] = code.scale;
    out.zero_point[first] = code.grid.zero_point;
    if (q.terms == 1) {
      if (!as_fixed) kernels.quantize[from.type](from.args, code.grid, codes, layout.tile);
      continue;
    }
    const RowCode residual = residual_code(q, code);
    kernels.quantize_twice[from.type](from.args, code.grid, {code.scale, residual.grid}, codes,
                                      layout.tile);
    out.scale[first + 1] = residual.scale;
    out.zero_point[first + 1] = residual.grid.zero_point;
  }
  return counts;
}

int64_t codes_bytes(int64_t m, int64_t k) {
  SQ_CHECK(m >= 0 && k >= 0, "activation shape [", m, ", ", k, "] is negative");
  // With the padding of blocks and tiles, and for the scale and zero point of each row.
  SQ_CHECK(m <= kMostBytes && k <= kMostBytes &&
               bounded_product(m, k + kTileDepth) <= kMostBytes / kBlockRows,
           "activation shape [", m, ", ", k, "] is more than any machine has");
  const CodeLayout layout(m, k);
  return ceil_div(m, layout.height) * layout.block;
}

void quantize_activations(const void* x, DType x_type, int64_t ldx,
                          const ActivationQuantizer& quantizer, const QuantizedActivation& out) {
  check_quantizer(quantizer);
  check_activation("out", out);
  check_scale("out", out);
  check_dtype("x", x_type);
  SQ_CHECK(out.max_code == quantizer.max_code(), "out.max_code is ", out.max_code,
           ", the quantizer's is ", quantizer.max_code());
  SQ_CHECK(out.terms == quantizer.terms, "out.terms is ", out.terms, ", the quantizer's is ",
           quantizer.terms);
  const int64_t m = out.m / out.terms;
  check_matrix("x", x, m, out.k, ldx);
  const RowKernels& rows = row_kernels(active_isa());
  const Activations all{x,
                        x_type,
                        m,
                        out.k,
                        ldx,
                        quantizer.inverse_smoothing,
                        quantizer.hadamard,
                        rotated_rows(quantizer, m, out.k)};
  RowStats whole{0.0f, 0.0f, true};
  if (quantizer.granularity == Granularity::kPerTensor) whole = tensor_stats(all, rows);
  run_team(worker_count(out.m, out.k, 1), [&](int worker, int workers) {
    const Range mine = part(m, 1, workers, worker);
    count_rows(quantizer, quantize_rows(all, mine, quantizer, whole, rows, worker, out), worker);
  });
}

}  // namespace sq_cpu
