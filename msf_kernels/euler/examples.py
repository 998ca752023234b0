"""Example calls of the sampler's steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..examples import Example, New, Shape
from ..pyramid.examples import statistics
from .op import guided_euler_merge, guided_euler_step

PATCH = 2
AUDITED = ((256, 16, 64, 64),)


def velocities(new: New, shape: Shape, tokens: bool, guided: bool = True) -> dict[str, Tensor]:
    """Make velocities with and without the label, as images (B, C, H, W) or as tokens."""
    batch, channels, height, width = shape
    if tokens:  # as a transformer returns them: (B, H/p * W/p, p * p * C)
        shape = (batch, height * width // PATCH**2, PATCH**2 * channels)
    return {name: new(*shape) for name in ("v_cond", "v_uncond")[: 1 + guided]}


def scalars(new: New, table: bool = False) -> dict[str, Tensor]:
    """Make guidance scale and step size, or tables of them and the row that counts."""
    like = new(1, dtype=torch.float32)
    shape = (2,) if table else ()
    made = {"guidance_scale": like.new_full(shape, 4.0), "dt": like.new_full(shape, 0.02)}
    return made | {"step": like.new_ones((), dtype=torch.int64)} if table else made


def state(new: New, shape: Shape) -> Tensor:
    """Make the sampler's state, which stays in float32 where the velocities have 16 bits."""
    return new(*shape, dtype=compute_dtype(new(1)))


def step(new: New, shape: Shape, tokens: bool) -> dict[str, Tensor]:
    return {"x": state(new, shape), **velocities(new, shape, tokens), **scalars(new)}


def heun(new: New, shape: Shape, tokens: bool) -> dict[str, Tensor]:
    """Make a step in the middle of a table, of a state in the dtype of the velocities."""
    made = {"x": new(*shape), **velocities(new, shape, tokens), "start": new(*shape)}
    return made | scalars(new, table=True)


def numbers(new: New, shape: Shape, guided: bool) -> dict[str, Tensor]:
    """Make a step whose scalars are the host's."""
    return {"x": new(*shape), **velocities(new, shape, tokens=False, guided=guided)}


def merge(
    new: New,
    shape: Shape,
    tokens: bool,
    standardised: bool,
    given: Callable[[New], dict[str, Tensor]] = scalars,
) -> dict[str, Tensor]:
    """Make a last step and the base that it is merged with; `given` makes its scalars."""
    batch, channels, height, width = shape
    made = {"x": state(new, shape), **velocities(new, shape, tokens), **given(new)}
    made["base"] = state(new, (batch, channels, height // 2, width // 2))
    return made | statistics(new, channels) if standardised else made


def _example(
    function: Callable[..., Any],
    inputs: Callable[..., dict[str, Tensor]],
    variant: str = "",
    gradients: int = 0,
    audited: tuple[Shape, ...] = AUDITED,
    **options: Any,
) -> Example:
    return Example(
        op=function.__name__,
        function=function,
        inputs=inputs,
        shape=(2, 3, 4, 6),
        options=lambda _: options,
        gradients=gradients,
        variant=variant,
        audited=audited,
    )


HOST: dict[str, Any] = {"guidance_scale": 3.0, "dt": 0.25}
EXAMPLES = (
    _example(guided_euler_step, partial(step, tokens=False), gradients=3),
    _example(guided_euler_step, partial(step, tokens=True), "tokens", 3, patch=PATCH),
    _example(guided_euler_step, partial(heun, tokens=False), "heun", 4),
    _example(guided_euler_step, partial(heun, tokens=True), "tokens heun", 4, patch=PATCH),
    _example(guided_euler_step, partial(numbers, guided=True), "floats", 3, **HOST),
    _example(
        guided_euler_step,
        partial(numbers, guided=False),
        "unguided",
        2,
        (),
        v_uncond=None,
        **HOST,
    ),
    _example(guided_euler_merge, partial(merge, tokens=False, standardised=True)),
    _example(
        guided_euler_merge,
        partial(merge, tokens=False, standardised=False),
        "without statistics",
    ),
    _example(
        guided_euler_merge,
        partial(merge, tokens=False, standardised=True, given=lambda _: {}),
        "floats",
        **HOST,
    ),
    _example(
        guided_euler_merge, partial(merge, tokens=True, standardised=False), "tokens", patch=PATCH
    ),
    _example(
        guided_euler_merge,
        partial(merge, tokens=True, standardised=True, given=partial(scalars, table=True)),
        "tokens bilinear",
        patch=PATCH,
        mode="bilinear",
        clamp=(-1.0, 1.0),
    ),
)
