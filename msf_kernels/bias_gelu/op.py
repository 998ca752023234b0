"""bias_gelu as an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..layout import new_gradient
from ..library import define
from . import reference

APPROXIMATIONS = ("tanh", "none")


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """Return gelu(x + bias), what stands between the two matrix products of an MLP.

    GELU (Hendrycks & Gimpel, 2016) is x times the normal distribution's share below x. The bias is
    that of the first product, which then runs without one; its gradient is summed in the pass that
    makes that of x.

    Args:
        x: (B, N, D) float64, float32, bfloat16 or float16.
        bias: (D,) in x's dtype or float32; None for no bias.
        approximate: "tanh", or "none" for the error function, as in `torch.nn.functional.gelu`.

    Returns:
        (B, N, D) in x's dtype, computed in float32 and rounded once.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    return _bias_gelu(x, bias, approximate)


def _check(op: str, x: Tensor, bias: Tensor | None, approximate: str) -> None:
    checks.tensors(op, x=x, **({} if bias is None else {"bias": bias}))
    checks.dimensions(op, "x", x, "(B, N, D)")
    if bias is not None:
        checks.shape(op, "bias", bias, "(D,)", (x.shape[2],))
        checks.dtype(op, "bias", bias, x.dtype, torch.float32)
    checks.choice(op, "approximate", approximate, APPROXIMATIONS)


def new_gradients(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Make tensors for the gradients of x and bias, of no elements without one."""
    return x.new_empty(x.shape), new_gradient(bias, x)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _gradient(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _bias_gelu_backward(grad, x, bias, ctx.approximate)
    return {"x": grad_x} if bias is None else {"x": grad_x, "bias": grad_bias}


_bias_gelu_backward = define(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    reference=reference.bias_gelu_backward,
    kernels=("cuda", "triton"),
    fake=new_gradients,
)

_bias_gelu = define(
    "bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor",
    reference=reference.bias_gelu,
    kernels=("cuda", "triton"),
    fake=lambda x: x.new_empty(x.shape),
    setup_context=_setup,
    backward=_gradient,
    check=_check,
)
