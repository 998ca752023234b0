// Launches recorded instead of started: so the audit learns what a call launches without a GPU.
#pragma once

#include <array>
#include <cstddef>
#include <tuple>
#include <vector>

namespace msf {

// Text in which the compiler names a kernel with its template arguments, grid, block, and dynamic
// bytes of shared memory.
using LaunchRecord =
    std::tuple<const char*, std::array<unsigned, 3>, std::array<unsigned, 3>, size_t>;

// While this is set, launches are added to it and nothing starts.
inline std::vector<LaunchRecord>* recorded_launches = nullptr;

}  // namespace msf
