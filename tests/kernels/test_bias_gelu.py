from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msf_kernels import bias_gelu
from numerics import DEVICE, assert_rounded_once, exactly, normal
from pairwise import pairwise

pytestmark = pytest.mark.operator("bias_gelu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Of x, and of the bias.
DTYPES = (
    *((torch.float64, FP32), (FP32, FP32)),
    *((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)),
)
# Odd D, N = 1 and batch 1 among them; rows of less than a block's width and of more, and slices
# that end in the middle of a step.
SHAPES = (2, 7, 64), (3, 1, 33), (1, 80, 128), (1, 3, 1), (2, 9, 1152), (1, 2, 4608)
# The reference is PyTorch's own GELU, which loses its tail and, from 1e13 on, all to an infinity.
kernels_only = pytest.mark.kernels
approximations = pytest.mark.parametrize("approximate", ["tanh", "none"])


@pairwise(shape=SHAPES, dtypes=DTYPES, approximate=("tanh", "none"), with_bias=(True, False))
def test_values_and_gradients(
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    approximate: str,
    with_bias: bool,
) -> None:
    (batch, tokens, channels), (dtype, other) = shape, dtypes
    x, bias = normal(batch, tokens, channels, dtype=dtype), normal(channels, dtype=other)
    inputs = [tensor.requires_grad_() for tensor in ((x, bias) if with_bias else (x,))]
    out, exact_inputs = bias_gelu(*inputs, approximate=approximate), exactly(*inputs)
    exact = F.gelu(sum(exact_inputs), approximate=approximate)
    assert out.dtype == dtype and out.is_contiguous()
    # The sum x + bias and some ten operations, whose errors add up as those of so many terms do. In
    # float64 PyTorch errs itself: its gradient has 1 - tanh^2 times up to 40.
    condition = 40 if dtype == torch.float64 else 1
    assert_rounded_once(out, exact, terms=10, condition=condition)

    grad = normal(*x.shape, dtype=dtype)
    got = torch.autograd.grad(out, inputs, grad)
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    for one, right, terms in zip(got, expected, (1, batch * tokens), strict=False):
        assert_rounded_once(one, right, terms=10 + terms, condition=condition)


@approximations
def test_the_bias_gradient_sums_what_is_not_rounded(approximate: str) -> None:
    x, bias = normal(4, 160, 24, dtype=BF16), normal(24, dtype=FP32)  # 40 slices of 16 rows
    inputs, grad = [x.requires_grad_(), bias.requires_grad_()], normal(4, 160, 24, dtype=BF16)
    out = bias_gelu(*inputs, approximate=approximate)
    exact = F.gelu(sum(exact_inputs := exactly(*inputs)), approximate=approximate)
    _, got = torch.autograd.grad(out, inputs, grad)
    _, expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    assert_rounded_once(got, expected, terms=4 * 160)


@approximations
@kernels_only
def test_the_negative_tail_keeps_its_relative_precision(approximate: str) -> None:
    """Where 1 + tanh and 1 + erf would be 0 in float32, but for errors of the exponent.

    An exponent of e = log(gelu / x) is off by e * eps, and so is the result's logarithm.
    """
    x = torch.linspace(-9, 3, 4001, dtype=FP32, device=DEVICE).view(1, 1, -1)
    got, exact = bias_gelu(x, approximate=approximate), exact_gelu(x, approximate)
    exponent = (exact / x.double()).log().abs()
    bound = (8 + 2 * exponent) * torch.finfo(FP32).eps * exact.abs()
    normal_numbers = exact.abs() > 1e-36  # GPUs take the others for 0
    assert ((got.double() - exact).abs() <= bound)[normal_numbers].all()


def exact_gelu(x: Tensor, approximate: str) -> Tensor:
    x = x.double()
    if approximate == "none":
        return x * torch.special.erfc(-x / 2**0.5) / 2
    return x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


@approximations
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", [torch.float64, FP32, BF16, FP16], ids=str)
@kernels_only
def test_large_numbers(dtype: torch.dtype, approximate: str) -> None:
    """From some 10 on gelu is x or 0, and its derivative 1 or 0."""
    sizes = [14.0, 16.0, 100.0, 6e4, *([1e10, 1e20, 3e38] if dtype != FP16 else [])]
    x = torch.tensor([[[*sizes, *(-size for size in sizes)]]], dtype=dtype, device=DEVICE)
    x.requires_grad_()
    out = bias_gelu(x, approximate=approximate)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    tiny = 1e-36  # the least that is not 0 is that of -14
    torch.testing.assert_close(out, x.clamp(min=0), rtol=0, atol=tiny)
    torch.testing.assert_close(grad, (x > 0).to(dtype), rtol=0, atol=tiny)


@approximations
def test_nan_stays_nan(approximate: str) -> None:
    x = torch.tensor([[[torch.nan, 1.0]]], device=DEVICE, requires_grad=True)
    bias = torch.zeros(2, device=DEVICE, requires_grad=True)
    out = bias_gelu(x, bias, approximate=approximate)
    grads = torch.autograd.grad(out, (x, bias), torch.ones_like(out))
    for result in (out, *grads):
        assert result.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("channels", [24, 33, 1032])
def test_misaligned_and_strided_tensors(channels: int) -> None:
    def misaligned(*shape: int) -> Tensor:
        whole = normal(*shape[:-1], shape[-1] + 2, dtype=BF16)[..., 1:-1]
        assert whole.data_ptr() % 16
        return whole.requires_grad_()

    inputs = misaligned(2, 5, channels), misaligned(channels)
    plain = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out, expected = bias_gelu(*inputs), bias_gelu(*plain)
    grad = misaligned(2, 5, channels).detach()
    got = torch.autograd.grad(out, inputs, grad)
    right = torch.autograd.grad(expected, plain, grad.contiguous())
    assert torch.equal(out, expected) and all(map(torch.equal, got, right))


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24), (2, 5, 0)], ids=str)
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    inputs = [normal(*shape).requires_grad_(), normal(shape[2], dtype=FP32).requires_grad_()]
    out = bias_gelu(*inputs)
    for grad, tensor in zip(torch.autograd.grad(out, inputs, out.detach()), inputs, strict=True):
        assert grad.shape == tensor.shape and not grad.any()


