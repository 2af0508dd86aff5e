// The functions of _core, as the table in bindings.cc lists them: from Python's arguments to the
// library's.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings_torch.h"
#include "check.h"
#include "sq_cpu/attention.h"
#include "sq_cpu/batched_matmul.h"
#include "sq_cpu/linear.h"

namespace sq_cpu::bindings {

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

// A quantizer that owns its smoothing.
struct Quantizer {
  Granularity granularity;
  bool symmetric;
  bool reduce_range;
  float scale;
  int32_t zero_point;
  std::vector<float> inverse_smoothing;  // empty: none
  int terms;
  int hadamard;
  bool dynamic_fallback;
  std::shared_ptr<RowCounter> counter;  // of a static scale, else null

  ActivationQuantizer view(int64_t k) const {
    const auto size = static_cast<int64_t>(inverse_smoothing.size());
    SQ_CHECK(size == 0 || size == k, "the smoothing has ", size, " elements, the input ", k,
             " columns");
    ActivationQuantizer view;
    view.granularity = granularity;
    view.symmetric = symmetric;
    view.reduce_range = reduce_range;
    view.scale = scale;
    view.zero_point = zero_point;
    view.terms = terms;
    view.hadamard = hadamard;
    view.dynamic_fallback = dynamic_fallback;
    view.counter = counter.get();
    view.inverse_smoothing = size == 0 ? nullptr : inverse_smoothing.data();
    return view;
  }
  int max_code() const { return view(static_cast<int64_t>(inverse_smoothing.size())).max_code(); }
  auto key() const {
    return std::tie(granularity, symmetric, reduce_range, scale, zero_point, inverse_smoothing,
                    terms, hadamard, dynamic_fallback);
  }
};

// bindings_linear.cc
Quantizer make_quantizer(Granularity granularity, bool symmetric, bool reduce_range, double scale,
                         const py::object& zero_point, std::vector<float> inverse_smoothing,
                         const py::object& terms, const py::object& hadamard,
                         bool dynamic_fallback);
void pack_weight(py::handle codes, py::handle scale, py::handle bias, py::handle out);
void unpack_weight(py::handle packed, int64_t n, int64_t k, py::handle codes, py::handle scale,
                   py::handle bias);
void gather_rows(py::handle packed, int64_t n, int64_t k, py::handle inverse_smoothing,
                 py::handle ids, py::handle y);
void linear(py::handle x, py::handle packed, int64_t n, int64_t k, const Quantizer& quantizer,
            py::handle y, Activation activation, py::handle other, py::handle residual);
void quantize_activations(py::handle x, int64_t k, const Quantizer& quantizer, py::handle codes,
                          py::handle scale, py::handle zero_point);
void linear_quantized(py::handle codes, py::handle scale, py::handle zero_point, int max_code,
                      int terms, py::handle packed, int64_t n, int64_t k, py::handle y,
                      Activation activation, py::handle other, py::handle residual);
void linear_requantized(py::handle codes, py::handle scale, py::handle zero_point, int max_code,
                        int terms, py::handle packed, int64_t n, int64_t k,
                        const Quantizer& y_quantizer, py::handle y_codes, py::handle y_scale,
                        py::handle y_zero_point, DType operand_type, Activation activation,
                        py::handle other, py::handle residual);
bool is_plain(py::handle x);
py::object linear_tensor(py::handle x, py::handle packed, int64_t k, int64_t n,
                         const Quantizer& quantizer);
void gemm(py::handle codes, py::handle zero_point, int max_code, py::handle packed, int64_t n,
          int64_t k, py::handle y);
std::pair<int64_t, int64_t> count_saturation(py::handle codes, py::handle zero_point, int max_code,
                                             py::handle packed, int64_t n, int64_t k);

// bindings_attention.cc
void append(py::handle pages, int64_t head_dim, KvType type, py::handle first_row,
            py::handle length, py::handle table, py::handle k, py::handle v);
void attention(py::handle pages, int64_t head_dim, KvType type, py::handle first_row,
               py::handle length, py::handle table, py::handle q, double scale, bool causal,
               int64_t window, double softcap, py::handle slopes, py::handle sinks, py::handle y);
void batched_matmul(py::handle a, py::handle b, bool transposed, double alpha, py::handle a_scale,
                    py::handle b_scale, py::handle y, BatchedType y_type);

// bindings_sampling.cc
void sample(py::handle logits, py::handle temperature, py::handle top_k, py::handle top_p,
            py::handle min_p, py::handle stream, py::handle position, py::handle edits,
            py::handle allowed, py::handle ids);

// bindings_program.cc
void define_program(py::module_& m);

}  // namespace sq_cpu::bindings
