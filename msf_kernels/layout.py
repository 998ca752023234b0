"""Operators give their outputs the memory format of their first tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .dtypes import compute_dtype

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return channels_last for images (B, C, H, W) that are stored so, else contiguous."""
    if x.dim() != 4 or x.is_contiguous():
        return torch.contiguous_format
    last = x.permute(0, 2, 3, 1).is_contiguous()  # which vmap can answer too
    return torch.channels_last if last else torch.contiguous_format


def contiguous(x: MaybeTensor, alignment: int = 1) -> MaybeTensor:
    """Return x, or a copy, contiguous and at a multiple of `alignment` bytes; None stays None.

    Kernels that read 16 bytes at once need an alignment of 16.
    """
    if x is None:
        return x
    x = x.contiguous()
    return x.clone() if alignment > 1 and x.data_ptr() % alignment else x


def contiguous_samples(x: MaybeTensor) -> MaybeTensor:
    """Return x, or a copy, whose samples are contiguous, however far apart; None stays None.

    Halves of a guided batch are such, and the first or last tokens of a sequence.
    """
    if x is None or x.is_contiguous() or x[:1].is_contiguous():
        return x
    return x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """Return x (B, N, channels) with contiguous channels, each token at a multiple of 16 bytes.

    x itself is returned where that holds already, and where the number of its channels does not
    allow it. Else it is copied, which takes less time than a kernel that reads fewer bytes at once.
    """
    elements = 16 // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:2], x.shape) if size > 1]
    in_place = not (x.data_ptr() % 16 or any(stride % elements for stride in strides))
    if x.stride(2) == 1 and (in_place or x.shape[2] % elements):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def empty_like(x: Tensor) -> Tensor:
    """Make a contiguous tensor as x, in half the host's time of `x.new_empty(x.shape)`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty(x: Tensor, *shape: int) -> Tensor:
    """Make an output of ``shape``, x's by default, in x's dtype and memory format."""
    sizes = shape or x.shape
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def new_gradient(parameter: Tensor | None, like: Tensor) -> Tensor:
    """Make a tensor for the gradient of a bias or weight, of no elements where there is none."""
    if parameter is None:
        return like.new_empty(0, dtype=compute_dtype(like))
    return parameter.new_empty(parameter.shape)


def in_layout_of(x: Any, like: Tensor) -> Any:
    """Return x, without gaps, in the memory format of an output as ``like``; None stays None."""
    return None if x is None else x.contiguous(memory_format=memory_format(like))


def conform(outputs: Iterable[Tensor], args: Iterable[Any]) -> tuple[Tensor, ...]:
    """Return ``outputs`` in the memory format of the first tensor among ``args``."""
    form = memory_format(next(arg for arg in args if isinstance(arg, Tensor)))
    plain = torch.contiguous_format
    return tuple(o.contiguous(memory_format=form if o.dim() == 4 else plain) for o in outputs)
