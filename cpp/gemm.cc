#include "gemm.h"

#include <algorithm>

#include "layout.h"
#include "read_ahead.h"

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
  const std::byte* base_ = nullptr;
  int64_t bytes_ = 0, stride_ = 0, pieces_ = 0, quarter_lines_ = 0, step_ = 0, done_ = 0;
};

// An epilogue runs one call of the microkernel behind its sums, so that a kernel whose products
// another unit computes (AMX) works on it meanwhile, and the sums alternate between two places:
//
//   call of the microkernel   group 0 | group 1 | group 2 | ...         (each: k whole)
//   it writes                 place 0 | place 1 | place 0 | ...
//   epilogue, meanwhile               | group 0 | group 1 | group 2
//   it reads                          | place 0 | place 1 | place 0
//
// A kernel that uses the vector units itself has nothing to overlap: its epilogues run at once.

// Where a call's sums lie: places that swap where products are whole, one for each group and panel
// of the strip block where k is cut, since all wait for the next k block.
class Sums {
 public:
  Sums(int32_t* base, int64_t place) : base_(base), place_(place) {}

  void rewind(bool cut) {
    cut_ = cut;
    now_ = base_;
  }
  int32_t* now() const { return now_; }
  void next() { now_ = cut_ || now_ == base_ ? now_ + place_ : base_; }

 private:
  int32_t* const base_;
  const int64_t place_;  // ints of it
  int32_t* now_ = nullptr;
  bool cut_ = false;
};

// The epilogue of the last finished product.
class DeferredEpilogue {
 public:
  explicit DeferredEpilogue(void (*epilogue)(const EpilogueArgs&)) : epilogue_(epilogue) {}

  // The rows that are left, for a microkernel to work on; null when there are none.
  EpilogueArgs* waiting() { return args_.row < args_.rows ? &args_ : nullptr; }

  // `args` of all rows, with steps at row 0 of the product; the group begins with `row`.
  void defer(const EpilogueArgs& args, const EpilogueSteps* steps, int64_t row) {
    args_ = args;
    args_.steps = nullptr;
    if (steps == nullptr) return;
    steps_ = *steps;
    advance(steps_, row);
    args_.steps = &steps_;
  }

  void finish() {
    if (args_.row < args_.rows) epilogue_(args_);
    args_.row = args_.rows;
  }

 private:
  void (*const epilogue_)(const EpilogueArgs&);
  EpilogueArgs args_{};
  EpilogueSteps steps_{};
};

class Worker {
 public:
  // `args`: of any of the products.
  Worker(const GemmArgs& args, const Microkernel& kernel, const RowKernels& rows,
         const Blocking& blocking, int32_t* sums)
      : kernel_(kernel),
        epilogue_(rows.epilogue[static_cast<int>(args.output)]),
        deferred_(epilogue_),
        blocking_(blocking),
        sums_(sums, kernel.rows * kernel.strips * kStripColumns),
        codes_(args.x.m, args.x.k),
        k_blocks_(k_block_count(args.x.k)),
        stride_(strip_bytes(args.x.k)) {}

  void begin() {
    if (kernel_.begin != nullptr) kernel_.begin(state_);
  }

  // A unit of work: the rows of one block, some of the strips of a task.
  void run(const GemmArgs& args, Range rows, Range strips, int64_t last_strip) {
    args_ = &args;
    set_groups(rows);
    for (int64_t s = strips.begin; s < strips.end; s += blocking_.strips) {
      strip_block({s, std::min(s + blocking_.strips, strips.end)}, last_strip);
    }
  }

  void end() {
    deferred_.finish();
    if (kernel_.end != nullptr) kernel_.end(state_);
  }

 private:
  struct Group {
    int64_t row;
    int rows;
    int64_t codes;  // offset of its first row's
  };

