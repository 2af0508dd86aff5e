// Hostile calls of every function of the public headers: a good call of which one to three values
// are replaced by extremes of their type, fields of structures too. Each returns or throws
// std::invalid_argument of one line. Under sanitizers, no call reads or writes beyond its buffers.
//
// A size between the buffers' own and what no machine has is a lie that no library can see: there
// is none here. tests/kernels/test_hostile.py compares the names with those of the headers.
//
//   test_hostile [SEED [COUNT]]    COUNT calls of each function
#include <array>
#include <functional>
#include <limits>
#include <tuple>

#include "harness.h"
#include "sq_cpu/attention.h"
#include "sq_cpu/batched_matmul.h"
#include "sq_cpu/sampling.h"
#include "sq_cpu/saturation.h"

namespace {

using namespace sq_cpu;
using namespace sq_cpu::testing;

// ------------------------------------------------------------------------------------- extremes

template <typename T>
T any_of(std::initializer_list<T> values, Rng& rng) {
  return values.begin()[rng.below(static_cast<int64_t>(values.size()))];
}

void spoil(int64_t& size, Rng& rng) {
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min(), kMax = -(kMin + 1);
  size = any_of<int64_t>({kMin, kMin + 1, -kMostBytes, -1, 0, size > 0 ? size - 1 : 0, kMostBytes,
                          kMostBytes + 1, int64_t{1} << 56, int64_t{1} << 62, kMax - 15, kMax},
                         rng);
}

void spoil(int& value, Rng& rng) {
  value = any_of<int>(
      {std::numeric_limits<int>::min(), -1, 0, 127, 128, 255, 256, std::numeric_limits<int>::max()},
      rng);
}

void spoil(float& value, Rng& rng) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  value = any_of<float>({0.0f, -0.0f, -1.0f, 1e-45f, 1e-38f, 3.4e38f, kInfinity, -kInfinity,
                         std::numeric_limits<float>::quiet_NaN()},
                        rng);
}

void spoil(bool& value, Rng&) { value = !value; }

template <typename T>
std::enable_if_t<std::is_pointer_v<T>> spoil(T& address, Rng&) {
  address = nullptr;
}

template <typename T>
std::enable_if_t<std::is_enum_v<T>> spoil(T& value, Rng& rng) {
  value = static_cast<T>(any_of<int>({std::numeric_limits<int>::min(), -1, 0, 1, 2, 3, 4, 5, 6, 99,
                                      std::numeric_limits<int>::max()},
                                     rng));
}

void spoil(PackedWeight& w, Rng& rng);
void spoil(QuantizedActivation& x, Rng& rng);
void spoil(ActivationQuantizer& q, Rng& rng);
void spoil(Epilogue& e, Rng& rng);
void spoil(BatchedShape& s, Rng& rng);
void spoil(BatchedStrides& s, Rng& rng);
void spoil(BatchedLeft& a, Rng& rng);
void spoil(BatchedRight& b, Rng& rng);
void spoil(BatchedResult& y, Rng& rng);
void spoil(KvCache& cache, Rng& rng);
void spoil(Sequences& s, Rng& rng);
void spoil(HeadRows& x, Rng& rng);
void spoil(HeadResult& y, Rng& rng);
void spoil(AttentionOptions& options, Rng& rng);
void spoil(SampledRow& row, Rng& rng);
void spoil(LogitEdits& edits, Rng& rng);

// One of several values, of any types.
template <typename... Values>
void spoil_one(Rng& rng, Values&... values) {
  const int64_t chosen = rng.below(sizeof...(values));
  int64_t index = 0;
  ((index++ == chosen ? spoil(values, rng) : void()), ...);
}

