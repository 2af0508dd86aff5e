// append() and attention(). A task is a kv head of a sequence, a block of query rows, and chunks of
// its keys. The query heads of a group are rows of one product, so a page is read once for all.
#include "sq_cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attend.h"
#include "blocking.h"
#include "check.h"
#include "dispatch.h"
#include "gemm.h"
#include "layout.h"
#include "quantize.h"
#include "scratch.h"
#include "team.h"

namespace sq_cpu {
namespace {

// Part of the result's bits: partial softmaxes over so many keys, at multiples of it, are merged.
constexpr int64_t kChunkTokens = 256;
constexpr int64_t kRowsOfTask = 32;  // two blocks of codes: what a call of AMX takes
static_assert(kChunkTokens % kPageTokens == 0);
constexpr double kLog2E = 1.4426950408889634;
constexpr float kNoKey = -std::numeric_limits<float>::infinity();
constexpr ActivationQuantizer kQuantizer;  // per row, symmetric

// Where the parts of a page lie.
struct PageLayout {
  explicit PageLayout(int64_t head_dim)
      : depth_tiles(k_block_count(head_dim)),
        value_tiles(strip_count(head_dim)),
        key_strip(depth_tiles * kTileBytes),
        values(kPageTokens / kStripColumns * key_strip),
        key_scale(values + value_tiles * kTileBytes),
        value_scale(key_scale + kPageTokens * int64_t{sizeof(float)}),
        key_offset(value_scale + kPageTokens * int64_t{sizeof(float)}),
        bytes(key_offset + kPageTokens * int64_t{sizeof(int32_t)}) {}
  const int64_t depth_tiles;
  const int64_t value_tiles;
  const int64_t key_strip;                                   // bytes of a strip of keys
  const int64_t values, key_scale, value_scale, key_offset;  // offsets
  const int64_t bytes;
};

// The largest power of two that divides the head: blocks of the rotation.
int64_t rotated_block(int64_t head_dim) { return head_dim & -head_dim; }

int64_t whole_vectors(int64_t count) { return ceil_div(count, kStripColumns) * kStripColumns; }

// Of a HeadCoder's workspace.
int64_t head_floats(int64_t head_dim) { return 2 * whole_vectors(head_dim); }

int64_t bytes_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

RowArgs head_row(const HeadRows& x, int64_t row, int64_t head, int64_t head_dim) {
  return {static_cast<const char*>(x.data) +
              (row * x.row_stride + head * x.head_stride) * bytes_of(x.type),
          nullptr, head_dim};
}

// Rows of heads as codes, of which 128 is 0.
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
    RowArgs source = head_row(rows, row, head, head_dim_);
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
    kernels_.rotate[static_cast<int>(rows.type)](source, rotated_block(head_dim_), rotated_);
    return code(DType::kFloat32, {rotated_, nullptr, head_dim_}, u, u_tile);
  }

  float keep(const HeadRows& rows, int64_t row, int64_t head, uint8_t* u) const {
    return code(rows.type, head_row(rows, row, head, head_dim_), u, kTileDepth);
  }

 private:
  float code(DType type, const RowArgs& row, uint8_t* u, int64_t u_tile) const {
    const RowCode code = make_code(kQuantizer, kernels_.stats[static_cast<int>(type)](row));
    kernels_.quantize[static_cast<int>(type)](row, code.grid, u, u_tile);
    return code.scale;
  }

  const int64_t head_dim_;
  const RowKernels& kernels_;
  float* const rotated_;
  float* const transformed_;
};

std::byte* page_of(const KvCache& cache, const Sequences& sequences, const PageLayout& layout,
                   int64_t sequence, int64_t token, int64_t kv_head) {
  const int64_t page = sequences.table[sequence * sequences.table_stride + token / kPageTokens];
  return cache.pages + (page * cache.kv_heads + kv_head) * layout.bytes;
}

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

