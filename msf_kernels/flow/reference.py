"""Rectified flow (Liu et al., 2022): the straight path and the guided Euler step along it.

Mathematics in float32 (float64 for float64), one rounding at each output.
"""

from __future__ import annotations

from torch import Tensor

from ..dtypes import widen


def flow_interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) * noise + t * data and velocity = data - noise; t is (B,)."""
    t = _per_sample(t, data)
    wide, wide_noise = widen(data), widen(noise)
    x_t = (1 - t) * wide_noise + t * wide
    return x_t.to(data.dtype), (wide - wide_noise).to(data.dtype)


def flow_interpolate_backward(
    grad_x_t: Tensor | None, grad_velocity: Tensor | None, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of data and noise from those of x_t and velocity, of which one may be None."""
    if grad_x_t is None:
        assert grad_velocity is not None
        return grad_velocity.clone(), -grad_velocity
    wide = widen(grad_x_t)
    t = _per_sample(t, grad_x_t)
    grad_data, grad_noise = t * wide, (1 - t) * wide
    if grad_velocity is not None:
        grad_data, grad_noise = grad_data + grad_velocity, grad_noise - grad_velocity
    return grad_data.to(grad_x_t.dtype), grad_noise.to(grad_x_t.dtype)


def guided_euler_step(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance_scale: Tensor, dt: Tensor
) -> Tensor:
    """x + dt * (v_uncond + guidance_scale * (v_cond - v_uncond)), in x's dtype.

    Classifier-free guidance (Ho & Salimans, 2022); x + dt * v_cond where v_uncond is None.
    """
    velocity = widen(v_cond)
    if v_uncond is not None:
        wide = widen(v_uncond)
        velocity = wide + guidance_scale * (velocity - wide)
    return (widen(x) + dt * velocity).to(x.dtype)


def guided_euler_step_backward(
    grad: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance_scale: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of v_cond and v_uncond (empty where that is None); that of x is `grad` itself."""
    grad_v = dt * widen(grad)
    if v_uncond is None:
        return grad_v.to(v_cond.dtype), v_cond.new_empty(0)
    grad_cond = guidance_scale * grad_v
    return grad_cond.to(v_cond.dtype), (grad_v - grad_cond).to(v_uncond.dtype)


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...) in the compute dtype."""
    return widen(t).view(-1, *[1] * (like.dim() - 1))
