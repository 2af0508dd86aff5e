// A decoder's forward as data: stages that run one after another in one parallel region.
//
//   embed     x[m, d] = table[id] * multiplier, or that row of a packed weight (gather_rows())
//   position  x += table[position + offset]
//   project   codes = quantize(norm(x)), once for all of its linears; each of them
//             y[m, column ..] (+)= cap(activation(codes W^T + bias) * multiplier) * other
//             or the same with norm(x) and a weight in float
//   attend    q and k of a projection: norm per head, rotary embedding, append() to the cache;
//             o[m, heads * head_dim] = attention()
//   merge     x += norm(y), where a norm follows a block (Gemma 2)
//   norm      x = norm(x): of some columns, in place
//
// A buffer is fp32 [rows, width]; a stage reads some and writes others. Between stages all threads
// wait for each other, and nowhere else but where a comment says so.
//
// Arithmetic: that of linear.h and attention.h, and for a row of n elements, in fp32,
//   rms    y = x * r * w,             r = 1 / sqrt(sum x^2 / n + eps)
//   layer  y = (x - mean) * r * w + b, r = 1 / sqrt(sum (x - mean)^2 / n + eps)
//   rotary y[i] = x[i] * cos[i] + x[partner of i] * sin[i], whose sign is in the table
//   cap    y = softcap * tanh(x / softcap), to 2^-22 of softcap
// where sums go through 32 virtual lanes and a fixed tree; products with weights in float through
// 16. The same bits on every ISA, for any thread count, any batch and any way to cut a prompt into
// calls.
#pragma once

#include <cstdint>
#include <memory>

#include "sq_cpu/attention.h"
#include "sq_cpu/linear.h"

namespace sq_cpu {

using Buffer = int;
constexpr Buffer kNoBuffer = -1;

struct Norm {
  enum class Kind { kNone, kRms, kLayer };
  Kind kind = Kind::kNone;
  const float* weight = nullptr;  // [n]; null: ones
  const float* bias = nullptr;    // [n]; null: zeros
  float eps = 0.0f;
};

struct EmbedStage {
  const void* table;  // [vocabulary, width of out]
  DType type;
  int64_t vocabulary;
  float multiplier;
  Buffer out;
};

struct PackedEmbedStage {
  PackedWeight weight;
  const float* inverse_smoothing;  // [width of out], or null
  float multiplier;
  Buffer out;
};

struct PositionStage {
  const float* table;  // [count, width of out]
  int64_t count;
  int64_t offset;  // of position 0
  Buffer out;
};

// Input channels that stay in float (LLM.int8(), arXiv 2208.07339): y += x[columns] W_o^T. What the
// quantizer makes of them meets a weight of 0.
struct FloatColumns {
  int64_t count = 0;
  const int64_t* columns = nullptr;  // [count]
  const float* weight = nullptr;     // [count, n]
};

// A weight that is not quantized, row after row.
struct FloatWeight {
  const void* data = nullptr;  // [n, k]
  DType type = DType::kFloat32;
  const float* bias = nullptr;  // [n], or null
};

struct ProjectedLinear {
  PackedWeight weight;  // of a weight in float: n and k alone
  Buffer out;
  int64_t column = 0;  // of out
  Activation activation = Activation::kNone;
  Buffer other = kNoBuffer;  // multiplied, column `column`: an earlier stage writes it, or the
                             // linear before, of the same shape
  bool accumulate = false;   // y is added to what out holds
  FloatColumns float_columns = {};  // added to all else
  float multiplier = 1.0f;
  float softcap = 0.0f;       // 0: none
  FloatWeight in_float = {};  // null: the weight is packed
};

constexpr int kMostLinears = 8;  // of a stage

struct ProjectStage {
  Buffer in;
  int64_t column = 0;  // of in
  Norm norm;
  ActivationQuantizer quantizer;   // not per tensor; not read where weights are in float
  bool kept_rows = false;          // of the step's kept rows alone: a head
  const ProjectedLinear* linears;  // all packed, or all in float
  int count;
};

struct AttendStage {
  Buffer in;
  int64_t q, k, v;  // columns of in
  int64_t heads;
  Norm q_norm, k_norm;  // over a head
  int rotary = -1;      // of Step.rotaries; none
  int cache;            // of Step.caches
  int64_t kv_heads, head_dim;
  AttentionOptions options;
  Buffer out;
  // Columns from a kv head's part, [its q heads, k, v], to the next one's, as GPT-NeoX has them.
  // 0: heads of q, of k and of v follow one another.
  int64_t stride = 0;
};

struct MergeStage {
  Buffer in;
  Norm norm;
  Buffer out;
};

struct NormStage {
  Buffer buffer;
  int64_t column, columns;
  Norm norm;
};

struct Rotary {
  const float* table;  // [positions, 2, rotated]: cos and sin of each channel
  int64_t positions;
  int64_t rotated;   // channels, even; the others stay
  bool interleaved;  // channel i's partner is i ^ 1; else i +- rotated / 2
};

struct Step {
  const int64_t* ids;        // [rows]
  const int64_t* positions;  // [rows]: of the rotary tables, and of learned positions
  Sequences sequences;       // rows are their new tokens
  const KvCache* caches;
  int cache_count;
  const int32_t* const* tables;  // [cache_count]: each cache's; null: sequences.table
  const Rotary* rotaries;
  int rotary_count;
  const int64_t* kept;  // [kept_count], ascending: rows whose result is wanted
  int64_t kept_count;
  float* result;  // [kept_count, width of the result]
};

// Stages are added in their order; each add() checks, throws std::invalid_argument, and keeps the
// pointers, not what they point to.
class Program {
 public:
  Program();
  ~Program();
  Program(const Program&) = delete;

  Buffer buffer(int64_t width);
  void add(const EmbedStage& stage);
  void add(const PackedEmbedStage& stage);
  void add(const PositionStage& stage);
  void add(const ProjectStage& stage);
  void add(const AttendStage& stage);
  void add(const MergeStage& stage);
  void add(const NormStage& stage);
  void set_result(Buffer buffer);  // what step.result gets of the kept rows

  // Not from two threads at once. `threads`: of the pool, at most; 0: all.
  void run(const Step& step, int threads = 0);

 private:
  struct Implementation;
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace sq_cpu
