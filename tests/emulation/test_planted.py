"""Bugs planted in a kernel are caught; the kernel without them is clean."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .build import VARIANTS, build, environment

SOURCE = Path(__file__).parent / "planted.cpp"

# Each is caught in every order. Only TSan sees the first four for sure: what the kernel computes
# is right in some orders, of the second and the fourth in all that were tried.
CAUGHT = [
    ("missing_barrier", "tsan", "ThreadSanitizer: data race"),
    ("missing_barrier_before_reuse", "tsan", "ThreadSanitizer: data race"),
    ("missing_syncwarp", "tsan", "ThreadSanitizer: data race"),
    ("race_between_blocks", "tsan", "ThreadSanitizer: data race"),
    ("small_shared_array", "asan", "AddressSanitizer: heap-buffer-overflow"),
    ("row_past_the_end", "asan", "AddressSanitizer: heap-buffer-overflow"),
    ("divergent_barrier", "plain", "64 threads wait in __syncthreads"),
]
ORDERS = ["fifo", "lifo", "random:1", "random:2"]


def run(bug: str, variant: str, order: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [build([SOURCE], variant, definitions=[f"BUG={bug}"])],
        env=os.environ | environment(variant) | {"MSF_EMULATION_ORDER": order},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("bug", "variant", "report"), CAUGHT, ids=[row[0] for row in CAUGHT])
def test_bug_is_caught(bug: str, variant: str, report: str, order: str) -> None:
    result = run(bug, variant, order)
    said = result.stdout + result.stderr
    assert result.returncode
    assert report in said
    assert "planted.cuh:" in said  # and where


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernel_without_bugs_is_clean(variant: str, order: str) -> None:
    result = run("none", variant, order)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")
