"""The guard against steps that would spoil the weights."""

from __future__ import annotations

import torch
from torch import Tensor

HORIZON = 100  # steps over which the norm is averaged, and before which nothing counts as a spike


class Guard:
    """A Guard judges the gradient norm of each step, on the device: the host never waits for it.

    A step whose norm is not finite, or more than ``spike`` times its average (0: any), is not
    taken. ``state`` is (average norm, steps in it, steps not taken since ``count_anew``).
    """

    def __init__(self, spike: float, device: torch.device) -> None:
        self.spike = spike
        self.state = torch.zeros(3, device=device)

    def judge(self, norm: Tensor) -> Tensor:
        """Return 1.0 where the step must not be taken, 0.0 elsewhere: AdamW's ``found_inf``."""
        average, count, skipped = self.state
        bad = ~norm.isfinite()
        if self.spike:
            bad |= (count >= HORIZON) & (norm > self.spike * average)
        weight = 1 / (count + 1).clamp(max=HORIZON)
        taken = torch.stack([torch.lerp(average, norm, weight), count + 1, skipped])
        self.state = torch.where(bad, torch.stack([average, count, skipped + 1]), taken)
        return bad.float()

    def skipped(self) -> int:
        """Return how many steps were not taken since ``count_anew``."""
        return int(self.state[2])

    def count_anew(self) -> None:
        self.state[2] = 0

    def average_norm(self) -> float:
        """Return the average over about 100 steps."""
        return float(self.state[0])

    def forget(self) -> None:
        """Begin anew to learn which norms are usual."""
        self.state = torch.zeros_like(self.state)
