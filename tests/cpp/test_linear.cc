// The float side of the library: quantization, the epilogue, every type in and out, on every ISA
// against a plain scalar layer, bit for bit, with guard pages at both ends of every buffer.
//
//   test_linear [SEED [COUNT]]    all of it, or some of the random layers
#include "plain_layer.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;

struct Outputs {
  Guarded codes, scale, zero_point, t, y, y_scale, y_zero_point, sums;
};

// Every way to compute the layer, on the ISA in use; the bytes of y.
std::vector<char> check_layer(const Layer& layer, int threads, Outputs& out,
                              const std::string& what, Rng& rng) {
  const bool at_end = layer.at_end;
  const QuantizedActivation q =
      place_activation(layer.rows_of_codes(), layer.k, layer.quantizer.max_code(), out.codes,
                       out.scale, out.zero_point, at_end, layer.quantizer.terms);
  RowCounter counter;
  ActivationQuantizer quantizer = layer.quantizer;
  quantizer.counter = &counter;
  quantize_activations(layer.x, layer.x_type, layer.ldx, quantizer, q);
  check(same_counts(counter.reset(), layer.counts), what + ": the counts");
  check(rows_are_right(layer, layer.codes, gather_codes(q.codes, q.m, layer.depth()).data()),
        what + ": the codes");
  check(std::equal(layer.scale.begin(), layer.scale.end(), q.scale, same), what + ": the scales");
  check(rows_are_right(layer, layer.zero_point, q.zero_point), what + ": the zero points");

  auto* t = out.t.place_filled<int32_t>(layer.rows_of_codes() * layer.n, at_end);
  gemm(q, layer.weight, t, layer.n);
  check(rows_are_right(layer, layer.t, t), what + ": gemm");

  const Microkernel& kernel = choose_microkernel(active_isa(), q.max_code, q.m);
  const Blocking blocking = random_blocking(kernel, k_block_count(layer.k), rng);
  const Epilogue& e = layer.epilogue;
  EpilogueSteps steps{e.activation,   e.other, e.ld_other, e.residual, e.ld_residual,
                      e.operand_type, 1.0f,    0.0f,       {},         nullptr};
  if (layer.to_codes) {
    const QuantizedActivation y = place_activation(layer.m, layer.n, layer.y_quantizer.max_code(),
                                                   out.y, out.y_scale, out.y_zero_point, at_end);
    ActivationQuantizer y_quantizer = layer.y_quantizer;
    y_quantizer.counter = &counter;
    linear(q, layer.weight, y_quantizer, y, e);
    check(same_counts(counter.read(), {0, 0, 0, layer.m}), what + ": int8 out is chained");
    check(codes_are_right(layer, y), what + ": int8 out");
    const Grid grid = plain_grid(layer.y_quantizer, 0.0f, 0.0f);
    steps.grid = {grid.inverse, static_cast<float>(grid.low), static_cast<float>(grid.high),
                  grid.zero_point};
    steps.code_scale = y.scale;
    std::memset(y.codes, Guarded::kFiller, codes_bytes(y.m, y.k));
    std::fill_n(y.scale, y.m, grid.scale);
    run_blocked({q, layer.weight, y.codes, Output::kCode, CodeLayout(y.m, y.k).tile, &steps},
                kernel, blocking, threads, out.sums, at_end);
    check(codes_are_right(layer, y), what + ": int8 out, " + describe(blocking));
    const std::vector<uint8_t> codes = gather_codes(y.codes, y.m, y.k);
    return {codes.begin(), codes.end()};
  }
  const int64_t bytes = y_bytes(layer);
  auto* y = out.y.place_filled<char>(bytes, at_end);
  linear(layer.x, layer.x_type, layer.m, layer.ldx, layer.weight, quantizer, y, layer.y_type,
         layer.ldy, e);
  check(y_is_right(layer, y), what + ": linear");
  check(same_counts(counter.read(), layer.n == 0 ? RowCounts{} : layer.counts),
        what + ": linear counts");
  const std::vector<char> first(y, y + bytes);
  std::fill_n(y, bytes, Guarded::kFiller);
  linear(q, layer.weight, y, layer.y_type, layer.ldy, e);
  check(std::equal(first.begin(), first.end(), y), what + ": linear of codes");
  std::fill_n(y, bytes, Guarded::kFiller);
  run_blocked({q, layer.weight, y, static_cast<Output>(layer.y_type), layer.ldy, &steps}, kernel,
              blocking, threads, out.sums, at_end);
  check(std::equal(first.begin(), first.end(), y), what + ": " + describe(blocking));
  return first;
}

