"""Calls the CUDA kernels of csrc/kernels/pyramid.cu."""

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
    images = image(x), image(base), image(residual)
    statistics = address(mean), address(std)
    launch("pyramid_split", x, dtype(x), sizes, *images, statistics, mode == "bilinear")
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
    images = image(grad_base), image(grad_residual), image(grad)
    sizes, statistics = (batch, channels, height, width), (0, address(std))
    bilinear = mode == "bilinear"
    launch("pyramid_split_backward", grad, dtype(grad), sizes, *images, statistics, bilinear)
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
    images = image(base), image(residual), image(x)
    statistics, bilinear = (address(mean), address(std)), mode == "bilinear"
    bounds = (low, high)
    launch("pyramid_merge", x, dtype(x), base.shape, *images, statistics, bilinear, bounds)
    return x


def pyramid_merge_backward(grad: Tensor, std: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = grad.shape
    sizes = (batch, channels, height // 2, width // 2)
    grad_base, grad_residual = empty(grad, *sizes), empty(grad)
    std = wide(std, grad)
    images = image(grad), image(grad_base), image(grad_residual)
    statistics, bilinear = (0, address(std)), mode == "bilinear"
    launch("pyramid_merge_backward", grad, dtype(grad), sizes, *images, statistics, bilinear)
    return grad_base, grad_residual
