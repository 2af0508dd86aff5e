// _core: the C++ library under Python's names. Built without torch headers, so one binary serves
// every torch: it asks the tensors themselves, as Python would, and checks that each has the memory
// that the library will touch.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "sq_cpu/attention.h"
#include "sq_cpu/isa.h"
#include "team.h"
#include "testing/use_isa.h"
#include "torch_ops.h"

namespace py = pybind11;

namespace {

using sq_cpu::Activation;
using sq_cpu::codes_bytes;
using sq_cpu::DType;
using sq_cpu::Granularity;
using sq_cpu::KvType;
using sq_cpu::packed_bytes;
using namespace sq_cpu::bindings;

// Sets the package's one exception.
void refuse(const std::string& message) {
  static const py::object* error = nullptr;
  made_once(error,
            [] { return new py::object(py::module_::import("sq_cpu.errors").attr("SqCpuError")); });
  py::set_error(*error, message.c_str());
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

void add_torch_operators() {
  const char* const problem = sq_cpu_add_torch_operators();
  SQ_CHECK(problem == nullptr, "sq_cpu's operators cannot be added to torch: ", problem);
}

int64_t page_bytes(int64_t head_dim, KvType type) { return sq_cpu::page_bytes(head_dim, type); }

PyMethodDef functions[] = {
#define SQ_FUNCTION(name, parameters)                                         \
  {#name,                                                                     \
   reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(                \
       +[](PyObject*, PyObject* const* args, Py_ssize_t count) -> PyObject* { \
         return fastcall(#name, &name, args, count);                          \
       })),                                                                   \
   METH_FASTCALL, #name "($module, " parameters "/)\n--\n\n"}
    SQ_FUNCTION(add_torch_operators, ""),
    SQ_FUNCTION(append, "pages, head_dim, kind, first_row, length, table, k, v, "),
    SQ_FUNCTION(attention,
                "pages, head_dim, kind, first_row, length, table, q, scale, causal, window, "
                "softcap, slopes, sinks, y, "),
    SQ_FUNCTION(batched_matmul, "a, b, transposed, alpha, a_scale, b_scale, y, y_type, "),
    SQ_FUNCTION(codes_bytes, "m, k, "),
    SQ_FUNCTION(count_saturation, "codes, zero_point, max_code, packed, n, k, "),
    SQ_FUNCTION(gemm, "codes, zero_point, max_code, packed, n, k, y, "),
    SQ_FUNCTION(gather_rows, "packed, n, k, inverse_smoothing, ids, y, "),
    SQ_FUNCTION(is_plain, "x, "),
    SQ_FUNCTION(isa, ""),
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
    SQ_FUNCTION(page_bytes, "head_dim, kind, "),
    SQ_FUNCTION(quantize_activations, "x, k, quantizer, codes, scale, zero_point, "),
    SQ_FUNCTION(
        sample,
        "logits, temperature, top_k, top_p, min_p, stream, position, edits, allowed, ids, "),
    SQ_FUNCTION(unpack_weight, "packed, n, k, weight, scale, bias, "),
    SQ_FUNCTION(use_isa, "name, emulated, "),
#undef SQ_FUNCTION
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

  py::enum_<KvType>(m, "KvType").value("int8", KvType::kInt8).value("bfloat16", KvType::kBFloat16);

  py::class_<Quantizer>(m, "ActivationQuantizer")
      .def(py::init(&make_quantizer), py::arg("granularity"), py::arg("symmetric"),
           py::arg("reduce_range"), py::arg("scale") = 0.0, py::arg("zero_point") = 0,
           py::arg("inverse_smoothing") = std::vector<float>(), py::arg("terms") = 1,
           py::arg("hadamard") = 0, py::arg("dynamic_fallback") = false)
      .def_property_readonly("max_code", [](const Quantizer& q) { return q.max_code(); })
      .def_property_readonly("terms", [](const Quantizer& q) { return q.terms; })
      .def_property_readonly("hadamard", [](const Quantizer& q) { return q.hadamard; })
      .def(
          "row_counts",
          [](const Quantizer& q, bool reset) {
            sq_cpu::RowCounts counts;
            if (q.counter != nullptr) counts = reset ? q.counter->reset() : q.counter->read();
            return py::make_tuple(counts.rows, counts.clipped, counts.underflowed, counts.chained);
          },
          py::arg("reset") = false)
      .def(
          "__eq__", [](const Quantizer& a, const Quantizer& b) { return a.key() == b.key(); },
          py::is_operator())
      .def(py::pickle(
          [](const Quantizer& q) {
            return py::make_tuple(static_cast<int>(q.granularity), q.symmetric, q.reduce_range,
                                  q.scale, q.zero_point, q.inverse_smoothing, q.terms, q.hadamard,
                                  q.dynamic_fallback);
          },
          [](const py::tuple& t) {
            return make_quantizer(static_cast<Granularity>(t[0].cast<int>()), t[1].cast<bool>(),
                                  t[2].cast<bool>(), t[3].cast<double>(), t[4].cast<py::object>(),
                                  t[5].cast<std::vector<float>>(), t[6].cast<py::object>(),
                                  t[7].cast<py::object>(), t[8].cast<bool>());
          }));

  define_program(m);
  m.attr("MAX_DEPTH") = sq_cpu::kMaxDepth;
  m.attr("PAGE_TOKENS") = sq_cpu::kPageTokens;
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}
