// Apart from what runs threads, so that code that does not need not be under a sanitizer.
#pragma once

#include <atomic>
#include <cstdint>

namespace msf::emulation {

// FLOPs of the products of matrices since this was last set to zero.
inline std::atomic<int64_t> matrix_flops = 0;

}  // namespace msf::emulation
