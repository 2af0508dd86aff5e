// Tensors to the arguments of linear.h and saturation.h.
#include <algorithm>
#include <array>
#include <optional>

#include "bindings.h"
#include "operands.h"
#include "quantize.h"
#include "sq_cpu/saturation.h"

namespace sq_cpu::bindings {
namespace {

int64_t count(py::handle tensor) {
  SQ_CHECK(is_tensor(tensor), "a tensor is needed, not ", describe(tensor));
  return invoke(Torch::get().numel, tensor).cast<int64_t>();
}

PackedWeight weight(py::handle packed, int64_t n, int64_t k) {
  const int64_t bytes = packed_bytes(n, k);
  return {array<const std::byte>("the packed weight", packed, Torch::get().uint8, bytes), n, k};
}

// Of as many rows of codes as zero_point has elements. scale: None where it is not read.
QuantizedActivation quantized(py::handle codes, py::handle scale, py::handle zero_point, int64_t k,
                              int max_code, int terms = 1) {
  const Torch& torch = Torch::get();
  const int64_t m = count(zero_point);
  return {array<uint8_t>("codes", codes, torch.uint8, codes_bytes(m, k)),
          optional_array<float>("scale", scale, torch.float32, m),
          array<int32_t>("zero_point", zero_point, torch.int32, m),
          m,
          k,
          max_code,
          terms};
}

// The rows of x that codes stand for.
int64_t rows_of(const sq_cpu::QuantizedActivation& x) {
  sq_cpu::check_activation("x", x);
  return x.m / x.terms;
}

// The input of a layer: floats, rows of k.
struct Input {
  const void* data;
  DType type;
  const py::object& dtype;
  int64_t m;
};

Input input(py::handle x, int64_t k) {
  SQ_CHECK(is_tensor(x), "x is ", describe(x), ", not a tensor");
  const std::optional<DType> type = float_type(x);
  SQ_CHECK(type.has_value(), "x is ", describe(x), "; use float32, bfloat16 or float16");
  const py::object& dtype = Torch::get().dtypes[static_cast<size_t>(*type)].first;
  const auto shape = get(x, Torch::get().shape).cast<std::vector<int64_t>>();
  SQ_CHECK(!shape.empty() && shape.back() == k, "x is ", describe(x), ", not rows of ", k);
  int64_t m = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) {
    SQ_CHECK(!__builtin_mul_overflow(m, shape[i], &m), "x is ", describe(x), ": too many rows");
  }
  SQ_CHECK(m <= kMostBytes, "x is ", describe(x), ": too many rows");
  return {array<const void>("x", x, dtype, m * k), *type, dtype, m};
}

// The steps after a product [m, n]; operands are of one type, that of `dtype` where it is given.
Epilogue epilogue(Activation activation, py::handle other, py::handle residual, int64_t m,
                  int64_t n, DType type) {
  SQ_CHECK(is_one_of(type, DType::kFloat16), "unknown DType ", static_cast<int>(type));
  const py::object& dtype = Torch::get().dtypes[static_cast<size_t>(type)].first;
  return {
      activation, optional_array<const void>("other", other, dtype, bounded_product(m, n)),
      n,          optional_array<const void>("residual", residual, dtype, bounded_product(m, n)),
      n,          type};
}

// An argument of ActivationQuantizer; any outside of [low, high] becomes the nearer end.
int32_t bounded(size_t index, const py::object& argument, int64_t low, int64_t high) {
  const auto given = cast<int64_t>("ActivationQuantizer", index, argument.ptr());
  return static_cast<int32_t>(std::clamp(given, low, high));
}

}  // namespace

Quantizer make_quantizer(Granularity granularity, bool symmetric, bool reduce_range, double scale,
                         const py::object& zero_point, std::vector<float> inverse_smoothing,
                         const py::object& terms, const py::object& hadamard,
                         bool dynamic_fallback) {
  // The ends are no codes, no numbers of terms, and no sizes of blocks.
  Quantizer quantizer{granularity,
                      symmetric,
                      reduce_range,
                      static_cast<float>(scale),
                      bounded(4, zero_point, -1, 256),
                      std::move(inverse_smoothing),
                      bounded(6, terms, 0, 3),
                      bounded(7, hadamard, -1, kTileDepth + 1),
                      dynamic_fallback,
                      nullptr};
  if (granularity == Granularity::kStatic) quantizer.counter = std::make_shared<RowCounter>();
  check_quantizer(quantizer.view(static_cast<int64_t>(quantizer.inverse_smoothing.size())));
  return quantizer;
}

