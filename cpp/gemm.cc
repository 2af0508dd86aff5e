#include "gemm.h"

#include <algorithm>

namespace sq_cpu {
namespace {

// What a task will read next, from beyond L2: `pieces` of a panel of weights. The calls of the
// microkernel before it each ask for their share, none for parts of two pieces.
struct Prefetch {
  const std::byte* base = nullptr;  // null: nothing
  int64_t lines = 0;                // of a piece
  int64_t stride = 0;               // bytes between pieces
  int64_t pieces = 1;

  void ask(TileArgs& tile, int64_t call, int64_t calls) const {
    const int64_t calls_a_piece = calls / pieces;
    const bool any = base != nullptr && call < calls_a_piece * pieces && tile.k_blocks > 0;
    tile.prefetch = nullptr;
    tile.prefetch_lines = 0;
    if (!any) return;
    const Range share = part(lines, 1, calls_a_piece, call % calls_a_piece);
    tile.prefetch = base + call / calls_a_piece * stride + share.begin * kLineBytes;
    tile.prefetch_lines = static_cast<int>(ceil_div(share.size(), 4 * tile.k_blocks));
  }

  static constexpr int64_t kLineBytes = 64;
};

class Worker {
 public:
  Worker(const GemmArgs& args, const Microkernel& kernel, const RowKernels& rows,
         const Blocking& blocking, int32_t* sums)
      : args_(args),
        kernel_(kernel),
        epilogue_(rows.epilogue[static_cast<int>(args.output)]),
        blocking_(blocking),
        sums_(sums),
        codes_(args.x.m, args.x.k),
        k_blocks_(k_block_count(args.x.k)),
        stride_(strip_bytes(args.x.k)),
        group_sums_(kernel.rows * kernel.strips * kStripColumns) {}

  void begin() {
    if (kernel_.begin != nullptr) kernel_.begin(state_);
  }

  // A unit of work: the rows of one block, some of the strips of a task.
  void run(Range rows, Range strips, int64_t last_strip) {
    for (int64_t s = strips.begin; s < strips.end; s += blocking_.strips) {
      strip_block(rows, {s, std::min(s + blocking_.strips, strips.end)}, last_strip);
    }
  }

  void end() {
    finish_epilogue();
    if (kernel_.end != nullptr) kernel_.end(state_);
  }

 private:
  // Groups of rows: near-equal parts of a block of 16, or whole blocks for a kernel that takes
  // more. A last group of a row or two would wait for its own latency.
  int64_t groups(Range rows) const {
    if (kernel_.rows >= kBlockRows) return ceil_div(rows.size(), kernel_.rows);
    const int64_t whole = rows.size() / kBlockRows, rest = rows.size() % kBlockRows;
    return whole * ceil_div(kBlockRows, kernel_.rows) + ceil_div(rest, kernel_.rows);
  }

  Range group(Range rows, int64_t index) const {
    if (kernel_.rows >= kBlockRows) {
      const int64_t begin = rows.begin + index * kernel_.rows;
      return {begin, std::min<int64_t>(begin + kernel_.rows, rows.end)};
    }
    const int64_t per_block = ceil_div(kBlockRows, kernel_.rows);
    const int64_t begin = rows.begin + index / per_block * kBlockRows;
    const int64_t size = std::min(kBlockRows, rows.end - begin);
    const Range r = part(size, 1, ceil_div(size, kernel_.rows), index % per_block);
    return {begin + r.begin, begin + r.end};
  }

  void strip_block(Range rows, Range strips, int64_t last_strip) {
    const int64_t group_count = groups(rows);
    const int64_t cuts = std::max<int64_t>(1, ceil_div(k_blocks_, blocking_.k_blocks));
    const bool one_panel = strips.size() <= blocking_.panel_strips;
    finish_epilogue();  // its sums are about to be written over
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t k0 = cut * blocking_.k_blocks;
      const int64_t depth = std::min(blocking_.k_blocks, k_blocks_ - k0);
      int32_t* c = sums_;
      for (int64_t s = strips.begin; s < strips.end; s += blocking_.panel_strips) {
        const int width = static_cast<int>(std::min(blocking_.panel_strips, strips.end - s));
        const Prefetch ahead = one_panel || cuts == 1 ? panel(s + width, last_strip)
                               : s + width < strips.end
                                   ? slice(s + width, strips.end, k0, depth)
                                   : slice(strips.begin, strips.end, k0 + depth, depth);
        for (int64_t index = 0; index < group_count; ++index) {
          const Range r = group(rows, index);
          TileArgs tile;
          tile.u = args_.x.codes + codes_.offset(r.begin) + k0 * codes_.tile;
          tile.u_tile = codes_.tile;
          tile.u_block = codes_.block;
          tile.strip = args_.weight.data + s * stride_ + k0 * kTileBytes;
          tile.strip_stride = stride_;
          tile.k_blocks = depth;
          tile.rows = static_cast<int>(r.size());
          tile.strips = width;
          tile.accumulate = cut > 0;
          tile.c = c;
          tile.state = &state_;
          one_panel ? ahead.ask(tile, cut * group_count + index, cuts * group_count)
                    : ahead.ask(tile, index, group_count);
          tile.waiting = waiting_.row < waiting_.rows ? &waiting_ : nullptr;
          tile.epilogue = epilogue_;
          kernel_.run(tile);
          finish_epilogue();
          if (cut + 1 == cuts) defer_epilogue(r, s, width, c);
          if (!kernel_.overlaps_epilogue) finish_epilogue();
          // Whole products swap two places: the other one's epilogue is still waiting.
          c = cuts > 1 ? c + group_sums_ : c == sums_ ? sums_ + group_sums_ : sums_;
        }
      }
    }
  }

