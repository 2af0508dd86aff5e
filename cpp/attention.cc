// attention(). A task is a kv head of a sequence, a block of query rows, and chunks of
// its keys. The query heads of a group are rows of one product, so a page is read once for all.
#include "sq_cpu/attention.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "attend.h"
#include "blocking.h"
#include "check.h"
#include "dispatch.h"
#include "gemm.h"
#include "kv_page.h"
#include "operands.h"
#include "read_ahead.h"
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

// The keys that a query may see.
Range visible(const AttentionOptions& options, int64_t position, int64_t length) {
  const int64_t end = options.causal ? position + 1 : length;
  return {options.window > 0 ? std::max<int64_t>(0, position + 1 - options.window) : 0, end};
}

// What a product of a query and a key is multiplied by to give a score in base 2 before its cap;
// and that cap.
struct Scores {
  explicit Scores(const AttentionOptions& options) {
    const double soft = options.softcap;
    scale = static_cast<float>(options.scale * (soft > 0 ? 2 * kLog2E / soft : kLog2E));
    cap = static_cast<float>(soft * kLog2E);
  }
  float scale, cap;
};

// What all tasks of a call share.
struct Job {
  Job(const AttentionArgs& args_, Isa isa_)
      : args(args_),
        cache(args_.cache),
        sequences(args_.sequences),
        options(args_.options),
        page(cache.head_dim, cache.type),
        in_floats(cache.type == KvType::kBFloat16),
        group(args.heads / cache.kv_heads),
        columns(whole_vectors(cache.head_dim)),
        isa(isa_),
        kernels(row_kernels(isa)) {
    const Scores factors(options);
    // A power of two; of rotated rows, products are as many times larger.
    score = in_floats ? factors.scale
                      : factors.scale / static_cast<float>(rotated_block(cache.head_dim));
    cap = factors.cap;
  }

  const AttentionArgs& args;
  const KvCache& cache;
  const Sequences& sequences;
  const AttentionOptions& options;
  const PageLayout page;
  const bool in_floats;
  const int64_t group;    // query heads of a kv head
  const int64_t columns;  // of values, in whole vectors
  const Isa isa;
  const RowKernels& kernels;
  float score;
  float cap;
};

using Block = AttentionBlock;

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
    const int64_t columns = whole_vectors(head_dim);
    return whole_lines(kRowsOfTask * columns * 4 +                      // q: floats, or codes
                       kRowsOfTask * kPageTokens * 4 +                  // p likewise
                       kMaxRows * std::max(columns, kPageTokens) * 4 +  // sums
                       head_floats(head_dim) * 4 + 2 * Softmaxes::floats(columns) * 4);
  }

  Worker(const Job& job, std::byte* workspace)
      : job_(job),
        q_floats_(take<float>(workspace, kRowsOfTask * job.columns)),
        p_floats_(take<float>(workspace, kRowsOfTask * kPageTokens)),
        q_codes_(reinterpret_cast<uint8_t*>(q_floats_)),
        p_codes_(reinterpret_cast<uint8_t*>(p_floats_)),
        sums_(take<int32_t>(workspace, kMaxRows * std::max(job.columns, kPageTokens))),
        head_(take<float>(workspace, head_floats(job.cache.head_dim))),
        chunk_(take<float>(workspace, Softmaxes::floats(job.columns)), job.columns),
        all_(take<float>(workspace, Softmaxes::floats(job.columns)), job.columns) {}

  // All chunks of a block, and its result.
  void run(const Block& block) {
    const Range chunks = chunks_of(block);
    begin(block, chunks.begin);
    start(all_);
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      attend(chunk, chunk_);
      all_.merge(chunk_, block.rows.size(), job_.kernels);
    }
    finish(all_);
    end();
  }

  // One chunk; the last to finish a block merges what all have left in `partial`, in order.
  void run_chunk(const Block& block, int64_t chunk, float* partial, std::atomic<int>& finished) {
    begin(block, chunk);
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

  void begin(const Block& block, int64_t chunk) {
    block_ = block;
    if (block.keys.size() > 0) ask_for(page_with(first_key(chunk)), job_.page.bytes);
    const int64_t rows = block.rows.size(), first = job_.sequences.first_row[block.sequence];
    const int64_t length = job_.sequences.length[block.sequence];
    const int64_t before = length - new_tokens(job_.sequences, block.sequence);
    kernel_ = job_.in_floats ? nullptr : &choose_microkernel(job_.isa, 255, rows);
    codes_ = CodeLayout(rows, job_.cache.head_dim);
    const HeadCoder coder(job_.cache.head_dim, job_.kernels, head_);
    const AttentionArgs& args = job_.args;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = block.rows.begin + r, from = first + row / job_.group;
      if (r + 1 < rows) {
        ask_for_head(args.q, args.transform, first + (row + 1) / job_.group, head(row + 1),
                     job_.cache.head_dim);
      }
      const float scale = job_.in_floats ? coder.widen(args.q, args.transform, from, head(row),
                                                       q_floats_ + r * job_.columns)
                                         : coder.rotate(args.q, args.transform, from, head(row),
                                                        q_codes_ + codes_.offset(r), codes_.tile);
      q_scale_[r] = scale * job_.score;
      position_[r] = before + row / job_.group;
      keys_[r] = visible(job_.options, position_[r], length);
      if (job_.options.slopes != nullptr) {
        slope_[r] = static_cast<float>(job_.options.slopes[head(row)] * kLog2E);
      }
    }
    if (kernel_ != nullptr && kernel_->begin != nullptr) kernel_->begin(state_);
  }

  void end() {
    if (kernel_ != nullptr && kernel_->end != nullptr) kernel_->end(state_);
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
    const int64_t end = std::min((chunk + 1) * kChunkTokens, block_.keys.end);
    for (int64_t key = first_key(chunk); key < end; key += kPageTokens) {
      const std::byte* const page = page_with(key);
      if (key + kPageTokens < block_.keys.end)
        ask_for(page_with(key + kPageTokens), job_.page.bytes);
      see(key);
      const Range all{0, block_.rows.size()};
      if (job_.in_floats) {
        attend_in_floats(page, all, to);
      } else {
        for_each_group(*kernel_, all, [&](Range rows) { attend(page, rows, to); });
      }
    }
  }

  // The first of its page, of a chunk.
  int64_t first_key(int64_t chunk) const {
    return std::max(chunk * kChunkTokens, block_.keys.begin) / kPageTokens * kPageTokens;
  }

  const std::byte* page_with(int64_t key) const {
    return page_of(job_.cache, job_.sequences, job_.page, block_.sequence, key, block_.kv_head);
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
    job_.kernels.weigh(page_weights(page, rows, to, panel, p_codes_));
    multiply(p_codes_, CodeLayout(count, kPageTokens), page + layout.values, layout.value_tile, 1,
             layout.value_tiles, count);
    job_.kernels.gather_values({sums_, panel, panel * count, count, job_.columns, carry_, unit_,
                                to.row(rows.begin).o, job_.columns});
  }

  void attend_in_floats(const std::byte* page, Range rows, Softmaxes& to) {
    const int count = static_cast<int>(rows.size());
    job_.kernels.multiply_keys({q_floats_ + rows.begin * job_.columns, job_.columns, count, page,
                                job_.cache.head_dim, reinterpret_cast<float*>(sums_)});
    job_.kernels.weigh_floats(page_weights(page, rows, to, kPageTokens, p_floats_));
    job_.kernels.add_values({p_floats_, first_ + rows.begin, last_ + rows.begin,
                             page + job_.page.values, count, job_.columns, carry_,
                             to.row(rows.begin).o, job_.columns});
  }

  // Of the sums of some rows with a page; a call gave `panel` columns of them.
  PageWeights page_weights(const std::byte* page, Range rows, const Softmaxes& to, int64_t panel,
                           void* weights) {
    const PageLayout& layout = job_.page;
    const int count = static_cast<int>(rows.size());
    const SoftmaxRow first = to.row(rows.begin);
    const bool sloped = job_.options.slopes != nullptr;
    return {sums_,
            panel,
            panel * count,
            count,
            q_scale_ + rows.begin,
            part_of<float>(page, layout.key_scale),
            part_of<float>(page, layout.value_scale),
            part_of<int32_t>(page, layout.key_offset),
            first_ + rows.begin,
            last_ + rows.begin,
            job_.cap,
            sloped ? slope_ + rows.begin : nullptr,
            distance_ + rows.begin,
            first.most,
            first.total,
            carry_,
            unit_,
            weights};
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
  float* const q_floats_;
  float* const p_floats_;
  uint8_t* const q_codes_;  // in their place
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

}  // namespace

