"""Progress where no terminal is, in few lines and none of what is soon done, and on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from typing import Any

import pytest

from msf.progress import SECONDS, Lines, bar, follow, say
from processes import PROGRAMS


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
        f"base: 228 of 400 steps, {rate}, 0:00:40 left",
        f"base: 356 of 400 steps, {rate}, 0:00:10 left",
        f"base: 400 of 400 steps, {rate}",
    ]


def test_what_is_soon_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(follow(range(3), "sample", 3, "batches")) == [0, 1, 2]
    assert not capsys.readouterr().err


def test_where_stderr_is_closed_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(bar("base", 10), Lines)
    say("a line")
    assert not capsys.readouterr().out


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert isinstance(bar("base", 10), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = bar("residual", 10, done=4, row=1)
    shown.update()
    shown.close()
    assert "residual" in capsys.readouterr().err


def screen(output: str) -> list[str]:
    """Return what a terminal shows after this output."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[AJ]|.", output, re.DOTALL):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[A":
            row -= 1
        elif part == "\x1b[J":
            lines[row:] = [lines[row][:column]]
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def shown(statements: list[tuple[int, str]]) -> list[str]:
    """Let processes by number execute statements, one after another, and return their screen."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command, pipe = [sys.executable, str(PROGRAMS / "show_bars.py")], subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=terminal, text=True)
        for _ in range(1 + max(number for number, _ in statements))
    ]
    os.close(terminal)
    for number, statement in statements:
        process = processes[number]
        assert process.stdin and process.stdout
        print(statement, file=process.stdin, flush=True)
        assert process.stdout.readline() == "done\n"
    output = b""
    while select.select([controller], [], [], 0)[0]:
        output += os.read(controller, 10_000)
    for process in processes:
        process.communicate()
    os.close(controller)
    return screen(output.decode())


def test_lines_on_a_terminal_are_above_the_bars() -> None:
    start = [(0, "a = bar('base', 100, done=30)"), (0, "say('data: digits')")]
    line, drawn = shown(start)
    assert line == "data: digits" and drawn.startswith("base:  30%|")
    *lines, last = shown([*start, (0, "a.update(70)"), (0, "a.close()"), (0, "say('end')")])
    assert lines[0] == "data: digits" and lines[1].startswith("base: 100%|")
    assert (lines[2:], last) == (["end"], "")


def test_each_of_two_processes_has_its_row() -> None:
    start = [(0, "a = bar('base', 100, row=0)"), (1, "a = bar('residual', 100, row=1)")]
    first, second = shown(start)
    assert first.startswith("base:   0%|") and second.startswith("residual:   0%|")
    lines = shown(
        [
            *start,
            (1, "say('a line of the second')"),
            (0, "say('a line of the first')"),
            (1, "a.update(100)"),
            (0, "a.update(61)"),
            (1, "a.close()"),
            (1, "say('the second ends')"),
            (0, "a.update(39)"),
            (0, "a.close()"),
        ]
    )
    assert lines[:2] == ["a line of the second", "a line of the first"]
    assert lines[2].startswith("residual: 100%|") and lines[3] == "the second ends"
    assert lines[4].startswith("base: 100%|") and lines[5:] == [""]
