"""Run a command, interrupt it as soon as a file appears, and exit with 0 if it ended with 130."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .parser import Parser

STOPPED = 130  # exit status of a command that Ctrl-C ended: 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.interrupt", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("command", nargs="...")
    args = parser.parse_args(argv)
    # In a shell's background it is ignored, which the command would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(args.command)
    while process.poll() is None and not args.file.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    if (status := process.wait()) == STOPPED:
        return 0
    print(f"benchmarks.interrupt: the command ended with {status}, not with {STOPPED}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
