// append(), and the checks of a cache.
#include "kv_page.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "blocking.h"
#include "check.h"
#include "dispatch.h"
#include "operands.h"
#include "scratch.h"
#include "team.h"

namespace sq_cpu {
namespace {

template <typename T>
void put(std::byte* page, int64_t offset, int64_t index, T value) {
  std::memcpy(page + offset + index * int64_t{sizeof(T)}, &value, sizeof value);
}

// Codes of which 128 is 0 become s8; what pads the depth is 0.
void put_key(std::byte* page, const PageLayout& layout, int64_t slot, uint8_t* u, int64_t head_dim,
             float scale) {
  const int64_t depth = layout.depth_tiles * kTileDepth;
  std::memset(u + head_dim, 0x80, depth - head_dim);
  int32_t sum = 0;
  for (int64_t c = 0; c < depth; ++c) {
    u[c] ^= 0x80;
    sum += static_cast<int8_t>(u[c]);
  }
  std::byte* const column =
      page + slot / kStripColumns * layout.key_strip + slot % kStripColumns * 4;
  for (int64_t c = 0; c < depth; c += 4) std::memcpy(column + c * kStripColumns, u + c, 4);
  put(page, layout.key_scale, slot, scale);
  put(page, layout.key_offset, slot, 128 * sum);
}

void put_value(std::byte* page, const PageLayout& layout, int64_t slot, const uint8_t* u,
               int64_t head_dim, float scale) {
  std::byte* tile = page + layout.values + slot / 4 * 64 + slot % 4;
  for (int64_t c = 0; c < head_dim; tile += kTileBytes) {
    for (const int64_t end = std::min(c + kStripColumns, head_dim); c < end; ++c) {
      tile[c % kStripColumns * 4] = std::byte(u[c] ^ 0x80);
    }
  }
  put(page, layout.value_scale, slot, scale);
}

// To the nearest, of two equally near ones the even; NaN becomes anything.
uint16_t to_bfloat16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

void put_floats(std::byte* page, const PageLayout& layout, int64_t slot, const float* key,
                const float* value, int64_t head_dim) {
  std::byte* const strip = page + slot / kStripColumns * layout.key_strip;
  for (int64_t c = 0; c < head_dim; ++c) {
    put(strip, 0, c * kStripColumns + slot % kStripColumns, to_bfloat16(key[c]));
    std::byte* const tile = page + layout.values + c / kStripColumns * layout.value_tile;
    put(tile, 0, slot * kStripColumns + c % kStripColumns, to_bfloat16(value[c]));
  }
}

// The pages that a sequence's new tokens lie in, as indices into its table.
Range written(const Sequences& sequences, int64_t i) {
  const int64_t end = sequences.length[i], begin = end - new_tokens(sequences, i);
  return {begin / kPageTokens, begin < end ? ceil_div(end, kPageTokens) : begin / kPageTokens};
}

}  // namespace

void check_cache(const KvCache& cache, const Sequences& sequences) {
  SQ_CHECK(cache.kv_heads > 0 && cache.page_count >= 0, "the cache has ", cache.page_count,
           " pages of ", cache.kv_heads, " kv heads");
  SQ_CHECK(bounded_product(cache.page_count, cache.kv_heads,
                           page_bytes(cache.head_dim, cache.type)) <= kMostBytes,
           "a cache of ", cache.page_count, " pages of ", cache.kv_heads,
           " kv heads is more than any machine has");
  SQ_CHECK(reinterpret_cast<uintptr_t>(cache.pages) % 64 == 0,
           "cache.pages begins within 64 bytes: align it");
  SQ_CHECK(sequences.count >= 0 && sequences.table_stride >= 0, sequences.count, " sequences of ",
           sequences.table_stride, " pages");
  if (sequences.count == 0) return;
  SQ_CHECK(bounded_product(sequences.count, std::max<int64_t>(sequences.table_stride, 1),
                           int64_t{sizeof(int64_t)}) < kMostBytes,
           sequences.count, " sequences of ", sequences.table_stride,
           " pages are more than any machine has");
  SQ_CHECK(sequences.first_row != nullptr && sequences.length != nullptr,
           "sequences.first_row or .length is null");
  SQ_CHECK(sequences.first_row[0] == 0, "the first sequence begins with row ",
           sequences.first_row[0]);
  for (int64_t i = 0; i < sequences.count; ++i) {
    const int64_t begin = sequences.first_row[i], end = sequences.first_row[i + 1];
    SQ_CHECK(begin <= end, "sequence ", i, " begins with row ", begin, ", the next one with ", end);
    const int64_t length = sequences.length[i];
    SQ_CHECK(end - begin <= length, "sequence ", i, " of ", length, " tokens has ", end - begin,
             " new ones");
    SQ_CHECK(length <= sequences.table_stride * kPageTokens, "sequence ", i, " of ", length,
             " tokens has only ", sequences.table_stride, " pages");
    SQ_CHECK(length == 0 || (sequences.table != nullptr && cache.pages != nullptr),
             "sequences.table or cache.pages is null");
    for (int64_t j = 0; j * kPageTokens < length; ++j) {
      const int64_t page = sequences.table[i * sequences.table_stride + j];
      SQ_CHECK(page >= 0 && page < cache.page_count, "sequence ", i, " has page ", page,
               " of a cache of ", cache.page_count);
    }
  }
}

// Two threads that write one page would leave parts of either's tokens.
void check_written_once(const Sequences& sequences) {
  std::vector<int32_t> pages;
  for (int64_t i = 0; i < sequences.count; ++i) {
    const int32_t* const table = sequences.table + i * sequences.table_stride;
    const Range range = written(sequences, i);
    pages.insert(pages.end(), table + range.begin, table + range.end);
  }
  std::sort(pages.begin(), pages.end());
  const auto twice = std::adjacent_find(pages.begin(), pages.end());
  SQ_CHECK(twice == pages.end(), "append: page ", twice == pages.end() ? -1 : *twice,
           " is written for more than one part of the sequences");
}

void check_heads(const char* name, const HeadRows& x, int64_t rows, int64_t heads,
                 int64_t head_dim) {
  check_dtype(name, x.type);
  SQ_CHECK(bounded_product(rows, heads, head_dim, int64_t{sizeof(float)}) <= kMostBytes, name,
           " of ", rows, " rows of ", heads, " heads is more than any machine has");
  SQ_CHECK(x.data != nullptr || rows == 0, name, " is null");
  check_reach("attention", name,
              std::array<Steps, 2>{{{x.row_stride, rows}, {x.head_stride, heads}}});
}

int64_t page_bytes(int64_t head_dim, KvType type) {
  SQ_CHECK(head_dim > 0 && head_dim <= kMaxHeadDim, "a head of ", head_dim, "; it has 1 .. ",
           kMaxHeadDim);
  SQ_CHECK(is_one_of(type, KvType::kBFloat16), "unknown KvType ", static_cast<int>(type));
  return PageLayout(head_dim, type).bytes;
}

int64_t append_workspace(int64_t head_dim) {
  return whole_lines((head_floats(head_dim) + 2 * whole_vectors(head_dim)) * 4);
}

void append_pages(const AppendArgs& args, const RowKernels& kernels, std::byte* workspace,
                  int worker, int workers) {
  const Sequences& sequences = args.sequences;
  int64_t turn = 0;  // by whole pages: no two threads write into one
  for (int64_t i = 0; i < sequences.count; ++i) {
    const Range pages = written(sequences, i);
    for (int64_t page = pages.begin; page < pages.end; ++page) {
      for (int64_t head = 0; head < args.cache.kv_heads; ++head) {
        if (turn++ % workers == worker) append_page(args, kernels, workspace, i, page, head);
      }
    }
  }
}

void append_page(const AppendArgs& args, const RowKernels& kernels, std::byte* workspace,
                 int64_t sequence, int64_t page, int64_t head) {
  const Sequences& sequences = args.sequences;
  const int64_t head_dim = args.cache.head_dim;
  const PageLayout layout(head_dim, args.cache.type);
  auto* const floats = reinterpret_cast<float*>(workspace);
  float* const key = floats + head_floats(head_dim);
  float* const value = key + whole_vectors(head_dim);
  auto* const u = reinterpret_cast<uint8_t*>(key);  // codes of either, in their place
  const HeadCoder coder(head_dim, kernels, floats);
  const int64_t end = sequences.length[sequence], begin = end - new_tokens(sequences, sequence);
  std::byte* const at = page_of(args.cache, sequences, layout, sequence, page * kPageTokens, head);
  const int64_t last = std::min((page + 1) * kPageTokens, end);
  for (int64_t token = std::max(begin, page * kPageTokens); token < last; ++token) {
    const int64_t row = sequences.first_row[sequence] + token - begin, slot = token % kPageTokens;
    if (token + 1 < last) {
      ask_for_head(args.k, args.transform, row + 1, head, head_dim);
      ask_for_head(args.v, {}, row + 1, head, head_dim);
    }
    if (args.cache.type == KvType::kBFloat16) {
      put(at, layout.key_scale, slot, coder.widen(args.k, args.transform, row, head, key));
      put(at, layout.value_scale, slot, coder.widen(args.v, {}, row, head, value));
      put_floats(at, layout, slot, key, value, head_dim);
      continue;
    }
    const float key_scale = coder.rotate(args.k, args.transform, row, head, u, kTileDepth);
    put_key(at, layout, slot, u, head_dim, key_scale);
    const float value_scale = coder.keep(args.v, row, head, u);
    put_value(at, layout, slot, u, head_dim, value_scale);
  }
}

void append(const KvCache& cache, const Sequences& sequences, const HeadRows& k,
            const HeadRows& v) {
  check_cache(cache, sequences);
  const int64_t rows = row_count(sequences);
  check_heads("k", k, rows, cache.kv_heads, cache.head_dim);
  check_heads("v", v, rows, cache.kv_heads, cache.head_dim);
  check_written_once(sequences);
  if (rows == 0) return;
  const AppendArgs args{cache, sequences, k, v, {}};
  const RowKernels& kernels = row_kernels(active_isa());
  const int64_t own_bytes = append_workspace(cache.head_dim);
  const int workers = worker_count(rows, cache.kv_heads, 8 * cache.head_dim);
  thread_local Scratch<std::byte> scratch;
  std::byte* const workspace = scratch.get(own_bytes * workers);
  run_team(workers, [&](int worker, int count) {
    append_pages(args, kernels, workspace + own_bytes * worker, worker, count);
  });
}

}  // namespace sq_cpu
