// What older_systems.cc stands in for: exceptions end when the last that points to them does, and
// sizes that no memory has are refused.
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "harness.h"

namespace {

using namespace sq_cpu::testing;

int g_alive = 0;

struct Counted {
  Counted() { ++g_alive; }
  Counted(const Counted&) { ++g_alive; }
  ~Counted() { --g_alive; }
};

void test_pointers() {
  Part part("pointers to exceptions");
  std::exception_ptr first;
  try {
    throw Counted();
  } catch (const Counted&) {
    first = std::current_exception();
  }
  check(g_alive == 1, "it outlives its catch");
  {
    std::vector<std::exception_ptr> copies(100, first);
    first = nullptr;
    check(first == nullptr && g_alive == 1, "copies keep it");
    copies.resize(1);
    first = copies[0];
    check(first == copies[0], "a copy points to the same");
  }
  for (int times = 0; times < 3; ++times) {
    bool caught = false;
    try {
      std::rethrow_exception(first);
    } catch (const Counted&) {
      caught = true;
    }
    check(caught && g_alive == 1, "it is thrown again");
  }
  first = nullptr;
  check(g_alive == 0, "it ends with its last pointer");
}

void test_shared() {
  Part part("shared pointers");
  auto one = std::make_shared<Counted>();
  std::vector<std::shared_ptr<Counted>> more(100, one);
  check(one.use_count() == 101 && g_alive == 1, "all are counted");
  more.clear();
  one.reset();
  check(g_alive == 0, "it ends with the last");
}

void test_lengths() {
  Part part("lengths");
  bool refused = false;
  try {
    volatile size_t count = static_cast<size_t>(-1) / 2;
    static_cast<void>(std::allocator<int64_t>().allocate(count));
  } catch (const std::bad_array_new_length&) {
    refused = true;
  }
  check(refused, "more elements than memory has addresses");
}

}  // namespace

int main() {
  test_pointers();
  test_shared();
  test_lengths();
  return finish();
}
