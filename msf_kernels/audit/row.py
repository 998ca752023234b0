"""A row of the audit: what a compiled kernel takes of a GPU."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from . import latency_bound
from .in_flight import bytes_in_flight
from .occupancy import Launch, gpu_of

ARCHITECTURES = (80, 90, 120)  # of GPUs that Triton kernels are compiled for


@dataclass(frozen=True)
class Row:
    backend: str  # "cuda", or "triton" and its version
    kernel: str
    configuration: str  # template arguments, or what was called and in which dtype
    architecture: str  # "sm_90"
    registers: int  # a thread
    shared: int  # bytes a block, static and, where a launch is known, dynamic
    spill: int  # bytes a thread stores to and loads from local memory for want of registers
    stack: int  # bytes a thread
    budget: int  # of registers
    fault: str | None = None  # of its instructions, see instructions.py

    # Of the launch among those known that has the fewest threads on a multiprocessor.
    blocks: int | None = None  # that fit a multiprocessor
    threads: int | None = None  # on a multiprocessor, with the blocks that fit and are in the grid
    in_flight: int | None = None  # bytes of their global loads, where the GPU is known to need some

    def launched(self, launches: Collection[Launch], sass: str) -> Row:
        """Return the row of a kernel of this SASS, with what is known from its launches.

        The SASS is read only where the GPU has a limit on bytes in flight (latency_bound.py).
        """
        gpu = gpu_of(self.architecture)
        if not gpu or not launches:
            return self
        threads = {launch: gpu.resident_threads(launch, self.registers) for launch in launches}
        launch = min(launches, key=lambda launch: threads[launch])
        return replace(
            self,
            shared=launch.shared,
            blocks=gpu.blocks_that_fit(launch, self.registers),
            threads=round(threads[launch]),
            in_flight=round(threads[launch] * bytes_in_flight(sass)) if gpu.in_flight else None,
        )

    def problem(self) -> str | None:
        """Return one line on what is wrong with the kernel; None if nothing is."""
        where = f"{self.kernel} ({self.configuration}) on {self.architecture}"
        if self.fault:
            return f"{where}: {self.fault}"
        if self.spill or self.stack:
            return f"{where}: spills {self.spill} bytes, has {self.stack} bytes of stack, want none"
        if self.registers > self.budget:
            return f"{where}: takes {self.registers} registers, want at most {self.budget}"
        if reason := latency_bound.problem(self):
            return f"{where}: {reason}"
        return None
