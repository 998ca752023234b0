// What the emulation tells ThreadSanitizer: which CUDA threads run concurrently, and what orders
// them. Needs g++, as clang does not define __SANITIZE_THREAD__.
#pragma once

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace msf::emulation {

#if defined(__SANITIZE_THREAD__)
constexpr bool kTsan = true;
#else
constexpr bool kTsan = false;
#endif

// A happens-before edge from every release to every later acquire. Edges are drawn only where CUDA
// gives them (__syncthreads, __syncwarp, start and end of a kernel); a shuffle, by the CUDA guide,
// orders no memory. A clock must live on the heap, in an object of its block or launch: TSan
// forgets it when that memory is freed, whereas one on the launcher's stack or in a static would
// carry its edges over to the next block.
class Clock {
 public:
#if defined(__SANITIZE_THREAD__)
  void release() { __tsan_release(this); }
  void acquire() { __tsan_acquire(this); }
#else
  void release() {}
  void acquire() {}
#endif

 private:
  char address_ = 0;
};

// In its scope memory accesses are the emulation's own bookkeeping, not the program under test.
class Quiet {
 public:
  Quiet() { begin(); }
  ~Quiet() { end(); }
  Quiet(const Quiet&) = delete;

  static void begin() {
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  static void end() {
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
};

}  // namespace msf::emulation
