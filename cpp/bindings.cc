// _core: the C++ library under Python's names. Built without torch headers, so one binary serves
// every torch: it asks the tensors themselves, as Python would, and checks that each has the memory
// that the library will touch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings_torch.h"
#include "check.h"
#include "operands.h"
#include "quantize.h"
#include "sq_cpu/attention.h"
#include "sq_cpu/batched_matmul.h"
#include "sq_cpu/isa.h"
#include "sq_cpu/linear.h"
#include "sq_cpu/saturation.h"
#include "team.h"
#include "testing/use_isa.h"

namespace py = pybind11;

namespace {

using sq_cpu::Activation;
using sq_cpu::codes_bytes;
using sq_cpu::DType;
using sq_cpu::Granularity;
using sq_cpu::packed_bytes;
using namespace sq_cpu::bindings;

// Sets the package's one exception.
void refuse(const std::string& message) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> error;
  error.call_once_and_store_result(
      [] { return py::module_::import("sq_cpu.errors").attr("SqCpuError"); });
  py::set_error(error.get_stored(), message.c_str());
}

// The library's refusals become it.
void translate(std::exception_ptr raised) {
  try {
    if (raised) std::rethrow_exception(raised);
  } catch (const std::invalid_argument& e) {
    refuse(e.what());
  } catch (const std::runtime_error& e) {
    refuse(e.what());
  }
}

template <typename T>
T cast(const char* function, size_t index, PyObject* argument) {
  try {
    return py::handle(argument).cast<T>();
  } catch (const py::cast_error&) {
    SQ_CHECK(false, function, ": argument ", index + 1,
             " does not fit: ", Py_TYPE(argument)->tp_name, " ",
             std::string(py::repr(argument)).substr(0, 60));
    throw;
  }
}

template <typename Result, typename... Args, size_t... I>
py::object call(const char* name, Result (*function)(Args...), PyObject* const* args,
                std::index_sequence<I...>) {
  if constexpr (std::is_void_v<Result>) {
    function(cast<Args>(name, I, args[I])...);
    return py::none();
  } else if constexpr (std::is_base_of_v<py::object, Result>) {
    return function(cast<Args>(name, I, args[I])...);
  } else {
    return py::cast(function(cast<Args>(name, I, args[I])...));
  }
}

// METH_FASTCALL: a layer's call costs 0.1 us to get here, through pybind11's dispatcher 0.5 us.
template <typename Result, typename... Args>
PyObject* fastcall(const char* name, Result (*function)(Args...), PyObject* const* args,
                   Py_ssize_t count) {
  try {
    SQ_CHECK(count == sizeof...(Args), name, ": ", count, " arguments given, ", sizeof...(Args),
             " needed");
    return call(name, function, args, std::index_sequence_for<Args...>()).release().ptr();
  } catch (py::error_already_set& e) {
    if (!e.matches(PyExc_RuntimeError)) {
      e.restore();
    } else {  // torch's, of a tensor that is sparse, nested, fake or transformed
      const std::string said = std::string(py::str(e.value()));
      refuse(sq_cpu::join(name, ": an operand has no memory of its own: ",
                          said.substr(0, said.find_first_of("\n."))));
    }
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& e) {
    try {
      translate(std::current_exception());
    } catch (...) {  // nothing may pass through Python's own frames
      PyErr_SetString(PyExc_RuntimeError, e.what());
    }
  }
  return nullptr;
}

// A quantizer that owns its smoothing.
struct Quantizer {
  Granularity granularity;
  bool symmetric;
  bool reduce_range;
  float scale;
  int32_t zero_point;
  std::vector<float> inverse_smoothing;  // empty: none
  int terms;

  sq_cpu::ActivationQuantizer view(int64_t k) const {
    const auto size = static_cast<int64_t>(inverse_smoothing.size());
    SQ_CHECK(size == 0 || size == k, "the smoothing has ", size, " elements, the input ", k,
             " columns");
    sq_cpu::ActivationQuantizer view;
    view.granularity = granularity;
    view.symmetric = symmetric;
    view.reduce_range = reduce_range;
    view.scale = scale;
    view.zero_point = zero_point;
    view.terms = terms;
    view.inverse_smoothing = size == 0 ? nullptr : inverse_smoothing.data();
    return view;
  }
  int max_code() const { return view(static_cast<int64_t>(inverse_smoothing.size())).max_code(); }
  auto key() const {
    return std::tie(granularity, symmetric, reduce_range, scale, zero_point, inverse_smoothing,
                    terms);
  }
};

