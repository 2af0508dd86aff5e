#include "pack.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "check.h"
#include "dispatch.h"
#include "layout.h"
#include "operands.h"
#include "sq_cpu/isa.h"
#include "sq_cpu/linear.h"
#include "team.h"

namespace sq_cpu {
namespace {

// Asks for huge pages before the first touch: one TLB entry then covers 2 MB of weights. A refusal
// costs speed only.
void ask_for_huge_pages(std::byte* data, int64_t bytes) {
  constexpr int64_t kWorthwhile = 4 << 20;
  if (bytes < kWorthwhile) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Offset of W[16s][k] to W[16s][k + 3] within strip s, k a multiple of 4; those of the next row
// follow.
int64_t group_offset(int64_t k) { return k / kTileDepth * kTileBytes + k % kTileDepth / 4 * 64; }

void check_shape(int64_t n, int64_t k) {
  SQ_CHECK(n >= 0 && k >= 0, "weight shape [", n, ", ", k, "] is negative");
  SQ_CHECK(k <= kMaxDepth, "in_features ", k, " exceeds ", kMaxDepth,
           ", beyond which an int32 accumulator can overflow; split the layer");
  SQ_CHECK(bounded_product(n, strip_bytes(k)) <= kMostBytes, "weight shape [", n, ", ", k,
           "] is more than any machine has");
}

// Fills a packed strip's scales and biases, which are zero beyond its columns.
void write_scale_and_bias(const float* scale, const float* bias, int64_t columns, int64_t k,
                          std::byte* strip) {
  float scale_and_bias[2 * kStripColumns] = {};
  std::copy_n(scale, columns, scale_and_bias);
  if (bias != nullptr) std::copy_n(bias, columns, scale_and_bias + kStripColumns);
  std::byte* trailer = strip + k_block_count(k) * kTileBytes;
  std::memcpy(trailer + kStripColumns * sizeof(int32_t), scale_and_bias, sizeof scale_and_bias);
}

}  // namespace

int64_t packed_bytes(int64_t n, int64_t k) {
  check_shape(n, k);
  return strip_count(n) * strip_bytes(k);
}

void pack_weight(const int8_t* weight, const float* scale, const float* bias, int64_t n, int64_t k,
                 std::byte* packed) {
  const int64_t bytes = packed_bytes(n, k);
  SQ_CHECK((weight != nullptr || n * k == 0) && (scale != nullptr || n == 0),
           "weight or scale is null");
  SQ_CHECK(packed != nullptr || bytes == 0, "packed is null");
  const auto pack_strips = row_kernels(active_isa()).pack_nk;
  ask_for_huge_pages(packed, bytes);
  const int64_t strips = strip_count(n);
  // Contiguous shares, as those of a product of few rows: who will read a strip touches it first.
  run_team(pool_size(), [&](int worker, int count) {
    const Range mine = part(strips, 1, count, worker);
    for (int64_t s = mine.begin; s < mine.end; ++s) {
      const int64_t n0 = s * kStripColumns;
      const int64_t columns = std::min(kStripColumns, n - n0);
      std::byte* strip = packed + s * strip_bytes(k);
      pack_strips({weight + n0 * k, k, columns, k, strip, true});
      write_scale_and_bias(scale + n0, bias == nullptr ? nullptr : bias + n0, columns, k, strip);
    }
  });
}

void gather_rows(const PackedWeight& weight, const int64_t* ids, int64_t count,
                 const float* inverse_smoothing, void* y, DType y_type, int64_t ldy) {
  check_weight(weight);
  check_dtype("y", y_type);
  check_matrix("y", y, count, weight.k, ldy);
  SQ_CHECK(count <= kMostBytes && (ids != nullptr || count == 0), "ids is null");
  for (int64_t i = 0; i < count; ++i) {
    SQ_CHECK(ids[i] >= 0 && ids[i] < weight.n, "id ", ids[i], " is none of the ", weight.n,
             " rows of the weight");
  }
  if (count == 0) return;  // rows of none may be any distance apart
  const auto weight_row = row_kernels(active_isa()).weight_row[static_cast<int>(y_type)];
  const int64_t row_bytes = ldy * (y_type == DType::kFloat32 ? 4 : 2);
  // A row brings its strip's whole lines in: those of 16.
  run_team(worker_count(count, kStripColumns, weight.k), [&](int worker, int workers) {
    const Range mine = part(count, 1, workers, worker);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      weight_row(row_of(weight, ids[i], inverse_smoothing), static_cast<char*>(y) + i * row_bytes);
    }
  });
}

void unpack_weight(const PackedWeight& packed, int8_t* weight, float* scale, float* bias) {
  check_shape(packed.n, packed.k);
  SQ_CHECK(packed.data != nullptr || packed.n == 0, "the packed weight is null");
  const int64_t k = packed.k, tiles = k_block_count(k) * kTileBytes;
  const int64_t strips = strip_count(packed.n);
  run_team(pool_size(), [&](int worker, int workers) {
    const Range mine = part(strips, 1, workers, worker);
    for (int64_t s = mine.begin; s < mine.end; ++s) {
      const std::byte* const strip = packed.data + s * strip_bytes(k);
      const int64_t n0 = s * kStripColumns, columns = std::min(kStripColumns, packed.n - n0);
      for (int64_t i = 0; weight != nullptr && i < k; i += 4) {
        const std::byte* const group = strip + group_offset(i);
        int8_t* const to = weight + n0 * k + i;
        if (i + 4 <= k) {  // of a size that is known
          for (int64_t c = 0; c < columns; ++c) std::memcpy(to + c * k, group + 4 * c, 4);
        } else {
          for (int64_t c = 0; c < columns; ++c) std::memcpy(to + c * k, group + 4 * c, k - i);
        }
      }
      const std::byte* const trailer = strip + tiles + kStripColumns * sizeof(int32_t);
      const auto copy = [&](float* to, int64_t index) {
        if (to == nullptr) return;
        std::memcpy(to + n0, trailer + index * kStripColumns * sizeof(float),
                    columns * sizeof(float));
      };
      copy(scale, 0);
      copy(bias, 1);
    }
  });
}

}  // namespace sq_cpu
