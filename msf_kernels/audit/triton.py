"""The audit of the Triton kernels, compiled as shipped for GPUs that need not be here.

The example calls of the operators (`examples.py` of each family) and their gradients run on tensors
without memory. Signatures, alignment and launch parameters are those of real calls, but each launch
only compiles. What ptxas made of the products and exponentials is compared with what Triton asked
it for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, product
from multiprocessing import get_context
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelInterface

from .. import triton_support
from ..examples import Example, New, Shape, examples, families
from ..library import NAMESPACE
from .instructions import fault
from .row import ARCHITECTURES, Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# The dtypes and layouts of a family that is not compiled in all DTYPES, or not in PLAIN alone.
DTYPES_OF = {"attention": ("bf16",)}
PLAIN = {"": torch.contiguous_format}
IMAGES = {"": torch.contiguous_format, "channels-last": torch.channels_last}
LAYOUTS = {"pyramid": IMAGES, "interpolation": IMAGES, "euler": IMAGES}

# Registers of a thread. Five blocks of 128 threads, of two dozen loads each, fit an SM of 65,536.
BUDGET = 96
BUDGETS = {
    # The backward keeps three sums and five numbers of a row for each of a thread's up to 18
    # channels; three blocks of 128 threads, of up to 54 loads each, fit.
    "adaln": 168,
    # All that a thread can have: sums, scores and operands are there to fill them.
    "attention": 255,
    # Bilinear kernels hold the neighbours of a pixel, for which Triton 3.6 takes 102 registers in
    # one case. Four blocks of 128 threads fit.
    "pyramid": 128,
}


class Target:
    """A Target stands in for Triton's driver, and is the GPU that Triton compiles for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def rows(architecture: int | None = None, family: str | None = None) -> Iterator[Row]:
    """Yield one row for each kernel and configuration, found by a process a core.

    They are those of one architecture, such as 90, or of each of ARCHITECTURES, and of one family
    or of all.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 is set, under which Triton cannot compile; what ptxas
            logged of a kernel is not understood; or no example launches a kernel.
    """
    if triton_support.interpreted():
        raise RuntimeError("the audit compiles Triton kernels: unset TRITON_INTERPRET")
    targets = [architecture] if architecture else ARCHITECTURES
    chosen = [family] if family else families()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = [*chain.from_iterable(pool.map(rows_of, *zip(*product(chosen, targets))))]
    if architecture is None:  # on a single GPU a family may need fewer kernels
        check_coverage(found, chosen)
    yield from found


def check_coverage(rows: Sequence[Row], families: Sequence[str]) -> None:
    """Raise RuntimeError if a kernel of these families is in no row: no example launches it."""
    launched = {row.kernel for row in rows}
    kernels = {f"{family}.{kernel}" for family in families for kernel in kernels_of(family)}
    if missing := kernels - launched:
        raise RuntimeError(f"no audited example launches {', '.join(sorted(missing))}")


def rows_of(family: str, architecture: int) -> list[Row]:
    """Return the rows of one family and architecture. Triton starts no kernel after this."""
    # Before any scope of Triton's settings, because the import chooses the assembler for good.
    importlib.import_module(f"msf_kernels.{family}.triton")
    budget, known, found = BUDGETS.get(family, BUDGET), set(), []
    for configuration, call in _calls(family):
        for kernel, compiled, log in _compile(call, architecture):
            if compiled.hash not in known:  # a known one has its row, and no log now
                found.append(_row(kernel, configuration, architecture, compiled, log, budget))
            known.add(compiled.hash)
    return found


def kernels_of(family: str) -> set[str]:
    """Return the names of a family's Triton kernels, without those that families share."""
    package = importlib.import_module(f"msf_kernels.{family}")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = (
        importlib.import_module(f"{package.__name__}.{name}")
        for name in names
        if name.startswith("triton")
    )
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface) and value.fn.__module__ == module.__name__
        if name.endswith("_kernel")
    }


def _calls(family: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the name and call of every example, at its shapes, in each layout and dtype."""
    for example in examples(family):
        for layout, memory_format in LAYOUTS.get(family, PLAIN).items():
            for dtype in DTYPES_OF.get(family, DTYPES):
                new = partial(_new, call_dtype=DTYPES[dtype], memory_format=memory_format)
                for shape in (*example.audited, *example.audited_forward):
                    sizes = "x".join(map(str, shape))
                    words = example.name, sizes, layout, dtype
                    gradients = shape in example.audited
                    call = partial(run, family, example, new, shape, gradients)
                    yield ", ".join(filter(None, words)), call


def run(family: str, example: Example, new: New, shape: Shape, gradients: bool) -> None:
    """Run the example on Triton and, if `gradients`, the gradients that it has."""
    with Kernels(importlib.import_module(f"msf_kernels.{family}.triton")):
        call, inputs = example.draw(new, shape)
        leaves = [tensor.requires_grad_() for tensor in inputs[: example.gradients * gradients]]
        outputs = call(*inputs)
        if leaves:
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])


class Kernels(TorchDispatchMode):
    """Kernels sends operators to a family's Triton kernels, though tensors have no memory."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        self.module = module

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == NAMESPACE:
            return getattr(self.module, func._opname)(*args)
        return func(*args, **(kwargs or {}))


def _new(
    *shape: int,
    call_dtype: torch.dtype,
    memory_format: torch.memory_format,
    dtype: torch.dtype | None = None,
) -> Tensor:
    form = memory_format if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or call_dtype, device="meta", memory_format=form)


def _compile(call: Callable[[], Any], architecture: int) -> list[tuple[str, Any, str]]:
    """Return (family.kernel, compiled kernel, log of ptxas) of every launch in the call."""
    compiled = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            result = run(kernel, *args, warmup=True, **options)
        family = kernel.__module__.removeprefix("msf_kernels.").partition(".")[0]
        compiled.append((f"{family}.{kernel.__name__}", result, log.getvalue()))
        return result

    driver.set_active(Target(architecture))
    with knobs.nvidia.scope(), knobs.compilation.scope():
        # What comes from the cache has no log.
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        with mock.patch.object(JITFunction, "run", compile_only):
            call()
    return compiled


def _row(
    kernel: str, configuration: str, architecture: int, compiled: Any, log: str, budget: int
) -> Row:
    registers = re.findall(r"Used (\d+) registers", log)
    local = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)
    if len(registers) != 1 or len(local) != 3:
        where = f"{kernel} ({configuration}) on sm_{architecture}"
        raise RuntimeError(f"{where}: cannot read the log of ptxas, {log!r}")
    stack, stores, loads = map(int, local)
    return Row(
        backend=f"triton {triton.__version__}",
        kernel=kernel,
        configuration=configuration,
        architecture=f"sm_{architecture}",
        registers=int(registers[0]),
        shared=compiled.metadata.shared,
        spill=stores + loads,
        stack=stack,
        budget=budget,
        fault=fault(compiled.asm["ptx"], disassemble(compiled.asm["cubin"])),
    )


def disassemble(cubin: bytes) -> str:
    """Return the SASS of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