void pack_weight(py::handle codes, py::handle scale, py::handle bias, py::handle out) {
  const Torch& torch = Torch::get();
  SQ_CHECK(is_tensor(codes), "weight is ", describe(codes), ", not a tensor");
  const auto shape = get(codes, torch.shape).cast<std::vector<int64_t>>();
  SQ_CHECK(shape.size() == 2, "weight is ", describe(codes), ", not of 2 dimensions");
  const int64_t n = shape[0], k = shape[1];
  auto* const w = array<const int8_t>("weight", codes, torch.int8, n * k);
  auto* const scales = array<const float>("scale", scale, torch.float32, n);
  auto* const biases = optional_array<const float>("bias", bias, torch.float32, n);
  auto* const packed = array<std::byte>("the packed weight", out, torch.uint8, packed_bytes(n, k));
  const Door door;
  sq_cpu::pack_weight(w, scales, biases, n, k, packed);
}

void unpack_weight(py::handle packed, int64_t n, int64_t k, py::handle codes, py::handle scale,
                   py::handle bias) {
  const Torch& torch = Torch::get();
  const PackedWeight from = weight(packed, n, k);
  auto* const w = optional_array<int8_t>("weight", codes, torch.int8, n * k);
  auto* const scales = optional_array<float>("scale", scale, torch.float32, n);
  auto* const biases = optional_array<float>("bias", bias, torch.float32, n);
  const Door door;
  sq_cpu::unpack_weight(from, w, scales, biases);
}

void gather_rows(py::handle packed, int64_t n, int64_t k, py::handle inverse_smoothing,
                 py::handle ids, py::handle y) {
  const sq_cpu::PackedWeight w = weight(packed, n, k);
  const int64_t rows = count(ids);
  auto* const from = array<const int64_t>("ids", ids, Torch::get().int64, rows);
  SQ_CHECK(is_tensor(y), "y is ", describe(y), ", not a tensor");
  const std::optional<DType> type = float_type(y);
  SQ_CHECK(type.has_value(), "y is ", describe(y), "; use float32, bfloat16 or float16");
  auto* const out =
      array<void>("y", y, get(y, Torch::get().dtype), sq_cpu::bounded_product(rows, k));
  auto* const scales =
      optional_array<const float>("inverse_smoothing", inverse_smoothing, Torch::get().float32, k);
  const Door door;
  sq_cpu::gather_rows(w, from, rows, scales, out, *type, k);
}

void linear(py::handle x, py::handle packed, int64_t n, int64_t k, const Quantizer& quantizer,
            py::handle y, Activation activation, py::handle other, py::handle residual) {
  const PackedWeight w = weight(packed, n, k);
  const Input in = input(x, k);
  auto* const out = array<void>("y", y, in.dtype, bounded_product(in.m, n));
  const Epilogue steps = epilogue(activation, other, residual, in.m, n, in.type);
  const ActivationQuantizer view = quantizer.view(k);
  const Door door;
  sq_cpu::linear(in.data, in.type, in.m, k, w, view, out, in.type, n, steps);
}

void quantize_activations(py::handle x, int64_t k, const Quantizer& quantizer, py::handle codes,
                          py::handle scale, py::handle zero_point) {
  const Input in = input(x, k);
  const ActivationQuantizer view = quantizer.view(k);
  const QuantizedActivation out =
      quantized(codes, scale, zero_point, k, view.max_code(), view.terms);
  SQ_CHECK(rows_of(out) == in.m, "zero_point has ", out.m, " elements, x ", in.m, " rows");
  const Door door;
  sq_cpu::quantize_activations(in.data, in.type, k, view, out);
}

void linear_quantized(py::handle codes, py::handle scale, py::handle zero_point, int max_code,
                      int terms, py::handle packed, int64_t n, int64_t k, py::handle y,
                      Activation activation, py::handle other, py::handle residual) {
  const PackedWeight w = weight(packed, n, k);
  const QuantizedActivation in = quantized(codes, scale, zero_point, k, max_code, terms);
  const int64_t m = rows_of(in);
  SQ_CHECK(is_tensor(y), "y is ", describe(y), ", not a tensor");
  const std::optional<DType> type = float_type(y);
  SQ_CHECK(type.has_value(), "y is ", describe(y), "; use float32, bfloat16 or float16");
  const Epilogue steps = epilogue(activation, other, residual, m, n, *type);
  auto* const out = array<void>("y", y, get(y, Torch::get().dtype), bounded_product(m, n));
  const Door door;
  sq_cpu::linear(in, w, out, *type, n, steps);
}

