"""guided_euler_step and guided_euler_merge as operators.

The gradient of the step is plain PyTorch, because sampling does not ask for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..layout import empty
from ..library import define, is_plain
from . import reference

NUMBERS = ("guidance_scale", "dt")


def guided_euler_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance_scale: float | Tensor,
    dt: float | Tensor,
    *,
    step: Tensor | None = None,
    start: Tensor | None = None,
    patch: int | None = None,
) -> Tensor:
    """Make one Euler step along the guided velocity.

    The result is x + dt * (v_uncond + guidance_scale * (v_cond - v_uncond)): classifier-free
    guidance (Ho & Salimans, 2022, equation 6, with their w = guidance_scale - 1).

    Args:
        x: the state, any shape; float32 or float64 keeps small steps exact.
        v_cond, v_uncond: velocities of x's shape, or tokens (see patch); one dtype with x, or one
            16-bit dtype beside float32. Without v_uncond the step is x + dt * v_cond.
        guidance_scale, dt: floats or 0-dimensional tensors; they get no gradient.
        step: 0-dimensional int64 on x's device: guidance_scale and dt are then tables (S,) on that
            device of which this row counts, so that one CUDA graph serves all steps. It must be in
            [0, S), which on a GPU is not checked: the host would have to wait for it.
        start: of x's shape and dtype: the result is half-way between it and the Euler step from x.
            Where x itself came from start by an Euler step, that is Heun's method.
        patch: x is (B, C, H, W) and the velocities are tokens (B, H/p * W/p, p * p * C) of patches
            that wide, row by row, channels as (row, column, C): a transformer's output as it is.

    Returns:
        The new state in x's dtype and memory format.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    _check_row("guided_euler_step", step, guidance_scale)
    return _guided_euler_step(x, v_cond, v_uncond, guidance_scale, dt, step, start, patch)


