#include "gemm.h"

#include <algorithm>

namespace sq_cpu {
namespace {

// What a task will read next, from beyond L2: `pieces` of a panel of weights, asked for in equal
// shares by the calls of the microkernel before it. No division here: a call may take but 0.5 us.
class Prefetch {
 public:
  Prefetch() = default;

  // lines: of a piece; stride: bytes between pieces; tiles: of a call.
  Prefetch(const std::byte* base, int64_t lines, int64_t stride, int64_t pieces)
      : base_(base), bytes_(lines * kLineBytes), stride_(stride), pieces_(pieces) {}

  void share_out(int64_t calls, int64_t tiles) {
    const int64_t calls_a_piece = pieces_ > 0 ? calls / pieces_ : 0;
    if (calls_a_piece == 0 || tiles == 0) {
      pieces_ = 0;
      return;
    }
    quarter_lines_ = ceil_div(bytes_, calls_a_piece * 4 * tiles * kLineBytes);
    step_ = quarter_lines_ * 4 * tiles * kLineBytes;
  }

  // The next call's share.
  void ask(TileArgs& tile) {
    tile.prefetch_lines = 0;
    if (pieces_ == 0) return;
    tile.prefetch = base_ + done_;
    tile.prefetch_lines = static_cast<int>(quarter_lines_);
    done_ += step_;
    if (done_ < bytes_) return;
    done_ = 0;
    base_ += stride_;
    --pieces_;
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  const std::byte* base_ = nullptr;
  int64_t bytes_ = 0, stride_ = 0, pieces_ = 0, quarter_lines_ = 0, step_ = 0, done_ = 0;
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
    set_groups(rows);
    for (int64_t s = strips.begin; s < strips.end; s += blocking_.strips) {
      strip_block({s, std::min(s + blocking_.strips, strips.end)}, last_strip);
    }
  }

  void end() {
    finish_epilogue();
    if (kernel_.end != nullptr) kernel_.end(state_);
  }

 private:
  struct Group {
    int64_t row;
    int rows;
    int64_t codes;  // offset of its first row's
  };

  // Groups of rows: near-equal parts of a block of 16, or whole blocks for a kernel that takes
  // more. A last group of a row or two would wait for its own latency.
  void set_groups(Range rows) {
    if (rows.begin == rows_.begin && rows.end == rows_.end) return;
    rows_ = rows;
    groups_ = 0;
    for (int64_t row = rows.begin; row < rows.end; row += row_step(kernel_)) {
      const int64_t size = std::min(row_step(kernel_), rows.end - row);
      const int64_t parts = ceil_div(size, kernel_.rows);
      for (int64_t index = 0; index < parts; ++index) {
        const Range r = part(size, 1, parts, index);
        group_[groups_++] = {row + r.begin, static_cast<int>(r.size()),
                             codes_.offset(row + r.begin)};
      }
    }
  }

  void strip_block(Range strips, int64_t last_strip) {
    const int64_t cuts = std::max<int64_t>(1, ceil_div(k_blocks_, blocking_.k_blocks));
    const bool one_panel = strips.size() <= blocking_.panel_strips;
    Prefetch ahead;
    TileArgs tile;
    tile.u_tile = codes_.tile;
    tile.u_block = codes_.block;
    tile.strip_stride = stride_;
    tile.epilogue = epilogue_;
    tile.state = &state_;
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t k0 = cut * blocking_.k_blocks;
      tile.k_blocks = std::min(blocking_.k_blocks, k_blocks_ - k0);
      tile.accumulate = cut > 0;
      int32_t* c = sums_;
      for (int64_t s = strips.begin; s < strips.end; s += blocking_.panel_strips) {
        const int width = static_cast<int>(std::min(blocking_.panel_strips, strips.end - s));
        tile.strip = args_.weight.data + s * stride_ + k0 * kTileBytes;
        tile.strips = width;
        if (!one_panel && cuts > 1) {
          ahead = s + width < strips.end ? slice(s + width, strips.end, k0)
                                         : slice(strips.begin, strips.end, k0 + tile.k_blocks);
          ahead.share_out(groups_, tile.k_blocks);
        } else if (cut == 0) {
          ahead = panel(s + width, last_strip);
          ahead.share_out(cuts * groups_, tile.k_blocks);
        }
        for (int64_t index = 0; index < groups_; ++index) {
          const Group& group = group_[index];
          tile.u = args_.x.codes + group.codes + k0 * codes_.tile;
          tile.rows = group.rows;
          tile.c = c;
          tile.waiting = waiting_.row < waiting_.rows ? &waiting_ : nullptr;
          ahead.ask(tile);
          kernel_.run(tile);
          finish_epilogue();
          if (cut + 1 == cuts) defer_epilogue(group, s, width, c);
          if (!kernel_.overlaps_epilogue) finish_epilogue();
          // Whole products swap two places: the other one's epilogue is still waiting.
          c = cuts > 1 ? c + group_sums_ : c == sums_ ? sums_ + group_sums_ : sums_;
        }
      }
      finish_epilogue();  // its sums are about to be written over
    }
  }

  // The panel from strip s on, whole: contiguous.
  Prefetch panel(int64_t s, int64_t end) const {
    const int64_t width = std::min(blocking_.panel_strips, end - s);
    if (width <= 0) return {};
    return {args_.weight.data + s * stride_, width * stride_ / 64, 0, 1};
  }

  // The same of a panel cut in k: a piece of each strip.
  Prefetch slice(int64_t s, int64_t end, int64_t k0) const {
    const int64_t depth = std::min(blocking_.k_blocks, k_blocks_ - k0);
    if (depth <= 0) return {};
    return {args_.weight.data + s * stride_ + k0 * kTileBytes, depth * kTileBytes / 64, stride_,
            std::min(blocking_.panel_strips, end - s)};
  }

  // The epilogue of a finished product waits for the next call of the microkernel.
  void defer_epilogue(const Group& group, int64_t s, int width, const int32_t* c) {
    EpilogueArgs& e = waiting_;
    e.c = c;
    e.ldc = width * kStripColumns;
    e.row = 0;
    e.rows = group.rows;
    e.row_scale = args_.x.scale == nullptr ? nullptr : args_.x.scale + group.row;  // kInt32
    e.row_zero_point = args_.x.zero_point + group.row;
    e.trailer = args_.weight.data + s * stride_ + k_blocks_ * kTileBytes;
    e.strip_stride = stride_;
    e.ldy = args_.ldy;
    e.column = s * kStripColumns;
    e.columns = std::min(width * kStripColumns, args_.weight.n - e.column);
    auto* y = static_cast<char*>(args_.y);
    if (args_.output == Output::kCode) {
      const CodeLayout layout(args_.x.m, args_.weight.n);
      e.y = y + layout.offset(group.row);
      e.y_block = layout.block;
    } else {
      e.y = y + group.row * args_.ldy * element_bytes(args_.output);
    }
    e.steps = nullptr;
    if (args_.steps != nullptr) {
      steps_ = *args_.steps;
      advance(steps_, group.row);
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
  Range rows_{0, 0};
  Group group_[kMostGroups];
  int64_t groups_ = 0;
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
