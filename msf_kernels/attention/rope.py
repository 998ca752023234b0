"""Rotary position tables for images."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from .. import checks


def rope_2d(
    height: int,
    width: int,
    head_dim: int,
    *,
    theta: float = 100.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return an axial 2-D rotary table: half of the angles turn with the row, half with the column.

    This is the rotary embedding of Su et al., 2021, applied per axis as by Heo et al., 2024. Tokens
    are row-major; angle j of an axis is position * theta ** (-j / (head_dim / 4)). The default
    theta of 100 suits grids of tens of tokens. The result is cached, do not write to it;
    torch.compile makes it in its graph.

    Args:
        height, width: the token grid, so that N = height * width.
        head_dim: channels of one head, a multiple of 4.
        device: of the result; None is the CPU.

    Returns:
        (2, N, head_dim / 2) float32: cosines, then sines.

    Raises:
        ValueError: head_dim is no multiple of 4, the grid is empty, or theta is not above 0.
        TypeError: what is to be a number is none.
    """
    for name, value in {"height": height, "width": width, "head_dim": head_dim}.items():
        checks.whole_number("rope_2d", name, value)
    checks.number("rope_2d", "theta", theta)
    if head_dim <= 0 or head_dim % 4:
        raise ValueError(f"rope_2d: head_dim must be a multiple of 4, got {head_dim}")
    if height <= 0 or width <= 0:
        raise ValueError(f"rope_2d: height and width must be positive, got {height} x {width}")
    if not 0 < theta < float("inf"):
        raise ValueError(f"rope_2d: theta must be above 0 and finite, got {theta}")
    device = torch.device(device or "cpu")
    build = _table if lasts() else _build
    return build(height, width, head_dim, theta, device)


def lasts() -> bool:
    """Tell whether a tensor made now may be kept: not one of a graph, nor without values, nor
    wrapped by a transform of torch.func, which ends."""
    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


@functools.lru_cache(maxsize=64)
def _table(height: int, width: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cached table may meet autograd later
        return _build(height, width, head_dim, theta, torch.device("cpu")).to(device)


def _build(height: int, width: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    def count(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.float64, device=device)

    quarter = head_dim // 4
    frequency = theta ** (-count(quarter) / quarter)
    rows = count(height)[:, None, None] * frequency
    columns = count(width)[None, :, None] * frequency
    grid = (height, width, quarter)
    angles = torch.cat((rows.expand(grid), columns.expand(grid)), -1).flatten(0, 1)
    return torch.stack((angles.cos(), angles.sin())).float()
