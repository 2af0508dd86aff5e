// The library as operators of torch, sq_cpu::linear and the others that torch_ops.cc lists, for
// graphs that torch traced: they run in Python, and in a C++ program that has no Python. The latter
// loads torch and this library, and calls the function below once:
//
//   void* library = dlopen("libsq_cpu_torch.so", RTLD_NOW);
//   auto* add = reinterpret_cast<const char* (*)()>(dlsym(library, "sq_cpu_add_torch_operators"));
//   if (const char* problem = add()) ...
#pragma once

// Returns null once the process has the operators, or one line that says why it cannot. Not done
// when the library is loaded: torch, to which nothing links it, may not be ready then.
extern "C" __attribute__((visibility("default"))) const char* sq_cpu_add_torch_operators();
