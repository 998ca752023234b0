"""The audit of the installed extension's CUDA kernels, for each GPU it was built for."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from ..cuda_support import build_config
from ..triton_support import compiler_unsupported_reason
from .cuda_launches import Instance, instance, launches
from .occupancy import RESERVED_SHARED, gpu_of
from .row import Row

KERNELS = Path(__file__).parents[2] / "csrc" / "kernels"

# The budget of a kernel stands above it, as csrc/kernels/launch.cuh explains.
BUDGET = re.compile(r"// registers: (.+)\n(?:template [^{]*?)?__global__ [^{]*?(\w+_kernel)\(")


def rows(architecture: int | None = None) -> Iterator[Row]:
    """Yield one row for each kernel on this architecture, such as 90, or on all it was built for.

    Raises:
        RuntimeError: there are no CUDA kernels, no cuobjdump to read them, or one has no budget.
    """
    config = build_config()
    if not config.get("cuda"):
        reason = config.get("reason", "it was built without nvcc")
        raise RuntimeError(f"no CUDA kernels in the extension: {reason}")
    import msf_kernels._C as _C

    assert _C.__file__
    listing = _run(_cuobjdump(), "--dump-resource-usage", _C.__file__)
    found = [*parse(_run("c++filt", stdin=listing))]
    for name in dict.fromkeys(row.architecture for row in found):
        if not architecture or name == f"sm_{architecture}":
            yield from _launched([row for row in found if row.architecture == name], _C.__file__)


def parse(listing: str) -> Iterator[Row]:
    """Yield the rows in what cuobjdump printed, with names demangled."""
    architecture = kernel = arguments = ""
    for line in listing.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif line.startswith(" Function "):
            kernel, arguments = instance(line)
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            budget = _budget(kernel, arguments)
            if architecture != "sm_80":  # of which alone the system's part is not in the listing
                shared = max(0, shared - RESERVED_SHARED)
            yield Row(
                "cuda", kernel, arguments, architecture, registers, shared, local, stack, budget
            )


def _launched(rows: list[Row], extension: str) -> Iterator[Row]:
    """Yield the rows, all of one architecture, with what their launches tell."""
    architecture = rows[0].architecture
    if not (gpu := gpu_of(architecture)):
        yield from rows
        return
    # cuobjdump takes 25 s for the machine code of an architecture.
    sass = _sass(extension, architecture) if gpu.in_flight else {}
    launched = launches(gpu)
    for row in rows:
        key = row.kernel, row.configuration
        own = launched.get(key, ())
        whole = [replace(launch, shared=launch.shared + row.shared) for launch in own]
        yield row.launched(whole, sass.get(key, ""))


def _sass(extension: str, architecture: str) -> dict[Instance, str]:
    """Return the machine code of every kernel."""
    listing = _run(_cuobjdump(), "-sass", "-arch", architecture, extension)
    _, *parts = re.split(r"Function : (\S+)", listing)
    names = _run("c++filt", stdin="\n".join(parts[::2])).splitlines()
    return {instance(name): code for name, code in zip(names, parts[1::2])}


def _budget(kernel: str, arguments: str) -> int:
    """Return the most registers that a thread of this instance of a kernel may take."""
    lines = _budgets()
    if kernel not in lines:
        raise RuntimeError(f"{kernel} has no line `// registers: N` above it in {KERNELS}")
    plain, *cases = lines[kernel].split("; ")
    budget = int(plain)
    for case in cases:
        registers, pattern = case.split(" for ")
        if fnmatchcase(f"<{arguments}>", pattern):
            budget = int(registers)
    return budget


@functools.cache
def _budgets() -> dict[str, str]:
    """Return the budget line of each kernel of csrc/kernels, such as "96; 128 for <*, 1>"."""
    sources = [path.read_text() for path in sorted(KERNELS.glob("*.cu*"))]
    return {kernel: line for source in sources for line, kernel in BUDGET.findall(source)}


def _cuobjdump() -> str:
    """Return the path of the CUDA toolkit's cuobjdump, or where that is missing of Triton's."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    if found := shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *folders])):
        return found
    if reason := compiler_unsupported_reason():
        raise RuntimeError(f"no cuobjdump: install the CUDA toolkit, or Triton ({reason})")
    from triton import knobs

    return knobs.nvidia.cuobjdump.path


def _run(*command: str, stdin: str | None = None) -> str:
    return subprocess.run(command, input=stdin, check=True, capture_output=True, text=True).stdout
