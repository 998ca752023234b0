"""Example calls of merge_tokens, with and without positions and condition tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..dtypes import compute_dtype
from ..examples import Example, New, Shape
from .op import merge_tokens

CONDITION = 16  # as many tokens of the class MPDiT has


def inputs(new: New, shape: Shape, position: bool, condition: bool) -> dict[str, Tensor]:
    """Make base and skip for a fine grid of tokens (B, H, W, D), their positions (H * W, D), and
    the condition (B, CONDITION, D)."""
    batch, height, width, channels = shape
    tokens = height * width
    made = {
        "base": new(batch, tokens // 4, 4 * channels),
        "skip": new(batch, tokens, channels),
    }
    if position:  # float32 beside 16 bits, as parameters are under autocast
        made["position"] = new(tokens, channels, dtype=compute_dtype(new(1)))
    if condition:
        made["condition"] = new(batch, CONDITION, channels)
    return made


def options(shape: Shape) -> dict[str, Any]:
    return {"grid": (shape[1] // 2, shape[2] // 2)}


EXAMPLES = tuple(
    Example(
        op="merge_tokens",
        function=merge_tokens,
        inputs=partial(inputs, position=position, condition=condition),
        shape=(2, 4, 6, 5),
        options=options,
        gradients=2 + position + condition,
        variant=variant,
        audited=((64, 16, 16, 768),) if position else (),
    )
    for variant, position, condition in (
        ("", True, False),
        ("without positions", False, False),
        ("with a condition", True, True),
    )
)
