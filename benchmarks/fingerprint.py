"""A short hash of the code behind a row of ours, which tells without git whether it has changed.

It covers more than the kernel that ran: a family's modules, its kernels and what kernels of the
backend share. Code that is not covered (checks, dispatch, launchers) costs the host time and leaves
the device's as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import msf_kernels

ROOT = Path(__file__).resolve().parents[1]


def family_of(op: str) -> str:
    """The folder of an operator in msf_kernels: "adaln" of "gate_residual"."""
    return getattr(msf_kernels, op).__module__.split(".")[1]


@cache
def of_operator(op: str, backend: str, root: Path = ROOT) -> str:
    """Of an operator on one of its backends."""
    return _hash(_sources(family_of(op), backend, root), root)


@cache
def of_models(root: Path = ROOT) -> str:
    """Of all operators, the tables by which they choose their backends, and the transformer."""
    parts = (
        *(root / "msf_kernels").rglob("*.py"),
        *(root / "msf_kernels").rglob("*.json"),
        *(root / "csrc").rglob("*.*"),
        root / "python" / "msf" / "transformer.py",
    )
    return _hash(parts, root)


def _sources(family: str, backend: str, root: Path) -> set[Path]:
    package, csrc = root / "msf_kernels", root / "csrc"
    files = set((package / family).glob("*.py"))
    if backend == "triton":
        files.update((package / "triton_support").glob("*.py"))
    elif backend == "cuda":
        files.update(csrc.glob("*.hpp"), csrc.glob("kernels/*.cuh"))
        files.update(csrc.glob(f"kernels/{family}*.cu"))
    elif backend != "reference":  # another library's attention: ours is the norm and rotation
        for kernels in ("triton", "cuda"):
            files |= _sources("qk_norm_rope", kernels, root)
    return files


def _hash(files: Iterable[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(
            file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0"
        )
    return digest.hexdigest()[:12]
