"""References of one level of the image pyramid: pooled base, upsampling and what is left (NCHW).

Mathematics runs in float32 (float64 for float64), with one rounding at each output. `pool` is the
2x2 average; `upsample` doubles both sides. Nearest upsampling after pooling is an orthogonal
projection, so the residual of a nearest split pools to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import widen


def pyramid_split(
    x: Tensor, mean: Tensor | None, std: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    """Return base = pool(x) and residual = (x - upsample(base) - mean) / std.

    The residual belongs to the base as rounded to x's dtype, so that merging gives x back. base
    is (B, C, H/2, W/2), residual (B, C, H, W), mean and std are (C,).
    """
    base = _pool(widen(x)).to(x.dtype)
    residual = widen(x) - _upsample(widen(base), mode)
    if mean is not None:
        residual = residual - _channels(mean)
    if std is not None:
        residual = residual / _channels(std)
    return base, residual.to(x.dtype)


def pyramid_split_backward(
    grad_base: Tensor | None, grad_residual: Tensor | None, std: Tensor | None, mode: str
) -> Tensor:
    """Return the gradient of x; one of those of base and residual may be None."""
    if grad_residual is None:
        assert grad_base is not None
        return (_upsample(widen(grad_base), "nearest") / 4).to(grad_base.dtype)
    wide = widen(grad_residual)
    if std is not None:
        wide = wide / _channels(std)
    pooled = -_upsample_adjoint(wide, mode)
    if grad_base is not None:
        pooled = pooled + grad_base
    return (wide + _upsample(pooled, "nearest") / 4).to(grad_residual.dtype)


def pyramid_merge(
    base: Tensor,
    residual: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    mode: str,
    low: float,
    high: float,
) -> Tensor:
    """Return x = upsample(base) + residual * std + mean (B, C, H, W), clamped to [low, high].

    mean and std are (C,).
    """
    detail = widen(residual)
    if std is not None:
        detail = detail * _channels(std)
    if mean is not None:
        detail = detail + _channels(mean)
    return (_upsample(widen(base), mode) + detail).clamp(low, high).to(residual.dtype)


def pyramid_merge_backward(grad: Tensor, std: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of base and residual."""
    wide = widen(grad)
    grad_residual = wide.clone() if std is None else wide * _channels(std)
    return _upsample_adjoint(wide, mode).to(grad.dtype), grad_residual.to(grad.dtype)


def _channels(statistic: Tensor) -> Tensor:
    return widen(statistic)[:, None, None]


def _pool(x: Tensor) -> Tensor:
    rows = x[..., 0::2, :] + x[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) / 4


def _upsample(x: Tensor, mode: str) -> Tensor:
    if mode == "nearest":
        return x.repeat_interleave(2, -2).repeat_interleave(2, -1)
    return _linear(_linear(x.mT).mT)


def _upsample_adjoint(grad: Tensor, mode: str) -> Tensor:
    if mode == "nearest":
        return _pool(grad) * 4
    return _linear_adjoint(_linear_adjoint(grad.mT).mT)


def _linear(x: Tensor) -> Tensor:
    """Double the last side, half-pixel centres: 3/4 of the nearest and 1/4 of the next sample.

    Outside the image the edge sample repeats (align_corners=False).
    """
    left = torch.cat((x[..., :1], x[..., :-1]), -1)
    right = torch.cat((x[..., 1:], x[..., -1:]), -1)
    pairs = torch.stack((0.75 * x + 0.25 * left, 0.75 * x + 0.25 * right), -1)
    return pairs.flatten(-2)


def _linear_adjoint(grad: Tensor) -> Tensor:
    even, odd = grad[..., 0::2], grad[..., 1::2]
    after = torch.cat((even[..., 1:], odd[..., -1:]), -1)
    before = torch.cat((even[..., :1], odd[..., :-1]), -1)
    return 0.75 * (even + odd) + 0.25 * (after + before)
