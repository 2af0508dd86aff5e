// batched_matmul() on every ISA against plain int64 arithmetic, with guard pages at both ends of
// every operand. AMX runs natively where there is AMX, else under the emulator.
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "harness.h"
#include "sq_cpu/batched_matmul.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;

enum class Fill { kRandom, kHigh, kLow, kAlternating };
enum class Layout { kHeadsFirst, kRowsFirst };  // [B, H, L, D], or [B, L, H, D] seen as that

struct Case {
  BatchedShape shape;
  bool is_signed = true;
  bool rows_are_n = true;
  BatchedType type = BatchedType::kInt32;
  Fill fill = Fill::kRandom;
  Layout layout = Layout::kHeadsFirst;
  bool scaled = false;  // by a and by b
  int max_code = 255;

  std::string describe() const {
    const BatchedShape& s = shape;
    std::string text = isa_name(active_isa());
    for (int64_t size : {s.batch, s.heads, s.kv_heads, s.m, s.n, s.k}) {
      text += " " + std::to_string(size);
    }
    for (int option : {int(is_signed), int(rows_are_n), int(type), int(fill), int(layout),
                       int(scaled), max_code}) {
      text += "," + std::to_string(option);
    }
    return text;
  }
};

BatchedStrides strides(Layout layout, int64_t heads, int64_t rows, int64_t columns) {
  return layout == Layout::kHeadsFirst
             ? BatchedStrides{heads * rows * columns, rows * columns, columns}
             : BatchedStrides{rows * heads * columns, columns, heads * columns};
}

int64_t bytes_of(BatchedType type) {
  return type == BatchedType::kInt8                                        ? 1
         : type == BatchedType::kBFloat16 || type == BatchedType::kFloat16 ? 2
                                                                           : 4;
}

uint16_t bfloat16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return std::isnan(v) ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

void store(BatchedType type, int64_t t, float scale, char* y) {
  const float v = std::fma(static_cast<float>(t), scale, 0.0f);
  const auto integer = static_cast<int32_t>(t);
  const auto half = static_cast<_Float16>(v);
  const uint16_t brain = bfloat16(v);
  const float limited = v > -127 ? std::fmin(v, 127.0f) : -127.0f;
  const auto code = static_cast<int8_t>(std::nearbyint(limited));
  switch (type) {
    case BatchedType::kFloat32:
      std::memcpy(y, &v, 4);
      break;
    case BatchedType::kBFloat16:
      std::memcpy(y, &brain, 2);
      break;
    case BatchedType::kFloat16:
      std::memcpy(y, &half, 2);
      break;
    case BatchedType::kInt32:
      std::memcpy(y, &integer, 4);
      break;
    case BatchedType::kInt8:
      std::memcpy(y, &code, 1);
      break;
  }
}

struct Operands {
  std::vector<int8_t> a, b;  // a: the bytes, of either sign
  std::vector<float> a_scale, b_scale;
  float alpha;
};

int8_t byte(Fill fill, int64_t i, int low, int high, std::mt19937& rng) {
  switch (fill) {
    case Fill::kRandom:
      break;
    case Fill::kHigh:
      return static_cast<int8_t>(high);
    case Fill::kLow:
      return static_cast<int8_t>(low);
    case Fill::kAlternating:
      return static_cast<int8_t>(i % 2 ? low : high);
  }
  return static_cast<int8_t>(low + static_cast<int>(rng() % (high - low + 1)));
}

Operands make_operands(const Case& c, std::mt19937& rng) {
  const BatchedShape& s = c.shape;
  Operands o;
  o.a.resize(s.batch * s.heads * s.m * s.k);
  o.b.resize(s.batch * s.kv_heads * s.n * s.k);
  const Fill a_fill = c.fill == Fill::kLow && !c.is_signed ? Fill::kHigh : c.fill;
  for (size_t i = 0; i < o.a.size(); ++i) {
    o.a[i] = byte(a_fill, i, c.is_signed ? -128 : 0, c.is_signed ? 127 : c.max_code, rng);
  }
  for (size_t i = 0; i < o.b.size(); ++i) o.b[i] = byte(c.fill, i, -128, 127, rng);
  // Codes should fall inside and outside of +-127.
  o.alpha = 1.0f / (64 * (s.k + 1));
  std::uniform_real_distribution<float> near(0.3f, 1.7f);
  if (c.scaled) {
    for (int64_t i = 0; i < s.batch * s.heads * s.m; ++i) o.a_scale.push_back(near(rng));
    for (int64_t i = 0; i < s.batch * s.kv_heads * s.n; ++i) o.b_scale.push_back(near(rng));
  }
  return o;
}

