#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>

namespace sq_cpu::testing {

// Memory between two inaccessible pages; a buffer lies against the one or the other.
class Guarded {
 public:
  explicit Guarded(size_t capacity) {
    page_ = sysconf(_SC_PAGESIZE);
    size_ = (capacity + page_ - 1) / page_ * page_;
    base_ = static_cast<char*>(
        mmap(nullptr, size_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + page_, size_, PROT_READ | PROT_WRITE);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, size_ + 2 * page_); }
  template <typename T>
  T* place(size_t count, bool at_end) {
    char* begin = base_ + page_;
    return reinterpret_cast<T*>(at_end ? begin + size_ - count * sizeof(T) : begin);
  }

 private:
  size_t page_, size_;
  char* base_;
};

}  // namespace sq_cpu::testing
