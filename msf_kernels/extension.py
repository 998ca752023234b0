"""The compiled CUDA kernels: whether they can run, and how Python calls them."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dtypes import compute_dtype

# msf::DType of csrc/launchers.hpp
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

# The number of blocks that a kernel with a sum over blocks aims at: four for each of the 132 SMs of
# an H200, so that the SMs end at about the same time. The second pass reads a row of each.
TARGET_BLOCKS = 528

# The kernels compiled for the host, which tests set; they take tensors of the CPU.
emulation: ModuleType | None = None


def available(device: torch.device) -> str | None:
    """None where CUDA kernels can run on tensors of this device, else the reason."""
    if not emulation and (reason := _problem()):
        return reason
    expected = "cpu" if emulation else "cuda"
    if device.type != expected:
        return f"the tensors are on {device}, not on {expected}"
    return None if emulation else _architecture_problem(device)


def launch(name: str, x: Tensor, *args: Any) -> None:
    """Call a launcher of csrc/launchers.hpp on the current stream of x's device."""
    if emulation:
        getattr(emulation, name)(*args, None)
        return
    with torch.cuda.device(x.device):
        getattr(_module(), name)(*args, torch.cuda.current_stream().cuda_stream)


def dtype(x: Tensor) -> int:
    return DTYPES[x.dtype]


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def image(x: Tensor | None) -> tuple[int, ...] | None:
    """(B, C, H, W) as an ImageView."""
    return None if x is None else (x.data_ptr(), *x.stride())


def wide(x: Tensor | None, like: Tensor) -> Tensor | None:
    """x contiguous and in the dtype that the mathematics on ``like`` runs in."""
    return None if x is None else x.to(compute_dtype(like)).contiguous()


def _module() -> ModuleType:
    import msf_kernels._C as _C

    return _C


@functools.lru_cache
def _problem() -> str | None:
    try:
        return _module().problem()
    except ImportError as error:
        return str(error)


@functools.lru_cache
def _architecture_problem(device: torch.device) -> str | None:
    """A binary runs on GPUs of its major version and at least its minor one; one for "90a" or
    "100f" is taken to run on that one alone."""
    capability = torch.cuda.get_device_capability(device)
    built = _module().build_config()["cuda_architectures"]
    for name in built:
        major, minor = divmod(int(name.rstrip("af")), 10)
        newest = minor if name[-1] in "af" else 9
        if capability[0] == major and minor <= capability[1] <= newest:
            return None
    return (
        f"this GPU is sm_{capability[0]}{capability[1]}, the extension was built for "
        f"{', '.join(built)}; set MSF_CUDA_ARCHS and build again"
    )