void linear_requantized(py::handle codes, py::handle scale, py::handle zero_point, int max_code,
                        int terms, py::handle packed, int64_t n, int64_t k,
                        const Quantizer& y_quantizer, py::handle y_codes, py::handle y_scale,
                        py::handle y_zero_point, DType operand_type, Activation activation,
                        py::handle other, py::handle residual) {
  const PackedWeight w = weight(packed, n, k);
  const QuantizedActivation in = quantized(codes, scale, zero_point, k, max_code, terms);
  const ActivationQuantizer view = y_quantizer.view(n);
  const QuantizedActivation out = quantized(y_codes, y_scale, y_zero_point, n, view.max_code());
  const Epilogue steps = epilogue(activation, other, residual, rows_of(in), n, operand_type);
  const Door door;
  sq_cpu::linear(in, w, view, out, steps);
}

// An ordinary tensor that nothing traces, transforms or differentiates forward; torch.compile's
// tracer is not seen here.
bool is_plain(py::handle x) {
  const Torch& torch = Torch::get();
  return Py_TYPE(x.ptr()) == reinterpret_cast<PyTypeObject*>(torch.tensor.ptr()) &&
         invoke(torch.tracing_state).is_none() && !truth(invoke(torch.dispatch_modes)) &&
         !truth(invoke(torch.functorch_active)) && !torch.is_differentiating_forward();
}

// y of a call that needs nothing changed or explained; None leaves the others to ops.py.
py::object linear_tensor(py::handle x, py::handle packed, int64_t k, int64_t n,
                         const Quantizer& quantizer) try {
  constexpr size_t kMaxRank = 8;
  const Torch& torch = Torch::get();
  if (!is_plain(x) || !is_tensor(packed) || torch.is_profiling()) return py::none();
  const std::optional<DType> type = float_type(x);
  if (!type.has_value()) return py::none();

  const auto shape = get(x, torch.shape).cast<py::tuple>();
  const size_t rank = shape.size();
  if (rank < 1 || rank > kMaxRank) return py::none();
  std::array<PyObject*, kMaxRank + 1> y_arguments{x.ptr()};
  int64_t m = 1;
  for (size_t i = 0; i + 1 < rank; ++i) {
    y_arguments[i + 1] = PyTuple_GET_ITEM(shape.ptr(), i);
    m = bounded_product(m, py::handle(y_arguments[i + 1]).cast<int64_t>());
  }
  if (py::handle(PyTuple_GET_ITEM(shape.ptr(), rank - 1)).cast<int64_t>() != k ||
      !truth(get(x, torch.is_cpu)) || !truth(get(packed, torch.is_cpu)) ||
      get(packed, torch.nbytes).cast<int64_t>() != packed_bytes(n, k) ||
      !truth(invoke(torch.is_contiguous, packed)) || truth(get(x, torch.requires_grad)) ||
      truth(invoke(torch.is_neg, x)) || !truth(invoke(torch.is_contiguous, x))) {
    return py::none();
  }

  const PackedWeight w{static_cast<const std::byte*>(address(packed)), n, k};
  const py::int_ columns(n);
  y_arguments[rank] = columns.ptr();
  py::object y = invoke(torch.new_empty, y_arguments.data(), rank + 1);
  const void* const from = address(x);
  void* const to = address(y);
  const ActivationQuantizer view = quantizer.view(k);
  const Door door;
  sq_cpu::linear(from, *type, m, k, w, view, to, *type, n);
  return y;
} catch (py::error_already_set& e) {
  if (!e.matches(PyExc_RuntimeError)) throw;
  return py::none();  // a tensor without memory of its own, or too little memory for y
}

void gemm(py::handle codes, py::handle zero_point, int max_code, py::handle packed, int64_t n,
          int64_t k, py::handle y) {
  const PackedWeight w = weight(packed, n, k);
  const QuantizedActivation in = quantized(codes, py::none(), zero_point, k, max_code);
  auto* const out = array<int32_t>("y", y, Torch::get().int32, bounded_product(in.m, n));
  const Door door;
  sq_cpu::gemm(in, w, out, n);
}

std::pair<int64_t, int64_t> count_saturation(py::handle codes, py::handle zero_point, int max_code,
                                             py::handle packed, int64_t n, int64_t k) {
  const PackedWeight w = weight(packed, n, k);
  const QuantizedActivation in = quantized(codes, py::none(), zero_point, k, max_code);
  const Door door;
  const SaturationCount count = sq_cpu::count_saturation(in, w);
  return {count.pairs, count.saturated};
}

}  // namespace sq_cpu::bindings
