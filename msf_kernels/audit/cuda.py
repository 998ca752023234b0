"""Reads from the installed extension what its CUDA kernels take of each GPU it was built for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ..build import build_config
from .row import Row

# Of 65,536 registers an SM, these leave 682, 512 and 292 threads: what blocks of 256 need at least
# to have loads of others in flight while some wait. Bilinear kernels hold a pixel's neighbours. Of
# adaLN the longest rows take blocks of 512 threads, which 128 just leave.
PLAIN, BILINEAR, BILINEAR_INTERLEAVED, ADALN = 96, 128, 224, 128

# With 512 threads an SM, the heads and gradients that they read at once are 32 KB: more than the
# 20 KB that arrive in the 600 ns of a memory access.
HEADS_BACKWARD = 128

DOUBLE = 255  # which nobody computes in for its speed


def rows(architecture: int | None = None) -> Iterator[Row]:
    """One row for each kernel on this architecture, such as 90, or on each it was built for.

    Raises:
        RuntimeError: there are no CUDA kernels, or no cuobjdump to read them.
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
    """Rows from what cuobjdump prints, with names demangled."""
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
    if kernel.startswith("gate_residual_adaln"):
        return ADALN
    if kernel == "qk_norm_rope_backward_kernel":
        return DOUBLE if arguments.startswith("double") else HEADS_BACKWARD
    bilinear = arguments.endswith(" 1") and ("Layout" in arguments or "merge_kernel" in kernel)
    if not bilinear:
        return PLAIN
    return BILINEAR_INTERLEAVED if "false>" in arguments else BILINEAR


def _cuobjdump() -> str:
    """Of the CUDA toolkit or, on machines with only its compiler, of Triton."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    if found := shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *folders])):
        return found
    try:
        from triton import knobs
    except ImportError:
        raise RuntimeError("no cuobjdump: install the CUDA toolkit or triton") from None
    return knobs.nvidia.cuobjdump.path


def _run(*command: str, stdin: str | None = None) -> str:
    return subprocess.run(command, input=stdin, check=True, capture_output=True, text=True).stdout
