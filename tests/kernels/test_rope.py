"""rope_2d, and attention with its tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.test_attention import eager_rotate
from msf_kernels import attention, rope_2d
from numerics import DEVICE, normal

pytestmark = pytest.mark.operator("attention")


def test_rope_scores_depend_on_relative_position_only() -> None:
    # A cosine or sine of the table is off by up to half a last bit of float32, u = 2^-25, so a
    # rotated pair by sqrt(2) u of its length, and its part of a score by 2 sqrt(2) u |q_i| |k_i|.
    height, width, head_dim = 5, 6, 16
    rope = rope_2d(height, width, head_dim)
    heads = [normal(head_dim).cpu() for _ in range(2)]
    q, k = (eager_rotate(head, rope) for head in heads)
    scores = (q @ k.mT).view(height, width, height, width)
    q_pairs, k_pairs = (head.view(2, -1).norm(dim=0) for head in heads)
    bound = 2 * (2 * 2**0.5 * 2**-25 * (q_pairs @ k_pairs))  # of a difference of two scores
    moved = scores[1:, 2:, 1:, 2:] - scores[:-1, :-2, :-1, :-2]
    assert moved.abs().max() <= bound
    assert (scores[1, 2, 0, 0] - scores[2, 1, 0, 0]).abs() > bound


def test_rope_table() -> None:
    table = rope_2d(2, 3, 8, theta=16.0)
    assert table.shape == (2, 6, 4) and table.dtype == torch.float32
    row, column = torch.arange(6) // 3, torch.arange(6) % 3
    angles = torch.stack((row, row / 4, column, column / 4), -1).double()  # 16 ** (-1 / 2) = 1 / 4
    torch.testing.assert_close(table, torch.stack((angles.cos(), angles.sin())).float())
    assert rope_2d(2, 3, 8, theta=16.0) is table
    with pytest.raises(ValueError, match=r"^rope_2d: theta must be above 0 and finite, got 0\.0$"):
        rope_2d(2, 3, 8, theta=0.0)


def test_rope_tables_in_a_compiled_graph() -> None:
    def two_grids(small: Tensor, large: Tensor) -> Tensor:
        rope, wide = rope_2d(2, 3, 8, device=DEVICE), rope_2d(2, 5, 8, device=DEVICE)
        out = attention(large, num_heads=1, rope=wide)
        return attention(small, num_heads=1, rope=rope).sum() + out.sum()

    inputs = normal(1, 6, 24), normal(1, 10, 24)
    for dynamic in (False, True):
        compiled = torch.compile(two_grids, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), two_grids(*inputs))


def test_rope_made_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        rope = rope_2d(2, 2, 4, theta=7.0, device=DEVICE)
    qkv = normal(1, 4, 12).requires_grad_()
    attention(qkv, num_heads=1, rope=rope).sum().backward()
    assert qkv.grad is not None


BAD = {
    "with odd quarters": (
        lambda: rope_2d(2, 2, 6),
        ValueError,
        "rope_2d: head_dim must be a multiple of 4, got 6",
    ),
    "without rows": (
        lambda: rope_2d(0, 2, 8),
        ValueError,
        "rope_2d: height and width must be positive, got 0 x 2",
    ),
    "of text": (
        lambda: rope_2d("2", 2, 8),  # type: ignore[arg-type]
        TypeError,
        "rope_2d: height must be a whole number, got str",
    ),
    "of a width that is true": (
        lambda: rope_2d(2, True, 8),
        TypeError,
        "rope_2d: width must be a whole number, got bool",
    ),
    "of a head_dim with a point": (
        lambda: rope_2d(2, 2, 8.0),  # type: ignore[arg-type]
        TypeError,
        "rope_2d: head_dim must be a whole number, got float",
    ),
    "without theta": (
        lambda: rope_2d(2, 2, 8, theta=None),  # type: ignore[arg-type]
        TypeError,
        "rope_2d: theta must be a number, got NoneType",
    ),
}


@pytest.mark.parametrize(("call", "error", "line"), BAD.values(), ids=BAD)
def test_bad_input(call, error, line) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == line
