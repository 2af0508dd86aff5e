// Uses the installed library as another project would: packs a weight, runs the layer, compares it
// with the plain loop that sq_cpu/linear.h states. Exit status 0 when every value is the same.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "sq_cpu/isa.h"
#include "sq_cpu/linear.h"

namespace {

constexpr int64_t kRows = 5, kOutputs = 37, kInputs = 100;

// Scale and zero point of each row; powers of two, so that the quantizer's division is exact.
struct Grid {
  float scale;
  int32_t zero_point, lowest_code, highest_code;
};

struct Layer {
  std::vector<float> x;   // [kRows, kInputs]
  std::vector<int8_t> w;  // [kOutputs, kInputs]
  std::vector<float> scale, bias;
};

Layer make_layer() {
  Layer layer;
  uint32_t state = 1;
  const auto next = [&state](int count) {
    state = state * 1664525u + 1013904223u;
    return static_cast<int>((state >> 8) % static_cast<uint32_t>(count));
  };
  for (int64_t i = 0; i < kRows * kInputs; ++i) {
    layer.x.push_back(static_cast<float>(next(2001) - 1000) / 512.0f);  // |x| < 127 / 64
  }
  for (int64_t row = 0; row < kRows; ++row)
    layer.x[row * kInputs + row] = 127.0f / 64.0f;  // absmax
  for (int64_t i = 0; i < kOutputs * kInputs; ++i) {
    layer.w.push_back(static_cast<int8_t>(next(255) - 127));
  }
  for (int64_t n = 0; n < kOutputs; ++n) {
    layer.scale.push_back(0.001f * static_cast<float>(1 + next(100)));
    layer.bias.push_back(0.1f * static_cast<float>(next(100) - 50));
  }
  return layer;
}

float expected(const Layer& layer, const Grid& grid, int64_t m, int64_t n) {
  int32_t sum = 0;
  for (int64_t k = 0; k < kInputs; ++k) {
    int code =
        static_cast<int>(std::nearbyint(layer.x[m * kInputs + k] / grid.scale)) + grid.zero_point;
    if (code < grid.lowest_code) code = grid.lowest_code;
    if (code > grid.highest_code) code = grid.highest_code;
    sum += (code - grid.zero_point) * layer.w[n * kInputs + k];
  }
  return std::fma(static_cast<float>(sum), grid.scale * layer.scale[n], layer.bias[n]);
}

int count_wrong(const Layer& layer, const sq_cpu::PackedWeight& weight,
                const sq_cpu::ActivationQuantizer& quantizer, const Grid& grid) {
  std::vector<float> y(kRows * kOutputs);
  sq_cpu::linear(layer.x.data(), sq_cpu::DType::kFloat32, kRows, kInputs, weight, quantizer,
                 y.data(), sq_cpu::DType::kFloat32, kOutputs);
  int wrong = 0;
  for (int64_t m = 0; m < kRows; ++m) {
    for (int64_t n = 0; n < kOutputs; ++n) {
      wrong += y[m * kOutputs + n] != expected(layer, grid, m, n);
    }
  }
  return wrong;
}

bool refuses_short_rows(const Layer& layer, const sq_cpu::PackedWeight& weight) {
  float y[kOutputs];
  try {
    sq_cpu::linear(layer.x.data(), sq_cpu::DType::kFloat32, 1, kInputs - 1, weight, {}, y,
                   sq_cpu::DType::kFloat32, kOutputs);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  const Layer layer = make_layer();
  std::vector<std::byte> packed(sq_cpu::packed_bytes(kOutputs, kInputs));
  sq_cpu::pack_weight(layer.w.data(), layer.scale.data(), layer.bias.data(), kOutputs, kInputs,
                      packed.data());
  const sq_cpu::PackedWeight weight{packed.data(), kOutputs, kInputs};

  const sq_cpu::ActivationQuantizer per_token;  // absmax / 127 = 1 / 64
  const int wrong_per_token = count_wrong(layer, weight, per_token, {1.0f / 64, 128, 1, 255});

  sq_cpu::ActivationQuantizer fixed;
  fixed.granularity = sq_cpu::Granularity::kStatic;
  fixed.symmetric = false;
  fixed.scale = 1.0f / 128;  // both ends are clamped
  fixed.zero_point = 77;
  const int wrong_static = count_wrong(layer, weight, fixed, {1.0f / 128, 77, 0, 255});

  const bool refused = refuses_short_rows(layer, weight);
  std::printf("isa %s\n", sq_cpu::isa_name(sq_cpu::active_isa()).c_str());
  std::printf("wrong values: %d per token, %d static; short rows %s\n", wrong_per_token,
              wrong_static, refused ? "refused" : "accepted");
  return wrong_per_token != 0 || wrong_static != 0 || !refused;
}
