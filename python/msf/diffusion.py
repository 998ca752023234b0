"""Denoising diffusion: from noise to data by a model that predicts the noise at numbered steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .config import DIFFUSION_STEPS

if TYPE_CHECKING:
    from torch import Tensor

    from .sampling_config import StageSampling


def signal_levels() -> np.ndarray:
    """Return (1000,) float64 alpha_bar_k, the part of x_k's variance that is data at step k, of the
    linear schedule of DDPM (arXiv 2006.11239, section 4)."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, DIFFUSION_STEPS, dtype=np.float64))


def step_numbers(steps: int) -> list[int]:
    """Return that many numbers of diffusion steps from 999 to 0, evenly spaced as by DiT; one step
    begins, and ends, at 999."""
    return [round(k) for k in np.linspace(DIFFUSION_STEPS - 1, 0, steps)]


def previous(
    x: Tensor, noise: Tensor, level: float, next_level: float, fresh: Tensor | None = None
) -> Tensor:
    """Return x at ``next_level`` of x (B, ...) at ``level`` (alpha_bar) and the ``noise`` predicted
    in it: DDIM's step (arXiv 2010.02502, equation 12) with eta 0, or, given ``fresh`` normals, eta
    1, which is DDPM's with the posterior's variance ("fixed small")."""
    data = (x - (1 - level) ** 0.5 * noise) / level**0.5
    variance = 0.0
    if fresh is not None:
        variance = (1 - next_level) / (1 - level) * (1 - level / next_level)
    x = next_level**0.5 * data + (1 - next_level - variance) ** 0.5 * noise
    return x if fresh is None else x + variance**0.5 * fresh


def denoise(
    predict: Callable[[Tensor, Tensor, bool], Tensor],
    x: Tensor,
    sampling: StageSampling,
    draw: Callable[[int], Tensor],
) -> Tensor:
    """Lead noise x (B, ...) to data, float32.

    Step k counts as time 1 - k / 1000 for the guidance interval. DiT's own sampler has a variance
    between DDPM's two, which the network's other outputs, dropped here, choose.

    Args:
        predict: (x, k (B,), guided) -> noise, like x.
        draw: what DDPM adds after step k, normals like x.
    """
    (low, high), levels = sampling.guidance_interval, signal_levels()
    numbers = step_numbers(sampling.steps)
    x = x.float()
    for k, following in zip(numbers, [*numbers[1:], None]):
        guided = sampling.guidance_scale != 1.0 and low <= 1 - k / DIFFUSION_STEPS <= high
        noise = predict(x, x.new_full((len(x),), k), guided)
        is_last = following is None
        next_level = 1.0 if is_last else float(levels[following])
        fresh = None if is_last or sampling.solver == "ddim" else draw(k)
        x = previous(x, noise, float(levels[k]), next_level, fresh)
    return x
