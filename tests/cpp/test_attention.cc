// append() and attention() against plain double precision on the same codes of q, k and v, and
// against themselves: the same bits on every ISA, for any threads, batch and cut of a prompt. Pages
// are full of NaN before tokens are written, and lie between guard pages.
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "attention_case.h"
#include "harness.h"
#include "sq_cpu/attention.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;

// The codes of a head and their scale; rotated by the definition of the Hadamard matrix, whose sums
// in fp32 are in the kernels' order.
struct Codes {
  std::vector<int> code;
  double scale;
};

Codes codes_of(const float* x, int64_t head_dim, bool rotate) {
  std::vector<float> v(x, x + head_dim);
  const int64_t block = head_dim & -head_dim;
  for (int64_t half = 1; rotate && half < block; half *= 2) {
    for (int64_t i = 0; i < head_dim; ++i) {
      if (i & half) continue;
      const float a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
  }
  double most = 1e-30;
  for (float value : v) most = std::max<double>(most, std::fabs(value));
  Codes codes{{}, static_cast<float>(most / 127)};
  const auto inverse = static_cast<float>(127 / most);
  for (float value : v) {
    codes.code.push_back(
        static_cast<int>(std::nearbyint(std::clamp(value * inverse, -127.f, 127.f))));
  }
  if (rotate) codes.scale /= std::sqrt(static_cast<double>(block));
  return codes;
}

// A score with its soft-cap and slope.
double bent(const Case& c, const Tokens& t, int64_t head, double v, int64_t distance) {
  if (c.softcap > 0) v = c.softcap * std::tanh(v / c.softcap);
  return c.sloped ? v + t.slopes[head] * static_cast<double>(distance) : v;
}

// Softmax(q k^T) v of bf16 keys and values, in double precision, of one row.
std::vector<double> expected_of_bf16(const Case& c, const Tokens& t, size_t s, int64_t row,
                                     int64_t head) {
  const int64_t length = c.before[s] + c.rows[s], position = c.before[s] + row;
  const int64_t d = c.head_dim, kv_head = head / c.group;
  const int64_t end = c.causal ? position + 1 : length;
  const int64_t begin = c.window ? std::max<int64_t>(0, position + 1 - c.window) : 0;
  const auto bf16 = [](float v) { return static_cast<double>(rounded(DType::kBFloat16, v)); };
  double most = c.sinks ? t.sinks[head] : -std::numeric_limits<double>::infinity();
  std::vector<double> score, y(d);
  for (int64_t j = begin; j < end; ++j) {
    const float* const k = &t.k[s][(j * c.kv_heads + kv_head) * d];
    double v = 0;
    for (int64_t e = 0; e < d; ++e) {
      v +=
          t.q[s][(row * c.heads() + head) * d + e] * bf16(k[e]) / std::sqrt(static_cast<double>(d));
    }
    score.push_back(bent(c, t, head, v, j - position));
    most = std::max(most, score.back());
  }
  double total = c.sinks ? std::exp(t.sinks[head] - most) : 0.0;
  for (double& v : score) total += v = std::exp(v - most);
  for (int64_t j = begin; j < end; ++j) {
    const float* const v = &t.v[s][(j * c.kv_heads + kv_head) * d];
    for (int64_t e = 0; e < d; ++e) y[e] += score[j - begin] / total * bf16(v[e]);
  }
  return y;
}

// Softmax(q k^T) v of the dequantized codes, in double precision, of one row; and how far codes of
// p may be from it, half of one each, and the variance of that.
struct Expected {
  std::vector<double> y, bound, variance;
};

Expected expected(const Case& c, const Tokens& t, size_t s, int64_t row, int64_t head) {
  const int64_t length = c.before[s] + c.rows[s], position = c.before[s] + row;
  const int64_t d = c.head_dim, kv_head = head / c.group;
  const Codes q = codes_of(&t.q[s][(row * c.heads() + head) * d], d, true);
  const int64_t end = c.causal ? position + 1 : length;
  const int64_t begin = c.window ? std::max<int64_t>(0, position + 1 - c.window) : 0;
  double most = c.sinks ? t.sinks[head] : -std::numeric_limits<double>::infinity();
  std::vector<double> score;
  std::vector<Codes> value;
  for (int64_t j = begin; j < end; ++j) {
    const Codes k = codes_of(&t.k[s][(j * c.kv_heads + kv_head) * d], d, true);
    value.push_back(codes_of(&t.v[s][(j * c.kv_heads + kv_head) * d], d, false));
    int64_t product = 0;
    for (int64_t e = 0; e < d; ++e) product += q.code[e] * k.code[e];
    double v = static_cast<double>(product) * q.scale * k.scale / std::sqrt(static_cast<double>(d));
    score.push_back(bent(c, t, head, v, j - position));
    most = std::max(most, score.back());
  }
  double total = c.sinks ? std::exp(t.sinks[head] - most) : 0.0;
  for (double& v : score) total += v = std::exp(v - most);
  Expected y{std::vector<double>(d), std::vector<double>(d), std::vector<double>(d)};
  for (int64_t j = begin; j < end;) {
    const int64_t page_end = std::min(end, (j / kPageTokens + 1) * kPageTokens);
    double heaviest = 0;
    for (int64_t i = j; i < page_end; ++i) {
      heaviest = std::max(heaviest, score[i - begin] * value[i - begin].scale);
    }
    const double unit = heaviest / 255 / total;
    for (; j < page_end; ++j) {
      const Codes& v = value[j - begin];
      for (int64_t e = 0; e < d; ++e) {
        y.y[e] += score[j - begin] / total * v.scale * v.code[e];
        y.bound[e] += unit / 2 * std::abs(v.code[e]);
        y.variance[e] += unit * unit / 12 * v.code[e] * v.code[e];
      }
    }
  }
  return y;
}

void check_values(const Case& c, const Tokens& t, const std::vector<std::vector<char>>& y) {
  const int64_t element = c.type == DType::kFloat32 ? 4 : 2;
  // The rounding of y; and that of s, whose error a sharp softmax multiplies.
  const double ulp = c.type == DType::kFloat32 ? 0 : c.type == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  const double own = c.spread * 2e-5;
  double worst = 0, squares = 0, variance = 0;
  for (size_t s = 0; s < c.rows.size(); ++s) {
    for (int64_t row = 0; row < c.rows[s]; row += std::max<int64_t>(1, c.rows[s] / 7)) {
      for (int64_t head = 0; head < c.heads(); ++head) {
        const Expected right = expected(c, t, s, row, head);
        for (int64_t e = 0; e < c.head_dim; ++e) {
          const int64_t at = (row * c.heads() + head) * c.head_dim + e;
          const double error = std::fabs(value_of(c.type, &y[s][at * element]) - right.y[e]);
          worst = std::max(worst, error - right.bound[e] - ulp * std::fabs(right.y[e]));
          squares += error * error;
          variance += right.variance[e] + ulp * ulp / 3 * right.y[e] * right.y[e];
        }
      }
    }
  }
  check(worst < own, c.describe() + join(": beyond the bound by ", worst));
  check(squares < 1.3 * variance + own * own,
        c.describe() + join(": squared errors ", squares, ", of codes ", variance));
}

void check_values_of_bf16(const Case& c, const Tokens& t, const std::vector<std::vector<char>>& y) {
  const int64_t element = c.type == DType::kFloat32 ? 4 : 2;
  const double ulp = c.type == DType::kFloat32 ? 0 : c.type == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  // Of scores: head_dim products of up to 8 * 8 * spread, each rounded; and exp's, 2.9e-6.
  const double own =
      8 * (c.spread * std::sqrt(static_cast<double>(c.head_dim)) * 64 * 0x1p-24 + 3e-6);
  double worst = 0;
  for (size_t s = 0; s < c.rows.size(); ++s) {
    for (int64_t row = 0; row < c.rows[s]; row += std::max<int64_t>(1, c.rows[s] / 7)) {
      for (int64_t head = 0; head < c.heads(); ++head) {
        const std::vector<double> right = expected_of_bf16(c, t, s, row, head);
        for (int64_t e = 0; e < c.head_dim; ++e) {
          const int64_t at = (row * c.heads() + head) * c.head_dim + e;
          const double error = std::fabs(value_of(c.type, &y[s][at * element]) - right[e]);
          worst = std::max(worst, error - ulp * std::fabs(right[e]));
        }
      }
    }
  }
  check(worst < own, c.describe() + join(": bf16 beyond the bound ", own, " by ", worst));
}

std::vector<Case> cases() {
  std::vector<Case> all;
  int turn = 0;
  for (int64_t head_dim : {1, 8, 20, 32, 64, 80, 96, 128, 160, 256}) {
    for (int64_t rows : {1, 2, 17, 70}) {
      Case c;
      c.head_dim = head_dim;
      c.kv_heads = 1 + turn % 3;
      c.group = std::vector<int64_t>{1, 2, 3, 4, 7, 8}[turn % 6];
      c.rows = {rows, 1 + turn % 5};
      c.before = {std::vector<int64_t>{0, 1, 63, 64, 65, 255, 256, 300}[turn % 8], turn % 3 * 100};
      c.type = static_cast<DType>(turn % 3);
      c.causal = turn % 7 != 3;
      c.window = c.causal && turn % 5 == 2 ? 1 + turn * 3 : 0;
      c.softcap = turn % 4 == 1 ? 3.0f : 0.0f;
      c.sloped = turn % 6 == 4;
      c.sinks = turn % 5 == 3;
      c.spread = turn % 3 == 2 ? 20 : 1;
      all.push_back(c);
      c.kv = KvType::kBFloat16;
      all.push_back(c);
      ++turn;
    }
  }
  return all;
}

using Results = std::vector<std::vector<std::vector<char>>>;

Results test_values() {
  const Part part("values " + isa_name(active_isa()));
  Results results;
  Rng rng(1);
  for (const Case& c : cases()) {
    const Tokens t = make_tokens(c, rng);
    Layer layer(c, 3, rng);
    results.push_back(layer.run(t));
    // Every ISA gives the first one's bits; the first is compared with plain arithmetic.
    if (active_isa() != Isa::kReference) continue;
    c.kv == KvType::kInt8 ? check_values(c, t, results.back())
                          : check_values_of_bf16(c, t, results.back());
  }
  return results;
}

// One call, or many: other threads, another batch, a prompt in pieces, another order of pages.
void test_same_bits() {
  const Part part("same bits " + isa_name(active_isa()));
  const int threads = omp_get_max_threads();
  Rng rng(2);
  for (int turn = 0; turn < 12; ++turn) {
    Case c;
    c.kv = turn < 6 ? KvType::kInt8 : KvType::kBFloat16;
    c.head_dim = std::vector<int64_t>{64, 80, 128}[turn % 3];
    c.kv_heads = 1 + turn % 2;
    c.group = std::vector<int64_t>{1, 4, 6}[turn / 2 % 3];
    c.rows = {330, 40, 7};
    c.before = {0, 0, 0};
    c.window = turn % 4 == 3 ? 100 : 0;
    c.sinks = turn % 3 == 1;
    if (is_slow(active_isa()) && !c.sinks && c.window == 0) continue;
    const Tokens t = make_tokens(c, rng);
    omp_set_num_threads(1);
    const auto whole = Layer(c, 0, rng).run(t);
    for (int count : {2, 3, 7}) {
      omp_set_num_threads(count);
      check(Layer(c, 5, rng).run(t) == whole, c.describe() + join(" threads=", count));
    }
    for (int64_t piece : {1, 63, 64, 65, 256}) {
      omp_set_num_threads(rng.threads());
      Layer layer(c, 2, rng);
      std::vector<std::vector<char>> y(c.rows.size());
      const bool together = rng.coin();
      for (int64_t from = 0; from < c.rows[0]; from += piece) {
        std::vector<size_t> which;
        std::vector<int64_t> begin, end;
        for (size_t s = 0; s < c.rows.size(); ++s) {
          if (from >= c.rows[s]) continue;
          which.push_back(s);
          begin.push_back(from);
          end.push_back(std::min(from + piece, c.rows[s]));
        }
        for (size_t i = 0; i < (together ? 1 : which.size()); ++i) {
          const auto part = together ? layer.run(t, which, begin, end)
                                     : layer.run(t, {which[i]}, {begin[i]}, {end[i]});
          for (size_t j = 0; j < part.size(); ++j) {
            auto& of = y[which[together ? j : i]];
            of.insert(of.end(), part[j].begin(), part[j].end());
          }
        }
      }
      check(y == whole, c.describe() + join(" by pieces of ", piece));
    }
  }
  omp_set_num_threads(threads);
}

void test_not_finite() {
  const Part part("not finite " + isa_name(active_isa()));
  Rng rng(3);
  Case c;
  c.rows = {70};
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (int turn = 0; turn < 6; ++turn) {
    const float bad = std::vector<float>{nan, inf, -inf}[turn % 3];
    c.kv = turn < 3 ? KvType::kInt8 : KvType::kBFloat16;
    for (int what : {0, 1, 2}) {
      Tokens t = make_tokens(c, rng);
      // Token 5, in its first head.
      const int64_t heads = what == 0 ? c.heads() : c.kv_heads;
      (what == 0 ? t.q : what == 1 ? t.k : t.v)[0][5 * heads * c.head_dim + 7] = bad;
      const std::vector<char> y = Layer(c, 0, rng).run(t)[0];
      bool right = true;
      for (int64_t row = 0; row < 70; ++row) {
        for (int64_t head = 0; head < c.heads(); ++head) {
          const bool poisoned = what == 0 ? row == 5 && head == 0 : row >= 5 && head < c.group;
          for (int64_t e = 0; e < c.head_dim; ++e) {
            const float v = value_of(c.type, &y[((row * c.heads() + head) * c.head_dim + e) * 4]);
            right &= std::isfinite(v) == !poisoned;
          }
        }
      }
      check(right, join(isa_name(active_isa()), ": ", bad, " in ", what));
    }
  }
}

void test_refusals() {
  const Part part("refusals");
  const int64_t rows[] = {0, 2}, length[] = {2}, short_length[] = {1}, long_length[] = {65};
  const int32_t table[] = {0}, wrong_table[] = {1};
  std::vector<std::byte> memory(page_bytes(64) + 64);
  auto* const pages =
      reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  std::vector<float> x(2 * 64);
  const KvCache cache{pages, 1, 1, 64};
  const Sequences sequences{1, rows, length, table, 1};
  const HeadRows k{x.data(), DType::kFloat32, 64, 64};
  check_refused("head of 0", [] { page_bytes(0); });
  check_refused("head of 1025", [] { page_bytes(1025); });
  check_refused("unknown KvType 2", [] { page_bytes(64, static_cast<KvType>(2)); });
  check_refused("0 kv heads", [&] { append({pages, 1, 0, 64}, sequences, k, k); });
  check_refused("has 2 new ones", [&] { append(cache, {1, rows, short_length, table, 1}, k, k); });
  check_refused("only 1 pages", [&] { append(cache, {1, rows, long_length, table, 1}, k, k); });
  check_refused("page 1 of a cache of 1",
                [&] { append(cache, {1, rows, length, wrong_table, 1}, k, k); });
  check_refused("null", [&] { append(cache, {1, rows, length, nullptr, 1}, k, k); });
  const int64_t falling[] = {0, 2, 1}, lengths[] = {2, 2}, wide_rows[] = {0, 2, 4};
  const int32_t twice[] = {0, 0};
  check_refused("begins with row 2, the next one with 1",
                [&] { append(cache, {2, falling, lengths, twice, 1}, k, k); });
  check_refused("page 0 is written for more than one",
                [&] { append(cache, {2, wide_rows, lengths, twice, 1}, k, k); });
  check_refused("begins within 64 bytes", [&] { append({pages + 1, 1, 1, 64}, sequences, k, k); });
  check_refused("more than any machine",
                [&] { append({pages, int64_t{1} << 40, 1, 64}, sequences, k, k); });
  check_refused("k is null", [&] { append(cache, sequences, {}, k); });
  append(cache, sequences, k, k);
  const HeadResult y{x.data(), DType::kFloat32, 64, 64};
  AttentionOptions options;
  const auto attend = [&](int64_t heads) { attention(cache, sequences, heads, k, options, y); };
  check_refused("0 heads", [&] { attend(0); });
  check_refused("q is null", [&] { attention(cache, sequences, 1, {}, options, y); });
  options.window = -1;
  check_refused("window is -1", [&] { attend(1); });
  options.window = 1;
  options.causal = false;
  check_refused("needs causal", [&] { attend(1); });
  options = {};
  options.softcap = 1e-40f;
  check_refused("leave the range of fp32", [&] { attend(1); });
  check_refused("y overlaps itself: 2 strides of 63 over 64", [&] {
    attention(cache, sequences, 1, k, {}, {x.data(), DType::kFloat32, 63, 64});
  });
  options = {};
  options.scale = std::numeric_limits<float>::infinity();
  check_refused("scale is inf", [&] { attend(1); });
}

}  // namespace

int main() {
  start();
  test_refusals();
  Results first;
  for (Isa isa : isas_here()) {
    use(isa);
    const Results results = test_values();
    if (first.empty()) first = results;
    for (size_t i = 0; i < results.size(); ++i) {
      check(results[i] == first[i],
            isa_name(isa) + ": other bits than the reference, case " + std::to_string(i));
    }
    test_same_bits();
    test_not_finite();
  }
  return finish();
}
