"""flow_interpolate and guided_euler_step as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..library import define
from . import reference


def flow_interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A point on the straight path from noise (t = 0) to data (t = 1), and its velocity.

    Rectified flow (Liu et al., 2022, equation 1).

    Args:
        data, noise: (B, ...) of one dtype, float64, float32, bfloat16 or float16.
        t: (B,) in [0, 1], of data's dtype or float32; gets no gradient.

    Returns:
        x_t = (1 - t) * noise + t * data and velocity = data - noise, (B, ...) in data's dtype.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    op = "flow_interpolate"
    checks.tensors(op, data=data, noise=noise, t=t)
    checks.dtype(op, "noise", noise, data.dtype)
    checks.dtype(op, "t", t, data.dtype, torch.float32)
    if data.dim() < 1:
        raise ValueError(f"{op}: data must be (B, ...), got ()")
    checks.shape(op, "noise", noise, "data.shape", tuple(data.shape))
    checks.shape(op, "t", t, "(B,)", (data.shape[0],))
    checks.constant(op, "t", t)
    return _flow_interpolate(data, noise, t)


def guided_euler_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance_scale: float | Tensor,
    dt: float | Tensor,
) -> Tensor:
    """One Euler step along the guided velocity.

    x + dt * (v_uncond + guidance_scale * (v_cond - v_uncond)): classifier-free guidance (Ho &
    Salimans, 2022, equation 6, with their w = guidance_scale - 1).

    Args:
        x: the state, any shape; float32 or float64 keeps small steps exact.
        v_cond, v_uncond: velocities of x's shape; one dtype with x, or one 16-bit dtype beside
            float32. Without v_uncond the step is x + dt * v_cond.
        guidance_scale, dt: floats, or 0-dimensional tensors so that a sampler may read them from
            a table on the device; they get no gradient.

    Returns:
        The new state in x's dtype.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    op = "guided_euler_step"
    velocities = {"v_cond": v_cond}
    if v_uncond is not None:
        velocities["v_uncond"] = v_uncond
    checks.tensors(op, x=x, **velocities)
    checks.dtypes(op, x=x, **velocities)
    for name, tensor in velocities.items():
        checks.shape(op, name, tensor, "x.shape", tuple(x.shape))
    scale, step = _scalar("guidance_scale", guidance_scale, x), _scalar("dt", dt, x)
    return _guided_euler_step(x, v_cond, v_uncond, scale, step)


def _scalar(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    op = "guided_euler_step"
    if not isinstance(value, Tensor):
        if not isinstance(value, (float, int)):
            raise TypeError(f"{op}: {name} must be a float or a tensor, got {type(value).__name__}")
        # A product, because torch.compile keeps it symbolic; torch.tensor(value) recompiles at
        # each new value until it gives up.
        return torch.ones((), dtype=torch.float64, device="cpu") * value
    checks.tensors(op, x=x, **{name: value})
    if value.dim():
        shape = tuple(value.shape)
        raise ValueError(f"{op}: {name} must be a float or a 0-dimensional tensor, got {shape}")
    checks.constant(op, name, value)
    return value


def _interpolate_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[2])


def _interpolate_gradient(ctx: Any, grad_x_t: Tensor | None, grad_velocity: Tensor | None) -> Any:
    if grad_x_t is None and grad_velocity is None:
        return None, None, None
    (t,) = ctx.saved_tensors
    return *_flow_interpolate_backward(grad_x_t, grad_velocity, t), None


def _interpolate_backward_fake(
    grad_x_t: Tensor | None, grad_velocity: Tensor | None, t: Tensor
) -> tuple[Tensor, Tensor]:
    like = grad_x_t if grad_x_t is not None else grad_velocity
    assert like is not None
    return like.new_empty(like.shape), like.new_empty(like.shape)


_flow_interpolate_backward = define(
    "flow_interpolate_backward(Tensor? grad_x_t, Tensor? grad_velocity, Tensor t) "
    "-> (Tensor, Tensor)",
    reference=reference.flow_interpolate_backward,
    fake=_interpolate_backward_fake,
)

_flow_interpolate = define(
    "flow_interpolate(Tensor data, Tensor noise, Tensor t) -> (Tensor, Tensor)",
    reference=reference.flow_interpolate,
    fake=lambda data, noise, t: (data.new_empty(data.shape), data.new_empty(data.shape)),
    setup_context=_interpolate_setup,
    backward=_interpolate_gradient,
)


def _euler_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


def _euler_gradient(ctx: Any, grad: Tensor | None) -> Any:
    if grad is None:
        return None, None, None, None, None
    v_uncond = ctx.saved_tensors[1]
    grad_cond, grad_uncond = _guided_euler_step_backward(grad, *ctx.saved_tensors)
    return grad, grad_cond, None if v_uncond is None else grad_uncond, None, None


_guided_euler_step_backward = define(
    "guided_euler_step_backward(Tensor grad, Tensor v_cond, Tensor? v_uncond, "
    "Tensor guidance_scale, Tensor dt) -> (Tensor, Tensor)",
    reference=reference.guided_euler_step_backward,
    fake=lambda grad, v_cond, v_uncond, guidance_scale, dt: (
        v_cond.new_empty(v_cond.shape),
        v_cond.new_empty(0 if v_uncond is None else v_uncond.shape),
    ),
)

_guided_euler_step = define(
    "guided_euler_step(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor guidance_scale, "
    "Tensor dt) -> Tensor",
    reference=reference.guided_euler_step,
    fake=lambda x, v_cond, v_uncond, guidance_scale, dt: x.new_empty(x.shape),
    setup_context=_euler_setup,
    backward=_euler_gradient,
)
