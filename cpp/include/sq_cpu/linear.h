// The int8 linear layer: y = epilogue(dequantize(quantize(x) * W^T) + bias), in one call or in two.
//
//   x  [m, k]  fp32 | bf16 | fp16, rows ldx elements apart   -> u8, per row: scale and zero point
//   W  [n, k]  s8, one fp32 scale per row; packed once by pack_weight()
//   y  [m, n]  fp32 | bf16 | fp16, rows ldy elements apart   (or u8 codes for the next int8 layer)
//
// Arithmetic, the same bits on every ISA, thread count and blocking:
//   x[m,k] = x * inverse_smoothing, then rotated    (each optional, see ActivationQuantizer; fp32)
//   u[m,k] = clamp(rne(x * inv_scale), lo - zp, hi - zp) + zp
//   t[m,n] = sum_k u * w - zp * colsum[n]                       (int32)
//   v[m,n] = fma(float(t), row_scale[m] * weight_scale[n], bias[n])                 (fp32)
//   y[m,n] = activation(v) * other[m,n] + residual[m,n]   each step in fp32 and optional, then
//            rounded once to y's type (RNE)
// With two terms (ActivationQuantizer::terms) a row of x is two rows of codes, the second those of
// what the first leaves over, and both are added up: 15 bits of x for twice the products.
//   r[m,k] = fma(-row_scale[2m], u[2m,k] - zp, x)    quantized by row_scale[2m] / 254, or / 126
//   v[m,n] = fma(float(t[2m,n]), row_scale[2m] * weight_scale[n],
//                fma(float(t[2m+1,n]), row_scale[2m+1] * weight_scale[n], bias[n]))
// A row of zeros gives v = bias. A row that holds NaN or Inf gives NaN in that row only. An
// absolute maximum below 1e-30 counts as 1e-30.
//
// Pointers need no alignment (64 bytes is fastest). Inputs and outputs must not overlap. Every
// function may be called from several threads at once and runs on the caller's OpenMP threads,
// alone when it is called inside a parallel region. Denormal numbers count, whatever the caller's
// floating-point mode; in a forked child each call runs alone, as the pool's threads stayed behind.
// Errors: std::invalid_argument on bad arguments, whose message names them (null, a size that is
// negative or more than 2^48 bytes, an enum without such a value; addresses are believed);
// std::runtime_error where SQ_CPU_ISA cannot be met; std::bad_alloc.
//
// Memory: each calling thread keeps the workspace of its calls for the next ones and frees it when
// it ends. That grows to the largest call: codes of x, up to 32 MB and 8 bytes a row, and for each
// worker 4 or 8 KB of int32 sums; where k is cut into blocks, up to 75 KB or a quarter of L2; where
// rows are rotated, one in fp32 for each thread of the pool. A
// worker keeps 16 KB of its own for codes that each makes for itself.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace sq_cpu {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Packed weights. Strips of 16 output columns, each one sequential stream:
//
//   strip s = columns 16s .. 16s+15; kb = ceil(k / 64) tiles of 1 KB, then a trailer of 192 bytes
//   +--------------------------------------------+--------------+-------------+------------+
//   | tile 0 | tile 1 | ... | tile kb-1          | colsum 16xi32 | scale 16xf32 | bias 16xf32 |
//   +--------------------------------------------+--------------+-------------+------------+
//   tile: 16 rows of 64 bytes; byte (g, c, i) at 64g + 4c + i holds W[16s + c][64b + 4g + i]
//
// One tile row is one operand of VPDPBUSD (16 columns x 4 k), one tile is one B tile of AMX. Rows
// of W beyond n and columns beyond k are zero. The trailer also keeps strips off power-of-two
// strides, which would map them all to the same cache sets.
constexpr int64_t kStripColumns = 16;
constexpr int64_t kTileDepth = 64;
constexpr int64_t kTileBytes = kStripColumns * kTileDepth;
constexpr int64_t kTrailerBytes = 3 * kStripColumns * 4;

// Largest k whose int32 accumulator cannot overflow for any u8 x s8 data: (2^31 - 1) / (255 * 128).
constexpr int64_t kMaxDepth = 65793;

