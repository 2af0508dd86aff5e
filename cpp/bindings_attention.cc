// Tensors to the arguments of attention.h and batched_matmul.h.
#include "bindings.h"
#include "sq_cpu/attention.h"

namespace sq_cpu::bindings {
namespace {

// [rows, heads, head_dim] of floats, whose last dimension is contiguous.
struct Heads {
  Heads(const char* name, py::handle x, int64_t rows, int64_t heads, int64_t head_dim) {
    const std::optional<DType> known = is_tensor(x) ? float_type(x) : std::nullopt;
    SQ_CHECK(known, name, " is ", describe(x), ", not float32, bfloat16 or float16");
    type = *known;
    data = memory(name, x, Torch::get().dtypes[static_cast<int>(type)].first);
    const auto shape = get(x, Torch::get().shape).cast<std::vector<int64_t>>();
    const auto strides = invoke(Torch::get().stride, x).cast<std::vector<int64_t>>();
    SQ_CHECK((shape == std::vector<int64_t>{rows, heads, head_dim}) &&
                 (strides[2] == 1 || head_dim == 1),
             name, " is ", describe(x), ", not [", rows, ", ", heads, ", ", head_dim,
             "] with contiguous channels");
    row_stride = strides[0];
    head_stride = strides[1];
  }
  HeadRows rows() const { return {data, type, row_stride, head_stride}; }
  HeadResult result() const { return {data, type, row_stride, head_stride}; }

  void* data;
  DType type;
  int64_t row_stride;
  int64_t head_stride;
};

// A layer's pages, and the sequences of a call.
struct Call {
  Call(py::handle pages, int64_t head_dim, KvType type, py::handle first_row, py::handle length,
       py::handle table) {
    const Torch& torch = Torch::get();
    const std::vector<int64_t> page = shape_of("pages", pages, 3);
    SQ_CHECK(page[2] == page_bytes(head_dim, type), "pages are of ", page[2], " bytes, not ",
             page_bytes(head_dim, type));
    cache = {
        array<std::byte>("pages", pages, torch.uint8, bounded_product(page[0], page[1], page[2])),
        page[0], page[1], head_dim, type};
    const std::vector<int64_t> tables = shape_of("table", table, 2);
    sequences = {
        tables[0], array<const int64_t>("first_row", first_row, torch.int64, tables[0] + 1),
        array<const int64_t>("length", length, torch.int64, tables[0]),
        array<const int32_t>("table", table, torch.int32, bounded_product(tables[0], tables[1])),
        tables[1]};
  }
  int64_t rows() const { return sequences.first_row[sequences.count]; }

  KvCache cache;
  Sequences sequences;
};

// A tensor [batch, heads, rows, columns] whose rows are contiguous.
struct Matrices {
  void* data;
  std::array<int64_t, 4> shape;
  BatchedStrides strides;
};

Matrices matrices(const char* name, py::handle x, const py::object& dtype) {
  void* const data = memory(name, x, dtype);
  const auto shape = get(x, Torch::get().shape).cast<std::vector<int64_t>>();
  const auto strides = invoke(Torch::get().stride, x).cast<std::vector<int64_t>>();
  SQ_CHECK(shape.size() == 4 && (strides[3] == 1 || shape[3] <= 1), name, " is ", describe(x),
           ", not [batch, heads, rows, columns] with contiguous rows");
  return {data, {shape[0], shape[1], shape[2], shape[3]}, {strides[0], strides[1], strides[2]}};
}

}  // namespace

void append(py::handle pages, int64_t head_dim, KvType type, py::handle first_row,
            py::handle length, py::handle table, py::handle k, py::handle v) {
  const Call call(pages, head_dim, type, first_row, length, table);
  const Heads keys("k", k, call.rows(), call.cache.kv_heads, head_dim);
  const Heads values("v", v, call.rows(), call.cache.kv_heads, head_dim);
  const Door door;
  sq_cpu::append(call.cache, call.sequences, keys.rows(), values.rows());
}

void attention(py::handle pages, int64_t head_dim, KvType type, py::handle first_row,
               py::handle length, py::handle table, py::handle q, double scale, bool causal,
               int64_t window, double softcap, py::handle slopes, py::handle sinks, py::handle y) {
  const Torch& torch = Torch::get();
  const Call call(pages, head_dim, type, first_row, length, table);
  const int64_t heads = shape_of("q", q, 3)[1];
  const Heads queries("q", q, call.rows(), heads, head_dim);
  const Heads result("y", y, call.rows(), heads, head_dim);
  const AttentionOptions options{
      static_cast<float>(scale),
      causal,
      window,
      static_cast<float>(softcap),
      optional_array<const float>("slopes", slopes, torch.float32, heads),
      optional_array<const float>("sinks", sinks, torch.float32, heads)};
  const Door door;
  sq_cpu::attention(call.cache, call.sequences, heads, queries.rows(), options, result.result());
}

void batched_matmul(py::handle a, py::handle b, bool transposed, double alpha, py::handle a_scale,
                    py::handle b_scale, py::handle y, BatchedType y_type) {
  const Torch& torch = Torch::get();
  const bool is_signed = !is_tensor(a) || !get(a, torch.dtype).is(torch.uint8);
  const Matrices left = matrices("a", a, is_signed ? torch.int8 : torch.uint8);
  const Matrices right = matrices("b", b, torch.int8);
  const py::object* const y_types[] = {&torch.float32, &torch.dtypes[1].first,
                                       &torch.dtypes[2].first, &torch.int32, &torch.int8};
  SQ_CHECK(is_one_of(y_type, BatchedType::kInt8), "unknown BatchedType ", static_cast<int>(y_type));
  const Matrices result = matrices("y", y, *y_types[static_cast<int>(y_type)]);
  const auto [batch, query_heads, m, k] = left.shape;
  const int64_t kv_heads = right.shape[1], n = right.shape[transposed ? 2 : 3];
  SQ_CHECK(right.shape[0] == batch && right.shape[transposed ? 3 : 2] == k &&
               (result.shape == std::array<int64_t, 4>{batch, query_heads, m, n}),
           "a is ", describe(a), ", b ", describe(b), ", y ", describe(y), ": they do not fit");
  auto* const a_scales = optional_array<const float>("a_scale", a_scale, torch.float32,
                                                     bounded_product(batch, query_heads, m));
  auto* const b_scales = optional_array<const float>("b_scale", b_scale, torch.float32,
                                                     bounded_product(batch, kv_heads, n));
  const Door door;
  sq_cpu::batched_matmul(
      {batch, query_heads, kv_heads, m, n, k}, {left.data, is_signed, left.strides, a_scales},
      {static_cast<const int8_t*>(right.data), transposed, right.strides, b_scales},
      static_cast<float>(alpha), {result.data, y_type, result.strides});
}

}  // namespace sq_cpu::bindings
