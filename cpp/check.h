// Argument checks of the public functions: throw, never abort or print.
#pragma once

#include <sstream>
#include <stdexcept>

// SQ_CHECK(k > 0, "k is ", k, "; ...") throws std::invalid_argument with the parts joined.
#define SQ_CHECK(condition, ...) \
  if (!(condition)) throw std::invalid_argument(::sq_cpu::join(__VA_ARGS__))

namespace sq_cpu {

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace sq_cpu
