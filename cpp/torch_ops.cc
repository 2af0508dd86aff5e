#include "torch_ops.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "sq_cpu/batched_matmul.h"
#include "sq_cpu/linear.h"
#include "torch_abi.h"

namespace sq_cpu {
namespace {

using torch_abi::TensorHandle;
using torch_abi::Value;

torch_abi::Functions g_torch;  // written before torch knows of any operator

struct ElementTypes {
  int32_t float32, bfloat16, float16, uint8, int8, int32, int64, cpu;
} g_types;

void succeed(int32_t status, const char* what) {
  if (status != 0) throw std::runtime_error(join("torch failed to ", what));
}

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(TensorHandle handle) : handle_(handle) {
    if (handle == nullptr) return;
    succeed(g_torch.aoti_torch_get_dim(handle, &dimensions_), "read a tensor");
    succeed(g_torch.aoti_torch_get_sizes(handle, &sizes_), "read a tensor");
    succeed(g_torch.aoti_torch_get_strides(handle, &strides_), "read a tensor");
    succeed(g_torch.aoti_torch_get_dtype(handle, &type_), "read a tensor");
    succeed(g_torch.aoti_torch_get_device_type(handle, &device_), "read a tensor");
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    dimensions_ = other.dimensions_;
    sizes_ = other.sizes_;
    strides_ = other.strides_;
    type_ = other.type_;
    device_ = other.device_;
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) g_torch.aoti_torch_delete_tensor_object(handle_);
  }

  static Tensor empty(const int64_t* sizes, int64_t dimensions, int32_t type) {
    std::vector<int64_t> strides(dimensions);
    int64_t count = 1;
    for (int64_t i = dimensions; i-- > 0;) {
      strides[i] = count;
      count = bounded_product(count, std::max<int64_t>(sizes[i], 1));
    }
    TensorHandle made = nullptr;
    succeed(g_torch.aoti_torch_empty_strided(dimensions, sizes, strides.data(), type, g_types.cpu,
                                             0, &made),
            "make a tensor: there may be no memory for it");
    return Tensor(made);
  }

  bool given() const { return handle_ != nullptr; }
  int64_t dimensions() const { return dimensions_; }
  const int64_t* sizes() const { return sizes_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  int32_t type() const { return type_; }
  TensorHandle release() { return std::exchange(handle_, nullptr); }

  int64_t count() const {
    int64_t product = 1;
    for (int64_t i = 0; i < dimensions_; ++i) product = bounded_product(product, sizes_[i]);
    return product;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dimensions_; i-- > 0;) {
      if (sizes_[i] != 1 && strides_[i] != expected) return count() == 0;
      expected *= sizes_[i];
    }
    return true;
  }
  // Itself, or a copy that is contiguous and of `type`.
  Tensor dense(int32_t type) && {
    if (!given() || (type_ == type && is_contiguous())) return std::move(*this);
    Tensor copy = empty(sizes_, dimensions_, type);
    succeed(g_torch.aoti_torch_copy_(copy.handle_, handle_, 0), "copy a tensor");
    return copy;
  }
  Tensor dense() && {
    const int32_t own = type_;
    return std::move(*this).dense(own);
  }

  // The memory of a tensor on the CPU of such elements; throws for another.
  void* memory(const char* name, int32_t type) const {
    SQ_CHECK(device_ == g_types.cpu, "int8: ", name,
             " is on another device; sq_cpu runs on the CPU");
    SQ_CHECK(type_ == type, "int8: ", name, " has elements of another dtype");
    void* data = nullptr;
    succeed(g_torch.aoti_torch_get_data_ptr(handle_, &data), "read a tensor's memory");
    SQ_CHECK(data != nullptr || count() == 0, "int8: ", name, " has no memory");
    return data;
  }
  // The same, of `elements` one after another.
  template <typename T>
  T* array(const char* name, int32_t type, int64_t elements) const {
    SQ_CHECK(count() == elements && is_contiguous(), "int8: ", name, " is not ", elements,
             " elements one after another");
    return static_cast<T*>(memory(name, type));
  }
  template <typename T>
  T* optional_array(const char* name, int32_t type, int64_t elements) const {
    return given() ? array<T>(name, type, elements) : nullptr;
  }

 private:
  TensorHandle handle_ = nullptr;
  int64_t dimensions_ = 0;
  int64_t* sizes_ = nullptr;
  int64_t* strides_ = nullptr;
  int32_t type_ = 0;
  int32_t device_ = 0;
};

