"""Intervals by resampling the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FRACTION = 0.8


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def subsets(n: int, replicates: int, seed: int) -> list[Tensor]:
    """``replicates`` random subsets of range(n), each of 80 % of it, for ``figure``."""
    generator = torch.Generator().manual_seed(seed)
    size = round(FRACTION * n)
    return [torch.randperm(n, generator=generator)[:size] for _ in range(replicates)]


def figure(statistic: Callable[[Tensor], float], n: int, chosen: list[Tensor]) -> Figure:
    """``statistic`` of range(n) with a 95 % interval from its values on the subsets ``chosen``.

    The m-out-of-n bootstrap without replacement (Politis and Romano 1994): with m = 0.8 n images, the
    statistic's deviation from its mean over the subsets is scaled by sqrt(m / (n - m)) = 2, which makes
    it exact for a mean. Resampling with replacement would repeat images: that doubles a Frechet
    distance near its floor, biases the unbiased kernel distance upwards, and lets a repeated image
    be its own nearest neighbour. The interval is centred on the value and so leaves in the value's
    finite-sample bias, which the floor beside it has too. Against repeated experiments on Gaussians
    (n = 100 to 534, D = 64) its width is right where the sets differ and up to 1.5 times too wide
    where they come from one distribution.
    """
    value = statistic(torch.arange(n))
    replicates = torch.tensor([statistic(subset) for subset in chosen], dtype=torch.float64)
    m = len(chosen[0])
    deviations = (replicates - replicates.mean()) * (m / (n - m)) ** 0.5
    low, high = torch.quantile(deviations, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Figure(value, value + float(low), value + float(high))