struct PackedWeight {
  const std::byte* data;  // packed_bytes(n, k) bytes
  int64_t n;
  int64_t k;
};

int64_t packed_bytes(int64_t n, int64_t k);

// weight: s8 [n, k] row-major; scale: fp32 [n]; bias: fp32 [n] or null (zeros). Writes
// packed_bytes(n, k) bytes to `packed`. Throws on k > kMaxDepth.
void pack_weight(const int8_t* weight, const float* scale, const float* bias, int64_t n, int64_t k,
                 std::byte* packed);

// The exact inverse; null outputs are skipped.
void unpack_weight(const PackedWeight& packed, int8_t* weight, float* scale, float* bias);

// Rows of W as floats, for an embedding that shares its weight with the head of a model:
//   y[i,j] = W[ids[i], j] * scale[ids[i]] * inverse_smoothing[j]
// each product in fp32, rounded once to y's type. inverse_smoothing: fp32 [k], or null for ones.
// Throws for an id that is not 0 .. n - 1, with y unspecified.
void gather_rows(const PackedWeight& weight, const int64_t* ids, int64_t count,
                 const float* inverse_smoothing, void* y, DType y_type, int64_t ldy);

// Quantized activations. Blocks of H = min(16, m) rows, each one sequential stream of tiles:
//
//   block r = rows Hr .. Hr+H-1; kb = ceil(k / 64) tiles of H rows x 64 bytes
//   byte (row i, column j) of tile b at 64i + j holds the code of x[Hr + i][64b + j]
//
// A tile is one A tile of AMX. Codes beyond k, and rows beyond m of the last block, may hold
// anything: the weights they meet are zero (or rotated, as the codes are), the rows are never read.
constexpr int64_t kBlockRows = 16;

struct QuantizedActivation {
  uint8_t* codes;       // codes_bytes(m, k) bytes
  float* scale;         // [m]
  int32_t* zero_point;  // [m]; row i stands for (codes - zero_point[i]) * scale[i]
  int64_t m;
  int64_t k;
  int max_code;   // the largest code there is: 255, or 127 with reduce_range
  int terms = 1;  // 1 or 2: so many rows that follow each other add up to one of x
};

int64_t codes_bytes(int64_t m, int64_t k);

enum class Granularity { kPerToken, kPerTensor, kStatic };

// Rows that a static quantizer met. A row clips where a code would lie beyond the grid, and
// underflows where its codes span less than an eighth of it: the largest is below 16 of 128 (8 of
// 64), or the distance of an asymmetric row's below 32 of 256 (16 of 128). A row of zeros and one
// that is not finite do neither.
struct RowCounts {
  int64_t rows = 0;  // those that are not chained
  int64_t clipped = 0;
  int64_t underflowed = 0;
  int64_t chained = 0;  // codes that a product wrote, which sees parts of a row: nobody looked

  RowCounts& operator+=(const RowCounts& more) {
    rows += more.rows;
    clipped += more.clipped;
    underflowed += more.underflowed;
    chained += more.chained;
    return *this;
  }
};

// Counts of a layer, by any number of threads at once: each worker of a team has a line of its own.
class RowCounter {
 public:
  void add(const RowCounts& counts, int worker) {
    Line& line = lines_[worker % kLines];
    const auto count = [](std::atomic<int64_t>& sum, int64_t more) {
      if (more != 0) sum.fetch_add(more, std::memory_order_relaxed);
    };
    count(line.rows, counts.rows);
    count(line.clipped, counts.clipped);
    count(line.underflowed, counts.underflowed);
    count(line.chained, counts.chained);
  }
  RowCounts read() const {
    return sum(lines_, [](const auto& count) { return count.load(std::memory_order_relaxed); });
  }
  // Returns what it held; no row is lost between both.
  RowCounts reset() {
    return sum(lines_, [](auto& count) { return count.exchange(0, std::memory_order_relaxed); });
  }

 private:
  static constexpr int kLines = 16;
  struct alignas(64) Line {
    std::atomic<int64_t> rows{0}, clipped{0}, underflowed{0}, chained{0};
  };
  template <typename Lines, typename Take>
  static RowCounts sum(Lines& lines, Take take) {
    RowCounts all;
    for (auto& line : lines) {
      all += {take(line.rows), take(line.clipped), take(line.underflowed), take(line.chained)};
    }
    return all;
  }
  Line lines_[kLines];
};

