from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import msf_kernels
from msf_kernels import pyramid_merge, pyramid_split
from numerics import DEVICE, assert_rounded_once, exactly, normal

pytestmark = pytest.mark.operator("pyramid_split")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
modes = pytest.mark.parametrize("mode", ["nearest", "bilinear"])
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def eager_upsample(x: Tensor, mode: str) -> Tensor:
    corners = None if mode == "nearest" else False
    return F.interpolate(x, scale_factor=2, mode=mode, align_corners=corners)


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


@modes
@dtypes
def test_standardised_split(dtype: torch.dtype, mode: str) -> None:
    x = normal(2, 3, 8, 12, dtype=dtype).requires_grad_()
    mean, std = normal(3).float(), (0.5 + normal(3).abs()).float()
    base, residual = pyramid_split(x, mode=mode, mean=mean, std=std)
    (exact_x,) = exactly(x)
    detail = exact_x - eager_upsample(base.detach().double(), mode)
    exact = (detail - mean.double()[:, None, None]) / std.double()[:, None, None]
    # The subtractions before the division may cancel to a tenth of their operands.
    assert_rounded_once(residual, exact, terms=4, condition=10)

    grad = normal(*x.shape, dtype=dtype)
    (got,) = torch.autograd.grad(residual, x, grad)
    scaled = grad.double() / std.double()[:, None, None]
    detail = exact_x - eager_upsample(F.avg_pool2d(exact_x, 2), mode)
    (expected,) = torch.autograd.grad(detail, exact_x, scaled)
    assert_rounded_once(got, expected, terms=16)


@modes
def test_zeros_keep_their_sign(mode: str) -> None:
    base, residual = (
        -torch.zeros(1, 1, 2, 2, device=DEVICE),
        -torch.zeros(1, 1, 4, 4, device=DEVICE),
    )
    assert pyramid_merge(base, residual, mode=mode).signbit().all()


@modes
def test_merge_inverts_a_standardised_split(mode: str) -> None:
    x = normal(2, 3, 8, 12, dtype=torch.float32)
    statistics = {"mean": normal(3).float(), "std": (0.5 + normal(3).abs()).float()}
    base, residual = pyramid_split(x, mode=mode, **statistics)
    merged = pyramid_merge(base, residual, mode=mode, **statistics)
    # Six operations, none on numbers of more than 16.
    assert (merged - x).abs().max() <= 6 * 16 * torch.finfo(torch.float32).eps


@modes
@dtypes
def test_clamped_merge(dtype: torch.dtype, mode: str) -> None:
    base, residual = normal(2, 3, 4, 6, dtype=dtype), normal(2, 3, 8, 12, dtype=dtype)
    residual[0, 0, 0, 0] = torch.nan
    free = pyramid_merge(base, residual, mode=mode)
    clamped = pyramid_merge(base, residual, mode=mode, clamp=(-0.5, 1.0))
    assert torch.equal(clamped.nan_to_num(7.0), free.clamp(-0.5, 1.0).nan_to_num(7.0))
    assert clamped[0, 0, 0, 0].isnan() and (clamped == 1.0).any()


@modes
@dtypes
@pytest.mark.parametrize("channels", [3, 16], ids=["3", "16"])
def test_channels_last(dtype: torch.dtype, mode: str, channels: int) -> None:
    """Images in channels-last give the same bits, gradients too, in channels-last."""
    x = normal(2, channels, 8, 16, dtype=dtype)
    plain = x.clone().requires_grad_()
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    outputs, expected = pyramid_split(last, mode=mode), pyramid_split(plain, mode=mode)
    cotangents = [normal(*output.shape, dtype=dtype) for output in expected]
    for one, right in zip(outputs, expected, strict=True):
        assert torch.equal(one, right) and one.is_contiguous(memory_format=torch.channels_last)
    (got,) = torch.autograd.grad(outputs, last, cotangents)
    (right,) = torch.autograd.grad(expected, plain, cotangents)
    assert torch.equal(got, right)
    merged, right = pyramid_merge(*outputs, mode=mode), pyramid_merge(*expected, mode=mode)
    assert torch.equal(merged, right)
    assert merged.is_contiguous(memory_format=torch.channels_last)


@modes
def test_backends_agree_bit_for_bit(mode: str) -> None:
    """At sizes with 16-byte vectors, with edges, and with more planes than one block holds."""
    for shape in [(2, 3, 16, 32), (1, 1, 2, 2), (70, 5, 4, 6)]:
        x = normal(*shape, dtype=torch.float32)
        outputs = pyramid_split(x, mode=mode)
        merged = pyramid_merge(*outputs, mode=mode)
        with msf_kernels.backend("reference"):
            expected = pyramid_split(x, mode=mode)
            assert all(map(torch.equal, outputs, expected))
            assert torch.equal(merged, pyramid_merge(*expected, mode=mode))


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
        "pyramid_split: height and width must be even and positive, got 3 x 8",
    ),
    "empty image": (
        lambda: pyramid_split(residual[:, :, :0]),
        ValueError,
        "pyramid_split: height and width must be even and positive, got 0 x 8",
    ),
    "unknown mode": (
        lambda: pyramid_split(residual, mode="bicubic"),
        ValueError,
        "pyramid_split: mode must be one of nearest, bilinear, got 'bicubic'",
    ),
    "mode that is a tensor": (
        lambda: pyramid_split(residual, mode=residual),
        ValueError,
        "pyramid_split: mode must be one of nearest, bilinear, got Tensor",
    ),
    "sparse images": (
        lambda: pyramid_split(residual.to_sparse()),
        TypeError,
        "pyramid_split: x must be a dense tensor, got sparse_coo",
    ),
    "nested images": (
        lambda: pyramid_split(torch.nested.nested_tensor([residual[0]])),
        TypeError,
        "pyramid_split: x must be a dense tensor, got nested",
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
    "bounds the wrong way round": (
        lambda: pyramid_merge(base, residual, clamp=(1.0, -1.0)),
        ValueError,
        "pyramid_merge: clamp must be (low, high) with low <= high, got (1.0, -1.0)",
    ),
    "a bound beyond all floats": (
        lambda: pyramid_merge(base, residual, clamp=(0, 10**400)),
        ValueError,
        "pyramid_merge: clamp must be in the range of a float",
    ),
    "one bound": (
        lambda: pyramid_merge(base, residual, clamp=(1.0,)),
        ValueError,
        "pyramid_merge: clamp must be (low, high) with low <= high, got (1.0,)",
    ),
    "a gradient through the clamp": (
        lambda: pyramid_merge(base.clone().requires_grad_(), residual, clamp=(-1.0, 1.0)),
        ValueError,
        "pyramid_merge with clamp: base gets no gradient, pass base.detach()",
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
