"""Compiles the Triton kernels as shipped, for GPUs that need not be here, and reads what they take.

The operators' own Triton functions run on tensors without memory (the `AUDITED` of each family), so
signatures, alignment and launch parameters are those of real calls; but each launch only compiles.
What ptxas made of the products and exponentials is held against what Triton asked it for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .. import triton_support
from .instructions import fault
from .row import ARCHITECTURES, Row

HERE = Path(__file__).parent
FAMILIES = sorted(f.parent.name for f in HERE.parent.glob("*/triton.py") if f.parent != HERE)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# A thread of a family that names no budget of its own may take so many registers: five blocks of
# 128 threads, of two dozen loads each, then fit an SM of 65,536 registers.
BUDGET = 96


class Target:
    """Stands in for a driver: the GPU that Triton compiles for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def rows(architecture: int | None = None) -> Iterator[Row]:
    """One row for each kernel and configuration on this architecture, such as 90, or on each of
    ARCHITECTURES, found by a process a core.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 is set, under which Triton cannot compile; or what ptxas
            logged of a kernel is not understood.
    """
    if triton_support.interpreted():
        raise RuntimeError("the audit compiles Triton kernels: unset TRITON_INTERPRET")
    targets = [architecture] if architecture else ARCHITECTURES
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for found in pool.map(rows_of, *zip(*product(FAMILIES, targets))):
            yield from found


def rows_of(family: str, architecture: int) -> list[Row]:
    """Those of one family and architecture. Triton starts no kernel after this."""
    module = importlib.import_module(f"msf_kernels.{family}.triton")
    budget, known, found = getattr(module, "BUDGET", BUDGET), set(), []
    for configuration, call in _calls(module):
        for kernel, compiled, log in _compile(call, architecture):
            if compiled.hash not in known:  # for another configuration, without log now
                name = f"{family}.{kernel}"
                found.append(_row(name, configuration, architecture, compiled, log, budget))
            known.add(compiled.hash)
    return found


def _calls(module: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What a family has AUDITED, in each layout that it names and each dtype, or those it names."""
    layouts = getattr(module, "AUDITED_LAYOUTS", {"": torch.contiguous_format})
    dtypes = getattr(module, "AUDITED_DTYPES", DTYPES)
    for name, call in module.AUDITED.items():
        for layout, memory_format in layouts.items():
            for dtype in dtypes:
                new = partial(_new, dtype=dtypes[dtype], memory_format=memory_format)
                yield ", ".join(filter(None, (name, layout, dtype))), partial(call, new)


def _new(*shape: int, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    plain = torch.contiguous_format
    form = memory_format if len(shape) == 4 else plain
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=form)


def _compile(call: Callable[[], Any], architecture: int) -> list[tuple[str, Any, str]]:
    """(kernel, compiled kernel, log of ptxas) of every launch in the call."""
    compiled = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            result = run(kernel, *args, warmup=True, **options)
        compiled.append((kernel.__name__, result, log.getvalue()))
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
    """The SASS of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
