"""The rates that this device reaches in this run, to which percentages refer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from .timing import Call, Work, interleave, replay_of, stopwatch_of

ROUNDS = 50
# A product of 8192 takes an H200 1.4 ms. Of 16 of them, start-up and cold cache are less than 1 %.
PRODUCTS = 16


@dataclass(frozen=True)
class Roofline:
    """A Roofline has the rates of a large copy and of a large bfloat16 matrix product.

    A copy's bytes are those read and written. `how` says how the rates were found.
    """

    copy_gb_s: float
    matmul_tflop_s: float
    how: str

    def memory_us(self, bytes: int) -> float:
        return bytes / self.copy_gb_s / 1e3

    def matmul_us(self, flops: int) -> float:
        return flops / self.matmul_tflop_s / 1e6

    def percent(self, bytes: int, flops: int, us: float) -> float:
        """Return the least time that memory or matrix products need, in percent of the time."""
        return 100 * max(self.memory_us(bytes), self.matmul_us(flops)) / us


def measure_roofline(device: torch.device) -> Roofline:
    """Time a kernel over 1 GiB and products of 8192 x 8192 matrices; small ones on a CPU."""
    size, n = (2**30, 8192) if device.type == "cuda" else (2**24, 256)
    copy_us = _best(_copies(size, device), device)
    matmul_us = _best(_products(n, device), device)
    how = (
        f"torch.neg of {size >> 20} MiB of float32 into another tensor, and {n}^3 bfloat16 "
        f"products, {PRODUCTS} a replay; the best tenth of {ROUNDS} replays"
    )
    return Roofline(2 * size / copy_us / 1e3, 2 * n**3 / matmul_us / 1e6, how)


def _copies(size: int, device: torch.device) -> list[Call]:
    # This is a kernel and not copy_, which in a CUDA graph becomes a memcpy node that another
    # engine runs. One H200 moved 2,766 GB/s by that, and 4,250 GB/s by a pointwise kernel, of which
    # each thread reads and writes 16 bytes at a time. The numbers are random like all our inputs:
    # on zeros the rates can be higher.
    source = torch.randn(size // 4, device=device)
    targets = [torch.empty_like(source) for _ in range(2)]
    return [partial(torch.neg, source, out=target) for target in targets]


def _products(n: int, device: torch.device) -> list[Call]:
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    products = [torch.empty_like(a) for _ in range(2)]
    return [partial(torch.mm, a, b, out=products[i % 2]) for i in range(PRODUCTS)]


def _best(calls: list[Call], device: torch.device) -> float:
    """Return the microseconds of a call in the best tenth of the rounds.

    A ceiling is what the device can do: clocks rise from idle at first, and fall as it gets hot.
    """
    replay = replay_of(Work(calls), device)
    (timing,) = interleave([replay], ROUNDS, stopwatch_of(device))
    return timing.p10_us
