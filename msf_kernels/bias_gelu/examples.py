"""Example calls of bias_gelu, with a bias and without, by tanh and by the error function."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..dtypes import compute_dtype
from ..examples import Example, New, Shape
from .op import bias_gelu

# The hidden layers of DiT-S, B, L and XL, and of width 1536, at the 256 tokens of 256 pixels.
AUDITED = tuple((64, 256, 4 * width) for width in (384, 768, 1024, 1152, 1536))
VARIANTS_AUDITED = ((64, 256, 4 * 384), (64, 256, 4 * 1152))


def inputs(new: New, shape: Shape, bias: bool) -> dict[str, Tensor]:
    """Make x (B, N, D) and its bias (D,), in float32 beside 16 bits, as it is under autocast."""
    made = {"x": new(*shape)}
    return made | {"bias": new(shape[2], dtype=compute_dtype(new(1)))} if bias else made


def options(shape: Shape, approximate: str) -> dict[str, Any]:
    return {"approximate": approximate}


EXAMPLES = tuple(
    Example(
        op="bias_gelu",
        function=bias_gelu,
        inputs=partial(inputs, bias=bias),
        shape=(2, 3, 5),
        options=partial(options, approximate=approximate),
        gradients=1 + bias,
        variant=" ".join(filter(None, ("" if bias else "without bias", variant))),
        audited=VARIANTS_AUDITED if variant or not bias else AUDITED,
    )
    for approximate, variant in (("tanh", ""), ("none", "erf"))
    for bias in (True, False)
)
