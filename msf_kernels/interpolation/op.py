"""flow_interpolate as an operator.

Its gradient is plain PyTorch, because training does not ask for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..layout import empty
from ..library import define
from . import reference


def flow_interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return a point on the straight path from noise (t = 0) to data (t = 1), and its velocity.

    This is rectified flow (Liu et al., 2022, equation 1).

    Args:
        data, noise: (B, ...) of one dtype, float64, float32, bfloat16 or float16.
        t: (B,) in [0, 1], of data's dtype or float32; gets no gradient.

    Returns:
        x_t = (1 - t) * noise + t * data and velocity = data - noise, (B, ...) in data's dtype and
        memory format.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    return _flow_interpolate(data, noise, t)


def _check(op: str, data: Tensor, noise: Tensor, t: Tensor) -> None:
    checks.tensors(op, data=data, noise=noise, t=t)
    checks.dtype(op, "noise", noise, data.dtype)
    checks.dtype(op, "t", t, data.dtype, torch.float32)
    if data.dim() < 1:
        raise ValueError(f"{op}: data must be (B, ...), got ()")
    checks.shape(op, "noise", noise, "data.shape", tuple(data.shape))
    checks.shape(op, "t", t, "(B,)", (data.shape[0],))
    checks.constant(op, "t", t)


def _interpolate_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[2])


def _interpolate_gradient(
    ctx: Any, grad_x_t: Tensor | None, grad_velocity: Tensor | None
) -> dict[str, Tensor]:
    grads = reference.flow_interpolate_backward(grad_x_t, grad_velocity, *ctx.saved_tensors)
    return dict(zip(("data", "noise"), grads))


_flow_interpolate = define(
    "flow_interpolate(Tensor data, Tensor noise, Tensor t) -> (Tensor, Tensor)",
    reference=reference.flow_interpolate,
    kernels=("cuda", "triton"),
    fake=lambda data: (empty(data), empty(data)),
    setup_context=_interpolate_setup,
    backward=_interpolate_gradient,
    check=_check,
)
