"""The path of rectified flow (arXiv 2209.03003): x_t = (1 - t) noise + t data, from t = 0 to 1.

``msf_kernels.flow_interpolate`` draws the line; here is where on it a model trains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .seeds import drawn_from


def logit_normal_times(
    batch: int,
    std: float = 1.0,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw t (B,) in (0, 1), the sigmoid of a normal of deviation ``std`` (arXiv 2403.03206, 3.1).

    1 puts most work in the middle; 1.8 is nearly uniform, the logistic having a deviation of 1.81.
    """
    normal = torch.randn(batch, device=device, dtype=torch.float32, **drawn_from(generator))
    return (std * normal).sigmoid()


def uniform_times(
    batch: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw t (B,) uniformly in [0, 1), as SiT does (arXiv 2401.08740)."""
    return torch.rand(batch, device=device, dtype=torch.float32, **drawn_from(generator))
