"""Launches of Triton kernels."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError

from .. import recording
from ..dispatch import CompilationFailed
from ..recording import Number
from . import interpreted, ptxas

COMPILER_ERRORS = (CompilationError, OutOfResources, PTXASError)


def _compiles_for_hopper() -> bool:
    """Tell whether this machine has a Hopper GPU, or no GPU and compiles for any it is told."""
    if interpreted():
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9


# This is why products of matrices would be wrong on Hopper, or None. It is asked here, before any
# kernel of ours is compiled, so that one assembler compiles all of them.
WGMMA_UNSUPPORTED_REASON = ptxas.choose() if _compiles_for_hopper() else None


def launch(
    kernel: Any,
    device: torch.device,
    programs: int,
    /,
    *,
    warps: int,
    fused: bool = False,
    **arguments: Any,
) -> None:
    """Start a kernel's programs on the device; none of them where a tensor is empty.

    Args:
        programs: how many programs run; the grid has one dimension.
        warps: how many warps a program has.
        fused: whether a product and a sum may round once where the reference rounds twice.
        arguments: those of the kernel, and options of Triton's compiler such as `maxnreg`.

    Raises:
        CompilationFailed: Triton or its assembler cannot compile the kernel for this GPU, or the
            GPU does not have what it takes.
    """
    if not programs:
        return
    given = {name: float(x) if isinstance(x, Number) else x for name, x in arguments.items()}
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        try:
            compiled = kernel[(programs,)](**given, num_warps=warps, enable_fp_fusion=fused)
        except COMPILER_ERRORS as error:
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CompilationFailed(
                f"Triton {triton.__version__} cannot compile {kernel.__name__} here: {line}"
            ) from error
    if (into := recording.current()) is not None:
        _record(into, kernel, compiled, device, programs, arguments)


def _record(
    into: recording.Recording,
    kernel: Any,
    compiled: Any,
    device: torch.device,
    programs: int,
    arguments: dict[str, Any],
) -> None:
    """Record a launch as one of the compiled kernel, which looks at no argument's type or value.

    Constants are in its code: it skips their places.
    """
    if compiled is None:  # the interpreter returns no kernel
        into.complete = False
        return
    run, launcher, index = compiled[programs, 1, 1], compiled.run, device.index
    function, metadata = compiled.function, compiled.packed_metadata
    stream_of = driver.active.get_current_stream

    def start(*args: Any) -> None:
        if index is not None and index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                return start(*args)
        hooks = knobs.runtime
        listened_to = getattr(hooks.launch_enter_hook, "calls", True)
        if listened_to or getattr(hooks.launch_exit_hook, "calls", True):
            run(*args)
        else:
            # The same without what `run` collects for profilers, which is half of its time.
            stream = stream_of(index)
            launcher(programs, 1, 1, stream, function, metadata, None, None, None, *args)

    args = (None if x.is_constexpr else _recorded(into, arguments[x.name]) for x in kernel.params)
    into.launches.append((start, tuple(args)))


def _recorded(into: recording.Recording, value: Any) -> Any:
    """Return an argument with addresses for tensors, which Triton takes too, and None for
    constants."""
    if isinstance(value, tuple):
        return tuple(_recorded(into, item) for item in value)
    if isinstance(value, triton.language.constexpr):
        return None
    return into.address(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Elements:
    """A flat tensor is cut into ``count`` blocks of ``block`` elements, a program each."""

    block: int
    warps: int
    count: int

    @classmethod
    def of(cls, size: int, element_size: int) -> Elements:
        """Cut ``size`` elements into blocks of up to 128 threads.

        A thread reads 16 bytes of the tensor whose elements are the smallest at once.
        """
        block = min(power_of_2(size), 128 * 16 // element_size)
        warps = max(1, block * element_size // 16 // 32)
        return cls(block, warps, -(-size // block))


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is not less than n; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def tiles(rows: int, columns: int, tile_rows: int, tile_columns: int) -> int:
    """Return how many tiles cover rows x columns.

    Raises:
        OverflowError: there are too many rows for the kernels, which count them in 32 bits.
    """
    if rows > 2**31 - tile_rows:
        raise OverflowError(f"Triton kernels take fewer than 2^31 rows of pixels, got {rows}")
    return -(-rows // tile_rows) * -(-columns // tile_columns)
