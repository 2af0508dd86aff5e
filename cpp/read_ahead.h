// Memory that is asked for before it is read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "blocking.h"

namespace sq_cpu {

struct WeightRange {
  const std::byte* data;
  int64_t bytes;
};

constexpr int64_t kLineBytes = 64;

// Asks for memory that is about to be read, to L2.
inline void ask_for(const void* data, int64_t bytes) {
  const auto* const lines = static_cast<const std::byte*>(data);
  for (int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(lines + at, 0, 2);
}

// What a worker will read in the stages to come, asked for while it waits for the others: at a
// barrier memory would be idle, and a stage begins with a row of misses.
class ReadAhead {
 public:
  // Ranges in the order in which the worker reads them.
  ReadAhead(const WeightRange* ranges, int64_t count)
      : ranges_(ranges), count_(count), most_(l2_bytes() / 8) {}

  // The worker reads the next `count` ranges itself from now on.
  void begin(int64_t count) {
    for (const int64_t end = begun_ + count; begun_ < end; ++begun_) {
      asked_ -= ranges_[begun_].bytes;
    }
    if (next_ < begun_) {
      next_ = begun_;
      done_ = asked_ = 0;
    }
  }

  // Asks for a few lines; false where what is asked for already fills its part of the cache.
  bool ask() {
    while (next_ < count_ && done_ >= ranges_[next_].bytes) {
      ++next_;
      done_ = 0;
    }
    if (next_ == count_ || asked_ >= most_) return false;
    // Few: while they wait for room among the requests, the barrier may open.
    const int64_t bytes = std::min(2 * kLineBytes, ranges_[next_].bytes - done_);
    ask_for(ranges_[next_].data + done_, bytes);
    done_ += bytes;
    asked_ += bytes;
    return true;
  }

 private:
  const WeightRange* const ranges_;
  const int64_t count_;
  const int64_t most_;
  int64_t begun_ = 0;  // ranges that the worker reads or has read
  int64_t next_ = 0;   // the range that is asked for, and how much of it was
  int64_t done_ = 0;
  int64_t asked_ = 0;  // bytes beyond those begun
};

}  // namespace sq_cpu