size_t result_bytes(const Case& c) {
  const BatchedShape& s = c.shape;
  return s.batch * s.heads * s.m * s.n * bytes_of(c.type);
}

std::vector<char> expected(const Case& c, const Operands& o) {
  const BatchedShape& s = c.shape;
  const int64_t bytes = bytes_of(c.type);
  std::vector<char> y(result_bytes(c));
  const BatchedStrides a = strides(c.layout, s.heads, s.m, s.k);
  const BatchedStrides b =
      strides(c.layout, s.kv_heads, c.rows_are_n ? s.n : s.k, c.rows_are_n ? s.k : s.n);
  const BatchedStrides to = strides(c.layout, s.heads, s.m, s.n);
  for (int64_t i = 0; i < s.batch; ++i) {
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t kv = h / (s.heads / s.kv_heads);
      for (int64_t m = 0; m < s.m; ++m) {
        for (int64_t n = 0; n < s.n; ++n) {
          const int8_t* x = o.a.data() + i * a.batch + h * a.head + m * a.row;
          const int8_t* w = o.b.data() + i * b.batch + kv * b.head + n * (c.rows_are_n ? b.row : 1);
          int64_t t = 0;
          for (int64_t k = 0; k < s.k; ++k) {
            const int code = c.is_signed ? x[k] : static_cast<uint8_t>(x[k]);
            t += int64_t{code} * w[k * (c.rows_are_n ? 1 : b.row)];
          }
          float scale = o.alpha;
          if (c.scaled) {
            scale *= o.b_scale[(i * s.kv_heads + kv) * s.n + n];
            scale *= o.a_scale[(i * s.heads + h) * s.m + m];
          }
          store(c.type, t, scale, &y[(i * to.batch + h * to.head + m * to.row + n) * bytes]);
        }
      }
    }
  }
  return y;
}

struct Buffers {
  Guarded a, b, y;
};

std::vector<char> run(const Case& c, const Operands& o, Buffers& buffers, bool at_end) {
  const BatchedShape& s = c.shape;
  const size_t bytes = result_bytes(c);
  auto* a = buffers.a.place<int8_t>(o.a.size(), at_end);
  auto* b = buffers.b.place<int8_t>(o.b.size(), at_end);
  auto* y = buffers.y.place<char>(bytes, at_end);
  if (!o.a.empty()) std::memcpy(a, o.a.data(), o.a.size());
  if (!o.b.empty()) std::memcpy(b, o.b.data(), o.b.size());
  std::memset(y, 0x5a, bytes);
  batched_matmul(s,
                 {a, c.is_signed, strides(c.layout, s.heads, s.m, s.k),
                  c.scaled ? o.a_scale.data() : nullptr, c.max_code},
                 {b, c.rows_are_n,
                  strides(c.layout, s.kv_heads, c.rows_are_n ? s.n : s.k, c.rows_are_n ? s.k : s.n),
                  c.scaled ? o.b_scale.data() : nullptr},
                 o.alpha, {y, c.type, strides(c.layout, s.heads, s.m, s.n)});
  return {y, y + bytes};
}

void test_case(const Case& c, Buffers& buffers, std::mt19937& rng, bool at_end) {
  const Operands o = make_operands(c, rng);
  check(run(c, o, buffers, at_end) == expected(c, o), c.describe());
}

constexpr int64_t kLengths[] = {0, 1, 2, 15, 16, 17, 33, 100};
constexpr int64_t kGroups[] = {1, 2, 3, 7, 8};

