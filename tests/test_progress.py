"""Progress where no terminal is: few lines, and none of what is soon done."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from msf.progress import SECONDS, Lines, bar, follow


def test_a_line_now_and_then_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = Lines("base", 400, done=100, clock=lambda: now)
    for _ in range(300):
        now += SECONDS / 128  # a number that sums without rounding
        lines.set_postfix(loss="1.5")
        lines.update()
    lines.close()
    said = capsys.readouterr().err.splitlines()
    rate = f"{128 / SECONDS:.3g} steps/s, loss 1.5"
    assert said == [
        f"base: 228 of 400 steps, {rate}",
        f"base: 356 of 400 steps, {rate}",
        f"base: 400 of 400 steps, {rate}",
    ]


def test_what_is_soon_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(follow(range(3), "sample", 3, "batches")) == [0, 1, 2]
    assert not capsys.readouterr().err


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert isinstance(bar("base", 10), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = bar("residual", 10, done=4, row=1)
    shown.update()
    shown.close()
    assert "residual" in capsys.readouterr().err