void spoil(PackedWeight& w, Rng& rng) { spoil_one(rng, w.data, w.n, w.k); }
void spoil(QuantizedActivation& x, Rng& rng) {
  spoil_one(rng, x.codes, x.scale, x.zero_point, x.m, x.k, x.max_code, x.terms);
}
void spoil(ActivationQuantizer& q, Rng& rng) {
  spoil_one(rng, q.granularity, q.symmetric, q.reduce_range, q.scale, q.zero_point,
            q.inverse_smoothing, q.terms, q.hadamard, q.dynamic_fallback);
}
void spoil(Epilogue& e, Rng& rng) {
  // Not operand_type: a wider one than the buffers' is a lie.
  spoil_one(rng, e.activation, e.other, e.ld_other, e.residual, e.ld_residual);
}
void spoil(BatchedShape& s, Rng& rng) {
  spoil_one(rng, s.batch, s.heads, s.kv_heads, s.m, s.n, s.k);
}
void spoil(BatchedStrides& s, Rng& rng) { spoil_one(rng, s.batch, s.head, s.row); }
void spoil(BatchedLeft& a, Rng& rng) {
  spoil_one(rng, a.data, a.is_signed, a.strides, a.scale, a.max_code);
}
void spoil(BatchedRight& b, Rng& rng) { spoil_one(rng, b.data, b.strides, b.scale); }
void spoil(BatchedResult& y, Rng& rng) { spoil_one(rng, y.data, y.strides); }

void spoil(SampledRow& row, Rng& rng) {
  spoil_one(rng, row.logits, row.temperature, row.top_k, row.top_p, row.min_p, row.edits,
            row.allowed);
}
void spoil(LogitEdits& edits, Rng& rng) {
  spoil_one(rng, edits.count, edits.ids, edits.divisors, edits.addends);
}

// Three sequences, of 66 tokens (2 new), none, and 3 (all new); the pages of the first and last.
constexpr int64_t kLow = std::numeric_limits<int64_t>::min(), kHigh = -(kLow + 1);
constexpr int32_t kNoPage = std::numeric_limits<int32_t>::max();
constexpr int64_t kSequences = 3, kPagesOfOne = 2, kPages = 4;
using Rows = std::array<int64_t, kSequences + 1>;
using Lengths = std::array<int64_t, kSequences>;
using Table = std::array<int32_t, kSequences * kPagesOfOne>;
constexpr Rows kRows{0, 2, 2, 5};
constexpr Lengths kLengths{66, 0, 3};
constexpr Table kTable{3, 0, kNoPage, kNoPage, 2, kNoPage};
constexpr Rows kWrongRows[] = {{1, 2, 2, 5},        {0, 3, 2, 5},         {0, -1, 2, 5},
                               {0, kHigh, kLow, 5}, {0, 2, 2, kHigh},     {kLow, 0, 0, 5},
                               {0, kHigh, 2, 5},    {0, 0, kHigh, kHigh}, {kHigh, kHigh, kHigh, 5}};
constexpr Lengths kWrongLengths[] = {{kHigh, 0, 3}, {kLow, 0, 3}, {66, -1, 3},        {66, 0, 129},
                                     {1, 0, 3},     {66, 1, 3},   {kMostBytes, 0, 3}, {66, 0, 2}};
constexpr Table kWrongTables[] = {{3, 4, 0, 0, 2, 0},
                                  {3, -1, 0, 0, 2, 0},
                                  {kNoPage, 0, 0, 0, 2, 0},
                                  {3, 0, 0, 0, -kNoPage - 1, 0},
                                  {3, 2, 0, 0, 2, 0}};  // a page that two write

void spoil(KvCache& cache, Rng& rng) {
  spoil_one(rng, cache.pages, cache.page_count, cache.kv_heads, cache.head_dim);
}
void spoil(Sequences& s, Rng& rng) {
  switch (rng.below(4)) {
    case 0:
      s.first_row = kWrongRows[rng.below(std::size(kWrongRows))].data();
      return;
    case 1:
      s.length = kWrongLengths[rng.below(std::size(kWrongLengths))].data();
      return;
    case 2:
      s.table = kWrongTables[rng.below(std::size(kWrongTables))].data();
      return;
    default:
      spoil_one(rng, s.count, s.first_row, s.length, s.table, s.table_stride);
  }
}
void spoil(HeadRows& x, Rng& rng) { spoil_one(rng, x.data, x.type, x.row_stride, x.head_stride); }
void spoil(HeadResult& y, Rng& rng) { spoil_one(rng, y.data, y.type, y.row_stride, y.head_stride); }
void spoil(AttentionOptions& o, Rng& rng) {
  spoil_one(rng, o.scale, o.causal, o.window, o.softcap, o.slopes, o.sinks);
}

// ---------------------------------------------------------------------------------------- calls

class Attack {
 public:
  explicit Attack(const Seeds& seeds) : seeds_(seeds) {}

