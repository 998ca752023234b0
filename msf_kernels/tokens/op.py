"""merge_tokens as an operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from ..library import define
from . import reference


def merge_tokens(
    base: Tensor,
    skip: Tensor,
    position: Tensor | None = None,
    condition: Tensor | None = None,
    *,
    grid: tuple[int, int],
) -> Tensor:
    """Merge coarse tokens into fine ones: shuffle(base) + skip + position.

    This is `pyramid_merge` in the space of tokens, between the scales of a multi-patch transformer
    (MPDiT, arXiv 2603.26357): pixel shuffle (arXiv 1609.05158), skip connection and positions.
    MPDiT's tokens of the class stand in front of those of the image on every scale. They pass the
    merge as they are, without skip and position, so that the whole sequence is written at once.
    GELU, norm and linear layer, which MPDiT has between shuffle and skip, see each token alone, so
    they give the same before the shuffle.

    Args:
        base: (B, h * w, 4 * D) float64, float32, bfloat16 or float16: a token's channels hold the
            2x2 tokens that it becomes, as (row, column, D).
        skip: (B, 4 * h * w, D) in base's dtype, tokens of the fine grid row by row.
        position: (4 * h * w, D) in base's dtype, or one of both in 16 bits, the other in float32.
        condition: (B, C, D) in base's dtype, tokens that no grid has.
        grid: (h, w) of the coarse grid.

    Of base, skip and condition, samples that are contiguous are read where they lie, such as
    `x[:, :C]` and `x[:, C:]`.

    Returns:
        (B, C + 4 * h * w, D) in base's dtype, the condition first. The sums are computed in float32
        and rounded once.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    checks.whole_numbers("merge_tokens", "grid", "(h, w)", grid, 2)
    return _merge_tokens(base, skip, position, condition, *grid)


def _check(
    op: str,
    base: Tensor,
    skip: Tensor,
    position: Tensor | None,
    condition: Tensor | None,
    height: int,
    width: int,
) -> None:
    optional = {"position": position, "condition": condition}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
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
    if condition is not None:
        checks.dtype(op, "condition", condition, base.dtype)
        checks.dimensions(op, "condition", condition, "(B, C, D)")
        sizes = (batch, condition.shape[1], channels // 4)
        checks.shape(op, "condition", condition, "(B, C, D)", sizes)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, position, condition, *ctx.grid = inputs
    ctx.condition_tokens = None if condition is None else condition.shape[1]
    ctx.save_for_backward(position)


def _gradient(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    (position,) = ctx.saved_tensors
    learned = position if ctx.needs_input_grad[2] else None  # fixed positions cost no sum
    found: dict[str, Tensor] = {}
    if (count := ctx.condition_tokens) is not None:
        found["condition"], grad = grad[:, :count], grad[:, count:]
    grad_base, grad_position = _merge_tokens_backward(grad, learned, *ctx.grid)
    found |= {"base": grad_base, "skip": grad}
    return found if learned is None else found | {"position": grad_position}


def _fake(skip: Tensor, condition: Tensor | None) -> Tensor:
    batch, tokens, channels = skip.shape
    count = 0 if condition is None else condition.shape[1]
    return skip.new_empty((batch, count + tokens, channels))


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
    "merge_tokens(Tensor base, Tensor skip, Tensor? position, Tensor? condition, int height, "
    "int width) -> Tensor",
    reference=reference.merge_tokens,
    kernels=("cuda", "triton"),
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
    check=_check,
)
