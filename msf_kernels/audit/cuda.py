"""The audit of the installed extension's CUDA kernels, for each GPU it was built for."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ..cuda_support import build_config
from ..triton_support import compiler_unsupported_reason
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
    for row in parse(_run("c++filt", stdin=listing)):
        if not architecture or row.architecture == f"sm_{architecture}":
            yield row


def parse(listing: str) -> Iterator[Row]:
    """Yield the rows in what cuobjdump printed, with names demangled."""
    architecture = kernel = arguments = ""
    for line in listing.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function .*?(\w+)<(.*?)>\(", line):
            kernel, arguments = found[1], found[2].replace("msf::", "")
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            budget = _budget(kernel, arguments)
            yield Row(
                "cuda", kernel, arguments, architecture, registers, shared, local, stack, budget
            )


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
