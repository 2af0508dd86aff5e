// For the wheel's binaries: what a newer compiler and its headers ask of the system and
// manylinux_2_28 (glibc 2.28, the libstdc++ of GCC 8) does not have, so that what was built on any
// machine loads there. tests/test_wheel.py fails when a compiler asks for more. The gcc-toolset of
// a manylinux container links such things into the binary itself; ours are then taken instead.
//
// Every name is hidden: others in the process keep their own.
#include <cxxabi.h>

#include <exception>
#include <new>

#ifdef __GLIBCXX__

#define SQ_CPU_HIDDEN extern "C" __attribute__((visibility("hidden")))

// glibc 2.32. std::shared_ptr counts without atomic instructions while it is true.
SQ_CPU_HIDDEN char single_threaded __asm__("__libc_single_threaded");
char single_threaded = 0;

// GLIBCXX_3.4.29.
SQ_CPU_HIDDEN [[noreturn]] void refuse_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void refuse_length() { throw std::bad_array_new_length(); }

// CXXABI_1.3.13: the two halves of a std::exception_ptr's copy and end, which older headers left to
// functions of the library. All libraries have those, under the version named here, by which they
// are not taken for the inline functions of newer headers, which call us.
__asm__(".symver copy_exception, _ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
__asm__(".symver end_exception, _ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");
extern "C" void copy_exception(void** to, void* const* from);
extern "C" void end_exception(void** pointer);

SQ_CPU_HIDDEN void add_reference(void** pointer) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void add_reference(void** pointer) {
  void* counted;  // left as it is: its count is the pointer's now
  copy_exception(&counted, pointer);
}

SQ_CPU_HIDDEN void release(void** pointer) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void release(void** pointer) {
  end_exception(pointer);
  *pointer = nullptr;
}

// CXXABI_1.3.15: an exception came to the end of a noexcept function.
SQ_CPU_HIDDEN [[noreturn]] void end_noexcept(void* exception) noexcept
    __asm__("__cxa_call_terminate");
void end_noexcept(void* exception) noexcept {
  abi::__cxa_begin_catch(exception);
  std::terminate();
}

#endif