void fuzz(const std::vector<Isa>& isas, const Seeds& seeds) {
  Part part("random layers");
  Inputs in;
  Outputs out;
  for (uint64_t seed = seeds.first; seed < seeds.first + seeds.count; ++seed) {
    Rng rng(seed);
    const Layer layer = random_layer(seed, in, rng);
    const int threads = rng.threads();
    std::vector<char> reference;
    for (Isa isa : isas) {
      use(isa);
      const std::string what = join("seed ", seed, ": ", isa_name(isa), " ", describe(layer));
      const std::vector<char> y = check_layer(layer, threads, out, what, rng);
      if (isa == Isa::kReference) reference = y;
      check(y == reference, what + ": the bits of the reference, those of NaN too");
    }
  }
}

// The borders of the static grid: one element of a row, at every place, decides.
void test_fallback(Isa isa) {
  use(isa);
  Part part("rows with their own scale on " + isa_name(isa));
  const float denormal = 1e-40f, huge = std::numeric_limits<float>::max();
  struct Case {
    float x;  // in static steps
    int64_t clipped, underflowed;
  };
  ActivationQuantizer q;
  q.granularity = Granularity::kStatic;
  q.scale = 0.25f;  // so that steps are exact
  q.zero_point = 128;
  q.dynamic_fallback = true;
  const Case cases[] = {{0, 0, 0},   {127, 0, 0},       {127.499f, 0, 0}, {127.5f, 1, 0},
                        {128, 1, 0}, {-127.499f, 0, 0}, {-127.5f, 1, 0},  {15.5f, 0, 0},
                        {16, 0, 0},  {15.499f, 0, 1},   {-15.5f, 0, 0},   {-15.499f, 0, 1},
                        {1, 0, 1},   {denormal, 0, 1},  {huge, 1, 0},     {-huge, 1, 0}};
  for (const auto& [steps, clipped, underflowed] : cases) {
    for (int64_t k : {1, 15, 16, 17, 33, 64, 65, 130}) {
      for (int64_t place = 0; place < k; ++place) {
        std::vector<float> x(k), scale(1);
        x[place] = steps == huge || steps == -huge || steps == denormal ? steps : steps * q.scale;
        std::vector<uint8_t> u(codes_bytes(1, k));
        std::vector<int32_t> zero_point(1);
        RowCounter counter;
        q.counter = &counter;
        quantize_activations(x.data(), DType::kFloat32, k, q,
                             {u.data(), scale.data(), zero_point.data(), 1, k, 255});
        const std::string what = join(x[place], " at ", place, " of ", k);
        check(same_counts(counter.read(), {1, clipped, underflowed, 0}), what + ": counts");
        const bool own = clipped + underflowed > 0;
        const double absmax = std::max(1e-30, std::fabs(double{x[place]}));
        const auto expected = own ? static_cast<float>(absmax / 127) : q.scale;
        check(scale[0] == expected && zero_point[0] == 128, what + ": the scale");
        const float inverse = own ? static_cast<float>(127 / absmax) : 1 / q.scale;
        const std::vector<uint8_t> codes = gather_codes(u.data(), 1, k);
        bool right = true;
        for (int64_t i = 0; i < k; ++i) {
          right &= codes[i] == 128 + std::nearbyint(x[i] * inverse);
        }
        check(right, what + ": the codes");
      }
    }
  }
  // A row that only its rotation makes an outlier: 64 times 3 becomes one 24, 96 steps of 1/4; 64
  // times 5 is 160 of them.
  q.hadamard = 64;
  for (const auto& [value, clips] : {std::pair{3.0f, 0}, std::pair{5.0f, 1}}) {
    const std::vector<float> x(64, value);
    std::vector<float> scale(1);
    std::vector<uint8_t> u(codes_bytes(1, 64));
    std::vector<int32_t> zero_point(1);
    RowCounter counter;
    q.counter = &counter;
    quantize_activations(x.data(), DType::kFloat32, 64, q,
                         {u.data(), scale.data(), zero_point.data(), 1, 64, 255});
    check(same_counts(counter.read(), {1, clips, 0, 0}), join("64 times ", value));
  }
}

