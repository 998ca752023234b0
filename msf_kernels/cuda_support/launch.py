"""Calls of the launchers in csrc/kernels/*.hpp, with arguments made of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import recording
from ..dtypes import compute_dtype
from . import extension

# These are the values of msf::DType.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def launch(name: str, x: Tensor, *args: Any) -> None:
    """Call a launcher on the current stream of x's device."""
    start = starter(name, x.device)
    start(*args)
    if (into := recording.current()) is not None:
        into.launches.append((start, args))


def starter(name: str, device: torch.device) -> Callable[..., None]:
    """Return a function that calls a launcher on the stream that is then current."""
    if extension.emulation:
        launcher = getattr(extension.emulation, name)
        return lambda *args: launcher(*args, None)
    launcher, index = getattr(extension.module(), name), device.index

    def start(*args: Any) -> None:
        # torch.cuda.current_stream makes an object of it, which takes longer than the launch.
        stream = torch._C._cuda_getCurrentRawStream(index)
        if index == torch._C._cuda_getDevice():
            launcher(*args, stream)
        else:
            with torch.cuda.device(index):
                launcher(*args, stream)

    return start


def dtype(x: Tensor) -> int:
    """Return the msf::DType of x."""
    return DTYPES[x.dtype]


def address(x: Tensor | None) -> int:
    """Return where x lies in memory, 0 for None."""
    if x is None:
        return 0
    into = recording.current()
    return x.data_ptr() if into is None else into.address(x)


def parameter(x: Tensor | None) -> tuple[int, int] | None:
    """Return a bias or norm weight, or its gradient, as an msf::Parameter; None if it is absent."""
    return None if x is None or not x.numel() else (address(x), dtype(x))


def image(x: Tensor | None) -> tuple[int, ...] | None:
    """Return x (B, C, H, W) as an msf::ImageView."""
    return None if x is None else (address(x), *x.stride())


def wide(x: Tensor | None, like: Tensor) -> Tensor | None:
    """Return x contiguous and in the dtype that the mathematics on ``like`` runs in."""
    return None if x is None else x.to(compute_dtype(like)).contiguous()
