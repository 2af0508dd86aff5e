// Python's names for attention.h. sq_cpu/kernels/paged_attention.py has checked shapes, dtypes and
// devices; the values of lengths and tables are checked by the library.
#include <pybind11/pybind11.h>

#include "bindings_torch.h"
#include "sq_cpu/attention.h"

namespace sq_cpu::bindings {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// [rows, heads, head_dim] whose last dimension is contiguous.
struct Heads {
  uintptr_t data;
  DType type;
  int64_t row_stride;
  int64_t head_stride;
  HeadRows rows() const { return {pointer<const void>(data), type, row_stride, head_stride}; }
  HeadResult result() const { return {pointer<void>(data), type, row_stride, head_stride}; }
};

}  // namespace

void bind_attention(py::module_& m) {
  m.attr("PAGE_TOKENS") = kPageTokens;
  m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  m.def("page_bytes", &page_bytes, py::arg("head_dim"));

  py::class_<KvCache>(m, "KvCache")
      .def(py::init([](uintptr_t pages, int64_t page_count, int64_t kv_heads, int64_t head_dim) {
             return KvCache{pointer<std::byte>(pages), page_count, kv_heads, head_dim};
           }),
           py::arg("pages"), py::arg("page_count"), py::arg("kv_heads"), py::arg("head_dim"));
  py::class_<Sequences>(m, "Sequences")
      .def(py::init([](int64_t count, uintptr_t first_row, uintptr_t length, uintptr_t table,
                       int64_t table_stride) {
             return Sequences{count, pointer<const int64_t>(first_row),
                              pointer<const int64_t>(length), pointer<const int32_t>(table),
                              table_stride};
           }),
           py::arg("count"), py::arg("first_row"), py::arg("length"), py::arg("table"),
           py::arg("table_stride"));
  py::class_<Heads>(m, "Heads")
      .def(py::init([](uintptr_t data, DType type, int64_t row_stride, int64_t head_stride) {
             return Heads{data, type, row_stride, head_stride};
           }),
           py::arg("data"), py::arg("dtype"), py::arg("row_stride"), py::arg("head_stride"));
  py::class_<AttentionOptions>(m, "AttentionOptions")
      .def(py::init([](float scale, bool causal, int64_t window, float softcap, uintptr_t slopes,
                       uintptr_t sinks) {
             return AttentionOptions{scale,
                                     causal,
                                     window,
                                     softcap,
                                     pointer<const float>(slopes),
                                     pointer<const float>(sinks)};
           }),
           py::arg("scale"), py::arg("causal"), py::arg("window"), py::arg("softcap"),
           py::arg("slopes"), py::arg("sinks"));

  m.def(
      "append",
      [](const KvCache& cache, const Sequences& sequences, const Heads& k, const Heads& v) {
        const Door door;
        append(cache, sequences, k.rows(), v.rows());
      },
      py::arg("cache"), py::arg("sequences"), py::arg("k"), py::arg("v"));
  m.def(
      "attention",
      [](const KvCache& cache, const Sequences& sequences, int64_t heads, const Heads& q,
         const AttentionOptions& options, const Heads& y) {
        const Door door;
        attention(cache, sequences, heads, q.rows(), options, y.result());
      },
      py::arg("cache"), py::arg("sequences"), py::arg("heads"), py::arg("q"), py::arg("options"),
      py::arg("y"));
}

}  // namespace sq_cpu::bindings
