// The pages of a cache as the code sees them: where their parts lie, and how rows of heads become
// codes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel.h"
#include "layout.h"
#include "quantize.h"
#include "read_ahead.h"
#include "sq_cpu/attention.h"
#include "sq_cpu/program.h"

namespace sq_cpu {

constexpr int64_t kPageFloatBytes = 2;

// Where the parts of a page lie.
struct PageLayout {
  PageLayout(int64_t head_dim, KvType type)
      : depth_tiles(k_block_count(head_dim)),
        value_tiles(strip_count(head_dim)),
        key_strip(type == KvType::kInt8 ? depth_tiles * kTileBytes
                                        : head_dim * kStripColumns * kPageFloatBytes),
        value_tile(type == KvType::kInt8 ? kTileBytes
                                         : kPageTokens * kStripColumns * kPageFloatBytes),
        values(kPageTokens / kStripColumns * key_strip),
        key_scale(values + value_tiles * value_tile),
        value_scale(key_scale + kPageTokens * int64_t{sizeof(float)}),
        key_offset(value_scale + kPageTokens * int64_t{sizeof(float)}),
        bytes(key_offset + kPageTokens * int64_t{sizeof(int32_t)}) {}
  const int64_t depth_tiles;
  const int64_t value_tiles;
  const int64_t key_strip, value_tile;                       // bytes of each
  const int64_t values, key_scale, value_scale, key_offset;  // offsets
  const int64_t bytes;
};

// The largest power of two that divides the head: blocks of the rotation.
inline int64_t rotated_block(int64_t head_dim) { return head_dim & -head_dim; }

inline int64_t whole_vectors(int64_t count) {
  return ceil_div(count, kStripColumns) * kStripColumns;
}

// Of a HeadCoder's workspace.
inline int64_t head_floats(int64_t head_dim) { return 2 * whole_vectors(head_dim); }

inline int64_t bytes_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

inline RowArgs head_row(const HeadRows& x, int64_t row, int64_t head, int64_t head_dim) {
  return {static_cast<const char*>(x.data) +
              (row * x.row_stride + head * x.head_stride) * bytes_of(x.type),
          nullptr, head_dim};
}

// What becomes of a row of q or k before it is rotated by Hadamard and rounded; fp32 rows only.
struct HeadTransform {
  Norm norm;
  const Rotary* rotary = nullptr;
  const int64_t* positions = nullptr;  // [rows]
  // Elements between a group of heads and the next, beside the strides between heads.
  int64_t group = 1;
  int64_t gap = 0;
};

inline RowArgs head_row(const HeadRows& x, const HeadTransform& transform, int64_t row,
                        int64_t head, int64_t head_dim) {
  RowArgs at = head_row(x, row, head, head_dim);
  if (transform.gap != 0) {
    at.x = static_cast<const float*>(at.x) + head / transform.group * transform.gap;
  }
  return at;
}

// Others have written it: it is asked for while the row before becomes codes.
inline void ask_for_head(const HeadRows& x, const HeadTransform& transform, int64_t row,
                         int64_t head, int64_t head_dim) {
  ask_for(head_row(x, transform, row, head, head_dim).x, head_dim * bytes_of(x.type));
}

// Rows of heads as codes, of which 128 is 0, or as floats.
class HeadCoder {
 public:
  // `floats`: head_floats() of them.
  HeadCoder(int64_t head_dim, const RowKernels& kernels, float* floats)
      : head_dim_(head_dim),
        kernels_(kernels),
        rotated_(floats),
        transformed_(floats + whole_vectors(head_dim)) {}

  // Returns the scale of the codes of `rows`' row: transformed, then rotated.
  float rotate(const HeadRows& rows, const HeadTransform& transform, int64_t row, int64_t head,
               uint8_t* u, int64_t u_tile) const {
    const RowArgs source = transformed(rows, transform, row, head);
    kernels_.rotate[static_cast<int>(rows.type)](source, rotated_block(head_dim_), 1.0f, rotated_);
    return code(DType::kFloat32, {rotated_, nullptr, head_dim_}, u, u_tile);
  }

