"""Calls on a CPU that cost the host what they cost on a GPU, but for launches, which do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

from msf_kernels import dispatch, triton_support
from msf_kernels.audit.occupancy import GPUS, RESERVED_SHARED
from msf_kernels.cuda_support import extension

SHARED_MEMORY = GPUS["sm_90"].shared - RESERVED_SHARED  # bytes that a block may have


class NoKernels:
    """NoKernels stands for the extension: it fits everything and launches nothing."""

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return _nothing

    def shared_memory(self, device: int) -> int:
        return SHARED_MEMORY


@contextmanager
def no_cuda() -> Iterator[None]:
    """Let kernels in CUDA launch nothing."""
    with mock.patch.object(extension, "emulation", NoKernels()):
        yield


def no_triton_reason() -> str | None:
    """Return why Triton's launches cannot be measured here, None where they can."""
    if triton_support.interpreted():
        return "Triton interprets its kernels: unset TRITON_INTERPRET"
    return triton_support.compiler_unsupported_reason()


@contextmanager
def no_triton(launcher: Callable[..., Any] | None = None) -> Iterator[None]:
    """Let Triton compile its kernels for Hopper, and launch nothing.

    Args:
        launcher: makes, of a kernel's source and metadata, what is called for a launch as Triton
            calls its own launcher, with the grid, the stream and the kernel's arguments.
    """
    from triton.runtime import driver

    from msf_kernels.audit.triton import Target

    class Driver(Target):
        launcher_cls = staticmethod(launcher or (lambda source, metadata: _nothing))
        utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY},
            # A module, a function, its registers and spills, and most threads of a block.
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            unload_module=_nothing,
        )

    kept = {op: of["triton"] for op, of in dispatch._registry.items() if "triton" in of}
    for op, implementation in kept.items():
        here = replace(implementation, unsupported_device_reason=dispatch._supported)
        dispatch.register(op, "triton", here)
    try:
        with mock.patch.object(driver, "_active", Driver(90)):
            yield
    finally:
        for op, implementation in kept.items():
            dispatch.register(op, "triton", implementation)


def _nothing(*_: Any) -> bool:
    return True