// The keys that a query may see.
Range visible(const AttentionOptions& options, int64_t position, int64_t length) {
  const int64_t end = options.causal ? position + 1 : length;
  return {options.window > 0 ? std::max<int64_t>(0, position + 1 - options.window) : 0, end};
}

// What all tasks of a call share.
struct Job {
  Job(const AttentionArgs& args_, Isa isa_)
      : args(args_),
        cache(args_.cache),
        sequences(args_.sequences),
        options(args_.options),
        page(cache.head_dim),
        group(args.heads / cache.kv_heads),
        columns(whole_vectors(cache.head_dim)),
        isa(isa_),
        kernels(row_kernels(isa)) {
    const double rotated = 1.0 / rotated_block(cache.head_dim);
    const double soft = options.softcap;
    score = static_cast<float>(options.scale * rotated * (soft > 0 ? 2 * kLog2E / soft : kLog2E));
    cap = static_cast<float>(soft * kLog2E);
  }

  const AttentionArgs& args;
  const KvCache& cache;
  const Sequences& sequences;
  const AttentionOptions& options;
  const PageLayout page;
  const int64_t group;    // query heads of a kv head
  const int64_t columns;  // of values, in whole vectors
  const Isa isa;
  const RowKernels& kernels;
  float score;
  float cap;
};

using Block = AttentionBlock;

int64_t new_tokens(const Sequences& sequences, int64_t sequence) {
  return sequences.first_row[sequence + 1] - sequences.first_row[sequence];
}

Range chunks_of(const Block& block) {
  if (block.keys.size() <= 0) return {0, 0};
  return {block.keys.begin / kChunkTokens, ceil_div(block.keys.end, kChunkTokens)};
}

// Softmaxes of the rows of a block over some keys.
class Softmaxes {
 public:
  Softmaxes(float* memory, int64_t columns)
      : most_(memory),
        total_(memory + kRowsOfTask),
        o_(memory + 2 * kRowsOfTask),
        columns_(columns) {}

  static int64_t floats(int64_t columns) { return kRowsOfTask * (columns + 2); }

  void clear(int64_t rows) {
    std::fill_n(most_, rows, kNoKey);
    std::fill_n(total_, rows, 0.0f);
    std::fill_n(o_, rows * columns_, 0.0f);
  }
  SoftmaxRow row(int64_t r) const { return {most_ + r, total_ + r, o_ + r * columns_}; }
  void merge(const Softmaxes& from, int64_t rows, const RowKernels& kernels) {
    for (int64_t r = 0; r < rows; ++r) kernels.merge(row(r), from.row(r), columns_);
  }

 private:
  float* const most_;
  float* const total_;
  float* const o_;
  const int64_t columns_;
};

class Worker {
 public:
  static int64_t bytes(int64_t head_dim) {
    const int64_t depth = k_block_count(head_dim) * kTileDepth, columns = whole_vectors(head_dim);
    return whole_lines(kRowsOfTask * depth +                            // codes of q
                       kRowsOfTask * kPageTokens +                      // codes of p
                       kMaxRows * std::max(columns, kPageTokens) * 4 +  // sums
                       head_floats(head_dim) * 4 + 2 * Softmaxes::floats(columns) * 4);
  }

  Worker(const Job& job, std::byte* workspace)
      : job_(job),
        q_codes_(take<uint8_t>(workspace, kRowsOfTask * job.page.depth_tiles * kTileDepth)),
        p_codes_(take<uint8_t>(workspace, kRowsOfTask * kPageTokens)),
        sums_(take<int32_t>(workspace, kMaxRows * std::max(job.columns, kPageTokens))),
        head_(take<float>(workspace, head_floats(job.cache.head_dim))),
        chunk_(take<float>(workspace, Softmaxes::floats(job.columns)), job.columns),
        all_(take<float>(workspace, Softmaxes::floats(job.columns)), job.columns) {}

