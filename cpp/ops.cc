// The public ops: check the arguments, quantize rows, run the product.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "blocking.h"
#include "check.h"
#include "gemm.h"
#include "sq_cpu/linear.h"

namespace sq_cpu {
namespace {

constexpr double kFloor = 1e-30;  // of an absolute maximum: keeps 127 / absmax finite

struct RowCode {  // how the rows that share statistics become u8
  RowGrid grid;
  float scale;
};

// All in double, rounded once: the same bits as the reference in any language.
RowCode make_code(const ActivationQuantizer& q, const RowStats& stats) {
  const int levels = q.reduce_range ? 127 : 255;  // asymmetric codes are 0 .. levels
  const int absmax_code = levels / 2;             // symmetric ones are +-127 or +-63
  const double low = stats.min, high = stats.max;
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

int max_code(const ActivationQuantizer& q) { return q.reduce_range ? 127 : 255; }

void check_quantizer(const ActivationQuantizer& q) {
  if (q.granularity != Granularity::kStatic) return;
  SQ_CHECK(std::isfinite(q.scale) && q.scale > 0.0f, "static activation scale is ", q.scale,
           "; it must be positive and finite");
  const int centre = q.reduce_range ? 64 : 128;
  SQ_CHECK(q.symmetric ? q.zero_point == centre : q.zero_point >= 0 && q.zero_point <= max_code(q),
           "static zero point is ", q.zero_point, "; this grid needs ",
           q.symmetric ? join(centre) : join("0 .. ", max_code(q)));
}

struct Activations {
  const void* x;
  DType type;
  int64_t m, k, ldx;
  const void* row(int64_t i) const {
    return static_cast<const char*>(x) + i * ldx * element_bytes(type);
  }
};

// Statistics over all finite rows, for a per-tensor scale.
RowStats tensor_stats(const Activations& x, const RowKernels& kernels, int threads) {
  const auto stats = kernels.stats[static_cast<int>(x.type)];
  float low = 0.0f, high = 0.0f;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : low) \
    reduction(max : high)
  for (int64_t row = 0; row < x.m; ++row) {
    const RowStats s = stats(x.row(row), x.k);
    if (!s.finite) continue;
    low = std::min(low, s.min);
    high = std::max(high, s.max);
  }
  return {low, high, true};
}

struct QuantizedRows {
  uint8_t* u;
  int64_t ldu;
  float* scale;
  int32_t* zero_point;
};

void quantize_rows(const Activations& x, Range rows, const ActivationQuantizer& q,
                   const RowStats& whole, const RowKernels& kernels, const QuantizedRows& out) {
  const auto stats = kernels.stats[static_cast<int>(x.type)];
  const auto quantize = kernels.quantize[static_cast<int>(x.type)];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const RowStats own = stats(x.row(row), x.k);
    const bool shared = q.granularity == Granularity::kPerTensor;
    const RowCode code = make_code(q, shared ? RowStats{whole.min, whole.max, own.finite} : own);
    uint8_t* u = out.u + row * out.ldu;
    quantize(x.row(row), x.k, code.grid, u);
    std::fill(u + x.k, u + k_block_count(x.k) * kTileDepth, uint8_t{0});
    out.scale[row] = code.scale;
    out.zero_point[row] = code.grid.zero_point;
  }
}

// One growing buffer per calling thread: a fresh one per call would fault in its pages every time.
template <typename T>
class Scratch {
 public:
  T* get(int64_t count) {
    if (count > capacity_) {
      const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      capacity_ = 0;  // stands if the allocation fails
      data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

// Serial inside another parallel region: the team's other threads are busy there.
int team_size(int64_t m, int64_t n, int64_t k) {
  return omp_in_parallel() ? 1 : useful_threads(m, n, k, omp_get_max_threads());
}

// Rows of 64-byte tiles 4 KB apart would all fall into one L1 set; one more line spreads them.
int64_t code_stride(int64_t k) {
  const int64_t padded = k_block_count(k) * kTileDepth;
  return padded % 4096 == 0 ? padded + 64 : padded;
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

}  // namespace

void linear(const void* x, DType x_type, int64_t m, int64_t ldx, const PackedWeight& weight,
            const ActivationQuantizer& quantizer, void* y, DType y_type, int64_t ldy) {
  check_quantizer(quantizer);
  check_weight(weight);
  check_matrix("x", x, m, weight.k, ldx);
  check_matrix("y", y, m, weight.n, ldy);
  SQ_CHECK(x_type != DType::kInt32 && y_type != DType::kInt32, "x and y must be floating point");
  if (m == 0 || weight.n == 0) return;

  const Isa isa = active_isa();
  const RowKernels& rows = row_kernels(isa);
  const int64_t ldu = std::max<int64_t>(code_stride(weight.k), kTileDepth);
  const int64_t pass = rows_per_pass(m, ldu);
  thread_local Scratch<uint8_t> codes;
  thread_local Scratch<float> scales;
  thread_local Scratch<int32_t> zero_points;
  const QuantizedRows q{codes.get(pass * ldu), ldu, scales.get(pass), zero_points.get(pass)};

  const Activations all{x, x_type, m, weight.k, ldx};
  RowStats whole{0.0f, 0.0f, true};
  if (quantizer.granularity == Granularity::kPerTensor) {
    whole = tensor_stats(all, rows, team_size(m, weight.k, 1));
  }
  for (int64_t m0 = 0; m0 < m; m0 += pass) {
    const int64_t count = std::min(pass, m - m0);
    const Activations part_x{all.row(m0), x_type, count, weight.k, ldx};
    const GemmArgs args{q.u,
                        ldu,
                        count,
                        q.scale,
                        q.zero_point,
                        weight,
                        static_cast<char*>(y) + m0 * ldy * element_bytes(y_type),
                        y_type,
                        ldy};
    const Microkernel& kernel = choose_microkernel(isa, max_code(quantizer), count);
    // The runtime may give fewer threads than asked for, so shares follow the team that came.
#pragma omp parallel num_threads(team_size(count, weight.n, weight.k))
    {
      const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
      quantize_rows(part_x, part(count, 1, threads, thread), quantizer, whole, rows, q);
#pragma omp barrier
      gemm_task(args, kernel, rows, thread, threads);
    }
  }
}

void quantize_activations(const void* x, DType x_type, int64_t m, int64_t k, int64_t ldx,
                          const ActivationQuantizer& quantizer, uint8_t* u, int64_t ldu,
                          float* row_scale, int32_t* row_zero_point) {
  check_quantizer(quantizer);
  check_matrix("x", x, m, k, ldx);
  check_matrix("u", u, m, k_block_count(k) * kTileDepth, ldu);
  SQ_CHECK(x_type != DType::kInt32, "x must be floating point");
  SQ_CHECK((row_scale != nullptr && row_zero_point != nullptr) || m == 0,
           "row_scale or row_zero_point is null");
  const RowKernels& rows = row_kernels(active_isa());
  const Activations all{x, x_type, m, k, ldx};
  const int threads = team_size(m, k, 1);
  RowStats whole{0.0f, 0.0f, true};
  if (quantizer.granularity == Granularity::kPerTensor) whole = tensor_stats(all, rows, threads);
#pragma omp parallel num_threads(threads)
  quantize_rows(all, part(m, 1, omp_get_num_threads(), omp_get_thread_num()), quantizer, whole,
                rows, {u, ldu, row_scale, row_zero_point});
}

void gemm(const uint8_t* u, int64_t m, int64_t ldu, const float* row_scale,
          const int32_t* row_zero_point, const PackedWeight& weight, int max_code, void* y,
          DType y_type, int64_t ldy) {
  check_weight(weight);
  check_matrix("u", u, m, k_block_count(weight.k) * kTileDepth, ldu);
  check_matrix("y", y, m, weight.n, ldy);
  SQ_CHECK(row_zero_point != nullptr || m == 0, "row_zero_point is null");
  SQ_CHECK(row_scale != nullptr || y_type == DType::kInt32 || m == 0, "row_scale is null");
  if (m == 0 || weight.n == 0) return;
  const Isa isa = active_isa();
  const RowKernels& rows = row_kernels(isa);
  const Microkernel& kernel = choose_microkernel(isa, max_code, m);
  const GemmArgs args{u, ldu, m, row_scale, row_zero_point, weight, y, y_type, ldy};
#pragma omp parallel num_threads(team_size(m, weight.n, weight.k))
  gemm_task(args, kernel, rows, omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace sq_cpu
