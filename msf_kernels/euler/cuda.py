"""Calls of the CUDA kernels in csrc/kernels/euler.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cuda_support.launch import address, dtype, image, launch, wide
from ..dtypes import compute_dtype
from ..layout import contiguous_samples, empty, in_layout_of
from ..recording import Number, number


def guided_euler_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance_scale: Tensor,
    dt: Tensor,
    step: Tensor | None,
    start: Tensor | None,
    patch: int | None,
) -> Tensor:
    x_next = empty(x)
    scale, dt = _on_device(guidance_scale, x), _on_device(dt, x)
    if patch:
        v_cond, v_uncond = contiguous_samples(v_cond), contiguous_samples(v_uncond)
        euler_step = _euler_step(v_cond, v_uncond, scale, dt, step, patch)
        launch(
            "guided_euler_step_of_tokens",
            x,
            dtype(x),
            x.shape,
            image(x),
            euler_step,
            image(start),
            image(x_next),
        )
        return x_next
    x, v_cond, v_uncond, start = (in_layout_of(t, x_next) for t in (x, v_cond, v_uncond, start))
    euler_step = _euler_step(v_cond, v_uncond, scale, dt, step, patch)
    launch(
        "guided_euler_step",
        x,
        dtype(x),
        x.numel(),
        address(x),
        euler_step,
        address(start),
        address(x_next),
    )
    return x_next


def guided_euler_merge(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance_scale: Tensor,
    dt: Tensor,
    step: Tensor | None,
    patch: int | None,
    base: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    mode: str,
    low: float,
    high: float,
) -> Tensor:
    merged = empty(x)
    scale, dt = _on_device(guidance_scale, x), _on_device(dt, x)
    mean, std = wide(mean, x), wide(std, x)
    if patch:
        v_cond, v_uncond = contiguous_samples(v_cond), contiguous_samples(v_uncond)
    elif v_uncond is not None and v_uncond.stride() != v_cond.stride():
        v_cond, v_uncond = v_cond.contiguous(), v_uncond.contiguous()
    launch(
        "guided_euler_merge",
        x,
        dtype(x),
        base.shape,
        image(x),
        _euler_step(v_cond, v_uncond, scale, dt, step, patch),
        image(base),
        image(merged),
        (address(mean), address(std)),
        mode == "bilinear",
        (low, high),
    )
    return merged


def _on_device(scalar: Tensor, x: Tensor) -> Tensor:
    """Return what stands for a number as it is, and a table in the compute dtype on x's device."""
    if _is_number(scalar):
        return scalar
    return scalar.to(x.device, compute_dtype(x)).contiguous()


def _is_number(scalar: Tensor) -> bool:
    """Tell whether it is a number on the host, which `library.define` has as a float64."""
    return not scalar.dim() and scalar.device.type == "cpu" and scalar.dtype == torch.float64


def _euler_step(
    v_cond: Tensor,
    v_uncond: Tensor | None,
    scale: Tensor,
    dt: Tensor,
    step: Tensor | None,
    patch: int | None,
) -> tuple[Any, ...]:
    """Return an msf::EulerStep."""
    return (
        dtype(v_cond),
        _strided(v_cond),
        _strided(v_uncond),
        _scalar(scale),
        _scalar(dt),
        address(step),
        patch or 0,
    )


def _strided(velocity: Tensor | None) -> tuple[int, ...] | None:
    """Return a velocity of any shape as an msf::ImageView."""
    if velocity is None:
        return None
    return (address(velocity), *(*velocity.stride(), 0, 0, 0, 0)[:4])


def _scalar(scalar: Tensor) -> tuple[float | Number, int]:
    """Return a number or a table as an msf::Scalar."""
    return (number(scalar), 0) if _is_number(scalar) else (0.0, address(scalar))
