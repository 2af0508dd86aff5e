// What torch_ops.cc needs of torch: functions of its stable C interface, which keep their names and
// types from one release to the next. Their addresses are looked up in the libtorch_cpu.so that the
// process has loaded, so building needs no torch, and no library file names one: a link would tie
// the binary to where torch lies, and its refusal would not be ours.
//
// A function that can fail returns 0, or another number when it did.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#ifdef __GLIBC__
// By the version that every glibc has: 2.34 moved them into libc itself under another, which would
// keep a library that was linked there from loading where glibc is older.
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
#endif

namespace sq_cpu::torch_abi {

struct TensorObject;
struct LibraryObject;
using TensorHandle = TensorObject*;    // owned: delete_tensor_object
using LibraryHandle = LibraryObject*;  // never deleted here, for that takes its operators away

// An argument or result of an operator: a number's bytes in the low ones, or a TensorHandle. An
// optional one is null, or points to another that `new` made and the operator deletes.
using Value = uint64_t;
static_assert(sizeof(void*) == sizeof(Value), "values hold pointers");
using Kernel = void (*)(Value* stack, uint64_t inputs, uint64_t outputs);

// name, type. All are there since torch 2.8.
#define SQ_TORCH_FUNCTIONS(F)                                                                      \
  F(aoti_torch_library_init_fragment,                                                              \
    int32_t (*)(const char* name_space, const char* file, uint32_t line, LibraryHandle* library))  \
  F(aoti_torch_library_init_impl,                                                                  \
    int32_t (*)(const char* name_space, const char* dispatch_key, const char* file, uint32_t line, \
                LibraryHandle* library))                                                           \
  F(aoti_torch_library_def, int32_t (*)(LibraryHandle library, const char* schema))                \
  F(aoti_torch_library_impl, int32_t (*)(LibraryHandle library, const char* name, Kernel kernel))  \
  F(aoti_torch_delete_tensor_object, int32_t (*)(TensorHandle tensor))                             \
  F(aoti_torch_get_data_ptr, int32_t (*)(TensorHandle tensor, void** data))                        \
  F(aoti_torch_get_dim, int32_t (*)(TensorHandle tensor, int64_t* dimensions))                     \
  F(aoti_torch_get_sizes, int32_t (*)(TensorHandle tensor, int64_t** sizes))                       \
  F(aoti_torch_get_strides, int32_t (*)(TensorHandle tensor, int64_t** strides))                   \
  F(aoti_torch_get_dtype, int32_t (*)(TensorHandle tensor, int32_t* dtype))                        \
  F(aoti_torch_get_device_type, int32_t (*)(TensorHandle tensor, int32_t* device))                 \
  F(aoti_torch_empty_strided,                                                                      \
    int32_t (*)(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,   \
                int32_t device, int32_t device_index, TensorHandle* made))                         \
  F(aoti_torch_copy_, int32_t (*)(TensorHandle to, TensorHandle from, int32_t non_blocking))       \
  F(aoti_torch_device_type_cpu, int32_t (*)())                                                     \
  F(aoti_torch_dtype_float32, int32_t (*)())                                                       \
  F(aoti_torch_dtype_bfloat16, int32_t (*)())                                                      \
  F(aoti_torch_dtype_float16, int32_t (*)())                                                       \
  F(aoti_torch_dtype_uint8, int32_t (*)())                                                         \
  F(aoti_torch_dtype_int8, int32_t (*)())                                                          \
  F(aoti_torch_dtype_int32, int32_t (*)())                                                         \
  F(aoti_torch_dtype_int64, int32_t (*)())

// Since torch 2.12: an operator is defined without tags before.
#define SQ_TORCH_OPTIONAL_FUNCTIONS(F)                                                          \
  F(torch_library_def_with_tags,                                                                \
    int32_t (*)(LibraryHandle library, const char* schema, const int32_t* tags, int32_t count)) \
  F(torch_tag_pt2_compliant_tag, int32_t (*)())

struct Functions {
#define SQ_TORCH_MEMBER(name, ...) \
  using name##_type = __VA_ARGS__; \
  name##_type name = nullptr;
  SQ_TORCH_FUNCTIONS(SQ_TORCH_MEMBER)
  SQ_TORCH_OPTIONAL_FUNCTIONS(SQ_TORCH_MEMBER)
#undef SQ_TORCH_MEMBER
  // at::get_num_threads, C++ and not of the stable interface, which has it since 2.10 only: torch
  // sets OpenMP's count for a thread when that thread first asks.
  int (*get_num_threads)() = nullptr;
};

// Throws std::runtime_error where no torch is loaded or it lacks a function.
inline Functions load() {
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) throw std::runtime_error("no libtorch_cpu.so is loaded: load torch first");
  Functions found;
  const auto find = [torch](const char* name, auto& function) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(torch, name));
    return function != nullptr;
  };
#define SQ_TORCH_FIND(name, ...)                                                         \
  if (!find(#name, found.name)) {                                                        \
    throw std::runtime_error("this torch has no " #name ": install torch 2.8 or newer"); \
  }
  SQ_TORCH_FUNCTIONS(SQ_TORCH_FIND)
#undef SQ_TORCH_FIND
#define SQ_TORCH_FIND(name, ...) find(#name, found.name);
  SQ_TORCH_OPTIONAL_FUNCTIONS(SQ_TORCH_FIND)
#undef SQ_TORCH_FIND
  find("_ZN2at15get_num_threadsEv", found.get_num_threads);
  return found;
}

}  // namespace sq_cpu::torch_abi
