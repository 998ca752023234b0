"""Numbers and positions as vectors: sinusoids of geometric frequencies (arXiv 1706.03762, 3.5)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from .weights import dtype_of

FREQUENCIES = 256


def sinusoid(positions: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Map positions (n,) to (n, dim) cosines and sines at geometric frequencies (arXiv 1706.03762,
    3.5)."""
    steps = torch.arange(dim // 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * torch.exp(-math.log(max_period) * (steps / (dim // 2)))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def sincos_2d(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Return the position table (height * width, dim): half of the channels for rows, half for
    columns.

    The result is cached, do not write to it; torch.compile makes it in its graph.
    """
    # Neither a table of a graph, one without values, nor one that a transform wraps may be kept.
    is_passing = (
        torch.compiler.is_compiling()
        or detect_fake_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    build = _sincos_2d if is_passing else _cached_sincos_2d
    return build(height, width, dim, device)


def _sincos_2d(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    rows, columns = (sinusoid(torch.arange(n, device=device), dim // 2) for n in (height, width))
    table = [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)]
    return torch.cat(table, dim=-1).flatten(0, 1)


@lru_cache(maxsize=64)
def _cached_sincos_2d(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cached table may meet autograd later
        return _sincos_2d(height, width, dim, device)


class ScalarEmbedding(nn.Sequential):
    """A ScalarEmbedding embeds times or deviations of noise (B,) in [0, 1] as (B, D): sinusoids of
    the number that far from the first to the second of ``span``, and an MLP.

    The default frequencies were made for the step numbers of a 1000-step diffusion.
    """

    def __init__(
        self, width: int, span: tuple[float, float] = (0.0, 1000.0), period: float = 10_000.0
    ) -> None:
        super().__init__(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.span, self.period = span, period

    def forward(self, value: Tensor) -> Tensor:
        start, end = self.span
        embedded = sinusoid((end - start) * value + start, FREQUENCIES, self.period)
        return super().forward(embedded.to(dtype_of(self[0])))
