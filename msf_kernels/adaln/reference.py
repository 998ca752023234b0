"""Adaptive layer normalisation and the gated residual of adaLN-Zero (Peebles & Xie, 2022).

Mathematics runs in float32 (float64 for float64), with one rounding at each output. Gradients reuse
temporaries in place, which halves their time on a CPU; forwards do not, because forward mode
differentiates them. B, N, D are batch, tokens, channels; shift, scale and gate are (B, D), or
(1, D) for all samples alike. `eager` rounds after every operation instead, as PyTorch does if it
runs them one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import widen


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, rounding: str, norm: str
) -> tuple[Tensor, Tensor]:
    """Return y = (1 + scale) * (x - mean) * rstd + shift, and the statistics (mean, rstd).

    y is (B, N, D) in x's dtype; the statistics are (2, B, N) in the compute dtype. The mean of RMS
    norm is 0, so that rstd is the reciprocal root of the mean square.
    """
    wide = widen(x)
    mean = wide.mean(-1, keepdim=True)
    if norm == "rms":
        mean = torch.zeros_like(mean)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normalised = centred * rstd
    if rounding == "eager":
        y = normalised.to(x.dtype) * (1 + scale[:, None]) + shift[:, None]
    else:
        y = torch.addcmul(_rows(shift), normalised, 1 + _rows(scale)).to(x.dtype)
    return y, torch.stack((mean, rstd)).squeeze(-1)


def adaln_modulate_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, statistics: Tensor, norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, shift and scale; `grad` is that of y (B, N, D)."""
    grad = widen(grad)
    mean, rstd = statistics[..., None].unbind()
    normalised = (widen(x) - mean).mul_(rstd)
    product = grad * normalised
    grad_shift, grad_scale = _sum_rows(grad, shift), _sum_rows(product, scale)
    factor = 1 + _rows(scale)
    along = product.mul_(factor).mean(-1, keepdim=True)
    grad_x = grad * factor
    if norm == "layer":
        grad_x.sub_(grad_x.mean(-1, keepdim=True))
    grad_x.addcmul_(normalised, along, value=-1)
    return grad_x.mul_(rstd).to(x.dtype), grad_shift, grad_scale


def gate_residual(
    x: Tensor, y: Tensor, y_bias: Tensor | None, gate: Tensor, rounding: str
) -> Tensor:
    """Return x + gate * (y + y_bias), (B, N, D) in x's dtype; y_bias is (D,) or absent."""
    if rounding == "eager":
        return x + gate[:, None] * (y if y_bias is None else y + y_bias)
    return torch.addcmul(widen(x), _rows(gate), _biased(y, y_bias)).to(x.dtype)


def gate_residual_backward(
    grad: Tensor, y: Tensor, y_bias: Tensor | None, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of y, y_bias (empty where there is none) and gate. That of x is grad."""
    grad = widen(grad)
    grad_y = grad * _rows(gate)
    grad_bias = grad.new_empty(0) if y_bias is None else grad_y.sum((0, 1)).to(y_bias.dtype)
    grad_gate = _sum_rows(grad * _biased(y, y_bias), gate)
    return grad_y.to(y.dtype), grad_bias, grad_gate


def gate_residual_adaln(
    x: Tensor,
    y: Tensor,
    y_bias: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    rounding: str,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_out = gate_residual(x, y, y_bias, gate), then adaln_modulate(x_out, shift, scale).

    The latter are h and its statistics. The normalisation sees x_out as rounded to x's dtype, which
    makes the fused operator equal to the two above and lets backward start from the stored x_out.
    """
    x_out = gate_residual(x, y, y_bias, gate, rounding)
    return x_out, *adaln_modulate(x_out, shift, scale, eps, rounding, norm)


def gate_residual_adaln_backward(
    grad_h: Tensor,
    grad_x_out: Tensor | None,
    x_out: Tensor,
    y: Tensor,
    y_bias: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    statistics: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, y_bias, gate, shift and scale.

    They come from those of h and perhaps x_out.
    """
    grad, grad_shift, grad_scale = adaln_modulate_backward(
        widen(grad_h), widen(x_out), shift, scale, statistics, norm
    )
    if grad_x_out is not None:
        grad = grad + grad_x_out
    grad_y, grad_bias, grad_gate = gate_residual_backward(grad, y, y_bias, gate)
    return grad.to(x_out.dtype), grad_y, grad_bias, grad_gate, grad_shift, grad_scale


def _biased(y: Tensor, y_bias: Tensor | None) -> Tensor:
    """Return y and its bias, added up in the compute dtype."""
    return widen(y) if y_bias is None else widen(y) + widen(y_bias)


def _rows(modulation: Tensor) -> Tensor:
    """Return a modulation (B, D) as (B, 1, D) in the compute dtype."""
    return widen(modulation)[:, None]


def _sum_rows(grad: Tensor, modulation: Tensor) -> Tensor:
    """Sum (B, N, D) to the shape and dtype of the modulation, (B, D) or (1, D)."""
    total = grad.sum(1)
    if modulation.shape[0] != total.shape[0]:
        total = total.sum(0, keepdim=True)
    return total.to(modulation.dtype)
