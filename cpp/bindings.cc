// _core: the C++ library under Python's names. Built without torch headers, so one binary serves
// every torch: tensors come as addresses and sizes, checked before by ops.py; linear_tensor asks
// the tensors themselves, as Python would.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings_torch.h"
#include "check.h"
#include "sq_cpu/batched_matmul.h"
#include "sq_cpu/isa.h"
#include "sq_cpu/linear.h"
#include "sq_cpu/saturation.h"
#include "team.h"
#include "testing/use_isa.h"

namespace py = pybind11;

namespace {

using sq_cpu::Activation;
using sq_cpu::DType;
using sq_cpu::Granularity;
using namespace sq_cpu::bindings;
using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

sq_cpu::PackedWeight packed(Address data, int64_t n, int64_t k) {
  return {pointer<const std::byte>(data), n, k};
}

// The library's refusals become the package's one exception.
void translate(std::exception_ptr raised) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> error;
  error.call_once_and_store_result(
      [] { return py::module_::import("sq_cpu.errors").attr("SqCpuError"); });
  try {
    if (raised) std::rethrow_exception(raised);
  } catch (const std::invalid_argument& e) {
    py::set_error(error.get_stored(), e.what());
  } catch (const std::runtime_error& e) {
    py::set_error(error.get_stored(), e.what());
  }
}

// METH_FASTCALL: a layer's call costs 0.1 us to get here, through pybind11's dispatcher 0.5 us.
template <typename... Args, size_t... I>
py::object call(void (*function)(Args...), PyObject* const* args, std::index_sequence<I...>) {
  function(py::handle(args[I]).cast<Args>()...);
  return py::none();
}

template <typename... Args, size_t... I>
py::object call(py::object (*function)(Args...), PyObject* const* args, std::index_sequence<I...>) {
  return function(py::handle(args[I]).cast<Args>()...);
}

template <typename Result, typename... Args>
py::object call(Result (*function)(Args...), PyObject* const* args, Py_ssize_t count) {
  SQ_CHECK(count == sizeof...(Args), count, " arguments given, ", sizeof...(Args), " needed");
  return call(function, args, std::index_sequence_for<Args...>());
}

template <auto kFunction>
PyObject* fastcall(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    return call(kFunction, args, count).release().ptr();
  } catch (py::error_already_set& e) {
    e.restore();
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
    view.inverse_smoothing = size == 0 ? nullptr : inverse_smoothing.data();
    return view;
  }
  int max_code() const { return view(static_cast<int64_t>(inverse_smoothing.size())).max_code(); }
  auto key() const {
    return std::tie(granularity, symmetric, reduce_range, scale, zero_point, inverse_smoothing);
  }
};

sq_cpu::Epilogue epilogue(Activation activation, Address other, Address residual, DType type,
                          int64_t n) {
  return {activation, pointer<const void>(other), n, pointer<const void>(residual), n, type};
}

sq_cpu::QuantizedActivation quantized(Address codes, Address scale, Address zero_point, int64_t m,
                                      int64_t k, int max_code) {
  return {
      pointer<uint8_t>(codes), pointer<float>(scale), pointer<int32_t>(zero_point), m, k, max_code};
}

void linear(Address x, DType type, int64_t m, Address weight, int64_t n, int64_t k,
            const Quantizer& quantizer, Address y, Activation activation, Address other,
            Address residual) {
  const Door door;
  sq_cpu::linear(pointer<const void>(x), type, m, k, packed(weight, n, k), quantizer.view(k),
                 pointer<void>(y), type, n, epilogue(activation, other, residual, type, n));
}

void quantize_activations(Address x, DType type, int64_t m, int64_t k, const Quantizer& quantizer,
                          Address codes, Address scale, Address zero_point) {
  const Door door;
  const sq_cpu::ActivationQuantizer view = quantizer.view(k);
  sq_cpu::quantize_activations(pointer<const void>(x), type, k, view,
                               quantized(codes, scale, zero_point, m, k, view.max_code()));
}

void linear_quantized(Address codes, Address scale, Address zero_point, int64_t m, int max_code,
                      Address weight, int64_t n, int64_t k, Address y, DType type,
                      Activation activation, Address other, Address residual) {
  const Door door;
  sq_cpu::linear(quantized(codes, scale, zero_point, m, k, max_code), packed(weight, n, k),
                 pointer<void>(y), type, n, epilogue(activation, other, residual, type, n));
}

void linear_requantized(Address codes, Address scale, Address zero_point, int64_t m, int max_code,
                        Address weight, int64_t n, int64_t k, const Quantizer& y_quantizer,
                        Address y_codes, Address y_scale, Address y_zero_point, DType operand_type,
                        Activation activation, Address other, Address residual) {
  const Door door;
  const sq_cpu::ActivationQuantizer view = y_quantizer.view(n);
  sq_cpu::linear(quantized(codes, scale, zero_point, m, k, max_code), packed(weight, n, k), view,
                 quantized(y_codes, y_scale, y_zero_point, m, n, view.max_code()),
                 epilogue(activation, other, residual, operand_type, n));
}

