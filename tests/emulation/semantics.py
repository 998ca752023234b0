"""The kernels of `semantics.cpp`, launched on the host with tensors."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

from torch import Tensor

from .build import build, load

HERE = Path(__file__).parent


@functools.cache
def _module() -> ModuleType:
    return load("semantics", build([HERE / "semantics.cpp"], module=True))


def launch(
    kernel: str,
    *tensors: Tensor,
    grid: tuple[int, ...] = (1,),
    block: tuple[int, ...] = (1,),
    shared_bytes: int = 0,
) -> None:
    """kernel<<<grid, block, shared_bytes>>>(tensors...)"""
    shapes = [(*shape, 1, 1)[:3] for shape in (grid, block)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    getattr(_module(), kernel)(*shapes, shared_bytes, *addresses)
