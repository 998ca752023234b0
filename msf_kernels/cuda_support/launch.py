"""Calls of the launchers in csrc/launchers.hpp, with arguments made of tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from . import extension

# These are the values of msf::DType.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def launch(name: str, x: Tensor, *args: Any) -> None:
    """Call a launcher on the current stream of x's device."""
    if extension.emulation:
        getattr(extension.emulation, name)(*args, None)
        return
    launcher, device = getattr(extension.module(), name), x.device.index
    # torch.cuda.current_stream makes an object of it, which takes longer than the launch.
    stream = torch._C._cuda_getCurrentRawStream(device)
    elsewhere = device != torch._C._cuda_getDevice()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        launcher(*args, stream)


def dtype(x: Tensor) -> int:
    """Return the msf::DType of x."""
    return DTYPES[x.dtype]


def address(x: Tensor | None) -> int:
    """Return where x lies in memory, 0 for None."""
    return 0 if x is None else x.data_ptr()


def parameter(x: Tensor | None) -> tuple[int, int] | None:
    """Return a bias or norm weight, or its gradient, as an msf::Parameter; None if it is absent."""
    return None if x is None or not x.numel() else (x.data_ptr(), dtype(x))


def image(x: Tensor | None) -> tuple[int, ...] | None:
    """Return x (B, C, H, W) as an msf::ImageView."""
    return None if x is None else (x.data_ptr(), *x.stride())


def wide(x: Tensor | None, like: Tensor) -> Tensor | None:
    """Return x contiguous and in the dtype that the mathematics on ``like`` runs in."""
    return None if x is None else x.to(compute_dtype(like)).contiguous()
