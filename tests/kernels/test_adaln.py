from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

from msf_kernels import adaln_modulate, gate_residual, gate_residual_adaln
from numerics import assert_rounded_once, exactly, normal
from pairwise import pairwise

from .adaln import BF16, DTYPES, FP32, NORMS, eager_adaln, eager_gate, modulation

pytestmark = pytest.mark.operator("gate_residual_adaln")
MODULATIONS = ("gate", "shift", "scale")
# Batch, rows of the modulation, N, D. Odd D, N = 1 and batch 1 among them; (1, D) modulation of a
# batch; rows of every length that the kernels tell apart.
SHAPES = (
    (2, 2, 7, 64),
    (3, 3, 1, 33),
    (1, 1, 80, 128),
    (3, 1, 19, 48),
    (2, 2, 5, 1152),
    (1, 1, 2, 4096),
    (1, 1, 2, 8192),
)
# Of y: in its dtype, or in float32 as a parameter is under autocast; None for no bias.
BIASES = None, "as y", "fp32"


def eager_pair(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    y_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    x_out = eager_gate(x, y, gate, y_bias)
    return x_out, eager_adaln(x_out, shift, scale)


def last_output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[-1]


@pairwise(shape=SHAPES, dtypes=DTYPES, norm=tuple(NORMS))
def test_adaln_modulate(
    shape: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype], norm: str
) -> None:
    (batch, rows, tokens, channels), (dtype, other) = shape, dtypes
    x = normal(batch, tokens, channels, dtype=dtype).requires_grad_()
    shift, scale, _ = modulation(rows, channels, other)
    inputs, grad = (x, shift, scale), normal(*x.shape, dtype=dtype)
    y, exact_inputs = adaln_modulate(*inputs, norm=norm), exactly(*inputs)
    exact = eager_adaln(*exact_inputs, norm=norm)
    assert_rounded_once(y, exact, terms=channels)

    got = torch.autograd.grad(y, inputs, grad)
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    for one, right, terms in zip(got, expected, (channels, *[batch * tokens] * 2), strict=True):
        assert_rounded_once(one, right, terms=terms)


def bias_of(y: Tensor, bias: str | None) -> list[Tensor]:
    if bias is None:
        return []
    dtype = y.dtype if bias == "as y" else FP32
    return [normal(y.shape[-1], dtype=dtype).requires_grad_()]


def with_bias(
    op: Callable[..., Any], inputs: Sequence[Tensor], bias: str | None, **options: str
) -> Any:
    if bias is None:
        return op(*inputs, **options)
    return op(*inputs[:-1], y_bias=inputs[-1], **options)


@pairwise(shape=SHAPES, dtypes=DTYPES, bias=BIASES)
def test_gate_residual(
    shape: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    bias: str | None,
) -> None:
    (batch, rows, tokens, channels), (dtype, other) = shape, dtypes
    x = normal(batch, tokens, channels, dtype=dtype).requires_grad_()
    y = normal(batch, tokens, channels, dtype=other).requires_grad_()
    gate, *_ = modulation(rows, channels, other)
    inputs, grad = (x, y, gate, *bias_of(y, bias)), normal(*x.shape, dtype=dtype)
    out, exact_inputs = with_bias(gate_residual, inputs, bias), exactly(*inputs)
    exact = eager_gate(*exact_inputs)
    assert_rounded_once(out, exact)

    got = torch.autograd.grad(out, inputs, grad)
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    for one, right in zip(got, expected, strict=True):
        assert_rounded_once(one, right, terms=batch * tokens)


@pairwise(shape=SHAPES, dtypes=DTYPES, bias=BIASES, norm=tuple(NORMS))
def test_gate_residual_adaln(
    shape: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    bias: str | None,
    norm: str,
) -> None:
    (batch, rows, tokens, channels), (dtype, other) = shape, dtypes
    x = normal(batch, tokens, channels, dtype=dtype).requires_grad_()
    y = normal(batch, tokens, channels, dtype=other).requires_grad_()
    inputs = (x, y, *modulation(rows, channels, other), *bias_of(y, bias))
    grads = normal(2, *x.shape, dtype=dtype).unbind()
    x_out, h = with_bias(gate_residual_adaln, inputs, bias, norm=norm)
    ex, ey, gate, shift, scale, *y_bias = exact_inputs = exactly(*inputs)
    exact_x_out = eager_gate(ex, ey, gate, *y_bias)
    assert_rounded_once(x_out, exact_x_out)
    # The norm and its gradient start from x_out as rounded.
    rounded = exact_x_out + (x_out.double() - exact_x_out).detach()
    exact_h = eager_adaln(rounded, shift, scale, norm=norm)
    assert_rounded_once(h, exact_h, terms=channels)

    got = torch.autograd.grad((x_out, h), inputs, grads)
    expected = torch.autograd.grad((rounded, exact_h), exact_inputs, [g.double() for g in grads])
    for one, right in zip(got, expected, strict=True):
        assert_rounded_once(one, right, terms=channels + batch * tokens)


