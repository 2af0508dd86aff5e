// The contract between the driver and the kernels of each ISA. Only plain data in here: this header
// is compiled with every ISA's flags, and an inline library function compiled with AVX-512 could
// win the linker's choice and crash on a machine without it.
#pragma once

#include <cstdint>

#include "sq_cpu/attention.h"
#include "sq_cpu/isa.h"
#include "sq_cpu/linear.h"

namespace sq_cpu {

// What a task keeps between calls of a microkernel: AMX stores the tile configuration that it found
// (another library's), and the row count that its own is made for.
struct alignas(64) TaskState {
  uint8_t saved[64];
  uint8_t config[64];
  int rows;
};

struct RowStats {
  float min;  // <= 0
  float max;  // >= 0
  bool finite;
};

// u = clamp(rne(x * inv_scale), low, high) + zero_point
struct RowGrid {
  float inv_scale;
  float low;
  float high;
  int32_t zero_point;
};

// A row to quantize: k elements, multiplied by inverse_smoothing[k] unless that is null.
struct RowArgs {
  const void* x;
  const float* inverse_smoothing;
  int64_t k;
};

// What the epilogue writes: the floats in DType's order, the integers themselves, u8 codes in
// blocks, or rows of s8: clamp(rne(v), -127, 127).
enum class Output { kFloat32, kBFloat16, kFloat16, kInt32, kCode, kInt8 };
constexpr int kOutputs = 6;
constexpr int kDTypes = 3;
static_assert(static_cast<int>(DType::kFloat16) == kDTypes - 1 &&
                  static_cast<int>(Output::kInt8) == kOutputs - 1,
              "RowKernels has a function for each DType and each Output");
static_assert(static_cast<int>(Output::kFloat32) == static_cast<int>(DType::kFloat32) &&
                  static_cast<int>(Output::kBFloat16) == static_cast<int>(DType::kBFloat16) &&
                  static_cast<int>(Output::kFloat16) == static_cast<int>(DType::kFloat16),
              "a DType becomes an Output by its number");

// What a row of codes leaves over, x - scale * (u - zero_point), becomes the codes of a second row.
struct ResidualGrid {
  float scale;  // of the first row
  RowGrid grid;
};

// The optional steps of an epilogue; operands point to the group's first row, column 0.
struct EpilogueSteps {
  Activation activation;
  const void* other;
  int64_t ld_other;
  const void* residual;
  int64_t ld_residual;
  DType operand_type;
  float multiplier = 1.0f;  // after the activation
  float softcap = 0.0f;     // after the multiplier; 0: none
  RowGrid grid;             // Output::kCode: how v becomes a code, and the scale of each row, which
  float* code_scale;        // turns NaN where v is not finite
};

// From rows row .. rows - 1 of the sums c[rows, ldc], of which each `terms` add up to a row of y:
// its columns column .. column + columns - 1. Nothing else is stored.
struct EpilogueArgs {
  const int32_t* c;
  int64_t ldc;
  int row;  // a multiple of terms, as is rows
  int rows;
  int terms;  // 1 or 2
  const float* row_scale;
  const int32_t* row_zero_point;
  const std::byte* trailer;  // of the first strip
  int64_t strip_stride;
  void* y;          // the group's first row, column 0
  int64_t ldy;      // elements between rows; kCode: bytes between tiles
  int64_t y_block;  // kCode: bytes between blocks of kBlockRows rows
  int64_t column;
  int64_t columns;
  const EpilogueSteps* steps;  // null: dequantize only; never null for kCode
};

// c[rows, 16 * strips] (+)= u[rows, 64 * k_blocks] * W strips, int32, c's rows 16 * strips apart.
// While it computes, the kernel asks for what will be read next: `prefetch_lines` cache lines for
// every quarter of a k block, from `prefetch` on.
struct TileArgs {
  const uint8_t* u;  // the group's first row in its first tile; rows of a block 64 bytes apart
  int64_t u_tile;    // bytes from a tile to the next one of the block
  int64_t u_block;   // bytes from a block to the next; groups of up to 16 rows lie in one block
  const std::byte* strip;  // first strip
  int64_t strip_stride;    // bytes
  int64_t k_blocks;
  int rows;    // 1 .. Microkernel::rows
  int strips;  // 1 .. Microkernel::strips
  bool accumulate;
  int32_t* c;  // 64-byte aligned
  const std::byte* prefetch;
  int prefetch_lines;
  // An epilogue to work on between products, where another unit computes those; may be null. The
  // kernel moves its `row` on.
  EpilogueArgs* waiting;
  void (*epilogue)(const EpilogueArgs&);
  TaskState* state;
};

// Where the panel of weights in use should stay while groups of rows pass by.
enum class PanelHome { kL1, kL2 };

struct Microkernel {
  const char* name;
  Isa isa;
  int rows;      // MR: most rows a call takes; beyond kBlockRows, whole blocks
  int strips;    // NR / 16: most strips a call takes
  int max_code;  // largest u for which it is exact
  int from_m;    // fewest rows of the whole product for which it is preferred
  PanelHome home;
  bool overlaps_epilogue;  // it works on TileArgs::waiting
  void (*run)(const TileArgs&);
  void (*begin)(TaskState&);  // at the start and the end of each thread's task; may be null
  void (*end)(TaskState&);
};

// The largest MR and NR of all rows of the table (dispatch.cc checks them).
constexpr int kMaxRows = 32;
constexpr int kMaxColumns = 64;

// A strip of weights and up to kBlockRows rows of codes of one block, as in TileArgs.
struct PairArgs {
  const uint8_t* u;
  int64_t u_tile;
  const std::byte* strip;
  int64_t k_blocks;
  int rows;
};

// Weights, or a right operand of batched_matmul(), to pack into ceil(n / 16) strips: tiles, and
// column sums if asked for. The rest of the trailers is the caller's.
struct StripArgs {
  const int8_t* w;
  int64_t ld;  // bytes between rows
  int64_t n;
  int64_t k;
  std::byte* packed;
  bool column_sums;  // else zeros
};

// The softmax of some query rows over a page of keys (attention.h). `panel` columns of the sums
// come from one call of the microkernel; those of the next are panel_stride elements on.
struct PageWeights {
  const void* sums;  // q's codes times the keys', int32; of bf16 pages fp32
  int64_t panel;
  int64_t panel_stride;
  int rows;
  const float* q_scale;  // [rows]; also turns e into 2
  const float* key_scale;
  const float* value_scale;
  const int32_t* key_offset;  // of codes only
  const int32_t* first;       // [rows]: the page's keys first .. last - 1 are visible
  const int32_t* last;
  float cap;              // 0: none
  const float* slope;     // [rows], or null
  const float* distance;  // [rows]: of the page's first key from the query
  float* most;            // [rows]: m, l of the softmax so far
  float* total;
  float* carry;   // [rows]: what the sums of values so far are multiplied by
  float* unit;    // [rows]: of the codes
  void* weights;  // [rows, kPageTokens]: u8 codes; of bf16 pages fp32
};

struct ValueSums {
  const int32_t* sums;  // as in PageWeights: codes times the values'
  int64_t panel;
  int64_t panel_stride;
  int rows;
  int64_t columns;
  const float* carry;
  const float* unit;
  float* o;
  int64_t ldo;
};

// Some query rows times the keys of a bf16 page, as it lies.
struct KeyProducts {
  const float* q;  // [rows, head_dim], rows ldq apart
  int64_t ldq;
  int rows;
  const void* keys;
  int64_t head_dim;
  float* sums;  // [rows, kPageTokens]
};

// o = o * carry + weights times the values of a bf16 page, as it lies.
struct ValueProducts {
  const float* weights;  // [rows, kPageTokens]
  const int32_t* first;  // as in PageWeights
  const int32_t* last;
  const void* values;
  int rows;
  int64_t columns;  // a multiple of kStripColumns
  const float* carry;
  float* o;
  int64_t ldo;
};

// m, l and o of a row.
struct SoftmaxRow {
  float* most;
  float* total;
  float* o;
};

// program.h defines these.
struct NormArgs {
  const float* x;  // [k]
  int64_t k;
  const float* weight;  // [k], or null
  const float* bias;    // [k], or null
  bool centred;         // a layer norm
  float eps;
  bool sum;  // the result is added to what y holds
  float* y;
};

struct RopeArgs {
  const float* x;  // [k]; may be y
  int64_t k;
  const float* table;  // cos [rotated], sin [rotated]
  int64_t rotated;
  bool interleaved;
  float* y;
};

struct ColumnArgs {
  const float* x;
  const int64_t* columns;  // [count]
  int64_t count;
  const float* weight;  // [count, n], rows ldw apart
  int64_t ldw;
  int64_t n;
  bool accumulate;
  float* y;
};

// y = steps(x W^T + bias), of a weight in float.
struct FloatProductArgs {
  const float* x;  // rows ldx apart
  int64_t ldx;
  int64_t rows;
  const void* weight;  // [columns, k]
  int64_t k;
  int64_t columns;
  const float* bias;           // [columns], or null
  const EpilogueSteps* steps;  // operands at row 0, column 0; or null
  float* y;
  int64_t ldy;
};

// A row of packed weights: column `column` of a strip.
struct WeightRow {
  const std::byte* strip;
  int64_t column;
  int64_t k;
  float scale;
  const float* inverse_smoothing;  // [k], or null
};

struct HighestLogit {
  int64_t index;  // the first of equals
  float value;
  bool finite;  // whether all are
};

constexpr int64_t kLogitBlock = 1024;  // logits whose weights are summed as one

// w[n] = 2^((x - highest) * scale), 0 where that is below 2^-126 or `least`; and the sum of each
// kLogitBlock of them.
struct LogitWeights {
  const float* x;
  int64_t n;
  float highest;
  float scale;
  float least;
  float* w;
  float* sums;
};

// What is beside the product, compiled once per vector width from rows.h, count_saturated.h,
// strips.h, softmax.h, page_products.h, norm.h, hadamard.h, float_product.h and sample.h.
struct RowKernels {
  RowStats (*stats[kDTypes])(const RowArgs&);  // by DType of x
  // By DType of x; tiles of the row's block are u_tile bytes apart.
  void (*quantize[kDTypes])(const RowArgs&, const RowGrid&, uint8_t* u, int64_t u_tile);
  // The same, and the statistics, in one pass.
  RowStats (*quantize_measured[kDTypes])(const RowArgs&, const RowGrid&, uint8_t* u,
                                         int64_t u_tile);
  // The same with the codes of a second term, which are the next row of the block.
  void (*quantize_twice[kDTypes])(const RowArgs&, const RowGrid&, const ResidualGrid&, uint8_t* u,
                                  int64_t u_tile);
  void (*epilogue[kOutputs])(const EpilogueArgs&);
  // The pairs of all products whose sum leaves int16.
  int64_t (*count_saturated)(const PairArgs&);
  void (*pack_nk)(const StripArgs&);                       // w is [n, k]
  void (*pack_kn)(const StripArgs&);                       // w is [k, n]
  void (*weight_row[kDTypes])(const WeightRow&, void* y);  // by DType of y
  // Writes the k bytes of x, each xor `flip`, as a row of codes in tiles u_tile bytes apart.
  // Returns the union of the bits of 8 codes at a time.
  uint64_t (*arrange)(const void* x, int64_t k, uint8_t flip, uint8_t* u, int64_t u_tile);
  // By DType of x: each `size` elements, a power of two, times the Hadamard matrix of ones and
  // minus ones, and times `factor`, a power of two. A last block is padded with zeros. `out` has
  // room for whole blocks and whole vectors of 16.
  void (*rotate[kDTypes])(const RowArgs&, int64_t size, float factor, float* out);
  void (*weigh)(const PageWeights&);
  void (*gather_values)(const ValueSums&);
  // The same of bf16 pages.
  void (*multiply_keys)(const KeyProducts&);
  void (*weigh_floats)(const PageWeights&);
  void (*add_values)(const ValueProducts&);
  // Joins another softmax's row; `columns` of o.
  void (*merge)(const SoftmaxRow& to, const SoftmaxRow& from, int64_t columns);
  void (*finish_row[kDTypes])(const SoftmaxRow&, int64_t columns, void* y);
  void (*multiply_floats[kDTypes])(const FloatProductArgs&);  // by DType of the weight
  void (*normalize)(const NormArgs&);
  void (*softmax_row)(const float* x, int64_t n, float* p);
  // y += weight * x, or sigmoid(weight) * x.
  void (*add_scaled)(const float* x, int64_t n, float weight, bool gate, float* y);
  void (*rotate_positions)(const RopeArgs&);
  void (*add_columns)(const ColumnArgs&);
  void (*widen_row[kDTypes])(const void* x, int64_t k, float multiplier, float* y);
  HighestLogit (*highest_logit)(const float* x, int64_t n);
  void (*weigh_logits)(const LogitWeights&);
};

// What the table says of a microkernel, for its own file to check: MR, and NR in strips.
template <int kMR, int kNRStrips>
struct RegisterBlock {
  static constexpr int kRows = kMR;
  static constexpr int kStrips = kNRStrips;
};

#define SQ_MICROKERNEL(isa, name, rows, strips, ...) \
  void name(const TileArgs&);                        \
  using name##_block = RegisterBlock<rows, strips>;
#define SQ_ROW_KERNELS(isa, name) extern const RowKernels name;
#include "kernels.inc"
#undef SQ_MICROKERNEL
#undef SQ_ROW_KERNELS

void amx_begin(TaskState&);
void amx_end(TaskState&);

}  // namespace sq_cpu
