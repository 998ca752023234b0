from __future__ import annotations

import pytest
import torch

import msf_kernels
from msf_kernels import flow_interpolate
from numerics import DEVICE, assert_rounded_once, exactly, normal

pytestmark = pytest.mark.operator("flow_interpolate")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
shapes = pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 7, 5), (3,)], ids=str)
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])


@shapes
@dtypes
def test_interpolate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    data, noise = (normal(*shape, dtype=dtype).requires_grad_() for _ in range(2))
    t = torch.rand(shape[0], device=DEVICE)
    outputs, inputs = flow_interpolate(data, noise, t), exactly(data, noise)
    weight = t.double().view(-1, *[1] * (len(shape) - 1))
    exact = torch.lerp(inputs[1], inputs[0], weight), inputs[0] - inputs[1]
    grads = [normal(*shape, dtype=dtype) for _ in range(2)]
    got = torch.autograd.grad(outputs, (data, noise), grads)
    expected = torch.autograd.grad(exact, inputs, [grad.double() for grad in grads])
    for one, right in zip((*outputs, *got), (*exact, *expected), strict=True):
        assert_rounded_once(one, right)


@dtypes
def test_interpolate_is_exact_at_both_ends(dtype: torch.dtype) -> None:
    data, noise = normal(2, 5, dtype=dtype), normal(2, 5, dtype=dtype)
    x_t, _ = flow_interpolate(data, noise, torch.tensor([0.0, 1.0], device=DEVICE))
    assert torch.equal(x_t, torch.stack((noise[0], data[1])))


@pytest.mark.parametrize("size", [64, 63, 1], ids=str)
@dtypes
def test_interpolate_agrees_with_the_reference_bit_for_bit(size: int, dtype: torch.dtype) -> None:
    data, noise = normal(2, 3, size, dtype=dtype)
    t = torch.rand(3, device=DEVICE)
    got = flow_interpolate(data, noise, t)
    with msf_kernels.backend("reference"):
        assert all(map(torch.equal, got, flow_interpolate(data, noise, t)))


image, t, scalar = normal(2, 3, 4, 4), torch.rand(2, device=DEVICE), torch.ones((), device=DEVICE)
BAD = {
    "noise of another shape": (
        lambda: flow_interpolate(image, image[:1], t),
        ValueError,
        "flow_interpolate: noise must be data.shape = (2, 3, 4, 4), got (1, 3, 4, 4)",
    ),
    "noise of another dtype": (
        lambda: flow_interpolate(image, image.half(), t),
        TypeError,
        "flow_interpolate: noise must be float64, got float16",
    ),
    "t is a float": (
        lambda: flow_interpolate(image, image, 0.5),
        TypeError,
        "flow_interpolate: t must be a tensor, got float",
    ),
    "t of another length": (
        lambda: flow_interpolate(image, image, t[:1]),
        ValueError,
        "flow_interpolate: t must be (B,) = (2,), got (1,)",
    ),
    "t wants a gradient": (
        lambda: flow_interpolate(image, image, t.clone().requires_grad_()),
        ValueError,
        "flow_interpolate: t gets no gradient, pass t.detach()",
    ),
    "no batch": (
        lambda: flow_interpolate(scalar, scalar, t),
        ValueError,
        "flow_interpolate: data must be (B, ...), got ()",
    ),
}


@pytest.mark.parametrize(("call", "error", "line"), BAD.values(), ids=BAD)
def test_bad_input(call, error, line) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == line
