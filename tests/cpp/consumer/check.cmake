# Installs the library under `work`, then builds and runs the consumer against it alone.
# The static library comes from the tree `build`, the shared one from a tree of its own.
file(REMOVE_RECURSE ${work}/prefix ${work}/consumer)

function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

set(tools -G ${generator} -D CMAKE_MAKE_PROGRAM=${make_program} -D CMAKE_CXX_COMPILER=${compiler})
if(kind STREQUAL "shared")
  set(build ${work}/library)
  # Without optimization, which the package does not depend on and takes most of a build.
  run(${CMAKE_COMMAND} -S ${source} -B ${build} ${tools} -D BUILD_SHARED_LIBS=ON
      -D CMAKE_BUILD_TYPE=None)
  run(${CMAKE_COMMAND} --build ${build})
endif()
run(${CMAKE_COMMAND} --install ${build} --prefix ${work}/prefix)

file(GLOB_RECURSE installed RELATIVE ${work}/prefix ${work}/prefix/*)
foreach(file IN LISTS installed)
  if(NOT file MATCHES "^(include/sq_cpu/[a-z_]+\\.h|lib.*/(libsq_cpu\\.(a|so[0-9.]*)|cmake/sq_cpu/.*\\.cmake))$")
    message(FATAL_ERROR "installed, but no part of the C++ library: ${file}")
  endif()
endforeach()

# The headers are strict C++17 and free of warnings in other people's settings.
run(${CMAKE_COMMAND} -S ${source}/tests/cpp/consumer -B ${work}/consumer ${tools}
    -D CMAKE_PREFIX_PATH=${work}/prefix -D CMAKE_CXX_EXTENSIONS=OFF
    "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wpedantic -Werror")
run(${CMAKE_COMMAND} --build ${work}/consumer)
run(${work}/consumer/consumer)
