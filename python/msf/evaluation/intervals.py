"""Intervals by resampling the images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FRACTION = 0.8
PROPORTION = (0.0, 1.0)
DISTANCE = (0.0, math.inf)
ANY = (-math.inf, math.inf)


@dataclass(frozen=True)
class Figure:
    """A Figure is a value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def subsets(n: int, replicates: int, seed: int) -> list[Tensor]:
    """Draw ``replicates`` subsets of range(n), 80 % of it, for ``figure``; n is even.

    Pairs (2j, 2j + 1) are chosen together and stay together. With the two of a pair in one class,
    the even and the odd members of a subset have the same label counts.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.arange(n).view(-1, 2)
    size = round(FRACTION * len(pairs))
    return [
        pairs[torch.randperm(len(pairs), generator=generator)[:size]].flatten()
        for _ in range(replicates)
    ]


def figure(
    statistic: Callable[[Tensor], float],
    n: int,
    chosen: list[Tensor],
    bounds: tuple[float, float] = ANY,
) -> Figure:
    """Return ``statistic`` of range(n) with a 95 % interval, from its values on the subsets
    ``chosen``.

    This is the m-out-of-n bootstrap without replacement (Politis and Romano 1994). With m = 0.8 n
    images the deviations from the mean over the subsets are scaled by sqrt(m / (n - m)) = 2, which
    is exact for a mean. Resampling with replacement would repeat images, which doubles a Frechet
    distance near its floor, biases the unbiased kernel distance, and makes a repeated image its own
    nearest neighbour.

    The interval is centred on the value and leaves in its finite-sample bias, which the floor
    beside it has too. Against repeated experiments on Gaussians (n = 100 to 534, D = 64) its width
    is right where two sets differ, and up to 1.5 times too wide where they do not. It is clipped to
    ``bounds``, the values that the statistic can take: ``PROPORTION`` for precision, recall and
    accuracy, ``DISTANCE`` for Frechet distances and their ratio. The unbiased kernel distance and
    the gap may be negative.
    """
    value = statistic(torch.arange(n))
    replicates = torch.tensor([statistic(subset) for subset in chosen], dtype=torch.float64)
    m = len(chosen[0])
    deviations = (replicates - replicates.mean()) * (m / (n - m)) ** 0.5
    low, high = torch.quantile(deviations, torch.tensor([0.025, 0.975], dtype=torch.float64))
    minimum, maximum = bounds
    low, high = value + min(float(low), 0.0), value + max(float(high), 0.0)
    return Figure(value, max(low, minimum), min(high, maximum))