Address address(py::handle tensor) { return invoke(Torch::get().data_ptr, tensor).cast<Address>(); }

// An ordinary tensor that nothing traces or transforms; torch.compile's tracer is not seen here.
bool is_plain(py::handle x) {
  const Torch& torch = Torch::get();
  return Py_TYPE(x.ptr()) == reinterpret_cast<PyTypeObject*>(torch.tensor.ptr()) &&
         invoke(torch.tracing_state).is_none() && !truth(invoke(torch.dispatch_modes)) &&
         !truth(invoke(torch.functorch_active));
}

// y of a call that needs nothing changed or explained; None leaves the others to ops.py.
py::object linear_tensor(py::handle x, py::handle weight, int64_t k, int64_t n,
                         const Quantizer& quantizer) {
  constexpr size_t kMaxRank = 8;
  if (!is_plain(x)) return py::none();
  const Torch& torch = Torch::get();
  const py::object dtype = get(x, torch.dtype);
  const auto known = std::find_if(torch.dtypes.begin(), torch.dtypes.end(),
                                  [&](const auto& each) { return each.first.is(dtype); });
  if (known == torch.dtypes.end()) return py::none();

  const auto shape = get(x, torch.shape).cast<py::tuple>();
  const size_t rank = shape.size();
  if (rank < 1 || rank > kMaxRank) return py::none();
  std::array<PyObject*, kMaxRank + 1> y_arguments{x.ptr()};
  int64_t m = 1;
  for (size_t i = 0; i + 1 < rank; ++i) {
    y_arguments[i + 1] = PyTuple_GET_ITEM(shape.ptr(), i);
    m *= py::handle(y_arguments[i + 1]).cast<int64_t>();
  }
  if (py::handle(PyTuple_GET_ITEM(shape.ptr(), rank - 1)).cast<int64_t>() != k ||
      !truth(get(x, torch.is_cpu)) || !truth(get(weight, torch.is_cpu)) ||
      truth(get(x, torch.requires_grad)) || truth(invoke(torch.is_neg, x)) ||
      !truth(invoke(torch.is_contiguous, x))) {
    return py::none();
  }

  const py::int_ columns(n);
  y_arguments[rank] = columns.ptr();
  py::object y = invoke(torch.new_empty, y_arguments.data(), rank + 1);
  linear(address(x), known->second, m, address(weight), n, k, quantizer, address(y),
         Activation::kNone, 0, 0);
  return y;
}

PyMethodDef fast_functions[] = {
#define SQ_FAST(name, arguments)                                                        \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fastcall<&name>)), \
   METH_FASTCALL, #name arguments}
    SQ_FAST(linear, "(x, x_type, m, packed, n, k, quantizer, y, activation, other, residual)"),
    SQ_FAST(linear_tensor, "(x, packed, in_features, out_features, quantizer)"),
    SQ_FAST(quantize_activations, "(x, x_type, m, k, quantizer, codes, scale, zero_point)"),
    SQ_FAST(linear_quantized,
            "(codes, scale, zero_point, m, max_code, packed, n, k, y, y_type, activation, other, "
            "residual)"),
    SQ_FAST(linear_requantized,
            "(codes, scale, zero_point, m, max_code, packed, n, k, y_quantizer, y_codes, y_scale, "
            "y_zero_point, operand_type, activation, other, residual)"),
#undef SQ_FAST
    {nullptr, nullptr, 0, nullptr}};

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

