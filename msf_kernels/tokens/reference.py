"""References of the merge of a multi-patch transformer: coarse tokens upsampled, plus a skip.

Mathematics runs in float32 (float64 for float64), with one rounding at each output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import widen


def merge_tokens(
    base: Tensor,
    skip: Tensor,
    position: Tensor | None,
    condition: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    """Return x = shuffle(base) + skip + position (B, 4hw, D), behind the condition (B, C, D).

    base (B, hw, 4D) lies on a grid of ``height`` by ``width``, row by row; `shuffle` makes of each
    token the 2x2 tokens (row, column, D) that its channels hold.
    """
    x = widen(base).unflatten(2, (2, 2, -1)).unflatten(1, (height, width))
    x = x.transpose(2, 3).flatten(1, 4) + widen(skip)
    if position is not None:
        x = x + widen(position)
    x = x.to(skip.dtype)
    return x if condition is None else torch.cat((condition, x), 1)


def merge_tokens_backward(
    grad: Tensor, position: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of base and position, empty without one, from that of skip."""
    grid = grad.unflatten(1, (height, 2, width, 2)).transpose(2, 3)
    grad_base = grid.clone(memory_format=torch.contiguous_format).flatten(3).flatten(1, 2)
    if position is None:
        return grad_base, grad.new_empty(0)
    return grad_base, widen(grad).sum(0).to(position.dtype)
