"""merge_tokens as an operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from ..library import define
from . import reference


def merge_tokens(
    base: Tensor, skip: Tensor, position: Tensor | None = None, *, grid: tuple[int, int]
) -> Tensor:
    """Merge coarse tokens into fine ones: shuffle(base) + skip + position.

    This is `pyramid_merge` in the space of tokens, between the scales of a multi-patch transformer
    (MPDiT, arXiv 2603.26357): pixel shuffle (arXiv 1609.05158), skip connection and positions.

    Args:
        base: (B, h * w, 4 * D) float64, float32, bfloat16 or float16: a token's channels hold the
            2x2 tokens that it becomes, as (row, column, D).
        skip: (B, 4 * h * w, D) in base's dtype, tokens of the fine grid row by row.
        position: (4 * h * w, D) in base's dtype, or one of both in 16 bits, the other in float32.
        grid: (h, w) of the coarse grid.

    Returns:
        (B, 4 * h * w, D) in base's dtype, computed in float32 and rounded once.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    checks.whole_numbers("merge_tokens", "grid", "(h, w)", grid, 2)
    return _merge_tokens(base, skip, position, *grid)


def _check(
    op: str, base: Tensor, skip: Tensor, position: Tensor | None, height: int, width: int
) -> None:
    given = {} if position is None else {"position": position}
    checks.tensors(op, base=base, skip=skip, **given)
    checks.dtype(op, "skip", skip, base.dtype)
    checks.dimensions(op, "base", base, "(B, h * w, 4 * D)")
    batch, tokens, channels = base.shape
    if height * width != tokens or channels % 4:
        raise ValueError(
            f"{op}: base must be (B, h * w, 4 * D) with (h, w) = grid = {(height, width)}, "
            f"got {tuple(base.shape)}"
        )
    checks.shape(op, "skip", skip, "(B, 4 * h * w, D)", (batch, 4 * tokens, channels // 4))
    if position is not None:
        checks.dtypes(op, base=base, position=position)
        checks.shape(op, "position", position, "(4 * h * w, D)", (4 * tokens, channels // 4))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, position, *ctx.grid = inputs
    ctx.save_for_backward(position)


def _gradient(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    (position,) = ctx.saved_tensors
    learned = position if ctx.needs_input_grad[2] else None  # fixed positions cost no sum
    grad_base, grad_position = _merge_tokens_backward(grad, learned, *ctx.grid)
    found = {"base": grad_base, "skip": grad}
    return found if learned is None else found | {"position": grad_position}


def _backward_fake(grad: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = grad.shape
    grad_base = grad.new_empty((batch, tokens // 4, 4 * channels))
    return grad_base, grad.new_empty(0) if position is None else position.new_empty(position.shape)


_merge_tokens_backward = define(
    "merge_tokens_backward(Tensor grad, Tensor? position, int height, int width) "
    "-> (Tensor, Tensor)",
    reference=reference.merge_tokens_backward,
    kernels=("cuda", "triton"),
    fake=_backward_fake,
)

_merge_tokens = define(
    "merge_tokens(Tensor base, Tensor skip, Tensor? position, int height, int width) -> Tensor",
    reference=reference.merge_tokens,
    kernels=("cuda", "triton"),
    fake=lambda skip: skip.new_empty(skip.shape),
    setup_context=_setup,
    backward=_gradient,
    check=_check,
)