  template <typename Result, typename... Parameters>
  void operator()(const std::string& name, Result (*function)(Parameters...),
                  std::decay_t<Parameters>... good) {
    Part part(name);
    int64_t refused = 0;
    for (uint64_t seed = seeds_.first; seed < seeds_.first + seeds_.count; ++seed) {
      Rng rng(seed);
      std::tuple<std::decay_t<Parameters>...> arguments(good...);
      for (int64_t times = seed == 0 ? 0 : rng.between(1, 3); times > 0; --times) {
        std::apply([&](auto&... values) { spoil_one(rng, values...); }, arguments);
      }
      std::string message;
      try {
        std::apply(function, arguments);
      } catch (const std::invalid_argument& e) {
        message = e.what();
        ++refused;
        check(!message.empty() && message.find('\n') == std::string::npos,
              join(name, " seed ", seed, ": ", message));
      } catch (const std::exception& e) {
        message = e.what();
        check(false, join(name, " seed ", seed, ": another exception: ", message));
      }
      check(seed > 0 || message.empty(), join(name, ", the good call: ", message));
    }
    check(seeds_.count < 100 || refused > 0, name + ": no call was refused");
  }

 private:
  const Seeds seeds_;
};

constexpr int64_t kM = 5, kN = 33, kK = 130, kHeads = 4, kKvHeads = 2, kBatch = 2;
constexpr int64_t kBefore = kBatch + kHeads + kN, kHeadDim = 20;

// Buffers of exactly what a good call takes, each an allocation of its own.
struct Buffers {
  std::vector<float> x = std::vector<float>(kM * kK, 0.5f), y = std::vector<float>(kM * kN);
  std::vector<float> operand = std::vector<float>(kM * kN, 1.0f);
  std::vector<float> smoothing = std::vector<float>(kK, 2.0f);
  std::vector<int8_t> w = std::vector<int8_t>(kN * kK, -128);
  std::vector<float> scale = std::vector<float>(kN, 0.1f), bias = std::vector<float>(kN, 1.0f);
  std::vector<std::byte> packed = std::vector<std::byte>(packed_bytes(kN, kK));
  std::vector<uint8_t> codes = std::vector<uint8_t>(codes_bytes(kM, kK), 200);
  std::vector<uint8_t> y_codes = std::vector<uint8_t>(codes_bytes(kM, kN));
  std::vector<float> row_scale = std::vector<float>(kM, 0.1f), y_scale = std::vector<float>(kM);
  std::vector<int32_t> zero_point = std::vector<int32_t>(kM, 128),
                       y_zero_point = std::vector<int32_t>(kM),
                       sums = std::vector<int32_t>(kM * kN);
  // Strides of -1 are allowed, and reach a little before the first row.
  std::vector<int8_t> a = std::vector<int8_t>(kBefore + kBatch * kHeads * kM * kK, 3);
  std::vector<int8_t> b = std::vector<int8_t>(kBefore + kBatch * kKvHeads * kN * kK, -128);
  std::vector<float> a_scale = std::vector<float>(kBatch * kHeads * kM, 1.0f);
  std::vector<float> b_scale = std::vector<float>(kBatch * kKvHeads * kN, 1.0f);
  std::vector<float> result = std::vector<float>(kBatch * kHeads * kM * kN);
  std::vector<float> q = std::vector<float>(kBefore + kM * kHeads * kHeadDim, 0.5f), attended = q;
  std::vector<float> kv = std::vector<float>(kBefore + kM * kKvHeads * kHeadDim, 0.5f);
  std::vector<float> slopes = std::vector<float>(kHeads, 0.5f);
  Guarded page_memory;
  std::byte* pages =
      page_memory.place_filled<std::byte>(kPages * kKvHeads * page_bytes(kHeadDim), true);
};

using LinearOfFloats = void (*)(const void*, DType, int64_t, int64_t, const PackedWeight&,
                                const ActivationQuantizer&, void*, DType, int64_t, const Epilogue&);
using LinearOfCodes = void (*)(const QuantizedActivation&, const PackedWeight&, void*, DType,
                               int64_t, const Epilogue&);
using LinearToCodes = void (*)(const QuantizedActivation&, const PackedWeight&,
                               const ActivationQuantizer&, const QuantizedActivation&,
                               const Epilogue&);

void sample_one(const SampledRow& row, int64_t vocabulary, int64_t* id) {
  sample(&row, 1, vocabulary, id);
}

