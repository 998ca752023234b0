"""References of the straight path of a rectified flow (Liu et al., 2022) from noise to data.

Mathematics runs in float32 (float64 for float64), with one rounding at each output.
"""

from __future__ import annotations

from torch import Tensor

from ..dtypes import widen


def flow_interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t = (1 - t) * noise + t * data and velocity = data - noise; t is (B,)."""
    t = _per_sample(t, data)
    wide, wide_noise = widen(data), widen(noise)
    x_t = (1 - t) * wide_noise + t * wide
    return x_t.to(data.dtype), (wide - wide_noise).to(data.dtype)


def flow_interpolate_backward(
    grad_x_t: Tensor | None, grad_velocity: Tensor | None, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of data and noise; one of those of x_t and velocity may be None."""
    if grad_x_t is None:
        assert grad_velocity is not None
        return grad_velocity.clone(), -grad_velocity
    wide = widen(grad_x_t)
    t = _per_sample(t, grad_x_t)
    grad_data, grad_noise = t * wide, (1 - t) * wide
    if grad_velocity is not None:
        grad_data, grad_noise = grad_data + grad_velocity, grad_noise - grad_velocity
    return grad_data.to(grad_x_t.dtype), grad_noise.to(grad_x_t.dtype)


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Return t (B,) as (B, 1, ...) in the compute dtype."""
    return widen(t).view(-1, *[1] * (like.dim() - 1))