void check_options(const AttentionOptions& options) {
  SQ_CHECK(std::isfinite(options.scale), "attention: scale is ", options.scale);
  SQ_CHECK(options.softcap >= 0, "attention: softcap is ", options.softcap);
  SQ_CHECK(options.window >= 0, "attention: window is ", options.window);
  SQ_CHECK(options.window == 0 || options.causal, "attention: a window needs causal attention");
  const Scores scores(options);
  SQ_CHECK(std::isfinite(scores.scale) && std::isfinite(scores.cap), "attention: scale ",
           options.scale, " and softcap ", options.softcap, " leave the range of fp32");
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
    appends_within_ &= length - before <= 1 && rows <= kRowsOfTask;
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
                        std::atomic<int>* finished, std::byte* workspace, float* partials,
                        const AppendArgs* append) const {
  const Job job(args, isa);
  Worker own(job, workspace);
  const auto write = [&](const AttentionBlock& block) {
    if (append == nullptr) return;
    const int64_t page = (args.sequences.length[block.sequence] - 1) / kPageTokens;
    append_page(*append, job.kernels, workspace + Worker::bytes(head_dim_), block.sequence, page,
                block.kv_head);
  };
  const auto count = static_cast<int64_t>(tasks_.empty() ? blocks_.size() : tasks_.size());
  for (int64_t i; (i = counter.take(count)) < count;) {
    if (tasks_.empty()) {
      write(blocks_[i]);
      own.run(blocks_[i]);
    } else {
      const Task& task = tasks_[i];
      if (task.chunk + 1 == chunks_of(blocks_[task.block]).end) write(blocks_[task.block]);
      own.run_chunk(blocks_[task.block], task.chunk, partials + task.partial, finished[task.block]);
    }
  }
}

void attention(const KvCache& cache, const Sequences& sequences, int64_t heads, const HeadRows& q,
               const AttentionOptions& options, const HeadResult& y) {
  check_cache(cache, sequences);
  check_options(options);
  SQ_CHECK(heads > 0 && heads % cache.kv_heads == 0, "attention: ", heads,
           " heads are not a multiple of ", cache.kv_heads, " kv heads");
  const int64_t rows = row_count(sequences);
  check_heads("q", q, rows, heads, cache.head_dim);
  check_heads("y", {y.data, y.type, y.row_stride, y.head_stride}, rows, heads, cache.head_dim);
  check_apart("attention", std::array<Steps, 2>{{{y.row_stride, rows}, {y.head_stride, heads}}},
              cache.head_dim);
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
