"""A row of the audit: what a compiled kernel takes of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = (80, 90, 120)  # of GPUs that Triton kernels are compiled for


@dataclass(frozen=True)
class Row:
    backend: str  # "cuda", or "triton" and its version
    kernel: str
    configuration: str  # template arguments, or what was called and in which dtype
    architecture: str  # "sm_90"
    registers: int  # a thread
    shared: int  # bytes a block, static and dynamic
    spill: int  # bytes a thread stores to and loads from local memory for want of registers
    stack: int  # bytes a thread
    budget: int  # of registers
    fault: str | None = None  # of its instructions, see instructions.py

    def problem(self) -> str | None:
        """Return one line on what is wrong with the kernel; None if nothing is."""
        where = f"{self.kernel} ({self.configuration}) on {self.architecture}"
        if self.fault:
            return f"{where}: {self.fault}"
        if self.spill or self.stack:
            return f"{where}: spills {self.spill} bytes, has {self.stack} bytes of stack, want none"
        if self.registers > self.budget:
            return f"{where}: takes {self.registers} registers, want at most {self.budget}"
        return None
