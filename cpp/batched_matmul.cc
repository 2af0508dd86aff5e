// batched_matmul(): each thread packs a piece of a head's right operand, arranges the rows that
// meet it, and runs the linear layer's product on them. A piece is multiplied by the thread that
// packed it, out of its own cache: no barrier, and no copy of a whole right operand anywhere.
#include "sq_cpu/batched_matmul.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>

#include "blocking.h"
#include "check.h"
#include "dispatch.h"
#include "gemm.h"
#include "layout.h"
#include "operands.h"
#include "scratch.h"
#include "team.h"

namespace sq_cpu {
namespace {

// A piece of right operand and a block of codes should stay in L2 together: half a MB each, of 1 MB
// and more. A piece narrower than 8 strips would repeat the arranging of the codes too often.
constexpr int64_t kPieceBytes = 512 << 10;
constexpr int64_t kFewestStrips = 8;
constexpr int64_t kFewestRows = 32;

Output output_of(BatchedType type) {
  switch (type) {
    case BatchedType::kFloat32:
      return Output::kFloat32;
    case BatchedType::kBFloat16:
      return Output::kBFloat16;
    case BatchedType::kFloat16:
      return Output::kFloat16;
    case BatchedType::kInt32:
      return Output::kInt32;
    case BatchedType::kInt8:
      break;
  }
  return Output::kInt8;
}

// A head's product is cut into row_parts x strip_parts tasks.
struct Split {
  int64_t row_parts;
  int64_t strip_parts;
};

// The split whose slowest thread is done first.
Split choose_split(int64_t heads, int64_t rows, int64_t row_step, int64_t strips, int threads) {
  Split best{1, 1};
  double least = -1;
  for (int64_t row_parts = 1; row_parts <= threads; ++row_parts) {
    for (int64_t strip_parts = 1; strip_parts <= threads / row_parts; ++strip_parts) {
      const double m = std::min(rows, ceil_div(ceil_div(rows, row_step), row_parts) * row_step);
      const double n = ceil_div(strips, strip_parts) * kStripColumns;
      // Cycles per k: 128 products in one, or 16 bytes arranged or packed.
      const double cost = m * n / 128 + (m + n) / 16;
      const double turns = ceil_div(heads * row_parts * strip_parts, threads);
      if (least < 0 || turns * cost < least) {
        least = turns * cost;
        best = {row_parts, strip_parts};
      }
    }
  }
  return best;
}

// What all tasks share. The query heads of a group are one product of group * m rows, so that B is
// packed once for all of them; where Y's rows lie evenly, a block of rows may span several heads,
// which is what makes a decode step (m = 1) one product rather than `group` of them.
struct Job {
  Job(const BatchedShape& shape_, const BatchedLeft& a_, const BatchedRight& b_, float alpha_,
      const BatchedResult& y_)
      : shape(shape_),
        a(a_),
        b(b_),
        alpha(alpha_),
        y(y_),
        isa(active_isa()),
        rows(row_kernels(isa)),
        group(shape.heads / shape.kv_heads),
        even(group == 1 || shape.m == 1 || y.strides.head == shape.m * y.strides.row),
        ldy(shape.m == 1 ? y.strides.head : y.strides.row),
        kernel(choose_microkernel(isa, a.max_code, even ? group * shape.m : shape.m)),
        strips(strip_count(shape.n)),
        piece_strips(std::clamp(kPieceBytes / strip_bytes(shape.k), std::min(kFewestStrips, strips),
                                strips)),
        block_rows(std::min(
            std::clamp(kPieceBytes / std::max<int64_t>(shape.k, 1) / kFewestRows * kFewestRows,
                       kFewestRows, kMostRows),
            even ? group * shape.m : shape.m)),
        blocking(choose_blocking(kernel, block_rows, piece_strips, k_block_count(shape.k), 1)),
        packed_bytes(whole_lines(piece_strips * strip_bytes(shape.k))),
        codes_bytes(whole_lines(sq_cpu::codes_bytes(block_rows, shape.k))),
        workspace_bytes(packed_bytes + codes_bytes +
                        whole_lines(workspace_sums(kernel, blocking, k_block_count(shape.k)) *
                                    int64_t{sizeof(int32_t)})) {
    std::fill_n(ones, kMostRows, 1.0f);
    std::fill_n(zero_points, kMostRows, a.is_signed ? 128 : 0);
  }

  const BatchedShape& shape;
  const BatchedLeft& a;
  const BatchedRight& b;
  const float alpha;
  const BatchedResult& y;
  const Isa isa;
  const RowKernels& rows;
  const int64_t group;
  const bool even;
  const int64_t ldy;
  const Microkernel& kernel;
  const int64_t strips;
  const int64_t piece_strips;
  const int64_t block_rows;
  const Blocking blocking;  // of the largest block times the largest piece; good for smaller ones
  const int64_t packed_bytes;
  const int64_t codes_bytes;
  const int64_t workspace_bytes;
  float ones[kMostRows];
  int32_t zero_points[kMostRows];
};

class Task {
 public:
  Task(const Job& job, std::byte* workspace)
      : job_(job),
        packed_(workspace),
        codes_(reinterpret_cast<uint8_t*>(workspace + job.packed_bytes)),
        sums_(reinterpret_cast<int32_t*>(workspace + job.packed_bytes + job.codes_bytes)) {}