@pytest.mark.parametrize(
    ("op", "batch", "tokens"),
    [
        (adaln_modulate, 1, 16_400),
        (gate_residual, 41, 400),
        (gate_residual_adaln, 1, 16_400),
        (gate_residual_adaln, 41, 400),
    ],
)
def test_gradients_of_modulations_over_16k_tokens(op, batch: int, tokens: int) -> None:
    # torch.compile of PyTorch 2.10 to 2.13 gets these wrong (pytorch/pytorch#193061).
    channels = 8
    names = signature(op).parameters
    inputs = [normal(batch, tokens, channels, dtype=FP32) for name in names if name in "xy"]
    inputs += [normal(1, channels, dtype=FP32) for name in names if name in MODULATIONS]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    eager = {adaln_modulate: eager_adaln, gate_residual: eager_gate}.get(op, eager_pair)
    grad = normal(batch, tokens, channels, dtype=FP32)
    got = torch.autograd.grad(last_output(op(*inputs)), inputs, grad)
    exact_inputs = exactly(*inputs)
    exact = last_output(eager(*exact_inputs))
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    for one, right in zip(got, expected, strict=True):
        assert_rounded_once(one, right, terms=batch * tokens)


def test_large_mean_small_variance() -> None:
    # E[x^2] - E[x]^2 in float32 would lose the variance altogether: 1000^2 * 2^-24 = 0.06.
    x = (1000 + 0.1 * normal(2, 5, 96)).float().requires_grad_()
    shift, scale = normal(2, 96, dtype=FP32), normal(2, 96, dtype=FP32)
    y, (exact_x,) = adaln_modulate(x, shift, scale), exactly(x)
    exact = eager_adaln(exact_x, shift.double(), scale.double())
    assert_rounded_once(y, exact, condition=1000 / 0.1)
    grad = normal(*y.shape, dtype=FP32)
    (got,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(exact, exact_x, grad.double())
    assert_rounded_once(got, expected, condition=1000 / 0.1)


def test_eps_is_added_to_the_variance() -> None:
    x = normal(2, 5, 96, dtype=FP32) * 0.01
    shift, scale = normal(2, 96, dtype=FP32), normal(2, 96, dtype=FP32)
    for eps in (1e-6, 1e-3):
        exact = eager_adaln(x.double(), shift.double(), scale.double(), eps)
        assert_rounded_once(adaln_modulate(x, shift, scale, eps=eps), exact, terms=96)


@pytest.mark.parametrize("channels", [24, 33, 4096])
def test_misaligned_and_strided_tensors(channels: int) -> None:
    def misaligned(*shape: int) -> Tensor:
        whole = normal(*shape[:-1], shape[-1] + 2, dtype=BF16)[..., 1:-1]
        assert whole.data_ptr() % 16 and not whole.is_contiguous()
        return whole.requires_grad_()

    def misaligned_bias() -> Tensor:
        return normal(2 * channels + 1, dtype=BF16)[1::2].requires_grad_()

    inputs = [misaligned(2, 5, channels) for _ in range(2)]
    inputs += [misaligned(2, channels) for _ in MODULATIONS] + [misaligned_bias()]
    plain = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = with_bias(gate_residual_adaln, inputs, "as y")
    expected = with_bias(gate_residual_adaln, plain, "as y")
    grads = [misaligned(2, 5, channels).detach() for _ in outputs]
    got = torch.autograd.grad(outputs, inputs, grads)
    right = torch.autograd.grad(expected, plain, [grad.contiguous() for grad in grads])
    for one, other in zip((*outputs, *got), (*expected, *right), strict=True):
        assert_rounded_once(one, other.double(), terms=channels)


def test_saved_tensors_may_come_back_strided() -> None:
    inputs = [tensor.requires_grad_() for tensor in (normal(2, 5, 24), *normal(2, 2, 24))]

    def gradients() -> tuple[Tensor, ...]:
        y = adaln_modulate(*inputs)
        return torch.autograd.grad(y, inputs, y.detach())

    expected = gradients()
    transpose = lambda tensor: tensor.mT.contiguous().mT  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, transpose):
        torch.testing.assert_close(gradients(), expected)


def test_an_empty_batch_of_many_tokens() -> None:
    inputs = [normal(0, 64, 24), normal(0, 64, 24), *normal(3, 0, 24), normal(24)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    _, h = with_bias(gate_residual_adaln, inputs, "as y")
    for grad, tensor in zip(torch.autograd.grad(h, inputs, h.detach()), inputs, strict=True):
        assert grad.shape == tensor.shape and not grad.any()
