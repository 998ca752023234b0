"""Every failure as one line, `what was wrong; what would be right`, and an exit status."""

from __future__ import annotations

import errno
import os
import re
import resource
import traceback
from pathlib import Path

LONGEST = 400  # characters of a line
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class Failure(Exception):
    """A Failure ends the command with this message and exit status; without a word where the
    message is empty, as another process says it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def explain(error: BaseException) -> tuple[str, int]:
    """Return (one line, exit status): 2 for what the user can put right, 130 for Ctrl-C, else 1."""
    line = _line(error)
    if isinstance(error, Failure):
        return line if str(error) else "", error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if (number := _errno(error)) in FULL:
        return (
            f"cannot write: {os.strerror(number)}; free some space, files are whole or absent",
            1,
        )
    # torch's has no number.
    told = isinstance(error, RuntimeError) and os.strerror(errno.EMFILE) in str(error)
    if number == errno.EMFILE or told:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too many open files; raise the limit (ulimit -n), which is {limit}", 2
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"needs the package {package}; run in the checkout: pip install '.[train]'", 2
    if isinstance(error, (ValueError, ImportError)) or type(error).__name__ == "BackendUnavailable":
        return line, 2
    if _is_out_of_memory(error):
        return f"out of memory: {line}; use a smaller --batch-size or model", 1
    return f"internal error, please report it: {type(error).__name__}: {line} ({_place(error)})", 1


def _line(error: BaseException) -> str:
    """Return the message's first line, of a ValueError all, as a name in it may hold line breaks;
    the last of an error in a DataLoader's worker, a traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = " ".join(lines) if isinstance(error, ValueError) else lines[0]
    if lines[0].startswith("Caught "):
        line = lines[-1].split(": ", 1)[-1]
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 150]} [...] {line[-150:]}"


def _errno(error: BaseException) -> int:
    """Return the system's error number, 0 for none. safetensors has it in the message only."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _is_out_of_memory(error: BaseException) -> bool:
    # torch is not imported here: CUDA's error is known by its name, the CPU's by its message.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "no traceback"
