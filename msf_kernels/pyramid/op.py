"""pyramid_split and pyramid_merge as operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from ..layout import empty
from ..library import define
from . import reference


def pyramid_split(
    x: Tensor,
    *,
    mode: str = "nearest",
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Split images into a base at half the resolution and the residual it leaves.

    base is the 2x2 average of x, residual is (x - upsample(base) - mean) / std. `pyramid_merge`
    with the same mode and statistics inverts it.

    Args:
        x: (B, C, H, W) float64, float32, bfloat16 or float16, H and W even.
        mode: how the base is upsampled, "nearest" or "bilinear" (half-pixel centres).
        mean, std: (C,) of the residual, in x's dtype or float32; they get no gradient.

    Returns:
        base (B, C, H/2, W/2) and residual (B, C, H, W) in x's dtype and memory format.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes, devices or mode.
    """
    return _pyramid_split(x, mean, std, mode)


def pyramid_merge(
    base: Tensor,
    residual: Tensor,
    *,
    mode: str = "nearest",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """Merge a base with its residual: upsample(base) + residual * std + mean.

    Args:
        base: (B, C, H/2, W/2) float64, float32, bfloat16 or float16.
        residual: (B, C, H, W) in base's dtype.
        mode: "nearest" or "bilinear" (half-pixel centres).
        mean, std: (C,) of the residual, in its dtype or float32; they get no gradient.
        clamp: (low, high) to clamp the result to; for sampling, it has no gradient.

    Returns:
        (B, C, H, W) in base's dtype and memory format.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes, devices, mode or bounds.
    """
    bounds = checks.bounds("pyramid_merge", clamp)
    return _pyramid_merge(base, residual, mean, std, mode, *bounds)


def _check_split(op: str, x: Tensor, mean: Tensor | None, std: Tensor | None, mode: str) -> None:
    checks.tensors(op, x=x)
    checks.dimensions(op, "x", x, "(B, C, H, W)")
    checks.choice(op, "mode", mode, checks.MODES)
    height, width = x.shape[-2:]
    if height % 2 or width % 2 or not height or not width:
        raise ValueError(
            f"{op}: height and width must be even and positive, got {height} x {width}"
        )
    checks.statistics(op, x, mean, std)


def _check_merge(
    op: str,
    base: Tensor,
    residual: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    mode: str,
    low: float,
    high: float,
) -> None:
    checks.tensors(op, base=base, residual=residual)
    checks.merge(op, base, "residual", residual, mode, mean, std)
    if (low, high) != checks.UNBOUNDED:
        for name, tensor in {"base": base, "residual": residual}.items():
            checks.constant(f"{op} with clamp", name, tensor)


def _half(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return empty(x, batch, channels, height // 2, width // 2)


def _split_backward_fake(grad_base: Tensor | None, grad_residual: Tensor | None) -> Tensor:
    if grad_base is None:
        assert grad_residual is not None
        return empty(grad_residual)
    batch, channels, height, width = grad_base.shape
    return empty(grad_base, batch, channels, 2 * height, 2 * width)


def _split_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, std, ctx.mode = inputs
    ctx.save_for_backward(std)


def _split_gradient(
    ctx: Any, grad_base: Tensor | None, grad_residual: Tensor | None
) -> dict[str, Tensor]:
    return {"x": _pyramid_split_backward(grad_base, grad_residual, *ctx.saved_tensors, ctx.mode)}


_pyramid_split_backward = define(
    "pyramid_split_backward(Tensor? grad_base, Tensor? grad_residual, Tensor? std, str mode) "
    "-> Tensor",
    reference=reference.pyramid_split_backward,
    kernels=("cuda", "triton"),
    fake=_split_backward_fake,
)

_pyramid_split = define(
    "pyramid_split(Tensor x, Tensor? mean, Tensor? std, str mode) -> (Tensor, Tensor)",
    reference=reference.pyramid_split,
    kernels=("cuda", "triton"),
    fake=lambda x: (_half(x), empty(x)),
    setup_context=_split_setup,
    backward=_split_gradient,
    check=_check_split,
)


def _merge_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, _, std, ctx.mode, _, _ = inputs
    ctx.save_for_backward(std)


def _merge_gradient(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    grad_base, grad_residual = _pyramid_merge_backward(grad, *ctx.saved_tensors, ctx.mode)
    return {"base": grad_base, "residual": grad_residual}


_pyramid_merge_backward = define(
    "pyramid_merge_backward(Tensor grad, Tensor? std, str mode) -> (Tensor, Tensor)",
    reference=reference.pyramid_merge_backward,
    kernels=("cuda", "triton"),
    fake=lambda grad: (_half(grad), empty(grad)),
)

_pyramid_merge = define(
    "pyramid_merge(Tensor base, Tensor residual, Tensor? mean, Tensor? std, str mode, float low, "
    "float high) -> Tensor",
    reference=reference.pyramid_merge,
    kernels=("cuda", "triton"),
    fake=lambda base, residual: empty(base, *residual.shape),
    setup_context=_merge_setup,
    backward=_merge_gradient,
    check=_check_merge,
)
