"""Example calls of flow_interpolate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..examples import Example, New, Shape
from .op import flow_interpolate


def inputs(new: New, shape: Shape) -> dict[str, Tensor]:
    """Make data and noise (B, ...) and times t (B,) in [0, 1]."""
    t = new(shape[0], dtype=torch.float32).sigmoid()
    return {"data": new(*shape), "noise": new(*shape), "t": t}


EXAMPLES = (
    Example(
        op="flow_interpolate",
        function=flow_interpolate,
        inputs=inputs,
        shape=(2, 3, 4, 6),
        gradients=2,
        audited=((256, 16, 64, 64),),
    ),
)
