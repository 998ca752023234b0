"""References of the guided Euler step along the velocity of a rectified flow (Liu et al., 2022).

Mathematics runs in float32 (float64 for float64), with one rounding at each output.
"""

from __future__ import annotations

from torch import Tensor

from ..dtypes import widen
from ..pyramid import reference as pyramid


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
    """Return x + dt * (v_uncond + guidance_scale * (v_cond - v_uncond)), in x's dtype.

    This is classifier-free guidance (Ho & Salimans, 2022); without v_uncond it is x + dt * v_cond.
    With ``step`` the two scalars are tables (S,) and this is their row. With ``start`` the result
    is half-way between it and the above: the second half of a Heun step. With ``patch`` the
    velocities are tokens of patches that wide.
    """
    scale, dt = _row(guidance_scale, step), _row(dt, step)
    velocity = _image(v_cond, x, patch)
    if v_uncond is not None:
        wide = _image(v_uncond, x, patch)
        velocity = wide + scale * (velocity - wide)
    x_next = widen(x) + dt * velocity
    if start is not None:
        x_next = (widen(start) + x_next) / 2
    return x_next.to(x.dtype)


def guided_euler_step_backward(
    grad: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance_scale: Tensor,
    dt: Tensor,
    step: Tensor | None,
    has_start: bool,
    patch: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, v_cond and v_uncond; that of start is that of x."""
    scale, dt = _row(guidance_scale, step), _row(dt, step)
    wide = widen(grad) / 2 if has_start else widen(grad)
    grad_x, grad_v = wide.to(grad.dtype), dt * wide
    if patch:
        grad_v = _tokens(grad_v, patch)
    if v_uncond is None:
        return grad_x, grad_v.to(v_cond.dtype), None
    grad_cond = scale * grad_v
    return grad_x, grad_cond.to(v_cond.dtype), (grad_v - grad_cond).to(v_uncond.dtype)


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
    """Return pyramid_merge(base, guided_euler_step(x, ...)), the last step of a residual."""
    residual = guided_euler_step(x, v_cond, v_uncond, guidance_scale, dt, step, None, patch)
    return pyramid.pyramid_merge(base, residual, mean, std, mode, low, high)


def _row(table: Tensor, step: Tensor | None) -> Tensor:
    """Return row ``step`` of a table (S,) unknown to the host; the scalar itself without step."""
    return table if step is None else table.index_select(0, step.view(1)).view(())


def _image(velocity: Tensor, x: Tensor, patch: int | None) -> Tensor:
    """Return the velocity in x's layout and the compute dtype."""
    velocity = widen(velocity)
    if not patch:
        return velocity
    channels, height, width = x.shape[1:]
    grid = len(velocity), height // patch, width // patch
    # Neither flatten nor unflatten has a batching rule.
    tokens = velocity.reshape(*grid, patch, patch, channels)
    return tokens.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def _tokens(image: Tensor, patch: int) -> Tensor:
    """Return an image (B, C, H, W) as tokens (B, H/p * W/p, p * p * C)."""
    batch, channels, height, width = image.shape
    rows, columns = height // patch, width // patch
    blocks = image.reshape(batch, channels, rows, patch, columns, patch)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch**2 * channels)
