from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msf_kernels import merge_tokens
from numerics import assert_rounded_once, normal

pytestmark = pytest.mark.operator("merge_tokens")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

dtypes = pytest.mark.parametrize(
    ("dtype", "other"),
    [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP16)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
# Of (B, h, w, D): one with 16-byte vectors, the others without, batch 1 and one token among them.
shapes = pytest.mark.parametrize(
    "shape",
    [(2, 2, 3, 16), (3, 1, 2, 5), (1, 1, 1, 12)],
    ids=lambda shape: "x".join(map(str, shape)),
)


def pixel_shuffle(base: Tensor, height: int, width: int) -> Tensor:
    """The same by way of images and PyTorch's own pixel shuffle."""
    channels = base.shape[2] // 4
    image = base.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    # PixelShuffle wants the channels as (D, row, column).
    image = image.unflatten(1, (4, channels)).transpose(1, 2).flatten(1, 2)
    return F.pixel_shuffle(image, 2).flatten(2).transpose(1, 2)


@shapes
@dtypes
@pytest.mark.parametrize("positioned", [True, False], ids=["position", ""])
def test_merge(
    shape: tuple[int, int, int, int], dtype: torch.dtype, other: torch.dtype, positioned: bool
) -> None:
    batch, height, width, channels = shape
    tokens = height * width
    inputs = [
        normal(batch, tokens, 4 * channels, dtype=dtype).requires_grad_(),
        normal(batch, 4 * tokens, channels, dtype=dtype).requires_grad_(),
    ]
    if positioned:
        inputs.append(normal(4 * tokens, channels, dtype=other).requires_grad_())
    x = merge_tokens(*inputs, grid=(height, width))

    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    base, *added = exact_inputs
    exact = pixel_shuffle(base, height, width) + sum(added)
    assert_rounded_once(x, exact, terms=3)
    grad = normal(*x.shape, dtype=dtype)
    got = torch.autograd.grad(x, inputs, grad)
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    for one, right in zip(got, expected, strict=True):
        assert_rounded_once(one, right, terms=batch)


def test_unaligned_tokens() -> None:
    """Contiguous, but not at an address that 16-byte accesses can have."""
    storage = normal(1 + 2 * 4 * 32, dtype=BF16)
    base, skip = storage[1:].view(2, 4, 32), normal(2, 16, 8, dtype=BF16)
    expected = merge_tokens(base.clone(), skip, grid=(2, 2))
    assert torch.equal(merge_tokens(base, skip, grid=(2, 2)), expected)


base, skip, position = normal(2, 6, 20), normal(2, 24, 5), normal(24, 5)
BAD = {
    "grid of another size": (
        lambda: merge_tokens(base, skip, grid=(2, 2)),
        ValueError,
        "merge_tokens: base must be (B, h * w, 4 * D) with (h, w) = grid = (2, 2), got (2, 6, 20)",
    ),
    "negative grid": (
        lambda: merge_tokens(base, skip, grid=(-2, -3)),
        ValueError,
        "merge_tokens: grid must be (h, w), positive whole numbers, got (-2, -3)",
    ),
    "grid of another kind": (
        lambda: merge_tokens(base, skip, grid=2.0),
        ValueError,
        "merge_tokens: grid must be (h, w), positive whole numbers, got 2.0",
    ),
    "channels that are no multiple of 4": (
        lambda: merge_tokens(base[..., :18], skip, grid=(2, 3)),
        ValueError,
        "merge_tokens: base must be (B, h * w, 4 * D) with (h, w) = grid = (2, 3), got (2, 6, 18)",
    ),
    "skip on the coarse grid": (
        lambda: merge_tokens(base, skip[:, :6], grid=(2, 3)),
        ValueError,
        "merge_tokens: skip must be (B, 4 * h * w, D) = (2, 24, 5), got (2, 6, 5)",
    ),
    "position with a batch": (
        lambda: merge_tokens(base, skip, skip, grid=(2, 3)),
        ValueError,
        "merge_tokens: position must be (4 * h * w, D) = (24, 5), got (2, 24, 5)",
    ),
    "skip of another dtype": (
        lambda: merge_tokens(base, skip.float(), grid=(2, 3)),
        TypeError,
        "merge_tokens: skip must be float64, got float32",
    ),
    "position of the other 16-bit dtype": (
        lambda: merge_tokens(base.half(), skip.half(), position.bfloat16(), grid=(2, 3)),
        TypeError,
        "merge_tokens: dtypes must agree, or be one 16-bit dtype and float32, got base float16, "
        "position bfloat16",
    ),
}


@pytest.mark.parametrize(("call", "error", "line"), BAD.values(), ids=BAD)
def test_bad_input(call, error, line) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == line
