"""Example calls of merge_tokens, with and without positions."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..dtypes import compute_dtype
from ..examples import Example, New, Shape
from .op import merge_tokens


def inputs(new: New, shape: Shape, position: bool) -> dict[str, Tensor]:
    """Make base and skip for a fine grid of tokens (B, H, W, D), and their positions (H * W, D)."""
    batch, height, width, channels = shape
    tokens = height * width
    made = {
        "base": new(batch, tokens // 4, 4 * channels),
        "skip": new(batch, tokens, channels),
    }
    if position:  # float32 beside 16 bits, as parameters are under autocast
        made["position"] = new(tokens, channels, dtype=compute_dtype(new(1)))
    return made


def options(shape: Shape) -> dict[str, Any]:
    return {"grid": (shape[1] // 2, shape[2] // 2)}


EXAMPLES = tuple(
    Example(
        op="merge_tokens",
        function=merge_tokens,
        inputs=partial(inputs, position=position),
        shape=(2, 4, 6, 5),
        options=options,
        gradients=2 + position,
        variant="" if position else "without positions",
        audited=((64, 16, 16, 768),) if position else (),
    )
    for position in (True, False)
)
