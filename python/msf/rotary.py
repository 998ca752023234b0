"""The order of a head's channels under RoPE (arXiv 2104.09864).

Our attention turns the pairs (i, i + d / 2) of a head of d channels; LightningDiT, for one, turns
(2i, 2i + 1). The product of q and k does not depend on the order, if both have the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def in_halves(x: Tensor, head_dim: int) -> Tensor:
    """Put rows 0, 2, 4... of each head before its rows 1, 3, 5..."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def qk_in_halves(x: Tensor, head_dim: int) -> Tensor:
    """Put rows of a weight or bias [q | k | v] in the order of ``in_halves`` where they make q or
    k."""
    width = x.shape[0] // 3
    qk, v = x.split((2 * width, width))
    return torch.cat((in_halves(qk, head_dim), v))