  // The panel from strip s on, whole: contiguous.
  Prefetch panel(int64_t s, int64_t end) const {
    const int64_t width = std::min(blocking_.panel_strips, end - s);
    if (width <= 0) return {};
    return {args_.weight.data + s * stride_, width * stride_ / Prefetch::kLineBytes, 0, 1};
  }

  // The same of a panel cut in k: a piece of each strip.
  Prefetch slice(int64_t s, int64_t end, int64_t k0, int64_t depth) const {
    depth = std::min(depth, k_blocks_ - k0);
    if (depth <= 0) return {};
    return {args_.weight.data + s * stride_ + k0 * kTileBytes,
            depth * kTileBytes / Prefetch::kLineBytes, stride_,
            std::min(blocking_.panel_strips, end - s)};
  }

  // The epilogue of a finished product waits for the next call of the microkernel.
  void defer_epilogue(Range rows, int64_t s, int width, const int32_t* c) {
    EpilogueArgs& e = waiting_;
    e.c = c;
    e.ldc = width * kStripColumns;
    e.row = 0;
    e.rows = static_cast<int>(rows.size());
    e.row_scale = args_.x.scale == nullptr ? nullptr : args_.x.scale + rows.begin;  // kInt32
    e.row_zero_point = args_.x.zero_point + rows.begin;
    e.trailer = args_.weight.data + s * stride_ + k_blocks_ * kTileBytes;
    e.strip_stride = stride_;
    e.ldy = args_.ldy;
    e.column = s * kStripColumns;
    e.columns = std::min(width * kStripColumns, args_.weight.n - e.column);
    auto* y = static_cast<char*>(args_.y);
    if (args_.output == Output::kCode) {
      const CodeLayout layout(args_.x.m, args_.weight.n);
      e.y = y + layout.offset(rows.begin);
      e.y_block = layout.block;
    } else {
      e.y = y + rows.begin * args_.ldy * element_bytes(args_.output);
    }
    e.steps = nullptr;
    if (args_.steps != nullptr) {
      steps_ = *args_.steps;
      advance(steps_, rows.begin);
      e.steps = &steps_;
    }
  }

  void finish_epilogue() {
    if (waiting_.row < waiting_.rows) epilogue_(waiting_);
    waiting_.row = waiting_.rows;
  }

  const GemmArgs& args_;
  const Microkernel& kernel_;
  void (*epilogue_)(const EpilogueArgs&);
  const Blocking& blocking_;
  int32_t* sums_;
  const CodeLayout codes_;
  const int64_t k_blocks_;
  const int64_t stride_;
  const int64_t group_sums_;
  EpilogueArgs waiting_{};
  EpilogueSteps steps_{};
  TaskState state_;
};

}  // namespace

int64_t element_bytes(Output output) {
  return output == Output::kBFloat16 || output == Output::kFloat16 ? 2
         : output == Output::kCode || output == Output::kInt8      ? 1
                                                                   : 4;
}

int64_t strip_count(int64_t n) { return ceil_div(n, kStripColumns); }

int64_t k_block_count(int64_t k) { return ceil_div(k, kTileDepth); }

int64_t strip_bytes(int64_t k) { return k_block_count(k) * kTileBytes + kTrailerBytes; }

void advance(EpilogueSteps& steps, int64_t rows) {
  const int64_t bytes = steps.operand_type == DType::kFloat32 ? 4 : 2;
  if (steps.other != nullptr) {
    steps.other = static_cast<const char*>(steps.other) + rows * steps.ld_other * bytes;
  }
  if (steps.residual != nullptr) {
    steps.residual = static_cast<const char*>(steps.residual) + rows * steps.ld_residual * bytes;
  }
  if (steps.code_scale != nullptr) steps.code_scale += rows;
}

CodeLayout::CodeLayout(int64_t m, int64_t k)
    : height(std::clamp<int64_t>(m, 1, kBlockRows)),
      tile(height * kTileDepth),
      block(tile * k_block_count(k)) {}

void run_tasks(const GemmArgs& args, const Microkernel& kernel, const RowKernels& rows,
               const Blocking& blocking, WorkCounter* counters, int32_t* sums, int thread) {
  const int64_t tasks = blocking.row_parts * blocking.strip_parts;
  Worker worker(args, kernel, rows, blocking, sums);
  worker.begin();
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t task = (thread + i) % tasks;
    const Range r =
        part(args.x.m, row_step(kernel), blocking.row_parts, task / blocking.strip_parts);
    const Range s = part(strip_count(args.weight.n), blocking.strip_step, blocking.strip_parts,
                         task % blocking.strip_parts);
    const int64_t across = ceil_div(s.size(), blocking.unit_strips);
    const int64_t units = ceil_div(r.size(), blocking.rows) * across;
    for (int64_t unit; (unit = counters[task].take(units)) < units;) {
      const int64_t row = r.begin + unit / across * blocking.rows;
      const int64_t strip = s.begin + unit % across * blocking.unit_strips;
      worker.run({row, std::min(row + blocking.rows, r.end)},
                 {strip, std::min(strip + blocking.unit_strips, s.end)}, s.end);
    }
  }
  worker.end();
}

}  // namespace sq_cpu