  // All chunks of a block, and its result.
  void run(const Block& block) {
    begin(block);
    start(all_);
    const Range chunks = chunks_of(block);
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      attend(chunk, chunk_);
      all_.merge(chunk_, block.rows.size(), job_.kernels);
    }
    finish(all_);
    end();
  }

  // One chunk; the last to finish a block merges what all have left in `partial`, in order.
  void run_chunk(const Block& block, int64_t chunk, float* partial, std::atomic<int>& finished) {
    begin(block);
    const Range chunks = chunks_of(block);
    const int64_t floats = Softmaxes::floats(job_.columns);
    Softmaxes own(partial + (chunk - chunks.begin) * floats, job_.columns);
    attend(chunk, own);
    end();
    if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 < chunks.size()) return;
    finished.store(0, std::memory_order_relaxed);  // for the next attention
    start(all_);
    for (int64_t i = 0; i < chunks.size(); ++i) {
      all_.merge(Softmaxes(partial + i * floats, job_.columns), block.rows.size(), job_.kernels);
    }
    finish(all_);
  }

 private:
  template <typename T>
  static T* take(std::byte*& workspace, int64_t count) {
    T* const taken = reinterpret_cast<T*>(workspace);
    workspace += count * int64_t{sizeof(T)};
    return taken;
  }

  void begin(const Block& block) {
    block_ = block;
    const int64_t rows = block.rows.size(), first = job_.sequences.first_row[block.sequence];
    const int64_t length = job_.sequences.length[block.sequence];
    const int64_t before = length - new_tokens(job_.sequences, block.sequence);
    kernel_ = &choose_microkernel(job_.isa, 255, rows);
    codes_ = CodeLayout(rows, job_.cache.head_dim);
    const HeadCoder coder(job_.cache.head_dim, job_.kernels, head_);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = block.rows.begin + r;
      const float scale = coder.rotate(job_.args.q, job_.args.transform, first + row / job_.group,
                                       head(row), q_codes_ + codes_.offset(r), codes_.tile);
      q_scale_[r] = scale * job_.score;
      position_[r] = before + row / job_.group;
      keys_[r] = visible(job_.options, position_[r], length);
      if (job_.options.slopes != nullptr) {
        slope_[r] = static_cast<float>(job_.options.slopes[head(row)] * kLog2E);
      }
    }
    if (kernel_->begin != nullptr) kernel_->begin(state_);
  }

  void end() {
    if (kernel_->end != nullptr) kernel_->end(state_);
  }

  int64_t head(int64_t row) const { return block_.kv_head * job_.group + row % job_.group; }

  void start(Softmaxes& all) const {
    all.clear(block_.rows.size());
    if (job_.options.sinks == nullptr) return;
    for (int64_t r = 0; r < block_.rows.size(); ++r) {
      const SoftmaxRow row = all.row(r);
      *row.most = static_cast<float>(job_.options.sinks[head(block_.rows.begin + r)] * kLog2E);
      *row.total = 1.0f;
    }
  }

  void attend(int64_t chunk, Softmaxes& to) {
    to.clear(block_.rows.size());
    const int64_t begin = std::max(chunk * kChunkTokens, block_.keys.begin);
    const int64_t end = std::min((chunk + 1) * kChunkTokens, block_.keys.end);
    for (int64_t key = begin / kPageTokens * kPageTokens; key < end; key += kPageTokens) {
      see(key);
      const std::byte* page =
          page_of(job_.cache, job_.sequences, job_.page, block_.sequence, key, block_.kv_head);
      for_each_group(*kernel_, {0, block_.rows.size()},
                     [&](Range rows) { attend(page, rows, to); });
    }
  }

  // What each row sees of the page that begins with `key`.
  void see(int64_t key) {
    for (int64_t r = 0; r < block_.rows.size(); ++r) {
      first_[r] = static_cast<int32_t>(std::clamp<int64_t>(keys_[r].begin - key, 0, kPageTokens));
      last_[r] = static_cast<int32_t>(std::clamp<int64_t>(keys_[r].end - key, 0, kPageTokens));
      distance_[r] = static_cast<float>(key - position_[r]);
    }
  }

  void attend(const std::byte* page, Range rows, Softmaxes& to) {
    const PageLayout& layout = job_.page;
    const int count = static_cast<int>(rows.size());
    multiply(q_codes_ + codes_.offset(rows.begin), codes_, page, layout.key_strip,
             layout.depth_tiles, kPageTokens / kStripColumns, count);
    const int64_t panel = kernel_->strips * kStripColumns;
    const SoftmaxRow first = to.row(rows.begin);
    const bool sloped = job_.options.slopes != nullptr;
    job_.kernels.weigh({sums_, panel, panel * count, count, q_scale_ + rows.begin,
                        part_of<float>(page, layout.key_scale),
                        part_of<float>(page, layout.value_scale),
                        part_of<int32_t>(page, layout.key_offset), first_ + rows.begin,
                        last_ + rows.begin, job_.cap, sloped ? slope_ + rows.begin : nullptr,
                        distance_ + rows.begin, first.most, first.total, carry_, unit_, p_codes_});
    multiply(p_codes_, CodeLayout(count, kPageTokens), page + layout.values, kTileBytes, 1,
             layout.value_tiles, count);
    job_.kernels.gather_values(
        {sums_, panel, panel * count, count, job_.columns, carry_, unit_, first.o, job_.columns});
  }

  // `strips` of a right operand, in calls that each leave their sums side by side.
  void multiply(const uint8_t* u, const CodeLayout& codes, const std::byte* strip, int64_t stride,
                int64_t k_blocks, int64_t strips, int rows) {
    TileArgs tile{};
    tile.u = u;
    tile.u_tile = codes.tile;
    tile.u_block = codes.block;
    tile.strip_stride = stride;
    tile.k_blocks = k_blocks;
    tile.rows = rows;
    tile.state = &state_;
    tile.c = sums_;
    for (int64_t s = 0; s < strips; s += kernel_->strips) {
      tile.strip = strip + s * stride;
      tile.strips = static_cast<int>(std::min<int64_t>(kernel_->strips, strips - s));
      kernel_->run(tile);
      tile.c += rows * kernel_->strips * kStripColumns;
    }
  }

  template <typename T>
  static const T* part_of(const std::byte* page, int64_t offset) {
    return reinterpret_cast<const T*>(page + offset);
  }

  void finish(const Softmaxes& all) const {
    const HeadResult& y = job_.args.y;
    const int64_t first = job_.sequences.first_row[block_.sequence];
    for (int64_t r = 0; r < block_.rows.size(); ++r) {
      const int64_t row = block_.rows.begin + r;
      char* const out = static_cast<char*>(y.data) +
                        ((first + row / job_.group) * y.row_stride + head(row) * y.head_stride) *
                            bytes_of(y.type);
      job_.kernels.finish_row[static_cast<int>(y.type)](all.row(r), job_.cache.head_dim, out);
    }
  }

  const Job& job_;
  uint8_t* const q_codes_;
  uint8_t* const p_codes_;
  int32_t* const sums_;
  float* const head_;
  Softmaxes chunk_, all_;
  Block block_{};
  CodeLayout codes_{0, 0};
  const Microkernel* kernel_ = nullptr;
  TaskState state_;
  float q_scale_[kRowsOfTask], slope_[kRowsOfTask], distance_[kRowsOfTask];
  int64_t position_[kRowsOfTask];
  Range keys_[kRowsOfTask];  // that a row sees
  int32_t first_[kRowsOfTask], last_[kRowsOfTask];
  float carry_[kMaxRows], unit_[kMaxRows];
};

