"""References of gelu(x + bias) (Hendrycks & Gimpel, 2016), between the products of an MLP.

Mathematics runs in float32 (float64 for float64), with one rounding at each output. gelu(x) is x
times the share of a distribution that lies below x: the normal one or, with approximate = "tanh",
the one whose share is sigmoid(2 u) = (1 + tanh(u)) / 2, u = sqrt(2 / pi) * (x + 0.044715 x^3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dtypes import widen

# The factors of x and x^3 in 2 u.
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR

# From here on the gradient is 0 or 1 to the last bit. Without this limit infinity would meet 0.
SATURATED = 14.0


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Return gelu(x + bias) (B, N, D) in x's dtype; the bias (D,) may be None."""
    total = _biased(x, bias)
    return (total * _share_below(total, approximate)).to(x.dtype)


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and bias, the latter of no elements without one.

    The derivative of gelu at x is the share below x plus x times the density there. Those at x and
    -x add up to 1, and the negative one has no difference of numbers near 1.
    """
    total = _biased(x, bias)
    size = total.abs().clamp(max=SATURATED)
    share = _share_below(-size, approximate)
    if approximate == "tanh":
        density = share * (1 - share) * (LINEAR + 3 * CUBIC * size * size)
    else:
        density = torch.exp(size * size / -2) / math.sqrt(2 * math.pi)
    negative = share - size * density
    grad = widen(grad) * torch.where(total < 0, negative, 1 - negative)
    if bias is None:
        return grad.to(x.dtype), grad.new_empty(0)
    return grad.to(x.dtype), grad.sum((0, 1)).to(bias.dtype)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return x + bias in the compute dtype."""
    return widen(x) if bias is None else widen(x) + widen(bias)


def _share_below(x: Tensor, approximate: str) -> Tensor:
    """Return the share of the distribution below x, to a relative precision also near 0."""
    if approximate == "tanh":
        return torch.sigmoid(x * (LINEAR + CUBIC * x * x))
    return torch.erfc(x * -math.sqrt(0.5)) / 2
