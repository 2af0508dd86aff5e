// torch as the bindings see it: its functions, looked up by name, and the door to the library's
// work.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <utility>

#include "sq_cpu/linear.h"

namespace sq_cpu::bindings {

namespace py = pybind11;

// What torch calls its things, looked up once.
struct Torch {
  py::object torch = py::module_::import("torch");
  py::object tensor = torch.attr("Tensor");
  std::array<std::pair<py::object, DType>, 3> dtypes{{{torch.attr("float32"), DType::kFloat32},
                                                      {torch.attr("bfloat16"), DType::kBFloat16},
                                                      {torch.attr("float16"), DType::kFloat16}}};
  py::object get_num_threads = torch.attr("get_num_threads");
  py::object tracing_state = torch.attr("_C").attr("_get_tracing_state");
  py::object dispatch_modes = torch.attr("_C").attr("_len_torch_dispatch_stack");
  py::object functorch_active = torch.attr("_C").attr("_are_functorch_transforms_active");
  // Descriptors: x.name would look each up.
  py::object data_ptr = tensor.attr("data_ptr");
  py::object dtype = tensor.attr("dtype");
  py::object is_contiguous = tensor.attr("is_contiguous");
  py::object is_cpu = tensor.attr("is_cpu");
  py::object is_neg = tensor.attr("is_neg");
  py::object new_empty = tensor.attr("new_empty");
  py::object requires_grad = tensor.attr("requires_grad");
  py::object shape = tensor.attr("shape");

  static const Torch& get() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> torch;
    return torch.call_once_and_store_result([] { return Torch(); }).get_stored();
  }
};

inline py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::object get(py::handle object, py::handle descriptor) {
  return owned(Py_TYPE(descriptor.ptr())
                   ->tp_descr_get(descriptor.ptr(), object.ptr(),
                                  reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()))));
}

inline py::object invoke(py::handle function, PyObject* const* arguments, size_t count) {
  return owned(PyObject_Vectorcall(function.ptr(), arguments, count, nullptr));
}

inline py::object invoke(py::handle function) { return invoke(function, nullptr, 0); }

inline py::object invoke(py::handle function, py::handle argument) {
  return invoke(function, &argument.ptr(), 1);
}

inline bool truth(const py::object& object) {
  const int value = PyObject_IsTrue(object.ptr());
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

// torch sets OpenMP's count for a thread only when that thread asks for it: asked here, when a
// thread first comes.
struct ThreadsOfTorch {
  ThreadsOfTorch() {
    thread_local bool asked = false;
    if (!asked) invoke(Torch::get().get_num_threads);
    asked = true;
  }
};

// The one door to the library's work: whoever releases the GIL for it has torch's thread count.
struct Door {
  ThreadsOfTorch threads;  // first: it calls Python
  py::gil_scoped_release release;
};

void bind_attention(py::module_& m);

}  // namespace sq_cpu::bindings
