// Workspace of the ops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace sq_cpu {

// One growing buffer per calling thread: a fresh one per call would fault in its pages every time.
template <typename T>
class Scratch {
 public:
  T* get(int64_t count) {
    if (count > capacity_) {
      const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      capacity_ = 0;  // stands if the allocation fails
      data_.reset();  // never both at once
      data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

}  // namespace sq_cpu
