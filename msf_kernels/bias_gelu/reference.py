"""References of gelu(x + bias) (Hendrycks & Gimpel, 2016), between the products of an MLP.

Mathematics runs in float32 (float64 for float64), with one rounding at each output. gelu(x) is x
times the share of the normal distribution that lies below x or, with approximate = "tanh", that of
the distribution (1 + tanh(u)) / 2 where u = sqrt(2 / pi) * (x + 0.044715 x^3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import widen


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Return gelu(x + bias) (B, N, D) in x's dtype; the bias (D,) may be None."""
    return F.gelu(_biased(x, bias), approximate=approximate).to(x.dtype)


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and bias, the latter of no elements without one."""
    total = _biased(x, bias)
    grad = torch.ops.aten.gelu_backward(widen(grad), total, approximate=approximate)
    if bias is None:
        return grad.to(x.dtype), grad.new_empty(0)
    return grad.to(x.dtype), grad.sum((0, 1)).to(bias.dtype)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return x + bias in the compute dtype."""
    return widen(x) if bias is None else widen(x) + widen(bias)
