// Runs CUDA kernels on the host: the same sources, compiled by g++ instead of nvcc.
//
// Each CUDA thread is a fiber, or a pass of a loop if it never waits; blocks run one after another.
// An error of the kernel (a deadlock, threads in different barriers, a lane missing from a warp
// collective) ends the launch with a std::runtime_error that says which thread and where. ASan sees
// accesses out of bounds of shared and global memory, UBSan misaligned vector accesses, and TSan,
// to which every CUDA thread is a thread, missing barriers and races between blocks.
//
// What it cannot show: anything that depends on lanes of a warp running in step, weak memory order
// beyond data races, the last bits of rsqrtf, expf and their like (the host's are more exact), and
// the contraction of a * b + c to a fused multiply-add, which nvcc does by default. A thread that
// spins until another one writes spins forever.
//
// Cost a thread (g++ 12 -O1, x86-64): 20 ns if it never waits, and 70 ns a barrier or warp
// collective; with ASan and UBSan 150 ns and 350 ns. With TSan 4 us and 5 us, after 1 ms and 0.8 MB
// for each thread of the largest block, twice: so use blocks of at most 256 threads there.
#pragma once

#include "async_copy.hpp"
#include "half.hpp"
#include "intrinsics.hpp"
#include "language.hpp"
#include "launch.hpp"
#include "matrices.hpp"
#include "shared_memory.hpp"
