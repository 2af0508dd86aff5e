// Argument checks of the public functions: throw, never abort or print.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

// SQ_CHECK(k > 0, "k is ", k, "; ...") throws std::invalid_argument with the parts joined.
#define SQ_CHECK(condition, ...) \
  if (!(condition)) throw std::invalid_argument(::sq_cpu::join(__VA_ARGS__))

namespace sq_cpu {

// More than any machine has: 256 TB. Sizes are refused beyond it, so that what the library makes of
// a few of them, and of its threads, cannot overflow.
constexpr int64_t kMostBytes = int64_t{1} << 48;

// The product of sizes, none negative, or kMostBytes + 1 where it is larger than kMostBytes.
template <typename... Sizes>
int64_t bounded_product(Sizes... sizes) {
  int64_t product = 1;
  bool fits = true;
  for (const int64_t size : {int64_t{sizes}...}) {
    fits = fits && !__builtin_mul_overflow(product, size, &product);
  }
  return ((sizes == 0) || ...) ? 0 : fits && product <= kMostBytes ? product : kMostBytes + 1;
}

// No iostreams: where a compiler links libstdc++ into the extension, its locale facets and those of
// the libstdc++ that torch loaded get mixed up, and the first number printed crashes.
template <typename Part>
std::string text(const Part& part) {
  if constexpr (std::is_floating_point_v<Part>) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%g", static_cast<double>(part));
    return buffer;
  } else if constexpr (std::is_integral_v<Part>) {
    return std::to_string(part);
  } else {
    return part;
  }
}

template <typename... Parts>
std::string join(const Parts&... parts) {
  return (text(parts) + ...);
}

// Whether an enum whose values count from 0 has this one: casts can make others, and tables are
// indexed by it.
template <typename Enum>
constexpr bool is_one_of(Enum value, Enum last) {
  return static_cast<int>(value) >= 0 && static_cast<int>(value) <= static_cast<int>(last);
}

}  // namespace sq_cpu
