"""What this device reaches in this run: the rates that percentages are of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from .timing import Call, Work, interleave, replay_of, stopwatch_of

ROUNDS = 50  # the clocks of an idle GPU take a while to rise; the median is past it


@dataclass(frozen=True)
class Roofline:
    """Rates of a large copy, bytes read and written, and of a large bfloat16 matrix product."""

    copy_gb_s: float
    matmul_tflop_s: float

    def memory_us(self, bytes: int) -> float:
        return bytes / self.copy_gb_s / 1e3

    def matmul_us(self, flops: int) -> float:
        return flops / self.matmul_tflop_s / 1e6

    def percent(self, bytes: int, flops: int, us: float) -> float:
        """The time that memory or matrix products need at least, of the time taken."""
        return 100 * max(self.memory_us(bytes), self.matmul_us(flops)) / us


def measure_roofline(device: torch.device) -> Roofline:
    """A copy of 1 GiB and a product of 8192 x 8192 matrices; small ones on a CPU."""
    size, n = (2**30, 8192) if device.type == "cuda" else (2**24, 256)
    copy_us = _time(_copies(size, device), device)
    matmul_us = _time(_products(n, device), device)
    return Roofline(2 * size / copy_us / 1e3, 2 * n**3 / matmul_us / 1e6)


def _copies(size: int, device: torch.device) -> list[Call]:
    # Random like all our inputs: on zeros the rates can be higher.
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    targets = [torch.empty_like(source) for _ in range(2)]
    return [partial(target.copy_, source) for target in targets]


def _products(n: int, device: torch.device) -> list[Call]:
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    products = [torch.empty_like(a) for _ in range(2)]
    return [partial(torch.mm, a, b, out=product) for product in products]


def _time(calls: list[Call], device: torch.device) -> float:
    replay = replay_of(Work(calls), device)
    (timing,) = interleave([replay], ROUNDS, stopwatch_of(device))
    return timing.median_us
