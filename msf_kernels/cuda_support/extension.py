"""The compiled extension ``msf_kernels._C``: what it was built with, and whether it can run."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

# Tests set this to the kernels compiled for the host, which take tensors of the CPU.
emulation: ModuleType | None = None


def module() -> ModuleType:
    """Return the extension, or raise ImportError."""
    import msf_kernels._C as _C

    return _C


def kernels() -> ModuleType:
    """Return what has the launchers: the extension, or the kernels compiled for the host."""
    return emulation or module()


@functools.lru_cache
def shared_memory(device: torch.device) -> int:
    """Return how many bytes of shared memory a block may have on the device."""
    return kernels().shared_memory(device.index or 0)


def build_config() -> dict[str, Any]:
    """Describe the build of the compiled extension ``msf_kernels._C``.

    Returns:
        ``{"extension": True, "version", "cxx_compiler", "cuda", "cuda_compiler",
        "cuda_architectures"}``: ``cuda`` is whether nvcc took part, ``cuda_compiler`` its version
        or None, ``cuda_architectures`` what it compiles for, e.g. ``["80", "90a"]``.
        Without the extension ``{"extension": False, "reason": ...}``; it is then optional, since
        the reference and Triton backends need no compiled code.
    """
    try:
        return {"extension": True, **module().build_config()}
    except ImportError as error:
        return {"extension": False, "reason": str(error)}


def unsupported_reason(device: torch.device) -> str | None:
    """Return why CUDA kernels cannot run on tensors of this device, None where they can."""
    if not emulation and (reason := _machine_unsupported_reason()):
        return reason
    expected = "cpu" if emulation else "cuda"
    if device.type != expected:
        return f"the tensors are on {device}, not on {expected}"
    return None if emulation else _gpu_unsupported_reason(device)


@functools.lru_cache
def _machine_unsupported_reason() -> str | None:
    try:
        return module().unsupported_reason()
    except ImportError as error:
        return str(error)


@functools.lru_cache
def _gpu_unsupported_reason(device: torch.device) -> str | None:
    """Return why the extension's binaries do not run on this GPU, None where one does.

    A binary runs on GPUs of its major version and at least its minor one; one for "90a" or "100f"
    is taken to run on that one alone.
    """
    capability = torch.cuda.get_device_capability(device)
    built = module().build_config()["cuda_architectures"]
    for name in built:
        major, minor = divmod(int(name.rstrip("af")), 10)
        newest = minor if name[-1] in "af" else 9
        if capability[0] == major and minor <= capability[1] <= newest:
            return None
    return (
        f"this GPU is sm_{capability[0]}{capability[1]}, the extension was built for "
        f"{', '.join(built)}; set MSF_CUDA_ARCHS and build again"
    )