  // Rows and strips of the product of `head`, which counts kv heads through the batch.
  void run(int64_t head, Range rows, Range strips) {
    if (rows.size() == 0) return;
    head_ = head;
    block_ = {0, 0};
    for (int64_t s0 = strips.begin; s0 < strips.end; s0 += job_.piece_strips) {
      const int64_t n0 = s0 * kStripColumns;
      const int64_t s1 = std::min(s0 + job_.piece_strips, strips.end);
      const Range columns{n0, std::min(s1 * kStripColumns, job_.shape.n)};
      pack(columns);
      for (int64_t r0 = rows.begin; r0 < rows.end; r0 = block_.end) {
        const int64_t last = job_.even ? rows.end : (r0 / job_.shape.m + 1) * job_.shape.m;
        const Range block{r0, std::min({r0 + job_.block_rows, rows.end, last})};
        if (block.begin != block_.begin || block.end != block_.end) arrange(block);
        multiply(columns);
      }
    }
  }

  uint64_t bits() const { return bits_; }  // of all codes, joined

 private:
  int64_t batch() const { return head_ / job_.shape.kv_heads; }
  int64_t kv_head() const { return head_ % job_.shape.kv_heads; }

  // The offset of a query row, counted through the group's heads.
  int64_t offset(const BatchedStrides& strides, int64_t row) const {
    return batch() * strides.batch + (kv_head() * job_.group + row / job_.shape.m) * strides.head +
           row % job_.shape.m * strides.row;
  }

  void pack(Range columns) {
    const BatchedRight& b = job_.b;
    const int64_t k = job_.shape.k;
    const int8_t* w = b.data;
    if (k > 0) {  // else it may be null
      w += batch() * b.strides.batch + kv_head() * b.strides.head +
           columns.begin * (b.rows_are_n ? b.strides.row : 1);
    }
    (b.rows_are_n ? job_.rows.pack_nk : job_.rows.pack_kn)(
        {w, b.strides.row, columns.size(), k, packed_, job_.a.is_signed});
    const float* scale = nullptr;
    if (b.scale != nullptr && job_.y.type != BatchedType::kInt32) {
      scale = b.scale + head_ * job_.shape.n + columns.begin;
    }
    for (int64_t n0 = 0; n0 < columns.size(); n0 += kStripColumns) {
      const int64_t count = std::min(kStripColumns, columns.size() - n0);
      float scale_and_bias[2 * kStripColumns] = {};
      for (int64_t c = 0; c < count; ++c) {
        scale_and_bias[c] = scale == nullptr ? job_.alpha : job_.alpha * scale[n0 + c];
      }
      std::byte* trailer =
          packed_ + n0 / kStripColumns * strip_bytes(k) + k_block_count(k) * kTileBytes;
      std::memcpy(trailer + kStripColumns * sizeof(int32_t), scale_and_bias, sizeof scale_and_bias);
    }
  }

  void arrange(Range rows) {
    block_ = rows;
    if (job_.shape.k == 0) return;  // a.data may be null
    const CodeLayout layout(rows.size(), job_.shape.k);
    const uint8_t flip = job_.a.is_signed ? 0x80 : 0;  // q + 128
    const auto* a = static_cast<const char*>(job_.a.data);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      bits_ |= job_.rows.arrange(a + offset(job_.a.strides, row), job_.shape.k, flip,
                                 codes_ + layout.offset(row - rows.begin), layout.tile);
    }
  }

  void multiply(Range columns) const {
    const BatchedShape& shape = job_.shape;
    const int64_t first_row = head_ * job_.group * shape.m + block_.begin;
    const float* scale = job_.a.scale == nullptr ? job_.ones : job_.a.scale + first_row;
    GemmArgs args{};
    args.x.codes = codes_;
    args.x.scale = const_cast<float*>(scale);
    args.x.zero_point = const_cast<int32_t*>(job_.zero_points);
    args.x.m = block_.size();
    args.x.k = shape.k;
    args.x.max_code = job_.a.max_code;
    args.weight = {packed_, columns.size(), shape.k};
    args.output = output_of(job_.y.type);
    args.y = static_cast<char*>(job_.y.data) +
             (offset(job_.y.strides, block_.begin) + columns.begin) * element_bytes(args.output);
    args.ldy = job_.ldy;
    WorkCounter counter;  // the blocking is for one thread: it has one task
    run_tasks(&args, 1, Order::kAlternating, job_.kernel, job_.rows, job_.blocking, &counter, sums_,
              0, 1);
  }

