"""Python in a process of its own: a line of code, or a file of `programs/`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"


def process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return _run("-c", code, variables=variables)


def program(
    name: str, *arguments: str, first: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a file of `programs/`; packages in the folder `first` come before installed ones."""
    return _run(str(PROGRAMS / name), *arguments, first=first, variables=variables)


def kill_all(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process and all that it has started: torchrun's are in no group of its."""
    found = [pid]
    for parent in found:  # grows
        with suppress(FileNotFoundError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
            found += map(int, children.split())
    for process in found:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _run(
    *words: str, variables: Mapping[str, str], first: Path | None = None
) -> subprocess.CompletedProcess[str]:
    paths = [*([str(first)] if first else []), str(HERE), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