int64_t row_count(const Sequences& sequences) {
  return sequences.count == 0 ? 0 : sequences.first_row[sequences.count];
}

}  // namespace

void check(const KvCache& cache, const Sequences& sequences) {
  SQ_CHECK(cache.kv_heads > 0, "the cache has ", cache.kv_heads, " kv heads");
  page_bytes(cache.head_dim);  // checks it
  SQ_CHECK(sequences.count >= 0, sequences.count, " sequences");
  if (sequences.count == 0) return;
  SQ_CHECK(sequences.first_row != nullptr && sequences.length != nullptr,
           "sequences.first_row or .length is null");
  SQ_CHECK(sequences.first_row[0] == 0, "the first sequence begins with row ",
           sequences.first_row[0]);
  for (int64_t i = 0; i < sequences.count; ++i) {
    const int64_t rows = sequences.first_row[i + 1] - sequences.first_row[i];
    const int64_t length = sequences.length[i], pages = ceil_div(length, kPageTokens);
    SQ_CHECK(rows >= 0 && rows <= length, "sequence ", i, " of ", length, " tokens has ", rows,
             " new ones");
    SQ_CHECK(pages <= sequences.table_stride, "sequence ", i, " of ", length, " tokens has only ",
             sequences.table_stride, " pages");
    SQ_CHECK(pages == 0 || (sequences.table != nullptr && cache.pages != nullptr),
             "sequences.table or cache.pages is null");
    for (int64_t j = 0; j < pages; ++j) {
      const int64_t page = sequences.table[i * sequences.table_stride + j];
      SQ_CHECK(page >= 0 && page < cache.page_count, "sequence ", i, " has page ", page,
               " of a cache of ", cache.page_count);
    }
  }
}