x, bias = normal(2, 3, 8), normal(8)
BAD = {
    "x is no tensor": (
        lambda: bias_gelu(1.0, bias),
        TypeError,
        "bias_gelu: x must be a tensor, got float",
    ),
    "integers": (
        lambda: bias_gelu(x.long()),
        TypeError,
        "bias_gelu: x must be float64, float32, bfloat16 or float16, got int64",
    ),
    "x is 2-D": (
        lambda: bias_gelu(x[0], bias),
        ValueError,
        "bias_gelu: x must be (B, N, D), got (3, 8)",
    ),
    "bias has another D": (
        lambda: bias_gelu(x, bias[:4]),
        ValueError,
        "bias_gelu: bias must be (D,) = (8,), got (4,)",
    ),
    "bias is 2-D": (
        lambda: bias_gelu(x, bias[None]),
        ValueError,
        "bias_gelu: bias must be (D,) = (8,), got (1, 8)",
    ),
    "bias of another dtype": (
        lambda: bias_gelu(x.half(), bias.bfloat16()),
        TypeError,
        "bias_gelu: bias must be float16 or float32, got bfloat16",
    ),
    "another approximation": (
        lambda: bias_gelu(x, bias, approximate="erf"),
        ValueError,
        "bias_gelu: approximate must be one of tanh, none, got 'erf'",
    ),
    "another device": (
        lambda: bias_gelu(x, bias.to("meta")),
        ValueError,
        f"bias_gelu: bias must be on the device of x, {x.device}, got meta",
    ),
}


@pytest.mark.parametrize(("call", "error", "line"), BAD.values(), ids=BAD)
def test_bad_input(call, error, line) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == line
