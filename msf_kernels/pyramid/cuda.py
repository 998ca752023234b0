"""Calls of the CUDA kernels in csrc/kernels/pyramid.cu."""

from __future__ import annotations

from torch import Tensor

from ..cuda_support.launch import address, dtype, image, launch, wide
from ..layout import empty


def pyramid_split(
    x: Tensor, mean: Tensor | None, std: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    sizes = (batch, channels, height // 2, width // 2)
    base, residual = empty(x, *sizes), empty(x)
    mean, std = wide(mean, x), wide(std, x)
    launch(
        "pyramid_split",
        x,
        dtype(x),
        sizes,
        image(x),
        image(base),
        image(residual),
        (address(mean), address(std)),
        mode == "bilinear",
    )
    return base, residual


def pyramid_split_backward(
    grad_base: Tensor | None, grad_residual: Tensor | None, std: Tensor | None, mode: str
) -> Tensor:
    first = grad_base if grad_base is not None else grad_residual
    assert first is not None
    batch, channels, height, width = first.shape
    if grad_base is None:
        height, width = height // 2, width // 2
    grad = empty(first, batch, channels, 2 * height, 2 * width)
    std = wide(std, grad)
    launch(
        "pyramid_split_backward",
        grad,
        dtype(grad),
        (batch, channels, height, width),
        image(grad_base),
        image(grad_residual),
        image(grad),
        (0, address(std)),
        mode == "bilinear",
    )
    return grad


def pyramid_merge(
    base: Tensor,
    residual: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    mode: str,
    low: float,
    high: float,
) -> Tensor:
    x = empty(base, *residual.shape)
    mean, std = wide(mean, x), wide(std, x)
    launch(
        "pyramid_merge",
        x,
        dtype(x),
        base.shape,
        image(base),
        image(residual),
        image(x),
        (address(mean), address(std)),
        mode == "bilinear",
        (low, high),
    )
    return x


def pyramid_merge_backward(grad: Tensor, std: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = grad.shape
    sizes = (batch, channels, height // 2, width // 2)
    grad_base, grad_residual = empty(grad, *sizes), empty(grad)
    std = wide(std, grad)
    launch(
        "pyramid_merge_backward",
        grad,
        dtype(grad),
        sizes,
        image(grad),
        image(grad_base),
        image(grad_residual),
        (0, address(std)),
        mode == "bilinear",
    )
    return grad_base, grad_residual