void use_isa(const std::string& name, bool emulated) {
  for (const sq_cpu::IsaStatus& s : sq_cpu::isa_status()) {
    if (s.name == name) return sq_cpu::use_isa(s.isa, emulated);
  }
  throw std::runtime_error(name + " is not an ISA of sq_cpu");
}

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

  py::class_<Quantizer>(m, "ActivationQuantizer")
      .def(py::init([](Granularity granularity, bool symmetric, bool reduce_range, float scale,
                       int32_t zero_point, std::vector<float> inverse_smoothing) {
             return Quantizer{granularity, symmetric,  reduce_range,
                              scale,       zero_point, std::move(inverse_smoothing)};
           }),
           py::arg("granularity"), py::arg("symmetric"), py::arg("reduce_range"),
           py::arg("scale") = 0.0f, py::arg("zero_point") = 0,
           py::arg("inverse_smoothing") = std::vector<float>())
      .def_property_readonly("max_code", [](const Quantizer& q) { return q.max_code(); })
      .def(
          "__eq__", [](const Quantizer& a, const Quantizer& b) { return a.key() == b.key(); },
          py::is_operator())
      .def(py::pickle(
          [](const Quantizer& q) {
            return py::make_tuple(static_cast<int>(q.granularity), q.symmetric, q.reduce_range,
                                  q.scale, q.zero_point, q.inverse_smoothing);
          },
          [](const py::tuple& t) {
            return Quantizer{static_cast<Granularity>(t[0].cast<int>()),
                             t[1].cast<bool>(),
                             t[2].cast<bool>(),
                             t[3].cast<float>(),
                             t[4].cast<int32_t>(),
                             t[5].cast<std::vector<float>>()};
          }));

  m.def("is_plain", &is_plain, py::arg("x"));
  m.attr("MAX_DEPTH") = sq_cpu::kMaxDepth;
  m.def("isa", &isa);
  m.def("microkernel_name", &sq_cpu::microkernel_name, py::arg("max_code"), py::arg("m"));
  m.def("use_isa", &use_isa, py::arg("name"), py::arg("emulated") = false);
  m.def("packed_bytes", &sq_cpu::packed_bytes, py::arg("n"), py::arg("k"));
  m.def("codes_bytes", &sq_cpu::codes_bytes, py::arg("m"), py::arg("k"));

  m.def(
      "pack_weight",
      [](Address weight, Address scale, Address bias, int64_t n, int64_t k, Address out) {
        const Door door;
        sq_cpu::pack_weight(pointer<const int8_t>(weight), pointer<const float>(scale),
                            pointer<const float>(bias), n, k, pointer<std::byte>(out));
      },
      py::arg("weight"), py::arg("scale"), py::arg("bias"), py::arg("n"), py::arg("k"),
      py::arg("out"));

  m.def(
      "unpack_weight",
      [](Address data, int64_t n, int64_t k, Address weight, Address scale, Address bias) {
        const Door door;
        sq_cpu::unpack_weight(packed(data, n, k), pointer<int8_t>(weight), pointer<float>(scale),
                              pointer<float>(bias));
      },
      py::arg("packed"), py::arg("n"), py::arg("k"), py::arg("weight"), py::arg("scale"),
      py::arg("bias"));

  if (PyModule_AddFunctions(m.ptr(), fast_functions) != 0) throw py::error_already_set();

  m.def(
      "gemm",
      [](Address codes, Address zero_point, int64_t m_, int max_code, Address weight, int64_t n,
         int64_t k, Address y) {
        const Door door;
        sq_cpu::gemm(
            {pointer<uint8_t>(codes), nullptr, pointer<int32_t>(zero_point), m_, k, max_code},
            packed(weight, n, k), pointer<int32_t>(y), n);
      },
      py::arg("codes"), py::arg("zero_point"), py::arg("m"), py::arg("max_code"), py::arg("packed"),
      py::arg("n"), py::arg("k"), py::arg("y"));

  m.def(
      "count_saturation",
      [](Address codes, Address zero_point, int64_t m_, int max_code, Address weight, int64_t n,
         int64_t k) {
        const Door door;
        const sq_cpu::SaturationCount count = sq_cpu::count_saturation(
            {pointer<uint8_t>(codes), nullptr, pointer<int32_t>(zero_point), m_, k, max_code},
            packed(weight, n, k));
        return std::make_pair(count.pairs, count.saturated);
      },
      py::arg("codes"), py::arg("zero_point"), py::arg("m"), py::arg("max_code"), py::arg("packed"),
      py::arg("n"), py::arg("k"));

  py::enum_<sq_cpu::BatchedType>(m, "BatchedType")
      .value("float32", sq_cpu::BatchedType::kFloat32)
      .value("bfloat16", sq_cpu::BatchedType::kBFloat16)
      .value("float16", sq_cpu::BatchedType::kFloat16)
      .value("int32", sq_cpu::BatchedType::kInt32)
      .value("int8", sq_cpu::BatchedType::kInt8);

  using Sizes = std::array<int64_t, 3>;
  m.def(
      "batched_matmul",
      [](int64_t batch, int64_t heads, int64_t kv_heads, int64_t m_, int64_t n, int64_t k,
         Address a, bool a_is_signed, const Sizes& a_strides, Address a_scale, Address b,
         bool b_rows_are_n, const Sizes& b_strides, Address b_scale, float alpha, Address y,
         sq_cpu::BatchedType y_type, const Sizes& y_strides) {
        const auto strides = [](const Sizes& s) {
          return sq_cpu::BatchedStrides{s[0], s[1], s[2]};
        };
        const Door door;
        const sq_cpu::BatchedLeft left{pointer<const void>(a), a_is_signed, strides(a_strides),
                                       pointer<const float>(a_scale)};
        const sq_cpu::BatchedRight right{pointer<const int8_t>(b), b_rows_are_n, strides(b_strides),
                                         pointer<const float>(b_scale)};
        const sq_cpu::BatchedResult result{pointer<void>(y), y_type, strides(y_strides)};
        sq_cpu::batched_matmul({batch, heads, kv_heads, m_, n, k}, left, right, alpha, result);
      },
      py::arg("batch"), py::arg("heads"), py::arg("kv_heads"), py::arg("m"), py::arg("n"),
      py::arg("k"), py::arg("a"), py::arg("a_is_signed"), py::arg("a_strides"), py::arg("a_scale"),
      py::arg("b"), py::arg("b_rows_are_n"), py::arg("b_strides"), py::arg("b_scale"),
      py::arg("alpha"), py::arg("y"), py::arg("y_type"), py::arg("y_strides"));
}
