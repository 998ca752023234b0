"""The audit of the Triton kernels, compiled as shipped for GPUs that need not be here.

Each launch of the example calls (calls.py) only compiles. What ptxas made of the products and
exponentials is compared with what Triton asked it for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from math import prod
from multiprocessing import get_context
from typing import Any
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelInterface

from .. import triton_support
from ..examples import families
from .calls import calls
from .disassembly import disassemble
from .instructions import fault
from .occupancy import WARP, Launch
from .row import ARCHITECTURES, Row

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
    budget = BUDGETS.get(family, BUDGET)
    found: dict[str, tuple[Any, str, Any, str]] = {}
    launches: dict[str, set[Launch]] = defaultdict(set)
    for configuration, call in calls(family, "triton"):
        for kernel, compiled, log, launch in _compile(call, architecture, family):
            # One that was launched before has no log now.
            found.setdefault(compiled.hash, (kernel, configuration, compiled, log))
            launches[compiled.hash].add(launch)
    cubins = [compiled.asm["cubin"] for _, _, compiled, _ in found.values()]
    rows = []
    for (hash, taken), sass in zip(found.items(), disassemble(cubins, architecture)):
        kernel, configuration, compiled, log = taken
        name = f"{family}.{kernel.__name__}"
        row = _row(name, configuration, architecture, compiled, log, budget, sass)
        rows.append(row.launched(launches[hash], sass))
        kernel.device_caches.clear()  # for the next family, as what is found there has no log
    return rows


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


def _compile(
    call: Callable[[], Any], architecture: int, family: str | None = None
) -> list[tuple[Any, Any, str, Launch]]:
    """Return (kernel, compiled kernel, log of ptxas, launch) of every launch in the call.

    Kernels of another family than this are left out, and not compiled.
    """
    compiled = []
    run = JITFunction.run

    def compile_only(
        function: Any, /, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> Any:
        if family and function.__module__.split(".")[1] not in (family, "triton_support"):
            return None
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            result = run(function, *args, grid=grid, warmup=True, **options)
        launch = Launch(prod(grid), WARP * result.metadata.num_warps, result.metadata.shared)
        compiled.append((function, result, log.getvalue(), launch))
        return result

    driver.set_active(Target(architecture))
    with knobs.nvidia.scope(), knobs.compilation.scope():
        # What comes from the cache has no log.
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        with mock.patch.object(JITFunction, "run", compile_only):
            call()
    return compiled


def _row(
    kernel: str,
    configuration: str,
    architecture: int,
    compiled: Any,
    log: str,
    budget: int,
    sass: str,
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
        fault=fault(compiled.asm["ptx"], sass),
    )
