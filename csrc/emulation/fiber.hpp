// A fiber: a stack of its own, and the switch from one stack to another, which takes a few ns
// (swapcontext would make a system call each time).
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "sanitizers.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers and the stack pointer, then loads those of the other stack.
extern "C" void msf_switch_stack(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
  .text
  .weak msf_switch_stack
  .hidden msf_switch_stack
  .type msf_switch_stack, @function
msf_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size msf_switch_stack, . - msf_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
  .text
  .weak msf_switch_stack
  .hidden msf_switch_stack
  .type msf_switch_stack, %function
msf_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size msf_switch_stack, . - msf_switch_stack
)");
#else
#error "csrc/emulation: runs on x86-64 and aarch64 hosts only"
#endif

namespace msf::emulation {

class Fiber {
 public:
  // The stack that the caller is on.
  Fiber() {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // A new stack, on which the first switch calls `main`; it must never return.
  explicit Fiber(void (*main)()) : main_(main), stack_bytes_(kStack) {
    void* mapped = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapped, kGuard, PROT_NONE);  // so that a stack that overflows ends the process
    stack_ = static_cast<char*>(mapped) + kGuard;
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
    lay_out_first_frame();
  }

  ~Fiber() {
    if (!main_) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(tsan_);
#endif
    munmap(static_cast<char*>(const_cast<void*>(stack_)) - kGuard, kGuard + kStack);
  }

  Fiber(const Fiber&) = delete;

  // Leaves this fiber, on which the caller is; returns when another one switches back to it. The
  // caller is Quiet, but not while it is away: TSan objects to a fiber destroyed in that state.
  __attribute__((noinline, no_sanitize_thread)) void switch_to(Fiber& to) {
    leaving = this;
    entering = &to;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&asan_stack_, to.stack_, to.stack_bytes_);
#endif
#if defined(__SANITIZE_THREAD__)
    Quiet::end();
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
    msf_switch_stack(&stack_pointer_, to.stack_pointer_);
    Quiet::begin();
    arrive();
  }

 private:
  static constexpr size_t kStack = 256 << 10;  // reserved; only touched pages take memory
  static constexpr size_t kGuard = 4 << 10;

  inline static thread_local Fiber* leaving = nullptr;
  inline static thread_local Fiber* entering = nullptr;

  static void arrive() {
#if defined(__SANITIZE_ADDRESS__)
    // Also how ASan tells us the bounds of the launcher's stack.
    __sanitizer_finish_switch_fiber(entering->asan_stack_, &leaving->stack_,
                                    &leaving->stack_bytes_);
#endif
  }

  static void begin() {
    arrive();
    entering->main_();
    __builtin_trap();
  }

  // What msf_switch_stack pops: zeros for the registers, and `begin` to return to.
  void lay_out_first_frame() {
    auto** top = reinterpret_cast<void**>(static_cast<char*>(const_cast<void*>(stack_)) + kStack);
#if defined(__x86_64__)
    constexpr int registers = 6, return_slot = 6, frame = 8;  // 8: keeps the stack 16-byte aligned
#else
    constexpr int registers = 20, return_slot = 11, frame = 20;
#endif
    void** bottom = top - frame;
    for (int i = 0; i < registers; ++i) bottom[i] = nullptr;
    bottom[return_slot] = reinterpret_cast<void*>(&Fiber::begin);
    stack_pointer_ = bottom;
  }

  void (*main_)() = nullptr;
  void* stack_pointer_ = nullptr;
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* asan_stack_ = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan_ = nullptr;
#endif
};

}  // namespace msf::emulation