void check(const AttentionOptions& options) {
  SQ_CHECK(std::isfinite(options.scale), "attention: scale is ", options.scale);
  SQ_CHECK(options.softcap >= 0 && std::isfinite(options.softcap), "attention: softcap is ",
           options.softcap);
  SQ_CHECK(options.window >= 0, "attention: window is ", options.window);
  SQ_CHECK(options.window == 0 || options.causal, "attention: a window needs causal attention");
}

int64_t page_bytes(int64_t head_dim) {
  SQ_CHECK(head_dim > 0 && head_dim <= kMaxHeadDim, "a head of ", head_dim, "; it has 1 .. ",
           kMaxHeadDim);
  return PageLayout(head_dim).bytes;
}

int64_t append_workspace(int64_t head_dim) {
  return whole_lines(head_floats(head_dim) * 4 + k_block_count(head_dim) * kTileDepth);
}

void append_pages(const AppendArgs& args, const RowKernels& kernels, std::byte* workspace,
                  int worker, int workers) {
  const Sequences& sequences = args.sequences;
  const int64_t head_dim = args.cache.head_dim;
  const PageLayout layout(head_dim);
  auto* const floats = reinterpret_cast<float*>(workspace);
  auto* const u = reinterpret_cast<uint8_t*>(floats + head_floats(head_dim));
  const HeadCoder coder(head_dim, kernels, floats);
  int64_t turn = 0;  // by whole pages: no two threads write into one
  for (int64_t i = 0; i < sequences.count; ++i) {
    const int64_t end = sequences.length[i], begin = end - new_tokens(sequences, i);
    for (int64_t page = begin / kPageTokens; page * kPageTokens < end && begin < end; ++page) {
      for (int64_t head = 0; head < args.cache.kv_heads; ++head) {
        if (turn++ % workers != worker) continue;
        std::byte* const at = page_of(args.cache, sequences, layout, i, page * kPageTokens, head);
        const int64_t last = std::min((page + 1) * kPageTokens, end);
        for (int64_t token = std::max(begin, page * kPageTokens); token < last; ++token) {
          const int64_t row = sequences.first_row[i] + token - begin, slot = token % kPageTokens;
          const float key_scale = coder.rotate(args.k, args.transform, row, head, u, kTileDepth);
          put_key(at, layout, slot, u, head_dim, key_scale);
          const float value_scale = coder.keep(args.v, row, head, u);
          put_value(at, layout, slot, u, head_dim, value_scale);
        }
      }
    }
  }
}

