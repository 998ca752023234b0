"""Rectified flow: x_t = (1 - t) noise + t data, with velocity data - noise, from t = 0 to 1."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from msf_kernels import guided_euler_step

from .config import MAX_STEPS

SOLVERS = ("euler", "heun")

# (x, t, guided) -> (v_cond, v_uncond); v_uncond is None when not guided.
Velocity = Callable[[Tensor, Tensor, bool], tuple[Tensor, "Tensor | None"]]

# (x, v_cond, v_uncond, guidance_scale, dt) -> x, as guided_euler_step does it.
Step = Callable[..., Tensor]


def logit_normal_times(
    batch: int,
    std: float = 1.0,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """t (B,) in (0, 1), sigmoid of a normal of deviation ``std`` (arXiv 2403.03206, section 3.1).

    1 puts most work in the middle; 1.8 is nearly uniform, the logistic having a deviation of 1.81.
    """
    return (std * torch.randn(batch, generator=generator, device=device)).sigmoid()


def evaluations(steps: int, solver: str) -> int:
    """How many velocities ``integrate`` asks for."""
    return steps if solver == "euler" else 2 * steps - 1


def check_settings(
    *, steps: int, guidance_scale: float, guidance_interval: tuple[float, float], solver: str
) -> None:
    """ValueError for what ``integrate`` cannot follow."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise ValueError(f"steps must be a whole number, got {steps}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if steps > MAX_STEPS:
        raise ValueError(f"steps must be at most {MAX_STEPS}, got {reprlib.repr(steps)}")
    try:
        low, high = guidance_interval
    except (TypeError, ValueError):
        raise ValueError(
            f"guidance_interval must be (low, high), got {guidance_interval}"
        ) from None
    # Finite in float32, in which the steps compute; math.isfinite refuses ints beyond a float.
    if not (abs(guidance_scale) <= torch.finfo(torch.float32).max and 0 <= low <= high <= 1):
        raise ValueError(
            "guidance_scale must be finite and guidance_interval 0 <= low <= high <= 1, "
            f"got {reprlib.repr(guidance_scale)} and {guidance_interval}"
        )


def integrate(
    velocity: Velocity,
    x: Tensor,
    *,
    steps: int,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    solver: str = "euler",
    patch: int | None = None,
    last: Step | None = None,
) -> Tensor:
    """Follow dx/dt = v from noise x (B, ...) at t = 0 to data at t = 1 in ``steps`` equal steps.

    Guided velocity: v_uncond + guidance_scale (v_cond - v_uncond) (arXiv 2207.12598), only at times
    in ``guidance_interval`` (arXiv 2404.07724): outside it the unconditional half is not computed.
    Heun is of second order and costs two velocities a step, one in the last. The state stays in
    float32.

    patch: the velocities are tokens of patches that wide. last: takes the last step in place of
    ``guided_euler_step``, to go on with its result in the same pass.
    """
    check_settings(
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        solver=solver,
    )
    low, high = guidance_interval
    times = [i / steps for i in range(steps + 1)]
    # On the device once, so that no step waits for a copy.
    table = torch.tensor(times, dtype=torch.float32, device=x.device)
    dt = torch.tensor(1 / steps, dtype=torch.float32, device=x.device)
    scale = torch.tensor(guidance_scale, dtype=torch.float32, device=x.device)

    euler = partial(guided_euler_step, patch=patch)

    def follow(x: Tensor, i: int, step: Step) -> Tensor:
        guided = guidance_scale != 1.0 and low <= times[i] <= high
        return step(x, *velocity(x, table[i].expand(len(x)), guided), scale, dt)

    x = x.float()
    for i in range(steps - 1):
        start, x = x, follow(x, i, euler)
        if solver == "heun":
            # x + dt (v(x) + v(x')) / 2 is half-way between x and the end of two Euler steps.
            x = follow(x, i + 1, partial(euler, start=start))
    # With Heun too: the velocity at t = 1 itself is hardly trained, with it the Frechet distance of
    # digits was 13 % larger. One Euler step leaves the order as it is.
    return follow(x, steps - 1, last or euler)