void attack_all(Attack attack) {
  Buffers o;
  const auto fp32 = DType::kFloat32;
  const PackedWeight weight{o.packed.data(), kN, kK};
  const QuantizedActivation x{o.codes.data(), o.row_scale.data(), o.zero_point.data(), kM, kK, 255};
  const QuantizedActivation y{
      o.y_codes.data(), o.y_scale.data(), o.y_zero_point.data(), kM, kN, 255};
  ActivationQuantizer quantizer;
  quantizer.inverse_smoothing = o.smoothing.data();
  ActivationQuantizer fixed;
  fixed.granularity = Granularity::kStatic;
  fixed.scale = 0.1f;
  fixed.zero_point = 128;
  fixed.dynamic_fallback = true;
  const Epilogue epilogue{Activation::kSilu, o.operand.data(), kN, o.operand.data(), kN, fp32};

  attack("packed_bytes", &packed_bytes, kN, kK);
  attack("codes_bytes", &codes_bytes, kM, kK);
  attack("pack_weight", &pack_weight, o.w.data(), o.scale.data(), o.bias.data(), kN, kK,
         o.packed.data());
  attack("unpack_weight", &unpack_weight, weight, o.w.data(), o.scale.data(), o.bias.data());
  attack("quantize_activations", &quantize_activations, o.x.data(), fp32, kK, quantizer, x);
  attack("linear", static_cast<LinearOfFloats>(&linear), o.x.data(), fp32, kM, kK, weight,
         quantizer, o.y.data(), fp32, kN, epilogue);
  attack("linear", static_cast<LinearOfCodes>(&linear), x, weight, o.y.data(), fp32, kN, epilogue);
  attack("linear", static_cast<LinearToCodes>(&linear), x, weight, fixed, y, epilogue);
  attack("gemm", &gemm, x, weight, o.sums.data(), kN);
  attack("count_saturation", &count_saturation, x, weight);
  const BatchedStrides a_strides{kHeads * kM * kK, kM * kK, kK};
  const BatchedStrides b_strides{kKvHeads * kN * kK, kN * kK, kK};
  attack("batched_matmul", &batched_matmul, BatchedShape{kBatch, kHeads, kKvHeads, kM, kN, kK},
         BatchedLeft{o.a.data() + kBefore, true, a_strides, o.a_scale.data()},
         BatchedRight{o.b.data() + kBefore, true, b_strides, o.b_scale.data()}, 0.5f,
         BatchedResult{o.result.data(), BatchedType::kFloat32, {kHeads * kM * kN, kM * kN, kN}});
  const KvCache cache{o.pages, kPages, kKvHeads, kHeadDim};
  const Sequences sequences{kSequences, kRows.data(), kLengths.data(), kTable.data(), kPagesOfOne};
  const HeadRows kv{o.kv.data() + kBefore, fp32, kKvHeads * kHeadDim, kHeadDim};
  attack("page_bytes", &page_bytes, kHeadDim, KvType::kBFloat16);
  attack("append", &append, cache, sequences, kv, kv);
  attack("attention", &attention, cache, sequences, kHeads,
         HeadRows{o.q.data() + kBefore, fp32, kHeads * kHeadDim, kHeadDim},
         AttentionOptions{0.5f, true, 3, 2.0f, o.slopes.data(), o.slopes.data()},
         HeadResult{o.attended.data(), fp32, kHeads * kHeadDim, kHeadDim});
  attack("isa_name", &isa_name, active_isa());
  const std::vector<int64_t> ids(kM, kN - 1);
  int64_t chosen = 0;
  const int64_t edited[] = {0, 7};
  const float factors[] = {1.5f, 2.0f};
  const uint32_t allowed[] = {~0u, ~0u};
  const SampledRow row{o.y.data(), 0.7f, 5, 0.9f, 0.1f, 3, 4, {2, edited, factors, factors},
                       allowed};
  attack("sample", &sample_one, row, kN, &chosen);
  attack("gather_rows", &gather_rows, weight, ids.data(), kM, o.smoothing.data(), o.x.data(), fp32,
         kK);
}

}  // namespace

int main(int argc, char** argv) {
  const Seeds chosen = seeds(argc, argv, 2000);
  start();
  for (Isa isa : isas_here()) {
    if (emulated(isa)) continue;  // checks come before any instruction set's code
    std::printf("%s\n", isa_name(isa).c_str());
    use(isa);
    attack_all(Attack(chosen));
  }
  return finish();
}