// All 65,536 half-precision values in, and a sweep of fp32 out, against the compiler's conversions.
void test_half(Isa isa) {
  use(isa);
  std::vector<uint16_t> halves(65536);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<uint8_t> u(codes_bytes(65536, 1));
  std::vector<float> scale(65536);
  std::vector<int32_t> zero_point(65536);
  quantize_activations(halves.data(), DType::kFloat16, 1, {},
                       {u.data(), scale.data(), zero_point.data(), 65536, 1, 255});
  bool same = true;
  for (size_t i = 0; i < halves.size(); ++i) {
    _Float16 half;
    std::memcpy(&half, &halves[i], 2);
    const double value = std::fabs(static_cast<double>(half));
    const auto expected = static_cast<float>(std::max(1e-30, value) / 127);
    same &= std::isfinite(value) ? scale[i] == expected : std::isnan(scale[i]);
  }
  check(same, isa_name(isa) + " reads every half");

  // k = 0 turns the layer into y = bias: the bias sweeps every fp32 exponent and rounding case.
  std::vector<float> bias;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 0x3fff1) {
    const auto word = static_cast<uint32_t>(bits);
    float value;
    std::memcpy(&value, &word, 4);
    if (!std::isnan(value)) bias.push_back(value);
  }
  for (int i = 0; i < 2048; ++i) {  // ties between two halves, subnormal ones included
    bias.push_back(std::ldexp(2 * i + 1, -25));
    bias.push_back(std::ldexp(2049 + 2 * i, -10));
  }
  const auto n = static_cast<int64_t>(bias.size());
  const std::vector<float> ones(n, 1.0f);
  std::vector<std::byte> packed(packed_bytes(n, 0));
  pack_weight(nullptr, ones.data(), bias.data(), n, 0, packed.data());
  std::vector<uint16_t> y(n);
  const float x = 0;
  linear(&x, DType::kFloat32, 1, 0, {packed.data(), n, 0}, {}, y.data(), DType::kFloat16, n);
  same = true;
  for (int64_t i = 0; i < n; ++i) {
    const auto half = static_cast<_Float16>(bias[i] + 0.0f);
    same &= std::memcmp(&half, &y[i], 2) == 0;
  }
  check(same, isa_name(isa) + " rounds to half once, to nearest even");
}

// Powers of two, and sums of few of them, come through the rotation exactly, and twice gives x.
void test_rotation(Isa isa) {
  use(isa);
  Part part("rotation on " + isa_name(isa));
  const RowKernels& kernels = row_kernels(isa);
  for (int64_t k : {1, 15, 16, 63, 64, 65, 100, 128, 191, 200}) {
    const int64_t whole = (k + 63) / 64 * 64;
    for (int64_t one = 0; one < k; ++one) {
      std::vector<float> x(k), rotated(whole, -1.0f), again(whole, -1.0f), expected(whole);
      x[one] = -4096.0f;
      kernels.rotate[0]({x.data(), nullptr, k}, 64, 0.125f, rotated.data());
      for (int64_t i = one / 64 * 64; i < one / 64 * 64 + 64; ++i) {
        expected[i] = __builtin_parityll(i & one & 63) ? 512.0f : -512.0f;
      }
      check(rotated == expected, join("element ", one, " of ", k));
      kernels.rotate[0]({rotated.data(), nullptr, whole}, 64, 0.125f, again.data());
      check(std::equal(x.begin(), x.end(), again.begin()),
            join("element ", one, " of ", k, ", twice"));
    }
  }
}

