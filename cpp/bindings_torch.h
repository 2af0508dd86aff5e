// torch as the bindings see it: its functions, looked up by name, and the door to the library's
// work.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "sq_cpu/linear.h"

namespace sq_cpu::bindings {

namespace py = pybind11;

// What `make` gives the first time, for the whole life of the process: nothing of Python's may be
// destroyed after the interpreter. The GIL guards it; a thread that comes while `make` has let it
// go makes another, which is used by none. (std::call_once needs a newer glibc where it is built
// with one: see older_systems.cc.)
template <typename T, typename Make>
const T& made_once(const T*& made, Make make) {
  if (made == nullptr) {
    const T* const mine = make();
    if (made == nullptr) made = mine;
  }
  return *made;
}

// What torch calls its things, looked up once.
struct Torch {
  py::object torch = py::module_::import("torch");
  py::object tensor = torch.attr("Tensor");
  std::array<std::pair<py::object, DType>, 3> dtypes{{{torch.attr("float32"), DType::kFloat32},
                                                      {torch.attr("bfloat16"), DType::kBFloat16},
                                                      {torch.attr("float16"), DType::kFloat16}}};
  py::object uint8 = torch.attr("uint8");
  py::object int8 = torch.attr("int8");
  py::object int32 = torch.attr("int32");
  py::object int64 = torch.attr("int64");
  py::object float32 = torch.attr("float32");
  py::object get_num_threads = torch.attr("get_num_threads");
  py::object tracing_state = torch.attr("_C").attr("_get_tracing_state");
  py::object dispatch_modes = torch.attr("_C").attr("_len_torch_dispatch_stack");
  py::object functorch_active = torch.attr("_C").attr("_are_functorch_transforms_active");
  // What modules say of themselves: the level of forward-mode derivatives, and whether it profiles.
  py::object forward_ad = py::module_::import("torch.autograd.forward_ad");
  py::object profiler = py::module_::import("torch.autograd.profiler");
  py::str current_level{"_current_level"};
  py::str is_profiler_enabled{"_is_profiler_enabled"};
  // Descriptors: x.name would look each up.
  py::object data_ptr = tensor.attr("data_ptr");
  py::object device = tensor.attr("device");
  py::object dtype = tensor.attr("dtype");
  py::object is_contiguous = tensor.attr("is_contiguous");
  py::object is_cpu = tensor.attr("is_cpu");
  py::object is_neg = tensor.attr("is_neg");
  py::object nbytes = tensor.attr("nbytes");
  py::object new_empty = tensor.attr("new_empty");
  py::object numel = tensor.attr("numel");
  py::object requires_grad = tensor.attr("requires_grad");
  py::object shape = tensor.attr("shape");
  py::object stride = tensor.attr("stride");

  bool is_differentiating_forward() const {
    return py::getattr(forward_ad, current_level).cast<int>() >= 0;
  }
  bool is_profiling() const { return py::getattr(profiler, is_profiler_enabled).ptr() == Py_True; }

  static const Torch& get() {
    static const Torch* torch = nullptr;
    return made_once(torch, [] { return new Torch(); });
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

inline bool is_tensor(py::handle object) {
  auto* const tensor = reinterpret_cast<PyTypeObject*>(Torch::get().tensor.ptr());
  return PyType_IsSubtype(Py_TYPE(object.ptr()), tensor) != 0;
}

inline std::optional<DType> float_type(py::handle tensor) {
  const py::object dtype = get(tensor, Torch::get().dtype);
  for (const auto& [known, type] : Torch::get().dtypes) {
    if (known.is(dtype)) return type;
  }
  return std::nullopt;
}

inline void* address(py::handle tensor) {
  return PyLong_AsVoidPtr(invoke(Torch::get().data_ptr, tensor).ptr());
}

// What a message says of an operand.
inline std::string describe(py::handle x) {
  const Torch& torch = Torch::get();
  if (!is_tensor(x)) return Py_TYPE(x.ptr())->tp_name;
  const py::str text("{} {} on {}");
  return text.format(get(x, torch.dtype), py::list(get(x, torch.shape)), get(x, torch.device));
}

// The memory of a tensor on the CPU, of `dtype`; else std::invalid_argument.
inline void* memory(const char* name, py::handle x, const py::object& dtype) {
  const Torch& torch = Torch::get();
  SQ_CHECK(is_tensor(x) && get(x, torch.dtype).is(dtype) && truth(get(x, torch.is_cpu)), name,
           " is ", describe(x), ", not ", std::string(py::str(dtype)), " on cpu");
  void* const data = address(x);
  SQ_CHECK(data != nullptr || invoke(torch.numel, x).cast<int64_t>() == 0, name, " is ",
           describe(x), " without memory");
  return data;
}

// The shape of a tensor of so many dimensions.
inline std::vector<int64_t> shape_of(const char* name, py::handle x, size_t dimensions) {
  SQ_CHECK(is_tensor(x), name, " is ", describe(x));
  auto shape = get(x, Torch::get().shape).cast<std::vector<int64_t>>();
  SQ_CHECK(shape.size() == dimensions, name, " is ", describe(x), " of ", shape.size(),
           " dimensions, not ", dimensions);
  return shape;
}

// The same of `count` elements, one after another.
template <typename T>
T* array(const char* name, py::handle x, const py::object& dtype, int64_t count) {
  void* const data = memory(name, x, dtype);
  SQ_CHECK(invoke(Torch::get().numel, x).cast<int64_t>() == count &&
               truth(invoke(Torch::get().is_contiguous, x)),
           name, " is ", describe(x), ", not ", count, " elements one after another");
  return static_cast<T*>(data);
}

// The same, or null for None.
template <typename T>
T* optional_array(const char* name, py::handle x, const py::object& dtype, int64_t count) {
  return x.is_none() ? nullptr : array<T>(name, x, dtype, count);
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

}  // namespace sq_cpu::bindings
