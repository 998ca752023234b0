"""Python in processes of their own: a line of code, a file of `programs/`, or a function."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch

# FSDP2 of old versions of torch runs on GPUs alone.
needs_fsdp2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream(), "record_event"), reason="this torch has no FSDP2 on a CPU"
)

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"


def process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return _run("-c", code, variables=variables)


def program(
    name: str, *arguments: str, first: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a file of `programs/`; packages in the folder `first` come before installed ones."""
    return _run(str(PROGRAMS / name), *arguments, first=first, variables=variables)


def in_two_processes(target: Callable[[int], int]) -> list[int]:
    """The exit statuses of processes that call ``target`` with their rank, as torchrun's would,
    but forked, which saves them importing torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in places.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        sys.exit(target(rank))

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(i,)) for i in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


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
