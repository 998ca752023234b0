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
@pytest.mark.parametrize("condition_tokens", [0, 1, 3])
def test_merge(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    other: torch.dtype,
    positioned: bool,
    condition_tokens: int,
) -> None:
    batch, height, width, channels = shape
    tokens = height * width
    sizes = {"base": (batch, tokens, 4 * channels), "skip": (batch, 4 * tokens, channels)}
    if condition_tokens:
        sizes["condition"] = (batch, condition_tokens, channels)
    inputs = {name: normal(*size, dtype=dtype) for name, size in sizes.items()}
    if positioned:
        inputs["position"] = normal(4 * tokens, channels, dtype=other)
    for tensor in inputs.values():
        tensor.requires_grad_()
    x = merge_tokens(**inputs, grid=(height, width))

    exact_inputs = {
        name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()
    }
    added = (exact_inputs[name] for name in ("skip", "position") if name in inputs)
    exact = pixel_shuffle(exact_inputs["base"], height, width) + sum(added)
    if condition_tokens:
        exact = torch.cat((exact_inputs["condition"], exact), 1)
    assert_rounded_once(x, exact, terms=3)
    grad = normal(*x.shape, dtype=dtype)
    got = torch.autograd.grad(x, list(inputs.values()), grad)
    expected = torch.autograd.grad(exact, list(exact_inputs.values()), grad.double())
    for one, right in zip(got, expected, strict=True):
        assert_rounded_once(one, right, terms=batch)


@pytest.mark.parametrize("channels", [5, 8])
def test_a_condition_changes_no_bit_of_what_is_merged(channels: int) -> None:
    base, skip = normal(2, 6, 4 * channels, dtype=BF16), normal(2, 24, channels, dtype=BF16)
    position = normal(24, channels, dtype=FP32)
    alone = merge_tokens(base, skip, position, grid=(2, 3))
    none = base.new_empty(2, 0, channels)
    assert torch.equal(merge_tokens(base, skip, position, none, grid=(2, 3)), alone)
    condition = normal(2, 3, channels, dtype=BF16)
    x = merge_tokens(base, skip, position, condition, grid=(2, 3))
    assert torch.equal(x, torch.cat((condition, alone), 1))


@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("condition_tokens", [1, 3])
def test_parts_of_one_sequence_are_read_where_they_lie(
    channels: int, condition_tokens: int, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MPDiT has them after a layer that takes condition and base together."""
    refined = normal(2, condition_tokens + 24, channels, dtype=BF16)
    skip = normal(2, 24, channels, dtype=BF16)
    condition, base = refined[:, :condition_tokens], refined[:, condition_tokens:]
    base = base.view(2, 6, 4 * channels)
    expected = merge_tokens(base.clone(), skip, None, condition.clone(), grid=(2, 3))
    # Their copies would come from here, and the reference makes others.
    if backend_name != "reference":
        monkeypatch.setattr(Tensor, "contiguous", lambda x: pytest.fail("a copy"))
    with torch.no_grad():
        got = merge_tokens(base, skip, None, condition, grid=(2, 3))
    monkeypatch.undo()
    assert torch.equal(got, expected)


def test_gradients_of_parts_of_a_sequence() -> None:
    """Condition and base that lie in one tensor, and a gradient that is a part of another."""
    refined, skip = normal(2, 3 + 24, 8).requires_grad_(), normal(2, 24, 8).requires_grad_()
    x = merge_tokens(refined[:, 3:].view(2, 6, 32), skip, None, refined[:, :3], grid=(2, 3))
    grad = normal(2, 40, 8)[:, 5:32]
    got = torch.autograd.grad(x, (refined, skip), grad)
    exact = pixel_shuffle(refined[:, 3:].view(2, 6, 32), 2, 3) + skip
    exact = torch.cat((refined[:, :3], exact), 1)
    assert all(map(torch.equal, got, torch.autograd.grad(exact, (refined, skip), grad)))


def test_layers_between_shuffle_and_skip_can_come_before_the_shuffle() -> None:
    """MPDiT's: what it does to each token alone, it does to those of the class too."""
    base, skip, position = normal(2, 6, 32), normal(2, 24, 8), normal(24, 8)
    condition, weight = normal(2, 3, 8), normal(8, 8)

    def refined(x: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), eps=1e-6) @ weight

    fine = F.gelu(pixel_shuffle(base, 2, 3), approximate="tanh")
    x = refined(torch.cat((condition, fine), 1))
    exact = torch.cat((x[:, :3], x[:, 3:] + skip + position), 1)
    coarse = F.gelu(base.view(2, 24, 8), approximate="tanh")
    x = refined(torch.cat((condition, coarse), 1))
    got = merge_tokens(x[:, 3:].view(2, 6, 32), skip, position, x[:, :3], grid=(2, 3))
    torch.testing.assert_close(got, exact)


def test_unaligned_tokens() -> None:
    """Contiguous, but not at an address that 16-byte accesses can have."""
    storage = normal(1 + 2 * 4 * 32, dtype=BF16)
    base, skip = storage[1:].view(2, 4, 32), normal(2, 16, 8, dtype=BF16)
    expected = merge_tokens(base.clone(), skip, grid=(2, 2))
    assert torch.equal(merge_tokens(base, skip, grid=(2, 2)), expected)


def test_unaligned_samples() -> None:
    """Aligned at the first sample, but not at the second."""
    storage = normal(2 * (4 * 32 + 1), dtype=BF16)
    base, skip = storage.view(2, -1)[:, :-1].view(2, 4, 32), normal(2, 16, 8, dtype=BF16)
    expected = merge_tokens(base.clone(), skip, grid=(2, 2))
    assert torch.equal(merge_tokens(base, skip, grid=(2, 2)), expected)


base, skip, position = normal(2, 6, 20), normal(2, 24, 5), normal(24, 5)
condition = normal(2, 3, 5)
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
    "condition of another width": (
        lambda: merge_tokens(base, skip, None, condition[..., :4], grid=(2, 3)),
        ValueError,
        "merge_tokens: condition must be (B, C, D) = (2, 3, 5), got (2, 3, 4)",
    ),
    "condition of another batch": (
        lambda: merge_tokens(base, skip, None, condition[:1], grid=(2, 3)),
        ValueError,
        "merge_tokens: condition must be (B, C, D) = (2, 3, 5), got (1, 3, 5)",
    ),
    "condition that is one token": (
        lambda: merge_tokens(base, skip, None, condition[:, 0], grid=(2, 3)),
        ValueError,
        "merge_tokens: condition must be (B, C, D), got (2, 5)",
    ),
    "condition of another dtype": (
        lambda: merge_tokens(base, skip, None, condition.float(), grid=(2, 3)),
        TypeError,
        "merge_tokens: condition must be float64, got float32",
    ),
    "condition of another kind": (
        lambda: merge_tokens(base, skip, None, 3, grid=(2, 3)),
        TypeError,
        "merge_tokens: condition must be a tensor, got int",
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
