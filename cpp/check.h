// Argument checks of the public functions: throw, never abort or print.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

// SQ_CHECK(k > 0, "k is ", k, "; ...") throws std::invalid_argument with the parts joined.
#define SQ_CHECK(condition, ...) \
  if (!(condition)) throw std::invalid_argument(::sq_cpu::join(__VA_ARGS__))

namespace sq_cpu {

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

}  // namespace sq_cpu