// The arguments of a call, in order; it owns the tensors from the beginning, so that none is lost.
template <size_t kTensors>
class Arguments {
 public:
  // `tensors`: which arguments are tensors, and after how many of them all are optional.
  Arguments(Value* stack, const std::array<int, kTensors>& tensors, size_t needed) : stack_(stack) {
    for (size_t i = 0; i < kTensors; ++i) {
      Value value = stack[tensors[i]];
      if (i >= needed && value != 0) {
        auto* const inner = as<Value*>(value);
        value = *inner;
        delete inner;
      }
      handles_[i] = as<TensorHandle>(value);
    }
  }
  ~Arguments() {
    for (TensorHandle handle : handles_) {
      if (handle != nullptr) g_torch.aoti_torch_delete_tensor_object(handle);
    }
  }
  Arguments(const Arguments&) = delete;

  Tensor tensor(size_t i) { return Tensor(std::exchange(handles_[i], nullptr)); }
  int64_t integer(size_t i) const { return as<int64_t>(stack_[i]); }
  double number(size_t i) const { return as<double>(stack_[i]); }
  bool truth(size_t i) const { return as<bool>(stack_[i]); }
  // Of an enum whose values count from 0; one beyond `last` becomes that, which the library
  // refuses.
  int bounded(size_t i, int last) const {
    return static_cast<int>(std::clamp<int64_t>(integer(i), -1, last));
  }

 private:
  template <typename T>
  static T as(Value value) {
    T result;
    std::memcpy(&result, &value, sizeof result);
    return result;
  }

  Value* stack_;
  TensorHandle handles_[kTensors];
};

void give(Value* stack, size_t i, Tensor&& result) {
  const TensorHandle handle = result.release();
  std::memcpy(stack + i, &handle, sizeof handle);
}

DType float_type(const char* name, const Tensor& x) {
  SQ_CHECK(
      x.type() == g_types.float32 || x.type() == g_types.bfloat16 || x.type() == g_types.float16,
      "int8: ", name, " has other elements; use float32, bfloat16 or float16");
  return x.type() == g_types.float32    ? DType::kFloat32
         : x.type() == g_types.bfloat16 ? DType::kBFloat16
                                        : DType::kFloat16;
}

int32_t torch_type(int64_t type) {
  const int32_t types[] = {g_types.float32, g_types.bfloat16, g_types.float16, g_types.int32,
                           g_types.int8};
  SQ_CHECK(type >= 0 && type < 5, "int8: unknown type ", type, " of the result");
  return types[type];
}

PackedWeight packed_weight(const Tensor& packed, int64_t n, int64_t k) {
  const int64_t bytes = packed_bytes(n, k);
  SQ_CHECK(packed.type() == g_types.uint8 && packed.is_contiguous() && packed.count() == bytes,
           "int8: ", packed.count(), " elements are not a packed weight [", n, ", ", k,
           "], which takes ", bytes, " of uint8");
  return {packed.array<const std::byte>("the packed weight", g_types.uint8, bytes), n, k};
}

// x [..., k] to y [..., n] of its dtype, with what linear.h says of the rest. The enums are those
// of linear.h as numbers.
// No argument has a default: inductor would pass those by name, which takes 2 us longer.
constexpr char kLinear[] =
    "linear(Tensor x, Tensor packed, int out_features, Tensor? inverse_smoothing, "
    "int granularity, bool symmetric, bool reduce_range, float scale, int zero_point, "
    "bool dynamic_fallback, int terms, int hadamard, int activation, Tensor? other, "
    "Tensor? residual) -> Tensor";

