"""Commands that run one after the other until a deadline, each with its own limit and log.

Nothing but the standard library is needed here, because the first command may be what installs
everything else.
"""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = "interrupted"
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
# A step that plans by "{minutes}" is told 85 % of its time. The rest is for imports and for a last
# measurement that runs over.
MARGIN = 0.85


@dataclass(frozen=True)
class Step:
    """A Step is one command.

    Args:
        name: the name of the step and of its log.
        command: the command, in which "{minutes}" becomes the time that the step has.
        limit: how many seconds the step may take.
        share: the part of the remaining time that the step may take.
        needs: Python packages without which the step is skipped.
        vital: whether the steps after it do not run if it fails.
    """

    name: str
    command: tuple[str, ...]
    limit: float = math.inf
    share: float = 1.0
    needs: tuple[str, ...] = ()
    vital: bool = False


@dataclass(frozen=True)
class Outcome:
    """An Outcome is what became of a step: "ok", "skipped: why", or what went wrong."""

    step: str
    status: str
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return not self.status.startswith(("ok", "skipped"))


def run_all(
    steps: Sequence[Step], seconds: float, out: Path, after: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Run the steps, with their logs in `out`, and call `after` after each.

    No step starts after so many seconds. Each is told to stop by then, for which it has GRACE.
    After Ctrl-C the step that ran is "interrupted", and those after it do not run.
    """
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    unable = None
    for number, step in enumerate(steps, 1):
        left = deadline - time.monotonic()
        missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
        if unable or left <= 0:
            outcome = Outcome(step.name, f"not run: {unable or 'no time was left'}")
        elif missing:
            outcome = Outcome(step.name, f"skipped: no {', no '.join(missing)}")
        else:
            log = out / f"{number:02d}-{step.name.replace(' ', '-')}.log"
            try:
                outcome = run(step, min(step.limit, step.share * left), log)
            except KeyboardInterrupt:
                outcome, unable = Outcome(step.name, INTERRUPTED), INTERRUPTED
        if step.vital and outcome.failed:
            unable = unable or f"{step.name} failed"
        outcomes.append(outcome)
        after()
    return outcomes


def run(step: Step, seconds: float, log: Path) -> Outcome:
    """Run one step for at most so many seconds; its output goes to the terminal and the log."""
    minutes = f"{MARGIN * seconds / 60:.3f}"
    command = [word.replace("{minutes}", minutes) for word in step.command]
    print(f"\n== {step.name}, at most {seconds:.0f} s: {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # a killed step leaves all that it said
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(step.name, f"failed: {error}")
    copier = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
    copier.start()
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        result = f"failed: stopped after {seconds:.0f} s"
    else:
        result = f"failed: exit status {status}" if status else "ok"
    finally:
        _stop(process)
    copier.join(GRACE)
    return Outcome(step.name, result, time.monotonic() - start)


def _copy(source: IO[bytes], log: Path) -> None:
    """Copy the source to the terminal and the log, as it comes."""
    with source, log.open("wb") as file:
        while block := os.read(source.fileno(), 1 << 16):
            for sink in (file, sys.stdout.buffer):
                sink.write(block)
                sink.flush()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started, which is one process group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(title: str, outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a markdown table."""
    rows = [f"| {o.step} | {o.status} | {o.seconds:.0f} |" for o in outcomes]
    total = f"| all | | {sum(o.seconds for o in outcomes):.0f} |"
    return "\n".join([f"### {title}", "", "| step | status | s |", "|---|---|---|", *rows, total])
