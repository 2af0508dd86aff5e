// Attention in int8 over a cache of keys and values that lies in pages.
//
//   append()     k, v  fp32 | bf16 | fp16  -> s8 in pages, one scale per token and kv head
//   attention()  y = softmax(scale * q k^T + ...) v over what the pages hold
//
// Arithmetic, for a query row, the same bits on every ISA, for any thread count, any batch, and any
// way to cut a prompt into calls:
//   q, k are multiplied by a Hadamard matrix, which leaves q k^T and evens out the channels
//   (QuaRot, arXiv 2404.00456, section 4), then rounded: 127 / max|x|, symmetric.
//   t[j] = sum_c q8[c] k8[j][c]                                                        (int32)
//   s[j] = t[j] * (q_scale * key_scale[j]), soft-capped, + slope * (j - position), for visible j
//   by pages of 64 keys, with the running maximum m' = max(m, max s) (arXiv 1805.02867):
//     p[j] = e^(s[j] - m');  l = l * e^(m - m') + sum p;  w[j] = p[j] * value_scale[j]
//     codes[j] = rne(w[j] * 255 / max w), u8: a scale for each row and page
//     o = o * e^(m - m') + (sum_j codes[j] v8[j]) * (max w / 255)
//   by chunks of 256 keys, which are merged in order; then y = o / l, rounded once to y's type.
// A layer whose keys int8 would spoil has pages of bf16. There q, k are not rotated and v is not
// scaled; q stays fp32, and p, and every sum is of fp32 products, one after another:
//   s[j] = sum_c q[c] k[j][c];  o = o * e^(m - m') + sum_j p[j] v[j]
// Pages of bf16 turn finite keys and values beyond bf16's range, 3.39e38, into Inf.
// e^x has a relative error of 2.9e-6, and is 2^-126 below that. A row that sees no key gives 0.
// NaN or Inf in a row of q makes that row of y NaN, and in a key or value every row that sees it.
//
// Memory, threads and errors: as linear.h says.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sq_cpu/linear.h"

namespace sq_cpu {

constexpr int64_t kPageTokens = 64;
constexpr int64_t kMaxHeadDim = 1024;  // q8 k8 sums stay exact in fp32: 127 * 127 * 1024 < 2^24

enum class KvType { kInt8, kBFloat16 };

// The cache of one layer: pages[page][kv head], each of page_bytes() bytes:
//
//   keys        4 strips of 16 tokens, ceil(head_dim / 64) tiles each; a tile as linear.h draws it
//               bf16: [4, head_dim, 16 tokens]
//   values      ceil(head_dim / 16) tiles, 16 channels wide and 64 tokens deep
//               bf16: [ceil(head_dim / 16), 64 tokens, 16 channels]
//   key_scale   fp32 [64]; bf16: 1, or NaN for a key that is not finite
//   value_scale fp32 [64]; bf16: likewise
//   key_offset  int32 [64]: 128 times the sum of a key's codes; bf16: not used
//
// Both are operands of the kernels as they lie. What no token has written may hold anything.
struct KvCache {
  std::byte* pages;  // 64-byte aligned
  int64_t page_count;
  int64_t kv_heads;
  int64_t head_dim;  // of keys and of values, 1 .. kMaxHeadDim
  KvType type = KvType::kInt8;
};

int64_t page_bytes(int64_t head_dim, KvType type = KvType::kInt8);

// The sequences of a call. Their new tokens lie one after another in q, k, v and y; sequence i has
// rows first_row[i] .. first_row[i + 1] - 1, which are its last ones.
struct Sequences {
  int64_t count;
  const int64_t* first_row;  // [count + 1], ascending from 0
  const int64_t* length;     // [count]: tokens, the new ones among them
  const int32_t* table;      // [count, table_stride]: token j lies in page table[j / 64]
  int64_t table_stride;
};

// Vectors of head_dim elements, [rows, heads]; strides count elements.
struct HeadRows {
  const void* data;
  DType type;
  int64_t row_stride;
  int64_t head_stride;
};

// Writes the keys and values of the new tokens. The pages of different sequences that are written
// must be different ones.
void append(const KvCache& cache, const Sequences& sequences, const HeadRows& k, const HeadRows& v);

struct AttentionOptions {
  float scale = 1.0f;             // of q k^T
  bool causal = true;             // a token sees those up to itself; else all of its sequence
  int64_t window = 0;             // of them the last so many; 0: all
  float softcap = 0.0f;           // s becomes softcap * tanh(s / softcap); 0: none
  const float* slopes = nullptr;  // [heads]: ALiBi (arXiv 2108.12409); null: none
  const float* sinks = nullptr;   // [heads]: a logit beside the keys', of no value; null: none
};

struct HeadResult {
  void* data;
  DType type;
  int64_t row_stride;
  int64_t head_stride;
};

// `heads` is a multiple of cache.kv_heads; the heads of a group follow one another.
void attention(const KvCache& cache, const Sequences& sequences, int64_t heads, const HeadRows& q,
               const AttentionOptions& options, const HeadResult& y);

}  // namespace sq_cpu
