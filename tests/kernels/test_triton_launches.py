"""Launches of compiled Triton kernels, which the interpreter does not have."""

from __future__ import annotations

import pytest

from processes import program

pytest.importorskip("triton", minversion="3.6")  # with 3.5 there is no attention


def test_replays_start_what_calls_without_a_plan_start() -> None:
    result = program("triton_replays.py", TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