  const Job& job_;
  std::byte* const packed_;
  uint8_t* const codes_;
  int32_t* const sums_;
  int64_t head_ = 0;
  Range block_{0, 0};  // the rows whose codes are arranged
  uint64_t bits_ = 0;
};

constexpr const char* kFunction = "batched matmul";

std::array<Steps, 3> steps(const BatchedStrides& s, int64_t batch, int64_t heads, int64_t rows) {
  return {{{s.batch, batch}, {s.head, heads}, {s.row, rows}}};
}

void check(const BatchedShape& s, const BatchedLeft& a, const BatchedRight& b, float alpha,
           const BatchedResult& y) {
  SQ_CHECK(s.batch >= 0 && s.heads >= 0 && s.kv_heads >= 0 && s.m >= 0 && s.n >= 0 && s.k >= 0,
           "batched matmul of batch ", s.batch, ", heads ", s.heads, " and ", s.kv_heads, ", m ",
           s.m, ", n ", s.n, ", k ", s.k, ": a size is negative");
  SQ_CHECK(bounded_product(s.batch, std::max(s.heads, s.kv_heads), std::max<int64_t>(s.m, 1),
                           std::max<int64_t>(s.n, 1), int64_t{sizeof(float)}) <= kMostBytes,
           "batched matmul of batch ", s.batch, ", heads ", s.heads, " and ", s.kv_heads, ", m ",
           s.m, ", n ", s.n, ": the result is more than any machine has");
  SQ_CHECK(s.kv_heads == 0 ? s.heads == 0 : s.heads % s.kv_heads == 0, "batched matmul: ", s.heads,
           " heads are not a multiple of ", s.kv_heads, " kv heads");
  SQ_CHECK(s.k <= kMaxDepth, "batched matmul: depth ", s.k, " exceeds ", kMaxDepth,
           ", beyond which an int32 sum can overflow; split it and add the parts");
  SQ_CHECK(a.max_code == 255 || (a.max_code == 127 && !a.is_signed),
           "batched matmul: a.max_code is ", a.max_code, "; it is 255, or 127 for u8");
  SQ_CHECK(is_one_of(y.type, BatchedType::kInt8), "batched matmul: y has the unknown BatchedType ",
           static_cast<int>(y.type));
  SQ_CHECK(y.type == BatchedType::kInt32 || std::isfinite(alpha), "batched matmul: alpha is ",
           alpha, "; it must be finite");
  const bool left = s.batch > 0 && s.heads > 0 && s.m > 0,
             right = s.batch > 0 && s.heads > 0 && s.n > 0;
  SQ_CHECK(a.data != nullptr || !left || s.k == 0, "batched matmul: a.data is null");
  SQ_CHECK(b.data != nullptr || !right || s.k == 0, "batched matmul: b.data is null");
  SQ_CHECK(y.data != nullptr || !left || !right, "batched matmul: y.data is null");
  check_reach(kFunction, "a", steps(a.strides, s.batch, s.heads, s.m));
  check_reach(kFunction, "b", steps(b.strides, s.batch, s.kv_heads, b.rows_are_n ? s.n : s.k));
  check_reach(kFunction, "y", steps(y.strides, s.batch, s.heads, s.m));
  if (left && right) check_apart(kFunction, steps(y.strides, s.batch, s.heads, s.m), s.n);
}

}  // namespace

void batched_matmul(const BatchedShape& shape, const BatchedLeft& a, const BatchedRight& b,
                    float alpha, const BatchedResult& y) {
  check(shape, a, b, alpha, y);
  if (shape.batch == 0 || shape.heads == 0 || shape.m == 0 || shape.n == 0) return;
  const Job job(shape, a, b, alpha, y);
  const int64_t heads = shape.batch * shape.kv_heads, rows = job.group * shape.m;
  const int workers = worker_count(rows, heads * shape.n, shape.k);
  const Split split = choose_split(heads, rows, row_step(job.kernel), job.strips, workers);
  const int64_t parts = split.row_parts * split.strip_parts;
  thread_local Scratch<std::byte> scratch;
  std::byte* const workspace = scratch.get(job.workspace_bytes * workers);
  std::atomic<uint64_t> bits{0};
  run_team(workers, [&](int worker, int count) {
    Task task(job, workspace + job.workspace_bytes * worker);
    for (int64_t t = worker; t < heads * parts; t += count) {
      task.run(t / parts,
               part(rows, row_step(job.kernel), split.row_parts, t % parts / split.strip_parts),
               part(job.strips, 1, split.strip_parts, t % split.strip_parts));
    }
    bits |= task.bits();
  });
  SQ_CHECK(a.max_code == 255 || (bits & 0x8080808080808080u) == 0,
           "batched matmul: a code of a exceeds max_code 127");
}

}  // namespace sq_cpu