void linear_kernel(Value* stack) {
  Arguments<5> given(stack, {0, 1, 3, 13, 14}, 2);
  Tensor x = given.tensor(0);
  const Tensor packed = given.tensor(1), inverse = given.tensor(2);
  const DType type = float_type("x", x);
  SQ_CHECK(x.dimensions() >= 1, "int8: x is of 0 dimensions; use one or more");
  const int64_t n = given.integer(2), k = x.size(x.dimensions() - 1);
  const PackedWeight weight = packed_weight(packed, n, k);
  x = std::move(x).dense();
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dimensions(); ++i) m = bounded_product(m, x.size(i));
  ActivationQuantizer quantizer;
  quantizer.granularity = static_cast<Granularity>(given.bounded(4, 3));
  quantizer.symmetric = given.truth(5);
  quantizer.reduce_range = given.truth(6);
  quantizer.scale = static_cast<float>(given.number(7));
  quantizer.zero_point = given.bounded(8, 256);
  quantizer.dynamic_fallback = given.truth(9);
  quantizer.terms = given.bounded(10, 3);
  quantizer.hadamard = given.bounded(11, kTileDepth + 1);
  quantizer.inverse_smoothing =
      inverse.optional_array<const float>("inverse_smoothing", g_types.float32, k);

  std::vector<int64_t> shape(x.sizes(), x.sizes() + x.dimensions());
  shape.back() = n;
  const auto operand = [&](size_t i, const char* name) {
    Tensor tensor = given.tensor(i);
    SQ_CHECK(!tensor.given() || (tensor.type() == x.type() &&
                                 std::equal(shape.begin(), shape.end(), tensor.sizes(),
                                            tensor.sizes() + tensor.dimensions())),
             "int8: ", name, " is not of the output's shape and dtype");
    return std::move(tensor).dense();
  };
  const Tensor other = operand(3, "other"), residual = operand(4, "residual");
  const int64_t size = bounded_product(m, n);
  Epilogue epilogue;
  epilogue.activation = static_cast<Activation>(given.bounded(12, 5));
  epilogue.other = other.optional_array<const void>("other", x.type(), size);
  epilogue.residual = residual.optional_array<const void>("residual", x.type(), size);
  epilogue.ld_other = epilogue.ld_residual = n;
  epilogue.operand_type = type;

  Tensor y = Tensor::empty(shape.data(), x.dimensions(), x.type());
  linear(x.memory("x", x.type()), type, m, k, weight, quantizer, y.memory("y", y.type()), type, n,
         epilogue);
  give(stack, 0, std::move(y));
}

// Rows of a packed weight, [..., in_features] of the DType `type`, for ids int64 or int32 [...].
constexpr char kGatherRows[] =
    "gather_rows(Tensor ids, Tensor packed, int out_features, int in_features, "
    "Tensor? inverse_smoothing, int type) -> Tensor";

void gather_rows_kernel(Value* stack) {
  Arguments<3> given(stack, {0, 1, 4}, 2);
  Tensor ids = given.tensor(0);
  const Tensor packed = given.tensor(1), inverse = given.tensor(2);
  SQ_CHECK(ids.type() == g_types.int64 || ids.type() == g_types.int32,
           "int8: ids have other elements; use int64 or int32");
  const int64_t n = given.integer(2), k = given.integer(3);
  const PackedWeight weight = packed_weight(packed, n, k);
  const int32_t type = torch_type(given.integer(5));
  const auto* const scales =
      inverse.optional_array<const float>("inverse_smoothing", g_types.float32, k);
  ids = std::move(ids).dense(g_types.int64);
  std::vector<int64_t> shape(ids.sizes(), ids.sizes() + ids.dimensions());
  shape.push_back(k);
  Tensor y = Tensor::empty(shape.data(), ids.dimensions() + 1, type);
  gather_rows(weight, static_cast<const int64_t*>(ids.memory("ids", g_types.int64)), ids.count(),
              scales, y.memory("y", type), float_type("y", y), k);
  give(stack, 0, std::move(y));
}

// The codes int8 [out_features, in_features] and the scales fp32 [out_features].
constexpr char kUnpackWeight[] =
    "unpack_weight(Tensor packed, int out_features, int in_features) -> (Tensor, Tensor)";

void unpack_weight_kernel(Value* stack) {
  Arguments<1> given(stack, {0}, 1);
  const Tensor packed = given.tensor(0);
  const int64_t shape[] = {given.integer(1), given.integer(2)};
  const PackedWeight weight = packed_weight(packed, shape[0], shape[1]);
  Tensor codes = Tensor::empty(shape, 2, g_types.int8);
  Tensor scale = Tensor::empty(shape, 1, g_types.float32);
  unpack_weight(weight, static_cast<int8_t*>(codes.memory("codes", g_types.int8)),
                static_cast<float*>(scale.memory("scale", g_types.float32)), nullptr);
  give(stack, 0, std::move(codes));
  give(stack, 1, std::move(scale));
}

// batched_matmul.h, with a BatchedType.
constexpr char kBatchedMatmul[] =
    "batched_matmul(Tensor a, Tensor b, bool transposed, float scale, Tensor? a_scale, "
    "Tensor? b_scale, int type) -> Tensor";

