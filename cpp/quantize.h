// Activations become codes: the statistics of rows, the grid that follows from them, and the codes
// in blocks (linear.h draws those and defines the arithmetic).
#pragma once

#include <cstdint>

#include "blocking.h"
#include "kernel.h"
#include "sq_cpu/linear.h"

namespace sq_cpu {

void check_quantizer(const ActivationQuantizer& q);

struct RowCode {  // how the rows that share statistics become u8
  RowGrid grid;
  float scale;
};

// Of rows with these statistics, which a static quantizer does not read but for `finite`.
RowCode make_code(const ActivationQuantizer& q, const RowStats& stats);

// Of a row that falls back from a static scale to its own.
RowCode own_code(ActivationQuantizer q, const RowStats& stats);

// How a row lies on a static grid (RowCounts).
enum class RowFit { kWithin, kClips, kUnderflows };

RowFit fit_of(const ActivationQuantizer& q, const RowGrid& grid, const RowStats& stats);

// Of what those codes leave over: at most half a step, which becomes 127 (63) steps.
RowCode residual_code(const ActivationQuantizer& q, const RowCode& code);

// A row as the grid meets it, and its type.
struct TypedRow {
  RowArgs args;
  int type;  // of RowKernels' arrays
};

struct Activations {
  const void* x;
  DType type;
  int64_t m, k, ldx;
  const float* inverse_smoothing;
  int hadamard;    // as in ActivationQuantizer
  float* rotated;  // of each worker, whole tiles of k, where a row is rotated; else not looked at

  RowArgs row(int64_t i) const {
    const int64_t bytes = type == DType::kFloat32 ? 4 : 2;
    return {static_cast<const char*>(x) + i * ldx * bytes, inverse_smoothing, k};
  }
  TypedRow rotated_row(int64_t i, const RowKernels& kernels, int worker) const;
};

// What Activations::rotated needs, of the calling thread and until its next call; null where no row
// is rotated.
float* rotated_rows(const ActivationQuantizer& q, int64_t m, int64_t k);

// Statistics over all finite rows, for a per-tensor scale. Opens a region of its own.
RowStats tensor_stats(const Activations& x, const RowKernels& kernels);

// Rows of x, by one thread, to `out`, where each is q.terms rows; `whole` is what tensor_stats()
// gave, read for a per-tensor scale only. Returns what count_rows() shall count, of a static scale.
RowCounts quantize_rows(const Activations& x, Range rows, const ActivationQuantizer& q,
                        const RowStats& whole, const RowKernels& kernels, int worker,
                        const QuantizedActivation& out);

inline void count_rows(const ActivationQuantizer& q, const RowCounts& counts, int worker) {
  if (q.counter != nullptr) q.counter->add(counts, worker);
}

// So little that every thread quantizes it all, for itself: quicker than to share it and wait.
struct OwnCodes {
  static constexpr int64_t kBytes = 16 << 10;  // 3 us of quantizing; a barrier takes 1 to 5
  static bool hold(int64_t m, int64_t k) { return m <= kBlockRows && codes_bytes(m, k) <= kBytes; }

  alignas(64) uint8_t codes[kBytes];
  float scale[kBlockRows];
  int32_t zero_point[kBlockRows];
};

}  // namespace sq_cpu