  float keep(const HeadRows& rows, int64_t row, int64_t head, uint8_t* u) const {
    return code(rows.type, head_row(rows, row, head, head_dim_), u, kTileDepth);
  }

  // Writes the row itself, transformed, as fp32; returns 1, or NaN for one that is not finite.
  float widen(const HeadRows& rows, const HeadTransform& transform, int64_t row, int64_t head,
              float* x) const {
    const RowArgs source = transformed(rows, transform, row, head);
    kernels_.widen_row[static_cast<int>(rows.type)](source.x, head_dim_, 1.0f, x);
    const RowArgs wide{x, nullptr, head_dim_};
    return kernels_.stats[static_cast<int>(DType::kFloat32)](wide).finite ? 1.0f
                                                                          : __builtin_nanf("");
  }

 private:
  RowArgs transformed(const HeadRows& rows, const HeadTransform& transform, int64_t row,
                      int64_t head) const {
    RowArgs source = head_row(rows, transform, row, head, head_dim_);
    if (transform.norm.kind != Norm::Kind::kNone) {
      const Norm& norm = transform.norm;
      kernels_.normalize({static_cast<const float*>(source.x), head_dim_, norm.weight, norm.bias,
                          norm.kind == Norm::Kind::kLayer, norm.eps, false, transformed_});
      source.x = transformed_;
    }
    if (transform.rotary != nullptr) {
      const Rotary& rotary = *transform.rotary;
      const float* const table = rotary.table + transform.positions[row] * 2 * rotary.rotated;
      kernels_.rotate_positions({static_cast<const float*>(source.x), head_dim_, table,
                                 rotary.rotated, rotary.interleaved, transformed_});
      source.x = transformed_;
    }
    return source;
  }

  float code(DType type, const RowArgs& row, uint8_t* u, int64_t u_tile) const {
    constexpr ActivationQuantizer kPerRow;  // symmetric
    const RowCode code = make_code(kPerRow, kernels_.stats[static_cast<int>(type)](row));
    kernels_.quantize[static_cast<int>(type)](row, code.grid, u, u_tile);
    return code.scale;
  }

  const int64_t head_dim_;
  const RowKernels& kernels_;
  float* const rotated_;
  float* const transformed_;
};

inline std::byte* page_of(const KvCache& cache, const Sequences& sequences,
                          const PageLayout& layout, int64_t sequence, int64_t token,
                          int64_t kv_head) {
  const int64_t page = sequences.table[sequence * sequences.table_stride + token / kPageTokens];
  return cache.pages + (page * cache.kv_heads + kv_head) * layout.bytes;
}

inline int64_t new_tokens(const Sequences& sequences, int64_t sequence) {
  return sequences.first_row[sequence + 1] - sequences.first_row[sequence];
}

inline int64_t row_count(const Sequences& sequences) {
  return sequences.count == 0 ? 0 : sequences.first_row[sequences.count];
}

// They throw std::invalid_argument for what names memory that the cache has not, or no machine.
void check_cache(const KvCache& cache, const Sequences& sequences);
void check_written_once(const Sequences& sequences);
void check_heads(const char* name, const HeadRows& x, int64_t rows, int64_t heads,
                 int64_t head_dim);

// append() inside a region.
struct AppendArgs {
  const KvCache& cache;
  const Sequences& sequences;
  HeadRows k, v;
  HeadTransform transform;  // of k
};

int64_t append_workspace(int64_t head_dim);  // bytes of each worker's
// Worker `worker` of `workers`: its pages.
void append_pages(const AppendArgs& args, const RowKernels& kernels, std::byte* workspace,
                  int worker, int workers);

// The new tokens of one page of a sequence and one kv head.
void append_page(const AppendArgs& args, const RowKernels& kernels, std::byte* workspace,
                 int64_t sequence, int64_t page, int64_t head);

}  // namespace sq_cpu
