"""Bad input raises one clear line: `operator: what was wrong, what would be right`."""

from __future__ import annotations

import math
import sys
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .dtypes import SUPPORTED

MODES = ("nearest", "bilinear")  # how a base image is upsampled
UNBOUNDED = -math.inf, math.inf


def tensors(op: str, **named: Any) -> None:
    """Check that each is a dense tensor of a supported dtype, all on the device of the first."""
    first, reference = next(iter(named.items()))
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else _plain(value.layout)
            raise TypeError(f"{op}: {name} must be a dense tensor, got {kind}")
        if value.dtype not in SUPPORTED:
            raise TypeError(
                f"{op}: {name} must be float64, float32, bfloat16 or float16, "
                f"got {_plain(value.dtype)}"
            )
        if value.device != reference.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first}, {reference.device}, "
                f"got {value.device}"
            )


def dtypes(op: str, **named: Tensor) -> None:
    """Check that all have one dtype, or each one 16-bit dtype or float32, as under autocast."""
    others = {tensor.dtype for tensor in named.values()} - {torch.float32}
    mixed = any(tensor.dtype == torch.float32 for tensor in named.values())
    if len(others) > 1 or (mixed and torch.float64 in others):
        got = ", ".join(f"{name} {_plain(tensor.dtype)}" for name, tensor in named.items())
        raise TypeError(f"{op}: dtypes must agree, or be one 16-bit dtype and float32, got {got}")


def dtype(op: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Check that the tensor is of one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        right = " or ".join(dict.fromkeys(map(_plain, allowed)))
        raise TypeError(f"{op}: {name} must be {right}, got {_plain(tensor.dtype)}")


def dimensions(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """Check that the tensor has as many dimensions as `letters` names, such as "(B, N, D)"."""
    if tensor.dim() != letters.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {letters}, got {tuple(tensor.shape)}")


def shape(op: str, name: str, tensor: Tensor, letters: str, sizes: tuple[int, ...]) -> None:
    """Check that the tensor is of shape `sizes`, which `letters` names."""
    if tensor.shape != sizes:
        raise ValueError(f"{op}: {name} must be {letters} = {sizes}, got {tuple(tensor.shape)}")


def choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that the value is one of the choices."""
    if value not in choices:
        got = repr(value) if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {got}")


def whole_number(op: str, name: str, value: int) -> None:
    """Check that the value is a whole number, which in a graph may be a symbol."""
    if not isinstance(value, (Integral, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a whole number, got {type(value).__name__}")


def number(op: str, name: str, value: float) -> None:
    """Check that the value is a number and, if a whole one, not beyond what a float holds."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{op}: {name} must be in the range of a float")


def eps(op: str, value: float) -> None:
    """Check the eps of a norm, below which a row of zeros would become NaN."""
    number(op, "eps", value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{op}: eps must be at least 0 and finite, got {value}")


def whole_numbers(op: str, name: str, letters: str, values: Any, count: int) -> None:
    """Check that the values are ``count`` positive whole numbers, which ``letters`` names."""
    if (
        not isinstance(values, (tuple, list))
        or len(values) != count
        or not all(type(value) is int and value > 0 for value in values)
    ):
        got = type(values).__name__ if isinstance(values, Tensor) else repr(values)
        raise ValueError(f"{op}: {name} must be {letters}, positive whole numbers, got {got}")


def constant(op: str, name: str, tensor: Tensor) -> None:
    """Check that the tensor asks for no gradient, because the operator gives it none."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} gets no gradient, pass {name}.detach()")


def merge(
    op: str,
    base: Tensor,
    name: str,
    residual: Tensor,
    mode: str,
    mean: Tensor | None,
    std: Tensor | None,
) -> None:
    """Check that ``residual``, called ``name``, and its statistics fit on ``base``."""
    dtype(op, name, residual, base.dtype)
    choice(op, "mode", mode, MODES)
    dimensions(op, "base", base, "(B, C, H/2, W/2)")
    batch, channels, height, width = base.shape
    shape(op, name, residual, "(B, C, H, W)", (batch, channels, 2 * height, 2 * width))
    statistics(op, residual, mean, std)


def statistics(op: str, x: Tensor, mean: Tensor | None, std: Tensor | None) -> None:
    """Check that mean and std, where given, are constants (C,) of x's dtype or float32."""
    for name, tensor in {"mean": mean, "std": std}.items():
        if tensor is not None:
            tensors(op, x=x, **{name: tensor})
            shape(op, name, tensor, "(C,)", (x.shape[1],))
            dtype(op, name, tensor, x.dtype, torch.float32)
            constant(op, name, tensor)


def bounds(op: str, clamp: tuple[float, float] | None) -> tuple[float, float]:
    """Return the bounds (low, high) after checking them; infinite ones for None."""
    if clamp is None:
        return UNBOUNDED
    numbers = isinstance(clamp, (tuple, list)) and all(isinstance(v, (float, int)) for v in clamp)
    if not numbers or len(clamp) != 2 or not clamp[0] <= clamp[1]:
        got = type(clamp).__name__ if isinstance(clamp, Tensor) else repr(clamp)
        raise ValueError(f"{op}: clamp must be (low, high) with low <= high, got {got}")
    for bound in clamp:
        number(op, "clamp", bound)
    return clamp


def _plain(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
