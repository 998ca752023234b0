"""Solvers of dx/dt = v(x, t), which lead from noise at t = 0 to data at t = 1."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from msf_kernels import guided_euler_step

from .sampling_config import StageSampling

# (x, t, guided) -> (v_cond, v_uncond); v_uncond is None when not guided.
Velocity = Callable[[Tensor, Tensor, bool], tuple[Tensor, "Tensor | None"]]

# (x, v_cond, v_uncond, guidance_scale, dt) -> x, as guided_euler_step does it.
Step = Callable[..., Tensor]


def evaluations(steps: int, solver: str) -> int:
    """Return how often ``integrate``, or ``denoise``, evaluates the model."""
    return 2 * steps - 1 if solver == "heun" else steps


def integrate(
    velocity: Velocity,
    x: Tensor,
    sampling: StageSampling,
    *,
    patch: int | None = None,
    last: Step | None = None,
) -> Tensor:
    """Follow dx/dt = v from noise x (B, ...) at t = 0 to data at t = 1 in equal steps.

    The guided velocity is v_uncond + guidance_scale (v_cond - v_uncond) (arXiv 2207.12598), only at
    times in the guidance interval (arXiv 2404.07724): outside it the unconditional half is not
    computed. Heun is of second order and costs two velocities a step, one in the last. The state
    stays in float32.

    Args:
        patch: the velocities are tokens of patches that wide.
        last: takes the last step in place of ``guided_euler_step``, to go on with its result in the
            same pass.
    """
    steps, (low, high) = sampling.steps, sampling.guidance_interval
    times = [i / steps for i in range(steps + 1)]
    # The scalars are on the device once, so that no step waits for a copy.
    table = torch.tensor(times, dtype=torch.float32, device=x.device)
    dt = torch.tensor(1 / steps, dtype=torch.float32, device=x.device)
    scale = torch.tensor(sampling.guidance_scale, dtype=torch.float32, device=x.device)

    euler = partial(guided_euler_step, patch=patch)

    def follow(x: Tensor, i: int, step: Step) -> Tensor:
        guided = sampling.guidance_scale != 1.0 and low <= times[i] <= high
        return step(x, *velocity(x, table[i].expand(len(x)), guided), scale, dt)

    x = x.float()
    for i in range(steps - 1):
        start, x = x, follow(x, i, euler)
        if sampling.solver == "heun":
            # x + dt (v(x) + v(x')) / 2 is half-way between x and the end of two Euler steps.
            x = follow(x, i + 1, partial(euler, start=start))
    # Heun ends with an Euler step too: the velocity at t = 1 itself is hardly trained, with it the
    # Frechet distance of digits was 13 % larger. One Euler step leaves the order as it is.
    return follow(x, steps - 1, last or euler)