// How activations become u8. Symmetric: zero point 128, |q| <= 127; asymmetric: the range extended
// to hold 0, zero point and codes in 0..255. reduce_range halves both grids (64, 63; 0..127), which
// vpmaddubsw needs in order not to saturate.
struct ActivationQuantizer {
  Granularity granularity = Granularity::kPerToken;
  bool symmetric = true;
  bool reduce_range = false;
  int terms = 1;           // 2: a second row of symmetric codes holds what the first leaves over
  float scale = 0.0f;      // kStatic only: > 0 and finite
  int32_t zero_point = 0;  // kStatic only: within the grid
  // fp32 [k] or null. x is multiplied by it first, in fp32: 1 / s, the reciprocal of the smoothing
  // scale (SmoothQuant, arXiv 2211.10438, eq. 3), where s cannot be folded into another layer. A
  // product that overflows makes its row one that is not finite.
  const float* inverse_smoothing = nullptr;
  // 0, or 64: each 64 columns are then multiplied by the orthonormal Hadamard matrix, which spreads
  // an outlier over them (QuaRot, arXiv 2404.00456): butterflies a + b, a - b at strides 1, 2, 4,
  // .. 32, then times 1/8, in fp32. The last columns are padded with zeros, so that codes are of k
  // rounded up to 64 columns. They take a weight of so many columns, W diag(s) rotated alike, which
  // fills whole tiles; where a function takes or makes them, k stands for either.
  int hadamard = 0;
  // kStatic only: a row that clips or underflows (RowCounts) gets the scale and zero point that
  // kPerToken gives it. Codes that a product writes for the next layer cannot: they are static.
  bool dynamic_fallback = false;
  RowCounter* counter = nullptr;  // kStatic only: where rows are counted, or null

  int max_code() const { return reduce_range ? 127 : 255; }
};

enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// What follows the dequantized sum, in this order. `other` and `residual` are [m, n] of
// operand_type, rows ld elements apart; null leaves the step out.
struct Epilogue {
  Activation activation = Activation::kNone;
  const void* other = nullptr;  // multiplied: SiLU(gate) * up
  int64_t ld_other = 0;
  const void* residual = nullptr;  // added
  int64_t ld_residual = 0;
  DType operand_type = DType::kFloat32;
};

// x is read, y written; both may be null when m == 0. k == 0 gives v = bias.
void linear(const void* x, DType x_type, int64_t m, int64_t ldx, const PackedWeight& weight,
            const ActivationQuantizer& quantizer, void* y, DType y_type, int64_t ldy,
            const Epilogue& epilogue = {});

// The first half alone: one quantized activation can feed several linears (q, k, v; gate, up).
// Writes out's three arrays; the rest is the caller's. x has out.m / out.terms rows.
void quantize_activations(const void* x, DType x_type, int64_t ldx,
                          const ActivationQuantizer& quantizer, const QuantizedActivation& out);

// The second half alone: linear() of what quantize_activations() gave, bit for bit.
void linear(const QuantizedActivation& x, const PackedWeight& weight, void* y, DType y_type,
            int64_t ldy, const Epilogue& epilogue = {});

// The second half with int8 out, so that int8 layers chain (the paper's W8A8B8O8): y becomes u8 by
// y_quantizer, which must be kStatic, of one term, without smoothing and not rotated. Writes y's
// three arrays; y is [x.m / x.terms, weight.n]. Its rows are chained: none gets its own scale.
// Where a row's value before quantization is not finite, y.scale is NaN.
void linear(const QuantizedActivation& x, const PackedWeight& weight,
            const ActivationQuantizer& y_quantizer, const QuantizedActivation& y,
            const Epilogue& epilogue = {});

// The integers t of each row of codes, [x.m, n]; scales are not read and x.scale may be null.
void gemm(const QuantizedActivation& x, const PackedWeight& weight, int32_t* y, int64_t ldy);

}  // namespace sq_cpu