// Q K^T and P V for every pair of lengths; everything else takes turns.
void test_shapes(Buffers& buffers) {
  std::mt19937 rng(1);
  int turn = 0;
  for (int64_t head_dim : {1, 3, 31, 64, 65, 80, 96, 128, 256}) {
    for (int64_t queries : kLengths) {
      for (int64_t keys : kLengths) {
        for (bool scores : {true, false}) {
          const int64_t kv_heads = 1 + turn % 2;
          Case c{{1 + turn / 2 % 2, kv_heads * kGroups[turn % 5], kv_heads, queries,
                  scores ? keys : head_dim, scores ? head_dim : keys}};
          c.is_signed = turn % 7 == 0 ? !scores : scores;
          c.rows_are_n = turn % 11 == 0 ? !scores : scores;
          c.type = static_cast<BatchedType>(turn % 9 < 5 ? turn % 9 : 3);
          c.fill = static_cast<Fill>(turn / 3 % 4);
          c.layout = static_cast<Layout>(turn / 5 % 2);
          c.scaled = turn % 3 == 1;
          c.max_code = !c.is_signed && turn % 4 == 0 ? 127 : 255;
          test_case(c, buffers, rng, turn % 2);
          ++turn;
        }
      }
    }
  }
}

void test_groups(Buffers& buffers) {
  std::mt19937 rng(2);
  for (int64_t group : kGroups) {
    for (int64_t queries : {1, 5, 33}) {
      for (Layout layout : {Layout::kHeadsFirst, Layout::kRowsFirst}) {
        for (bool scores : {true, false}) {
          Case c{{2, 3 * group, 3, queries, scores ? 100 : 80, scores ? 80 : 100}};
          c.is_signed = c.rows_are_n = scores;
          c.layout = layout;
          c.type = BatchedType::kFloat32;
          c.scaled = true;
          test_case(c, buffers, rng, true);
        }
      }
    }
  }
}

// Beyond a block of rows and a piece of the right operand, and the split among threads: few heads,
// many, long rows, long columns.
void test_threads(Buffers& buffers) {
  std::mt19937 rng(3);
  const BatchedShape shapes[] = {{1, 2, 1, 20, 4400, 128}, {1, 2, 1, 35, 128, 4400},
                                 {1, 4, 1, 1, 7200, 128},  {1, 4, 1, 1, 128, 7200},
                                 {3, 6, 3, 40, 100, 64},   {1, 1, 1, 700, 40, 80},
                                 {1, 1, 1, 3, 20, 65793}};
  const int before = omp_get_max_threads();
  for (const BatchedShape& shape : shapes) {
    for (Layout layout : {Layout::kHeadsFirst, Layout::kRowsFirst}) {
      Case c{shape};
      c.is_signed = c.rows_are_n = shape.k <= 128;
      c.type = BatchedType::kBFloat16;
      c.layout = layout;
      c.scaled = true;
      const Operands o = make_operands(c, rng);
      const std::vector<char> y = expected(c, o);
      for (int threads : {1, 2, 3, 7}) {
        if (is_slow(active_isa()) && threads != 3) continue;
        omp_set_num_threads(threads);
        check(run(c, o, buffers, true) == y, c.describe() + " threads=" + std::to_string(threads));
      }
    }
  }
  omp_set_num_threads(before);

  Case c{{3, 6, 3, 40, 100, 64}};
  const Operands o = make_operands(c, rng);
  const std::vector<char> y = expected(c, o);
  bool same = true;
#pragma omp parallel num_threads(3) reduction(&& : same)
  {
    Buffers own;
    same = run(c, o, own, true) == y;
  }
  check(same, isa_name(active_isa()) + " inside a parallel region");
}

// The deepest sums of all, at the extremes: they stay within int32.
void test_deepest(Buffers& buffers) {
  std::mt19937 rng(4);
  for (Fill fill : {Fill::kHigh, Fill::kLow}) {
    for (bool is_signed : {true, false}) {
      Case c{{1, 1, 1, 1, 1, kMaxDepth}};
      c.is_signed = is_signed;
      c.fill = fill;
      test_case(c, buffers, rng, true);
    }
  }
}

