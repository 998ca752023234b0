"""adaln_modulate, gate_residual and gate_residual_adaln as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dtypes import compute_dtype
from ..layout import new_gradient
from ..library import define
from . import reference

ROUNDINGS = ("fp32", "eager")
NORMS = ("layer", "rms")


def adaln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    rounding: str = "fp32",
    norm: str = "layer",
) -> Tensor:
    """Normalise each token without weights, then modulate it: LN(x) * (1 + scale) + shift.

    This is the adaLN of DiT (Peebles & Xie, 2022, section 3.2). The weight of a norm can be folded
    into scale, as weight * (1 + scale) - 1, and its bias into shift, as shift + bias * (1 + scale).

    Args:
        x: (B, N, D) float64, float32, bfloat16 or float16.
        shift, scale: (B, D) or (1, D), possibly strided views of one (B, 6D) tensor. All are of one
            dtype, or each of one 16-bit dtype or float32.
        eps: added to the variance.
        rounding: "fp32" computes in float32 and rounds once. "eager" rounds where PyTorch does if
            it runs `layer_norm(x) * (1 + scale) + shift` in 16 bits, operation by operation, so
            that a model trained or published that way gives the same images; it takes tensors of
            one dtype only. The gradient is the same in both. Statistics are sums in another order
            than PyTorch's, so that in 16 bits one value in hundreds or thousands may still differ
            by its last bit.
        norm: "layer", or "rms" for RMS norm (Zhang & Sennrich, 2019), which subtracts no mean: x
            times the reciprocal root of its mean square and eps.

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    return _adaln_modulate(x, shift, scale, eps, rounding, norm)[0]


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    y_bias: Tensor | None = None,
    rounding: str = "fp32",
) -> Tensor:
    """Return the gated residual of adaLN-Zero, x + gate * (y + y_bias).

    Args:
        x, y: (B, N, D); dtypes as in `adaln_modulate`.
        gate: (B, D) or (1, D), possibly strided; dtypes as for x and y.
        y_bias: (D,) of the matmul that y comes from, in y's dtype or float32; None for no bias.
            With its gradient summed here, it costs no pass over y of its own.
        rounding: "fp32" or "eager", as in `adaln_modulate`.

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    return _gate_residual(x, y, y_bias, gate, rounding)


def gate_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    y_bias: Tensor | None = None,
    eps: float = 1e-6,
    rounding: str = "fp32",
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Run gate_residual, then adaln_modulate on its result, in one pass over memory.

    Args:
        x, y: (B, N, D); dtypes as in `adaln_modulate`.
        gate, shift, scale: (B, D) or (1, D), possibly strided; dtypes as for x and y.
        y_bias: as in `gate_residual`.
        eps: added to the variance.
        rounding: "fp32" or "eager", as in `adaln_modulate`.
        norm: "layer" or "rms", as in `adaln_modulate`.

    Returns:
        x_out = x + gate * (y + y_bias) and h = LN(x_out) * (1 + scale) + shift, both (B, N, D) in
        x's dtype.

    Raises:
        TypeError, ValueError: wrong kinds, dtypes, shapes or devices.
    """
    return _gate_residual_adaln(x, y, y_bias, gate, shift, scale, eps, rounding, norm)[:2]


def _check(
    op: str,
    *,
    rounding: str,
    norm: str = "layer",
    eps: float = 0.0,
    y_bias: Tensor | None = None,
    **tensors: Tensor,
) -> None:
    tokens = {name: tensor for name, tensor in tensors.items() if name in ("x", "y")}
    modulation = {name: tensor for name, tensor in tensors.items() if name not in tokens}
    bias = {} if y_bias is None else {"y_bias": y_bias}
    checks.tensors(op, **tokens, **modulation, **bias)
    checks.dtypes(op, **tokens, **modulation)
    x = tokens["x"]
    checks.dimensions(op, "x", x, "(B, N, D)")
    batch, _, channels = x.shape
    for name, tensor in tokens.items():
        checks.shape(op, name, tensor, "(B, N, D)", tuple(x.shape))
    for name, tensor in modulation.items():
        if tensor.shape != (1, channels):
            checks.shape(op, name, tensor, "(B, D)", (batch, channels))
    for name, tensor in bias.items():
        checks.shape(op, name, tensor, "(D,)", (channels,))
        checks.dtype(op, name, tensor, tokens["y"].dtype, torch.float32)
    checks.eps(op, eps)
    checks.choice(op, "rounding", rounding, ROUNDINGS)
    checks.choice(op, "norm", norm, NORMS)
    if rounding == "eager":
        for name, tensor in {**tokens, **modulation, **bias}.items():
            checks.dtype(f'{op}: with rounding="eager"', name, tensor, x.dtype)


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty((2, *x.shape[:2]), dtype=compute_dtype(x))


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