  void set_groups(Range rows) {
    if (rows.begin == rows_.begin && rows.end == rows_.end) return;
    rows_ = rows;
    groups_ = 0;
    const auto add = [&](Range r) {
      group_[groups_++] = {r.begin, static_cast<int>(r.size()), codes_.offset(r.begin)};
    };
    for_each_group(kernel_, rows, add, args_->x.terms);
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
      sums_.rewind(cuts > 1);
      for (int64_t s = strips.begin; s < strips.end; s += blocking_.panel_strips) {
        const int width = static_cast<int>(std::min(blocking_.panel_strips, strips.end - s));
        tile.strip = args_->weight.data + s * stride_ + k0 * kTileBytes;
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
          tile.u = args_->x.codes + group.codes + k0 * codes_.tile;
          tile.rows = group.rows;
          tile.c = sums_.now();
          tile.waiting = deferred_.waiting();
          ahead.ask(tile);
          kernel_.run(tile);
          deferred_.finish();
          if (cut + 1 == cuts) {
            deferred_.defer(epilogue_of(group, s, width), args_->steps, group.row / args_->x.terms);
          }
          if (!kernel_.overlaps_epilogue) deferred_.finish();
          sums_.next();
        }
      }
      deferred_.finish();  // its sums are about to be written over
    }
  }

  // The panel from strip s on, whole: contiguous.
  Prefetch panel(int64_t s, int64_t end) const {
    const int64_t width = std::min(blocking_.panel_strips, end - s);
    if (width <= 0) return {};
    return {args_->weight.data + s * stride_, width * stride_ / 64, 0, 1};
  }

  // The same of a panel cut in k: a piece of each strip.
  Prefetch slice(int64_t s, int64_t end, int64_t k0) const {
    const int64_t depth = std::min(blocking_.k_blocks, k_blocks_ - k0);
    if (depth <= 0) return {};
    return {args_->weight.data + s * stride_ + k0 * kTileBytes, depth * kTileBytes / 64, stride_,
            std::min(blocking_.panel_strips, end - s)};
  }

  // Of the product that lies in sums_.now(): a group times the `width` strips from s on.
  EpilogueArgs epilogue_of(const Group& group, int64_t s, int width) const {
    EpilogueArgs e{};
    e.c = sums_.now();
    e.ldc = width * kStripColumns;
    e.row = 0;
    e.rows = group.rows;
    e.terms = args_->x.terms;
    e.row_scale = args_->x.scale == nullptr ? nullptr : args_->x.scale + group.row;  // kInt32
    e.row_zero_point = args_->x.zero_point + group.row;
    e.trailer = args_->weight.data + s * stride_ + k_blocks_ * kTileBytes;
    e.strip_stride = stride_;
    e.ldy = args_->ldy;
    e.column = s * kStripColumns;
    e.columns = std::min(width * kStripColumns, args_->weight.n - e.column);
    auto* y = static_cast<char*>(args_->y);
    // The integers are of each row of codes.
    const int64_t y_row = args_->output == Output::kInt32 ? group.row : group.row / args_->x.terms;
    if (args_->output == Output::kCode) {
      const CodeLayout layout(args_->x.m / args_->x.terms, args_->weight.n);
      e.y = y + layout.offset(y_row);
      e.y_block = layout.block;
    } else {
      e.y = y + y_row * args_->ldy * element_bytes(args_->output);
    }
    return e;
  }

  const GemmArgs* args_ = nullptr;  // of the unit
  const Microkernel& kernel_;
  void (*const epilogue_)(const EpilogueArgs&);
  DeferredEpilogue deferred_;
  const Blocking& blocking_;
  Sums sums_;
  const CodeLayout codes_;
  const int64_t k_blocks_;
  const int64_t stride_;
  Range rows_{0, 0};
  Group group_[kMostGroups];
  int64_t groups_ = 0;
  TaskState state_;
};

}  // namespace

int64_t element_bytes(Output output) {
  return output == Output::kBFloat16 || output == Output::kFloat16 ? 2
         : output == Output::kCode || output == Output::kInt8      ? 1
                                                                   : 4;
}

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

int64_t joined_strips(const GemmArgs* products, int count, Order order) {
  int64_t strips = strip_count(products[0].weight.n);
  for (int i = 1; order == Order::kSideBySide && i < count; ++i) {
    strips += strip_count(products[i].weight.n);
  }
  return strips;
}

void run_tasks(const GemmArgs* products, int count, Order order, const Microkernel& kernel,
               const RowKernels& rows, const Blocking& blocking, WorkCounter* counters,
               int32_t* sums, int thread, int threads) {
  const GemmArgs& args = *products;
  const int64_t tasks = blocking.row_parts * blocking.strip_parts;
  const int64_t strips = joined_strips(products, count, order);
  Worker worker(args, kernel, rows, blocking, sums);
  worker.begin();
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t task = (thread + i) % tasks;
    if (counters == nullptr && task % threads != thread) continue;
    int64_t done = 0;
    const auto take = [&](int64_t units) {
      return counters == nullptr ? done++ : counters[task].take(units);
    };
    const Range r =
        part(args.x.m, row_step(kernel), blocking.row_parts, task / blocking.strip_parts);
    const Range s =
        part(strips, blocking.strip_step, blocking.strip_parts, task % blocking.strip_parts);
    const int64_t across = ceil_div(s.size(), blocking.unit_strips);
    const int64_t units = ceil_div(r.size(), blocking.rows) * across;
    for (int64_t unit; (unit = take(units)) < units;) {
      const int64_t row = r.begin + unit / across * blocking.rows;
      const int64_t strip = s.begin + unit % across * blocking.unit_strips;
      const Range unit_strips{strip, std::min(strip + blocking.unit_strips, s.end)};
      const Range unit_rows{row, std::min(row + blocking.rows, r.end)};
      const int64_t to_come = s.end - unit_strips.end;
      for_each_product(products, count, order, unit_strips, [&](int product, Range own) {
        const int64_t last = std::min(strip_count(products[product].weight.n), own.end + to_come);
        worker.run(products[product], unit_rows, own, last);
      });
    }
  }
  worker.end();
}

}  // namespace sq_cpu
