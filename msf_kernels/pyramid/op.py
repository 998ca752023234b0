"""pyramid_split and pyramid_merge as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..library import define
from . import reference

MODES = ("nearest", "bilinear")


def pyramid_split(x: Tensor, *, mode: str = "nearest") -> tuple[Tensor, Tensor]:
    """Split images into a base at half the resolution and the residual it leaves.

    base is the 2x2 average of x, residual is x minus the upsampled base. `pyramid_merge` with the
    same mode inverts it.

    Args:
        x: (B, C, H, W) float64, float32, bfloat16 or float16, H and W even.
        mode: how the base is upsampled, "nearest" or "bilinear" (half-pixel centres).

    Returns:
        base (B, C, H/2, W/2) and residual (B, C, H, W) in x's dtype.

    Raises:
        TypeError, ValueError: wrong kind, dtype, shape or mode.
    """
    op = "pyramid_split"
    checks.tensors(op, x=x)
    checks.dimensions(op, "x", x, "(B, C, H, W)")
    checks.choice(op, "mode", mode, MODES)
    height, width = x.shape[-2:]
    if height % 2 or width % 2 or not height or not width:
        raise ValueError(f"{op}: height and width must be even, got {height} x {width}")
    return _pyramid_split(x, mode)


def pyramid_merge(
    base: Tensor,
    residual: Tensor,
    *,
    mode: str = "nearest",
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Merge a base with its residual: upsample(base) + residual * std + mean.

    Args:
        base: (B, C, H/2, W/2) float64, float32, bfloat16 or float16.
        residual: (B, C, H, W) in base's dtype.
        mode: "nearest" or "bilinear" (half-pixel centres).
        mean, std: (C,) of the residual, in its dtype or float32; they get no gradient.

    Returns:
        (B, C, H, W) in base's dtype.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes, devices or mode.
    """
    op = "pyramid_merge"
    statistics = {"mean": mean, "std": std}
    given = {name: tensor for name, tensor in statistics.items() if tensor is not None}
    checks.tensors(op, base=base, residual=residual, **given)
    checks.dtype(op, "residual", residual, base.dtype)
    checks.choice(op, "mode", mode, MODES)
    checks.dimensions(op, "base", base, "(B, C, H/2, W/2)")
    batch, channels, height, width = base.shape
    sizes = (batch, channels, 2 * height, 2 * width)
    checks.shape(op, "residual", residual, "(B, C, H, W)", sizes)
    for name, tensor in given.items():
        checks.shape(op, name, tensor, "(C,)", (channels,))
        checks.dtype(op, name, tensor, residual.dtype, torch.float32)
        checks.constant(op, name, tensor)
    return _pyramid_merge(base, residual, mean, std, mode)


def _split_fake(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, channels, height // 2, width // 2)), x.new_empty(x.shape)


def _split_backward_fake(
    grad_base: Tensor | None, grad_residual: Tensor | None, mode: str
) -> Tensor:
    if grad_residual is not None:
        return grad_residual.new_empty(grad_residual.shape)
    assert grad_base is not None
    batch, channels, height, width = grad_base.shape
    return grad_base.new_empty((batch, channels, 2 * height, 2 * width))


def _split_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, ctx.mode = inputs


def _split_gradient(ctx: Any, grad_base: Tensor | None, grad_residual: Tensor | None) -> Any:
    if grad_base is None and grad_residual is None:
        return None, None
    return _pyramid_split_backward(grad_base, grad_residual, ctx.mode), None


_pyramid_split_backward = define(
    "pyramid_split_backward(Tensor? grad_base, Tensor? grad_residual, str mode) -> Tensor",
    reference=reference.pyramid_split_backward,
    fake=_split_backward_fake,
)

_pyramid_split = define(
    "pyramid_split(Tensor x, str mode) -> (Tensor, Tensor)",
    reference=reference.pyramid_split,
    fake=_split_fake,
    setup_context=_split_setup,
    backward=_split_gradient,
)


def _merge_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, _, std, ctx.mode = inputs
    ctx.save_for_backward(std)


def _merge_gradient(ctx: Any, grad: Tensor | None) -> Any:
    if grad is None:
        return None, None, None, None, None
    return *_pyramid_merge_backward(grad, *ctx.saved_tensors, ctx.mode), None, None, None


_pyramid_merge_backward = define(
    "pyramid_merge_backward(Tensor grad, Tensor? std, str mode) -> (Tensor, Tensor)",
    reference=reference.pyramid_merge_backward,
    fake=lambda grad, std, mode: _split_fake(grad, mode),
)

_pyramid_merge = define(
    "pyramid_merge(Tensor base, Tensor residual, Tensor? mean, Tensor? std, str mode) -> Tensor",
    reference=reference.pyramid_merge,
    fake=lambda base, residual, mean, std, mode: residual.new_empty(residual.shape),
    setup_context=_merge_setup,
    backward=_merge_gradient,
)
