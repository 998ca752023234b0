// Apart from what runs threads: bindings.cpp reads it, and is compiled without the sanitizers.
#pragma once

#include <atomic>
#include <cstdint>

namespace msf::emulation {

// FLOPs of the products of matrices since this was last set to zero.
inline std::atomic<int64_t> matrix_flops = 0;

}  // namespace msf::emulation
