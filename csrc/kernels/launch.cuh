// The shapes of launches: blocks, grids, streams, and where a thread stands in them.
//
// A comment `// registers: 96` above a kernel is its budget: the most registers that one of its
// threads may take. `128 for <*, 1>` is the budget where the template arguments match the pattern;
// the last match counts. msf_kernels/audit/cuda.py reads these lines and fails where a compiled
// kernel takes more.
//
// An SM has 65,536 registers: at 96 a thread 682 threads fit, at 128 512, at 224 292. At least one
// block of 256 threads must fit, so that the loads of one warp are in flight while another waits.
#pragma once

#include "../cuda.hpp"
#include "../types.hpp"

namespace msf {

constexpr int kWarp = 32;           // threads of a warp
constexpr unsigned kThreads = 256;  // threads of a block, where a kernel says nothing else

inline cudaStream_t cuda_stream(Address stream) { return static_cast<cudaStream_t>(stream.value); }

// The number of blocks of kThreads that hold this many threads.
inline unsigned blocks(int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); }

// The second dimension of a grid has at most 65,535 blocks, so the kernel loops over its rows.
inline unsigned grid_rows(int64_t rows) { return unsigned(rows < 65535 ? rows : 65535); }

__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// Says whether all of these addresses are multiples of 16 bytes; absent tensors are at 0.
inline bool is_aligned(std::initializer_list<Address> addresses) {
  for (const Address& address : addresses) {
    if (reinterpret_cast<uintptr_t>(address.value) % 16 != 0) return false;
  }
  return true;
}

}  // namespace msf