void batched_matmul_kernel(Value* stack) {
  Arguments<4> given(stack, {0, 1, 4, 5}, 2);
  const auto matrices = [&](size_t i, const char* name) {
    Tensor x = given.tensor(i);
    SQ_CHECK(x.dimensions() == 4, "int8: ", name, " is not [batch, heads, rows, columns]");
    const bool rows = x.stride(3) == 1 || x.size(3) <= 1;
    return rows ? std::move(x) : std::move(x).dense();
  };
  const Tensor a = matrices(0, "a"), b = matrices(1, "b");
  const Tensor a_scale = given.tensor(2).dense(), b_scale = given.tensor(3).dense();
  const bool transposed = given.truth(2), is_signed = a.type() == g_types.int8;
  const int64_t kv_heads = b.size(1), n = b.size(transposed ? 2 : 3);
  const int64_t shape[] = {a.size(0), a.size(1), a.size(2), n};
  SQ_CHECK(b.size(0) == shape[0] && b.size(transposed ? 3 : 2) == a.size(3),
           "int8: a and b do not fit");
  const int64_t type = given.integer(6);
  const auto strides = [](const Tensor& x) {
    return BatchedStrides{x.stride(0), x.stride(1), x.stride(2)};
  };
  auto* const left = a.memory("a", is_signed ? g_types.int8 : g_types.uint8);
  auto* const right = static_cast<const int8_t*>(b.memory("b", g_types.int8));
  auto* const left_scales = a_scale.optional_array<const float>(
      "a_scale", g_types.float32, bounded_product(shape[0], shape[1], shape[2]));
  auto* const right_scales = b_scale.optional_array<const float>(
      "b_scale", g_types.float32, bounded_product(shape[0], kv_heads, n));
  Tensor y = Tensor::empty(shape, 4, torch_type(type));
  batched_matmul({shape[0], shape[1], kv_heads, shape[2], n, a.size(3)},
                 {left, is_signed, strides(a), left_scales},
                 {right, transposed, strides(b), right_scales}, static_cast<float>(given.number(3)),
                 {y.memory("y", y.type()), static_cast<BatchedType>(type), strides(y)});
  give(stack, 0, std::move(y));
}

// torch hands an exception to whoever called the operator. Those of the library are all of one type
// there, for which Python has RuntimeError.
template <void (*kernel)(Value*)>
void call(Value* stack, uint64_t, uint64_t) {
  thread_local bool asked = false;
  if (!asked && g_torch.get_num_threads != nullptr) g_torch.get_num_threads();
  asked = true;
  try {
    kernel(stack);
  } catch (const std::invalid_argument& e) {
    throw std::runtime_error(e.what());
  }
}

struct Operator {
  const char* schema;
  torch_abi::Kernel kernel;
};

constexpr Operator kOperators[] = {
    {kLinear, &call<linear_kernel>},
    {kGatherRows, &call<gather_rows_kernel>},
    {kUnpackWeight, &call<unpack_weight_kernel>},
    {kBatchedMatmul, &call<batched_matmul_kernel>},
};

void add_operators() {
  g_torch = torch_abi::load();
  g_types = {g_torch.aoti_torch_dtype_float32(), g_torch.aoti_torch_dtype_bfloat16(),
             g_torch.aoti_torch_dtype_float16(), g_torch.aoti_torch_dtype_uint8(),
             g_torch.aoti_torch_dtype_int8(),    g_torch.aoti_torch_dtype_int32(),
             g_torch.aoti_torch_dtype_int64(),   g_torch.aoti_torch_device_type_cpu()};
  torch_abi::LibraryHandle schemas = nullptr, kernels = nullptr;
  succeed(g_torch.aoti_torch_library_init_fragment("sq_cpu", __FILE__, __LINE__, &schemas),
          "add the operators of sq_cpu");
  succeed(g_torch.aoti_torch_library_init_impl("sq_cpu", "CPU", __FILE__, __LINE__, &kernels),
          "add the operators of sq_cpu");
  const bool tags = g_torch.torch_library_def_with_tags != nullptr &&
                    g_torch.torch_tag_pt2_compliant_tag != nullptr;
  const int32_t tag = tags ? g_torch.torch_tag_pt2_compliant_tag() : 0;
  for (const auto& [schema, kernel] : kOperators) {
    succeed(tags ? g_torch.torch_library_def_with_tags(schemas, schema, &tag, 1)
                 : g_torch.aoti_torch_library_def(schemas, schema),
            "define an operator of sq_cpu");
    const std::string name(schema, std::strchr(schema, '('));
    succeed(g_torch.aoti_torch_library_impl(kernels, name.c_str(), kernel),
            "add an operator of sq_cpu");
  }
}

}  // namespace
}  // namespace sq_cpu

const char* sq_cpu_add_torch_operators() {
  static const std::string problem = []() -> std::string {
    try {
      sq_cpu::add_operators();
      return {};
    } catch (const std::exception& e) {
      return e.what();
    }
  }();
  return problem.empty() ? nullptr : problem.c_str();
}