void test_not_finite(Buffers& buffers) {
  std::mt19937 rng(5);
  for (BatchedType type : {BatchedType::kFloat32, BatchedType::kInt8}) {
    Case c{{1, 2, 1, 5, 20, 64}};
    c.type = type;
    c.scaled = true;
    Operands o = make_operands(c, rng);
    o.a_scale[3] = std::numeric_limits<float>::quiet_NaN();
    const std::vector<char> y = run(c, o, buffers, true);
    bool right = true;
    for (int64_t i = 0; i < 10 * 20; ++i) {
      float v = 0;
      if (type == BatchedType::kFloat32) std::memcpy(&v, &y[4 * i], 4);
      const bool marked =
          type == BatchedType::kFloat32 ? std::isnan(v) : static_cast<int8_t>(y[i]) == -127;
      if (i / 20 == 3) right &= marked;
      if (i / 20 != 3 && type == BatchedType::kFloat32) right &= !marked;
    }
    check(right, isa_name(active_isa()) + ": a NaN scale stays in its row");
  }
}

bool refused(const char* message, const BatchedShape& s, const BatchedLeft& a,
             const BatchedRight& b, float alpha, const BatchedResult& y) {
  try {
    batched_matmul(s, a, b, alpha, y);
  } catch (const std::invalid_argument& e) {
    if (std::string(e.what()).find(message) != std::string::npos) return true;
    std::printf("said: %s\n", e.what());
  }
  return false;
}

void test_refusals() {
  uint8_t a[4] = {1, 2, 128, 3};
  int8_t b[4] = {};
  float y[4];
  const BatchedShape one{1, 1, 1, 1, 1, 4};
  const BatchedLeft left{a, false, {4, 4, 4}};
  const BatchedRight right{b, true, {4, 4, 4}};
  const BatchedResult result{y, BatchedType::kFloat32, {1, 1, 1}};
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const struct {
    const char* message;
    BatchedShape shape = {1, 1, 1, 1, 1, 4};
    BatchedLeft a;
    BatchedRight b;
    float alpha;
    BatchedResult y;
  } bad[] = {
      {"a size is negative", {1, 1, 1, -1, 1, 4}, left, right, 1, result},
      {"3 heads are not a multiple of 2", {1, 3, 2, 1, 1, 4}, left, right, 1, result},
      {"1 heads are not a multiple of 0", {1, 1, 0, 1, 1, 4}, left, right, 1, result},
      {"depth 65794 exceeds 65793", {1, 1, 1, 1, 1, 65794}, left, right, 1, result},
      {"max_code is 100", one, {a, false, {}, nullptr, 100}, right, 1, result},
      {"max_code is 127", one, {a, true, {}, nullptr, 127}, right, 1, result},
      {"exceeds max_code 127", one, {a, false, {}, nullptr, 127}, right, 1, result},
      {"alpha is nan", one, left, right, nan, result},
      {"a.data is null", one, {nullptr, false, {}}, right, 1, result},
      {"b.data is null", one, left, {nullptr, true, {}}, 1, result},
      {"y.data is null", one, left, right, 1, {nullptr, BatchedType::kFloat32, {}}},
      {"the unknown BatchedType 5", one, left, right, 1, {y, static_cast<BatchedType>(5), {}}},
      {"the result is more than", {1, 1, 1, int64_t{1} << 47, 1, 4}, left, right, 1, result},
      {"2 strides of 9223372036854775807 in a",
       {1, 1, 1, 2, 1, 4},
       {a, false, {4, 4, std::numeric_limits<int64_t>::max()}},
       right,
       1,
       {y, BatchedType::kFloat32, {2, 2, 1}}},
      {"y overlaps itself: 2 strides of 1 over 2", {1, 1, 1, 2, 2, 4}, left, right, 1, result},
      {"y overlaps itself: 2 strides of 1 over 2",
       {1, 2, 1, 2, 1, 4},
       left,
       right,
       1,
       {y, BatchedType::kFloat32, {4, 1, 1}}},
  };
  for (const auto& r : bad) {
    check(refused(r.message, r.shape, r.a, r.b, r.alpha, r.y), r.message);
  }
  batched_matmul({1, 1, 1, 1, 1, 0}, {nullptr, true, {}}, {nullptr, true, {}}, 1, result);
  check(y[0] == 0, "depth 0 gives 0");
}

}  // namespace

int main() {
  start();
  Buffers buffers;
  test_refusals();
  for (Isa isa : isas_here()) {
    Part part("batched matmul on " + isa_name(isa));
    use(isa);
    test_shapes(buffers);
    test_groups(buffers);
    test_threads(buffers);
    test_deepest(buffers);
    test_not_finite(buffers);
  }
  return finish();
}
