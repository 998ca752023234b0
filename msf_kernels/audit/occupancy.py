"""How many blocks of a launch are on a multiprocessor at the same time."""

from __future__ import annotations

from dataclasses import dataclass

RESERVED_SHARED = 1 << 10  # bytes of each block that the system takes, since sm_80
WARP = 32


@dataclass(frozen=True)
class Launch:
    grid: int  # blocks
    threads: int  # of a block
    shared: int  # bytes a block, static and dynamic


@dataclass(frozen=True)
class GPU:
    """A GPU has what CUDA's programming guide says of its compute capability."""

    multiprocessors: int
    shared: int  # bytes of a multiprocessor
    warps: int = 64  # the most on a multiprocessor
    blocks: int = 32  # the most on a multiprocessor
    in_flight: int = 0  # bytes of loads that a multiprocessor needs, see latency_bound.py

    def blocks_that_fit(self, launch: Launch, registers: int) -> int:
        """Return how many blocks of threads of so many registers a multiprocessor has room for.

        A warp's registers are allocated in units of 256, in one of the four partitions with 16,384
        each; the shared memory of a block in units of 128 bytes.
        """
        warps = -(-launch.threads // WARP)
        partition = 16384 // _round_up(registers * WARP, 256)
        shared = _round_up(launch.shared + RESERVED_SHARED, 128)
        fits = self.warps // warps, 4 * partition // warps, self.shared // shared
        return min(self.blocks, *fits)

    def resident_threads(self, launch: Launch, registers: int) -> float:
        """Return how many threads of the launch a multiprocessor has at the same time.

        It is the mean of all multiprocessors, some of which have a block less where the grid is
        smaller than what fits.
        """
        blocks = min(self.blocks_that_fit(launch, registers), launch.grid / self.multiprocessors)
        return blocks * launch.threads


# An A100, H200, B200 and RTX 5090.
GPUS = {
    "sm_80": GPU(multiprocessors=108, shared=164 << 10),
    "sm_90": GPU(multiprocessors=132, shared=228 << 10, in_flight=24 << 10),
    "sm_100": GPU(multiprocessors=148, shared=228 << 10),
    "sm_120": GPU(multiprocessors=170, shared=100 << 10, warps=48, blocks=24),
}


def gpu_of(architecture: str) -> GPU | None:
    """Return the GPU of an architecture such as sm_90 or sm_90a, None if it is not known here."""
    return GPUS.get(architecture.rstrip("af"))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
