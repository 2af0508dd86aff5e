// Runs an AOTInductor package of an int8 model without Python: main PACKAGE LIBRARY ROWS X Y,
// where X and Y are fp32 files of the input [rows, columns] and of what the model gave in Python.
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

namespace {

at::Tensor read(const char* path, int64_t rows) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto count = static_cast<int64_t>(bytes.size() / sizeof(float));
  return at::from_blob(const_cast<char*>(bytes.data()), {rows, count / rows}, at::kFloat).clone();
}

void fail(const char* problem) {
  std::fprintf(stderr, "%s\n", problem);
  std::exit(1);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 6) fail("usage: main PACKAGE LIBRARY ROWS X Y");
  void* const library = dlopen(arguments[2], RTLD_NOW);
  if (library == nullptr) fail(dlerror());
  auto* const add =
      reinterpret_cast<const char* (*)()>(dlsym(library, "sq_cpu_add_torch_operators"));
  if (add == nullptr) fail(dlerror());
  if (const char* const problem = add()) fail(problem);
  if (dlsym(RTLD_DEFAULT, "Py_Initialize") != nullptr) fail("there is a Python in this process");

  const int64_t rows = std::atoll(arguments[3]);
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const at::Tensor y = model.run({read(arguments[4], rows)}).at(0);
  if (!at::equal(y, read(arguments[5], rows))) fail("the result is not that of Python");
  std::puts("bit for bit what Python gave, without Python");
}
