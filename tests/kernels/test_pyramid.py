from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msf_kernels import pyramid_merge, pyramid_split
from numerics import DEVICE, assert_rounded_once, normal

OP = "pyramid_split"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
modes = pytest.mark.parametrize("mode", ["nearest", "bilinear"])
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def eager_upsample(x: Tensor, mode: str) -> Tensor:
    corners = None if mode == "nearest" else False
    return F.interpolate(x, scale_factor=2, mode=mode, align_corners=corners)


def exactly(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def pixels(*shape: int) -> Tensor:
    """8-bit images as float32 in [-1, 1): multiples of 1/128, which pooling keeps exact."""
    return torch.randint(-128, 128, shape, device=DEVICE) / 128


@modes
@dtypes
@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 1, 2, 2), (2, 4, 2, 10)], ids=str)
def test_split(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> None:
    x = normal(*shape, dtype=dtype).requires_grad_()
    base, residual = pyramid_split(x, mode=mode)
    (exact_x,) = exactly(x)
    exact_base = F.avg_pool2d(exact_x, 2)
    assert_rounded_once(base, exact_base, terms=4)
    # The residual is that of the base as rounded.
    rounded = exact_base + (base.double() - exact_base).detach()
    exact_residual = exact_x - eager_upsample(rounded, mode)
    assert_rounded_once(residual, exact_residual, terms=4)

    grads = [normal(*t.shape, dtype=dtype) for t in (base, residual)]
    (got,) = torch.autograd.grad((base, residual), x, grads)
    (expected,) = torch.autograd.grad(
        (exact_base, exact_residual), exact_x, [grad.double() for grad in grads]
    )
    assert_rounded_once(got, expected, terms=16)


@modes
@dtypes
@pytest.mark.parametrize("with_mean", [False, True], ids=["", "mean"])
@pytest.mark.parametrize("with_std", [False, True], ids=["", "std"])
def test_merge(dtype: torch.dtype, mode: str, with_mean: bool, with_std: bool) -> None:
    base = normal(2, 3, 4, 5, dtype=dtype).requires_grad_()
    residual = normal(2, 3, 8, 10, dtype=dtype).requires_grad_()
    mean = normal(3).float() if with_mean else None
    std = (0.1 + normal(3).abs()).float() if with_std else None
    x = pyramid_merge(base, residual, mode=mode, mean=mean, std=std)
    exact_base, exact_residual = exactly(base, residual)
    detail = exact_residual
    if std is not None:
        detail = detail * std.double()[:, None, None]
    if mean is not None:
        detail = detail + mean.double()[:, None, None]
    exact = eager_upsample(exact_base, mode) + detail
    assert_rounded_once(x, exact, terms=4)

    grad = normal(*x.shape, dtype=dtype)
    got = torch.autograd.grad(x, (base, residual), grad)
    expected = torch.autograd.grad(exact, (exact_base, exact_residual), grad.double())
    for one, right in zip(got, expected, strict=True):
        assert_rounded_once(one, right, terms=16)


@modes
def test_merge_inverts_split_bit_for_bit_on_pixels(mode: str) -> None:
    x = pixels(2, 3, 16, 12)
    assert torch.equal(pyramid_merge(*pyramid_split(x, mode=mode), mode=mode), x)


@modes
@dtypes
def test_merge_inverts_split_but_for_the_rounding_of_the_residual(
    dtype: torch.dtype, mode: str
) -> None:
    x = normal(2, 3, 16, 12, dtype=dtype)
    base, residual = pyramid_split(x, mode=mode)
    # Half a last bit of the residual, half a last bit of the sum, float32 inside.
    eps = torch.finfo(dtype).eps
    bound = eps * (residual.abs().max() + x.abs().max()).double()
    assert ((pyramid_merge(base, residual, mode=mode) - x).double().abs() <= bound).all()


def test_nearest_residual_pools_to_zero_and_the_merge_pools_to_the_base() -> None:
    x = pixels(2, 3, 16, 12)
    base, residual = pyramid_split(x)
    assert not F.avg_pool2d(residual, 2).any() and residual.any()
    assert torch.equal(F.avg_pool2d(pyramid_merge(base, residual), 2), base)


def test_channels_last_input() -> None:
    x = normal(2, 3, 8, 8, dtype=torch.float32)
    for one, other in zip(
        pyramid_split(x.to(memory_format=torch.channels_last)), pyramid_split(x), strict=True
    ):
        assert torch.equal(one, other)


base, residual, row = normal(2, 3, 2, 4), normal(2, 3, 4, 8), normal(3)
BAD = {
    "x is 3-D": (
        lambda: pyramid_split(residual[0]),
        ValueError,
        "pyramid_split: x must be (B, C, H, W), got (3, 4, 8)",
    ),
    "odd height": (
        lambda: pyramid_split(residual[:, :, :3]),
        ValueError,
        "pyramid_split: height and width must be even, got 3 x 8",
    ),
    "empty image": (
        lambda: pyramid_split(residual[:, :, :0]),
        ValueError,
        "pyramid_split: height and width must be even, got 0 x 8",
    ),
    "unknown mode": (
        lambda: pyramid_split(residual, mode="bicubic"),
        ValueError,
        "pyramid_split: mode must be one of nearest, bilinear, got 'bicubic'",
    ),
    "8-bit images": (
        lambda: pyramid_split(residual.byte()),
        TypeError,
        "pyramid_split: x must be float64, float32, bfloat16 or float16, got uint8",
    ),
    "residual of the wrong size": (
        lambda: pyramid_merge(base, base),
        ValueError,
        "pyramid_merge: residual must be (B, C, H, W) = (2, 3, 4, 8), got (2, 3, 2, 4)",
    ),
    "residual of another dtype": (
        lambda: pyramid_merge(base, residual.float()),
        TypeError,
        "pyramid_merge: residual must be float64, got float32",
    ),
    "mean of another length": (
        lambda: pyramid_merge(base, residual, mean=row[:2]),
        ValueError,
        "pyramid_merge: mean must be (C,) = (3,), got (2,)",
    ),
    "std that wants a gradient": (
        lambda: pyramid_merge(base, residual, std=row.clone().requires_grad_()),
        ValueError,
        "pyramid_merge: std gets no gradient, pass std.detach()",
    ),
}


@pytest.mark.parametrize(("call", "error", "line"), BAD.values(), ids=BAD)
def test_bad_input(call, error, line) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == line