// So deep and long that it takes two passes: the operands and y move on with the rows.
void test_passes(Isa isa) {
  use(isa);
  Part part("two passes on " + isa_name(isa));
  const int64_t n = 3, k = kMaxDepth, pass = rows_per_pass(int64_t{1} << 30, k), m = pass + 5;
  Rng rng(6);
  std::vector<uint16_t> x(m * k);  // bf16
  for (auto& v : x) v = static_cast<uint16_t>(0x3f80 | (rng() & 0x8000) | rng.below(64));
  const Problem p = make_problem(0, n, k, 255, Fill::kUniform, rng);
  const std::vector<float> scale{1e-4f, 2e-4f, 3e-4f};
  std::vector<std::byte> packed(packed_bytes(n, k));
  pack_weight(p.w.data(), scale.data(), nullptr, n, k, packed.data());
  const PackedWeight weight{packed.data(), n, k};
  std::vector<float> operand(m * n);
  for (auto& v : operand) v = 1.0f + rng.below(100);
  const Epilogue epilogue{Activation::kSilu, operand.data(), n, operand.data(), n, DType::kFloat32};
  ActivationQuantizer quantizer;
  quantizer.symmetric = false;
  std::vector<float> y(m * n), one(n);
  linear(x.data(), DType::kBFloat16, m, k, weight, quantizer, y.data(), DType::kFloat32, n,
         epilogue);
  for (int64_t row : {int64_t{0}, pass - 1, pass, m - 1}) {
    Epilogue here = epilogue;
    here.other = here.residual = operand.data() + row * n;
    linear(x.data() + row * k, DType::kBFloat16, 1, k, weight, quantizer, one.data(),
           DType::kFloat32, n, here);
    check(std::equal(one.begin(), one.end(), y.begin() + row * n), join("row ", row));
  }
}

// Rows of weights as an embedding reads them: every column of a strip, every type.
void test_gather_rows(const std::vector<Isa>& isas, const Seeds& seeds) {
  Part part("gathered rows");
  Guarded memory, ids_memory, out;
  const uint64_t cases = std::min<uint64_t>(seeds.count, 200);
  for (uint64_t seed = seeds.first; seed < seeds.first + cases; ++seed) {
    Rng rng(seed);
    const int64_t n = 1 + rng.below(70), k = rng.below(140), count = rng.below(40);
    const int64_t ldy = k + rng.below(3);
    const auto type = static_cast<DType>(seed % 3);
    const Problem p = make_problem(0, n, k, 255, Fill::kUniform, rng);
    std::vector<float> scale(n), inverse(k);
    for (auto& one : scale) one = std::ldexp(1.0f + rng.below(100) / 100.0f, -8);
    for (auto& one : inverse) one = std::ldexp(1.0f + rng.below(100) / 100.0f, 2);
    auto* packed = memory.place_filled<std::byte>(packed_bytes(n, k), true);
    auto* ids = ids_memory.place_filled<int64_t>(count, true);
    for (int64_t i = 0; i < count; ++i) ids[i] = rng.below(n);
    const float* smoothing = rng.coin() ? inverse.data() : nullptr;
    const int64_t bytes = count == 0 ? 0 : ((count - 1) * ldy + k) * bytes_of(type);
    std::vector<char> expected(bytes, Guarded::kFiller);
    for (int64_t i = 0; i < count * k; ++i) {
      const int64_t row = ids[i / k], column = i % k;
      float v = static_cast<float>(p.w[row * k + column]) * scale[row];
      if (smoothing != nullptr) v *= smoothing[column];
      write(type, expected.data(), i / k * ldy + column, v);
    }
    for (Isa isa : isas) {
      use(isa);
      pack_weight(p.w.data(), scale.data(), nullptr, n, k, packed);
      auto* y = out.place_filled<char>(bytes, true);
      gather_rows({packed, n, k}, ids, count, smoothing, y, type, ldy);
      check(std::equal(expected.begin(), expected.end(), y), join("seed ", seed));
      for (const int64_t id : {int64_t{-1}, n}) {
        if (count == 0) continue;
        const int64_t good = ids[count - 1];
        ids[count - 1] = id;
        check_refused(join("id ", id, " is none of the ", n, " rows"),
                      [&] { gather_rows({packed, n, k}, ids, count, smoothing, y, type, ldy); });
        ids[count - 1] = good;
      }
    }
  }
}

