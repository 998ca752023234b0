"""Kernels with too few bytes in flight to be bound by memory: they wait for its latency.

An H200 moves 4.3 TB/s with a latency of some 700 ns, on 132 multiprocessors: by Little's law each
needs 23 KB in flight. Rates were measured on no other GPU, so there is no limit for others; nor for
attention, which products of matrices bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from .occupancy import gpu_of

if TYPE_CHECKING:
    from .row import Row

# What is under the limit today, as the audit names it, and why.
KNOWN = {
    "cuda sum_over_batch_kernel (*)": "one block an SM: a thread sums over a whole batch",
    "cuda sum_partials_kernel (*, 32)": (
        "the partial sums of a bias are 0.8 to 2.4 MB, of norm weights 0.3, and lie in the L2"
    ),
    "triton qk_norm_rope.sum_kernel (*)": "the partial sums of norm weights are 0.3 MB in all",
    "triton bias_gelu.sum_kernel (*)": "the partial sums of the bias are 1.4 MB in all",
    "triton adaln.sum_kernel (*x384, *)": "few blocks at 384 channels: 23.3 KB",
    "triton adaln.backward_kernel (* bias, *x768, bf16)": "four sums in registers: 21 KB",
    "triton adaln.backward_kernel (*x384, bf16)": "few blocks at 384 channels: 23.3 KB",
    "triton tokens.merge_backward_kernel (*)": "one to three blocks an SM sum over a whole batch",
    "triton pyramid.split_backward_kernel (* of the base, *)": "it writes four bytes for each read",
    "triton pyramid.split_backward_kernel (pyramid_split bilinear, *x62, bf16)": (
        "each division by the deviation is a branch, across which no load moves ahead"
    ),
}


def is_latency_bound(row: Row) -> bool:
    if row.in_flight is None or row.kernel.startswith("attention"):
        return False
    return row.in_flight < _needed(row)


def problem(row: Row) -> str | None:
    """Return what is wrong with a kernel that is under the limit and not known for it."""
    if not is_latency_bound(row) or any(_matches(row, known) for known in KNOWN):
        return None
    return f"has {row.in_flight} bytes of loads in flight on an SM, want at least {_needed(row)}"


def outdated(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what KNOWN says of the kernels in these rows, and no longer holds."""
    rows = [row for row in rows if _needed(row) and row.in_flight is not None]
    audited = {_family(_name(row)) for row in rows}
    for known in KNOWN:
        holds = any(_matches(row, known) and is_latency_bound(row) for row in rows)
        if _family(known) in audited and not holds:
            yield f"{known}: has enough loads in flight, take it off KNOWN in latency_bound.py"


def _needed(row: Row) -> int:
    gpu = gpu_of(row.architecture)
    return gpu.in_flight if gpu else 0


def _matches(row: Row, known: str) -> bool:
    return fnmatchcase(_name(row), known)


def _name(row: Row) -> str:
    return f"{row.backend.split()[0]} {row.kernel} ({row.configuration})"


def _family(name: str) -> str:
    """Return what is audited as a whole: the CUDA kernels, or a family's Triton kernels."""
    backend, kernel, *_ = name.split()
    return backend if backend == "cuda" else kernel.partition(".")[0]
