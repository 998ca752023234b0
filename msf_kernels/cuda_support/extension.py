"""Tells whether the compiled CUDA kernels can run here, and calls them."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .dtypes import compute_dtype

# msf::DType of csrc/launchers.hpp
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

# The kernels compiled for the host, which tests set; they take tensors of the CPU.
emulation: ModuleType | None = None


def unsupported_reason(device: torch.device) -> str | None:
    """Return why CUDA kernels cannot run on tensors of this device, None where they can."""
    if not emulation and (reason := _machine_unsupported_reason()):
        return reason
    expected = "cpu" if emulation else "cuda"
    if device.type != expected:
        return f"the tensors are on {device}, not on {expected}"
    return None if emulation else _gpu_unsupported_reason(device)


def launch(name: str, x: Tensor, *args: Any) -> None:
    """Call a launcher of csrc/launchers.hpp on the current stream of x's device."""
    if emulation:
        getattr(emulation, name)(*args, None)
        return
    with torch.cuda.device(x.device):
        getattr(_module(), name)(*args, torch.cuda.current_stream().cuda_stream)


def dtype(x: Tensor) -> int:
    """Return the msf::DType of x."""
    return DTYPES[x.dtype]


def address(x: Tensor | None) -> int:
    """Return where x lies in memory, 0 for None."""
    return 0 if x is None else x.data_ptr()


def image(x: Tensor | None) -> tuple[int, ...] | None:
    """Return x (B, C, H, W) as an ImageView of csrc/launchers.hpp."""
    return None if x is None else (x.data_ptr(), *x.stride())


def wide(x: Tensor | None, like: Tensor) -> Tensor | None:
    """Return x contiguous and in the dtype that the mathematics on ``like`` runs in."""
    return None if x is None else x.to(compute_dtype(like)).contiguous()


def _module() -> ModuleType:
    import msf_kernels._C as _C

    return _C


@functools.lru_cache
def _machine_unsupported_reason() -> str | None:
    try:
        return _module().problem()
    except ImportError as error:
        return str(error)


@functools.lru_cache
def _gpu_unsupported_reason(device: torch.device) -> str | None:
    """Return why the extension's binaries do not run on this GPU, None where one does.

    A binary runs on GPUs of its major version and at least its minor one; one for "90a" or "100f"
    is taken to run on that one alone.
    """
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