_adaln_modulate_backward = define(
    "adaln_modulate_backward(Tensor grad, Tensor x, Tensor shift, Tensor scale, Tensor statistics, "
    "str norm) -> (Tensor, Tensor, Tensor)",
    reference=reference.adaln_modulate_backward,
    kernels=("cuda", "triton"),
    fake=lambda x, shift, scale: _like(x, shift, scale),
)


def _adaln_modulate_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, shift, scale, _, _, ctx.norm = inputs
    _, statistics = output
    ctx.save_for_backward(x, shift, scale, statistics)
    ctx.mark_non_differentiable(statistics)


def _adaln_modulate_gradient(ctx: Any, grad: Tensor, _: None) -> dict[str, Tensor]:
    grad_x, grad_shift, grad_scale = _adaln_modulate_backward(grad, *ctx.saved_tensors, ctx.norm)
    return {"x": grad_x, "shift": grad_shift, "scale": grad_scale}


_adaln_modulate = define(
    "adaln_modulate(Tensor x, Tensor shift, Tensor scale, float eps, str rounding, str norm) "
    "-> (Tensor, Tensor)",
    reference=reference.adaln_modulate,
    kernels=("cuda", "triton"),
    fake=lambda x: (*_like(x), _statistics(x)),
    setup_context=_adaln_modulate_setup,
    backward=_adaln_modulate_gradient,
    for_gradient=True,
    check=_check,
)

_gate_residual_backward = define(
    "gate_residual_backward(Tensor grad, Tensor y, Tensor? y_bias, Tensor gate) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.gate_residual_backward,
    kernels=("cuda", "triton"),
    fake=lambda y, y_bias, gate: (*_like(y), new_gradient(y_bias, y), *_like(gate)),
)


def _gate_residual_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, y, y_bias, gate, _ = inputs
    ctx.save_for_backward(y, y_bias, gate)


def _gate_residual_gradient(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    return {"x": grad} | _gradients_of_branch(grad, *ctx.saved_tensors)


def _gradients_of_branch(
    grad: Tensor, y: Tensor, y_bias: Tensor | None, gate: Tensor
) -> dict[str, Tensor | None]:
    grad_y, grad_bias, grad_gate = _gate_residual_backward(grad, y, y_bias, gate)
    return {"y": grad_y, "y_bias": None if y_bias is None else grad_bias, "gate": grad_gate}


_gate_residual = define(
    "gate_residual(Tensor x, Tensor y, Tensor? y_bias, Tensor gate, str rounding) -> Tensor",
    reference=reference.gate_residual,
    kernels=("cuda", "triton"),
    fake=lambda x: x.new_empty(x.shape),
    setup_context=_gate_residual_setup,
    backward=_gate_residual_gradient,
    check=_check,
)

_gate_residual_adaln_backward = define(
    "gate_residual_adaln_backward(Tensor grad_h, Tensor? grad_x_out, Tensor x_out, Tensor y, "
    "Tensor? y_bias, Tensor gate, Tensor shift, Tensor scale, Tensor statistics, str norm) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.gate_residual_adaln_backward,
    kernels=("cuda", "triton"),
    fake=lambda x_out, y, y_bias, gate, shift, scale: (
        *_like(x_out, y),
        new_gradient(y_bias, y),
        *_like(gate, shift, scale),
    ),
)


def _gate_residual_adaln_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, *tensors, _, _, ctx.norm = inputs  # y, y_bias, gate, shift and scale
    x_out, _, statistics = output
    ctx.save_for_backward(x_out, *tensors, statistics)
    ctx.mark_non_differentiable(statistics)


def _gate_residual_adaln_gradient(
    ctx: Any, grad_x_out: Tensor | None, grad_h: Tensor | None, _: None
) -> dict[str, Tensor | None]:
    saved = ctx.saved_tensors
    _, y, y_bias, gate, *_ = saved
    if grad_h is None:
        assert grad_x_out is not None
        return {"x": grad_x_out} | _gradients_of_branch(grad_x_out, y, y_bias, gate)
    grads = _gate_residual_adaln_backward(grad_h, grad_x_out, *saved, ctx.norm)
    named = dict(zip(("x", "y", "y_bias", "gate", "shift", "scale"), grads, strict=True))
    return named if y_bias is not None else named | {"y_bias": None}


_gate_residual_adaln = define(
    "gate_residual_adaln(Tensor x, Tensor y, Tensor? y_bias, Tensor gate, Tensor shift, "
    "Tensor scale, float eps, str rounding, str norm) -> (Tensor, Tensor, Tensor)",
    reference=reference.gate_residual_adaln,
    kernels=("cuda", "triton"),
    fake=lambda x: (*_like(x, x), _statistics(x)),
    setup_context=_gate_residual_adaln_setup,
    backward=_gate_residual_adaln_gradient,
    for_gradient=True,
    check=_check,
)