// An argument of ActivationQuantizer; any outside of [low, high] becomes the nearer end.
int32_t bounded(size_t index, const py::object& argument, int64_t low, int64_t high) {
  const auto given = cast<int64_t>("ActivationQuantizer", index, argument.ptr());
  return static_cast<int32_t>(std::clamp(given, low, high));
}

Quantizer make_quantizer(Granularity granularity, bool symmetric, bool reduce_range, double scale,
                         const py::object& zero_point, std::vector<float> inverse_smoothing,
                         const py::object& terms) {
  // The ends are no codes, and no numbers of terms.
  Quantizer quantizer{granularity,
                      symmetric,
                      reduce_range,
                      static_cast<float>(scale),
                      bounded(4, zero_point, -1, 256),
                      std::move(inverse_smoothing),
                      bounded(6, terms, 0, 3)};
  sq_cpu::check_quantizer(quantizer.view(static_cast<int64_t>(quantizer.inverse_smoothing.size())));
  return quantizer;
}

int64_t count(py::handle tensor) {
  SQ_CHECK(is_tensor(tensor), "a tensor is needed, not ", describe(tensor));
  return invoke(Torch::get().numel, tensor).cast<int64_t>();
}

sq_cpu::PackedWeight weight(py::handle packed, int64_t n, int64_t k) {
  const int64_t bytes = sq_cpu::packed_bytes(n, k);
  return {array<const std::byte>("the packed weight", packed, Torch::get().uint8, bytes), n, k};
}