def guided_euler_merge(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance_scale: float | Tensor,
    dt: float | Tensor,
    base: Tensor,
    *,
    step: Tensor | None = None,
    patch: int | None = None,
    mode: str = "nearest",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """Make the last step of a residual's sampling and merge it with its base, in one pass.

    The result is that of ``pyramid_merge(base, guided_euler_step(x, ...), ...)``; the arguments are
    theirs. It has no gradient.

    Args:
        x: the standardised residual (B, C, H, W), float64, float32, bfloat16 or float16.
        base: (B, C, H/2, W/2) in x's dtype.

    Returns:
        (B, C, H, W) in x's dtype and memory format.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    bounds = checks.bounds("guided_euler_merge", clamp)
    _check_row("guided_euler_merge", step, guidance_scale)
    return _guided_euler_merge(
        x, v_cond, v_uncond, guidance_scale, dt, step, patch, base, mean, std, mode, *bounds
    )


def _check_row(op: str, step: Tensor | None, table: float | Tensor) -> None:
    """Check what step holds, at each call because it is no part of a signature.

    On a GPU the host would have to wait for it. `_check_tables` checks what step and table are.
    """
    if not isinstance(step, Tensor) or not isinstance(table, Tensor) or step.dim():
        return
    known = step.device.type == "cpu" and not torch.compiler.is_compiling() and is_plain(step)
    if known and table.dim() == 1 and not 0 <= int(step) < len(table):
        raise ValueError(f"{op}: step must be in [0, {len(table)}), got {int(step)}")


def _check_step(
    op: str,
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance_scale: float | Tensor,
    dt: float | Tensor,
    step: Tensor | None,
    patch: int | None,
    start: Tensor | None = None,
) -> None:
    velocities = {"v_cond": v_cond}
    if v_uncond is not None:
        velocities["v_uncond"] = v_uncond
    checks.tensors(op, x=x, **velocities)
    checks.dtypes(op, x=x, **velocities)
    if v_uncond is not None:
        checks.dtype(op, "v_uncond", v_uncond, v_cond.dtype)
    for name, tensor in velocities.items():
        if patch is None:
            checks.shape(op, name, tensor, "x.shape", tuple(x.shape))
        else:
            checks.shape(op, name, tensor, "(B, H/p * W/p, p * p * C)", _tokens(op, x, patch))
    if step is None:
        _check_scalar(op, "guidance_scale", guidance_scale, x)
        _check_scalar(op, "dt", dt, x)
    else:
        _check_tables(op, guidance_scale, dt, step, x)
    if start is not None:
        checks.tensors(op, x=x, start=start)
        checks.dtype(op, "start", start, x.dtype)
        checks.shape(op, "start", start, "x.shape", tuple(x.shape))


def _check_merge(
    op: str,
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    base: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    mode: str,
    low: float,
    high: float,
    **step: Any,
) -> None:
    _check_step(op, x, v_cond, v_uncond, **step)
    checks.tensors(op, x=x, base=base)
    checks.merge(op, base, "x", x, mode, mean, std)
    for name, tensor in {"x": x, "v_cond": v_cond, "v_uncond": v_uncond, "base": base}.items():
        if tensor is not None:
            checks.constant(op, name, tensor)


def _tokens(op: str, x: Tensor, patch: int) -> tuple[int, ...]:
    """Return the shape of x's patches as tokens."""
    checks.dimensions(op, "x", x, "(B, C, H, W)")
    checks.whole_numbers(op, "patch", "(p,)", (patch,), 1)
    batch, channels, height, width = x.shape
    if height % patch or width % patch:
        raise ValueError(f"{op}: patch must divide H and W, {height} x {width}, got {patch}")
    return batch, height // patch * (width // patch), patch * patch * channels


def _check_tables(op: str, guidance_scale: Any, dt: Any, step: Any, x: Tensor) -> None:
    """Check tables (S,), and that step is a 0-dimensional int64 tensor on x's device."""
    if not isinstance(step, Tensor) or step.dtype != torch.int64 or step.dim():
        kind = f"{step.dtype} {tuple(step.shape)}" if isinstance(step, Tensor) else type(step)
        raise TypeError(f"{op}: step must be a 0-dimensional int64 tensor, got {kind}")
    if step.device != x.device:
        raise ValueError(f"{op}: step must be on the device of x, {x.device}, got {step.device}")
    for name, table in {"guidance_scale": guidance_scale, "dt": dt}.items():
        if not isinstance(table, Tensor) or table.dim() != 1:
            raise ValueError(f"{op}: {name} must be a table (S,) of steps, where step is given")
        checks.tensors(op, x=x, **{name: table})
        checks.constant(op, name, table)
        checks.shape(op, name, table, "(S,) as guidance_scale", tuple(guidance_scale.shape))


def _check_scalar(op: str, name: str, value: float | Tensor, x: Tensor) -> None:
    """Check a number, or a tensor that holds one, called ``name``."""
    if isinstance(value, Tensor):
        checks.tensors(op, x=x, **{name: value})
        if value.dim():
            shape = tuple(value.shape)
            raise ValueError(f"{op}: {name} must be a float or a 0-dimensional tensor, got {shape}")
        checks.constant(op, name, value)
    elif isinstance(value, (float, int)):
        checks.number(op, name, value)
    else:
        raise TypeError(f"{op}: {name} must be a float or a tensor, got {type(value).__name__}")


def _euler_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, v_cond, v_uncond, scale, dt, step, start, ctx.patch = inputs
    ctx.has_start = start is not None
    ctx.save_for_backward(v_cond, v_uncond, scale, dt, step)


def _euler_gradient(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    v_cond, v_uncond, scale, dt, step = ctx.saved_tensors
    grad_x, grad_cond, grad_uncond = reference.guided_euler_step_backward(
        grad, v_cond, v_uncond, scale, dt, step, ctx.has_start, ctx.patch
    )
    grads = {"x": grad_x, "v_cond": grad_cond, "v_uncond": grad_uncond}
    return grads | {"start": grad_x} if ctx.has_start else grads


_guided_euler_step = define(
    "guided_euler_step(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor guidance_scale, "
    "Tensor dt, Tensor? step, Tensor? start, int? patch) -> Tensor",
    reference=reference.guided_euler_step,
    kernels=("cuda", "triton"),
    fake=lambda x: empty(x),
    setup_context=_euler_setup,
    backward=_euler_gradient,
    check=_check_step,
    numbers=NUMBERS,
)


_guided_euler_merge = define(
    "guided_euler_merge(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor guidance_scale, "
    "Tensor dt, Tensor? step, int? patch, Tensor base, Tensor? mean, Tensor? std, str mode, "
    "float low, float high) -> Tensor",
    reference=reference.guided_euler_merge,
    kernels=("cuda", "triton"),
    fake=lambda x: empty(x),
    check=_check_merge,
    numbers=NUMBERS,
)
