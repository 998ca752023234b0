from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msf_kernels import flow_interpolate, guided_euler_step
from numerics import DEVICE, assert_rounded_once, normal

OP = "flow_interpolate"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
shapes = pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 7, 5), (3,)], ids=str)
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])


def exactly(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


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


@shapes
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("table", [True, False], ids=["table", "floats"])
@pytest.mark.parametrize("velocity", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_euler_step(
    shape: tuple[int, ...], velocity: torch.dtype, guided: bool, table: bool
) -> None:
    tensors = [normal(*shape, dtype=FP32)]
    tensors += [normal(*shape, dtype=velocity) for _ in range(1 + guided)]
    inputs = [tensor.requires_grad_() for tensor in tensors]
    scalars = torch.tensor([3.5, 0.0625], device=DEVICE) if table else (3.5, 0.0625)
    x = guided_euler_step(inputs[0], inputs[1], inputs[2] if guided else None, *scalars)

    exact_inputs = exactly(*inputs)
    v = exact_inputs[1]
    if guided:
        v = 3.5 * v - 2.5 * exact_inputs[2]
    exact = exact_inputs[0] + 0.0625 * v
    grad = normal(*shape, dtype=FP32)
    got = torch.autograd.grad(x, inputs, grad)
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    for one, right in zip((x, *got), (exact, *expected), strict=True):
        assert_rounded_once(one, right)


def test_floats_and_a_table_give_the_same_bits() -> None:
    x, v_cond, v_uncond = normal(3, 2, 5, dtype=FP32)
    scale, dt = torch.tensor([1.7, 0.3], device=DEVICE)
    step = guided_euler_step(x, v_cond, v_uncond, 1.7, 0.3)
    assert torch.equal(step, guided_euler_step(x, v_cond, v_uncond, scale, dt))


def test_new_floats_do_not_recompile_for_ever() -> None:
    torch.compiler.reset()
    compiled = torch.compile(guided_euler_step, fullgraph=True, backend="aot_eager")
    x, v_cond, v_uncond = normal(3, 2, 5, dtype=FP32)
    for step in range(20):  # more than the limit of 8 recompilations, an error under fullgraph
        scalars = 1.0 + step / 7, 1 / (step + 3)
        expected = guided_euler_step(x, v_cond, v_uncond, *scalars)
        assert torch.equal(compiled(x, v_cond, v_uncond, *scalars), expected)


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
    "velocity of another shape": (
        lambda: guided_euler_step(image, image, image[:1], 2.0, 0.1),
        ValueError,
        "guided_euler_step: v_uncond must be x.shape = (2, 3, 4, 4), got (1, 3, 4, 4)",
    ),
    "one scale per sample": (
        lambda: guided_euler_step(image, image, image, t, 0.1),
        ValueError,
        "guided_euler_step: guidance_scale must be a float or a 0-dimensional tensor, got (2,)",
    ),
    "dt is text": (
        lambda: guided_euler_step(image, image, None, 1.0, "0.1"),
        TypeError,
        "guided_euler_step: dt must be a float or a tensor, got str",
    ),
    "dt wants a gradient": (
        lambda: guided_euler_step(image, image, None, 1.0, scalar.clone().requires_grad_()),
        ValueError,
        "guided_euler_step: dt gets no gradient, pass dt.detach()",
    ),
}


@pytest.mark.parametrize(("call", "error", "line"), BAD.values(), ids=BAD)
def test_bad_input(call, error, line) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == line