AttentionPlan::AttentionPlan(const Sequences& sequences, int64_t heads, int64_t kv_heads,
                             int64_t head_dim, const AttentionOptions& options, int available)
    : head_dim_(head_dim) {
  const int64_t group = heads / kv_heads;
  double products = 0;
  for (int64_t sequence = 0; sequence < sequences.count; ++sequence) {
    const int64_t length = sequences.length[sequence];
    const int64_t before = length - new_tokens(sequences, sequence);
    const int64_t rows = new_tokens(sequences, sequence) * group;
    // The last rows of a sequence first: they see most.
    for (int64_t i = ceil_div(rows, kRowsOfTask) - 1; i >= 0; --i) {
      const Range block{i * kRowsOfTask, std::min((i + 1) * kRowsOfTask, rows)};
      const Range first = visible(options, before + block.begin / group, length);
      const Range last = visible(options, before + (block.end - 1) / group, length);
      const Range keys{first.begin, last.end};
      products += static_cast<double>(block.size()) * keys.size() * kv_heads;
      for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
        blocks_.push_back({sequence, kv_head, block, keys});
      }
    }
  }
  workers_ = useful_threads(kRowsOfTask, static_cast<int64_t>(products / kRowsOfTask), 2 * head_dim,
                            available);
  if (workers_ == 1 || blocks() >= 4 * workers_) return;
  // Too few blocks to keep the workers busy: a task for each chunk.
  for (int64_t i = 0; i < blocks(); ++i) {
    const Range chunks = chunks_of(blocks_[i]);
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      tasks_.push_back({i, chunk, partials_});
    }
    partials_ += chunks.size() * Softmaxes::floats(whole_vectors(head_dim));
  }
}

int64_t AttentionPlan::workspace() const { return Worker::bytes(head_dim_); }

void AttentionPlan::run(const AttentionArgs& args, Isa isa, WorkCounter& counter,
                        std::atomic<int>* finished, std::byte* workspace, float* partials) const {
  const Job job(args, isa);
  Worker own(job, workspace);
  const auto count = static_cast<int64_t>(tasks_.empty() ? blocks_.size() : tasks_.size());
  for (int64_t i; (i = counter.take(count)) < count;) {
    if (tasks_.empty()) {
      own.run(blocks_[i]);
    } else {
      const Task& task = tasks_[i];
      own.run_chunk(blocks_[task.block], task.chunk, partials + task.partial, finished[task.block]);
    }
  }
}

void append(const KvCache& cache, const Sequences& sequences, const HeadRows& k,
            const HeadRows& v) {
  check(cache, sequences);
  const int64_t rows = row_count(sequences);
  SQ_CHECK(rows == 0 || (k.data != nullptr && v.data != nullptr), "append: k or v is null");
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

void attention(const KvCache& cache, const Sequences& sequences, int64_t heads, const HeadRows& q,
               const AttentionOptions& options, const HeadResult& y) {
  check(cache, sequences);
  check(options);
  SQ_CHECK(heads > 0 && heads % cache.kv_heads == 0, "attention: ", heads,
           " heads are not a multiple of ", cache.kv_heads, " kv heads");
  const int64_t rows = row_count(sequences);
  SQ_CHECK(rows == 0 || (q.data != nullptr && y.data != nullptr), "attention: q or y is null");
  if (rows == 0) return;
  const AttentionArgs args{cache, sequences, heads, q, {}, options, y};
  const AttentionPlan plan(sequences, heads, cache.kv_heads, cache.head_dim, options, pool_size());
  std::vector<std::atomic<int>> finished(plan.blocks());
  thread_local Scratch<std::byte> scratch;
  thread_local Scratch<float> partial_scratch;
  std::byte* const workspace = scratch.get(plan.workspace() * plan.workers());
  float* const partials = partial_scratch.get(plan.partials());
  WorkCounter counter;
  const Isa isa = active_isa();
  run_team(plan.workers(), [&](int worker, int) {
    plan.run(args, isa, counter, finished.data(), workspace + plan.workspace() * worker, partials);
  });
}

}  // namespace sq_cpu
