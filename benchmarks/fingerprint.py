"""A short hash of the code behind one of our rows. It tells without git whether that has changed.

It covers a family's operator, its reference, its code for the backend, and what all kernels of the
backend share. It does not cover what all operators share (dispatch, layout, checks).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import msf_kernels

ROOT = Path(__file__).resolve().parents[1]


def family_of(op: str) -> str:
    """Return the folder of an operator in msf_kernels: "adaln" for "gate_residual"."""
    return getattr(msf_kernels, op).__module__.split(".")[1]


@cache
def of_operator(op: str, backend: str, root: Path = ROOT) -> str:
    """Return the hash of the sources behind an operator on a backend."""
    return _hash(_sources(family_of(op), backend, root), root)


@cache
def of_models(root: Path = ROOT) -> str:
    """Return the hash of all sources behind a model."""
    parts = (
        *(root / "msf_kernels").rglob("*.py"),
        *(root / "msf_kernels").rglob("*.json"),
        *(root / "csrc").rglob("*.*"),
        *(root / "python").rglob("*.py"),
    )
    return _hash(parts, root)


def _sources(family: str, backend: str, root: Path) -> set[Path]:
    package, csrc = root / "msf_kernels", root / "csrc"
    files = {
        file
        for file in (package / family).glob("*.py")
        if file.stem.startswith(backend) or not file.stem.startswith(("cuda", "triton", "examples"))
    }
    if backend in ("triton", "cuda"):
        files.add(package / "grid.py")
    if backend == "triton":
        files.update((package / "triton_support").glob("*.py"))
    elif backend == "cuda":
        files.update((package / "cuda_support").glob("*.py"))
        files.update(csrc.glob("*.hpp"), csrc.glob("kernels/*.hpp"), csrc.glob("kernels/*.cuh"))
        files.update(csrc.glob(f"kernels/{family}*.cu"))
    elif backend != "reference":  # another library's attention, after our norm and rotation
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
