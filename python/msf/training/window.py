"""What the next line of metrics.jsonl averages."""

from __future__ import annotations

import torch
from torch import Tensor

TIMES = 10  # parts of equal length that losses are told for


class Window:
    """A Window sums the losses of steps on the device: the host never waits for it.

    ``sums`` (2, 1 + TIMES) float64 are those of losses that are numbers, and how many they are: of
    steps in the first column, of images by the tenth of their time in the others. ``steps`` is how
    many steps there were, ``untaken`` how many since one was taken, in the whole windows before.
    """

    def __init__(self, device: torch.device) -> None:
        # In float64, so that sums of one process and of several, or on a GPU in another order, are
        # the same to the digits that are written.
        self.sums = torch.zeros(2, 1 + TIMES, dtype=torch.float64, device=device)
        self.steps = self.untaken = 0

    def clear(self) -> None:
        """Begin anew."""
        self.sums, self.steps = torch.zeros_like(self.sums), 0

    def add(self, loss: Tensor, by_time: Tensor) -> None:
        """Add one step's ``loss`` (scalar), and what ``by_time`` returned of its images."""
        self.sums += torch.cat([_numbers(loss[None]), by_time], dim=1)
        self.steps += 1


def by_time(losses: Tensor, times: Tensor) -> Tensor:
    """Return (2, TIMES): the sums of those losses (B,) that are numbers, and how many they are, of
    each tenth of the times (B,)."""
    values = _numbers(losses)
    part = (times * TIMES).long().clamp(max=TIMES - 1)
    return values.new_zeros(2, TIMES).index_add_(1, part, values)


def _numbers(losses: Tensor) -> Tensor:
    """Return (2, B) float64. Row 0: the losses (B,), 0 where one is no number. Row 1: 1 where one
    is a number, else 0."""
    # Sums of larger ones would be infinite in float32, and with them a state refused.
    finite = losses.abs() < 1e30
    return torch.stack([torch.where(finite, losses, 0), finite]).double()
