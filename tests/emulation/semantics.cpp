// The kernels of builtins.cuh and mistakes.cuh as functions of Python:
// kernel(grid, block, shared_bytes, *addresses).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "builtins.cuh"
#include "mistakes.cuh"

namespace py = pybind11;

using Shape = std::array<unsigned, 3>;

template <class>
using Address = uintptr_t;

template <class... Pointees>
void define(py::module_& module, const char* name, void (*kernel)(Pointees*...)) {
  module.def(
      name, [kernel](Shape grid, Shape block, size_t shared_bytes, Address<Pointees>... addresses) {
        msf::start(kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                   shared_bytes, nullptr, reinterpret_cast<Pointees*>(addresses)...);
      });
}

#define DEFINE(space, kernel) define(module, #kernel, &space::kernel)

PYBIND11_MODULE(semantics, module) {
  DEFINE(builtins, indices);
  DEFINE(builtins, shuffles);
  DEFINE(builtins, any_of_warp);
  DEFINE(builtins, warp_sums);
  DEFINE(builtins, reverse);
  DEFINE(builtins, rotate_warp);
  DEFINE(builtins, unwritten_shared);
  DEFINE(builtins, turns);
  define(module, "arithmetic_float", &builtins::arithmetic<float>);
  define(module, "arithmetic_double", &builtins::arithmetic<double>);
  DEFINE(builtins, vectors);
  define(module, "load_matrices", &builtins::load_matrices<false>);
  define(module, "load_matrices_transposed", &builtins::load_matrices<true>);
  define(module, "multiply_half_8", &builtins::multiply_matrices<__half, 8>);
  define(module, "multiply_half_16", &builtins::multiply_matrices<__half, 16>);
  define(module, "multiply_bfloat16_8", &builtins::multiply_matrices<__nv_bfloat16, 8>);
  define(module, "multiply_bfloat16_16", &builtins::multiply_matrices<__nv_bfloat16, 16>);
  DEFINE(builtins, copies);
  define(module, "widen_half", &builtins::widen<__half>);
  define(module, "widen_bfloat16", &builtins::widen<__nv_bfloat16>);
  define(module, "narrow_half", &builtins::narrow<__half>);
  define(module, "narrow_bfloat16", &builtins::narrow<__nv_bfloat16>);

  DEFINE(mistakes, barrier_that_some_skip);
  DEFINE(mistakes, deadlock_at_two_places);
  DEFINE(mistakes, two_barriers_that_meet);
  DEFINE(mistakes, two_collectives_that_meet);
  DEFINE(mistakes, caller_outside_mask);
  DEFINE(mistakes, lanes_that_do_not_exist);
  DEFINE(mistakes, lane_that_has_returned);
  DEFINE(mistakes, lane_that_returns_later);
  DEFINE(mistakes, overlapping_masks);
  DEFINE(mistakes, read_outside_mask);
  DEFINE(mistakes, copies_that_nobody_waits_for);
  DEFINE(mistakes, copy_to_a_misaligned_address);
  DEFINE(mistakes, misaligned_row);
  DEFINE(mistakes, too_much_shared_memory);
  DEFINE(mistakes, barrier_inside);
  DEFINE(mistakes, nothing);
}