void test_refusals() {
  Part part("refusals");
  float f[4] = {};
  int32_t z[4] = {};
  uint8_t u[4096] = {};
  std::byte packed[4096] = {};
  const PackedWeight weight{packed, 4, 4};
  const QuantizedActivation x{u, f, z, 1, 4, 255};
  const auto fp32 = DType::kFloat32;
  const auto call = [&](const void* x, int64_t ldx, const PackedWeight& w, void* y, int64_t ldy,
                        const Epilogue& e = {}) {
    linear(x, fp32, 1, ldx, w, {}, y, fp32, ldy, e);
  };
  check_refused("x is null", [&] { call(nullptr, 4, weight, f, 4); });
  check_refused("y is null", [&] { call(f, 4, weight, nullptr, 4); });
  check_refused("the packed weight is null", [&] { call(f, 4, {nullptr, 4, 4}, f, 4); });
  check_refused("x has rows of 4 elements only 3 apart", [&] { call(f, 3, weight, f, 4); });
  check_refused("y has rows of 4 elements only 3 apart", [&] { call(f, 4, weight, f, 3); });
  check_refused("x has -1 rows", [&] { linear(f, fp32, -1, 4, weight, {}, f, fp32, 4); });
  Epilogue narrow;
  narrow.other = f, narrow.ld_other = 3;
  check_refused("epilogue.other has rows of 4", [&] { call(f, 4, weight, f, 4, narrow); });
  narrow = {};
  narrow.residual = f, narrow.ld_residual = 3;
  check_refused("epilogue.residual has rows of 4", [&] { call(f, 4, weight, f, 4, narrow); });

  ActivationQuantizer fixed;
  fixed.granularity = Granularity::kStatic;
  fixed.zero_point = 128;
  for (float scale : {0.0f, -1.0f, std::numeric_limits<float>::quiet_NaN(),
                      std::numeric_limits<float>::infinity()}) {
    fixed.scale = scale;
    check_refused("must be positive and finite",
                  [&] { quantize_activations(f, fp32, 4, fixed, x); });
  }
  fixed.scale = 1.0f;
  fixed.zero_point = 127;
  check_refused("this grid needs 128", [&] { quantize_activations(f, fp32, 4, fixed, x); });
  fixed.symmetric = false;
  fixed.zero_point = 256;
  check_refused("this grid needs 0 .. 255", [&] { quantize_activations(f, fp32, 4, fixed, x); });
  fixed.zero_point = 0;

  QuantizedActivation bad = x;
  bad.k = 5;
  check_refused("x has 5 columns, the weight takes 4", [&] { gemm(bad, weight, z, 4); });
  bad = x;
  bad.max_code = 200;
  check_refused("x.max_code is 200", [&] { gemm(bad, weight, z, 4); });
  bad.max_code = 127;
  check_refused("out.max_code is 127", [&] { quantize_activations(f, fp32, 4, fixed, bad); });
  check_refused("y.max_code is 127", [&] { linear(x, weight, fixed, bad); });
  bad = x;
  bad.scale = nullptr;
  check_refused("x.scale is null", [&] { linear(bad, weight, f, fp32, 4); });
  bad = x;
  bad.terms = 3;
  check_refused("x.terms is 3", [&] { gemm(bad, weight, z, 4); });
  bad.terms = 2;
  check_refused("x has 1 rows of codes, which are no pairs", [&] { gemm(bad, weight, z, 4); });
  bad.m = 2;
  check_refused("out.terms is 2", [&] { quantize_activations(f, fp32, 4, fixed, bad); });
  bad.terms = 1;
  check_refused("y is [2, 4], the product [1, 4]", [&] { linear(x, weight, fixed, bad); });
  check_refused("needs a static quantizer", [&] { linear(x, weight, {}, x); });
  fixed.hadamard = 64;
  check_refused("needs a static quantizer", [&] { linear(x, weight, fixed, x); });
  fixed.hadamard = 32;
  check_refused("blocks are of 32 columns", [&] { quantize_activations(f, fp32, 4, fixed, x); });
}

}  // namespace

int main(int argc, char** argv) {
  const Seeds fuzzed = seeds(argc, argv, 2400);
  start();
  const std::vector<Isa> isas = isas_here();
  if (!fuzzed.chosen) {
    test_refusals();
    for (Isa isa : isas) test_half(isa);
    for (Isa isa : isas) test_rotation(isa);
    // What cuts the rows is the same on all: the quickest that is not emulated.
    test_passes(emulated(isas.back()) ? isas[isas.size() - 2] : isas.back());
  }
  for (Isa isa : isas) test_fallback(isa);
  test_gather_rows(isas, fuzzed);
  fuzz(isas, fuzzed);
  return finish();
}
