// _core: the C++ library under Python's names. Built without torch headers: tensors come as
// addresses and sizes, checked before by linear.py, so one binary serves every torch.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "sq_cpu/isa.h"
#include "sq_cpu/linear.h"
#include "sq_cpu/saturation.h"

namespace py = pybind11;

namespace {

using sq_cpu::DType;
using Quantizer = sq_cpu::ActivationQuantizer;
using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

sq_cpu::PackedWeight packed(Address data, int64_t n, int64_t k) {
  return {pointer<const std::byte>(data), n, k};
}

py::dict isa() {
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
  result["threads"] = omp_get_max_threads();
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
  // The library's refusals become the package's one exception.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> error;
  error.call_once_and_store_result(
      [] { return py::module_::import("sq_cpu.errors").attr("SqCpuError"); });
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const std::invalid_argument& e) {
      py::set_error(error.get_stored(), e.what());
    } catch (const std::runtime_error& e) {
      py::set_error(error.get_stored(), e.what());
    }
  });

  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);

  py::enum_<sq_cpu::Granularity>(m, "Granularity")
      .value("per_token", sq_cpu::Granularity::kPerToken)
      .value("per_tensor", sq_cpu::Granularity::kPerTensor)
      .value("static", sq_cpu::Granularity::kStatic);

  py::class_<Quantizer>(m, "ActivationQuantizer")
      .def(py::init([](sq_cpu::Granularity granularity, bool symmetric, bool reduce_range,
                       float scale, int32_t zero_point) {
             return Quantizer{granularity, symmetric, reduce_range, scale, zero_point, nullptr};
           }),
           py::arg("granularity"), py::arg("symmetric"), py::arg("reduce_range"),
           py::arg("scale") = 0.0f, py::arg("zero_point") = 0)
      .def(py::pickle(
          [](const Quantizer& q) {
            return py::make_tuple(static_cast<int>(q.granularity), q.symmetric, q.reduce_range,
                                  q.scale, q.zero_point);
          },
          [](const py::tuple& t) {
            return Quantizer{static_cast<sq_cpu::Granularity>(t[0].cast<int>()),
                             t[1].cast<bool>(),
                             t[2].cast<bool>(),
                             t[3].cast<float>(),
                             t[4].cast<int32_t>(),
                             nullptr};
          }));

  m.attr("MAX_DEPTH") = sq_cpu::kMaxDepth;
  m.def("isa", &isa);
  m.def("microkernel_name", &sq_cpu::microkernel_name, py::arg("max_code"), py::arg("m"));
  m.def("use_isa", &use_isa, py::arg("name"), py::arg("emulated") = false);
  m.def("packed_bytes", &sq_cpu::packed_bytes, py::arg("n"), py::arg("k"));
  m.def("codes_bytes", &sq_cpu::codes_bytes, py::arg("m"), py::arg("k"));

  m.def(
      "pack_weight",
      [](Address weight, Address scale, Address bias, int64_t n, int64_t k, Address out) {
        py::gil_scoped_release release;
        sq_cpu::pack_weight(pointer<const int8_t>(weight), pointer<const float>(scale),
                            pointer<const float>(bias), n, k, pointer<std::byte>(out));
      },
      py::arg("weight"), py::arg("scale"), py::arg("bias"), py::arg("n"), py::arg("k"),
      py::arg("out"));

  m.def(
      "unpack_weight",
      [](Address data, int64_t n, int64_t k, Address weight, Address scale, Address bias) {
        py::gil_scoped_release release;
        sq_cpu::unpack_weight(packed(data, n, k), pointer<int8_t>(weight), pointer<float>(scale),
                              pointer<float>(bias));
      },
      py::arg("packed"), py::arg("n"), py::arg("k"), py::arg("weight"), py::arg("scale"),
      py::arg("bias"));

  m.def(
      "linear",
      [](Address x, DType x_type, int64_t m_, Address weight, int64_t n, int64_t k,
         const Quantizer& quantizer, Address y, DType y_type) {
        py::gil_scoped_release release;
        sq_cpu::linear(pointer<const void>(x), x_type, m_, k, packed(weight, n, k), quantizer,
                       pointer<void>(y), y_type, n);
      },
      py::arg("x"), py::arg("x_type"), py::arg("m"), py::arg("packed"), py::arg("n"), py::arg("k"),
      py::arg("quantizer"), py::arg("y"), py::arg("y_type"));

  m.def(
      "quantize_activations",
      [](Address x, DType x_type, int64_t m_, int64_t k, const Quantizer& quantizer, Address codes,
         Address scale, Address zero_point) {
        py::gil_scoped_release release;
        sq_cpu::quantize_activations(pointer<const void>(x), x_type, k, quantizer,
                                     {pointer<uint8_t>(codes), pointer<float>(scale),
                                      pointer<int32_t>(zero_point), m_, k, quantizer.max_code()});
      },
      py::arg("x"), py::arg("x_type"), py::arg("m"), py::arg("k"), py::arg("quantizer"),
      py::arg("codes"), py::arg("scale"), py::arg("zero_point"));

  m.def(
      "gemm",
      [](Address codes, Address zero_point, int64_t m_, int max_code, Address weight, int64_t n,
         int64_t k, Address y) {
        py::gil_scoped_release release;
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
        py::gil_scoped_release release;
        const sq_cpu::SaturationCount count = sq_cpu::count_saturation(
            {pointer<uint8_t>(codes), nullptr, pointer<int32_t>(zero_point), m_, k, max_code},
            packed(weight, n, k));
        return std::make_pair(count.pairs, count.saturated);
      },
      py::arg("codes"), py::arg("zero_point"), py::arg("m"), py::arg("max_code"), py::arg("packed"),
      py::arg("n"), py::arg("k"));
}