// Of as many rows of codes as zero_point has elements. scale: None where it is not read.
sq_cpu::QuantizedActivation quantized(py::handle codes, py::handle scale, py::handle zero_point,
                                      int64_t k, int max_code, int terms = 1) {
  const Torch& torch = Torch::get();
  const int64_t m = count(zero_point);
  return {array<uint8_t>("codes", codes, torch.uint8, sq_cpu::codes_bytes(m, k)),
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
  SQ_CHECK(m <= sq_cpu::kMostBytes, "x is ", describe(x), ": too many rows");
  return {array<const void>("x", x, dtype, m * k), *type, dtype, m};
}

// The steps after a product [m, n]; operands are of one type, that of `dtype` where it is given.
sq_cpu::Epilogue epilogue(Activation activation, py::handle other, py::handle residual, int64_t m,
                          int64_t n, DType type) {
  SQ_CHECK(sq_cpu::is_one_of(type, DType::kFloat16), "unknown DType ", static_cast<int>(type));
  const py::object& dtype = Torch::get().dtypes[static_cast<size_t>(type)].first;
  return {activation,
          optional_array<const void>("other", other, dtype, sq_cpu::bounded_product(m, n)),
          n,
          optional_array<const void>("residual", residual, dtype, sq_cpu::bounded_product(m, n)),
          n,
          type};
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
  auto* const packed =
      array<std::byte>("the packed weight", out, torch.uint8, sq_cpu::packed_bytes(n, k));
  const Door door;
  sq_cpu::pack_weight(w, scales, biases, n, k, packed);
}

void unpack_weight(py::handle packed, int64_t n, int64_t k, py::handle codes, py::handle scale,
                   py::handle bias) {
  const Torch& torch = Torch::get();
  const sq_cpu::PackedWeight from = weight(packed, n, k);
  auto* const w = optional_array<int8_t>("weight", codes, torch.int8, n * k);
  auto* const scales = optional_array<float>("scale", scale, torch.float32, n);
  auto* const biases = optional_array<float>("bias", bias, torch.float32, n);
  const Door door;
  sq_cpu::unpack_weight(from, w, scales, biases);
}

void gather_rows(py::handle packed, int64_t n, int64_t k, const Quantizer& quantizer,
                 py::handle ids, py::handle y) {
  const sq_cpu::PackedWeight w = weight(packed, n, k);
  const int64_t rows = count(ids);
  auto* const from = array<const int64_t>("ids", ids, Torch::get().int64, rows);
  SQ_CHECK(is_tensor(y), "y is ", describe(y), ", not a tensor");
  const std::optional<DType> type = float_type(y);
  SQ_CHECK(type.has_value(), "y is ", describe(y), "; use float32, bfloat16 or float16");
  auto* const out =
      array<void>("y", y, get(y, Torch::get().dtype), sq_cpu::bounded_product(rows, k));
  const sq_cpu::ActivationQuantizer view = quantizer.view(k);
  const Door door;
  sq_cpu::gather_rows(w, from, rows, view.inverse_smoothing, out, *type, k);
}

void linear(py::handle x, py::handle packed, int64_t n, int64_t k, const Quantizer& quantizer,
            py::handle y, Activation activation, py::handle other, py::handle residual) {
  const sq_cpu::PackedWeight w = weight(packed, n, k);
  const Input in = input(x, k);
  auto* const out = array<void>("y", y, in.dtype, sq_cpu::bounded_product(in.m, n));
  const sq_cpu::Epilogue steps = epilogue(activation, other, residual, in.m, n, in.type);
  const sq_cpu::ActivationQuantizer view = quantizer.view(k);
  const Door door;
  sq_cpu::linear(in.data, in.type, in.m, k, w, view, out, in.type, n, steps);
}

void quantize_activations(py::handle x, int64_t k, const Quantizer& quantizer, py::handle codes,
                          py::handle scale, py::handle zero_point) {
  const Input in = input(x, k);
  const sq_cpu::ActivationQuantizer view = quantizer.view(k);
  const sq_cpu::QuantizedActivation out =
      quantized(codes, scale, zero_point, k, view.max_code(), view.terms);
  SQ_CHECK(rows_of(out) == in.m, "zero_point has ", out.m, " elements, x ", in.m, " rows");
  const Door door;
  sq_cpu::quantize_activations(in.data, in.type, k, view, out);
}

void linear_quantized(py::handle codes, py::handle scale, py::handle zero_point, int max_code,
                      int terms, py::handle packed, int64_t n, int64_t k, py::handle y,
                      Activation activation, py::handle other, py::handle residual) {
  const sq_cpu::PackedWeight w = weight(packed, n, k);
  const sq_cpu::QuantizedActivation in = quantized(codes, scale, zero_point, k, max_code, terms);
  const int64_t m = rows_of(in);
  SQ_CHECK(is_tensor(y), "y is ", describe(y), ", not a tensor");
  const std::optional<DType> type = float_type(y);
  SQ_CHECK(type.has_value(), "y is ", describe(y), "; use float32, bfloat16 or float16");
  const sq_cpu::Epilogue steps = epilogue(activation, other, residual, m, n, *type);
  auto* const out = array<void>("y", y, get(y, Torch::get().dtype), sq_cpu::bounded_product(m, n));
  const Door door;
  sq_cpu::linear(in, w, out, *type, n, steps);
}

void linear_requantized(py::handle codes, py::handle scale, py::handle zero_point, int max_code,
                        int terms, py::handle packed, int64_t n, int64_t k,
                        const Quantizer& y_quantizer, py::handle y_codes, py::handle y_scale,
                        py::handle y_zero_point, DType operand_type, Activation activation,
                        py::handle other, py::handle residual) {
  const sq_cpu::PackedWeight w = weight(packed, n, k);
  const sq_cpu::QuantizedActivation in = quantized(codes, scale, zero_point, k, max_code, terms);
  const sq_cpu::ActivationQuantizer view = y_quantizer.view(n);
  const sq_cpu::QuantizedActivation out =
      quantized(y_codes, y_scale, y_zero_point, n, view.max_code());
  const sq_cpu::Epilogue steps =
      epilogue(activation, other, residual, rows_of(in), n, operand_type);
  const Door door;
  sq_cpu::linear(in, w, view, out, steps);
}

// An ordinary tensor that nothing traces or transforms; torch.compile's tracer is not seen here.
bool is_plain(py::handle x) {
  const Torch& torch = Torch::get();
  return Py_TYPE(x.ptr()) == reinterpret_cast<PyTypeObject*>(torch.tensor.ptr()) &&
         invoke(torch.tracing_state).is_none() && !truth(invoke(torch.dispatch_modes)) &&
         !truth(invoke(torch.functorch_active));
}

// y of a call that needs nothing changed or explained; None leaves the others to ops.py.
py::object linear_tensor(py::handle x, py::handle packed, int64_t k, int64_t n,
                         const Quantizer& quantizer) try {
  constexpr size_t kMaxRank = 8;
  if (!is_plain(x) || !is_tensor(packed)) return py::none();
  const Torch& torch = Torch::get();
  const std::optional<DType> type = float_type(x);
  if (!type.has_value()) return py::none();

  const auto shape = get(x, torch.shape).cast<py::tuple>();
  const size_t rank = shape.size();
  if (rank < 1 || rank > kMaxRank) return py::none();
  std::array<PyObject*, kMaxRank + 1> y_arguments{x.ptr()};
  int64_t m = 1;
  for (size_t i = 0; i + 1 < rank; ++i) {
    y_arguments[i + 1] = PyTuple_GET_ITEM(shape.ptr(), i);
    m = sq_cpu::bounded_product(m, py::handle(y_arguments[i + 1]).cast<int64_t>());
  }
  if (py::handle(PyTuple_GET_ITEM(shape.ptr(), rank - 1)).cast<int64_t>() != k ||
      !truth(get(x, torch.is_cpu)) || !truth(get(packed, torch.is_cpu)) ||
      get(packed, torch.nbytes).cast<int64_t>() != packed_bytes(n, k) ||
      !truth(invoke(torch.is_contiguous, packed)) || truth(get(x, torch.requires_grad)) ||
      truth(invoke(torch.is_neg, x)) || !truth(invoke(torch.is_contiguous, x))) {
    return py::none();
  }

  const sq_cpu::PackedWeight w{static_cast<const std::byte*>(address(packed)), n, k};
  const py::int_ columns(n);
  y_arguments[rank] = columns.ptr();
  py::object y = invoke(torch.new_empty, y_arguments.data(), rank + 1);
  const void* const from = address(x);
  void* const to = address(y);
  const sq_cpu::ActivationQuantizer view = quantizer.view(k);
  const Door door;
  sq_cpu::linear(from, *type, m, k, w, view, to, *type, n);
  return y;
} catch (py::error_already_set& e) {
  if (!e.matches(PyExc_RuntimeError)) throw;
  return py::none();  // a tensor without memory of its own, or too little memory for y
}

void gemm(py::handle codes, py::handle zero_point, int max_code, py::handle packed, int64_t n,
          int64_t k, py::handle y) {
  const sq_cpu::PackedWeight w = weight(packed, n, k);
  const sq_cpu::QuantizedActivation in = quantized(codes, py::none(), zero_point, k, max_code);
  auto* const out = array<int32_t>("y", y, Torch::get().int32, sq_cpu::bounded_product(in.m, n));
  const Door door;
  sq_cpu::gemm(in, w, out, n);
}

std::pair<int64_t, int64_t> count_saturation(py::handle codes, py::handle zero_point, int max_code,
                                             py::handle packed, int64_t n, int64_t k) {
  const sq_cpu::PackedWeight w = weight(packed, n, k);
  const sq_cpu::QuantizedActivation in = quantized(codes, py::none(), zero_point, k, max_code);
  const Door door;
  const sq_cpu::SaturationCount count = sq_cpu::count_saturation(in, w);
  return {count.pairs, count.saturated};
}

// A tensor [batch, heads, rows, columns] whose rows are contiguous.
struct Heads {
  void* data;
  std::array<int64_t, 4> shape;
  sq_cpu::BatchedStrides strides;
};

Heads heads(const char* name, py::handle x, const py::object& dtype) {
  void* const data = memory(name, x, dtype);
  const auto shape = get(x, Torch::get().shape).cast<std::vector<int64_t>>();
  const auto strides = invoke(Torch::get().stride, x).cast<std::vector<int64_t>>();
  SQ_CHECK(shape.size() == 4 && (strides[3] == 1 || shape[3] <= 1), name, " is ", describe(x),
           ", not [batch, heads, rows, columns] with contiguous rows");
  return {data, {shape[0], shape[1], shape[2], shape[3]}, {strides[0], strides[1], strides[2]}};
}

void batched_matmul(py::handle a, py::handle b, bool transposed, double alpha, py::handle a_scale,
                    py::handle b_scale, py::handle y, sq_cpu::BatchedType y_type) {
  const Torch& torch = Torch::get();
  const bool is_signed = !is_tensor(a) || !get(a, torch.dtype).is(torch.uint8);
  const Heads left = heads("a", a, is_signed ? torch.int8 : torch.uint8);
  const Heads right = heads("b", b, torch.int8);
  const py::object* const y_types[] = {&torch.float32, &torch.dtypes[1].first,
                                       &torch.dtypes[2].first, &torch.int32, &torch.int8};
  SQ_CHECK(sq_cpu::is_one_of(y_type, sq_cpu::BatchedType::kInt8), "unknown BatchedType ",
           static_cast<int>(y_type));
  const Heads result = heads("y", y, *y_types[static_cast<int>(y_type)]);
  const auto [batch, query_heads, m, k] = left.shape;
  const int64_t kv_heads = right.shape[1], n = right.shape[transposed ? 2 : 3];
  SQ_CHECK(right.shape[0] == batch && right.shape[transposed ? 3 : 2] == k &&
               (result.shape == std::array<int64_t, 4>{batch, query_heads, m, n}),
           "a is ", describe(a), ", b ", describe(b), ", y ", describe(y), ": they do not fit");
  auto* const a_scales = optional_array<const float>(
      "a_scale", a_scale, torch.float32, sq_cpu::bounded_product(batch, query_heads, m));
  auto* const b_scales = optional_array<const float>("b_scale", b_scale, torch.float32,
                                                     sq_cpu::bounded_product(batch, kv_heads, n));
  const Door door;
  sq_cpu::batched_matmul(
      {batch, query_heads, kv_heads, m, n, k}, {left.data, is_signed, left.strides, a_scales},
      {static_cast<const int8_t*>(right.data), transposed, right.strides, b_scales},
      static_cast<float>(alpha), {result.data, y_type, result.strides});
}

py::dict isa() {
  const ThreadsOfTorch threads;
  py::dict isas;
  for (const sq_cpu::IsaStatus& s : sq_cpu::isa_status()) {
    py::dict entry;
    entry["built"] = s.built;
    entry["detected"] = s.detected;
    entry["granted"] = s.granted;
    entry["usable"] = s.usable();
    entry["reason"] = s.reason;
    isas[py::str(s.name)] = entry;
  }
  py::dict result;
  result["in_use"] = sq_cpu::isa_name(sq_cpu::active_isa());
  result["forced"] = sq_cpu::isa_is_forced();
  result["isas"] = isas;
  result["vnni"] = sq_cpu::active_isa() >= sq_cpu::Isa::kAvx512Vnni;
  result["threads"] = sq_cpu::pool_size();
  return result;
}

std::string microkernel_name(int max_code, int64_t m) {
  return sq_cpu::microkernel_name(max_code, m);
}

void use_isa(std::string name, bool emulated) {
  for (const sq_cpu::IsaStatus& s : sq_cpu::isa_status()) {
    if (s.name == name) return sq_cpu::use_isa(s.isa, emulated);
  }
  throw std::runtime_error(name + " is not an ISA of sq_cpu");
}

int64_t page_bytes(int64_t head_dim) { return sq_cpu::page_bytes(head_dim); }

PyMethodDef functions[] = {
#define SQ_FUNCTION(name, parameters)                                         \
  {#name,                                                                     \
   reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(                \
       +[](PyObject*, PyObject* const* args, Py_ssize_t count) -> PyObject* { \
         return fastcall(#name, &name, args, count);                          \
       })),                                                                   \
   METH_FASTCALL, #name "($module, " parameters "/)\n--\n\n"}
    SQ_FUNCTION(append, "pages, head_dim, first_row, length, table, k, v, "),
    SQ_FUNCTION(attention,
                "pages, head_dim, first_row, length, table, q, scale, causal, window, softcap, "
                "slopes, sinks, y, "),
    SQ_FUNCTION(batched_matmul, "a, b, transposed, alpha, a_scale, b_scale, y, y_type, "),
    SQ_FUNCTION(codes_bytes, "m, k, "),
    SQ_FUNCTION(count_saturation, "codes, zero_point, max_code, packed, n, k, "),
    SQ_FUNCTION(gemm, "codes, zero_point, max_code, packed, n, k, y, "),
    SQ_FUNCTION(gather_rows, "packed, n, k, quantizer, ids, y, "),
    SQ_FUNCTION(is_plain, "x, "),
    SQ_FUNCTION(linear, "x, packed, n, k, quantizer, y, activation, other, residual, "),
    SQ_FUNCTION(linear_quantized,
                "codes, scale, zero_point, max_code, terms, packed, n, k, y, activation, other, "
                "residual, "),
    SQ_FUNCTION(linear_requantized,
                "codes, scale, zero_point, max_code, terms, packed, n, k, y_quantizer, y_codes, "
                "y_scale, y_zero_point, operand_type, activation, other, residual, "),
    SQ_FUNCTION(linear_tensor, "x, packed, in_features, out_features, quantizer, "),
    SQ_FUNCTION(microkernel_name, "max_code, m, "),
    SQ_FUNCTION(pack_weight, "weight, scale, bias, out, "),
    SQ_FUNCTION(packed_bytes, "n, k, "),
    SQ_FUNCTION(page_bytes, "head_dim, "),
    SQ_FUNCTION(quantize_activations, "x, k, quantizer, codes, scale, zero_point, "),
    SQ_FUNCTION(unpack_weight, "packed, n, k, weight, scale, bias, "),
    SQ_FUNCTION(use_isa, "name, emulated, "),
#undef SQ_FUNCTION
    {"isa",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(
         +[](PyObject*, PyObject* const* args, Py_ssize_t count) -> PyObject* {
           return fastcall("isa", &isa, args, count);
         })),
     METH_FASTCALL, "isa($module, /)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(_core, m) {
  py::register_local_exception_translator(&translate);

  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);

  py::enum_<Granularity>(m, "Granularity")
      .value("per_token", Granularity::kPerToken)
      .value("per_tensor", Granularity::kPerTensor)
      .value("static", Granularity::kStatic);

  py::enum_<Activation>(m, "Activation")
      .value("none", Activation::kNone)
      .value("relu", Activation::kRelu)
      .value("gelu", Activation::kGelu)
      .value("gelu_tanh", Activation::kGeluTanh)
      .value("silu", Activation::kSilu);

  py::enum_<sq_cpu::BatchedType>(m, "BatchedType")
      .value("float32", sq_cpu::BatchedType::kFloat32)
      .value("bfloat16", sq_cpu::BatchedType::kBFloat16)
      .value("float16", sq_cpu::BatchedType::kFloat16)
      .value("int32", sq_cpu::BatchedType::kInt32)
      .value("int8", sq_cpu::BatchedType::kInt8);

  py::class_<Quantizer>(m, "ActivationQuantizer")
      .def(py::init(&make_quantizer), py::arg("granularity"), py::arg("symmetric"),
           py::arg("reduce_range"), py::arg("scale") = 0.0, py::arg("zero_point") = 0,
           py::arg("inverse_smoothing") = std::vector<float>(), py::arg("terms") = 1)
      .def_property_readonly("max_code", [](const Quantizer& q) { return q.max_code(); })
      .def_property_readonly("terms", [](const Quantizer& q) { return q.terms; })
      .def(
          "__eq__", [](const Quantizer& a, const Quantizer& b) { return a.key() == b.key(); },
          py::is_operator())
      .def(py::pickle(
          [](const Quantizer& q) {
            return py::make_tuple(static_cast<int>(q.granularity), q.symmetric, q.reduce_range,
                                  q.scale, q.zero_point, q.inverse_smoothing, q.terms);
          },
          [](const py::tuple& t) {
            return make_quantizer(static_cast<Granularity>(t[0].cast<int>()), t[1].cast<bool>(),
                                  t[2].cast<bool>(), t[3].cast<double>(), t[4].cast<py::object>(),
                                  t[5].cast<std::vector<float>>(), t[6].cast<py::object>());
          }));

  m.attr("MAX_DEPTH") = sq_cpu::kMaxDepth;
  m.attr("PAGE_TOKENS") = sq_cpu::kPageTokens;
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}
